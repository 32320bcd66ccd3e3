"""What an export writes into the folder that becomes the bundle."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cnnedge.benchmark.environment import environment
from cnnedge.benchmark.interleaved import Benchmark, measure_watched
from cnnedge.bundle import (
    LABELS,
    REPORT,
    Manifest,
    Variant,
    describe_files,
    weights_digest,
    write_labels,
)
from cnnedge.comparison import WEIGHT_ONLY, Comparison, Verdict, compare
from cnnedge.data import Split
from cnnedge.errors import DataError
from cnnedge.files import sha256
from cnnedge.graph.fingerprint import layer_fingerprints
from cnnedge.graph.float16 import to_float16
from cnnedge.graph.precision import achieved_precision
from cnnedge.graph.write import serialize, write_onnx
from cnnedge.head import require_head
from cnnedge.machine import this_machine, tool_versions
from cnnedge.manifest import Precision, TargetName
from cnnedge.measurement import Measurement
from cnnedge.pipeline.gate import Gate
from cnnedge.pipeline.int8 import (
    Calibrated,
    calibrate_source,
    describe_quantization,
    guard_variant,
)
from cnnedge.pipeline.limits import measure_limits
from cnnedge.pipeline.reference import answers_in_float32, moved_reference, weights_not_finite
from cnnedge.progress import Progress
from cnnedge.protocols import Runner
from cnnedge.quantize import NoInt8Error, brief, quantize_dense_weights
from cnnedge.recipe import Recipe
from cnnedge.report import render_report
from cnnedge.runtime.uint8 import as_taken, scaling_before, taking_uint8
from cnnedge.sections import DataRecord, Latency, ModelRecord, ReferenceRecord
from cnnedge.selftest import REFERENCE_ANSWERS, Fingerprints, golden_images, write_selftest
from cnnedge.source import Source
from cnnedge.verify import compare_variants

if TYPE_CHECKING:
    import onnx_ir as ir

RANDOM_TEST_IMAGES = 32
# The reference's answers travel with the bundle while they stay small: 8 MB of float32.
MOST_RECORDED_ANSWERS = 2_000_000


@dataclass(frozen=True)
class Graph:
    """One variant on its way into the bundle."""

    name: str
    precision: Precision
    target: TargetName
    model: ir.Model
    quantization: Mapping[str, Any] | None = None

    @property
    def file(self) -> str:
        """Its file's name in the bundle."""
        return f"model.{self.name}.onnx"


@dataclass(frozen=True)
class _Opened:
    """A variant as loaded from its file: uint8 batches in, whatever its graph takes."""

    answer: Runner
    fingerprint: Callable[[np.ndarray], Fingerprints]
    provider: str


@dataclass(frozen=True)
class _Built:
    """A variant in its bundle, with what was found of it; replaced as a whole."""

    graph: Graph
    opened: _Opened
    comparison: Comparison
    verdict: Verdict


def write_bundle(
    source: Source, recipe: Recipe, folder: Path, warnings: list[str], progress: Progress
) -> Manifest:
    """Write everything of the bundle but its manifest, which is returned."""
    test = _test_split(source, recipe)
    graphs, calibrated = _convert(source, recipe, test, folder, warnings, progress)
    # From here on what is measured is the files, as a receiver will load them.
    opened = [_write_and_open(graph, source, recipe, folder) for graph in graphs]
    comparisons, answers, limits = _compare(source, test, graphs, opened, progress)
    gate = Gate(source, recipe, test, answers)
    warnings += gate.warnings
    variants = []
    for graph, loaded, comparison in zip(graphs, opened, comparisons, strict=True):
        verdict = gate.judge(graph.precision, graph.model, comparison)
        variants.append(_Built(graph, loaded, comparison, verdict))
    if calibrated is not None and recipe.guard:
        variants = [_mended(one, calibrated, gate, folder, progress) for one in variants]
    bench = _measure(source, recipe, test, variants, progress)
    files = _write_selftest(source, test, variants, answers, limits, folder)
    manifest = _describe(gate, variants, bench, calibrated, folder)
    (folder / REPORT).write_text(render_report(manifest, bench), encoding="utf-8")
    return replace(manifest, files=describe_files(folder, [*files, REPORT]))


