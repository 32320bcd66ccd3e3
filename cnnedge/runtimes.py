"""Which runtimes there are: a row each, read by all that names, opens, times or recommends one.

A new one is a file in `backends/` that has `open_graph`, and a row here. Nothing registers itself
when it is imported, and this imports no backend.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from cnnedge.errors import BackendError

ORT = "onnxruntime"  # the module of ONNX Runtime, under whichever extra it was installed
_SEEN_IN_SESSION = "the session names its provider, and ONNX Runtime where each node went"
_SEEN_IN_ENGINE = "the built engine lists its layers with their types"


@dataclass(frozen=True, kw_only=True)
class Runtime:
    """One runtime.

    Attributes:
        name: As ``--runtime`` has it.
        title: What a table calls it.
        about: What it is, in words.
        module: What runs it, in `backends/`; it has
            ``open_graph(graph: GraphFile, settings: RunSettings)``, unless it runs plans. What that
            returns gives probabilities of a batch as the graph takes it.
        package: The module that must be installed.
        extra: The extra of cnnedge that brings it.
        device: Where it computes.
        variants: The names of those that it runs, on a GPU the fastest first as a rule; none: every
            one that is not written for TensorRT.
        runs_plans: Whether it runs a plan of the bundle, and not one of its ONNX files.
        read_back: How it is known where it computes, and in which types.
        provider: What ONNX Runtime calls it, where that runs it.
        peer: Whether it is another tool's: taken only where it is clearly the fastest.
        why_not: Why it leaves out the variants of a precision, where that is not because they are
            stored for ONNX Runtime alone.
        profiler: The import string of what times its layers; None: it does not tell.
    """

    name: str
    title: str
    about: str
    module: str
    package: str
    extra: str
    device: Literal["cpu", "gpu"]
    read_back: str
    variants: tuple[str, ...] = ()
    runs_plans: bool = False
    provider: str | None = None
    peer: bool = False
    why_not: Mapping[str, str] = field(default_factory=dict)
    profiler: str | None = None

    def runs(self, variant: str, target: str) -> bool:
        """Whether a variant, by its name and whom its graph is written for, is one it runs."""
        return variant in self.variants if self.variants else target != "trt"


# The order of variants: the CUDA provider has no INT8 convolutions; TensorRT takes the INT8 that is
# written for it. TensorRT-RTX writes FP32 between INT8 convolutions, 2.5 times the bytes of FP16,
# and nobody has timed it: it comes last.
RUNTIMES: dict[str, Runtime] = {
    row.name: row
    for row in (
        Runtime(
            name="cpu",
            title="ONNX Runtime",
            about="ONNX Runtime on the CPU",
            module="cnnedge.backends.onnxruntime",
            package=ORT,
            extra="cpu",
            device="cpu",
            read_back="the session names its provider, which computes in the graph's types",
            provider="CPUExecutionProvider",
            profiler="cnnedge.benchmark.openers:profile_onnxruntime",
        ),
        Runtime(
            name="openvino",
            title="OpenVINO",
            about="OpenVINO on the CPU",
            module="cnnedge.backends.openvino",
            package="openvino",
            extra="openvino",
            device="cpu",
            read_back="the compiled model names what it computes floats in",
            # It computes FP16 in FP32 on a CPU, and does not read ONNX Runtime's own operators.
            variants=("int8", "fp32"),
            why_not={"fp16": "computed in FP32 there"},
            peer=True,
            profiler="cnnedge.benchmark.openers:profile_openvino",
        ),
        Runtime(
            name="cuda",
            title="ORT CUDA",
            about="ONNX Runtime's CUDA provider",
            module="cnnedge.backends.onnxruntime_gpu",
            package=ORT,
            extra="gpu",
            device="gpu",
            read_back=_SEEN_IN_SESSION,
            variants=("fp16", "fp32"),
            provider="CUDAExecutionProvider",
        ),
        Runtime(
            name="ort-tensorrt",
            title="ORT TensorRT",
            about="ONNX Runtime's TensorRT provider",
            module="cnnedge.backends.onnxruntime_gpu",
            package=ORT,
            extra="gpu",
            device="gpu",
            read_back=_SEEN_IN_SESSION,
            variants=("int8-trt", "fp16", "fp32"),
            provider="TensorrtExecutionProvider",
        ),
        Runtime(
            name="ort-rtx",
            title="ORT TensorRT-RTX",
            about="ONNX Runtime's TensorRT-RTX plugin provider",
            module="cnnedge.backends.onnxruntime_gpu",
            package=ORT,
            extra="ort-rtx",
            device="gpu",
            read_back=_SEEN_IN_SESSION,
            variants=("fp16", "fp32", "int8-trt"),
            provider="NvTensorRTRTXExecutionProvider",
        ),
        Runtime(
            name="tensorrt",
            title="TensorRT",
            about="a TensorRT plan of the bundle",
            module="cnnedge.backends.tensorrt",
            package="tensorrt",
            extra="tensorrt",
            device="gpu",
            read_back=_SEEN_IN_ENGINE,
            variants=("int8-trt", "fp16", "fp32"),
            runs_plans=True,
        ),
        Runtime(
            name="rtx",
            title="TensorRT-RTX",
            about="a TensorRT-RTX plan of the bundle",
            module="cnnedge.backends.tensorrt",
            package="tensorrt_rtx",
            extra="rtx",
            device="gpu",
            read_back=_SEEN_IN_ENGINE,
            variants=("fp16", "fp32", "int8-trt"),
            runs_plans=True,
        ),
    )
}
PLAN_RUNTIMES = tuple(row.name for row in RUNTIMES.values() if row.runs_plans)
# What the benchmark measures beside them: it runs the Keras model, and no file of a bundle.
KERAS = Runtime(
    name="keras",
    title="Keras",
    about="Keras, as one tf.function",
    module="cnnedge.backends.keras",
    package="tensorflow",
    extra="export",
    device="cpu",
    read_back="the reference, which computes as its layers' policies say",
)
LITERT = Runtime(
    name="litert",
    title="LiteRT",
    about="LiteRT with XNNPACK, by its own converter",
    module="cnnedge.backends.litert",
    package="ai_edge_litert",
    extra="litert",
    device="cpu",
    read_back="the interpreter lists its tensors with their types",
    peer=True,
)


def measured_runtimes() -> dict[str, Runtime]:
    """Return all that `cnnedge bench` knows by a name."""
    return RUNTIMES | {row.name: row for row in (KERAS, LITERT)}


@dataclass(frozen=True)
class RunSettings:
    """How a variant is run.

    Attributes:
        runtime: One of `RUNTIMES`.
        threads: How many threads of the CPU one call may use; None lets the runtime decide.
        rebuild: Whether a plan that does not fit this machine is built anew from the bundle's
            ONNX, in memory. That takes seconds to minutes at each start; `cnnedge engine` does it
            once.
        cache: A folder for what a GPU runtime compiles, kept for the next start. It holds
            executable content and must be one that nobody else can write. None: nothing is kept.
        graphs: Whether calls on a GPU replay a CUDA graph.
        max_batch: The largest batch that a TensorRT provider of ONNX Runtime prepares for; a plan
            of the bundle has its own.
    """

    runtime: str = "cpu"
    threads: int | None = None
    rebuild: bool = False
    cache: Path | None = None
    graphs: bool = True
    max_batch: int = 8

    def __post_init__(self) -> None:
        if self.runtime not in RUNTIMES:
            raise BackendError(
                f"there is no runtime {self.runtime!r}", fix=f"choose one of {', '.join(RUNTIMES)}"
            )

    @property
    def row(self) -> Runtime:
        """The runtime's row in the table."""
        return RUNTIMES[self.runtime]


@dataclass(frozen=True)
class GraphFile:
    """An ONNX file, as what runs it has to know it.

    Attributes:
        path: Where it lies while it is loaded.
        variant: What it is called.
        sha256: Its hash, by which what is compiled of it is found again.
        precision: "fp32", "fp16", "int8" …
        image: Height, width and channels of the input.
        scaling: The normalization that it leaves to its caller; None: it takes uint8 images.
    """

    path: Path
    variant: str
    sha256: str
    precision: str
    image: tuple[int, int, int]
    scaling: str | None = None
