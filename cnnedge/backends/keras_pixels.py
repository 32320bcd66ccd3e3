"""What a Keras model makes of its pixels before its first weights, read from the values it gives.

A scaling may be a Rescaling, an operator, two layers in a row, stand behind an augmentation or
inside a nested model. So layers are not looked up by class: what comes before the first weights is
run on images of one colour each, and what comes out is fitted as an affine map of the colour.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import keras
import numpy as np

from cnnedge.backends.keras_graph import Call, KerasGraph, trace_calls
from cnnedge.errors import ModelError
from cnnedge.image import ImageContract, normalizations_of, normalize

# Enough to fit an affine map of three channels, and to see where a map is none.
_COLOURS = np.array(
    [
        *((0, 0, 0), (255, 255, 255), (255, 0, 0), (0, 255, 0), (0, 0, 255)),
        *((128, 128, 128), (64, 192, 32), (200, 100, 150), (20, 40, 90)),
    ],
    np.uint8,
)
_EXACT = 0.01  # of a value's range: float16 and bfloat16 round
_MOST = 0.9  # of the elements decide: padding and dark corners differ
_FEW = 4  # weights of a layer that at most scales and shifts each channel


@dataclass(frozen=True)
class Reach:
    """What reaches a model's first weights when its pixels go from 0 to 255.

    Attributes:
        low: The lowest value.
        high: The highest.
        centred: Whether it is pixels less a mean that pixels can have, over a deviation that they
            can have with it.
        usual: Whether it is that, or a range that networks are trained on, such as 0…1 or −1…1.
    """

    low: float
    high: float
    centred: bool = False
    usual: bool = False

    def __str__(self) -> str:
        return f"{self.low:.4g}…{self.high:.4g}"


@dataclass(frozen=True)
class PixelReading:
    """What a model's first layers do to its pixels.

    Attributes:
        by: The names of those that change their values; none: the model leaves scaling to others.
        reach: What reaches the first weights, by the normalization before the model.
    """

    by: tuple[str, ...]
    reach: Mapping[str, Reach]

    @property
    def takes_raw(self) -> bool:
        """Whether the model scales raw 0…255 pixels by itself."""
        return bool(self.by) and self.reach["none"].usual

    @property
    def fitting(self) -> tuple[str, ...]:
        """The normalizations whose pixels its own numbers were made for; none: they do not say.

        Behind "unit" every model is given 0…1, and behind "caffe" something centred: that says
        nothing of the model.
        """
        if self.takes_raw:
            return ("none",)
        small = ("unit", "tf", "torch") if self.by else ()
        return tuple(name for name in small if name in self.reach and self.reach[name].centred)


def read_pixels(model: keras.Model, image: ImageContract) -> PixelReading | None:
    """Read what a model makes of its pixels; None where its calls cannot be traced.

    Args:
        model: A built ``keras.Model`` of one image.
        image: Its size and channels.
    """
    try:
        graph = trace_calls(model, [image.shape])
    except ModelError:
        return None
    colours = _COLOURS[:, : image.channels]
    images = np.broadcast_to(colours[:, None, None], (len(colours), *image.shape))
    by: tuple[str, ...] = ()
    reach = {}
    for name in normalizations_of(image.channels):
        front, changed = _first_values(graph, normalize(images, name))
        reach[name] = _reach([_affine(values, colours) for values in front])
        by = changed if name == "none" else by
    return PixelReading(by, reach)


def _first_values(
    graph: KerasGraph, images: np.ndarray
) -> tuple[list[np.ndarray], tuple[str, ...]]:
    """Return what each tensor holds at which weights, or no affine map, come next.

    Returns:
        Float arrays ``[images, …]``, and the names of the calls that changed the values.
    """
    known = {id(graph.inputs[0]): keras.ops.convert_to_tensor(images)}
    front: dict[int, np.ndarray] = {}
    changed = []
    for call in graph.calls:
        taken = [id(tensor) for tensor in call.inputs if id(tensor) in known]
        if not taken:
            continue
        before = [np.asarray(known[key], np.float32) for key in taken]
        made = None
        if len(taken) == len(call.inputs) and not _weighs(call.operation):
            made = _run(call, known, images)
        if made is None:
            front.update(zip(taken, before, strict=True))
            continue
        known.update(zip(map(id, call.outputs), made, strict=True))
        if _ends(before) != _ends(made):
            changed.append(call.name)
        if _is_batch_norm(call.operation):
            front[id(call.outputs[0])] = np.asarray(made[0], np.float32)
            del known[id(call.outputs[0])]
    return list(front.values()), tuple(changed)


def _weighs(operation: keras.Operation) -> bool:
    """Tell whether a layer has weights that were learned of more than the pixels' own scale."""
    if isinstance(operation, keras.layers.Normalization) or _is_batch_norm(operation):
        return False
    if getattr(operation, "kernel", None) is not None:
        return True
    return any(prod(w.shape) > _FEW for w in getattr(operation, "weights", ()))


def _is_batch_norm(operation: keras.Operation) -> bool:
    return isinstance(operation, keras.layers.BatchNormalization)


