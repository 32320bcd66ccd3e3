"""Hold what a document says of a model against what the graph itself takes and gives.

A label for each output and the image of the right size: before either is allocated or looked up.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from cnnedge.errors import ModelError
from cnnedge.image import ImageContract
from cnnedge.metadata import Ends

INPUTS = ("uint8", "float32")


def check_ends(
    ends: Ends,
    image: ImageContract,
    labels: int,
    where: str,
    *,
    said_by: str,
    any_size: bool = False,
    inputs: Collection[str] = INPUTS,
) -> None:
    """Refuse a graph whose input or output is not what a document says.

    Args:
        ends: The graph's; a dimension that it leaves free is taken on trust.
        image: The image contract.
        labels: How many there are.
        where: The model, for messages.
        said_by: The document, as in "its metadata".
        any_size: Whether the graph resizes images by itself.
        inputs: The types that its input may have.

    Raises:
        ModelError: it is not; the message names what differs.
    """
    takes, gives = ends.input, ends.output
    size: tuple[int | None, ...] = (None, None, image.channels) if any_size else image.shape
    fits = _fits(takes.shape[1:], size, exactly=any_size)
    if takes.dtype not in inputs or len(takes.shape) != 4 or not fits:
        raise ModelError(
            f"{where} takes {takes.dtype} {_shown(takes.shape)}, and {said_by} says "
            f"{' or '.join(inputs)}, an image of {'×'.join(map(_size, size))}",
            fix="export or package it again",
        )
    if gives.dtype != "float32" or not _fits(gives.shape[1:], (labels,)):
        raise ModelError(
            f"{where} gives {gives.dtype} {_shown(gives.shape)}, and {said_by} names "
            f"{labels} labels",
            fix="export or package it again",
        )


def _fits(found: tuple[Any, ...], said: tuple[Any, ...], *, exactly: bool = False) -> bool:
    free = () if exactly else (None,)
    return len(found) == len(said) and all(
        one in (other, *free) for one, other in zip(found, said, strict=True)
    )


def _size(size: int | None) -> str:
    return "any" if size is None else str(size)


def _shown(shape: tuple[int | None, ...]) -> str:
    return f"[{', '.join(map(_size, shape[:8]))}{', …' if len(shape) > 8 else ''}]"
