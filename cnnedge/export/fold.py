"""Bind the weights into a skeleton and fold away what the converter leaves around them.

Every pass takes an ``onnx_ir.Model``, changes it in place and says whether it did; `fold` names
their order. Matching is by what a node computes, never by its name, so a user's own model gets the
same treatment as the built-in ones. What does not match is left as it is: slower, never wrong.
"""

from __future__ import annotations

from collections import Counter
from math import prod
from typing import TYPE_CHECKING

import numpy as np

from cnnedge.export.layout import keep_nchw
from cnnedge.export.trace import Skeleton
from cnnedge.graph.edit import (
    NCHW_TO_NHWC,
    all_nodes,
    attribute_ints,
    constant,
    describe_like,
    erase,
    initializer,
    inner_graphs,
    made_by,
    main_nodes,
    name_of,
    operand,
    optional_operand,
    replace_node,
    required_constant,
    shape_of,
    single_consumer,
)
from cnnedge.graph.passes import drop_unused_nodes, graph_pass, infer_shapes, sort_nodes

if TYPE_CHECKING:
    import onnx_ir as ir


def fold(skeleton: Skeleton) -> ir.Model:
    """Return the skeleton as an ``onnx_ir.Model`` with its weights bound and folded."""
    import onnx_ir as ir

    model = ir.from_proto(skeleton.proto)
    infer_shapes(model)
    fix_reshape_targets(model)
    bind_weights(model, skeleton.weights)
    free_loops_of_constants(model)
    fold_constants(model)
    fold_batch_norm(model)
    keep_nchw(model)
    fold_padding(model)
    fold_scale_and_shift(model)
    name_pooling(model)
    fold_flatten(model)
    merge_reshapes(model)
    fuse_dense(model)
    fold_constants(model)
    drop_identities(model)
    drop_unused_nodes(model)
    sort_nodes(model)
    return model


@graph_pass
def fix_reshape_targets(model: ir.Model) -> None:
    """Give a Reshape whose result is known but for the batch a constant target.

    Keras' Flatten arrives as Shape, Gather, Cast, Slice, Concat and Cast around one Reshape.
    """
    for node in main_nodes(model, "Reshape"):
        shape = node.outputs[0].shape
        if shape is None or constant(node.inputs[1]) is not None:
            continue
        known = [d if isinstance(d, int) else None for d in shape.dims]
        if known[:1] == [None] and None not in known[1:]:
            target = np.array([-1, *known[1:]], np.int64)
            name = f"{node.outputs[0].name}/target"
            node.replace_input_with(1, initializer(model, name, target))


@graph_pass
def bind_weights(model: ir.Model, weights: dict[str, np.ndarray]) -> None:
    """Turn the skeleton's weight inputs into initializers."""
    import onnx_ir as ir

    graph = model.graph
    for value in list(graph.inputs):
        name = name_of(value)
        if name in weights:
            graph.inputs.remove(value)
            value.const_value = ir.tensor(weights[name], name=name)
            graph.register_initializer(value)


@graph_pass
def free_loops_of_constants(model: ir.Model) -> None:
    """Let a loop's body read what never changes from outside, and not from its state.

    The converter carries a recurrent layer's weights from step to step.
    """
    import onnx_ir as ir

    for loop in main_nodes(model, "Loop"):
        (body,) = inner_graphs(loop)
        states = range(len(loop.inputs) - 2)  # before them: how often, and whether at all
        given = Counter(map(id, body.outputs))
        fixed = [
            i
            for i in states
            if body.outputs[1 + i] is body.inputs[2 + i] and given[id(body.inputs[2 + i])] == 1
        ]
        if not fixed:
            continue
        kept = [value for i, value in enumerate(loop.outputs) if i not in fixed]
        inputs = [value for i, value in enumerate(loop.inputs) if i - 2 not in fixed]
        for i in reversed(fixed):
            body.outputs.pop(1 + i)
            inside, outside = body.inputs.pop(2 + i), operand(loop, 2 + i)
            inside.replace_all_uses_with(outside)
            loop.outputs[i].replace_all_uses_with(outside, replace_graph_outputs=True)
        new = ir.node("Loop", inputs, num_outputs=len(kept), name=loop.name)
        for ours, theirs in zip(new.outputs, kept, strict=True):
            describe_like(ours, theirs)
            theirs.replace_all_uses_with(ours, replace_graph_outputs=True)
        new.attributes["body"] = loop.attributes.pop("body")
        model.graph.insert_before(loop, new)
        erase(loop)


@graph_pass
def fold_constants(model: ir.Model) -> None:
    """Evaluate every node whose inputs are all constants, with ONNX's own reference."""
    for node in list(all_nodes(model)):
        if node.op_type in {"QuantizeLinear", "DequantizeLinear"} or not node.inputs:
            continue
        if any(inner_graphs(node)):
            continue  # a loop or a branch reads more than its inputs
        known = all(constant(value) is not None for value in node.inputs if value is not None)
        if not known or any(output.is_graph_output() for output in node.outputs):
            continue
        for output, array in zip(node.outputs, _evaluate(model, node), strict=True):
            folded = initializer(model, output.name or "folded", np.asarray(array))
            output.replace_all_uses_with(folded)
        erase(node)


@graph_pass
def fold_batch_norm(model: ir.Model) -> None:
    """Rewrite BatchNormalization as a scale and a shift (Ioffe & Szegedy 2015, algorithm 2)."""
    for node in main_nodes(model, "BatchNormalization"):
        parameters = [constant(value) for value in node.inputs[1:5]]
        if any(p is None for p in parameters) or len(node.outputs) > 1:
            continue
        gamma, beta, mean, variance = (np.asarray(p, np.float64) for p in parameters)
        epsilon = node.attributes.get_float("epsilon", 1e-5)
        scale = gamma / np.sqrt(variance + epsilon)
        spatial = (1, -1, *([1] * (len(shape_of(operand(node, 0))) - 2)))
        name = node.outputs[0].name
        scaled = replace_node(
            model, node, "Mul", [node.inputs[0], _reshaped(model, f"{name}/scale", scale, spatial)]
        )
        shifted = _reshaped(model, f"{name}/shift", beta - mean * scale, spatial)
        _insert_after(model, scaled, "Add", shifted)


@graph_pass
def fold_padding(model: ir.Model) -> None:
    """Fold a Pad with zeros around the image into the convolution that alone follows it."""
    import onnx_ir as ir

    for pad in main_nodes(model, "Pad"):
        conv, pads = single_consumer(pad.outputs[0]), constant(pad.inputs[1])
        value = constant(optional_operand(pad, 2))
        mode = pad.attributes.get_string("mode", "constant")
        is_zero = mode == "constant" and (value is None or not np.any(value))
        if conv is None or conv.op_type != "Conv" or pads is None or pads.size != 8 or not is_zero:
            continue
        around = pads.reshape(2, 4)
        explicit = conv.attributes.get_string("auto_pad", "NOTSET") in {"NOTSET", "VALID"}
        if around[:, :2].any() or (around < 0).any() or not explicit:
            continue
        own = attribute_ints(conv, "pads") or [0, 0, 0, 0]
        total = (around[:, 2:].reshape(-1) + own).tolist()
        conv.attributes.pop("auto_pad", None)
        conv.attributes["pads"] = ir.AttrInt64s("pads", [int(p) for p in total])
        conv.replace_input_with(0, pad.inputs[0])
        erase(pad)


@graph_pass
def fold_scale_and_shift(model: ir.Model) -> None:
    """Fold a per-channel Mul or Add behind a Conv into the convolution's weights and bias."""
    for conv in main_nodes(model, "Conv"):
        while (node := single_consumer(conv.outputs[0])) is not None:
            if node.op_type not in {"Mul", "Add", "Sub"}:
                break
            factor = _other_constant(node, conv.outputs[0])
            weight = constant(conv.inputs[1])
            if factor is None or weight is None:
                break
            per_channel = _per_channel(factor, weight.shape[0], len(shape_of(conv.outputs[0])))
            subtracted_from = node.op_type == "Sub" and node.inputs[0] is not conv.outputs[0]
            if per_channel is None or subtracted_from:
                break
            bias = constant(optional_operand(conv, 2))
            bias = np.zeros(weight.shape[0], weight.dtype) if bias is None else bias
            if node.op_type == "Mul":
                weight = weight * per_channel.reshape(-1, *([1] * (weight.ndim - 1)))
                bias = bias * per_channel
            else:
                bias = bias + (per_channel if node.op_type == "Add" else -per_channel)
            name = conv.outputs[0].name
            new_inputs = [
                conv.inputs[0],
                initializer(model, f"{name}/weight", weight.astype(np.float32)),
                initializer(model, f"{name}/bias", bias.astype(np.float32)),
            ]
            conv.resize_inputs(3)
            for index, value in enumerate(new_inputs):
                conv.replace_input_with(index, value)
            node.outputs[0].replace_all_uses_with(conv.outputs[0], replace_graph_outputs=True)
            erase(node)


