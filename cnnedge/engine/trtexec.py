"""The command line of NVIDIA's own tool that builds what we build.

For whoever has to build on a device without Python, or wants to see that both give the same. The
options are those of ``trtexec --help`` in TensorRT 10; 11 takes them too (there a network is always
strongly typed and ``--stronglyTyped`` changes nothing). TensorRT-RTX's tool is ``tensorrt_rtx``.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence

from cnnedge.plan import PlanOptions

_TOOLS = {"tensorrt": "trtexec", "rtx": "tensorrt_rtx"}


def trtexec_line(
    runtime: str,
    onnx: str,
    plan: str,
    options: PlanOptions,
    image: Sequence[int],
    *,
    timing_cache: str | None = None,
) -> str:
    """Return the line that builds a plan as `build_plan` does, and times it.

    Args:
        runtime: "tensorrt" or "rtx".
        onnx: The ONNX file.
        plan: The file to write.
        options: How it is built.
        image: The input's dimensions without the batch's: height, width, channels.
        timing_cache: A file of kernel timings to use and extend.
    """
    words = [_TOOLS[runtime], f"--onnx={onnx}", f"--saveEngine={plan}"]
    if runtime == "tensorrt":
        words.append("--stronglyTyped")
    words.append("--profilingVerbosity=detailed")
    if not options.tf32:
        words.append("--noTF32")
    words += _profiles(options, image)
    if options.compute_capabilities and runtime == "rtx":
        targets = ",".join(target.replace(".", "") for target in options.compute_capabilities)
        words.append(f"--computeCapabilities={targets}")
    if options.workspace_bytes is not None:
        words.append(f"--memPoolSize=workspace:{options.workspace_bytes}B")
    if options.optimization_level is not None:
        words.append(f"--builderOptimizationLevel={options.optimization_level}")
    if timing_cache is not None:
        words.append(f"--timingCacheFile={timing_cache}")
    if options.version_compatible:
        words.append("--versionCompatible")
    if options.hardware_compatible:
        words.append("--hardwareCompatibilityLevel=ampere+")
    if options.refit:
        words.append("--refit")
    if options.dla_core is not None:
        words += [f"--useDLACore={options.dla_core}", "--allowGPUFallback"]
    # A plan without weights cannot be timed, nor one for another GPU.
    words += ["--stripWeights", "--skipInference"] if options.strip_weights else _timing(runtime)
    return shlex.join(words)


def _profiles(options: PlanOptions, image: Sequence[int]) -> list[str]:
    words = []
    for index, profile in enumerate(options.profiles):
        if len(options.profiles) > 1:
            words.append(f"--profile={index}")
        for name, batch in (
            ("min", profile.smallest),
            ("opt", profile.typical),
            ("max", profile.largest),
        ):
            shape = "x".join(str(d) for d in (batch, *image))
            words.append(f"--{name}Shapes=image:{shape}")
    return words


def _timing(runtime: str) -> list[str]:
    """Return what makes its figures comparable with ours: CUDA graphs, and waits that spin.

    trtexec 10 leaves CUDA graphs off and copies on, 11 the other way round; graphs are asked for,
    and copies stand in our own report beside compute.
    """
    return ["--useCudaGraph", "--useSpinWait"] if runtime == "tensorrt" else ["--skipInference"]
