"""Everything that takes an NVIDIA GPU, in one command: build, check, measure, write one JSON.

    python benchmarks/gpu.py -o results.json              # AlexNet v1 and VGG-16, every runtime
    python benchmarks/gpu.py --bundle alexnet vgg16       # your own bundles
    python benchmarks/gpu.py --models alexnet_v1 --batches 1,8 --seconds 1

It needs neither TensorFlow nor trained weights: `skeletons/` holds the ONNX graphs without their
weights, which are drawn here (He et al. 2015, seeded), quantized on `signs` images and written as a
bundle. Their speed is that of trained ones; their answers are held against FP32 on the CPU. A
runtime that is not to be had is named with the reason, not left out. Latencies of one batch size
are taken in turns, all runtimes in one run.

    python benchmarks/gpu.py --make-skeletons             # writes skeletons/ anew (needs Keras)
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

from cnnedge.benchmark.environment import describe_gpu, environment
from cnnedge.benchmark.interleaved import measure_interleaved
from cnnedge.bundle import (
    LABELS,
    MANIFEST,
    Bundle,
    Manifest,
    Variant,
    describe_files,
    open_bundle,
    write_labels,
)
from cnnedge.comparison import Verdict, compare
from cnnedge.errors import CnnEdgeError
from cnnedge.files import sha256
from cnnedge.image import ImageContract
from cnnedge.plan import PlanOptions
from cnnedge.runtime import RUNTIMES, RunSettings, open_variant, runs_on, usable_variants
from cnnedge.sections import ModelRecord

SKELETONS = Path(__file__).parent / "skeletons"
MODELS = ("alexnet_v1", "vgg16")
BATCHES = (1, 2, 4, 8, 16, 32, 64, 128)
PLANS = ("rtx", "tensorrt")
CALIBRATION_IMAGES, TEST_IMAGES = 64, 64
_LISTED = "cnnedge.skeleton"  # metadata: the weights that were taken out, name → shape


def make_skeleton(model: str, path: Path) -> None:
    """Write a built-in model's FP32 graph without its large weights."""
    import onnx
    import onnx_ir as ir

    from cnnedge.recipe import make_recipe
    from cnnedge.source import resolve

    source, _ = resolve(make_recipe(model=model))
    exported = source.to_onnx()
    proto = ir.to_proto(exported.model)
    weights, kept = {}, []
    for tensor in proto.graph.initializer:
        if tensor.name.endswith(("/weight", "/bias")):
            weights[tensor.name] = list(tensor.dims)
        else:
            kept.append(tensor)
    del proto.graph.initializer[:]
    proto.graph.initializer.extend(kept)
    proto.metadata_props.add(key=_LISTED, value=json.dumps(weights))
    path.parent.mkdir(exist_ok=True)
    onnx.save(proto, path)


def fill_skeleton(path: Path, seed: int) -> Any:
    """Return a skeleton's graph with drawn weights: He's normal ones, and no biases."""
    import onnx
    import onnx_ir as ir

    proto = onnx.load(path)
    about = {entry.key: entry.value for entry in proto.metadata_props}
    generator = np.random.default_rng(seed)
    for name, shape in json.loads(about[_LISTED]).items():
        if len(shape) == 1:
            values = np.zeros(shape, np.float32)
        else:  # a convolution's is [out, in, height, width], a dense layer's [in, out]
            fan_in = int(np.prod(shape[1:])) if len(shape) == 4 else shape[0]
            values = generator.standard_normal(shape, np.float32) * np.float32((2 / fan_in) ** 0.5)
        proto.graph.initializer.append(onnx.numpy_helper.from_array(values, name))
    for index, entry in enumerate(proto.metadata_props):
        if entry.key == _LISTED:
            del proto.metadata_props[index]
            break
    return ir.from_proto(proto)


