"""ONNX file → rows: float graphs, and quantized ones in the QDQ form.

Quantize, dequantize, cast and transpose nodes are no layers: they are looked through, so that a
quantized graph reads like the float one. Activations and biases that stand alone are counted with
the layer before them, as runtimes execute them.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cnnedge.errors import CnnEdgeError, MissingExtraError, ModelError, first_line
from cnnedge.graph.edit import NCHW_TO_NHWC, NHWC_TO_NCHW, WEIGHTED_OR_TRANSPOSED
from cnnedge.inspect.formulas import Field, Span, join, output_size, same_padding
from cnnedge.inspect.table import Inspection, LayerRow, Reading, window_text
from cnnedge.kind import kind_of

if TYPE_CHECKING:
    import onnx

# Above so many elements a tensor is taken for a weight, and only its shape is kept.
_SMALL = 1024

_TRANSPARENT = frozenset({"Identity", "Cast", "QuantizeLinear", "DequantizeLinear", "Dropout"})
_RESHAPES = frozenset({"Reshape", "Flatten", "Squeeze", "Unsqueeze"})
_POOLS = frozenset({"MaxPool", "AveragePool", "LpPool"})
_WEIGHTED = frozenset(
    {
        *WEIGHTED_OR_TRANSPOSED,
        *("PRelu", "BatchNormalization", "InstanceNormalization", "LayerNormalization"),
    }
)
_ACTIVATIONS = frozenset(
    {
        *("Relu", "Clip", "LeakyRelu", "Elu", "Selu", "Sigmoid", "Tanh", "HardSigmoid"),
        *("HardSwish", "Gelu", "Mish", "Softplus", "Softsign"),
    }
)


@dataclass(frozen=True)
class _Value:
    """A tensor computed from the image: its row, its shape with the batch, what it depends on."""

    row: int
    shape: tuple[int, ...]
    reach: Field
    channels_last: bool = False

    @property
    def axes(self) -> tuple[int, int]:
        """The axes of height and width."""
        return (1, 2) if self.channels_last else (2, 3)

    @property
    def shown(self) -> tuple[int, ...]:
        """The shape without the batch, a feature map as height, width, channels."""
        if len(self.shape) != 4 or self.channels_last:
            return self.shape[1:]
        return (*self.shape[2:], self.shape[1])


@dataclass(frozen=True)
class _Constant:
    """A tensor that does not depend on the image: the initializer it stems from, and its shape."""

    root: str
    shape: tuple[int, ...]


def read_onnx(path: Path, height: int | None, width: int | None) -> Inspection:
    """Walk an ONNX classifier for one image; the weights' values are not looked at.

    Args:
        path: An `.onnx` file; its external data need not be there.
        height: Input height in pixels; the graph's own where it is None.
        width: Input width in pixels; likewise.

    Raises:
        MissingExtraError: the package onnx is not installed.
        ModelError: the file is missing or damaged, has not one image input, leaves its size open
            where none is given, or does not take that size.
    """
    try:
        import onnx
    except ImportError as error:
        raise MissingExtraError(error.name or "onnx", "export", purpose="inspecting") from error

    try:
        proto = onnx.load(path, load_external_data=False)
    except FileNotFoundError as error:
        raise ModelError(f"no model file {path}", fix="check the path") from error
    except Exception as error:  # protobuf's DecodeError, or what the disk says
        what = f"{path} is not a whole ONNX file, it is {kind_of(path)}"
        raise ModelError(what, fix="give an .onnx file, or export it again") from error
    if not proto.graph.node:
        raise ModelError(f"{path} is not an ONNX file, or has no nodes", fix="export it again")

    try:
        walk = _Walk(proto, path)
        walk.image(height, width)
        walk.infer_shapes()
        for node in walk.graph.node:
            walk.node(node)
        return walk.reading.finish(proto.graph.name or path.stem, str(path))
    except CnnEdgeError:
        raise
    except Exception as error:  # whatever sizes and types that cannot be make onnx and NumPy raise
        raise ModelError(
            f"{path} says what cannot be ({first_line(error)})", fix="export it again"
        ) from error


class _Walk:
    """Follows the nodes in their order, appending a row for each layer."""

    def __init__(self, proto: onnx.ModelProto, path: Path) -> None:
        from onnx import numpy_helper

        self.proto, self.graph, self.path = proto, proto.graph, path
        self.reading = Reading()
        self.values: dict[str, _Value] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.counted: set[str] = set()
        self.uses = Counter(name for node in self.graph.node for name in node.input)
        self.constants = {t.name: _Constant(t.name, tuple(t.dims)) for t in self.graph.initializer}
        self.arrays: dict[str, np.ndarray] = {}
        self.strip_weights()
        for tensor in self.graph.initializer:
            self.arrays[tensor.name] = numpy_helper.to_array(tensor)

    def strip_weights(self) -> None:
        """Turn large initializers into inputs, so that inferring shapes copies none of them."""
        from onnx import helper

        given = {value.name for value in self.graph.input}
        kept = []
        for tensor in self.graph.initializer:
            if prod(tensor.dims) <= _SMALL and self._is_here(tensor):
                kept.append(tensor)
            elif tensor.name not in given:
                self.graph.input.append(
                    helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims)
                )
        del self.graph.initializer[:]
        self.graph.initializer.extend(kept)
        for node in self.graph.node:
            if node.op_type == "MatMulNBits":  # ONNX Runtime's own: weights of 4 bits, packed
                self._unpack(node)

    def _is_here(self, tensor: onnx.TensorProto) -> bool:
        """Tell whether a tensor's values are to be had, fetching them if they lie in a file."""
        from onnx import TensorProto, external_data_helper

        if tensor.data_location != TensorProto.EXTERNAL:
            return True
        try:
            external_data_helper.load_external_data_for_tensor(tensor, str(self.path.parent))
        except Exception:  # missing, or a path that onnx does not follow: a weight like others
            return False
        tensor.data_location = TensorProto.DEFAULT
        del tensor.external_data[:]
        return True

    def _unpack(self, node: onnx.NodeProto) -> None:
        from onnx import TensorProto, helper

        sizes = (_attribute(node, "K"), _attribute(node, "N"))
        weight = f"{node.input[1]}:unpacked"
        self.graph.input.append(helper.make_tensor_value_info(weight, TensorProto.FLOAT, sizes))
        self.constants[weight] = _Constant(weight, sizes)
        node.op_type, node.domain = "MatMul", ""
        del node.input[1:], node.attribute[:]
        node.input.append(weight)

    def image(self, height: int | None, width: int | None) -> None:
        """Fix the size of the one image input, for a batch of one."""
        images = [value for value in self.graph.input if value.name not in self.constants]
        dims = images[0].type.tensor_type.shape.dim if len(images) == 1 else []
        if len(dims) != 4:
            raise ModelError(
                f"{self.path} has the inputs {', '.join(value.name for value in images)}",
                fix="pass a model with one image input of four dimensions",
            )
        sizes = [dim.dim_value for dim in dims]
        last = sizes[3] in (1, 3, 4) and sizes[1] not in (1, 3, 4)
        axes = (1, 2) if last else (2, 3)
        sizes[0] = 1
        sizes[axes[0]] = height or sizes[axes[0]]
        sizes[axes[1]] = width or sizes[axes[1]]
        if 0 in sizes:
            raise ModelError(
                f"{self.path} leaves its input size open", fix="pass a height and a width"
            )
        for dim, size in zip(dims, sizes, strict=True):
            dim.dim_value = size
        reach: Field = (Span(), Span())
        value = _Value(0, tuple(sizes), reach, channels_last=last)
        self.reading.add(images[0].name, "Input", value.shown, reach)
        self.values[images[0].name] = value

    def infer_shapes(self) -> None:
        """Fill `shapes` by ONNX's own shape inference."""
        import onnx

        del self.graph.value_info[:]  # recorded for another batch, or another size
        for output in self.graph.output:
            output.type.tensor_type.ClearField("shape")
        try:
            inferred = onnx.shape_inference.infer_shapes(self.proto, data_prop=True)
        except Exception as error:  # its own exception type is not public
            reason = first_line(error)
            raise ModelError(
                f"the sizes in {self.path} cannot be inferred: {reason}",
                fix="pass a height and a width that it takes",
            ) from error
        for value in [*inferred.graph.value_info, *inferred.graph.output]:
            dims = value.type.tensor_type.shape.dim
            if all(dim.HasField("dim_value") for dim in dims):
                self.shapes[value.name] = tuple(dim.dim_value for dim in dims)

    def node(self, node: onnx.NodeProto) -> None:
        """Look through a node, count it with the layer before it, or append its row."""
        values = [self.values[name] for name in node.input if name in self.values]
        if not values:
            self.constant(node)
            return
        if node.op_type in ("Shape", "Size"):
            return
        value, name = values[0], node.output[0]
        if node.op_type in _TRANSPARENT:
            self.values[name] = value
            return
        shape = self.shapes.get(name)
        if not shape:
            raise ModelError(
                f"the size of {node.name or name} ({node.op_type}) in {self.path} is unknown",
                fix="pass a size that the model takes, or a model of standard operations",
            )
        if 0 in shape:
            raise ModelError(
                f"nothing is left of the image after {node.name or name} in {self.path}",
                fix="pass a larger height and width",
            )
        if turned := _transposed(node, value, shape):
            self.values[name] = turned
        elif self.belongs_to_the_layer_before(node, value):
            self.reading.rows[value.row] = self.extended(node, value)
            self.values[name] = value
        else:
            self.values[name] = self.layer(node, values, shape)

    def constant(self, node: onnx.NodeProto) -> None:
        """Follow a node that computes on constants alone."""
        from onnx import numpy_helper

        if node.op_type == "Constant":
            tensor = _attribute(node, "value")
            if tensor is not None:
                self.arrays[node.output[0]] = numpy_helper.to_array(tensor)
                self.constants[node.output[0]] = _Constant(node.output[0], tuple(tensor.dims))
            return
        source = next((self.constants[n] for n in node.input if n in self.constants), None)
        if source is not None:
            for name in node.output:
                self.constants[name] = _Constant(source.root, self.shapes.get(name, source.shape))

    def belongs_to_the_layer_before(self, node: onnx.NodeProto, value: _Value) -> bool:
        """Tell whether a node is the activation or the bias of the layer that it follows."""
        row = self.reading.rows[value.row]
        if row.kind.partition("+")[0] not in _WEIGHTED or self.uses[node.input[0]] > 1:
            return False
        if node.op_type == "Add":
            return row.kind in ("MatMul", "Conv") and any(n in self.constants for n in node.input)
        return node.op_type in _ACTIVATIONS

    def extended(self, node: onnx.NodeProto, value: _Value) -> LayerRow:
        row = self.reading.rows[value.row]
        if node.op_type == "Add":
            return replace(row, params=row.params + self.params(node))
        return replace(row, kind=f"{row.kind}+{node.op_type}")

    def layer(self, node: onnx.NodeProto, values: list[_Value], shape: tuple[int, ...]) -> _Value:
        """Append the row of a node and return what it computes."""
        name = node.name or node.output[0]
        result = _Value(-1, shape, None, values[0].channels_last)
        reach = self.reach(node, name, values, result)
        shown = replace(result, reach=reach).shown
        row = self.reading.add(
            name,
            node.op_type,
            shown,
            reach,
            [value.row for value in values],
            window=self.window_text(node),
            params=self.params(node) if node.op_type in _WEIGHTED else 0,
            macs=self.macs(node, values, shape),
            view=node.op_type in _RESHAPES,
        )
        return replace(result, row=row, reach=reach)

    def params(self, node: onnx.NodeProto) -> int:
        """Return the elements of a node's constants that no row has counted yet."""
        total = 0
        for name in node.input:
            constant = self.constants.get(name)
            if constant is not None and constant.root not in self.counted:
                self.counted.add(constant.root)
                total += prod(constant.shape)
        return total

    def macs(self, node: onnx.NodeProto, values: list[_Value], shape: tuple[int, ...]) -> int:
        """Return a node's multiply-accumulates: every weight, at every position."""
        weights = [self.constants[name].shape for name in node.input[:2] if name in self.constants]
        if node.op_type == "Conv" and weights:
            return prod(weights[0]) * prod(shape[2:])
        if node.op_type == "ConvTranspose" and weights:
            return prod(weights[0]) * prod(values[0].shape[2:])
        if node.op_type == "Gemm" and weights:
            return prod(weights[0]) * shape[0]
        if node.op_type in ("MatMul", "Gemm"):
            return prod(shape) * values[0].shape[-1]
        return 0

    def window(
        self, node: onnx.NodeProto
    ) -> tuple[tuple[int, int], tuple[int, int], tuple[int, int]] | None:
        """Return the kernel, the strides and the dilations of a sliding window."""
        kernel = _attribute(node, "kernel_shape")
        if node.op_type == "Conv" and kernel is None:
            weight = self.constants.get(node.input[1])
            kernel = weight.shape[2:] if weight else None
        if node.op_type not in _POOLS | {"Conv"} or kernel is None or len(kernel) != 2:
            return None
        strides = _attribute(node, "strides") or (1, 1)
        return tuple(kernel), tuple(strides), tuple(_attribute(node, "dilations") or (1, 1))

    def window_text(self, node: onnx.NodeProto) -> str:
        window = self.window(node)
        return window_text(*window) if window else ""

    def reach(self, node: onnx.NodeProto, name: str, values: list[_Value], result: _Value) -> Field:
        """Return what a node's outputs depend on, checking its output size on the way."""
        reach = join([value.reach for value in values])
        if reach is None or len(values[0].shape) != 4 or len(result.shape) != 4:
            return None
        before = [values[0].shape[axis] for axis in values[0].axes]
        after = [result.shape[axis] for axis in result.axes]
        window = self.window(node)
        spans, expected = [], after
        if window is not None:
            expected = []
            for i, size in enumerate(before):
                kernel, stride, dilation = (part[i] for part in window)
                pads = _pads(node, i, size, kernel, stride, dilation)
                spans.append(reach[i].through(kernel, stride, pads[0], dilation))
                expected.append(output_size(size, kernel, stride, sum(pads), dilation))
        elif node.op_type in ("Slice", "Pad"):
            moves = self.moves(node, values[0])
            if moves is not None:
                spans = [
                    span.through(1, step, -start)
                    for span, (start, step) in zip(reach, moves, strict=True)
                ]
        elif before == after:
            return reach
        elif node.op_type.startswith(("Global", "Reduce")):
            return None
        if not spans:
            self.reading.notes.append(
                f"{name} ({node.op_type}): its receptive field cannot be followed"
            )
            return None
        if expected != after and not _attribute(node, "ceil_mode"):
            self.reading.notes.append(
                f"{name} ({node.op_type}): its output is {after[0]}x{after[1]} where the formula "
                f"gives {expected[0]}x{expected[1]}"
            )
        return spans[0], spans[1]

    def moves(self, node: onnx.NodeProto, value: _Value) -> list[tuple[int, int]] | None:
        """Return the first pixel and the step of a Slice or a Pad, in height and in width."""
        arrays = [self.arrays.get(name) for name in node.input[1:]]
        moves = dict.fromkeys(range(4), (0, 1))
        if node.op_type == "Pad":
            pads = arrays[0] if arrays else _attribute(node, "pads")
            if pads is None or len(pads) != 8:
                return None
            moves = {axis: (-int(pads[axis]), 1) for axis in range(4)}
        else:
            starts, _, axes, steps = [*arrays, None, None, None, None][:4]
            if starts is None or axes is None:
                return None
            for i, axis in enumerate(axes):
                start, size = int(starts[i]), value.shape[axis]
                step = 1 if steps is None else int(steps[i])
                moves[int(axis) % 4] = (start + size if start < 0 else start, step)
        return [moves[axis] for axis in value.axes]


