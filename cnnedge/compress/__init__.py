"""Step: make a network smaller so that it still gives the reference's answers.

What is where: `channels` says which channels stand or fall together, `importance` how much each
matters, `budget` what they cost and which to give up, `rewrite` builds the network without them,
`factorize` splits layers in cheaper ones, `recovery` lets the network learn again, and `outcome` is
what came of it. This file is the order of things.
"""

from __future__ import annotations

import importlib
import itertools
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cnnedge import __version__
from cnnedge.checkpoint import run_of
from cnnedge.compress.budget import Budget, Cost, choose_units, costs, require_reachable, steps_of
from cnnedge.compress.channels import ChannelMap, map_channels
from cnnedge.compress.factorize import split_convolutions, split_dense
from cnnedge.compress.importance import l1, taylor
from cnnedge.compress.options import PARETO, CompressOptions
from cnnedge.compress.outcome import (
    Candidate,
    CompressResult,
    LayerKept,
    Timing,
    require_channels,
    still_there,
)
from cnnedge.compress.recovery import RecoveryEpoch, Student, Teacher, run_epoch
from cnnedge.compress.rewrite import remove_channels
from cnnedge.compress.saved import Saved, state_path
from cnnedge.data import Dataset, Split
from cnnedge.data.stream import Stream
from cnnedge.errors import ModelError
from cnnedge.files import require_keras_file, require_space, require_writable
from cnnedge.progress import Progress, silent
from cnnedge.quiet import require_training_packages
from cnnedge.result import Comparison, compare

if TYPE_CHECKING:
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
    time: Callable[[Any], Timing] | None = None
    faster: Callable[..., bool] = lambda *case: False


def compress(
    model: Any,
    note: ModelNote,
    dataset: Dataset | None,
    out: Path | str,
    options: CompressOptions,
    platform: Platform,
    *,
    emits: str = "probabilities",
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
    from cnnedge.backends.keras import save_model

    out = Path(out)
    saved = Saved(state_path(out), note)
    require_keras_file(out)
    require_writable(out, saved.state)
    image = note.image
    shape = (image.height, image.width, image.channels)
    channels = map_channels(model, shape)
    require_channels(channels, model.name)
    everything = np.ones(channels.units, bool)
    reference = remove_channels(model, channels, everything)  # flat, with names of its own
    before = _Sizes(reference, shape, platform)
    if dataset is None:
        small, kept = _without_data(before, options, platform)
        save_model(small, out, replace(note, metrics={}))
        only = _Sizes(small, shape, platform).candidate(1, kept)
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

    chosen, candidates = _choose(saved, dataset.test, model, note, options, progress)
    network = saved.network(chosen)
    comparison = candidates[chosen].comparison
    assert comparison is not None
    metrics = {"top1": comparison.top1, "test_images": comparison.n}
    save_model(network, out, replace(note, metrics=metrics))
    result = CompressResult(
        out, options, platform.multiple, candidates[0], tuple(candidates[1:]), chosen
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


class _Sizes:
    """A network, its channels, and what it costs."""

    def __init__(self, network: Any, shape: tuple[int, int, int], platform: Platform) -> None:
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


def _without_data(
    before: _Sizes, options: CompressOptions, platform: Platform
) -> tuple[Any, dict[str, list[int]]]:
    target = options.rounds(before.costs())[-1]
    steps = steps_of(before.channels, platform.multiple)
    importance = l1(before.channels)
    small, kept = _prune(before, importance, target, platform, steps, floor=0.0, exact=True)
    return small, still_there({}, before.channels, kept)


def _prune(
    sizes: _Sizes,
    importance: np.ndarray,
    target: dict[str, float],
    platform: Platform,
    steps: Mapping[str, int],
    *,
    floor: float,
    exact: bool,
) -> tuple[Any, np.ndarray]:
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
        kept = _chosen(sizes.channels, importance, budgets, steps, floor)
        return remove_channels(sizes.network, sizes.channels, kept), kept
    assert platform.time is not None
    cost, overhead = sizes.latency()
    limit = max(target["latency"] - overhead, 0.05 * target["latency"])
    best = None
    for _ in range(LATENCY_TRIES):
        latency = Budget(cost, limit)
        kept = _chosen(sizes.channels, importance, [*budgets, latency], steps, floor)
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


def _chosen(
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
        sizes = _Sizes(network, self.shape, self.platform)
        candidate = sizes.candidate(number, saved.kept(number), saved.reports, saved.splits)
        saved.finish(candidate, network)
        return candidate

    @property
    def splitting(self) -> dict[str, Any]:
        """How layers are split."""
        return {"energy": self.options.energy, "multiple": self.platform.multiple}

    def prune(
        self, network: Any, before: dict[str, list[int]], target: dict[str, float], last: bool
    ) -> tuple[Any, dict[str, list[int]]]:
        """Return a smaller network, and which of the reference's channels it has by layer."""
        sizes = _Sizes(network, self.shape, self.platform)
        if self.options.importance == "l1":
            importance = l1(sizes.channels)
        else:
            batches = itertools.islice(self.stream.training(0), TAYLOR_BATCHES)
            importance = taylor(sizes.channels, batches, emits=self.emits)
        # What a split has put in between is not in the reference.
        steps = {**steps_of(sizes.channels, self.platform.multiple), **self.steps}
        exact = last or bool(self.options.pareto)
        small, kept = _prune(
            sizes, importance, target, self.platform, steps, floor=FLOOR, exact=exact
        )
        return small, still_there(before, sizes.channels, kept)


def _choose(
    saved: Saved,
    test: Split,
    reference: Any,
    note: ModelNote,
    options: CompressOptions,
    progress: Progress,
) -> tuple[int, list[Candidate]]:
    """Return which round's network is kept, and every candidate with what it was held against.

    Round 0 is the reference itself, which loses nothing.
    """
    candidates = list(saved.candidates)
    answers = _answers(reference, test, note, "reference", progress)

    def judged(number: int) -> Comparison:
        task = f"test, round {number}"
        found = _answers(saved.network(number), test, note, task, progress)
        comparison = compare(found, answers, test.targets)
        candidates[number] = replace(candidates[number], comparison=comparison)
        return comparison

    chosen = 0
    for number in range(len(candidates) - 1, -1, -1):
        if judged(number).drop <= options.max_drop:
            chosen = chosen or number
            if not options.pareto:
                break
    return chosen, candidates


def _answers(
    model: Any, split: Split, note: ModelNote, task: str, progress: Progress
) -> np.ndarray:
    from cnnedge.backends.keras import predict

    found, done = [], 0
    for images, _ in split.batches(note.image, 32):
        found.append(predict(model, images, note.normalization))
        done += len(images)
        progress(task, done, len(split))
    return np.concatenate(found)


def _require_space(out: Path, model: Any, rounds: int) -> None:
    # Each round's network, and a checkpoint with Adam's two moments while the next is written.
    weights = 4 * int(model.count_params())
    require_space(out.parent, (rounds + 2 + 2 * 3) * weights, "compressing")


def _describe(
    model: Any, dataset: Dataset, options: CompressOptions, platform: Platform
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


def _digest(model: Any) -> str:
    import hashlib

    digest = hashlib.sha256()
    for array in model.get_weights():
        digest.update(array.tobytes())
    return digest.hexdigest()
