"""Step: measure latency, contestants interleaved, so that a drifting machine moves all alike.

They take turns in short blocks, A A A B B B A A A …, and the first tenth of a second of each is not
counted. Turn by turn, each would be measured with the caches that the others left, and beside the
threads of the others' pools, which spin for a while after every call: seen to make an FP32 AlexNet
take 14 ms where it takes 4.3 alone. See docs/decisions/interleaved-blocks.md.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from cnnedge.bundle import open_bundle
from cnnedge.errors import BundleError
from cnnedge.image import normalize
from cnnedge.machine import Machine, this_machine, tool_versions
from cnnedge.progress import Progress, silent
from cnnedge.result import GpuTimes, Measurement, Recommendation, ratio_interval, recommend
from cnnedge.runtime import RunSettings, open_variant, runs_on, usable_variants

WARM_UP_SECONDS = 0.5
FEWEST_ROUNDS = 3  # blocks of each contestant, however long they take
BLOCK = 20  # counted calls in a block
SETTLE = 3  # calls before them that are not, at least
SETTLE_SECONDS = 0.1  # and for so long: the others' threads were seen to spin for 40 to 100 ms


@dataclass(frozen=True)
class Benchmark:
    """Single-stream latencies of one model's variants, measured in one run.

    Attributes:
        measurements: One per contestant, the runtime call alone: uint8 tensor in, probabilities
            out; no decoding, no resizing.
        baseline: The contestant that ratios are quoted against.
        environment: Machine, versions, threads, and what is timed.
        precisions: Of those that are variants of the bundle, by name.
    """

    measurements: tuple[Measurement, ...]
    baseline: str
    environment: Mapping[str, Any]
    precisions: Mapping[str, str] = field(default_factory=dict)

    def speed_up(self, name: str) -> tuple[float, float, float]:
        """Return how many times faster than the baseline, and the ratio's 95 % interval."""
        samples = {m.name: m.samples for m in self.measurements}
        return ratio_interval(samples[name], samples[self.baseline])

    def recommend(self, name: str, precision: str) -> Recommendation:
        """Apply the speed gate to a variant of this bundle, measured here or not."""
        samples = {m.name: m.samples for m in self.measurements}
        lacks = lacking(precision, this_machine())
        return recommend(precision, samples.get(name), samples.get("fp32"), lacks)

    def to_dict(self) -> dict[str, Any]:
        """Return it as JSON-able data, raw samples included."""
        rows = []
        for measurement in self.measurements:
            ratio, low, high = self.speed_up(measurement.name)
            speed_up = {"ratio": ratio, "interval": [low, high], "against": self.baseline}
            row = measurement.to_dict() | {"speed_up": speed_up}
            if measurement.name in self.precisions:
                found = self.recommend(measurement.name, self.precisions[measurement.name])
                row["recommendation"] = asdict(found)
            rows.append(row)
        return {
            "scenario": "single-stream",
            "batch": self.environment.get("batch", 1),
            "environment": dict(self.environment),
            "measurements": rows,
        }


def measure_interleaved(
    contestants: Mapping[str, Callable[[], Any]],
    *,
    seconds: float = 10.0,
    most_rounds: int = 35,
    clock: Callable[[], float] = time.perf_counter,
    progress: Progress = silent,
) -> list[Measurement]:
    """Time callables in turn, a block of calls each, until the time is spent.

    Args:
        contestants: What to call, by name; a call may return `GpuTimes`, which are kept.
        seconds: About how long to measure, warm-up aside; at least `FEWEST_ROUNDS` blocks of each
            are made whatever they take.
        most_rounds: Stop after so many blocks of each; 34 are enough for a p99.
        clock: Seconds, monotonic.
        progress: Told how many of ``most_rounds`` are done.
    """
    for call in contestants.values():  # the first calls allocate, compile and fill caches
        start = clock()
        call()
        while clock() - start < WARM_UP_SECONDS:
            call()
    samples: dict[str, list[float]] = {name: [] for name in contestants}
    on_gpu: dict[str, list[GpuTimes]] = {name: [] for name in contestants}
    start, rounds = clock(), 0
    while rounds < most_rounds and (rounds < FEWEST_ROUNDS or clock() - start < seconds):
        for name, call in contestants.items():
            began, settled = clock(), 0
            while settled < SETTLE or clock() - began < SETTLE_SECONDS:
                call()
                settled += 1
            for _ in range(BLOCK):
                before = clock()
                returned = call()
                samples[name].append(clock() - before)
                if isinstance(returned, GpuTimes):
                    on_gpu[name].append(returned)
        rounds += 1
        progress("benchmark", rounds, most_rounds)
    return [
        Measurement(name, tuple(taken), gpu=tuple(on_gpu[name])) for name, taken in samples.items()
    ]


