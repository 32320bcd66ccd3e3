"""A histogram that grows with what it sees: fixed memory, and the same in whatever order.

Bins are a power of two wide and begin at zero. A value beyond the last bin doubles the width until
it fits, and doubling merges neighbours exactly, so the result depends on the values alone: not on
how they were cut into batches, nor on which came first.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

SIDE = 4096  # bins on each side of zero; at least half of the longer side is always in use


@dataclass(frozen=True)
class Histogram:
    """How often a tensor's values fell where.

    Attributes:
        counts: int64 ``[2 * SIDE]``; bin ``i`` holds values from ``(i - SIDE) * width`` on.
        width: Of a bin, in the tensor's own units; a power of two, or 0 before anything but zeros
            was seen.
        low: The smallest value of all, exactly, also where the counts are of a sample.
        high: The largest.
    """

    counts: np.ndarray
    width: float
    low: float
    high: float

    @staticmethod
    def empty() -> Histogram:
        """Return a histogram that has seen nothing."""
        return Histogram(np.zeros(2 * SIDE, np.int64), 0.0, math.inf, -math.inf)

    def add(self, values: np.ndarray, low: float, high: float) -> Histogram:
        """Return this histogram with more values counted.

        Args:
            values: float32, any shape: all the values, or a sample of them.
            low: The smallest of all the values, sampled or not; not below it lies any of them.
            high: The largest.
        """
        low, high = min(self.low, low), max(self.high, high)
        width = _width(max(-low, high))
        counts = _widened(self.counts, self.width, width)
        if width == 0.0:  # nothing but zeros so far
            counts[SIDE] += values.size
        else:
            # Dividing by a power of two is exact, so a value never lands beside its bin.
            bins = np.floor(values.reshape(-1) * (1.0 / width)).astype(np.int64) + SIDE
            counts += np.bincount(np.minimum(bins, 2 * SIDE - 1), minlength=2 * SIDE)
        return Histogram(counts, width, low, high)

    @property
    def centers(self) -> np.ndarray:
        """The middle of each bin, float64 ``[2 * SIDE]``."""
        return (np.arange(2 * SIDE) - SIDE + 0.5) * self.width

    @property
    def magnitudes(self) -> np.ndarray:
        """How often each magnitude occurred, int64 ``[SIDE]``, bins of the same width."""
        return self.counts[SIDE:] + self.counts[:SIDE][::-1]


def _width(largest: float) -> float:
    """Return the width at which ``largest`` is the end of the last bin, or less."""
    if largest == 0.0:
        return 0.0
    mantissa, exponent = math.frexp(largest)
    # A subnormal range would give a width whose inverse overflows.
    return math.ldexp(1.0, max(exponent - (mantissa == 0.5), -100)) / SIDE


def _widened(counts: np.ndarray, width: float, wanted: float) -> np.ndarray:
    """Return a copy of the counts in bins of another, larger width."""
    if width in (0.0, wanted):  # zeros are in the bin of zero, whatever its width
        return counts.copy()
    wider = np.zeros_like(counts)
    factor = round(wanted / width)
    bins = (np.arange(2 * SIDE) - SIDE) // factor + SIDE
    np.add.at(wider, bins, counts)
    return wider
