"""INT8 of one trained model by cnnedge and by its peers, each in processes of its own.

    python benchmarks/int8_peers alexnet.keras --data signs:20480 --data-seed 1 --json out.json

Beside cnnedge: ONNX Runtime's `quantize_static` with its defaults, NNCF on OpenVINO, the LiteRT
converter. All get the same Keras model or its FP32 graph, and the same calibration images. Measured
are calibration (seconds, and peak memory of a process that does nothing else), the answers to the
test images against the Keras reference's, the size, and the latency at batch 1: processes take
turns in blocks, in another order each time, and are started anew for each round; only the
runtime's call is timed. What a peer's graph wants done to the uint8 image beforehand is not in its
time; cnnedge's graph takes the image as it is.
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from contest import Entrant, answer, attempt, hold, latency, quantized, result_of, tell, time_round

from cnnedge.benchmark.statistics import paired_ratio
from cnnedge.comparison import compare
from cnnedge.machine import this_machine, tool_versions

SLOWER = 1.05  # than the fastest peer's INT8 is still as fast
FEWEST = {"rounds": 5, "repeats": 3}  # that settle anything
TITLES = {
    "keras": "Keras (reference)",
    "ort-fp32": "cnnedge FP32 on ONNX Runtime",
    "openvino-fp32": "cnnedge FP32 on OpenVINO",
    "litert-fp32": "LiteRT FP32",
    "ort-static": "ORT `quantize_static` on ONNX Runtime",
    "nncf": "NNCF on OpenVINO",
    "litert": "LiteRT converter on LiteRT",
}
PEERS = ("ort-static", "nncf", "litert")
FLOATS = ("ort-fp32", "openvino-fp32", "litert-fp32")


def run(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Measure everything and return it as one document."""
    threads = arguments.threads or this_machine().cores
    tell(f"preparing {arguments.data}")
    prepared = result_of(
        *("prepare", folder, arguments.model.resolve(), arguments.data, arguments.data_seed),
        *(arguments.test_images, arguments.calibration_images),
    )
    ours = f"cnnedge-{arguments.method}"
    rows: dict[str, dict[str, Any]] = {"keras": {"bytes": 4 * prepared["parameters"], "file": "-"}}
    for name in (*FLOATS, ours, *PEERS):
        tell(f"quantizing: {name}")
        times = 1 if name in FLOATS else arguments.repeats
        rows[name] = attempt(lambda name=name, times=times: quantized(folder, name, times))
    rows[f"{ours}-openvino"] = dict(rows[ours])  # peers may run our graph too
    running = {name: row for name, row in rows.items() if "error" not in row}
    for name, row in running.items():
        if name != "keras":  # whose answers are the reference
            tell(f"answering: {name}")
            entrant = Entrant(folder, name, row["file"])
            row.update(attempt(lambda entrant=entrant: answer(entrant, threads)))
    running = {name: row for name, row in running.items() if "error" not in row}
    samples: dict[str, list[list[float]]] = {name: [] for name in running}  # by round
    shuffled = random.Random(0)
    for number in range(arguments.rounds):
        tell(f"timing: round {number + 1} of {arguments.rounds}")
        # New processes each time: where its memory happens to lie makes one 20 % faster than
        # another of the same program.
        entrants = {name: Entrant(folder, name, row["file"]) for name, row in running.items()}
        for name, taken in time_round(entrants, threads, shuffled).items():
            if isinstance(taken, str):
                rows[name] = {"error": taken}
                del running[name], samples[name]
            else:
                samples[name].append(taken)
    reference = np.load(folder / "keras.answers.npy")
    targets = np.load(folder / "targets.npy")
    for name in running:
        rows[name].update(latency(samples[name]))
        answers = np.load(folder / f"{name}.answers.npy")
        rows[name]["accuracy"] = compare(answers, reference, targets).to_dict()
    return {
        "model": arguments.model.name,
        "data": arguments.data,
        "data_seed": arguments.data_seed,
        "ours": ours,
        "threads": threads,
        "prepared": prepared,
        "machine": this_machine().to_dict(),
        "tools": tool_versions(),
        "rows": rows,
        "goals": goals(rows, ours, samples),
    }


