"""Who takes part: each variant of a bundle on each runtime that runs it, Keras, and the peers.

A runtime is a function by import string, `Opener`, so that the process that measures it is the only
one that imports it, and so that a user's own takes part by its name alone:
``--runtime cpu,mypackage.mymodule:open_model``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from cnnedge.benchmark.suite import ModelEntry, Suite
from cnnedge.bundle import Bundle, Manifest, Variant
from cnnedge.errors import BackendError, CnnEdgeError, MissingExtraError, ModelError
from cnnedge.kind import kind_of
from cnnedge.machine import this_machine
from cnnedge.protocols import Runner
from cnnedge.runtime import runs_on, usable_variants
from cnnedge.runtime.uint8 import scaling_before
from cnnedge.runtimes import KERAS, LITERT, RUNTIMES, RunSettings, Runtime, measured_runtimes


class Opener(Protocol):
    """Loads a model: what an import string names."""

    def __call__(self, model: str, *, threads: int | None, **options: Any) -> Runner:
        """Return the loaded model.

        Args:
            model: A file; for a runtime given by import string, the ONNX file of a variant.
            threads: How many threads of the CPU a call may use; None lets the runtime decide.
            **options: What `Contestant.options` has.
        """


@dataclass(frozen=True, kw_only=True)
class Contestant:
    """One model on one runtime, as the process that measures it is told.

    Attributes:
        name: "int8@cpu", "keras".
        title: What a table calls it.
        runtime: A name in `measured_runtimes`, or an import string.
        variant: The bundle's variant, or what was converted.
        precision: "fp32", "bf16", "fp16", "int8" …
        opener: The import string of an `Opener`.
        model: The file it loads.
        options: What else the opener takes; JSON-able.
        imports: Modules that an app of this runtime imports before it loads a model.
        bytes: The model's size.
        layers_of: The variant whose graph tells its layers.
        profiler: The import string of what times its layers; None: the runtime does not tell.
    """

    name: str
    title: str
    runtime: str
    variant: str
    precision: str
    opener: str
    model: str
    options: Mapping[str, Any] = field(default_factory=dict)
    imports: tuple[str, ...] = ()
    bytes: int = 0
    layers_of: str | None = None
    profiler: str | None = None

    @property
    def peer(self) -> bool:
        """Whether its runtime is another tool's."""
        row = measured_runtimes().get(self.runtime)
        return row is None or row.peer

    @property
    def on_gpu(self) -> bool:
        """Whether it computes on a GPU, as far as that is known."""
        return is_on_gpu(self.runtime)


@dataclass(frozen=True)
class Field:
    """Who takes part, and who does not and why not.

    Attributes:
        contestants: In the order of the tables; the first is the baseline.
        left_out: Names and reasons.
    """

    contestants: tuple[Contestant, ...]
    left_out: tuple[tuple[str, str], ...]


def installed_runtimes() -> tuple[str, ...]:
    """Return the CPU's runtimes that are installed here, ours first."""
    rows = [row for row in (*RUNTIMES.values(), LITERT) if row.device == "cpu"]
    return tuple(r.name for r in rows if r.name == "cpu" or find_spec(r.package) is not None)


def is_on_gpu(runtime: str) -> bool:
    """Whether a runtime computes on a GPU; of an import string that is not known."""
    return runtime in RUNTIMES and RUNTIMES[runtime].device == "gpu"


def enter(bundle: Bundle, entry: ModelEntry, suite: Suite, converted: Mapping[str, Path]) -> Field:
    """Return who takes part for one bundle.

    Args:
        bundle: The bundle.
        entry: Its reference and data.
        suite: The runtimes asked for.
        converted: LiteRT files by precision, or nothing where none could be made.

    Raises:
        BackendError: a runtime was asked for that there is not.
    """
    found: list[Contestant] = []
    left_out: list[tuple[str, str]] = []
    for runtime in _runtimes(entry, suite):
        try:
            if runtime == "keras":
                found += [_keras(bundle.manifest, entry)]
            elif runtime == "litert":
                _require(LITERT)
                found += _litert(bundle, converted)
            elif ":" in runtime:
                found += _by_import_string(bundle, runtime)
            else:
                found += _of_the_bundle(bundle, runtime, left_out)
        except CnnEdgeError as error:
            left_out.append((runtime, str(error)))
        if runtime == "openvino" and find_spec("openvino") is not None:
            try:
                found.append(_bfloat16(bundle))
            except CnnEdgeError as error:
                left_out.append(("bf16@openvino", str(error)))
    return Field(tuple(found), tuple(left_out))


def _runtimes(entry: ModelEntry, suite: Suite) -> list[str]:
    """Return the runtimes asked for, Keras first where there is a reference."""
    asked = list(dict.fromkeys(suite.runtimes))
    for runtime in asked:
        if runtime not in (known := measured_runtimes()) and ":" not in runtime:
            raise BackendError(
                f"there is no runtime {runtime!r}",
                fix=f"choose of {', '.join(known)}, or give an import string package:function",
            )
    if entry.reference is not None or "keras" in asked:
        asked = ["keras", *(name for name in asked if name != "keras")]
    return asked


def _require(row: Runtime) -> None:
    if row.device == "cpu" and find_spec(row.package) is None:
        raise MissingExtraError(row.package, row.extra, purpose=f"the runtime {row.name}")


def require_reference(reference: Path) -> None:
    """Refuse a reference that is no `.keras` file.

    Raises:
        ModelError: it is none; the message says what it is.
    """
    if (found := kind_of(reference)) == "not there":
        raise ModelError(f"no model file {reference}", fix="check the path")
    if found != "a Keras model":
        raise ModelError(
            f"{reference} is {found}, and no .keras file",
            fix="give the .keras file that the bundle was exported from",
        )


