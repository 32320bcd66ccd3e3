"""What differs between TensorRT 10.3 to 11.x and TensorRT-RTX, each probed in one place.

All of them build the same strongly typed network: the precision of every tensor stands in the ONNX
graph, so no precision flag and no calibrator is ever set (TensorRT 11 removed both). What is left
to differ is which flags, targets and runtime settings exist.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from cnnedge.errors import BackendError, MissingExtraError
from cnnedge.plan import PlanOptions
from cnnedge.runtimes import RUNTIMES

log = logging.getLogger("cnnedge.tensorrt")

_OLDEST = (10, 3)  # of TensorRT; JetPack 6 has it
_DLA_SINCE = (11, 4, 1)  # the first release with a strongly typed network on a Jetson's DLA
_VALID = ("VALID", "SUBOPTIMAL")
_INVALIDITY = {
    "VERSION_MISMATCH": "it was built by another release",
    "UNSUPPORTED_CC": "it was not built for this GPU",
    "OLD_CUDA_DRIVER": "the CUDA driver is too old for it",
    "OLD_CUDA_RUNTIME": "the CUDA runtime is too old for it",
    "INSUFFICIENT_GPU_MEMORY": "this GPU has too little memory for it",
    "MALFORMED_ENGINE": "it is no engine, or cut short",
    "CUDA_ERROR": "the CUDA driver or runtime is not installed properly",
}


@dataclass
class Messages:
    """What a library logged: errors to tell, and the lines that describe a built engine."""

    errors: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    layers: list[str] = field(default_factory=list)
    weight_bytes: int | None = None

    def take(self, severity: str, text: str) -> None:
        """Take one message."""
        if severity in {"ERROR", "INTERNAL_ERROR"}:
            self.errors.append(" ".join(text.split()))
        elif severity == "WARNING":
            self.warnings.append(" ".join(text.split()))
        elif text.startswith("Layers:"):
            self.layers.append(text)
        elif text.startswith("Total Weights Memory:"):
            self.weight_bytes = int(text.split(":")[1].split()[0])
        log.debug("%s %s", severity, text)

    def tell(self) -> str:
        """Return the first error, which is the cause of those after it."""
        return self.errors[0] if self.errors else "it does not say why"


@dataclass(frozen=True)
class Library:
    """TensorRT or TensorRT-RTX, as installed.

    Attributes:
        runtime: "tensorrt" or "rtx".
        module: The library's module.
        version: Its version.
    """

    runtime: str
    module: Any
    version: str

    @property
    def title(self) -> str:
        """Its name and version, for people."""
        return f"{RUNTIMES[self.runtime].title} {self.version}"

    def logger(self, messages: Messages) -> Any:
        """Return a logger of the library's own class that hands everything to ``messages``."""
        trt = self.module

        class Logger(trt.ILogger):  # type: ignore[name-defined]
            def __init__(self) -> None:
                trt.ILogger.__init__(self)

            def log(self, severity: Any, text: str) -> None:
                messages.take(severity.name, text)

        return Logger()

    # --- building ----------------------------------------------------------------------------

    @property
    def builds_without_gpu(self) -> bool:
        """Whether it builds for GPUs that it is told of; else for the one it runs on."""
        return hasattr(self.module, "ComputeCapability")

    def compute_capabilities(self) -> tuple[str, ...]:
        """Return the GPUs that it can be told to build for, "8.9" and the like; else nothing."""
        if not self.builds_without_gpu:
            return ()
        names = self.module.ComputeCapability.__members__
        digits = [name.removeprefix("SM") for name in names if name.startswith("SM")]
        return tuple(f"{d[:-1]}.{d[-1]}" for d in sorted(digits, key=int))

    def network_flags(self) -> int:
        """Return the creation flags of a strongly typed network (in 11.x it always is)."""
        return 1 << int(self.module.NetworkDefinitionCreationFlag.STRONGLY_TYPED)

    def configure(self, config: Any, options: PlanOptions, targets: tuple[str, ...]) -> None:
        """Set a builder's configuration as the options say.

        Raises:
            BackendError: an option that this library or release does not have.
        """
        trt = self.module
        config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED  # else nothing is read back
        if not options.tf32:
            config.clear_flag(trt.BuilderFlag.TF32)
        if options.workspace_bytes is not None:
            config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, options.workspace_bytes)
        if options.optimization_level is not None:
            config.builder_optimization_level = options.optimization_level
        for wanted, flag in (
            (options.version_compatible, "VERSION_COMPATIBLE"),
            (options.strip_weights, "STRIP_PLAN"),
            (options.strip_weights and not options.refit, "REFIT_IDENTICAL"),
            (options.refit, "REFIT"),
        ):
            if wanted:
                config.set_flag(getattr(trt.BuilderFlag, flag))
        if options.hardware_compatible:
            config.hardware_compatibility_level = trt.HardwareCompatibilityLevel.AMPERE_PLUS
        if options.dla_core is not None:
            config.default_device_type = trt.DeviceType.DLA
            config.DLA_core = options.dla_core
            config.set_flag(trt.BuilderFlag.GPU_FALLBACK)
        if self.builds_without_gpu and targets:
            config.num_compute_capabilities = len(targets)
            for index, target in enumerate(targets):
                name = f"SM{target.replace('.', '')}"
                config.set_compute_capability(getattr(trt.ComputeCapability, name), index)

    def adjust_parser(self, parser: Any, options: PlanOptions) -> None:
        """Let a parser reshape what a DLA would refuse, where it can."""
        if options.dla_core is not None:
            parser.set_flag(self.module.OnnxParserFlag.ADJUST_FOR_DLA)

    def check(self, options: PlanOptions, gpu: str | None) -> None:
        """Refuse at once what this library or release cannot build here.

        Args:
            options: What is asked for.
            gpu: The compute capability of this machine's GPU, or None where there is none.

        Raises:
            BackendError: it cannot; the message says what can.
        """
        if self.runtime == "rtx":
            self._check_rtx(options, gpu)
        else:
            self._check_tensorrt(options, gpu)

    def _check_rtx(self, options: PlanOptions, gpu: str | None) -> None:
        known = self.compute_capabilities()
        unknown = [target for target in options.compute_capabilities if target not in known]
        if unknown:
            raise BackendError(
                f"{self.title} does not build for compute capability {', '.join(unknown)}",
                fix=f"it builds for {', '.join(known)}; elsewhere use --runtime tensorrt",
            )
        if options.version_compatible:
            raise BackendError(
                "a TensorRT-RTX plan is loaded by the very release that built it",
                fix="leave --version-compatible out, and build it again for each release",
            )
        if options.hardware_compatible:
            raise BackendError(
                "a TensorRT-RTX plan is for the GPUs it names, which are all of them by default",
                fix="leave --hardware-compatible out, or name GPUs with --sm",
            )
        if options.dla_core is not None:
            raise BackendError("TensorRT-RTX has no DLA", fix="use --runtime tensorrt")
        if options.strip_weights or options.refit:
            if gpu is None:
                raise BackendError(
                    "TensorRT-RTX builds refittable plans on a machine with a GPU alone",
                    fix="leave --strip-weights and --refit out, or build on the device",
                )
            if len(options.compute_capabilities) > 1:
                raise BackendError(
                    "TensorRT-RTX builds a refittable plan for one kind of GPU at a time",
                    fix="give --sm one compute capability",
                )

    def _check_tensorrt(self, options: PlanOptions, gpu: str | None) -> None:
        if gpu is None:
            raise BackendError(
                "TensorRT builds on the GPU that it builds for, and this machine has none",
                fix="run this on the device, or use --runtime rtx for RTX GPUs",
            )
        others = [target for target in options.compute_capabilities if target != gpu]
        if others:
            raise BackendError(
                f"TensorRT builds for the GPU it runs on ({gpu}), not for {', '.join(others)}",
                fix="run this on that device",
            )
        if options.dla_core is not None and version_numbers(self.version) < _DLA_SINCE:
            raise BackendError(
                f"TensorRT {self.version} takes no strongly typed network on a DLA, "
                "which 11.4.1 (JetPack 7.2.2) does",
                fix="see export/jetson-orin/README.md for trtexec's way on JetPack 6",
            )
        if options.dla_core is not None and options.max_batch != 1:
            raise BackendError("a DLA takes one fixed batch size", fix="pass --max-batch 1")

    def timing_cache(self, config: Any, known: bytes) -> Any | None:
        """Give a build the kernel timings of earlier ones; None where the library keeps none.

        TensorRT-RTX times nothing when it builds, and setting a cache makes it ask for a GPU.
        """
        if self.builds_without_gpu:
            return None
        cache = config.create_timing_cache(known)
        config.set_timing_cache(cache, ignore_mismatch=False)
        return cache

    # --- running -----------------------------------------------------------------------------

    def refuse_invalid(self, runtime: Any, plan: bytes) -> None:
        """Ask the library whether it would load a plan here, where it can tell beforehand.

        Raises:
            BackendError: it would not, and the message says why.
        """
        if not hasattr(runtime, "get_engine_validity"):
            return
        validity, diagnostics = runtime.get_engine_validity(plan)
        if validity.name in _VALID:
            return
        members = self.module.EngineInvalidityDiagnostics.__members__
        reasons = [
            _INVALIDITY.get(name, name) for name, bit in members.items() if int(bit) & diagnostics
        ]
        raise BackendError(
            f"{self.title} refuses the plan: {'; '.join(reasons) or 'it does not say why'}",
            fix=f"build it again: cnnedge engine BUNDLE --runtime {self.runtime}",
        )

    def deserialize(self, plan: bytes, messages: Messages, *, trust_code: bool = False) -> Any:
        """Return the engine of a plan whose hash was checked.

        Args:
            plan: The plan.
            messages: Takes what the library says.
            trust_code: Whether the plan brings machine code of the host's, as version-compatible
                plans do.

        Raises:
            BackendError: the library refuses it.
        """
        runtime = self.module.Runtime(self.logger(messages))
        self.refuse_invalid(runtime, plan)
        if trust_code:
            runtime.engine_host_code_allowed = True
        engine = runtime.deserialize_cuda_engine(plan)
        if engine is None:
            raise BackendError(
                f"{self.title} cannot load the plan: {messages.tell()}",
                fix=f"build it again: cnnedge engine BUNDLE --runtime {self.runtime}",
            )
        return engine

    def refit(self, engine: Any, onnx: bytes, messages: Messages) -> None:
        """Put the weights of an ONNX model into a stripped or refittable engine.

        Raises:
            BackendError: they do not fit.
        """
        logger = self.logger(messages)
        refitter = self.module.Refitter(engine, logger)
        parser = self.module.OnnxParserRefitter(refitter, logger)
        if not parser.refit_from_bytes(onnx) or not refitter.refit_cuda_engine():
            raise BackendError(
                f"the plan does not take the weights of its ONNX file: {messages.tell()}",
                fix="build the engine again",
            )

    def create_context(self, engine: Any, *, graphs: bool, kernels: bytes) -> tuple[Any, Any]:
        """Return an execution context, and the cache of its just-in-time compiled kernels or None.

        Args:
            engine: The engine.
            graphs: Whether the library may replay calls as a CUDA graph by itself.
            kernels: A cache of an earlier run, or nothing.
        """
        if not self.replays_graphs:
            return engine.create_execution_context(), None
        settings = engine.create_runtime_config()
        strategy = self.module.CudaGraphStrategy
        settings.cuda_graph_strategy = strategy.WHOLE_GRAPH_CAPTURE if graphs else strategy.DISABLED
        cache = settings.create_runtime_cache()
        if kernels and not cache.deserialize(kernels):
            log.info("%s: the kernel cache is of another machine and is made anew", self.title)
        settings.set_runtime_cache(cache)
        return engine.create_execution_context(settings), cache

    def bare_context(self, engine: Any) -> Any:
        """Return an execution context to describe an engine with, of which nothing is run.

        It needs no scratch memory, which for large batches is gigabytes, where the release can
        leave it out.

        Raises:
            BackendError: there is none to be had.
        """
        without_memory = getattr(engine, "create_execution_context_without_device_memory", None)
        context = (without_memory or engine.create_execution_context)()
        if context is None:
            raise BackendError(
                f"{self.title} cannot set up the plan to read it back",
                fix="free some GPU memory, or build it with a smaller --max-batch",
            )
        return context

    @property
    def replays_graphs(self) -> bool:
        """Whether it captures CUDA graphs by itself; else the caller does, from its stream."""
        return hasattr(self.module, "CudaGraphStrategy")


