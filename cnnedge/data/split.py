"""A labelled data set and its disjoint parts."""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from cnnedge.errors import DataError
from cnnedge.image import ImageContract, to_tensor
from cnnedge.machine import this_machine
from cnnedge.progress import Progress, silent

T = TypeVar("T")

# Decoded images that may wait for the network, beside one for each thread.
AHEAD_BYTES = 256 * 2**20
# A twentieth of an image's decoding holds the interpreter's lock: more threads would wait for it.
MOST_WORKERS = 32


@dataclass(frozen=True)
class Split:
    """Labelled images, decoded when they are asked for.

    Attributes:
        name: "train", "calibration" or "test".
        items: Paths, or uint8 arrays ``[H, W, 3]``.
        targets: The class of each, int64 ``[N]``.
        digests: The SHA-256 of each one's content, where it is known already.
    """

    name: str
    items: Sequence[Any]
    targets: np.ndarray
    digests: Sequence[bytes] | None = None

    def __len__(self) -> int:
        return len(self.targets)

    def tensor(self, index: int, contract: ImageContract) -> np.ndarray:
        """Return one image, uint8 ``[H, W, C]``."""
        return to_tensor(self.items[index], contract)

    def batches(
        self, contract: ImageContract, batch_size: int
    ) -> Generator[tuple[np.ndarray, np.ndarray], None, None]:
        """Yield ``(uint8 [n, H, W, C], int64 [n])`` in order; the last one may be smaller.

        While the caller works on a batch, the next one is decoded by a thread for each core
        (Pillow releases the interpreter's lock), and no more than `AHEAD_BYTES` of it, so memory
        does not grow with the data set.
        """
        nbytes = contract.height * contract.width * contract.channels
        # Beyond the next batch a few, so that no thread waits while a batch is put together.
        ahead = min(batch_size + 2 * workers(), max(workers(), AHEAD_BYTES // nbytes))
        batch: list[np.ndarray] = []
        images = map_ahead(lambda i: self.tensor(i, contract), len(self), ahead)
        with closing(images):
            for done, image in enumerate(images, start=1):
                batch.append(image)
                if len(batch) == batch_size or done == len(self):
                    stacked, batch = np.stack(batch), []
                    yield stacked, self.targets[done - len(stacked) : done]

    def take(self, count: int, seed: int) -> Split:
        """Return a seeded, stratified part of at most ``count`` images, in their order."""
        if count >= len(self):
            return self
        rng = np.random.default_rng(seed)
        # Deal the classes out in turn: any prefix of this order is as balanced as can be.
        rank = np.empty(len(self), np.int64)
        for label in np.unique(self.targets):
            members = np.flatnonzero(self.targets == label)
            rank[rng.permutation(members)] = np.arange(len(members))
        order = np.lexsort((rng.permutation(len(self)), rank))
        return self.select(np.sort(order[:count]))

    def select(self, indices: np.ndarray) -> Split:
        """Return the images at these indices."""
        digests = None if self.digests is None else Selection(self.digests, indices)
        return Split(self.name, Selection(self.items, indices), self.targets[indices], digests)

    def hashed(self, progress: Progress = silent) -> Split:
        """Return the same split with its `digests`, so that no image is hashed a second time.

        Args:
            progress: Told how many images are done, where they are not known yet.
        """
        if self.digests is not None:
            return self
        digests = []
        for digest in map_ahead(lambda i: item_digest(self.items[i]), len(self), 4 * workers()):
            digests.append(digest)
            progress("hash", len(digests), len(self))
        return replace(self, digests=digests)

    def digest(self) -> str:
        """Return the SHA-256 of the images' content and classes, in order."""
        digest = hashlib.sha256()
        for item, target in zip(self.item_digests(), self.targets, strict=True):
            digest.update(item)
            digest.update(int(target).to_bytes(8, "little"))
        return digest.hexdigest()

    def item_digests(self) -> Iterator[bytes]:
        """Yield the SHA-256 of each image's content."""
        return map(item_digest, self.items) if self.digests is None else iter(self.digests)

    def name_of(self, index: int) -> str:
        """Return what a message calls the image at ``index``: its file, or its place."""
        item = self.items[index]
        return f"image {index}" if isinstance(item, np.ndarray) else str(item)


@dataclass(frozen=True)
class Selection(Sequence[Any]):
    """Some items of another sequence, fetched when they are asked for."""

    items: Sequence[Any]
    indices: np.ndarray

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return Selection(self.items, self.indices[index])
        return self.items[int(self.indices[index])]


@dataclass(frozen=True)
class Dataset:
    """A data source with its three disjoint parts.

    Attributes:
        name: "digits", "signs" or a folder's name.
        spec: How to open it again: ``open_source(spec)``.
        labels: The classes, in the order of the targets.
        train: What weights are learned from.
        calibration: What activation ranges are taken from; never trained nor tested on.
        test: What accuracy is measured on.
        skipped: Files that were left out, each with the reason.
        told: One line: how many images of how many classes, and how many of what was left out.
            Empty where the images come from no folder.
    """

    name: str
    spec: str
    labels: tuple[str, ...]
    train: Split
    calibration: Split
    test: Split
    skipped: tuple[str, ...] = ()
    told: str = ""


def workers() -> int:
    """Return how many threads decode: one for each core that this process may use."""
    return min(MOST_WORKERS, this_machine().cores)


def map_ahead(function: Callable[[int], T], count: int, ahead: int) -> Generator[T, None, None]:
    """Yield ``function(0)`` … ``function(count - 1)`` in order, computed ahead by `workers`.

    Args:
        function: Called from several threads; what it raises is raised in its place.
        count: How many calls.
        ahead: At most this many results wait or are being computed, while the caller has one.
    """
    waiting: deque[Future[T]] = deque()
    with ThreadPoolExecutor(workers()) as pool:
        try:
            for index in range(count):
                waiting.append(pool.submit(function, index))
                if len(waiting) > ahead:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:  # the caller stopped early, or a call failed
            for future in waiting:
                future.cancel()


def item_digest(item: Any) -> bytes:
    """Return the SHA-256 of one item's content: a file's bytes, or an array's shape and pixels."""
    if isinstance(item, np.ndarray):
        return hashlib.sha256(f"{item.shape}".encode() + item.tobytes()).digest()
    with open(Path(item), "rb") as file:
        return hashlib.file_digest(file, "sha256").digest()


def refuse_overlap(calibration: Split, test: Split) -> None:
    """Refuse calibration images that accuracy is measured on as well, by their content.

    Raises:
        DataError: there is one; the message names it in both splits.
    """
    places = {digest: index for index, digest in enumerate(calibration.item_digests())}
    for index, digest in enumerate(test.item_digests()):
        if digest in places:
            raise DataError(
                f"the calibration {calibration.name_of(places[digest])} is also the test "
                f"{test.name_of(index)}",
                fix="remove the duplicate: accuracy on images that set the scales proves nothing",
            )


def stratified(targets: np.ndarray, shares: Sequence[float], seed: int) -> tuple[np.ndarray, ...]:
    """Divide indices into disjoint parts that hold each class in the same proportion.

    Args:
        targets: The class of each item, int64 ``[N]``.
        shares: The share of each part; they sum to 1. Every part gets at least one of each class.
        seed: Seeds the shuffle.

    Returns:
        Sorted index arrays, one per share.

    Raises:
        DataError: a class has fewer items than there are parts.
    """
    rng = np.random.default_rng(seed)
    parts: list[list[np.ndarray]] = [[] for _ in shares]
    for label in np.unique(targets):
        members = rng.permutation(np.flatnonzero(targets == label))
        if len(members) < len(shares):
            raise DataError(
                f"class {label} has {len(members)} images, too few for {len(shares)} splits",
                fix=f"give at least {len(shares)} of each class",
            )
        cuts = np.rint(np.cumsum(shares) * len(members)).astype(int)
        least = np.arange(1, len(shares) + 1)  # one of each class in every part
        cuts = np.clip(cuts, least, len(members) - least[::-1] + 1)
        for part, chosen in zip(parts, np.split(members, cuts[:-1]), strict=True):
            part.append(chosen)
    return tuple(np.sort(np.concatenate(part)) for part in parts)
