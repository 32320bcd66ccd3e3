"""Keras model → rows: functional, sequential, nested and subclassed models alike.

The model's `call` is traced on symbolic images of the size in question, and so is that of every
model inside it; what comes out is a functional graph with sizes, whatever form the model had.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any

from cnnedge.errors import MissingExtraError, ModelError
from cnnedge.inspect.formulas import Field, Span, join, output_size, same_padding
from cnnedge.inspect.table import Inspection, Reading, window_text

# At inference these hand their input on.
_VIEWS = frozenset(
    {
        *("Flatten", "Reshape", "Identity", "ActivityRegularization", "GaussianNoise"),
        *("Dropout", "SpatialDropout2D", "AlphaDropout", "GaussianDropout"),
    }
)
# With weights, yet by convention without multiply-accumulates.
_UNCOUNTED = frozenset(
    {
        *("BatchNormalization", "LayerNormalization", "GroupNormalization", "UnitNormalization"),
        *("Normalization", "PReLU", "SortPool2D"),
    }
)


@dataclass(frozen=True)
class _Value:
    """A symbolic tensor: the row that made it, its shape without the batch, what it depends on."""

    row: int
    shape: tuple[int, ...]
    reach: Field


def read_keras(model: Any, source: str, height: int | None, width: int | None) -> Inspection:
    """Walk a Keras classifier.

    Args:
        model: A built ``keras.Model`` with one image input ``[N, H, W, C]``.
        source: Where it came from.
        height: Input height in pixels; the model's own where it is None.
        width: Input width in pixels; likewise.

    Raises:
        MissingExtraError: Keras is not installed.
        ModelError: the model has not one image input, leaves its size open where none is given,
            does not take that size, or computes something that Keras cannot trace.
    """
    try:
        import keras  # noqa: F401
    except ImportError as error:
        raise MissingExtraError(error.name or "keras", "export", purpose="inspecting") from error

    shape = _image_shape(model, height, width)
    walk = _Walk()
    reach: Field = (Span(), Span())
    row = walk.reading.add("image", "Input", shape, reach)
    walk.through(model, [_Value(row, shape, reach)], "")
    return walk.reading.finish(model.name, source)


def _image_shape(model: Any, height: int | None, width: int | None) -> tuple[int, int, int]:
    inputs = getattr(model, "inputs", None)
    if inputs:
        shapes = [tuple(tensor.shape) for tensor in inputs]
    else:  # a subclassed model remembers what it was built for
        built_for = (model.get_build_config() or {}).get("input_shape") if model.built else None
        shapes = [tuple(built_for)] if built_for else []
    if len(shapes) != 1 or len(shapes[0]) != 4 or not shapes[0][3]:
        raise ModelError(
            f"the inputs of {model.name!r} are {shapes or 'not known'}",
            fix="pass a built model with one image input [N, H, W, C]",
        )
    sizes = height or shapes[0][1], width or shapes[0][2]
    if None in sizes:
        raise ModelError(
            f"{model.name!r} leaves its input size open", fix="pass a height and a width"
        )
    return (*sizes, shapes[0][3])


class _Walk:
    """Follows a model's graph, appending a row for each layer."""

    def __init__(self) -> None:
        self.reading = Reading()
        self.counted: set[int] = set()

    def through(self, model: Any, values: list[_Value], prefix: str) -> list[_Value]:
        """Append the rows of ``model`` applied to ``values``; return its outputs."""
        import keras

        inputs = [keras.Input(value.shape) for value in values]
        try:
            outputs = model.call(inputs[0] if len(inputs) == 1 else inputs)
            graph = keras.Function(inputs, outputs)
        except Exception as error:  # whatever the model's own code raises
            reason = (str(error).strip().splitlines() or [repr(error)])[0]
            size = " and ".join("x".join(map(str, value.shape)) for value in values)
            raise ModelError(
                f"{model.name!r} cannot be traced on an input of {size}: {reason}",
                fix="pass a size that it takes; its call must consist of layers and keras.ops",
            ) from error
        made = {id(tensor): value for tensor, value in zip(inputs, values, strict=True)}
        # Keras has no public list of a graph's nodes; its operations alone would merge the uses
        # of a layer that is called twice.
        for depth in sorted(graph._nodes_by_depth, reverse=True):
            for node in graph._nodes_by_depth[depth]:
                if node.is_input:
                    continue
                taken = [made[id(tensor)] for tensor in node.arguments.keras_tensors]
                if type(node.operation).__name__ == "ConvertToTensor":  # the trace's own
                    results = taken
                elif isinstance(node.operation, keras.Model):
                    results = self.through(node.operation, taken, f"{prefix}{node.operation.name}/")
                else:
                    results = self.layer(node, taken, prefix)
                made.update(zip(map(id, node.outputs), results, strict=True))
        return [made[id(tensor)] for tensor in keras.tree.flatten(outputs)]

    def layer(self, node: Any, values: list[_Value], prefix: str) -> list[_Value]:
        """Append the row of one layer, or of one operation of `keras.ops`."""
        layer, kind = node.operation, type(node.operation).__name__
        name = prefix + layer.name
        shapes = [tuple(tensor.shape[1:]) for tensor in node.outputs]
        reach = self.reach(layer, name, values, shapes[0])
        kernel = _pair(layer, "kernel_size") or _pair(layer, "pool_size")
        window = ""
        if kernel is not None:
            strides = _pair(layer, "strides") or kernel
            window = window_text(kernel, strides, _pair(layer, "dilation_rate") or (1, 1))
        row = self.reading.add(
            name,
            kind,
            shapes[0],
            reach,
            [value.row for value in values],
            window=window,
            params=self.params(layer),
            macs=self.macs(layer, name, values, shapes[0]),
            view=kind in _VIEWS,
        )
        return [_Value(row, shape, reach) for shape in shapes]

    def params(self, layer: Any) -> int:
        """Return the parameters of a layer that no row has counted yet."""
        new = [v for v in getattr(layer, "weights", ()) if id(v) not in self.counted]
        self.counted.update(map(id, new))
        return sum(prod(variable.shape) for variable in new)

    def macs(self, layer: Any, name: str, values: list[_Value], output: tuple[int, ...]) -> int:
        """Return a layer's multiply-accumulates: every kernel, at every position."""
        kind = type(layer).__name__
        if kind in ("Conv2D", "DepthwiseConv2D", "Dense"):
            return prod(layer.kernel.shape) * _positions(layer, output)
        if kind == "SeparableConv2D":
            kernels = prod(layer.depthwise_kernel.shape) + prod(layer.pointwise_kernel.shape)
            return kernels * _positions(layer, output)
        if kind == "Conv2DTranspose":
            return prod(layer.kernel.shape) * _positions(layer, values[0].shape)
        if getattr(layer, "weights", ()) and kind not in _UNCOUNTED:
            self.reading.notes.append(f"{name} ({kind}): its multiply-accumulates are not counted")
        return 0

    def reach(self, layer: Any, name: str, values: list[_Value], output: tuple[int, ...]) -> Field:
        """Return what a layer's outputs depend on, checking its output size on the way."""
        import keras

        reach = join([value.reach for value in values])
        taken = values[0].shape
        if reach is None or len(taken) != 3 or len(output) != 3:
            return None
        if type(layer).__name__.startswith("Global"):
            return None
        axes = _spatial(layer)
        before, after = [taken[axis] for axis in axes], [output[axis] for axis in axes]

        if isinstance(layer, keras.layers.ZeroPadding2D | keras.layers.Cropping2D):
            padding = isinstance(layer, keras.layers.ZeroPadding2D)
            amounts = layer.padding if padding else [(-a, -b) for a, b in layer.cropping]
            expected = [size + sum(pair) for size, pair in zip(before, amounts, strict=True)]
            spans = [s.through(1, 1, pair[0]) for s, pair in zip(reach, amounts, strict=True)]
        elif (kernel := _pair(layer, "kernel_size") or _pair(layer, "pool_size")) and (
            type(layer).__name__ != "Conv2DTranspose"
        ):
            strides = _pair(layer, "strides") or kernel
            dilation = _pair(layer, "dilation_rate") or (1, 1)
            spans, expected = [], []
            for i, size in enumerate(before):
                window = kernel[i], strides[i]
                pads = (
                    same_padding(size, *window, dilation[i]) if layer.padding == "same" else (0, 0)
                )
                spans.append(reach[i].through(*window, pads[0], dilation[i]))
                expected.append(output_size(size, *window, sum(pads), dilation[i]))
        elif before == after:
            if not type(layer).__module__.startswith(("keras.", "cnnedge.")):
                self.reading.notes.append(
                    f"{name} ({type(layer).__name__}): taken to work pixel by pixel"
                )
            return reach
        else:
            self.reading.notes.append(
                f"{name} ({type(layer).__name__}): its receptive field cannot be followed"
            )
            return None

        if expected != after:
            self.reading.notes.append(
                f"{name} ({type(layer).__name__}): its output is {after[0]}x{after[1]} where the "
                f"formula gives {expected[0]}x{expected[1]}"
            )
        return spans[0], spans[1]


def _spatial(layer: Any) -> tuple[int, int]:
    """Return the axes of height and width in a shape without the batch."""
    return (1, 2) if getattr(layer, "data_format", None) == "channels_first" else (0, 1)


def _positions(layer: Any, shape: tuple[int, ...]) -> int:
    """Return how often a layer applies its kernels: once per pixel of a map, or of a vector."""
    if getattr(layer, "data_format", None) == "channels_first":
        return prod(shape[1:])
    return prod(shape[:-1])


def _pair(layer: Any, attribute: str) -> tuple[int, int] | None:
    value = getattr(layer, attribute, None)
    if isinstance(value, tuple | list) and len(value) == 2:
        return int(value[0]), int(value[1])
    return None
