"""Which tensors are quantized, for which target: the plan that calibration and insertion share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import numpy as np

from cnnedge.errors import ModelError
from cnnedge.graph.edit import (
    WEIGHTED,
    WEIGHTED_OR_TRANSPOSED,
    all_nodes,
    constant,
    made_by,
    main_nodes,
    name_of,
    operand,
    optional_operand,
    single_consumer,
)
from cnnedge.graph.image_part import image_part

if TYPE_CHECKING:
    import onnx_ir as ir

# A dense layer with fewer outputs than this gains nothing from int8 and decides the answer.
SMALLEST_DENSE = 16
_TOLD = 2  # layers that a message names
ASKED_FOR = "asked for"  # why a layer stays float that could be quantized
# Moves values without computing any: result and operand share one scale.
SAME_SCALE = frozenset({"MaxPool", "Flatten", "Reshape", "Squeeze", "Unsqueeze", "Transpose"})
# Computes in int8 on CPU runtimes when operands and result are quantized.
CPU_ARITHMETIC = frozenset({"Add", "Concat", "GlobalAveragePool", "AveragePool"})


class NoInt8Error(ModelError):
    """No layer of a network can compute in int8."""


@dataclass(frozen=True, kw_only=True)
class Target:
    """The contract of a family of runtimes.

    Attributes:
        name: "cpu" or "trt".
        symmetric: Activations are int8 with zero point 0; else uint8 with a zero point.
        quantizes_bias: Biases are int32 with scale ``s_x * s_w``; else they stay float.
        takes_uint8: A uint8 image scaled by one factor feeds the first layer as it is.
        output_channel_first: Dense kernels are stored ``[out, in]`` so that weight scales run
            along axis 0.
        weight_limit: The largest magnitude of a quantized weight.
        float16: What stays float is FP16, scales included.
    """

    name: Literal["cpu", "trt"]
    symmetric: bool = False
    quantizes_bias: bool = False
    takes_uint8: bool = False
    output_channel_first: bool = False
    weight_limit: int = 127
    float16: bool = False


CPU = Target(name="cpu", quantizes_bias=True, takes_uint8=True)
# uint8 × int8 products are summed in saturating 16-bit pairs where the CPU has no dot-product
# instruction (VNNI); weights of 7 bits cannot saturate them.
CPU_REDUCED = replace(CPU, weight_limit=63)
TRT = Target(name="trt", symmetric=True, output_channel_first=True, float16=True)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What to quantize in one graph for one target.

    Attributes:
        target: The contract that the plan follows.
        compute: Names of the weighted nodes that will compute in int8.
        tensors: Names of activations that get a Q/DQ pair, in graph order.
        folded: Names of Relu/Clip nodes that the quantized result's clamp replaces.
        shares: For a tensor, the one whose scale it must have.
        skipped: Weighted nodes left in float, and why.
        pixels: Names of the activations that are the image itself, normalized.
    """

    target: Target
    compute: tuple[str, ...]
    tensors: tuple[str, ...]
    folded: tuple[str, ...]
    shares: Mapping[str, str]
    skipped: Mapping[str, str]
    pixels: frozenset[str]

    def scale_source(self, tensor: str) -> str:
        """Return the tensor whose range gives the scale of ``tensor``."""
        while tensor in self.shares:
            tensor = self.shares[tensor]
        return tensor


def make_plan(
    model: ir.Model,
    target: Target,
    *,
    keep_float: frozenset[str] = frozenset(),
    unfit: Mapping[str, str] | None = None,
) -> Plan:
    """Decide what is quantized.

    Args:
        model: An FP32 ``onnx_ir.Model`` whose layers bear names.
        target: The contract to follow.
        keep_float: Names of weighted nodes to leave in float.
        unfit: Names of weighted nodes that were found not to be quantizable, and why.

    Raises:
        NoInt8Error: no layer can compute in int8.
    """
    compute: list[str] = []
    skipped: dict[str, str] = {}
    quantized: dict[str, ir.Value] = {}  # by the tensor's name
    for node in all_nodes(model):
        if node.op_type not in WEIGHTED_OR_TRANSPOSED:
            continue
        name, image = name_of(node), operand(node, 0)
        reason = (unfit or {}).get(name) or _unfit(node, model, target)
        reason = ASKED_FOR if name in keep_float else reason
        if reason:
            skipped[name] = reason
            continue
        compute.append(name)
        quantized.setdefault(name_of(image), image)
    if not compute:
        reasons = brief(skipped)
        raise NoInt8Error(
            f"no layer of this network can compute in int8 ({reasons or 'none has weights'})",
            fix="leave int8 out: --precision fp32,fp16",
        )
    shares, folded = _plan_cpu(model, compute, quantized) if target.name == "cpu" else ({}, [])
    return Plan(
        target=target,
        compute=tuple(compute),
        tensors=tuple(name for name in map(name_of, _values(model)) if name in quantized),
        folded=tuple(folded),
        shares=shares,
        skipped=skipped,
        pixels=frozenset(name_of(node.outputs[0]) for node in image_part(model)),
    )


