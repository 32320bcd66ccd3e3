"""What all figures and texts of the benchmark page share: colours, axes, how numbers are written.

Colours such as ``var(--ink)`` are left for the page's script to look up, so that one figure serves
the light and the dark scheme.
"""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Figure = Any  # plotly's; it is imported only where a page is made
Row = Mapping[str, Any]

# Okabe and Ito's palette, told apart by the colour-blind; its yellow and black left out, as they
# vanish on white or on dark, and its blue made lighter for the same reason.
_PALETTE = ("#3b82c4", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8262b5")
_GREY = "#8a95a3"  # the Keras reference
_SYMBOLS = (
    *(("circle", "●"), ("square", "■"), ("diamond", "◆"), ("triangle-up", "▲")),
    *(("triangle-down", "▼"), ("star", "★"), ("cross", "✚")),
)
_DASHES = ("solid", "dash", "dot", "dashdot")
NONE = "–"


@dataclass(frozen=True)
class Look:
    """How a contestant is drawn, in every figure alike.

    Attributes:
        colour: As in CSS.
        symbol: Of its points, as plotly calls it.
        glyph: The same as a character, for the legend.
        dash: Of its lines; differs only where the palette starts over.
    """

    colour: str
    symbol: str
    glyph: str
    dash: str


def looks(names: Iterable[str]) -> dict[str, Look]:
    """Give each contestant, by name, a look of its own; the same names get the same looks."""
    found: dict[str, Look] = {}
    for name in names:
        if name in found:
            continue
        if name == "keras" or name.startswith("keras@"):
            found[name] = Look(_GREY, "circle", "●", "solid")
            continue
        place = sum(look.colour != _GREY for look in found.values())
        # Past the palette the same colour comes with another symbol and another dash.
        symbol, glyph = _SYMBOLS[(place + place // len(_PALETTE)) % len(_SYMBOLS)]
        dash = _DASHES[place // len(_PALETTE) % len(_DASHES)]
        found[name] = Look(_PALETTE[place % len(_PALETTE)], symbol, glyph, dash)
    return found


def at(source: Any, *path: str) -> Any:
    """Follow keys into nested mappings; None where any is missing or null."""
    for key in path:
        if not isinstance(source, Mapping):
            return None
        source = source.get(key)
    return source


def title_of(contestant: Row) -> str:
    """Return what a table calls a contestant."""
    return str(contestant.get("title") or contestant.get("name") or "?")


def flat(samples: Any) -> list[float]:
    """Return the numbers in lists of any depth, in order."""
    if samples is None:
        return []
    if isinstance(samples, (list, tuple)):
        return [x for part in samples for x in flat(part)]
    return [float(samples)]


def number(x: float | None, digits: int = 3) -> str:
    """Write a number with so many significant digits, never in powers of ten."""
    if x is None:
        return NONE
    if x == 0 or not math.isfinite(x):
        return f"{x:.0f}"
    places = max(digits - 1 - math.floor(math.log10(abs(x))), 0)
    return f"{x:,.{places}f}".replace("-", "−")


def signed(x: float) -> str:
    """Write a difference in points, with its sign."""
    return f"{x:+.2f}".replace("-", "−")


def ms(x: float | None) -> str:
    """Write a time given in milliseconds, in the unit that reads best."""
    if x is None:
        return NONE
    return f"{number(x / 1000)} s" if abs(x) >= 10_000 else f"{number(x)} ms"


def percent(share: float | None, digits: int = 0) -> str:
    """Write a share, 0…1, in percent."""
    return NONE if share is None else f"{100 * share:.{digits}f} %"


def listed(words: Sequence[str]) -> str:
    """Join as prose does: a, b and c; with semicolons where a word has commas of its own."""
    comma = "; " if any("," in word for word in words) else ", "
    return " and ".join(filter(None, (comma.join(words[:-1]), *words[-1:])))


def plain(text: Any, most: int = 0) -> str:
    """Make text safe for plotly, which reads a little HTML in labels; cut its middle beyond most.

    Args:
        text: Whatever the document holds.
        most: Characters to keep, or 0 for all.
    """
    text = str(text)
    if most and len(text) > most:
        text = f"{text[: (most - 1) * 2 // 3]}…{text[-((most - 1) // 3) :]}"
    return html.escape(text, quote=False)


def wrapped(text: Any, width: int = 17) -> str:
    """Break a label into two lines at most, so that a phone's plot is not all labels."""
    lines = [""]
    for word in str(text).split():
        fits = len(lines[-1]) + len(word) < width
        lines[-1:] = [f"{lines[-1]} {word}".strip()] if fits else [lines[-1], word]
    lines = [line for line in lines if line]
    lines[1:] = [" ".join(lines[1:])] if lines[1:] else []
    return "<br>".join(plain(line, width + 3) for line in lines)


def told_apart(names: Sequence[str]) -> list[str]:
    """Drop the first and the last parts of paths, "a/b/c", that all of them share."""
    paths = [name.split("/") for name in names]
    if len(set(names)) < 2:
        return list(names)
    shortest = min(map(len, paths)) - 1  # something is left of each
    first = last = 0
    while first < shortest and len({path[first] for path in paths}) == 1:
        first += 1
    while first + last < shortest and len({path[-1 - last] for path in paths}) == 1:
        last += 1
    return ["/".join(path[first : len(path) - last]) for path in paths]


def faint(colour: str, alpha: float = 0.3) -> str:
    """Return a colour, ``#rrggbb``, that lets through what is behind it."""
    red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return f"rgba({red},{green},{blue},{alpha})"


def figure(height: int, **layout: Any) -> Figure:
    """Return an empty figure in the page's style, of a height in pixels."""
    import plotly.graph_objects as go

    return go.Figure(
        layout={
            "template": go.layout.Template(),
            "height": height,
            "autosize": True,
            "font": {"family": "system-ui, sans-serif", "size": 12, "color": "var(--ink)"},
            "paper_bgcolor": "rgba(0,0,0,0)",
            "plot_bgcolor": "rgba(0,0,0,0)",
            "margin": {"l": 8, "r": 14, "t": 10, "b": 8},
            "showlegend": False,
            "hoverlabel": {
                "bgcolor": "var(--paper)",
                "bordercolor": "var(--line)",
                "font": {"color": "var(--ink)", "size": 12},
                "align": "left",
            },
            "hovermode": "closest",
            "dragmode": False,  # or a finger on the plot would not scroll the page
            **layout,
        }
    )


def axis(title: str = "", **more: Any) -> dict[str, Any]:
    """Return a linear axis in the page's style."""
    return {
        "title": {"text": title, "standoff": 8, "font": {"size": 12}},
        "automargin": True,
        "fixedrange": True,
        "gridcolor": "var(--line)",
        "linecolor": "var(--line)",
        "zerolinecolor": "var(--line)",
        "tickfont": {"size": 11},
        "tickformat": ",~g",
        **more,
    }


def log_axis(
    title: str, values: Sequence[float], margin: float = 0.06, **more: Any
) -> dict[str, Any]:
    """Return a logarithmic axis over values, with few round ticks written out.

    Args:
        title: What it is of, and the unit.
        values: All that must be on it.
        margin: Room to leave at either end, as a share of its length.
        more: What else plotly is to be told of it.
    """
    values = [v for v in values if v > 0] or [1.0]
    room = (max(values) / min(values)) ** margin * 1.03
    low, high = min(values) / room, max(values) * room
    ticks = _log_ticks(low, high)
    return axis(
        title,
        type="log",
        range=[math.log10(low), math.log10(high)],
        tickvals=ticks,
        ticktext=[f"{t:,.10g}" for t in ticks],
        tickangle=0,
        **more,
    )


def _log_ticks(low: float, high: float) -> list[float]:
    """Return about five round numbers between two, spaced well on a logarithmic axis."""
    if high / low < 3:  # so little that it is almost linear
        step = 10 ** math.floor(math.log10((high - low) / 2))
        step *= next(m for m in (1, 2, 2.5, 5, 10) if (high - low) / (step * m) <= 5)
        first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
        return [round(k * step, 12) for k in range(first, last + 1)]
    few = {6: (1, 1.5, 2, 3, 5, 7), 16: (1, 2, 3, 5), 50: (1, 2, 5), 2000: (1, 3)}
    factors = next((f for most, f in few.items() if high / low < most), (1,))
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    return [t for p in powers for f in factors if low <= (t := float(f"{f}e{p}")) <= high]


def row_axis(labels: Sequence[str], **more: Any) -> dict[str, Any]:
    """Return a vertical axis with one row for each label, the first on top."""
    return axis(
        tickvals=list(range(len(labels))),
        ticktext=list(labels),
        range=[len(labels) - 0.45, -0.55],
        showgrid=False,
        zeroline=False,
        **more,
    )
