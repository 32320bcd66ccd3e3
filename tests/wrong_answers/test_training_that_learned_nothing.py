"""Training stayed at the loss of a network that sees nothing, and ended with exit code 0."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from click.testing import CliRunner
from conftest import SIZE

from cnnedge.chance import Chance, against_chance, better, binomial_tail
from cnnedge.comparison import judge
from cnnedge.data import Dataset, Split
from cnnedge.train import EpochReport, TrainOptions, train_model

pytest.importorskip("keras")
from cnnedge.cli import main
from cnnedge.train.plateau import Blind, findings

pytestmark = pytest.mark.tf

MODEL = "alexnet_v2"  # the smallest of the built-in ones
LN4 = float(np.log(4))


class StopError(Exception):
    """What stands for a kill."""


# --- better than guessing? ---------------------------------------------------------------------


def test_a_model_that_always_says_the_same_guesses_however_common_that_class_is():
    targets = np.repeat([0, 1], [900, 100])
    always = against_chance(np.zeros(1000, int), targets)
    assert (always.accuracy, always.guess, always.at_chance) == (0.9, 0.9, True)
    finds_some = np.where(np.arange(1000) >= 960, 1, 0)  # 40 of the rare 100, and no false alarm
    assert not against_chance(finds_some, targets).at_chance


@pytest.mark.parametrize("classes", [2, 3, 8, 1000])
def test_blind_answers_guess_and_right_ones_do_not(classes):
    rng = np.random.default_rng(0)
    targets = np.arange(max(80, classes)) % classes
    found = [against_chance(rng.permutation(targets), targets).at_chance for _ in range(200)]
    assert np.mean(found) >= 0.97  # at a level of 1 %
    assert not against_chance(targets, targets).at_chance
    weak = np.where(rng.random(len(targets)) < 0.6, targets, rng.permutation(targets))
    assert not against_chance(weak, targets).at_chance


def test_few_images_prove_nothing_against_a_model_that_is_often_right():
    assert not Chance(6, 4, 1 / 3).at_chance
    assert Chance(6, 2, 1 / 3).at_chance
    assert not Chance(5, 5, 1.0).at_chance  # one class: nobody can tell
    assert Chance(80, 10, 1 / 8).at_chance


def test_the_binomial_tail_is_the_sum_of_its_terms():
    assert binomial_tail(2, 3, 0.5) == pytest.approx(0.5)
    assert binomial_tail(3, 3, 0.5) == pytest.approx(0.125)
    assert binomial_tail(0, 3, 0.5) == 1.0
    assert binomial_tail(1, 10_000, 0.0) == 0.0
    assert binomial_tail(5_000, 10_000, 0.5) == pytest.approx(0.504, abs=1e-3)


def test_answers_are_better_where_chance_does_not_explain_it():
    right = np.ones(20, bool)
    assert better(right, np.arange(20) >= 7)
    assert not better(right, np.arange(20) >= 6)
    assert not better(np.arange(20) >= 7, right)


# --- what training tells -----------------------------------------------------------------------


def report(epoch, loss, accuracy, val_accuracy):
    return EpochReport(epoch, 9, loss, accuracy, loss, val_accuracy, 1.0)


BLIND = Blind(loss=LN4, share=0.25, images=40, steps=20)
KNOWS = Chance(80, 70, 0.25)


@pytest.mark.parametrize(
    ("losses", "steps", "unmoved"),
    [
        ([LN4, LN4], 20, True),
        ([1.4, 1.375], 20, True),  # within 1 %
        ([1.4, 1.36], 20, False),
        ([2.0, 1.9], 20, True),  # worse than blind
        ([LN4], 20, False),  # an epoch is too few
        ([LN4, LN4], 5, False),  # and so are ten steps
        ([LN4] * 4, 5, True),
    ],
)
def test_a_loss_that_stays_is_seen(losses, steps, unmoved):
    history = [report(i, loss, 0.25, 0.25) for i, loss in enumerate(losses, 1)]
    assert replace(BLIND, steps=steps).unmoved(history) == unmoved


def test_a_high_loss_of_a_model_that_is_often_right_is_no_plateau():
    assert not BLIND.unmoved([report(1, 1.5, 0.3, 0.5), report(2, 1.5, 0.4, 0.7)])


def test_what_is_learned_by_heart_is_told_in_a_line():
    history = [report(3, 0.9, 0.6, 0.65), report(4, 0.1, 0.99, 0.6)]
    (line,) = findings(history, BLIND, KNOWS)
    assert line.startswith("learned by heart: in epoch 4 99.0% of the training images")
    assert "more images" in line
    assert "(the best was 3)" in line
    assert findings([report(1, 0.1, 0.99, 0.9)], BLIND, KNOWS) == []
    few = replace(BLIND, images=4)  # of which one more wrong is no proof
    assert findings([report(1, 0.3, 0.9, 0.65)], few, KNOWS) == []


# --- what training does ------------------------------------------------------------------------


def stripes(seed):
    """Four directions of faint stripes on noise, which Glorot's weights do not find."""
    rng = np.random.default_rng(seed)
    rows, columns = np.mgrid[:64, :64]

    def part(name, each):
        targets = np.repeat(np.arange(4), each)
        pixels = np.empty((len(targets), 64, 64, 3), np.uint8)
        for index, angle in enumerate(np.pi * targets / 4):
            across = columns * np.cos(angle) + rows * np.sin(angle)
            wave = 10 * np.sin(across * 2 * np.pi / 8 + rng.uniform(0, 6.28))
            noise = rng.normal(0, 10, (64, 64, 3))
            pixels[index] = np.clip(rng.uniform(60, 200) + wave[..., None] + noise, 0, 255)
        return Split(name, pixels, targets)

    return Dataset(
        "stripes", "stripes", tuple("abcd"), part("train", 60), part("c", 4), part("t", 20)
    )


