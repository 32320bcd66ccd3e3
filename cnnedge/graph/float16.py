"""FP32 graph → FP16 graph: the network in half precision, its ends in single.

The image's normalization, the softmax and what makes the output stay FP32 (a normalized pixel in
FP16 keeps 11 bits, its scale would lose some of them; an FP16 softmax, or a mean of such, rounds
the very numbers that are compared). So does an operation that ONNX has for FP32 alone, or whose
weights FP16 cannot hold, with casts around it.
The same pass serves the graph with Q/DQ pairs that TensorRT takes, whose scales must then be FP16
too. Bodies of loops and branches are converted like the graph around them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from cnnedge.graph.edit import (
    WEIGHTED,
    constant,
    describe_like,
    initializer,
    inner_graphs,
    maker,
    name_of,
    rename_initializer,
)
from cnnedge.graph.image_part import image_part
from cnnedge.graph.passes import PassResult, named_in_errors, settle_names

if TYPE_CHECKING:
    import onnx_ir as ir

LARGEST = 65504.0  # the largest finite FP16
# LRN sums squares, which leave FP16's range; Resize takes its scales as float32 by definition.
KEEP_FLOAT32 = frozenset({"Softmax", "LRN", "Resize"})
_BOUNDS = frozenset({"Min", "Max", "Clip"})  # a bound that no FP16 reaches bounds nothing


@dataclass(frozen=True)
class Float16Graph(PassResult):
    """An FP16 graph, and what of it is FP32 for want of an FP16 form.

    Attributes:
        kept_float: Names of such nodes, and why each is.
    """

    kept_float: Mapping[str, str]


@named_in_errors
def to_float16(model: ir.Model) -> Float16Graph:
    """Return an FP16 copy of an ``onnx_ir.Model``; input and output keep their types."""
    copy = model.clone()
    conversion = _Conversion(copy)
    conversion.convert(copy.graph)
    conversion.drop_singles()
    settle_names(copy)
    modified = conversion.halved or bool(conversion.halves or conversion.casts)
    return Float16Graph(copy, modified, conversion.kept_float)


class _Conversion:
    """Converts a model's graphs in place, the outer one first."""

    def __init__(self, model: ir.Model) -> None:
        import onnx_ir as ir

        self.single, self.half = ir.DataType.FLOAT, ir.DataType.FLOAT16
        self.model = model
        self.normalization = image_part(model)
        self.kept_float: dict[str, str] = {}
        self.casts: dict[tuple[int, int], ir.Value] = {}
        # A constant and its copy, by the former's id.
        self.halves: dict[int, tuple[ir.Value, ir.Value]] = {}
        self.halved = False  # whether any result was

    def convert(self, graph: ir.Graph) -> None:
        """Convert a graph's nodes in their order; what it reads from outside is converted."""
        for node in list(graph):
            wanted = self.single if self.stays_single(node) else self.half
            for index, value in enumerate(node.inputs):
                if value is not None and value.dtype in (self.single, self.half):
                    node.replace_input_with(index, self.as_type(value, wanted, node))
            if wanted == self.single:
                continue
            for body in inner_graphs(node):
                self.convert_body(body)
            _give_half(node)
            for value in node.outputs:
                if value.dtype == self.single:
                    if _is_outer_output(value, self.model):
                        _widen_output(self.model, value)
                    self.set_half(value)

    def convert_body(self, body: ir.Graph) -> None:
        """Convert the body of a loop, or a branch: FP16 in, FP16 out."""
        import onnx_ir as ir

        for value in body.inputs:
            if value.dtype == self.single:
                self.set_half(value)
        self.convert(body)
        for index, value in enumerate(body.outputs):
            if value.dtype != self.single:
                continue
            if constant(value) is not None:
                value = self.half_constant(value)
            cast = ir.node("Cast", [value], {"to": self.half}, name=f"{value.name}/half")
            cast.outputs[0].name = cast.name
            cast.outputs[0].shape = value.shape
            self.set_half(cast.outputs[0])
            body.append(cast)
            body.outputs[index] = cast.outputs[0]

    def set_half(self, value: ir.Value) -> None:
        import onnx_ir as ir

        value.type, self.halved = ir.TensorType(self.half), True

    def as_type(self, value: ir.Value, wanted: ir.DataType, before: ir.Node) -> ir.Value:
        """Return a value in the wanted type, cast where the graph of ``before`` needs it so."""
        import onnx_ir as ir

        if value.dtype == wanted:
            return value
        if constant(value) is not None:
            return self.half_constant(value)
        # One cast for all of a graph's readers; a body has its own.
        key = (id(value), id(before.graph))
        if key not in self.casts:
            suffix = "half" if wanted == self.half else "single"
            cast = ir.node("Cast", [value], {"to": wanted}, name=f"{value.name}/{suffix}")
            cast.outputs[0].name = cast.name
            cast.outputs[0].shape, cast.outputs[0].type = value.shape, ir.TensorType(wanted)
            before.prepend(cast)
            self.casts[key] = cast.outputs[0]
        return self.casts[key]

    def half_constant(self, value: ir.Value) -> ir.Value:
        """Return a constant's copy in FP16; one beyond its range is only ever a bound."""
        if id(value) not in self.halves:
            array = constant(value)
            assert array is not None
            narrow = np.clip(array, -LARGEST, LARGEST).astype(np.float16)
            made = initializer(self.model, f"{value.name}/half", narrow)
            self.halves[id(value)] = (value, made)
        return self.halves[id(value)][1]

    def drop_singles(self) -> None:
        """Forget the constants of which only the copy is used, which takes over the name."""
        for original, half in self.halves.values():
            if original.uses() or original.is_graph_output():
                continue
            name = name_of(original)
            assert original.graph is not None
            del original.graph.initializers[name]
            if name not in self.model.graph.initializers:
                rename_initializer(half, name)

    def stays_single(self, node: ir.Node) -> bool:
        """Tell whether a node stays FP32; a reason that is its own is noted."""
        if node in self.normalization or node.op_type in KEEP_FLOAT32:
            return True
        gives = any(_is_outer_output(value, self.model) for value in node.outputs)
        if gives and node.op_type not in WEIGHTED:
            return True
        reason = self.unfit(node)
        if reason is not None:
            self.kept_float[name_of(node)] = reason
        return reason is not None

    def unfit(self, node: ir.Node) -> str | None:
        """Return why a node cannot compute in FP16, or None."""
        if not _has_half_form(node, self.model.graph.opset_imports.get("", 1)):
            return f"ONNX has no FP16 {node.op_type}"
        if node.op_type in _BOUNDS:
            return None
        for value in node.inputs:
            array = constant(value)
            if value is None or array is None or array.dtype != np.float32:
                continue
            finite = np.abs(array[np.isfinite(array)])
            if finite.max(initial=0.0) > LARGEST:
                return f"{value.name} holds {finite.max():.3g}, and FP16 ends at {LARGEST:.0f}"
        return None


