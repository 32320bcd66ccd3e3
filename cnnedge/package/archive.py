"""A bundle in one zip file, which `cnnedge.load` and every command open as it is."""

from __future__ import annotations

import hashlib
import stat
import zipfile
import zlib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cnnedge.bundle import MANIFEST, UNLISTED, Bundle, Manifest, file_hashes
from cnnedge.errors import BundleError
from cnnedge.files import atomic_path, sha256
from cnnedge.package.place import check_file
from cnnedge.package.single import copy_checked

# The first moment that a zip file can name: the same bundle gives the same bytes.
_MOMENT = (1980, 1, 1, 0, 0, 0)
_UNIX = 3
_PAYS = 0.8  # of its size: what deflating must leave of a file at most
_SAMPLES, _SAMPLE = 16, 2**16  # of a large file


@dataclass(frozen=True)
class Archive:
    """What was written.

    Attributes:
        file: The zip file.
        files: How many files are in it.
        bytes: Its size.
        sha256: Its hash.
    """

    file: str
    files: int
    bytes: int
    sha256: str

    def to_dict(self) -> dict[str, Any]:
        """Return it as JSON-able data."""
        return asdict(self)


def write_archive(bundle: Bundle, out: Path | str, *, force: bool = False) -> Archive:
    """Write a bundle as one zip file.

    The same bundle gives the same bytes: names in order, one date, and no rights but the owner's.

    Args:
        bundle: The bundle.
        out: The file, which appears once it is complete.
        force: Whether a file that exists is replaced.

    Raises:
        BundleError: a file of the bundle changed while it was read.
        CnnEdgeError: the file exists, or cannot be written.
    """
    out = Path(out)
    check_file(bundle, out, force=force)
    hashes: dict[str, str | None] = {
        **file_hashes(bundle.manifest),
        MANIFEST: _manifest_hash(bundle),
    }
    hashes |= {name: None for name in UNLISTED if bundle.path(name).is_file()}
    with (
        atomic_path(out) as temporary,
        zipfile.ZipFile(temporary, "w") as archive,
    ):
        for name in sorted(hashes):
            _add(archive, bundle, name, hashes[name])
    return Archive(str(out), len(hashes), out.stat().st_size, sha256(out))


def _add(archive: zipfile.ZipFile, bundle: Bundle, name: str, digest: str | None) -> None:
    path = bundle.path(name)
    info = zipfile.ZipInfo(name, _MOMENT)
    info.create_system = _UNIX
    info.external_attr = (stat.S_IFREG | 0o644) << 16
    info.file_size = path.stat().st_size
    info.compress_type = zipfile.ZIP_DEFLATED if _pays(path) else zipfile.ZIP_STORED
    with archive.open(info, "w") as target:
        copy_checked(path, target, digest)


def _manifest_hash(bundle: Bundle) -> str:
    """Return the SHA-256 of the manifest, which must still list what was opened.

    Its bytes are taken as they are and not written anew: a signature covers them.
    """
    path = bundle.path(MANIFEST)
    try:
        text = path.read_bytes()
        same = file_hashes(Manifest.from_json(text)) == file_hashes(bundle.manifest)
    except (OSError, ValueError):
        same = False
    if not same:
        raise BundleError(f"{path} changed since it was opened", fix="package it again")
    return hashlib.sha256(text).hexdigest()


def _pays(path: Path) -> bool:
    """Whether deflating a file makes it enough smaller; of a large one, samples tell.

    Weights of a trained network hardly shrink, and a stored one is read at the disk's speed.
    """
    size = path.stat().st_size
    step = max(_SAMPLE, size // _SAMPLES)
    with open(path, "rb") as file:
        sample = b"".join(_read_at(file, place) for place in range(0, size, step))
    return len(zlib.compress(sample, 6)) <= _PAYS * len(sample) if sample else False


def _read_at(file: Any, place: int) -> bytes:
    file.seek(place)
    return file.read(_SAMPLE)
