"""Change a bundle that stands: one process at a time, and whatever kills it leaves a bundle.

What is added lies in a `Partial` within the bundle until it is whole, so that the last step is to
rename it. A signature does not cover that folder, and nothing that is read may lie in it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

from cnnedge.bundle import (
    MANIFEST,
    Bundle,
    Engine,
    Manifest,
    describe_files,
    file_hashes,
    place_inside,
    read_manifest,
    require_folder,
)
from cnnedge.documents import parse_json
from cnnedge.errors import BundleError
from cnnedge.files import cannot_write, sha256, write_text
from cnnedge.partial import Partial, is_partial, locked_folder, sweep_inside
from cnnedge.plan import FOLDER, PlanNote

_JOURNAL = "names"  # beside what is put in place: one line for each, written before the first is
_MOST_TEXT = 65536


@contextmanager
def changing(root: Path) -> Iterator[None]:
    """Hold a bundle's folder against others that would change it; what the dead left there goes.

    Raises:
        CnnEdgeError: another run has been changing it for a minute.
        BundleError: there is no such folder, or it has no manifest.
    """
    read_manifest(root, root)
    with locked_folder(root) as alone:
        if alone:  # so whoever was putting files in place is dead
            for name in _half_put(root):
                (root / name).unlink(missing_ok=True)
        sweep_inside(root)
        yield


def unfinished(root: Path) -> set[str]:
    """Return what lies in a bundle's folder and does not belong to it: a killed run left it.

    Those are folders of parts, and plans that the manifest was to name next. Nothing of that is
    ever read, so a signature need not cover it.
    """
    found = _half_put(root)
    for folder, folders, files in os.walk(root):
        for name in [*folders, *files]:
            path = Path(folder, name)
            if is_partial(name) and not path.is_symlink():
                found.add(path.relative_to(root).as_posix())
        folders[:] = [name for name in folders if not is_partial(name)]
    return found


def put_engine(
    bundle: Bundle, note: PlanNote, plan: bytes, timing_cache: bytes | None = None
) -> Bundle:
    """Add a plan with its note to a bundle, in the place of the one of that name.

    What others have added since the bundle was opened stays. The manifest forgets the old plan
    before its file changes, and names the new one after: whatever kills this leaves a bundle, at
    worst without that plan.

    Returns:
        The bundle with its new manifest.

    Raises:
        BundleError: the bundle has become another since it was opened.
        CnnEdgeError: it cannot be written, or another run has been changing it for a minute.
    """
    require_folder(bundle, "adding a plan")
    sidecar = f"{note.file.removesuffix('.plan')}.json"
    content = {note.file: plan, sidecar: note.to_json().encode()}
    if note.timing_cache is not None and timing_cache is not None:
        content[str(note.timing_cache["file"])] = timing_cache
    for name in content:
        place_inside(bundle.root, name, bundle.origin)
    try:
        with changing(bundle.root), Partial(bundle.root) as partial:
            without = _without(bundle, note)
            return Bundle(bundle.root, _put(bundle.root, partial, without, note, content))
    except OSError as error:
        raise cannot_write(bundle.root, error) from error


def _without(bundle: Bundle, note: PlanNote) -> Manifest:
    """Return the manifest as it is now, less the plan that is replaced."""
    manifest = read_manifest(bundle.root, bundle.root)
    if manifest.variants != bundle.manifest.variants:
        raise BundleError(
            f"{bundle.root} has become another bundle since the plan was begun",
            fix="build the engine again",
        )
    cache = None if note.timing_cache is None else str(note.timing_cache["file"])
    return replace(
        manifest,
        engines=tuple(engine for engine in manifest.engines if engine.file != note.file),
        files={name: entry for name, entry in manifest.files.items() if name != cache},
    )


def _put(
    root: Path, partial: Partial, without: Manifest, note: PlanNote, content: Mapping[str, bytes]
) -> Manifest:
    for name, what in content.items():
        _write(partial.new / name, what)
    _write(partial.folder / _JOURNAL, "\n".join(content).encode())
    if without != read_manifest(root, root):
        _write_manifest(root, without)
    try:
        for name in content:
            (root / name).parent.mkdir(exist_ok=True)
            os.replace(partial.new / name, root / name)
        manifest = _with(root, without, note, list(content))
        _write_manifest(root, manifest)
    except BaseException:
        for name in _unlisted(root, content):
            (root / name).unlink(missing_ok=True)
        raise
    return manifest


def _write_manifest(root: Path, manifest: Manifest) -> None:
    """Write what was changed of it; what this cnnedge does not know of it stays."""
    document = parse_json((root / MANIFEST).read_bytes())
    changed = manifest.to_dict()
    document |= {key: changed[key] for key in ("engines", "files")}
    write_text(root / MANIFEST, json.dumps(document, indent=1) + "\n")


def _with(root: Path, without: Manifest, note: PlanNote, names: list[str]) -> Manifest:
    file, sidecar, *cache = names
    engine = Engine(
        note.variant,
        note.runtime,
        file,
        note.sha256,
        note.bytes,
        sidecar,
        sha256(root / sidecar),
    )
    files = {**without.files, **describe_files(root, cache)}
    return replace(without, engines=(*without.engines, engine), files=files)


def _write(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _half_put(root: Path) -> set[str]:
    """Return what a run that was killed had put in place, and the manifest does not name yet."""
    found: set[str] = set()
    for journal in root.glob(f"*/{_JOURNAL}"):
        with suppress(OSError):
            if is_partial(journal.parent.name) and journal.stat().st_size <= _MOST_TEXT:
                names = journal.read_text(encoding="utf-8", errors="replace").splitlines()
                found |= _unlisted(root, names)
    return found


def _unlisted(root: Path, names: Iterable[str]) -> set[str]:
    """Return those that are plain files among the plans, and not the manifest's."""
    listed = file_hashes(read_manifest(root, root))
    return {
        name
        for name in names
        if name not in listed
        and name == f"{FOLDER}/{Path(name).name}"
        and (root / name).is_file()
        and not (root / name).is_symlink()
    }
