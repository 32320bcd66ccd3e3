"""One image takes at most 300 MiB, or is refused in a line that says so and how to raise it."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, features

from cnnedge.errors import ImageError
from cnnedge.image import ImageContract, decode, to_tensor
from cnnedge.pixels import to_rgb

# What the highest use of memory grew by, in MiB, and what came of it.
MEASURE = """
import re, sys, io
import numpy as np, PIL.ImageOps
from PIL import Image
from cnnedge.image import ImageContract, to_tensor
from cnnedge.errors import ImageError
small = io.BytesIO()
Image.new("RGB", (900, 900)).save(small, sys.argv[2])
to_tensor(small.getvalue(), ImageContract(224, 224))
# ru_maxrss would begin with the highest use of the process that started this one
peak = lambda: int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) // 1024
before = peak()
try:
    tensor = to_tensor(sys.argv[1], ImageContract(224, 224))
    said = f"{tensor.shape} {tensor.mean():.0f}"
except ImageError as error:
    said = f"refused: {error}"
print(peak() - before, said)
"""
LARGE, TALL = (9400, 9400), (1, 80_000_000)


def picture(mode, size):
    if mode == "I;16":
        return Image.new("I;16", size, 128 * 257)
    if mode == "P+":
        made = Image.new("P", size, 1)
        made.putpalette([0, 0, 0, 128, 128, 128])
        return made
    colour = {"RGBA": (128, 128, 128, 255), "LA": (128, 255), "CMYK": (127, 127, 127, 0)}
    return Image.new(mode, size, colour.get(mode, 128 if mode in ("L", "F") else 1))


CASES = {
    "grey of 16 bits": ("I;16", LARGE, "PNG", {}),
    "grey of 16 bits, 40 MP": ("I;16", (6300, 6300), "PNG", {}),
    "RGBA": ("RGBA", LARGE, "PNG", {}),
    "RGBA, 30 MP": ("RGBA", (5400, 5400), "PNG", {}),
    "palette with transparency": ("P+", LARGE, "PNG", {"transparency": b"\xff\x80"}),
    "palette with transparency, 50 MP": ("P+", (7000, 7000), "PNG", {"transparency": b"\xff\x80"}),
    "grey": ("L", LARGE, "PNG", {}),
    "grey with alpha": ("LA", LARGE, "PNG", {}),
    "one bit": ("1", LARGE, "PNG", {}),
    "a thread": ("L", TALL[::-1], "BMP", {}),
    "GIF": ("L", LARGE, "GIF", {}),
    "BMP": ("L", LARGE, "BMP", {}),
    "CMYK JPEG": ("CMYK", LARGE, "JPEG", {}),
    "progressive JPEG": ("L", LARGE, "JPEG", {"progressive": True}),
    "WebP": ("RGBA", (9000, 9000), "WEBP", {"lossless": True, "quality": 0, "method": 0}),
    "WebP, 15 MP": ("RGBA", (3900, 3900), "WEBP", {"lossless": True, "quality": 0, "method": 0}),
    "float TIFF": ("F", LARGE, "TIFF", {"compression": "tiff_lzw"}),
    "TIFF in one strip": (
        *("I;16", (8000, 8000), "TIFF"),
        {"compression": "tiff_lzw", "tiffinfo": {278: 8000}},
    ),
}


@pytest.mark.system
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="only Linux tells the peak")
@pytest.mark.parametrize("name", CASES)
def test_the_peak_of_one_image_stays_below_the_limit(tmp_path, name):
    mode, size, format, options = CASES[name]
    path = tmp_path / f"image.{format.lower()}"
    picture(mode, size).save(path, format, **options)
    warm = "PNG" if format == "BMP" else format
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    environment.pop("CNNEDGE_IMAGE_MEMORY", None)
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(path), warm],
        capture_output=True,
        text=True,
        check=True,
        env=environment,
    )
    peak, _, said = done.stdout.strip().partition(" ")
    assert int(peak) < 300, (peak, said)
    if said.startswith("refused"):
        assert "MiB of memory to decode, and one image may take 300; " in said or "float32" in said
        assert "float32" in said or "CNNEDGE_IMAGE_MEMORY=" in said
        assert not name.endswith(" MP")
    else:
        assert said.startswith("(224, 224, 3)")


def test_the_limit_is_raised_and_lowered_by_the_environment(monkeypatch):
    stream = io.BytesIO()
    Image.new("RGBA", (2000, 2000), (9, 9, 9, 255)).save(stream, "PNG")
    data, contract = stream.getvalue(), ImageContract(8, 8)
    whole = to_tensor(data, contract)
    monkeypatch.setenv("CNNEDGE_IMAGE_MEMORY", "20")
    with pytest.raises(ImageError, match=r"takes 31 MiB .* may take 20; .*CNNEDGE_IMAGE_MEMORY=31"):
        to_tensor(data, contract)
    monkeypatch.setenv("CNNEDGE_IMAGE_MEMORY", "40")
    np.testing.assert_array_equal(to_tensor(data, contract), whole)
    monkeypatch.setenv("CNNEDGE_IMAGE_MEMORY", "lots")
    with pytest.raises(ImageError, match="give a number of MiB"):
        to_tensor(data, contract)


def reference(opened):
    """What a picture becomes when it is converted whole."""
    if opened.mode.startswith("I"):
        levels = np.rint(np.asarray(opened) / 257.0).astype(np.uint8)
        return np.repeat(levels[..., None], 3, 2)
    if opened.mode in ("RGBA", "LA", "PA") or "transparency" in opened.info:
        layer = opened.convert("RGBA")
        opened = Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer)
    return np.asarray(opened.convert("RGB"))


MODES = ["1", "L", "LA", "P", "P+", "RGB", "RGB+", "L+", "RGBA", "CMYK", "YCbCr", "I;16", "I"]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("size", [(1300, 700), (513, 1), (1, 1025), (512, 512)])
def test_pixels_are_the_same_as_converted_whole(mode, size):
    rng = np.random.default_rng(0)
    noise = Image.fromarray(rng.integers(0, 256, (size[1], size[0], 4), np.uint8), "RGBA")
    bare, transparent = mode.rstrip("+"), mode.endswith("+")
    if bare.startswith("I"):
        levels = rng.integers(0, 65536, size[::-1])
        made = Image.fromarray(levels.astype(np.uint16 if bare == "I;16" else np.int32))
    else:
        made = noise.convert("RGB").convert(bare) if bare != "RGBA" else noise
        if bare == "LA":
            made = noise.convert("LA")
    if transparent:
        known = {"P": bytes(range(256)), "L": 7, "RGB": noise.convert("RGB").getpixel((0, 0))}
        made.info["transparency"] = known[bare]
    np.testing.assert_array_equal(np.asarray(to_rgb(made, "made")), reference(made))


@pytest.mark.parametrize("orientation", [1, 6])
def test_a_large_picture_is_turned_as_a_small_one_is(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    rng = np.random.default_rng(0)
    made = Image.fromarray(rng.integers(0, 256, (600, 900, 4), np.uint8), "RGBA")
    stream = io.BytesIO()
    made.save(stream, "PNG", exif=exif)
    turned = made if orientation == 1 else made.transpose(Image.Transpose.ROTATE_270)
    np.testing.assert_array_equal(np.asarray(decode(stream.getvalue())), reference(turned))


def others():
    """Bytes of formats that Pillow knows and cnnedge does not promise."""
    small = Image.new("RGB", (8, 8), "red")
    for format in ("EPS", "PDF", "TGA", "PCX", "SGI", "ICO", "DDS", "JPEG2000", "SPIDER"):
        stream = io.BytesIO()
        try:
            (small.convert("F") if format == "SPIDER" else small).save(stream, format)
        except (OSError, KeyError):
            continue
        yield pytest.param(stream.getvalue(), id=format)


@pytest.mark.parametrize("content", list(others()))
@pytest.mark.parametrize("suffix", ["png", "eps"])
def test_only_the_promised_formats_are_opened(tmp_path, content, suffix, monkeypatch):
    def start(*args, **kwargs):
        raise AssertionError("a program was started")

    monkeypatch.setattr(subprocess, "check_call", start)
    path = tmp_path / f"image.{suffix}"
    path.write_bytes(content)
    for source in (path, content, io.BytesIO(content)):
        with pytest.raises(ImageError, match="is no image; give a JPEG, PNG, WebP"):
            decode(source)


PROMISED = ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "MPO"]
PROMISED += ["AVIF"] if features.check("avif") else []


@pytest.mark.parametrize("format", PROMISED)
def test_every_promised_format_is_opened(format):
    stream = io.BytesIO()
    Image.new("RGB", (40, 40), (200, 30, 30)).save(stream, format)
    seen = to_tensor(stream.getvalue(), ImageContract(8, 8)).astype(int)
    assert np.abs(seen - (200, 30, 30)).max() < 12
