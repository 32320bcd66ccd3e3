"""How often an app's own resize changes the answer, and what the resize in the graph costs.

    python benchmarks/resize build/resize --json benchmarks/results/resize-MACHINE.json
    python benchmarks/resize --time --json benchmarks/results/resize-time-MACHINE.json
    python benchmarks/resize --write     # docs/resize.md's tables, from the recorded results
    python benchmarks/resize --check     # exit code 1 where they are not what results/ say

A small network is trained on `signs` as cnnedge reads them, at 64×64, and exported in FP32 and
INT8. Then JPEGs of 320×320 pixels, by the same camera and never seen, are decoded once and resized
as each app does; in headless Chromium the browser decodes them too. The reference is `image.fit`:
Pillow's BILINEAR on the whole picture. How near the graphs come to it is measured on photographs,
in many sizes.

Times are of camera pictures, taken in turns, and a run of their own: they alone want an idle
machine. OpenCV is timed where it is installed.

Besides the extras `cpu`, `export` and `dev` it takes opencv-python-headless, and Chromium; times
take scikit-learn's photographs and nothing else.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

from apps import CANVAS, app_resizes, browser, canvas_pixels, opencv_resizes
from graphs import OURS, resize_graphs, runner
from images import DATA, NETWORK, QUALITY, SIDE, make_bundle, make_images, tell
from tables import check, section, write

from cnnedge.backends.onnxruntime import open_session
from cnnedge.benchmark.interleaved import measure_interleaved
from cnnedge.benchmark.statistics import paired_ratio
from cnnedge.bundle import Bundle
from cnnedge.comparison import compare
from cnnedge.graph.resize import put_resize
from cnnedge.image import ImageContract, decode, fit, to_tensor
from cnnedge.machine import this_machine, tool_versions

REFERENCE = "Pillow `BILINEAR` (reference)"
DRAFT = "cnnedge on the file: JPEG decoded at a half, then `BILINEAR`"
IN_GRAPH = "the resize in the graph"
PRECISIONS = ("fp32", "int8")
SOURCES = ((640, 480), (1920, 1080))  # width, height, of what is timed
TARGETS = (224, 64)
PHOTO_SIZES = ((640, 427), (641, 431), (1920, 1080), (1024, 768), (333, 500), (100, 80))


def measure_apps(bundle: Bundle, images: Path) -> dict[str, Any]:
    """Resize every test picture in each way, classify it, and hold it against the reference."""
    contract = bundle.manifest.image
    size = (contract.height, contract.width)
    labels = bundle.manifest.labels
    files = sorted(images.rglob("*.jpg"), key=lambda path: path.name)
    targets = np.array([labels.index(path.parent.name) for path in files])
    pictures = [np.asarray(decode(path)) for path in files]
    tensors: dict[str, np.ndarray] = {
        REFERENCE: np.stack([fit(decode(path), contract) for path in files]),
        DRAFT: np.stack([to_tensor(path, contract) for path in files]),
    }
    for name, resize in app_resizes(size).items():
        tell(name)
        tensors[name] = np.stack([resize(pixels) for pixels in pictures])
    tell("Chromium")
    small: dict[str, list[np.ndarray]] = {quality: [] for quality in CANVAS}
    whole = []
    with browser() as opened:
        about = f"Chromium {opened.version}"
        data = [path.read_bytes() for path in files]
        for found, full in canvas_pixels(opened.new_page(), data, size):
            for quality, pixels in found.items():
                small[quality].append(pixels)
            whole.append(np.ascontiguousarray(full))
    for quality in CANVAS:
        default = " (its default)" if quality == "low" else ""
        tensors[f"{about}, canvas, `{quality}`{default}"] = np.stack(small[quality])
    in_graph = runner(resize_graphs(contract)[OURS])
    tensors[IN_GRAPH] = np.stack([in_graph(pixels) for pixels in pictures])
    tensors[f"{IN_GRAPH}, decoded by {about}"] = np.stack([in_graph(pixels) for pixels in whole])
    rows: list[dict[str, Any]] = [
        {"name": name, "pixels": _pixels(pixels, tensors[REFERENCE])}
        for name, pixels in tensors.items()
    ]
    for precision in PRECISIONS:
        model = bundle.path(bundle.manifest.variant(precision).file).read_bytes()
        session, any_size = open_session(model), open_session(put_resize(model, contract))
        answers = {
            name: np.concatenate([session(x[i : i + 1]) for i in range(len(x))])
            for name, x in tensors.items()
        }
        # By the very graph that an app would load, not by the resize alone.
        answers[IN_GRAPH] = np.concatenate([any_size(pixels[None]) for pixels in pictures])
        for row in rows:
            found = compare(answers[row["name"]], answers[REFERENCE], targets)
            flips = int((answers[row["name"]].argmax(1) != answers[REFERENCE].argmax(1)).sum())
            low, high = share_interval(flips, found.n)
            row[precision] = found.to_dict() | {
                "flips": flips,
                "flips_percent": 100 * flips / found.n,
                "flips_interval_percent": [low, high],
            }
    return {
        "pictures": f"{SIDE}×{SIDE} JPEG, quality {QUALITY}, of the road-sign camera",
        "network": f"{NETWORK}×{NETWORK}, trained on `{DATA}`",
        "n": len(files),
        "rows": rows,
    }


def share_interval(count: int, n: int) -> tuple[float, float]:
    """Return Wilson's 95 % interval of a share, in percent (Wilson 1927)."""
    z = 1.959964
    centre = (count + z * z / 2) / (n + z * z)
    spread = z * np.sqrt(count * (n - count) / n + z * z / 4) / (n + z * z)
    return 100 * max(0.0, centre - spread), 100 * min(1.0, centre + spread)