@graph_pass
def name_pooling(model: ir.Model) -> None:
    """Write a mean or maximum over both spatial axes as the pooling that runtimes know."""
    import onnx_ir as ir

    pools = {"ReduceMean": "GlobalAveragePool", "ReduceMax": "GlobalMaxPool"}
    for node in main_nodes(model, *pools):
        axes = attribute_ints(node, "axes")
        if axes is None:
            folded = constant(optional_operand(node, 1))
            axes = None if folded is None else [int(a) for a in folded]
        source = operand(node, 0)
        keep = node.attributes.get_int("keepdims", 1)
        if axes is None or source.shape is None or len(source.shape.dims) != 4:
            continue
        axes = sorted(axis % 4 for axis in axes)
        transpose = made_by(source, "Transpose")
        in_nhwc = transpose is not None and attribute_ints(transpose, "perm") == NCHW_TO_NHWC
        if transpose is not None and in_nhwc and not keep:
            source, axes = operand(transpose, 0), [{1: 2, 2: 3, 3: 1}.get(a, a) for a in axes]
        if sorted(axes) != [2, 3]:
            continue
        pool = replace_node(model, node, pools[node.op_type], [source])
        if not keep:
            flat = pool.outputs[0].shape
            _insert_after(model, pool, "Flatten", None).outputs[0].shape = flat
            if flat is not None:
                pool.outputs[0].shape = ir.Shape([*flat.dims, 1, 1])


@graph_pass
def fold_flatten(model: ir.Model) -> None:
    """Fold the NHWC Transpose before Flatten into the rows of the Dense layer behind it.

    Keras flattens ``[H, W, C]``, the ONNX graph holds ``[C, H, W]``: permuting the Dense kernel's
    rows once, here, replaces permuting every image.
    """
    for transpose in main_nodes(model, "Transpose"):
        if attribute_ints(transpose, "perm") != NCHW_TO_NHWC:
            continue
        shape = operand(transpose, 0).shape
        reshape = single_consumer(transpose.outputs[0])
        if reshape is None or reshape.op_type not in {"Reshape", "Flatten"} or shape is None:
            continue
        sizes = [d for d in shape.dims[1:] if isinstance(d, int)]
        flat, size = reshape.outputs[0].shape, prod(sizes)
        if len(sizes) < 3 or flat is None or list(flat.dims[1:]) != [size]:
            continue
        channels, height, width = sizes
        dense = _dense_consumers(reshape.outputs[0])
        if not dense:
            continue
        for node in dense:
            kernel = required_constant(node.inputs[1])
            rows = kernel.reshape(height, width, channels, -1).transpose(2, 0, 1, 3)
            name = f"{node.outputs[0].name}/weight"
            node.replace_input_with(1, initializer(model, name, rows.reshape(size, -1)))
        reshape.replace_input_with(0, transpose.inputs[0])
        if reshape.op_type == "Reshape":
            replace_node(model, reshape, "Flatten", [transpose.inputs[0]])
        erase(transpose)


@graph_pass
def merge_reshapes(model: ir.Model) -> None:
    """Drop a Reshape whose result is only reshaped again, and write ``[N, …] → [N, k]`` as Flatten.

    Where an image has one pixel or one channel, the converter writes each Transpose as a Reshape.
    """
    for node in main_nodes(model, "Reshape", "Flatten"):
        while (source := made_by(node.inputs[0], "Reshape")) is not None:
            node.replace_input_with(0, source.inputs[0])
        value = operand(node, 0)
        before, after = value.shape, node.outputs[0].shape
        if node.op_type == "Flatten" or before is None or after is None:
            continue
        if list(before.dims[1:]) == list(after.dims[1:]):
            node.outputs[0].replace_all_uses_with(value, replace_graph_outputs=True)
            erase(node)
            continue
        if len(after.dims) == 2 and _product(*before.dims[1:]) == after.dims[1]:
            replace_node(model, node, "Flatten", [value])


