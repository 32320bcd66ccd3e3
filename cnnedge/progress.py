"""How a long step tells how far it is, without knowing who listens."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """Receives ``(task, done, total)`` as a step advances; ``total`` 0 means unknown."""

    def __call__(self, task: str, done: int, total: int) -> None:
        """Report that ``done`` of ``total`` units of ``task`` are finished."""


def silent(task: str, done: int, total: int) -> None:
    """Report nothing."""
