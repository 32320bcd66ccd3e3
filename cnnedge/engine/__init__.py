"""Step: build TensorRT plans from a bundle's ONNX files, check them, and put them into the bundle.

The precision of a plan is that of the ONNX graph it is built from. What was built is read back from
the engine and held against that graph; a plan in which it is not what was asked is not kept.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from cnnedge.bundle import Bundle, Variant, open_bundle, require_folder
from cnnedge.change import put_engine
from cnnedge.engine.trtexec import trtexec_line
from cnnedge.errors import BackendError, BundleError, GateError, MissingExtraError
from cnnedge.machine import tool_versions
from cnnedge.plan import (
    FOLDER,
    PlanNote,
    PlanOptions,
    experimental,
    plan_file,
    takes_gpu,
)
from cnnedge.progress import Progress, silent
from cnnedge.runtime.uint8 import scaling_before, taking_uint8
from cnnedge.runtimes import RUNTIMES

if TYPE_CHECKING:
    from pathlib import Path

    from cnnedge.backends.gpu import Gpu
    from cnnedge.backends.tensorrt import BuiltPlan, Library
    from cnnedge.engine.check import EngineReport

# What plans are built of unless variants are named: what one would deploy. FP32 is for comparison.
DEPLOYED = {"tensorrt": ("int8-trt", "fp16"), "rtx": ("fp16",)}


@dataclass(frozen=True)
class BuiltEngine:
    """What became of one variant.

    Attributes:
        note: The plan's note, as it stands beside it.
        report: What was read back from the engine.
        warnings: What the builder warned of, and why such a plan is not picked by itself.
    """

    note: PlanNote
    report: EngineReport
    warnings: tuple[str, ...]

    @property
    def failed(self) -> bool:
        """Whether it is not what was asked, and so was not kept."""
        return bool(self.report.violations)

    def to_dict(self) -> dict[str, Any]:
        """Return it as JSON-able data."""
        return {
            **asdict(self.note),
            "kept": not self.failed,
            "violations": list(self.report.violations),
            "warnings": list(self.warnings),
        }


def build_engines(
    path: Path | str,
    runtime: str,
    options: PlanOptions | None = None,
    *,
    variants: Sequence[str] | None = None,
    progress: Progress = silent,
) -> list[BuiltEngine]:
    """Build plans of a bundle's variants, and keep those that are what was asked.

    Args:
        path: The bundle.
        runtime: "tensorrt" or "rtx".
        options: How; None: a static plan for batch 1 with a second profile up to 8.
        variants: Which; None: INT8 (for TensorRT alone) and FP16, of those that the bundle has and
            whose gate did not fail, else FP32.
        progress: Told how many are done.

    Raises:
        BundleError: the bundle is incomplete or was altered, or a variant cannot be built.
        MissingExtraError: the library is not installed.
        BackendError: the library refuses something; plans built before it stay.
    """
    from cnnedge.backends.gpu import open_gpu
    from cnnedge.backends.tensorrt import open_library

    options = options or PlanOptions()
    bundle = open_bundle(path)
    require_folder(bundle, "building engines")
    chosen = choose_variants(bundle, runtime, variants)
    library = open_library(runtime)
    try:
        gpu = open_gpu()
    except BackendError:  # TensorRT-RTX builds without one; `check` tells where one is needed
        gpu = None
    library.check(options, None if gpu is None else gpu.facts.compute_capability)
    _require_onnx_ir()
    built = []
    for index, variant in enumerate(chosen):
        progress("engine", index, len(chosen))
        engine, bundle = _build(bundle, variant, library, options, gpu)
        built.append(engine)
    progress("engine", len(chosen), len(chosen))
    return built


def choose_variants(bundle: Bundle, runtime: str, names: Sequence[str] | None) -> list[Variant]:
    """Return the variants that plans are to be built of.

    Raises:
        BundleError: one was named that TensorRT does not take, or there is none.
    """
    manifest = bundle.manifest
    if names is not None:
        chosen = [manifest.variant(name) for name in names]
        for variant in chosen:
            if variant.target == "cpu":
                raise BundleError(
                    f"the variant {variant.name} is written for CPUs",
                    fix="build int8-trt, fp16 or fp32",
                )
        return chosen
    fit = [v for v in manifest.variants if v.target != "cpu" and v.verified]
    chosen = [v for v in fit if v.name in DEPLOYED[runtime]] or [
        v for v in fit if experimental(runtime, v.precision) is None
    ]
    if not chosen:
        raise BundleError(
            f"no verified variant of {bundle.origin} is for TensorRT",
            fix="export fp16 or int8, or name a --variant",
        )
    return chosen


def trtexec_lines(
    path: Path | str,
    runtime: str,
    options: PlanOptions | None = None,
    *,
    variants: Sequence[str] | None = None,
) -> list[str]:
    """Return the command lines of NVIDIA's own tool that build the same, run inside the bundle.

    Nothing of NVIDIA's has to be installed for it.
    """
    options = options or PlanOptions()
    bundle = open_bundle(path)
    lines = []
    for variant in choose_variants(bundle, runtime, variants):
        plan = plan_file(variant.name, runtime, options.compute_capabilities)
        lines.append(_trtexec(bundle, variant, runtime, plan, options, None))
    return lines


def _build(
    bundle: Bundle, variant: Variant, library: Library, options: PlanOptions, gpu: Gpu | None
) -> tuple[BuiltEngine, Bundle]:
    """Build, check and keep one plan; return it, and the bundle with it."""
    import onnx_ir as ir

    from cnnedge.backends.tensorrt import build_plan
    from cnnedge.engine.check import check_engine, refusal_causes

    onnx = bundle.path(variant.file)
    model = ir.load(onnx)
    facts = None if gpu is None else gpu.facts
    known = _timings(bundle, library, gpu)
    built = build_plan(
        library,
        onnx,
        options,
        facts,
        timing_cache=known,
        causes=refusal_causes(model),
    )
    report = check_engine(
        model,
        built.description,
        profiles=len(options.profiles),
        source=built.source,
        weight_bytes=built.weight_bytes,
    )
    note = _note(bundle, variant, library, options, gpu, built, report)
    if gpu is not None and takes_gpu(note, gpu.facts.compute_capability):
        replay = _replay(bundle, variant, library, gpu, built, options)
        note = replace(note, replay=replay)
        if replay is not None and not replay["finite"]:
            report = replace(report, violations=(*report.violations, replay["detail"]))
    doubt = experimental(library.runtime, variant.precision)
    engine = BuiltEngine(note, report, (*([doubt] if doubt else []), *built.warnings))
    if not engine.failed:
        bundle = put_engine(bundle, note, built.plan, built.timing_cache)
    return engine, bundle


def _note(
    bundle: Bundle,
    variant: Variant,
    library: Library,
    options: PlanOptions,
    gpu: Gpu | None,
    built: BuiltPlan,
    report: EngineReport,
) -> PlanNote:
    file = plan_file(variant.name, library.runtime, built.compute_capabilities)
    cache = None
    if built.timing_cache is not None:
        digest = hashlib.sha256(built.timing_cache).hexdigest()
        cache = {"file": _timing_file(library, gpu), "sha256": digest}
    images = bundle.manifest.calibration
    seen = None if images is None else images.sha256
    return PlanNote(
        variant=variant.name,
        precision=variant.precision,
        runtime=library.runtime,
        library=library.version,
        file=file,
        sha256=hashlib.sha256(built.plan).hexdigest(),
        bytes=len(built.plan),
        onnx_sha256=variant.sha256,
        calibration_sha256=seen if variant.precision == "int8" else None,
        compute_capabilities=built.compute_capabilities,
        gpu=None if gpu is None else gpu.facts.to_dict(),
        options=options,
        timing_cache=cache,
        found=report.to_dict(),
        build_seconds=round(built.seconds, 3),
        trtexec=_trtexec(bundle, variant, library.runtime, file, options, cache),
        tools=tool_versions(),
    )


def _replay(
    bundle: Bundle,
    variant: Variant,
    library: Library,
    gpu: Gpu,
    built: BuiltPlan,
    options: PlanOptions,
) -> dict[str, Any] | None:
    """Answer the bundle's golden images with a fresh plan, on the GPU that built it.

    A GPU that will not run it loses nobody the plan: what it said is kept beside it.
    """
    from cnnedge.backends.tensorrt import open_plan
    from cnnedge.selftest import INDEX, run_selftest

    if INDEX not in bundle.manifest.files:
        return None
    try:
        session = open_plan(
            library,
            gpu,
            built.plan,
            options.profiles,
            weights=bundle.path(variant.file).read_bytes() if options.strip_weights else None,
            trust_code=options.version_compatible,
        )
        with contextlib.closing(session):
            scaling = scaling_before(bundle.manifest.input, bundle.manifest.normalization)
            (stage,) = run_selftest(bundle, {variant.name: taking_uint8(session, scaling)})
    except BackendError as error:
        return {"diverged": "runtime", "detail": error.what, "finite": True}
    return {"diverged": stage.stage, "detail": stage.detail, "finite": stage.finite}


def _trtexec(
    bundle: Bundle,
    variant: Variant,
    runtime: str,
    plan: str,
    options: PlanOptions,
    cache: dict[str, str] | None,
) -> str:
    image = bundle.manifest.image
    return trtexec_line(
        runtime,
        variant.file,
        plan,
        options,
        image.shape,
        timing_cache=None if cache is None else cache["file"],
    )


def _timing_file(library: Library, gpu: Gpu | None) -> str:
    target = "" if gpu is None else f"-sm{gpu.facts.compute_capability.replace('.', '')}"
    return f"{FOLDER}/{library.runtime}{target}.timing.cache"


def _timings(bundle: Bundle, library: Library, gpu: Gpu | None) -> bytes:
    """Return the kernel timings of earlier builds on such a GPU, which the bundle vouches for."""
    name = _timing_file(library, gpu)
    return bundle.path(name).read_bytes() if name in bundle.manifest.files else b""


def _require_onnx_ir() -> None:
    try:
        import onnx_ir  # noqa: F401
    except ImportError as error:
        raise MissingExtraError(
            "onnx-ir", "tensorrt", purpose="holding an engine against its graph"
        ) from error


def failure_of(built: Sequence[BuiltEngine]) -> GateError | None:
    """Return what to raise for plans that are not what was asked; None: all are."""
    failed = [engine for engine in built if engine.failed]
    if not failed:
        return None
    found = []
    for engine in failed:
        first, *others = engine.report.violations
        more = f" and {len(others)} more" if others else ""
        found.append(f"{engine.note.variant}: {first}{more}")
    title = RUNTIMES[failed[0].note.runtime].title
    return GateError(
        f"{title} built something else than was asked, which was not kept: {'; '.join(found)}",
        fix="name other GPUs with --sm, or build another --variant",
    )
