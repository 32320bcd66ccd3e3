"""What came of a compression, as data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from cnnedge.comparison import Comparison
from cnnedge.compress.channels import ChannelMap
from cnnedge.compress.options import CompressOptions
from cnnedge.compress.recovery import RecoveryEpoch
from cnnedge.compress.rewrite import kept_places
from cnnedge.errors import ModelError


@dataclass(frozen=True)
class Timing:
    """How long a network takes on the machine that it is for.

    Attributes:
        seconds: For one image.
        by_layer: What each layer takes of that, by its name.
    """

    seconds: float
    by_layer: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class LayerKept:
    """What is left of a layer.

    Attributes:
        name: The layer.
        channels: How many channels it makes.
        kept: Which of the reference's these are, ascending; empty where all are kept, or where the
            reference has no such layer.
    """

    name: str
    channels: int
    kept: tuple[int, ...] = ()


@dataclass(frozen=True)
class Candidate:
    """A network on the way: the reference as round 0, then one for each round of pruning.

    Attributes:
        round: From 0.
        macs: Multiply-accumulates of one image.
        params: Parameters.
        seconds: The latency, where a budget asks for it.
        layers: Each layer that makes channels.
        epochs: The fine-tuning.
        splits: The layers that were split so far, a line each.
        notes: What had to stay as it is, and why.
        comparison: Its answers to the test images against the reference's, where it was asked.
    """

    round: int
    macs: int
    params: int
    seconds: float | None
    layers: tuple[LayerKept, ...]
    epochs: tuple[RecoveryEpoch, ...] = ()
    splits: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    comparison: Comparison | None = None

    def __str__(self) -> str:
        widths = ", ".join(f"{layer.name} {layer.channels}" for layer in self.layers)
        took = "" if self.seconds is None else f", {1e3 * self.seconds:.2f} ms"
        return (
            f"round {self.round}: {self.macs / 1e6:,.1f} M MACs, {self.params:,} parameters{took}; "
            f"{widths}"
        )

    def to_dict(self) -> dict[str, Any]:
        """Return it as JSON-able data."""
        comparison = None if self.comparison is None else self.comparison.to_dict()
        return asdict(self) | {"comparison": comparison}

    @staticmethod
    def from_dict(fields: Mapping[str, Any]) -> Candidate:
        """Read what `to_dict` wrote of one that was not compared yet."""
        layers = tuple(
            LayerKept(layer["name"], layer["channels"], tuple(layer["kept"]))
            for layer in fields["layers"]
        )
        epochs = tuple(RecoveryEpoch(**epoch) for epoch in fields["epochs"])
        lines = {key: tuple(fields[key]) for key in ("splits", "notes")}
        return Candidate(**{**fields, "layers": layers, "epochs": epochs, **lines})


@dataclass(frozen=True)
class CompressResult:
    """What came of it.

    Attributes:
        path: The `.keras` file.
        options: What was asked for.
        multiple: What numbers of channels were rounded to.
        reference: The network as it was.
        candidates: One for each round.
        chosen: The round whose network was kept; 0: the reference itself, none being good enough.
        guessing: How well the reference does, where that is no better than by guessing.
    """

    path: Path
    options: CompressOptions
    multiple: int
    reference: Candidate
    candidates: tuple[Candidate, ...]
    chosen: int
    guessing: str | None = None

    @property
    def kept(self) -> Candidate:
        """The network in the file."""
        return (self.reference, *self.candidates)[self.chosen]

    @property
    def met(self) -> bool:
        """Whether the budget is met within the drop allowed."""
        return self.chosen == len(self.candidates) or bool(self.options.pareto and self.chosen)

    @property
    def points(self) -> tuple[Path, ...]:
        """The files of the networks along a front, in the order of the candidates."""
        shares = sorted(self.options.pareto, reverse=True)
        return tuple(self.path.with_name(f"{self.path.stem}.macs-{s:g}.keras") for s in shares)

    def removed(self) -> list[dict[str, Any]]:
        """Return for each layer how many channels it had and has, and which are left."""
        had = {layer.name: layer.channels for layer in self.reference.layers}
        return [
            {
                "layer": layer.name,
                "before": had.get(layer.name),
                "after": layer.channels,
                "kept": list(layer.kept) or list(range(layer.channels)),
            }
            for layer in self.kept.layers
        ]

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-able data; which channels are left is told of the kept network alone."""
        networks = [candidate.to_dict() for candidate in (self.reference, *self.candidates)]
        for network in networks:
            network["layers"] = {layer["name"]: layer["channels"] for layer in network["layers"]}
        return {
            "path": str(self.path),
            "options": asdict(self.options),
            "multiple": self.multiple,
            "met": self.met,
            "chosen_round": self.chosen,
            "layers": self.removed(),
            "reference": networks[0],
            "rounds": networks[1:],
        }


def require_channels(channels: ChannelMap, name: str) -> None:
    """Refuse a network of which nothing can be removed.

    Raises:
        ModelError: there is no channel that may go; the message says why.
    """
    if not channels.groups:
        why = f": {'; '.join(channels.notes)}" if channels.notes else ""
        raise ModelError(
            f"no channel of {name!r} can be removed{why}",
            fix="compress takes networks of convolutions and dense layers, channels last",
        )


def still_there(
    before: Mapping[str, list[int]], channels: ChannelMap, kept: np.ndarray
) -> dict[str, list[int]]:
    """Return which of the reference's channels each layer still has.

    Args:
        before: The same before this round; a layer that is not in it had all of them.
        channels: The network's before this round.
        kept: For each of its units whether it stays.
    """
    found = {}
    for layer in channels.layers.values():
        if layer.work and layer.width is not None:
            had = before.get(layer.name) or list(range(len(layer.width)))
            found[layer.name] = [had[place] for place in kept_places(layer.width, kept)]
    return found
