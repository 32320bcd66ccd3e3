"""Calibration: how an FP32 graph's activations are distributed over real images.

The statistics are taken inside the graph: the extremes of each channel of each tensor, exactly,
and a sample of its values, which differs from batch to batch. Only these leave the runtime, never
the activations, so memory does not grow with the number of images. Histograms of the samples are
brought up to date batch by batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from cnnedge.errors import CnnEdgeError, DataError, MissingExtraError, ModelError
from cnnedge.graph.edit import initializer
from cnnedge.progress import Progress, silent
from cnnedge.quantize.histogram import Histogram
from cnnedge.quantize.plan import Plan
from cnnedge.quantize.threshold import METHODS, Limits
from cnnedge.quiet import import_onnxruntime

if TYPE_CHECKING:
    import onnx_ir as ir

    from cnnedge.backends.onnxruntime import ort

# Values of a tensor that enter its histogram, of each image: the scales they give differ from those
# of all the values by no more than, for entropy about as much as, those of half the images do
# (benchmarks/calibration.py).
SAMPLES = 16384
BATCH_SIZE = 1  # images at a time: more is hardly faster, and each takes memory


@dataclass(frozen=True)
class Ranges:
    """The part of each activation's range that is kept.

    Attributes:
        limits: ``(lowest, highest)`` of each tensor, in the tensor's own units, by name.
        images: How many images they were taken from.
    """

    limits: Mapping[str, Limits]
    images: int


@dataclass(frozen=True)
class Calibration:
    """What calibration saw.

    Attributes:
        histograms: Of each tensor's values, by name.
        peaks: The largest magnitude in each channel of each tensor, float32 ``[C]``, by name.
        images: How many images it saw.
        snapshots: The histograms as they were after 1, 2, 4, 8 … batches, and how many images that
            was, oldest first.
    """

    histograms: Mapping[str, Histogram]
    peaks: Mapping[str, np.ndarray]
    images: int
    snapshots: tuple[tuple[int, Mapping[str, Histogram]], ...]


def calibrate(
    model: ir.Model,
    tensors: Iterable[str],
    batches: Iterable[np.ndarray],
    folder: Path | str,
    *,
    samples: int | None = SAMPLES,
    value_range: tuple[float, float] | None = None,
    name_of: Callable[[int], str] = "image {}".format,
    total: int = 0,
    progress: Progress = silent,
) -> Calibration:
    """Run images through an FP32 graph and observe the named tensors.

    Deterministic: the same batches give the same result, bit for bit.

    Args:
        model: The FP32 ``onnx_ir.Model``.
        tensors: Names of the values to observe.
        batches: Images as the graph takes them, ``[n, H, W, C]``; the last batch may be smaller.
        folder: Where the instrumented graph is kept for a moment.
        samples: At most so many values per image and tensor enter the histograms; None: all.
        value_range: For a graph that takes float32, what its normalization can give.
        name_of: Names the image at a place, counted from 0, for the message if it is refused.
        total: How many images there are, for the progress alone.
        progress: Told how many images have been seen.

    Raises:
        DataError: there are no images, or one has another shape or type than the graph takes, is
            not finite or leaves ``value_range``.
        ModelError: an activation is NaN or infinite; the message names it.
    """
    names = list(tensors)
    watched = _watched(model, names, samples)
    session = open_scratch(watched, Path(folder))
    del watched  # it holds a copy of every weight
    image_input = session.get_inputs()[0]
    outputs = [f"{name}//{kind}" for name in names for kind in _OBSERVED]
    histograms = dict.fromkeys(names, Histogram.empty())
    peaks: dict[str, np.ndarray] = {}
    snapshots: list[tuple[int, Mapping[str, Histogram]]] = []
    seen = 0
    for number, batch in enumerate(batches):
        _check(batch, image_input, seen, value_range, name_of)
        feed = {image_input.name: batch, _PHASE: np.array([number], np.int64)}
        found = session.run(outputs, feed)
        for name, lowest, highest, sample in zip(
            names, found[0::3], found[1::3], found[2::3], strict=True
        ):
            low, high = float(lowest.min()), float(highest.max())
            if not np.isfinite([low, high]).all():
                raise ModelError(
                    f"the activation {name!r} is not finite on the calibration images",
                    fix="check the model's weights and its normalization",
                )
            histograms[name] = histograms[name].add(sample, low, high)
            if lowest.ndim:  # the channels are known
                peak = np.maximum(-lowest, highest)
                peaks[name] = np.maximum(peaks.get(name, 0.0), peak)
        seen += len(batch)
        if (number + 1) & number == 0:  # 1, 2, 4, 8 …
            snapshots.append((seen, dict(histograms)))
        progress("calibrate", seen, total)
    if not seen:
        raise DataError("no images to calibrate on", fix="give --data with a calibration split")
    return Calibration(histograms, peaks, seen, tuple(snapshots))


def choose_ranges(calibration: Calibration, plan: Plan, method: str) -> Ranges:
    """Return the range that a calibration method keeps of each of a plan's tensors.

    Args:
        calibration: What was observed of the plan's tensors.
        plan: Decides whether scales are symmetric, and which tensors share one.
        method: "minmax", "percentile", "entropy" or "mse".
    """
    limits = _limits(calibration.histograms, plan, method)
    # Those that share a scale too: with fewer layers quantized they may need one of their own.
    every = {tensor: limits[plan.scale_source(tensor)] for tensor in plan.tensors}
    return Ranges(every, calibration.images)


@dataclass(frozen=True)
class Convergence:
    """How far scales were from their final values when fewer images had been seen.

    Attributes:
        images: How many images that was.
        median_change: Over the tensors, ``|scale / final - 1|``.
        largest_change: Likewise.
    """

    images: int
    median_change: float
    largest_change: float


def convergence(calibration: Calibration, plan: Plan, method: str) -> list[Convergence]:
    """Return the scale-convergence curve: scale change against number of images."""
    final = _spans(_limits(calibration.histograms, plan, method), plan)
    curve: list[Convergence] = []
    for images, histograms in (*calibration.snapshots, (calibration.images, None)):
        seen = calibration.histograms if histograms is None else histograms
        if curve and curve[-1].images == images:
            continue
        change = np.abs(_spans(_limits(seen, plan, method), plan) / final - 1)
        curve.append(Convergence(images, float(np.median(change)), float(change.max())))
    return curve


def enough_images(curve: list[Convergence], tolerance: float = 0.05) -> int:
    """Return after how many images no scale was further than ``tolerance`` from its final value."""
    enough = curve[-1].images
    for point in reversed(curve):
        if point.largest_change > tolerance:
            break
        enough = point.images
    return enough


def _limits(histograms: Mapping[str, Histogram], plan: Plan, method: str) -> dict[str, Limits]:
    keep = METHODS[method]
    sources = dict.fromkeys(plan.scale_source(tensor) for tensor in plan.tensors)
    # Pixels are bounded, and a white one is no outlier: the image keeps its whole range.
    return {
        name: (METHODS["minmax"] if name in plan.pixels else keep)(
            histograms[name], plan.target.symmetric
        )
        for name in sources
    }


def _spans(limits: Mapping[str, Limits], plan: Plan) -> np.ndarray:
    """Return what each scale is proportional to, float64 ``[tensors]``."""
    low, high = np.array(list(limits.values()), np.float64).T
    low, high = np.minimum(low, 0.0), np.maximum(high, 0.0)
    span = np.maximum(-low, high) if plan.target.symmetric else high - low
    return np.where(span == 0.0, 1.0, span)


# --- the instrumented graph --------------------------------------------------------------------

# A name with two slashes is no layer's, whatever a user's layers and models are called.
_PHASE = "calibration//phase"  # the number of the batch: which values are sampled
_OBSERVED = ("lowest", "highest", "sample")


def _watched(model: ir.Model, names: list[str], samples: int | None) -> ir.Model:
    """Return a copy of a graph that also gives the statistics of the named values."""
    import onnx_ir as ir

    watched = model.clone()
    values = {value.name: value for node in watched.graph for value in node.outputs}
    values |= {value.name: value for value in watched.graph.inputs}
    phase = ir.Value(name=_PHASE, shape=ir.Shape([1]), type=ir.TensorType(ir.DataType.INT64))
    watched.graph.inputs.append(phase)
    flat = initializer(watched, "calibration//flat", np.array([-1], np.int64))
    end = initializer(watched, "calibration//end", np.array([2**62], np.int64))
    axis = initializer(watched, "calibration//axis", np.array([0], np.int64))

    def append(
        name: str,
        op_type: str,
        inputs: list[ir.Value],
        attributes: Mapping[str, int | list[int]] | None = None,
        kind: ir.DataType = ir.DataType.FLOAT,
    ) -> ir.Value:
        node = ir.node(op_type, inputs, attributes, name=name)
        node.outputs[0].name = name
        node.outputs[0].type = ir.TensorType(kind)
        watched.graph.append(node)
        return node.outputs[0]

    for name in names:
        value = values[name]
        inputs, attributes = but_channels(watched, value)
        low = append(f"{name}//lowest", "ReduceMin", inputs, attributes)
        high = append(f"{name}//highest", "ReduceMax", inputs, attributes)
        dims = value.shape.dims[1:] if value.shape is not None else ()
        known = [d for d in dims if isinstance(d, int)]
        stride = _stride(math.prod(known), samples) if len(known) == len(dims) else 1
        step = initializer(watched, f"{name}//stride", np.array([stride], np.int64))
        begin = append(f"{name}//begin", "Mod", [phase, step], kind=ir.DataType.INT64)
        line = append(f"{name}//line", "Reshape", [value, flat])
        sample = append(f"{name}//sample", "Slice", [line, begin, end, axis, step])
        for statistic in (low, high, sample):
            watched.graph.outputs.append(statistic)
    return watched


def _stride(size: int, samples: int | None) -> int:
    """Return a stride over ``size`` values that takes about ``samples``, and every place in turn.

    A prime divides no row or channel but its own multiples, so that each batch's sample, which
    begins one further, lies elsewhere in rows, columns and channels.
    """
    if samples is None or size <= samples:
        return 1
    stride = -(-size // samples)
    while any(stride % d == 0 for d in range(2, int(stride**0.5) + 1)):
        stride += 1
    return stride


def but_channels(
    model: ir.Model, value: ir.Value
) -> tuple[list[ir.Value], dict[str, int | list[int]]]:
    """Return inputs and attributes of a reduction over every axis of ``value`` but the second.

    Over all of them where the value's rank is not known.
    """
    if value.shape is None:
        return [value], {"keepdims": 0}
    axes = [i for i in range(len(value.shape)) if i != 1]
    if model.graph.opset_imports[""] < 18:  # since then the axes are an input
        return [value], {"axes": axes, "keepdims": 0}
    operand = initializer(model, "reduced//axes", np.array(axes, np.int64))
    return [value, operand], {"keepdims": 0}


def open_scratch(model: ir.Model, folder: Path) -> ort.InferenceSession:
    """Return a session of a graph that is needed once, its file removed again."""
    try:
        import onnx_ir as ir

        ort = import_onnxruntime()
    except ImportError as error:
        raise MissingExtraError(
            error.name or "onnxruntime", "cpu", purpose="calibrating"
        ) from error
    path, weights = folder / "calibration.onnx", folder / "calibration.weights"
    options = ort.SessionOptions()
    options.log_severity_level = 3
    try:
        # Weights beside the graph are mapped into memory; inside it they would be parsed first.
        ir.save(model, path, external_data=weights.name)
        return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except OSError as error:
        raise CnnEdgeError(
            f"cannot write {path}: {error.strerror}", fix="make room, or choose another folder"
        ) from error
    finally:
        path.unlink(missing_ok=True)
        weights.unlink(missing_ok=True)


def _check(
    batch: np.ndarray,
    taken: ort.NodeArg,
    seen: int,
    value_range: tuple[float, float] | None,
    name_of: Callable[[int], str],
) -> None:
    """Refuse images that inference would never see."""
    wanted = np.uint8 if "uint8" in taken.type else np.float32
    shape = tuple(taken.shape[1:])
    if batch.dtype != wanted or batch.shape[1:] != shape:
        raise DataError(
            f"calibration {name_of(seen)} is {batch.dtype} {list(batch.shape[1:])}, "
            f"and the graph takes {np.dtype(wanted)} {list(shape)}",
            fix="calibrate on images prepared exactly as for inference",
        )
    if wanted == np.uint8:
        return
    for place, image in enumerate(batch):
        if not np.isfinite(image).all():
            raise DataError(
                f"calibration {name_of(seen + place)} holds NaN or infinite values",
                fix="leave it out, or mend how it is prepared",
            )
        low, high = float(image.min()), float(image.max())
        if value_range is not None and (low < value_range[0] or high > value_range[1]):
            raise DataError(
                f"calibration {name_of(seen + place)} spans {low:g} to {high:g}, outside the "
                f"{value_range[0]:g} to {value_range[1]:g} that inference gives",
                fix="calibrate on images normalized exactly as for inference",
            )
