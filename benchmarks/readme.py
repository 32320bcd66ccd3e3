"""Write the part of benchmarks/README.md, and its plots, that recorded results say.

    python benchmarks/readme.py            # writes them anew
    python benchmarks/readme.py --check    # exit code 1 where they are not what results/ say

The results are those of the suites `edge-cpu.toml` and `sustained-cpu.toml`, one file for each
machine: ``results/edge-cpu-MACHINE.json``, ``results/sustained-cpu-MACHINE.json``.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from cnnedge.benchmark.document import read_result
from cnnedge.benchmark.load import banner
from cnnedge.report.benchmark import HEADERS, main_rows, markdown_cell, where

HERE = Path(__file__).parent
README, RESULTS, PLOTS = HERE / "README.md", HERE / "results", HERE / "plots"
BEGIN, END = "<!-- edge-cpu: begin, by readme.py -->", "<!-- edge-cpu: end -->"
COLOURS = {
    "keras": "#8a93a3",
    "cpu": "#3b82c4",
    "openvino": "#d08f00",
    "litert": "#1d9a6c",
}
MARKERS = {"fp32": "o", "fp16": "s", "bf16": "^", "int8": "D"}


def results(suite: str = "edge-cpu") -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the name and the document of each recorded run of a suite."""
    for path in sorted(RESULTS.glob(f"{suite}-*.json")):
        yield path.stem, read_result(path)


def section() -> str:
    """Return the generated part of the README, its markers aside."""
    parts = []
    for name, document in results():
        parts.append(
            f"{where(document)}; {document['created'][:10]} "
            f"([`{name}.json`](results/{name}.json)).\n"
        )
        parts += [f"**{banner(document['doubt'])}**\n"] if document["doubt"] else []
        parts += [_model(name, model) for model in document["models"]]
    for name, document in results("sustained-cpu"):
        parts += [_sustained(name, document, model) for model in document["models"]]
    return "\n".join(parts)


def _sustained(name: str, document: Mapping[str, Any], model: Mapping[str, Any]) -> str:
    """Return the table of a model's minutes on end."""
    machine = document["environment"]["machine"]["cpu"]
    lines = [
        f"Minutes on end, **{model['name']}** on {machine} ([`{name}.json`](results/{name}.json)): "
        "the drift of the median from the first quarter to the last.",
        "",
        "|  | seconds | median, first and last window | drift [95 %] |",
        "|---|---|---|---|",
    ]
    for row in model["contestants"]:
        found = row["sustained"]
        first, last = (found["windows"][i]["p50_ms"] for i in (0, -1))
        low, high = found["interval"]
        lines.append(
            f"| {row['title']} | {found['seconds']:.0f} | {first:.2f} ms, {last:.2f} ms | "
            f"{found['drift_percent']:+.1f} % [{low:+.1f}, {high:+.1f}] |"
        )
    return "\n".join(lines) + "\n"


def _model(name: str, model: Mapping[str, Any]) -> str:
    data, judged = model["data"], model["weights"] != "random"
    height, width = model["image"]["height"], model["image"]["width"]
    about = f"**{model['name']}**, {height}×{width}, {model['weights']} weights"
    if data:
        about += f", {data['images']} test images of `{data['source']}`"
    elif not judged:
        about += ": their speed is that of trained ones, their accuracy means nothing"
    columns = [i for i, header in enumerate(HEADERS) if judged or header not in _OF_ACCURACY]
    lines = [
        about,
        "",
        "| " + " | ".join(HEADERS[i] if i else "" for i in columns) + " |",
        "|---" * len(columns) + "|",
    ]
    for source, row in zip(model["contestants"], main_rows(model), strict=True):
        cells = [markdown_cell(row[i]) for i in columns]
        if source["name"] == model["pick"]["name"] and not model["doubt"]:
            cells[0] = f"**{cells[0]}**"
        lines.append("| " + " | ".join(cells) + " |")
    by = ", by arithmetic alone" if model["doubt"] else ""
    lines += ["", f"Pick{by}: **{model['pick']['title']}**, {model['pick']['why']}."]
    lines += [
        "",
        f"![{model['name']}: latency by runtime]({PLOTS.name}/{name}-{model['name']}.svg)",
    ]
    return "\n".join(lines) + "\n"


_OF_ACCURACY = {"top-1", "drop [95 %]"}


def draw(name: str, model: Mapping[str, Any]) -> Path:
    """Draw a model's latencies, and throughput against batch where it was measured."""
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    plt.rcParams.update(
        {"svg.hashsalt": "cnnedge", "font.size": 9, "svg.fonttype": "none", "font.family": "sans"}
    )
    rows = [row for row in model["contestants"] if row["single_stream"]]
    batched = [row for row in rows if len(row["offline"]) > 1]
    figure, axes = plt.subplots(
        1, 2 if batched else 1, figsize=(9 if batched else 6, 3.2), layout="constrained"
    )
    left = axes[0] if batched else axes
    for place, row in enumerate(reversed(rows)):
        single = row["single_stream"]
        samples = [s for blocks in single["samples_ms"] for block in blocks for s in block]
        left.boxplot(
            [samples],
            positions=[place],
            orientation="horizontal",
            whis=(5, 95),
            showfliers=False,
            widths=0.6,
            patch_artist=True,
            boxprops={"facecolor": COLOURS.get(row["runtime"], "#999"), "alpha": 0.75},
            medianprops={"color": "black"},
        )
    left.set_yticks(range(len(rows)), [row["title"] for row in reversed(rows)])
    left.set_xscale("log")
    _plain_ticks(left.xaxis)
    left.set_xlabel("ms an image (box: quartiles, whiskers: 5 to 95 %)")
    left.grid(axis="x", alpha=0.3, which="both")
    if batched:
        right = axes[1]
        for row in batched:
            right.plot(
                [point["batch"] for point in row["offline"]],
                [point["images_per_second"] for point in row["offline"]],
                color=COLOURS.get(row["runtime"], "#999"),
                marker=MARKERS.get(row["precision"], "x"),
                linestyle="-" if row["precision"] == "int8" else "--",
                label=row["title"],
            )
        batches = sorted({point["batch"] for row in batched for point in row["offline"]})
        right.set_xscale("log", base=2)
        right.set_xticks(batches, [str(batch) for batch in batches])
        right.set_yscale("log")
        _plain_ticks(right.yaxis)
        right.set_xlabel("images in a batch")
        right.set_ylabel("images/s")
        right.grid(alpha=0.3, which="both")
        right.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    PLOTS.mkdir(exist_ok=True)
    path = PLOTS / f"{name}-{model['name']}.svg"
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)
    return path


def _plain_ticks(axis: Any) -> None:
    """Label a logarithmic axis 1, 2, 5, 10 … in plain numbers."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def main() -> None:
    """Write or check."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    text = README.read_text(encoding="utf-8")
    head, _, rest = text.partition(BEGIN)
    _, _, tail = rest.partition(END)
    wanted = f"{head}{BEGIN}\n{section()}\n{END}{tail}"
    if check:
        sys.exit(0 if wanted == text else "benchmarks/README.md is not what results/ say")
    README.write_text(wanted, encoding="utf-8")
    for name, document in results():
        for model in document["models"]:
            print(draw(name, model))


if __name__ == "__main__":
    main()
