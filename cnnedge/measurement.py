"""What is timed: latencies, a GPU call by part, and the speed gate. Plain data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

# How many samples MLPerf's early stopping asks for before it lets a percentile be quoted.
FEWEST_SAMPLES = {50: 1, 90: 64, 99: 662}
SPEED_GATE = 1.02  # times faster than its sibling that a variant must be to be recommended


@dataclass(frozen=True)
class GpuTimes:
    """What one call cost on a GPU, by part, in seconds: the first three between CUDA events.

    Attributes:
        copy_in: Input, host to device ("H2D Latency" in trtexec's words).
        compute: The kernels ("GPU Compute Time").
        copy_out: Output, device to host ("D2H Latency").
        enqueue: What the host took to enqueue all three ("Enqueue Time").
    """

    copy_in: float
    compute: float
    copy_out: float
    enqueue: float

    @property
    def latency(self) -> float:
        """Copies and compute together (trtexec's "Latency")."""
        return self.copy_in + self.compute + self.copy_out


@dataclass(frozen=True)
class Staged:
    """One call by part, in seconds of the host's clock.

    Attributes:
        answers: The call's probabilities, float32 ``[N, classes]``.
        copy_in: Handing the image over, with whatever the runtime's graph wants done to it first.
        compute: The network.
        copy_out: Taking the answers back.
    """

    answers: np.ndarray
    copy_in: float
    compute: float
    copy_out: float


# trtexec's names, which its users compare with.
GPU_FIGURES = {
    "GPU Compute Time": lambda t: t.compute,
    "Latency": lambda t: t.latency,
    "Enqueue Time": lambda t: t.enqueue,
    "H2D Latency": lambda t: t.copy_in,
    "D2H Latency": lambda t: t.copy_out,
}


@dataclass(frozen=True)
class Measurement:
    """Latencies of one thing.

    Attributes:
        name: What was measured.
        samples: Seconds, one per call, in the order they were taken.
        images: Images per call.
        gpu: The same calls by part, where they ran on a GPU that tells.
        block: How many calls ran in a row before somebody else's turn; None: all of them.
    """

    name: str
    samples: tuple[float, ...]
    images: int = 1
    gpu: tuple[GpuTimes, ...] = ()
    block: int | None = None

    @property
    def median(self) -> float:
        """The median in seconds."""
        return float(np.median(self.samples))

    @property
    def blocks(self) -> tuple[tuple[float, ...], ...]:
        """The samples by block: what an interval resamples, for calls within one are alike."""
        size = self.block or max(1, len(self.samples))
        starts = range(0, len(self.samples), size)
        return tuple(self.samples[start : start + size] for start in starts)

    def percentile(self, percent: int) -> float | None:
        """Return a percentile in seconds, or None where the samples are too few to quote it."""
        if len(self.samples) < FEWEST_SAMPLES.get(percent, 1):
            return None
        return float(np.percentile(self.samples, percent, method="higher"))

    def gpu_medians(self) -> dict[str, float]:
        """Return the median of each of a GPU's figures in seconds, by trtexec's name."""
        return {
            name: float(np.median([of(times) for times in self.gpu]))
            for name, of in (GPU_FIGURES.items() if self.gpu else ())
        }

    def to_dict(self) -> dict[str, Any]:
        """Return it as JSON-able data, milliseconds and raw samples."""
        on_gpu = {f"{name} (ms)": _ms(median) for name, median in self.gpu_medians().items()}
        return {
            "name": self.name,
            "images": self.images,
            "n": len(self.samples),
            "median_ms": _ms(self.median),
            "p90_ms": _ms(self.percentile(90)),
            "p99_ms": _ms(self.percentile(99)),
            "samples_ms": [_ms(s) for s in self.samples],
            "block": self.block,
        } | ({"gpu": on_gpu} if on_gpu else {})


@dataclass(frozen=True)
class Recommendation:
    """Whether a variant is worth running on the machine that measured it.

    Attributes:
        recommended: It beats its higher-precision sibling by `SPEED_GATE`, or is FP32 itself.
        reason: One sentence.
        against: The sibling's name, or None.
        ratio: The sibling's median latency over its own, or None where nothing was measured.
        interval: The ratio's 95 % interval.
    """

    recommended: bool
    reason: str
    against: str | None = None
    ratio: float | None = None
    interval: tuple[float, float] | None = None


def recommend(
    precision: str,
    speed: tuple[float, float, float] | None,
    lacks: str | None,
    doubt: str | None = None,
) -> Recommendation:
    """Apply the speed gate.

    Args:
        precision: The variant's: "fp32", "fp16", "int8" …
        speed: How many times faster than FP32 it is, both measured in turns, and the ratio's 95 %
            interval; None where it was not measured on this machine.
        lacks: What this machine lacks for the precision to be fast, in words, or None.
        doubt: Why latencies of this run decide nothing, or None.
    """
    if precision == "fp32":
        return Recommendation(True, "what the others are held against")
    if speed is None:
        return Recommendation(False, "written for other runtimes: not measured on this machine")
    ratio, low, high = speed
    if doubt is not None:
        return Recommendation(False, f"not known: {doubt}", "fp32", ratio, (low, high))
    measured = f"{ratio:.2f}× the speed of fp32 [{low:.2f}, {high:.2f}]"
    if ratio >= SPEED_GATE and low > 1.0:
        return Recommendation(True, measured, "fp32", ratio, (low, high))
    why = f" ({lacks})" if lacks else ""
    short = "which may be chance" if ratio >= SPEED_GATE else f"and {SPEED_GATE:.2f}× is asked"
    reason = f"{measured}, {short}{why}"
    return Recommendation(False, reason, "fp32", ratio, (low, high))


def _ms(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds * 1e3, 4)
