"""The tables of docs/resize.md, from the results that are recorded."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
DOCS, RESULTS = ROOT / "docs" / "resize.md", ROOT / "benchmarks" / "results"
BEGIN, END = "<!-- resize: begin, by benchmarks/resize -->", "<!-- resize: end -->"


def documents() -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the name and the document of each recorded run."""
    for path in sorted(RESULTS.glob("resize-*.json")):
        yield path.name, json.loads(path.read_text(encoding="utf-8"))


def generated() -> str:
    """Return what stands between the markers."""
    return "\n".join(
        f"{section(document)}\n\n[`{name}`](../benchmarks/results/{name})\n"
        for name, document in documents()
    )


def section(document: Mapping[str, Any]) -> str:
    """Return the tables of one run, as Markdown: of answers, or of times."""
    machine, tools = document["machine"], document["tools"]
    versions = ", ".join(
        f"{name} {tools[package]}"
        for name, package in (
            ("Pillow", "pillow"),
            ("ONNX Runtime", "onnxruntime"),
            ("OpenCV", "opencv-python-headless"),
            ("TensorFlow", "tensorflow"),
        )
        if package in tools and not ("time" in document and package == "tensorflow")
    )
    about = f"{machine['cpu']}, {machine['cores']} cores; {versions}; {document['created'][:10]}."
    if "time" in document:
        title = f"What it costs, median ({document['timed']}). {about}"
        return "\n".join([title, "", *_times(document["time"])])
    apps = document["apps"]
    return "\n".join(
        [
            f"{apps['n']} pictures ({apps['pictures']}), a network at {apps['network']}. {about}",
            "",
            *_apps(apps["rows"]),
            "",
            "How near a graph comes to Pillow on photographs:",
            "",
            *_closeness(document["closeness"]),
        ]
    )


def write() -> None:
    """Write the tables into docs/resize.md."""
    before, _, rest = DOCS.read_text(encoding="utf-8").partition(BEGIN)
    after = rest.partition(END)[2]
    DOCS.write_text(f"{before}{BEGIN}\n{generated()}\n{END}{after}", encoding="utf-8")


def check() -> bool:
    """Tell whether docs/resize.md holds the tables that the results make."""
    found = DOCS.read_text(encoding="utf-8").partition(BEGIN)[2].partition(END)[0]
    return found == f"\n{generated()}\n"


def _apps(rows: list[dict[str, Any]]) -> list[str]:
    return [
        "| resized by | pixels: mean (largest) difference | FP32: answers changed [95 %] "
        "| drop, points [95 %] | INT8: answers changed [95 %] | drop, points [95 %] |",
        "|---|---|---|---|---|---|",
        f"| {rows[0]['name']} | – | – | – | – | – |",
        *(
            f"| {row['name']} | {row['pixels']['mean']:.2f} ({row['pixels']['max']}) "
            f"| {_flips(row['fp32'])} | {_drop(row['fp32'])} "
            f"| {_flips(row['int8'])} | {_drop(row['int8'])} |"
            for row in rows[1:]
        ),
        "",
        "The reference's own top-1: "
        f"FP32 {100 * rows[0]['fp32']['top1']:.2f} %, INT8 {100 * rows[0]['int8']['top1']:.2f} %.",
    ]


def _flips(found: Mapping[str, Any]) -> str:
    low, high = found["flips_interval_percent"]
    return f"{found['flips_percent']:.2f} % [{low:.2f}, {high:.2f}]"


def _drop(found: Mapping[str, Any]) -> str:
    low, high = found["drop_interval_points"]
    return f"{found['drop_points']:+.2f} [{low:+.2f}, {high:+.2f}]"


def _closeness(rows: list[dict[str, Any]]) -> list[str]:
    lines = ["| graph | mean difference | largest | pixels that differ |", "|---|---|---|---|"]
    for row in rows:
        pixels = row["pixels"]
        lines.append(
            f"| {row['name']} | {pixels['mean']:.5f} | {pixels['max']} "
            f"| {pixels['changed_percent']:.3f} % |"
        )
    return lines


def _times(rows: list[dict[str, Any]]) -> list[str]:
    sources = list(dict.fromkeys(tuple(row["source"]) for row in rows))
    target = rows[0]["target"]
    heads = [f"{w}×{h} → {target}×{target} | speed, Pillow's is 1 [95 %]" for w, h in sources]
    lines = [f"| | {' | '.join(heads)} |", "|---" * (1 + 2 * len(sources)) + "|"]
    for name in dict.fromkeys(row["name"] for row in rows):
        cells = []
        for source in sources:
            row = next(r for r in rows if r["name"] == name and tuple(r["source"]) == source)
            speed = row["speed_of_pillow"]
            low, high = speed["interval"]
            against = f"{speed['ratio']:.2f} [{low:.2f}, {high:.2f}]"
            if name == rows[0]["name"]:
                against = "1"
            cells += [f"{row['median_ms']:.2f} ms", against]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines
