"""How the bundle's own runtimes are opened and profiled, by import string; see `contestants`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from cnnedge.bundle import open_bundle
from cnnedge.image import normalize
from cnnedge.runtime import RunSettings, open_variant


def open_from_bundle(model: str, *, threads: int | None, variant: str, runtime: str) -> Any:
    """Open a variant as `cnnedge.load` does, every hash checked.

    Args:
        model: The bundle's folder.
        threads: Threads of the CPU for one call.
        variant: The variant's name.
        runtime: One of `runtimes.RUNTIMES`.
    """
    bundle = open_bundle(model)
    manifest = bundle.manifest
    session = open_variant(bundle, manifest.variant(variant), RunSettings(runtime, threads))
    return as_uint8(session, manifest.normalization if manifest.input == "float32" else None)


def open_bfloat16(model: str, *, threads: int | None, normalization: str | None) -> Any:
    """Open an FP32 ONNX file on OpenVINO, to be computed in bfloat16."""
    from cnnedge.backends.openvino import open_openvino

    return as_uint8(open_openvino(model, threads=threads, floats="bf16"), normalization)


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


def as_uint8(session: Any, normalization: str | None) -> Any:
    """Return a session that takes uint8 images like every other; the scaling is timed with it."""
    return session if normalization is None else _Normalizing(session, normalization)


class _Normalizing:
    def __init__(self, session: Any, normalization: str) -> None:
        self._session, self._normalization = session, normalization
        self.provider = getattr(session, "provider", "?")

    def __call__(self, batch: np.ndarray) -> np.ndarray:
        return self._session(normalize(batch, self._normalization))


def _graph_and_feed(model: str, variant: str, batch: np.ndarray) -> tuple[Path, np.ndarray]:
    bundle = open_bundle(model)
    manifest = bundle.manifest
    feed = normalize(batch, manifest.normalization) if manifest.input == "float32" else batch
    return bundle.path(manifest.variant(variant).file), feed
