"""Road signs as a camera in a moving car sees them: small, tilted, dirty, blurred, half hidden.

Image ``i`` of a seed is a pure function of ``(seed, i)``. Only additions, multiplications and
NumPy's seeded generator decide what is drawn, so two machines draw the same picture, save that
another release of Pillow or libjpeg may round a pixel another way.
"""

from __future__ import annotations

import io
import math
from typing import TYPE_CHECKING

import numpy as np

from cnnedge.data.signs.drawing import LABELS, MAKES, Colour, templates

if TYPE_CHECKING:
    from numpy.random import Generator
    from PIL.Image import Image as PillowImage
    from PIL.ImageDraw import ImageDraw

SIZE = 112  # pixels: half of what AlexNet and VGG take
# Whoever changes a pixel of any image changes this: it is in the cache's name.
VERSION = 1
# How hard the pictures are, from 0 (large, clean, frontal signs) to 1 (many that a person cannot
# read). Chosen so that a good model still errs on a few in a hundred, mostly among 30/50/60/80: a
# model that was damaged on its way to a device then shows it. Changing it changes every picture.
DIFFICULTY = 0.75

_CANVAS = 2 * SIZE  # shapes are drawn at twice the size and reduced: Pillow's are not antialiased
_ROW, _COLUMN = np.mgrid[0:SIZE, 0:SIZE].astype(np.float32) / np.float32(SIZE)

_SKIES = ((150, 185, 225), (205, 215, 225), (235, 225, 210), (110, 120, 140), (60, 70, 95))
_GROUNDS = ((95, 95, 95), (120, 115, 105), (85, 105, 60), (130, 110, 85), (60, 62, 66))
_WALLS = ((165, 150, 130), (140, 75, 60), (200, 195, 185), (110, 110, 115), (185, 170, 120))
_LEAVES = ((60, 95, 40), (85, 120, 55), (40, 65, 35), (140, 120, 50), (150, 95, 45))
# Hoardings, cars, shop fronts in the colours of signs: colour alone must not give a class away.
_PAINTS = ((190, 30, 40), (20, 80, 165), (240, 195, 40), (235, 235, 235), (30, 30, 32))


def render(seed: int, index: int) -> np.ndarray:
    """Return image ``index`` of a seed, uint8 ``[SIZE, SIZE, 3]``; its class is `label_of`."""
    rng = np.random.default_rng((seed, index))
    hard = DIFFICULTY
    radius = SIZE * (0.42 - 0.25 * hard * _uniform(rng, 0, 1))
    centre = tuple(
        SIZE / 2 + (0.1 + 0.5 * hard) * (SIZE / 2 - 0.9 * radius) * u for u in _pair(rng)
    )
    scene = _scene(rng, centre, radius)
    sign = _seen_sign(rng, label_of(index), centre, radius)
    alpha = sign[3] / np.float32(255)
    picture = scene * (1 - alpha) + _weather(rng, sign[:3]) * alpha
    if rng.random() < 0.4 * hard:
        picture = _occlude(rng, picture, centre, radius)
    picture = _light(rng, picture)
    return _shoot(rng, picture)


def label_of(index: int) -> int:
    """Return the class of an image: they take turns, so any run of them is balanced."""
    return index % len(LABELS)


def _uniform(rng: Generator, low: float, high: float) -> float:
    return low + (high - low) * float(rng.random())


def _pair(rng: Generator) -> tuple[float, float]:
    return _uniform(rng, -1, 1), _uniform(rng, -1, 1)


def _pick(rng: Generator, colours: tuple[Colour, ...], jitter: int = 25) -> Colour:
    base = colours[int(rng.integers(len(colours)))]
    shift = int(rng.integers(-jitter, jitter + 1))
    r, g, b = (min(255, max(0, c + shift)) for c in base)
    return r, g, b


def _clouds(rng: Generator, cells: int) -> np.ndarray:
    """Return smooth noise of a number of cells across, float32 ``[SIZE, SIZE]`` in 0…1."""
    from PIL import Image

    grid = Image.fromarray(rng.integers(0, 256, (cells, cells), np.uint8))
    smooth = grid.resize((SIZE, SIZE), Image.Resampling.BILINEAR)
    return np.asarray(smooth, np.float32) / np.float32(255)


def _planes(image: PillowImage) -> np.ndarray:
    """Return an image's channels as float32 ``[C, SIZE, SIZE]``: NumPy is slow on rows of three."""
    return np.asarray(image).transpose(2, 0, 1).astype(np.float32, order="C")


def _photo(picture: np.ndarray) -> PillowImage:
    """Return float planes as an 8-bit image."""
    from PIL import Image

    levels = np.clip(picture, 0, 255).astype(np.uint8)
    return Image.fromarray(np.ascontiguousarray(levels.transpose(1, 2, 0)))