def _compare(
    source: Source, test: Split, graphs: list[Graph], opened: list[_Opened], progress: Progress
) -> tuple[list[Comparison], np.ndarray, dict[str, float]]:
    """Hold every variant's answers to the test images against the reference's.

    Returns:
        A comparison for each, with the limit of its parity; the reference's answers, float32
        ``[N, classes]``; and the limits by precision.
    """
    found, answers = compare_variants(
        {graph.name: one.answer for graph, one in zip(graphs, opened, strict=True)},
        source.reference(),
        test,
        source.image,
        who="the model itself" + weights_not_finite(source.model),
        progress=progress,
    )
    require_head(answers, source.emits, name=source.name, rounding=source.rounding)
    rounds_as = source.rounds_as
    limits = measure_limits(
        moved_reference(source),
        test,
        source.image,
        answers if rounds_as is None else answers_in_float32(source, test),
        {graph.precision: found[graph.name] for graph in graphs},
        progress,
        rounds_as,
    )
    limited = [
        replace(found[graph.name], limit=limits.get(graph.precision), rounds_as=rounds_as)
        for graph in graphs
    ]
    return limited, answers, limits


def _write_selftest(
    source: Source,
    test: Split,
    variants: list[_Built],
    answers: np.ndarray,
    limits: Mapping[str, float],
    folder: Path,
) -> list[str]:
    """Write the self-test, the reference's answers where they are small, and the labels."""
    files = write_selftest(
        folder,
        [test.items[i] for i in golden_images(test, answers)],
        source.image,
        source.reference(),
        {one.graph.name: one.opened.answer for one in variants},
        {one.graph.name: one.opened.fingerprint for one in variants},
        limits,
    )
    if answers.size <= MOST_RECORDED_ANSWERS:
        np.savez_compressed(folder / REFERENCE_ANSWERS, answers=answers)
        files.append(REFERENCE_ANSWERS)
    write_labels(folder, source.labels)
    return [*files, LABELS]


def _describe(
    gate: Gate,
    variants: list[_Built],
    bench: Benchmark,
    calibrated: Calibrated | None,
    folder: Path,
) -> Manifest:
    """Return the manifest, its list of other files aside."""
    source, recipe, test = gate.source, gate.recipe, gate.test
    latency = {m.name: _summary(m, bench.doubt) for m in bench.measurements}
    alone = compare(gate.expected, gate.expected, test.targets)
    parameters = int(source.model.count_params())
    weights = {v.path: v.numpy() for v in source.model.trainable_variables}
    return Manifest(
        name=source.name,
        model=ModelRecord(
            origin=source.origin,
            weights=source.weights,
            weights_sha256=weights_digest(weights),
            parameters=parameters,
            emits=source.emits,
            output=source.output,
            computes_in=source.computes_in or ("float32",),
        ),
        image=source.image,
        normalization=source.normalization,
        input=recipe.input,
        labels=source.labels,
        variants=tuple(
            _describe_variant(one, gate, bench, latency.get(one.graph.name), folder)
            for one in variants
        ),
        reference=ReferenceRecord(
            top1=alone.top1,
            top5=alone.top5,
            guessing=gate.guessing,
            bytes=4 * parameters,
            latency=latency["keras"],
        ),
        data=DataRecord(
            source=source.dataset.spec, test_images=len(test), test_sha256=test.digest()
        ),
        calibration=None if calibrated is None else calibrated.describe(source.dataset.spec),
        machine=this_machine(),
        tools=tool_versions(),
        max_drop=recipe.max_drop,
        recipe=recipe.to_dict(),
    )


def _describe_variant(
    one: _Built, gate: Gate, bench: Benchmark, latency: Latency | None, folder: Path
) -> Variant:
    graph, path = one.graph, folder / one.graph.file
    return Variant(
        name=graph.name,
        file=graph.file,
        sha256=sha256(path),
        bytes=path.stat().st_size,
        precision=graph.precision,
        target=graph.target,
        achieved=achieved_precision(graph.model),
        accuracy=one.comparison,
        verdict=one.verdict,
        provider=one.opened.provider,
        latency=latency,
        quantization=graph.quantization,
        recommendation=gate.recommend(bench, graph.name, graph.precision),
    )


