"""Every kind of image file becomes the one tensor, or one clear error that names it."""

from __future__ import annotations

import io
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image

from cnnedge.errors import ImageError
from cnnedge.image import (
    NORMALIZATIONS,
    ImageContract,
    decode,
    fit,
    normalize,
    to_batch,
    to_tensor,
)

CONTRACT = ImageContract(24, 32)


def picture(width=64, height=48):
    """Red grows to the right, green downwards; blue marks the upper left corner."""
    x, y = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    blue = np.zeros_like(x)
    blue[: height // 2, : width // 2] = 255
    return np.stack([x, y, blue], -1).round().astype(np.uint8)


def saved(image, format, **options):
    stream = io.BytesIO()
    image.save(stream, format, **options)
    return stream.getvalue()


RGB = Image.fromarray(picture())
NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (48, 64, 3), np.uint8))


def test_all_kinds_of_source_give_the_same_tensor(tmp_path):
    data = saved(RGB, "PNG")
    path = tmp_path / "a.png"
    path.write_bytes(data)
    expected = to_tensor(data, CONTRACT)
    assert expected.shape == (24, 32, 3)
    assert expected.dtype == np.uint8
    with open(path, "rb") as file:
        for source in (path, str(path), file, RGB, picture()):
            np.testing.assert_array_equal(to_tensor(source, CONTRACT), expected)


def test_the_resize_is_pillows_antialiased_bilinear():
    expected = np.asarray(RGB.resize((32, 24), Image.Resampling.BILINEAR))
    np.testing.assert_array_equal(to_tensor(RGB, CONTRACT), expected)
    checker = np.tile(np.array([[0, 255], [255, 0]], np.uint8), (64, 64))
    shrunk = to_tensor(checker, ImageContract(16, 16))
    assert np.abs(shrunk.astype(int) - 127).max() < 3  # without antialiasing: 0 and 255


def test_crop_and_letterbox():
    wide = np.zeros((20, 60, 3), np.uint8)
    wide[:, 20:40] = 255
    crop = to_tensor(wide, ImageContract(10, 10, resize="crop"))
    assert crop.min() == 255
    letterbox = to_tensor(wide, ImageContract(30, 30, resize="letterbox"))
    assert letterbox[:10].max() == 0
    assert letterbox[20:].max() == 0
    assert letterbox[10:20, 11:19].min() == 255


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_rotated_photo_is_turned_upright(orientation):
    turns = {
        1: lambda a: a,
        2: np.fliplr,
        3: lambda a: np.rot90(a, 2),
        4: np.flipud,
        5: lambda a: np.swapaxes(a, 0, 1),
        6: np.rot90,
        7: lambda a: np.rot90(np.swapaxes(a, 0, 1), 2),
        8: lambda a: np.rot90(a, -1),
    }
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = Image.fromarray(np.ascontiguousarray(turns[orientation](picture())))
    upright = np.asarray(decode(saved(stored, "PNG", exif=exif)))
    np.testing.assert_array_equal(upright, picture())


def test_sixteen_bits_are_scaled_not_clipped(tmp_path):
    levels = np.linspace(0, 65535, 48 * 64).reshape(48, 64).astype(np.uint16)
    for format in ("PNG", "TIFF"):
        grey = np.asarray(decode(saved(Image.fromarray(levels), format)))
        np.testing.assert_array_equal(grey[..., 0], np.rint(levels / 257).astype(np.uint8))


def test_transparency_is_laid_on_white():
    rgba = np.zeros((8, 8, 4), np.uint8)
    rgba[:, :4] = (200, 0, 0, 255)
    for data in (
        saved(Image.fromarray(rgba), "PNG"),
        saved(Image.fromarray(rgba), "WEBP", lossless=True),
    ):
        shown = np.asarray(decode(data))
        assert (shown[:, :4] == (200, 0, 0)).all()
        assert (shown[:, 4:] == 255).all()
    palette = Image.fromarray(rgba[..., :3]).quantize(4)
    transparent = palette.getpixel((7, 0))
    shown = np.asarray(decode(saved(palette, "PNG", transparency=transparent)))
    assert (shown[:, 4:] == 255).all()
    shown = np.asarray(decode(saved(Image.fromarray(rgba[..., :3]), "PNG", transparency=(0, 0, 0))))
    assert (shown[:, :4] == (200, 0, 0)).all()
    assert (shown[:, 4:] == 255).all()


