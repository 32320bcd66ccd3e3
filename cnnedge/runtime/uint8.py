"""A graph takes uint8 images, or float32 that has to be scaled before: it is asked here alone."""

from __future__ import annotations

from typing import Any

import numpy as np

from cnnedge.image import normalize
from cnnedge.protocols import Runner


def scaling_before(takes: str, normalization: str) -> str | None:
    """Return the normalization that a graph leaves to its caller; None: it does it by itself.

    Args:
        takes: The type of its input, "uint8" or "float32".
        normalization: What the network behind it was trained on, a name in `NORMALIZATIONS`.
    """
    return normalization if takes == "float32" else None


def as_taken(batch: np.ndarray, scaling: str | None) -> np.ndarray:
    """Return uint8 images as a graph takes them; ``scaling`` is what `scaling_before` says."""
    return batch if scaling is None else normalize(batch, scaling)


def taking_uint8(session: Any, scaling: str | None) -> Runner:
    """Return what takes uint8 images, whatever the session's graph does; the scaling is its own."""
    runner: Runner = session if scaling is None else _Scaling(session, scaling)
    return runner


class _Scaling:
    """Scales each batch and hands it on."""

    def __init__(self, session: Any, scaling: str) -> None:
        self._session, self._scaling = session, scaling
        self.provider = getattr(session, "provider", "?")
        self.close = getattr(session, "close", lambda: None)

    def __call__(self, batch: np.ndarray) -> np.ndarray:
        answers: np.ndarray = self._session(as_taken(batch, self._scaling))
        return answers
