"""The precision that a graph achieves, read from the graph itself, never from what was asked."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from cnnedge.graph.edit import (
    WEIGHTED_OR_TRANSPOSED,
    constant,
    inner_graphs,
    made_by,
    name_of,
    operand,
    stored,
)

if TYPE_CHECKING:
    import onnx_ir as ir


def achieved_precision(model: ir.Model) -> dict[str, dict[str, float]]:
    """Return the share of MACs and of weights that each data type has in a graph.

    A layer counts as int8 only if its kernel *and* its image operand come through
    DequantizeLinear: with one of them float, runtimes compute in float. MatMulNBits stores weights
    in 4 or 8 bits and computes in int8 where its ``accuracy_level`` is 4, quantizing activations as
    they come.

    Args:
        model: An ``onnx_ir.Model`` that bears the shapes of its results.

    Returns:
        ``{"macs": {"int8": 0.99, "float32": 0.01}, "weights": {…}}``; each sums to 1.
    """
    return shares(weighted_layers(model))


@dataclass(frozen=True)
class WeightedLayer:
    """A convolution or a dense layer by what it computes in.

    Attributes:
        name: The node's name.
        op_type: "Conv", "ConvTranspose", "Gemm", "MatMul" or "MatMulNBits".
        weights: How many weights its kernel has.
        macs: Multiplications for one image.
        stored: The data type its weights are stored in.
        computed: The data type it multiplies in.
        kernel: The constant that holds its weights; layers that share one store it once.
    """

    name: str
    op_type: str
    weights: int
    macs: int
    stored: str
    computed: str
    kernel: str


def weighted_layers(model: ir.Model) -> list[WeightedLayer]:
    """Return the layers of a graph that have weights, in its order."""
    layers = []
    for node, times in _nodes(model.graph):
        if node.op_type == "MatMulNBits":
            size = node.attributes["K"].as_int() * node.attributes["N"].as_int()
            dtype = f"int{node.attributes['bits'].as_int()}"
            computed = "int8" if node.attributes["accuracy_level"].as_int() == 4 else "float32"
            macs, kernel = size, operand(node, 1)
        elif node.op_type in WEIGHTED_OR_TRANSPOSED and (weights := _kernel(node)) is not None:
            kernel, tensor = weights, stored(weights)
            size = int(np.prod(tensor.shape.numpy()))
            dtype = dtype_name(tensor.dtype)
            computed = _compute_type(node, dtype)
            macs = size * _positions(node) * times
        else:
            continue
        name, op_type = name_of(node), node.op_type
        layers.append(WeightedLayer(name, op_type, size, macs, dtype, computed, name_of(kernel)))
    return layers


def shares(layers: Iterable[WeightedLayer]) -> dict[str, dict[str, float]]:
    """Return the share of MACs and of weights of each data type; each sums to 1."""
    macs: Counter[str] = Counter()
    weights: Counter[str] = Counter()
    kernels = set()
    for layer in layers:
        macs[layer.computed] += layer.macs
        if layer.kernel not in kernels:
            weights[layer.stored] += layer.weights
        kernels.add(layer.kernel)
    return {"macs": _shares(macs), "weights": _shares(weights)}


def _kernel(node: ir.Node) -> ir.Value | None:
    """Return the constant that holds a layer's weights, or None where they are none."""
    value = operand(node, 1)
    dequantize = made_by(value, "DequantizeLinear")
    value = value if dequantize is None else operand(dequantize, 0)
    return value if value.is_initializer() else None


def _compute_type(node: ir.Node, dtype: str) -> str:
    from_integer = made_by(operand(node, 0), "DequantizeLinear") is not None
    return dtype if dtype != "int8" or from_integer else "float32"


def dtype_name(dtype: ir.DataType) -> str:
    """Return the name of a data type; ONNX's FLOAT is float32."""
    return "float32" if dtype.name == "FLOAT" else dtype.name.lower()


def _positions(node: ir.Node) -> int:
    """Return at how many places of the image a kernel is applied: 1 for a dense layer."""
    if node.op_type not in {"Conv", "ConvTranspose"}:
        return 1
    shape = (node.outputs[0] if node.op_type == "Conv" else operand(node, 0)).shape
    return int(np.prod([d for d in shape.dims[2:] if isinstance(d, int)])) if shape else 1


def _nodes(graph: ir.Graph, times: int = 1) -> Iterator[tuple[ir.Node, int]]:
    """Yield every node, and how often it runs for one image: in a loop of known length so often."""
    for node in graph:
        yield node, times
        count = constant(node.inputs[0]) if node.op_type == "Loop" else None
        for body in inner_graphs(node):
            yield from _nodes(body, times * (1 if count is None else int(count)))


def _shares(counts: Counter[str]) -> dict[str, float]:
    total = sum(counts.values()) or 1
    return {name: count / total for name, count in counts.most_common()}
