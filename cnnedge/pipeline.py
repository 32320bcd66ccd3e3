"""The whole flow as plain calls: Keras model in, verified bundle out.

    train ──► export ──► quantize ──► verify ──► benchmark ──► bundle ──► runtime

Each step is a function of its own module and knows no other step; this page connects them.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from cnnedge.benchmark import Benchmark, environment, measure_interleaved
from cnnedge.bundle import (
    LABELS,
    MANIFEST,
    REPORT,
    Bundle,
    Manifest,
    Variant,
    describe_files,
    open_bundle,
    weights_digest,
    write_labels,
)
from cnnedge.data import Split
from cnnedge.errors import CnnEdgeError, DataError
from cnnedge.export import ExportedGraph, export_onnx
from cnnedge.files import atomic_folder, sha256
from cnnedge.graph.fingerprint import layer_fingerprints
from cnnedge.graph.float16 import to_float16
from cnnedge.graph.precision import achieved_precision
from cnnedge.graph.write import write_onnx
from cnnedge.image import normalize
from cnnedge.machine import this_machine, tool_versions
from cnnedge.progress import Progress, silent
from cnnedge.quantize import CPU, CPU_REDUCED, TRT, collect_ranges, make_plan, quantize
from cnnedge.recipe import Recipe
from cnnedge.report import render_report
from cnnedge.result import Measurement, compare, judge
from cnnedge.selftest import GOLDEN, Fingerprints, write_selftest
from cnnedge.source import Source, resolve
from cnnedge.verify import REFERENCE_ANSWERS, compare_variants

Answer = Callable[[np.ndarray], np.ndarray]
RANDOM_TEST_IMAGES = 32
# The reference's answers travel with the bundle while they stay small: 8 MB of float32.
MOST_RECORDED_ANSWERS = 2_000_000


@dataclass(frozen=True)
class Graph:
    """One variant on its way into the bundle."""

    name: str
    precision: str
    target: str
    model: Any

    @property
    def file(self) -> str:
        """Its file's name in the bundle."""
        return f"model.{self.name}.onnx"


def export_bundle(
    recipe: Recipe, out: Path | str, *, force: bool = False, progress: Progress = silent
) -> tuple[Bundle, list[str]]:
    """Build the bundle that a recipe asks for.

    Args:
        recipe: What to build.
        out: The bundle's folder, which appears only once it is complete.
        force: Replace ``out`` if it exists.
        progress: Told how far each step is.

    Returns:
        The bundle, and warnings a user should read, one line each.

    Raises:
        CnnEdgeError: anything that stops it; nothing is left half-written.
    """
    out = Path(out)
    if out.exists() and not force:  # before minutes of work, not after
        raise CnnEdgeError(f"{out} exists already", fix="choose another folder or pass --force")
    source, warnings = resolve(recipe)
    with atomic_folder(out, overwrite=force) as folder:
        manifest = _build(source, recipe, folder, warnings, progress)
        (folder / MANIFEST).write_text(manifest.to_json(), encoding="utf-8")  # last: it completes
    return open_bundle(out), warnings


