"""Budgets are met, by giving up what matters least for what it costs."""

from __future__ import annotations

from itertools import pairwise

import keras
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from keras import layers

from cnnedge.compress import CompressOptions
from cnnedge.compress.budget import Budget, choose_units, costs, rounding, steps_of
from cnnedge.compress.channels import map_channels
from cnnedge.compress.rewrite import remove_channels
from cnnedge.errors import ModelError
from cnnedge.inspect import inspect_model

pytestmark = pytest.mark.tf

SHAPE = (16, 16, 3)


@pytest.fixture(scope="module")
def model():
    image = keras.Input(SHAPE)
    x = layers.Conv2D(32, 3, activation="relu", name="a")(image)
    x = layers.Conv2D(48, 3, activation="relu", name="b")(layers.MaxPooling2D()(x))
    x = layers.Dense(100, activation="relu", name="fc1")(layers.Flatten()(x))
    return keras.Model(image, layers.Dense(10, name="fc2")(x))


@pytest.fixture(scope="module")
def channels(model):
    return map_channels(model, SHAPE)


SIZES = {"a": 32, "b": 48, "fc1": 100}
STEPS_OF_ONE = dict.fromkeys(SIZES, 1)


def counts(channels, kept):
    return {group.name: int(kept[group.units].sum()) for group in channels.groups}


def test_costs_are_what_inspect_says(model, channels):
    full = [len(group) for group in channels.groups]
    macs, params = costs(channels)
    assert macs.at(full) == inspect_model(model).macs
    assert params.at(full) == model.count_params()
    assert sum(macs.by_layer(full).values()) == macs.at(full)


@settings(max_examples=40, deadline=None)
@given(
    st.floats(0.15, 1.0),
    st.floats(0.15, 1.0),
    st.sampled_from([1, 4, 8]),
    st.integers(0, 99),
)
def test_every_budget_is_met_in_multiples(model, channels, macs_left, params_left, multiple, seed):
    importance = np.random.default_rng(seed).random(channels.units)
    full = [len(group) for group in channels.groups]
    macs, params = costs(channels)
    budgets = [
        Budget(macs, macs_left * macs.at(full)),
        Budget(params, params_left * params.at(full)),
    ]
    steps = steps_of(channels, multiple)
    kept = choose_units(channels, importance, budgets, steps=steps)
    small = remove_channels(model, channels, kept)
    assert inspect_model(small).macs <= budgets[0].limit
    assert small.count_params() <= budgets[1].limit
    for group in channels.groups:
        left = kept[group.units]
        assert left.sum() % multiple == 0 or left.all()
        # Of each group the most important stay.
        if not left.all():
            assert importance[group.units][left].min() >= importance[group.units][~left].max()


def test_what_costs_much_and_matters_little_goes_first(channels):
    importance = np.ones(channels.units)
    a, b, _ = channels.groups
    macs, _ = costs(channels)
    full = [len(group) for group in channels.groups]
    budget = [Budget(macs, 0.6 * macs.at(full))]
    importance[b.units] = 1e-6
    kept = counts(channels, choose_units(channels, importance, budget, steps=steps_of(channels, 8)))
    assert kept["a"] == 32
    assert kept["fc1"] == 100
    assert kept["b"] < 48
    importance[b.units], importance[a.units] = 1, 1e-6
    kept = counts(channels, choose_units(channels, importance, budget, steps=steps_of(channels, 8)))
    assert kept["a"] < 32
    assert kept["b"] == 48


def test_of_equally_important_ones_the_costliest_goes_first(channels):
    importance = np.ones(channels.units)
    full = [len(group) for group in channels.groups]
    for cost in costs(channels):
        saved = {
            group.name: cost.at(full) - cost.at([*full[:i], full[i] - 1, *full[i + 1 :]])
            for i, group in enumerate(channels.groups)
        }
        budget = [Budget(cost, cost.at(full) - max(saved.values()))]
        kept = counts(channels, choose_units(channels, importance, budget, steps=STEPS_OF_ONE))
        costliest = max(saved, key=lambda name: saved[name])
        assert [name for name, count in kept.items() if count < SIZES[name]] == [costliest]


