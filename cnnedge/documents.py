"""Documents from elsewhere: JSON is parsed and held against a type before anything believes it.

A document's type names what is read of it. Fields that it does not name are left alone, so that an
older device reads what a newer cnnedge wrote; a value that it does not allow is told in one line
with its place, as in ``$.variants[0].bytes: expected int, got str``.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, TypeVar

from msgspec import Meta, ValidationError, convert

T = TypeVar("T")

MOST_DEPTH = 64  # of brackets; what cnnedge writes has a dozen
_LONGEST = 160  # characters of a reason
_LARGEST = 2**53  # up to here every reader of JSON has the same whole numbers

# Types of single values. Patterns end in \Z: "$" would let a line break by.
Count = Annotated[int, Meta(ge=0, le=_LARGEST)]
Finite = Annotated[float, Meta(ge=-1e300, le=1e300)]
Amount = Annotated[float, Meta(ge=0, le=1e300)]
Positive = Annotated[float, Meta(gt=0, le=1e300)]
Share = Annotated[float, Meta(ge=0, le=1)]
Points = Annotated[float, Meta(ge=0, le=100)]
Sha256 = Annotated[str, Meta(pattern=r"\A[0-9a-f]{64}\Z")]
Labels = Annotated[tuple[str, ...], Meta(min_length=1)]
# Becomes part of file names.
Name = Annotated[str, Meta(pattern=r"\A[A-Za-z0-9][A-Za-z0-9._+-]{0,63}\Z")]


def parse_json(text: bytes | str) -> Any:
    """Return what a JSON text holds.

    Raises:
        ValueError: it is no JSON, is nested deeper than any document of cnnedge, or holds half a
            character.
    """
    try:
        found = json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deep") from None
    except UnicodeDecodeError:
        raise ValueError("it is no UTF-8") from None
    _check_depth(found)
    lower = text.lower()
    if (b"\\ud" in lower) if isinstance(lower, bytes) else ("\\ud" in lower):
        json.dumps(found, ensure_ascii=False).encode()  # half a surrogate pair prints nowhere
    return found


def hold(found: Any, kind: type[T]) -> T:
    """Return parsed JSON as a type.

    Raises:
        ValueError: a value is missing or not what its type allows; the message says which.
    """
    try:
        return convert(found, kind)
    except ValidationError as error:
        reason, _, place = str(error).partition(" - at ")
        reason = reason.replace("`", "").replace("Expected", "expected", 1)
        if len(reason) > _LONGEST:
            reason = f"{reason[:_LONGEST]}…"
        raise ValueError(f"{place.strip('`') or '$'}: {reason}") from None


def read_as(text: bytes | str, kind: type[T]) -> T:
    """Return a JSON text as a type; see `parse_json` and `hold` for what it raises."""
    return hold(parse_json(text), kind)


def _check_depth(found: Any) -> None:
    level = [found]
    for _ in range(MOST_DEPTH):
        level = [
            child
            for node in level
            if isinstance(node, (dict, list))
            for child in (node.values() if isinstance(node, dict) else node)
            if isinstance(child, (dict, list))
        ]
        if not level:
            return
    raise ValueError("it is nested too deep")
