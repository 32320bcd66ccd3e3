"""The proof that a model with its resize inside answers like the one fed by `image.fit`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from cnnedge.errors import GateError
from cnnedge.image import ImageContract, ImageSource, decode, fit
from cnnedge.selftest import TOLERANCE

# Each image is also given in these multiples of its width and height: images of a bundle's
# self-test may have the network's own size, at which nothing is resized.
_SIZES = ((1.0, 1.0), (2.37, 1.61), (0.7, 0.9))
_GREY = "L"


@dataclass(frozen=True)
class ResizeCheck:
    """Answers with the resize in the graph, held against answers with it before the graph.

    Attributes:
        n: How many images.
        max_abs_diff: The largest difference of a probability.
        flips: On how many images the first answer differs.
    """

    n: int
    max_abs_diff: float
    flips: int


def check_resize(
    plain: bytes,
    any_size: bytes,
    image: ImageContract,
    images: Iterable[ImageSource],
    *,
    precision: str,
) -> ResizeCheck:
    """Run images both ways on ONNX Runtime's CPU provider.

    Args:
        plain: The model as exported.
        any_size: What `put_resize` made of it.
        image: The image contract.
        images: What `decode` takes, the golden images of a bundle, say; each is tried in three
            sizes.
        precision: "fp32", "fp16", "int8" …: how much an answer may differ; see `TOLERANCE`.

    Raises:
        GateError: an answer differs by more.
        BackendError: ONNX Runtime cannot run one of the models.
        ImageError: an image cannot be decoded.
    """
    from cnnedge.backends.onnxruntime import open_session

    before, inside = open_session(plain), open_session(any_size)
    count, flips, largest = 0, 0, 0.0
    for pixels, tensor in _both_ways(images, image):
        expected, found = before(tensor[None]), inside(pixels[None])
        count += 1
        flips += int(expected.argmax() != found.argmax())
        # maximum, unlike max, hands a NaN on
        largest = float(np.maximum(largest, np.abs(expected - found).max()))
    if count == 0:
        raise GateError(
            "no image was given to try the resize in the graph on", fix="give at least one"
        )
    if not largest <= TOLERANCE[precision]:
        raise GateError(
            f"with the resize in the graph a probability differs by {largest:.1e} and {flips} of "
            f"{count} first answers differ ({precision} may differ by {TOLERANCE[precision]:.0e})",
            fix="use the model without it, and resize as cnnedge does",
        )
    return ResizeCheck(count, largest, flips)


def _both_ways(
    images: Iterable[ImageSource], image: ImageContract
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield each image as the app decodes it, uint8 ``[H, W, C]``, and as the network takes it."""
    from PIL import Image

    for source in images:
        # Without the contract: an app's decoder reads a large JPEG at its full size.
        decoded = decode(source)
        for across, down in _SIZES:
            size = (max(1, round(decoded.width * across)), max(1, round(decoded.height * down)))
            picture = decoded.resize(size, Image.Resampling.BICUBIC)
            grey = picture.convert(_GREY) if image.channels == 1 else picture
            pixels = np.asarray(grey)
            yield (pixels[..., None] if image.channels == 1 else pixels), fit(picture, image)
