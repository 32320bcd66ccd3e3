"""The manifest of a bundle as a record; docs/manifest.md says what each field means."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from msgspec import to_builtins

from cnnedge.archive import Sizes
from cnnedge.comparison import Comparison, Verdict
from cnnedge.documents import Amount, Count, Labels, Name, Points, Sha256, hold, parse_json
from cnnedge.errors import BundleError
from cnnedge.image import ImageContract, normalizations_of
from cnnedge.machine import Machine
from cnnedge.measurement import Recommendation
from cnnedge.plan import RuntimeName
from cnnedge.sections import (
    CalibrationRecord,
    DataRecord,
    FileRecord,
    Latency,
    ModelRecord,
    ReferenceRecord,
)

SCHEMA = 1
MANIFEST = "manifest.json"
LABELS = "labels.txt"
REPORT = "report.html"
SELFTEST = "selftest"
SIGNATURE = "bundle.sig"
# What an archive may hold although its manifest does not list it: a signature covers the manifest.
UNLISTED = frozenset({SIGNATURE})
SHOWN = 80  # characters of a name in a message
Precision = Literal["fp32", "fp16", "int8", "int8-weight", "int4-weight"]
TargetName = Literal["any", "cpu", "trt"]


@dataclass(frozen=True)
class Variant:
    """One exported model of a bundle.

    Attributes:
        name: "fp32", "fp16", "int8" or "int8-trt".
        file: Its path inside the bundle.
        sha256: The file's hash.
        bytes: The file's size.
        precision: What was asked for: "fp32", "fp16" or "int8".
        target: Which runtimes its graph is written for: "any", "cpu" or "trt".
        achieved: Share of MACs and of weights per data type, read from the graph.
        accuracy: How it compares with Keras; None where nothing was measured.
        verdict: Whether it passed its gate, or None.
        provider: The ONNX Runtime provider that really gave those answers.
        latency: On the machine of the export, or None.
        quantization: How it was quantized and what was tried, or None where it was not.
        recommendation: For the machine of the export, or None.
    """

    name: Name
    file: str
    sha256: Sha256
    bytes: Count
    precision: Precision
    target: TargetName
    achieved: Mapping[str, Mapping[str, Amount]] = field(default_factory=dict)
    accuracy: Comparison | None = None
    verdict: Verdict | None = None
    provider: str | None = None
    latency: Latency | None = None
    quantization: Mapping[str, Any] | None = None
    recommendation: Recommendation | None = None

    @property
    def recommended(self) -> bool:
        """Whether it beat its higher-precision sibling on the machine of the export."""
        return self.recommendation is not None and self.recommendation.recommended

    @property
    def verified(self) -> bool:
        """Whether this variant was held against the reference and did not fail its gate."""
        return self.verdict is not None and not self.verdict.failed


@dataclass(frozen=True)
class Engine:
    """One TensorRT plan of a bundle; its note tells what it was built from and for.

    Attributes:
        variant: The variant it was built from.
        runtime: "tensorrt" or "rtx".
        file: The plan's path inside the bundle; likewise its hash and size.
        note: The note's path; likewise its hash.
    """

    variant: Name
    runtime: RuntimeName
    file: str
    sha256: Sha256
    bytes: Count
    note: str
    note_sha256: Sha256


@dataclass(frozen=True)
class Manifest:
    """Everything a receiver has to know of a bundle; see docs/manifest.md for each field."""

    name: str
    model: ModelRecord
    image: ImageContract
    normalization: str
    input: Literal["uint8", "float32"]
    labels: Labels
    variants: tuple[Variant, ...]
    engines: tuple[Engine, ...] = ()
    reference: ReferenceRecord = field(default_factory=ReferenceRecord)
    data: DataRecord = field(default_factory=DataRecord)
    calibration: CalibrationRecord | None = None
    machine: Machine | None = None
    tools: Mapping[str, str] = field(default_factory=dict)
    max_drop: Points = 0.5
    files: Mapping[str, FileRecord] = field(default_factory=dict)
    recipe: Mapping[str, Any] | None = None
    schema: int = SCHEMA

    def __post_init__(self) -> None:
        known = normalizations_of(self.image.channels)
        if self.normalization not in known:
            shown = f"{self.normalization[:SHOWN]!r} is none of {', '.join(known)}"
            raise ValueError(f"normalization {shown}")

    def variant(self, name: str) -> Variant:
        """Return the variant of that name.

        Raises:
            BundleError: there is none.
        """
        for variant in self.variants:
            if variant.name == name:
                return variant
        known = ", ".join(variant.name for variant in self.variants)
        raise BundleError(f"{self.name} has no variant {name!r}", fix=f"choose one of: {known}")

    def to_json(self) -> str:
        """Return the manifest as a JSON document."""
        return json.dumps(self.to_dict(), indent=1) + "\n"

    def to_dict(self) -> dict[str, Any]:
        """Return it as JSON-able data, with what follows from its fields."""
        document: dict[str, Any] = to_builtins(self)
        document["image"] = self.image.to_dict()
        for variant, entry in zip(self.variants, document["variants"], strict=True):
            if variant.accuracy is not None:
                entry["accuracy"] = variant.accuracy.to_dict()
        return document

    @staticmethod
    def from_json(text: str | bytes) -> Manifest:
        """Read what `to_json` wrote; fields that this cnnedge does not know are left out.

        Raises:
            ValueError: it is no manifest of this schema; the message says what is wrong with it.
        """
        fields = parse_json(text)
        found = fields.get("schema") if isinstance(fields, dict) else None
        if found != SCHEMA or isinstance(found, bool):
            raise ValueError(f"schema {str(found)[:40]}, this cnnedge reads {SCHEMA}")
        manifest = hold(fields, Manifest)
        _refuse_doubles("variants", [variant.name for variant in manifest.variants])
        _refuse_doubles("files", [MANIFEST, SIGNATURE, *_names(manifest)])
        return manifest


def _names(manifest: Manifest) -> list[str]:
    """Return the name of every file that a manifest lists, as often as it does."""
    plans = [name for engine in manifest.engines for name in (engine.file, engine.note)]
    return [*(variant.file for variant in manifest.variants), *plans, *manifest.files]


def _refuse_doubles(what: str, names: list[str]) -> None:
    """Refuse a name that stands for two things: one of them would be taken for the other."""
    twice = sorted(name for name, count in Counter(names).items() if count > 1)
    if twice:
        raise ValueError(f"two {what} are called {twice[0][:SHOWN]!r}")


def file_sizes(manifest: Manifest) -> Sizes:
    """Return every file that a manifest lists, with its size where it names one."""
    sizes: dict[str, int | None] = {variant.file: variant.bytes for variant in manifest.variants}
    sizes |= {name: entry.bytes for name, entry in manifest.files.items()}
    sizes |= {engine.file: engine.bytes for engine in manifest.engines}
    return sizes | {engine.note: None for engine in manifest.engines}


def file_hashes(manifest: Manifest) -> dict[str, str]:
    """Return every file that a manifest lists, with its hash."""
    hashes = {variant.file: variant.sha256 for variant in manifest.variants}
    hashes |= {name: entry.sha256 for name, entry in manifest.files.items()}
    hashes |= {engine.file: engine.sha256 for engine in manifest.engines}
    return hashes | {engine.note: engine.note_sha256 for engine in manifest.engines}