def _build(
    source: Source, recipe: Recipe, folder: Path, warnings: list[str], progress: Progress
) -> Manifest:
    """Write everything of the bundle but its manifest, which is returned."""
    exported, graphs, calibration = _convert(source, recipe, folder, warnings, progress)
    # From here on what is measured is the files, as a receiver will load them.
    for graph in graphs:
        write_onnx(graph.model, folder / graph.file)
    reference = _reference(source, exported.emitted)
    contestants = _open(graphs, source, recipe, folder)
    run: dict[str, Answer] = {name: opened.answer for name, opened in contestants.items()}

    test = _test_split(source, recipe)
    comparisons, answers = compare_variants(run, reference, test, source.image, progress=progress)
    bench = _measure(source, recipe, test, graphs, contestants, progress)
    files = write_selftest(
        folder,
        [test.items[i] for i in range(min(GOLDEN, len(test)))],
        source.image,
        reference,
        run,
        {name: opened.fingerprint for name, opened in contestants.items()},
    )
    if answers.size <= MOST_RECORDED_ANSWERS:
        np.savez_compressed(folder / REFERENCE_ANSWERS, answers=answers)
        files.append(REFERENCE_ANSWERS)
    write_labels(folder, source.labels)
    files.append(LABELS)

    latency = {m.name: _summary(m) for m in bench.measurements}
    judged = source.weights != "random" and source.may_calibrate
    variants = []
    for graph in graphs:
        found, achieved = comparisons[graph.name], achieved_precision(graph.model)
        verdict = judge(
            found,
            precision=graph.precision,
            max_drop=recipe.max_drop,
            trained=judged,
            achieved=achieved["macs"],
        )
        variants.append(
            Variant(
                name=graph.name,
                file=graph.file,
                sha256=sha256(folder / graph.file),
                bytes=(folder / graph.file).stat().st_size,
                precision=graph.precision,
                target=graph.target,
                achieved=achieved,
                accuracy=found.to_dict(),
                verdict=asdict(verdict),
                provider=contestants[graph.name].provider,
                latency=latency.get(graph.name),
            )
        )
    alone = compare(answers, answers, test.targets)
    parameters = int(source.model.count_params())
    manifest = Manifest(
        name=source.name,
        model={
            "origin": source.origin,
            "weights": source.weights,
            "weights_sha256": weights_digest(
                {v.path: v.numpy() for v in source.model.trainable_variables}
            ),
            "parameters": parameters,
            "emits": exported.emitted,
        },
        image=source.image,
        normalization=source.normalization,
        input=recipe.input,
        labels=source.labels,
        variants=tuple(variants),
        reference={
            "runtime": "keras",
            "top1": alone.top1,
            "top5": alone.top5,
            "bytes": 4 * parameters,
            "latency": latency["keras"],
        },
        data={
            "source": source.dataset.spec,
            "test_images": len(test),
            "test_sha256": test.digest(),
        },
        calibration=calibration,
        machine=this_machine().to_dict(),
        tools=tool_versions(),
        max_drop=recipe.max_drop,
    )
    (folder / REPORT).write_text(render_report(manifest, bench), encoding="utf-8")
    files.append(REPORT)
    return replace(manifest, files=describe_files(folder, files))


def _convert(
    source: Source, recipe: Recipe, folder: Path, warnings: list[str], progress: Progress
) -> tuple[ExportedGraph, list[Graph], dict[str, Any]]:
    """Convert the model to the graphs that the recipe asks for; FP32 is always the first."""
    precisions = _precisions(recipe, source, warnings)
    exported = export_onnx(
        source.model,
        name=source.name,
        labels=source.labels,
        image=source.image,
        normalization=source.normalization,
        input_dtype=recipe.input,
    )
    graphs = [Graph("fp32", "fp32", "any", exported.model)]
    if "fp16" in precisions:
        half = to_float16(exported.model)
        if half.clipped:
            warnings.append(f"FP16 cannot hold, and clips, weights of {', '.join(half.clipped)}")
        graphs.append(Graph("fp16", "fp16", "any", half.model))
    calibration: dict[str, Any] = {}
    if "int8" in precisions:
        quantized, calibration = _quantize(source, recipe, exported.model, folder, progress)
        graphs += quantized
    return exported, graphs, calibration


@dataclass(frozen=True)
class _Opened:
    """A variant as loaded from its file: uint8 batches in, whatever its graph takes."""

    answer: Answer
    fingerprint: Callable[[np.ndarray], Fingerprints]
    provider: str


def _open(graphs: list[Graph], source: Source, recipe: Recipe, folder: Path) -> dict[str, _Opened]:
    from cnnedge.backends.onnxruntime import open_session

    def as_taken(batch: np.ndarray) -> np.ndarray:
        return normalize(batch, source.normalization) if recipe.input == "float32" else batch

    def open_one(path: Path) -> _Opened:
        session = open_session(path)
        return _Opened(
            lambda batch: session(as_taken(batch)),
            lambda batch: layer_fingerprints(path, as_taken(batch)),
            session.provider,
        )

    return {graph.name: open_one(folder / graph.file) for graph in graphs}


