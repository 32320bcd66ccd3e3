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


def cards_of(model: Row, prefix: str, style: Mapping[str, Look]) -> list[Card]:
    """Return the figures of a model that have something to show, in the order of reading.

    Args:
        model: One of the document's, its `contestants` a list.
        prefix: What the names of its elements start with.
        style: How each contestant is drawn.
    """

    def chart(name: str, drawn: Figure, keys: Sequence[Key], how: str, finds: str) -> Chart:
        # "<" could end the script element that holds it, whatever the labels are.
        json = drawn.to_json().replace("<", "\\u003c").replace("&", "\\u0026")
        height = int(drawn.layout.height)
        # A sentence on who is faster would decide what latencies here cannot.
        said = finds if not model.get("doubt") or name.startswith("confusion") else ""
        return Chart(f"{prefix}-{name}", "", json, height, keys, how, said)

    def contestants(kept: Sequence[Row]) -> list[Key]:
        looked = ((c["name"], title_of(c), style[c["name"]]) for c in kept)
        return [(name, title, look.colour, look.glyph) for name, title, look in looked]

    def parts(colours: Mapping[str, str]) -> list[Key]:
        return [(part, part, colour, "■") for part, colour in colours.items()]

    def lines(
        title: str, key: str, draw: Callable[..., Figure], find: Callable[..., str], how: str
    ) -> Card:
        kept = _having(model["contestants"], key)
        if not kept:
            return Card(title, [])
        # Figures with a row for each contestant name them at the row.
        keys = contestants(kept) if key not in ("single_stream", "duty_cycle") else []
        return Card(
            title,
            [chart(key, draw(kept, style), keys, how, find(kept))],
            wide=key in ("single_stream", "server", "sustained"),
        )

    def stacks(title: str, key: str, draw: Callable[..., Any], find: Any, how: str) -> Card:
        kept = _having(model["contestants"], key)
        if not kept:
            return Card(title, [])
        drawn, colours = draw(kept)
        wide = key == "waterfall"
        return Card(title, [chart(key, drawn, parts(colours), how, find(kept))], wide)

    def choices(title: str, key: str, draw: Callable[[Row], tuple[Figure, str]], how: str) -> Card:
        pick = at(model, "pick", "name")
        kept = [c for c in model["contestants"] if c.get(key)]
        kept.sort(key=lambda c: c["name"] != pick)  # the pick is the one shown at first
        made = [chart(f"{key}-{i}", *_of(draw(c), how)) for i, c in enumerate(kept)]
        titled = zip(kept, made, strict=True)
        return Card(title, [replace(m, label=title_of(c)) for c, m in titled])

    found = [
        _front_card(model, style, chart, contestants),
        lines(
            "How latency is distributed",
            "single_stream",
            figures.latency,
            findings.latency,
            "Each row holds every call: the wider, the more calls took that long; the bar is the "
            "p50, the diamond the p90, the triangle the p99, and the dots below are the medians "
            "of the rounds, each a new process.",
        ),
        stacks(
            "From a file to a label",
            "waterfall",
            breakdown.waterfall,
            findings.waterfall,
            _waterfall_how(model["contestants"]),
        ),
        lines(
            "Throughput in batches",
            "offline",
            figures.throughput,
            findings.throughput,
            "Higher is better; where a line is flat, a larger batch gains nothing.",
        ),
        lines(
            "Several clients at once",
            "multi_stream",
            figures.multi_stream,
            findings.multi_stream,
            "Each point is a number of clients, written beside it; right is more throughput, up "
            "is a longer wait.",
        ),
        lines(
            "Requests that arrive at random",
            "server",
            figures.server,
            findings.server,
            "Solid lines are the p99, dashed the p90, dotted the p50, each from a request's "
            "arrival, so that waiting in the queue counts.",
        ),
        stacks(
            "Cold start",
            "cold_start",
            breakdown.cold_start,
            findings.cold_start,
            "A whole process, from nothing to its first answer, with the files in the page cache; "
            "medians by part.",
        ),
        lines(
            "After a pause",
            "duty_cycle",
            breakdown.duty_cycle,
            findings.duty_cycle,
            f"From the steady median (ring) to the median of first answers after "
            f"{_pause(model['contestants'])} (dot); the ticks are single first answers.",
        ),
        lines(
            "Minutes on end",
            "sustained",
            figures.sustained,
            findings.sustained,
            "The median of each few seconds against its own first quarter: above 0 % it has "
            "become slower." + _throttled(model["contestants"]),
        ),
        choices(
            "Where the time goes, layer by layer",
            "layers",
            lambda c: (breakdown.layers(c, style[c["name"]]), findings.layers(c)),
            "As the runtime's profile gives them, in the order they run; hover or tap a bar "
            "for its precision and work." + _of_layers(model["contestants"]),
        ),
        choices(
            "What is mistaken for what",
            "confusion",
            lambda c: (
                breakdown.confusion(c["confusion"], _labels(model, c)),
                findings.confusion(c),
            ),
            "Rows are the truth, columns the answer; all off the diagonal is a mistake. The "
            "colour is logarithmic, so that single mistakes can be seen.",
        ),
    ]
    return _side_by_side([card for card in found if card.charts])


def _side_by_side(cards: Sequence[Card]) -> list[Card]:
    """Let a card that would stand alone in its half of the page have all of its width."""
    laid: list[Card] = []
    left = False  # is the left half of the last row taken, and the right one free?
    for i, card in enumerate(cards):
        alone = not left and (i + 1 == len(cards) or cards[i + 1].wide)
        laid.append(replace(card, wide=card.wide or alone))
        left = not left and not laid[-1].wide
    return laid


def _front_card(
    model: Row,
    style: Mapping[str, Look],
    chart: Callable[..., Chart],
    contestants: Callable[..., list[Key]],
) -> Card:
    kept = [c for c in model["contestants"] if at(c, "single_stream", "p50_ms")]
    known = [c for c in kept if table.top1(c, model["contestants"]) is not None]
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
    drawn = figures.front(points, style, pick, floor)
    finds = findings.front(best, len(points) - len(best), floor)
    return Card(title, [chart("front", drawn, contestants(kept), how, finds)])


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


def _of(made: tuple[Figure, str], how: str) -> tuple[Figure, list[Key], str, str]:
    return made[0], [], how, made[1]


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


def _pause(contestants: Sequence[Row]) -> str:
    idle = next((i for c in contestants if (i := at(c, "duty_cycle", "idle_s"))), None)
    return "an idle pause" if idle is None else f"{idle:g} s of idleness"
