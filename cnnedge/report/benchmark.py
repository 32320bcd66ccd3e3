"""A benchmark's result document → rows for a table, CSV and Markdown."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from typing import Any

from cnnedge.benchmark.load import banner

HEADERS = (
    *("contestant", "size", "top-1", "drop [95 %]", "p50", "p90", "p99", "speed [95 %]"),
    *("of roof", "cold start", "memory"),
)
# One row for each figure, which a spreadsheet can filter and pivot.
CSV_HEADERS = ("model", "contestant", "runtime", "precision", "scenario", "at", "figure", "value")


def main_rows(model: Mapping[str, Any]) -> list[tuple[Any, ...]]:
    """Return the main table of a model, a row for each contestant, in the columns of `HEADERS`."""
    doubted = bool(model.get("doubt"))
    return [_main_row(row, doubted) for row in model["contestants"]]


def _main_row(row: Mapping[str, Any], doubted: bool) -> tuple[Any, ...]:
    single, accuracy = row["single_stream"] or {}, row["accuracy"] or {}
    against = single.get("against")
    speed = None
    if against:
        low, high = against["interval"]
        factor = "" if doubted else f"{against['ratio']:.2f}× "
        speed = f"{factor}[{low:.2f}, {high:.2f}]"
    drop = None
    if accuracy:
        low, high = accuracy["drop_interval_points"]
        drop = f"{accuracy['drop_points']:+.2f} [{low:+.2f}, {high:+.2f}]"
    fraction = (row.get("roofline") or {}).get("fraction")
    cold, memory = row.get("cold_start"), row.get("memory")
    return (
        row["title"] + ("" if single.get("stable", True) else " *"),
        f"{row['bytes'] / 1e6:.2f} MB" if row["bytes"] else None,
        f"{100 * accuracy['top1']:.2f} %" if accuracy else None,
        drop,
        *(_ms(single.get(name)) for name in ("p50_ms", "p90_ms", "p99_ms")),
        speed,
        None if fraction is None else f"{fraction:.0%}",
        None if cold is None else f"{cold['total_ms'] / 1e3:.2f} s",
        None if memory is None else f"{memory['peak_mib']:.0f} MiB",
    )


def remarks(document: Mapping[str, Any], model: Mapping[str, Any]) -> list[str]:
    """Return the lines under a model's table: what is doubtful, left out, and the pick."""
    lines = []
    if model.get("guessing"):
        lines.append(f"warning: the model itself is no better than guessing: {model['guessing']}")
    for row in model["contestants"]:
        single = row["single_stream"]
        if single is not None and not single["stable"]:
            lines.append(f"* {row['title']} is unstable: {'; '.join(single['notes'])}")
        if row.get("error"):
            lines.append(f"{row['name']}: failed: {row['error']}")
        lines += [f"{row['name']}: no {what}: {why}" for what, why in row["notes"].items()]
    lines += [f"left out: {left['name']}: {left['why']}" for left in model["left_out"]]
    data = model["data"]
    if data is not None:
        lines.append(
            f"accuracy on {data['images']} images of {data['source']}: {data['reference']}"
        )
    lines.append(where(document))
    found = model["pick"]
    by = ", by arithmetic alone" if found.get("by") == "arithmetic" else ""
    lines.append(f"pick{by}: {found['title'] or 'none'}: {found['why']}")
    if found["how"]:
        lines.append(f"      {found['how']}")
    lines += [f"not {other['title']}: {other['why']}" for other in found["runners_up"]]
    return lines


def where(document: Mapping[str, Any]) -> str:
    """Return the machine and what is timed, in a line."""
    found = document["environment"]
    machine, gpu = found["machine"], found.get("gpu")
    line = f"{machine['cpu']}, {found['threads']} threads"
    line += f"; {gpu['name']}" if gpu else ""
    peaks = document.get("peaks") or {}
    rates = [
        f"{kind.upper()} {peaks[kind]['giga_per_second']:.0f} {unit}"
        for kind, unit in (("fp32", "GFLOP/s"), ("int8", "GOP/s"))
        if peaks.get(kind)
    ]
    if rates:
        bandwidth = peaks["bandwidth"]["gigabytes_per_second"]
        line += f"; it reaches {', '.join(rates)}, {bandwidth:.0f} GB/s"
    return f"{line}; batch {found.get('batch', 1)}; timed: {found['timed']}"


