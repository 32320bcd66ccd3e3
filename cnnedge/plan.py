"""A TensorRT plan and the note beside it: what it was built from, with what, and for what.

A plan is machine code for one library version and a few GPUs, and loading it executes it. So it
travels with a sidecar: the plan stays the raw file that trtexec loads, and its ``.json`` tells
whether this machine may load it, and what differs where it may not.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Annotated, Any

from msgspec import Meta

from cnnedge.documents import Amount, Count, Name, Sha256, hold, parse_json
from cnnedge.errors import BundleError, CnnEdgeError
from cnnedge.runtimes import PLAN_RUNTIMES, RUNTIMES

SCHEMA = 1
FOLDER = "engines"
RuntimeName = Annotated[str, Meta(pattern=rf"\A({'|'.join(PLAN_RUNTIMES)})\Z")]
LARGEST_BATCH = 65536
ComputeCapability = Annotated[str, Meta(pattern=r"\A\d{1,2}\.\d\Z")]
# Why nothing builds or picks a precision by itself.
_EXPERIMENTAL = {
    # Support matrices of 1.0 to 1.5: INT8 as weight-only GEMM alone. Read back from plans of 1.7.1:
    # convolutions with a scale for each channel write FP32, and a second kernel quantizes again.
    ("rtx", "int8"): (
        "outside NVIDIA's support matrix for TensorRT-RTX (no INT8 convolutions), and never timed"
    ),
}
# From here on plans marked as hardware-compatible run (TensorRT's AMPERE_PLUS).
_AMPERE = (8, 0)
# And from here on those of TensorRT-RTX for which no GPU was named:
# https://docs.nvidia.com/deeplearning/tensorrt-rtx/latest/inference-library/cpu-engines.html
PORTABLE = "8.6"


def experimental(runtime: str, precision: str) -> str | None:
    """Return why plans of a precision are not picked by themselves; None: they are."""
    return _EXPERIMENTAL.get((runtime, precision))


@dataclass(frozen=True)
class Profile:
    """An optimisation profile: which batch sizes a plan takes, and which it is best at."""

    smallest: int
    typical: int
    largest: int

    def holds(self, batch: int) -> bool:
        """Whether a batch of that size runs under it."""
        return self.smallest <= batch <= self.largest


@dataclass(frozen=True)
class PlanOptions:
    """How a plan is built.

    Attributes:
        max_batch: The largest batch. 1 makes a static plan; more adds a second profile, 1 to
            ``max_batch``, beside that of batch 1.
        compute_capabilities: The GPUs it is for, "8.9" and the like. TensorRT: this machine's
            alone. TensorRT-RTX: any that it knows; with none given, the plan is portable and runs
            on 8.6 and later. Name 7.5 (Turing) on its own: a plan for several GPUs is made of what
            they all have, and Turing has neither INT8 convolutions nor FP32 products there.
        workspace_bytes: The largest scratch memory that a layer may ask for; None: the library's
            own limit, the GPU's memory.
        tf32: Whether FP32 layers may round their inputs to TF32's 10 bits of mantissa. Faster, and
            no longer within 1e-5 of Keras.
        version_compatible: Whether later TensorRT releases of the same major version may load it.
            Costs speed and brings a runtime library into the plan.
        hardware_compatible: Whether any GPU from Ampere on may load it, at some cost in speed.
        strip_weights: Whether the weights stay out of the plan, to be put back from the bundle's
            ONNX when it is loaded. Costs time at each load.
        refit: Whether weights may be replaced without building anew. Costs some fusions.
        dla_core: The deep-learning accelerator of a Jetson to run on; None: the GPU.
        optimization_level: 0 to 5: how long the builder looks for faster kernels; None: its own.
    """

    max_batch: Annotated[int, Meta(ge=1, le=LARGEST_BATCH)] = 8
    compute_capabilities: tuple[ComputeCapability, ...] = ()
    workspace_bytes: Count | None = None
    tf32: bool = False
    version_compatible: bool = False
    hardware_compatible: bool = False
    strip_weights: bool = False
    refit: bool = False
    dla_core: int | None = None
    optimization_level: int | None = None

    @property
    def profiles(self) -> tuple[Profile, ...]:
        """The optimisation profiles: batch 1 alone, and 1 to ``max_batch``."""
        static = Profile(1, 1, 1)
        if self.max_batch == 1:
            return (static,)
        return (static, Profile(1, max(1, self.max_batch // 2), self.max_batch))


@dataclass(frozen=True)
class PlanNote:
    """The sidecar of a plan.

    Attributes:
        variant: The variant of the bundle that it was built from; likewise its precision.
        runtime: "tensorrt" or "rtx".
        library: That library's version.
        file: The plan's path in the bundle; likewise its hash and its size.
        onnx_sha256: Of the ONNX file that it was built from.
        calibration_sha256: Of the images that the INT8 scales were taken from, or None.
        compute_capabilities: The GPUs that it is for; none: it is portable (see `PORTABLE`).
        gpu: The GPU it was built on as data (`GpuFacts`), or None where it was built without one.
        options: The `PlanOptions`.
        timing_cache: The file of kernel timings that the build used and extended, with its hash;
            None where the library keeps none.
        found: What was read back from the built engine: layers, types, fusions, shares.
        replay: How the golden images were answered on the GPU that built it; None where there was
            none, or not one that the plan is for, or the bundle holds no self-test.
        build_seconds: How long building took.
        trtexec: The command line of NVIDIA's own tool that builds the same.
        tools: Versions of everything involved.
    """

    variant: Name
    precision: str
    runtime: RuntimeName
    library: str
    file: str
    sha256: Sha256
    bytes: Count
    onnx_sha256: Sha256
    calibration_sha256: str | None
    compute_capabilities: tuple[ComputeCapability, ...]
    gpu: Mapping[str, Any] | None
    options: PlanOptions
    timing_cache: Mapping[str, str] | None = None
    found: Mapping[str, Any] = field(default_factory=dict)
    replay: Mapping[str, Any] | None = None
    build_seconds: Amount = 0.0
    trtexec: str = ""
    tools: Mapping[str, str] = field(default_factory=dict)
    schema: int = SCHEMA

    def to_json(self) -> str:
        """Return the sidecar's text."""
        profiles = [asdict(profile) for profile in self.options.profiles]
        return json.dumps(asdict(self) | {"profiles": profiles}, indent=1) + "\n"

    @staticmethod
    def from_json(text: str, where: str) -> PlanNote:
        """Read what `to_json` wrote.

        Raises:
            BundleError: it is no sidecar of this schema; the message names ``where``.
        """
        try:
            fields = parse_json(text)
            found = fields.get("schema") if isinstance(fields, dict) else None
            if found != SCHEMA:
                raise ValueError(f"schema {str(found)[:40]}, this cnnedge reads {SCHEMA}")
            return hold(fields, PlanNote)
        except ValueError as error:
            raise BundleError(
                f"{where} is no plan's note ({error})", fix="build the engine again"
            ) from error


