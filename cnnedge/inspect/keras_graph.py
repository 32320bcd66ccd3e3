"""Keras model → rows: functional, sequential, nested and subclassed models alike."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING

from cnnedge.errors import MissingExtraError, ModelError
from cnnedge.inspect.formulas import Field, Span, join, output_size, same_padding
from cnnedge.inspect.table import Inspection, Reading, window_text

if TYPE_CHECKING:
    import keras

    from cnnedge.backends.keras_graph import Call

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


def read_keras(
    model: keras.Model, source: str, height: int | None, width: int | None
) -> Inspection:
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
    from cnnedge.backends.keras_graph import trace_calls

    graph = trace_calls(model, [shape])
    walk = _Walk()
    reach: Field = (Span(), Span())
    row = walk.reading.add("image", "Input", shape, reach)
    made = {id(graph.inputs[0]): _Value(row, shape, reach)}
    for call in graph.calls:
        results = walk.add(call, [made[id(tensor)] for tensor in call.inputs])
        made.update(zip(map(id, call.outputs), results, strict=True))
    return walk.reading.finish(model.name, source)


def _image_shape(model: keras.Model, height: int | None, width: int | None) -> tuple[int, int, int]:
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
    """The rows so far, and what has been counted in them."""

    def __init__(self) -> None:
        self.reading = Reading()
        self.counted: set[int] = set()

    def add(self, call: Call, values: list[_Value]) -> list[_Value]:
        """Append the row of one call; return its outputs."""
        layer, kind, name = call.operation, call.kind, call.name
        shapes = [tuple(tensor.shape[1:]) for tensor in call.outputs]
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

    def params(self, layer: keras.Layer) -> int:
        """Return the parameters of a layer that no row has counted yet."""
        new = [v for v in getattr(layer, "weights", ()) if id(v) not in self.counted]
        self.counted.update(map(id, new))
        return sum(prod(variable.shape) for variable in new)

    def macs(
        self, layer: keras.Layer, name: str, values: list[_Value], output: tuple[int, ...]
    ) -> int:
        """Return a layer's multiply-accumulates: every kernel, at every position."""
        from cnnedge.backends.keras_graph import kernels, positions

        counted = kernels(layer)
        if counted:
            used = positions(layer, values[0].shape, output)
            return sum(prod(kernel.shape) for kernel in counted) * used
        kind = type(layer).__name__
        if getattr(layer, "weights", ()) and kind not in _UNCOUNTED:
            self.reading.notes.append(f"{name} ({kind}): its multiply-accumulates are not counted")
        return 0

    def reach(
        self, layer: keras.Layer, name: str, values: list[_Value], output: tuple[int, ...]
    ) -> Field:
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


def _spatial(layer: keras.Layer) -> tuple[int, int]:
    """Return the axes of height and width in a shape without the batch."""
    return (1, 2) if getattr(layer, "data_format", None) == "channels_first" else (0, 1)


def _pair(layer: keras.Layer, attribute: str) -> tuple[int, int] | None:
    value = getattr(layer, attribute, None)
    if isinstance(value, tuple | list) and len(value) == 2:
        return int(value[0]), int(value[1])
    return None
