"""The road signs as flat pictures, after the Vienna Convention on Road Signs and Signals (1968).

Everything is drawn from polygons, digits and letters included: no font, so that no machine's
fonts decide what the data set looks like.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL.Image import Image as PillowImage

Point = tuple[float, float]
Colour = tuple[int, int, int]

TEMPLATE_SIZE = 192  # pixels of a sign's largest picture; halved down to 48
_SUPERSAMPLING = 3
WHITE, BLACK = (242, 242, 240), (22, 22, 24)


@dataclass(frozen=True)
class Make:
    """One manufacturer's rendition: signs of one kind are not all alike.

    Attributes:
        red: Of rings and grounds.
        blue: Of mandatory signs.
        yellow: Of the priority road.
        ring: The width of a red border, as a share of the sign's radius.
        weight: The stroke width of digits and letters, as a share of their height.
        glyph: The height of the digits, as a share of the sign's radius.
    """

    red: Colour
    blue: Colour
    yellow: Colour
    ring: float
    weight: float
    glyph: float


MAKES = (
    Make((196, 22, 34), (14, 78, 160), (246, 192, 20), 0.17, 0.17, 0.74),
    Make((178, 30, 30), (24, 92, 178), (236, 176, 44), 0.22, 0.14, 0.68),
    Make((214, 44, 40), (8, 60, 132), (252, 206, 40), 0.14, 0.20, 0.76),
)


class Pen:
    """Draws in a square from −1 to 1, y downwards, on a supersampled canvas."""

    def __init__(self, make: Make) -> None:
        from PIL import Image, ImageDraw

        self.make = make
        self.side = TEMPLATE_SIZE * _SUPERSAMPLING
        self.canvas = Image.new("RGBA", (self.side, self.side))
        self._draw = ImageDraw.Draw(self.canvas)

    def polygon(self, points: Iterable[Point], colour: Colour) -> None:
        """Fill a polygon."""
        half = self.side / 2
        self._draw.polygon([((x + 1) * half, (y + 1) * half) for x, y in points], (*colour, 255))

    def disc(self, radius: float, colour: Colour, centre: Point = (0, 0)) -> None:
        """Fill a circle."""
        self.polygon(arc(centre, radius, radius, 0, 360), colour)

    def stroke(self, points: Iterable[Point], width: float, colour: Colour) -> None:
        """Draw a line of round caps and joints through the points."""
        points = list(points)
        for (x0, y0), (x1, y1) in pairwise(points):
            length = math.hypot(x1 - x0, y1 - y0) or 1.0
            nx, ny = -(y1 - y0) / length * width / 2, (x1 - x0) / length * width / 2
            self.polygon(
                [(x0 + nx, y0 + ny), (x1 + nx, y1 + ny), (x1 - nx, y1 - ny), (x0 - nx, y0 - ny)],
                colour,
            )
        for point in points:
            self.polygon(_regular(18, width / 2, 0, point), colour)

    def arrow(self, points: Iterable[Point], width: float, colour: Colour) -> None:
        """Draw a stroke that ends in a head 2.6 times as wide."""
        points = list(points)
        self.stroke(points, width, colour)
        (x0, y0), (x1, y1) = points[-2:]
        length = math.hypot(x1 - x0, y1 - y0)
        ux, uy = (x1 - x0) / length * width, (y1 - y0) / length * width
        base_x, base_y = x1 - 0.3 * ux, y1 - 0.3 * uy
        self.polygon(
            [
                (base_x - 1.3 * uy, base_y + 1.3 * ux),
                (base_x + 1.6 * ux, base_y + 1.6 * uy),
                (base_x + 1.3 * uy, base_y - 1.3 * ux),
            ],
            colour,
        )

    def finished(self) -> PillowImage:
        """Return the antialiased picture of `TEMPLATE_SIZE`, RGB premultiplied by alpha."""
        return self.canvas.convert("RGBa").reduce(_SUPERSAMPLING)


def arc(centre: Point, rx: float, ry: float, start: float, end: float) -> list[Point]:
    """Return points on an ellipse; degrees, clockwise as seen (y points down)."""
    steps = max(2, round(abs(end - start) / 6))
    angles = (math.radians(start + (end - start) * i / steps) for i in range(steps + 1))
    return [(centre[0] + rx * math.cos(a), centre[1] + ry * math.sin(a)) for a in angles]


# Strokes of each character in a box 0.6 wide and 1 high, y downwards.
GLYPHS: dict[str, list[list[Point]]] = {
    "0": [arc((0.3, 0.5), 0.27, 0.5, 0, 360)],
    "3": [
        arc((0.28, 0.25), 0.25, 0.25, -155, 80) + arc((0.27, 0.73), 0.30, 0.27, -85, 155),
    ],
    "5": [[(0.54, 0.0), (0.1, 0.0), (0.06, 0.44), *arc((0.27, 0.69), 0.30, 0.31, -128, 150)]],
    "6": [
        arc((0.3, 0.69), 0.28, 0.31, 0, 360),
        [(0.02, 0.69), *arc((0.42, 0.66), 0.40, 0.66, 180, 280)],
    ],
    "8": [arc((0.3, 0.24), 0.23, 0.24, 0, 360), arc((0.3, 0.73), 0.28, 0.27, 0, 360)],
    "S": [arc((0.3, 0.25), 0.27, 0.25, -25, -270) + arc((0.3, 0.75), 0.27, 0.25, -90, 155)],
    "T": [[(0.0, 0.0), (0.6, 0.0)], [(0.3, 0.0), (0.3, 1.0)]],
    "O": [arc((0.3, 0.5), 0.28, 0.5, 0, 360)],
    "P": [
        [(0.05, 1.0), (0.05, 0.0), (0.3, 0.0), *arc((0.3, 0.27), 0.27, 0.27, -90, 90), (0.05, 0.54)]
    ],
}


def write(pen: Pen, text: str, height: float, weight: float, colour: Colour, y: float = 0) -> None:
    """Write centred text of a height, in the pen's units."""
    width, gap = 0.6 * height, (0.16 + weight) * height
    left = -(len(text) * width + (len(text) - 1) * gap) / 2
    for i, character in enumerate(text):
        x = left + i * (width + gap)
        for points in GLYPHS[character]:
            placed = [(x + px * height, y + (py - 0.5) * height) for px, py in points]
            pen.stroke(placed, weight * height, colour)


