"""Whole runs: rounds, the gate, a kill and what comes after, and what is told beforehand."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import cnnedge.compress
from cnnedge.compress import CompressOptions, Platform, Timing, compress
from cnnedge.compress.front import Point, dominated
from cnnedge.errors import CnnEdgeError, DataError, ModelError
from cnnedge.inspect import inspect_model

OPTIONS = CompressOptions(
    macs=0.45, params=0.25, max_drop=100, epochs=2, round_epochs=1, learning_rate=1e-3
)
PLATFORM = Platform(multiple=4)


class StopError(Exception):
    """What stands for a kill."""


def small(dataset):
    return replace(dataset, train=dataset.train.take(200, 0), test=dataset.test.take(100, 0))


def load(path):
    from cnnedge.backends.keras import load_model

    return load_model(path)


@pytest.fixture(scope="module")
def few_digits(digits):
    return small(digits)


@pytest.fixture(scope="module")
def toy(toy_file):
    return load(toy_file)


def run(toy, dataset, out, options=OPTIONS, platform=PLATFORM, **others):
    model, note = toy
    return compress(model, note, dataset, out, options, platform, **others)


@pytest.fixture(scope="module")
def straight(toy, few_digits, tmp_path_factory):
    out = tmp_path_factory.mktemp("straight") / "small.keras"
    return run(toy, few_digits, out)


def same(ours, theirs):
    for a, b in zip(load(ours)[0].get_weights(), load(theirs)[0].get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_reference_that_guesses_is_told(toy, few_digits, straight, tmp_path):
    def blind(batch):
        return np.full((len(batch), 10), 0.1, np.float32)

    options = replace(OPTIONS, macs=0.9, params=None, epochs=1, round_epochs=1)
    result = run(toy, few_digits, tmp_path / "small.keras", options, held_to=blind)
    assert result.guessing.startswith("right for ")
    assert straight.guessing is None


class TestARun:
    def test_the_budgets_are_met_by_what_is_in_the_file(self, toy, straight):
        model, note = load(straight.path)
        assert straight.met
        assert straight.chosen == len(straight.candidates) == 2
        assert inspect_model(model).macs == straight.kept.macs
        assert straight.kept.macs <= 0.45 * inspect_model(toy[0]).macs
        assert model.count_params() == straight.kept.params <= 0.25 * toy[0].count_params()
        assert (note.labels, note.image, note.data) == (toy[1].labels, toy[1].image, "digits")
        assert note.metrics["top1"] == straight.kept.comparison.top1

    def test_it_learned(self, straight):
        """Far more than chance, on images that it was not trained on."""
        assert straight.kept.comparison.top1 > 0.7
        assert straight.kept.comparison.n == 100
        first, last = straight.kept.epochs[0], straight.kept.epochs[-1]
        assert last.loss < first.loss

    def test_the_reference_is_as_it_was(self, toy, toy_file, straight):
        for a, b in zip(toy[0].get_weights(), load(toy_file)[0].get_weights(), strict=True):
            np.testing.assert_array_equal(a, b)

    def test_what_was_removed_is_told_by_layer(self, toy, straight):
        removed = {row["layer"]: row for row in straight.removed()}
        for layer in load(straight.path)[0].layers:
            if hasattr(layer, "kernel"):
                row = removed[layer.name]
                assert row["after"] == layer.kernel.shape[-1] == len(row["kept"])
                assert row["before"] == toy[0].get_layer(layer.name).kernel.shape[-1]
                assert row["kept"] == sorted(set(row["kept"]))
                assert max(row["kept"]) < row["before"]
        assert json.loads(json.dumps(straight.to_dict(), default=str))["met"] is True

    def test_which_channels_are_left_is_true_through_all_rounds(self, toy, few_digits, tmp_path):
        """With a learning rate near 0 they still have the reference's weights."""
        options = replace(OPTIONS, learning_rate=1e-12)
        result = run(toy, few_digits, tmp_path / "x.keras", options)
        kept = {row["layer"]: row["kept"] for row in result.removed()}
        for name in ("conv1", "conv3"):
            ours = load(result.path)[0].get_layer(name).bias
            theirs = np.array(toy[0].get_layer(name).bias)[kept[name]]
            np.testing.assert_allclose(np.array(ours), theirs, atol=1e-6)

    def test_nothing_is_left_but_the_result(self, straight):
        assert [path.name for path in straight.path.parent.iterdir()] == ["small.keras"]

    def test_nothing_asked_nothing_removed(self, toy, few_digits, tmp_path):
        options = replace(OPTIONS, macs=1.0, params=None, epochs=1, learning_rate=1e-12)
        result = run(toy, few_digits, tmp_path / "x.keras", options)
        assert result.kept.params == toy[0].count_params()
        assert result.kept.comparison.max_abs_diff < 1e-5

    def test_the_same_seed_gives_the_same_weights(self, toy, few_digits, tmp_path):
        """With dropout too, whose random numbers Keras would seed anew in every process."""
        import keras
        from keras import layers

        def with_dropout(layer):
            return layers.Dropout(0.3) if layer.name == "flatten" else layer

        stack = [copy for layer in toy[0].layers for copy in (layer, with_dropout(layer))]
        model = keras.Sequential([keras.Input((32, 32, 3)), *dict.fromkeys(stack)])
        options = replace(OPTIONS, params=None)
        first = run((model, toy[1]), few_digits, tmp_path / "a.keras", options)
        again = run((model, toy[1]), few_digits, tmp_path / "b.keras", options)
        assert any(isinstance(layer, layers.Dropout) for layer in load(first.path)[0].layers)
        same(first.path, again.path)


