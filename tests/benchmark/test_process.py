"""Real processes that hold a runtime whose latencies are known: the protocol, and how it fails."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from fake_runtime import answers_of

from cnnedge.benchmark.contestants import Contestant
from cnnedge.benchmark.process import Process, call
from cnnedge.benchmark.worker import peak_mib
from cnnedge.errors import BackendError, ProcessEnded

pytestmark = pytest.mark.system

SHAPE = (8, 8, 3)


def contestant(name, opener, model):
    return Contestant(
        name=name,
        title=name,
        runtime=opener,
        variant="fp32",
        precision="fp32",
        opener=opener,
        model=str(model),
    )


@pytest.fixture
def hold(tmp_path, monkeypatch):
    """Return a function that holds the fake runtime in a process; all are closed in the end."""
    held = []
    model = tmp_path / "model.onnx"
    model.write_bytes(b"model")

    def start(threads=2, model=model, **how):
        monkeypatch.setenv("FAKE_RUNTIME", json.dumps(how))
        opener = "fake_runtime:open_fake"
        who = contestant("fp32@fake", opener, model)
        held.append(Process.hold(who, SHAPE, threads))
        return held[-1]

    yield start
    for process in held:
        process.close()


def test_ctrl_c_is_for_the_parent_which_closes_it(hold):
    process = hold()
    assert os.getsid(process._process.pid) != os.getsid(0)


def test_it_opens_measures_answers_and_ends(hold, tmp_path):
    process = hold(seconds=0.02)
    assert process.opened["provider"] == "Fake 1.0, 2 threads"
    parts = [process.opened[name] for name in ("import", "load", "first")]
    assert all(part >= 0 for part in parts)
    assert sum(parts) == pytest.approx(process.opened["total"])
    assert process.opened["first"] >= 0.02
    found = process.ask("block", seconds=0.1)
    assert all(sample >= 0.02 for sample in found["samples"])
    images = np.random.default_rng(0).integers(0, 256, (5, *SHAPE), np.uint8)
    np.save(tmp_path / "in.npy", images)
    process.ask("answers", images=str(tmp_path / "in.npy"), out=str(tmp_path / "o.npy"), batch=2)
    assert np.array_equal(np.load(tmp_path / "o.npy"), answers_of(images))
    assert process.ask("memory")["peak_mib"] > process.ask("memory")["before_mib"] - 1
    process.close()
    assert process._process.returncode == 0


def test_what_native_code_prints_does_not_come_between(hold):
    assert hold(prints=True).ask("block", seconds=0.0)["samples"]


def test_an_error_is_one_line_and_the_process_lives_on(hold):
    process = hold(largest_batch=4)
    with pytest.raises(BackendError) as caught:
        process.ask("block", seconds=0.0, batch=8)
    assert str(caught.value) == "fp32@fake: a batch of 8 is too large"
    assert process.ask("block", seconds=0.0, batch=4)["samples"]
    with pytest.raises(BackendError, match="'Station' object has no attribute 'nonsense'"):
        process.ask("nonsense")


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"fails": True}, "fp32@fake: no such device"),
        ({"dies_opening": True}, "fp32@fake: its process was ended with code 7"),
        ({"shape": [3]}, r"an array of shape \(3,\) to one image"),
    ],
)
def test_what_cannot_be_opened_says_why(hold, how, message):
    with pytest.raises(BackendError, match=message) as caught:
        hold(**how)
    assert "\n" not in str(caught.value)


def test_a_missing_file_or_module_says_so(hold, tmp_path):
    with pytest.raises(BackendError, match="No such file"):
        hold(model=tmp_path / "none")
    who = contestant("x", "no_such:f", "m")
    with pytest.raises(BackendError, match="No module named 'no_such'"):
        Process.hold(who, SHAPE, None)


def test_a_process_that_dies_leaves_its_last_words(hold):
    process = hold(dies_at=6)
    with pytest.raises(BackendError, match="ended with code 11: Segmentation fault, it said"):
        process.ask("block", seconds=5.0)
    with pytest.raises(ProcessEnded, match="its process was"):
        process.ask("memory")


def test_a_killed_process_is_named(hold):
    process = hold()
    os.kill(process._process.pid, signal.SIGKILL)
    with pytest.raises(ProcessEnded, match="killed by signal 9"):
        process.ask("block", seconds=1.0)


def test_one_that_hangs_is_ended(hold, monkeypatch):
    process = hold()
    monkeypatch.setattr("cnnedge.benchmark.process.PATIENCE", 0.5)  # it may open at its leisure
    with pytest.raises(ProcessEnded, match="did not answer"):
        process.ask("after_idling", idle=60.0, times=1)
    process._process.wait(10)


def test_no_process_outlives_a_parent_that_is_killed(tmp_path):
    code = (
        "from cnnedge.benchmark.process import Process\n"
        "import time; p = Process('x'); print(p._process.pid, flush=True); time.sleep(60)"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, cwd=Path(__file__).parents[2]
    )
    child = int(parent.stdout.readline())
    parent.kill()
    parent.wait()
    for _ in range(200):
        if not Path(f"/proc/{child}").exists() or "zombie" in _state(child):
            break
        time.sleep(0.05)
    else:
        os.kill(child, signal.SIGKILL)
        pytest.fail("the measuring process went on")


def _state(pid):
    try:
        return Path(f"/proc/{pid}/status").read_text().split("State:")[1].split("\n")[0]
    except OSError:
        return "zombie"


def test_a_function_by_import_string():
    assert call("math:hypot", 3.0, 4.0) == 5.0
    with pytest.raises(BackendError, match="math domain error|expected a nonnegative"):
        call("math:sqrt", -1.0)


def test_peak_memory_is_this_process_alone():
    """It is read off the process itself: what a parent held at its start would count otherwise."""
    ballast = np.ones(200 << 20, np.uint8)
    assert call("cnnedge.benchmark.worker:peak_mib") < 150
    assert peak_mib() > 200
    del ballast
