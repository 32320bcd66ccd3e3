"""Data sources: labelled images with disjoint train, calibration and test splits."""

from __future__ import annotations

import re
from difflib import get_close_matches
from pathlib import Path

from cnnedge.data.split import Dataset, Split
from cnnedge.data.tree import cannot_read
from cnnedge.errors import DataError
from cnnedge.progress import Progress, silent

__all__ = ["Dataset", "Split", "open_source"]


def open_source(spec: str, *, seed: int = 0, progress: Progress = silent) -> Dataset:
    """Open a data source.

    Args:
        spec: "digits" (the real handwritten digits that scikit-learn ships), "signs" or "signs:N"
            (N images of a procedural road-sign camera), or the path of a folder of classes.
        seed: Seeds the splits, and what `signs` draws.
        progress: Told how many of a folder's files are looked at.

    Raises:
        DataError: there is no such source, or it is not laid out as expected.
        MissingExtraError: a package that the source needs is not installed.

    Examples:
        >>> digits = cnnedge.open_source("digits")
        >>> digits.labels[:3], len(digits.test)
        (('0', '1', '2'), 359)
    """
    if spec == "digits":
        from cnnedge.data.digits import open_digits

        return open_digits(seed)
    if match := re.fullmatch(r"signs(?::(\d+))?", spec):
        from cnnedge.data.signs import DEFAULT_COUNT, open_signs

        return open_signs(int(match[1] or DEFAULT_COUNT), seed)
    if not _exists(Path(spec)):
        close = get_close_matches(spec, ["digits", "signs"], 1)
        meant = f"did you mean {close[0]}? " if close else ""
        raise DataError(
            f"there is no data source {spec!r}",
            fix=f"{meant}give digits, signs, signs:N or a folder of class sub-folders",
        )
    from cnnedge.data.folder import open_folder

    return open_folder(Path(spec), seed, progress)


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError as error:  # a folder above it may not be read
        raise cannot_read(path, error) from error