def bench_bundle(
    path: Path | str,
    *,
    reference: Callable[[np.ndarray], np.ndarray] | None = None,
    threads: int | None = None,
    runtimes: Sequence[str] = ("cpu",),
    batch: int = 1,
    seconds: float = 10.0,
    seed: int = 0,
    progress: Progress = silent,
) -> Benchmark:
    """Measure a bundle's variants on one or more runtimes, beside the Keras reference if given.

    Args:
        path: The bundle.
        reference: The Keras reference, uint8 batch → probabilities; it becomes the baseline. Give
            `backends.keras.compiled`, which is how its users run it.
        threads: Threads of each call; None lets the runtime use every core.
        runtimes: What runs them; see `runtime.RUNTIMES`. On the CPU, variants written for TensorRT
            are left out: it would emulate them. On others, a variant is named "fp16@rtx".
        batch: Images in each call.
        seconds: About how long to measure.
        seed: Seeds the image, whose content does not matter to a CNN's speed.
        progress: Told how far it is.

    Raises:
        BundleError: the bundle has nothing that a runtime runs.
        BackendError: a runtime is not to be had here.
    """
    bundle = open_bundle(path)
    manifest = bundle.manifest
    size = (batch, manifest.image.height, manifest.image.width, manifest.image.channels)
    image = np.random.default_rng(seed).integers(0, 256, size, np.uint8)
    feed = normalize(image, manifest.normalization) if manifest.input == "float32" else image
    contestants: dict[str, Callable[[], Any]] = {}
    providers: dict[str, str] = {}
    if reference is not None:
        contestants["keras"] = lambda: reference(image)
    for runtime in runtimes:
        settings = RunSettings(runtime, threads)
        usable = usable_variants(bundle, settings)
        for variant in manifest.variants:
            if not runs_on(variant, runtime) or (usable is not None and variant.name not in usable):
                continue
            name = variant.name if runtime == "cpu" else f"{variant.name}@{runtime}"
            answer = open_variant(bundle, variant, settings)
            providers[name] = str(getattr(answer, "provider", "?"))
            # A session that times its parts is measured by them and as a whole in the same calls.
            contestants[name] = partial(getattr(answer, "timed", answer), feed)
    if not contestants:
        raise BundleError(
            f"nothing in {bundle.root} runs on {', '.join(runtimes)}", fix="name other runtimes"
        )
    measured = measure_interleaved(contestants, seconds=seconds, progress=progress)
    measured = [replace(m, images=batch) for m in measured]
    precisions = {v.name: v.precision for v in manifest.variants if v.name in contestants}
    described = {**environment(threads), "batch": batch, "providers": providers}
    if set(runtimes) != {"cpu"}:
        described["gpu"], _ = describe_gpu()
    return Benchmark(tuple(measured), next(iter(contestants)), described, precisions)


def describe_gpu() -> tuple[dict[str, Any] | None, str]:
    """Return this machine's GPU as data; or None, and why there is none."""
    from cnnedge.backends.gpu import find_gpu

    facts, why = find_gpu()
    return (None if facts is None else facts.to_dict()), why


def lacking(precision: str, machine: Machine) -> str | None:
    """Return what a CPU lacks for a precision to be fast on it, in words; None: nothing."""
    if precision == "int8" and not machine.has_int8_dot_product:
        return "this CPU has no int8 dot product such as VNNI"
    if precision == "fp16" and not machine.has_fp16_arithmetic:
        return "this CPU has no FP16 arithmetic: it is emulated in FP32"
    return None


def environment(threads: int | None) -> dict[str, Any]:
    """Return what every figure is quoted with: machine, versions, threads, what is timed."""
    return {
        "machine": this_machine().to_dict(),
        "threads": threads or this_machine().cores,
        "timed": "the runtime call: uint8 tensor in, probabilities out",
        "tools": tool_versions(),
    }
