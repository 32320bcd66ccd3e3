"""Train a built-in model on a data source, to the same weights whenever the seed is the same.

What is where: `learner` is the network and its optimizer, `checkpoint` keeps both on disk,
`history` tells how it went. The batches come from `cnnedge.data.stream`. This file is the order of
things.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cnnedge.chance import against_chance
from cnnedge.checkpoint import remove_checkpoint
from cnnedge.comparison import top_k
from cnnedge.data import Dataset
from cnnedge.data.stream import Stream
from cnnedge.errors import ModelError
from cnnedge.files import require_keras_file, require_space, require_writable
from cnnedge.progress import Progress, silent
from cnnedge.quiet import require_training_packages
from cnnedge.train.checkpoint import State, read_state, write_state
from cnnedge.train.history import EpochReport, best_epoch, draw_history, write_history
from cnnedge.train.learner import Learner, precision
from cnnedge.train.plateau import AGAIN, Blind, describe_retry, findings, start_again
from cnnedge.version import __version__

if TYPE_CHECKING:
    from cnnedge.backends.keras import ModelNote

__all__ = ["EpochReport", "TrainOptions", "TrainResult", "train_model"]

# Adam's: VGG is deeper and, like AlexNet here, has no batch normalisation to keep it in bounds.
LEARNING_RATES = {"alexnet": 3e-4, "vgg": 1e-4}


@dataclass(frozen=True)
class TrainOptions:
    """How to train.

    Attributes:
        epochs: The most passes over the training images.
        batch_size: Images in a step; the last one of an epoch may have fewer.
        image_size: ``(height, width)`` in pixels; the model's own where it is None.
        seed: Seeds the weights, the dropout, the order, the augmentation and the validation part.
        init: What VGG's convolutions start from, see `cnnedge.models.pretrained.init_from`.
        learning_rate: Adam's; where it is None, 3e-4 for AlexNet and 1e-4 for VGG.
        patience: Stop after so many epochs in a row that are no better than the best.
        augment: Whether to vary the training images, see `cnnedge.data.stream.augment`.
        model_options: What `cnnedge.models.build` takes besides.

    Raises:
        ModelError: a number is out of its range.

    Examples:
        >>> cnnedge.TrainOptions(epochs=5).rate_for("vgg16")
        0.0001
    """

    epochs: int = 20
    batch_size: int = 32
    image_size: tuple[int, int] | None = None
    seed: int = 0
    init: str | None = None
    learning_rate: float | None = None
    patience: int = 5
    augment: bool = True
    model_options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "patience"):
            if getattr(self, name) < 1:
                raise ModelError(f"{name} is {getattr(self, name)}", fix="pass 1 or more")
        if self.learning_rate is not None and not 0 < self.learning_rate < float("inf"):
            raise ModelError(f"learning_rate is {self.learning_rate}", fix="pass one above 0")
        if not 0 <= self.seed < 2**32:
            raise ModelError(f"the seed is {self.seed}", fix=f"pass one from 0 to {2**32 - 1}")

    def rate_for(self, model_name: str) -> float:
        """Return the learning rate, by the model's family where none was given."""
        if self.learning_rate is not None:
            return self.learning_rate
        return LEARNING_RATES["vgg" if model_name.startswith("vgg") else "alexnet"]


