"""A run on disk: each round's network, and a checkpoint of the round that is being worked on."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cnnedge.checkpoint import damaged, read_checkpoint, remove_checkpoint, write_checkpoint
from cnnedge.compress.outcome import Candidate
from cnnedge.compress.recovery import RecoveryEpoch

if TYPE_CHECKING:
    import keras

    from cnnedge.backends.keras import ModelNote

Kept = dict[str, list[int]]


def state_path(out: Path) -> Path:
    """Return where the checkpoint of a run is that writes ``out``; its networks are beside it."""
    return out.with_suffix(".ckpt") / "state.npz"


class Saved:
    """What a run has come to, always as it is on disk.

    Args:
        state: Where its checkpoint is, see `state_path`.
        note: What goes with each network.

    Attributes:
        state: The checkpoint.
        candidates: The reference, and one for each finished round.
        begun: The round that is being worked on, or that was finished last.
        reports: Its epochs so far, while it is being worked on.
        variables: Its network's after the last of them.
        optimizer: Its optimizer's.
        splits: The layers that were split so far, a line each.
    """

    def __init__(self, state: Path, note: ModelNote) -> None:
        self.state = state
        self.candidates: list[Candidate] = []
        self.begun = 0
        self.reports: tuple[RecoveryEpoch, ...] = ()
        self.variables: list[np.ndarray] = []
        self.optimizer: list[np.ndarray] = []
        self._folder = state.parent
        self._note = note
        self._run: Mapping[str, Any] = {}
        self._kept: Kept = {}  # of the round that is begun
        self.splits: tuple[str, ...] = ()

    @property
    def finished(self) -> int:
        """The last finished round."""
        return len(self.candidates) - 1

    def start(self, run: Mapping[str, Any], reference: Candidate, network: keras.Model) -> None:
        """Begin a run; what another one left is removed."""
        self.remove()
        self._run = run
        self.candidates = [reference]
        self._write_network(0, network)
        self._write()

    def resume(self, run: Mapping[str, Any]) -> None:
        """Go on with a run.

        Raises:
            ModelError: there is none, it is damaged, or it is another.
        """
        facts, arrays = read_checkpoint(self.state, run)
        self._run = run
        try:
            self.candidates = [Candidate.from_dict(fields) for fields in facts["candidates"]]
            self.reports = tuple(RecoveryEpoch(**report) for report in facts["reports"])
            self.begun, self._kept = facts["begun"], facts["kept"]
            self.splits = tuple(facts["splits"])
            self.variables, self.optimizer = arrays["variables"], arrays["optimizer"]
        except (KeyError, TypeError) as error:
            raise damaged(self.state, error) from error

    def network(self, number: int) -> keras.Model:
        """Load a round's network: pruned while it is worked on, recovered once it is finished."""
        from cnnedge.backends.keras import load_model

        return load_model(self._path(number))[0]

    def kept(self, number: int) -> Kept:
        """Return which of the reference's channels each layer of a round's network has."""
        if number > self.finished:
            return self._kept
        return {layer.name: list(layer.kept) for layer in self.candidates[number].layers}

    def begin(self, number: int, network: keras.Model, kept: Kept, splits: tuple[str, ...]) -> None:
        """Save a network that was just pruned."""
        self._write_network(number, network)
        self.begun, self._kept, self.splits, self.reports = number, kept, splits, ()
        self._write()

    def epoch(
        self, report: RecoveryEpoch, variables: list[np.ndarray], optimizer: list[np.ndarray]
    ) -> None:
        """Save the state after an epoch."""
        self.reports = (*self.reports, report)
        self.variables, self.optimizer = variables, optimizer
        self._write()

    def finish(self, candidate: Candidate, network: keras.Model) -> None:
        """Save a round's network for good."""
        self._write_network(candidate.round, network)
        self.candidates.append(candidate)
        self.reports, self.variables, self.optimizer = (), [], []
        self._write()

    def remove(self) -> None:
        """Remove everything."""
        with suppress(OSError):
            for file in (*self._folder.glob("round-*.keras"), *self._folder.glob(".round-*")):
                file.unlink(missing_ok=True)
        remove_checkpoint(self.state)

    def _path(self, number: int) -> Path:
        return self._folder / f"round-{number}.keras"

    def _write_network(self, number: int, network: keras.Model) -> None:
        from cnnedge.backends.keras import save_model

        save_model(network, self._path(number), self._note)

    def _write(self) -> None:
        facts = {
            "candidates": [candidate.to_dict() for candidate in self.candidates],
            "begun": self.begun,
            "kept": self._kept,
            "splits": self.splits,
            "reports": [asdict(report) for report in self.reports],
        }
        arrays = {"variables": self.variables, "optimizer": self.optimizer}
        write_checkpoint(self.state, self._run, facts, arrays)