def brief(kept: Mapping[str, str]) -> str:
    """Return the first few layers that stay float, each with its reason, on one short line."""
    told = "; ".join(f"{name}: {why}" for name, why in list(kept.items())[:_TOLD])
    return told + (f"; and {len(kept) - _TOLD} more" if len(kept) > _TOLD else "")


def _plan_cpu(
    model: ir.Model, compute: list[str], quantized: dict[str, ir.Value]
) -> tuple[dict[str, str], list[str]]:
    """Extend what is quantized so that whole int8 operations form, as CPU runtimes fuse them.

    Returns:
        For a tensor, the one whose scale it must have; and the clamps that are folded.
    """
    # An integer convolution exists only with an int8 result, and a dense layer whose Relu is left
    # to itself is fused into a float one; the last layer's scores go to the softmax in float.
    for node in main_nodes(model, *WEIGHTED):
        result = _behind_clamp(node)
        if node.name in compute and not _feeds_softmax(result):
            quantized.setdefault(name_of(result), result)
    integer: set[str | None] = {*compute}
    shares: dict[str, str] = {}
    # Values move and add in int8 where what feeds them is int8 already, so in graph order.
    for node in main_nodes(model):
        data = [value for value in node.inputs if value is not None and constant(value) is None]
        if any(value.name not in quantized for value in data):
            continue
        if node.op_type in SAME_SCALE and not node.outputs[0].is_graph_output():
            result = node.outputs[0]
            shares[name_of(result)] = name_of(data[0])
        elif node.op_type in CPU_ARITHMETIC and len(data) == len(node.inputs):
            result = _behind_clamp(node)
        else:
            continue
        if not result.is_graph_output():
            quantized.setdefault(name_of(result), result)
            integer.add(node.name)
    folded = []
    for node in main_nodes(model, "Relu", "Clip"):
        producer = operand(node, 0).producer()
        if producer is None or producer.name not in integer:
            continue
        if _behind_clamp(producer) is node.outputs[0] and node.outputs[0].name in quantized:
            folded.append(name_of(node))
    return shares, folded


def _behind_clamp(node: ir.Node) -> ir.Value:
    """Return a node's result, or that of the one Relu or Relu6 behind it."""
    result = node.outputs[0]
    clamp = single_consumer(result)
    if clamp is not None and clamp.op_type in {"Relu", "Clip"} and clamp.inputs[0] is result:
        return clamp.outputs[0]
    return result


def _feeds_softmax(value: ir.Value) -> bool:
    return value.is_graph_output() or any(user.op_type == "Softmax" for user, _ in value.uses())


def _unfit(node: ir.Node, model: ir.Model, target: Target) -> str | None:
    """Return why a weighted node cannot compute in int8, or None."""
    weight = constant(node.inputs[1])
    if weight is None:
        return "its second operand is no constant"
    if made_by(node.inputs[0], "Softmax") is not None:
        return "it reads a softmax, which stays float"
    if node.graph is not model.graph:
        return "it is computed inside a loop or a branch"
    bias = constant(optional_operand(node, 2))
    # NaN is left to calibration, which refuses it by name; an infinite bias may give finite values.
    if np.isinf(weight).any() or (bias is not None and np.isinf(bias).any()):
        return "its weights are not finite"
    if node.op_type == "ConvTranspose":
        return "a transposed convolution, which is not quantized"
    if node.op_type == "Conv":
        if weight.shape[0] == 1:
            return "1 output channel, which gains nothing from int8"
        # On CPUs an integer convolution has an integer result, and a softmax wants a float one.
        if target.quantizes_bias and _feeds_softmax(_behind_clamp(node)):
            return "its result goes to a softmax, which stays float"
        return None
    if weight.ndim != 2 or node.op_type == "MatMul":
        return "not a dense layer over [N, features]"
    outputs = weight.shape[1]
    return f"{outputs} outputs, fewer than {SMALLEST_DENSE}" if outputs < SMALLEST_DENSE else None


def _values(model: ir.Model) -> list[ir.Value]:
    return [*model.graph.inputs, *(v for node in model.graph for v in node.outputs)]
