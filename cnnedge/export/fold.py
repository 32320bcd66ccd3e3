"""Bind the weights into a skeleton and fold away what the converter leaves around them.

Every pass takes an ``onnx_ir.Model`` and changes it in place; `fold` names their order. Matching is
by what a node computes, never by its name, so a user's own model gets the same treatment as the
built-in ones. What does not match is left as it is: slower, never wrong.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np

from cnnedge.export.layout import NCHW_TO_NHWC, keep_nchw
from cnnedge.export.trace import Skeleton
from cnnedge.graph.edit import (
    all_nodes,
    attribute_ints,
    constant,
    erase,
    initializer,
    inner_graphs,
    main_nodes,
    replace_node,
    required_constant,
    single_consumer,
)


def fold(skeleton: Skeleton) -> Any:
    """Return the skeleton as an ``onnx_ir.Model`` with its weights bound and folded."""
    import onnx_ir as ir
    import onnx_ir.passes.common as passes

    model = ir.from_proto(skeleton.proto)
    passes.ShapeInferencePass()(model)
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
    passes.RemoveUnusedNodesPass()(model)
    passes.TopologicalSortPass()(model)
    return model


def fix_reshape_targets(model: Any) -> None:
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


def bind_weights(model: Any, weights: dict[str, np.ndarray]) -> None:
    """Turn the skeleton's weight inputs into initializers."""
    import onnx_ir as ir

    graph = model.graph
    for value in list(graph.inputs):
        if value.name in weights:
            graph.inputs.remove(value)
            value.const_value = ir.tensor(weights[value.name], name=value.name)
            graph.register_initializer(value)


def free_loops_of_constants(model: Any) -> None:
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
            inside, outside = body.inputs.pop(2 + i), loop.inputs[2 + i]
            inside.replace_all_uses_with(outside)
            loop.outputs[i].replace_all_uses_with(outside, replace_graph_outputs=True)
        new = ir.node("Loop", inputs, num_outputs=len(kept), name=loop.name)
        for ours, theirs in zip(new.outputs, kept, strict=True):
            ours.name, ours.shape, ours.type = theirs.name, theirs.shape, theirs.type
            theirs.replace_all_uses_with(ours, replace_graph_outputs=True)
        new.attributes["body"] = loop.attributes.pop("body")
        model.graph.insert_before(loop, new)
        erase(model, loop)


def fold_constants(model: Any) -> None:
    """Evaluate every node whose inputs are all constants, with ONNX's own reference."""
    for node in list(all_nodes(model)):
        if node.op_type in {"QuantizeLinear", "DequantizeLinear"} or not node.inputs:
            continue
        if any(inner_graphs(node)):
            continue  # a loop or a branch reads more than its inputs
        arrays = [constant(value) if value is not None else None for value in node.inputs]
        known = all(a is not None for a, v in zip(arrays, node.inputs, strict=True) if v)
        if not known or any(output.is_graph_output() for output in node.outputs):
            continue
        for output, array in zip(node.outputs, _evaluate(model, node, arrays), strict=True):
            folded = initializer(model, output.name or "folded", np.asarray(array))
            output.replace_all_uses_with(folded)
        erase(model, node)


def fold_batch_norm(model: Any) -> None:
    """Rewrite BatchNormalization as a scale and a shift (Ioffe & Szegedy 2015, algorithm 2)."""
    for node in main_nodes(model, "BatchNormalization"):
        parameters = [constant(value) for value in node.inputs[1:5]]
        if any(p is None for p in parameters) or len(node.outputs) > 1:
            continue
        gamma, beta, mean, variance = (np.asarray(p, np.float64) for p in parameters)
        epsilon = node.attributes["epsilon"].as_float() if "epsilon" in node.attributes else 1e-5
        scale = gamma / np.sqrt(variance + epsilon)
        spatial = (1, -1, *([1] * (len(node.inputs[0].shape.dims) - 2)))
        name = node.outputs[0].name
        scaled = replace_node(
            model, node, "Mul", [node.inputs[0], _reshaped(model, f"{name}/scale", scale, spatial)]
        )
        shifted = _reshaped(model, f"{name}/shift", beta - mean * scale, spatial)
        _insert_after(model, scaled, "Add", shifted)


