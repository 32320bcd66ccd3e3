"""What is concluded: the pick, and whether a newer result regressed."""

from __future__ import annotations

import copy

import numpy as np
import pytest

from cnnedge.benchmark.accuracy import confused, confusion, flips, pack, unpack
from cnnedge.benchmark.compare import compare_results
from cnnedge.benchmark.pick import pick
from cnnedge.comparison import compare


def samples_of(ms, noise=0.01, seed=0, rounds=3):
    rng = np.random.default_rng(seed)
    return (ms * rng.normal(1, noise, (rounds, 4, 20))).tolist()


def row(name, ms, *, drop=0.0, n=1000, peer=False, size=10e6, noise=0.01, seed=0, accuracy=True):
    variant, runtime = name.split("@")
    lost = round(drop * n / 100)
    samples = samples_of(ms, noise, seed)
    reference = np.eye(2, dtype=np.float32)[np.zeros(n, int)]
    answers = reference.copy()
    answers[:lost] = answers[:lost, ::-1]
    targets = np.zeros(n, int)
    return {
        "name": name,
        "title": name,
        "runtime": runtime,
        "variant": variant,
        "precision": variant,
        "peer": peer,
        "bytes": size,
        "memory": {"peak_mib": 100.0},
        "accuracy": compare(answers, reference, targets).to_dict() if accuracy else None,
        "right": pack(answers.argmax(1) == targets) if accuracy else None,
        "offline": [],
        "single_stream": {
            "p50_ms": float(np.median(samples)),
            "samples_ms": samples,
            "stable": True,
            "notes": [],
            "against": None,
        },
    }


def picked(*rows, judged=True, max_drop=0.5):
    return pick(rows, bundle="b", max_drop=max_drop, judged=judged)


# --- the pick ----------------------------------------------------------------------------------


def test_the_fastest_within_the_budget_is_picked():
    found = picked(row("fp32@cpu", 4.0), row("int8@cpu", 1.0, drop=0.2), row("fp16@cpu", 3.0))
    assert found["name"] == "int8@cpu"
    assert "the fastest within the budget: 1.00 ms" in found["why"]
    assert "+0.20 points" in found["why"]
    assert found["how"] == 'cnnedge.load("b", variant="int8")'
    assert [other["name"] for other in found["runners_up"]] == ["fp16@cpu", "fp32@cpu"]
    assert "takes 3.0" in found["runners_up"][0]["why"]


def test_who_drops_too_much_is_not_however_fast():
    found = picked(row("fp32@cpu", 4.0), row("int8@cpu", 1.0, drop=0.6))
    assert found["name"] == "fp32@cpu"
    (other,) = found["runners_up"]
    assert "top-1 drops +0.60 points" in other["why"]
    assert "more than the 0.5 allowed" in other["why"]
    assert picked(row("int8@cpu", 1.0, drop=0.6), max_drop=1.0)["name"] == "int8@cpu"


def test_a_peer_that_is_faster_is_picked():
    found = picked(row("int8@cpu", 2.0), row("int8@openvino", 1.0, peer=True))
    assert found["name"] == "int8@openvino"
    assert found["how"] == (
        'pip install "cnnedge[openvino]"; cnnedge.load("b", variant="int8", runtime="openvino")'
    )


def test_a_peer_that_may_be_faster_by_chance_is_not():
    found = picked(
        row("int8@openvino", 0.99, noise=0.2, seed=2, peer=True, size=9e6),
        row("int8@cpu", 1.0, noise=0.2, seed=1, drop=0.1),
    )
    assert found["name"] == "int8@cpu"
    assert "int8@openvino may be as fast" in found["why"]
    assert "may be as fast: takes" in found["runners_up"][0]["why"]


def test_of_equals_the_one_that_drops_less():
    rows = [row("int8@cpu", 1.0, noise=0.2, drop=0.3), row("fp32@cpu", 1.0, noise=0.2, seed=5)]
    assert picked(*rows)["name"] == "fp32@cpu"


def test_random_weights_are_not_judged():
    found = picked(row("int8@cpu", 1.0, drop=50.0), row("fp32@cpu", 2.0), judged=False)
    assert found["name"] == "int8@cpu"
    assert "accuracy was not judged" in found["why"]


