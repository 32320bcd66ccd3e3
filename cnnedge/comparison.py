"""What is accurate: a variant held against the reference, and the gates. Plain data."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from cnnedge.documents import Amount, Count, Share
from cnnedge.errors import CnnEdgeError, ModelError

Z95 = 1.959964  # the normal distribution's 97.5 % quantile


@dataclass(frozen=True)
class Comparison:
    """A variant's answers held against the Keras reference's, on the same images.

    Attributes:
        n: How many labelled images.
        top1: Share of images whose first answer is right, 0…1; likewise the others.
        reference_top1: The reference's own.
        top5: Share whose right label is among the first five (or all, with fewer classes).
        reference_top5: The reference's own.
        agreement: Share of images on which both give the same first answer.
        max_abs_diff: The largest difference of any probability; None where an answer is no number.
        lost: Images that the reference answered right and the variant wrong.
        won: The other way round.
        not_finite: Images that the variant answered with NaN or infinity, which is always wrong.
        limit: The largest difference that the rounding of the variant's precision explains in this
            model; None: `PARITY` has the figure.
        rounds_as: What the reference itself computes in, where that is coarser than float32:
            "float16" or "bfloat16".
    """

    n: Count
    top1: Share
    reference_top1: Share
    top5: Share
    reference_top5: Share
    agreement: Share
    max_abs_diff: Amount | None
    lost: Count
    won: Count
    not_finite: Count = 0
    limit: Amount | None = None
    rounds_as: str | None = None

    @property
    def drop(self) -> float:
        """Top-1 points lost against the reference (negative: won)."""
        return 100.0 * (self.lost - self.won) / self.n

    @property
    def interval(self) -> tuple[float, float]:
        """The paired 95 % interval of `drop`, in points.

        Agresti & Min, "Simple improved confidence intervals for comparing matched proportions"
        (2005): the Wald interval with half a pair added to each cell.
        """
        return paired_interval(self.lost, self.won, self.n)

    @property
    def smallest_drop(self) -> float:
        """The smallest drop, in points, that this many images could have shown.

        That is, the one whose interval excludes zero when no image is won.
        """
        for lost in range(1, self.n + 1):
            if paired_interval(lost, 0, self.n)[0] > 0:
                return 100.0 * lost / self.n
        return 100.0

    def to_dict(self) -> dict[str, Any]:
        """Return it as JSON-able data, the derived figures included."""
        low, high = self.interval
        return {
            "n": self.n,
            "top1": self.top1,
            "top5": self.top5,
            "reference_top1": self.reference_top1,
            "reference_top5": self.reference_top5,
            "agreement": self.agreement,
            "max_abs_diff": self.max_abs_diff,
            "limit": self.limit,
            "rounds_as": self.rounds_as,
            "not_finite": self.not_finite,
            "lost": self.lost,
            "won": self.won,
            "drop_points": self.drop,
            "drop_interval_points": [low, high],
            "smallest_drop_points": self.smallest_drop,
        }


Status = Literal["passed", "unproven", "failed", "not judged"]


@dataclass(frozen=True)
class Verdict:
    """Whether a variant is good enough, and why.

    Attributes:
        status: "passed"; "unproven" (the drop is within the limit, but so few images could not
            have shown otherwise); "failed"; or "not judged" (the weights are random, or the model
            itself is no better than guessing).
        reason: One sentence.
    """

    status: Status
    reason: str

    @property
    def failed(self) -> bool:
        """Whether the gate stopped this variant."""
        return self.status == "failed"


def compare(answers: np.ndarray, reference: np.ndarray, targets: np.ndarray) -> Comparison:
    """Hold a variant's answers against the reference's.

    Args:
        answers: The variant's, float32 ``[N, classes]``.
        reference: The reference's, likewise.
        targets: The right classes, int64 ``[N]``.
    """
    n, classes = reference.shape
    first, reference_first = first_answers(answers), first_answers(reference)
    right, reference_right = first == targets, reference_first == targets
    with np.errstate(invalid="ignore"):  # infinity less infinity
        largest = float(np.max([np.abs(a - r).max() for a, r in _parts(answers, reference)]))
    return Comparison(
        n=n,
        top1=float(right.mean()),
        reference_top1=float(reference_right.mean()),
        top5=top_k(answers, targets, min(5, classes)),
        reference_top5=top_k(reference, targets, min(5, classes)),
        agreement=float((first == reference_first).mean()),
        max_abs_diff=largest if math.isfinite(largest) else None,
        lost=int((reference_right & ~right).sum()),
        won=int((~reference_right & right).sum()),
        not_finite=int((first == NO_ANSWER).sum()),
    )


NO_ANSWER = -1  # no class has this index


def first_answers(answers: np.ndarray) -> np.ndarray:
    """Return the likeliest class of each row, int64 ``[N]``; `NO_ANSWER` of one with a NaN or inf.

    Args:
        answers: float32 ``[N, classes]``. NumPy's own argmax would take a NaN for the largest.
    """
    found = [np.where(_finite(rows), rows.argmax(1), NO_ANSWER) for (rows,) in _parts(answers)]
    return np.concatenate(found)


def require_finite(
    answers: np.ndarray,
    who: str,
    name_of: Callable[[int], str],
    error: type[CnnEdgeError] = ModelError,
) -> None:
    """Refuse answers that others cannot be held against.

    Args:
        answers: float32 ``[N, classes]``.
        who: Who gave them, in words.
        name_of: Names the image of a row.
        error: What is raised.

    Raises:
        CnnEdgeError: one of them is NaN or infinite; as ``error``.
    """
    wrong = np.flatnonzero(first_answers(answers) == NO_ANSWER)
    if not len(wrong):
        return
    more = f" and to {len(wrong) - 1:,} more images" if len(wrong) > 1 else ""
    raise error(
        f"{who} answers NaN or infinity to {name_of(int(wrong[0]))}{more}",
        fix="look for a division by zero or an overflow, and train or export it anew",
    )


def _finite(rows: np.ndarray) -> np.ndarray:
    return np.isfinite(rows).all(axis=1)


def judge(
    comparison: Comparison,
    *,
    precision: str,
    max_drop: float,
    trained: bool,
    achieved: Mapping[str, Mapping[str, float]],
    guessing: str | None = None,
) -> Verdict:
    """Apply the gates to a comparison.

    Args:
        comparison: What was measured.
        precision: "fp32", "fp16" or "int8": the first two also have a parity limit.
        max_drop: The largest top-1 drop allowed, in points.
        trained: Whether the weights are: with random ones accuracy is not judged.
        achieved: The share of MACs and of weights per data type, read from the graph.
        guessing: How well the reference does, where that is no better than by guessing: a drop
            from there would not show, so accuracy is not judged either.
    """
    if comparison.not_finite:
        return Verdict(
            "failed",
            f"{comparison.not_finite} of {comparison.n} answers are no numbers (NaN or infinity)",
        )
    asked, kind = DATA_TYPES[precision], "weights" if precision in WEIGHT_ONLY else "macs"
    shares = achieved.get(kind, {})
    if shares.get(asked, 0.0) < LEAST_ACHIEVED:
        built = ", ".join(f"{share:.0%} {name}" for name, share in shares.items()) or "nothing"
        does = "stores its weights" if kind == "weights" else "computes"
        return Verdict("failed", f"{precision} was asked for, and the graph {does} in {built}")
    limit = limit_of(precision, comparison.limit, comparison.rounds_as)
    difference = math.inf if comparison.max_abs_diff is None else comparison.max_abs_diff
    if limit is not None and not difference <= limit:
        return Verdict(
            "failed",
            f"a probability differs by {difference:.1e} from Keras "
            f"({precision} may differ by {limit:.1e})",
        )
    if not trained:
        return Verdict(
            "not judged",
            "the weights are random, or the images not the model's own: accuracy means nothing",
        )
    if guessing is not None:
        return Verdict("not judged", f"the model itself is no better than guessing: {guessing}")
    low, high = comparison.interval
    measured = f"{comparison.drop:+.2f} points [{low:+.2f}, {high:+.2f}] on {comparison.n} images"
    if comparison.drop > max_drop:
        return Verdict("failed", f"top-1 drops {measured}, more than the {max_drop:g} allowed")
    if high > max_drop:
        return Verdict(
            "unproven", f"top-1 drops {measured}; more images would show if {max_drop:g} holds"
        )
    return Verdict("passed", f"top-1 drops {measured}, within the {max_drop:g} allowed")


# The largest difference of a probability to Keras that rounding explains in any network, on real
# images. A network that moves more by itself has a larger one; see docs/decisions/parity-limits.md.
PARITY = {"fp32": 1e-5, "fp16": 2e-3}
# The same of a reference that itself rounds as these do, whatever the variant is.
OWN_PARITY = {"float16": 2e-3, "bfloat16": 1.6e-2}
CEILING = 50.0  # times that figure: what goes beyond is not explained by rounding, whatever moves


def limit_of(precision: str, own: Any = None, rounds_as: Any = None) -> float | None:
    """Return by how much a variant's probabilities may differ; None: its precision has no limit.

    Args:
        precision: The variant's.
        own: What was measured of its model, a `Comparison.limit` or as a manifest has it; in older
            ones there is none.
        rounds_as: A `Comparison.rounds_as`, likewise.
    """
    floor = PARITY.get(precision)
    if floor is not None and isinstance(rounds_as, str):
        floor = max(floor, OWN_PARITY.get(rounds_as, floor))
    if floor is None or isinstance(own, bool) or not isinstance(own, int | float):
        return floor
    return min(max(floor, own), CEILING * floor) if math.isfinite(own) else floor


# A variant that bears a precision's name computes at least so much of its MACs in it.
LEAST_ACHIEVED = 0.5
DATA_TYPES = {
    "fp32": "float32",
    "fp16": "float16",
    "int8": "int8",
    "int8-weight": "int8",
    "int4-weight": "int4",
}
# Weight-only variants store in that type and compute in another: their weights are what counts.
WEIGHT_ONLY = frozenset({"int8-weight", "int4-weight"})


def paired_interval(lost: int, won: int, n: int) -> tuple[float, float]:
    """Return the 95 % interval of ``(lost - won) / n`` in points; see `Comparison.interval`."""
    b, c, total = lost + 0.5, won + 0.5, n + 2.0
    center = (b - c) / total
    spread = Z95 * math.sqrt(max(b + c - (b - c) ** 2 / total, 0.0)) / total
    return 100.0 * (center - spread), 100.0 * (center + spread)


def top_k(answers: np.ndarray, targets: np.ndarray, k: int) -> float:
    """Return the share of rows whose target is among the ``k`` highest scores, all being finite."""
    right = [
        (np.argpartition(-rows, k - 1, axis=1)[:, :k] == classes[:, None]).any(axis=1)
        & _finite(rows)
        for rows, classes in _parts(answers, targets)
    ]
    return float(np.concatenate(right).mean())


def _parts(*arrays: np.ndarray) -> Iterator[tuple[np.ndarray, ...]]:
    """Yield the arrays some thousand rows at a time; they may be larger than the memory."""
    for start in range(0, max(1, len(arrays[0])), 4096):
        yield tuple(array[start : start + 4096] for array in arrays)
