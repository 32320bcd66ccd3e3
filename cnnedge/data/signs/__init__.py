"""A procedural road-sign camera: any number of RGB images of sixteen classes, from a seed.

It needs no download, has pairs that are hard to tell apart (30, 50, 60, 80; left and right), and
leaves room for a loss of accuracy to show. `drawing` holds the signs, `camera` what happens to
them on their way into a picture, `cache` keeps what was rendered.
"""

from __future__ import annotations

import numpy as np

from cnnedge.data.signs.cache import SignImages
from cnnedge.data.signs.camera import label_of
from cnnedge.data.signs.drawing import LABELS
from cnnedge.data.split import Dataset, Selection, Split, stratified
from cnnedge.errors import DataError

DEFAULT_COUNT = 4000
MOST = 1_000_000
_TEST_SHARE = 0.25
_CALIBRATION_SHARE, _MOST_CALIBRATION_SHARE = 0.05, 0.15
_CALIBRATION_IMAGES = 128  # what activation ranges want; of a small set, at most 15 %


def open_signs(count: int, seed: int) -> Dataset:
    """Return ``count`` images in all three splits together; none is rendered yet.

    Args:
        count: At least eight of each class.
        seed: Decides what is drawn, and the splits. Not negative.

    Raises:
        DataError: the count or the seed is out of range.
    """
    fewest = 8 * len(LABELS)
    if not fewest <= count <= MOST:
        raise DataError(
            f"signs:{count} asks for {count} images of {len(LABELS)} classes",
            fix=f"ask for {fewest} to {MOST}",
        )
    if seed < 0:
        raise DataError(f"the seed of signs is {seed}", fix="give one that is not negative")
    targets = np.array([label_of(i) for i in range(count)], np.int64)
    # Of each class as many, rounded up: shares of whole images must not fall short together.
    wanted = -(-_CALIBRATION_IMAGES // len(LABELS)) + 1e-6
    share = wanted / (count // len(LABELS))
    calibration = max(_CALIBRATION_SHARE, min(_MOST_CALIBRATION_SHARE, share))
    shares = (1 - calibration - _TEST_SHARE, calibration, _TEST_SHARE)
    images = SignImages(seed, count)
    train, held_out, test = (
        Split(name, Selection(images, at), targets[at])
        for name, at in zip(
            ("train", "calibration", "test"), stratified(targets, shares, seed), strict=True
        )
    )
    spec = "signs" if count == DEFAULT_COUNT else f"signs:{count}"
    return Dataset("signs", spec, LABELS, train, held_out, test)
