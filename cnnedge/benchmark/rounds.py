"""Rounds of new processes, in each of which the contestants take turns in blocks."""

from __future__ import annotations

import random
import statistics as stats
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from cnnedge.benchmark.contestants import Contestant
from cnnedge.benchmark.environment import read_sensors
from cnnedge.benchmark.process import Link, Process
from cnnedge.benchmark.station import WARM_UP
from cnnedge.benchmark.statistics import block_medians, flatten, unpaired_ratio
from cnnedge.benchmark.suite import Suite
from cnnedge.errors import BackendError, ProcessEnded
from cnnedge.measurement import FEWEST_SAMPLES, GpuTimes
from cnnedge.progress import Progress, silent

BLOCKS = 4  # of each contestant in a round
SWEEPS = 2  # turns of each in the other scenarios
TURN_SECONDS = 0.3  # of one in those
IDLE_TIMES = 6  # pauses of `duty-cycle`
PROFILE_CALLS = 15
SUSTAINED_WINDOW = 5.0  # seconds
ENOUGH = 0.01  # a median that repeats within this share is known: single-stream may end early


@dataclass
class Collected:
    """What one contestant has shown so far; seconds throughout.

    Attributes:
        contestant: Who.
        opened: What opening told, by round.
        rounds: Single-stream samples, ``[round][block][call]``.
        warm_ups: What each round's warm-up told.
        gpu: The same calls by part, where they ran on a GPU that tells.
        offline: Samples by batch size and round.
        clients: Samples and elapsed seconds by number of clients, a turn each.
        server: Likewise by load, with the offered rate.
        idle: First calls after a pause.
        sustained: Windows.
        stages: Samples by stage of the waterfall; ``whole``, ``app``: of all of it.
        layers: Mean seconds by node.
        memory: What the process told of it, by round.
        notes: Why a scenario is missing, by its name.
        error: Why there is nothing more, or None.
    """

    contestant: Contestant
    opened: list[Mapping[str, Any]] = field(default_factory=list)
    rounds: list[list[list[float]]] = field(default_factory=list)
    warm_ups: list[Mapping[str, Any]] = field(default_factory=list)
    gpu: list[GpuTimes] = field(default_factory=list)
    offline: dict[int, list[list[float]]] = field(default_factory=dict)
    clients: dict[int, list[Mapping[str, Any]]] = field(default_factory=dict)
    server: dict[float, dict[str, Any]] = field(default_factory=dict)
    idle: list[float] = field(default_factory=list)
    sustained: list[dict[str, Any]] = field(default_factory=list)
    stages: dict[str, list[float]] = field(default_factory=dict)
    whole: list[float] = field(default_factory=list)
    app: list[float] = field(default_factory=list)
    layers: dict[str, float] = field(default_factory=dict)
    memory: list[Mapping[str, Any]] = field(default_factory=list)
    notes: dict[str, str] = field(default_factory=dict)
    error: str | None = None

    @property
    def median(self) -> float:
        """The median of all single-stream samples."""
        return float(np.median(flatten(self.rounds)))


Start = Callable[[Contestant], Any]  # → a Link that has `opened`


@dataclass(frozen=True)
class Target:
    """What all contestants of one bundle are given.

    Attributes:
        bundle: The bundle's folder.
        shape: Height, width and channels of the images.
        image: The image contract.
        labels: The classes.
        file: The image file of the waterfall.
    """

    bundle: Path
    shape: tuple[int, int, int]
    image: Mapping[str, Any]
    labels: tuple[str, ...]
    file: Path


def hold_rounds(
    contestants: Sequence[Contestant],
    target: Target,
    suite: Suite,
    *,
    start: Start | None = None,
    before_a_round: Callable[[], object] = lambda: None,
    at_the_end: Callable[[Mapping[str, Link]], None] | None = None,
    progress: Progress = silent,
) -> list[Collected]:
    """Measure all contestants of one bundle.

    Args:
        contestants: Who takes part.
        target: What they are given.
        suite: What to measure, and for how long.
        start: Starts a contestant; None: in a process of its own.
        before_a_round: Called before each round, when nobody runs.
        at_the_end: Called with everybody who is still alive, by name, before the last round ends.
        progress: Told how many steps are done.
    """

    def in_a_process(contestant: Contestant) -> Any:
        return Process.hold(contestant, target.shape, suite.threads)

    every = [Collected(contestant) for contestant in contestants]
    shuffled = random.Random(suite.seed)
    steps = _Steps(suite, progress)
    for number in range(suite.rounds):
        before_a_round()
        with _alive(every, start or in_a_process, shuffled, steps) as links:
            this = Round(every, links, target, suite, shuffled)
            _single_stream(this, steps)
            for one in this.running():  # before profiles and the like load it again
                one.memory.append(this.ask(one, "memory", "memory") or {})
            if "offline" in suite.scenarios:
                _offline(this)
                steps()
            if number == suite.rounds - 1:
                for scenario in suite.scenarios:
                    if scenario in _SCENARIOS:
                        _SCENARIOS[scenario](this)
                        steps()
                if at_the_end is not None:
                    names = [one.contestant.name for one in this.running()]
                    at_the_end({name: links[name] for name in names})
    return every