def _run(call: Call, known: Mapping[int, Any], images: np.ndarray) -> list[Any] | None:
    """Return what a call makes at inference; None where that is no affine map of the colours."""
    operation = call.operation
    arguments, keywords = call.node.arguments.fill_in(known)
    # A functional model's `training=False` overrides what the call was recorded with, too.
    keywords.pop("training", None)
    if getattr(operation, "_call_has_training_arg", False):
        keywords["training"] = False
    try:
        if _is_batch_norm(operation):
            made = [_standardized(operation, arguments[0])]
        else:
            made = keras.tree.flatten(operation(*arguments, **keywords))
        values = [np.asarray(keras.ops.convert_to_numpy(one), np.float32) for one in made]
    except Exception:  # a layer's own code; what cannot be run here is not read
        return None
    if len(made) != len(call.outputs) or any(v.shape[:1] != images.shape[:1] for v in values):
        return None
    fitted = [_affine(v, images[:, 0, 0]) for v in values]
    varied = any(_varies(v).any() for v in values)
    return made if varied and all(fit is not None for fit in fitted) else None


def _standardized(layer: keras.Layer, values: Any) -> np.ndarray:
    """Return a batch norm's input less its mean, over its deviation: what it has seen of it.

    Raises:
        ValueError: it was never trained.
    """
    mean, variance = np.asarray(layer.moving_mean), np.asarray(layer.moving_variance)
    if not mean.any() and (variance == 1).all():
        raise ValueError
    shape = [1] * len(values.shape)
    shape[layer.axis] = -1
    deviation = np.sqrt(variance + layer.epsilon)
    return (np.asarray(values) - mean.reshape(shape)) / deviation.reshape(shape)


def _ends(values: list[Any]) -> list[float]:
    """Return the least and the greatest of all values, to four digits."""
    arrays = [np.asarray(v, np.float32) for v in values]
    ends = min(a.min() for a in arrays), max(a.max() for a in arrays)
    return [float(f"{end:.4g}") for end in ends]


def _varies(values: np.ndarray) -> np.ndarray:
    """Tell of each element whether it depends on the image, bool ``[elements]``."""
    flat = values.reshape(len(values), -1)
    return np.ptp(flat, axis=0) > 1e-5 * np.maximum(1e-3, np.abs(flat).max(axis=0))


def _affine(values: np.ndarray, colours: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
    """Fit each element that varies as an affine map of the image's colour.

    Args:
        values: Float ``[images, …]``.
        colours: ``[images, channels]``.

    Returns:
        Factors float64 ``[channels, elements]`` and offsets ``[elements]``; None where one of them
        is no affine map.
    """
    flat = values.reshape(len(values), -1)[:, _varies(values)].astype(np.float64)
    if not np.isfinite(flat).all():
        return None
    design = np.column_stack([colours, np.ones(len(colours))]).astype(np.float64)
    fitted = np.linalg.pinv(design) @ flat
    error = np.abs(design @ fitted - flat).max(axis=0, initial=0.0)
    if (error > _EXACT * np.ptp(flat, axis=0)).any():
        return None
    return fitted[:-1], fitted[-1]


def _reach(maps: list[tuple[np.ndarray, np.ndarray] | None]) -> Reach:
    known = [found for found in maps if found is not None and found[1].size]
    if not known:
        return Reach(0.0, 0.0)
    ends = [_span(*found) for found in known]
    low = min(float(low.min()) for low, _ in ends)
    high = max(float(high.max()) for _, high in ends)
    if len(known) < len(maps):
        return Reach(low, high)
    alive = [(f[:, there], o[there]) for f, o in known if (there := _alive(f)).any()]
    centred = [_centred(*found) for found in alive]
    usual = [c | _ranged(*found) for c, found in zip(centred, alive, strict=True)]
    most = [all(np.mean(told) >= _MOST for told in both) for both in (centred, usual)]
    rounding = 1e-6 * high
    return Reach(
        0.0 if abs(low) < rounding else low, high, *(bool(alive) and told for told in most)
    )


def _span(factor: np.ndarray, offset: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the least and the greatest value of each element, for colours of 0…255."""
    low = offset + 255 * np.minimum(factor, 0).sum(0)
    return low, low + 255 * np.abs(factor).sum(0)


def _alive(factor: np.ndarray) -> np.ndarray:
    """Tell which were not of a constant channel, and divided by next to nothing."""
    return np.abs(factor).sum(0) < 1e4


def _ranged(factor: np.ndarray, offset: np.ndarray) -> np.ndarray:
    """Tell which make of 0…255 about 0…1, −1…1, −0.5…0.5 or 0…2."""
    low, high = _span(factor, offset)
    return (high - low >= 0.9) & (high - low <= 2.2) & (low >= -1.3) & (high <= 2.3)


def _centred(factor: np.ndarray, offset: np.ndarray) -> np.ndarray:
    """Tell which subtract a mean, and divide by a deviation, that pixels of 0…255 can have.

    Values between 0 and 255 of such a mean deviate so far at most (Bhatia and Davis, "A better
    bound on the variance", 2000). No other normalization gives pixels a mean well above 1.
    """
    scale, signed = np.abs(factor).sum(0), factor.sum(0)
    one_way = np.abs(np.abs(signed) - scale) <= 1e-3 * scale
    mean = np.divide(-offset, signed, out=np.zeros_like(offset), where=one_way)
    possible = scale**-2 <= 1.05 * mean * (255 - mean)
    divided = (scale <= 1 / 3) | (np.abs(scale - 1) < 1e-3)  # or a mean was subtracted, no more
    return one_way & (mean >= 3) & possible & divided
