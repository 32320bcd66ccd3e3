"""The front of accuracy, latency and size, as data and as a picture."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from cnnedge.files import atomic_path, write_text
from cnnedge.quiet import import_matplotlib

COLORS = {"int8": "#0b6bcb", "fp32": "#7a869a"}
LARGEST = 900  # of a point, in square points of print


@dataclass(frozen=True)
class Point:
    """A network in one form.

    Attributes:
        network: "reference", or how much of its work is left: "macs 0.25".
        form: "fp32" or "int8".
        latency_ms: Median at batch 1, milliseconds.
        bytes: Of the ONNX file.
        top1: Share of the test images answered right, 0…1.
        drop_points: Top-1 points lost against the Keras reference.
        drop_interval_points: Its paired 95 % interval.
    """

    network: str
    form: str
    latency_ms: float
    bytes: int
    top1: float
    drop_points: float
    drop_interval_points: tuple[float, float]


def dominated(point: Point, points: Sequence[Point]) -> bool:
    """Tell whether another point is as good in accuracy, latency and size, and better in one."""

    def figures(p: Point) -> tuple[float, float, float]:
        return -p.top1, p.latency_ms, p.bytes

    own = figures(point)
    return any(
        other is not point
        and all(theirs <= ours for theirs, ours in zip(figures(other), own, strict=True))
        and figures(other) != own
        for other in points
    )


def write_front(json_path: Path, csv_path: Path, points: Sequence[Point]) -> None:
    """Write the points, and of each whether it is on the front, as JSON and as CSV."""
    rows = [asdict(point) | {"on_front": not dominated(point, points)} for point in points]
    write_text(json_path, json.dumps(rows, indent=1) + "\n")
    text = io.StringIO()
    flat = [
        {
            **{key: value for key, value in row.items() if key != "drop_interval_points"},
            "drop_low": row["drop_interval_points"][0],
            "drop_high": row["drop_interval_points"][1],
        }
        for row in rows
    ]
    writer = csv.DictWriter(text, list(flat[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(flat)
    write_text(csv_path, text.getvalue())


def draw_front(path: Path, title: str, points: Sequence[Point], max_drop: float) -> None:
    """Draw top-1 over latency, the size of the file as the size of the point, as a PNG."""
    import_matplotlib()
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter

    figure = Figure(figsize=(9, 5), layout="constrained")
    axes = figure.subplots()
    biggest = max(point.bytes for point in points)
    best = next((p for p in points if p.network == "reference" and p.form == "fp32"), points[0])
    limit = 100 * best.top1 + best.drop_points - max_drop
    axes.axhline(limit, color="#d9480f", linewidth=1, linestyle="--", zorder=1)
    axes.annotate(
        f"gate: {max_drop:g} points below the reference",
        (0, limit),
        xycoords=("axes fraction", "data"),
        xytext=(6, 4),
        textcoords="offset points",
        ha="left",
        color="#d9480f",
        fontsize=8,
    )
    for form, color in COLORS.items():
        own = sorted((p for p in points if p.form == form), key=lambda p: p.latency_ms)
        if not own:
            continue
        x, y = [p.latency_ms for p in own], [100 * p.top1 for p in own]
        # The interval is of the difference to the reference: drawn about the point itself.
        below = [p.drop_interval_points[1] - p.drop_points for p in own]
        above = [p.drop_points - p.drop_interval_points[0] for p in own]
        axes.errorbar(
            x, y, yerr=[below, above], color=color, linewidth=1, alpha=0.45, capsize=2, zorder=2
        )
        sizes = [max(LARGEST * p.bytes / biggest, 12) for p in own]
        axes.scatter(x, y, s=sizes, color=color, alpha=0.75, zorder=3)
        axes.scatter([], [], s=60, color=color, alpha=0.75, label=form.upper())  # the legend's
        for p in own:
            axes.annotate(
                f"{p.network.removeprefix('macs ')}\n{p.bytes / 1e6:.2f} MB",
                (p.latency_ms, 100 * p.top1),
                xytext=(0, -30 if form == "int8" else 18),
                textcoords="offset points",
                ha="center",
                fontsize=7,
                color="#333333",
            )
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    axes.xaxis.set_minor_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    axes.tick_params(axis="x", which="minor", labelsize=7)
    axes.set(title=title, xlabel="latency at batch 1, ms (log)", ylabel="top-1, %")
    axes.margins(0.12, 0.2)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside right upper", title="area: size", frameon=False)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=130)