@dataclass(frozen=True)
class Round:
    """A round while its processes run.

    Attributes:
        every: All contestants, with what each has shown so far.
        links: Those whose process could be started, by name.
        target: What all are given.
        suite: What to measure.
        shuffled: Decides in which order they take their turns.
    """

    every: Sequence[Collected]
    links: Mapping[str, Link]
    target: Target
    suite: Suite
    shuffled: random.Random

    def running(self) -> list[Collected]:
        """Return whoever still runs, in the order of the tables."""
        started = [one for one in self.every if one.contestant.name in self.links]
        return [one for one in started if one.error is None]

    def in_turn(self, sweeps: int = 1) -> Iterator[Collected]:
        """Yield whoever still runs, so many times, each time in another order."""
        for _ in range(sweeps):
            yield from _shuffled(self.running(), self.shuffled)

    def ask(
        self, one: Collected, scenario: str, do: str, **arguments: Any
    ) -> dict[str, Any] | None:
        """Ask for something; where it fails, note why under the scenario, and return None."""
        if scenario in one.notes or one.error is not None:
            return None
        name = one.contestant.name
        try:
            return self.links[name].ask(do, **arguments)
        except BackendError as error:
            one.notes[scenario] = str(error).removeprefix(f"{name}: ")
            if isinstance(error, ProcessEnded):
                one.error = f"{scenario}: {one.notes[scenario]}"
            return None


class _Steps:
    """Counts what is done, for the progress bar."""

    def __init__(self, suite: Suite, progress: Progress) -> None:
        self._progress, self._done = progress, 0
        each = 1 + BLOCKS + ("offline" in suite.scenarios)
        self._total = suite.rounds * each + len(set(suite.scenarios) & set(_SCENARIOS))

    def __call__(self) -> None:
        self._done += 1
        self._progress("benchmark", min(self._done, self._total), self._total)


@contextmanager
def _alive(
    every: list[Collected], start: Start, shuffled: random.Random, steps: _Steps
) -> Iterator[dict[str, Link]]:
    """Start everybody, one after the other, so that each starts alone."""
    links: dict[str, Link] = {}
    order = [one for one in every if one.error is None]
    shuffled.shuffle(order)
    try:
        for one in order:
            try:
                link = start(one.contestant)
            except BackendError as error:
                one.error = str(error).removeprefix(f"{one.contestant.name}: ")
                continue
            links[one.contestant.name] = link
            one.opened.append(link.opened)
        steps()
        yield links
    finally:
        for link in links.values():
            link.close()


def _single_stream(this: Round, steps: _Steps) -> None:
    suite, running = this.suite, this.running()
    for one in running:
        asked = {"batch": suite.batch, "least": WARM_UP}
        one.warm_ups.append(this.ask(one, "warm-up", "warm_up", **asked) or {})
        one.rounds.append([])
    seconds = suite.seconds / (suite.rounds * BLOCKS * max(len(running), 1))
    for block in range(BLOCKS):
        steps()
        # Each round has a block: what one process differs from the next is not known otherwise.
        if block and len(this.every[0].rounds) > 1 and all(map(_known_well, this.running())):
            continue
        for one in this.in_turn():
            found = this.ask(one, "single-stream", "block", seconds=seconds, batch=suite.batch)
            if found is not None:
                one.rounds[-1].append(found["samples"])
                one.gpu += [GpuTimes(**parts) for parts in found.get("gpu", ())]