def goals(
    rows: dict[str, dict[str, Any]], ours: str, samples: dict[str, list[list[float]]]
) -> list[dict[str, Any]]:
    """Hold what was measured against the goals.

    ``met`` is None for a figure that decides nothing; ``settled`` is False where other runs like
    these might well decide otherwise.
    """
    peers = [name for name in PEERS if name in samples]
    if ours not in samples or not peers:
        return []
    drop = {name: rows[name]["accuracy"]["drop_points"] for name in (ours, *peers)}
    best = min(drop, key=lambda name: drop[name])
    # Where FP32 failed, the reference's own drop stands in for it: none.
    fp32 = rows["ort-fp32"]["accuracy"]["drop_points"] if "ort-fp32" in samples else 0.0
    found: list[dict[str, Any]] = [
        {
            "goal": "top-1 drop within 0.1 points of FP32, or the best of all",
            "measured": f"{drop[ours]:+.2f} points; FP32 {fp32:+.2f}; best {drop[best]:+.2f} "
            f"({title(best)})",
            "met": drop[ours] <= fp32 + 0.1 or drop[ours] <= drop[best],
            "settled": True,  # the same images for all: their interval stands in the table
        }
    ]
    # A process is faster or slower for its whole life, so that a round is one observation.
    rounds = {name: [[taken] for taken in samples[name]] for name in samples}
    fastest = min(peers, key=lambda name: rows[name]["median_ms"])
    mine = [name for name in (ours, f"{ours}-openvino") if name in samples]
    quickest = min(mine, key=lambda name: rows[name]["median_ms"])
    for name in mine:
        ratio, low, high = paired_ratio(rounds[fastest], rounds[name])
        found.append(
            {
                "goal": f"latency at most {SLOWER} × the fastest peer's INT8 ({title(fastest)})",
                "measured": f"{title(name)}: {ratio:.3f} × [{low:.3f}, {high:.3f}]",
                "met": ratio <= SLOWER if name == quickest else None,
                "settled": len(rounds[name]) >= FEWEST["rounds"] and not low <= SLOWER < high,
            }
        )
    for key, what in (("peak_over_start_mib", "above its start"), ("peak_mib", "of the process")):
        peaks = {name: [run[key] for run in rows[name]["runs"]] for name in (ours, *peers)}
        rival = min(peers, key=lambda name: median(peaks[name]))
        met = median(peaks[ours]) < median(peaks[rival])
        low, high = sorted((ours, rival), key=lambda name: median(peaks[name]))
        found.append(
            {
                "goal": f"calibration peak memory {what} the lowest",
                "measured": f"{_span(peaks[ours])} MiB; the lowest peer's {_span(peaks[rival])} "
                f"({title(rival)})",
                "met": met,
                "settled": len(peaks[ours]) >= FEWEST["repeats"]
                and max(peaks[low]) < min(peaks[high]),
            }
        )
    return found


def _span(values: list[float]) -> str:
    """Return a median, and the extremes beside it."""
    return f"{median(values):.0f} [{min(values):.0f}, {max(values):.0f}]"


def title(name: str) -> str:
    """Return what the table calls a contestant."""
    if name in TITLES:
        return TITLES[name]
    where = "OpenVINO" if name.endswith("-openvino") else "ONNX Runtime"
    return f"**cnnedge INT8** ({name.split('-')[1]}) on {where}"


def markdown(document: dict[str, Any]) -> str:
    """Return the table and the goals as Markdown."""
    prepared, machine = document["prepared"], document["machine"]
    height, width, _ = prepared["image"]
    lines = [
        f"{document['model']} at {height}×{width}, {prepared['test_images']} test images of "
        f"`{document['data']}` (seed {document['data_seed']}), {prepared['calibration_images']} "
        f"calibration images; {machine['cpu']}, {document['threads']} threads.",
        "",
        "| | top-1 | drop, points [95 %] | agreement | batch 1, p50 (p90) | size | "
        "calibration | peak memory, above its start (whole) |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, row in document["rows"].items():
        if "error" in row:
            lines.append(f"| {title(name)} | failed: {row['error'][:120]} | | | | | | |")
            continue
        a = row["accuracy"]
        low, high = a["drop_interval_points"]
        quantizes = name in PEERS or name == document["ours"]
        lines.append(
            f"| {title(name)} | {100 * a['top1']:.2f} % | {a['drop_points']:+.2f} "
            f"[{low:+.2f}, {high:+.2f}] | {100 * a['agreement']:.2f} % | "
            f"{row['median_ms']:.2f} ({row['p90_ms']:.2f}) ms | {row['bytes'] / 1e6:.1f} MB | "
            + (
                f"{row['seconds']:.1f} s | {row['peak_over_start_mib']:.0f} "
                f"({row['peak_mib']:.0f}) MiB |"
                if quantizes
                else "– | – |"
            )
        )
    lines += ["", "| goal | measured | |", "|---|---|---|"]
    for goal in document["goals"]:
        met = {True: "met", False: "**MISSED**", None: "–"}[goal["met"]]
        doubt = ", not settled" if goal["met"] is not None and not goal["settled"] else ""
        lines.append(f"| {goal['goal']} | {goal['measured']} | {met}{doubt} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Parse the command line, measure, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", type=Path, help="a trained .keras file")
    parser.add_argument("--method", default="minmax", help="cnnedge's calibration method")
    parser.add_argument(
        "--repeats", type=int, default=3, help="calibrations of each, in new processes"
    )
    hold(parser, run, markdown)


if __name__ == "__main__":
    main()
