"""Hold a built engine against the ONNX graph that it was built from.

What was asked stands in the graph; what was built, in the engine. A builder may put a layer into a
higher precision without a word (TensorRT-RTX computes INT8 convolutions in FP16 as soon as one of
the plan's GPUs lacks them), and a quantizer set between a convolution and its Relu costs the fusion
of the two. Both are found here, layer by layer.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from cnnedge.backends.tensorrt.layers import (
    UNKNOWN,
    EngineDescription,
    EngineLayer,
    EngineTensor,
)
from cnnedge.graph.edit import constant, made_by, name_of, optional_operand
from cnnedge.graph.precision import WeightedLayer, dtype_name, shares, weighted_layers

if TYPE_CHECKING:
    import onnx_ir as ir

_FLOATS = ("float32", "float16", "bfloat16")
_MULTIPLIED = {*_FLOATS, "int8", "float8"}  # what kernels of weights come in


@dataclass(frozen=True)
class Fusion:
    """Where an engine computes a convolution's Relu.

    Attributes:
        convolution: The convolution's node.
        activation: The Relu's.
        where: "one kernel": in the convolution's; "a second pass": in the kernel that reads its
            result, which also scales, adds the bias and quantizes again; "requantized": behind a
            quantizer of the convolution's result; "apart": further on.
    """

    convolution: str
    activation: str
    where: str

    @property
    def accepted(self) -> bool:
        """Whether the Relu costs no pass over memory beyond those that the data types cost."""
        return self.where in {"one kernel", "a second pass"}


@dataclass(frozen=True)
class _Kernel:
    """The layer of an engine that multiplies with certain weights, and those weights."""

    layer: EngineLayer
    weights: EngineTensor


@dataclass(frozen=True)
class EngineReport:
    """What was read back from an engine.

    Attributes:
        source: Where from: "engine inspector" or "builder log".
        layers: Every layer: its name, kind and profile, the type it computes in, and the nodes of
            the ONNX graph that it computes.
        counts: How many layers each profile has.
        tensors: Inputs and outputs: name, mode, dimensions and type.
        weight_bytes: The weights, as the library counts them, or None.
        achieved: Share of MACs and of weights per data type, in the first profile.
        layer_types: Share of the layers, by the type that each computes in.
        fusions: Of every convolution with a Relu.
        violations: What is not as the graph asks, one line each; empty: nothing.
    """

    source: str
    layers: tuple[dict[str, Any], ...]
    counts: tuple[int, ...]
    tensors: tuple[dict[str, Any], ...]
    weight_bytes: int | None
    achieved: dict[str, dict[str, float]]
    layer_types: dict[str, float]
    fusions: tuple[Fusion, ...]
    violations: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return it as JSON-able data."""
        return asdict(self)


def check_engine(
    model: ir.Model,
    description: EngineDescription,
    *,
    profiles: int,
    source: str,
    weight_bytes: int | None,
) -> EngineReport:
    """Hold an engine against its graph.

    Args:
        model: The ``onnx_ir.Model``.
        description: The engine, as read back.
        profiles: How many optimisation profiles it has.
        source: Where the description comes from.
        weight_bytes: The weights as the library counts them.
    """
    by_profile = [
        [layer for layer in description.layers if layer.profile == p] for p in range(profiles)
    ]
    asked = weighted_layers(model)
    pairs = list(_activations(model))
    violations: list[str] = []
    built: list[WeightedLayer] = []
    fusions: list[Fusion] = []
    for index, layers in enumerate(by_profile):
        where = f" (profile {index})" if profiles > 1 else ""
        kernels = {layer.name: _kernel(layer, layers) for layer in asked}
        found = [(layer, _as_built(layer, kernels[layer.name])) for layer in asked]
        fused = [_fusion(pair, layers, kernels.get(pair[0])) for pair in pairs]
        violations += [line + where for line in _precision_violations(found)]
        violations += [line + where for line in _fusion_violations(fused)]
        if index == 0:
            built = [new for _, new in found if new is not None]
            fusions = fused
    violations += _tensor_violations(model, description)
    types = Counter(_compute_type(layer) for layer in by_profile[0])
    total = sum(types.values()) or 1
    return EngineReport(
        source=source,
        layers=tuple(
            {
                "name": layer.name,
                "kind": layer.kind,
                "profile": layer.profile,
                "computes_in": _compute_type(layer),
                "nodes": list(layer.origins),
            }
            for layer in description.layers
        ),
        counts=tuple(len(layers) for layers in by_profile),
        tensors=tuple(
            {"name": t.name, "mode": mode, "dims": list(t.dims), "dtype": t.dtype}
            for t, mode in description.tensors
        ),
        weight_bytes=weight_bytes,
        achieved=shares(built),
        layer_types={name: count / total for name, count in types.most_common()},
        fusions=tuple(fusions),
        violations=tuple(violations),
    )