@pytest.mark.parametrize("mode", ["L", "LA", "P", "1", "CMYK", "YCbCr", "HSV"])
def test_other_modes_become_rgb(mode):
    converted = RGB.convert(mode)
    format = "TIFF" if mode in {"CMYK", "YCbCr"} else "PNG"
    source = converted if mode == "HSV" else saved(converted, format)
    shown = decode(source)
    assert (shown.mode, shown.size) == ("RGB", RGB.size)
    if mode in {"CMYK", "YCbCr", "HSV"}:
        assert np.abs(np.asarray(shown).astype(int) - picture()).mean() < 12


def test_an_animation_gives_its_first_frame():
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "green", "blue")]
    for format in ("GIF", "WEBP"):
        data = saved(frames[0], format, save_all=True, append_images=frames[1:])
        red, green, blue = np.asarray(decode(data))[0, 0].astype(int)
        assert red > 240
        assert green < 20
        assert blue < 20


def test_grey_networks_get_one_channel():
    tensor = to_tensor(RGB, ImageContract(24, 32, channels=1))
    assert tensor.shape == (24, 32, 1)
    assert to_tensor(picture()[..., 0], ImageContract(24, 32, 1)).shape == (24, 32, 1)


def test_a_large_photo_is_decoded_small_and_stays_the_same_picture():
    large = RGB.resize((2400, 1800), Image.Resampling.BICUBIC)
    data = saved(large, "JPEG", quality=95)
    contract = ImageContract(60, 80)
    assert decode(data, contract).size == (300, 225)  # an eighth, still over twice the target
    drafted = to_tensor(data, contract).astype(int)
    whole = np.asarray(decode(data).resize((80, 60), Image.Resampling.BILINEAR)).astype(int)
    assert np.abs(drafted - whole).mean() < 2


def test_a_photo_taken_sideways_keeps_twice_the_target():
    exif = Image.Exif()
    exif[0x0112] = 6  # stored 4000×1000, upright 1000×4000
    data = saved(RGB.resize((4000, 1000)), "JPEG", exif=exif)
    assert decode(data, ImageContract(height=100, width=450)).size == (1000, 4000)
    assert decode(data, ImageContract(height=450, width=100)).size == (250, 1000)


def test_an_array_that_fits_is_not_touched():
    ready = to_tensor(RGB, CONTRACT)
    assert to_tensor(ready, CONTRACT) is ready


def png_that_declares(width, height):
    def chunk(kind, content):
        body = kind + content
        return len(content).to_bytes(4, "big") + body + zlib.crc32(body).to_bytes(4, "big")

    header = width.to_bytes(4, "big") + height.to_bytes(4, "big") + b"\x08\x02\0\0\0"
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is no image"),
        (b"hello", "is no image"),
        (saved(NOISE, "PNG")[:2000], "cannot be decoded"),
        (saved(NOISE, "JPEG")[:2000], "cannot be decoded"),
        (saved(RGB, "PNG")[:20], "cannot be decoded|is no image"),
        (png_that_declares(12_000, 10_000), "declares"),
        (png_that_declares(100_000, 100_000), "declares"),
        (saved(Image.fromarray(np.full((4, 4), 0.5, np.float32)), "TIFF"), "float32"),
    ],
    ids=["empty", "text", "png", "jpeg", "header", "large", "bomb", "float"],
)
def test_a_broken_file_is_named(tmp_path, content, message, recwarn):
    path = tmp_path / "photo.jpg"
    path.write_bytes(content)
    with pytest.raises(ImageError, match=message) as caught:
        to_tensor(path, CONTRACT)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not recwarn


