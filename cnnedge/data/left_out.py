"""What of a folder is not among its images, counted and told in one line."""

from __future__ import annotations

import os
import re
from collections import Counter, defaultdict
from dataclasses import dataclass, field

from cnnedge.data.layout import Layout, labelled, some
from cnnedge.data.tree import Tree
from cnnedge.formats import missing_plugin

_MOST = 10  # kinds that a line names
_LONGEST = 12  # characters of a suffix; a longer one is a part of the name


@dataclass(frozen=True)
class LeftOut:
    """What is not used.

    Attributes:
        counts: How many there are of each kind: ".txt", "broken image" …
        names: Of the folders among them, by kind.
    """

    counts: Counter[str] = field(default_factory=Counter)
    names: defaultdict[str, list[str]] = field(default_factory=lambda: defaultdict(list))

    def line(self, images: int, classes: int) -> str:
        """Say how many images of how many classes there are, and what was left out."""
        counts = self.counts + Counter({kind: len(names) for kind, names in self.names.items()})
        # Folders first: a whole class may be missing.
        kinds = sorted(counts, key=lambda kind: (kind not in self.names, -counts[kind], kind))
        phrases = [self._phrase(kind, counts[kind]) for kind in kinds[:_MOST]]
        if len(kinds) > _MOST:
            rest = sum(counts[kind] for kind in kinds[_MOST:])
            phrases.append(f"{rest} of {len(kinds) - _MOST} other kinds")
        line = f"{images} images, {classes} classes"
        return f"{line}; left out: {', '.join(phrases)}" if phrases else line

    def _phrase(self, kind: str, count: int) -> str:
        if kind.startswith("."):
            plugin = missing_plugin(kind)
            return f"{count} {kind}" + (f" (pip install {plugin.package})" if plugin else "")
        named = f" ({some(sorted(self.names[kind]))})" if kind in self.names else ""
        return f"{count} {_plural(kind) if count > 1 else kind}{named}"


def _plural(kind: str) -> str:
    return re.sub("folder|image|file", r"\g<0>s", kind, count=1)


def leave_out(root: Tree, layout: Layout) -> LeftOut:
    """Count what lies in a folder and is no image in a class folder.

    Args:
        root: The folder.
        layout: What its folders mean.
    """
    found = LeftOut()
    splits = [layout.train] if layout.test is None else [layout.train, layout.test]
    classes = {tree for split in splits for tree in labelled(split).values()}
    waiting = [(root, False)]
    while waiting:
        tree, within = waiting.pop()
        _count_files(tree, found)
        if tree.images and not within:
            found.counts["image outside the class folders"] += len(tree.images)
        for below in tree.folders.values():
            if below in layout.unused:
                found.names["folder beside the splits"].append(below.path.name)
            elif below.linked and within:
                found.counts["linked folder"] += 1
            elif below.holds_images():
                waiting.append((below, within or below in classes))
            else:
                parts = list(below.walk())
                for part in parts:
                    _count_files(part, found)
                filled = any(part.others for part in parts)
                kind = "folder without an image" if filled else "empty folder"
                found.names[kind].append(os.path.relpath(below.path, layout.train.path))
    return found


def _count_files(tree: Tree, found: LeftOut) -> None:
    for kind, count in tree.others.items():
        long = kind.startswith(".") and len(kind) > _LONGEST
        found.counts["file without a suffix" if long else kind] += count