def _reference(source: Source, emitted: str) -> Answer:
    """Return the Keras reference: uint8 batch → probabilities."""
    from cnnedge.backends.keras import predict

    def answer(batch: np.ndarray) -> np.ndarray:
        scores = predict(source.model, batch, source.normalization)
        return _softmax(scores) if emitted == "logits" else scores

    return answer


def _measure(
    source: Source,
    recipe: Recipe,
    test: Split,
    graphs: list[Graph],
    opened: dict[str, _Opened],
    progress: Progress,
) -> Benchmark:
    """Measure the latency of every variant and of Keras on one test image, interleaved."""
    from cnnedge.backends.keras import compiled

    image = next(iter(test.batches(source.image, 1)))[0]
    keras = compiled(source.model, source.normalization)
    contestants: dict[str, Callable[[], Any]] = {"keras": partial(keras, image)}
    for graph in graphs:
        if graph.target != "trt":  # a CPU would emulate it: its speed there means nothing
            contestants[graph.name] = partial(opened[graph.name].answer, image)
    seconds = recipe.bench_seconds
    measured = measure_interleaved(contestants, seconds=seconds, progress=progress)
    return Benchmark(tuple(measured), "keras", environment(None))


def _quantize(
    source: Source, recipe: Recipe, model: Any, folder: Path, progress: Progress
) -> tuple[list[Graph], dict[str, Any]]:
    """Build the INT8 graphs of both families of runtimes from one calibration."""
    machine = this_machine()
    cpu = CPU if machine.has_int8_dot_product else CPU_REDUCED
    plans = {"int8": make_plan(model, cpu), "int8-trt": make_plan(model, TRT)}
    split = source.dataset.calibration.take(recipe.calibration_images, seed=recipe.seed)
    tensors = list(dict.fromkeys(name for plan in plans.values() for name in plan.tensors))
    takes_float = recipe.input == "float32"
    batches = (
        normalize(batch, source.normalization) if takes_float else batch
        for batch, _ in split.batches(source.image, 8)
    )
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        ranges = collect_ranges(
            model, tensors, batches, Path(scratch), total=len(split), progress=progress
        )
    graphs = []
    for name, plan in plans.items():
        quantized = quantize(model, plan, ranges)
        graphs.append(Graph(name, "int8", plan.target.name, quantized.model))
    calibration = {
        "source": source.dataset.spec,
        "split": split.name,
        "images": ranges.images,
        "sha256": split.digest(),
        "method": "minmax",
        "weight_limit": cpu.weight_limit,
        "kept_float": {name: dict(plan.skipped) for name, plan in plans.items()},
    }
    return graphs, calibration


def _precisions(recipe: Recipe, source: Source, warnings: list[str]) -> list[str]:
    if source.may_calibrate or (recipe.precision and "int8" not in recipe.precision):
        return list(dict.fromkeys(["fp32", *(recipe.precision or ("fp16", "int8"))]))
    if recipe.precision:
        raise DataError(
            "int8 needs images of the model's own kind to calibrate on",
            fix="pass --data FOLDER, or --precision fp32,fp16",
        )
    warnings.append(
        "no --data: leaving INT8 out (it needs the model's own images to calibrate on) and "
        "checking parity on the embedded digits"
    )
    return ["fp32", "fp16"]


def _test_split(source: Source, recipe: Recipe) -> Split:
    limit = recipe.test_images
    if limit is None and (source.weights == "random" or not source.may_calibrate):
        limit = RANDOM_TEST_IMAGES
    test = source.dataset.test
    return test if limit is None or limit >= len(test) else test.take(limit, seed=recipe.seed)


def _summary(measurement: Measurement) -> dict[str, Any]:
    summary = measurement.to_dict()
    del summary["samples_ms"], summary["name"]  # the raw samples are in the report
    return summary


def _softmax(logits: np.ndarray) -> np.ndarray:
    exponent = np.exp(logits - logits.max(axis=1, keepdims=True))
    return exponent / exponent.sum(axis=1, keepdims=True)