def fold_padding(model: Any) -> None:
    """Fold a Pad with zeros around the image into the convolution that alone follows it."""
    import onnx_ir as ir

    for pad in main_nodes(model, "Pad"):
        conv, pads = single_consumer(pad.outputs[0]), constant(pad.inputs[1])
        value = constant(pad.inputs[2]) if len(pad.inputs) > 2 else None
        mode = pad.attributes["mode"].as_string() if "mode" in pad.attributes else "constant"
        is_zero = mode == "constant" and (value is None or not np.any(value))
        if conv is None or conv.op_type != "Conv" or pads is None or pads.size != 8 or not is_zero:
            continue
        around = pads.reshape(2, 4)
        explicit = "auto_pad" not in conv.attributes or (
            conv.attributes["auto_pad"].as_string() in {"NOTSET", "VALID"}
        )
        if around[:, :2].any() or (around < 0).any() or not explicit:
            continue
        own = attribute_ints(conv, "pads") or [0, 0, 0, 0]
        total = (around[:, 2:].reshape(-1) + own).tolist()
        conv.attributes.pop("auto_pad", None)
        conv.attributes["pads"] = ir.AttrInt64s("pads", [int(p) for p in total])
        conv.replace_input_with(0, pad.inputs[0])
        erase(model, pad)


def fold_scale_and_shift(model: Any) -> None:
    """Fold a per-channel Mul or Add behind a Conv into the convolution's weights and bias."""
    for conv in main_nodes(model, "Conv"):
        while (node := single_consumer(conv.outputs[0])) is not None:
            if node.op_type not in {"Mul", "Add", "Sub"}:
                break
            factor = _other_constant(node, conv.outputs[0])
            weight = constant(conv.inputs[1])
            if factor is None or weight is None:
                break
            per_channel = _per_channel(factor, weight.shape[0], len(conv.outputs[0].shape.dims))
            subtracted_from = node.op_type == "Sub" and node.inputs[0] is not conv.outputs[0]
            if per_channel is None or subtracted_from:
                break
            bias = constant(conv.inputs[2]) if len(conv.inputs) > 2 else None
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
            erase(model, node)


def name_pooling(model: Any) -> None:
    """Write a mean or maximum over both spatial axes as the pooling that runtimes know."""
    import onnx_ir as ir

    pools = {"ReduceMean": "GlobalAveragePool", "ReduceMax": "GlobalMaxPool"}
    for node in main_nodes(model, *pools):
        axes = attribute_ints(node, "axes")
        if axes is None and len(node.inputs) > 1:
            folded = constant(node.inputs[1])
            axes = None if folded is None else [int(a) for a in folded]
        source = node.inputs[0]
        keep = node.attributes["keepdims"].as_int() if "keepdims" in node.attributes else 1
        if axes is None or source.shape is None or len(source.shape.dims) != 4:
            continue
        axes = sorted(axis % 4 for axis in axes)
        transpose = source.producer()
        in_nhwc = transpose is not None and transpose.op_type == "Transpose"
        if in_nhwc and attribute_ints(transpose, "perm") == NCHW_TO_NHWC and not keep:
            source, axes = transpose.inputs[0], [{1: 2, 2: 3, 3: 1}.get(a, a) for a in axes]
        if sorted(axes) != [2, 3]:
            continue
        pool = replace_node(model, node, pools[node.op_type], [source])
        if not keep:
            flat = pool.outputs[0].shape
            _insert_after(model, pool, "Flatten", None).outputs[0].shape = flat
            if flat is not None:
                pool.outputs[0].shape = ir.Shape([*flat.dims, 1, 1])


def fold_flatten(model: Any) -> None:
    """Fold the NHWC Transpose before Flatten into the rows of the Dense layer behind it.

    Keras flattens ``[H, W, C]``, the ONNX graph holds ``[C, H, W]``: permuting the Dense kernel's
    rows once, here, replaces permuting every image.
    """
    for transpose in main_nodes(model, "Transpose"):
        if attribute_ints(transpose, "perm") != NCHW_TO_NHWC:
            continue
        shape = transpose.inputs[0].shape
        reshape = single_consumer(transpose.outputs[0])
        if reshape is None or reshape.op_type not in {"Reshape", "Flatten"} or shape is None:
            continue
        channels, height, width = shape.dims[1:]
        flat = reshape.outputs[0].shape
        size = _product(channels, height, width)
        if size is None or flat is None or list(flat.dims[1:]) != [size]:
            continue
        dense = list(_dense_consumers(reshape.outputs[0]))
        if not dense or any(node is None for node in dense):
            continue
        for node in dense:
            kernel = required_constant(node.inputs[1])
            rows = kernel.reshape(height, width, channels, -1).transpose(2, 0, 1, 3)
            name = f"{node.outputs[0].name}/weight"
            node.replace_input_with(1, initializer(model, name, rows.reshape(size, -1)))
        reshape.replace_input_with(0, transpose.inputs[0])
        if reshape.op_type == "Reshape":
            replace_node(model, reshape, "Flatten", [transpose.inputs[0]])
        erase(model, transpose)


