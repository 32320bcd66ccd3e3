"""The measuring itself, on a runner whose latencies are known and a clock that stands still."""

from __future__ import annotations

import threading

import numpy as np
import pytest
from fake_runtime import FakeClock, FakeRunner

from cnnedge.benchmark.station import (
    FEWEST_CALLS,
    MOST_WARM_UP,
    SETTLE_SECONDS,
    STAGES,
    WARM_UP,
    WINDOWS,
    Station,
)
from cnnedge.benchmark.worker import resolve
from cnnedge.image import ImageContract
from cnnedge.measurement import GpuTimes, Staged

SHAPE = (8, 8, 3)


def station_of(seconds, runner=None):
    clock = FakeClock()
    runner = runner or FakeRunner(clock, seconds)
    runner.clock = clock
    return Station(runner, SHAPE, clock=clock, sleep=clock.sleep), runner, clock


def test_a_steady_runner_warms_up_for_the_least_time():
    station, _, _ = station_of(0.01)
    found = station.warm_up()
    assert found["settled"]
    assert WARM_UP <= found["seconds"] < WARM_UP + 0.2


def test_a_slow_runner_is_not_settled_by_one_call():
    station, runner, _ = station_of(0.6)
    assert station.warm_up()["settled"]
    assert runner.calls == WINDOWS


def test_one_that_settles_late_is_waited_for():
    station, runner, _ = station_of(
        lambda call: 0.02 if call > 40 else 0.02 * (1 + 0.2 * (call % 7))
    )
    found = station.warm_up()
    assert found["settled"]
    assert runner.calls > 40


def test_one_that_never_settles_is_measured_all_the_same_and_said_so():
    station, _, _ = station_of(lambda call: 0.1 * (1 + call))
    found = station.warm_up()
    assert not found["settled"]
    assert found["seconds"] >= MOST_WARM_UP


def test_a_block_counts_nothing_of_its_settling():
    station, runner, _ = station_of(lambda call: 0.5 if call == 1 else 0.125)
    found = station.block(seconds=2.0)
    assert found["samples"] == [0.125] * 16
    assert runner.calls == 17  # the first one alone took longer than settling asks for
    assert SETTLE_SECONDS < 0.5


def test_a_slow_runner_gets_its_fewest_calls():
    station, _, _ = station_of(9.0)
    assert station.block(seconds=1.0)["samples"] == [9.0] * FEWEST_CALLS
    assert station.block(seconds=1.0, calls=2)["samples"] == [9.0] * 2


def test_a_batch_is_one_call():
    station, runner, _ = station_of(0.0625)
    assert set(station.block(seconds=1.0, batch=4)["samples"]) == {0.25}
    assert set(runner.batches) == {4}


def test_a_runner_that_times_its_parts_is_asked_for_them():
    class OnGpu(FakeRunner):
        def timed(self, batch):
            self(batch)
            return GpuTimes(0.001, 0.002, 0.003, 0.0001)

    station, _, _ = station_of(0.25, OnGpu(None, 0.25))
    found = station.block(seconds=1.0, calls=3)
    assert found["gpu"][0] == {
        "copy_in": 0.001,
        "compute": 0.002,
        "copy_out": 0.003,
        "enqueue": 0.0001,
    }
    assert len(found["gpu"]) == len(found["samples"])


@pytest.mark.system
def test_a_server_at_half_load_waits_as_queueing_theory_says():
    """M/D/1: the mean wait is ρ·s / 2(1 − ρ) (Pollaczek and Khinchine)."""
    service, load = 0.010, 0.5
    station, _, _ = station_of(service)
    found = station.server(rate=load / service, seconds=400.0, seed=1)
    assert len(found["samples"]) == 20_000
    assert min(found["samples"]) >= service - 1e-9
    wait = np.mean(found["samples"]) - service
    assert wait == pytest.approx(load * service / (2 * (1 - load)), rel=0.05)


def test_a_server_counts_what_an_image_waited():
    """One stall delays everybody behind it, and all of that counts."""
    station, _runner, _ = station_of(lambda call: 1.0 if call == 200 else 0.001)
    found = station.server(rate=100.0, seconds=4.0, seed=0)
    late = [s for s in found["samples"] if s > 0.1]
    assert 60 <= len(late) <= 140  # about a hundred arrive while the one second lasts


def test_clients_call_at_once():
    together, most = threading.Barrier(3, timeout=20), []
    lock, inside = threading.Lock(), [0]

    class Meeting:
        calls = 0

        def __call__(self, batch):
            with lock:
                inside[0] += 1
                most.append(inside[0])
                first = Meeting.calls > 0
            if first and threading.current_thread() is not threading.main_thread():
                together.wait()
            with lock:
                Meeting.calls += 1
                inside[0] -= 1
            return np.ones((len(batch), 10), np.float32)

    station = Station(Meeting(), SHAPE)
    found = station.clients(3, seconds=0.0)
    assert max(most) == 3
    assert len(found["samples"]) == 6  # each client's fewest
    assert found["elapsed"] > 0


def test_the_first_call_after_a_pause_is_what_is_timed():
    asleep = []

    class Drowsy(FakeRunner):
        def __call__(self, batch):
            self.seconds = 0.5 if asleep and asleep.pop() else 0.1
            return super().__call__(batch)

    clock = FakeClock()

    def sleep(seconds):
        asleep.append(seconds >= 2.0)
        clock.sleep(seconds)

    station = Station(Drowsy(clock, 0.1), SHAPE, clock=clock, sleep=sleep)
    found = station.after_idling(idle=2.0, times=3)
    assert found["samples"] == pytest.approx([0.5] * 3)
    assert clock.now >= 6.0


def test_a_waterfall_has_every_stage_and_they_add_up(tmp_path):
    from PIL import Image

    file = tmp_path / "photo.jpg"
    Image.fromarray(np.full((40, 60, 3), 200, np.uint8)).save(file)

    class InStages(FakeRunner):
        def staged(self, batch):
            assert batch.shape == (1, *SHAPE)
            assert batch.dtype == np.uint8
            answers = self(batch)
            return Staged(answers, 0.001, 0.125, 0.002)

    station, _, _ = station_of(0.128, InStages(None, 0.128))
    labels = [str(i) for i in range(10)]
    found = station.waterfall(str(file), ImageContract(8, 8).to_dict(), labels, seconds=1.0)
    assert tuple(found["stages"]) == STAGES
    assert found["stages"]["copy in"][0] == 0.001
    assert found["stages"]["compute"][0] == 0.125
    assert found["stages"]["copy out"][0] == 0.002
    for whole, *parts in zip(found["whole"], *found["stages"].values(), strict=True):
        assert whole == pytest.approx(sum(parts))


def test_answers_go_through_files_in_parts(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (10, *SHAPE), np.uint8)
    np.save(tmp_path / "in.npy", images)
    station, runner, _ = station_of(0.01)
    station.answers(str(tmp_path / "in.npy"), str(tmp_path / "out.npy"), batch=4)
    assert runner.batches == [4, 4, 2]
    found = np.load(tmp_path / "out.npy")
    assert found.shape == (10, 10)
    assert found.dtype == np.float32


def test_import_strings():
    assert resolve("math:sqrt")(9.0) == 3.0
    with pytest.raises(ImportError):
        resolve("no_such_module:f")
    with pytest.raises(AttributeError):
        resolve("math:no_such")
