"""What was found of each file of a folder: its content's hash, or why it cannot be used.

Looking at a file means reading and decoding it, which takes minutes for tens of thousands. So the
findings of a large folder are kept in the user's cache, and a file is looked at again where its
size or its times have changed. The cache may be deleted at any time; one that was damaged, or
that another release made, counts for nothing.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import stat
import time
from collections.abc import Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from cnnedge.data.split import item_digest, map_ahead, workers
from cnnedge.data.tree import cannot_read
from cnnedge.errors import CnnEdgeError, ImageError
from cnnedge.files import atomic_path, cache_folder
from cnnedge.image import ImageContract, decode
from cnnedge.pixels import LIMIT
from cnnedge.progress import Progress, silent

Finding: TypeAlias = bytes | str  # the SHA-256 of a usable image, or why it is none

# Broken files are found before work starts, decoded small: JPEGs cost an eighth this way.
_PROBE = ImageContract(32, 32)
_FEWEST = 256  # files; fewer are looked at within a second or two, and leave nothing behind
_CHUNK = 16  # files that a thread looks at in one go: most of them take microseconds next time
_SAVE_SECONDS = 10.0  # what a kill may cost
# Within the clock's coarsest tick a file can be written to again and its times stay the same; that
# of FAT is two seconds. So what has just been written is not kept.
_SETTLED_NS = 2_000_000_000


@dataclass(frozen=True)
class _Seen:
    """A file as it was looked at.

    Attributes:
        size: Bytes.
        modified: When its content changed, nanoseconds.
        changed: When anything about it did, which no copying sets back.
        digest: The SHA-256 of its content, hexadecimal; empty where it is no usable image.
        fault: What is wrong with it then: a sentence, without the path that it begins with.
    """

    size: int
    modified: int
    changed: int
    digest: str
    fault: str

    def finding(self, path: Path) -> Finding:
        return bytes.fromhex(self.digest) if self.digest else f"{path}{self.fault}"


def find(root: Path, paths: Sequence[Path], progress: Progress = silent) -> dict[Path, Finding]:
    """Look at files, in parallel; those that were looked at before only if they have changed.

    Args:
        root: The folder that they are in.
        paths: The files.
        progress: Told how many are done.

    Returns:
        The SHA-256 of each one's content, or a sentence that says why it is no usable image.

    Raises:
        DataError: a file may not be read; the message names it.
    """
    store = _store_of(root) if len(paths) >= _FEWEST else None
    known = {} if store is None else _read(store)
    names = [str(path.relative_to(root)) for path in paths]

    def look(chunk: int) -> list[tuple[Finding, _Seen | None]]:
        at = range(chunk * _CHUNK, min((chunk + 1) * _CHUNK, len(paths)))
        return [_look(paths[i], known.get(names[i])) for i in at]

    found: list[Finding] = []
    kept: dict[str, _Seen] = {}
    news, saved = False, time.monotonic()
    try:
        with closing(map_ahead(look, -(-len(paths) // _CHUNK), 4 * workers())) as chunks:
            for chunk in chunks:
                for finding, seen in chunk:
                    name = names[len(found)]
                    found.append(finding)
                    if seen is not None:
                        kept[name] = seen
                        news = news or seen is not known.get(name)
                progress("open", len(found), len(paths))
                if store and news and time.monotonic() - saved > _SAVE_SECONDS:
                    _write(store, {**known, **kept})
                    news, saved = False, time.monotonic()
    finally:  # also where it was interrupted
        if store and news:
            _write(store, kept if len(found) == len(paths) else {**known, **kept})
    return dict(zip(paths, found, strict=True))


def _look(path: Path, before: _Seen | None) -> tuple[Finding, _Seen | None]:
    """Return what is found of a file, and what may be kept of that."""
    now = time.time_ns()
    try:
        facts = os.stat(path)  # before it is read: one that changes meanwhile is read again
    except OSError as error:
        return _unread(path, error), None
    times = (facts.st_size, facts.st_mtime_ns, facts.st_ctime_ns)
    if before is not None and (before.size, before.modified, before.changed) == times:
        return before.finding(path), before
    if not stat.S_ISREG(facts.st_mode):  # reading a pipe would wait for ever
        return f"{path} is no file", None
    settled = max(facts.st_mtime_ns, facts.st_ctime_ns) < now - _SETTLED_NS
    try:
        decode(path, _PROBE)
        digest = item_digest(path)
    except ImageError as error:
        if isinstance(error.__cause__, PermissionError):
            raise cannot_read(path, error.__cause__) from error
        reason = str(error)
        if not settled or _passing(error.__cause__) or not reason.startswith(str(path)):
            return reason, None
        return reason, _Seen(*times, "", reason.removeprefix(str(path)))
    except OSError as error:
        return _unread(path, error), None
    return digest, _Seen(*times, digest.hex(), "") if settled else None


def _unread(path: Path, error: OSError) -> str:
    if error.errno in (errno.EACCES, errno.EPERM):
        raise cannot_read(path, error) from error
    return f"{path} cannot be read ({error.strerror})"


def _passing(cause: BaseException | None) -> bool:
    """Say whether a file was unusable for a reason outside it, such as a lack of memory."""
    return isinstance(cause, MemoryError) or (isinstance(cause, OSError) and bool(cause.errno))


def _store_of(root: Path) -> Path | None:
    cache = cache_folder()
    if cache is None:
        return None
    place = hashlib.sha256(os.fsencode(root.resolve())).hexdigest()
    return cache / "folders" / f"{place[:24]}.json"


def _made_by() -> dict[str, object]:
    """Return what decides what is found of a file."""
    from PIL import __version__

    limit = os.environ.get(LIMIT, "")
    return {"format": 2, "pillow": __version__, "probe": _PROBE.to_dict(), "memory": limit}


def _read(store: Path) -> dict[str, _Seen]:
    """Return what was kept, or nothing where that cannot be trusted."""
    try:
        checksum, _, body = store.read_bytes().partition(b"\n")
        if hashlib.sha256(body).hexdigest().encode() != checksum:
            return {}
        content = json.loads(body)
        if content["made by"] != _made_by():
            return {}
        return {name: _Seen(*facts) for name, facts in content["files"].items()}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def _write(store: Path, kept: Mapping[str, _Seen]) -> None:
    """Keep it, whole or not at all. Where that cannot be, the files are read the next time too."""
    files = {
        name: (seen.size, seen.modified, seen.changed, seen.digest, seen.fault)
        for name, seen in kept.items()
    }
    content = {"made by": _made_by(), "files": files}
    body = json.dumps(content).encode()
    with suppress(CnnEdgeError), atomic_path(store) as temporary:
        temporary.write_bytes(hashlib.sha256(body).hexdigest().encode() + b"\n" + body)
