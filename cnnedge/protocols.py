"""What a loaded model is to those who call it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import numpy as np


class Runner(Protocol):
    """A loaded model. What else it may have is used where it is there.

    ``provider``: what really runs it. ``staged(batch)``: a call by part, `measurement.Staged`.
    ``serial``: whether it serves one call at a time.
    ``timed(batch)``: the same on a GPU, `measurement.GpuTimes`. ``layer_times(batch, calls)``: mean
    seconds of each node. ``close()``: gives back what it holds.
    """

    def __call__(self, batch: np.ndarray, /) -> np.ndarray:
        """Return probabilities float32 ``[N, classes]`` of uint8 images ``[N, H, W, C]``."""
