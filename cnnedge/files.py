"""Write files so that a kill or a full disk leaves the old one or the new, never half of one."""

from __future__ import annotations

import contextlib
import glob
import hashlib
import os
import shutil
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cnnedge.errors import CnnEdgeError, ModelError


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
        raise cannot_write(path, error) from error
    finally:
        with contextlib.suppress(OSError):  # its folder may be what could not be made
            temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: Path, *, overwrite: bool) -> Iterator[Path]:
    """Yield a temporary folder beside ``path`` that takes its place when the block succeeds.

    The old folder, where there is one, is moved aside first and deleted last. Killed in between,
    it comes back at the next call. Of a link, what it points to is replaced.

    Raises:
        CnnEdgeError: ``path`` exists and ``overwrite`` is false, or it cannot be written.
    """
    place = Path(path).resolve()
    temporary = place.parent / f".{place.name}.{os.getpid()}.partial"
    aside = temporary.with_suffix(".old")
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        _clear_up(place)
        if place.exists() and not overwrite:
            raise CnnEdgeError(
                f"{path} exists already", fix="choose another folder or pass --force"
            )
        temporary.mkdir()
    except OSError as error:
        raise cannot_write(path, error) from error
    try:
        yield temporary
        if place.exists():
            os.replace(place, aside)
        try:
            os.replace(temporary, place)
        except BaseException:
            if aside.exists():
                os.replace(aside, place)
            raise
        shutil.rmtree(aside, ignore_errors=True)
    except OSError as error:
        raise cannot_write(path, error) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def require_keras_file(path: Path) -> None:
    """Refuse a name that Keras would not write a model to.

    Raises:
        ModelError: it does not end in `.keras`.
    """
    if path.suffix != ".keras":
        raise ModelError(f"{path} does not end in .keras", fix="name the file F.keras")


def require_writable(out: Path, *others: Path) -> None:
    """Find out before hours of work whether their result can be written.

    Args:
        out: The file to write; its folder is made where it is missing.
        *others: What is written beside it, in that folder or in one within it.

    Raises:
        ModelError: a folder is in the place of a file, or a file in the place of a folder.
        CnnEdgeError: the folder cannot be written, or the disk is full.
    """
    for path in (out, *others):
        if path.is_dir():
            raise ModelError(f"{path} is a folder", fix="move it, or name another file")
        if path.parent != out.parent and path.parent.is_file():
            raise ModelError(
                f"{path.parent} is a file, and a folder of that name is to be there",
                fix="move it, or name another file",
            )
    probe = out.with_suffix(f".{os.getpid()}.probe")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(bytes(4096))
    except OSError as error:
        raise cannot_write(out, error) from error
    finally:
        with contextlib.suppress(OSError):
            probe.unlink()


def require_space(folder: Path, needed: int, purpose: str) -> None:
    """Find out before hours of work whether their result has room.

    Args:
        folder: A folder on the disk in question.
        needed: Bytes.
        purpose: What needs them, as in "training".

    Raises:
        CnnEdgeError: the disk has less free.
    """
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise CnnEdgeError(
            f"{folder.absolute()} has {free / 1e9:.2f} GB free, and {purpose} there needs "
            f"{needed / 1e9:.2f} GB",
            fix="free some space or choose another disk",
        )


def read_toml(path: Path, kind: str, *, see: str) -> dict[str, Any]:
    """Return what a TOML file holds.

    Args:
        path: The file.
        kind: What it is, as in "recipe".
        see: The page that says what may be in it.

    Raises:
        CnnEdgeError: the file is missing, or is no TOML.
    """
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CnnEdgeError(f"cannot read the {kind} {path}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise CnnEdgeError(f"{path} is no TOML: {error}", fix=f"see {see}") from error


def write_text(path: Path, text: str) -> None:
    """Write ``text`` as UTF-8 to ``path``, whole or not at all."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def cache_folder() -> Path | None:
    """Return ``$CNNEDGE_CACHE``, or ``cnnedge`` in the XDG cache folder; None without a home."""
    if chosen := os.environ.get("CNNEDGE_CACHE"):
        return Path(chosen)
    if xdg := os.environ.get("XDG_CACHE_HOME"):
        return Path(xdg) / "cnnedge"
    try:
        return Path.home() / ".cache" / "cnnedge"
    except RuntimeError:
        return None


def sha256(path: Path) -> str:
    """Return the hexadecimal SHA-256 of a file's content."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _partial(path: Path) -> Path:
    """Return the temporary place of ``path``; its ending stays, which some writers go by."""
    return path.absolute().with_name(f".{path.stem}.{os.getpid()}.partial{path.suffix}")


def _clear_up(place: Path) -> None:
    """Undo what a process that was killed half-way left beside ``place``."""
    for left in place.parent.glob(f".{glob.escape(place.name)}.*"):
        pid, _, ending = left.name[len(place.name) + 2 :].partition(".")
        if not pid.isdigit() or Path(f"/proc/{pid}").exists() or not Path("/proc/self").exists():
            continue
        if ending == "old" and not place.exists():
            os.replace(left, place)
        elif ending in ("old", "partial"):
            shutil.rmtree(left, ignore_errors=True)


def cannot_write(path: Path, error: OSError) -> CnnEdgeError:
    """Return what is raised where the system refuses to write ``path``."""
    reason = error.strerror or str(error)
    return CnnEdgeError(
        f"cannot write {path}: {reason}", fix="free some space or choose a folder you may write to"
    )
