"""ONNX Runtime for browsers: its files, from a folder of the user's, the cache, or npm once."""

from __future__ import annotations

import base64
import hashlib
import shutil
import subprocess
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from cnnedge.errors import CnnEdgeError
from cnnedge.files import atomic_folder, cache_folder, cannot_write, scratch_folder, sha256

PACKAGE, VERSION = "onnxruntime-web", "1.30.0"
# Of the package's tarball, as npm itself writes and checks it.
INTEGRITY = (
    "sha512-q0y+JrrtukXSzsBWEMccVfqX25LRmosXHF+CaRJmg8pZ"
    "ClzcV7svNc4rKY3jL02Vb7QmRMDs1SigqR4CXAfKYQ=="
)
# What the page loads, with its SHA-256: the build for the CPU, and the one for WebGPU, twice as
# large, of which a browser loads one. docs/decisions/browser.md says why there are two.
_WASM = "ort-wasm-simd-threaded"
FILES = {
    "ort.wasm.min.mjs": "219e6a1fc8a9938268d18efca3c91d310bd2f4a59bbd13744df5b2b7fc6cee3b",
    f"{_WASM}.mjs": "e13f7f94fc51b4ca72b12faeb1ee95f4ace6dfbc8939bc718aabdc0a27c4299b",
    f"{_WASM}.wasm": "3398c10d07d229bd91b364548e130e0e51a8e5704b88c7c083ebbeb78842dee2",
    "ort.webgpu.min.mjs": "3dffff71811bc13a3a3d9591c57ca5ee5735b8f5f3eaf789510b02bb040ae3a0",
    f"{_WASM}.asyncify.mjs": "3d1c85995364bb643302fc6fd877a0c3ba5ae72401815e0f24828a53d9191e28",
    f"{_WASM}.asyncify.wasm": "39f9f0894d478800487ed9f7dbe92618498db320cf55c8e3d89adff8dce658da",
}
_LARGEST = 64 << 20  # bytes of one file; the largest has 27 MB
_PATIENCE = 600  # seconds for npm, which retries by itself
_BY_HAND = (
    f"where npm is: `npm pack {PACKAGE}@{VERSION}`, unpack it, and pass --runtime-dir package/dist"
)


@dataclass(frozen=True)
class Runtime:
    """The files of ONNX Runtime that the page loads.

    Attributes:
        folder: Where they are; it may hold others too.
        known: Whether they are those of the version that the page was tested with.
    """

    folder: Path
    known: bool


def find_runtime(
    folder: Path | None = None, *, tell: Callable[[str], None] = lambda line: None
) -> Runtime:
    """Return ONNX Runtime's files for browsers; npm fetches them into the cache the first time.

    Args:
        folder: Where the user has them: an unpacked `onnxruntime-web`, or its `dist`. None: the
            cache, `cnnedge.files.cache_folder`.
        tell: Is told what takes long.

    Raises:
        CnnEdgeError: a file is missing, npm is missing or failed, what it fetched is not the
            package that was asked for, or the cache cannot be written.
    """
    if folder is not None:
        return _in_folder(folder)
    cache = cache_folder()
    if cache is None:
        raise CnnEdgeError(
            "there is no home folder to keep ONNX Runtime's files in",
            fix="set CNNEDGE_CACHE to a folder you may write to",
        )
    kept = cache / f"{PACKAGE}-{VERSION}"
    if not _is_whole(kept):
        tell(f"fetching {PACKAGE} {VERSION} with npm, 33 MB, this once")
        _fetch(kept)
    return Runtime(kept, known=True)


def _in_folder(folder: Path) -> Runtime:
    for place in (folder, folder / "dist", folder / "package" / "dist"):
        missing = [name for name in FILES if not (place / name).is_file()]
        if not missing:
            return Runtime(place, known=_is_whole(place))
        if len(missing) < len(FILES):
            break
    else:
        place, missing = folder, list(FILES)
    raise CnnEdgeError(
        f"{place} has no {missing[0]}", fix=f"unpack {PACKAGE} {VERSION} there, and name its dist"
    )


def _is_whole(folder: Path) -> bool:
    try:
        return all(sha256(folder / name) == digest for name, digest in FILES.items())
    except OSError:
        return False


def _fetch(kept: Path) -> None:
    npm = shutil.which("npm")
    if npm is None:
        raise CnnEdgeError(
            f"the page needs {PACKAGE} {VERSION}, and there is no npm here to fetch it",
            fix=f"install Node.js, or {_BY_HAND}",
        )
    try:
        with scratch_folder() as temporary:
            tarball = _pack(npm, temporary)
            with atomic_folder(kept, overwrite=True) as folder:
                unpack(tarball, folder)
    except OSError as error:
        raise cannot_write(kept, error) from error


def _pack(npm: str, folder: Path) -> Path:
    """Have npm fetch the tarball, with the user's own settings, and check it."""
    command = [npm, "pack", f"{PACKAGE}@{VERSION}", "--silent", "--pack-destination", str(folder)]
    try:
        done = subprocess.run(
            command, cwd=folder, capture_output=True, text=True, timeout=_PATIENCE, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise CnnEdgeError(
            f"npm did not fetch {PACKAGE} {VERSION} within {_PATIENCE} s", fix=_BY_HAND
        ) from error
    found = list(folder.glob("*.tgz"))
    if done.returncode or len(found) != 1:
        said = [line for line in (done.stderr + done.stdout).splitlines() if line.strip()]
        reason = said[0].strip() if said else f"exit code {done.returncode}"
        raise CnnEdgeError(f"npm could not fetch {PACKAGE} {VERSION} ({reason})", fix=_BY_HAND)
    return found[0]


def unpack(tarball: Path, folder: Path) -> None:
    """Check the package's tarball and take out of it the files that the page loads, and no other.

    Raises:
        CnnEdgeError: it is not the tarball that was asked for.
    """
    algorithm, _, expected = INTEGRITY.partition("-")
    with open(tarball, "rb") as file:
        digest = hashlib.file_digest(file, algorithm).digest()
    if base64.b64encode(digest).decode() != expected:
        raise CnnEdgeError(
            f"what npm fetched is not {PACKAGE} {VERSION}: its {algorithm} differs",
            fix="see which registry npm is set to, and try again",
        )
    take_files(tarball, folder)


def take_files(tarball: Path, folder: Path) -> None:
    """Take `FILES` out of a tarball, by name: no path of the tarball's own is ever written to.

    Raises:
        CnnEdgeError: one is missing, is no plain file, or is larger than it can be.
    """
    wanted = {f"package/dist/{name}": name for name in FILES}
    with tarfile.open(tarball, "r:gz") as archive:
        for member in archive:
            name = wanted.get(member.name)
            if name is None or not member.isreg() or member.size > _LARGEST:
                continue
            source = archive.extractfile(member)
            if source is not None:
                with source, open(folder / name, "wb") as target:
                    shutil.copyfileobj(source, target)
                del wanted[member.name]
    if wanted:
        raise CnnEdgeError(f"{PACKAGE} {VERSION} has no {min(wanted)}", fix=_BY_HAND)