# The scene


def _scene(rng: Generator, centre: tuple[float, ...], radius: float) -> np.ndarray:
    """Return what is behind the sign, float32 ``[3, SIZE, SIZE]`` in 0…255."""
    from PIL import Image, ImageDraw

    sky, ground = _pick(rng, _SKIES), _pick(rng, _GROUNDS)
    canvas = Image.new("RGB", (_CANVAS, _CANVAS), sky)
    draw = ImageDraw.Draw(canvas)
    horizon = _CANVAS * _uniform(rng, 0.35, 1.1)
    slope = _CANVAS * _uniform(rng, -0.1, 0.1)
    for _ in range(int(rng.integers(2, 7))):
        (_building, _tree, _tree, _paint, _pole)[int(rng.integers(5))](rng, draw, horizon)
    draw.polygon(
        [(0, horizon), (_CANVAS, horizon + slope), (_CANVAS, _CANVAS), (0, _CANVAS)], ground
    )
    if rng.random() < 0.5:
        _tree(rng, draw, horizon)
    x, y, half = 2 * centre[0], 2 * centre[1], radius * _uniform(rng, 0.08, 0.16)
    lean = _uniform(rng, -0.06, 0.06) * (_CANVAS - y)
    steel = _pick(rng, ((150, 150, 150), (90, 92, 95), (110, 90, 70)))
    draw.polygon(
        [(x - half, y), (x + half, y), (x + lean + half, _CANVAS), (x + lean - half, _CANVAS)],
        steel,
    )
    texture = 0.7 * _clouds(rng, 40) + 0.3 * _clouds(rng, 6)
    strength = _uniform(rng, 0.1, 0.7)
    return _planes(canvas.reduce(2)) * (1 + strength * (texture - np.float32(0.5)))


