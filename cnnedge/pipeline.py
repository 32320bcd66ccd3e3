"""The whole flow as plain calls: Keras model in, verified bundle out.

    train ──► export ──► quantize ──► verify ──► benchmark ──► bundle ──► runtime

Each step is a function of its own module and knows no other step; this page connects them.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
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
from cnnedge.data import Dataset, Split, open_source
from cnnedge.errors import CnnEdgeError, DataError, MissingExtraError, ModelError
from cnnedge.export import classifier_shape, export_onnx
from cnnedge.files import atomic_folder, sha256
from cnnedge.graph.fingerprint import layer_fingerprints
from cnnedge.graph.float16 import to_float16
from cnnedge.graph.precision import achieved_precision
from cnnedge.graph.write import write_onnx
from cnnedge.image import ImageContract, normalize
from cnnedge.machine import this_machine, tool_versions
from cnnedge.models import MODELS, build
from cnnedge.progress import Progress, silent
from cnnedge.quantize import CPU, CPU_REDUCED, TRT, collect_ranges, make_plan, quantize
from cnnedge.recipe import Recipe
from cnnedge.report import render_report
from cnnedge.result import Measurement, compare, judge
from cnnedge.selftest import GOLDEN, write_selftest
from cnnedge.verify import REFERENCE_ANSWERS, compare_variants

Answer = Callable[[np.ndarray], np.ndarray]
RANDOM_TEST_IMAGES = 32
# The reference's answers travel with the bundle while they stay small: 8 MB of float32.
MOST_RECORDED_ANSWERS = 2_000_000


@dataclass(frozen=True)
class Source:
    """A model to export, with all that a `.keras` file may leave unsaid.

    Attributes:
        model: The ``keras.Model``.
        name: What it is called.
        labels: One per class.
        image: The image contract.
        normalization: What the network wants of its pixels.
        weights: "random", "trained" or "user".
        origin: The file or the built-in model it comes from.
        dataset: Images to calibrate and verify on.
        may_calibrate: Whether that data is the model's own, so that INT8 ranges mean something.
    """

    model: Any
    name: str
    labels: tuple[str, ...]
    image: ImageContract
    normalization: str
    weights: str
    origin: str
    dataset: Dataset
    may_calibrate: bool = True


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


def resolve(recipe: Recipe) -> tuple[Source, list[str]]:
    """Load or build the model that a recipe names, and open the data it is verified on.

    Raises:
        ModelError: there is no such model, or it leaves something unsaid that must be given.
        DataError: the data does not fit the model.
    """
    try:
        from cnnedge.backends.keras import ModelNote, load_model
    except ImportError as error:
        raise MissingExtraError(error.name or "keras", "export", purpose="exporting") from error

    warnings: list[str] = []
    path = Path(recipe.model)
    found = Path(f"{recipe.model}.keras")
    if recipe.model in MODELS and not found.is_file():
        height, width = recipe.image_size or (None, None)
        model = build(
            recipe.model, height=height, width=width, classes=recipe.classes, seed=recipe.seed
        )
        warnings.append(
            f"no trained weights for {recipe.model} (looked for ./{found}): exporting random ones; "
            "parity, size and latency count, accuracy means nothing yet"
        )
        height, width, channels, _ = classifier_shape(model)
        assert height is not None
        assert width is not None
        contract = ImageContract(height, width, channels)
        labels = tuple(f"class {i}" for i in range(recipe.classes))
        dataset = open_source(recipe.data or "digits", seed=recipe.seed)
        normalization = recipe.preprocess or MODELS[recipe.model].normalization
        return Source(
            model, recipe.model, labels, contract, normalization, "random", recipe.model, dataset
        ), warnings
    if recipe.model in MODELS:
        path = found
    elif path.suffix != ".keras":
        known = ", ".join(MODELS)
        raise ModelError(
            f"no model {recipe.model!r}", fix=f"give a .keras file, a recipe or one of: {known}"
        )
    model, note = load_model(path)
    if note is None:
        note = _note_of_user_model(model, path, recipe)
    spec = recipe.data or note.data
    dataset = open_source(spec or "digits", seed=recipe.seed)
    labels = _labels(recipe, note.labels, dataset if spec else None, model)
    if spec is not None and dataset.labels != labels:
        raise DataError(
            f"{spec} has the classes {_brief(dataset.labels)}, the model has {_brief(labels)}",
            fix="give the data that the model was trained on, or its labels with --labels",
        )
    image = replace(note.image, resize=recipe.resize or note.image.resize)
    normalization = recipe.preprocess or note.normalization
    name = note.model if isinstance(note, ModelNote) else path.stem
    return Source(
        model,
        name,
        labels,
        image,
        normalization,
        note.weights if spec is not None or note.weights == "random" else "user",
        path.name,
        dataset,
        may_calibrate=spec is not None,
    ), warnings


def _build(
    source: Source, recipe: Recipe, folder: Path, warnings: list[str], progress: Progress
) -> Manifest:
    """Write everything of the bundle but its manifest, which is returned."""
    from cnnedge.backends.keras import predict
    from cnnedge.backends.onnxruntime import open_session

    precisions = _precisions(recipe, source, warnings)
    progress("export", 0, len(precisions))
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

    # From here on what is measured is the files, as a receiver will load them.
    for graph in graphs:
        write_onnx(graph.model, folder / graph.file)

    def as_graph_takes(batch: np.ndarray) -> np.ndarray:
        return normalize(batch, source.normalization) if recipe.input == "float32" else batch

    def reference(batch: np.ndarray) -> np.ndarray:
        answers = predict(source.model, batch, source.normalization)
        return _softmax(answers) if exported.emitted == "logits" else answers

    sessions = {graph.name: open_session(folder / graph.file) for graph in graphs}
    run: dict[str, Answer] = {
        name: lambda batch, session=session: session(as_graph_takes(batch))  # type: ignore[misc]
        for name, session in sessions.items()
    }
    test = _test_split(source, recipe)
    comparisons, answers = compare_variants(run, reference, test, source.image, progress=progress)
    trained = source.weights != "random"
    verdicts = {
        graph.name: judge(
            comparisons[graph.name],
            precision=graph.precision,
            max_drop=recipe.max_drop,
            trained=trained and source.may_calibrate,
        )
        for graph in graphs
    }
    image = next(iter(test.batches(source.image, 1)))[0]
    feed = as_graph_takes(image)
    contestants: dict[str, Callable[[], Any]] = {"keras": _compiled(source, image)}
    contestants |= {
        name: lambda session=session: session(feed)  # type: ignore[misc]
        for name, session in sessions.items()
    }
    measured = measure_interleaved(contestants, seconds=recipe.bench_seconds, progress=progress)
    latencies = {measurement.name: measurement for measurement in measured}

    files = write_selftest(
        folder,
        [test.items[i] for i in range(min(GOLDEN, len(test)))],
        source.image,
        reference,
        run,
        {
            graph.name: lambda batch, graph=graph: layer_fingerprints(  # type: ignore[misc]
                folder / graph.file, as_graph_takes(batch)
            )
            for graph in graphs
        },
    )
    if answers.size <= MOST_RECORDED_ANSWERS:
        np.savez_compressed(folder / REFERENCE_ANSWERS, answers=answers)
        files.append(REFERENCE_ANSWERS)
    write_labels(folder, source.labels)
    files.append(LABELS)

    keras_alone = compare(answers, answers, test.targets)
    manifest = Manifest(
        name=source.name,
        model={
            "origin": source.origin,
            "weights": source.weights,
            "weights_sha256": weights_digest(
                {v.path: v.numpy() for v in source.model.trainable_variables}
            ),
            "parameters": int(source.model.count_params()),
            "emits": exported.emitted,
        },
        image=source.image,
        normalization=source.normalization,
        input=recipe.input,
        labels=source.labels,
        variants=tuple(
            Variant(
                name=graph.name,
                file=graph.file,
                sha256=sha256(folder / graph.file),
                bytes=(folder / graph.file).stat().st_size,
                precision=graph.precision,
                target=graph.target,
                achieved=achieved_precision(graph.model),
                accuracy=comparisons[graph.name].to_dict(),
                verdict=asdict(verdicts[graph.name]),
                provider=sessions[graph.name].provider,
                latency=_summary(latencies[graph.name]),
            )
            for graph in graphs
        ),
        reference={
            "runtime": "keras",
            "top1": keras_alone.top1,
            "top5": keras_alone.top5,
            "bytes": 4 * int(source.model.count_params()),
            "latency": _summary(latencies["keras"]),
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
        files={},
    )
    bench = Benchmark(tuple(measured), "keras", environment(None))
    (folder / REPORT).write_text(render_report(manifest, bench), encoding="utf-8")
    files.append(REPORT)
    return replace(manifest, files=describe_files(folder, files))


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


def _note_of_user_model(model: Any, path: Path, recipe: Recipe) -> Any:
    """Say for a user's own `.keras` file what it does not say itself, or refuse to guess."""
    from cnnedge.backends.keras import ModelNote, scales_itself

    height, width, channels, _ = classifier_shape(model)
    if recipe.image_size is not None:
        height, width = height or recipe.image_size[0], width or recipe.image_size[1]
    if height is None or width is None:
        raise ModelError(f"{path} takes images of any size", fix="pass --image-size HEIGHT,WIDTH")
    normalization = recipe.preprocess or ("none" if scales_itself(model) else None)
    if normalization is None:
        raise ModelError(
            f"{path} does not say how it wants its pixels, and a wrong guess would be silent",
            fix="pass --preprocess unit (x/255), tf (x/127.5-1), caffe, torch or none (0…255)",
        )
    contract = ImageContract(height, width, channels)
    return ModelNote(path.stem, (), contract, normalization, weights="user")


