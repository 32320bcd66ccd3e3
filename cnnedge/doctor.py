"""What this machine can build and run, and why not."""

from __future__ import annotations

import importlib.metadata
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from typing import Any

from cnnedge.backends.gpu import GpuFacts, open_gpu
from cnnedge.backends.tensorrt import open_library
from cnnedge.errors import BackendError, CnnEdgeError, MissingExtraError
from cnnedge.machine import DISTRIBUTIONS, this_machine, tool_versions
from cnnedge.quiet import import_onnxruntime


@dataclass(frozen=True)
class Ability:
    """Something cnnedge can do, whether this machine can, and what to do if not."""

    name: str
    ready: bool
    detail: str
    fix: str | None = None


@dataclass(frozen=True)
class Diagnosis:
    """What `cnnedge doctor` tells."""

    machine: dict[str, Any]
    tools: dict[str, str]
    abilities: tuple[Ability, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return it as JSON-able data."""
        return {
            "machine": self.machine,
            "tools": self.tools,
            "abilities": [asdict(ability) for ability in self.abilities],
        }


def diagnose() -> Diagnosis:
    """Look at this machine: hardware, packages, and what follows for each command."""
    abilities = (
        _packages(
            "train, compress, export", "export", ("tensorflow", "tf2onnx", "onnx", "onnx_ir")
        ),
        _onnxruntime(),
        _packages("run bundles on OpenVINO", "openvino", ("openvino",)),
        _packages("measure LiteRT beside them", "litert", ("ai_edge_litert",)),
        _int8(),
        _on_gpu("use an NVIDIA GPU"),
        _gpu_provider(),
        _rtx_provider(),
        _tensorrt(),
        *_tensorrt_rtx(),
    )
    return Diagnosis(this_machine().to_dict(), tool_versions(), abilities)


def _packages(name: str, extra: str, modules: tuple[str, ...]) -> Ability:
    missing = [module for module in modules if find_spec(module) is None]
    if missing:
        fix = f'pip install "cnnedge[{extra}]"'
        return Ability(name, False, f"not installed: {', '.join(missing)}", fix)
    return Ability(name, True, "every package is installed")


def _onnxruntime() -> Ability:
    name = "run bundles on the CPU"
    installed = [d for d in DISTRIBUTIONS["onnxruntime"] if d in tool_versions()]
    if not installed:
        return Ability(name, False, "onnxruntime is not installed", 'pip install "cnnedge[cpu]"')
    if _both_onnxruntimes():
        return Ability(
            name,
            False,
            "onnxruntime and onnxruntime-gpu are both installed, and overwrite each other",
            "pip uninstall onnxruntime onnxruntime-gpu, then install one",
        )
    try:
        from cnnedge.backends import onnxruntime as backend
    except ImportError as error:
        return Ability(name, False, f"onnxruntime cannot be loaded: {error}", "install it again")
    return Ability(name, True, f"ONNX Runtime {backend.version()}")


def _both_onnxruntimes() -> bool:
    found = 0
    for name in DISTRIBUTIONS["onnxruntime"]:
        try:
            importlib.metadata.version(name)
            found += 1
        except importlib.metadata.PackageNotFoundError:
            pass
    return found > 1


def _int8() -> Ability:
    machine = this_machine()
    if machine.has_int8_dot_product:
        return Ability("INT8 faster than FP32 here", True, "this CPU has an int8 dot product")
    return Ability(
        "INT8 faster than FP32 here",
        False,
        "this CPU has no int8 dot product: INT8 may be slower, and full-range weights saturate",
        "INT8 exported here uses 7-bit weights; prefer FP32",
    )


def _find_gpu() -> GpuFacts | CnnEdgeError:
    try:
        return open_gpu().facts
    except CnnEdgeError as error:
        return error


def _on_gpu(name: str, detail: str = "{gpu}") -> Ability:
    """Tell of something that needs a GPU and lacks nothing else."""
    found = _find_gpu()
    if isinstance(found, CnnEdgeError):
        return Ability(name, False, found.what, found.fix)
    gpu = (
        f"{found.name}, compute capability {found.compute_capability}, "
        f"{found.memory_gib:.0f} GiB, driver for CUDA {found.driver}"
    )
    return Ability(name, True, detail.format(gpu=gpu))


def _gpu_provider() -> Ability:
    name = "run bundles on ONNX Runtime's CUDA provider"
    if find_spec("onnxruntime") is None:
        return Ability(name, False, "onnxruntime is not installed", 'pip install "cnnedge[gpu]"')
    ort = import_onnxruntime()

    if "CUDAExecutionProvider" not in ort.get_available_providers():
        detail = "this onnxruntime is built without CUDA"
        return Ability(name, False, detail, 'pip uninstall onnxruntime; pip install "cnnedge[gpu]"')
    return _on_gpu(name, "this onnxruntime is built with CUDA; a session shows if it loads")


def _rtx_provider() -> Ability:
    name = "run bundles on ONNX Runtime's RTX provider"
    if find_spec("onnxruntime_ep_nv_tensorrt_rtx") is None:
        return Ability(name, False, "its plugin is not installed", 'pip install "cnnedge[ort-rtx]"')
    return _on_gpu(name, "its plugin is installed")


def _tensorrt() -> Ability:
    """TensorRT builds and runs on one and the same GPU."""
    name = "build and run TensorRT plans"
    try:
        library = open_library("tensorrt")
    except MissingExtraError as error:
        detail = (
            "tensorrt is not installed; its libraries come from NVIDIA's own package index, which "
            "has to be in reach (on a Jetson they come with JetPack)"
        )
        return Ability(name, False, detail, f'pip install "cnnedge[{error.extra}]"')
    except BackendError as error:
        return Ability(name, False, error.what, error.fix)
    return _on_gpu(name, f"{library.title}, for {{gpu}}")


def _tensorrt_rtx() -> tuple[Ability, Ability]:
    """TensorRT-RTX builds anywhere and runs on RTX GPUs."""
    build, run = "build TensorRT-RTX plans", "run TensorRT-RTX plans"
    try:
        library = open_library("rtx")
    except MissingExtraError as error:
        fix = f'pip install "cnnedge[{error.extra}]"'
        missing = "tensorrt_rtx is not installed"
        return Ability(build, False, missing, fix), Ability(run, False, missing, fix)
    except BackendError as error:
        refused = Ability(build, False, error.what, error.fix)
        return refused, Ability(run, False, error.what, error.fix)
    known = ", ".join(library.compute_capabilities())
    return (
        Ability(build, True, f"{library.title}, without a GPU, for compute capability {known}"),
        _on_gpu(run, library.title),
    )
