"""The figures of the benchmark page with their legends and sentences, in the order of reading."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from cnnedge.report import breakdown, figures, findings, table
from cnnedge.report.style import Figure, Look, Row, at, flat, number, title_of

Key = tuple[str, str, str, str]  # of a legend: group, label, colour, glyph


@dataclass(frozen=True)
class Chart:
    """A figure as the page holds it.

    Attributes:
        id: Of the element it is drawn into.
        label: What a list of several charts calls it; its own name otherwise.
        json: Data and layout; safe inside a script element.
        height: Pixels.
        keys: The legend; a click on one hides or shows its part.
        how: One sentence on how to read it.
        finds: One on what it shows, or "".
    """

    id: str
    label: str
    json: str
    height: int
    keys: Sequence[Key]
    how: str
    finds: str


@dataclass(frozen=True)
class Card:
    """A section of the page: a chart, or several of which one is shown.

    Attributes:
        title: Its heading.
        charts: One, or one for each contestant to choose from.
        wide: Whether it takes the page's whole width.
    """

    title: str
    charts: Sequence[Chart]
    wide: bool = True


Drawn = tuple[Figure, Sequence[Key]]  # a figure and its legend


@dataclass(frozen=True)
class _Part:
    """The part of the page that is of one model.

    Attributes:
        model: One of the document's, its `contestants` a list.
        prefix: What the names of its elements start with.
        style: How each contestant is drawn.
    """

    model: Row
    prefix: str
    style: Mapping[str, Look]

    @property
    def contestants(self) -> Sequence[Row]:
        """All that were measured."""
        return self.model["contestants"]

    def legend(self, kept: Sequence[Row]) -> list[Key]:
        """Return the legend of contestants."""
        looked = ((c["name"], title_of(c), self.style[c["name"]]) for c in kept)
        return [(name, title, look.colour, look.glyph) for name, title, look in looked]

    def chart(self, name: str, drawn: Drawn, how: str, finds: str, label: str = "") -> Chart:
        """Return a figure as the page holds it."""
        figure, keys = drawn
        # "<" could end the script element that holds it, whatever the labels are.
        json = figure.to_json().replace("<", "\\u003c").replace("&", "\\u0026")
        # A sentence on who is faster would decide what latencies here cannot.
        said = finds if not self.model.get("doubt") or name.startswith("confusion") else ""
        height = int(figure.layout.height)
        return Chart(f"{self.prefix}-{name}", label, json, height, keys, how, said)


def _with_legend(draw: Callable[..., Figure]) -> Callable[..., Drawn]:
    return lambda kept, part: (draw(kept, part.style), part.legend(kept))


def _by_row(draw: Callable[..., Figure]) -> Callable[..., Drawn]:
    """Have a figure drawn that names each contestant at its row."""
    return lambda kept, part: (draw(kept, part.style), [])


def _stacked(draw: Callable[..., tuple[Figure, Mapping[str, str]]]) -> Callable[..., Drawn]:
    """Have a figure drawn whose legend is of the parts of a time, by colour."""

    def drawn(kept: Sequence[Row], part: _Part) -> Drawn:
        figure, colours = draw(kept)
        return figure, [(name, name, colour, "■") for name, colour in colours.items()]

    return drawn


@dataclass(frozen=True)
class Section:
    """What becomes a card, where a contestant has something to show.

    Attributes:
        title: The card's heading.
        key: The field of a contestant that it is of.
        draw: Draws it, given contestants (of `_CHOICES`: one of them) and the part of the page.
        find: Says what it shows, given the same contestants.
        how: How to read it.
        more: Says the rest of that, given all contestants.
        wide: Whether it takes the page's whole width.
    """

    title: str
    key: str
    draw: Callable[[Any, _Part], Drawn]
    find: Callable[[Any], str]
    how: str = ""
    more: Callable[[Sequence[Row]], str] = lambda contestants: ""
    wide: bool = False


def cards_of(model: Row, prefix: str, style: Mapping[str, Look]) -> list[Card]:
    """Return the figures of a model that have something to show, in the order of reading.

    Args:
        model: One of the document's, its `contestants` a list.
        prefix: What the names of its elements start with.
        style: How each contestant is drawn.
    """
    part = _Part(model, prefix, style)
    cards = [
        _front_card(part),
        *(_together(section, part) for section in _SECTIONS),
        *(_one_by_one(section, part) for section in _CHOICES),
    ]
    return _side_by_side([card for card in cards if card.charts])


def _together(section: Section, part: _Part) -> Card:
    """Return a card with all contestants in one chart."""
    kept = _having(part.contestants, section.key)
    if not kept:
        return Card(section.title, [])
    drawn, how = section.draw(kept, part), section.how + section.more(part.contestants)
    chart = part.chart(section.key, drawn, how, section.find(kept))
    return Card(section.title, [chart], section.wide)


def _one_by_one(section: Section, part: _Part) -> Card:
    """Return a card with a chart for each contestant to choose from, that of the pick first."""
    pick, how = at(part.model, "pick", "name"), section.how + section.more(part.contestants)
    kept = [c for c in part.contestants if c.get(section.key)]
    kept.sort(key=lambda c: c["name"] != pick)
    charts = [
        part.chart(f"{section.key}-{i}", section.draw(c, part), how, section.find(c), title_of(c))
        for i, c in enumerate(kept)
    ]
    return Card(section.title, charts)


def _side_by_side(cards: Sequence[Card]) -> list[Card]:
    """Let a card that would stand alone in its half of the page have all of its width."""
    laid: list[Card] = []
    left = False  # is the left half of the last row taken, and the right one free?
    for i, card in enumerate(cards):
        alone = not left and (i + 1 == len(cards) or cards[i + 1].wide)
        laid.append(replace(card, wide=card.wide or alone))
        left = not left and not laid[-1].wide
    return laid


def _front_card(part: _Part) -> Card:
    model = part.model
    kept = [c for c in part.contestants if at(c, "single_stream", "p50_ms")]
    known = [c for c in kept if table.top1(c, part.contestants) is not None]
    accurate = len(known) > 1
    kept = known if accurate else [c for c in kept if c.get("bytes")]
    if not kept:
        return Card("", [])
    points = [_point(c, model if accurate else None) for c in kept]
    reference = next((r for c in kept if (r := at(c, "accuracy", "reference_top1"))), None)
    budget = model.get("max_drop")
    floor = None
    if accurate and reference is not None and budget is not None:
        floor = 100 * reference - budget
    best = figures.front_of(points, "top1" if accurate else "bytes")
    if accurate:
        title = "Accuracy, latency and size"
        how = (
            "Up and to the left is better; the area of a point is the size of its file, the line "
            "joins those that nothing else beats on both axes, the bars are the 95 % intervals of "
            "the drop against the reference on the same images."
        )
    else:
        title = "Size and latency"
        how = (
            "Down and to the left is better; the line joins those that nothing else beats on both "
            "axes. No accuracy was measured."
        )
    pick = None if model.get("doubt") else at(model, "pick", "name")
    drawn = figures.front(points, part.style, pick, floor), part.legend(kept)
    finds = findings.front(best, len(points) - len(best), floor)
    return Card(title, [part.chart("front", drawn, how, finds)])


def _point(contestant: Row, model: Row | None) -> dict[str, Any]:
    """Return what the front draws of a contestant; without a model, no accuracy."""
    top1 = table.top1(contestant, model["contestants"]) if model else None
    drop = at(contestant, "accuracy", "drop_points")
    low, high = at(contestant, "accuracy", "drop_interval_points") or (None, None)
    known = None not in (top1, drop, low, high) and contestant.get("runtime") != "keras"
    return {
        "name": contestant["name"],
        "title": title_of(contestant),
        "p50": contestant["single_stream"]["p50_ms"],
        "bytes": contestant.get("bytes"),
        "top1": top1,
        "low": top1 + drop - high if known and top1 is not None else None,
        "high": min(top1 + drop - low, 100.0) if known and top1 is not None else None,
    }


# What a run must hold to be drawn; some other fields may be null.
_NEEDS = {
    "offline": ("batch", "images_per_second"),
    "multi_stream": ("clients", "images_per_second", "p50_ms"),
    "server": ("load",),
    "cold_start": ("total_ms",),
    "duty_cycle": ("first_p50_ms", "steady_p50_ms"),
    "waterfall": ("stages",),
    "sustained": ("windows",),
}


def _having(contestants: Sequence[Row], key: str) -> list[Row]:
    """Return those that ran a scenario, without such of its runs as came to nothing."""
    needs = _NEEDS.get(key, ())
    kept: list[Row] = []
    for c in contestants:
        found = c.get(key)
        if key == "single_stream":
            found = found if flat(at(found, "samples_ms")) else None
        elif isinstance(found, (list, tuple)):
            found = [run for run in found if all(at(run, need) for need in needs)]
        elif found:
            found = found if all(at(found, need) for need in needs) else None
        if found:
            kept.append({**c, key: found})
    return kept


def _labels(model: Row, contestant: Row) -> list[str]:
    labels = model.get("labels") or []
    known = len(labels) == len(contestant["confusion"])
    return [str(x) for x in (labels if known else range(len(contestant["confusion"])))]


def _of_layers(contestants: Sequence[Row]) -> str:
    found = [c.get("layers") or [] for c in contestants]
    bound = any(x.get("bound_ms") for layers in found for x in layers)
    text = " The mark in or beside a bar is the roofline: no faster on this machine." * bound
    shown = breakdown.MOST_LAYERS
    most = max(map(len, found), default=0)
    return text + (f" Only the {shown} longest are shown." if most > shown else "")


def _throttled(contestants: Sequence[Row]) -> str:
    windows = (w for c in contestants for w in at(c, "sustained", "windows") or ())
    return " Large points were throttled." if any(w.get("throttled") for w in windows) else ""


def _waterfall_how(contestants: Sequence[Row]) -> str:
    files = (at(c, "waterfall", "file") for c in contestants)
    file = next((f for f in files if isinstance(f, Mapping)), {})
    what = "a file"
    if file.get("width") and file.get("height"):
        what = f"a {file.get('format') or 'file'} of {file['width']}×{file['height']} pixels"
    size = f", {number(file['bytes'] / 1e3)} kB" if file.get("bytes") else ""
    return (
        f"Median time of each stage from {what}{size} to a label; the number is all of them in a "
        "row, the diamond the same file through cnnedge.load, where that runs it."
    )


def _duty_cycle_how(contestants: Sequence[Row]) -> str:
    idle = next((i for c in contestants if (i := at(c, "duty_cycle", "idle_s"))), None)
    pause = "an idle pause" if idle is None else f"{idle:g} s of idleness"
    return (
        f"From the steady median (ring) to the median of first answers after {pause} (dot); the "
        "ticks are single first answers."
    )


_SECTIONS = (
    Section(
        "How latency is distributed",
        "single_stream",
        _by_row(figures.latency),
        findings.latency,
        "Each row holds every call: the wider, the more calls took that long; the bar is the "
        "p50, the diamond the p90, the triangle the p99, and the dots below are the medians "
        "of the rounds, each a new process.",
        wide=True,
    ),
    Section(
        "From a file to a label",
        "waterfall",
        _stacked(breakdown.waterfall),
        findings.waterfall,
        more=_waterfall_how,
        wide=True,
    ),
    Section(
        "Throughput in batches",
        "offline",
        _with_legend(figures.throughput),
        findings.throughput,
        "Higher is better; where a line is flat, a larger batch gains nothing.",
    ),
    Section(
        "Several clients at once",
        "multi_stream",
        _with_legend(figures.multi_stream),
        findings.multi_stream,
        "Each point is a number of clients, written beside it; right is more throughput, up "
        "is a longer wait.",
    ),
    Section(
        "Requests that arrive at random",
        "server",
        _with_legend(figures.server),
        findings.server,
        "Solid lines are the p99, dashed the p90, dotted the p50, each from a request's "
        "arrival, so that waiting in the queue counts.",
        wide=True,
    ),
    Section(
        "Cold start",
        "cold_start",
        _stacked(breakdown.cold_start),
        findings.cold_start,
        "A whole process, from nothing to its first answer, with the files in the page cache; "
        "medians by part.",
    ),
    Section(
        "After a pause",
        "duty_cycle",
        _by_row(breakdown.duty_cycle),
        findings.duty_cycle,
        more=_duty_cycle_how,
    ),
    Section(
        "Minutes on end",
        "sustained",
        _with_legend(figures.sustained),
        findings.sustained,
        "The median of each few seconds against its own first quarter: above 0 % it has "
        "become slower.",
        _throttled,
        wide=True,
    ),
)
_CHOICES = (
    Section(
        "Where the time goes, layer by layer",
        "layers",
        lambda c, part: (breakdown.layers(c, part.style[c["name"]]), []),
        findings.layers,
        "As the runtime's profile gives them, in the order they run; hover or tap a bar "
        "for its precision and work.",
        _of_layers,
    ),
    Section(
        "What is mistaken for what",
        "confusion",
        lambda c, part: (breakdown.confusion(c["confusion"], _labels(part.model, c)), []),
        findings.confusion,
        "Rows are the truth, columns the answer; all off the diagonal is a mistake. The "
        "colour is logarithmic, so that single mistakes can be seen.",
    ),
)
