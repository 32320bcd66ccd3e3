"""Step: make a network smaller so that it still gives the reference's answers.

What is where: `channels` says which channels stand or fall together, `importance` how much each
matters, `budget` what they cost and which to give up, `rewrite` builds the network without them;
`pruning` is these together. `factorize` splits layers in cheaper ones, `recovery` lets the network
learn again, `saved` is what a kill leaves, `outcome` what came of it. This file is the order of
things.
"""

from __future__ import annotations

import importlib
import itertools
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cnnedge.chance import guessing
from cnnedge.checkpoint import run_of
from cnnedge.comparison import Comparison, compare, require_finite
from cnnedge.compress.budget import require_reachable, steps_of
from cnnedge.compress.channels import map_channels
from cnnedge.compress.factorize import split_convolutions, split_dense
from cnnedge.compress.importance import l1, taylor
from cnnedge.compress.options import PARETO, CompressOptions
from cnnedge.compress.outcome import (
    Candidate,
    CompressResult,
    Timing,
    require_channels,
    still_there,
)
from cnnedge.compress.pruning import Platform, Sizes, prune_to
from cnnedge.compress.recovery import RecoveryEpoch, Student, Teacher, run_epoch
from cnnedge.compress.rewrite import remove_channels
from cnnedge.compress.saved import Saved, state_path
from cnnedge.data import Dataset, Split
from cnnedge.data.stream import Stream
from cnnedge.errors import ModelError
from cnnedge.files import require_keras_file, require_space, require_writable
from cnnedge.progress import Progress, silent
from cnnedge.protocols import Runner
from cnnedge.quiet import require_training_packages
from cnnedge.version import __version__

if TYPE_CHECKING:
    import keras

    from cnnedge.backends.keras import ModelNote

__all__ = [
    "PARETO",
    "Candidate",
    "CompressOptions",
    "CompressResult",
    "Platform",
    "Timing",
    "compress",
    "resumed_multiple",
]

TAYLOR_BATCHES = 32  # that importance is taken from
FLOOR = 0.25  # of a group, that stays in each round: an estimate of first order reaches no further


