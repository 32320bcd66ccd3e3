"""A decoded picture becomes 8-bit RGB, in little more memory than the two of them take.

A file of a few kilobytes may declare eighty million pixels. What it will take is reckoned before
it is decoded, and refused above a limit; conversions are done a tile at a time.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from cnnedge.errors import ImageError

if TYPE_CHECKING:
    from PIL.Image import Image as PillowImage

LIMIT = "CNNEDGE_IMAGE_MEMORY"  # environment variable: MiB that one image may take
DEFAULT_MIB = 300
ORIENTATION = 0x0112  # EXIF tag: how the camera was held
_TILE = 512  # pixels either way
_ONE_BYTE, _TWO_BYTES = {"1", "L", "P"}, {"I;16", "I;16L", "I;16B", "I;16N"}
_ALPHA = {"RGBA", "LA", "PA", "RGBa", "La"}
# Bytes a pixel that a decoder holds beside the picture: canvases, planes, and a copy of the result.
_DECODER = {"WEBP": 14, "AVIF": 14, "HEIF": 14, "JXL": 14}
_ROWS, _TILE_ROWS, _BITS, _SAMPLES = 278, 323, 258, 277  # TIFF tags


def require_memory(needed: int, name: str) -> None:
    """Refuse what takes more memory than one image may.

    Args:
        needed: Bytes at the worst moment.
        name: What the image is called.

    Raises:
        ImageError: it takes more; the message says the limit and how to raise it.
    """
    text = os.environ.get(LIMIT, "")
    if text and not text.isdecimal():
        raise ImageError(f"{LIMIT} is {text[:20]!r}", fix="give a number of MiB, such as 600")
    limit = int(text) if text else DEFAULT_MIB
    if needed > limit * 2**20:
        mib = -(-needed // 2**20)
        raise ImageError(
            f"{name} takes {mib} MiB of memory to decode, and one image may take {limit}",
            fix=f"shrink it, or set {LIMIT}={mib} in the environment",
        )


def decoding_bytes(opened: Any, declared: tuple[int, int]) -> int:
    """Return what decoding an opened file and making RGB of it takes, at the worst moment.

    Args:
        opened: A Pillow image file that is not read yet, at the size it will be decoded at.
        declared: Its width and height as declared.
    """
    area = opened.width * opened.height
    extra = area * _DECODER.get(opened.format, 0)
    if opened.format in ("JPEG", "MPO") and opened.info.get("progressive"):
        # Every coefficient waits until the last scan, two bytes each, whatever size is asked for.
        samples = [across * down for _, across, down, _ in getattr(opened, "layer", ())] or [1] * 3
        extra += 2 * declared[0] * declared[1] * sum(samples) // max(samples)
    if opened.format == "TIFF":
        tags = opened.tag_v2
        rows = tags.get(_TILE_ROWS) or min(tags.get(_ROWS, opened.height), opened.height)
        bits = tags.get(_BITS, (1,))
        sample = max(bits) if isinstance(bits, tuple) else int(bits)
        extra += opened.width * int(rows) * max(32, sample * int(tags.get(_SAMPLES, 1))) // 8
    converted = 0 if opened.mode == "RGB" else area * (_bytes_of(opened.mode) + 4)
    return max(area * _bytes_of(opened.mode) + extra, converted)


def to_rgb(picture: PillowImage, name: str) -> PillowImage:
    """Return a decoded picture upright, in 8-bit RGB, transparency laid on white.

    Raises:
        ImageError: it holds no pixels of 8 or 16 bits, or that takes more memory than it may.
    """
    from PIL import Image, ImageOps

    area = picture.width * picture.height
    if picture.getexif().get(ORIENTATION, 1) != 1:
        require_memory(2 * area * _bytes_of(picture.mode), name)
        picture = ImageOps.exif_transpose(picture)
    convert = _conversion(picture, name)
    if convert is None:
        return picture
    if picture.width <= _TILE and picture.height <= _TILE:
        return convert(picture)
    require_memory(area * (_bytes_of(picture.mode) + 4), name)
    whole = Image.new("RGB", picture.size)
    for box in _tiles(picture):
        whole.paste(convert(picture.crop(box)), box[:2])
    return whole


def _conversion(picture: PillowImage, name: str) -> Callable[[PillowImage], PillowImage] | None:
    """Return what makes of any part of a picture RGB; None where it is RGB already."""
    if picture.mode == "RGB" and "transparency" not in picture.info:
        return None
    if picture.mode.startswith("I") or picture.mode == "F":
        _refuse_deeper(picture, name)
        return _from_deep_grey
    if picture.mode in _ALPHA or "transparency" in picture.info:
        return _on_white
    return lambda part: part.convert("RGB")


def _on_white(part: PillowImage) -> PillowImage:
    from PIL import Image

    layer = part.convert("RGBA")
    white = Image.new("RGBA", layer.size, "white")
    return Image.alpha_composite(white, layer).convert("RGB")


def _from_deep_grey(part: PillowImage) -> PillowImage:
    """Scale 16-bit grey to 8 bits; Pillow's own conversion would clip it at 255."""
    from PIL import Image

    levels = np.rint(np.asarray(part) / 257.0).astype(np.uint8)
    return Image.fromarray(levels).convert("RGB")


def _refuse_deeper(picture: PillowImage, name: str) -> None:
    low, high, dtype = np.inf, -np.inf, None
    for box in _tiles(picture):
        levels = np.asarray(picture.crop(box))
        low, high, dtype = min(low, levels.min()), max(high, levels.max()), levels.dtype
    if dtype is None or dtype.kind == "f" or low < 0 or high > 65535:
        raise ImageError(
            f"{name} holds {dtype} pixels from {low:g} to {high:g}",
            fix="save it with 8 or 16 bits per channel",
        )


def _tiles(picture: PillowImage) -> Iterator[tuple[int, int, int, int]]:
    """Yield boxes that cover a picture, a row of them after the other."""
    for top in range(0, picture.height, _TILE):
        for left in range(0, picture.width, _TILE):
            right, bottom = left + _TILE, top + _TILE
            yield left, top, min(right, picture.width), min(bottom, picture.height)


def _bytes_of(mode: str) -> int:
    """Return what Pillow stores a pixel in."""
    return 1 if mode in _ONE_BYTE else 2 if mode in _TWO_BYTES else 4
