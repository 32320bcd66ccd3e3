"""A compressed classifier in INT8 beside the original's reference and the peers' INT8 of it.

    python benchmarks/int8_peers/compressed.py alexnet.keras small.keras --json out.json

The second file is what `cnnedge compress` made of the first. The peers (ONNX Runtime's
`quantize_static`, NNCF on OpenVINO, the LiteRT converter) quantize the original; cnnedge quantizes
both. All answer the same test images, which neither file was made with, and are timed at batch 1 in
one run, in processes that take turns and are started anew for each round.
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path
from typing import Any

import numpy as np
from contest import Entrant, answer, attempt, hold, latency, quantized, result_of, tell, time_round

from cnnedge.benchmark.statistics import paired_ratio
from cnnedge.comparison import compare
from cnnedge.machine import this_machine, tool_versions

MAX_DROP = 0.5  # points of top-1
# Times: smaller than FP32, faster than the fastest peer's INT8, faster than Keras. The sizes are
# Deep Compression's (Han et al., 2016, table 1).
GOALS = {"alexnet": (35, 2, 12), "vgg": (49, 3, 15)}
PEERS = ("ort-static", "nncf", "litert")
INT8 = "cnnedge-minmax"
OURS = "compressed"
TITLES = {
    "keras": "Keras (reference)",
    "ort-fp32": "cnnedge FP32 on ONNX Runtime",
    "ort-static": "ORT `quantize_static` on ONNX Runtime",
    "nncf": "NNCF on OpenVINO",
    "litert": "LiteRT converter on LiteRT",
    INT8: "cnnedge INT8 on ONNX Runtime",
    "compressed-keras": "cnnedge compressed, Keras",
    "compressed-fp32": "cnnedge compressed, FP32 on ONNX Runtime",
    OURS: "**cnnedge compressed + INT8** on ONNX Runtime",
}


def run(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Measure everything and return it as one document."""
    threads = arguments.threads or this_machine().cores
    original, small = folder / "original", folder / "compressed"
    prepared = {}
    for place, model in ((original, arguments.original), (small, arguments.compressed)):
        tell(f"preparing {model.name}")
        place.mkdir()
        prepared[place.name] = result_of(
            *("prepare", place, model.resolve(), arguments.data, arguments.data_seed),
            *(arguments.test_images, arguments.calibration_images),
        )
    if prepared["original"]["test_sha256"] != prepared["compressed"]["test_sha256"]:
        raise SystemExit("the two files were not given the same test images")
    rows: dict[str, dict[str, Any]] = {}
    entrants: dict[str, Entrant] = {}
    asked = [("keras", original, "keras")]
    asked += [(name, original, name) for name in ("ort-fp32", INT8, *PEERS)]
    asked += [("compressed-keras", small, "keras"), ("compressed-fp32", small, "ort-fp32")]
    for key, place, name in [*asked, (OURS, small, INT8)]:
        if name == "keras":
            rows[key] = {"bytes": 4 * prepared[place.name]["parameters"], "file": "-"}
        else:
            tell(f"quantizing: {key}")
            rows[key] = attempt(lambda place=place, name=name: quantized(place, name, 1))
        if "error" not in rows[key]:
            entrants[key] = Entrant(place, name, rows[key]["file"])
    for key, entrant in list(entrants.items()):
        if entrant.name != "keras":  # it answered when the images were prepared
            tell(f"answering: {key}")
            failed = attempt(lambda entrant=entrant: answer(entrant, threads))
            if failed:
                rows[key] = failed
                del entrants[key]
    samples: dict[str, list[list[float]]] = {key: [] for key in entrants}
    shuffled = random.Random(0)
    for number in range(arguments.rounds):
        tell(f"timing: round {number + 1} of {arguments.rounds}")
        for key, taken in time_round(entrants, threads, shuffled).items():
            if isinstance(taken, str):
                rows[key] = {"error": taken}
                del entrants[key], samples[key]
            else:
                samples[key].append(taken)
    reference = np.load(original / "keras.answers.npy")
    targets = np.load(original / "targets.npy")
    for key, entrant in entrants.items():
        rows[key].update(latency(samples[key]))
        answers = np.load(entrant.folder / f"{entrant.name}.answers.npy")
        rows[key]["accuracy"] = compare(answers, reference, targets).to_dict()
    return {
        "original": arguments.original.name,
        "compressed": arguments.compressed.name,
        "data": arguments.data,
        "data_seed": arguments.data_seed,
        "threads": threads,
        "prepared": prepared,
        "machine": this_machine().to_dict(),
        "tools": tool_versions(),
        "rows": rows,
        "goals": goals(arguments.original.name, rows, samples),
    }


