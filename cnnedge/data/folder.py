"""A folder of class sub-folders, or of splits such as ``train/`` and ``test/`` that hold them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from cnnedge.data.findings import Finding, find
from cnnedge.data.layout import find_layout, labelled
from cnnedge.data.left_out import LeftOut, leave_out
from cnnedge.data.split import Dataset, Split, stratified
from cnnedge.data.tree import Tree, scan
from cnnedge.errors import DataError
from cnnedge.formats import readable_suffixes
from cnnedge.progress import Progress, silent

SHARES = (0.7, 0.1, 0.2)  # train, calibration, test
CALIBRATION_SHARE = 0.1  # of train, where the test split is given


def open_folder(root: Path, seed: int, progress: Progress = silent) -> Dataset:
    """Open a folder of images, one sub-folder for each class.

    With ``train/`` and ``test/`` (or ``val/``; see `layout` for the usual names) inside, the latter
    is the test split and the calibration split is cut from the former; else all three are cut from
    the whole, stratified. Where there are both, ``val/`` is left alone, and said so in ``skipped``.
    Broken files are left out and named in ``skipped``, and so is a test image whose very content
    is among the training images; ``told`` counts these and all else that is left out. What was
    found of each file of a large folder is kept, so that only new and changed ones are read the
    next time; see `findings`.

    Args:
        root: The folder.
        seed: Seeds the splits.
        progress: Told how many files are looked at.

    Raises:
        DataError: no such folder; a folder or file that may not be read; fewer than two classes;
            too few images of one; or folders that may be splits or classes.
    """
    if not root.is_dir():
        raise DataError(
            f"there is no folder {root}", fix="give digits, signs, signs:N or a folder of classes"
        )
    everything = scan(root, readable_suffixes())
    layout = find_layout(everything)
    learning, held_out = layout.train.path, None if layout.test is None else layout.test.path
    classes = labelled(layout.train)
    labels = tuple(classes)
    if len(labels) < 2:
        raise DataError(
            f"{learning} holds {len(labels)} class folder(s) with images, a classifier needs two",
            fix="make one sub-folder for each class",
        )
    listed = _candidates(classes, labels)
    tested = [] if layout.test is None else _candidates(labelled(layout.test), labels)
    found = find(root, [path for path, _ in listed + tested], progress)
    skipped: list[str] = []
    left_out = leave_out(everything, layout)
    paths, targets, digests = _images(listed, found, skipped, left_out)
    known = dict(zip(digests, range(len(digests)), strict=True))
    _require_images(targets, labels, 3 if held_out is None else 2, learning)
    why = f"only {learning} holds classes" if held_out is None else f"{held_out} is the test split"
    skipped += [f"{tree.path}: {why}" for tree in layout.unused]
    if held_out is not None:
        test_paths, test_targets, test_digests = _images(tested, found, skipped, left_out)
        fresh = [i for i, digest in enumerate(test_digests) if digest not in known]
        for i in sorted(set(range(len(test_paths))) - set(fresh)):
            twin = paths[known[test_digests[i]]]
            skipped.append(f"{test_paths[i]}: the same content as {twin}, which is trained on")
            left_out.counts["test image among those trained on"] += 1
        if not fresh:
            raise DataError(f"{held_out} holds no image to test on", fix="put images there")
        test = _split("test", test_paths, test_targets, test_digests, fresh)
        train_at, calibration_at = stratified(
            targets, (1 - CALIBRATION_SHARE, CALIBRATION_SHARE), seed
        )
    else:
        train_at, calibration_at, test_at = stratified(targets, SHARES, seed)
        test = _split("test", paths, targets, digests, test_at)
    images = len(train_at) + len(calibration_at) + len(test)
    return Dataset(
        root.resolve().name,
        str(root),
        labels,
        _split("train", paths, targets, digests, train_at),
        _split("calibration", paths, targets, digests, calibration_at),
        test,
        tuple(skipped),
        left_out.line(images, len(labels)),
    )


def _split(
    name: str,
    paths: Sequence[Path],
    targets: np.ndarray,
    digests: Sequence[bytes],
    at: Sequence[int] | np.ndarray,
) -> Split:
    return Split(name, [paths[i] for i in at], targets[at], [digests[i] for i in at])


def _candidates(classes: Mapping[str, Tree], labels: Sequence[str]) -> list[tuple[Path, int]]:
    """Return the files of each class and their classes."""
    return [(path, t) for t, label in enumerate(labels) for path in classes[label].files()]


def _images(
    candidates: list[tuple[Path, int]],
    found: dict[Path, Finding],
    skipped: list[str],
    left_out: LeftOut,
) -> tuple[list[Path], np.ndarray, list[bytes]]:
    """Return the whole images of each class, their classes, and their content's hashes.

    One of two files with the same content is left out, so that none falls into two splits.
    """
    first: dict[bytes, Path] = {}
    paths, targets, digests = [], [], []
    for path, target in candidates:
        finding = found[path]
        if isinstance(finding, str):
            skipped.append(finding)
            left_out.counts["broken image"] += 1
        elif finding in first:
            skipped.append(f"{path}: the same content as {first[finding]}")
            left_out.counts["repeated image"] += 1
        else:
            first[finding] = path
            paths.append(path)
            targets.append(target)
            digests.append(finding)
    return paths, np.array(targets, np.int64), digests


def _require_images(targets: np.ndarray, labels: Sequence[str], fewest: int, folder: Path) -> None:
    counts = np.bincount(targets, minlength=len(labels))
    if counts.min() < fewest:
        label, count = labels[int(counts.argmin())], int(counts.min())
        raise DataError(
            f"the class {label!r} in {folder} has {count} usable image(s), too few to split",
            fix=f"give at least {fewest} of each class",
        )
