"""The sections of a manifest as records; docs/manifest.md says what each field means."""

from __future__ import annotations

from typing import Literal

from msgspec import Struct

from cnnedge.documents import Count, Finite, Positive, Sha256, Share

Weights = Literal["random", "trained", "user"]


class Latency(Struct, frozen=True, kw_only=True):
    """Single stream, batch 1, the runtime call alone; milliseconds."""

    median_ms: Positive
    p90_ms: Positive | None = None
    p99_ms: Positive | None = None
    n: Count = 0
    images: Count = 1
    gpu: dict[str, Finite] | None = None
    doubt: str | None = None


class FileRecord(Struct, frozen=True):
    """One file that is no variant, no plan and no note."""

    bytes: Count
    sha256: Sha256


class ModelRecord(Struct, frozen=True, kw_only=True):
    """Where the weights come from, and what the Keras network gives."""

    origin: str = ""
    weights: Weights | None = None
    weights_sha256: str = ""
    parameters: Count = 0
    emits: str | None = None
    output: str | None = None
    computes_in: tuple[str, ...] = ("float32",)

    @property
    def trained(self) -> bool:
        """Whether accuracy means anything."""
        return self.weights != "random"


class ReferenceRecord(Struct, frozen=True, kw_only=True):
    """Keras itself."""

    runtime: str = "keras"
    top1: Share | None = None
    top5: Share | None = None
    guessing: str | None = None
    bytes: Count = 0
    latency: Latency | None = None


class DataRecord(Struct, frozen=True, kw_only=True):
    """The test images."""

    source: str | None = None
    test_images: Count = 0
    test_sha256: str | None = None


class ConvergencePoint(Struct, frozen=True, kw_only=True):
    """How far the scales after so many images were from the final ones."""

    images: Count
    median_change: Finite
    largest_change: Finite


class CalibrationRecord(Struct, frozen=True, kw_only=True):
    """The images that the scales were taken from."""

    source: str | None = None
    split: str = ""
    images: Count = 0
    sha256: str | None = None
    image_sha256: tuple[str, ...] = ()
    method: str = ""
    convergence: tuple[ConvergencePoint, ...] = ()
    enough_images: Count = 0
