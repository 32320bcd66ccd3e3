"""What a network costs by the number of channels of each group, and which units to give up for it.

A cost is a sum of products: a layer's multiply-accumulates are its kernel's dimensions times the
positions it is applied at, and each dimension is a sum of how many units of some groups are kept.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np

from cnnedge.compress.channels import ChannelMap
from cnnedge.errors import ModelError

FINEST = 8  # a multiple that is not halved any more
COARSEST_SHARE = 4  # a group is at least so many multiples wide, or these are finer


@dataclass(frozen=True)
class Dimension:
    """The length of an axis: ``fixed + sum(count * kept units of the group)``.

    Attributes:
        fixed: Places that stay.
        counts: For each group how many places one of its units has, by the group's index.
    """

    fixed: int
    counts: Mapping[int, int]

    def at(self, kept: Sequence[int]) -> int:
        """Return the length where so many units of each group are kept."""
        return self.fixed + sum(times * kept[group] for group, times in self.counts.items())


@dataclass(frozen=True)
class Term:
    """A product of dimensions: one layer's weights, or its work."""

    layer: str
    factor: float
    dimensions: tuple[Dimension, ...]

    def at(self, kept: Sequence[int]) -> float:
        """Return its value where so many units of each group are kept."""
        return self.factor * prod(dimension.at(kept) for dimension in self.dimensions)


@dataclass(frozen=True)
class Cost:
    """Multiply-accumulates, parameters, or seconds.

    Attributes:
        name: "macs", "params" or "latency".
        terms: What it is the sum of.
    """

    name: str
    terms: tuple[Term, ...]

    def at(self, kept: Sequence[int]) -> float:
        """Return it where so many units of each group are kept."""
        return sum(term.at(kept) for term in self.terms)

    def weighted(self, name: str, factors: Mapping[str, float]) -> Cost:
        """Return a cost whose terms are these times a factor of their layer; 0 where it has none.

        With measured seconds per multiply-accumulate this is a latency.
        """
        terms = (
            Term(t.layer, t.factor * factors.get(t.layer, 0.0), t.dimensions) for t in self.terms
        )
        return Cost(name, tuple(terms))

    def by_layer(self, kept: Sequence[int]) -> dict[str, float]:
        """Return what each layer contributes."""
        found: dict[str, float] = {}
        for term in self.terms:
            found[term.layer] = found.get(term.layer, 0.0) + term.at(kept)
        return found


def costs(channels: ChannelMap) -> tuple[Cost, Cost]:
    """Return a network's multiply-accumulates for one image, and its parameters.

    Layers without channels of their own count with all their parameters.
    """
    group_of = np.full(channels.units + 1, -1)  # the last is what label -1 finds
    for index, group in enumerate(channels.groups):
        group_of[group.units] = index
    macs, params = [], []
    for found in channels.layers.values():
        variables = getattr(found.layer, "weights", ())
        axes = found.axes or [(None,) * len(variable.shape) for variable in variables]
        for index, (variable, along) in enumerate(zip(variables, axes, strict=True)):
            dimensions = tuple(
                _dimension(labels, size, group_of, channels)
                for labels, size in zip(along, variable.shape, strict=True)
            )
            params.append(Term(found.name, 1, dimensions))
            if index in found.work:
                macs.append(Term(found.name, found.work[index], dimensions))
    return Cost("macs", tuple(macs)), Cost("params", tuple(params))


def _dimension(labels: Any, size: int, group_of: np.ndarray, channels: ChannelMap) -> Dimension:
    if labels is None:
        return Dimension(size, {})
    groups, places = np.unique(group_of[labels], return_counts=True)
    counts = {
        int(group): int(count) // len(channels.groups[group])
        for group, count in zip(groups, places, strict=True)
        if group >= 0
    }
    fixed = size - sum(counts[g] * len(channels.groups[g]) for g in counts)
    return Dimension(fixed, counts)


@dataclass(frozen=True)
class Budget:
    """A cost and the most it may be."""

    cost: Cost
    limit: float


