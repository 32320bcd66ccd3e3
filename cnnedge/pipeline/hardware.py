"""What this machine likes of a network: measured on INT8 graphs as the pipeline builds them."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import TYPE_CHECKING, Any

import numpy as np

from cnnedge.compress import Timing
from cnnedge.export import export_onnx
from cnnedge.files import scratch_folder
from cnnedge.graph.write import serialize
from cnnedge.head import LOGITS
from cnnedge.image import ImageContract
from cnnedge.machine import this_machine
from cnnedge.progress import Progress
from cnnedge.quantize import CPU, CPU_REDUCED, calibrate, choose_ranges, make_plan, quantize
from cnnedge.source import Source

if TYPE_CHECKING:
    import keras
    import onnx_ir as ir

MULTIPLES = (8, 16, 32)
NEAR_ENOUGH = 0.95  # of the best throughput
CENTER = 128  # channels, about which throughput is measured
SIDE = 28  # of the feature map, pixels
IMAGES = 8  # that ranges are taken from where only time is measured
SECONDS = 0.4  # of timing for one network
BLOCK = 10  # calls that are timed in a row


@dataclass(frozen=True)
class Granularity:
    """What numbers of channels this machine computes fast.

    Attributes:
        multiple: The smallest whose throughput is near the best.
        throughput: Multiply-accumulates a second of an INT8 convolution whose channels are odd
            multiples of each candidate near 128, as a share of the best, by the candidate.
    """

    multiple: int
    throughput: Mapping[int, float]


def measure_granularity(progress: Progress) -> Granularity:
    """Measure which multiple channels are to be rounded to.

    Convolutions with numbers of channels just below and above 128 that are multiples of 8 and of
    nothing higher, of 16, of 32, and with 128 itself, take turns; a runtime that pads to 32 would
    be slow on all but the last two.
    """
    counts = {m: (CENTER - m, CENTER + m) for m in MULTIPLES} | {CENTER: (CENTER,)}
    every = sorted({count for pair in counts.values() for count in pair})
    calls = {}
    for done, count in enumerate(every):
        progress("granularity", done, len(every))
        calls[count] = _ready(_stack([(count, 3, 1)] * 3, count))
    seconds = time_in_turn(calls, SECONDS * len(calls))
    work = {count: 3 * 9 * count * count * SIDE * SIDE for count in every}
    speed = {
        multiple: sum(work[c] for c in pair) / sum(seconds[c] for c in pair)
        for multiple, pair in counts.items()
    }
    best = max(speed.values())
    shares = {multiple: speed[multiple] / best for multiple in MULTIPLES}
    near = [multiple for multiple in MULTIPLES if shares[multiple] >= NEAR_ENOUGH]
    progress("granularity", len(every), len(every))
    return Granularity(min(near, default=MULTIPLES[-1]), shares)


def split_is_faster(
    height: int, width: int, kernel: Sequence[int], strides: Sequence[int], ranks: Sequence[int]
) -> bool:
    """Tell whether a convolution is faster split in three, 1x1, kxk, 1x1, in one run.

    Args:
        height: Of the feature map that it reads, pixels.
        width: Likewise.
        kernel: ``(kernel height, kernel width, channels read, channels made)``.
        strides: Vertical and horizontal.
        ranks: The channels on both sides of the middle one.
    """
    side, step = max(height, width), strides[0]
    whole = [(kernel[3], kernel[0], step)]
    split = [(ranks[0], 1, 1), (ranks[1], kernel[0], step), (kernel[3], 1, 1)]
    calls = {
        name: _ready(_stack(stack, kernel[2], side))
        for name, stack in (("whole", whole), ("split", split))
    }
    seconds = time_in_turn(calls, 2 * SECONDS)
    return seconds["split"] < NEAR_ENOUGH * seconds["whole"]


def timer(source: Source, images: np.ndarray | None) -> Callable[[keras.Model], Timing]:
    """Return what times a network with the contract of ``source`` at batch 1.

    Args:
        source: Of which the networks are smaller versions.
        images: To take INT8 ranges from, uint8 ``[N, H, W, C]``; None: time the FP32 graph.
    """
    from cnnedge.backends.onnxruntime import profile

    def measure(network: keras.Model) -> Timing:
        exported = replace(source, model=network).to_onnx().model
        graph = serialize(exported if images is None else _int8(exported, images))
        size = (1, *source.image.shape)
        image = np.zeros(size, np.uint8) if images is None else images[:1]
        seconds = time_in_turn({"network": _session(graph, image)}, 2 * SECONDS)["network"]
        by_node = profile(graph, image)
        scale = seconds / max(sum(by_node.values()), 1e-9)
        by_layer: dict[str, float] = {}
        for node, taken in by_node.items():
            layer = node.split("/")[0]
            by_layer[layer] = by_layer.get(layer, 0.0) + taken * min(scale, 1.0)
        return Timing(seconds, by_layer)

    return measure


def time_in_turn(calls: Mapping[Any, Callable[[], Any]], seconds: float) -> dict[Any, float]:
    """Return the median seconds of each call, blocks of them taking turns."""
    for call in calls.values():
        for _ in range(5):
            call()
    samples: dict[Any, list[float]] = {name: [] for name in calls}
    started = time.perf_counter()
    while not all(samples.values()) or time.perf_counter() - started < seconds:
        for name, call in calls.items():
            for number in range(BLOCK + 2):
                before = time.perf_counter()
                call()
                if number >= 2:  # the first find the caches of another
                    samples[name].append(time.perf_counter() - before)
    return {name: median(taken) for name, taken in samples.items()}


def _stack(layers: Sequence[tuple[int, int, int]], reads: int, side: int = SIDE) -> keras.Model:
    """Return a classifier of convolutions ``(channels, kernel, stride)``, after a 1x1 one."""
    import keras

    image = keras.Input((side, side, 3))
    x = keras.layers.Conv2D(reads, 1, activation="relu")(image)
    for number, (channels, kernel, stride) in enumerate(layers):
        last = number == len(layers) - 1
        x = keras.layers.Conv2D(
            channels, kernel, stride, padding="same", activation="relu" if last else None
        )(x)
    x = keras.layers.GlobalAveragePooling2D()(x)
    return keras.Model(image, keras.layers.Dense(16)(x), name="stack")


def _ready(model: keras.Model) -> Callable[[], Any]:
    """Return a call of the model's INT8 graph on a noise image."""
    height, width, channels = model.input_shape[1:]
    images = _noise((IMAGES, height, width, channels))
    exported = export_onnx(
        model,
        name=model.name,
        labels=tuple(f"class {i}" for i in range(model.output_shape[-1])),
        image=ImageContract(height, width, channels),
        normalization="unit",
        emits=LOGITS,
    )
    return _session(serialize(_int8(exported.model, images)), images[:1])


def _int8(model: ir.Model, images: np.ndarray) -> ir.Model:
    plan = make_plan(model, CPU if this_machine().has_int8_dot_product else CPU_REDUCED)
    with scratch_folder() as scratch:
        seen = calibrate(model, dict.fromkeys(plan.tensors), [images], scratch)
    return quantize(model, plan, choose_ranges(seen, plan, "minmax")).model


def _session(graph: bytes, image: np.ndarray) -> Callable[[], Any]:
    from cnnedge.backends.onnxruntime import open_session

    session = open_session(graph)
    return lambda: session(image)


def _noise(shape: tuple[int, ...]) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, shape, np.uint8)
