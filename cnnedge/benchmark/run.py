"""The order of things: a suite in, a result document out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from cnnedge.benchmark.accuracy import Answers, alive
from cnnedge.benchmark.contestants import enter, is_on_gpu, litert_jobs, require_reference
from cnnedge.benchmark.document import KIND, SCHEMA, Measured, model_document, whole_doubt
from cnnedge.benchmark.environment import (
    conditions,
    describe_gpu,
    environment,
    now_utc,
    read_sensors,
)
from cnnedge.benchmark.load import Watch, banner
from cnnedge.benchmark.peaks import best_of
from cnnedge.benchmark.process import Link, call
from cnnedge.benchmark.rounds import Start, Target, hold_rounds
from cnnedge.benchmark.rows import peak_rows
from cnnedge.benchmark.suite import ModelEntry, Suite
from cnnedge.bundle import MANIFEST, Bundle, open_bundle
from cnnedge.comparison import require_finite
from cnnedge.data import Dataset, Split, open_source
from cnnedge.errors import BackendError, BundleError, CnnEdgeError, DataError, GateError
from cnnedge.files import scratch_folder, sha256
from cnnedge.image import to_tensor
from cnnedge.progress import Progress, silent
from cnnedge.selftest import in_order_of, recorded_answers, refuse_calibration_images
from cnnedge.sweep import checkpoint_place, sweep

CALIBRATION_IMAGES = 128  # for what a peer's converter quantizes
TIMED = (
    "a call: uint8 images in, probabilities out, with all that the runtime's graph wants done "
    "to the images first"
)


def bench(
    suite: Suite,
    *,
    start: Start | None = None,
    resume: bool = False,
    progress: Progress = silent,
    on_data: Callable[[Dataset], None] = lambda dataset: None,
    warn: Callable[[str], object] = lambda line: None,
) -> dict[str, Any]:
    """Run a suite.

    Args:
        suite: What to measure.
        start: Starts a contestant; None: in a process of its own.
        resume: Go on from the answers that a run which was stopped has kept; see `sweep`.
            Latencies are of one run, and taken anew.
        progress: Told how far it is.
        on_data: Told of the data of each bundle once it is open.
        warn: Told before anything is measured what will spoil it, in a line.

    Returns:
        The result document; docs/benchmark.md lists its fields.

    Raises:
        BundleError: a bundle is incomplete or was altered.
        BackendError: nothing can be measured here, or there is no such runtime.
        DataError: the data's classes are not the bundle's.
    """
    before = read_sensors()
    rounds: list[dict[str, Any]] = []
    measured = [
        _measure(entry, suite, rounds, start, resume, progress, on_data, warn)
        for entry in suite.models
    ]
    peaks = best_of(rounds) if rounds else None
    models = [model_document(found, suite, peaks) for found in measured]
    gpu = describe_gpu()[0] if any(map(is_on_gpu, suite.runtimes)) else None
    return {
        "schema": SCHEMA,
        "kind": KIND,
        "created": now_utc(),
        "doubt": whole_doubt(models),
        "suite": suite.to_dict(),
        "environment": {
            **environment(suite.threads),
            "timed": TIMED,
            "batch": suite.batch,
            "conditions": {
                **conditions(before, read_sensors()),
                "others": _worst([found.others for found in measured]),
            },
            "gpu": gpu,
        },
        "peaks": peak_rows(rounds, peaks) if peaks else None,
        "models": models,
    }


def _worst(others: Sequence[Mapping[str, Any] | None]) -> dict[str, Any] | None:
    """Return what others took of the CPUs during the model where it was the most."""
    found = [dict(one) for one in others if one is not None and one["during"] is not None]
    return max(found, key=lambda one: one["during"], default=None)


def _measure(
    entry: ModelEntry,
    suite: Suite,
    rounds: list[dict[str, Any]],
    start: Start | None,
    resume: bool,
    progress: Progress,
    on_data: Callable[[Dataset], None],
    warn: Callable[[str], object],
) -> Measured:
    """Measure one bundle; the machine's peaks are appended to ``rounds``."""
    if entry.scenarios is not None:
        suite = replace(suite, scenarios=entry.scenarios)
    bundle = open_bundle(entry.bundle)
    if entry.reference is not None:
        require_reference(entry.reference)  # before a peer's converter takes seconds to refuse it
    found = Measured(bundle, entry)
    dataset, test = _data(bundle, entry, suite, progress, on_data)
    with scratch_folder() as scratch:
        converted = _convert(bundle, entry, suite, dataset, scratch, found.left_out)
        field = enter(bundle, entry, suite, converted)
        found.left_out += field.left_out
        if not field.contestants:
            reasons = "; ".join(f"{name}: {why}" for name, why in found.left_out)
            raise BackendError(f"nothing of {bundle.origin} can be measured here: {reasons}")
        target = _target(bundle, entry, test)
        found.file = target.file

        watch = Watch(suite.threads)
        watch.look()
        if watch.busy is not None:
            warn(banner(watch.busy))

        def peaks() -> None:
            watch.stop()  # of the round before
            if start is None:
                measured = "cnnedge.benchmark.peaks:measure_peaks"
                try:
                    rounds.append(call(measured, suite.threads, PEAK_SECONDS, name="peaks"))
                except BackendError as error:  # latencies are worth having without a roof
                    if "peaks" not in dict(found.left_out):
                        found.left_out.append(("peaks", str(error)))
            watch.start()

        def answers(links: Mapping[str, Link]) -> None:
            watch.stop()
            if dataset is not None and test is not None:
                found.answers = _answer(
                    bundle, dataset.spec, test, suite, links, scratch, resume, found, progress
                )

        found.collected = hold_rounds(
            field.contestants,
            target,
            suite,
            start=start,
            before_a_round=peaks,
            at_the_end=answers,
            progress=progress,
        )
    found.others = watch.to_dict()
    failures = [one.error for one in found.collected if one.error is not None]
    if len(failures) == len(found.collected):
        raise BackendError(f"nothing of {bundle.origin} can be measured here: {failures[0]}")
    return found


