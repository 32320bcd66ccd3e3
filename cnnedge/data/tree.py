"""A folder as it lies there: its images and its sub-folders, and what is neither."""

from __future__ import annotations

import errno
import os
from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from cnnedge.errors import DataError

# What systems leave behind by themselves; nobody misses it among the photos.
_LITTER = frozenset({"__macosx", "lost+found", "$recycle.bin", "system volume information"})
_LITTER_FILES = frozenset({"thumbs.db", "desktop.ini", ".ds_store", ".gitkeep", ".nomedia"})
# Links to folders are followed down to where class folders may be, and not within one.
_LINKS_DEEP = 3


@dataclass(frozen=True, eq=False)
class Tree:
    """A folder and all that is below it.

    Attributes:
        path: Where it lies.
        linked: Whether it is a link to a folder.
        images: The image files directly in it.
        folders: Its sub-folders by name, sorted.
        others: How many things of each other kind are directly in it: ".txt", "hidden file" …
    """

    path: Path
    linked: bool = False
    images: list[Path] = field(default_factory=list)
    folders: dict[str, Tree] = field(default_factory=dict)
    others: Counter[str] = field(default_factory=Counter)

    def walk(self) -> Iterator[Tree]:
        """Yield it and every folder below, but none that is linked from there."""
        waiting = [self]
        while waiting:
            tree = waiting.pop()
            yield tree
            waiting += [below for below in tree.folders.values() if not below.linked]

    def files(self) -> list[Path]:
        """Return the image files in it and below, sorted."""
        return sorted(path for tree in self.walk() for path in tree.images)

    def classes(self) -> dict[str, Tree]:
        """Return the sub-folders that hold an image, by name, sorted."""
        return {name: tree for name, tree in self.folders.items() if tree.holds_images()}

    def holds_images(self) -> bool:
        """Say whether there is an image in it or below."""
        return any(tree.images for tree in self.walk())


def scan(root: Path, suffixes: frozenset[str]) -> Tree:
    """List a folder with all that is below it.

    Args:
        root: The folder.
        suffixes: Of image files, in lower case.

    Raises:
        DataError: a folder cannot be read; the message names it.
    """
    top = Tree(root)
    linked: set[Path] = set()
    waiting: deque[tuple[Tree, tuple[Path, ...]]] = deque([(top, (root.resolve(),))])
    while waiting:
        tree, above = waiting.popleft()
        for entry in _listed(tree.path):
            name = entry.name
            if not _is_folder(entry):
                _add_file(tree, name, suffixes)
            elif name.lower() in _LITTER:
                continue
            elif name.startswith("."):
                tree.others["hidden folder"] += 1
            elif not entry.is_symlink():
                below = tree.folders[name] = Tree(tree.path / name)
                waiting.append((below, (*above, above[-1] / name)))
            else:
                real = (tree.path / name).resolve()
                back = any(folder.is_relative_to(real) for folder in above)
                if back or real in linked or len(above) > _LINKS_DEEP:
                    tree.others["linked folder"] += 1
                    continue
                linked.add(real)
                below = tree.folders[name] = Tree(tree.path / name, linked=True)
                waiting.append((below, (*above, real)))
    return top


def _listed(folder: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return sorted(entries, key=lambda entry: entry.name)
    except OSError as error:
        raise cannot_read(folder, error) from error


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError as error:
        if error.errno == errno.ELOOP:  # a link to itself
            return False
        raise cannot_read(Path(entry.path), error) from error


def _add_file(tree: Tree, name: str, suffixes: frozenset[str]) -> None:
    suffix = os.path.splitext(name)[1].lower()
    suffix = suffix if suffix.isprintable() and suffix != "." else ""
    if name.lower() in _LITTER_FILES or name.startswith("._"):
        return
    if name.startswith("."):
        tree.others["hidden file"] += 1
    elif suffix in suffixes:
        tree.images.append(tree.path / name)
    else:
        tree.others[suffix or "file without a suffix"] += 1


def cannot_read(path: Path, error: OSError) -> DataError:
    """Describe a file or folder that is there and may not be read."""
    return DataError(f"cannot read {path} ({error.strerror})", fix="check its permissions")