def _regular(corners: int, radius: float, turn: float, centre: Point = (0, 0)) -> list[Point]:
    angles = (math.radians(turn + 360 * i / corners) for i in range(corners))
    return [(centre[0] + radius * math.cos(a), centre[1] + radius * math.sin(a)) for a in angles]


def _ring(pen: Pen) -> None:
    pen.disc(0.94, WHITE)
    pen.disc(0.92, pen.make.red)
    pen.disc(0.92 * (1 - pen.make.ring), WHITE)


def _triangle(pen: Pen, turn: float) -> None:
    centre = (0.0, 0.22 if turn < 0 else -0.22)
    for radius, colour in ((1.08, WHITE), (1.05, pen.make.red)):
        pen.stroke([*(ring := _regular(3, radius - 0.08, turn, centre)), ring[0]], 0.16, colour)
        pen.polygon(ring, colour)
    pen.polygon(_regular(3, 1.1 - 1.7 * pen.make.ring, turn, centre), WHITE)


def _stop(pen: Pen) -> None:
    pen.polygon(_regular(8, 0.97, 22.5), WHITE)
    pen.polygon(_regular(8, 0.91, 22.5), pen.make.red)
    write(pen, "STOP", 0.27 + 0.12 * pen.make.glyph, pen.make.weight, WHITE)


def _yield(pen: Pen) -> None:
    _triangle(pen, 90)


def _no_entry(pen: Pen) -> None:
    pen.disc(0.94, WHITE)
    pen.disc(0.92, pen.make.red)
    h = 0.06 + 0.16 * pen.make.glyph
    pen.polygon([(-0.68, -h), (0.68, -h), (0.68, h), (-0.68, h)], WHITE)


def _speed(text: str) -> Callable[[Pen], None]:
    def draw(pen: Pen) -> None:
        _ring(pen)
        write(pen, text, pen.make.glyph, pen.make.weight, BLACK)

    return draw


def _car(pen: Pen, x: float, colour: Colour) -> None:
    def place(*points: Point) -> list[Point]:
        return [(x + 1.2 * px, 1.2 * py) for px, py in points]

    pen.polygon(place((-0.2, 0.02), (-0.13, -0.17), (0.13, -0.17), (0.2, 0.02)), colour)
    pen.polygon(place((-0.12, -0.01), (-0.08, -0.11), (0.08, -0.11), (0.12, -0.01)), WHITE)
    pen.stroke(place((-0.17, 0.07), (0.17, 0.07)), 0.18, colour)
    for wheel in (-0.17, 0.17):
        pen.stroke(place((wheel, 0.1), (wheel, 0.2)), 0.11, colour)