def _data(
    bundle: Bundle,
    entry: ModelEntry,
    suite: Suite,
    progress: Progress,
    on_data: Callable[[Dataset], None],
) -> tuple[Dataset | None, Split | None]:
    """Return the labelled data and its test images, refused before anything is measured."""
    if entry.data is None:
        return None, None
    dataset = open_source(entry.data, seed=suite.seed, progress=progress)
    on_data(dataset)
    dataset = in_order_of(bundle.manifest, dataset)
    test = dataset.test
    if suite.test_images is not None:
        test = test.take(suite.test_images, seed=0)
    if not len(test):
        raise DataError(f"{dataset.spec} has no test images", fix="give data with more images")
    test = test.hashed(progress)
    refuse_calibration_images(bundle.manifest, test)
    return dataset, test


PEAK_SECONDS = 0.1  # for each product and each working set, a round


def _convert(
    bundle: Bundle,
    entry: ModelEntry,
    suite: Suite,
    dataset: Dataset | None,
    scratch: Path,
    left_out: list[tuple[str, str]],
) -> dict[str, Path]:
    """Let LiteRT's converter make its files; what it refuses is left out."""
    images = None
    if dataset is not None and "litert" in suite.runtimes and len(dataset.calibration):
        part = dataset.calibration.take(CALIBRATION_IMAGES, seed=suite.seed)
        images = scratch / "calibration.npy"
        np.save(images, np.concatenate([b for b, _ in part.batches(bundle.manifest.image, 32)]))
    converted = {}
    for precision, arguments in litert_jobs(bundle, entry, suite, scratch, images):
        try:
            call("cnnedge.backends.litert:convert_litert", *arguments, name="LiteRT's converter")
            converted[precision] = Path(arguments[1])
        except BackendError as error:
            left_out.append((f"{precision}@litert", str(error)))
    return converted


def _target(bundle: Bundle, entry: ModelEntry, test: Split | None) -> Target:
    image = bundle.manifest.image
    file = entry.image or _photograph(bundle, test)
    if not file.is_file():
        raise CnnEdgeError(f"there is no image {file}", fix="check the path")
    to_tensor(file, image)  # a broken one is told before anything is measured
    return Target(
        bundle.root.resolve(),
        image.shape,
        image.to_dict(),
        bundle.manifest.labels,
        file.resolve(),
    )


def _photograph(bundle: Bundle, test: Split | None) -> Path:
    """Return an image file as an app will get: a JPEG of the data's, or of a photograph's size."""
    first = None if test is None else test.items[0]
    found = [Path(first)] if isinstance(first, str | Path) else []
    package = find_spec("sklearn")
    if package is not None and package.submodule_search_locations:
        found.append(Path(package.submodule_search_locations[0], "datasets/images/china.jpg"))
    golden = [bundle.path(name) for name in bundle.manifest.files if "/golden-" in name]
    found += sorted(golden, key=lambda path: (path.suffix not in _JPEG, -path.stat().st_size))
    for path in found:
        if path.is_file():
            return path
    raise BundleError(f"{bundle.origin} holds no golden image", fix="pass --image FILE")


_JPEG = {".jpg", ".jpeg"}


def _answer(
    bundle: Bundle,
    source: str,
    split: Split,
    suite: Suite,
    links: Mapping[str, Link],
    scratch: Path,
    resume: bool,
    found: Measured,
    progress: Progress,
) -> Answers | None:
    """Let everybody who is alive answer the test images."""
    image = bundle.manifest.image
    probe = split.tensor(0, image)[None].repeat(2, 0)
    one_by_one = [name for name in links if name.endswith("@litert")]
    answerers, refused = alive(links, one_by_one, scratch, probe)
    found.left_out += [(f"answers of {name}", why) for name, why in refused.items()]
    if not answerers:
        return None
    key = {
        "bundle": sha256(bundle.path(MANIFEST)),
        "images": split.digest(),
        "threads": suite.threads,
    }
    kept = checkpoint_place("bench", bundle.origin, source, *sorted(answerers))
    try:
        answers = sweep(
            split,
            image,
            answerers,
            checkpoint=kept,
            key=key,
            resume=resume and kept is not None and kept.exists(),
            progress=progress,
            task="accuracy",
        )
    except CnnEdgeError as error:  # the latencies are measured, and not thrown away with it
        found.left_out.append(("accuracy", str(error)))
        return None
    recorded = recorded_answers(bundle, split)
    if "keras" in answers:
        expected, reference = answers["keras"], "Keras, in this run"
    elif recorded is not None:
        expected, reference = recorded, "Keras, as recorded at export"
    else:
        name = next((n for n in answers if n.startswith("fp32@")), None)
        if name is None:
            return None
        expected, reference = answers[name], f"{name} (held to Keras at export)"
    require_finite(expected, reference, split.name_of, GateError)
    return Answers(split, expected, reference, answers, source)
