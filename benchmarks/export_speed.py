"""Keras model in memory → FP32 ONNX file on disk: cnnedge beside tf2onnx's own `from_keras`.

    python benchmarks/export_speed.py                 # VGG-16, 1000 classes, 224×224
    python benchmarks/export_speed.py alexnet_v1 --json out.json

Both run in turn, A B A B, each in a process of its own that has imported everything and built the
model before the clock starts; memory is the process's high-water mark during the conversion, less
what it held before the model was built, so it includes the weights themselves once.
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
from statistics import median

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")


def status_kib(field: str) -> int:
    """Return a field of /proc/self/status, in KiB (Linux alone)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1])
    raise RuntimeError(f"no {field} in /proc/self/status")


def convert_once(contestant: str, model_name: str, height: int, width: int) -> dict[str, float]:
    """Convert in this process, and return seconds and bytes."""
    import onnx.reference  # noqa: F401
    import onnx_ir.passes.common  # noqa: F401
    import tensorflow as tf
    import tf2onnx.convert

    from cnnedge.export import export_onnx, write_onnx
    from cnnedge.image import ImageContract
    from cnnedge.models import build

    before = status_kib("VmRSS")
    model = build(model_name, height=height, width=width)
    weights = sum(int(v.numpy().nbytes) for v in model.trainable_variables)
    Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        start = time.perf_counter()
        if contestant == "cnnedge":
            labels = tuple(f"class {i}" for i in range(1000))
            exported = export_onnx(
                model, name=model_name, labels=labels, image=ImageContract(height, width)
            )
            write_onnx(exported.model, path)
        else:
            signature = [tf.TensorSpec((None, height, width, 3), tf.float32, name="image")]
            tf2onnx.convert.from_keras(
                model, input_signature=signature, opset=17, output_path=str(path)
            )
        seconds = time.perf_counter() - start
        peak = 1024 * (status_kib("VmHWM") - before)
        return {
            "seconds": seconds,
            "file_bytes": path.stat().st_size,
            "weight_bytes": weights,
            "peak_bytes": peak,
        }


def main() -> None:
    """Run both contestants in turn and print what they took."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", nargs="?", default="vgg16")
    parser.add_argument("--image-size", type=int, nargs=2, default=(224, 224), metavar=("H", "W"))
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    height, width = arguments.image_size
    if arguments.child:
        result = convert_once(arguments.child, arguments.model, height, width)
        print("RESULT", json.dumps(result))
        return

    from cnnedge.machine import this_machine, tool_versions

    runs: dict[str, list[dict[str, float]]] = {"cnnedge": [], "tf2onnx": []}
    for _ in range(arguments.rounds):
        for contestant, results in runs.items():
            child = [sys.executable, __file__, arguments.model, "--child", contestant]
            child += ["--image-size", str(height), str(width)]
            done = subprocess.run(child, capture_output=True, text=True)
            line = next((x for x in done.stdout.splitlines() if x.startswith("RESULT ")), None)
            if line is None:
                sys.exit(f"{contestant} failed:\n{done.stderr[-2000:]}")
            results.append(json.loads(line.removeprefix("RESULT ")))
            print(f"{contestant:8} {results[-1]['seconds']:7.2f} s", file=sys.stderr)
    seconds = {name: median(r["seconds"] for r in results) for name, results in runs.items()}
    document = {
        "model": arguments.model,
        "image_size": [height, width],
        "machine": this_machine().to_dict(),
        "tools": tool_versions(),
        "runs": runs,
        "median_seconds": seconds,
        "times_faster": seconds["tf2onnx"] / seconds["cnnedge"],
        "peak_over_weights": {
            name: max(r["peak_bytes"] / r["weight_bytes"] for r in results)
            for name, results in runs.items()
        },
    }
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(document, indent=1) + "\n")
    machine = this_machine()
    print(f"{arguments.model} at {height}×{width}, {machine.cpu}, {machine.cores} cores")
    for name in runs:
        peak = document["peak_over_weights"][name]
        print(f"  {name:8} {seconds[name]:7.2f} s   peak memory {peak:.2f} × the weights")
    print(f"  cnnedge is {document['times_faster']:.1f} × faster")


if __name__ == "__main__":
    main()
