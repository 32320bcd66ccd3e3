"""The real handwritten digits that scikit-learn ships: 1,797 images of ten classes.

Alpaydin & Kaynak, "Optical Recognition of Handwritten Digits", UCI Machine Learning Repository,
1998: the test part of that set, 8×8 pixels of 17 grey levels. The smallest real data there is
without a network, and so the embedded default.
"""

from __future__ import annotations

import numpy as np

from cnnedge.data.split import Dataset, Split, stratified
from cnnedge.errors import MissingExtraError

SIZE = 64  # 8×8 is brought to this by bilinear interpolation, as a larger scan would look
SHARES = (0.7, 0.1, 0.2)


def open_digits(seed: int) -> Dataset:
    """Return the digits as RGB images of `SIZE` pixels, white on black.

    Raises:
        MissingExtraError: scikit-learn is not installed.
    """
    try:
        from PIL import Image
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise MissingExtraError(
            "scikit-learn", "export", purpose="the data source 'digits'"
        ) from error

    raw = load_digits()
    levels = np.rint(raw.images * (255 / 16)).astype(np.uint8)
    size = (SIZE, SIZE)
    images = np.stack(
        [
            np.asarray(
                Image.fromarray(image).resize(size, Image.Resampling.BILINEAR).convert("RGB")
            )
            for image in levels
        ]
    )
    targets = raw.target.astype(np.int64)
    train, calibration, test = (
        Split(name, images[indices], targets[indices])
        for name, indices in zip(
            ("train", "calibration", "test"), stratified(targets, SHARES, seed), strict=True
        )
    )
    return Dataset("digits", "digits", tuple("0123456789"), train, calibration, test)
