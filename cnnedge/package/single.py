"""One ONNX file that an app opens by itself: a variant with all that is needed in its metadata."""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cnnedge.bundle import Bundle, Variant
from cnnedge.errors import BundleError, MissingExtraError, ModelError
from cnnedge.files import atomic_path
from cnnedge.graph.write import PROTOBUF_LIMIT, metadata_bytes
from cnnedge.metadata import (
    META_BUNDLE,
    META_NORMALIZATION,
    META_PRECISION,
    META_SOURCE_BYTES,
    META_SOURCE_SHA256,
    META_TARGET,
    META_VARIANT,
    META_VERDICT,
    read_metadata,
)
from cnnedge.package.place import check_file
from cnnedge.runtime import choose
from cnnedge.runtime.opening import onnxruntime_backend
from cnnedge.runtime.single import check_contract

_CHUNK = 2**20


@dataclass(frozen=True)
class SingleFile:
    """What was written.

    Attributes:
        file: The file.
        variant: Which variant it holds.
        reason: Why that one.
        bytes: Its size.
        sha256: Its hash.
        source_sha256: That of the bundle's file.
    """

    file: str
    variant: str
    reason: str
    bytes: int
    sha256: str
    source_sha256: str

    def to_dict(self) -> dict[str, Any]:
        """Return it as JSON-able data."""
        return asdict(self)


def write_single(
    bundle: Bundle,
    out: Path | str,
    *,
    variant: str | None = None,
    any_size: bool = False,
    force: bool = False,
) -> SingleFile:
    """Write one variant of a bundle as one ONNX file that tells all that is needed to run it.

    The graph stays byte for byte what was verified: the metadata is appended. With ``any_size``
    the resize goes in front of it, and it is held against the bundle's on the golden images.

    Args:
        bundle: The bundle.
        out: The file, which appears once it is complete and was read back.
        variant: Which; None: the one that `cnnedge.load` picks on this machine's CPU.
        any_size: Whether the graph takes images of any size and resizes them itself, as
            `cnnedge.load` does.
        force: Whether a file that exists is replaced.

    Raises:
        BundleError: there is no such variant, or its file's metadata is not the manifest's.
        ModelError: its graph takes no uint8 image that could be resized.
        GateError: it answers otherwise with the resize inside.
        MissingExtraError: ONNX Runtime, which reads the metadata, is not installed; or onnx, which
            changes the graph.
        CnnEdgeError: the file exists, or cannot be written.
    """
    out = Path(out)
    if out.suffix != ".onnx":
        raise ModelError(f"{out} does not end in .onnx", fix="name the file F.onnx")
    backend = onnxruntime_backend()
    check_file(bundle, out, force=force)
    choice = choose(bundle, variant)
    chosen, source = choice.variant, bundle.path(choice.variant.file)
    check_variant(bundle, chosen)
    resized = _with_resize(bundle, chosen) if any_size else None
    graph_bytes = chosen.bytes if resized is None else len(resized)
    graph_sha256 = chosen.sha256 if resized is None else hashlib.sha256(resized).hexdigest()
    addition = metadata_bytes(_entries(bundle, chosen, graph_sha256, graph_bytes))
    if graph_bytes + len(addition) > PROTOBUF_LIMIT:
        raise ModelError(f"{out} would exceed the 2 GiB of an ONNX file", fix="compress the model")
    written = hashlib.sha256()
    with atomic_path(out) as temporary:
        with open(temporary, "wb") as file:
            if resized is None:
                copy_checked(source, file, chosen.sha256, written)
            else:
                file.write(resized)
                written.update(resized)
            file.write(addition)
        written.update(addition)
        facts = backend.read_facts(temporary)
        check_contract(facts, read_metadata(facts.metadata, str(out)), str(out))
    return SingleFile(
        str(out),
        chosen.name,
        choice.reason,
        out.stat().st_size,
        written.hexdigest(),
        chosen.sha256,
    )


def _with_resize(bundle: Bundle, variant: Variant) -> bytes:
    """Return a variant's graph with the resize in front, which answers like the one without."""
    try:
        from cnnedge.graph.resize import put_resize
        from cnnedge.graph.resize_check import check_resize

        plain = bundle.path(variant.file).read_bytes()
        if hashlib.sha256(plain).hexdigest() != variant.sha256:
            raise BundleError(f"{variant.file} changed since it was opened", fix="open it again")
        resized = put_resize(plain, bundle.manifest.image)
    except ImportError as error:
        raise MissingExtraError("onnx", "export", purpose="--any-size") from error
    golden = sorted(bundle.path(n) for n in bundle.manifest.files if "/golden-" in n)
    check_resize(
        plain, resized, bundle.manifest.image, map(str, golden), precision=variant.precision
    )
    return resized


def check_variant(bundle: Bundle, variant: Variant) -> Any:
    """Return what a variant's file says of itself (`ModelFacts`), held against the manifest.

    Raises:
        BundleError: its labels or its image contract are others than the manifest's.
        ModelError: it has none.
    """
    where = str(bundle.origin / variant.file)
    facts = onnxruntime_backend().read_facts(bundle.path(variant.file))
    about = read_metadata(facts.metadata, where)
    check_contract(facts, about, where)
    manifest = bundle.manifest
    for what, found, expected in (
        ("labels", about.labels, manifest.labels),
        ("image contract", about.image, manifest.image),
    ):
        if found != expected:
            raise BundleError(
                f"the {what} in {where} are not those of the manifest", fix="export it again"
            )
    return facts


def copy_checked(path: Path, target: Any, sha256: str | None, *more: Any) -> None:
    """Copy a file of a bundle into an open one; hashes in ``more`` are told of the bytes, too.

    Raises:
        BundleError: what was copied has another SHA-256 than when the bundle was opened.
    """
    digest = hashlib.sha256()
    with open(path, "rb") as source:
        while chunk := source.read(_CHUNK):
            target.write(chunk)
            for one in (digest, *more):
                one.update(chunk)
    if sha256 not in {None, digest.hexdigest()}:
        raise BundleError(f"{path} changed while it was read", fix="package it again")


def _entries(bundle: Bundle, variant: Variant, sha256: str, size: int) -> dict[str, str]:
    verdict = variant.verdict
    return {
        META_BUNDLE: bundle.manifest.name,
        META_VARIANT: variant.name,
        META_PRECISION: variant.precision,
        META_TARGET: variant.target,
        META_NORMALIZATION: bundle.manifest.normalization,
        META_VERDICT: "not verified: no gate was applied"
        if verdict is None
        else f"{verdict.status}: {verdict.reason}",
        META_SOURCE_SHA256: sha256,
        META_SOURCE_BYTES: str(size),
    }