def _known_well(one: Collected) -> bool:
    """Whether more samples would hardly tell more: enough for a p99, and a median that is known."""
    blocks = sum(map(len, block_medians(one.rounds)))
    if len(flatten(one.rounds)) < FEWEST_SAMPLES[99] or blocks < BLOCKS:
        return False
    _, resampled = unpaired_ratio(one.rounds, one.rounds, resamples=500)
    low, high = np.percentile(resampled, [2.5, 97.5])
    return bool(high - low <= 2 * ENOUGH)


def _offline(this: Round) -> None:
    """In every round, for throughput too is a process's, and may be its luck."""
    for batch in this.suite.batches:
        for one in this.in_turn():
            asked = {"seconds": TURN_SECONDS, "batch": batch, "calls": 2}
            found = this.ask(one, "offline", "block", **asked)
            if found is not None:
                one.offline.setdefault(batch, []).append(found["samples"])


def _multi_stream(this: Round) -> None:
    for count in this.suite.clients:
        for one in this.in_turn(SWEEPS):
            found = this.ask(one, "multi-stream", "clients", count=count, seconds=TURN_SECONDS)
            if found is not None:
                one.clients.setdefault(count, []).append(found)


def _server(this: Round) -> None:
    """Arrivals at shares of what each itself gets through, so that every load can be borne."""
    for load in this.suite.loads:
        for one in this.in_turn():
            if not len(flatten(one.rounds)):
                one.notes["server"] = "its own rate, which loads are shares of, is not known"
                continue
            rate = load / one.median
            seconds = max(2.0, FEWEST_SAMPLES[90] / rate)
            asked = {"rate": rate, "seconds": seconds, "seed": this.suite.seed}
            found = this.ask(one, "server", "server", **asked)
            if found is not None:
                one.server[load] = {"rate": rate, **found}


def _waterfall(this: Round) -> None:
    for one in this.in_turn(SWEEPS):
        found = this.ask(
            one,
            "waterfall",
            "waterfall",
            file=str(this.target.file),
            contract=this.target.image,
            labels=list(this.target.labels),
            seconds=TURN_SECONDS,
        )
        if found is None:
            continue
        for name, samples in found["stages"].items():
            one.stages.setdefault(name, []).extend(samples)
        one.whole += found["whole"]
        if "runtime" in one.contestant.options:  # an app would run it by `cnnedge.load`
            asked = {"bundle": str(this.target.bundle), "file": str(this.target.file)}
            found = this.ask(one, "app", "app", seconds=TURN_SECONDS, **asked)
            one.app += [] if found is None else found["samples"]


def _layers(this: Round) -> None:
    for one in this.running():
        if one.contestant.profiler is None:
            one.notes["layers"] = "this runtime does not tell"
            continue
        asked = {"calls": PROFILE_CALLS, "shape": list(this.target.shape)}
        one.layers = this.ask(one, "layers", "profile", **asked) or {}


def _duty_cycle(this: Round) -> None:
    for one in this.in_turn(SWEEPS):
        asked = {"idle": this.suite.idle_seconds, "times": IDLE_TIMES // SWEEPS}
        found = this.ask(one, "duty-cycle", "after_idling", **asked)
        one.idle += [] if found is None else found["samples"]


def _sustained(this: Round) -> None:
    window = min(SUSTAINED_WINDOW, this.suite.sustained_seconds / 4)
    for one in this.running():
        spent = 0.0
        # Four at least, or there is no first and last quarter to compare, however slow a call is.
        while spent < this.suite.sustained_seconds or len(one.sustained) < 4:
            before = read_sensors()
            found = this.ask(one, "sustained", "block", seconds=window, batch=this.suite.batch)
            if found is None:
                break
            after, samples = read_sensors(), found["samples"]
            events = None
            if before.throttled is not None and after.throttled is not None:
                events = after.throttled - before.throttled
            one.sustained.append(
                {
                    "at": spent,
                    "n": len(samples),
                    "p50": stats.median(samples),
                    "clock_mhz": after.clock_mhz,
                    "temperature_c": after.temperature_c,
                    "throttled": events,
                }
            )
            spent += sum(samples)


_SCENARIOS = {
    "multi-stream": _multi_stream,
    "server": _server,
    "waterfall": _waterfall,
    "layers": _layers,
    "duty-cycle": _duty_cycle,
    "sustained": _sustained,
}


def _shuffled(ones: list[Collected], shuffled: random.Random) -> list[Collected]:
    order = list(ones)
    shuffled.shuffle(order)
    return order
