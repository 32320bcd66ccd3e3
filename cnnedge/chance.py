"""Whether answers are better than guessing, and whether some are better than others."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

# A model that guesses passes for one that knows something so often.
LEVEL = 0.01


@dataclass(frozen=True)
class Chance:
    """How many answers are right, beside what guessing gives.

    Attributes:
        n: Images.
        right: Those whose first answer is right.
        guess: The share that would be right if the same answers had been dealt out blindly: for
            a model that always says the same, that class's share of the images.
    """

    n: int
    right: int
    guess: float

    @property
    def accuracy(self) -> float:
        """The share that is right, 0…1."""
        return self.right / self.n

    @property
    def p_value(self) -> float:
        """How likely guessing is to get so many right, or more: an exact binomial tail."""
        return binomial_tail(self.right, self.n, self.guess)

    @property
    def at_chance(self) -> bool:
        """Whether the answers are no better than guessing.

        Some images cannot tell a weak model from a guess: one that comes a quarter of the way from
        guessing to always right is given the benefit of the doubt. Images of one class tell
        nothing.
        """
        if not self.n or self.guess > 1 - 1e-9:
            return False
        quarter = self.accuracy - self.guess > (1 - self.guess) / 4
        return self.p_value > LEVEL and not quarter

    def __str__(self) -> str:
        return f"{self.accuracy:.1%} of {self.n} images, where guessing gives {self.guess:.1%}"


def guessing(answers: np.ndarray, targets: np.ndarray) -> str | None:
    """Return how well a model does that is no better than guessing; None: it is better.

    Args:
        answers: float ``[N, classes]``.
        targets: The right classes, int ``[N]``.
    """
    found = against_chance(answers.argmax(axis=1), targets)
    return f"right for {found}" if found.at_chance else None


def against_chance(first: np.ndarray, targets: np.ndarray) -> Chance:
    """Hold answers against guessing.

    Args:
        first: The class that each image was given, int ``[N]``.
        targets: The right ones, likewise.
    """
    n = len(targets)
    classes = int(max(first.max(initial=0), targets.max(initial=0))) + 1
    shares = [np.bincount(each, minlength=classes) / max(n, 1) for each in (first, targets)]
    return Chance(n, int((first == targets).sum()), float(shares[0] @ shares[1]))


def better(these: np.ndarray, others: np.ndarray) -> bool:
    """Tell whether these answers are right more often than others to the same images.

    By McNemar's exact test ("Note on the sampling error of the difference between correlated
    proportions", 1947), one-sided.

    Args:
        these: Which of them are right, bool ``[N]``.
        others: Likewise.
    """
    won, lost = int((these & ~others).sum()), int((others & ~these).sum())
    return won > lost and binomial_tail(won, won + lost, 0.5) <= LEVEL


def binomial_tail(successes: int, n: int, share: float) -> float:
    """Return the probability of so many successes, or more, in ``n`` draws."""
    if successes <= 0 or share >= 1:
        return 1.0
    if share <= 0 or successes > n:
        return 0.0
    log_factorial = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, n + 1)))])
    k = np.arange(successes, n + 1)
    logs = log_factorial[n] - log_factorial[k] - log_factorial[n - k]
    logs += k * np.log(share) + (n - k) * np.log1p(-share)
    return float(min(1.0, np.exp(logs).sum()))
