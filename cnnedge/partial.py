"""Where a file or a folder lies until it is whole, and how what a killed run left there is swept.

Beside what is written stands a folder ``.cnnedge.TOKEN.partial``. Its token is random, so it is
nobody else's, in whatever container: a process id comes back, and means nothing elsewhere. As long
as its process lives, a file in it is locked (``flock``); the system drops the lock however that
process ends. So who can take the lock knows that nobody works there any more::

    .cnnedge.0123456789abcdef.partial/
        lock       locked by who writes; called `held` where the file system knows no locks
        new/NAME   what is written
        old/NAME   what it replaces, between the two renames of a folder

Where there are no locks nothing is swept, since nobody knows who is alive.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cnnedge.errors import CnnEdgeError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

_NAME = re.compile(r"\.cnnedge\.[0-9a-f]{16}\.partial")
_OLDER = re.compile(r"\..+\.([0-9]+)\.partial(?:\.[A-Za-z0-9]+)?")  # of earlier releases
_PATIENCE = 60.0  # seconds; a folder is held for as long as its files take to be written
_ATTEMPTS = 100  # a sweeper may be quicker than the lock; twice in a row is unheard of


def is_partial(name: str) -> bool:
    """Whether a name is one of what is not whole yet, in this release or an earlier one.

    Nothing of that name belongs to a bundle: it is neither read nor signed.
    """
    return (_NAME.fullmatch(name) or _OLDER.fullmatch(name)) is not None


class Partial:
    """A folder of this process alone, for what is not whole yet.

    Attributes:
        folder: The folder.
        new: A folder in it, for what is written; it exists.
        old: Another, for what is replaced; it does not.
    """

    def __init__(self, parent: Path) -> None:
        """Make it.

        Raises:
            OSError: nothing can be written there.
        """
        for _ in range(_ATTEMPTS):
            self.folder = parent / f".cnnedge.{secrets.token_hex(8)}.partial"
            self.folder.mkdir(mode=0o700)
            with contextlib.suppress(FileNotFoundError):  # swept before it was locked
                self._lock = _hold(self.folder / "lock")
                break
        else:
            raise OSError(None, "what is written there is swept away", str(parent))
        self.new, self.old = self.folder / "new", self.folder / "old"
        try:
            self.new.mkdir(mode=0o700)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Remove the folder with all that is still in it."""
        _remove(self.folder)
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def __enter__(self) -> Partial:
        """Return it; it goes in the end."""
        return self

    def __exit__(self, *exception: Any) -> None:
        """Remove the folder."""
        self.close()


@contextmanager
def locked_folder(folder: Path) -> Iterator[bool]:
    """Hold a folder against every other process and thread that holds it so.

    Yields:
        Whether it is held; False where the file system or the machine knows no locks.

    Raises:
        CnnEdgeError: another holds it, and has not let go of it in a minute.
        OSError: there is no such folder.
    """
    lock = os.open(folder, os.O_RDONLY)
    try:
        yield _waited_for(lock, folder)
    finally:
        os.close(lock)


def _waited_for(lock: int, folder: Path) -> bool:
    end = time.monotonic() + _PATIENCE
    while time.monotonic() < end:
        try:
            if _locked(lock):
                return True
        except OSError:
            return False
        time.sleep(0.05)
    raise CnnEdgeError(f"another run is changing {folder}", fix="wait until it has ended")


def sweep(place: Path) -> None:
    """Remove what dead processes left beside ``place``; what one had moved aside comes back.

    That includes what earlier releases left of ``place``: their names bear a process id.
    """
    older = re.compile(
        rf"\.{re.escape(place.name)}\.([0-9]+)\.(?:partial|old)"
        rf"|\.{re.escape(place.stem)}\.([0-9]+)\.partial{re.escape(place.suffix)}"
    )
    with contextlib.suppress(OSError):
        for name in os.listdir(place.parent):
            if _NAME.fullmatch(name):
                _sweep_one(place.parent / name)
            elif known := older.fullmatch(name):
                _sweep_older(place.parent / name, known[1] or known[2], place)


def sweep_inside(root: Path) -> None:
    """Remove what dead processes left anywhere in a folder that is cnnedge's own, as a bundle's."""
    for folder, folders, files in os.walk(root):
        for name in [*folders, *files]:
            path = Path(folder, name)
            if _NAME.fullmatch(name):
                _sweep_one(path)
            elif known := _OLDER.fullmatch(name):
                _sweep_older(path, known[1])
        folders[:] = [name for name in folders if not is_partial(name)]


def _sweep_older(left: Path, pid: str, place: Path | None = None) -> None:
    """Remove or put back what a process of an earlier release left, unless it may be alive.

    This process has made none of them, though one may bear its own id.
    """
    alive = Path(f"/proc/{pid}").exists() or not Path("/proc/self").exists()
    if alive and pid != str(os.getpid()):
        return
    with contextlib.suppress(OSError):
        if place is not None and left.suffix == ".old" and not os.path.lexists(place):
            os.replace(left, place)
        elif left.is_dir() and not left.is_symlink():
            shutil.rmtree(left, ignore_errors=True)
        else:
            left.unlink()


def _sweep_one(folder: Path) -> None:
    try:
        lock = _opened(folder / "lock", 0)
    except FileNotFoundError:  # killed before it was locked, and so empty; or it knows no locks
        with contextlib.suppress(OSError):
            folder.rmdir()
        return
    except OSError:
        return
    try:
        if _locked(lock):
            if (folder / "old").is_dir():
                for name in os.listdir(folder / "old"):
                    if not os.path.lexists(folder.parent / name):
                        os.replace(folder / "old" / name, folder.parent / name)
            _remove(folder)
    except OSError:  # no locks here, or no right to move: it stays
        pass
    finally:
        os.close(lock)


def _remove(folder: Path) -> None:
    """Remove all in it before its lock, so that a kill leaves what can still be swept."""
    with contextlib.suppress(OSError):
        for name in os.listdir(folder):
            if (folder / name).is_dir():
                shutil.rmtree(folder / name, ignore_errors=True)
            elif name != "lock":
                (folder / name).unlink()
    shutil.rmtree(folder, ignore_errors=True)


def _hold(path: Path) -> int | None:
    """Make a lock file and lock it; None: there are no locks here, and it is called otherwise.

    Raises:
        FileNotFoundError: a sweeper took it for a dead one's.
        OSError: it cannot be made.
    """
    lock = _opened(path, os.O_CREAT)
    try:
        mine = _locked(lock) and os.path.samestat(os.fstat(lock), os.stat(path))
    except FileNotFoundError:
        mine = False
    except OSError:
        os.close(lock)
        os.replace(path, path.with_name("held"))
        return None
    if not mine:
        os.close(lock)
        raise FileNotFoundError(path)
    return lock


def _opened(path: Path, flags: int) -> int:
    """Open a lock file; one that somebody made a pipe or a link is not waited for or followed."""
    safe = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
    return os.open(path, os.O_RDWR | flags | safe, 0o600)


def _locked(lock: int) -> bool:
    """Lock a file and return true, or false where another has it.

    Raises:
        OSError: there are no locks here.
    """
    if fcntl is None:
        raise OSError("no locks")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