def _kernel(asked: WeightedLayer, layers: Sequence[EngineLayer]) -> _Kernel | None:
    """Find the kernel that multiplies with a layer's weights, among those that bear its name.

    The weights are the constant that has as many values or more (they are padded), the smallest of
    those; or, where the engine converts them first, an operand of that size.
    """
    named = [layer for layer in layers if asked.name in layer.origins]
    for operands in (lambda layer: layer.constants, lambda layer: layer.inputs[1:]):
        fitting = [
            _Kernel(layer, tensor)
            for layer in named
            for tensor in operands(layer)
            if tensor.dtype in _MULTIPLIED and tensor.size >= asked.weights
        ]
        if fitting:
            return min(fitting, key=lambda kernel: kernel.weights.size)
    return None


def _as_built(asked: WeightedLayer, kernel: _Kernel | None) -> WeightedLayer | None:
    """Return a layer with the types that the engine has it in; None where it is not in there."""
    if kernel is None:
        return None
    stored = kernel.weights.dtype
    return replace(asked, stored=stored, computed=_computed(stored, kernel.layer))


def _computed(stored: str, layer: EngineLayer) -> str:
    """Return what a kernel multiplies in: INT8 takes both operands."""
    if stored in _FLOATS or any(t.dtype == stored for t in layer.inputs):
        return stored
    return next((t.dtype for t in layer.inputs if t.dtype in _FLOATS), UNKNOWN)


def _compute_type(layer: EngineLayer) -> str:
    """Return the type of what a layer reads: of its weights where it has any."""
    weights = [t for t in layer.constants if t.dtype in _MULTIPLIED]
    if weights:
        return _computed(max(weights, key=lambda t: t.size).dtype, layer)
    return layer.inputs[0].dtype if layer.inputs else "none"


def _precision_violations(
    found: Sequence[tuple[WeightedLayer, WeightedLayer | None]],
) -> Iterator[str]:
    for asked, built in found:
        if built is None:
            yield f"{asked.name}: no kernel of the engine has its weights"
        elif built.computed != asked.computed:
            yield f"{asked.name}: {asked.computed} was asked for, and {built.computed} was built"


def _fusion_violations(fusions: Sequence[Fusion]) -> Iterator[str]:
    for fusion in fusions:
        if fusion.where == "requantized":
            yield (
                f"{fusion.convolution}: a quantizer stands between it and {fusion.activation}, "
                "which breaks their fusion"
            )
        elif not fusion.accepted:
            yield f"{fusion.convolution}: {fusion.activation} was built as a kernel of its own"


def _tensor_violations(model: ir.Model, description: EngineDescription) -> Iterator[str]:
    """Compare the names and types of inputs and outputs."""
    theirs = {tensor.name: tensor.dtype for tensor, _ in description.tensors}
    for value in (*model.graph.inputs, *model.graph.outputs):
        name, asked = name_of(value), "?" if value.dtype is None else dtype_name(value.dtype)
        if theirs.get(name) != asked:
            yield f"{name}: {asked} in the graph, {theirs.get(name, 'missing')} in the engine"


def _activations(model: ir.Model) -> Iterator[tuple[str, str, tuple[str, ...]]]:
    """Yield each convolution with a Relu behind it: their names, and any quantizers between."""
    for node in model.graph:
        if node.op_type != "Relu":
            continue
        between: list[str] = []
        value = node.inputs[0]
        while (pair := made_by(value, "QuantizeLinear", "DequantizeLinear")) is not None:
            between.append(name_of(pair))
            value = pair.inputs[0]
        if (before := made_by(value, "Conv")) is not None:
            yield name_of(before), name_of(node), tuple(between)


def _fusion(
    pair: tuple[str, str, tuple[str, ...]], layers: Sequence[EngineLayer], kernel: _Kernel | None
) -> Fusion:
    convolution, activation, between = pair
    homes = [layer for layer in layers if activation in layer.origins]
    if any(set(between) & set(layer.origins) for layer in homes):
        return Fusion(convolution, activation, "requantized")
    if kernel is not None and kernel.layer in homes:
        return Fusion(convolution, activation, "one kernel")
    results = set() if kernel is None else {tensor.name for tensor in kernel.layer.outputs}
    behind = any(results & {tensor.name for tensor in layer.inputs} for layer in homes)
    return Fusion(convolution, activation, "a second pass" if behind else "apart")


def refusal_causes(model: ir.Model) -> dict[str, str]:
    """Return for each node that TensorRT may refuse what about it is the cause, in words.

    Asked for where a parser refused one of them: its own message names the node, not our reason.
    """
    return {name_of(node): cause for node in model.graph if (cause := _refusal_cause(node))}


def _refusal_cause(node: ir.Node) -> str | None:
    if node.domain not in {"", "ai.onnx"}:
        return f"{node.op_type} is ONNX Runtime's own operation: build int8-trt or fp16 instead"
    if node.op_type in {"QuantizeLinear", "DequantizeLinear"}:
        zero = constant(optional_operand(node, 2))
        if zero is not None and zero.any():
            return (
                f"its zero point is {int(zero.reshape(-1)[0])}, as CPUs want it: "
                "build the int8-trt variant"
            )
    takes = [v.dtype.name for v in node.inputs if v is not None and v.dtype is not None]
    if "UINT8" in takes and node.op_type != "Cast":
        return "it works on uint8 values, as graphs for CPUs do: build int8-trt, fp16 or fp32"
    return None
