"""A folder of class sub-folders, with or without ``train/`` and ``val/`` or ``test/``."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from cnnedge.data.split import Dataset, Split, item_digest, stratified
from cnnedge.errors import DataError, ImageError
from cnnedge.image import ImageContract, decode

EXTENSIONS = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm"})
SHARES = (0.7, 0.1, 0.2)  # train, calibration, test
CALIBRATION_SHARE = 0.1  # of train, where the test split is given
# Broken files are found before training starts, decoded small: JPEGs cost an eighth this way.
_PROBE = ImageContract(32, 32)


def open_folder(root: Path, seed: int) -> Dataset:
    """Open a folder of images, one sub-folder for each class.

    With ``train/`` and ``test/`` (or ``val/``) inside, the latter is the test split and the
    calibration split is cut from the former; else all three are cut from the whole, stratified.
    Where there are both, ``val/`` is left alone, and said so in ``skipped``.
    Broken files are left out and named in ``skipped``, and so is a test image whose very content
    is among the training images.

    Raises:
        DataError: no such folder, fewer than two classes, or too few images of one.
    """
    if not root.is_dir():
        raise DataError(
            f"there is no folder {root}", fix="give digits, signs, signs:N or a folder of classes"
        )
    train = root / "train"
    # A test/ without class folders is a competition's: its answers are not given.
    given = [root / name for name in ("test", "val") if _classes(root / name)]
    held_out = given[0] if given and train.is_dir() else None
    divided = held_out is not None
    learning = train if divided or (_classes(root) == ["train"] and _classes(train)) else root
    labels = _classes(learning)
    if len(labels) < 2:
        raise DataError(
            f"{learning} holds {len(labels)} class folder(s) with images, a classifier needs two",
            fix="make one sub-folder for each class",
        )
    skipped: list[str] = []
    paths, targets, digests = _images(learning, labels, skipped)
    known = dict(zip(digests, range(len(digests)), strict=True))
    _require_images(targets, labels, 2 if divided else 3, learning)
    if held_out is not None:
        skipped += [f"{unused}: {held_out} is the test split" for unused in given[1:]]
        strangers = sorted(set(_classes(held_out)) - set(labels))
        if strangers:
            raise DataError(
                f"{held_out} has classes that {learning} lacks: {', '.join(strangers[:5])}",
                fix="give both the same class folders",
            )
        test_paths, test_targets, test_digests = _images(held_out, labels, skipped)
        fresh = [i for i, digest in enumerate(test_digests) if digest not in known]
        for i in sorted(set(range(len(test_paths))) - set(fresh)):
            twin = paths[known[test_digests[i]]]
            skipped.append(f"{test_paths[i]}: the same content as {twin}, which is trained on")
        if not fresh:
            raise DataError(f"{held_out} holds no image to test on", fix="put images there")
        test = Split("test", [test_paths[i] for i in fresh], test_targets[fresh])
        train_at, calibration_at = stratified(
            targets, (1 - CALIBRATION_SHARE, CALIBRATION_SHARE), seed
        )
    else:
        train_at, calibration_at, test_at = stratified(targets, SHARES, seed)
        test = _split("test", paths, targets, test_at)
    return Dataset(
        root.resolve().name,
        str(root),
        tuple(labels),
        _split("train", paths, targets, train_at),
        _split("calibration", paths, targets, calibration_at),
        test,
        tuple(skipped),
    )


def _split(name: str, paths: Sequence[Path], targets: np.ndarray, at: np.ndarray) -> Split:
    return Split(name, [paths[i] for i in at], targets[at])


def _classes(folder: Path) -> list[str]:
    """Return the names of the sub-folders that hold an image, sorted; none if it is no folder."""
    if not folder.is_dir():
        return []
    try:
        found = [p for p in folder.iterdir() if p.is_dir() and not p.name.startswith(".")]
    except OSError as error:
        raise DataError(
            f"cannot read {folder} ({error.strerror})", fix="check its permissions"
        ) from error
    here = folder.resolve()  # a link to where it lies, or above, is no class
    found = [p for p in found if not (p.is_symlink() and here.is_relative_to(p.resolve()))]
    return sorted(p.name for p in found if next(_files(p), None) is not None)


def _files(folder: Path) -> Iterator[Path]:
    """Yield the image files under a class folder; links to folders in it are not followed."""
    for parent, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in names:
            if not name.startswith(".") and Path(name).suffix.lower() in EXTENSIONS:
                yield Path(parent) / name


def _images(
    folder: Path, labels: list[str], skipped: list[str]
) -> tuple[list[Path], np.ndarray, list[bytes]]:
    """Return the whole images of each class, their classes, and their content's hashes.

    One of two files with the same content is left out, so that none falls into two splits.
    """
    candidates = [(p, t) for t, label in enumerate(labels) for p in sorted(_files(folder / label))]
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        checked = list(pool.map(_check, (path for path, _ in candidates)))
    first: dict[bytes, Path] = {}
    paths, targets, digests = [], [], []
    for (path, target), found in zip(candidates, checked, strict=True):
        if isinstance(found, str):
            skipped.append(found)
        elif found in first:
            skipped.append(f"{path}: the same content as {first[found]}")
        else:
            first[found] = path
            paths.append(path)
            targets.append(target)
            digests.append(found)
    return paths, np.array(targets, np.int64), digests


def _check(path: Path) -> bytes | str:
    """Return the hash of a file's content, or why it cannot be used."""
    try:
        if path.exists() and not path.is_file():  # reading a pipe would wait for ever
            return f"{path} is no file"
        decode(path, _PROBE)
        return item_digest(path)
    except (ImageError, OSError) as error:
        return str(error)


def _require_images(targets: np.ndarray, labels: list[str], fewest: int, folder: Path) -> None:
    counts = np.bincount(targets, minlength=len(labels))
    if counts.min() < fewest:
        label, count = labels[int(counts.argmin())], int(counts.min())
        raise DataError(
            f"the class {label!r} in {folder} has {count} usable image(s), too few to split",
            fix=f"give at least {fewest} of each class",
        )
