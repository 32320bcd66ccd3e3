"""A bundle in one zip file: what may be in it, and how it is unpacked.

An archive comes from elsewhere, so nothing it declares is believed: names are held against the
manifest's list, sizes against the manifest's and then against what really comes out, and nothing
is written outside a folder of its own. The hashes are checked after that, as for a folder.
"""

from __future__ import annotations

import io
import os
import stat
import struct
import tempfile
import unicodedata
import weakref
import zipfile
import zlib
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from cnnedge.errors import BundleError, CnnEdgeError
from cnnedge.files import cannot_write, require_space, temporary_partial
from cnnedge.partial import Partial

MOST_ENTRIES = 4096
MOST_TEXT = 16 * 2**20  # bytes of the manifest, and of a file for which it names no size
MOST_EXPANSION = 100  # times the archive's own size; DEFLATE goes to 1032
_LONGEST_NAME = 255  # bytes, which is what file systems take
_MOST_AT_ONCE = 4 * 2**20  # bytes; a directory of MOST_ENTRIES fits
_CHUNK = 2**20
_ENCRYPTED = 0x1 | 0x40 | 0x2000  # traditional, strong, and a hidden directory
# What zipfile raises of an archive that was cut or changed. RuntimeError is its word for a
# password or a compression that it does not know.
_DAMAGED = (
    *(zipfile.BadZipFile, zipfile.LargeZipFile, zlib.error, struct.error),
    *(EOFError, ValueError, RuntimeError, OverflowError, KeyError, OSError, MemoryError),
)

Sizes = Mapping[str, "int | None"]


class Unpacked:
    """An archive's content in a private temporary folder, which goes when this object does.

    Attributes:
        archive: The archive.
        folder: Where its files lie. Readable by this user alone.
    """

    def __init__(self, archive: Path) -> None:
        self.archive = archive
        partial = temporary_partial()
        self.folder = partial.new
        # A forked child must not take its parent's files away when it ends.
        self._remove = weakref.finalize(self, _remove, partial, os.getpid())

    def close(self) -> None:
        """Delete the folder now."""
        self._remove()


def is_archive(path: Path) -> bool:
    """Whether a file begins as zip archives do."""
    try:
        if not path.is_file():  # reading a pipe may wait for ever
            return False
        with open(path, "rb") as file:
            return file.read(2) == b"PK"
    except OSError:
        return False


def unpack(
    path: Path, manifest: str, unlisted: Collection[str], sizes: Callable[[bytes], Sizes]
) -> Unpacked:
    """Unpack a bundle's archive into a private temporary folder.

    Args:
        path: The archive.
        manifest: The name of the file that lists the others.
        unlisted: Names that may be there although the manifest does not list them.
        sizes: Reads the manifest: each file that it lists, with its size where it names one.

    Raises:
        BundleError: it is damaged, or holds anything but what its manifest lists.
        CnnEdgeError: the temporary folder cannot be written, or the disk has no room.
    """
    try:
        with _Frugal(path) as file, zipfile.ZipFile(file) as archive:
            entries = _entries(path, archive.infolist())
            if manifest not in entries:
                raise BundleError(
                    f"{path} is no bundle: it has no {manifest} at its root",
                    fix="make one with `cnnedge package BUNDLE --zip FILE`",
                )
            text = _read(path, archive, entries[manifest])
            expected = {**sizes(text), manifest: len(text)}
            _compare(path, entries, expected, unlisted)
            total = sum(info.file_size for info in entries.values())
            if total > MOST_EXPANSION * path.stat().st_size:
                raise _refused(path, f"{total / 1e6:.0f} MB in {path.stat().st_size} bytes")
            require_space(Path(tempfile.gettempdir()), total, f"unpacking {path}")
            unpacked = Unpacked(path)
            try:
                for name, info in entries.items():
                    if not info.is_dir():
                        _extract(archive, info, unpacked.folder / name)
            except BaseException:
                unpacked.close()
                raise
            return unpacked
    except CnnEdgeError:
        raise
    except _DAMAGED as error:
        raise BundleError(
            f"{path} is damaged or cut short ({str(error) or type(error).__name__})",
            fix="copy it again, or make it anew with `cnnedge package BUNDLE --zip FILE`",
        ) from error


