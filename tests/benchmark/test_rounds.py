"""Who is asked for what, in which order: rounds, blocks, early stopping, failures."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from fake_runtime import FakeClock, FakeRunner

from cnnedge.benchmark.contestants import Contestant
from cnnedge.benchmark.rounds import BLOCKS, SWEEPS, Target, hold_rounds
from cnnedge.benchmark.station import Station
from cnnedge.benchmark.suite import SCENARIOS, ModelEntry, Suite
from cnnedge.errors import BackendError, ProcessEnded
from cnnedge.image import ImageContract

SHAPE = (8, 8, 3)


class FakeLink:
    """A link to a station in this process; notes what it was asked, and fails as it is told."""

    def __init__(self, name, station, log, fails):
        self.opened = {"provider": "Fake", "total": 1.0, "import": 0.5, "load": 0.3, "first": 0.2}
        self.name, self.station, self.log, self.fails = name, station, log, fails

    def ask(self, do, **arguments):
        self.log.append((self.name, do))
        if do in self.fails:
            failure = self.fails[do]
            kind = BackendError if isinstance(failure, str) else type(failure)
            raise kind(f"{self.name}: {failure}")
        if do == "memory":
            return {"peak_mib": 100.0, "before_mib": 50.0}
        if do == "profile":
            return {"conv1": 0.001}
        if do == "app":
            return {"samples": [0.01]}
        return getattr(self.station, do)(**arguments)

    def close(self):
        self.log.append((self.name, "close"))


class Stage:
    """Contestants of known latencies on one clock that stands still but for them."""

    def __init__(self, **seconds):
        self.clock, self.log, self.fails, self.broken = FakeClock(), [], {}, set()
        self.seconds = seconds

    def start(self, contestant):
        self.log.append((contestant.name, "open"))
        if contestant.name in self.broken:
            raise BackendError(f"{contestant.name}: no such device")
        runner = FakeRunner(self.clock, self.seconds[contestant.name])
        station = Station(runner, SHAPE, clock=self.clock, sleep=self.clock.sleep)
        fails = self.fails.get(contestant.name, {})
        return FakeLink(contestant.name, station, self.log, fails)

    def run(self, scenarios=("single-stream",), **options):
        contestants = [
            Contestant(
                name=name,
                title=name,
                runtime="cpu",
                variant="fp32",
                precision="fp32",
                opener="x:y",
                model="m",
                options={"runtime": "cpu"},
                profiler="p:q",
            )
            for name in self.seconds
        ]
        golden = Path(self.file)
        image = ImageContract(8, 8).to_dict()
        target = Target(Path("bundle"), SHAPE, image, tuple("0123456789"), golden)
        options = {"seconds": 12.0, **options}
        suite = Suite((ModelEntry(Path("bundle")),), scenarios=tuple(scenarios), **options)
        return hold_rounds(contestants, target, suite, start=self.start)

    file = "none"


@pytest.fixture
def photo(tmp_path):
    from PIL import Image

    path = tmp_path / "photo.png"
    Image.fromarray(np.zeros((9, 9, 3), np.uint8)).save(path)
    return path


def test_every_round_is_of_new_processes_that_start_one_by_one():
    stage = Stage(a=0.01, b=0.02)
    found = stage.run(rounds=3)
    assert [len(one.rounds) for one in found] == [3, 3]
    assert [len(one.opened) for one in found] == [3, 3]
    for verb in ("open", "close", "memory"):
        assert sum(do == verb for _, do in stage.log) == 6
    opened = [i for i, (_, do) in enumerate(stage.log) if do == "open"]
    closed = [i for i, (_, do) in enumerate(stage.log) if do == "close"]
    assert opened[2] > closed[1]  # nobody of a round is left when the next one begins


def test_contestants_take_turns_and_not_always_in_one_order():
    stage = Stage(a=0.01, b=0.02, c=0.03)
    found = stage.run(rounds=2)
    blocks = [name for name, do in stage.log if do == "block"]
    sweeps = [blocks[i : i + 3] for i in range(0, len(blocks), 3)]
    assert len(sweeps) == 2 * BLOCKS
    assert all(sorted(sweep) == ["a", "b", "c"] for sweep in sweeps)
    assert len(set(map(tuple, sweeps))) > 1
    assert all(len(blocks) == BLOCKS for one in found for blocks in one.rounds)


def test_known_latencies_come_out():
    stage = Stage(a=0.0078125, b=0.03125)
    a, b = stage.run()
    assert (a.median, b.median) == (0.0078125, 0.03125)
    assert all(w["settled"] for w in a.warm_ups)


def test_measuring_ends_early_where_everything_is_known_well():
    """662 samples of a median known within 1 %: more would tell nothing. Noise has to go on."""
    steady = Stage(a=0.0009765625)
    (known,) = steady.run(seconds=60.0, rounds=3)
    assert [len(blocks) for blocks in known.rounds] == [BLOCKS, 1, 1]
    rng = np.random.default_rng(0)
    noisy = Stage(a=lambda call: 0.001 * rng.choice([1.0, 1.5]))
    (unknown,) = noisy.run(seconds=60.0, rounds=3)
    assert [len(blocks) for blocks in unknown.rounds] == [BLOCKS] * 3
    few = Stage(a=0.25)
    (slow,) = few.run(seconds=12.0, rounds=3)
    assert [len(blocks) for blocks in slow.rounds] == [BLOCKS] * 3


def test_every_scenario_is_measured_in_turns(photo):
    stage = Stage(a=0.01, b=0.02)
    stage.file = photo
    a, b = stage.run(
        SCENARIOS,
        batches=(1, 4),
        clients=(2,),
        loads=(0.5,),
        sustained_seconds=40.0,
        idle_seconds=1.0,
    )
    assert sorted(a.offline) == [1, 4]
    assert len(b.offline[4]) == 3  # a turn a round
    assert np.median(np.concatenate(b.offline[4])) == pytest.approx(0.08)
    assert len(a.clients[2]) == SWEEPS
    assert a.server[0.5]["rate"] == pytest.approx(50.0)
    assert b.server[0.5]["rate"] == pytest.approx(25.0)  # of what it gets through itself
    assert a.layers == {"conv1": 0.001}
    assert len(a.idle) == 6
    assert [round(w["at"]) for w in a.sustained] == [0, 5, 10, 15, 20, 25, 30, 35]
    assert a.whole
    assert a.app == [0.01] * SWEEPS
    assert a.notes == {}


def test_who_cannot_be_opened_is_left_out_and_the_others_go_on():
    stage = Stage(a=0.01, b=0.02)
    stage.broken = {"a"}
    a, b = stage.run(rounds=2)
    assert a.error == "no such device"
    assert not a.rounds
    assert len(b.rounds) == 2
    assert sum(entry == ("a", "open") for entry in stage.log) == 1  # not again


def test_a_scenario_that_fails_is_noted_and_the_rest_is_measured():
    stage = Stage(a=0.01, b=0.02)
    stage.fails = {"a": {"clients": "one call at a time"}}
    a, b = stage.run(("single-stream", "multi-stream", "offline"), rounds=1)
    assert a.notes == {"multi-stream": "one call at a time"}
    assert a.error is None
    assert a.offline
    assert b.clients
    assert sum(entry == ("a", "clients") for entry in stage.log) == 1


def test_loads_are_not_offered_where_the_own_rate_is_not_known():
    stage = Stage(a=0.01, b=0.02)
    stage.fails["a"] = {"block": "out of memory"}
    a, b = stage.run(["server"], rounds=1, loads=(0.5,))
    assert a.server == {}
    assert "not known" in a.notes["server"]
    assert ("a", "server") not in stage.log
    assert b.server[0.5]["rate"] == pytest.approx(0.5 / 0.02)


def test_a_process_that_dies_is_not_asked_again():
    stage = Stage(a=0.01, b=0.02)
    stage.fails = {"a": {"block": ProcessEnded("its process was killed by signal 9")}}
    a, b = stage.run(("single-stream", "offline"), rounds=2)
    assert a.error == "single-stream: its process was killed by signal 9"
    assert sum(entry == ("a", "block") for entry in stage.log) == 1
    assert sum(entry == ("a", "open") for entry in stage.log) == 1
    assert b.offline
    assert ("a", "close") in stage.log


def test_what_an_error_says_does_not_decide_whether_the_process_is_gone():
    stage = Stage(a=0.01)
    stage.fails = {"a": {"clients": "the accelerator did not answer"}}
    (a,) = stage.run(("single-stream", "multi-stream", "offline"), rounds=1)
    assert a.notes == {"multi-stream": "the accelerator did not answer"}
    assert a.error is None
    assert a.offline


def test_processes_are_closed_whatever_happens():
    stage = Stage(a=0.01, b=0.02)

    def interrupt(call):
        if call > 30:
            raise KeyboardInterrupt
        return 0.05

    stage.seconds["b"] = interrupt
    with pytest.raises(KeyboardInterrupt):
        stage.run()
    assert {("a", "close"), ("b", "close")} <= set(stage.log)