class TestTheGate:
    def test_the_smallest_that_holds_is_kept(self, toy, few_digits, tmp_path, monkeypatch):
        """Round 2 is made to fail, round 1 to hold."""
        real, seen = cnnedge.compress.compare, []

        def compare(found, reference, targets):
            seen.append(len(seen))
            comparison = real(found, reference, targets)
            return (
                replace(comparison, lost=50, won=0)
                if len(seen) == 1
                else replace(comparison, lost=0, won=0)
            )

        monkeypatch.setattr(cnnedge.compress, "compare", compare)
        result = run(toy, few_digits, tmp_path / "x.keras", replace(OPTIONS, max_drop=5))
        assert (result.chosen, result.met) == (1, False)
        assert load(result.path)[0].count_params() == result.candidates[0].params
        assert result.candidates[1].comparison.drop == 50

    def test_the_reference_is_kept_where_none_holds(self, toy, few_digits, tmp_path, monkeypatch):
        real = cnnedge.compress.compare
        monkeypatch.setattr(
            cnnedge.compress, "compare", lambda *a: replace(real(*a), lost=len(a[2]), won=0)
        )
        result = run(toy, few_digits, tmp_path / "x.keras", replace(OPTIONS, max_drop=5))
        assert (result.chosen, result.met) == (0, False)
        same_model = load(result.path)[0]
        for a, b in zip(same_model.get_weights(), toy[0].get_weights(), strict=True):
            np.testing.assert_array_equal(a, b)


