"""How the bundle's own runtimes are opened and profiled, by import string; see `contestants`."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from cnnedge.bundle import open_bundle
from cnnedge.protocols import Runner
from cnnedge.runtime import RunSettings, open_variant
from cnnedge.runtime.uint8 import as_taken, scaling_before, taking_uint8


def open_from_bundle(model: str, *, threads: int | None, variant: str, runtime: str) -> Runner:
    """Open a variant as `cnnedge.load` does, every hash checked.

    Args:
        model: The bundle's folder.
        threads: Threads of the CPU for one call.
        variant: The variant's name.
        runtime: One of `runtimes.RUNTIMES`.
    """
    bundle = open_bundle(model)
    return open_variant(bundle, bundle.manifest.variant(variant), RunSettings(runtime, threads))


def open_bfloat16(model: str, *, threads: int | None, scaling: str | None) -> Runner:
    """Open an FP32 ONNX file on OpenVINO, to be computed in bfloat16."""
    from cnnedge.backends.openvino import open_openvino

    return taking_uint8(open_openvino(model, threads=threads, floats="bf16"), scaling)


def profile_onnxruntime(
    model: str, batch: np.ndarray, calls: int, *, threads: int | None, variant: str, runtime: str
) -> dict[str, float]:
    """Return the mean seconds of each node of a bundle's variant on ONNX Runtime's CPU provider."""
    from cnnedge.backends.onnxruntime import profile

    path, feed = _graph_and_feed(model, variant, batch)
    return profile(path, feed, calls=calls, threads=threads)


def profile_openvino(
    model: str, batch: np.ndarray, calls: int, *, threads: int | None, variant: str, runtime: str
) -> dict[str, float]:
    """Return the mean seconds of each node of a bundle's variant on OpenVINO."""
    from cnnedge.backends.openvino import open_openvino

    path, feed = _graph_and_feed(model, variant, batch)
    return open_openvino(path, threads=threads, profiling=True).layer_times(feed, calls)


def _graph_and_feed(model: str, variant: str, batch: np.ndarray) -> tuple[Path, np.ndarray]:
    bundle = open_bundle(model)
    manifest = bundle.manifest
    feed = as_taken(batch, scaling_before(manifest.input, manifest.normalization))
    return bundle.path(manifest.variant(variant).file), feed
