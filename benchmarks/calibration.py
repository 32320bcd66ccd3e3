"""Calibration of one FP32 graph: cnnedge's streaming histograms beside ONNX Runtime's calibrator.

    python benchmarks/calibration.py                     # VGG-16 at 224×224, 512 images
    python benchmarks/calibration.py alexnet.keras --images 256 --json out.json

Each runs in a process of its own, in turn: plain FP32 inference over the images, cnnedge, plain
inference again. ONNX Runtime's entropy calibrator keeps every activation of every image, so it
gets as many images as fit and is quoted per image, beside cnnedge over the same ones. Then the same
images are observed without sampling, to see by how much sampling changes the scales.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")


def prepare(folder: Path, model: str, data: str, images: int) -> None:
    """Write the FP32 graph and the calibration images."""
    from cnnedge.data import open_source
    from cnnedge.export import write_onnx
    from cnnedge.recipe import make_recipe
    from cnnedge.source import resolve

    source, _ = resolve(make_recipe(model=model))
    exported = source.to_onnx()
    write_onnx(exported.model, folder / "fp32.onnx")
    split = open_source(data, seed=1).train.take(images, seed=0)
    batches = [batch for batch, _ in split.batches(source.image, 32)]
    np.save(folder / "images.npy", np.concatenate(batches))


def plain(folder: Path, images: np.ndarray) -> None:
    """Run FP32 inference and keep nothing."""
    from cnnedge.backends.onnxruntime import open_session

    session = open_session(folder / "fp32.onnx")
    for i in range(len(images)):
        session(images[i : i + 1])


def cnnedge(folder: Path, images: np.ndarray, samples: int | None = -1) -> dict[str, Any]:
    """Observe the graph, and return the limits that each method chooses."""
    import onnx_ir as ir

    from cnnedge.quantize import CPU, METHODS, calibrate, choose_ranges, make_plan
    from cnnedge.quantize.calibrate import SAMPLES

    model = ir.load(folder / "fp32.onnx")
    plan = make_plan(model, CPU)
    batches = (images[i : i + 1] for i in range(len(images)))
    seen = calibrate(
        model, plan.tensors, batches, folder, samples=SAMPLES if samples == -1 else samples
    )
    return {method: dict(choose_ranges(seen, plan, method).limits) for method in METHODS}


def ort(folder: Path, images: np.ndarray) -> None:
    """Calibrate with ONNX Runtime's own entropy calibrator."""
    from onnxruntime.quantization import CalibrationDataReader, CalibrationMethod
    from onnxruntime.quantization.calibrate import create_calibrator

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.images = iter(images)

        def get_next(self) -> dict | None:
            image = next(self.images, None)
            return None if image is None else {"image": image[None]}

    calibrator = create_calibrator(
        str(folder / "fp32.onnx"),
        augmented_model_path=str(folder / "augmented.onnx"),
        calibrate_method=CalibrationMethod.Entropy,
    )
    calibrator.set_execution_providers(["CPUExecutionProvider"])
    calibrator.collect_data(Reader())
    calibrator.compute_data()