def as_markdown(document: Mapping[str, Any]) -> str:
    """Return the main tables as Markdown."""
    parts = [f"> **{banner(document['doubt'])}**\n"] if document.get("doubt") else []
    for model in document["models"]:
        lines = [
            f"**{model['name']}**, {model['layout']}, {model['weights']} weights:",
            "",
            "| " + " | ".join(HEADERS) + " |",
            "|---" * len(HEADERS) + "|",
        ]
        chosen = None if model.get("doubt") else model["pick"]["name"]
        for source, row in zip(model["contestants"], main_rows(model), strict=True):
            cells = [markdown_cell(cell) for cell in row]
            if source["name"] == chosen:
                cells[0] = f"**{cells[0]}**"
            lines.append("| " + " | ".join(cells) + " |")
        lines += ["", *(f"- {line.strip()}" for line in remarks(document, model))]
        parts.append("\n".join(lines) + "\n")
    return "\n".join(parts)


def markdown_cell(value: Any) -> str:
    """Return a table's cell, with what Markdown would take for its own escaped."""
    if value is None:
        return "–"
    return str(value).replace("|", "\\|").replace("*", "\\*")


def as_csv(document: Mapping[str, Any]) -> str:
    """Return every figure as CSV, a row each, raw samples aside."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(CSV_HEADERS)
    for model in document["models"]:
        if model.get("doubt"):
            writer.writerow((model["name"], "", "", "", "conditions", "", "doubt", model["doubt"]))
        for row in model["contestants"]:
            who = (model["name"], row["name"], row["runtime"], row["precision"])
            for scenario, at, figure, value in _figures(row):
                writer.writerow((*who, scenario, at, figure, value))
    return buffer.getvalue()


_AT = {
    "offline": "batch",
    "multi_stream": "clients",
    "server": "load",
    "layers": "name",
}


def _figures(row: Mapping[str, Any]) -> list[tuple[str, Any, str, Any]]:
    found: list[tuple[str, Any, str, Any]] = [("file", "", "bytes", row["bytes"])]
    for scenario in ("accuracy", "single_stream", "cold_start", "memory", "duty_cycle", "roofline"):
        found += _scalars(scenario, "", row.get(scenario) or {})
    against = (row["single_stream"] or {}).get("against")
    if against:
        found.append(("single_stream", against["name"], "ratio", against["ratio"]))
    for scenario, at in _AT.items():
        for point in row.get(scenario) or ():
            rest = {name: value for name, value in point.items() if name != at}
            found += _scalars(scenario, point[at], rest)
    for stage in (row.get("waterfall") or {}).get("stages", ()):
        found.append(("waterfall", stage["name"], "p50_ms", stage["p50_ms"]))
    found += _scalars("waterfall", "", row.get("waterfall") or {})
    sustained = row.get("sustained") or {}
    found += _scalars("sustained", "", sustained)
    for window in sustained.get("windows", ()):
        rest = {name: value for name, value in window.items() if name != "at_s"}
        found += _scalars("sustained", window["at_s"], rest)
    return found


def _scalars(scenario: str, at: Any, values: Mapping[str, Any]) -> list[tuple[str, Any, str, Any]]:
    return [
        (scenario, at, name, value)
        for name, value in values.items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    ]


def _ms(value: float | None) -> str | None:
    return None if value is None else f"{value:.3f} ms" if value < 1 else f"{value:.2f} ms"


CHANGE_HEADERS = ("model", "contestant", "figure", "before", "after", "ratio [95 %]", "")


def change_rows(changes: Mapping[str, Any]) -> list[tuple[Any, ...]]:
    """Return `Changes` as data as a table's rows, in the columns of `CHANGE_HEADERS`."""
    rows = []
    for change in changes["changes"]:
        ratio = None if change["ratio"] is None else f"{change['ratio']:.3f}×"
        if change["interval"]:
            low, high = change["interval"]
            ratio = f"{ratio} [{low:.3f}, {high:.3f}]"
        verdict = change["verdict"] + (f": {change['why']}" if change["why"] else "")
        figures = [_figure(change[name], change["unit"]) for name in ("before", "after")]
        rows.append(
            (change["model"], change["contestant"], change["figure"], *figures, ratio, verdict)
        )
    return rows


def _figure(value: float | None, unit: str) -> str | None:
    if value is None:
        return None
    return f"{value:.4g} {unit}".rstrip() if unit else f"{100 * value:.2f} %"
