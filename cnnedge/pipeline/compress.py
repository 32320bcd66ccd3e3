"""Compression within the flow: what it is asked for, the machine it is for, and what it came to.

reference .keras ──► compress ──► smaller .keras ──► export ──► quantize ──► benchmark
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from cnnedge.benchmark.environment import environment
from cnnedge.benchmark.interleaved import measure_watched
from cnnedge.benchmark.load import Watch
from cnnedge.comparison import Comparison, compare
from cnnedge.compress import (
    Candidate,
    CompressOptions,
    CompressResult,
    Platform,
    compress,
    resumed_multiple,
)
from cnnedge.compress.front import Point, draw_front, write_front
from cnnedge.compress.outcome import RecoveryEpoch
from cnnedge.data import Dataset
from cnnedge.data.split import refuse_overlap
from cnnedge.errors import DataError, ModelError
from cnnedge.files import require_keras_file, scratch_folder, write_text
from cnnedge.graph.write import write_onnx
from cnnedge.head import PROBABILITIES
from cnnedge.measurement import Measurement
from cnnedge.pipeline.hardware import (
    IMAGES,
    Granularity,
    measure_granularity,
    split_is_faster,
    timer,
)
from cnnedge.pipeline.int8 import calibrate_source, calibration_split
from cnnedge.progress import Progress, silent
from cnnedge.protocols import Runner
from cnnedge.recipe import Recipe
from cnnedge.source import Source, resolve


@dataclass(frozen=True)
class Version:
    """One network in one form, measured.

    Attributes:
        network: "reference", "compressed", or the point of a front: "macs 0.25".
        form: "keras", "fp32" or "int8": the model itself, or its ONNX graph.
        bytes: Of the ONNX file; of a Keras model four for each parameter.
        latency: Interleaved with all others, batch 1.
        comparison: Its answers to the test images against the Keras reference's; None where there
            are no images that it knows.
    """

    network: str
    form: str
    bytes: int
    latency: Measurement
    comparison: Comparison | None

    def to_dict(self) -> dict[str, Any]:
        """Return it as JSON-able data."""
        comparison = None if self.comparison is None else self.comparison.to_dict()
        return asdict(self) | {"latency": self.latency.to_dict(), "comparison": comparison}


@dataclass(frozen=True)
class CompressReport:
    """What a compression came to, and how it was measured.

    Attributes:
        result: The networks.
        granularity: What the channels were rounded by; None where the user said.
        versions: The reference and the compressed network in every form.
        environment: Machine, tools, threads, what others took of the machine, and `doubt`: why
            the latencies decide nothing, or None.
        test_images: How many accuracy was measured on.
        files: What was written, the `.keras` file first.
    """

    result: CompressResult
    granularity: Granularity | None
    versions: tuple[Version, ...]
    environment: dict[str, Any]
    test_images: int
    files: tuple[Path, ...]

    def find(self, network: str, form: str) -> Version | None:
        """Return a version, or None."""
        return next((v for v in self.versions if (v.network, v.form) == (network, form)), None)

    def to_dict(self) -> dict[str, Any]:
        """Return it as JSON-able data."""
        return {
            **self.result.to_dict(),
            "granularity": None if self.granularity is None else asdict(self.granularity),
            "versions": [version.to_dict() for version in self.versions],
            "environment": self.environment,
            "test_images": self.test_images,
            "files": [str(path) for path in self.files],
        }


def compress_model(
    recipe: Recipe,
    out: Path | str,
    options: CompressOptions,
    *,
    data_free: bool = False,
    multiple: int | None = None,
    resume: bool = False,
    progress: Progress = silent,
    on_data: Callable[[Dataset], None] = lambda dataset: None,
    on_epoch: Callable[[RecoveryEpoch], None] = lambda report: None,
    on_round: Callable[[Candidate], None] = lambda candidate: None,
) -> tuple[CompressReport, list[str]]:
    """Compress the model that a recipe names, and measure what came of it beside the reference.

    Args:
        recipe: The model, its data, and how it is quantized.
        out: The file to write, `G.keras`. Beside it: `G.compress.json`; for a front also
            `G.pareto.json`, `.csv` and `.png`, and `G.macs-X.keras` for each point.
        options: How far to go.
        data_free: Prune by the weights alone, and judge nothing.
        multiple: What to round numbers of channels to; None: measure it.
        resume: Go on from the checkpoint beside ``out``.
        progress: Told how far each part is.
        on_data: Told of the data once it is open.
        on_epoch: Told of every epoch of fine-tuning.
        on_round: Told of every round.

    Returns:
        The report, and warnings a user should read, one line each.

    Raises:
        CnnEdgeError: as `resolve` and `compress`, or the files cannot be written.

    Examples:
        >>> report, warnings = cnnedge.compress_model(
        ...     cnnedge.make_recipe(model="digits.keras", bench_seconds=0.1),
        ...     "small.keras",
        ...     cnnedge.CompressOptions(macs=0.5),
        ...     data_free=True,  # by the weights alone: it need not be trained again
        ...     multiple=4,
        ... )
        >>> report.result.kept.macs < 0.5 * report.result.reference.macs
        True
    """
    out = Path(out)
    require_keras_file(out)
    source, warnings = resolve(recipe, without_data=data_free, progress=progress)
    if source.note is None:
        raise ModelError(
            f"{source.origin} has no trained weights to go by",
            fix="train it first, or give your own .keras file",
        )
    if not data_free:
        if not source.may_calibrate:
            raise DataError(
                f"{source.origin} does not say what it was trained on",
                fix="pass --data FOLDER, or --data-free to prune by the weights alone",
            )
        on_data(source.dataset)
        # INT8 is calibrated at the end, and that is too late to find this out.
        refuse_overlap(calibration_split(source, recipe), source.dataset.test)
    source.to_onnx()  # if it cannot be exported, now is the time to say so
    granularity = None
    if multiple is None and resume:
        multiple = resumed_multiple(out)
    if multiple is None:
        watch = Watch()
        with watch.watching():
            granularity = measure_granularity(progress)
        multiple = granularity.multiple
        if watch.busy is not None:
            warnings.append(
                f"channels are rounded to multiples of {multiple}, which was measured though "
                f"{watch.busy}; --multiple says it instead"
            )
    seen = None if data_free else _first_images(source)
    platform = Platform(
        multiple, timer(source, seen) if options.latency is not None else None, split_is_faster
    )
    options = replace(options, seed=source.seed, max_drop=recipe.max_drop)
    result = compress(
        source.model,
        source.note,
        None if data_free else source.dataset,
        out,
        options,
        platform,
        emits=source.emits or PROBABILITIES,
        held_to=source.reference(),
        resume=resume,
        progress=progress,
        on_epoch=on_epoch,
        on_round=on_round,
    )
    if result.guessing is not None:
        warnings.append(
            f"{source.name} itself is no better than guessing: {result.guessing}; so no table here "
            "says anything of accuracy: see --preprocess, the order of --labels, and its training"
        )
    report = _measure(source, recipe, result, granularity, data_free, progress)
    _write(report)
    return report, warnings + [f"kept as it is: {note}" for note in result.reference.notes]


def _first_images(source: Source) -> np.ndarray:
    return next(iter(source.dataset.calibration.batches(source.image, IMAGES)))[0]


def _measure(
    source: Source,
    recipe: Recipe,
    result: CompressResult,
    granularity: Granularity | None,
    data_free: bool,
    progress: Progress,
) -> CompressReport:
    """Export every network in every form, and measure all of them in one run."""
    from cnnedge.backends.keras import CompiledReference, load_model
    from cnnedge.backends.onnxruntime import open_session

    networks = {"reference": source.model}
    if result.options.pareto:
        for point, share in zip(result.points, _shares(result.options), strict=True):
            networks[f"macs {share:g}"] = load_model(point)[0]
    else:
        networks["compressed"] = load_model(result.path)[0]
    limit = recipe.test_images
    test = source.dataset.test if limit is None else source.dataset.test.take(limit, seed=0)
    image = next(iter(test.batches(source.image, 1)))[0]
    forms = ("keras", "fp32") if data_free else ("keras", "fp32", "int8")
    answers: dict[tuple[str, str], Runner] = {}
    sizes: dict[tuple[str, str], int] = {}
    with scratch_folder() as folder:
        for name, network in networks.items():
            own = replace(source, model=network)
            graph = own.to_onnx().model
            is_own = name == "reference"
            of, position = (source.saved, source.position) if is_own else (network, 0)
            answers[name, "keras"] = CompiledReference(
                of, source.normalization, source.emits, output=position
            )
            sizes[name, "keras"] = 4 * int(network.count_params())
            graphs = {"fp32": graph}
            if "int8" in forms:
                seen = calibrate_source(own, recipe, graph, test, folder, progress)
                graphs["int8"] = seen.plain("int8").model
            for form, model in graphs.items():
                path = folder / f"{len(answers)}.onnx"
                write_onnx(model, path)
                answers[name, form] = open_session(path)
                sizes[name, form] = path.stat().st_size
        calls = {f"{n}/{form}": partial(answers[n, form], image) for n, form in answers}
        seconds = recipe.bench_seconds
        measured, conditions = measure_watched(calls, seconds=seconds, progress=progress)
        compared: dict[tuple[str, str], Comparison] = {}
        if not data_free:
            compared = _compare(answers, source, test, progress)
    versions = tuple(
        Version(*key, sizes[key], latency, compared.get(key))
        for key, latency in zip(answers, measured, strict=True)
    )
    files = [result.path, result.path.with_suffix(".compress.json")]
    if result.options.pareto:
        front = [result.path.with_suffix(f".pareto.{kind}") for kind in ("json", "csv", "png")]
        files += [*result.points, *front]
    images = 0 if data_free else len(test)
    described = environment(None) | conditions
    return CompressReport(result, granularity, versions, described, images, tuple(files))


def _compare(
    answers: dict[tuple[str, str], Runner],
    source: Source,
    test: Any,
    progress: Progress,
) -> dict[tuple[str, str], Comparison]:
    """Hold every version's answers against the Keras reference's, on the same images."""
    found: dict[tuple[str, str], list[np.ndarray]] = {key: [] for key in answers}
    done = 0
    for images, _ in test.batches(source.image, 32):
        for key, answer in answers.items():
            found[key].append(answer(images))
        done += len(images)
        progress("answers", done, len(test))
    whole = {key: np.concatenate(parts) for key, parts in found.items()}
    reference = whole["reference", "keras"]
    return {key: compare(own, reference, test.targets) for key, own in whole.items()}


def _shares(options: CompressOptions) -> list[float]:
    return sorted(options.pareto, reverse=True)


def _write(report: CompressReport) -> None:
    path = report.result.path
    document = json.dumps(report.to_dict(), indent=1, default=str)
    write_text(path.with_suffix(".compress.json"), document + "\n")
    if not report.result.options.pareto:
        return
    points = []
    for version in report.versions:
        if version.form == "keras" or version.comparison is None:
            continue
        points.append(
            Point(
                network=version.network,
                form=version.form,
                latency_ms=1e3 * version.latency.median,
                bytes=version.bytes,
                top1=version.comparison.top1,
                drop_points=version.comparison.drop,
                drop_interval_points=version.comparison.interval,
            )
        )
    title = f"{path.stem}: accuracy, latency and size, {report.test_images} test images"
    write_front(path.with_suffix(".pareto.json"), path.with_suffix(".pareto.csv"), points)
    draw_front(path.with_suffix(".pareto.png"), title, points, report.result.options.max_drop)