def test_what_is_no_file_is_named(tmp_path):
    with pytest.raises(ImageError, match=r"no image .*nowhere\.png"):
        decode(tmp_path / "nowhere.png")
    with pytest.raises(ImageError, match="is a folder, and no image file"):
        decode(tmp_path)


def test_a_picture_whose_file_is_cut_short_is_no_stack_trace():
    opened = Image.open(io.BytesIO(saved(NOISE, "JPEG")[:2000]))  # lazy: nothing is read yet
    with pytest.raises(ImageError, match="truncated"):
        to_tensor(opened, CONTRACT)


@pytest.mark.parametrize("source", [None, 7, ["a.png"]])
def test_what_cannot_hold_an_image_is_refused(source):
    with pytest.raises(ImageError, match="give a path, bytes, an open file or a uint8 array"):
        decode(source)


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((8, 8, 3), np.float32), "uint8"),
        (np.zeros((8, 8, 2), np.uint8), "is no image"),
        (np.zeros((1, 8, 8, 3), np.uint8), "is no image"),
        (np.zeros((0, 8, 3), np.uint8), "is no image"),
    ],
)
def test_arrays_that_are_no_images(array, message):
    with pytest.raises(ImageError, match=message):
        to_tensor(array, CONTRACT)


def test_threads_do_not_disturb_each_other():
    sources = [saved(RGB.rotate(10 * i), "JPEG") for i in range(16)]
    alone = to_batch(sources, CONTRACT)
    with ThreadPoolExecutor(8) as pool:
        for batch in pool.map(lambda _: to_batch(sources, CONTRACT), range(8)):
            np.testing.assert_array_equal(batch, alone)


@pytest.mark.tf
@pytest.mark.parametrize("name", NORMALIZATIONS)
def test_normalizations_are_those_of_keras(name):
    from keras.applications.imagenet_utils import preprocess_input

    batch = np.random.default_rng(0).integers(0, 256, (2, 5, 5, 3), np.uint8)
    ours = normalize(batch, name)
    assert ours.dtype == np.float32
    plain = batch.astype(np.float32)
    expected = {"unit": plain / 255, "none": plain}.get(name)
    if expected is None:
        expected = preprocess_input(plain.copy(), mode=name)
    np.testing.assert_allclose(ours, expected, atol=2e-5 if name == "caffe" else 2e-6)


def test_the_contract_survives_its_own_json():
    contract = ImageContract(10, 20, 1, "letterbox")
    assert ImageContract.from_dict(contract.to_dict()) == contract
    for wrong in ({"height": 0, "width": 3}, {"height": 3, "width": 3, "resize": "magic"}):
        with pytest.raises(ValueError, match="shape|resize"):
            ImageContract.from_dict(wrong)


@pytest.mark.parametrize("resize", ["stretch", "letterbox"])
def test_the_width_is_resized_first_whatever_pillow_finds_quicker(resize):
    """Each pass rounds, so the order shows; from 13.0 on Pillow's own depends on the sizes."""
    rng = np.random.default_rng(0)
    tall = Image.fromarray(rng.integers(0, 256, (640, 64, 3), np.uint8))
    found = fit(tall, ImageContract(60, 60, resize=resize))
    width = 60 if resize == "stretch" else 6
    narrow = tall.resize((width, 640), Image.Resampling.BILINEAR)
    expected = np.asarray(narrow.resize((width, 60), Image.Resampling.BILINEAR))
    left = (60 - width) // 2
    np.testing.assert_array_equal(found[:, left : left + width], expected)


def test_a_thread_of_pixels_is_not_stretched():
    """Widened first it would be 224 times as large: of the most that is decoded, 60 GB."""
    thread = Image.new("RGB", (1, 400_000))
    with pytest.raises(ImageError, match="1×400000 pixels is too tall .* at most 399457 rows"):
        fit(thread, ImageContract(224, 224))
    for resize in ("crop", "letterbox"):
        assert fit(thread, ImageContract(224, 224, resize=resize)).shape == (224, 224, 3)
    assert fit(thread.rotate(90, expand=True), ImageContract(224, 224)).shape == (224, 224, 3)