@dataclass(frozen=True)
class TrainResult:
    """What training came to.

    Attributes:
        path: The `.keras` file, with the weights of the best epoch.
        history: One report an epoch, those before a resumption included.
        top1: Share of the test images whose first answer is right, 0…1.
        top5: Share whose right label is among the first five (or all, with fewer classes).
        test_images: How many those are shares of.
        epochs_run: Epochs trained.
        best_epoch: The epoch, from 1, that the weights are of.
        seconds: What the epochs took.
        stopped_early: Whether patience ran out before the epochs did.
        parameters: How many weights the model has.
        at_chance: Whether the test images are answered no better than by guessing; see
            `cnnedge.chance`.
        warnings: What a user should read of how it went, one line each.
        retry: How it was started a second time, since nothing was learned at first, with
            ``after_epoch``, ``why``, ``initialisation`` and ``normalization``; None: it was not.
    """

    path: Path
    history: tuple[EpochReport, ...]
    top1: float
    top5: float
    test_images: int
    epochs_run: int
    best_epoch: int
    seconds: float
    stopped_early: bool
    parameters: int
    at_chance: bool = False
    warnings: tuple[str, ...] = ()
    retry: dict[str, Any] | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return it as JSON-able data."""
        return asdict(self) | {"path": str(self.path), "history": [asdict(r) for r in self.history]}


def train_model(
    model_name: str,
    dataset: Dataset,
    out: Path | str,
    options: TrainOptions = TrainOptions(),
    *,
    resume: bool = False,
    progress: Progress = silent,
    on_epoch: Callable[[EpochReport], None] = lambda report: None,
    on_retry: Callable[[str], None] = lambda line: None,
) -> TrainResult:
    """Train a built-in model, and keep the weights of the epoch that validated best.

    Where random weights have learned nothing in the first epochs, it starts again once, with He's
    initialisation and pixels in -1…1, for the epochs that are left; see `cnnedge.train.plateau`.

    A tenth of the *train* split, stratified and seeded, is held back for validation. The test
    split is looked at once, after training; the calibration split never.

    On a CPU the same seed gives the same weights, bit for bit, whether or not the run was stopped
    and resumed. Where TensorFlow lists a GPU it computes in mixed precision, and the order in which
    a GPU adds is not fixed; the saved model is float32 either way.

    Written beside ``out``, `F.keras`: `F.history.json`, `F.history.png`, and while it runs the
    checkpoint `F.ckpt/`. What these names held before is replaced.

    Args:
        model_name: A name in `cnnedge.models.MODELS`.
        dataset: The labelled images.
        out: The file to write, ending in `.keras`.
        options: How to train.
        resume: Go on from the checkpoint beside ``out``.
        progress: Told of every batch.
        on_epoch: Told of every epoch, after its checkpoint was written.
        on_retry: Told of a second start.

    Raises:
        MissingExtraError: TensorFlow or Matplotlib is not installed.
        ModelError: the model cannot be built; the loss is no longer a number; there is no
            checkpoint to resume from, it is damaged, or it is of a run with other options.
        DataError: a class has too few images to validate on.
        CnnEdgeError: ``out`` cannot be written, or the disk is too full.

    Examples:
        >>> result = cnnedge.train_model(
        ...     "alexnet_v2",
        ...     cnnedge.open_source("signs:200"),
        ...     "signs.keras",
        ...     cnnedge.TrainOptions(epochs=1, image_size=(64, 64)),
        ... )
        >>> result.epochs_run, result.path.name
        (1, 'signs.keras')
    """
    require_training_packages("training")
    from cnnedge.backends.keras import ModelNote

    out = Path(out)
    checkpoint = out.with_suffix(".ckpt") / "state.npz"
    history_json, history_png = out.with_suffix(".history.json"), out.with_suffix(".history.png")
    require_keras_file(out)
    require_writable(out, checkpoint, history_json, history_png)
    run = _describe(model_name, dataset, options)
    state = read_state(checkpoint, run) if resume else None
    make_learner = partial(
        Learner,
        model_name,
        len(dataset.labels),
        options.image_size,
        seed=options.seed,
        learning_rate=run["learning_rate"],
        options=options.model_options,
    )
    learner = make_learner()
    _require_space(out, checkpoint, learner.nbytes)
    if state is None:
        normalization = learner.init_from(options.init)
        state = State(run, normalization, (), learner.variables(), learner.optimizer_variables())
    else:
        learner.restore(state.variables, state.optimizer)
    note = ModelNote(
        model=model_name,
        labels=dataset.labels,
        image=learner.contract,
        normalization=state.normalization,
        data=dataset.spec,
        seed=options.seed,
    )
    stream = Stream(
        dataset.train,
        learner.contract,
        state.normalization,
        batch_size=options.batch_size,
        seed=options.seed,
        augmented=options.augment,
        progress=progress,
    )

    blind = Blind.of(stream, dataset.train.targets)
    may_retry = options.init is None
    while True:
        if may_retry and _may_start_again(state, options) and blind.unmoved(state.history):
            learner = make_learner()
            state = _started_again(learner, state, options, blind)
            note = replace(note, normalization=state.normalization)
            stream = stream.normalized(state.normalization)
            on_retry(AGAIN.format(**(state.retry or {})))
        if _finished(state, options):
            break
        report = learner.run_epoch(len(state.history) + 1, options.epochs, stream, progress)
        if not report.finite:
            remove_checkpoint(checkpoint)  # going on from it would lead here again
            raise _diverged(report, learner, state, out, note)
        state = state.after(report, learner.variables(), learner.optimizer_variables())
        write_state(checkpoint, state)
        on_epoch(report)

    learner.restore(state.best)
    answers = _test(learner, dataset, state.normalization, progress)
    targets = dataset.test.targets
    top1, top5 = top_k(answers, targets, 1), top_k(answers, targets, min(5, len(dataset.labels)))
    test = against_chance(answers.argmax(1), targets)
    result = TrainResult(
        path=out,
        history=state.history,
        top1=top1,
        top5=top5,
        test_images=len(dataset.test),
        epochs_run=len(state.history),
        best_epoch=best_epoch(state.counted),
        seconds=sum(report.seconds for report in state.history),
        stopped_early=len(state.history) < options.epochs,
        parameters=learner.parameters,
        at_chance=test.at_chance,
        warnings=tuple(findings(state.counted, blind, test)),
        retry=state.retry,
    )
    learner.save(out, note, {"top1": top1, "top5": top5, "test_images": len(dataset.test)})
    write_history(history_json, run, result.to_dict())
    title = f"{model_name} on {dataset.name}"
    draw_history(history_png, title, state.history, result.best_epoch)
    remove_checkpoint(checkpoint)
    return result


def _require_space(out: Path, checkpoint: Path, weights: int) -> None:
    # A checkpoint is the weights, Adam's two moments and the best weights, and the last one stays
    # while the next is written. Then the model itself. One that is there already, to be resumed
    # from or replaced, has its place.
    there = checkpoint.stat().st_size if checkpoint.is_file() else 0
    require_space(out.parent, (2 * 4 + 1) * weights - min(there, 4 * weights), "training")


def _describe(model_name: str, dataset: Dataset, options: TrainOptions) -> dict[str, Any]:
    """Return all that decides what the weights become; a resumed run must have the same."""
    return {
        "model": model_name,
        "data": dataset.spec,
        "labels": list(dataset.labels),
        "training images": dataset.train.digest(),
        "precision": precision(),
        "cnnedge": __version__,
        "tensorflow": importlib.import_module("tensorflow").__version__,
        **asdict(options),
        "learning_rate": options.rate_for(model_name),
    }


def _may_start_again(state: State, options: TrainOptions) -> bool:
    return state.retry is None and len(state.history) < options.epochs


def _started_again(learner: Learner, state: State, options: TrainOptions, blind: Blind) -> State:
    """Return the state before the first epoch of a second start."""
    return State(
        state.run,
        start_again(learner.model, options.seed),
        state.history,
        learner.variables(),
        learner.optimizer_variables(),
        retry=describe_retry(state.history, blind),
    )


def _finished(state: State, options: TrainOptions) -> bool:
    since_best = len(state.counted)
    if state.counted:
        since_best = len(state.history) - best_epoch(state.counted)
    return len(state.history) >= options.epochs or since_best >= options.patience


def _diverged(
    report: EpochReport, learner: Learner, state: State, out: Path, note: ModelNote
) -> ModelError:
    """Save the best weights so far beside ``out``, and return the error that says so."""
    kept = "no epoch before it is worth keeping"
    if state.counted:
        best = state.history[best_epoch(state.counted) - 1]
        rescued = out.with_suffix(".best.keras")
        learner.restore(state.best)
        learner.save(rescued, note, {"validation_top1": best.val_accuracy})
        kept = f"the weights of epoch {best.epoch} are in {rescued}"
    rate = state.run["learning_rate"]
    return ModelError(
        f"the loss is no longer a number in epoch {report.epoch}; {kept}",
        fix=f"try a learning rate below {rate:g}, such as {rate / 10:g}",
    )


def _test(learner: Learner, dataset: Dataset, normalization: str, progress: Progress) -> np.ndarray:
    """Return the answers to the test images, float32 ``[N, classes]``."""
    from cnnedge.backends.keras import predict

    model = learner.in_float32()
    answers, done = [], 0
    for images, _ in dataset.test.batches(learner.contract, 32):
        answers.append(predict(model, images, normalization))
        done += len(images)
        progress("test", done, len(dataset.test))
    return np.concatenate(answers)
