"""How apps resize: each function takes a decoded picture, uint8 ``[H, W, 3]``, as `fit` does."""

from __future__ import annotations

import base64
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

Resize = Callable[[np.ndarray], np.ndarray]
CANVAS = ("low", "medium", "high")


def app_resizes(size: tuple[int, int]) -> dict[str, Resize]:
    """Return the resizes that run in this process, by what an app calls.

    Args:
        size: Height and width, in pixels.
    """
    import tensorflow as tf
    from PIL import Image

    height, width = size

    def pillow(filter_name: str, **options: Any) -> Resize:
        resample = Image.Resampling[filter_name]
        return lambda pixels: np.asarray(
            Image.fromarray(pixels).resize((width, height), resample, **options)
        )

    def tensorflow(antialias: bool) -> Resize:
        def resize(pixels: np.ndarray) -> np.ndarray:
            found = tf.image.resize(pixels, (height, width), antialias=antialias)
            return np.clip(np.rint(found.numpy()), 0, 255).astype(np.uint8)

        return resize

    return {
        "Pillow `BILINEAR`, `reducing_gap=2`": pillow("BILINEAR", reducing_gap=2.0),
        "Pillow `BICUBIC`": pillow("BICUBIC"),
        "Pillow `NEAREST`": pillow("NEAREST"),
        **opencv_resizes(size),
        "`tf.image.resize` (its default)": tensorflow(False),
        "`tf.image.resize`, `antialias=True`": tensorflow(True),
    }


def opencv_resizes(size: tuple[int, int]) -> dict[str, Resize]:
    """Return OpenCV's, as `app_resizes` does."""
    import cv2

    height, width = size

    def opencv(interpolation: int) -> Resize:
        return lambda pixels: cv2.resize(pixels, (width, height), interpolation=interpolation)

    return {
        "OpenCV `INTER_LINEAR` (its default)": opencv(cv2.INTER_LINEAR),
        "OpenCV `INTER_AREA`": opencv(cv2.INTER_AREA),
    }


_PAGE = """
async (files, side, qualities) => {
  const text = (bytes) => {
    let out = "";
    for (let i = 0; i < bytes.length; i += 32768)
      out += String.fromCharCode.apply(null, bytes.subarray(i, i + 32768));
    return btoa(out);
  };
  const read = (image, width, height, quality) => {
    const canvas = document.createElement("canvas");
    canvas.width = width; canvas.height = height;
    const context = canvas.getContext("2d", {willReadFrequently: true});
    if (quality) context.imageSmoothingQuality = quality;
    context.drawImage(image, 0, 0, width, height);
    return text(context.getImageData(0, 0, width, height).data);
  };
  const out = [];
  for (const file of files) {
    const image = new Image();
    image.src = "data:image/jpeg;base64," + file;
    await image.decode();
    const found = qualities.map((quality) => read(image, side[1], side[0], quality));
    found.push(read(image, image.naturalWidth, image.naturalHeight, null));
    out.push([image.naturalHeight, image.naturalWidth, found]);
  }
  return out;
}
"""


@contextmanager
def browser() -> Iterator[Any]:
    """Yield headless Chromium."""
    from playwright.sync_api import sync_playwright

    names = ("chromium", "chromium-browser", "google-chrome")
    found = next(filter(None, map(shutil.which, names)), None)
    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(
            executable_path=found, args=["--no-sandbox", "--disable-gpu"]
        )
        yield opened
        opened.close()


def canvas_pixels(
    page: Any, files: Sequence[bytes], size: tuple[int, int]
) -> Iterator[tuple[dict[str, np.ndarray], np.ndarray]]:
    """Yield what a canvas makes of each JPEG: small ones by quality, and the whole picture."""
    for start in range(0, len(files), 8):
        encoded = [base64.b64encode(file).decode() for file in files[start : start + 8]]
        answers = page.evaluate(f"([a, b, c]) => ({_PAGE})(a, b, c)", [encoded, size, CANVAS])
        for height, width, found in answers:
            planes = [np.frombuffer(base64.b64decode(text), np.uint8) for text in found]
            small = [plane.reshape(*size, 4)[..., :3] for plane in planes[:-1]]
            whole = planes[-1].reshape(height, width, 4)[..., :3]
            yield dict(zip(CANVAS, small, strict=True)), whole
