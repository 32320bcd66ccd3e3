"""Write files so that a kill or a full disk leaves the old one or the new, never half of one."""

from __future__ import annotations

import contextlib
import glob
import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cnnedge.errors import CnnEdgeError


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside ``path`` that replaces it when the block succeeds.

    Raises:
        CnnEdgeError: the folder cannot be written, or the disk is full.
    """
    path = Path(path)
    temporary = _partial(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        with open(temporary, "rb") as written:
            os.fsync(written.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise _cannot_write(path, error) from error
    finally:
        with contextlib.suppress(OSError):  # its folder may be what could not be made
            temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: Path, *, overwrite: bool) -> Iterator[Path]:
    """Yield a temporary folder beside ``path`` that takes its place when the block succeeds.

    The old folder, where there is one, is moved aside first and deleted last.

    Raises:
        CnnEdgeError: ``path`` exists and ``overwrite`` is false, or it cannot be written.
    """
    path = Path(path)
    if path.exists() and not overwrite:
        raise CnnEdgeError(f"{path} exists already", fix="choose another folder or pass --force")
    try:
        path.absolute().parent.mkdir(parents=True, exist_ok=True)
        _sweep(path)
        temporary = _partial(path)
        temporary.mkdir()
    except OSError as error:
        raise _cannot_write(path, error) from error
    try:
        yield temporary
        if path.exists():
            aside = temporary.with_suffix(".old")
            os.replace(path, aside)
            os.replace(temporary, path)
            shutil.rmtree(aside, ignore_errors=True)
        else:
            os.replace(temporary, path)
    except OSError as error:
        raise _cannot_write(path, error) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    """Write ``text`` as UTF-8 to ``path``, whole or not at all."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def sha256(path: Path) -> str:
    """Return the hexadecimal SHA-256 of a file's content."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _partial(path: Path) -> Path:
    """Return the temporary place of ``path``; its ending stays, which some writers go by."""
    return path.absolute().with_name(f".{path.stem}.{os.getpid()}.partial{path.suffix}")


def _sweep(path: Path) -> None:
    """Remove what an export that was killed half-way left beside ``path``."""
    for left in path.absolute().parent.glob(f".{glob.escape(path.stem)}.*.partial"):
        pid = left.name.split(".")[-2]
        if pid.isdigit() and not Path(f"/proc/{pid}").exists() and Path("/proc/self").exists():
            shutil.rmtree(left, ignore_errors=True)


def _cannot_write(path: Path, error: OSError) -> CnnEdgeError:
    reason = error.strerror or str(error)
    return CnnEdgeError(
        f"cannot write {path}: {reason}", fix="free some space or choose a folder you may write to"
    )
