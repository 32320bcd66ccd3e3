"""Rendered signs, kept on disk: a picture takes milliseconds to draw and microseconds to read."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cnnedge.data.signs import camera
from cnnedge.errors import CnnEdgeError
from cnnedge.files import atomic_path, cache_folder

BLOCK = 64  # images in a file: 2.4 MB, drawn in a quarter of a second
_OPEN_BLOCKS = 128  # each holds a file descriptor


class SignImages(Sequence[np.ndarray]):
    """The images of a seed, each uint8 ``[SIZE, SIZE, 3]``, drawn when first asked for.

    They are drawn, stored and mapped into memory in blocks, so a set of any size takes the disk
    space of what was looked at. A block of another shape, or whose first image is not what would
    be drawn today, is drawn again. Where nothing can be stored, each image is drawn each time.
    The files may be deleted at any time.

    Args:
        seed: Not negative.
        count: How many there are.
        folder: Where blocks are stored; None: `cache_folder`.
    """

    def __init__(self, seed: int, count: int, folder: Path | None = None) -> None:
        self._seed = seed
        self._count = count
        self._root = folder or cache_folder()
        self._blocks: OrderedDict[int, np.ndarray] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(self._count))]
        if not -self._count <= index < self._count:
            raise IndexError(f"there are {self._count} images, none at {index}")
        number, place = divmod(int(index) % self._count, BLOCK)
        with self._lock:  # so that one thread draws a block while the others wait for it
            block = self._block(number)
        if block is None:
            return camera.render(self._seed, number * BLOCK + place)
        return np.asarray(block[place])

    def _block(self, number: int) -> np.ndarray | None:
        if number in self._blocks:
            self._blocks.move_to_end(number)
            return self._blocks[number]
        if self._root is None:
            return None
        # The name holds whatever decides the pixels.
        name = f"signs-v{camera.VERSION}-d{camera.DIFFICULTY:g}-s{self._seed}"
        path = self._root / name / f"{number:06d}.npy"
        block = self._read(path, number)
        if block is None:
            drawn = np.stack([camera.render(self._seed, number * BLOCK + i) for i in range(BLOCK)])
            try:
                with atomic_path(path) as temporary:
                    np.save(temporary, drawn)
            except (
                CnnEdgeError,
                OSError,
            ):  # full or read-only: an image costs its drawing from now on
                self._root = None
                return drawn
            block = self._read(path, number)
            if block is None:
                return drawn
        self._blocks[number] = block
        if len(self._blocks) > _OPEN_BLOCKS:
            self._blocks.popitem(last=False)
        return block

    def _read(self, path: Path, number: int) -> np.ndarray | None:
        """Return a stored block, or None if there is none that can be trusted."""
        try:
            block = np.load(path, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError, EOFError):
            return None
        if block.shape != (BLOCK, camera.SIZE, camera.SIZE, 3) or block.dtype != np.uint8:
            return None
        # Another release of Pillow may round otherwise: half a set must not be of each.
        if not np.array_equal(block[0], camera.render(self._seed, number * BLOCK)):
            return None
        return block