def _convert(
    source: Source,
    recipe: Recipe,
    test: Split,
    folder: Path,
    warnings: list[str],
    progress: Progress,
) -> tuple[list[Graph], Calibrated | None]:
    """Convert the model to the graphs that the recipe asks for; FP32 is always the first."""
    precisions = _precisions(recipe, source, warnings)
    exported = source.to_onnx(recipe.input).model
    graphs = [Graph("fp32", "fp32", "any", exported)]
    if "fp16" in precisions:
        half = to_float16(exported)
        kept = dict(half.kept_float)
        if kept:
            warnings.append(f"fp16: {len(kept)} operations stay FP32 ({brief(kept)})")
        graphs.append(
            Graph("fp16", "fp16", "any", half.model, {"kept_float": kept} if kept else None)
        )
    for precision in (p for p in precisions if p in WEIGHT_ONLY):
        bits = 8 if precision == "int8-weight" else 4
        found = quantize_dense_weights(exported, bits)
        described = {"layers": list(found.layers), "kept_float": found.skipped}
        graphs.append(Graph(precision, precision, "cpu", found.model, described))
    calibrated = None
    if "int8" in precisions:
        try:
            with tempfile.TemporaryDirectory(dir=folder) as scratch:
                calibrated = calibrate_source(
                    source, recipe, exported, test, Path(scratch), progress
                )
        except NoInt8Error as error:
            if recipe.precision is not None:  # it was asked for
                raise
            warnings.append(f"leaving INT8 out: {error.what}")
            return graphs, None
        warnings += [f"leaving {n} out: {why}" for n, why in calibrated.refused.items()]
        for name, plan in calibrated.plans.items():
            plain = calibrated.plain(name)
            described = describe_quantization(plain, calibrated.method, None)
            graphs.append(Graph(name, "int8", plan.target.name, plain.model, described))
    return graphs, calibrated


def _mended(
    one: _Built, calibrated: Calibrated, gate: Gate, folder: Path, progress: Progress
) -> _Built:
    """Return an INT8 variant that holds its gate, or the best that could be made of it."""
    from cnnedge.backends.onnxruntime import open_session

    lost_too_much = one.comparison.drop > gate.recipe.max_drop or one.comparison.not_finite > 0
    if not (one.graph.precision == "int8" and one.verdict.failed and lost_too_much):
        return one

    def evaluate(model: ir.Model) -> tuple[Comparison, Verdict]:
        session = open_session(serialize(model))
        comparison = gate.compare(taking_uint8(session, scaling))
        return comparison, gate.judge(one.graph.precision, model, comparison)

    scaling = scaling_before(gate.recipe.input, gate.source.normalization)
    plain = one.comparison, one.verdict
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        guarded = guard_variant(
            calibrated, one.graph.name, plain, evaluate, Path(scratch), progress
        )
    described = describe_quantization(guarded.graph, guarded.method, guarded)
    graph = replace(one.graph, model=guarded.graph.model, quantization=described)
    opened = _write_and_open(graph, gate.source, gate.recipe, folder)
    comparison = gate.compare(opened.answer)
    return _Built(graph, opened, comparison, gate.judge(graph.precision, graph.model, comparison))


def _write_and_open(graph: Graph, source: Source, recipe: Recipe, folder: Path) -> _Opened:
    from cnnedge.backends.onnxruntime import open_session

    path, scaling = folder / graph.file, scaling_before(recipe.input, source.normalization)
    write_onnx(graph.model, path)
    session = open_session(path)
    return _Opened(
        taking_uint8(session, scaling),
        lambda batch: layer_fingerprints(path, as_taken(batch, scaling)),
        session.provider,
    )


def _measure(
    source: Source,
    recipe: Recipe,
    test: Split,
    variants: list[_Built],
    progress: Progress,
) -> Benchmark:
    """Measure the latency of every variant and of Keras on one test image, interleaved."""
    from cnnedge.backends.keras import compiled

    image = next(iter(test.batches(source.image, 1)))[0]
    keras = compiled(source.model, source.normalization)
    contestants: dict[str, Callable[[], Any]] = {"keras": partial(keras, image)}
    for one in variants:
        if one.graph.target != "trt":  # a CPU would emulate it: its speed there means nothing
            contestants[one.graph.name] = partial(one.opened.answer, image)
    measured, load = measure_watched(contestants, seconds=recipe.bench_seconds, progress=progress)
    precisions = {one.graph.name: one.graph.precision for one in variants}
    return Benchmark(tuple(measured), "keras", environment(None) | load, precisions)


def _precisions(recipe: Recipe, source: Source, warnings: list[str]) -> list[Precision]:
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
    return test if limit is None or limit >= len(test) else test.take(limit, seed=recipe.seed or 0)


def _summary(measurement: Measurement, doubt: str | None) -> Latency:
    """Return what the manifest has of a measurement; the raw samples are in the report."""
    told = measurement.to_dict()
    return Latency(
        median_ms=told["median_ms"],
        p90_ms=told["p90_ms"],
        p99_ms=told["p99_ms"],
        n=told["n"],
        images=told["images"],
        gpu=told.get("gpu"),
        doubt=doubt,
    )