def make_bundle(skeleton: Path, folder: Path, *, images: np.ndarray, seed: int = 0) -> Bundle:
    """Write a bundle of FP32, FP16 and INT8 for TensorRT from a skeleton.

    Args:
        skeleton: The graph without weights.
        folder: Where to write it.
        images: Calibration images, uint8 ``[N, H, W, 3]``.
        seed: Of the weights.
    """
    from cnnedge.graph.float16 import to_float16
    from cnnedge.graph.precision import achieved_precision
    from cnnedge.graph.write import write_onnx
    from cnnedge.quantize import TRT, calibrate, choose_ranges, make_plan, quantize

    folder.mkdir(parents=True)
    model = fill_skeleton(skeleton, seed)
    plan = make_plan(model, TRT)
    with tempfile.TemporaryDirectory() as scratch:
        batches = (images[i : i + 1] for i in range(len(images)))
        seen = calibrate(model, plan.tensors, batches, Path(scratch))
    int8 = quantize(model, plan, choose_ranges(seen, plan, "minmax")).model
    half = to_float16(model).model
    graphs = [
        ("fp32", "fp32", "any", model),
        ("fp16", "fp16", "any", half),
        ("int8-trt", "int8", "trt", int8),
    ]
    variants = []
    for name, precision, target, graph in graphs:
        path = folder / f"model.{name}.onnx"
        write_onnx(graph, path)
        variants.append(
            Variant(
                name,
                path.name,
                sha256(path),
                path.stat().st_size,
                precision,
                target,
                achieved=achieved_precision(graph),
                verdict=Verdict("not judged", "the weights are random"),
            )
        )
    labels = tuple(f"class {i}" for i in range(model.graph.outputs[0].shape[1]))
    write_labels(folder, labels)
    manifest = Manifest(
        name=skeleton.stem,
        model=ModelRecord(origin=f"{skeleton.stem}, seed {seed}", weights="random"),
        image=ImageContract(*images.shape[1:3]),
        normalization="unit",
        input="uint8",
        labels=labels,
        variants=tuple(variants),
        files=describe_files(folder, [LABELS]),
    )
    (folder / MANIFEST).write_text(manifest.to_json(), encoding="utf-8")
    return open_bundle(folder)


def draw_images(height: int, width: int, count: int, seed: int) -> np.ndarray:
    """Return seeded road-sign photographs, uint8 ``[count, height, width, 3]``."""
    from cnnedge.data import open_source

    split = open_source(f"signs:{max(10 * count, 1000)}", seed=seed).train.take(count, seed=seed)
    contract = ImageContract(height, width)
    return np.concatenate([batch for batch, _ in split.batches(contract, 32)])


@dataclass
class Run:
    """One measured bundle, as it fills."""

    bundle: Bundle
    images: np.ndarray
    max_batch: int
    cache: Path
    result: dict[str, Any]

    def skip(self, what: str, error: Exception) -> None:
        """Note what could not be done, and why."""
        reason = " ".join(str(error).split()).replace(str(self.bundle.root), self.result["model"])
        self.result["skipped"][what] = reason
        print(f"  {what}: {reason}", flush=True)


def build_plans(run: Run) -> None:
    """Build plans of every variant, each held against its graph."""
    from cnnedge.engine import build_engines

    names = [v.name for v in run.bundle.manifest.variants if v.target != "cpu"]
    for runtime in PLANS:
        for name in names:
            try:
                options = PlanOptions(max_batch=run.max_batch)
                (built,) = build_engines(run.bundle.root, runtime, options, variants=[name])
            except CnnEdgeError as error:
                run.skip(f"plan {name}@{runtime}", error)
                continue
            described = built.to_dict()
            del described["found"]["layers"], described["tools"]
            run.result["plans"].append(described)
            kept = "kept" if not built.failed else f"not kept: {built.report.violations[0]}"
            print(f"  plan {name}@{runtime}: {built.note.bytes / 1e6:.1f} MB, {kept}", flush=True)
    run.bundle = open_bundle(run.bundle.root)


def open_all(run: Run, runtimes: list[str]) -> Iterator[tuple[str, str, str, Any]]:
    """Yield name, runtime, variant and loaded session of everything that runs here."""
    for runtime in runtimes:
        settings = RunSettings(runtime, cache=run.cache / runtime, max_batch=run.max_batch)
        try:
            usable = usable_variants(run.bundle, settings)
        except CnnEdgeError as error:
            run.skip(runtime, error)
            continue
        for variant in run.bundle.manifest.variants:
            fits = runs_on(variant, runtime) and (usable is None or variant.name in usable)
            if not fits or (runtime == "cpu" and variant.precision == "fp16"):
                continue
            name = f"{variant.name}@{runtime}"
            try:
                yield name, runtime, variant.name, open_variant(run.bundle, variant, settings)
            except CnnEdgeError as error:
                run.skip(name, error)


def check_answers(run: Run, sessions: dict[str, Any]) -> None:
    """Hold every session's answers against FP32 on the CPU."""
    manifest = run.bundle.manifest
    reference = open_variant(run.bundle, manifest.variant("fp32"))
    expected = np.concatenate([reference(run.images[i : i + 1]) for i in range(len(run.images))])
    targets = expected.argmax(1)
    for name, session in list(sessions.items()):
        try:
            answers = np.concatenate([session(run.images[i : i + 8]) for i in range(0, 64, 8)])
        except CnnEdgeError as error:
            run.skip(name, error)
            del sessions[name]
            continue
        found = compare(answers, expected, targets)
        run.result["answers"][name] = {
            "images": found.n,
            "agreement": found.agreement,
            "max_abs_diff": found.max_abs_diff,
            "largest_probability": float(expected.max()),
        }
        print(f"  {name}: max |Δp| {found.max_abs_diff:.1e}, agree {found.agreement:.1%}")


