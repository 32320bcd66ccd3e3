"""What is read of a manifest besides the fields of `Manifest` and `Variant` themselves.

Their sections are data as the export recorded it, and grow with every release. So a section's type
names what some command goes by, and no more.
"""

from __future__ import annotations

from typing import Any, Literal

from msgspec import Struct, field

from cnnedge.documents import Amount, Count, Finite, Positive, Sha256, Share
from cnnedge.result import DATA_TYPES, STATUSES


class Accuracy(Struct, frozen=True):
    """What `Comparison.to_dict` wrote."""

    n: Count
    top1: Share
    top5: Share
    reference_top1: Share
    reference_top5: Share
    agreement: Share
    lost: Count
    won: Count
    drop_points: Finite
    drop_interval_points: tuple[Finite, Finite]
    smallest_drop_points: Finite
    max_abs_diff: float | None = None  # NaN, where an answer was: no gate passed that variant


class Verdict(Struct, frozen=True):
    """What `result.Verdict` is as data."""

    status: str
    reason: str

    def __post_init__(self) -> None:
        if self.status not in STATUSES:
            raise ValueError(f"status {self.status[:40]!r} is none of {', '.join(STATUSES)}")


class Latency(Struct, frozen=True):
    """What `Measurement.to_dict` wrote."""

    median_ms: Positive


class Recommendation(Struct, frozen=True):
    """What `result.Recommendation` is as data."""

    recommended: bool


class VariantSections(Struct, frozen=True):
    """Of one variant."""

    precision: str
    target: Literal["any", "cpu", "trt"]
    achieved: dict[str, dict[str, Amount]] = field(default_factory=dict)
    accuracy: Accuracy | None = None
    verdict: Verdict | None = None
    latency: Latency | None = None
    recommendation: Recommendation | None = None

    def __post_init__(self) -> None:
        if self.precision not in DATA_TYPES:
            known = ", ".join(DATA_TYPES)
            raise ValueError(f"precision {self.precision[:40]!r} is none of {known}")


class File(Struct, frozen=True):
    """Of one file that is no variant, no plan and no note."""

    bytes: Count
    sha256: Sha256


class Model(Struct, frozen=True):
    """Where the weights come from, and what the Keras network gives."""

    weights: Literal["random", "trained", "user"] | None = None
    emits: str | None = None


class Reference(Struct, frozen=True):
    """Keras itself."""

    bytes: Count = 0
    top1: Share | None = None


class Data(Struct, frozen=True):
    """The test images."""

    test_sha256: str | None = None


class Calibration(Struct, frozen=True):
    """The images that the scales were taken from."""

    sha256: str | None = None
    image_sha256: tuple[str, ...] = ()


class Machine(Struct, frozen=True):
    """Where it was exported."""

    cpu: str | None = None


class Sections(Struct, frozen=True):
    """All of them, where they stand in the document."""

    model: Model
    variants: tuple[VariantSections, ...]
    files: dict[str, File] = field(default_factory=dict)
    reference: Reference = field(default_factory=Reference)
    data: Data = field(default_factory=Data)
    calibration: Calibration = field(default_factory=Calibration)
    machine: Machine = field(default_factory=Machine)
    tools: dict[str, Any] = field(default_factory=dict)