def merge_reshapes(model: Any) -> None:
    """Drop a Reshape whose result is only reshaped again, and write ``[N, …] → [N, k]`` as Flatten.

    Where an image has one pixel or one channel, the converter writes each Transpose as a Reshape.
    """
    for node in main_nodes(model, "Reshape", "Flatten"):
        source = node.inputs[0].producer()
        while source is not None and source.op_type == "Reshape":
            node.replace_input_with(0, source.inputs[0])
            source = node.inputs[0].producer()
        before, after = node.inputs[0].shape, node.outputs[0].shape
        if node.op_type == "Flatten" or before is None or after is None:
            continue
        if list(before.dims[1:]) == list(after.dims[1:]):
            node.outputs[0].replace_all_uses_with(node.inputs[0], replace_graph_outputs=True)
            erase(model, node)
            continue
        if len(after.dims) == 2 and _product(*before.dims[1:]) == after.dims[1]:
            replace_node(model, node, "Flatten", [node.inputs[0]])


def fuse_dense(model: Any) -> None:
    """Write MatMul with a constant kernel, and the Add of its bias, as one Gemm."""
    for matmul in main_nodes(model, "MatMul"):
        kernel, shape = constant(matmul.inputs[1]), matmul.inputs[0].shape
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
            erase(model, add)
        replace_node(model, matmul, "Gemm", inputs)


def drop_identities(model: Any) -> None:
    """Drop the graph's own Identity nodes; in a branch one may stand for a value from outside."""
    for node in main_nodes(model, "Identity"):
        value, result = node.inputs[0], node.outputs[0]
        if result.is_graph_output() and (value.producer() is None or value.is_graph_output()):
            continue
        result.replace_all_uses_with(value, replace_graph_outputs=True)
        erase(model, node)


def _evaluate(model: Any, node: Any, arrays: list[Any]) -> list[Any]:
    if node.op_type == "Transpose":  # by far the largest: a view, copied once when it is written
        return [np.transpose(arrays[0], attribute_ints(node, "perm"))]
    import onnx_ir as ir
    from onnx.reference import ReferenceEvaluator

    proto = ir.to_proto(node)
    evaluator = ReferenceEvaluator(proto, opsets=dict(model.graph.opset_imports))
    feeds = {v.name: a for v, a in zip(node.inputs, arrays, strict=True) if v is not None}
    return evaluator.run(None, feeds)


def _dense_consumers(value: Any) -> Iterator[Any]:
    for consumer, index in value.uses():
        kernel = constant(consumer.inputs[1]) if consumer.op_type == "MatMul" else None
        yield consumer if index == 0 and kernel is not None and kernel.ndim == 2 else None
    if value.is_graph_output():
        yield None


def _other_constant(node: Any, value: Any) -> np.ndarray | None:
    others = [v for v in node.inputs if v is not value]
    return constant(others[0]) if len(others) == 1 else None


def _per_channel(array: np.ndarray, channels: int, rank: int) -> np.ndarray | None:
    """Return ``array`` as ``[channels]`` if it broadcasts along axis 1 of ``[N, C, …]`` alone."""
    if array.size == 1:
        return np.full(channels, array.reshape(-1)[0], array.dtype)
    padded = (1,) * (rank - array.ndim) + array.shape
    expected = (1, channels, *([1] * (rank - 2)))
    return array.reshape(-1) if padded == expected else None


def _product(*sizes: Any) -> int | None:
    return int(np.prod(sizes)) if all(isinstance(s, int) for s in sizes) else None


def _reshaped(model: Any, name: str, array: np.ndarray, shape: tuple[int, ...]) -> Any:
    return initializer(model, name, array.astype(np.float32).reshape(shape))


def _insert_after(model: Any, node: Any, op_type: str, operand: Any | None) -> Any:
    """Insert ``op_type`` on the result of ``node``, for all who used that result."""
    import onnx_ir as ir

    value = node.outputs[0]
    inputs = [value] if operand is None else [value, operand]
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