OPTIONS = TrainOptions(epochs=7, batch_size=16, image_size=(64, 64), augment=False)


@pytest.fixture(scope="module")
def data():
    return stripes(0)


@pytest.fixture(scope="module")
def learned(data, tmp_path_factory):
    out = tmp_path_factory.mktemp("stripes") / "m.keras"
    lines = []
    return train_model(MODEL, data, out, OPTIONS, on_retry=lines.append), lines


def test_training_that_stays_starts_again_and_leaves_the_plateau(learned):
    from cnnedge.backends.keras import load_model

    result, lines = learned
    assert [line.partition(" cost")[0] for line in lines] == [
        f"the loss stayed at {result.history[1].loss:.3f}, and answers that ignore the image"
    ]
    assert result.retry["after_epoch"] == 2
    assert (result.retry["initialisation"], result.retry["normalization"]) == ("He's", "tf")
    assert [epoch.epoch for epoch in result.history] == [1, 2, 3, 4, 5, 6, 7]
    assert min(epoch.loss for epoch in result.history[2:]) < 0.99 * LN4
    assert result.best_epoch > 2
    assert (result.at_chance, result.warnings) == (False, ())
    assert load_model(result.path)[1].normalization == "tf"
    written = json.loads(result.path.with_suffix(".history.json").read_text())
    assert written["result"]["retry"] == result.retry


def test_a_killed_run_that_starts_again_ends_where_it_would_have(data, learned, tmp_path):
    """Killed before the second start, and again after it."""
    from cnnedge.backends.keras import load_model

    def stop(report):
        if report.epoch in (2, 4):
            raise StopError

    for resume in (False, True):
        with pytest.raises(StopError):
            train_model(MODEL, data, tmp_path / "m.keras", OPTIONS, resume=resume, on_epoch=stop)
    result = train_model(MODEL, data, tmp_path / "m.keras", OPTIONS, resume=True)
    assert result.retry == learned[0].retry
    assert [replace(r, seconds=0) for r in result.history] == [
        replace(r, seconds=0) for r in learned[0].history
    ]
    ours, theirs = load_model(result.path)[0], load_model(learned[0].path)[0]
    for a, b in zip(ours.get_weights(), theirs.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)


