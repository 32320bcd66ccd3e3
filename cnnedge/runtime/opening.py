"""Load one variant of a bundle into the runtime that was asked for, and into no other."""

from __future__ import annotations

import hashlib
import importlib
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cnnedge.bundle import Bundle, Engine, Variant
from cnnedge.errors import BackendError, BundleError, MissingExtraError
from cnnedge.files import scratch_folder
from cnnedge.plan import Here, PlanNote, PlanOptions, differences, same_gpu_model
from cnnedge.protocols import Runner
from cnnedge.runtime.contract import check_ends
from cnnedge.runtime.uint8 import scaling_before, taking_uint8
from cnnedge.runtimes import ORT, RUNTIMES, GraphFile, RunSettings, Runtime

log = logging.getLogger("cnnedge")


def open_variant(bundle: Bundle, variant: Variant, settings: RunSettings | None = None) -> Runner:
    """Load one variant of a bundle; see `load` for what it raises."""
    settings, manifest = settings or RunSettings(), bundle.manifest
    if settings.row.runs_plans:
        session = _open_plan(bundle, variant, settings)
    else:
        with _graph(bundle, variant) as graph:
            session = _open_graph(graph, settings)
    ends = getattr(session, "facts", None)
    if ends is not None:
        where, labels = str(bundle.origin / variant.file), len(manifest.labels)
        check_ends(
            *(ends, manifest.image, labels, where),
            said_by="the manifest",
            inputs=(manifest.input,),
        )
    return taking_uint8(session, scaling_before(manifest.input, manifest.normalization))


def open_file(graph: GraphFile, settings: RunSettings) -> Runner:
    """Load one ONNX file, which no bundle vouches for; its input and output are not checked.

    A runtime of plans builds one in memory.

    Raises:
        MissingExtraError, BackendError: as `load` does.
    """
    if settings.row.runs_plans:
        session = _rebuild(graph, settings, _machine(settings.runtime), PlanOptions())
    else:
        session = _open_graph(graph, settings)
    return taking_uint8(session, graph.scaling)


def _open_graph(graph: GraphFile, settings: RunSettings) -> Any:
    return import_backend(settings.row).open_graph(graph, settings)


@contextmanager
def _graph(bundle: Bundle, variant: Variant) -> Iterator[GraphFile]:
    """Yield a variant's ONNX file, for the length of its loading.

    Of a signed bundle it is a private copy of the very bytes whose hash is right: the file itself
    may have been swapped since it was checked.
    """
    manifest = bundle.manifest
    graph = GraphFile(
        bundle.path(variant.file),
        variant.name,
        variant.sha256,
        variant.precision,
        manifest.image.shape,
        scaling_before(manifest.input, manifest.normalization),
    )
    if not bundle.signed:
        yield graph
        return
    with scratch_folder() as folder:
        path = folder / Path(variant.file).name
        path.write_bytes(_read_checked(bundle, variant.file, variant.sha256))
        yield replace(graph, path=path)


def usable_variants(bundle: Bundle, settings: RunSettings) -> list[str] | None:
    """Return the variants that can be run; None: every one that the runtime takes.

    Raises:
        BundleError: the bundle has no plan for the runtime.
        BackendError: none of its plans fits this machine; the message says what differs.
    """
    if not settings.row.runs_plans or settings.rebuild:
        return None
    engines = [e for e in bundle.manifest.engines if e.runtime == settings.runtime]
    if not engines:
        raise _no_plan(bundle, settings.runtime)
    machine = _machine(settings.runtime)
    fitting, refused = [], []
    for engine in engines:
        found = _differences(bundle, engine, machine.here)
        if found:
            refused.append(f"{engine.file}: {'; '.join(found)}")
        else:
            fitting.append(engine.variant)
    if not fitting:
        raise _no_fitting_plan(refused, settings.runtime)
    return fitting


def onnxruntime_backend() -> Any:
    """Import the backend of ONNX Runtime; see `import_backend` for what it raises."""
    return import_backend(RUNTIMES["cpu"])


def import_backend(row: Runtime) -> Any:
    """Import what runs a runtime.

    Raises:
        MissingExtraError: it is not installed.
        BackendError: it is, and cannot be loaded.
    """
    # Whichever extra brings it, ONNX Runtime is spoken of in one way.
    told, purpose = (
        (RUNTIMES["cpu"], "a bundle") if row.package == ORT else (row, f"on {row.title}")
    )
    try:
        return importlib.import_module(row.module)
    except ImportError as error:
        if error.name != row.package:
            raise BackendError(
                f"{told.title} is installed and cannot be loaded: {error}",
                fix="run `cnnedge doctor`",
            ) from error
        raise MissingExtraError(told.package, told.extra, purpose=f"running {purpose}") from error


@dataclass(frozen=True)
class _GpuMachine:
    """A library with the GPU that it runs on."""

    library: Any
    gpu: Any
    here: Here


