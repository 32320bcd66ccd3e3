"""Which part of an activation's range to keep: less range, finer steps.

Each method maps a histogram to ``(low, high)``; what lies beyond is clamped. Exact zeros cost
nothing at any scale, since zero is always representable, so the methods that weigh errors leave
them out.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from cnnedge.quantize.histogram import SIDE, Histogram

Limits = tuple[float, float]

PERCENTILE = 99.99  # of the values lie inside, the rest is split between both ends
_CANDIDATES = np.geomspace(1.0, 1 / 64, 193)  # shares of the full range that `mse` tries
_ENTROPY_STEP = 16  # bins between the thresholds that `entropy` tries


def minmax(histogram: Histogram, symmetric: bool) -> Limits:
    """Keep everything."""
    return histogram.low, histogram.high


def percentile(histogram: Histogram, symmetric: bool) -> Limits:
    """Keep `PERCENTILE` of the values: of the magnitudes where the scale is symmetric."""
    if symmetric:
        total = np.cumsum(histogram.magnitudes)
        kept = int(np.searchsorted(total, total[-1] * PERCENTILE / 100)) + 1
        return _clamped(histogram, -kept * histogram.width, kept * histogram.width)
    total = np.cumsum(histogram.counts)
    tail = (1 - PERCENTILE / 100) / 2 if histogram.low < 0 < histogram.high else 0.0
    tail_high = 1 - PERCENTILE / 100 - tail
    first = int(np.searchsorted(total, total[-1] * tail, side="right")) if histogram.low < 0 else 0
    last = int(np.searchsorted(total, total[-1] * (1 - tail_high))) + 1
    return _clamped(histogram, (first - SIDE) * histogram.width, (last - SIDE) * histogram.width)


def mse(histogram: Histogram, symmetric: bool) -> Limits:
    """Keep the range with the least mean squared error of the quantized values.

    A value inside errs by ``s² / 12`` on average, ``s`` being the step; one that rounds to zero by
    itself; one outside by its distance to the end. Banner et al., "Post training 4-bit
    quantization of convolutional networks" (2019), with the histogram in place of a fitted
    distribution.
    """
    used = histogram.counts > 0
    values, counts = histogram.centers[used], histogram.counts[used]
    if symmetric:
        largest = max(-histogram.low, histogram.high)
        ends = largest * _CANDIDATES
        errors = [_squared_error(values, counts, -end, end, 2 * end / 254) for end in ends]
        best = float(ends[int(np.argmin(errors))])
        return _clamped(histogram, -best, best)
    low, high = min(histogram.low, 0.0), max(histogram.high, 0.0)
    best_low, best_high = low, high
    for _ in range(2 if low < 0 < high else 1):  # one end at a time, each twice
        if high > 0:
            ends = high * _CANDIDATES
            errors = [
                _squared_error(values, counts, best_low, end, (end - best_low) / 255)
                for end in ends
            ]
            best_high = float(ends[int(np.argmin(errors))])
        if low < 0:
            ends = low * _CANDIDATES
            errors = [
                _squared_error(values, counts, end, best_high, (best_high - end) / 255)
                for end in ends
            ]
            best_low = float(ends[int(np.argmin(errors))])
    return best_low, best_high


def entropy(histogram: Histogram, symmetric: bool) -> Limits:
    """Keep the range whose quantized distribution is nearest the original's (KL divergence).

    Migacz, "8-bit inference with TensorRT" (2017), on magnitudes. There 128 levels are taken for
    a symmetric int8; a one-sided uint8 has 256 of them.
    """
    one_sided = not symmetric and not histogram.low < 0 < histogram.high
    levels = 256 if one_sided else 128
    counts = histogram.magnitudes.astype(np.float64)
    counts[0] = counts[1]  # zeros are exact at every scale
    used = int(np.flatnonzero(counts)[-1]) + 1 if counts.any() else 0
    if used <= levels:
        return minmax(histogram, symmetric)
    ends = [*range(levels, used, _ENTROPY_STEP), used]
    divergences = [_divergence(counts, end, levels) for end in ends]
    kept = ends[int(np.argmin(divergences))] * histogram.width
    return _clamped(histogram, -kept, kept)


METHODS: dict[str, Callable[[Histogram, bool], Limits]] = {
    "minmax": minmax,
    "percentile": percentile,
    "entropy": entropy,
    "mse": mse,
}


def _clamped(histogram: Histogram, low: float, high: float) -> Limits:
    """Return limits that do not go beyond what was seen."""
    return max(low, histogram.low), min(high, histogram.high)


def _squared_error(
    values: np.ndarray, counts: np.ndarray, low: float, high: float, step: float
) -> float:
    magnitude = np.abs(values)
    inside = np.where(magnitude < step / 2, values**2, step * step / 12)
    beyond = np.maximum(values - high, 0.0) + np.maximum(low - values, 0.0)
    return float(np.dot(counts, np.where(beyond > 0, beyond**2, inside)))


def _divergence(counts: np.ndarray, end: int, levels: int) -> float:
    """Return KL(p ‖ q) for a histogram cut at bin ``end`` and quantized to ``levels``."""
    p = counts[:end].copy()
    edges = np.linspace(0, end, levels + 1).astype(np.int64)[:-1]
    occupied = counts[:end] > 0
    sums = np.add.reduceat(counts[:end], edges)
    sharers = np.add.reduceat(occupied.astype(np.float64), edges)
    level = np.searchsorted(edges, np.arange(end), side="right") - 1
    q = np.where(occupied, (sums / np.maximum(sharers, 1.0))[level], 0.0)
    p[-1] += counts[end:].sum()  # what is clamped piles up at the end
    missing = (p > 0) & (q == 0)
    q[missing] = 1e-4 * q[q > 0].min(initial=1.0)  # dear, not infinite
    p, q = p / p.sum(), q / q.sum()
    some = p > 0
    return float(np.dot(p[some], np.log(p[some] / q[some])))
