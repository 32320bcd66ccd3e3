"""What an ONNX file says of itself in ``metadata_props``: enough to run it without its bundle."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass

from cnnedge.errors import MALFORMED, ModelError
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
        labels = json.loads(metadata[META_LABELS])
        if not isinstance(labels, list) or not all(isinstance(label, str) for label in labels):
            raise ValueError("the labels are no list of texts")
        return About(
            tuple(labels),
            ImageContract.from_dict(json.loads(metadata[META_IMAGE])),
            name=metadata.get(META_BUNDLE, metadata.get(META_MODEL, "")),
            variant=metadata.get(META_VARIANT, "model"),
            precision=metadata.get(META_PRECISION, ""),
            target=metadata.get(META_TARGET, "any"),
            normalization=metadata.get(META_NORMALIZATION),
            verdict=metadata.get(META_VERDICT, ""),
            source_sha256=metadata.get(META_SOURCE_SHA256),
            source_bytes=int(metadata.get(META_SOURCE_BYTES, 0)),
            any_size=metadata.get(META_RESIZE) == IN_THE_GRAPH,
        )
    except MALFORMED as error:
        raise ModelError(
            f"the metadata of {where} cannot be read ({error})", fix="package the bundle again"
        ) from error