class TestStoppedAndResumed:
    @pytest.mark.parametrize("after", [1, 2, 3])
    def test_it_ends_where_the_straight_one_did(self, toy, few_digits, straight, tmp_path, after):
        """After round 1, and in the midst and at the end of round 2."""
        seen = []

        def stop(report):
            seen.append(report)
            if len(seen) == after:
                raise StopError

        out = tmp_path / "small.keras"
        with pytest.raises(StopError):
            run(toy, few_digits, out, on_epoch=stop)
        assert not out.exists()
        resumed = []
        result = run(toy, few_digits, out, resume=True, on_epoch=resumed.append)
        assert len(resumed) == 3 - after
        same(straight.path, result.path)
        assert result.removed() == straight.removed()
        assert result.kept.comparison == straight.kept.comparison

    def test_a_round_that_was_saved_is_not_repeated(self, toy, few_digits, straight, tmp_path):
        def stop(candidate):
            raise StopError

        out = tmp_path / "small.keras"
        with pytest.raises(StopError):
            run(toy, few_digits, out, on_round=stop)
        resumed = []
        result = run(toy, few_digits, out, resume=True, on_epoch=resumed.append)
        assert [report.round for report in resumed] == [2, 2]
        same(straight.path, result.path)

    def test_a_killed_process_resumes(self, toy, toy_file, few_digits, straight, tmp_path):
        """A real SIGKILL, in the midst of an epoch of the last round."""
        code = (
            "import os, signal, sys\n"
            "sys.path.insert(0, 'tests/compress')\n"
            "from cnnedge.data import open_source\n"
            "from test_compress import *\n"
            "def tell(task, done, total):\n"
            "    if task == 'round 2' and done == 9: os.kill(os.getpid(), signal.SIGKILL)\n"
            f"run(load({str(toy_file)!r}), small(open_source('digits')),"
            f" {str(tmp_path / 'small.keras')!r}, progress=tell)"
        )
        root = Path(__file__).parents[2]
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=root, capture_output=True, text=True
        )
        assert done.returncode == -signal.SIGKILL, done.stderr
        assert [path.name for path in tmp_path.iterdir()] == ["small.ckpt"]
        result = run(toy, few_digits, tmp_path / "small.keras", resume=True)
        same(straight.path, result.path)

    @pytest.fixture(scope="class")
    def stopped(self, toy, few_digits, tmp_path_factory):
        folder = tmp_path_factory.mktemp("stopped")

        def stop(report):
            raise StopError

        with pytest.raises(StopError):
            run(toy, few_digits, folder / "small.keras", on_epoch=stop)
        return folder

    @pytest.fixture
    def stopped_copy(self, stopped, tmp_path):
        return Path(shutil.copytree(stopped, tmp_path / "copy")) / "small.keras"

    @pytest.mark.parametrize(
        ("options", "platform", "named"),
        [
            (replace(OPTIONS, macs=0.5), PLATFORM, r"macs \(0\.45 there, 0\.5 now\)"),
            (replace(OPTIONS, seed=1), PLATFORM, "seed"),
            (OPTIONS, Platform(8), "multiple"),
        ],
        ids=["macs", "seed", "multiple"],
    )
    def test_other_options_are_named(self, toy, few_digits, stopped_copy, options, platform, named):
        with pytest.raises(ModelError, match=f"of another run, with another {named}"):
            run(toy, few_digits, stopped_copy, options, platform, resume=True)

    def test_another_model_is_told(self, toy, few_digits, stopped_copy):
        import keras

        other = keras.models.clone_model(toy[0])
        with pytest.raises(ModelError, match="another weights"):
            run((other, toy[1]), few_digits, stopped_copy, resume=True)

    @pytest.mark.parametrize("file", ["state.npz", "round-1.keras", "round-0.keras"])
    def test_a_damaged_checkpoint_is_told(self, toy, few_digits, stopped_copy, file):
        path = stopped_copy.with_suffix(".ckpt") / file
        path.write_bytes(path.read_bytes()[:200])
        if file == "round-0.keras":  # read where no round holds, and not before
            run(toy, few_digits, stopped_copy, resume=True)
            return
        with pytest.raises(ModelError, match=rf"{file} is (damaged|not a whole)"):
            run(toy, few_digits, stopped_copy, resume=True)

    def test_a_resumed_run_rounds_as_it_did(self, stopped_copy, tmp_path):
        assert cnnedge.compress.resumed_multiple(stopped_copy) == 4
        with pytest.raises(ModelError, match="there is no checkpoint"):
            cnnedge.compress.resumed_multiple(tmp_path / "other.keras")

    def test_nothing_to_resume_from(self, toy, few_digits, tmp_path):
        with pytest.raises(ModelError, match="there is no checkpoint"):
            run(toy, few_digits, tmp_path / "x.keras", resume=True)

    def test_starting_anew_forgets_the_old_run(self, toy, few_digits, straight, stopped_copy):
        result = run(toy, few_digits, stopped_copy)
        same(straight.path, result.path)


class TestOtherWays:
    def test_without_data_the_smallest_weights_go(self, toy, tmp_path):
        result = run(toy, None, tmp_path / "x.keras", replace(OPTIONS, params=None))
        model, note = load(result.path)
        assert inspect_model(model).macs <= 0.45 * inspect_model(toy[0]).macs
        assert result.kept.comparison is None
        assert note.metrics == {}
        row = next(row for row in result.removed() if row["layer"] == "conv3")
        norms = np.abs(np.array(toy[0].get_layer("conv3").kernel)).sum(axis=(0, 1, 2))
        assert row["kept"] == sorted(np.argsort(-norms)[: row["after"]].tolist())
        ours = np.array(model.get_layer("conv3").bias)  # as they were: nothing was learned
        np.testing.assert_array_equal(ours, np.array(toy[0].get_layer("conv3").bias)[row["kept"]])

    def test_l1_with_data_learns(self, toy, few_digits, tmp_path):
        options = replace(OPTIONS, importance="l1", epochs=6)
        result = run(toy, few_digits, tmp_path / "x.keras", options)
        assert result.kept.comparison.top1 > 0.7

    def test_a_latency_is_measured_until_it_holds(self, toy, few_digits, tmp_path):
        """On a machine that takes 1 ns for a multiply-accumulate and 0.2 ms for nothing at all."""
        timed = []

        def time(network):
            macs = inspect_model(network).macs
            timed.append(2e-4 + 1e-9 * macs)
            # It tells the layers' times wrongly, as a profile does.
            layers = {row.name: 1.4e-9 * row.macs for row in inspect_model(network).layers}
            return Timing(timed[-1], layers)

        options = replace(OPTIONS, macs=None, params=None, latency=1.2e-3)
        result = run(toy, few_digits, tmp_path / "x.keras", options, Platform(4, time))
        assert timed[0] > 1.9e-3
        assert 0.8 * 1.2e-3 < result.kept.seconds <= 1.2e-3

    def test_a_latency_that_no_network_reaches(self, toy, few_digits, tmp_path):
        platform = Platform(4, lambda network: Timing(1e-3, {"conv1": 5e-4, "conv2": 5e-4}))
        options = replace(OPTIONS, macs=None, params=None, latency=5e-4)
        with pytest.raises(ModelError, match=r"none answers within 0\.5 ms|cannot be met"):
            run(toy, few_digits, tmp_path / "x.keras", options, platform)

    def test_a_front_keeps_every_point(self, toy, few_digits, tmp_path):
        options = CompressOptions(pareto=(0.4, 0.8), max_drop=100, epochs=1)
        result = run(toy, few_digits, tmp_path / "f.keras", options)
        assert [path.name for path in result.points] == ["f.macs-0.8.keras", "f.macs-0.4.keras"]
        full = inspect_model(toy[0]).macs
        for path, share in zip(result.points, (0.8, 0.4), strict=True):
            assert inspect_model(load(path)[0]).macs <= share * full
        assert [c.comparison is not None for c in result.candidates] == [True, True]
        same(result.path, result.points[-1])

    def test_split_layers_are_pruned_and_told(self, toy, few_digits, tmp_path):
        options = replace(OPTIONS, low_rank=True, tucker=True, energy=0.5)
        platform = Platform(4, faster=lambda *case: True)
        result = run(toy, few_digits, tmp_path / "x.keras", options, platform)
        names = {layer.name for layer in load(result.path)[0].layers}
        assert "fc1_in" in names
        assert {name for name in names if name.endswith("_core")}
        assert any(line.startswith("fc1 split at rank") for line in result.kept.splits)
        assert result.kept.comparison.top1 > 0.5

    def test_a_loss_that_is_no_number_says_so(self, toy, few_digits, tmp_path):
        options = replace(OPTIONS, learning_rate=1e30)
        with pytest.raises(ModelError, match="no longer a number"):
            run(toy, few_digits, tmp_path / "x.keras", options)
        assert not list(tmp_path.iterdir())


