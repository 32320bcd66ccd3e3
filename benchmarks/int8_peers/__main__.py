"""INT8 of one trained model by cnnedge and by its peers, each in processes of its own.

    python benchmarks/int8_peers alexnet.keras --data signs:20480 --data-seed 1 --json out.json

Beside cnnedge: ONNX Runtime's `quantize_static` with its defaults, NNCF on OpenVINO, the LiteRT
converter. All get the same Keras model or its FP32 graph, and the same calibration images. Measured
are calibration (seconds, and peak memory of a process that does nothing else), the answers to the
test images against the Keras reference's, the size, and the latency at batch 1: processes take
turns in blocks, in another order each time, and are started anew for each round; only the
runtime's call is timed.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from cnnedge.machine import this_machine, tool_versions
from cnnedge.result import compare, ratio_interval

WORKER = Path(__file__).with_name("worker.py")
BLOCK = 20  # timed calls in a block
BLOCKS = 3  # of each contestant before its process is started anew
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


def result_of(*arguments: Any) -> Any:
    """Run the worker to its end and return its result; raise with its last line otherwise."""
    command = [sys.executable, str(WORKER), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    for line in done.stdout.splitlines():
        if line.startswith("RESULT "):
            return json.loads(line.removeprefix("RESULT "))
    raise RuntimeError((done.stderr.strip().splitlines() or ["it said nothing"])[-1])


class Server:
    """A contestant's long-lived process."""

    def __init__(self, folder: Path, name: str, file: str, threads: int) -> None:
        command = [sys.executable, str(WORKER), "serve", str(folder), name, file, str(threads)]
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed with the process
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
        )
        self._await("READY")

    def ask(self, command: str) -> Any:
        """Send a command and return its result."""
        assert self._process.stdin is not None
        self._process.stdin.write(command + "\n")
        self._process.stdin.flush()
        return json.loads(self._await("RESULT"))

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()

    def _await(self, word: str) -> str:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith(word):
                return line.removeprefix(word).strip()
        self._errors.seek(0)
        raise RuntimeError((self._errors.read().strip().splitlines() or ["it died"])[-1])


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
        rows[name] = attempt(lambda name=name: result_of("quantize", folder, name))
    rows[f"{ours}-openvino"] = dict(rows[ours])  # peers may run our graph too
    running = {name: row for name, row in rows.items() if "error" not in row}
    for name, row in running.items():
        if name != "keras":  # whose answers are the reference
            tell(f"answering: {name}")
            row.update(attempt(lambda name=name, row=row: answer(folder, name, row, threads)))
    running = {name: row for name, row in running.items() if "error" not in row}
    samples: dict[str, list[float]] = {name: [] for name in running}
    shuffled, order = random.Random(0), list(running)
    for number in range(arguments.rounds):
        tell(f"timing: round {number + 1} of {arguments.rounds}")
        # New processes each time: where its memory happens to lie makes one 20 % faster than
        # another of the same program.
        servers = {
            name: Server(folder, name, row["file"], threads) for name, row in running.items()
        }
        for _ in range(BLOCKS):
            shuffled.shuffle(order)  # or one would always come after the same, slower neighbour
            for name in order:
                samples[name] += servers[name].ask(f"time {BLOCK}")
        for server in servers.values():
            server.close()
    reference = np.load(folder / "keras.answers.npy")
    targets = np.load(folder / "targets.npy")
    for name in running:
        rows[name]["samples_ms"] = [round(1e3 * s, 4) for s in samples[name]]
        rows[name]["median_ms"] = 1e3 * float(np.median(samples[name]))
        rows[name]["p90_ms"] = 1e3 * float(np.percentile(samples[name], 90))
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


def answer(folder: Path, name: str, row: dict[str, Any], threads: int) -> dict[str, Any]:
    """Let a contestant answer the test images."""
    server = Server(folder, name, row["file"], threads)
    server.ask("answers")
    server.close()
    return {}


def attempt(work: Any) -> dict[str, Any]:
    """Return a result, or the one line that says why there is none."""
    try:
        return work()
    except (RuntimeError, OSError) as error:
        return {"error": str(error)}


def goals(
    rows: dict[str, dict[str, Any]], ours: str, samples: dict[str, list[float]]
) -> list[dict[str, Any]]:
    """Hold what was measured against the goals."""
    peers = [name for name in PEERS if name in samples]
    if ours not in samples or not peers:
        return []
    drop = {name: rows[name]["accuracy"]["drop_points"] for name in (ours, *peers)}
    fp32 = rows["ort-fp32"]["accuracy"]["drop_points"]
    best = min(drop, key=lambda name: drop[name])
    fastest = min(peers, key=lambda name: rows[name]["median_ms"])
    found = [
        {
            "goal": "top-1 drop within 0.1 points of FP32, or the best of all",
            "measured": f"{drop[ours]:+.2f} points; FP32 {fp32:+.2f}; best {drop[best]:+.2f} "
            f"({title(best)})",
            "met": drop[ours] <= fp32 + 0.1 or drop[ours] <= drop[best],
        }
    ]
    mine = [name for name in (ours, f"{ours}-openvino") if name in samples]
    quickest = min(mine, key=lambda name: rows[name]["median_ms"])
    for name in mine:
        ratio, low, high = ratio_interval(samples[fastest], samples[name])
        found.append(
            {
                "goal": f"latency at most 1.05 × the fastest peer's INT8 ({title(fastest)})",
                "measured": f"{title(name)}: {ratio:.2f} × [{low:.2f}, {high:.2f}]",
                "met": ratio <= 1.05 if name == quickest else None,
            }
        )
    for key, what in (("peak_over_start_mib", "above its start"), ("peak_mib", "of the process")):
        peak = {name: rows[name][key] for name in (ours, *peers)}
        lowest = min(peak, key=lambda name: peak[name])
        found.append(
            {
                "goal": f"calibration peak memory {what} the lowest",
                "measured": f"{peak[ours]:.0f} MiB; lowest {peak[lowest]:.0f} ({title(lowest)})",
                "met": lowest == ours,
            }
        )
    return found


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
        met = {True: "met", False: "**missed**", None: "–"}[goal["met"]]
        lines.append(f"| {goal['goal']} | {goal['measured']} | {met} |")
    return "\n".join(lines) + "\n"


def tell(text: str) -> None:
    """Say what is being done."""
    print(text, file=sys.stderr, flush=True)


def main() -> None:
    """Parse the command line, measure, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", type=Path, help="a trained .keras file")
    parser.add_argument("--data", default="signs:20480", help="digits, signs:N or a folder")
    parser.add_argument("--data-seed", type=int, default=1, help="not the one of the training")
    parser.add_argument("--test-images", type=int, default=5000)
    parser.add_argument("--calibration-images", type=int, default=128)
    parser.add_argument("--method", default="minmax", help="cnnedge's calibration method")
    parser.add_argument(
        "--rounds", type=int, default=10, help=f"of new processes, {BLOCKS} blocks each"
    )
    parser.add_argument("--threads", type=int)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--markdown", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        document = run(arguments, Path(folder))
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(document, indent=1) + "\n")
    text = markdown(document)
    if arguments.markdown:
        arguments.markdown.write_text(text)
    print(text)


if __name__ == "__main__":
    main()
