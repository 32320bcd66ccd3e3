"""The arithmetic of measuring: percentiles with their bounds, ratios with their intervals.

Samples come as rounds of blocks: a round is one life of a process, a block a run of calls without
another contestant in between. Neither is independent within itself, so intervals resample rounds,
then blocks, never single calls (a hierarchical bootstrap: Kalibera & Jones, "Rigorous benchmarking
in reasonable time", 2013).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

Rounds = Sequence[Sequence[Sequence[float]]]  # seconds, [round][block][call]

CONFIDENCE = 0.99  # MLPerf's, for a percentile's upper bound
RESAMPLES = 2000


def flatten(rounds: Rounds) -> np.ndarray:
    """Return all samples, float64 ``[n]``, in the order they were taken."""
    return np.array([sample for blocks in rounds for block in blocks for sample in block])


def percentile_bound(samples: Sequence[float] | np.ndarray, percent: int) -> float | None:
    """Return a bound that the percentile stays under with 99 % confidence; None from too few.

    It is MLPerf's early stopping estimate (the "Early Stopping Criterion" of its inference rules):
    the order statistic whose rank leaves so much room above that a binomial count of samples under
    the true percentile exceeds it with probability 1 % at most, and never the largest sample. That
    takes 64 samples for p90 and 662 for p99.
    """
    ordered = np.sort(np.asarray(samples, dtype=float))
    n, share = len(ordered), percent / 100
    above, tail = 0, 0.0  # samples above the bound, and P(at most so many exceed the percentile)
    rank = None
    while above < n:
        tail += math.exp(
            math.lgamma(n + 1)
            - math.lgamma(above + 1)
            - math.lgamma(n - above + 1)
            + above * math.log1p(-share)
            + (n - above) * math.log(share)
        )
        if tail > 1 - CONFIDENCE:
            break
        rank = n - 1 - above
        above += 1
    # With none above, the bound would be the largest sample, which MLPerf does not accept.
    return None if rank is None or rank == n - 1 else float(ordered[rank])


def block_medians(rounds: Rounds) -> list[np.ndarray]:
    """Return the median of each block, an array for each round; empty blocks are left out."""
    medians = [np.array([np.median(b) for b in blocks if len(b)]) for blocks in rounds]
    return [found for found in medians if len(found)]


def paired_ratio(
    ours: Rounds, theirs: Rounds, *, seed: int = 0, resamples: int = RESAMPLES
) -> tuple[float, float, float]:
    """Return how many times faster ours is than theirs, measured in turns, and its 95 % interval.

    The ratio is that of the medians of all samples, theirs over ours. What is resampled is rounds,
    and blocks within them, the same ones of both, since drift of the machine moves both of a pair.

    Raises:
        ValueError: one of them holds no sample.
    """
    a, b = block_medians(ours), block_medians(theirs)
    if not a or not b:
        raise ValueError("a ratio needs samples of both")
    lengths = [min(len(x), len(y)) for x, y in zip(a, b, strict=False)]
    draws = _draw(lengths, np.random.default_rng(seed), resamples)
    ratios = _medians(b, draws) / _medians(a, draws)
    low, high = np.percentile(ratios, [2.5, 97.5])
    ratio = float(np.median(flatten(theirs)) / np.median(flatten(ours)))
    return ratio, float(min(low, ratio)), float(max(high, ratio))


def unpaired_ratio(
    new: Rounds, old: Rounds, *, seed: int = 0, resamples: int = RESAMPLES
) -> tuple[float, np.ndarray]:
    """Return how many times as long new takes as old, of two runs, and its bootstrap resamples.

    Each run's rounds and blocks are resampled by themselves: nothing pairs them.

    Returns:
        The ratio of the medians of all samples, new over old, and float64 ``[resamples]``.
    """
    rng = np.random.default_rng(seed)
    resampled = [
        _medians(blocks, _draw([len(b) for b in blocks], rng, resamples))
        for blocks in (block_medians(new), block_medians(old))
    ]
    ratio = float(np.median(flatten(new)) / np.median(flatten(old)))
    return ratio, resampled[0] / resampled[1]


@dataclass(frozen=True)
class _Draws:
    """Which rounds and which of their blocks each resample has.

    Attributes:
        rounds: int ``[resamples, rounds]``.
        blocks: int ``[resamples, rounds, most blocks]``.
        there: Whether the round has so many, bool likewise.
    """

    rounds: np.ndarray
    blocks: np.ndarray
    there: np.ndarray


def _draw(lengths: Sequence[int], rng: np.random.Generator, resamples: int) -> _Draws:
    size, most = np.array(lengths), max(lengths)
    rounds = rng.integers(0, len(size), (resamples, len(size)))
    length = size[rounds][..., None]
    blocks = (rng.random((resamples, len(size), most)) * length).astype(int)
    return _Draws(rounds, blocks, np.arange(most) < length)


def _medians(blocks: Sequence[np.ndarray], draws: _Draws) -> np.ndarray:
    """Return the median of each resample's blocks, float64 ``[resamples]``."""
    table = np.full((len(blocks), max(len(b) for b in blocks)), np.nan)
    for row, medians in zip(table, blocks, strict=True):
        row[: len(medians)] = medians
    drawn = np.where(draws.there, table[draws.rounds[..., None], draws.blocks], np.nan)
    drawn = np.sort(drawn.reshape(len(drawn), -1), axis=1)  # what is not there comes last
    count = draws.there.sum(axis=(1, 2))
    each = np.arange(len(drawn))
    return (drawn[each, (count - 1) // 2] + drawn[each, count // 2]) / 2


def instabilities(rounds: Rounds, settled: Sequence[bool]) -> list[str]:
    """Return what makes a measurement doubtful, a clause each; none: it is stable.

    Args:
        rounds: The samples.
        settled: Whether each round's warm-up came to rest.
    """
    notes = []
    if not all(settled):
        notes.append(f"the warm-up had not settled in {len(settled) - sum(settled)} round(s)")
    by_round = [float(np.median(np.concatenate([list(b) for b in r if len(b)]))) for r in rounds]
    if len(by_round) > 1 and max(by_round) > ROUNDS_APART * min(by_round):
        notes.append(f"rounds differ by {max(by_round) / min(by_round) - 1:.0%}")
    drifts = [d for d in map(_drift, rounds) if d is not None]
    if drifts and abs(float(np.median(drifts))) > DRIFT:
        notes.append(f"it drifts by {float(np.median(drifts)):+.0%} within a round")
    samples = flatten(rounds)
    low, middle, high = np.percentile(samples, [25, 50, 75])
    if high - low > SPREAD * middle:
        notes.append(f"half of the calls spread over {(high - low) / middle:.0%} of the median")
    return notes


ROUNDS_APART = 1.15  # slowest round's median over the fastest's
DRIFT = 0.08  # of the median from the first to the last third of a round's blocks
SPREAD = 0.25  # interquartile range over the median


def _drift(blocks: Sequence[Sequence[float]]) -> float | None:
    """Return by which share the last third of a round's blocks is slower than the first."""
    third = len(blocks) // 3
    if not third:
        return None
    first, last = ([s for b in part for s in b] for part in (blocks[:third], blocks[-third:]))
    return float(np.median(last) / np.median(first)) - 1 if first and last else None
