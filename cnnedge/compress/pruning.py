"""One round's pruning: what a network costs on the machine, and one that costs less."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from cnnedge.compress.budget import Budget, Cost, choose_units, costs
from cnnedge.compress.channels import ChannelMap, map_channels
from cnnedge.compress.outcome import Candidate, LayerKept, Timing
from cnnedge.compress.recovery import RecoveryEpoch
from cnnedge.compress.rewrite import remove_channels
from cnnedge.errors import ModelError

if TYPE_CHECKING:
    import keras

LATENCY_TRIES = 6
LATENCY_SLACK = 0.93  # of the latency asked for: nearer than this is near enough


@dataclass(frozen=True)
class Platform:
    """What the machine that the network is for is like.

    Attributes:
        multiple: What it likes the number of channels to be a multiple of.
        time: Times a network on it; None where no budget asks for that.
        faster: Tells of a convolution split in three, by the ranks in the middle, whether it is
            faster: ``faster(height, width, kernel shape, strides, ranks)``.
    """

    multiple: int
    time: Callable[[keras.Model], Timing] | None = None
    faster: Callable[..., bool] = lambda *case: False


class Sizes:
    """A network, its channels, and what it costs."""

    def __init__(
        self, network: keras.Model, shape: tuple[int, int, int], platform: Platform
    ) -> None:
        self.network = network
        self.channels = map_channels(network, shape)
        self.macs, self.params = costs(self.channels)
        self.full = [len(group) for group in self.channels.groups]
        self.timing = None if platform.time is None else platform.time(network)

    def costs(self) -> dict[str, float]:
        """Return what it costs, by the name of the budget."""
        found = {"macs": self.macs.at(self.full), "params": self.params.at(self.full)}
        if self.timing is not None:
            found["latency"] = self.timing.seconds
        return found

    def budgets(self, target: dict[str, float]) -> list[Budget]:
        """Return the budgets of a target that channels alone decide."""
        by_name = {"macs": self.macs, "params": self.params}
        return [Budget(by_name[name], target[name]) for name in by_name if name in target]

    def latency(self) -> tuple[Cost, float]:
        """Return the latency as a cost, and the seconds that no channel decides."""
        assert self.timing is not None
        rates = {
            layer: self.timing.by_layer.get(layer, 0.0) / macs
            for layer, macs in self.macs.by_layer(self.full).items()
            if macs
        }
        cost = self.macs.weighted("latency", rates)
        return cost, max(self.timing.seconds - cost.at(self.full), 0.0)

    def candidate(
        self,
        number: int,
        kept: dict[str, list[int]],
        epochs: tuple[RecoveryEpoch, ...] = (),
        splits: tuple[str, ...] = (),
    ) -> Candidate:
        """Return it as data."""
        layers = tuple(
            LayerKept(found.name, len(found.width), tuple(kept.get(found.name, ())))
            for found in self.channels.layers.values()
            if found.work and found.width is not None
        )
        found = self.costs()
        return Candidate(
            round=number,
            macs=int(found["macs"]),
            params=int(found["params"]),
            seconds=found.get("latency"),
            layers=layers,
            epochs=epochs,
            splits=splits,
            notes=self.channels.notes,
        )


def prune_to(
    sizes: Sizes,
    importance: np.ndarray,
    target: dict[str, float],
    platform: Platform,
    steps: Mapping[str, int],
    *,
    floor: float,
    exact: bool,
) -> tuple[keras.Model, np.ndarray]:
    """Return a network that meets the target, and for each unit whether it is kept.

    Args:
        sizes: The network to prune.
        importance: Of each of its units.
        target: The most that may be left of each cost.
        platform: The machine.
        steps: What each group is rounded to.
        floor: The share of each group that stays, unless the target cannot be met otherwise.
        exact: Whether a latency is measured and not only estimated from the layers'.
    """
    budgets = sizes.budgets(target)
    if "latency" not in target:
        kept = _choose_units(sizes.channels, importance, budgets, steps, floor)
        return remove_channels(sizes.network, sizes.channels, kept), kept
    assert platform.time is not None
    cost, overhead = sizes.latency()
    limit = max(target["latency"] - overhead, 0.05 * target["latency"])
    best = None
    for _ in range(LATENCY_TRIES):
        latency = Budget(cost, limit)
        kept = _choose_units(sizes.channels, importance, [*budgets, latency], steps, floor)
        small = remove_channels(sizes.network, sizes.channels, kept)
        if not exact:
            return small, kept
        seconds = platform.time(small).seconds
        if seconds <= target["latency"]:
            best = small, kept
            if seconds >= LATENCY_SLACK * target["latency"] or kept.all():
                return best
        elif best is not None:
            return best
        limit *= target["latency"] * (1 + LATENCY_SLACK) / 2 / seconds
    if best is None:
        raise ModelError(
            f"{LATENCY_TRIES} networks were measured and none answers within "
            f"{1e3 * target['latency']:.3g} ms, the last in {1e3 * seconds:.3g} ms",
            fix="ask for less, or use a machine that nothing else keeps busy",
        )
    return best


def _choose_units(
    channels: ChannelMap,
    importance: np.ndarray,
    budgets: list[Budget],
    steps: Mapping[str, int],
    floor: float,
) -> np.ndarray:
    try:
        return choose_units(channels, importance, budgets, steps=steps, floor=floor)
    except ModelError:
        if not floor:
            raise
        return choose_units(channels, importance, budgets, steps=steps)
