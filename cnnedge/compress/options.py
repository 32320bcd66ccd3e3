"""What is asked of a compression."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from cnnedge.errors import ModelError

# A round divides the costs by at most this before the network is given time to recover.
ROUND_FACTOR = 3.0
PARETO = (0.5, 0.35, 0.25, 0.18, 0.12, 0.08)


@dataclass(frozen=True)
class CompressOptions:
    """How far to compress, and how to recover.

    Attributes:
        macs: The share of the multiply-accumulates to keep, 0…1.
        params: The share of the parameters to keep.
        latency: Seconds that one image may take, as the pipeline measures it. All budgets given
            have to hold.
        pareto: Shares of the multiply-accumulates to walk down, in the place of a budget.
        max_drop: The most top-1 points that may be lost against the reference.
        importance: "taylor", from data, or "l1", from the weights.
        low_rank: Whether dense layers may be split in two of lower rank.
        tucker: Whether convolutions may be split in three, where that is measured to be faster.
        energy: The share of the squared singular values that a split has to keep, 0…1.
        epochs: Passes over the training images after the last round of pruning, and at every point
            of a `pareto`.
        round_epochs: After each of the others.
        batch_size: Images in a step.
        learning_rate: Adam's, at its highest.
        augment: Whether to vary the training images.
        seed: Seeds the validation part, the order and the augmentation.

    Raises:
        ModelError: a number is out of its range, or nothing is asked for.

    Examples:
        >>> options = cnnedge.CompressOptions(macs=0.25)
        >>> [round(budget["macs"]) for budget in options.rounds({"macs": 1000})]
        [500, 250]
    """

    macs: float | None = None
    params: float | None = None
    latency: float | None = None
    pareto: tuple[float, ...] = ()
    max_drop: float = 0.5
    importance: str = "taylor"
    low_rank: bool = False
    tucker: bool = False
    energy: float = 0.8
    epochs: int = 12
    round_epochs: int = 3
    batch_size: int = 32
    learning_rate: float = 3e-4
    augment: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("macs", "params", "energy"):
            share = getattr(self, name)
            if share is not None and not 0 < share <= 1:
                raise ModelError(f"{name} is {share:g}", fix="pass a share such as 0.25")
        if self.latency is not None and not 0 < self.latency < math.inf:
            raise ModelError(f"the latency is {self.latency:g} s", fix="pass one such as 5ms")
        budgets = (self.macs, self.params, self.latency)
        if not self.pareto and all(budget is None for budget in budgets):
            raise ModelError("no budget is given", fix="pass one, such as a quarter of the MACs")
        if self.pareto and any(budget is not None for budget in budgets):
            raise ModelError("a front is walked and a budget is given", fix="pass one of the two")
        if any(not 0 < share <= 1 for share in self.pareto):
            raise ModelError(
                f"the front is to go through {', '.join(f'{s:g}' for s in self.pareto)}",
                fix="pass shares such as 0.5,0.25,0.12",
            )
        if self.importance not in ("taylor", "l1"):
            raise ModelError(f"the importance is {self.importance!r}", fix="pass taylor or l1")
        for name in ("epochs", "round_epochs", "batch_size"):
            if getattr(self, name) < 1:
                raise ModelError(f"{name} is {getattr(self, name)}", fix="pass 1 or more")
        if not 0 <= self.seed < 2**32:
            raise ModelError(f"the seed is {self.seed}", fix=f"pass one from 0 to {2**32 - 1}")

    def rounds(self, full: Mapping[str, float]) -> list[dict[str, float]]:
        """Return what each round of pruning has to come down to.

        Args:
            full: What the reference costs, by the budget's name.

        Returns:
            For each round the most that may be left of each cost. They fall by the same factor
            each, for a network that is cut down at once recovers less.
        """
        if self.pareto:
            return [{"macs": share * full["macs"]} for share in sorted(self.pareto, reverse=True)]
        targets = {
            name: share * full[name]
            for name, share in (("macs", self.macs), ("params", self.params))
            if share is not None
        }
        if self.latency is not None:
            targets["latency"] = self.latency
        furthest = max(full[name] / target for name, target in targets.items())
        count = max(1, math.ceil(math.log(furthest) / math.log(ROUND_FACTOR) - 1e-9))
        return [
            {
                name: full[name] * (target / full[name]) ** (number / count)
                for name, target in targets.items()
            }
            for number in range(1, count + 1)
        ]

    def epochs_of(self, number: int, rounds: int) -> int:
        """Return the epochs of a round, from 1."""
        return self.epochs if self.pareto or number == rounds else self.round_epochs
