"""What the folders of a data source mean: classes, or splits that hold the classes."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Collection
from dataclasses import dataclass

from cnnedge.data.tree import Tree
from cnnedge.errors import DataError

# What a split is called. Where several hold images to test on, the first of these tests.
_TRAIN = "train"
_NAMES = {
    _TRAIN: ("train", "training", "trn"),
    "test": ("test", "testing", "tst"),
    "eval": ("eval", "evaluation", "holdout"),
    "val": ("val", "valid", "validate", "validation", "dev"),
}
_SPLITS = {name: split for split, names in _NAMES.items() for name in names}
# What may stand beside it: train_set, seg_test, val-images, train2017.
_FILLERS = frozenset({"set", "data", "dataset", "images", "image", "imgs", "img", "split", "seg"})
_AFFIX = re.compile(r"(?<=.)(set|data)$")
_MOST, _LONGEST = 4, 24  # names in a message, and characters of one
_WRAPPERS = _FILLERS | {"photos", "pictures", "classes"}


@dataclass(frozen=True)
class Layout:
    """Where the classes are.

    Attributes:
        train: The folder of the class folders; where ``test`` is None, of all splits.
        test: The test split's folder, with the same class folders.
        unused: Folders with images that belong to neither.
    """

    train: Tree
    test: Tree | None = None
    unused: tuple[Tree, ...] = ()


def find_layout(root: Tree) -> Layout:
    """Say which folders are splits, and which are classes.

    Folders are splits where they are called so, in any case, and hold class folders of their own:
    a class may be called ``train`` as well.

    Raises:
        DataError: the folders may mean either, or the splits have not the same classes; the
            message names them.
    """
    found = _divided(_unwrapped(root))
    _refuse_same_below(found.train)
    return found


def labelled(folder: Tree) -> dict[str, Tree]:
    """Return the class folders with images by their labels, in the order of their names.

    A label is the folder's name in Unicode's composed form, whatever form the disk has.

    Raises:
        DataError: a name is no text, or two are the same.
    """
    found: dict[str, Tree] = {}
    for name, tree in folder.classes().items():
        label = unicodedata.normalize("NFC", name)
        if any(unicodedata.category(character) in {"Cc", "Cs"} for character in label):
            raise DataError(
                f"the folder name {name!a} in {folder.path} cannot be a label",
                fix="rename it: a label is one line of text in UTF-8",
            )
        if label in found:
            raise DataError(
                f"{folder.path} holds two folders called {label!r}, in two forms of Unicode",
                fix="put their images into one",
            )
        found[label] = tree
    return found


def _divided(root: Tree) -> Layout:
    """Tell splits from classes among the sub-folders of one folder."""
    given = root.classes()
    splits = {name: tree for name, tree in given.items() if _split_of(name)}
    inner = {name: _unwrapped(tree) for name, tree in splits.items()}
    nested = {name: tree for name, tree in inner.items() if _holds_classes(tree)}
    others = [name for name in given if name not in splits]
    if others and len(nested) < 2:
        ambiguous = [
            name for name, tree in nested.items() if len(tree.classes()) > 1 and not tree.images
        ]
        if ambiguous and not all(given[name].classes() for name in others):
            name = ambiguous[0]
            own = some(nested[name].classes())
            raise DataError(
                f"{root.path} holds {name} with folders of its own ({own}) beside {some(others)}: "
                "is it a split or a class?",
                fix=f"give {splits[name].path}, or rename it if it is a class",
            )
        return Layout(root)
    if not splits:
        return Layout(root)
    by_split: dict[str, list[str]] = {split: [] for split in _NAMES}
    for name in nested:
        by_split[str(_split_of(name))].append(name)
    if not by_split[_TRAIN]:
        raise DataError(
            f"{root.path} holds {some(given)}, and no train folder with class folders in it",
            fix="make one sub-folder for each class in it, or give the folder of the classes",
        )
    test = next((names for split, names in by_split.items() if names and split != _TRAIN), [])
    for names in (by_split[_TRAIN], test):
        if len(names) > 1:
            raise DataError(
                f"{root.path} holds {' and '.join(names)}: which of them is meant?",
                fix="move one away, or put their images together",
            )
    train = by_split[_TRAIN][0]
    for name in nested:
        _require_same_classes(nested[name], nested[train])
    return Layout(
        nested[train],
        nested[test[0]] if test else None,
        tuple(tree for name, tree in given.items() if name not in {train, *test}),
    )


def _require_same_classes(split: Tree, train: Tree) -> None:
    held, wanted = set(labelled(split)), set(labelled(train))
    more, less = sorted(held - wanted), sorted(wanted - held)
    name = train.path.name  # of two long paths the middle would be cut, and with it the classes
    differ = [f"has classes that {name} lacks: {some(more)}"] if more else []
    differ += [f"lacks classes that {name} has: {some(less)}"] if less else []
    if differ:
        raise DataError(
            f"{split.path} {'; it '.join(differ)}", fix="give both the same class folders"
        )


def _split_of(name: str) -> str | None:
    """Return the split that a folder is called after, or None."""
    words = re.findall(r"[^\W\d_]+", name.casefold())
    words = [_AFFIX.sub("", word) for word in words if word not in _FILLERS]
    return _SPLITS.get(words[0]) if len(words) == 1 else None


def _holds_classes(split: Tree) -> bool:
    classes = split.classes()
    return len(classes) > 1 or (len(classes) == 1 and not split.images)


def _unwrapped(tree: Tree) -> Tree:
    """Return the folder itself, or the only one in it where that does no more than hold the rest.

    Archives are often unpacked so: ``flowers/flowers/train/…``, ``images/train/…``.
    """
    while not tree.images:
        held = tree.classes()
        if len(held) != 1:
            break
        (name, only), *_ = held.items()
        below = only.classes()
        wraps = name.casefold() in _WRAPPERS | {tree.path.resolve().name.casefold()}
        divided = len(below) > 1 and all(map(_split_of, below))
        if _split_of(name) and _split_of(tree.path.name) != _split_of(name):
            break
        if len(below) == 0 or not (wraps or divided):
            break
        tree = only
    return tree


def _refuse_same_below(folder: Tree) -> None:
    """Refuse folders that all hold the same sub-folders: those may be the classes."""
    classes = folder.classes()
    below = [set(tree.classes()) for tree in classes.values()]
    shared = set.intersection(*below) if below else set()
    if len(classes) > 1 and len(shared) > 1:
        raise DataError(
            f"{some(classes)} in {folder.path} hold the same sub-folders "
            f"({some(sorted(shared))}): which are the classes?",
            fix="name splits train and test, or put the images of a class into its folder",
        )


def some(names: Collection[str]) -> str:
    """List the first of some names, short enough for a line."""
    shown = [name if len(name) <= _LONGEST else f"{name[:_LONGEST]}…" for name in names][:_MOST]
    line = ", ".join(shown) + (", …" if len(names) > _MOST else "")
    return "".join(character if character.isprintable() else "?" for character in line)
