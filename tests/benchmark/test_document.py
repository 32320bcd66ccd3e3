"""What becomes of a run's figures in the result document."""

from __future__ import annotations

from dataclasses import replace

import pytest

from cnnedge.benchmark.contestants import enter
from cnnedge.benchmark.document import Measured, model_document
from cnnedge.benchmark.peaks import Peaks
from cnnedge.benchmark.rounds import Collected
from cnnedge.benchmark.suite import ModelEntry, Suite

PEAKS = Peaks(1e9, 4e9, {1: 1e9, 256: 1e9}, {"fp32": "test", "int8": "test"})


@pytest.fixture
def measured(toy_bundle):
    """A function: the document of FP32 on a runtime that took 10 ms a call."""
    entry = ModelEntry(toy_bundle.root)
    suite = Suite((entry,), runtimes=("cpu",))
    fp32 = enter(toy_bundle, entry, suite, {}).contestants[0]

    def document(runtime, peaks=PEAKS):
        found = Measured(toy_bundle, entry)
        one = Collected(replace(fp32, runtime=runtime))
        one.rounds = [[[0.01] * 8]]
        one.warm_ups = [{"settled": True}]
        found.collected = [one]
        found.file = next(toy_bundle.root.glob("selftest/golden-*"))
        return model_document(found, suite, peaks)

    return document


def test_a_cpus_results_are_held_against_its_roof(measured):
    document = measured("cpu")
    roof = document["contestants"][0]["roofline"]
    assert roof["why"] is None
    assert roof["bound_ms"] >= 1e3 * 2 * document["macs"] / 1e9 - 1e-3
    assert roof["fraction"] == pytest.approx(roof["bound_ms"] / 10, rel=1e-3)


@pytest.mark.parametrize("runtime", ["cuda", "ort-tensorrt", "ort-rtx", "tensorrt", "rtx"])
def test_a_gpus_results_are_not_held_against_the_cpus_roof(measured, runtime):
    roof = measured(runtime)["contestants"][0]["roofline"]
    assert (roof["bound_ms"], roof["fraction"]) == (None, None)
    assert "GPU" in roof["why"]


def test_without_peaks_there_is_no_roof(measured):
    roof = measured("cpu", peaks=None)["contestants"][0]["roofline"]
    assert roof == {"bound_ms": None, "fraction": None, "why": roof["why"]}
    assert "not measured" in roof["why"]