# --- a model that guesses ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def noise(tmp_path_factory):
    """Class folders that differ in nothing."""
    from PIL import Image

    rng, root = np.random.default_rng(0), tmp_path_factory.mktemp("noise") / "noise"
    for name in "abc":
        (root / name).mkdir(parents=True)
        for number in range(40):
            pixels = rng.integers(0, 256, (SIZE, SIZE, 3), np.uint8)
            Image.fromarray(pixels).save(root / name / f"{number:02}.png")
    return root


def run(*arguments):
    return CliRunner().invoke(main, [str(a) for a in arguments])


@pytest.fixture(scope="module")
def guesser(noise):
    """What `cnnedge train` did with them, and the file that it wrote."""
    out = noise.parent / "m.keras"
    done = run(
        *("train", MODEL, "--data", noise, "-o", out, "--image-size", "64,64", "--epochs", 4),
        *("--batch-size", 8, "--json"),
    )
    return done, out


def test_a_model_that_guesses_ends_with_exit_code_3(guesser):
    done, out = guesser
    assert done.exit_code == 3, done.output
    assert out.is_file()
    result = json.loads(done.stdout)
    assert result["at_chance"] is True
    assert result["retry"]["after_epoch"] == 2
    warned = [line for line in done.stderr.splitlines() if line.startswith("warning: ")]
    assert any("starting again with He's" in line for line in warned)
    assert any("no better than guessing" in line for line in warned)
    (error,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert "it guesses" in error
    assert "--learning-rate" in error


@pytest.fixture(scope="module")
def bundle(guesser, noise):
    recipe = noise.parent / "r.toml"
    recipe.write_text('model = "m.keras"\nprecision = ["fp32", "fp16"]\nbench_seconds = 0.05\n')
    done = run("export", recipe, "-o", noise.parent / "bundle")
    return done, noise.parent / "bundle"


def test_a_bundle_of_a_model_that_guesses_says_so_and_boasts_of_nothing(bundle):
    done, root = bundle
    manifest = json.loads((root / "manifest.json").read_text())
    assert "warning: alexnet_v2 itself is no better than guessing: right for" in done.stderr
    assert "The model itself is no better than guessing" in done.stdout
    assert "× " not in done.stdout.partition("verdict")[2].partition("AMD")[0]
    assert "where guessing gives" in manifest["reference"]["guessing"]
    for variant in manifest["variants"]:
        assert variant["verdict"]["status"] != "passed"
        assert "guessing" in variant["verdict"]["reason"]
    assert not manifest["variants"][1]["recommendation"]["recommended"]
    page = (root / "report.html").read_text()
    assert "The model itself is no better than guessing" in page


def test_verify_and_bench_say_it_too(bundle, noise):
    root = bundle[1]
    found = run("verify", root, "--data", noise)
    assert "not judged: the model itself is no better than guessing" in found.stdout
    for data in (("--data", noise), ()):
        done = run(
            *("bench", root, *data, "--runtime", "cpu", "--json", "--seconds", 0.1, "--rounds", 1),
            *("--scenarios", "single-stream"),
        )
        model = json.loads(done.stdout)["models"][0]
        assert "where guessing gives" in model["guessing"]
        assert model["pick"]["name"] is None
        assert "no better than guessing" in model["pick"]["why"]


def test_no_verdict_is_passed_on_a_model_that_guesses():
    from cnnedge.comparison import compare

    answers = np.eye(2, dtype=np.float32)[np.zeros(400, int)]
    found = compare(answers, answers, np.arange(400) % 2)
    given = {"precision": "fp32", "max_drop": 5.0, "achieved": {"macs": {"float32": 1.0}}}
    assert judge(found, trained=True, **given).status == "passed"
    assert judge(found, trained=True, guessing="as a coin", **given).status == "not judged"