def compress(
    model: keras.Model,
    note: ModelNote,
    dataset: Dataset | None,
    out: Path | str,
    options: CompressOptions,
    platform: Platform,
    *,
    emits: str = "probabilities",
    held_to: Runner | None = None,
    resume: bool = False,
    progress: Progress = silent,
    on_epoch: Callable[[RecoveryEpoch], None] = lambda report: None,
    on_round: Callable[[Candidate], None] = lambda candidate: None,
) -> CompressResult:
    """Prune a classifier in rounds, each followed by fine-tuning, and keep the smallest that holds.

    Trained on is the *train* split less a stratified tenth, which tells how each round went. The
    gate is applied to the *test* split: from the smallest network upwards until one has lost at
    most ``options.max_drop`` points. On a CPU the same seed gives the same weights, bit for bit,
    whether or not the run was stopped and resumed, unless the budget is a latency.

    Without data the channels with the smallest weights go, nothing is learned again, and nothing is
    judged.

    Written is ``out``; while it runs, beside it, the folder `G.ckpt/`. What these held before is
    replaced.

    Args:
        model: The reference, which stays as it is.
        note: What its input and its outputs mean.
        dataset: Labelled images of the classes it knows.
        out: The file to write, ending in `.keras`.
        options: How far to go.
        platform: The machine that it is for.
        emits: "probabilities" or "logits", the network's output.
        held_to: What every round is held against: uint8 images → probabilities. None: ``model``;
            it is another where that is not as its file has it, in float32 or without an output.
        resume: Go on from the checkpoint beside ``out``.
        progress: Told how far each part is.
        on_epoch: Told of every epoch, after its checkpoint was written.
        on_round: Told of every round, once its network is saved.

    Raises:
        MissingExtraError: TensorFlow is not installed.
        ModelError: no channel can be removed, the budget cannot be met, the loss is no longer a
            number; or there is no checkpoint to resume from, or one of another run.
        CnnEdgeError: ``out`` cannot be written, or the disk is too full.
    """
    require_training_packages("compressing")
    from cnnedge.backends.keras import KerasReference, save_model

    out = Path(out)
    saved = Saved(state_path(out), note)
    require_keras_file(out)
    require_writable(out, saved.state)
    image = note.image
    shape = image.shape
    channels = map_channels(model, shape)
    require_channels(channels, model.name)
    everything = np.ones(channels.units, bool)
    reference = remove_channels(model, channels, everything)  # flat, with names of its own
    before = Sizes(reference, shape, platform)
    if dataset is None:
        small, kept = _without_data(before, options, platform)
        save_model(small, out, replace(note, metrics={}))
        only = Sizes(small, shape, platform).candidate(1, kept)
        return CompressResult(out, options, platform.multiple, before.candidate(0, {}), (only,), 1)

    rounds = options.rounds(before.costs())
    steps = steps_of(before.channels, platform.multiple)
    require_reachable(before.channels, before.budgets(rounds[-1]), steps)
    _require_space(out, model, len(rounds))
    run = _describe(model, dataset, options, platform)
    stream = Stream(
        dataset.train,
        image,
        note.normalization,
        batch_size=options.batch_size,
        seed=options.seed,
        augmented=options.augment,
        progress=progress,
    )
    teacher = Teacher(model, stream, emits, len(dataset.train), progress)
    work = _Work(
        options, platform, steps, shape, stream, teacher, dataset.train, emits, progress, on_epoch
    )
    if resume:
        saved.resume(run)
    else:
        saved.start(run, before.candidate(0, {}), reference)
    for number in range(saved.finished + 1, len(rounds) + 1):
        epochs = options.epochs_of(number, len(rounds))
        on_round(work.round(saved, number, rounds[number - 1], epochs, last=number == len(rounds)))

    held_to = held_to or KerasReference(model, note.normalization, emits)
    answers = _answers(held_to, dataset.test, note, "reference", progress)
    require_finite(answers, "the model itself", dataset.test.name_of)
    chosen, candidates = _choose(saved, dataset.test, answers, note, options, emits, progress)
    network = saved.network(chosen)
    comparison = candidates[chosen].comparison
    assert comparison is not None
    metrics = {"top1": comparison.top1, "test_images": comparison.n}
    save_model(network, out, replace(note, metrics=metrics))
    result = CompressResult(
        path=out,
        options=options,
        multiple=platform.multiple,
        reference=candidates[0],
        candidates=tuple(candidates[1:]),
        chosen=chosen,
        guessing=guessing(answers, dataset.test.targets),
    )
    for number, point in enumerate(result.points, 1):
        save_model(saved.network(number), point, note)
    saved.remove()
    return result


def resumed_multiple(out: Path | str) -> int:
    """Return what a stopped run rounds to: measured again, it might be something else.

    Raises:
        ModelError: there is no run to resume beside ``out``, or its checkpoint is damaged.
    """
    return int(run_of(state_path(Path(out)))["multiple"])


def _without_data(
    before: Sizes, options: CompressOptions, platform: Platform
) -> tuple[keras.Model, dict[str, list[int]]]:
    target = options.rounds(before.costs())[-1]
    steps = steps_of(before.channels, platform.multiple)
    importance = l1(before.channels)
    small, kept = prune_to(before, importance, target, platform, steps, floor=0.0, exact=True)
    return small, still_there({}, before.channels, kept)


