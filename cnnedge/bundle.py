"""The bundle: what was built, as a folder that is complete or absent, and checked when it is read.

::

    manifest.json     what is here: every file with its SHA-256, every variant with its figures
    labels.txt        one label a line, in the order of the output
    model.*.onnx      the variants
    selftest/         golden images, the tensors they must become, the answers they must get
    engines/*.plan    TensorRT plans, each with its note
    report.html       the same as a page
    bundle.sig        where its maker signed it (`cnnedge.signature`); the manifest does not name it

The same in one zip file opens alike; see `archive`.
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from cnnedge.archive import MOST_TEXT, Unpacked, is_archive, name_problem, unpack
from cnnedge.documents import parse_json
from cnnedge.errors import MALFORMED, BundleError, SignatureError
from cnnedge.files import sha256
from cnnedge.kind import kind_of
from cnnedge.manifest import (
    LABELS,
    MANIFEST,
    REPORT,
    SCHEMA,
    SELFTEST,
    SHOWN,
    SIGNATURE,
    UNLISTED,
    Engine,
    Manifest,
    Variant,
    file_hashes,
    file_sizes,
)
from cnnedge.partial import is_partial
from cnnedge.sections import FileRecord

__all__ = [
    "LABELS",
    "MANIFEST",
    "REPORT",
    "SCHEMA",
    "SELFTEST",
    "SIGNATURE",
    "UNLISTED",
    "Bundle",
    "Engine",
    "Manifest",
    "Variant",
    "check_place",
    "describe_files",
    "file_hashes",
    "open_bundle",
    "place_inside",
    "require_folder",
    "weights_digest",
    "write_labels",
]


@dataclass(frozen=True)
class Bundle:
    """A bundle on disk whose files were checked against its manifest.

    Attributes:
        root: The folder with its files; a zip file's is temporary and goes with this object.
        manifest: What is in it.
        unpacked: What keeps that temporary folder; None where the bundle is a folder.
        signed: Whether its manifest is the very one that a signature covers. Then no file of it is
            opened by name once it was checked, since another may stand there by then.
    """

    root: Path
    manifest: Manifest
    unpacked: Unpacked | None = field(default=None, repr=False, compare=False)
    signed: bool = field(default=False, compare=False)

    def path(self, name: str) -> Path:
        """Return the path of one of its files.

        Raises:
            BundleError: the manifest does not list it, so that nothing vouches for what is in it;
                or it leaves the bundle.
        """
        if name not in self.files() | UNLISTED:
            raise BundleError(
                f"the manifest of {self.origin} does not list {name[:SHOWN]!r}",
                fix="do not use this bundle, or export it again",
            )
        return place_inside(self.root, name, self.origin)

    @property
    def origin(self) -> Path:
        """The folder or the zip file that was opened."""
        return self.root if self.unpacked is None else self.unpacked.archive

    def files(self) -> frozenset[str]:
        """Return the name of every file that belongs to it, the manifest included."""
        return frozenset(file_hashes(self.manifest)) | {MANIFEST}


def open_bundle(root: Path | str, *, manifest_sha256: str | None = None) -> Bundle:
    """Read a bundle, a folder or one zip file, and check every file of it.

    Args:
        root: The folder, or the file.
        manifest_sha256: What a signature names for a folder's manifest; None: nothing vouches for
            it. It is held against the very bytes that are read.

    Raises:
        BundleError: it is absent or incomplete, a file was altered, or a path leaves the bundle;
            or its archive holds what its manifest does not list.

    Examples:
        >>> bundle = cnnedge.open_bundle("digits")
        >>> bundle.manifest.variant("fp32").file
        'model.fp32.onnx'
    """
    root = Path(root)
    if not root.is_file():
        signed = manifest_sha256 is not None
        return Bundle(root, _read_checked_manifest(root, root, manifest_sha256), signed=signed)
    found = kind_of(root)
    if not is_archive(root) or found == "a Keras model":  # which is a zip archive too
        what = f"{root} is {found}, neither a bundle's folder nor a zip archive of one"
        raise BundleError(what, fix="give the bundle that it belongs to")
    unpacked = unpack(root, MANIFEST, UNLISTED, lambda text: file_sizes(_parse(text, root)))
    try:
        return Bundle(unpacked.folder, _read_checked_manifest(unpacked.folder, root), unpacked)
    except BaseException:
        unpacked.close()
        raise


def require_folder(bundle: Bundle, purpose: str) -> None:
    """Refuse to change a bundle that is a zip file.

    Args:
        bundle: The bundle.
        purpose: What would change it, as in "building engines".

    Raises:
        BundleError: it is one.
    """
    if bundle.unpacked is not None:
        raise BundleError(
            f"{bundle.origin} is a zip archive, and {purpose} writes into the bundle",
            fix="unpack it, do that to the folder, and package it again",
        )


def _parse(text: bytes, where: Path) -> Manifest:
    try:
        return Manifest.from_json(text)
    except ValueError as error:
        raise BundleError(
            f"the manifest of {where} cannot be read ({error})", fix="copy or export it again"
        ) from error


def read_manifest(root: Path, where: Path, digest: str | None = None) -> Manifest:
    """Return a folder's manifest, no file of it having been checked; ``where`` is for messages.

    Raises:
        BundleError: it is absent, or no manifest, or its SHA-256 is not ``digest``.
    """
    path = place_inside(root, MANIFEST, where)
    if not path.is_file():
        what = "is no bundle: it has no manifest.json" if root.is_dir() else "does not exist"
        raise BundleError(f"{root} {what}", fix="make one with `cnnedge export MODEL -o DIR`")
    try:
        if path.stat().st_size > MOST_TEXT:
            raise OSError(f"it has more than {MOST_TEXT} bytes")
        text = path.read_bytes()
    except OSError as error:
        raise BundleError(
            f"the manifest of {where} cannot be read ({error})", fix="copy or export it again"
        ) from error
    if digest is not None and hashlib.sha256(text).hexdigest() != digest:
        raise SignatureError(
            f"the manifest of {where} is not the one that was signed", fix="do not use this bundle"
        )
    return _parse(text, where)


def _read_checked_manifest(root: Path, where: Path, digest: str | None = None) -> Manifest:
    """Return a folder's manifest, every file having been checked; ``where`` is for messages."""
    manifest = read_manifest(root, where, digest)
    expected = file_hashes(manifest)
    for name in expected:
        place_inside(root, name, where)
    # Large first and two at a time: hashing is most of the time that loading a bundle takes.
    names = sorted(expected, key=lambda name: -_size(root / name))
    with ThreadPoolExecutor(max_workers=min(4, os.cpu_count() or 1)) as pool:
        found = dict(zip(names, pool.map(lambda name: _hash(root, name), names), strict=True))
    for name, digest in found.items():
        if digest != expected[name]:
            raise BundleError(
                f"{where / name} is not what the manifest names: it was altered or cut short",
                fix="copy or export the bundle again",
            )
    return manifest