def measure(run: Run, sessions: dict[str, Any], batches: list[int], seconds: float) -> None:
    """Time every session at every batch size, those of one batch size in turns."""
    shape = run.images.shape[1:]
    for batch in batches:
        feed = np.random.default_rng(0).integers(0, 256, (batch, *shape), np.uint8)
        contestants: dict[str, Callable[[], Any]] = {}
        for name, session in sessions.items():
            if name.endswith("@cpu") and batch > 1:
                continue
            call = getattr(session, "timed", session)
            try:
                call(feed)
            except CnnEdgeError as error:
                run.skip(f"{name} at batch {batch}", error)
                continue
            contestants[name] = lambda call=call, feed=feed: call(feed)  # type: ignore[misc]
        for measured in measure_interleaved(contestants, seconds=seconds) if contestants else ():
            row = measured.to_dict() | {"batch": batch, "images": batch}
            row["images_per_second"] = round(batch / measured.median, 1)
            run.result["latency"].append(row)
            gpu = measured.gpu_medians()
            compute = f", GPU compute {gpu['GPU Compute Time'] * 1e3:.3f} ms" if gpu else ""
            print(
                f"  {measured.name}, batch {batch}: {measured.median * 1e3:.3f} ms"
                f"{compute}, {row['images_per_second']:,.0f} images/s",
                flush=True,
            )


def run_bundle(
    bundle: Bundle, cache: Path, runtimes: list[str], batches: list[int], seconds: float
) -> dict[str, Any]:
    """Build, check and measure one bundle."""
    manifest = bundle.manifest
    images = draw_images(manifest.image.height, manifest.image.width, TEST_IMAGES, seed=2)
    result: dict[str, Any] = {
        "model": manifest.name,
        "weights": manifest.model.weights,
        "image": [manifest.image.height, manifest.image.width],
        "skipped": {},
        "plans": [],
        "answers": {},
        "latency": [],
    }
    run = Run(bundle, images, max(batches), cache, result)
    build_plans(run)
    sessions = {name: session for name, _, _, session in open_all(run, runtimes)}
    for name, session in sessions.items():
        result.setdefault("providers", {})[name] = str(getattr(session, "provider", "?"))
    check_answers(run, sessions)
    measure(run, sessions, batches, seconds)
    return result


def main() -> None:
    """Parse the command line, run, write."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--models", nargs="+", default=list(MODELS))
    parser.add_argument("--bundle", nargs="+", type=Path, help="bundles instead of skeletons")
    parser.add_argument("--runtimes", nargs="+", default=list(RUNTIMES), choices=list(RUNTIMES))
    parser.add_argument("--batches", default=",".join(map(str, BATCHES)))
    parser.add_argument("--seconds", type=float, default=3.0, help="for each batch size")
    parser.add_argument("-o", "--out", type=Path)
    parser.add_argument("--make-skeletons", action="store_true")
    options = parser.parse_args()
    if options.make_skeletons:
        for model in options.models:
            make_skeleton(model, SKELETONS / f"{model}.onnx")
        return
    gpu, why = describe_gpu()
    print(why, flush=True)
    batches = [int(batch) for batch in options.batches.split(",")]
    results = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        for index, name in enumerate(options.bundle or options.models):
            print(f"{name}:", flush=True)
            if options.bundle:
                bundle = open_bundle(name)
            else:
                images = draw_images(224, 224, CALIBRATION_IMAGES, seed=1)
                bundle = make_bundle(SKELETONS / f"{name}.onnx", folder / name, images=images)
            cache = folder / f"cache-{index}"
            results.append(run_bundle(bundle, cache, options.runtimes, batches, options.seconds))
    document = {
        "gpu": gpu,
        "no_gpu_because": None if gpu else why,
        "environment": environment(None),
        "timed": "the session's call: uint8 tensor in, probabilities out, copies included; "
        "`gpu` by part between CUDA events, under trtexec's names",
        "results": results,
    }
    if options.out is not None:
        options.out.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    ran = {row["name"] for result in results for row in result["latency"]}
    print(f"{len(ran)} runtimes and variants measured", flush=True)
    if gpu is None:
        print("no GPU was measured", file=sys.stderr)


if __name__ == "__main__":
    main()