@graph_pass
def fuse_dense(model: ir.Model) -> None:
    """Write MatMul with a constant kernel, and the Add of its bias, as one Gemm."""
    for matmul in main_nodes(model, "MatMul"):
        kernel, shape = constant(matmul.inputs[1]), operand(matmul, 0).shape
        if kernel is None or kernel.ndim != 2 or shape is None or len(shape.dims) != 2:
            continue
        inputs = list(matmul.inputs)
        add = single_consumer(matmul.outputs[0])
        bias = (
            None if add is None or add.op_type != "Add" else _other_constant(add, matmul.outputs[0])
        )
        if bias is not None and add is not None and bias.size == kernel.shape[1]:
            name = f"{matmul.outputs[0].name}/bias"
            inputs.append(initializer(model, name, bias.reshape(-1)))
            add.outputs[0].replace_all_uses_with(matmul.outputs[0], replace_graph_outputs=True)
            erase(add)
        replace_node(model, matmul, "Gemm", inputs)


@graph_pass
def drop_identities(model: ir.Model) -> None:
    """Drop the graph's own Identity nodes; in a branch one may stand for a value from outside."""
    for node in main_nodes(model, "Identity"):
        value, result = operand(node, 0), node.outputs[0]
        if result.is_graph_output() and (value.producer() is None or value.is_graph_output()):
            continue
        result.replace_all_uses_with(value, replace_graph_outputs=True)
        erase(node)


def _evaluate(model: ir.Model, node: ir.Node) -> list[np.ndarray]:
    if node.op_type == "Transpose":  # by far the largest: a view, copied once when it is written
        return [np.transpose(required_constant(node.inputs[0]), attribute_ints(node, "perm"))]
    import onnx_ir as ir
    from onnx.reference import ReferenceEvaluator

    proto = ir.to_proto(node)
    evaluator = ReferenceEvaluator(proto, opsets=dict(model.graph.opset_imports))
    feeds = {name_of(value): required_constant(value) for value in node.inputs if value is not None}
    return list(evaluator.run(None, feeds))


def _dense_consumers(value: ir.Value) -> list[ir.Node]:
    """Return the dense layers that read a value; none where anything else does."""
    consumers = []
    for consumer, index in value.uses():
        kernel = constant(consumer.inputs[1]) if consumer.op_type == "MatMul" else None
        if index != 0 or kernel is None or kernel.ndim != 2:
            return []
        consumers.append(consumer)
    return [] if value.is_graph_output() else consumers


def _other_constant(node: ir.Node, value: ir.Value) -> np.ndarray | None:
    others = [v for v in node.inputs if v is not value]
    return constant(others[0]) if len(others) == 1 else None


def _per_channel(array: np.ndarray, channels: int, rank: int) -> np.ndarray | None:
    """Return ``array`` as ``[channels]`` if it broadcasts along axis 1 of ``[N, C, …]`` alone."""
    if array.size == 1:
        return np.full(channels, array.reshape(-1)[0], array.dtype)
    padded = (1,) * (rank - array.ndim) + array.shape
    expected = (1, channels, *([1] * (rank - 2)))
    return array.reshape(-1) if padded == expected else None


def _product(*sizes: object) -> int | None:
    known = [size for size in sizes if isinstance(size, int)]
    return prod(known) if len(known) == len(sizes) else None


def _reshaped(model: ir.Model, name: str, array: np.ndarray, shape: tuple[int, ...]) -> ir.Value:
    return initializer(model, name, array.astype(np.float32).reshape(shape))


def _insert_after(model: ir.Model, node: ir.Node, op_type: str, second: ir.Value | None) -> ir.Node:
    """Insert ``op_type`` on the result of ``node``, for all who used that result."""
    import onnx_ir as ir

    value = node.outputs[0]
    inputs = [value] if second is None else [value, second]
    new = ir.node(op_type, inputs, name=f"{node.name}/{op_type.lower()}")
    new.outputs[0].name = f"{value.name}/{op_type.lower()}"
    new.outputs[0].shape, new.outputs[0].type = value.shape, value.type
    uses = [(user, index) for user, index in value.uses() if user is not new]
    model.graph.insert_after(node, new)
    for user, index in uses:
        user.replace_input_with(index, new.outputs[0])
    if value.is_graph_output():
        position = list(model.graph.outputs).index(value)
        model.graph.outputs[position] = new.outputs[0]
    return new
