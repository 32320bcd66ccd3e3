"""One ONNX file as a classifier: what `cnnedge package --onnx` writes, opened without its bundle.

The labels and the image contract come from the file's metadata. There is no self-test in it and no
manifest: `cnnedge verify` needs the bundle.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, cast

from cnnedge.bundle import Variant
from cnnedge.comparison import Status, Verdict
from cnnedge.errors import BundleError, ModelError
from cnnedge.files import sha256
from cnnedge.image import normalizations_of
from cnnedge.manifest import Precision, TargetName
from cnnedge.metadata import About, read_metadata
from cnnedge.protocols import Runner
from cnnedge.runtime.choice import Choice
from cnnedge.runtime.contract import check_ends
from cnnedge.runtime.opening import onnxruntime_backend, open_file
from cnnedge.runtime.uint8 import scaling_before, taking_uint8
from cnnedge.runtimes import GraphFile, RunSettings

if TYPE_CHECKING:
    from cnnedge.backends.onnxruntime import ModelFacts

_CHUNK = 2**20


@dataclass(frozen=True)
class Single:
    """One ONNX file that was opened.

    Attributes:
        session: What runs it.
        choice: Its variant.
        about: What its metadata tells.
    """

    session: Runner
    choice: Choice
    about: About


def open_single(path: Path, variant: str | None, settings: RunSettings) -> Single:
    """Open one ONNX file.

    Args:
        path: The file.
        variant: The variant that it must be; None: whichever it is.
        settings: How it is run.

    Raises:
        ModelError: it was not written by cnnedge, or does not fit what its metadata says.
        BundleError: it is another variant, was altered since it was packaged, or a plan was asked
            for, which is in no ONNX file.
        MissingExtraError, BackendError: as `load` does.
    """
    backend = onnxruntime_backend()
    session = None
    if settings.runtime == "cpu":
        session = backend.open_session(path, threads=settings.threads)
    facts = backend.read_facts(path) if session is None else session.facts
    about = read_metadata(facts.metadata, str(path))
    check_contract(facts, about, str(path))
    scaling = scaling_before(facts.input.dtype, about.normalization or "")
    if scaling is not None and scaling not in normalizations_of(about.image.channels):
        raise ModelError(
            f"{path} takes float32 and does not say how its pixels are normalized",
            fix="package it with `cnnedge package BUNDLE --onnx FILE`",
        )
    if variant is not None and variant != about.variant:
        raise BundleError(
            f"{path} holds the variant {about.variant!r} alone, and {variant!r} was asked for",
            fix="load the bundle, or package that variant",
        )
    if settings.row.runs_plans and not settings.rebuild:
        raise BundleError(
            f"{path} is one ONNX file and holds no plan for {settings.runtime}",
            fix="load the bundle, or pass rebuild=True",
        )
    _check_source(path, about)
    found = _as_variant(path, about)
    choice = Choice(found, f"the only one in {path.name}")
    if session is not None:
        return Single(taking_uint8(session, scaling), choice, about)
    image = about.image.shape
    graph = GraphFile(path, found.name, found.sha256, found.precision, image, scaling)
    return Single(open_file(graph, settings), choice, about)


def check_contract(facts: ModelFacts, about: About, where: str) -> None:
    """Refuse a graph whose input or output is not what its metadata says.

    Raises:
        ModelError: it is not; the message names what differs.
    """
    labels = len(about.labels)
    check_ends(facts, about.image, labels, where, said_by="its metadata", any_size=about.any_size)


def _check_source(path: Path, about: About) -> None:
    """Find out whether the file still begins with the bytes that were packaged."""
    if about.source_sha256 is None:
        return
    digest, left = hashlib.sha256(), about.source_bytes
    with open(path, "rb") as file:
        while left > 0 and (chunk := file.read(min(_CHUNK, left))):
            digest.update(chunk)
            left -= len(chunk)
    if left or digest.hexdigest() != about.source_sha256:
        raise BundleError(
            f"{path} is not what was packaged: it was altered since", fix="package it again"
        )


def _as_variant(path: Path, about: About) -> Variant:
    status, _, reason = about.verdict.partition(": ")
    return Variant(
        about.variant,
        path.name,
        about.source_sha256 or sha256(path),
        path.stat().st_size,
        cast("Precision", about.precision),
        cast("TargetName", about.target),
        verdict=Verdict(cast("Status", status), reason) if status else None,
    )