@dataclass(frozen=True)
class Here:
    """What a plan has to match: the library and the GPU of this machine."""

    library: str
    compute_capability: str
    gpu: str = ""
    driver: str = ""


def differences(note: PlanNote, here: Here, onnx_sha256: str) -> list[str]:
    """Return why a plan must not be loaded here, one clause each; empty: it may.

    Args:
        note: The plan's sidecar.
        here: This machine.
        onnx_sha256: Of the bundle's ONNX file that the plan claims to be built from.
    """
    found = []
    title = RUNTIMES[note.runtime].title
    if note.library != here.library and not _takes_version(note, here.library):
        found.append(f"built by {title} {note.library}, and {here.library} is installed")
    if not takes_gpu(note, here.compute_capability):
        known = ", ".join(note.compute_capabilities) or f"{PORTABLE} and later"
        what = f" ({here.gpu})" if here.gpu else ""
        found.append(
            f"built for compute capability {known}, and this GPU{what} has "
            f"{here.compute_capability}"
        )
    if note.gpu is not None and here.driver and _older(here.driver, str(note.gpu.get("driver"))):
        found.append(
            f"built under a driver for CUDA {note.gpu['driver']}, and this one supports "
            f"{here.driver}"
        )
    if note.onnx_sha256 != onnx_sha256:
        found.append(f"built from another {note.variant} ONNX file than this bundle's")
    return found


def takes_gpu(note: PlanNote, compute_capability: str) -> bool:
    """Whether a plan is for GPUs of a compute capability."""
    if compute_capability in note.compute_capabilities:
        return True
    if not note.compute_capabilities:
        return _numbers(compute_capability) >= _numbers(PORTABLE)
    return note.options.hardware_compatible and _numbers(compute_capability) >= _AMPERE


def same_gpu_model(note: PlanNote, here: Here) -> bool:
    """Whether the plan's kernels were timed on a GPU of this model, as far as that is known."""
    return note.gpu is None or not here.gpu or note.gpu.get("name") == here.gpu


def plan_file(variant: str, runtime: str, compute_capabilities: Sequence[str]) -> str:
    """Return a plan's path in its bundle.

    It names the GPUs that it is tied to: plans for several stand side by side.
    """
    suffix = "".join(f"-sm{target.replace('.', '')}" for target in compute_capabilities)
    return f"{FOLDER}/{variant}.{runtime}{suffix}.plan"


def parse_compute_capability(text: str) -> str:
    """Return "8.9" of "8.9", "89", "sm89" or "sm_89".

    Raises:
        CnnEdgeError: it is none.
    """
    digits = text.strip().lower().removeprefix("sm").removeprefix("_").replace(".", "")
    if not digits.isdecimal() or not 2 <= len(digits) <= 3:
        raise CnnEdgeError(f"{text!r} is no compute capability", fix="give one such as 8.9 or 12.0")
    return f"{digits[:-1]}.{digits[-1]}"


def parse_bytes(text: str) -> int:
    """Return the bytes of "512M", "2G" or a plain number of them; K, M and G are powers of 1024.

    Raises:
        CnnEdgeError: it is no size.
    """
    units = {"K": 2**10, "M": 2**20, "G": 2**30}
    number, unit = text.strip(), 1
    if number[-1:].upper() in units:
        unit, number = units[number[-1].upper()], number[:-1]
    try:
        size = int(float(number) * unit)
    except (ValueError, OverflowError):
        size = 0
    if size < 1:
        raise CnnEdgeError(f"{text!r} is no size in bytes", fix="give one such as 512M or 2G")
    return size


def _takes_version(note: PlanNote, installed: str) -> bool:
    """Whether a version-compatible plan may be loaded by the installed release."""
    ours, theirs = _numbers(installed), _numbers(note.library)
    return note.options.version_compatible and ours[:1] == theirs[:1] and ours >= theirs


def _older(version: str, other: str) -> bool:
    """Whether a CUDA version is of an earlier major release; minor ones load each other's code."""
    return _numbers(version)[:1] < _numbers(other)[:1]


def _numbers(version: str) -> tuple[int, ...]:
    """Return a version as numbers, so that 10.10 follows 10.9."""
    return tuple(int(part) if part.isdecimal() else -1 for part in version.split("."))