def _building(rng: Generator, draw: ImageDraw, horizon: float) -> None:
    left, width = _uniform(rng, -0.3, 0.9) * _CANVAS, _uniform(rng, 0.2, 0.7) * _CANVAS
    top = horizon - _uniform(rng, 0.2, 0.9) * _CANVAS
    draw.rectangle((left, top, left + width, _CANVAS), _pick(rng, _WALLS))
    glass = _pick(rng, ((50, 55, 65), (90, 105, 125), (210, 200, 160)))
    step, pane = _uniform(rng, 18, 40), _uniform(rng, 0.4, 0.7)
    for row in range(int((_CANVAS - top) // step)):
        for column in range(int(width // step)):
            x, y = left + (column + 0.25) * step, top + (row + 0.25) * step
            draw.rectangle((x, y, x + pane * step, y + pane * step), glass)


def _tree(rng: Generator, draw: ImageDraw, horizon: float) -> None:
    x, y = _uniform(rng, 0, 1) * _CANVAS, horizon - _uniform(rng, 0, 0.6) * _CANVAS
    spread, colour = _uniform(rng, 0.12, 0.4) * _CANVAS, _pick(rng, _LEAVES, 10)
    draw.line((x, y, x, _CANVAS), (70, 55, 45), int(spread / 8) + 1)
    count = 36
    offsets = (rng.random((count, 2)) + rng.random((count, 2)) - 1) * spread
    sizes = rng.random(count) * spread * 0.22 + 3
    shades = rng.integers(-30, 31, count)
    for (dx, dy), size, shade in zip(
        offsets.tolist(), sizes.tolist(), shades.tolist(), strict=True
    ):
        box = (x + dx - size, y + dy - size, x + dx + size, y + dy + size)
        draw.ellipse(box, (colour[0] + shade, colour[1] + shade, colour[2] + shade))


def _paint(rng: Generator, draw: ImageDraw, horizon: float) -> None:
    """Something in the colours of road signs, round or square, that is none."""
    x, y = _uniform(rng, 0, 1) * _CANVAS, _uniform(rng, 0, 1) * _CANVAS
    w, h = _uniform(rng, 0.06, 0.25) * _CANVAS, _uniform(rng, 0.06, 0.25) * _CANVAS
    shape = draw.ellipse if rng.random() < 0.5 else draw.rectangle
    shape((x - w, y - h, x + w, y + h), _pick(rng, _PAINTS))
    if rng.random() < 0.6:
        shape((x - 0.7 * w, y - 0.7 * h, x + 0.7 * w, y + 0.7 * h), _pick(rng, _PAINTS))


def _pole(rng: Generator, draw: ImageDraw, horizon: float) -> None:
    x, lean = _uniform(rng, 0, 1) * _CANVAS, _uniform(rng, -0.15, 0.15) * _CANVAS
    colour = _pick(rng, ((60, 60, 62), (140, 140, 140), (95, 75, 55)))
    draw.line((x, 0, x + lean, _CANVAS), colour, int(rng.integers(2, 14)))
    if rng.random() < 0.5:  # wires
        y = _uniform(rng, 0, 0.5) * _CANVAS
        draw.line((0, y, _CANVAS, y + lean), (40, 40, 42), 2)


# The sign


def _seen_sign(rng: Generator, label: int, centre: tuple[float, ...], radius: float) -> np.ndarray:
    """Return the sign in perspective, float32 RGBA ``[4, SIZE, SIZE]`` in 0…255."""
    from PIL import Image

    hard = DIFFICULTY
    yaw = math.radians(_uniform(rng, -52, 52) * hard)
    pitch = math.radians(_uniform(rng, -22, 22) * hard)
    roll = math.radians(_uniform(rng, -14, 14) * hard)
    sizes = templates(label, int(rng.integers(len(MAKES))))
    # The smallest picture that is not enlarged: bilinear sampling does not antialias.
    flat = next((t for t in reversed(sizes) if t.width >= 2 * radius), sizes[0])
    towards = _homography(yaw, pitch, roll, centre, radius, flat.width)
    seen = flat.transform(
        (SIZE, SIZE), Image.Transform.PERSPECTIVE, towards, Image.Resampling.BILINEAR
    )
    return _planes(seen.convert("RGBA"))


def _homography(
    yaw: float, pitch: float, roll: float, centre: tuple[float, ...], radius: float, side: int
) -> tuple[float, ...]:
    """Return Pillow's eight coefficients from a place in the image to one in the flat picture.

    A pinhole camera at five radii from a plane turned by three angles (Hartley & Zisserman,
    Multiple View Geometry, 2nd ed., 8.1): the inverse of ``K [r1 r2 t]``.
    """
    cy, sy, cp, sp = math.cos(yaw), math.sin(yaw), math.cos(pitch), math.sin(pitch)
    cr, sr = math.cos(roll), math.sin(roll)
    distance, half = 5.0, side / 2
    # The turned plane's axes, and where its origin lies: x right, y down, z away.
    first = (cy * cr, cp * sr + sp * sy * cr, sp * sr - cp * sy * cr)
    second = (-cy * sr, cp * cr - sp * sy * sr, sp * cr + cp * sy * sr)
    focal = distance * radius
    forward = np.array(
        [
            [focal * a + centre[0] * c, focal * b + centre[1] * c, c]
            for a, b, c in (first, second, (0.0, 0.0, distance))
        ]
    ).T
    a, b, c, d, e, f, g, h, i = forward.ravel().tolist()
    back = (
        (e * i - f * h, c * h - b * i, b * f - c * e),
        (f * g - d * i, a * i - c * g, c * d - a * f),
        (d * h - e * g, b * g - a * h, a * e - b * d),
    )
    rows = [
        [half * (p + q) for p, q in zip(back[axis], back[2], strict=True)] for axis in (0, 1)
    ] + [list(back[2])]
    scale = rows[2][2]
    return tuple(v / scale for row in rows for v in row)[:8]


def _weather(rng: Generator, sign: np.ndarray) -> np.ndarray:
    """Return the sign faded by the sun, and dirty."""
    hard = DIFFICULTY
    fade = 0.55 * hard * _uniform(rng, 0, 1) ** 2
    grey = (sign[0] + sign[1] + sign[2]) / np.float32(3)
    sign = sign * (1 - fade) + (0.5 * grey + 85) * fade
    if rng.random() < 0.5 * hard:
        amount = _uniform(rng, 0.3, 0.9) * hard
        dirt = np.clip((_clouds(rng, int(rng.integers(4, 14))) - 0.55) * 5, 0, 1)
        soil = np.array(_pick(rng, _GROUNDS), np.float32)[:, None, None]
        sign = sign + (soil - sign) * (dirt * amount)
    return sign * _uniform(rng, 1 - 0.35 * hard, 1.1)


def _occlude(
    rng: Generator, picture: np.ndarray, centre: tuple[float, ...], radius: float
) -> np.ndarray:
    """Put leaves, a pole or a sticker before a part of the sign."""
    from PIL import Image, ImageDraw

    layer = Image.new("RGBA", (_CANVAS, _CANVAS))
    draw = ImageDraw.Draw(layer)
    side = 1 if rng.random() < 0.5 else -1
    x = 2 * centre[0] + side * 2 * radius * _uniform(rng, 0.55, 1.1)
    y = 2 * centre[1] + 2 * radius * _uniform(rng, -0.9, 0.9)
    kind = rng.random()
    if kind < 0.5:
        colour = _pick(rng, _LEAVES)
        for dx, dy, size in (rng.random((14, 3)) - (0.5, 0.5, -0.4)).tolist():
            w, h = 0.16 * radius * size, 0.32 * radius * size
            px, py = x + 1.3 * radius * dx, y + 1.3 * radius * dy
            draw.polygon([(px - w, py), (px, py - h), (px + w, py), (px, py + h)], (*colour, 255))
    elif kind < 0.75:
        draw.line((x, 0, x, _CANVAS), (*_pick(rng, _WALLS), 255), int(0.25 * radius) + 2)
    else:
        x, y = (
            2 * centre[0] + radius * _uniform(rng, -1, 1),
            2 * centre[1] + radius * _uniform(rng, -1, 1),
        )
        w, h = radius * _uniform(rng, 0.15, 0.4), radius * _uniform(rng, 0.15, 0.4)
        draw.polygon(
            [(x - w, y - h), (x + w, y - 0.8 * h), (x + 0.9 * w, y + h), (x - w, y + 0.8 * h)],
            (*_pick(rng, _PAINTS), 255),
        )
    hidden = _planes(layer.convert("RGBa").reduce(2))  # premultiplied
    return picture * (1 - hidden[3] / np.float32(255)) + hidden[:3]


# The light and the camera


def _light(rng: Generator, picture: np.ndarray) -> np.ndarray:
    """Return the picture under a light: its gradient, shadows, colour, haze and glare."""
    hard = DIFFICULTY
    across, down = _pair(rng)
    light = 1 + 0.35 * hard * (
        across * (_COLUMN - np.float32(0.5)) + down * (_ROW - np.float32(0.5))
    )
    shadow = rng.random()
    depth = _uniform(rng, 0.25, 0.7) * hard
    if shadow < 0.2:  # a wall's edge
        a, b = _pair(rng)
        edge = (a * (_COLUMN - np.float32(0.5)) + b * (_ROW - np.float32(0.5))) * 12
        light = light * (1 - depth * np.clip(edge + _uniform(rng, -1.5, 1.5), 0, 1))
    elif shadow < 0.4:  # a tree's leaves
        leaves = np.clip((_clouds(rng, int(rng.integers(5, 16))) - 0.5) * 4, 0, 1)
        light = light * (1 - depth * leaves)
    exposure = 1 + hard * _uniform(rng, -0.6, 0.35)
    warmth = 0.16 * hard * _uniform(rng, -1, 1)
    tint = np.array([1 + warmth, 1, 1 - warmth], np.float32) * np.float32(exposure)
    picture = picture * (light * tint[:, None, None])
    haze = 0.45 * hard * _uniform(rng, 0, 1) ** 3
    picture = picture * (1 - haze) + 175 * haze
    if rng.random() < 0.08 * hard:  # glare
        x, y = (0.5 + 0.5 * u for u in _pair(rng))
        near = np.clip(1 - ((_COLUMN - np.float32(x)) ** 2 + (_ROW - np.float32(y)) ** 2) * 6, 0, 1)
        picture = picture + 150 * (near * near)
    return picture


def _shoot(rng: Generator, picture: np.ndarray) -> np.ndarray:
    """Return what the camera stores of a picture: blurred, coarse, noisy, compressed."""
    from PIL import Image, ImageFilter

    hard = DIFFICULTY
    kind = rng.random()
    if kind < 0.25:
        picture = _smear(picture, int(rng.integers(2, 3 + round(5 * hard))), rng.random() < 0.7)
    photo = _photo(picture)
    if 0.25 <= kind < 0.6:
        photo = photo.filter(ImageFilter.GaussianBlur(_uniform(rng, 0.2, 0.4 + 1.6 * hard)))
    if rng.random() < 0.5 * hard:  # cut out of a wider frame and enlarged
        side = round(SIZE * (1 - hard * _uniform(rng, 0.15, 0.62)))
        photo = photo.resize((side, side), Image.Resampling.BILINEAR)
        photo = photo.resize((SIZE, SIZE), Image.Resampling.BILINEAR)
    sigma = 1 + 13 * hard * _uniform(rng, 0, 1) ** 2
    noise = rng.standard_normal((SIZE, SIZE, 3), np.float32) * np.float32(sigma)
    exposed = np.clip(np.asarray(photo) + noise, 0, 255).astype(np.uint8)
    stored = io.BytesIO()
    Image.fromarray(exposed).save(
        stored, "JPEG", quality=95 - round(65 * hard * _uniform(rng, 0, 1))
    )
    with Image.open(stored) as seen:
        return np.asarray(seen)


def _smear(picture: np.ndarray, length: int, sideways: bool) -> np.ndarray:
    """Return the mean of a picture and its shifted copies: motion blur along a row or column."""
    total = picture.copy()
    for shift in range(1, length):
        if sideways:
            total[..., shift:] += picture[..., :-shift]
            total[..., :shift] += picture[..., :1]
        else:
            total[:, shift:] += picture[:, :-shift]
            total[:, :shift] += picture[:, :1]
    return total / np.float32(length)