class TestToldBeforehand:
    @pytest.fixture(autouse=True)
    def no_training(self, monkeypatch):
        def forbid(*arguments, **options):
            raise AssertionError("training began")

        monkeypatch.setattr(cnnedge.compress, "run_epoch", forbid)

    def test_a_budget_out_of_reach(self, toy, few_digits, tmp_path):
        with pytest.raises(ModelError, match="cannot be met"):
            run(toy, few_digits, tmp_path / "x.keras", replace(OPTIONS, macs=0.001))
        assert not list(tmp_path.iterdir())

    def test_a_place_that_cannot_be_written(self, toy, few_digits, tmp_path):
        (tmp_path / "file").touch()
        with pytest.raises(CnnEdgeError, match="cannot write"):
            run(toy, few_digits, tmp_path / "file" / "x.keras")
        with pytest.raises(ModelError, match=r"does not end in \.keras"):
            run(toy, few_digits, tmp_path / "x.h5")
        (tmp_path / "x.ckpt").touch()
        with pytest.raises(ModelError, match=r"x\.ckpt is a file"):
            run(toy, few_digits, tmp_path / "x.keras")

    def test_a_full_disk(self, toy, few_digits, tmp_path, monkeypatch):
        usage = shutil.disk_usage(tmp_path)._replace(free=1000)
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
        with pytest.raises(CnnEdgeError, match="compressing there needs"):
            run(toy, few_digits, tmp_path / "x.keras")

    def test_nothing_that_can_go(self, toy, few_digits, tmp_path):
        import keras
        from keras import layers

        image = keras.Input((32, 32, 3))
        x = layers.Conv2D(4, 3, groups=1, name="c")(image)
        x = layers.LayerNormalization(name="norm")(x)
        model = keras.Model(image, layers.Dense(10)(layers.Flatten()(x)), name="stuck")
        with pytest.raises(ModelError, match=r"no channel of 'stuck' can be removed: norm"):
            run((model, toy[1]), few_digits, tmp_path / "x.keras")

    def test_too_few_images_to_hold_some_back(self, toy, digits, tmp_path):
        with pytest.raises(DataError, match="too few"):
            few = replace(digits, train=digits.train.take(10, 0))
            run(toy, few, tmp_path / "x.keras")
        assert not list(tmp_path.glob("*.keras"))


def test_the_front_is_what_nothing_beats():
    def point(latency, size, top1):
        return Point("x", "int8", latency, size, top1, 0.0, (0.0, 0.0))

    best, small_, slow, worse = (
        *(point(1.0, 10, 0.99), point(0.5, 5, 0.95)),
        *(point(2.0, 20, 0.99), point(0.6, 6, 0.94)),
    )
    points = [best, small_, slow, worse, replace(best)]
    assert [dominated(p, points) for p in points] == [False, False, True, True, False]
