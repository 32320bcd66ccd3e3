"""What a network's answers mean, told by their values: probabilities, or logits.

The last operation cannot tell. A softmax may be followed by a Reshape, a mean or a sum, and its
rows are still probabilities; a division by a temperature or a pooling makes logits as any dense
layer does. So the network is asked, and what it answers decides whether a softmax is added.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from cnnedge.errors import ModelError
from cnnedge.image import normalize

PROBABILITIES, LOGITS = "probabilities", "logits"
SINGLE = 2.0**-24  # float32's unit roundoff
SUM_ERROR = 1e-3  # of a row of probabilities: weights such as 0.333 for each of three networks
ROUNDINGS = 8  # units of roundoff by which a softmax's row may miss 1; measured: 3.3
# Scores this far outside 0…1 are no sigmoids, nor sigmoids that were shifted a little.
OUTSIDE = 0.05
# What normalized pixels are multiplied by to see whether scores have a bound at all.
AMPLIFIED = (-1.0, 30.0, -30.0, 1000.0)

Scores = Callable[[np.ndarray], np.ndarray]


def read_head(
    scores: Scores,
    images: np.ndarray,
    normalization: str,
    *,
    name: str,
    rounding: float = SINGLE,
) -> str:
    """Return "probabilities" or "logits": what a network gives.

    Rows in 0…1 that sum to 1, on every one of the images and of a dozen synthetic ones, are
    probabilities. Rows that leave 0…1 are logits, unless they all sum to one number, as percents
    do. Rows that stay in 0…1 and do not sum to 1 are taken for sigmoids, unless pixels far beyond
    any image's drive them out of it.

    Args:
        scores: The network: float32 ``[N, H, W, C]``, normalized → ``[N, classes]``.
        images: Real images, uint8 ``[N, H, W, C]``.
        normalization: What the network wants of its pixels.
        name: What messages call it.
        rounding: The unit roundoff of the coarsest type that it computes in.

    Raises:
        ModelError: the answers are neither, or sum to 1 on some images only, or are all 0.
    """
    pixels = normalize(images, normalization)
    synthetic = normalize(synthetic_images(images.shape[1:]), normalization)
    answers = np.asarray(scores(pixels)).astype(np.float64)
    if not np.isfinite(answers).all(axis=1).any():
        return PROBABILITIES  # nothing is added to what is no number, and every gate fails on it
    real, made = _telling(answers), _telling(scores(synthetic))
    if not len(real):
        raise _neither(name, "are 0 on every image")
    every = np.concatenate([real, made])
    summing, sums = sums_to_one(every, rounding), every.sum(axis=1)
    if _leaves(real, OUTSIDE):
        if _sum_alike(every):
            raise _neither(name, f"sum to {sums.mean():.4g} on every image and are not in 0…1")
        return LOGITS
    if summing.all() and not _leaves(every, SUM_ERROR + ROUNDINGS * rounding):
        return PROBABILITIES
    if not summing[: len(real)].all() and _has_no_bound(scores, pixels, synthetic):
        return LOGITS
    if summing.any():
        raise _neither(name, f"sum to 1 on {summing.sum()} of {len(every)} images only")
    span = f"{sums.min():.3g}…{sums.max():.3g}"
    raise _neither(name, f"lie in 0…1 and sum to {span}, as those of sigmoids do")


def require_head(
    answers: np.ndarray, emits: str | None, *, name: str, rounding: float = SINGLE
) -> None:
    """Hold the answers to all test images to what `read_head` found on some of them.

    Args:
        answers: The reference's, float32 ``[N, classes]``.
        emits: What was found.
        name: What messages call the network.
        rounding: As there.

    Raises:
        ModelError: they were taken for probabilities, and some do not sum to 1.
    """
    if emits != PROBABILITIES:
        return
    told = _telling(answers)
    odd = int((~sums_to_one(told, rounding)).sum())
    if odd:
        raise _neither(name, f"do not sum to 1 on {odd} of {len(answers)} test images")


def as_probabilities(scores: np.ndarray, emits: str | None) -> np.ndarray:
    """Return a network's scores ``[N, classes]`` as probabilities, in their own type."""
    return softmax(scores) if emits == LOGITS else scores


def softmax(logits: np.ndarray) -> np.ndarray:
    """Return probabilities of logits ``[N, classes]``."""
    exponent = np.exp(logits - logits.max(axis=1, keepdims=True))
    return exponent / exponent.sum(axis=1, keepdims=True)


def sums_to_one(rows: np.ndarray, rounding: float) -> np.ndarray:
    """Tell of each row ``[N, classes]`` whether it sums to 1, as far as its rounding allows."""
    return np.abs(rows.sum(axis=1) - 1.0) <= SUM_ERROR + ROUNDINGS * rounding


def synthetic_images(shape: tuple[int, ...]) -> np.ndarray:
    """Return images unlike each other and unlike photographs, uint8 ``[N, H, W, C]``.

    Args:
        shape: ``(height, width, channels)``.
    """
    return np.stack([np.broadcast_to(image, shape) for image in _drawn(*shape)]).astype(np.uint8)


def _drawn(height: int, width: int, channels: int) -> Iterator[np.ndarray]:
    rng = np.random.default_rng(0)
    for low, high in ((0, 256), (0, 64), (192, 256)):
        yield rng.integers(low, high, (height, width, channels))
    for channel in range(channels):  # one colour alone, and all but that
        yield 255 * (np.arange(channels) == channel)
        yield 255 * (np.arange(channels) != channel)
    yield np.full(channels, 255)
    yield np.linspace(0, 255, width)[None, :, None]
    yield np.linspace(255, 0, height)[:, None, None]
    yield 255 * ((np.arange(height)[:, None, None] // 4 + np.arange(width)[None, :, None] // 4) % 2)


def _telling(rows: np.ndarray) -> np.ndarray:
    """Return the rows that say something, in float64: finite, and not zero throughout."""
    rows = np.asarray(rows).astype(np.float64)
    return rows[np.isfinite(rows).all(axis=1) & (rows != 0).any(axis=1)]


def _leaves(rows: np.ndarray, margin: float) -> bool:
    return bool(len(rows)) and bool((rows < -margin).any() or (rows > 1 + margin).any())


def _has_no_bound(scores: Scores, *pixels: np.ndarray) -> bool:
    """Tell whether scores leave 0…1 on synthetic images, or on pixels that no image has."""
    some = np.concatenate([part[:8] for part in pixels])
    batches = [pixels[-1], *(some * np.float32(factor) for factor in AMPLIFIED)]
    with np.errstate(all="ignore"):
        return any(_leaves(_telling(scores(batch)), OUTSIDE) for batch in batches)


def _sum_alike(rows: np.ndarray) -> bool:
    """Tell whether rows that differ all sum to 1, or to one number without a negative: percents."""
    sums = rows.sum(axis=1)
    alike = bool(np.ptp(sums) <= SUM_ERROR * np.abs(sums).mean()) and bool(
        np.ptp(rows, axis=0).any()
    )
    return alike and (bool((rows >= 0).all()) or bool(abs(sums.mean() - 1) <= SUM_ERROR))


def _neither(name: str, why: str) -> ModelError:
    return ModelError(
        f"the answers of {name!r} are neither probabilities nor logits: they {why}",
        fix="end it with a softmax over its classes, or with their logits",
    )