def _labels(
    recipe: Recipe, noted: tuple[str, ...], dataset: Dataset | None, model: Any
) -> tuple[str, ...]:
    classes = classifier_shape(model)[3]
    if recipe.labels is not None:
        try:
            labels = tuple(Path(recipe.labels).read_text(encoding="utf-8").splitlines())
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"cannot read the labels {recipe.labels}: {error}") from error
    elif noted:
        labels = noted
    elif dataset is not None:
        labels = dataset.labels
    else:
        labels = tuple(f"class {i}" for i in range(classes))
    if len(labels) != classes:
        raise DataError(
            f"{len(labels)} labels for a model of {classes} classes",
            fix="give one label a line with --labels, in the order of the output",
        )
    return labels


def _test_split(source: Source, recipe: Recipe) -> Split:
    limit = recipe.test_images
    if limit is None and (source.weights == "random" or not source.may_calibrate):
        limit = RANDOM_TEST_IMAGES
    test = source.dataset.test
    return test if limit is None or limit >= len(test) else test.take(limit, seed=recipe.seed)


def _compiled(source: Source, image: np.ndarray) -> Callable[[], Any]:
    """Return the reference as its users would time it: a traced ``tf.function``, float32 in."""
    import tensorflow as tf

    function = tf.function(lambda x: source.model(x, training=False), autograph=False)
    tensor = tf.constant(normalize(image, source.normalization))
    return lambda: function(tensor).numpy()


def _summary(measurement: Measurement) -> dict[str, Any]:
    summary = measurement.to_dict()
    del summary["samples_ms"], summary["name"]  # the raw samples are in the report
    return summary


def _softmax(logits: np.ndarray) -> np.ndarray:
    exponent = np.exp(logits - logits.max(axis=1, keepdims=True))
    return exponent / exponent.sum(axis=1, keepdims=True)


def _brief(labels: tuple[str, ...]) -> str:
    head = ", ".join(labels[:3])
    return f"{len(labels)} ({head}{', …' if len(labels) > 3 else ''})"
