"""FP32 graph → FP16 graph: the network in half precision, its ends in single.

The image's normalization, the softmax and what makes the output stay FP32 (a normalized pixel in
FP16 keeps 11 bits, its scale would lose some of them; an FP16 softmax, or a mean of such, rounds
the very numbers that are compared). The same pass serves the graph with Q/DQ pairs that TensorRT
takes, whose scales must then be FP16 too.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from cnnedge.graph.edit import constant, initializer, rename_initializer

LARGEST = 65504.0  # the largest finite FP16
# LRN sums squares, which leave FP16's range; Resize takes its scales as float32 by definition.
KEEP_FLOAT32 = frozenset({"Softmax", "LRN", "Resize"})
WEIGHTED = frozenset({"Conv", "Gemm", "MatMul"})


@dataclass(frozen=True)
class Float16Graph:
    """An FP16 graph, and the weights whose values FP16 cannot hold.

    Attributes:
        model: The ``onnx_ir.Model``.
        clipped: Names of initializers with a value beyond ±65504, which was clipped.
    """

    model: Any
    clipped: tuple[str, ...]


def to_float16(model: Any) -> Float16Graph:
    """Return an FP16 copy of an ``onnx_ir.Model``; input and output keep their types."""
    import onnx_ir as ir

    single, half = ir.DataType.FLOAT, ir.DataType.FLOAT16
    copy = model.clone()
    casts: dict[tuple[int, Any], Any] = {}
    halves: dict[str, Any] = {}
    clipped = []

    def as_type(value: Any, wanted: Any, before: Any) -> Any:
        if (id(value), wanted) not in casts:
            suffix = "half" if wanted == half else "single"
            cast = ir.node("Cast", [value], {"to": wanted}, name=f"{value.name}/{suffix}")
            cast.outputs[0].name = cast.name
            cast.outputs[0].shape, cast.outputs[0].type = value.shape, ir.TensorType(wanted)
            copy.graph.insert_before(before, cast)
            casts[id(value), wanted] = cast.outputs[0]
        return casts[id(value), wanted]

    def half_constant(value: Any) -> Any:
        if value.name not in halves:
            array = constant(value)
            assert array is not None
            if np.abs(array).max(initial=0.0) > LARGEST:
                clipped.append(value.name)
            narrow = np.clip(array, -LARGEST, LARGEST).astype(np.float16)
            halves[value.name] = initializer(copy, f"{value.name}/half", narrow)
        return halves[value.name]

    for node in list(copy.graph):
        wanted = single if _stays_single(node) else half
        for index, value in enumerate(node.inputs):
            if value is None or value.dtype not in (single, half) or value.dtype == wanted:
                continue
            if constant(value) is not None:
                node.replace_input_with(index, half_constant(value))
            else:
                node.replace_input_with(index, as_type(value, wanted, node))
        if wanted == half:
            if node.op_type == "Cast" and node.attributes["to"].as_int() == single:
                node.attributes["to"] = ir.AttrInt64("to", half)
            for value in node.outputs:
                if value.dtype == single:
                    if value.is_graph_output():
                        _widen_output(copy, value)
                    value.type = ir.TensorType(half)
    for name in list(halves):
        original = copy.graph.initializers[name]
        if not original.uses():
            del copy.graph.initializers[name]
            rename_initializer(copy.graph, halves[name], name)
    return Float16Graph(copy, tuple(clipped))


def _widen_output(model: Any, value: Any) -> None:
    """Let a cast to FP32 give the graph's output in the place of ``value``."""
    import onnx_ir as ir

    graph, node = model.graph, value.producer()
    cast = ir.node("Cast", [value], {"to": ir.DataType.FLOAT}, name=f"{node.name}/single")
    given = cast.outputs[0]
    given.shape, given.type, given.name = value.shape, value.type, value.name
    value.name = node.name
    graph.outputs[list(graph.outputs).index(value)] = given
    graph.insert_after(node, cast)


def _stays_single(node: Any) -> bool:
    is_pair = node.op_type in {"QuantizeLinear", "DequantizeLinear"}
    is_normalization = bool(node.name) and node.name.startswith("image/") and not is_pair
    gives = node.op_type not in WEIGHTED and any(v.is_graph_output() for v in node.outputs)
    return is_normalization or gives or node.op_type in KEEP_FLOAT32