def _transposed(node: onnx.NodeProto, value: _Value, shape: tuple[int, ...]) -> _Value | None:
    """Return the value in the other layout, or None if that is not what the node does."""
    order = NHWC_TO_NCHW if value.channels_last else NCHW_TO_NHWC
    # With a single channel no element moves, and converters write a Reshape.
    grey = node.op_type == "Reshape" and len(value.shape) == 4 and value.shown[2] == 1
    if list(_attribute(node, "perm") or ()) == order or (
        grey and shape == tuple(value.shape[axis] for axis in order)
    ):
        return replace(value, shape=shape, channels_last=not value.channels_last)
    return None


def _pads(
    node: onnx.NodeProto, axis: int, size: int, kernel: int, stride: int, dilation: int
) -> tuple[int, int]:
    """Return the padding of a window before and after, along height (0) or width (1)."""
    auto = _attribute(node, "auto_pad")
    before, after = same_padding(size, kernel, stride, dilation)
    if auto == b"SAME_UPPER":
        return before, after
    if auto == b"SAME_LOWER":
        return after, before
    pads = _attribute(node, "pads") or (0, 0, 0, 0)
    return pads[axis], pads[axis + 2]


def _attribute(node: onnx.NodeProto, name: str) -> Any:
    from onnx import helper

    found = next((a for a in node.attribute if a.name == name), None)
    return None if found is None else helper.get_attribute_value(found)