def test_nobody_within_the_budget():
    found = picked(row("int8@cpu", 1.0, drop=3.0), row("int8@openvino", 1.0, accuracy=False))
    assert found["name"] is None
    assert {other["name"] for other in found["runners_up"]} == {"int8@cpu", "int8@openvino"}
    assert "pass --data" in found["runners_up"][1]["why"]


# --- old and new -------------------------------------------------------------------------------


def document(*rows, peak=100.0, sha="s", images=1000, cpu="A CPU"):
    peaks = [peak * 1.001, peak * 0.999, peak]
    return {
        "environment": {"machine": {"cpu": cpu}, "threads": 2, "tools": {"onnxruntime": "1.0"}},
        "peaks": {"fp32": {"samples": peaks}},
        "models": [
            {
                "name": "m",
                "data": {"sha256": sha, "images": images},
                "contestants": list(rows),
                "left_out": [],
            }
        ],
    }


def verdicts(old, new, **options):
    found = compare_results(old, new, **options)
    return {change.figure: change.verdict for change in found.rows}, found


def test_the_same_is_the_same():
    old = document(row("int8@cpu", 1.0))
    found, changes = verdicts(old, copy.deepcopy(old))
    assert found == {"p50": "same", "top-1": "same", "size": "same", "memory": "same"}
    assert not changes.regressed


@pytest.mark.parametrize(
    ("ms", "noise", "verdict"),
    [
        (1.10, 0.01, "regressed"),
        (1.02, 0.01, "same"),  # within the tolerance
        (0.80, 0.01, "improved"),
        (1.05, 0.60, "within noise"),
    ],
)
def test_a_latency_is_judged_by_its_interval(ms, noise, verdict):
    old = document(row("int8@cpu", 1.0, noise=noise))
    new = document(row("int8@cpu", ms, noise=noise, seed=7))
    found, changes = verdicts(old, new)
    assert found["p50"] == verdict
    (change,) = [c for c in changes.rows if c.figure == "p50"]
    assert change.interval[0] <= change.ratio <= change.interval[1]
    assert bool(changes.regressed) == (verdict == "regressed")


def test_tolerance():
    old, new = document(row("a@cpu", 1.0)), document(row("a@cpu", 1.1, seed=7))
    assert verdicts(old, new, tolerance=0.2)[0]["p50"] == "same"
    assert verdicts(old, new, tolerance=0.02)[0]["p50"] == "regressed"


def test_a_machine_that_slowed_down_as_much_is_no_regression():
    old = document(row("int8@cpu", 1.0), peak=100.0)
    found, changes = verdicts(old, document(row("int8@cpu", 1.25, seed=7), peak=80.0))
    assert found["p50"] == "within noise"
    (change,) = [c for c in changes.rows if c.figure == "p50"]
    assert "the machine was slower too" in change.why
    assert changes.machine[0] == pytest.approx(0.8, rel=0.01)
    found, _ = verdicts(old, document(row("int8@cpu", 1.6, seed=7), peak=80.0))
    assert found["p50"] == "regressed"  # by more than the machine
    # A machine that got faster excuses nothing.
    found, _ = verdicts(old, document(row("int8@cpu", 1.25, seed=7), peak=125.0))
    assert found["p50"] == "regressed"


def test_accuracy_is_compared_image_by_image():
    old = document(row("int8@cpu", 1.0))
    found, changes = verdicts(old, document(row("int8@cpu", 1.0, drop=2.0)))
    assert found["top-1"] == "regressed"
    assert "20 lost, 0 won of 1000" in next(c.why for c in changes.rows if c.figure == "top-1")
    assert verdicts(old, document(row("int8@cpu", 1.0, drop=0.2)))[0]["top-1"] == "within noise"
    assert verdicts(document(row("int8@cpu", 1.0, drop=2.0)), old)[0]["top-1"] == "improved"
    other = document(row("int8@cpu", 1.0, drop=2.0), sha="other")
    assert verdicts(old, other)[0]["top-1"] == "not comparable"


def test_size_and_memory():
    new = document(row("int8@cpu", 1.0, size=10.5e6))
    new["models"][0]["contestants"][0]["memory"]["peak_mib"] = 105.0
    found, _ = verdicts(document(row("int8@cpu", 1.0)), new)
    assert (found["size"], found["memory"]) == ("regressed", "same")