def _machine(runtime: str) -> _GpuMachine:
    from cnnedge.backends.gpu import open_gpu
    from cnnedge.backends.tensorrt import open_library

    library = open_library(runtime)
    gpu = open_gpu()
    facts = gpu.facts
    here = Here(library.version, facts.compute_capability, facts.name, facts.driver)
    return _GpuMachine(library, gpu, here)


def _open_plan(bundle: Bundle, variant: Variant, settings: RunSettings) -> Any:
    """Load the plan of a variant that fits this machine, or build one where that is asked for."""
    from cnnedge.backends.tensorrt import open_plan

    runtime = settings.runtime
    engines = [
        e for e in bundle.manifest.engines if (e.runtime, e.variant) == (runtime, variant.name)
    ]
    if not engines and not settings.rebuild:
        raise _no_plan(bundle, runtime, variant.name)
    machine = _machine(runtime)
    refused = []
    for engine in engines:
        found = _differences(bundle, engine, machine.here)
        if found:
            refused.append(f"{engine.file}: {'; '.join(found)}")
            continue
        note = read_note(bundle, engine)
        if not same_gpu_model(note, machine.here):
            log.warning("%s was tuned on another GPU model: build it again here", engine.file)
        stripped = note.options.strip_weights
        return open_plan(
            machine.library,
            machine.gpu,
            # The very bytes whose hash is right are loaded: a plan is executable content.
            _read_checked(bundle, engine.file, engine.sha256),
            note.options.profiles,
            weights=_read_checked(bundle, variant.file, variant.sha256) if stripped else None,
            trust_code=note.options.version_compatible,
            graphs=settings.graphs,
            kernel_cache=_kernel_file(settings, engine.sha256),
        )
    if not settings.rebuild:
        raise _no_fitting_plan(refused, runtime)
    options = read_note(bundle, engines[0]).options if engines else PlanOptions()
    with _graph(bundle, variant) as graph:
        return _rebuild(graph, settings, machine, options)


def _rebuild(
    graph: GraphFile, settings: RunSettings, machine: _GpuMachine, options: PlanOptions
) -> Any:
    """Build a plan from an ONNX file, in memory.

    It is not kept: the bundle's manifest vouches for what is in it, and nothing vouches for a plan
    that lies elsewhere.
    """
    from cnnedge.backends.tensorrt import build_plan, open_plan

    log.warning(
        "building a %s plan of %s for this machine; `cnnedge engine` keeps one in the bundle",
        settings.row.title,
        graph.variant,
    )
    options = replace(options, compute_capabilities=(), strip_weights=False)
    gpu = machine.gpu.facts
    built = build_plan(machine.library, graph.path, options, gpu)
    return open_plan(
        machine.library,
        machine.gpu,
        built.plan,
        options.profiles,
        trust_code=options.version_compatible,
        graphs=settings.graphs,
        kernel_cache=_kernel_file(settings, hashlib.sha256(built.plan).hexdigest()),
    )


def read_note(bundle: Bundle, engine: Engine) -> PlanNote:
    """Return the note of a bundle's plan.

    Raises:
        BundleError: it was altered since the bundle was opened, or cannot be read.
    """
    content = _read_checked(bundle, engine.note, engine.note_sha256)
    note = PlanNote.from_json(content.decode("utf-8", "replace"), engine.note)
    said = (note.variant, note.runtime, note.file, note.sha256)
    if said != (engine.variant, engine.runtime, engine.file, engine.sha256):
        raise BundleError(
            f"{bundle.origin / engine.note} is the note of another plan than {engine.file}",
            fix="build the engine again",
        )
    return note


def _differences(bundle: Bundle, engine: Engine, here: Here) -> list[str]:
    variant = bundle.manifest.variant(engine.variant)
    return differences(read_note(bundle, engine), here, variant.sha256)


def _read_checked(bundle: Bundle, name: str, digest: str) -> bytes:
    content = bundle.path(name).read_bytes()
    if hashlib.sha256(content).hexdigest() != digest:
        raise BundleError(
            f"{bundle.origin / name} is not what the manifest names: it was altered or cut short",
            fix="copy or export the bundle again",
        )
    return content


def _kernel_file(settings: RunSettings, digest: str) -> Path | None:
    if settings.cache is None:
        return None
    settings.cache.mkdir(parents=True, exist_ok=True, mode=0o700)
    return settings.cache / f"{digest[:16]}.kernels"


def _no_plan(bundle: Bundle, runtime: str, variant: str | None = None) -> BundleError:
    of = "" if variant is None else f" of {variant}"
    return BundleError(
        f"{bundle.origin} has no {RUNTIMES[runtime].title} plan{of}",
        fix=f"build one: cnnedge engine {bundle.origin} --runtime {runtime}"
        + ("" if variant is None else f" --variant {variant}"),
    )


def _no_fitting_plan(refused: list[str], runtime: str) -> BackendError:
    return BackendError(
        f"the plan does not fit this machine: {' | '.join(refused)}",
        fix=f"build it here (cnnedge engine BUNDLE --runtime {runtime}), or load with rebuild=True",
    )