def test_a_floor_holds(channels):
    importance = np.ones(channels.units)
    importance[channels.groups[2].units] = 1e-9
    _, params = costs(channels)
    full = [len(group) for group in channels.groups]
    budget = [Budget(params, 0.6 * params.at(full))]
    steps = steps_of(channels, 1)
    assert counts(channels, choose_units(channels, importance, budget, steps=steps))["fc1"] < 60
    kept = choose_units(channels, importance, budget, steps=steps, floor=0.75)
    assert counts(channels, kept)["fc1"] == 75


def test_no_budget_removes_nothing(channels):
    macs, _ = costs(channels)
    full = [len(group) for group in channels.groups]
    budgets = [Budget(macs, macs.at(full))]
    importance = np.zeros(channels.units)
    assert choose_units(channels, importance, budgets, steps=steps_of(channels, 8)).all()


def test_a_budget_out_of_reach_says_how_far_it_goes(channels):
    macs, _ = costs(channels)
    full = [len(group) for group in channels.groups]
    budgets = [Budget(macs, 0.01 * macs.at(full))]
    with pytest.raises(ModelError, match=r"budget of 0\.01 of the macs .* 0\.0\d+ are left"):
        choose_units(channels, np.ones(channels.units), budgets, steps=steps_of(channels, 8))


@pytest.mark.parametrize(
    ("count", "multiple", "expected"),
    [(512, 32, 32), (128, 32, 32), (100, 32, 16), (48, 32, 8), (16, 32, 8), (512, 8, 8), (6, 4, 4)],
)
def test_narrow_groups_are_rounded_finer(count, multiple, expected):
    assert rounding(count, multiple) == expected


FULL = {"macs": 1000.0, "params": 500.0, "latency": 0.01}


class TestRounds:
    def test_costs_fall_by_the_same_factor(self):
        rounds = CompressOptions(macs=0.25, params=0.04).rounds(FULL)
        assert len(rounds) == 3
        assert rounds[-1] == pytest.approx({"macs": 250, "params": 20})
        steps = pairwise([FULL, *rounds])
        shrink = [after["params"] / before["params"] for before, after in steps]
        assert shrink == pytest.approx([0.04 ** (1 / 3)] * 3)
        assert min(shrink) > 1 / 3

    def test_one_is_enough_where_little_is_asked(self):
        assert CompressOptions(macs=0.5).rounds(FULL) == [{"macs": pytest.approx(500)}]
        assert CompressOptions(macs=1.0).rounds(FULL) == [{"macs": pytest.approx(1000)}]

    def test_a_latency_it_has_already(self):
        """Measured again it may take a little longer, and still less than asked."""
        assert CompressOptions(latency=1.0).rounds(FULL) == [{"latency": pytest.approx(1.0)}]

    def test_a_front_goes_down(self):
        rounds = CompressOptions(pareto=(0.2, 0.8)).rounds(FULL)
        assert rounds == [{"macs": 800}, {"macs": 200}]

    @pytest.mark.parametrize(
        ("options", "named"),
        [
            ({}, "no budget"),
            ({"macs": 0}, "macs is 0"),
            ({"macs": 25}, "macs is 25"),
            ({"params": -1}, "params is -1"),
            ({"latency": 0}, "latency is 0"),
            ({"macs": 0.5, "pareto": (0.5,)}, "a front is walked and a budget"),
            ({"pareto": (0.5, 2)}, "0.5, 2"),
            ({"macs": 0.5, "importance": "l2"}, "l2"),
            ({"macs": 0.5, "epochs": 0}, "epochs is 0"),
            ({"macs": 0.5, "seed": -1}, "seed is -1"),
            ({"macs": 0.5, "energy": 0}, "energy is 0"),
        ],
    )
    def test_what_is_out_of_range(self, options, named):
        with pytest.raises(ModelError, match=named):
            CompressOptions(**options)