def test_throughput():
    old, new = document(row("a@cpu", 1.0)), document(row("a@cpu", 1.0))
    for doc, ms in ((old, 8.0), (new, 10.0)):
        rounds = [[ms * (1 + 0.001 * k + luck) for k in range(10)] for luck in (0, 0.01, 0.02)]
        double = [[2 * s for s in samples] for samples in rounds]
        doc["models"][0]["contestants"][0]["offline"] = [
            {"batch": 1, "samples_ms": [[1.0]]},  # single-stream tells that better
            {"batch": 8, "samples_ms": rounds},
            {"batch": 16, "samples_ms": double},
        ]
    assert verdicts(old, new)[0]["offline, batch 8 to 16"] == "regressed"
    found, changes = verdicts(new, old)
    assert found["offline, batch 8 to 16"] == "improved"
    (change,) = [c for c in changes.rows if c.figure.startswith("offline")]
    assert change.before == pytest.approx(10.0 / 8, rel=0.03)
    assert change.ratio == pytest.approx(0.8)


def test_one_round_cannot_tell_a_slower_model_from_an_unlucky_process():
    old, new = document(row("a@cpu", 1.0)), document(row("a@cpu", 1.5, seed=7))
    for doc in (old, new):
        single = doc["models"][0]["contestants"][0]["single_stream"]
        single["samples_ms"] = single["samples_ms"][:1]
    found, changes = verdicts(old, new)
    assert found["p50"] == "not comparable"
    assert "unlucky process" in next(c.why for c in changes.rows if c.figure == "p50")
    assert not changes.regressed


def test_who_was_measured_and_now_fails_has_regressed():
    old = document(row("int8@cpu", 1.0), row("fp32@cpu", 2.0))
    new = document(row("fp32@cpu", 2.0))
    assert "not comparable" in verdicts(old, new)[0].values()  # nobody asked for it
    new["models"][0]["left_out"] = [{"name": "int8@cpu", "why": "no plan fits"}]
    found, changes = verdicts(old, new)
    assert found["measured"] == "regressed"
    assert changes.regressed[0].why == "no plan fits"


def test_other_machines_threads_and_versions_are_named():
    old, new = document(row("a@cpu", 1.0)), document(row("a@cpu", 1.0), cpu="Another")
    new["environment"]["threads"] = 4
    new["environment"]["tools"] = {"onnxruntime": "2.0"}
    new["models"][0]["name"] = "other"
    notes = " | ".join(compare_results(old, new).notes)
    for text in ("m is not in the new result", "A CPU and Another", "2 and 4", "1.0 → 2.0"):
        assert text in notes


def test_results_without_peaks_are_compared_all_the_same():
    old, new = document(row("a@cpu", 1.0)), document(row("a@cpu", 1.5))
    old["peaks"] = None
    found, changes = verdicts(old, new)
    assert changes.machine is None
    assert found["p50"] == "regressed"


# --- answers -----------------------------------------------------------------------------------


def test_bits_survive_packing():
    right = np.random.default_rng(0).random(1003) < 0.9
    assert np.array_equal(unpack(pack(right), 1003), right)
    with pytest.raises(ValueError, match="bits for"):
        unpack(pack(right), 2000)


def test_confusion_counts_truth_by_answer():
    first, targets = np.array([0, 1, 1, 2, 2]), np.array([0, 1, 2, 2, 0])
    assert confusion(first, targets, 3) == [[1, 0, 1], [0, 1, 0], [0, 1, 1]]
    assert confusion(first, targets, 1000) is None
    mistakes = confused(np.array([1, 1, 2]), np.array([0, 0, 0]), ["a", "b", "c"])
    assert mistakes == [
        {"truth": "a", "answer": "b", "count": 2},
        {"truth": "a", "answer": "c", "count": 1},
    ]


def test_flips_begin_with_the_surest():
    expected = np.array([[0.6, 0.4], [0.9, 0.1], [0.2, 0.8]], np.float32)
    mine = np.array([[0.3, 0.7], [0.4, 0.6], [0.1, 0.9]], np.float32)
    found = flips(mine, expected, ["a", "b"])
    assert [(f["image"], f["reference"], f["answer"]) for f in found] == [
        (1, "a", "b"),
        (0, "a", "b"),
    ]
    assert found[0]["reference_probability"] == pytest.approx(0.9)
