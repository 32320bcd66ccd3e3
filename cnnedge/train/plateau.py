"""Training that does not learn: how it is seen, and what is tried once by itself.

With Glorot's initialisation and pixels in 0…1, a plain stack of convolutions may stay for ever at
the loss of a network that sees nothing. He's initialisation ("Delving Deep into Rectifiers", 2015)
keeps the variance through rectified layers, and pixels in -1…1 are centred: together they left that
plateau in the first epoch wherever it was seen.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from cnnedge.chance import LEVEL, Chance, binomial_tail
from cnnedge.data.stream import Stream
from cnnedge.train.history import EpochReport, best_epoch

if TYPE_CHECKING:
    import keras

FEWEST_EPOCHS = 2
FEWEST_STEPS = 20  # of the optimizer, before a loss that stays tells anything
UNMOVED = 0.99  # of the blind loss
AGAIN = "{why}: starting again with {initialisation} initial weights and pixels in -1…1"
BY_HEART = 0.2  # more of the training images answered right than of the validation ones


@dataclass(frozen=True)
class Blind:
    """What a network costs and gets that answers without looking at the image.

    Attributes:
        loss: The entropy of the training images' classes in nats; ln K where K are equally common.
        share: The share of the validation images that the commonest class is.
        images: How many validation images there are.
        steps: Of the optimizer, in an epoch.
    """

    loss: float
    share: float
    images: int
    steps: int

    @staticmethod
    def of(stream: Stream, targets: np.ndarray) -> Blind:
        """Return it for the stream's parts of a split with these classes."""
        shares = [
            np.bincount(targets[at]) / len(at) for at in (stream.train_at, stream.validation_at)
        ]
        there = shares[0][shares[0] > 0]
        loss = float(-(there * np.log(there)).sum())
        return Blind(loss, float(shares[1].max()), len(stream.validation_at), len(stream))

    def unmoved(self, history: Sequence[EpochReport]) -> bool:
        """Tell whether these epochs, enough of them, learned nothing.

        No loss is 1 % below the blind one, and the validation images are answered no better than
        by guessing.
        """
        if len(history) < FEWEST_EPOCHS or len(history) * self.steps < FEWEST_STEPS:
            return False
        if min(report.loss for report in history) < UNMOVED * self.loss:
            return False
        right = round(history[-1].val_accuracy * self.images)
        return Chance(self.images, right, self.share).at_chance

    def by_heart(self, report: EpochReport) -> bool:
        """Tell whether far more of the training images are answered right than of the others."""
        if report.accuracy - report.val_accuracy < BY_HEART:
            return False
        wrong = round((1 - report.val_accuracy) * self.images)
        return binomial_tail(wrong, self.images, 1 - report.accuracy) <= LEVEL


def start_again(model: keras.Model, seed: int) -> str:
    """Draw He's weights for all that is rectified, and return what the pixels are normalized by.

    Args:
        model: A built-in model with freshly drawn weights; changed in place.
        seed: Seeds the weights.
    """
    import keras

    layers = [layer for layer in model._flatten_layers() if hasattr(layer, "kernel")]
    for number, layer in enumerate(layers[:-1]):  # the last one gives logits
        draw = keras.initializers.HeNormal(seed=seed + number)
        layer.kernel.assign(draw(layer.kernel.shape))
    return "tf"


def describe_retry(history: Sequence[EpochReport], blind: Blind) -> dict[str, Any]:
    """Return what the history keeps of a second start."""
    return {
        "after_epoch": len(history),
        "why": f"the loss stayed at {history[-1].loss:.3f}, and answers that ignore the image cost "
        f"{blind.loss:.3f}",
        "initialisation": "He's",
        "normalization": "tf",
    }


def findings(history: Sequence[EpochReport], blind: Blind, test: Chance) -> list[str]:
    """Return what a user should read of how it went, one line each.

    Args:
        history: The epochs, those before a second start left out.
        blind: What not looking at the image costs.
        test: The answers to the test images.
    """
    lines = []
    last, best = history[-1], history[best_epoch(history) - history[0].epoch]
    if min(report.loss for report in history) >= UNMOVED * blind.loss:
        lines.append(
            f"the loss never left {blind.loss:.3f}, what answers that ignore the image cost: try "
            "another --learning-rate, more epochs or images, or see whether the labels are right"
        )
    if blind.by_heart(last):
        lines.append(
            f"learned by heart: in epoch {last.epoch} {last.accuracy:.1%} of the training images "
            f"are answered right, {last.val_accuracy:.1%} of the validation ones: try more images, "
            f"augmentation, or fewer epochs (the best was {best.epoch})"
        )
    if test.at_chance:
        lines.append(f"no better than guessing: right for {test}")
    return lines
