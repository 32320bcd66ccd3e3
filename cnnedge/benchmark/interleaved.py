"""Latencies of callables in this very process, interleaved: what `cnnedge export` measures.

They take turns in short blocks, A A A B B B A A A …, and the first tenth of a second of each is not
counted. Turn by turn, each would be measured with the caches that the others left, and beside the
threads of the others' pools, which spin for a while after every call: seen to make an FP32 AlexNet
take 14 ms where it takes 4.3 alone. See docs/decisions/interleaved-blocks.md.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from cnnedge.benchmark.environment import lacking
from cnnedge.benchmark.load import Watch, doubt
from cnnedge.benchmark.statistics import instabilities, paired_ratio
from cnnedge.machine import this_machine
from cnnedge.measurement import GpuTimes, Measurement, Recommendation, recommend
from cnnedge.progress import Progress, silent

WARM_UP_SECONDS = 0.5
# Blocks of each contestant, however long they take: of fewer, an interval covers too little.
FEWEST_ROUNDS = 5
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
        environment: Machine, versions, threads, what is timed, and what `measure_watched` told.
        precisions: Of those that are variants of the bundle, by name.
    """

    measurements: tuple[Measurement, ...]
    baseline: str
    environment: Mapping[str, Any]
    precisions: Mapping[str, str] = field(default_factory=dict)

    @property
    def doubt(self) -> str | None:
        """Why these latencies decide nothing; None: they do."""
        return self.environment.get("doubt")

    def speed_up(self, name: str) -> tuple[float, float, float]:
        """Return how many times faster than the baseline, and the ratio's 95 % interval."""
        return self._speed(name, self.baseline)

    def recommend(self, name: str, precision: str) -> Recommendation:
        """Apply the speed gate to a variant of this bundle, measured here or not."""
        measured = {m.name for m in self.measurements}
        speed = self._speed(name, "fp32") if {name, "fp32"} <= measured else None
        return recommend(precision, speed, lacking(precision, this_machine()), self.doubt)

    def _speed(self, name: str, against: str) -> tuple[float, float, float]:
        blocks = {m.name: [m.blocks] for m in self.measurements}  # of one round: this process
        return paired_ratio(blocks[name], blocks[against])

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


def measure_watched(
    contestants: Mapping[str, Callable[[], Any]],
    *,
    seconds: float = 10.0,
    progress: Progress = silent,
) -> tuple[list[Measurement], dict[str, Any]]:
    """Time callables as `measure_interleaved` does, and see whether the machine was quiet.

    Returns:
        The measurements; and `others`, what others took of the CPUs (see `Watch.to_dict`), with
        `doubt`, why the latencies decide nothing, or None.
    """
    watch = Watch()
    watch.look()
    with watch.watching():
        measured = measure_interleaved(contestants, seconds=seconds, progress=progress)
    others = watch.to_dict()
    stable = [not instabilities([one.blocks], [True]) for one in measured]
    return measured, {"others": others, "doubt": doubt(others, stable)}


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
        Measurement(name, tuple(taken), gpu=tuple(on_gpu[name]), block=BLOCK)
        for name, taken in samples.items()
    ]