def _has_half_form(node: ir.Node, opset: int) -> bool:
    """Tell whether ONNX lets each float input and output of a node be FP16."""
    import onnx
    import onnx_ir as ir

    if node.domain not in {"", "ai.onnx"}:
        return False
    schema = onnx.defs.get_schema(node.op_type, opset, "")
    allowed = {c.type_param_str: c.allowed_type_strs for c in schema.type_constraints}
    for values, formals in ((node.inputs, schema.inputs), (node.outputs, schema.outputs)):
        for index, value in enumerate(values):
            if value is None or value.dtype not in (ir.DataType.FLOAT, ir.DataType.FLOAT16):
                continue
            formal = formals[min(index, len(formals) - 1)].type_str
            if "tensor(float16)" not in allowed.get(formal, [formal]):
                return False
    return True


def _give_half(node: ir.Node) -> None:
    """Make a node whose attribute says that it gives FP32 give FP16."""
    import onnx_ir as ir

    if node.op_type == "Cast" and node.attributes["to"].as_int() == ir.DataType.FLOAT:
        node.attributes["to"] = ir.AttrInt64("to", ir.DataType.FLOAT16)
    elif node.op_type in {"Constant", "ConstantOfShape"}:
        given = node.attributes.get("value")
        array = np.zeros(1, np.float32) if given is None else given.as_tensor().numpy()
        if array.dtype == np.float32:
            narrow = ir.tensor(np.clip(array, -LARGEST, LARGEST).astype(np.float16))
            node.attributes["value"] = ir.AttrTensor("value", narrow)


def _is_outer_output(value: ir.Value, model: ir.Model) -> bool:
    return any(value is output for output in model.graph.outputs)


def _widen_output(model: ir.Model, value: ir.Value) -> None:
    """Let a cast to FP32 give the graph's output in the place of ``value``."""
    import onnx_ir as ir

    graph, node = model.graph, maker(value)
    cast = ir.node("Cast", [value], {"to": ir.DataType.FLOAT}, name=f"{node.name}/single")
    given = cast.outputs[0]
    describe_like(given, value)
    value.name = node.name
    graph.outputs[list(graph.outputs).index(value)] = given
    graph.insert_after(node, cast)
