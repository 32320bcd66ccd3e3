"""The figures of the benchmark page: contestants as the result file holds them in, a figure out.

Each takes only contestants that have what it draws; the page sees to that.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from cnnedge.report.style import (
    Figure,
    Look,
    Row,
    at,
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
    wrapped,
)

Looks = Mapping[str, Look]


def front(points: Sequence[Row], looks: Looks, pick: str | None, floor: float | None) -> Figure:
    """Draw top-1, or where it is unknown the size, against latency, and the front of the best.

    Args:
        points: `name`, `title`, `p50`, `bytes`, `top1` in percent or None, `low` and `high`: the
            ends of its interval, or None.
        looks: By contestant.
        pick: Which to put a ring around.
        floor: The least top-1 within the budget, in percent, or None.
    """
    accurate = all(p["top1"] is not None for p in points)
    key = "top1" if accurate else "megabytes"
    points = [{**p, "megabytes": (p["bytes"] or 0) / 1e6} for p in points]
    largest = max(p["megabytes"] for p in points) or 1.0
    x_axis = log_axis("median latency of one image, ms", [p["p50"] for p in points], 0.12)
    if accurate:
        y_axis = axis("top-1, %", nticks=7)
    else:
        y_axis = log_axis("size of the model file, MB", [p["megabytes"] for p in points], 0.12)
    drawn = figure(430, xaxis=x_axis, yaxis=y_axis)
    best = front_of(points, key)
    # The line goes on as steps: between two of the front nothing better was measured.
    drawn.add_scatter(
        x=[p["p50"] for p in best],
        y=[p[key] for p in best],
        line={"shape": "hv" if accurate else "vh", "color": "var(--soft)", "width": 1.5},
        mode="lines",
        hoverinfo="skip",
    )
    if accurate and floor is not None:
        drawn.add_hline(
            y=floor,
            line={"color": "var(--bad)", "width": 1.5, "dash": "dash"},
            annotation={"text": "accuracy budget", "font": {"size": 11, "color": "var(--bad)"}},
            annotation_position="bottom right",
        )
    for p in sorted(points, key=lambda p: p["name"] == pick):  # the pick on top
        look, picked = looks[p["name"]], p["name"] == pick
        width = 12 + 28 * math.sqrt(p["megabytes"] / largest) if accurate else 14
        text = f"<b>{plain(p['title'])}</b><br>{ms(p['p50'])}, {number(p['megabytes'])} MB"
        if accurate:
            text += f"<br>top-1 {p['top1']:.2f} %"
        if accurate and p["low"] is not None:
            up, down = p["high"] - p["top1"], p["top1"] - p["low"]
            text += f", paired 95 % interval {p['low']:.2f} to {p['high']:.2f}"
        else:
            up = down = 0.0
        drawn.add_scatter(
            x=[p["p50"]],
            y=[p[key]],
            legendgroup=p["name"],
            mode="markers",
            cliponaxis=False,
            marker={
                "size": width,
                "color": faint(look.colour, 0.75),
                "symbol": look.symbol,
                "line": {
                    "width": 3 if picked else 1,
                    "color": "var(--ink)" if picked else look.colour,
                },
            },
            error_y={
                "array": [max(up, 0.0)],
                "arrayminus": [max(down, 0.0)],
                "visible": up + down > 0,
                "color": look.colour,
                "thickness": 1.5,
                "width": 4,
            },
            hovertext=text,
            hoverinfo="text",
        )
        if picked:
            drawn.add_annotation(
                x=math.log10(p["p50"]),
                y=p[key] if accurate else math.log10(max(p[key], 1e-9)),
                text="<b>pick</b>",
                showarrow=False,
                xshift=width / 2 + 14,
                yshift=-width / 2 - 6,
            )
    return drawn


def latency(contestants: Sequence[Row], looks: Looks) -> Figure:
    """Draw how the latencies are distributed, a row for each contestant."""
    samples = [flat(at(c, "single_stream", "samples_ms")) for c in contestants]
    drawn = figure(
        64 * len(contestants) + 60,
        xaxis=log_axis("latency of one image, ms", [x for xs in samples for x in xs]),
        yaxis=row_axis([wrapped(title_of(c)) for c in contestants]),
    )
    for row, (c, xs) in enumerate(zip(contestants, samples, strict=True)):
        look, single = looks[c["name"]], c["single_stream"]
        grid, height = _density(xs)
        drawn.add_scatter(
            x=[*grid, *reversed(grid)],
            y=[*(row - h for h in height), *(row + h for h in reversed(height))],
            fill="toself",
            fillcolor=faint(look.colour),
            mode="lines",
            line={"color": look.colour, "width": 1},
            hoverinfo="skip",
        )
        rounds = [m for part in single["samples_ms"] if (m := flat(part))]
        marks = [(single.get(f"p{p}_ms"), f"p{p}", s) for p, s in _PERCENTILES.items()]
        medians = [(float(np.median(part)), "median of one round", "circle") for part in rounds]
        for found, above in ((marks, 0.0), (medians, 0.42)):
            found = [mark for mark in found if mark[0] is not None]
            drawn.add_scatter(
                x=[x for x, _, _ in found],
                y=[row + above] * len(found),
                mode="markers",
                marker={
                    "symbol": [symbol for _, _, symbol in found],
                    "size": [20 if s == "line-ns-open" else 8 - 9 * above for _, _, s in found],
                    "color": look.colour if above else "var(--ink)",
                    "opacity": 1,
                    "line": {"width": 0 if above else 2, "color": "var(--ink)"},
                },
                hovertext=[f"{plain(title_of(c))}: {what} {ms(x)}" for x, what, _ in found],
                hoverinfo="text",
            )
    return drawn


_PERCENTILES = {50: "line-ns-open", 90: "diamond", 99: "triangle-up"}


def throughput(contestants: Sequence[Row], looks: Looks) -> Figure:
    """Draw images per second against the batch size."""
    runs = [(c, run) for c in contestants for run in c["offline"]]
    batches = sorted({run["batch"] for _, run in runs})
    drawn = figure(
        360,
        xaxis=log_axis("images in a batch", batches)
        | {"tickvals": batches, "ticktext": [str(b) for b in batches]},
        yaxis=log_axis("images per second", [r["images_per_second"] for _, r in runs]),
    )
    for c in contestants:
        told = [
            f"batch {r['batch']}: {number(r['images_per_second'])} images/s"
            f"<br>a call takes {ms(r.get('p50_ms'))}"
            for r in c["offline"]
        ]
        xs = [r["batch"] for r in c["offline"]]
        _line(drawn, c, looks, xs, [r["images_per_second"] for r in c["offline"]], told)
    return drawn


def multi_stream(contestants: Sequence[Row], looks: Looks) -> Figure:
    """Draw latency against throughput; along a line the number of clients grows."""
    runs = [run for c in contestants for run in c["multi_stream"]]
    drawn = figure(
        360,
        xaxis=log_axis("images per second, all clients", [r["images_per_second"] for r in runs]),
        yaxis=log_axis("median latency, ms", [r["p50_ms"] for r in runs]),
    )
    for c in contestants:
        points = sorted(c["multi_stream"], key=lambda r: r["clients"])
        told = [
            f"{r['clients']} client{'s' * (r['clients'] != 1)}: "
            f"{number(r['images_per_second'])} images/s<br>{_percentiles(r)}"
            for r in points
        ]
        xs = [r["images_per_second"] for r in points]
        _line(drawn, c, looks, xs, [r["p50_ms"] for r in points], told)
        drawn.data[-1].update(
            mode="lines+markers+text",
            text=[f" {r['clients']}" for r in points],
            textposition="bottom right",
            textfont={"size": 11, "color": "var(--soft)"},
        )
    return drawn


def server(contestants: Sequence[Row], looks: Looks) -> Figure:
    """Draw what a request waits, queueing included, against the load."""
    runs = [run for c in contestants for run in c["server"]]
    loads = sorted({100 * run["load"] for run in runs})
    times = [r[f"p{p}_ms"] for r in runs for p in (50, 90, 99) if r.get(f"p{p}_ms")]
    drawn = figure(
        360,
        xaxis=axis("load, % of what one client gets through", tickvals=loads),
        yaxis=log_axis("latency from arrival, ms", times),
    )
    for c in contestants:
        points = sorted(c["server"], key=lambda r: r["load"])
        for p, dash, width in ((99, "solid", 2.2), (90, "dash", 1.4), (50, "dot", 1.4)):
            kept = [r for r in points if r.get(f"p{p}_ms")]
            told = [
                f"{percent(r['load'])} load, {number(r.get('offered_per_second'))} images/s asked"
                f"<br>{_percentiles(r)}"
                for r in kept
            ]
            ys = [r[f"p{p}_ms"] for r in kept]
            _line(drawn, c, looks, [100 * r["load"] for r in kept], ys, told)
            drawn.data[-1].update(line={"dash": dash, "width": width}, marker={"size": 6})
            if p != 99:
                drawn.data[-1].update(mode="lines")
    return drawn


def sustained(contestants: Sequence[Row], looks: Looks) -> Figure:
    """Draw each contestant's median against time, as a change from its own start; clocks below."""
    clocks = any(w.get("clock_mhz") for c in contestants for w in c["sustained"]["windows"])
    drawn = figure(
        470 if clocks else 340,
        xaxis=axis("minutes on end", anchor="y2" if clocks else "y"),
        yaxis=axis("median, % from its start", domain=[0.4 if clocks else 0, 1], ticksuffix=" %"),
    )
    if clocks:
        drawn.update_layout(yaxis2=axis("clock, MHz", domain=[0, 0.3], nticks=4))
    for c in contestants:
        windows = [
            w for w in c["sustained"]["windows"] if w.get("p50_ms") and at(w, "at_s") is not None
        ]
        first = [w["p50_ms"] for w in windows[: max(len(windows) // 4, 1)]]
        start = float(np.median(first)) if first else 1.0
        xs = [w["at_s"] / 60 for w in windows]
        told = [
            f"{number(w['at_s'])} s: {ms(w['p50_ms'])}"
            + (f"<br>{w['clock_mhz']:,.0f} MHz" if w.get("clock_mhz") else "")
            + (f"<br>{w['temperature_c']:.0f} °C" if w.get("temperature_c") else "")
            + (f"<br>throttled {w['throttled']} times" if w.get("throttled") else "")
            for w in windows
        ]
        _line(drawn, c, looks, xs, [100 * (w["p50_ms"] / start - 1) for w in windows], told)
        drawn.data[-1].marker.size = [11 if w.get("throttled") else 5 for w in windows]
        if clocks:
            _line(drawn, c, looks, xs, [w.get("clock_mhz") for w in windows], told)
            drawn.data[-1].update(yaxis="y2", marker={"size": 5})
    return drawn


def front_of(points: Sequence[Row], key: str) -> list[Row]:
    """Return, from the fastest on, those that nothing faster beats: more top-1, or fewer MB."""
    sign = 1 if key == "top1" else -1
    best: list[Row] = []
    for p in sorted(points, key=lambda p: (p["p50"], -sign * p[key])):
        if not best or sign * p[key] > sign * best[-1][key]:
            best.append(p)
    return best


def _density(samples: Sequence[float]) -> tuple[list[float], list[float]]:
    """Return points and the samples' density there, the peak at 0.36, on a logarithmic scale."""
    logs = np.log(np.maximum(samples, 1e-9))
    quarter = np.subtract(*np.percentile(logs, [75, 25])) / 1.34
    spread = min(float(logs.std()), float(quarter) or math.inf)  # Silverman's rule
    width = max(0.9 * spread * len(logs) ** -0.2, 0.004)
    grid = np.linspace(logs.min(), logs.max(), 160)
    height = np.exp(-0.5 * ((grid[:, None] - logs[None, :]) / width) ** 2).sum(axis=1)
    return np.exp(grid).round(6).tolist(), (0.36 * height / height.max()).round(4).tolist()


def _line(
    drawn: Figure,
    contestant: Row,
    looks: Looks,
    xs: Sequence[float],
    ys: Sequence[float],
    told: Sequence[str],
) -> None:
    look = looks[contestant["name"]]
    drawn.add_scatter(
        x=list(xs),
        y=list(ys),
        legendgroup=contestant["name"],
        mode="lines+markers",
        line={"color": look.colour, "dash": look.dash, "width": 2},
        marker={"symbol": look.symbol, "size": 8},
        hovertext=[f"<b>{plain(title_of(contestant))}</b><br>{text}" for text in told],
        hoverinfo="text",
    )


def _percentiles(run: Any) -> str:
    found = [(p, run.get(f"p{p}_ms")) for p in (50, 90, 99)]
    return ", ".join(f"p{p} {ms(x)}" for p, x in found if x is not None)
