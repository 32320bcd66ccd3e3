"""All that a run needs to go on after a kill, in one file that is whole or absent."""

from __future__ import annotations

import json
import zipfile
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from cnnedge.errors import ModelError
from cnnedge.files import atomic_path
from cnnedge.train.history import EpochReport, best_epoch

_ARRAYS = ("variables", "optimizer", "best")

# What NumPy's and zipfile's readers raise of a file that was cut or changed. RuntimeError is
# zipfile's for a flipped bit that says "encrypted", or names another compression or version.
_DAMAGED = (
    *(OSError, EOFError, KeyError, TypeError, ValueError, RuntimeError),
    zipfile.BadZipFile,
)


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
    """

    run: dict[str, Any]
    normalization: str
    history: tuple[EpochReport, ...]
    variables: list[np.ndarray]
    optimizer: list[np.ndarray]
    best: list[np.ndarray] = field(default_factory=list)

    def after(
        self, report: EpochReport, variables: list[np.ndarray], optimizer: list[np.ndarray]
    ) -> State:
        """Return the state after one more epoch."""
        history = (*self.history, report)
        best = variables if best_epoch(history) == report.epoch else self.best
        return State(self.run, self.normalization, history, variables, optimizer, best)


def write_state(path: Path, state: State) -> None:
    """Write it to an `.npz` file, in the place of the last one.

    Raises:
        CnnEdgeError: the folder cannot be written, or the disk is full.
    """
    about = {
        "run": state.run,
        "normalization": state.normalization,
        "history": [asdict(report) for report in state.history],
        "counts": {name: len(getattr(state, name)) for name in _ARRAYS},
    }
    arrays = {
        f"{name}/{i}": array for name in _ARRAYS for i, array in enumerate(getattr(state, name))
    }
    with atomic_path(path) as temporary:
        np.savez(temporary, about=np.array(_json(about)), **arrays)


def read_state(path: Path, run: dict[str, Any]) -> State:
    """Read what `write_state` wrote of the same run.

    Raises:
        ModelError: there is no such file, it is damaged, or it is of another run than ``run``; the
            message names what differs.
    """
    if not path.is_file():
        raise ModelError(
            f"there is no checkpoint {path} to resume from",
            fix="start without --resume; a run that finished has removed its own",
        )
    try:
        with np.load(path, allow_pickle=False) as file:
            about = json.loads(str(file["about"]))
            arrays = {
                name: [file[f"{name}/{i}"] for i in range(about["counts"][name])]
                for name in _ARRAYS
            }
        history = tuple(EpochReport(**report) for report in about["history"])
        found, normalization = dict(about["run"]), about["normalization"]
    except _DAMAGED as error:
        raise ModelError(
            f"the checkpoint {path} is damaged ({error})", fix="start again without --resume"
        ) from error
    _require_same(path, found, json.loads(_json(run)))
    return State(found, normalization, history, **arrays)


def remove_state(path: Path) -> None:
    """Remove a checkpoint, what a kill left of the next one, and the folder if it is empty then."""
    with suppress(OSError):
        for file in (path, *path.parent.glob(f".{path.stem}.*.partial{path.suffix}")):
            file.unlink(missing_ok=True)
        path.parent.rmdir()


def _require_same(path: Path, found: dict[str, Any], asked: dict[str, Any]) -> None:
    differing = [
        f"{name} ({_short(found.get(name))} there, {_short(asked.get(name))} now)"
        for name in found | asked
        if found.get(name) != asked.get(name)
    ]
    if differing:
        raise ModelError(
            f"the checkpoint {path} is of another run, with another {', another '.join(differing)}",
            fix="resume with the same data and options, or start again without --resume",
        )


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 40 else f"{text[:12]}…"


def _json(document: dict[str, Any]) -> str:
    return json.dumps(document, default=str)
