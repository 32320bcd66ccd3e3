"""What this machine can build and run, and why not."""

from __future__ import annotations

import importlib.metadata
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from typing import Any

from cnnedge.machine import DISTRIBUTIONS, this_machine, tool_versions


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
        _int8(),
        _gpu_provider(),
        _tensorrt("TensorRT engines", "tensorrt", "tensorrt"),
        _tensorrt("TensorRT-RTX engines", "tensorrt_rtx", "rtx"),
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


def _gpu_provider() -> Ability:
    name = "run bundles on an NVIDIA GPU"
    if find_spec("onnxruntime") is None:
        return Ability(name, False, "onnxruntime is not installed", 'pip install "cnnedge[gpu]"')
    import onnxruntime as ort

    if "CUDAExecutionProvider" not in ort.get_available_providers():
        detail = "this onnxruntime is built without CUDA"
        return Ability(name, False, detail, 'pip uninstall onnxruntime; pip install "cnnedge[gpu]"')
    return Ability(name, True, "this onnxruntime is built with CUDA; a session shows if it loads")


def _tensorrt(name: str, module: str, extra: str) -> Ability:
    if find_spec(module) is None:
        fix = f'pip install "cnnedge[{extra}]"'
        return Ability(name, False, f"{module} is not installed", fix)
    return Ability(
        name, True, f"{module} is installed; `cnnedge engine` comes with a later version"
    )
