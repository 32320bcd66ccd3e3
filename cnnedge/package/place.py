"""Where a package may be written: never over or inside the bundle that it is made of."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from cnnedge.bundle import Bundle
from cnnedge.errors import BundleError, CnnEdgeError
from cnnedge.files import require_writable

CONFIG = "config.pbtxt"  # of each model in a Triton repository
SERVICE = "inferenceservice.yaml"  # beside them


def check_file(bundle: Bundle, out: Path, *, force: bool) -> None:
    """Find out whether a file may be written, before anything is.

    Raises:
        BundleError: it lies inside the bundle, or is the bundle.
        CnnEdgeError: it exists and ``force`` is false, is a folder, or cannot be written.
    """
    _check_outside(bundle, out)
    if out.exists() and not out.is_dir() and not force:
        raise CnnEdgeError(f"{out} exists already", fix="choose another name or pass --force")
    require_writable(out)


def check_repository(bundle: Bundle, out: Path, *, force: bool) -> None:
    """Find out whether a Triton model repository may be written, before anything is.

    Raises:
        BundleError: it lies inside the bundle, or the bundle inside it.
        CnnEdgeError: it exists, and ``force`` is false or it is no model repository: a folder that
            holds anything else is not replaced.
    """
    _check_outside(bundle, out)
    if bundle.origin.resolve().is_relative_to(out.resolve()):
        raise BundleError(f"{out} holds the bundle itself", fix="choose another folder")
    if not out.exists():
        require_writable(out.absolute().parent / f".{out.name}")
        return
    if not out.is_dir():
        raise CnnEdgeError(f"{out} is a file", fix="choose another folder")
    if not force:
        raise CnnEdgeError(f"{out} exists already", fix="choose another folder or pass --force")
    for path in sorted(out.iterdir()):
        if path.name != SERVICE and not (path / CONFIG).is_file():
            raise CnnEdgeError(
                f"{out} holds {path.name}, and is no model repository: it is not replaced",
                fix="choose another folder",
            )


def check_places(
    bundle: Bundle, files: Iterable[Path | None], repository: Path | None, *, force: bool
) -> None:
    """Find out whether all of several packages may be written, before the first is.

    Raises:
        CnnEdgeError: as `check_file` and `check_repository` do.
    """
    for file in files:
        if file is not None:
            check_file(bundle, file, force=force)
    if repository is not None:
        check_repository(bundle, repository, force=force)


def _check_outside(bundle: Bundle, out: Path) -> None:
    place, origin = out.resolve(), bundle.origin.resolve()
    # A zip file may take the place of the zip file that it was made of: that was unpacked.
    replaced = bundle.unpacked is not None and place == origin and out.suffix == origin.suffix
    if place.is_relative_to(origin) and not replaced:
        raise BundleError(f"{out} lies inside the bundle {bundle.origin}", fix="write it elsewhere")
