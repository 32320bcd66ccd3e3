from __future__ import annotations

import numpy as np
import pytest

from cnnedge.benchmark.statistics import paired_ratio
from cnnedge.comparison import DATA_TYPES, Comparison, compare, judge, paired_interval, top_k
from cnnedge.measurement import Measurement, recommend


def comparison(lost=0, won=0, n=1000, difference=0.0):
    return Comparison(n, 0.9, 0.9, 1.0, 1.0, 1.0, difference, lost, won)


def test_percentiles_are_quoted_only_from_enough_samples():
    few = Measurement("few", tuple(np.arange(1, 64) / 1000))
    assert few.median == pytest.approx(0.032)
    assert few.percentile(90) is None
    enough = Measurement("enough", tuple(np.arange(1, 101) / 1000))
    assert enough.percentile(90) == pytest.approx(0.091)
    assert enough.percentile(99) is None
    assert Measurement("many", tuple(np.arange(1, 663) / 1000)).percentile(99) is not None


def test_compare_counts_what_is_lost_and_won():
    reference = np.eye(4, dtype=np.float32)[[0, 1, 2, 3]]
    answers = np.eye(4, dtype=np.float32)[[0, 2, 2, 1]]
    found = compare(answers, reference, np.array([0, 1, 2, 1]))
    assert (found.lost, found.won) == (1, 1)
    assert found.top1 == 0.75
    assert found.reference_top1 == 0.75
    assert found.agreement == 0.5
    assert found.max_abs_diff == 1.0
    assert found.drop == 0.0


def test_top_k():
    scores = np.array([[0.1, 0.5, 0.4], [0.7, 0.2, 0.1]])
    assert top_k(scores, np.array([2, 2]), 1) == 0.0
    assert top_k(scores, np.array([2, 2]), 2) == 0.5
    assert top_k(scores, np.array([2, 2]), 3) == 1.0


def test_paired_interval_follows_agresti_and_min():
    # b = 10, c = 4, n = 100: (10.5 - 4.5) / 102 ± 1.96 sqrt(15 - 36/102) / 102
    low, high = paired_interval(10, 4, 100)
    assert low == pytest.approx(100 * (6 - 1.959964 * np.sqrt(15 - 36 / 102)) / 102)
    assert high == pytest.approx(100 * (6 + 1.959964 * np.sqrt(15 - 36 / 102)) / 102)


def test_paired_interval_covers_the_truth():
    rng = np.random.default_rng(0)
    n, p_lost, p_won = 400, 0.03, 0.01
    draws = rng.multinomial(n, [p_lost, p_won, 1 - p_lost - p_won], 2000)
    hits = sum(
        low <= 100 * (p_lost - p_won) <= high
        for low, high in (paired_interval(b, c, n) for b, c, _ in draws)
    )
    assert 0.93 < hits / 2000 < 0.98


def test_smallest_drop_shrinks_with_the_number_of_images():
    small, large = comparison(n=100).smallest_drop, comparison(n=10_000).smallest_drop
    assert paired_interval(round(small), 0, 100)[0] > 0
    assert paired_interval(round(small) - 1, 0, 100)[0] <= 0
    assert large < small / 10


@pytest.mark.parametrize(
    ("found", "precision", "trained", "status"),
    [
        (comparison(), "int8", True, "passed"),
        (comparison(lost=20), "int8", True, "failed"),
        (comparison(n=100), "int8", True, "unproven"),
        (comparison(lost=500), "int8", False, "not judged"),
        (comparison(difference=2e-5), "fp32", True, "failed"),
        (comparison(difference=2e-5), "fp32", False, "failed"),
        (comparison(difference=1e-3), "fp16", True, "passed"),
        (comparison(difference=3e-3), "fp16", True, "failed"),
        (comparison(difference=float("nan")), "fp32", True, "failed"),
        (comparison(difference=0.3), "int8", True, "passed"),
    ],
)
def test_gate(found, precision, trained, status):
    verdict = judge(
        found,
        precision=precision,
        max_drop=0.5,
        trained=trained,
        achieved={"macs": {DATA_TYPES[precision]: 0.99}},
    )
    assert verdict.status == status


def test_int8_that_computes_in_float_fails():
    for achieved in ({"float32": 1.0}, {"int8": 0.2, "float32": 0.8}, {}):
        verdict = judge(
            comparison(),
            precision="int8",
            max_drop=0.5,
            trained=True,
            achieved={"macs": achieved, "weights": {"int8": 1.0}},
        )
        assert verdict.failed
        assert "int8 was asked for" in verdict.reason


# --- the speed gate ----------------------------------------------------------------------------


def speed(own, sibling, spread=0.01, seed=0):
    """How many times faster, of 6 blocks of 10 calls each, taken in turns."""
    noise = np.random.default_rng(seed).normal(1, spread, (2, 1, 6, 10))
    return paired_ratio(own * noise[0], sibling * noise[1])


@pytest.mark.parametrize(
    ("own", "sibling", "recommended"),
    [
        (1.0, 3.0, True),
        (1.0, 1.03, True),
        (1.0, 1.01, False),  # faster, and not by enough
        (1.0, 0.5, False),
    ],
)
def test_speed_gate(own, sibling, recommended):
    found = recommend("int8", speed(own, sibling), "this CPU has no int8 dot product")
    assert found.recommended == recommended
    assert found.against == "fp32"
    assert found.ratio == pytest.approx(sibling / own, rel=0.01)
    assert found.interval[0] <= found.ratio <= found.interval[1]
    assert ("no int8 dot product" in found.reason) == (not recommended)


def test_a_ratio_that_may_be_chance_is_not_recommended():
    found = recommend("int8", speed(1.0, 1.2, spread=0.9, seed=4), None)
    assert found.interval[0] < 1 < found.interval[1]
    assert found.ratio >= 1.02
    assert not found.recommended
    assert "may be chance" in found.reason


def test_what_was_not_measured_is_not_recommended():
    assert not recommend("int8", None, None).recommended
    assert recommend("fp32", speed(3.0, 3.0), None).recommended


def test_weight_only_variants_are_judged_by_their_weights():
    achieved = {"macs": {"float32": 1.0}, "weights": {"int4": 0.9, "float32": 0.1}}
    verdict = judge(
        comparison(), precision="int4-weight", max_drop=0.5, trained=True, achieved=achieved
    )
    assert verdict.status == "passed"
    achieved["weights"] = {"float32": 1.0}
    verdict = judge(
        comparison(), precision="int4-weight", max_drop=0.5, trained=True, achieved=achieved
    )
    assert verdict.failed
    assert "stores its weights in 100% float32" in verdict.reason
