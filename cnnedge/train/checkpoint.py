"""All that a run of training needs to go on after a kill."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from cnnedge.checkpoint import damaged, read_checkpoint, write_checkpoint
from cnnedge.train.history import EpochReport, best_epoch


@dataclass(frozen=True)
class State:
    """A run between two epochs.

    Attributes:
        run: All that decides what the weights become.
        normalization: What the graph wants of its pixels; weights to start from may change it.
        history: The epochs so far.
        variables: The model's: its weights, and the state of the dropout's random generators.
        optimizer: The optimizer's variables, its step count included.
        best: The model's variables after the best epoch so far; empty before the first.
        retry: How it was started a second time, as `describe_retry` has it; None: it was not.
    """

    run: dict[str, Any]
    normalization: str
    history: tuple[EpochReport, ...]
    variables: list[np.ndarray]
    optimizer: list[np.ndarray]
    best: list[np.ndarray] = field(default_factory=list)
    retry: dict[str, Any] | None = None

    @property
    def counted(self) -> tuple[EpochReport, ...]:
        """The epochs since the last start."""
        return self.history[self.retry["after_epoch"] :] if self.retry else self.history

    def after(
        self, report: EpochReport, variables: list[np.ndarray], optimizer: list[np.ndarray]
    ) -> State:
        """Return the state after one more epoch."""
        best = self.best
        if best_epoch((*self.counted, report)) == report.epoch:
            best = variables
        history = (*self.history, report)
        return replace(self, history=history, variables=variables, optimizer=optimizer, best=best)


def write_state(path: Path, state: State) -> None:
    """Write it to an `.npz` file; see `write_checkpoint`."""
    facts = {
        "normalization": state.normalization,
        "history": [asdict(report) for report in state.history],
        "retry": state.retry,
    }
    arrays = {name: getattr(state, name) for name in ("variables", "optimizer", "best")}
    write_checkpoint(path, state.run, facts, arrays)


def read_state(path: Path, run: dict[str, Any]) -> State:
    """Read what `write_state` wrote of the same run; see `read_checkpoint`."""
    facts, arrays = read_checkpoint(path, run)
    try:
        history = tuple(EpochReport(**report) for report in facts["history"])
        return State(run, facts["normalization"], history, **arrays, retry=facts["retry"])
    except (KeyError, TypeError) as error:
        raise damaged(path, error) from error
