"""Step: hold what was exported against the Keras reference, and apply the gates."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from cnnedge.bundle import MANIFEST, Bundle, Manifest, Variant, open_bundle
from cnnedge.chance import guessing
from cnnedge.comparison import Comparison, Verdict, compare, judge, limit_of, require_finite
from cnnedge.data import Dataset, Split
from cnnedge.errors import BundleError, DataError, GateError, ModelError
from cnnedge.files import sha256
from cnnedge.image import ImageContract
from cnnedge.progress import Progress, silent
from cnnedge.protocols import Runner
from cnnedge.runtime import RunSettings, open_variant, runs_on, usable_variants
from cnnedge.runtime.uint8 import as_taken, scaling_before
from cnnedge.selftest import (
    Fingerprints,
    StageReport,
    in_order_of,
    recorded_answers,
    refuse_calibration_images,
    run_selftest,
)
from cnnedge.sweep import checkpoint_place, sweep

REFERENCE = "the reference"  # beside the names of variants


@dataclass(frozen=True)
class VariantReport:
    """What verification found of one variant."""

    name: str
    precision: str
    provider: str
    selftest: StageReport | None
    comparison: Comparison | None
    verdict: Verdict | None
    achieved: Mapping[str, Mapping[str, float]]

    @property
    def failed(self) -> bool:
        """Whether the self-test diverged or a gate stopped it."""
        diverged = self.selftest is not None and self.selftest.stage is not None
        return diverged or (self.verdict is not None and self.verdict.failed)

    def to_dict(self) -> dict[str, Any]:
        """Return it as JSON-able data."""
        return {
            "variant": self.name,
            "precision": self.precision,
            "achieved": {kind: dict(shares) for kind, shares in self.achieved.items()},
            "provider": self.provider,
            "selftest": None if self.selftest is None else asdict(self.selftest),
            "accuracy": None if self.comparison is None else self.comparison.to_dict(),
            "verdict": None if self.verdict is None else asdict(self.verdict),
            "failed": self.failed,
        }


@dataclass(frozen=True)
class Verification:
    """What verification found of a bundle.

    Attributes:
        bundle: The bundle's folder.
        reference: What the answers were held against, in words.
        data: The data source and how many images of it, in words.
        variants: One report each.
    """

    bundle: str
    reference: str
    data: str
    variants: tuple[VariantReport, ...]

    @property
    def failed(self) -> bool:
        """Whether any variant failed."""
        return any(variant.failed for variant in self.variants)

    def to_dict(self) -> dict[str, Any]:
        """Return it as JSON-able data."""
        return {
            "bundle": self.bundle,
            "reference": self.reference,
            "data": self.data,
            "failed": self.failed,
            "variants": [variant.to_dict() for variant in self.variants],
        }


def verify_bundle(
    path: Path | str,
    dataset: Dataset | None = None,
    *,
    reference: Runner | None = None,
    max_drop: float | None = None,
    limit: int | None = None,
    runtime: str = "cpu",
    resume: bool = False,
    reference_id: str = "",
    progress: Progress = silent,
) -> Verification:
    """Replay a bundle's self-test here; with data, also measure accuracy and apply the gate.

    Args:
        path: The bundle.
        dataset: Labelled images; its test split is used. None: the self-test alone.
        reference: The Keras reference, uint8 batch → probabilities. None: its recorded answers
            where ``dataset`` is the one of the export, else the FP32 variant, which was held to
            Keras within 1e-5 then.
        max_drop: The largest top-1 drop allowed, in points; None: the bundle's own.
        limit: At most this many test images.
        runtime: What runs the variants; see `runtimes.RUNTIMES`. On one of a GPU, those that it
            runs are held against the recorded answers or the given reference.
        resume: Go on from where the same verification was stopped, to the same result; see `sweep`.
            What is done so far is kept in the user's cache, so that a bundle may be read-only.
        reference_id: What tells the given reference from others, as the hash of its file. Without
            it the answers to that reference cannot be told from those to another, and nothing is
            kept.
        progress: Told how many images are done.

    Raises:
        BundleError: the bundle is incomplete or was altered, or has nothing that the runtime runs.
        BackendError: the runtime is not to be had here.
        DataError: the data's classes are not the bundle's.
        ModelError: there is nothing to resume, or it is damaged, or of another verification; or the
            reference itself answers NaN or infinity.
        GateError: likewise, and the reference is a variant of the bundle.

    Examples:
        >>> found = cnnedge.verify_bundle("digits", cnnedge.open_source("digits"), limit=50)
        >>> found.failed, found.data
        (False, '50 test images of digits')
    """
    if resume and (dataset is None or (reference is not None and not reference_id)):
        raise DataError(
            "only a verification over data is resumed, and one with a reference that has an id",
            fix="give the data, and a reference_id beside the reference",
        )
    bundle = open_bundle(path)
    manifest, settings = bundle.manifest, RunSettings(runtime)
    chosen = _chosen(bundle, settings)
    run = {v.name: open_variant(bundle, v, settings) for v in chosen}
    stages = {
        report.variant: report
        for report in run_selftest(bundle, run, lambda name, x: _fingerprint(bundle, name, x))
    }
    against, data = "the recorded answers to the golden images", "golden images alone"
    comparisons: dict[str, Comparison] = {}
    guesses = None
    if dataset is not None:
        dataset = in_order_of(manifest, dataset)
        split = dataset.test if limit is None else dataset.test.take(limit, seed=0)
        split = split.hashed(progress)
        refuse_calibration_images(manifest, split)
        truth = _truth(bundle, split, run, runtime, reference, reference_id)
        kept = checkpoint_place("verify", bundle.origin, dataset.spec, runtime)
        key = {
            "bundle": sha256(bundle.path(MANIFEST)),
            "test images": split.digest(),
            "runtime": runtime,
            "reference": truth.id,
        }
        comparisons, right = compare_variants(
            run,
            truth.run,
            split,
            manifest.image,
            expected=truth.answers,
            who=truth.who,
            checkpoint=kept if truth.id else None,
            key=key,
            resume=resume,
            progress=progress,
        )
        against, data = truth.who, f"{len(split)} test images of {dataset.spec}"
        guesses = guessing(right, split.targets)
    reports = []
    for v in chosen:
        comparison, achieved = comparisons.get(v.name), _achieved(bundle, v)
        verdict = None
        if comparison is not None:
            comparison, verdict = _judge(manifest, v, comparison, achieved, max_drop, guesses)
        provider = getattr(run[v.name], "provider", "?")
        stage = stages.get(v.name)
        reports.append(
            VariantReport(v.name, v.precision, provider, stage, comparison, verdict, achieved)
        )
    return Verification(str(bundle.origin), against, data, tuple(reports))


@dataclass(frozen=True)
class _Truth:
    """Whom the variants are held against.

    Attributes:
        who: In words.
        id: What tells it from others in a checkpoint; "": nothing does.
        run: uint8 batch → probabilities; None where its answers are known.
        answers: Its answers, float32 ``[N, classes]``, where they are known.
    """

    who: str
    id: str
    run: Runner | None = None
    answers: np.ndarray | None = None


def _truth(
    bundle: Bundle,
    split: Split,
    run: Mapping[str, Runner],
    runtime: str,
    reference: Runner | None,
    reference_id: str,
) -> _Truth:
    """Return the reference that is given, else what was recorded of it, else the FP32 variant."""
    if reference is not None:
        return _Truth("Keras", reference_id, reference)
    recorded = recorded_answers(bundle, split)
    if recorded is not None:
        return _Truth("Keras, as recorded at export", "recorded", answers=recorded)
    on_cpu = runtime == "cpu" and "fp32" in run  # then it need not run twice
    fp32 = run["fp32"] if on_cpu else open_variant(bundle, bundle.manifest.variant("fp32"))
    return _Truth("the FP32 variant on the CPU (held to Keras at export)", "fp32", fp32)


def _judge(
    manifest: Manifest,
    variant: Variant,
    comparison: Comparison,
    achieved: Mapping[str, Mapping[str, float]],
    max_drop: float | None,
    guesses: str | None,
) -> tuple[Comparison, Verdict]:
    """Return a comparison with the limits of its variant, and what the gates say of it."""
    at_export = variant.accuracy
    own, rounds_as = (None, None) if at_export is None else (at_export.limit, at_export.rounds_as)
    parity = limit_of(variant.precision, own, rounds_as)
    comparison = replace(comparison, limit=parity, rounds_as=rounds_as)
    verdict = judge(
        comparison,
        precision=variant.precision,
        max_drop=manifest.max_drop if max_drop is None else max_drop,
        trained=manifest.model.trained,
        achieved=achieved,
        guessing=guesses,
    )
    return comparison, verdict


def compare_variants(
    variants: Mapping[str, Runner],
    reference: Runner | None,
    split: Split,
    image: ImageContract,
    *,
    expected: np.ndarray | None = None,
    who: str = "the model itself",
    checkpoint: Path | None = None,
    key: Mapping[str, Any] | None = None,
    resume: bool = False,
    progress: Progress = silent,
) -> tuple[dict[str, Comparison], np.ndarray]:
    """Run every variant and the reference over a split, each batch decoded once.

    Args:
        variants: uint8 batch → probabilities, by name.
        reference: Likewise, and it may be one of them; None where ``expected`` holds its answers.
        split: Labelled images.
        image: The image contract.
        expected: The reference's answers float32 ``[N, classes]``, where known.
        who: What a message calls the reference.
        checkpoint: Where what is done so far is kept; see `sweep`, also for the next two.
        key: What decides the answers.
        resume: Go on from the checkpoint.
        progress: Told how many images are done.

    Returns:
        A comparison for each variant, and the reference's answers.

    Raises:
        ModelError: the reference answers NaN or infinity; as GateError where it is a variant.
    """
    runners = dict(variants)
    name = next((name for name, run in variants.items() if run is reference), REFERENCE)
    if expected is None:
        assert reference is not None
        runners[name] = reference
    answers = sweep(
        split,
        image,
        runners,
        checkpoint=checkpoint,
        key=key,
        resume=resume,
        progress=progress,
    )
    right = answers[name] if expected is None else expected
    is_variant = expected is None and name != REFERENCE
    require_finite(right, who, split.name_of, GateError if is_variant else ModelError)
    return {name: compare(answers[name], right, split.targets) for name in variants}, right


def _chosen(bundle: Bundle, settings: RunSettings) -> list[Variant]:
    """Return the variants to verify: on a CPU all, which it emulates; on a GPU what runs there."""
    if settings.runtime == "cpu":
        return list(bundle.manifest.variants)
    usable = usable_variants(bundle, settings)
    chosen = [
        v
        for v in bundle.manifest.variants
        if runs_on(v, settings.runtime) and (usable is None or v.name in usable)
    ]
    if not chosen:
        raise BundleError(
            f"nothing in {bundle.origin} runs on {settings.runtime}", fix="export fp16 or int8"
        )
    return chosen


def _fingerprint(bundle: Bundle, name: str, tensors: np.ndarray) -> Fingerprints:
    manifest = bundle.manifest
    try:
        import onnx_ir  # noqa: F401
    except ImportError:  # a device without the `export` extra: no layer can be named
        return {}
    from cnnedge.graph.fingerprint import layer_fingerprints

    batch = as_taken(tensors, scaling_before(manifest.input, manifest.normalization))
    return layer_fingerprints(bundle.path(manifest.variant(name).file), batch)


def _achieved(bundle: Bundle, variant: Variant) -> Mapping[str, Mapping[str, float]]:
    """Read a variant's precision off its file, as it was off the graph when it was exported."""
    try:
        import onnx_ir as ir
    except ImportError:  # a device without the `export` extra: as the manifest has it
        return variant.achieved
    from cnnedge.graph.precision import achieved_precision

    return achieved_precision(ir.load(bundle.path(variant.file)))
