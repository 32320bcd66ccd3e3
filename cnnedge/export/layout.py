"""Keep the network in NCHW: move the Transposes that are left between layers until they cancel.

The converter turns to NHWC behind a convolution and back before the next; where it cannot see that
what stands between does not care (hard-swish, squeeze-and-excite), both stay.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from cnnedge.graph.edit import (
    NCHW_TO_NHWC,
    NHWC_TO_NCHW,
    attribute_ints,
    constant,
    erase,
    initializer,
    made_by,
    main_nodes,
    maker,
    operand,
    optional_operand,
)
from cnnedge.graph.passes import graph_pass

if TYPE_CHECKING:
    import onnx_ir as ir

# Operations that look at each value by itself; operands beside the first are scalars.
_UNARY = frozenset(
    {
        *("Relu", "Clip", "Sigmoid", "HardSigmoid", "HardSwish", "Tanh", "LeakyRelu", "Elu"),
        *("Selu", "Erf", "Softplus", "Softsign", "Sqrt", "Neg", "Exp", "Identity"),
    }
)
_BINARY = frozenset({"Add", "Sub", "Mul", "Div", "Max", "Min"})


@graph_pass
def keep_nchw(model: ir.Model) -> None:
    """Move each NCHW → NHWC Transpose behind what follows it, and cancel it against its inverse.

    One sweep in graph order does: what is moved behind a node stands before the nodes that follow.
    """
    for node in main_nodes(model):
        if node.op_type == "Transpose":
            _cancel(node)
        elif node.op_type in _UNARY and _is_nhwc(node.inputs[0]):
            _sink(model, node, [0])
        elif node.op_type in _BINARY | {"Concat"}:
            _sink_where_all_are(model, node)
        elif node.op_type == "Pad" and _is_nhwc(node.inputs[0]) and len(node.inputs) < 4:
            _sink_pad(model, node)
        elif node.op_type in {"ReduceMean", "ReduceMax"} and _is_nhwc(node.inputs[0]):
            _sink_reduction(model, node)


def _is_nhwc(value: ir.Value | None) -> bool:
    """Tell whether a value comes straight from an NCHW → NHWC Transpose."""
    transpose = made_by(value, "Transpose")
    return transpose is not None and attribute_ints(transpose, "perm") == NCHW_TO_NHWC


def _cancel(node: ir.Node) -> None:
    if attribute_ints(node, "perm") != NHWC_TO_NCHW or not _is_nhwc(node.inputs[0]):
        return
    if node.outputs[0].is_graph_output():
        return
    before = maker(operand(node, 0))
    node.outputs[0].replace_all_uses_with(operand(before, 0))
    erase(node)
    _erase_if_unused(before)


def _sink(model: ir.Model, node: ir.Node, indices: list[int]) -> None:
    """Take operands from before their Transpose, and put one behind the node's result."""
    import onnx_ir as ir

    result = node.outputs[0]
    if result.is_graph_output():
        return
    for index in indices:
        transpose = maker(operand(node, index))
        node.replace_input_with(index, transpose.inputs[0])
        _erase_if_unused(transpose)
    uses = list(result.uses())
    behind = ir.node("Transpose", [result], {"perm": NCHW_TO_NHWC}, name=f"{node.name}/nhwc")
    behind.outputs[0].name = f"{result.name}/nhwc"
    behind.outputs[0].shape, behind.outputs[0].type = result.shape, result.type
    if result.shape is not None:
        result.shape = ir.Shape([result.shape.dims[i] for i in NHWC_TO_NCHW])
    model.graph.insert_after(node, behind)
    for user, index in uses:
        user.replace_input_with(index, behind.outputs[0])


def _sink_where_all_are(model: ir.Model, node: ir.Node) -> None:
    """Sink through an operation on several operands, if each is NHWC or a constant."""
    moving = [i for i, value in enumerate(node.inputs) if _is_nhwc(value)]
    fixed = [i for i in range(len(node.inputs)) if i not in moving]
    arrays = {i: constant(node.inputs[i]) for i in fixed}
    if not moving or any(array is None or array.ndim > 4 for array in arrays.values()):
        return
    if node.outputs[0].is_graph_output():
        return
    if node.op_type == "Concat":
        import onnx_ir as ir

        axis = node.attributes["axis"].as_int() % 4
        node.attributes["axis"] = ir.AttrInt64("axis", NCHW_TO_NHWC[axis])
    for index, array in arrays.items():
        assert array is not None
        if array.size > 1:
            wide = array.reshape((1,) * (4 - array.ndim) + array.shape)
            name = f"{operand(node, index).name}/nchw"
            turned = np.ascontiguousarray(wide.transpose(NHWC_TO_NCHW))
            node.replace_input_with(index, initializer(model, name, turned))
    _sink(model, node, moving)


def _sink_pad(model: ir.Model, node: ir.Node) -> None:
    pads = constant(node.inputs[1])
    if pads is None or pads.size != 8 or node.outputs[0].is_graph_output():
        return
    turned = pads.reshape(2, 4)[:, NHWC_TO_NCHW].reshape(-1)
    node.replace_input_with(1, initializer(model, f"{operand(node, 1).name}/nchw", turned))
    _sink(model, node, [0])


def _sink_reduction(model: ir.Model, node: ir.Node) -> None:
    """Sink through a reduction that keeps its axes (one that drops them is a pooling's)."""
    axes = constant(optional_operand(node, 1))
    if (
        axes is None
        or not node.attributes.get_int("keepdims", 1)
        or node.outputs[0].is_graph_output()
    ):
        return
    turned = np.array([NCHW_TO_NHWC[int(axis) % 4] for axis in axes], np.int64)
    node.replace_input_with(1, initializer(model, f"{operand(node, 1).name}/nchw", turned))
    _sink(model, node, [0])


def _erase_if_unused(node: ir.Node) -> None:
    if not node.outputs[0].uses() and not node.outputs[0].is_graph_output():
        erase(node)