def _keras(manifest: Manifest, entry: ModelEntry) -> Contestant:
    if entry.reference is None:
        raise ModelError("Keras needs the model itself", fix="pass --reference F.keras")
    if find_spec(KERAS.package) is None:
        raise MissingExtraError(KERAS.package, KERAS.extra, purpose="the Keras reference")
    return Contestant(
        name="keras",
        title=KERAS.title,
        runtime=KERAS.name,
        variant="keras",
        precision="fp32",
        opener="cnnedge.backends.keras:open_reference",
        model=str(entry.reference),
        options={
            "normalization": manifest.normalization,
            "emits": manifest.model.emits,
            "output": manifest.model.output,
        },
        imports=(KERAS.module, "PIL.Image"),
        bytes=manifest.reference.bytes,
        layers_of="fp32",
    )


def _litert(bundle: Bundle, converted: Mapping[str, Path]) -> list[Contestant]:
    if not converted:
        raise ModelError(
            "LiteRT has its own converter, which needs the Keras model",
            fix="pass --reference F.keras (and --data for INT8)",
        )
    return [
        Contestant(
            name=f"{precision}@litert",
            title=f"{LITERT.title} {precision.upper()}",
            runtime="litert",
            variant=precision,
            precision=precision,
            opener="cnnedge.backends.litert:open_litert",
            model=str(file),
            options={"normalization": bundle.manifest.normalization},
            imports=(LITERT.module, "ai_edge_litert.interpreter", "PIL.Image"),
            bytes=file.stat().st_size,
            layers_of=precision,
        )
        for precision, file in converted.items()
    ]


def _bfloat16(bundle: Bundle) -> Contestant:
    """FP32 computed in bfloat16, which OpenVINO does on CPUs that have it."""
    if not {"avx512_bf16", "amx_bf16"} & set(this_machine().isa):
        raise BackendError("this CPU has no bfloat16 arithmetic")
    manifest = bundle.manifest
    fp32 = manifest.variant("fp32")
    return Contestant(
        name="bf16@openvino",
        title="OpenVINO BF16",
        runtime="openvino",
        variant="fp32",
        precision="bf16",
        opener="cnnedge.benchmark.openers:open_bfloat16",
        model=str(bundle.path(fp32.file).resolve()),
        options={"scaling": scaling_before(manifest.input, manifest.normalization)},
        imports=("cnnedge.backends.openvino", "PIL.Image"),
        bytes=fp32.bytes,
        layers_of="fp32",
    )


def _by_import_string(bundle: Bundle, runtime: str) -> list[Contestant]:
    module = runtime.split(":", 1)[0]
    return [
        Contestant(
            name=f"{variant.name}@{runtime}",
            title=f"{runtime} {variant.name.upper()}",
            runtime=runtime,
            variant=variant.name,
            precision=variant.precision,
            opener=runtime,
            model=str(bundle.path(variant.file).resolve()),
            imports=(module,),
            bytes=variant.bytes,
            layers_of=variant.name,
        )
        for variant in bundle.manifest.variants
        if variant.target != "trt"
    ]


def _of_the_bundle(
    bundle: Bundle, runtime: str, left_out: list[tuple[str, str]]
) -> list[Contestant]:
    row = RUNTIMES[runtime]
    _require(row)
    usable = usable_variants(bundle, RunSettings(runtime))
    fit: list[Variant] = []
    for variant in bundle.manifest.variants:
        if not runs_on(variant, runtime):
            if row.device == "cpu":
                left_out.append((f"{variant.name}@{runtime}", _why_not(row, variant)))
            continue
        if usable is not None and variant.name not in usable:
            left_out.append((f"{variant.name}@{runtime}", "no plan of it fits this machine"))
            continue
        fit.append(variant)
    if not fit:
        raise BackendError(f"nothing in {bundle.origin} runs on {runtime}")
    return [
        Contestant(
            name=f"{variant.name}@{runtime}",
            title=f"{row.title} {variant.name.upper()}",
            runtime=runtime,
            variant=variant.name,
            precision=variant.precision,
            opener="cnnedge.benchmark.openers:open_from_bundle",
            model=str(bundle.root.resolve()),
            options={"variant": variant.name, "runtime": runtime},
            imports=(row.module, "PIL.Image"),
            bytes=variant.bytes,
            layers_of=variant.name,
            profiler=row.profiler,
        )
        for variant in fit
    ]


def _why_not(row: Runtime, variant: Variant) -> str:
    """Return why a runtime of the CPU leaves a variant out."""
    if variant.target == "trt":
        return "written for TensorRT: on a CPU its speed would be emulation"
    return row.why_not.get(variant.precision, "stored for ONNX Runtime alone")


def litert_jobs(
    bundle: Bundle, entry: ModelEntry, suite: Suite, scratch: Path, images: Path | None
) -> list[tuple[str, list[Any]]]:
    """Return which LiteRT files to make: the precision, and the arguments of `convert_litert`.

    INT8 needs calibration images; without data there are none.
    """
    if "litert" not in suite.runtimes or entry.reference is None:
        return []
    if find_spec("ai_edge_litert") is None or find_spec("tensorflow") is None:
        return []
    kept = [v.precision for v in bundle.manifest.variants if v.target != "trt"]
    wanted = [p for p in ("fp32", "int8") if p in kept and (p == "fp32" or images is not None)]
    return [
        (
            precision,
            [
                *(str(entry.reference), str(scratch / f"litert.{precision}.tflite"), precision),
                bundle.manifest.normalization,
                *(bundle.manifest.model.emits, bundle.manifest.model.output),
                *([str(images)] if images else []),
            ],
        )
        for precision in wanted
    ]