def _no_overtaking(pen: Pen) -> None:
    _ring(pen)
    _car(pen, -0.34, pen.make.red)
    _car(pen, 0.34, BLACK)


def _priority(pen: Pen) -> None:
    for radius, colour in ((0.98, BLACK), (0.95, WHITE), (0.68, BLACK), (0.65, pen.make.yellow)):
        pen.polygon(_regular(4, radius, 0), colour)


def _danger(pen: Pen) -> None:
    _triangle(pen, -90)
    w = 0.5 * pen.make.weight
    pen.polygon([(-w, -0.24), (w, -0.24), (0.55 * w, 0.27), (-0.55 * w, 0.27)], BLACK)
    pen.disc(0.08, BLACK, (0, 0.41))


def _curve(side: int) -> Callable[[Pen], None]:
    def draw(pen: Pen) -> None:
        _triangle(pen, -90)
        points = [(-0.12, 0.48), *arc((0.1, 0.27), 0.22, 0.22, 180, 270)]
        pen.arrow([(side * x, y) for x, y in points], 0.13, BLACK)

    return draw


def _crossing(pen: Pen) -> None:
    pen.polygon([(-0.9, -0.9), (0.9, -0.9), (0.9, 0.9), (-0.9, 0.9)], WHITE)
    pen.polygon([(-0.86, -0.86), (0.86, -0.86), (0.86, 0.86), (-0.86, 0.86)], pen.make.blue)
    pen.polygon([(0, -0.72), (0.72, 0.62), (-0.72, 0.62)], WHITE)
    pen.disc(0.085, BLACK, (0.03, -0.25))
    pen.stroke([(0.02, -0.1), (-0.02, 0.16)], 0.14, BLACK)
    for leg in (
        [(-0.02, 0.16), (0.13, 0.32), (0.15, 0.5)],
        [(-0.02, 0.16), (-0.1, 0.33), (-0.22, 0.48)],
    ):
        pen.stroke(leg, 0.09, BLACK)
    for arm in ([(0.02, -0.1), (0.18, 0.04)], [(0.0, -0.1), (-0.17, 0.06)]):
        pen.stroke(arm, 0.06, BLACK)


def _turn(side: int) -> Callable[[Pen], None]:
    def draw(pen: Pen) -> None:
        pen.disc(0.94, WHITE)
        pen.disc(0.91, pen.make.blue)
        points = [
            (-0.26, 0.55),
            (-0.26, 0.08),
            *arc((-0.06, 0.08), 0.2, 0.2, 180, 270),
            (0.3, -0.12),
        ]
        pen.arrow([(side * x, y) for x, y in points], 0.19, WHITE)

    return draw


def _ahead(pen: Pen) -> None:
    pen.disc(0.94, WHITE)
    pen.disc(0.91, pen.make.blue)
    pen.arrow([(0, 0.6), (0, -0.32)], 0.2, WHITE)


SIGNS: dict[str, Callable[[Pen], None]] = {
    "stop": _stop,
    "yield": _yield,
    "no entry": _no_entry,
    "speed limit 30": _speed("30"),
    "speed limit 50": _speed("50"),
    "speed limit 60": _speed("60"),
    "speed limit 80": _speed("80"),
    "no overtaking": _no_overtaking,
    "priority road": _priority,
    "danger": _danger,
    "curve left": _curve(-1),
    "curve right": _curve(1),
    "pedestrian crossing": _crossing,
    "turn left": _turn(-1),
    "turn right": _turn(1),
    "straight ahead": _ahead,
}
LABELS = tuple(SIGNS)


@lru_cache(maxsize=len(SIGNS) * len(MAKES))
def templates(label: int, make: int) -> tuple[PillowImage, ...]:
    """Return a sign's flat picture at 192, 96 and 48 pixels, RGB premultiplied by alpha.

    So the transparent surroundings do not darken the rim when the picture is resampled.
    """
    pen = Pen(MAKES[make])
    SIGNS[LABELS[label]](pen)
    largest = pen.finished()
    return largest, largest.reduce(2), largest.reduce(4)
