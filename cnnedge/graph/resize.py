"""The resize inside the graph: images of any size in, and Pillow's very pixels behind it.

`image.fit` resizes by Pillow's antialiased bilinear filter: the width first and then the height,
each time a sum of pixels times weights of 22 bits, rounded to 8 bits (Pillow's ``Resample.c``).
ONNX's Resize comes near that on one runtime and is missing or another on the next, so the sums are
written out: as matrix products whose weights are computed from the image's shape. Every number in
them is a whole number below 2^24, which float32 holds exactly, so that no order of summing and no
runtime changes a pixel: for networks of 32…512 pixels, images of up to 16,000 a side. Far beyond
that levels change: 40,000 pixels into one are two off. See docs/decisions/resize-in-graph.md.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from cnnedge.errors import ModelError, first_line
from cnnedge.graph.edit import NCHW_TO_NHWC, NHWC_TO_NCHW, initializer, shape_of
from cnnedge.graph.image_part import RESIZE
from cnnedge.graph.passes import named_in_errors, settle_names
from cnnedge.graph.write import serialize
from cnnedge.image import ImageContract
from cnnedge.metadata import IN_THE_GRAPH, META_IMAGE, META_RESIZE

if TYPE_CHECKING:
    import onnx_ir as ir

    _Operand = ir.Value | np.ndarray | int | float

_LEAST_OPSET = 13  # ReduceSum and Split by input, Min and Max of whole numbers
# Columns or rows that share a matrix product: the more, the fewer products, and the more of the
# weights are zeros that are multiplied all the same.
_GROUP = 16
# Pillow's weights are multiples of 2^-22. Their upper 16 bits times a pixel and their lower 6 times
# a pixel each sum up exactly in float32, over more than a thousand pixels.
_BITS, _LOW_BITS = 22, 6


def put_resize(model: bytes, image: ImageContract) -> bytes:
    """Return an exported model that takes images of any size, and answers as it did.

    Args:
        model: An ONNX file of a bundle: its input is uint8 ``[N, H, W, C]`` of the contract's size.
        image: The bundle's image contract.

    Returns:
        The same model with an input uint8 ``[N, any, any, C]``: decoded upright, RGB, and not
        resized. Its metadata are kept and say in `META_RESIZE` that the resize is inside.

    Raises:
        ModelError: it is no ONNX model, takes something else, or has its resize inside already.
    """
    import onnx
    import onnx_ir as ir

    try:
        loaded = ir.from_proto(onnx.load_model_from_string(model))
    except Exception as error:  # protobuf's decoder has an exception of its own
        raise ModelError(
            f"these {len(model)} bytes are no ONNX model ({first_line(error)})",
            fix="give a .onnx file of a bundle",
        ) from error
    add_resize(loaded, image)
    return serialize(loaded)


@named_in_errors
def add_resize(model: ir.Model, image: ImageContract) -> None:
    """Put the resize in front of an ``onnx_ir.Model``, in place; see `put_resize`."""
    import onnx_ir as ir

    old = _fixed_input(model, image)
    new = ir.Value(
        name=old.name,
        shape=ir.Shape([shape_of(old)[0], "H", "W", image.channels]),
        type=ir.TensorType(ir.DataType.UINT8),
    )
    ops = _Ops(model)
    pixels, width, height = _placed(ops, new, image)
    planes = ops("Transpose", pixels, perm=NHWC_TO_NCHW, name="nchw")
    narrow = _resize_axis(ops, planes, width, image.channels)
    small = _resize_axis(ops, narrow, height, image.channels)
    levels = ops("Cast", small, to=ir.DataType.UINT8, name="uint8")
    resized = ops("Transpose", levels, perm=NCHW_TO_NHWC, name="resized")
    resized.shape, resized.type = old.shape, old.type
    old.replace_all_uses_with(resized)
    graph = model.graph
    place = list(graph.inputs).index(old)
    graph.inputs[place] = new
    first = next(iter(graph))
    graph.insert_before(first, ops.nodes)
    settle_names(model)
    model.metadata_props[META_RESIZE] = IN_THE_GRAPH


@dataclass(frozen=True)
class _Axis:
    """One axis of the resize; the first three are int64 scalars of the graph.

    Attributes:
        name: "width" or "height".
        source: How many pixels there are.
        target: How many they become.
        offset: How many black ones come before those.
        size: How many there are in the end; known when the graph is written.
    """

    name: str
    source: ir.Value
    target: ir.Value
    offset: ir.Value
    size: int

    @property
    def groups(self) -> int:
        """How many matrix products share the work."""
        return -(-self.size // _GROUP)

    @property
    def group_size(self) -> int:
        """How many results each of them has; the last one's may reach beyond `size`."""
        return -(-self.size // self.groups)


@dataclass
class _Ops:
    """Nodes under construction: ``ops("Add", a, 1, name="sum")`` appends one, returns its result.

    Integers among the inputs become int64 constants, floats become float32 ones.
    """

    model: ir.Model
    nodes: list[ir.Node] = field(default_factory=list)
    _constants: dict[tuple[str, tuple[int, ...], bytes], ir.Value] = field(default_factory=dict)
    _taken: set[str] = field(default_factory=set)

    def __call__(
        self, op_type: str, *inputs: _Operand, name: str, **attributes: int | list[int]
    ) -> ir.Value:
        return self.several(op_type, *inputs, name=name, count=1, **attributes)[0]

    def several(
        self, op_type: str, *inputs: _Operand, name: str, count: int, **attributes: int | list[int]
    ) -> Sequence[ir.Value]:
        """Append a node of several results."""
        import onnx_ir as ir

        unique, suffix = f"{RESIZE}/{name}", 1
        while unique in self._taken:
            suffix += 1
            unique = f"{RESIZE}/{name}_{suffix}"
        self._taken.add(unique)
        operands = [self.constant(value) for value in inputs]
        node = ir.node(op_type, operands, attributes, num_outputs=count, name=unique)
        for index, value in enumerate(node.outputs):
            value.name = unique if count == 1 else f"{unique}:{index}"
        self.nodes.append(node)
        return list(node.outputs)

    def constant(self, value: _Operand) -> ir.Value:
        """Return a number or an array as an initializer, and a result as it is."""
        if isinstance(value, int):
            value = np.array(value, np.int64)
        elif isinstance(value, float):
            value = np.array(value, np.float32)
        if not isinstance(value, np.ndarray):
            return value
        key = (value.dtype.str, value.shape, value.tobytes())
        if key not in self._constants:
            self._constants[key] = initializer(self.model, f"{RESIZE}/constant", value)
        return self._constants[key]


def _fixed_input(model: ir.Model, image: ImageContract) -> ir.Value:
    """Return the input that the resize goes before.

    Raises:
        ModelError: it is none that an export with that contract has.
    """
    import onnx_ir as ir

    graph, props = model.graph, model.metadata_props
    if META_RESIZE in props:
        raise ModelError(
            "this model has its resize inside already", fix="start from the bundle's own .onnx"
        )
    inputs = [value for value in graph.inputs if value.name not in graph.initializers]
    wanted = image.shape
    takes = ", ".join(
        f"{v.dtype.name.lower() if v.dtype is not None else '?'} {v.shape}" for v in inputs
    )
    if (
        len(inputs) != 1
        or inputs[0].dtype != ir.DataType.UINT8
        or inputs[0].shape is None
        or tuple(inputs[0].shape)[1:] != wanted
    ):
        raise ModelError(
            f"the model takes {takes or 'nothing'}, and a resize goes before uint8 "
            f"[N, {', '.join(map(str, wanted))}]",
            fix="export it without --input float32, and give its own image contract",
        )
    if META_IMAGE in props:
        try:
            said = ImageContract.from_dict(json.loads(props[META_IMAGE]))
        except (ValueError, KeyError, TypeError) as error:
            raise ModelError(
                f"the model's metadata {META_IMAGE} cannot be read ({error})",
                fix="export it again",
            ) from error
        if said != image:
            raise ModelError(
                f"the model was exported for {said}, not for {image}",
                fix="give its own image contract",
            )
    if graph.opset_imports.get("", 0) < _LEAST_OPSET:
        raise ModelError(
            f"the model is of opset {graph.opset_imports.get('')}, and the resize needs "
            f"{_LEAST_OPSET}",
            fix="export it again",
        )
    return inputs[0]


def _placed(ops: _Ops, pixels: ir.Value, image: ImageContract) -> tuple[ir.Value, _Axis, _Axis]:
    """Return the pixels to be resized, and both axes, as `image.fit` places them."""
    shape = ops("Shape", pixels, name="shape")
    height = ops("Gather", shape, 1, axis=0, name="source_height")
    width = ops("Gather", shape, 2, axis=0, name="source_width")
    target_height = ops.constant(image.height)
    target_width = ops.constant(image.width)
    top = left = ops.constant(0)
    if image.resize == "crop":
        pixels, height, width = _cropped(ops, pixels, height, width, image)
    elif image.resize == "letterbox":
        # float64, as Python computes it: the same ties are rounded to even.
        across, down = _double(ops, width), _double(ops, height)
        scale = ops(
            "Min",
            ops("Div", np.array(image.width, np.float64), across, name="scale_across"),
            ops("Div", np.array(image.height, np.float64), down, name="scale_down"),
            name="scale",
        )
        target_width = _whole(ops, ops("Mul", across, scale, name="inner_width"))
        target_height = _whole(ops, ops("Mul", down, scale, name="inner_height"))
        left = ops("Div", ops("Sub", image.width, target_width, name="margin"), 2, name="left")
        top = ops("Div", ops("Sub", image.height, target_height, name="margin"), 2, name="top")
    return (
        pixels,
        _Axis("width", width, target_width, left, image.width),
        _Axis("height", height, target_height, top, image.height),
    )


def _cropped(
    ops: _Ops, pixels: ir.Value, height: ir.Value, width: ir.Value, image: ImageContract
) -> tuple[ir.Value, ir.Value, ir.Value]:
    """Return the largest centred part of the contract's shape, its height and its width."""
    aspect = np.array(image.width / image.height, np.float64)
    across, down = _double(ops, width), _double(ops, height)
    wide = ops("Mul", down, aspect, name="crop_across")
    high = ops("Div", across, aspect, name="crop_down")
    new_width = _whole(ops, ops("Min", across, wide, name="crop_width"))
    new_height = _whole(ops, ops("Min", down, high, name="crop_height"))
    left = ops("Div", ops("Sub", width, new_width, name="margin"), 2, name="crop_left")
    top = ops("Div", ops("Sub", height, new_height, name="margin"), 2, name="crop_top")
    begin = [ops("Reshape", v, np.array([1], np.int64), name="begin") for v in (top, left)]
    sizes = [
        ops("Reshape", v, np.array([1], np.int64), name="size") for v in (new_height, new_width)
    ]
    start = ops("Concat", *begin, axis=0, name="crop_start")
    end = ops("Add", start, ops("Concat", *sizes, axis=0, name="crop_size"), name="crop_end")
    part = ops("Slice", pixels, start, end, np.array([1, 2], np.int64), name="crop")
    return part, new_height, new_width


def _double(ops: _Ops, value: ir.Value) -> ir.Value:
    import onnx_ir as ir

    return ops("Cast", value, to=ir.DataType.DOUBLE, name="double")


def _whole(ops: _Ops, value: ir.Value) -> ir.Value:
    """Return ``max(1, round(value))`` as int64."""
    import onnx_ir as ir

    rounded = ops("Round", value, name="round")
    return ops(
        "Max", ops("Cast", rounded, to=ir.DataType.INT64, name="whole"), 1, name="at_least_1"
    )


def _resize_axis(ops: _Ops, planes: ir.Value, axis: _Axis, channels: int) -> ir.Value:
    """Return float32 planes ``[N, C, H, W]`` of whole numbers, resized along one axis.

    Args:
        ops: Where the nodes go.
        planes: uint8 or float32, whole numbers 0…255.
        axis: Which, and from what to what.
        channels: C.
    """
    import onnx_ir as ir

    name, groups, group = axis.name, axis.groups, axis.group_size
    weights, starts, ends = _weights(ops, axis)
    along = 3 if name == "width" else 2
    if name == "width":
        weights = ops("Transpose", weights, perm=[0, 2, 1], name=f"{name}/weights")
    ones = np.ones(groups, np.int64)
    start_of = ops.several("Split", starts, ones, axis=0, name=f"{name}/start", count=groups)
    end_of = ops.several("Split", ends, ones, axis=0, name=f"{name}/end", count=groups)
    sums = []
    for g in range(groups):
        part = ops(
            "Slice",
            planes,
            start_of[g],
            end_of[g],
            np.array([along], np.int64),
            name=f"{name}/part",
        )
        part = ops("Cast", part, to=ir.DataType.FLOAT, name=f"{name}/float")
        own = ops("Gather", weights, g, axis=0, name=f"{name}/own_weights")
        factors = (part, own) if name == "width" else (own, part)
        sums.append(ops("MatMul", *factors, name=f"{name}/sum"))
    both = ops("Concat", *sums, axis=along, name=f"{name}/sums")
    # Each product holds the sums over the upper bits, then those over the lower ones.
    if name == "width":
        apart, together = [0, channels, -1, groups, 2, group], [0, channels, -1, groups * group]
        pair = 4
    else:
        apart, together = [0, channels, groups, 2, group, -1], [0, channels, groups * group, -1]
        pair = 3
    split = ops("Reshape", both, np.array(apart, np.int64), name=f"{name}/apart")
    high, low = ops.several(
        "Split", split, np.ones(2, np.int64), axis=pair, name=f"{name}/bits", count=2
    )
    carried = ops("Add", high, ops("Floor", low, name=f"{name}/low"), name=f"{name}/carried")
    scaled = ops("Mul", carried, 2.0 ** (_LOW_BITS - _BITS), name=f"{name}/scaled")
    level = ops("Floor", ops("Add", scaled, 0.5, name=f"{name}/half"), name=f"{name}/level")
    result = ops("Reshape", level, np.array(together, np.int64), name=f"{name}/together")
    if groups * group > axis.size:
        bounds = [np.array([v], np.int64) for v in (0, axis.size, along)]
        result = ops("Slice", result, *bounds, name=f"{name}/cut")
    return result


def _weights(ops: _Ops, axis: _Axis) -> tuple[ir.Value, ir.Value, ir.Value]:
    """Return an axis's weights, group by group, and the source pixels each group is of.

    With n source pixels and m results, result i weighs pixel x by a triangle around its own
    place: ``max(0, 2·max(n, m) − |(2x + 1)·m − (2i + 1)·n|)``, over their sum.

    Returns:
        float32 ``[groups, 2 · group_size, length]``: the upper 16 bits of each weight as whole
        numbers, then the lower 6 as multiples of 1/64; int64 ``[groups]``, the first pixel of each
        group; and likewise the one after the last.
    """
    import onnx_ir as ir

    name, group = axis.name, axis.group_size
    n, m, offset = axis.source, axis.target, axis.offset
    places = np.arange(axis.groups * group, dtype=np.int64).reshape(-1, group, 1)

    def odd(value: _Operand, what: str) -> ir.Value:
        return ops("Add", ops("Mul", value, 2, name=f"{name}/{what}_2"), 1, name=f"{name}/{what}")

    reach = ops("Mul", ops("Max", n, m, name=f"{name}/larger"), 2, name=f"{name}/reach")
    # The pixels that a group reaches, and one or two more: those weigh nothing.
    spread = ops("Add", ops("Mul", n, group - 1, name=f"{name}/span"), reach, name=f"{name}/spread")
    length = ops("Add", ops("Div", spread, m, name=f"{name}/pixels"), 3, name=f"{name}/length")
    length = ops("Min", length, n, name=f"{name}/length")
    first = ops("Sub", places[:, 0, 0], offset, name=f"{name}/first")
    middle = ops("Mul", odd(first, "first_odd"), n, name=f"{name}/middle")
    low = ops("Sub", middle, reach, name=f"{name}/lowest")
    low = ops("Div", low, ops("Mul", m, 2, name=f"{name}/twice"), name=f"{name}/lowest")
    low = ops("Sub", low, 1, name=f"{name}/lowest")
    last = ops("Sub", n, length, name=f"{name}/last")
    starts = ops("Max", ops("Min", low, last, name=f"{name}/starts"), 0, name=f"{name}/starts")
    ends = ops("Add", starts, length, name=f"{name}/ends")

    column = ops("Reshape", starts, np.array([-1, 1, 1], np.int64), name=f"{name}/column")
    pixel = ops(
        "Add", ops("Range", 0, length, 1, name=f"{name}/range"), column, name=f"{name}/pixel"
    )
    result = ops("Sub", places, offset, name=f"{name}/result")
    at = [
        ops("Cast", value, to=ir.DataType.FLOAT, name=f"{name}/at")
        for value in (
            ops("Mul", odd(pixel, "pixel_odd"), m, name=f"{name}/pixel_at"),
            ops("Mul", odd(result, "result_odd"), n, name=f"{name}/result_at"),
            reach,
        )
    ]
    distance = ops("Abs", ops("Sub", at[0], at[1], name=f"{name}/apart"), name=f"{name}/distance")
    share = ops("Relu", ops("Sub", at[2], distance, name=f"{name}/near"), name=f"{name}/share")
    # A margin of the letterbox has no weights and is black; what is cut away has none either.
    inside = ops(
        "And",
        ops("Less", -1, result, name=f"{name}/not_before"),
        ops("Less", result, m, name=f"{name}/not_behind"),
        name=f"{name}/inside",
    )
    mask = ops("Cast", inside, to=ir.DataType.FLOAT, name=f"{name}/mask")
    share = ops("Mul", share, mask, name=f"{name}/share")
    total = ops("ReduceSum", share, np.array([2], np.int64), keepdims=1, name=f"{name}/total")
    total = ops("Max", total, 1.0, name=f"{name}/total")
    steps = ops(
        "Mul", _rounded_ratio(ops, name, share, total), 2.0**-_LOW_BITS, name=f"{name}/steps"
    )
    upper = ops("Floor", steps, name=f"{name}/upper")
    lower = ops("Sub", steps, upper, name=f"{name}/lower")
    return ops("Concat", upper, lower, axis=1, name=f"{name}/both"), starts, ends


def _rounded_ratio(ops: _Ops, name: str, share: ir.Value, total: ir.Value) -> ir.Value:
    """Return ``floor(share / total · 2^22 + 1/2)`` in float32, exactly.

    A division in float32 is one off at times, and some runtimes have no float64. What is left over
    tells by how much: its two terms leave int32, and their difference does not, so that it is right
    in arithmetic modulo 2^32.
    """
    import onnx_ir as ir

    ratio = ops(
        "Mul", ops("Div", share, total, name=f"{name}/ratio"), 2.0**_BITS, name=f"{name}/ratio"
    )
    guess = ops("Floor", ops("Add", ratio, 0.5, name=f"{name}/ratio"), name=f"{name}/guess")
    shares, totals, guesses = (
        ops("Cast", value, to=ir.DataType.INT32, name=f"{name}/int32")
        for value in (share, total, guess)
    )
    left = ops(
        "Sub",
        ops("Mul", shares, np.array(2**_BITS, np.int32), name=f"{name}/scaled_share"),
        ops("Mul", guesses, totals, name=f"{name}/taken"),
        name=f"{name}/left",
    )
    twice = ops("Mul", left, np.array(2, np.int32), name=f"{name}/left_2")
    below = ops("Neg", totals, name=f"{name}/minus_total")
    up = ops("GreaterOrEqual", twice, totals, name=f"{name}/one_more")
    down = ops("Less", twice, below, name=f"{name}/one_less")
    up, down = (ops("Cast", v, to=ir.DataType.FLOAT, name=f"{name}/float") for v in (up, down))
    return ops("Add", guess, ops("Sub", up, down, name=f"{name}/change"), name=f"{name}/weight")