def open_library(runtime: str, load: Callable[[str], Any] = importlib.import_module) -> Library:
    """Return TensorRT or TensorRT-RTX.

    Args:
        runtime: "tensorrt" or "rtx".
        load: Imports a module by name.

    Raises:
        MissingExtraError: it is not installed.
        BackendError: it is installed and cannot be loaded, or is too old.
    """
    title, name = RUNTIMES[runtime].title, RUNTIMES[runtime].package
    try:
        module = load(name)
    except ImportError as error:
        if error.name == name:
            raise MissingExtraError(name, runtime, purpose=title) from error
        raise BackendError(
            f"{title} is installed and cannot be loaded: {error}",
            fix="`cnnedge doctor` says what it lacks",
        ) from error
    version = str(module.__version__)
    if runtime == "tensorrt" and version_numbers(version)[:2] < _OLDEST:
        raise BackendError(
            f"TensorRT {version} is too old", fix="install TensorRT 10.3 (JetPack 6) or newer"
        )
    return Library(runtime, module, version)


def version_numbers(version: str) -> tuple[int, ...]:
    """Return the leading numbers of a version: (10, 3, 0) of "10.3.0.post1"."""
    numbers = []
    for part in version.split("."):
        if not part.isdecimal():
            break
        numbers.append(int(part))
    return tuple(numbers)
