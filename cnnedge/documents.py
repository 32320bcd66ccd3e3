"""Documents from elsewhere: JSON is parsed and held against a type before anything believes it.

A document's type names what is read of it. Fields that it does not name are left alone, so that an
older device reads what a newer cnnedge wrote; a value that it does not allow is told in one line
with its place, as in ``$.variants[0].bytes: expected int, got str``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from reprlib import repr
from typing import Annotated, Any, TypeVar

from msgspec import Meta, ValidationError, convert

from cnnedge.errors import CnnEdgeError, one_line

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
        found = json.loads(text, parse_constant=lambda name: None)  # JSON knows no NaN
    except RecursionError:
        raise ValueError("it is nested too deep") from None
    except UnicodeDecodeError:
        raise ValueError("it is no UTF-8") from None
    _check_depth(found)
    lower = text.lower()
    if (b"\\ud" in lower) if isinstance(lower, bytes) else ("\\ud" in lower):
        json.dumps(found, ensure_ascii=False).encode()  # half a surrogate pair prints nowhere
    return found


class MismatchError(ValueError):
    """A value is missing or not what its type allows.

    Attributes:
        place: Where, as in ``$.variants[0].bytes``.
        reason: What was expected, and what is there.
    """

    def __init__(self, place: str, reason: str) -> None:
        self.place, self.reason = place, reason
        super().__init__(f"{place}: {reason}")


def hold(found: Any, kind: type[T]) -> T:
    """Return parsed JSON as a type.

    Raises:
        MismatchError: a value is missing or not what its type allows; the message says which.
    """
    try:
        return convert(found, kind, dec_hook=_path)
    except ValidationError as error:
        reason, _, place = str(error).partition(" - at ")
        place = place.strip("`") or "$"
        reason = reason.replace("`", "").replace("Expected", "expected", 1)
        if reason.startswith("Invalid enum value"):
            value = reason.removeprefix("Invalid enum value ")
            reason = f"expected one of {', '.join(map(str, _choices(kind, place)))}, got {value}"
        if len(reason) > _LONGEST:
            reason = f"{reason[:_LONGEST]}…"
        raise MismatchError(place, reason) from None


def hold_options(
    fields: Mapping[str, Any],
    kind: type[T],
    what: str,
    *,
    fix: str,
    options: Mapping[str, str] | None = None,
) -> T:
    """Return options, or what a TOML file holds, as a type.

    Args:
        fields: The values by name.
        kind: The type.
        what: What they make: "recipe" or "suite".
        fix: Where they are described.
        options: What a message calls a field that was given on the command line.

    Raises:
        CnnEdgeError: one is unknown, missing, or has a value it may not have; the message names it.
    """
    known = kind.__annotations__  # of a dataclass, unlike a Struct, the others would be ignored
    if unknown := [name for name in fields if name not in known]:
        raise CnnEdgeError(
            f"{what} has no {one_line(unknown[0], 60)}, it has {', '.join(known)}", fix=fix
        )
    try:
        return hold(fields, kind)
    except MismatchError as error:
        if error.place == "$":
            raise CnnEdgeError(f"{what}: {error.reason}", fix=fix) from None
        place = error.place.removeprefix("$.")
        name = (options or {}).get(_steps(error.place)[0], f"{what}: {place}")
        value = one_line(repr(_at(fields, error.place)), 60)
        raise CnnEdgeError(f"{name} {value}: {error.reason}", fix=fix) from None


def _path(kind: type, found: Any) -> Any:
    """Return a path as a type's field may be one, which JSON and TOML have as text."""
    if kind is Path and isinstance(found, str | Path):
        return Path(found)
    raise ValueError(f"expected {kind.__name__.lower()}, got {type(found).__name__}")


def _steps(place: str) -> list[str]:
    return [name or index for name, index in re.findall(r"\.(\w+)|\[(\d+|\.\.\.)\]", place)]


def _at(found: Any, place: str) -> Any:
    """Return the value at a place; what is around it where that cannot be told."""
    for step in _steps(place):
        try:
            found = found[int(step)] if isinstance(found, list | tuple) else found[step]
        except (KeyError, ValueError, TypeError, IndexError):
            break
    return found


def _choices(kind: Any, place: str) -> tuple[Any, ...]:
    """Return the values that a type allows at a place, where it lists them."""
    from msgspec import inspect

    kinds = [inspect.type_info(kind)]
    for step in _steps(place):
        inner = []
        for one in kinds:
            if isinstance(one, inspect.StructType | inspect.DataclassType):
                inner += [field.type for field in one.fields if field.encode_name == step]
            elif isinstance(one, inspect.TupleType):
                inner += one.item_types
            else:
                inner += [getattr(one, name) for name in _ITEMS if hasattr(one, name)]
        kinds = [part for one in inner for part in getattr(one, "types", (one,))]
    return tuple(value for one in kinds for value in getattr(one, "values", ()))


_ITEMS = ("item_type", "value_type")  # of a list and the like, and of a mapping


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
