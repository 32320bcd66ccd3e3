"""The arithmetic of measuring, with a clock that is told what to say."""

from __future__ import annotations

import math

import pytest

from cnnedge.benchmark import interleaved
from cnnedge.benchmark.environment import lacking
from cnnedge.benchmark.interleaved import (
    BLOCK,
    FEWEST_ROUNDS,
    SETTLE,
    SETTLE_SECONDS,
    WARM_UP_SECONDS,
    Benchmark,
    measure_interleaved,
)
from cnnedge.machine import Machine


@pytest.fixture(autouse=True)
def as_users_have_it(monkeypatch):
    for name, value in {
        "WARM_UP_SECONDS": WARM_UP_SECONDS,
        "SETTLE_SECONDS": SETTLE_SECONDS,
    }.items():
        monkeypatch.setattr(interleaved, name, value)
    monkeypatch.setattr(interleaved, "BLOCK", BLOCK)


class FakeClock:
    """A clock that stands still but for the contestants, who say how long they took."""

    def __init__(self):
        self.now = 0.0
        self.calls = []

    def __call__(self):
        return self.now

    def contestant(self, name, seconds):
        def call():
            self.calls.append(name)
            self.now += seconds(len(self.calls)) if callable(seconds) else seconds

        return call


def test_contestants_take_turns_in_blocks_after_the_warm_up():
    clock = FakeClock()
    contestants = {"a": clock.contestant("a", 1 / 128), "b": clock.contestant("b", 1 / 8)}
    settle = {"a": math.ceil(SETTLE_SECONDS * 128), "b": SETTLE}  # for so long, and so often
    one_round = ["a"] * (settle["a"] + BLOCK) + ["b"] * (settle["b"] + BLOCK)
    seconds = one_round.count("a") / 128 + one_round.count("b") / 8
    rounds = FEWEST_ROUNDS + 1
    a, b = measure_interleaved(contestants, seconds=rounds * seconds, clock=clock)
    assert len(a.samples) == len(b.samples) == rounds * BLOCK
    tail = clock.calls[-rounds * len(one_round) :]
    assert tail == one_round * rounds
    assert set(clock.calls[: -len(tail)]) == {"a", "b"}  # the warm-up
    assert (a.median, b.median) == (1 / 128, 1 / 8)


def test_the_first_calls_of_a_block_are_not_counted():
    clock = FakeClock()
    names = []

    def call(name):
        def settles():
            names.append(name)
            recent = names[-SETTLE - 1 :]
            clock.now += 1.0 if len(set(recent)) == 1 and len(recent) > SETTLE else 50.0

        return settles

    a, b = measure_interleaved({"a": call("a"), "b": call("b")}, seconds=1.0, clock=clock)
    assert set(a.samples) == set(b.samples) == {1.0}


def test_a_slow_contestant_still_gets_its_fewest_blocks():
    clock = FakeClock()
    (slow,) = measure_interleaved({"slow": clock.contestant("s", 9.0)}, seconds=1.0, clock=clock)
    assert len(slow.samples) == FEWEST_ROUNDS * BLOCK


def test_drift_moves_both_and_leaves_the_ratio():
    clock = FakeClock()
    drift = {
        "fast": clock.contestant("fast", lambda n: 0.001 * (1 + n / 2000)),
        "slow": clock.contestant("slow", lambda n: 0.004 * (1 + n / 2000)),
    }
    measured = measure_interleaved(drift, seconds=100, most_rounds=40, clock=clock)
    bench = Benchmark(tuple(measured), "slow", {})
    ratio, low, high = bench.speed_up("fast")
    assert ratio == pytest.approx(4.0, rel=0.02)
    assert low <= ratio <= high
    assert high - low < 0.6


def test_raw_samples_are_kept():
    clock = FakeClock()
    measured = measure_interleaved({"a": clock.contestant("a", 0.25)}, seconds=1, clock=clock)
    document = Benchmark(tuple(measured), "a", {"machine": "x"}).to_dict()
    (row,) = document["measurements"]
    assert row["samples_ms"] == [250.0] * FEWEST_ROUNDS * BLOCK
    assert row["p99_ms"] is None
    assert document["environment"] == {"machine": "x"}


@pytest.mark.parametrize(
    ("precision", "isa", "lacks"),
    [
        ("int8", ("avx2",), "int8 dot product"),
        ("int8", ("avx512_vnni",), None),
        ("int8", ("asimddp",), None),
        ("fp16", ("avx512_vnni",), "FP16"),
        ("fp16", ("asimdhp",), None),
        ("int4-weight", (), None),
    ],
)
def test_what_a_cpu_lacks_for_a_precision(precision, isa, lacks):
    found = lacking(precision, Machine("made up", 2, isa, 8.0, "Linux"))
    assert (found is None) == (lacks is None)
    assert lacks is None or lacks in found
