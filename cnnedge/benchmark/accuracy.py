"""Accuracy beside each latency: the same processes answer the same labelled images."""

from __future__ import annotations

import base64
import io
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cnnedge.benchmark.process import Link
from cnnedge.comparison import NO_ANSWER, compare, first_answers
from cnnedge.data import Split
from cnnedge.errors import BackendError
from cnnedge.image import ImageContract
from cnnedge.protocols import Runner

AT_ONCE = 16  # images in a call
MOST_FLIPS = 24  # of a contestant that are shown
MOST_CLASSES = 40  # of a confusion matrix; more would not be read
MOST_CONFUSED = 12
THUMBNAIL = 96  # pixels


@dataclass(frozen=True)
class Answers:
    """What everybody answered to the same images.

    Attributes:
        split: The images.
        expected: The reference's probabilities, float32 ``[N, classes]``.
        reference: Who that was, in words.
        found: The others', by contestant.
        source: The data source.
    """

    split: Split
    expected: np.ndarray
    reference: str
    found: Mapping[str, np.ndarray]
    source: str


def remote(link: Link, name: str, scratch: Path, at_once: int) -> Runner:
    """Return a classifier, uint8 batch → probabilities, that asks a measuring process.

    Args:
        link: The process.
        name: The contestant's.
        scratch: A folder both can see.
        at_once: Images in a call of the runtime.

    Raises:
        BackendError: from the classifier; it cannot answer.
    """
    # Names may hold what no file's may; one classifier at a time uses them.
    images, answers = scratch / "batch.npy", scratch / "answers.npy"

    def answer(batch: np.ndarray) -> np.ndarray:
        np.save(images, batch)
        link.ask("answers", images=str(images), out=str(answers), batch=at_once)
        return np.load(answers)

    return answer


def describe(answers: Answers, name: str, labels: Sequence[str]) -> dict[str, Any]:
    """Return what docs/benchmark.md lists of a contestant's answers."""
    mine, targets = answers.found[name], answers.split.targets
    first = first_answers(mine)
    return {
        "accuracy": compare(mine, answers.expected, targets).to_dict(),
        "right": pack(first == targets),
        "confusion": confusion(first, targets, len(labels)),
        "confused": confused(first, targets, labels),
        "flips": flips(mine, answers.expected, labels),
        "flipped": int((first != answers.expected.argmax(1)).sum()),
    }


def pack(right: np.ndarray) -> str:
    """Return bits as base64, the first image first."""
    return base64.b64encode(np.packbits(right).tobytes()).decode()


def unpack(text: str, count: int) -> np.ndarray:
    """Return what `pack` packed, bool ``[count]``.

    Raises:
        ValueError: it is no base64, or holds fewer.
    """
    bits = np.unpackbits(np.frombuffer(base64.b64decode(text, validate=True), np.uint8))
    if len(bits) < count:
        raise ValueError(f"{len(bits)} bits for {count} images")
    return bits[:count].astype(bool)


def confusion(first: np.ndarray, targets: np.ndarray, classes: int) -> list[list[int]] | None:
    """Return counts ``[truth][answer]``, or None where there are too many classes to read."""
    if classes > MOST_CLASSES:
        return None
    counts = np.zeros((classes, classes), int)
    answered = first != NO_ANSWER
    np.add.at(counts, (targets[answered], first[answered]), 1)
    return counts.tolist()


def confused(first: np.ndarray, targets: np.ndarray, labels: Sequence[str]) -> list[dict[str, Any]]:
    """Return the commonest mistakes."""
    wrong = np.flatnonzero((first != targets) & (first != NO_ANSWER))
    pairs = Counter((int(targets[i]), int(first[i])) for i in wrong)
    return [
        {"truth": labels[truth], "answer": labels[answer], "count": count}
        for (truth, answer), count in pairs.most_common(MOST_CONFUSED)
    ]


def flips(mine: np.ndarray, expected: np.ndarray, labels: Sequence[str]) -> list[dict[str, Any]]:
    """Return images whose first answer is not the reference's, its surest first."""
    first, theirs = first_answers(mine), expected.argmax(1)
    changed = np.flatnonzero((first != theirs) & (first != NO_ANSWER))
    order = changed[np.argsort(-expected[changed, theirs[changed]], kind="stable")]
    return [
        {
            "image": int(i),
            "reference": labels[theirs[i]],
            "answer": labels[first[i]],
            "reference_probability": round(float(expected[i, theirs[i]]), 4),
            "probability": round(float(mine[i, first[i]]), 4),
        }
        for i in order[:MOST_FLIPS]
    ]


def examples(
    answers: Answers, rows: Sequence[Mapping[str, Any]], labels: Sequence[str], image: ImageContract
) -> dict[str, Any]:
    """Return class and thumbnail of each image that is shown, by its place in the data."""
    shown = sorted({flip["image"] for row in rows for flip in row.get("flips") or ()})
    return {
        "truth": {str(i): labels[int(answers.split.targets[i])] for i in shown},
        "thumbnails": {str(i): _thumbnail(answers.split.tensor(i, image)) for i in shown},
    }


def _thumbnail(tensor: np.ndarray) -> str:
    from PIL import Image

    picture = Image.fromarray(tensor[..., 0] if tensor.shape[-1] == 1 else tensor)
    picture.thumbnail((THUMBNAIL, THUMBNAIL))
    buffer = io.BytesIO()
    picture.convert("RGB").save(buffer, "WEBP", quality=80)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode()


def alive(
    links: Mapping[str, Link], one_by_one: Sequence[str], scratch: Path, probe: np.ndarray
) -> tuple[dict[str, Runner], dict[str, str]]:
    """Return a classifier for each process that can answer, and why the others cannot.

    Args:
        links: The processes, by contestant.
        one_by_one: Those that are given one image a call.
        scratch: A folder for what passes between.
        probe: A batch as they will be given, uint8 ``[N, H, W, C]``: who fails on it is left out
            before hours of answering, not in their middle.
    """
    found, refused = {}, {}
    for name, link in links.items():
        answer = remote(link, name, scratch, 1 if name in one_by_one else AT_ONCE)
        try:
            answer(probe)
            found[name] = answer
        except BackendError as error:
            refused[name] = str(error)
    return found, refused