@dataclass(frozen=True)
class _Work:
    """What every round of a run shares."""

    options: CompressOptions
    platform: Platform
    steps: Mapping[str, int]
    shape: tuple[int, int, int]
    stream: Stream
    teacher: Teacher
    split: Split
    emits: str
    progress: Progress
    on_epoch: Callable[[RecoveryEpoch], None]

    def round(
        self, saved: Saved, number: int, target: dict[str, float], epochs: int, *, last: bool
    ) -> Candidate:
        """Prune, let it recover, save the network; go on with a round that was begun."""
        if saved.begun != number:
            network = saved.network(number - 1)
            splits = saved.splits
            if self.options.low_rank and number == 1:
                network, found = split_dense(network, self.shape, **self.splitting)
                splits = (*splits, *map(str, found))
            small, kept = self.prune(network, saved.kept(number - 1), target, last)
            if self.options.tucker and (last or self.options.pareto):
                faster = self.platform.faster
                small, found = split_convolutions(
                    small, self.shape, faster=faster, **self.splitting
                )
                splits = (*splits, *map(str, found))
            saved.begin(number, small, kept, splits)
        network = saved.network(number)
        targets = self.split.targets
        student = Student(
            network,
            self.emits,
            learning_rate=self.options.learning_rate,
            steps=epochs * len(self.stream),
        )
        if saved.reports:
            student.restore(saved.variables, saved.optimizer)
        while len(saved.reports) < epochs:
            report = run_epoch(
                student,
                self.teacher,
                self.stream,
                targets,
                round=number,
                epoch=len(saved.reports) + 1,
                epochs=epochs,
                progress=self.progress,
            )
            if not np.isfinite(report.loss):
                saved.remove()  # going on from it would lead here again
                rate = self.options.learning_rate
                raise ModelError(
                    f"the loss is no longer a number in epoch {report.epoch} of round {number}",
                    fix=f"try a learning rate below {rate:g}, such as {rate / 10:g}",
                )
            saved.epoch(report, student.variables(), student.optimizer_variables())
            self.on_epoch(report)
        sizes = Sizes(network, self.shape, self.platform)
        candidate = sizes.candidate(number, saved.kept(number), saved.reports, saved.splits)
        saved.finish(candidate, network)
        return candidate

    @property
    def splitting(self) -> dict[str, Any]:
        """How layers are split."""
        return {"energy": self.options.energy, "multiple": self.platform.multiple}

    def prune(
        self,
        network: keras.Model,
        before: dict[str, list[int]],
        target: dict[str, float],
        last: bool,
    ) -> tuple[keras.Model, dict[str, list[int]]]:
        """Return a smaller network, and which of the reference's channels it has by layer."""
        sizes = Sizes(network, self.shape, self.platform)
        if self.options.importance == "l1":
            importance = l1(sizes.channels)
        else:
            batches = itertools.islice(self.stream.training(0), TAYLOR_BATCHES)
            importance = taylor(sizes.channels, batches, emits=self.emits)
        # What a split has put in between is not in the reference.
        steps = {**steps_of(sizes.channels, self.platform.multiple), **self.steps}
        exact = last or bool(self.options.pareto)
        small, kept = prune_to(
            sizes, importance, target, self.platform, steps, floor=FLOOR, exact=exact
        )
        return small, still_there(before, sizes.channels, kept)


def _choose(
    saved: Saved,
    test: Split,
    expected: np.ndarray,
    note: ModelNote,
    options: CompressOptions,
    emits: str,
    progress: Progress,
) -> tuple[int, list[Candidate]]:
    """Return which round's network is kept, and every candidate with what it was held against.

    Round 0 is the reference itself, which loses nothing; ``expected`` are its answers.
    """
    from cnnedge.backends.keras import KerasReference

    candidates = list(saved.candidates)

    def judged(number: int) -> Comparison:
        answer = KerasReference(saved.network(number), note.normalization, emits)
        found = _answers(answer, test, note, f"test, round {number}", progress)
        comparison = compare(found, expected, test.targets)
        candidates[number] = replace(candidates[number], comparison=comparison)
        return comparison

    chosen = 0
    for number in range(len(candidates) - 1, -1, -1):
        comparison = judged(number)
        if comparison.drop <= options.max_drop and not comparison.not_finite:
            chosen = chosen or number
            if not options.pareto:
                break
    return chosen, candidates


def _answers(
    answer: Runner, split: Split, note: ModelNote, task: str, progress: Progress
) -> np.ndarray:
    found, done = [], 0
    for images, _ in split.batches(note.image, 32):
        found.append(answer(images))
        done += len(images)
        progress(task, done, len(split))
    return np.concatenate(found)


def _require_space(out: Path, model: keras.Model, rounds: int) -> None:
    # Each round's network, and a checkpoint with Adam's two moments while the next is written.
    weights = 4 * int(model.count_params())
    require_space(out.parent, (rounds + 2 + 2 * 3) * weights, "compressing")


def _describe(
    model: keras.Model, dataset: Dataset, options: CompressOptions, platform: Platform
) -> dict[str, Any]:
    """Return all that decides what comes of it; a resumed run must have the same."""
    return {
        "model": model.name,
        "weights": _digest(model),
        "data": dataset.spec,
        "labels": list(dataset.labels),
        "training images": dataset.train.digest(),
        "cnnedge": __version__,
        "tensorflow": importlib.import_module("tensorflow").__version__,
        "multiple": platform.multiple,
        **asdict(options),
    }


def _digest(model: keras.Model) -> str:
    import hashlib

    digest = hashlib.sha256()
    for array in model.get_weights():
        digest.update(array.tobytes())
    return digest.hexdigest()
