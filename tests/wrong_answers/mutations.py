"""Documents with one value replaced: what a damaged or a hostile file may hold."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Iterator
from typing import Any

REPLACEMENTS = {
    "absent": ...,
    "null": None,
    "true": True,
    "-1": -1,
    "0": 0,
    "inf": float("inf"),
    "nan": float("nan"),
    "half": 0.5,
    "empty text": "",
    "text": "x",
    "a path": "../../x",
    "half a character": "\ud800",
    "empty list": [],
    "empty object": {},
    "a million": 10**6,
    "huge": 10**30,
    "lists": [[["x"]]],
    "objects": {"x": {"y": [1]}},
    "long list": [1] * 5000,
    "deep": None,  # made below
}
deep: list[Any] = []
for _ in range(300):
    deep = [deep]
REPLACEMENTS["deep"] = deep


def mutations(document: Any, count: int, *, seed: int = 0) -> Iterator[tuple[str, str]]:
    """Yield what was done, and the document with one of its values replaced, as JSON.

    Args:
        document: The document; every value of it may be replaced, by anything in `REPLACEMENTS`.
            Of a list, only the first entry is: the others are alike.
        count: How many to draw of them.
        seed: Of the drawing.
    """
    cases = [(path, name) for path in _paths(document) for name in REPLACEMENTS]
    for path, name in random.Random(seed).sample(cases, min(count, len(cases))):
        value, changed = REPLACEMENTS[name], copy.deepcopy(document)
        place = changed
        for step in path[:-1]:
            place = place[step]
        if value is ...:
            del place[path[-1]]
        else:
            place[path[-1]] = value
        yield f"{'.'.join(map(str, path))}: {name}", json.dumps(changed)


def _paths(found: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    if at:
        yield at
    if isinstance(found, dict):
        for key, value in found.items():
            yield from _paths(value, (*at, key))
    elif isinstance(found, list) and found:
        yield from _paths(found[0], (*at, 0))
