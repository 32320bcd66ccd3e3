"""From nothing to the first answer: a whole process that loads a bundle and classifies one image.

    python benchmarks/cold_start.py BUNDLE [--variant int8] [--rounds 20]

Beside it, in turn, what a process costs that does the same with onnxruntime and Pillow alone, and
one that only imports TensorFlow.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

OURS = "import sys, cnnedge; print(cnnedge.load(sys.argv[1], variant=sys.argv[2])(sys.argv[3])[0])"
BARE = """
import json, sys, numpy as np, onnxruntime as ort
from PIL import Image
session = ort.InferenceSession(f"{sys.argv[1]}/model.{sys.argv[2]}.onnx")
image = json.loads(session.get_modelmeta().custom_metadata_map["cnnedge.image"])
photo = Image.open(sys.argv[3]).convert("RGB").resize((image["width"], image["height"]), 2)
print(session.run(None, {"image": np.asarray(photo)[None]})[0].argmax())
"""
TENSORFLOW = "import tensorflow"


def main() -> None:
    """Time the processes in turn and print their medians."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--variant", default="int8")
    parser.add_argument("--rounds", type=int, default=20)
    arguments = parser.parse_args()
    golden = arguments.bundle / "selftest" / "golden-00.png"
    programs = {"cnnedge": OURS, "onnxruntime alone": BARE, "import tensorflow": TENSORFLOW}
    seconds: dict[str, list[float]] = {name: [] for name in programs}
    for round_number in range(arguments.rounds):
        for name, code in programs.items():
            if code is TENSORFLOW and round_number >= 3:
                continue
            command = [sys.executable, "-c", code, arguments.bundle, arguments.variant, golden]
            start = time.perf_counter()
            subprocess.run(command, check=True, capture_output=True)
            seconds[name].append(time.perf_counter() - start)
    for name, taken in seconds.items():
        print(f"{name:18} median {median(taken):.2f} s, slowest {max(taken):.2f} s of {len(taken)}")


if __name__ == "__main__":
    main()
