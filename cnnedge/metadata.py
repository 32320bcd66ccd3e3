"""What an ONNX file says of itself in ``metadata_props``: enough to run it without its bundle."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Literal

from msgspec import Meta, Struct, field

from cnnedge.documents import Labels, Name, Sha256, hold, read_as
from cnnedge.errors import ModelError
from cnnedge.image import ImageContract

META_LABELS = "cnnedge.labels"
META_IMAGE = "cnnedge.image"
META_MODEL = "cnnedge.model"
META_VERSION = "cnnedge.version"
# What `cnnedge package --onnx` adds.
META_BUNDLE = "cnnedge.bundle"
META_VARIANT = "cnnedge.variant"
META_PRECISION = "cnnedge.precision"
META_TARGET = "cnnedge.target"
META_NORMALIZATION = "cnnedge.normalization"
META_VERDICT = "cnnedge.verdict"
META_SOURCE_SHA256 = "cnnedge.source_sha256"
META_SOURCE_BYTES = "cnnedge.source_bytes"
META_RESIZE = "cnnedge.resize"
IN_THE_GRAPH = "in the graph"


@dataclass(frozen=True)
class TensorFacts:
    """An input or output of a graph: its name, NumPy type, and shape; None for a free dimension."""

    name: str
    dtype: str
    shape: tuple[int | None, ...]


@dataclass(frozen=True)
class Ends:
    """The one input and the one output of a classifier's graph."""

    input: TensorFacts
    output: TensorFacts


@dataclass(frozen=True)
class About:
    """What the metadata tells of a classifier.

    Attributes:
        labels: The classes, in the order of the output.
        image: The image contract.
        name: What the bundle, or else the model, is called.
        variant: The variant's name; "model" where the file does not say.
        precision: What was asked for: "fp32", "fp16", "int8" …; likewise.
        target: Which runtimes the graph is written for: "any", "cpu" or "trt".
        normalization: What a float32 graph wants of its pixels; None where the file does not say.
        verdict: The gate's verdict on the accuracy, in one sentence; empty where not told.
        source_sha256: Of the graph as it was packaged, with which the file begins; None where it
            was not packaged.
        source_bytes: The size of that.
        any_size: Whether it takes images of any size, and resizes them in its graph.
    """

    labels: tuple[str, ...]
    image: ImageContract
    name: str = ""
    variant: str = "model"
    precision: str = ""
    target: str = "any"
    normalization: str | None = None
    verdict: str = ""
    source_sha256: str | None = None
    source_bytes: int = 0
    any_size: bool = False


class _Told(Struct):
    """What has a form of its own; a whole number is text here."""

    variant: Name = field(name=META_VARIANT, default="model")
    precision: Annotated[str, Meta(pattern=r"\A([a-z0-9-]{1,32})?\Z")] = field(
        name=META_PRECISION, default=""
    )
    target: Literal["any", "cpu", "trt"] = field(name=META_TARGET, default="any")
    source_sha256: Sha256 | None = field(name=META_SOURCE_SHA256, default=None)
    source_bytes: Annotated[str, Meta(pattern=r"\A[0-9]{1,15}\Z")] = field(
        name=META_SOURCE_BYTES, default="0"
    )


def read_metadata(metadata: Mapping[str, str], where: str) -> About:
    """Read an ONNX file's metadata.

    Args:
        metadata: Its ``metadata_props``.
        where: The file, for messages.

    Raises:
        ModelError: it was not written by cnnedge, or cannot be read.
    """
    if META_LABELS not in metadata or META_IMAGE not in metadata:
        raise ModelError(
            f"{where} carries no labels and no image contract of cnnedge: it is another tool's",
            fix="write one with `cnnedge package BUNDLE --onnx FILE`",
        )
    try:
        labels = read_as(metadata[META_LABELS], Labels)
        told = hold(dict(metadata), _Told)
        return About(
            labels,
            read_as(metadata[META_IMAGE], ImageContract),
            name=metadata.get(META_BUNDLE, metadata.get(META_MODEL, "")),
            variant=told.variant,
            precision=told.precision,
            target=told.target,
            normalization=metadata.get(META_NORMALIZATION),
            verdict=metadata.get(META_VERDICT, ""),
            source_sha256=told.source_sha256,
            source_bytes=int(told.source_bytes),
            any_size=metadata.get(META_RESIZE) == IN_THE_GRAPH,
        )
    except ValueError as error:
        raise ModelError(
            f"the metadata of {where} cannot be read ({error})", fix="package the bundle again"
        ) from error
