"""Labels: read from a file, and matched by name with the classes of a data source."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from cnnedge.data.layout import some
from cnnedge.data.split import Dataset, Split
from cnnedge.errors import DataError

_UTF16 = (b"\xff\xfe", b"\xfe\xff")


def read_labels(path: Path, known: Sequence[str] = ()) -> tuple[str, ...]:
    """Read one label a line, as editors and other tools write them.

    A byte order mark, blanks around a label and blank lines at the end are no part of it, and
    accented letters are composed (NFC). Where every line begins with its running number from 0 on,
    as in Teachable Machine's labels.txt, the numbers are dropped.

    Args:
        path: The file, UTF-8, or UTF-16 with its mark.
        known: The labels as known from elsewhere; lines that are these are taken as they are.

    Raises:
        DataError: it cannot be read, a line within it is blank, or a label is there twice.
    """
    try:
        content = path.read_bytes()
        text = content.decode("utf-16" if content[:2] in _UTF16 else "utf-8-sig")
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or "it is no text in UTF-8"
        raise DataError(
            f"cannot read the labels {path}: {reason}", fix="give one label a line, in UTF-8"
        ) from error
    lines = [as_label(line) for line in re.split("\r\n|\r|\n", text.rstrip())]
    if not any(lines):
        raise DataError(f"{path} holds no labels", fix="give one label a line")
    if "" in lines:
        raise DataError(
            f"line {lines.index('') + 1} of {path} is blank", fix="give one label a line"
        )
    bare = [_without_number(line, number) for number, line in enumerate(lines)]
    numbered = all(bare) and len(set(bare)) == len(bare)
    if numbered and set(lines) != {as_label(label) for label in known}:
        lines = [str(label) for label in bare]
    for number, label in enumerate(lines):
        if label in lines[:number]:
            raise DataError(
                f"{path} names {some([label])} twice (lines {lines.index(label) + 1} and "
                f"{number + 1})",
                fix="give each class a label of its own",
            )
    return tuple(lines)


def as_label(text: str) -> str:
    """Return a label without blanks around it, its accented letters composed."""
    return unicodedata.normalize("NFC", text).strip()


def _without_number(line: str, number: int) -> str | None:
    found = re.fullmatch(r"(\d{1,9})\s+(\S.*)", line)
    return found[2] if found and int(found[1]) == number else None


def same_names(one: Sequence[str], other: Sequence[str]) -> bool:
    """Say whether two lists name the same classes, in whatever order."""
    return sorted(map(as_label, one)) == sorted(map(as_label, other))


def in_order(dataset: Dataset, labels: Sequence[str]) -> Dataset | None:
    """Return the same images, their classes numbered as these labels are; None: they are others.

    Args:
        dataset: Its classes are numbered as its folders are sorted.
        labels: Those of a model's outputs, in their order.
    """
    if not same_names(dataset.labels, labels):
        return None
    places = {as_label(label): place for place, label in enumerate(labels)}
    order = np.array([places[as_label(label)] for label in dataset.labels], np.int64)

    def renumber(split: Split) -> Split:
        return replace(split, targets=order[split.targets])

    return replace(
        dataset,
        labels=tuple(labels),
        train=renumber(dataset.train),
        calibration=renumber(dataset.calibration),
        test=renumber(dataset.test),
    )


def difference(data: Sequence[str], model: Sequence[str]) -> str:
    """Say which classes the data and a model have not in common."""
    ours, theirs = set(map(as_label, data)), set(map(as_label, model))
    found = [
        f"only {whose}: {some(sorted(names))}"
        for whose, names in (("in the data", ours - theirs), ("in the model", theirs - ours))
        if names
    ]
    return "; ".join(found) or "a class is there twice"
