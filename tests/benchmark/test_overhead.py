"""benchmarks/overhead.py: its arithmetic, and that it runs. No figure of it is asserted."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from cnnedge.package.archive import write_archive

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "overhead.py"


@pytest.fixture(scope="module")
def overhead():
    spec = importlib.util.spec_from_file_location("benchmark_overhead", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_overhead_is_the_difference_and_processes_decide_its_interval(overhead):
    rng = np.random.default_rng(0)

    def process(extra):
        bare = rng.normal(500e-6, 20e-6, (40, 100))
        return {"bare": bare.tolist(), "ours": (bare + extra).tolist()}

    found, low, high = overhead.overhead_of([process(20e-6) for _ in range(5)])
    assert found == pytest.approx(20e-6, rel=1e-6)
    assert low == pytest.approx(20e-6, rel=1e-6)
    found, low, high = overhead.overhead_of([process(x * 1e-6) for x in (10, 20, 30, 40, 50)])
    assert low <= 20e-6 < found < 40e-6 <= high
    other = [p | {"by_hand": p["ours"], "ours": p["bare"]} for p in [process(7e-6)] * 2]
    assert overhead.overhead_of(other)[0] == 0
    assert overhead.overhead_of(other, "by_hand")[0] == pytest.approx(7e-6, rel=1e-6)


def test_every_contestant_is_first_as_often_as_the_others(overhead):
    order = []
    calls = [lambda k=k: order.append(k) for k in range(3)]
    taken = overhead.in_turn(*calls)
    assert [len(seconds) for seconds in taken] == [overhead.BLOCK] * 3
    assert order[:9] == [0, 1, 2, 1, 2, 0, 2, 0, 1]


@pytest.mark.system
def test_it_measures_a_bundle(toy_bundle, tmp_path):
    out = tmp_path / "new" / "overhead.json"
    command = [sys.executable, SCRIPT, toy_bundle.root, "--json", out]
    command += ["--processes", "2", "--seconds", "0.4", "--calls", "2000"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    document = json.loads(out.read_text())
    (result,) = document["results"]
    assert (result["name"], result["classes"]) == (toy_bundle.root.name, 10)
    assert document["environment"]["machine"]["cores"] >= 1
    low, high = result["overhead"]["interval"]
    assert low <= result["overhead"]["seconds"] <= high
    least, most = result["overhead"]["by_hand_interval"]
    assert least <= result["overhead"]["by_hand_seconds"] <= most
    assert [sorted(blocks) for blocks in result["overhead"]["blocks"]] == [
        ["bare", "by_hand", "ours"]
    ] * 2
    assert result["memory"]["array"]["calls"] == 2000
    assert len(result["memory"]["file"]["resident_bytes"]) == 101
    assert min(result["memory"]["array"]["resident_bytes"]) > 10 * 2**20
    threads = result["threads"]
    assert threads["wrong"] == 0
    assert len(threads["seconds_per_call"]["8"]) == len(threads["seconds_per_call"]["1"]) == 2
    assert f"{result['name']} ({result['variant']}, 10 classes)" in done.stdout
    assert "times the throughput of 1; 0 answers differed" in done.stdout


def test_a_wrong_answer_is_counted(overhead, toy_bundle, monkeypatch):
    """One of the threads' answers in a few is another's: what the count is there for."""
    load = overhead.cnnedge.load

    def careless(bundle):
        classify, calls = load(bundle), []
        session = classify._session

        def run(batch):
            calls.append(None)
            return session(batch[:, ::-1] if len(calls) > 40 and len(calls) % 7 == 0 else batch)

        classify._session = run
        return classify

    monkeypatch.setattr(overhead.cnnedge, "load", careless)
    assert overhead.measure_threads(toy_bundle.root, 0.1)["wrong"] > 0


@pytest.mark.system
def test_its_refusals_are_one_line(toy_bundle, tmp_path):
    done = subprocess.run(
        [sys.executable, SCRIPT, tmp_path / "none"], capture_output=True, text=True
    )
    assert done.returncode == 1
    assert "does not exist" in done.stderr
    assert "Traceback" not in done.stderr
    taken = [sys.executable, SCRIPT, toy_bundle.root, "--json", tmp_path]
    done = subprocess.run(taken, capture_output=True, text=True)
    assert (done.returncode, "is a folder" in done.stderr) == (1, True)
    assert "process 1" not in done.stderr
    write_archive(toy_bundle, tmp_path / "toy.zip")
    packed = [sys.executable, SCRIPT, tmp_path / "toy.zip"]
    done = subprocess.run(packed, capture_output=True, text=True)
    assert (done.returncode, "is no folder with golden images" in done.stderr) == (2, True)
    few = [sys.executable, SCRIPT, "--calls", "10"]
    assert subprocess.run(few, capture_output=True).returncode == 2
