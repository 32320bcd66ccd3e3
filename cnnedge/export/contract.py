"""The ONNX contract: what every exported graph takes and gives, and what it says of itself.

Input ``image``: uint8 ``[N, H, W, C]`` RGB (or grey), N dynamic. Output ``probabilities``: float32
``[N, classes]``. Scaling and layout live in the graph, so an app cannot get them wrong; labels and
the image contract are in ``metadata_props``.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from cnnedge.export.trace import layer_in
from cnnedge.graph.edit import (
    NHWC_TO_NCHW,
    WEIGHTED_OR_TRANSPOSED,
    all_nodes,
    attribute_ints,
    initializer,
    rename_initializer,
    shape_of,
    single_consumer,
)
from cnnedge.graph.image_part import BGR, CAST, NCHW, SCALE, SHIFT
from cnnedge.graph.passes import graph_pass, infer_shapes, named_in_errors, settle_names
from cnnedge.head import LOGITS
from cnnedge.image import NORMALIZATIONS, ImageContract
from cnnedge.metadata import META_IMAGE, META_LABELS, META_MODEL, META_VERSION
from cnnedge.version import __version__

if TYPE_CHECKING:
    import onnx_ir as ir

INPUT = "image"
OUTPUT = "probabilities"
_BATCH = 7919  # a prime that is no size of anything else


@named_in_errors
def take_uint8(model: ir.Model, image: ImageContract, normalization: str) -> list[ir.Node]:
    """Make the graph take raw uint8 images: cast, NCHW, and the network's own normalization.

    The cast comes first because TensorRT wants a uint8 input cast before anything else.

    Returns:
        The nodes that do this, named.
    """
    import onnx_ir as ir

    graph = model.graph
    (old,) = graph.inputs
    new = ir.Value(
        name=INPUT,
        shape=ir.Shape(["N", image.height, image.width, image.channels]),
        type=ir.TensorType(ir.DataType.UINT8),
    )
    # Where the network begins by going to NCHW, as every traced convolution does, normalize
    # behind that Transpose; a network that looks at the NHWC image first is left its layout.
    transpose = single_consumer(old)
    if transpose is not None and not _goes_to_nchw(transpose, image.channels):
        transpose = None
    nodes = [ir.node("Cast", [new], {"to": ir.DataType.FLOAT}, name=CAST)]
    if transpose is not None:
        last = nodes[-1].outputs[0]
        nodes.append(ir.node("Transpose", [last], {"perm": NHWC_TO_NCHW}, name=NCHW))
    channel_axis = 3 if transpose is None else 1
    spec = NORMALIZATIONS[normalization]
    if spec.bgr and image.channels == 3:
        order = initializer(model, f"{BGR}/order", np.array([2, 1, 0], np.int64))
        attributes = {"axis": channel_axis}
        last = nodes[-1].outputs[0]
        nodes.append(ir.node("Gather", [last, order], attributes, name=BGR))
    for op_type, name, values, neutral in (
        ("Mul", SCALE, spec.scale, 1.0),
        ("Add", SHIFT, spec.offset, 0.0),
    ):
        if all(v == neutral for v in values):
            continue
        array = np.array(values, np.float32)
        shape = [1, 1, 1, 1]
        shape[channel_axis] = len(array)
        operand = initializer(model, f"{name}/value", array.reshape(shape))
        nodes.append(ir.node(op_type, [nodes[-1].outputs[0], operand], name=name))
    _describe_preprocessing(nodes, image)
    replaced = old if transpose is None else transpose.outputs[0]
    replaced.replace_all_uses_with(nodes[-1].outputs[0])
    first = next(iter(graph))
    graph.insert_before(first, nodes)
    if transpose is not None:
        graph.remove(transpose, safe=True)
    graph.inputs.remove(old)
    graph.inputs.append(new)
    return nodes


@graph_pass
def take_float32(model: ir.Model, image: ImageContract) -> None:
    """Keep the Keras graph's own signature: float32 ``[N, H, W, C]``, already normalized."""
    import onnx_ir as ir

    (value,) = model.graph.inputs
    value.name = INPUT
    value.shape = ir.Shape(["N", image.height, image.width, image.channels])


@graph_pass
def give_probabilities(model: ir.Model, classes: int, emits: str) -> None:
    """Make the output ``probabilities`` float32 ``[N, classes]``, with a softmax behind logits.

    Args:
        model: The graph.
        classes: How many there are.
        emits: What the network gives, as `cnnedge.head.read_head` found.
    """
    import onnx_ir as ir

    (output,) = model.graph.outputs
    if emits == LOGITS:
        softmax = ir.node("Softmax", [output], {"axis": -1}, name="softmax")
        softmax.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
        model.graph.append(softmax)
        model.graph.outputs[0] = softmax.outputs[0]
    (output,) = model.graph.outputs
    output.name = OUTPUT
    output.shape = ir.Shape(["N", classes])


