"""Write files so that a kill or a full disk leaves the old one or the new, never half of one."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import stat
import tempfile
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cnnedge.errors import CnnEdgeError, ModelError
from cnnedge.partial import Partial, sweep


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary path of the same name that replaces ``path`` when the block succeeds.

    Raises:
        CnnEdgeError: the folder cannot be written, or the disk is full.
    """
    path = Path(path)
    place = path.absolute()
    refuse_special(place)
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        sweep(place)
        with Partial(place.parent) as partial:
            temporary = partial.new / place.name
            yield temporary
            with open(temporary, "rb") as written:
                os.fsync(written.fileno())
            os.replace(temporary, place)
    except OSError as error:
        raise cannot_write(path, error) from error


@contextmanager
def atomic_folder(path: Path, *, overwrite: bool) -> Iterator[Path]:
    """Yield a temporary folder that takes the place of ``path`` when the block succeeds.

    The old folder, where there is one, is moved aside first and deleted last. Killed in between,
    it comes back at the next call. Of a link, what it points to is replaced.

    Raises:
        CnnEdgeError: ``path`` exists and ``overwrite`` is false, or it cannot be written.
    """
    refuse_special(path)
    try:
        place = Path(path).resolve()
        place.parent.mkdir(parents=True, exist_ok=True)
        sweep(place)
        if place.exists() and not overwrite:
            raise CnnEdgeError(
                f"{path} exists already", fix="choose another folder or pass --force"
            )
        with Partial(place.parent) as partial:
            temporary = partial.new / place.name
            temporary.mkdir()
            yield temporary
            _swap(temporary, place, partial.old)
    except OSError as error:
        raise cannot_write(path, error) from error


@contextmanager
def scratch_folder() -> Iterator[Path]:
    """Yield a folder for what nobody keeps, among the system's temporary ones.

    It goes in the end, or where the process was killed, when the next one makes its own.

    Raises:
        CnnEdgeError: it cannot be made.
    """
    with temporary_partial() as partial:
        yield partial.new


def temporary_partial() -> Partial:
    """Return a `Partial` among the system's temporary folders, once those of the dead are swept.

    Raises:
        CnnEdgeError: it cannot be made.
    """
    parent = Path("the temporary folder")
    try:
        parent = Path(tempfile.gettempdir())
        sweep(parent / "cnnedge")
        return Partial(parent)
    except OSError as error:
        raise cannot_write(parent, error) from error


def _swap(new: Path, place: Path, old: Path) -> None:
    """Put one folder in the place of another, which is moved into ``old``."""
    aside = old / place.name
    if place.exists():
        old.mkdir()
        os.replace(place, aside)
    try:
        os.replace(new, place)
    except BaseException:
        if aside.exists():
            os.replace(aside, place)
        raise


def what_is_special(path: Path | str) -> str | None:
    """Return what a path leads to if that is no file and no folder: reading it may wait for ever.

    What is missing, or may not be looked at, is left to whoever opens it.
    """
    try:
        mode = os.stat(path).st_mode
    except OSError as error:
        circle = error.errno == errno.ELOOP
        return "a link that leads back to itself" if circle else None
    except ValueError:  # no name that a file can have
        return None
    kinds = {
        stat.S_IFIFO: "a pipe",
        stat.S_IFSOCK: "a socket",
        stat.S_IFCHR: "a device",
        stat.S_IFBLK: "a device",
    }
    return kinds.get(stat.S_IFMT(mode))


def refuse_special(path: Path | str) -> None:
    """Refuse a path that leads to no file and no folder.

    Raises:
        CnnEdgeError: it is a pipe, a socket, a device, or a link that leads in a circle.
    """
    if found := what_is_special(path):
        raise CnnEdgeError(f"{path} is {found}", fix="name an ordinary file or folder")


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
        refuse_special(path)
        if path.is_dir():
            raise ModelError(f"{path} is a folder", fix="move it, or name another file")
        if path.parent != out.parent and path.parent.is_file():
            raise ModelError(
                f"{path.parent} is a file, and a folder of that name is to be there",
                fix="move it, or name another file",
            )
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        sweep(out.absolute())
        with Partial(out.absolute().parent) as probe:
            (probe.new / out.name).write_bytes(bytes(4096))
    except OSError as error:
        raise cannot_write(out, error) from error


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
    refuse_special(path)
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CnnEdgeError(f"cannot read the {kind} {path}: {error.strerror}") from error
    # Besides its own error, tomllib raises what a number of five thousand digits, a thousand
    # brackets, or a date of the 40th of a month make Python raise.
    except (ValueError, RecursionError) as error:
        reason = "it is nested too deep" if isinstance(error, RecursionError) else str(error)
        raise CnnEdgeError(f"{path} is no TOML: {reason}", fix=f"see {see}") from error


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
    refuse_special(path)
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def cannot_write(path: Path, error: OSError) -> CnnEdgeError:
    """Return what is raised where the system refuses to write ``path``."""
    reason = error.strerror or str(error)
    return CnnEdgeError(
        f"cannot write {path}: {reason}", fix="free some space or choose a folder you may write to"
    )