def rounding(count: int, multiple: int) -> int:
    """Return what a group of ``count`` units is rounded to.

    The machine's multiple, halved while it is more than a quarter of the group: else the group had
    no choice but to stay or to go; never below `FINEST`.
    """
    while multiple > FINEST and multiple > count / COARSEST_SHARE:
        multiple //= 2
    return multiple


def steps_of(channels: ChannelMap, multiple: int) -> dict[str, int]:
    """Return what the units of each group are rounded to, by the group's name."""
    return {group.name: rounding(len(group), multiple) for group in channels.groups}


def fewest(channels: ChannelMap, steps: Mapping[str, int]) -> list[int]:
    """Return how many units of each group have to stay whatever the budget."""
    return [min(steps[group.name], len(group)) for group in channels.groups]


def require_reachable(
    channels: ChannelMap, budgets: Sequence[Budget], steps: Mapping[str, int]
) -> None:
    """Refuse a budget that is not met by the smallest network there can be.

    Args:
        channels: The network's channels.
        budgets: What has to hold.
        steps: What each group is rounded to, see `steps_of`.

    Raises:
        ModelError: one is not; the message says how far it goes.
    """
    least = fewest(channels, steps)
    for budget in budgets:
        reached = budget.cost.at(least)
        if reached > budget.limit:
            full = budget.cost.at([len(group) for group in channels.groups])
            raise ModelError(
                f"the budget of {budget.limit / full:.3g} of the {budget.cost.name} cannot be met: "
                f"with as few channels as can be, in multiples of up to {max(steps.values())}, "
                f"{reached / full:.3g} are left",
                fix="ask for less, or pass a smaller --multiple",
            )


def choose_units(
    channels: ChannelMap,
    importance: np.ndarray,
    budgets: Sequence[Budget],
    *,
    steps: Mapping[str, int],
    floor: float = 0.0,
) -> np.ndarray:
    """Give up the units that matter least for what they cost, until every budget is met.

    In each group the least important go first, in steps to the next lower multiple. Which group is
    next: the one that loses the least importance for its share of what the unmet budgets still
    have to come down by.

    Args:
        channels: The network's channels.
        importance: Of each unit, 0 or more.
        budgets: What has to hold in the end.
        steps: What the number of units of each group is rounded to, by its name. A group keeps at
            least so many, or all it has.
        floor: The share of each group's units, 0…1, that stays whatever the budgets say.

    Returns:
        For each unit whether it is kept, bool ``[units]``.

    Raises:
        ModelError: the budgets cannot be met; the message says how far it goes.
    """
    require_reachable(channels, budgets, steps)
    ranked = [g.units[np.argsort(-importance[g.units], kind="stable")] for g in channels.groups]
    # The importance of a group's k most important units, by k.
    totals = [np.concatenate([[0.0], np.cumsum(importance[units])]) for units in ranked]
    least = [
        max(few, int(np.ceil(floor * len(group))))
        for few, group in zip(fewest(channels, steps), channels.groups, strict=True)
    ]
    kept = [len(units) for units in ranked]
    now = [budget.cost.at(kept) for budget in budgets]

    while any(value > budget.limit for value, budget in zip(now, budgets, strict=True)):
        best: tuple[float, int, int, list[float]] | None = None
        for group, have in enumerate(kept):
            step = steps[channels.groups[group].name]
            fewer = (have - 1) // step * step
            if fewer < least[group] or fewer == have:
                continue
            trial = [*kept[:group], fewer, *kept[group + 1 :]]
            then = [budget.cost.at(trial) for budget in budgets]
            gain = sum(
                min(before - after, before - budget.limit) / (before - budget.limit)
                for before, after, budget in zip(now, then, budgets, strict=True)
                if before > budget.limit
            )
            if gain <= 0:
                continue
            lost = float(totals[group][have] - totals[group][fewer])
            if best is None or lost / gain < best[0]:
                best = lost / gain, group, fewer, then
        if best is None:
            raise ModelError(f"the budgets cannot be met with {floor:.0%} of each group left")
        _, group, kept[group], now = best
    chosen = np.zeros(channels.units, bool)
    for units, count in zip(ranked, kept, strict=True):
        chosen[units[:count]] = True
    return chosen