@graph_pass
def write_names(model: ir.Model, layers: frozenset[str], named: Sequence[ir.Node] = ()) -> None:
    """Name nodes, results and weights after the model's own layers: ``conv2_1``, ``fc1/relu``.

    Args:
        model: The ``onnx_ir.Model``.
        layers: Names of the model's layers.
        named: Nodes that bear their names already.
    """
    import onnx_ir as ir

    taken: set[str | None] = {INPUT, OUTPUT, *(node.name for node in named)}
    done = {id(value) for node in named for value in node.inputs}
    batched = _batch_first(model)
    for node in all_nodes(model):
        if node in named:
            continue
        base = _layer_name(node, layers)
        kind = node.op_type.lower()
        if base and node.op_type not in _MAIN:
            base = f"{base}/{kind}"
        node.name = _unique(base or kind, taken)
        for index, value in enumerate(node.outputs):
            if value in model.graph.outputs:
                continue
            if value.shape is not None and value.shape.dims[:1] and value.shape.is_dynamic(0):
                first = "N" if value in batched else None
                value.shape = ir.Shape([first, *value.shape.dims[1:]])
            if not value.is_graph_output():  # of a body
                value.name = node.name if index == 0 else f"{node.name}:{index}"
        has_kernel = node.op_type in WEIGHTED_OR_TRANSPOSED
        roles = ("weight", "bias") if has_kernel else ("value",) * len(node.inputs)
        for role, fixed in zip(roles, list(node.inputs)[1:], strict=False):
            if fixed is None or not fixed.is_initializer() or id(fixed) in done:
                continue
            rename_initializer(fixed, _unique(f"{node.name}/{role}", taken))
            done.add(id(fixed))  # what several layers share is the first one's
    settle_names(model)


def _batch_first(model: ir.Model) -> set[ir.Value]:
    """Return the values whose first axis is the batch: with a batch of so many it is so long.

    One name for two lengths would be a lie that runtimes plan their memory by.
    """
    import onnx_ir as ir

    settle_names(model)  # shapes are inferred by name
    copy = model.clone()
    (image,) = copy.graph.inputs
    image.shape = ir.Shape([_BATCH, *shape_of(image).dims[1:]])
    for node in all_nodes(copy):
        for value in node.outputs:
            value.shape = None
    infer_shapes(copy)
    return {
        ours
        for node, its in zip(all_nodes(model), all_nodes(copy), strict=True)
        for ours, theirs in zip(node.outputs, its.outputs, strict=True)
        if theirs.shape is not None and theirs.shape.dims[:1] == (_BATCH,)
    }


def write_metadata(
    model: ir.Model, *, name: str, labels: tuple[str, ...], image: ImageContract
) -> None:
    """Put the labels and the image contract where an app without cnnedge can read them."""
    model.metadata_props.clear()
    model.metadata_props.update(
        {
            META_MODEL: name,
            META_LABELS: json.dumps(list(labels), ensure_ascii=False),
            META_IMAGE: json.dumps(image.to_dict()),
            META_VERSION: __version__,
        }
    )
    model.producer_name, model.producer_version = "cnnedge", __version__
    model.graph.name = name


def _goes_to_nchw(node: ir.Node, channels: int) -> bool:
    """Tell whether a node turns the NHWC image to NCHW; for one channel a Reshape does."""
    if node.op_type == "Transpose":
        return attribute_ints(node, "perm") == NHWC_TO_NCHW
    shape = node.outputs[0].shape
    if node.op_type != "Reshape" or channels != 1 or shape is None or len(shape) != 4:
        return False
    return shape[1] == 1


def _describe_preprocessing(nodes: list[ir.Node], image: ImageContract) -> None:
    """State the shape and type of each result, so that later passes need not infer them."""
    import onnx_ir as ir

    dims: list[int | str] = ["N", image.height, image.width, image.channels]
    for node in nodes:
        if node.op_type == "Transpose":
            dims = [dims[i] for i in NHWC_TO_NCHW]
        node.outputs[0].name = node.name
        node.outputs[0].shape = ir.Shape(dims)
        node.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)


_MAIN = {
    *WEIGHTED_OR_TRANSPOSED,
    "MaxPool",
    "AveragePool",
    "GlobalAveragePool",
    "GlobalMaxPool",
    "LRN",
    "Flatten",
    "Softmax",
}


def _layer_name(node: ir.Node, layers: frozenset[str]) -> str:
    """Return the path of the layer that a node comes from; empty where nothing tells."""
    # A node that the converter made by merging two keeps a name of the layer in its operands.
    candidates = [node.name, node.outputs[0].name, *(v.name for v in node.inputs[1:] if v)]
    return next((path for name in candidates if (path := layer_in(name or "", layers))), "")


def _unique(name: str, taken: set[str | None]) -> str:
    unique, suffix = name, 1
    while unique in taken:
        suffix += 1
        unique = f"{name}_{suffix}"
    taken.add(unique)
    return unique