class _Frugal(io.FileIO):
    """A file that is never read in large pieces.

    zipfile reads an archive's whole directory at once, however large the archive says that it is.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path, "rb")

    def read(self, size: int | None = -1, /) -> bytes:
        if size is not None and size > _MOST_AT_ONCE:
            raise zipfile.BadZipFile("its directory is larger than any bundle's")
        return super().read(_MOST_AT_ONCE if size is None or size < 0 else size) or b""


def _entries(path: Path, infos: list[zipfile.ZipInfo]) -> dict[str, zipfile.ZipInfo]:
    """Return the entries by name, none of which is anything but a plain file or folder."""
    if len(infos) > MOST_ENTRIES:
        raise _refused(path, f"{len(infos)} entries")
    entries: dict[str, zipfile.ZipInfo] = {}
    seen: set[str] = set()
    for info in infos:
        name = info.filename
        problem = _name_problem(info) or _kind_problem(info)
        # Names that some file systems take for one: Windows and macOS ignore case, macOS also how
        # an accent is spelt.
        alike = unicodedata.normalize("NFC", name).casefold().rstrip("/")
        if problem is None and alike in seen:
            problem = "twice, or under a name that differs by case alone"
        if problem is not None:
            raise _refused(path, f"{name[:80]!r} {problem}")
        seen.add(alike)
        entries[name] = info
    return entries


def name_problem(name: str) -> str | None:
    """Return why a name is none of a file inside a bundle, as a relative clause; None: it may be.

    A bundle's folder and its zip file take the same names.
    """
    parts = name.split("/")
    if any(part in {"", ".", ".."} for part in parts):
        return "which does not stay inside"
    if "\\" in name or ":" in name:
        return "which is a path of another system"
    if any(unicodedata.category(c)[0] == "C" for c in name):
        return "which has characters that no name should have"
    if len(name.encode()) > _LONGEST_NAME:
        return "whose name is too long"
    return None


def _name_problem(info: zipfile.ZipInfo) -> str | None:
    name = info.orig_filename  # zipfile cuts at a NUL, and turns other separators to "/"
    if name != info.filename and "\\" not in name:
        return "which has characters that no name should have"
    return name_problem(name.removesuffix("/"))


def _kind_problem(info: zipfile.ZipInfo) -> str | None:
    kind = stat.S_IFMT(info.external_attr >> 16)
    if kind not in {0, stat.S_IFDIR if info.is_dir() else stat.S_IFREG}:
        return "which is a link or another special file"
    if info.is_dir() and info.file_size:
        return "which is a folder with a content"
    if info.flag_bits & _ENCRYPTED:
        return "which is encrypted"
    if info.compress_type not in {zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED}:
        return "which is neither stored nor deflated"
    return None


def _compare(
    path: Path, entries: Mapping[str, zipfile.ZipInfo], expected: Sizes, unlisted: Collection[str]
) -> None:
    """Refuse an archive that holds anything else than what its manifest lists."""
    folders = {
        "/".join(name.split("/")[:depth]) + "/"
        for name in expected
        for depth in range(1, name.count("/") + 1)
    }
    for name, info in entries.items():
        if info.is_dir():
            if name not in folders:
                raise _refused(path, f"the folder {name!r}, of which its manifest knows nothing")
            continue
        if name not in expected and name not in unlisted:
            raise _refused(path, f"{name!r}, of which its manifest knows nothing")
        size = expected.get(name)
        if info.file_size > MOST_TEXT if size is None else info.file_size != size:
            named = f"at most {MOST_TEXT}" if size is None else f"{size}"
            raise _refused(path, f"{name!r} with {info.file_size} bytes, and not {named}")
    clash = {name.rstrip("/") for name in folders} & {n for n in entries if not n.endswith("/")}
    if clash:
        raise _refused(path, f"{min(clash)!r} as a file and as a folder")
    missing = sorted(set(expected) - set(entries))
    if missing:
        raise BundleError(
            f"{path} lacks {missing[0]}, which its manifest names",
            fix="make it anew with `cnnedge package BUNDLE --zip FILE`",
        )


def _read(path: Path, archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> bytes:
    if info.file_size > MOST_TEXT:
        raise _refused(path, f"{info.filename} with {info.file_size} bytes")
    with archive.open(info) as source:
        text = source.read(MOST_TEXT + 1)
    if len(text) != info.file_size:
        raise zipfile.BadZipFile(f"{info.filename} is not as long as declared")
    return text


def _extract(archive: zipfile.ZipFile, info: zipfile.ZipInfo, target: Path) -> None:
    left = info.file_size
    with archive.open(info) as source:
        # A full disk must not be taken for damage to the archive, which is told by an OSError, too.
        with _writing(target):
            target.parent.mkdir(parents=True, exist_ok=True)
            target.touch(exist_ok=False)
        with open(target, "wb") as out:
            while left >= 0 and (chunk := source.read(_CHUNK)):
                left -= len(chunk)
                with _writing(target):
                    out.write(chunk)
                    out.flush()
    if left:
        raise zipfile.BadZipFile(f"{info.filename} is not as long as declared")


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise cannot_write(path, error) from error


def _refused(path: Path, what: str) -> BundleError:
    return BundleError(f"{path} holds {what}", fix="do not use this archive")


def _remove(partial: Partial, owner: int) -> None:
    if os.getpid() == owner:
        partial.close()