def check_place(out: Path, *, force: bool) -> None:
    """Find out before minutes of work whether a bundle may be written there.

    Raises:
        BundleError: something is there, and ``force`` is false or it is neither an empty folder
            nor a bundle, whole or damaged: nothing else is replaced.
    """
    if not out.exists():
        return
    if not force:
        raise BundleError(f"{out} exists already", fix="choose another folder or pass --force")
    if not _claims_to_be_bundle(out) and not (out.is_dir() and not any(out.iterdir())):
        raise BundleError(f"{out} is no bundle, and is not replaced", fix="choose another folder")


def _claims_to_be_bundle(folder: Path) -> bool:
    try:  # a web page has a manifest.json too
        manifest = parse_json((folder / MANIFEST).read_bytes())
        return {"schema", "variants"} <= manifest.keys()
    except (OSError, *MALFORMED):
        return False


def describe_files(root: Path, names: list[str]) -> dict[str, FileRecord]:
    """Return size and hash of files inside ``root``, as the manifest lists them."""
    return {
        name: FileRecord((root / name).stat().st_size, sha256(root / name))
        for name in sorted(names)
    }


def write_labels(root: Path, labels: tuple[str, ...]) -> None:
    """Write ``labels.txt``.

    Raises:
        BundleError: a label holds a line break, which the file could not say.
    """
    for label in labels:
        if len(label.splitlines()) > 1 or label != label.strip("\r\n"):
            raise BundleError(f"the label {label!r} holds a line break", fix="rename that class")
    (root / LABELS).write_text("".join(f"{label}\n" for label in labels), encoding="utf-8")


def weights_digest(arrays: Mapping[str, Any]) -> str:
    """Return the SHA-256 of named weight arrays, in name order."""
    digest = hashlib.sha256()
    for name in sorted(arrays):
        digest.update(name.encode())
        digest.update(memoryview(arrays[name]).cast("B"))
    return digest.hexdigest()


def place_inside(root: Path, name: str, where: Path) -> Path:
    """Return the path of a file inside a bundle's folder: THE check of every name in a document.

    Args:
        root: The folder.
        name: The file's name as a document of the bundle has it.
        where: The bundle, for messages.

    Raises:
        BundleError: the name leaves the folder, by its spelling or through a link, or is that of
            something else than an ordinary file. A file that is not there yet passes.
    """
    problem = "which lies outside the bundle" if name_problem(name) else None
    if any(is_partial(part) for part in PurePosixPath(name).parts):
        problem = "which is a part of an unfinished run"  # no signature covers that
    place = root
    for part in () if problem else PurePosixPath(name).parts:
        place = place / part
        try:
            mode = place.lstat().st_mode
        except (OSError, ValueError):  # whoever reads it says that it is missing
            continue
        if stat.S_ISLNK(mode):
            problem = "which is a link and may lead outside the bundle"
        elif not stat.S_ISREG(mode) and (not stat.S_ISDIR(mode) or place == root / name):
            problem = "which is no ordinary file"
    if problem is not None:
        shown = name if len(name) <= SHOWN else f"{name[:SHOWN]}…"
        raise BundleError(f"{where} names {shown!r}, {problem}", fix="do not use this bundle")
    return root / name


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


def _hash(root: Path, name: str) -> str:
    try:
        return sha256(root / name)
    except OSError as error:
        raise BundleError(
            f"{root / name} is missing or cannot be read ({error.strerror})",
            fix="copy or export the bundle again",
        ) from error