def goals(
    model: str, rows: dict[str, dict[str, Any]], samples: dict[str, list[list[float]]]
) -> list[dict[str, Any]]:
    """Hold what was measured against the goals; those of a model it has none for are AlexNet's."""
    peers = [name for name in PEERS if name in samples]
    if OURS not in samples or "keras" not in samples or not peers:
        return []
    smaller, than_peer, than_keras = GOALS["vgg" if model.startswith("vgg") else "alexnet"]
    accuracy = rows[OURS]["accuracy"]
    low, high = accuracy["drop_interval_points"]
    ratio = rows["ort-fp32"]["bytes"] / rows[OURS]["bytes"]
    # A process is faster or slower for its whole life, so that a round is one observation.
    rounds = {name: [[taken] for taken in samples[name]] for name in samples}
    fastest = min(peers, key=lambda name: rows[name]["median_ms"])
    found: list[dict[str, Any]] = [
        {
            "goal": f"top-1 drop at most {MAX_DROP} points",
            "measured": f"{accuracy['drop_points']:+.2f} [{low:+.2f}, {high:+.2f}]",
            "met": accuracy["drop_points"] <= MAX_DROP,
            "settled": not low <= MAX_DROP < high,
        },
        {
            "goal": f"size at least {smaller}× smaller than FP32",
            "measured": f"{ratio:.0f}×",
            "met": ratio >= smaller,
            "settled": True,
        },
    ]
    for rival, least, what in (
        (fastest, than_peer, f"the fastest peer's INT8 of the original ({TITLES[fastest]})"),
        ("keras", than_keras, "Keras"),
    ):
        times, low, high = paired_ratio(rounds[OURS], rounds[rival])
        found.append(
            {
                "goal": f"latency at least {least}× better than {what}",
                "measured": f"{times:.2f}× [{low:.2f}, {high:.2f}]",
                "met": times >= least,
                "settled": not low < least <= high,
            }
        )
    return found


def markdown(document: dict[str, Any]) -> str:
    """Return the table and the goals as Markdown."""
    prepared, machine = document["prepared"]["original"], document["machine"]
    height, width, _ = prepared["image"]
    lines = [
        f"{document['original']} and {document['compressed']} at {height}×{width}, "
        f"{prepared['test_images']} test images of `{document['data']}` (seed "
        f"{document['data_seed']}); {machine['cpu']}, {document['threads']} threads.",
        "",
        "| | top-1 | drop, points [95 %] | batch 1, p50 (p90) | size |",
        "|---|---|---|---|---|",
    ]
    for key, row in document["rows"].items():
        if "error" in row:
            lines.append(f"| {TITLES[key]} | failed: {row['error'][:120]} | | | |")
            continue
        a = row["accuracy"]
        low, high = a["drop_interval_points"]
        lines.append(
            f"| {TITLES[key]} | {100 * a['top1']:.2f} % | {a['drop_points']:+.2f} "
            f"[{low:+.2f}, {high:+.2f}] | {row['median_ms']:.2f} ({row['p90_ms']:.2f}) ms | "
            f"{row['bytes'] / 1e6:.2f} MB |"
        )
    lines += ["", "| goal | measured | |", "|---|---|---|"]
    for goal in document["goals"]:
        met = "met" if goal["met"] else "**MISSED**"
        doubt = "" if goal["settled"] else ", not settled"
        lines.append(f"| {goal['goal']} | {goal['measured']} | {met}{doubt} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Parse the command line, measure, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("original", type=Path, help="a trained .keras file")
    parser.add_argument("compressed", type=Path, help="what cnnedge compress made of it")
    hold(parser, run, markdown)


if __name__ == "__main__":
    main()
