"""The limit of a variant's parity: how far rounding moves the reference's own answers.

See docs/decisions/parity-limits.md for why it is measured so, and what it lets through.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager

import numpy as np

from cnnedge.comparison import CEILING, PARITY, Comparison, limit_of
from cnnedge.data import Split
from cnnedge.image import ImageContract
from cnnedge.progress import Progress
from cnnedge.protocols import Runner

DRAWS = 4  # directions in which everything is moved; as many again, twice, where that is too few
MARGIN = 1.5  # what rounds in halves rounds each layer's result too, not its weights alone
FEW_PIXELS, FEWEST, MOST = 64 * 96 * 96, 8, 64  # of the images that are always measured on
BATCH_SIZE = 32
_COARSER = {"float16": "fp16", "bfloat16": "bf16"}

# (precision, draw) → what answers uint8 batches with input and weights moved so, in probabilities
Moved = Callable[[str, int], AbstractContextManager[Runner]]


def measure_limits(
    moved: Moved,
    test: Split,
    image: ImageContract,
    answers: np.ndarray,
    found: Mapping[str, Comparison],
    progress: Progress,
    rounds_as: str | None = None,
) -> dict[str, float]:
    """Return by how much a probability of each precision's variant may differ from Keras.

    Measured is on the few test images whose two likeliest classes are nearest, which move most;
    where a variant differs by more than that explains, on all of them.

    Args:
        moved: The reference with everything moved by half a unit in the last place.
        test: The test images.
        image: The image contract.
        answers: What the reference answers to them, float32 ``[N, classes]``.
        found: How each precision's variant compares; those without an entry in `PARITY` have no
            limit.
        progress: Told how many images are done.
        rounds_as: What the reference itself computes in, where that is coarser than float32. Then
            no variant is nearer to it than that.
    """
    limits = {}
    for precision, comparison in found.items():
        floor = limit_of(precision, None, rounds_as)
        if floor is None:
            continue
        coarser = _COARSER.get(rounds_as or "", precision)
        place = precision if floor == PARITY[precision] else coarser
        limits[precision] = floor
        for indices, draws in _stages(answers, image):
            part, expected = test.select(indices), answers[indices]
            largest = _largest_move(moved, place, draws, part, image, expected, progress)
            limits[precision] = max(limits[precision], min(MARGIN * largest, CEILING * floor))
            if comparison.max_abs_diff is None or comparison.max_abs_diff <= limits[precision]:
                break
    return limits


def _stages(answers: np.ndarray, image: ImageContract) -> list[tuple[np.ndarray, range]]:
    """Return which images and draws are measured first, and which if that does not explain it."""
    few = int(np.clip(FEW_PIXELS // (image.height * image.width), FEWEST, MOST))
    two = np.partition(answers, -2, axis=1)[:, -2:]
    nearest = np.argsort(two[:, 1] - two[:, 0], kind="stable")
    return [
        (np.sort(nearest[:few]), range(DRAWS)),
        (np.arange(len(answers)), range(DRAWS, 3 * DRAWS)),
    ]


def _largest_move(
    moved: Moved,
    precision: str,
    draws: range,
    part: Split,
    image: ImageContract,
    expected: np.ndarray,
    progress: Progress,
) -> float:
    """Return the largest change of any probability in any draw."""
    largest, done = 0.0, 0
    for draw in draws:
        start = 0
        with moved(precision, draw) as answer:
            for batch, _ in part.batches(image, BATCH_SIZE):
                change = np.abs(answer(batch) - expected[start : start + len(batch)])
                largest = max(largest, float(np.max(change, where=np.isfinite(change), initial=0)))
                start, done = start + len(batch), done + len(batch)
                progress(f"rounding, {precision}", done, len(draws) * len(part))
    return largest
