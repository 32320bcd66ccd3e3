"""What machine this is, as far as it matters to a figure measured on it."""

from __future__ import annotations

import os
import platform
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

# Instructions that sum int8 products without saturating: x86's VNNI, Arm's dot product.
_DOT_PRODUCT = {"avx512_vnni", "avx_vnni", "avx_vnni_int8", "asimddp"}
_NOTED = (
    *("sse4_2", "avx", "avx2", "fma", "avx512f", "avx512_vnni", "avx_vnni", "avx512_bf16"),
    *("amx_tile", "amx_int8", "amx_bf16", "asimd", "asimddp", "asimdhp", "i8mm", "sve"),
)

# Arm's CPUs give a number in the place of a name: "CPU part" of MIDR_EL1, implementer 0x41.
_ARM_PARTS = {
    "0xd03": "Cortex-A53",
    "0xd05": "Cortex-A55",
    "0xd07": "Cortex-A57",
    "0xd08": "Cortex-A72",
    "0xd0b": "Cortex-A76",
    "0xd0c": "Neoverse-N1",
    "0xd40": "Neoverse-V1",
    "0xd42": "Cortex-A78AE",
    "0xd49": "Neoverse-N2",
    "0xd4f": "Neoverse-V2",
}

# Distribution names that bring a module, in the order they are looked for.
DISTRIBUTIONS = {
    "numpy": ("numpy",),
    "PIL": ("pillow",),
    "onnxruntime": ("onnxruntime", "onnxruntime-gpu"),
    "tensorflow": ("tensorflow", "tensorflow-cpu"),
    "keras": ("keras",),
    "tf2onnx": ("tf2onnx",),
    "onnx": ("onnx",),
    "onnx_ir": ("onnx-ir",),
    "sklearn": ("scikit-learn",),
    "tensorrt": ("tensorrt",),
    "tensorrt_rtx": ("tensorrt-rtx-cu13", "tensorrt-rtx"),
    "cuda.bindings": ("cuda-bindings",),
    "cupy": ("cupy-cuda13x", "cupy-cuda12x", "cupy"),
    "onnxruntime_ep_nv_tensorrt_rtx": ("onnxruntime-ep-nv-tensorrt-rtx-cu13",),
    "openvino": ("openvino",),
    "nncf": ("nncf",),
    "ai_edge_litert": ("ai-edge-litert",),
}


@dataclass(frozen=True)
class Machine:
    """A machine by what its speed depends on.

    Attributes:
        cpu: Its model name.
        cores: How many cores this process may use.
        isa: The instruction sets that matter to neural networks, of those it has.
        memory_gib: Installed memory.
        system: Operating system and architecture.
    """

    cpu: str
    cores: int
    isa: tuple[str, ...]
    memory_gib: float
    system: str

    @property
    def has_int8_dot_product(self) -> bool:
        """Whether int8 products are summed by one instruction, without saturating."""
        return any(name in _DOT_PRODUCT for name in self.isa)

    @property
    def has_fp16_arithmetic(self) -> bool:
        """Whether ONNX Runtime computes in FP16 on it: on Arm with half precision alone."""
        return "asimdhp" in self.isa

    @property
    def fastest_first(self) -> tuple[str, ...]:
        """The precisions as CPUs of this instruction set run them as a rule, the fastest first.

        FP16 is the last even where there is arithmetic for it: elsewhere it is emulated.
        """
        quantized = ("int8",) if self.has_int8_dot_product else ()
        order = (*quantized, "fp32", "int8-weight", "int4-weight", "int8", "fp16")
        return tuple(dict.fromkeys(order))

    @property
    def why_first(self) -> str:
        """Why that order begins as it does, in a clause."""
        found = [name for name in self.isa if name in _DOT_PRODUCT]
        if found:
            return f"this CPU has an int8 dot product ({', '.join(found)})"
        return "this CPU has no int8 dot product, so INT8 need not be faster"

    def to_dict(self) -> dict[str, Any]:
        """Return it as JSON-able data."""
        return asdict(self) | {"isa": list(self.isa)}


@cache
def this_machine() -> Machine:
    """Describe the machine that this process runs on."""
    cpu, flags = _cpu_info()
    try:
        cores = len(os.sched_getaffinity(0))
    except AttributeError:  # not on Linux
        cores = os.cpu_count() or 1
    try:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    except (AttributeError, ValueError, OSError):
        memory = 0.0
    isa = tuple(name for name in _NOTED if name in flags)
    system = f"{platform.system()} {platform.machine()}"
    return Machine(cpu, cores, isa, round(memory, 1), system)


def tool_versions() -> dict[str, str]:
    """Return the versions of what is installed of the packages that cnnedge works with."""
    from importlib import metadata  # it costs as much as a document's types do

    from cnnedge.version import __version__

    versions = {"cnnedge": __version__, "python": platform.python_version()}
    for names in DISTRIBUTIONS.values():
        for name in names:
            try:
                versions[name] = metadata.version(name)
            except metadata.PackageNotFoundError:
                continue
            break
    return versions


def _cpu_info(path: Path = Path("/proc/cpuinfo")) -> tuple[str, set[str]]:
    """Return the CPU's name and feature flags, as Linux tells them."""
    name = platform.processor() or platform.machine()
    flags: set[str] = set()
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return name, flags
    first = text.split("\n\n", 1)[0].splitlines()
    fields = {key.strip(): value.strip() for key, _, value in (x.partition(":") for x in first)}
    for key in ("flags", "Features"):
        flags |= set(fields.get(key, "").split())
    return fields.get("model name") or _arm_name(fields) or name, flags


def _arm_name(fields: dict[str, str]) -> str | None:
    """Return the name of a CPU that tells its part number alone, as every 64-bit Arm does.

    "aarch64" would be the same name for a server and a Raspberry Pi, and what was measured on one
    would be believed on the other.
    """
    implementer, part = fields.get("CPU implementer"), fields.get("CPU part")
    if implementer is None or part is None:
        return None
    if implementer == "0x41" and part in _ARM_PARTS:
        return f"Arm {_ARM_PARTS[part]}"
    return f"Arm, implementer {implementer}, part {part}"