def _pixels(found: np.ndarray, reference: np.ndarray) -> dict[str, float]:
    difference = np.abs(found.astype(np.int16) - reference.astype(np.int16))
    return {
        "mean": float(difference.mean()),
        "max": int(difference.max()),
        "changed_percent": 100 * float((difference > 0).mean()),
    }


def photographs() -> list[np.ndarray]:
    """Return the two photographs that scikit-learn ships, enlarged and reduced."""
    from PIL import Image
    from sklearn.datasets import load_sample_images

    filters = Image.Resampling
    return [
        np.asarray(Image.fromarray(photo).resize(size, filters.LANCZOS))
        for photo in load_sample_images().images
        for size in PHOTO_SIZES
    ]


def measure_closeness() -> list[dict[str, Any]]:
    """Compare the pixels of each graph with `image.fit`'s, on photographs."""
    from PIL import Image

    photos, rows = photographs(), []
    contracts = [ImageContract(side, side) for side in TARGETS]
    for name in resize_graphs(contracts[0]):
        tell(name)
        runs = [runner(resize_graphs(contract)[name]) for contract in contracts]
        pairs = [
            (run(photo), fit(Image.fromarray(photo), contract))
            for run, contract in zip(runs, contracts, strict=True)
            for photo in photos
        ]
        found, expected = (np.concatenate([p[k].reshape(-1) for p in pairs]) for k in (0, 1))
        rows.append({"name": name, "pixels": _pixels(found, expected)})
    return rows


def measure_time(seconds: float) -> list[dict[str, Any]]:
    """Time the resize alone, all ways in turns, from a decoded picture to uint8 224×224."""
    from PIL import Image
    from sklearn.datasets import load_sample_images

    contract = ImageContract(TARGETS[0], TARGETS[0])
    graphs = resize_graphs(contract)
    rows = []
    for size in SOURCES:
        tell(f"timing at {size[0]}×{size[1]}")
        photo = Image.fromarray(load_sample_images().images[0]).resize(size)
        pixels = np.asarray(photo)
        calls: dict[str, Callable[[], Any]] = {"Pillow `BILINEAR`": partial(fit, photo, contract)}
        for name in (OURS, "`Resize` uint8, NCHW", "`Resize` uint8, NHWC"):
            for threads, said in ((None, ""), (1, ", one thread")):
                calls[name + said] = partial(runner(graphs[name], threads), pixels)
        if _opencv():
            for name, resize in opencv_resizes((contract.height, contract.width)).items():
                calls[name] = partial(resize, pixels)
        taken = measure_interleaved(calls, seconds=seconds)
        for measurement in taken:
            ratio, low, high = paired_ratio([measurement.blocks], [taken[0].blocks])
            rows.append(
                {"source": list(size), "target": TARGETS[0]}
                | measurement.to_dict()
                | {"speed_of_pillow": {"ratio": ratio, "interval": [low, high]}}
            )
    return rows


def _opencv() -> dict[str, str]:
    """Return OpenCV's version under its package's name; nothing where it is not installed."""
    try:
        import cv2
    except ImportError:
        return {}
    return {"opencv-python-headless": cv2.__version__}


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure the answers, or the times, and return them as one document."""
    machine = this_machine()
    document: dict[str, Any] = {
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": machine.to_dict(),
        "tools": tool_versions() | _opencv(),
    }
    if arguments.time:
        document["timed"] = (
            "the resize alone: decoded uint8 pixels in, uint8 pixels out; batch 1; Pillow on one "
            f"thread, the others on {machine.cores} unless said"
        )
        document["time"] = measure_time(arguments.seconds)
        return document
    images = arguments.folder / "images"
    make_images(images, arguments.pictures, machine.cores)
    bundle = make_bundle(arguments.folder, arguments.epochs)
    document["closeness"] = measure_closeness()
    document["apps"] = measure_apps(bundle, images)
    return document


def main() -> None:
    """Parse the command line, then measure, or write or check the documentation."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", nargs="?", type=Path, help="for pictures and models, kept")
    parser.add_argument("--pictures", type=int, default=1000, help="to classify")
    parser.add_argument("--epochs", type=int, default=14)
    parser.add_argument("--time", action="store_true", help="measure times instead, no answers")
    parser.add_argument("--seconds", type=float, default=40.0, help="of timing, for each size")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--write", action="store_true", help="write docs/resize.md's tables")
    parser.add_argument("--check", action="store_true", help="or check them")
    arguments = parser.parse_args()
    if arguments.write:
        write()
        return
    if arguments.check:
        sys.exit(0 if check() else "docs/resize.md is not what the results say: use --write")
    if arguments.folder is None and not arguments.time:
        parser.error("name a FOLDER, or --time, --write or --check")
    document = run(arguments)
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n")
    print(section(document))


if __name__ == "__main__":
    main()
