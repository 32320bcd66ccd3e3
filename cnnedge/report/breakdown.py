"""Figures of the benchmark page that take a time, or the answers, apart: see also figures.py."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from cnnedge.report.style import (
    Figure,
    Look,
    Row,
    axis,
    faint,
    figure,
    flat,
    log_axis,
    ms,
    number,
    percent,
    plain,
    row_axis,
    title_of,
    told_apart,
    wrapped,
)

# Steps that follow each other, in fixed colours; what the network itself does stands out.
_STAGES = {"decode": "#4f6d9c", "resize": "#86a3cb", "compute": "#e69f00", "post": "#9c86b8"}
_STAGES |= {"copy in": "#77bfa7", "copy out": "#b3a08d"}
_PARTS = {"import": "#4f6d9c", "load": "#e69f00", "first": "#77bfa7", "other": "#9aa7b5"}
_SPARE = ("#b3a08d", "#5aa2a8", "#c7848f", "#9c86b8")
MOST_LAYERS = 40


def waterfall(contestants: Sequence[Row]) -> tuple[Figure, dict[str, str]]:
    """Draw from file to label, stage by stage; return also the colours of the stages."""
    stages: dict[str, dict[int, float]] = {}
    for row, c in enumerate(contestants):
        for stage in c["waterfall"]["stages"]:
            stages.setdefault(stage["name"], {})[row] = stage.get("p50_ms") or 0.0
    spare = iter(_SPARE * len(stages))
    colours = {name: _STAGES.get(name) or next(spare) for name in stages}
    apps = {
        row: app for row, c in enumerate(contestants) if (app := c["waterfall"].get("app_p50_ms"))
    }
    ends = []
    for row, c in enumerate(contestants):
        whole = c["waterfall"].get("whole_p50_ms") or sum(s.get(row, 0.0) for s in stages.values())
        app = f" (◆ {number(apps[row])})" if row in apps else ""
        ends.append((max(whole, apps.get(row, 0.0)), f"{number(whole)}{app}"))
    drawn = _stacked(contestants, stages, colours, ends)
    drawn.add_scatter(
        x=list(apps.values()),
        y=list(apps),
        mode="markers",
        marker={
            "symbol": "diamond",
            "size": 11,
            "color": "var(--ink)",
            "line": {"color": "var(--paper)", "width": 1.5},
        },
        hovertext=[f"through cnnedge.load: {ms(app)}" for app in apps.values()],
        hoverinfo="text",
    )
    return drawn, colours


def cold_start(contestants: Sequence[Row]) -> tuple[Figure, dict[str, str]]:
    """Draw from nothing to the first answer, by part; return also the colours of the parts."""
    parts: dict[str, dict[int, float]] = {part: {} for part in _PARTS}
    for row, c in enumerate(contestants):
        known = {part: c["cold_start"].get(f"{part}_ms") or 0.0 for part in _PARTS}
        known["other"] = max(c["cold_start"]["total_ms"] - sum(known.values()), 0.0)
        for part, took in known.items():
            parts[part][row] = took
    whole = sum(sum(rows.values()) for rows in parts.values())
    kept = {part: rows for part, rows in parts.items() if sum(rows.values()) > 0.005 * whole}
    colours = {part: _PARTS[part] for part in kept}
    ends = [(c["cold_start"]["total_ms"], number(c["cold_start"]["total_ms"])) for c in contestants]
    return _stacked(contestants, kept, colours, ends), colours


def duty_cycle(contestants: Sequence[Row], looks: Mapping[str, Look]) -> Figure:
    """Draw the first answer after a pause beside the steady one, a row for each contestant."""
    cycles = [c["duty_cycle"] for c in contestants]
    times = [t for d in cycles for t in [*flat(d.get("first_ms")), d["steady_p50_ms"]]]
    times += [d["first_p50_ms"] for d in cycles]
    drawn = figure(
        48 * len(contestants) + 60,
        xaxis=log_axis("latency, ms", times),
        yaxis=row_axis([wrapped(title_of(c)) for c in contestants]),
    )
    for row, (c, d) in enumerate(zip(contestants, cycles, strict=True)):
        colour, firsts = looks[c["name"]].colour, flat(d.get("first_ms"))
        drawn.add_scatter(
            x=firsts,
            y=[row] * len(firsts),
            mode="markers",
            marker={"symbol": "line-ns-open", "size": 12, "color": faint(colour, 0.6)},
            hoverinfo="skip",
        )
        ends = [(d["steady_p50_ms"], "steady"), (d["first_p50_ms"], "first after the pause")]
        drawn.add_scatter(
            x=[x for x, _ in ends],
            y=[row, row],
            mode="lines+markers",
            line={"color": colour, "width": 3},
            marker={
                "symbol": ["circle-open", "circle"],
                "size": 12,
                "line": {"width": 2.5, "color": colour},
            },
            hovertext=[f"{plain(title_of(c))}, {what}: {ms(x)}" for x, what in ends],
            hoverinfo="text",
        )
    return drawn


def layers(contestant: Row, look: Look) -> Figure:
    """Draw what each layer takes, in the order they run, with the least it could take here."""
    found = list(contestant["layers"])
    long = sorted(found, key=lambda x: -(x.get("ms") or 0.0))[:MOST_LAYERS]
    kept = [x for x in found if any(x is y for y in long)]
    names = told_apart([str(x.get("name")) for x in kept])
    drawn = figure(
        20 * len(kept) + 60,
        xaxis=axis("time, ms", rangemode="tozero"),
        yaxis=row_axis([plain(name, 22) for name in names]),
        bargap=0.25,
    )
    told = [
        f"<b>{plain(x.get('name'))}</b><br>{plain(x.get('kind') or '?')}, "
        f"{plain(x.get('precision') or 'unknown precision')}<br>{ms(x.get('ms'))}"
        + (f", {number(x['macs'] / 1e6)} M MACs" if x.get("macs") else "")
        + (f"<br>no faster than {ms(x['bound_ms'])}" if x.get("bound_ms") else "")
        + (f": {percent(x['fraction'])} of it reached" if x.get("fraction") else "")
        for x in kept
    ]
    places = list(range(len(kept)))
    drawn.add_bar(
        x=[x.get("ms") or 0.0 for x in kept],
        y=places,
        orientation="h",
        marker={"color": look.colour},
        hovertext=told,
        hoverinfo="text",
        textposition="none",
    )
    bounds = [(row, x["bound_ms"]) for row, x in enumerate(kept) if x.get("bound_ms")]
    drawn.add_scatter(
        x=[bound for _, bound in bounds],
        y=[row for row, _ in bounds],
        mode="markers",
        marker={
            "symbol": "line-ns-open",
            "size": 14,
            "color": "var(--ink)",
            "line": {"width": 2.5, "color": "var(--ink)"},
        },
        hoverinfo="skip",
    )
    return drawn


def confusion(counts: Sequence[Sequence[int]], labels: Sequence[str]) -> Figure:
    """Draw how often each class was answered for each; the colour is logarithmic."""
    names = [f"{plain(label, 16)}" for label in labels]
    names = [n if names.count(n) == 1 else f"{n} ({i})" for i, n in enumerate(names)]
    told = [
        [f"{a} answered for {t}: {n:,}" for a, n in zip(names, row, strict=True)]
        for t, row in zip(names, counts, strict=True)
    ]
    most = max((n for row in counts for n in row), default=1)
    ticks = [10**k for k in range(int(math.log10(max(most, 1))) + 1)]
    drawn = figure(
        min(150 + 30 * len(names), 620),
        xaxis=axis("answer", type="category", showgrid=False),
        yaxis=axis("truth", type="category", showgrid=False, autorange="reversed"),
    )
    drawn.add_heatmap(
        x=names,
        y=names,
        z=[[math.log10(n) if n else None for n in row] for row in counts],
        text=[[f"{n}" if n else "" for n in row] for row in counts],
        texttemplate="%{text}" if len(names) <= 12 else None,
        textfont={"size": 11},
        customdata=told,
        hovertemplate="%{customdata}<extra></extra>",
        hoverongaps=False,
        zmin=0,
        zmax=max(math.log10(max(most, 1)), 1),
        colorscale=[[0, "var(--low)"], [1, "var(--high)"]],
        xgap=1,
        ygap=1,
        colorbar={
            "thickness": 10,
            "tickvals": [math.log10(t) for t in ticks],
            "ticktext": [f"{t:,}" for t in ticks],
            "tickfont": {"size": 11},
            "outlinewidth": 0,
            "title": {"text": "images", "font": {"size": 11}},
        },
    )
    return drawn


def _stacked(
    contestants: Sequence[Row],
    parts: Mapping[str, Mapping[int, float]],
    colours: Mapping[str, str],
    ends: Sequence[tuple[float, str]],
) -> Figure:
    """Draw parts of a whole, one bar for each contestant, and the whole in words beside it.

    Args:
        contestants: From the top on.
        parts: Of each row, by name of the part.
        colours: By name of the part.
        ends: By row, where all that is drawn ends, and the words to put there.
    """
    # Room for the words, which take more of a phone's plot than of a desk's.
    far = max(end for end, _ in ends) * (1.15 + 0.035 * max(len(words) for _, words in ends))
    drawn = figure(
        44 * len(contestants) + 60,
        xaxis=axis("time, ms", range=[0, far], nticks=6),
        yaxis=row_axis([wrapped(title_of(c)) for c in contestants]),
        barmode="stack",
        bargap=0.35,
    )
    for name, rows in parts.items():
        drawn.add_bar(
            x=list(rows.values()),
            y=list(rows),
            orientation="h",
            legendgroup=name,
            marker={"color": colours[name]},
            hovertext=[
                f"{plain(title_of(contestants[row]))}, {plain(name)}: {ms(took)}"
                for row, took in rows.items()
            ],
            hoverinfo="text",
            textposition="none",
        )
    drawn.add_scatter(
        x=[end for end, _ in ends],
        y=list(range(len(ends))),
        mode="text",
        cliponaxis=False,
        text=[f"   {words}" for _, words in ends],
        textposition="middle right",
        textfont={"size": 11},
        hoverinfo="skip",
    )
    return drawn
