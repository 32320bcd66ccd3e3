"""How training went: one report an epoch, as a file for machines and a picture for people."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cnnedge.files import atomic_path, write_text
from cnnedge.quiet import import_matplotlib


@dataclass(frozen=True)
class EpochReport:
    """One pass over the training images.

    Attributes:
        epoch: Counted from 1.
        epochs: The most there will be.
        loss: Mean cross-entropy of the training images in nats, as they were trained on: augmented,
            with dropout, while the weights moved.
        accuracy: Share of those answered right, 0…1.
        val_loss: Mean cross-entropy of the validation images after the epoch.
        val_accuracy: Share of those answered right.
        seconds: What the epoch took, validation included.
    """

    epoch: int
    epochs: int
    loss: float
    accuracy: float
    val_loss: float
    val_accuracy: float
    seconds: float

    def __str__(self) -> str:
        return (
            f"epoch {self.epoch}/{self.epochs}: loss {self.loss:.3f}, "
            f"validation {self.val_accuracy * 100:.1f} %, {self.seconds:.0f} s"
        )

    @property
    def finite(self) -> bool:
        """Whether both losses are numbers."""
        return math.isfinite(self.loss) and math.isfinite(self.val_loss)


def best_epoch(history: Sequence[EpochReport]) -> int:
    """Return the epoch that validated best, from 1; 0 where there is none.

    The highest accuracy; among equals the lowest loss, which tells epochs apart where the
    validation images are few; among equals of that the first.
    """
    if not history:
        return 0
    return max(history, key=lambda r: (r.val_accuracy, -r.val_loss, -r.epoch)).epoch


def write_history(path: Path, run: dict[str, Any], result: dict[str, Any]) -> None:
    """Write what was asked for and what came of it as JSON, whole or not at all."""
    write_text(path, json.dumps({"run": run, "result": result}, indent=1, default=str) + "\n")


def draw_history(path: Path, title: str, history: Sequence[EpochReport], best: int) -> None:
    """Draw loss and accuracy over the epochs, training beside validation, as a PNG.

    Args:
        path: The file.
        title: Above the panels.
        history: All epochs.
        best: The one that is marked, from 1.
    """
    import_matplotlib()
    from matplotlib.figure import Figure  # no pyplot: it would keep state, and want a display
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    figure.suptitle(title)
    epochs = [r.epoch for r in history]
    panels = (
        ("Loss (cross-entropy)", [r.loss for r in history], [r.val_loss for r in history]),
        ("Accuracy", [r.accuracy for r in history], [r.val_accuracy for r in history]),
    )
    for axes, (name, training, validation) in zip(figure.subplots(1, 2), panels, strict=True):
        axes.plot(epochs, training, "o-", color="#7a869a", markersize=4, label="training")
        axes.plot(epochs, validation, "o-", color="#0b6bcb", markersize=4, label="validation")
        axes.plot(
            *(best, validation[best - 1], "*"),
            color="#d9480f",
            markersize=14,
            clip_on=False,
            label=f"best: epoch {best}",
        )
        axes.set(title=name, xlabel="epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].set_ylim(bottom=0)
    figure.axes[1].yaxis.set_major_formatter(PercentFormatter(1.0))
    figure.axes[1].legend(loc="lower right")
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=130)