def status_mib(field: str) -> float:
    """Return a field of /proc/self/status, in MiB (Linux alone)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) / 1024
    raise RuntimeError(f"no {field} in /proc/self/status")


def child(folder: Path, what: str, count: int) -> dict[str, Any]:
    """Do one thing in this process and return what it took; libraries are loaded beforehand."""
    import onnx_ir  # noqa: F401
    import onnxruntime.quantization.calibrate  # noqa: F401

    images = np.load(folder / "images.npy", mmap_mode="r")[:count]
    work = {
        "plain": plain,
        "cnnedge": cnnedge,
        "unsampled": lambda f, i: cnnedge(f, i, None),
        "ort": ort,
    }
    before = status_mib("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
    start = time.perf_counter()
    limits = work[what](folder, images)
    seconds = time.perf_counter() - start
    peak = status_mib("VmHWM")
    return {
        "what": what,
        "images": len(images),
        "seconds": seconds,
        "peak_mib": peak,
        "peak_over_start_mib": peak - before,
        "limits": limits,
    }


def measured(folder: Path, what: str, count: int) -> dict[str, Any]:
    """Run one thing in a process of its own."""
    print(f"{what}, {count} images", file=sys.stderr, flush=True)
    command = [sys.executable, __file__, "--child", what, "--images", str(count), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True)
    for line in done.stdout.splitlines():
        if line.startswith("RESULT "):
            return json.loads(line.removeprefix("RESULT "))
    last = (done.stderr.strip().splitlines() or [f"ended with {done.returncode}"])[-1]
    return {"what": what, "images": count, "error": last}


def changes(one: dict[str, Any], other: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Return by how much the ranges of one run differ from another's, per method."""
    found = {}
    for method, limits in one["limits"].items():
        span = np.array([high - low for low, high in limits.values()])
        theirs = np.array([high - low for low, high in other["limits"][method].values()])
        change = np.abs(span / theirs - 1)
        found[method] = {"median": float(np.median(change)), "largest": float(change.max())}
    return found


def run(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Measure everything."""
    from cnnedge.machine import this_machine, tool_versions

    count, few = arguments.images, arguments.ort_images
    prepare(folder, arguments.model, arguments.data, count)
    runs = {
        "plain": measured(folder, "plain", count),
        "cnnedge": measured(folder, "cnnedge", count),
        "plain again": measured(folder, "plain", count),
        "ort": measured(folder, "ort", few),
        "cnnedge few": measured(folder, "cnnedge", few),
        "unsampled": measured(folder, "unsampled", count),
        "cnnedge half": measured(folder, "cnnedge", count // 2),
    }
    images = {
        name: result.get("seconds", np.nan) / result["images"] for name, result in runs.items()
    }
    base = min(images["plain"], images["plain again"])
    return {
        "model": Path(arguments.model).name,
        "data": arguments.data,
        "machine": this_machine().to_dict(),
        "tools": tool_versions(),
        "runs": {k: {n: v for n, v in r.items() if n != "limits"} for k, r in runs.items()},
        "times_plain": images["cnnedge"] / base,
        "times_faster_than_ort": images["ort"] / images["cnnedge few"],
        "change_by_sampling": changes(runs["cnnedge"], runs["unsampled"]),
        "change_by_half_the_images": changes(runs["cnnedge half"], runs["cnnedge"]),
    }


def main() -> None:
    """Parse the command line, measure, and print what was found."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", nargs="?", default="vgg16")
    parser.add_argument("--data", default="signs")
    parser.add_argument("--images", type=int, default=512)
    parser.add_argument("--ort-images", type=int, default=16, help="for ONNX Runtime's calibrator")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        found = child(Path(arguments.model), arguments.child, arguments.images)
        return print("RESULT", json.dumps(found))
    with tempfile.TemporaryDirectory() as folder:
        document = run(arguments, Path(folder))
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(document, indent=1) + "\n")
    for name, result in document["runs"].items():
        if "error" in result:
            print(f"{name:13} {result['images']:4} images  failed: {result['error']}")
            continue
        print(
            f"{name:13} {result['images']:4} images  {result['seconds']:7.1f} s  "
            f"{1e3 * result['seconds'] / result['images']:7.1f} ms an image  "
            f"peak {result['peak_mib']:6.0f} MiB, "
            f"{result['peak_over_start_mib']:.0f} above its start"
        )
    print(f"cnnedge takes {document['times_plain']:.2f} × plain FP32 inference")
    print(
        f"cnnedge is {document['times_faster_than_ort']:.1f} × faster than ORT's entropy calibrator"
    )
    for key in ("change_by_sampling", "change_by_half_the_images"):
        parts = [
            f"{method} {100 * c['median']:.2f} % (largest {100 * c['largest']:.1f} %)"
            for method, c in document[key].items()
        ]
        print(f"{key.replace('_', ' ')}: {', '.join(parts)}")
    return None


if __name__ == "__main__":
    main()
