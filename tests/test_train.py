"""Training: what the network sees, what is kept, and that a killed run ends where it would have."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from collections import namedtuple
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from cnnedge.data import Split, stream
from cnnedge.data.stream import Stream, augment
from cnnedge.errors import CnnEdgeError, DataError, ImageError, MissingExtraError, ModelError
from cnnedge.image import NORMALIZATIONS, ImageContract, normalize
from cnnedge.train import EpochReport, TrainOptions, learner, train_model
from cnnedge.train.history import best_epoch
from cnnedge.train.learner import Learner

pytestmark = pytest.mark.tf

MODEL = "alexnet_v2"  # the smallest of the built-in ones
OPTIONS = TrainOptions(epochs=4, batch_size=32, image_size=(64, 64), seed=3, learning_rate=1e-3)
CONTRACT = ImageContract(16, 16)


class StopError(Exception):
    """What stands for a kill."""


def small(dataset):
    return replace(dataset, train=dataset.train.take(200, 0), test=dataset.test.take(50, 0))


@pytest.fixture(scope="module")
def few_digits(digits):
    return small(digits)


@pytest.fixture(scope="module")
def straight(few_digits, tmp_path_factory):
    """A run that nothing disturbed, its result and what it left."""
    out = tmp_path_factory.mktemp("straight") / "m.keras"
    seen = []
    result = train_model(MODEL, few_digits, out, OPTIONS, on_epoch=seen.append)
    return result, seen


@pytest.fixture(scope="module")
def stopped(few_digits, tmp_path_factory):
    """The folder of the same run stopped after two of its epochs."""
    folder = tmp_path_factory.mktemp("stopped")

    def stop(report):
        if report.epoch == 2:
            raise StopError

    with pytest.raises(StopError):
        train_model(MODEL, few_digits, folder / "m.keras", OPTIONS, on_epoch=stop)
    return folder


@pytest.fixture
def stopped_copy(stopped, tmp_path):
    return Path(shutil.copytree(stopped, tmp_path / "copy")) / "m.keras"


def weights(path):
    from cnnedge.backends.keras import load_model

    return load_model(path)[0].get_weights()


def forbid(*arguments):
    raise AssertionError("it trained")


def without_seconds(history):
    return [replace(report, seconds=0) for report in history]


def make_stream(split, contract=CONTRACT, normalization="none", *, seed=0, **options):
    settings = {"batch_size": 32, "augmented": False} | options
    return Stream(split, contract, normalization, seed=seed, **settings)


def drain(batches):
    parts = [(images.numpy(), targets.numpy()) for images, targets in batches]
    return tuple(np.concatenate(column) for column in zip(*parts, strict=True))


# --- what the network sees --------------------------------------------------------------------


def test_validation_is_a_stratified_tenth_of_the_train_split(digits):
    made = make_stream(digits.train)
    both = np.concatenate([made.train_at, made.validation_at])
    np.testing.assert_array_equal(np.sort(both), np.arange(len(digits.train)))
    counts = np.bincount(digits.train.targets[made.validation_at], minlength=10)
    of_all = np.bincount(digits.train.targets, minlength=10)
    assert np.abs(counts - of_all / 10).max() <= 1
    other = make_stream(digits.train, seed=1)
    assert not np.array_equal(made.validation_at, other.validation_at)


def test_an_epoch_has_every_training_image_once_and_its_own_order(few_digits):
    made = make_stream(few_digits.train)
    # One pixel is enough to tell which image it is, if it is made to.
    marked = np.zeros((200, 16, 16, 3), np.uint8)
    marked[:, 0, 0, 0] = np.arange(200)
    made._pixels = marked
    first, targets = drain(made.training(1))
    second, _ = drain(made.training(2))
    again, _ = drain(made.training(1))
    at = first[:, 0, 0, 0].astype(int)
    np.testing.assert_array_equal(np.sort(at), made.train_at)
    np.testing.assert_array_equal(targets, few_digits.train.targets[at])
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, second)
    assert len(list(made.training(1))) == len(made)


@pytest.mark.parametrize("name", NORMALIZATIONS)
def test_the_graph_normalizes_as_numpy_does(few_digits, name):
    rng = np.random.default_rng(0)
    colours = rng.integers(0, 256, (200, 16, 16, 3), np.uint8)
    split = Split("train", colours, few_digits.train.targets)
    made = make_stream(split, normalization=name)
    images, targets = drain(made.validation())
    np.testing.assert_allclose(images, normalize(colours[made.validation_at], name), atol=1e-5)
    np.testing.assert_array_equal(targets, split.targets[made.validation_at])


def test_images_that_do_not_fit_into_memory_are_the_same(few_digits):
    kept = make_stream(few_digits.train, augmented=True)
    streamed = make_stream(few_digits.train, augmented=True, memory_budget=1000)
    assert kept._pixels is not None
    assert streamed._pixels is None
    for a, b in zip(drain(kept.training(5)), drain(streamed.training(5)), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_file_that_breaks_during_training_is_named(few_digits, tmp_path):
    items = [tmp_path / f"{i}.png" for i in range(200)]
    made = make_stream(Split("train", items, few_digits.train.targets), memory_budget=0)
    with pytest.raises(ImageError, match=r"\d+\.png"):
        list(made.training(1))


def test_augmentation_belongs_to_the_image_and_the_epoch(few_digits):
    """Not to the place in the order or the batch size, which another order would change."""
    narrow = make_stream(few_digits.train, augmented=True, batch_size=7)
    wide = make_stream(few_digits.train, augmented=True, batch_size=64)
    pair = drain(narrow.training(1))[0], drain(wide.training(1))[0]
    np.testing.assert_allclose(*pair, atol=1e-3)  # a cosine's last bit may depend on the batch
    one_image = np.repeat(few_digits.train.tensor(0, CONTRACT)[None], 200, axis=0)
    split = Split("train", one_image, few_digits.train.targets)
    made = make_stream(split, augmented=True)
    varied, _ = drain(made.training(1))
    assert len(np.unique(varied, axis=0)) == len(varied)
    later, _ = drain(made.training(2))
    assert len(np.unique(np.concatenate([varied, later]), axis=0)) == 2 * len(varied)


def test_augment_without_draws_changes_nothing():
    images = np.random.default_rng(0).uniform(0, 255, (2, 20, 30, 3)).astype(np.float32)
    np.testing.assert_allclose(augment(images, np.zeros((2, 6), np.float32)), images, atol=1e-3)


@pytest.mark.parametrize(
    ("draw", "expected"),
    [
        (2, (50 - 100 * stream.SHIFT, 80)),  # the source is taken from below: up it goes
        (3, (50, 80 - 200 * stream.SHIFT)),
        (1, (50, 99.5 + (80 - 99.5) * (1 + stream.ZOOM))),
        # Counter-clockwise about (49.5, 99.5): what is left of it goes down.
        (0, (49.5 + 19.5 * np.sin(stream.ROTATION) + 0.5, 99.5 - 19.5 * np.cos(stream.ROTATION))),
    ],
    ids=["down", "right", "zoom", "turn"],
)
def test_augment_moves_a_dot_as_far_as_it_says(draw, expected):
    image = np.zeros((1, 100, 200, 1), np.float32)
    image[0, 49:52, 79:82] = 255
    draws = np.zeros((1, 6), np.float32)
    draws[0, draw] = 1
    moved = augment(image, draws).numpy()[0, ..., 0]
    rows, columns = np.indices(moved.shape)
    found = (rows * moved).sum() / moved.sum(), (columns * moved).sum() / moved.sum()
    assert found == pytest.approx(expected, abs=0.4)


def test_augment_repeats_the_edge():
    """A grey image stays grey: nothing black comes in from outside."""
    draws = np.random.default_rng(0).uniform(-1, 1, (50, 6)).astype(np.float32)
    draws[:, 4:] = 0
    varied = augment(np.full((50, 16, 24, 3), 77, np.float32), draws)
    np.testing.assert_allclose(varied, 77, atol=1e-3)


def test_augment_never_mirrors():
    """Whatever is drawn, the image stays closer to itself than to its mirror images."""
    image = np.zeros((1, 48, 48, 1), np.float32)
    image[0, 8:40, 8:14] = image[0, 8:14, 8:36] = image[0, 20:26, 8:28] = 255  # an F
    draws = np.random.default_rng(0).uniform(-1, 1, (300, 6)).astype(np.float32)
    varied = augment(np.repeat(image, 300, 0), draws).numpy()
    assert varied.min() >= 0
    assert varied.max() <= 255

    def distance(other):
        return ((varied - other) ** 2).mean(axis=(1, 2, 3))

    for mirrored in (image[:, ::-1], image[:, :, ::-1]):
        assert (distance(image) < distance(mirrored)).all()


def test_brightness_and_contrast_do_what_they_say():
    image = np.full((1, 8, 8, 3), 100, np.float32)
    image[0, :4] = 140
    draws = np.zeros((3, 6), np.float32)
    draws[1, 4] = draws[2, 5] = 1
    plain, brighter, contrasted = augment(np.repeat(image, 3, 0), draws).numpy()
    np.testing.assert_allclose(brighter - plain, stream.BRIGHTNESS, atol=1e-3)
    np.testing.assert_allclose(np.ptp(contrasted), 40 * (1 + stream.CONTRAST), atol=1e-3)
    assert contrasted.mean() == pytest.approx(plain.mean(), abs=1e-2)


# --- what is kept -----------------------------------------------------------------------------


def test_a_run_leaves_a_model_that_answers_as_it_says(straight, few_digits):
    from cnnedge.backends.keras import load_model, predict

    result, seen = straight
    model, note = load_model(result.path)
    assert (note.model, note.weights, note.data, note.seed) == (MODEL, "trained", "digits", 3)
    assert note.labels == few_digits.labels
    assert note.image == ImageContract(64, 64)
    assert note.metrics == {"top1": result.top1, "top5": result.top5, "test_images": 50}
    ((images, targets),) = few_digits.test.batches(note.image, 50)
    right = predict(model, images, note.normalization).argmax(1) == targets
    assert right.mean() == result.top1
    assert result.top1 <= result.top5 <= 1
    assert result.history == tuple(seen)
    assert [report.epoch for report in seen] == [1, 2, 3, 4]
    assert seen[-1].loss < seen[0].loss
    assert (result.epochs_run, result.stopped_early, result.test_images) == (4, False, 50)
    assert result.parameters == sum(w.size for w in model.get_weights())


def test_a_run_leaves_its_history_and_no_checkpoint(straight):
    result, _ = straight
    folder = result.path.parent
    names = {"m.keras", "m.history.json", "m.history.png"}
    assert {path.name for path in folder.iterdir()} == names
    written = json.loads((folder / "m.history.json").read_text())
    assert written["result"] == json.loads(json.dumps(result.to_dict()))
    assert (written["run"]["seed"], written["run"]["learning_rate"]) == (3, 1e-3)
    assert (folder / "m.history.png").read_bytes().startswith(b"\x89PNG")


def scripted(monkeypatch, script):
    """Let the epochs end with these validation accuracies, and each leave its number as weights."""

    def run_epoch(self, epoch, epochs, stream, progress):
        self.model.set_weights([np.full_like(w, epoch) for w in self.model.get_weights()])
        accuracy = script[epoch - 1]
        return EpochReport(epoch, epochs, accuracy, accuracy, 1.0, accuracy, 1.0)

    monkeypatch.setattr(Learner, "run_epoch", run_epoch)


def test_patience_stops_and_the_best_epoch_is_kept(few_digits, tmp_path, monkeypatch):
    scripted(monkeypatch, [0.5, 0.8, 0.7, 0.8, 0.9])
    options = replace(OPTIONS, epochs=5, patience=2)
    result = train_model(MODEL, few_digits, tmp_path / "m.keras", options)
    assert (result.epochs_run, result.best_epoch, result.stopped_early) == (4, 2, True)
    assert all((w == 2).all() for w in weights(result.path))


def test_a_loss_that_is_no_number_saves_the_best_so_far(few_digits, tmp_path, monkeypatch):
    scripted(monkeypatch, [0.5, 0.4, float("nan")])
    with pytest.raises(ModelError, match=r"in epoch 3; .* epoch 1 are in .*best\.keras.* 0\.0001"):
        train_model(MODEL, few_digits, tmp_path / "m.keras", OPTIONS)
    assert [path.name for path in tmp_path.iterdir()] == ["m.best.keras"]
    assert all((w == 1).all() for w in weights(tmp_path / "m.best.keras"))


def test_a_learning_rate_far_too_high_is_told(few_digits, tmp_path):
    options = replace(OPTIONS, learning_rate=1e30)
    with pytest.raises(ModelError, match=r"in epoch 1; no epoch .*below 1e\+30"):
        train_model(MODEL, few_digits, tmp_path / "m.keras", options)
    assert not list(tmp_path.iterdir())


def test_mixed_precision_saves_a_float32_model(few_digits, tmp_path, monkeypatch):
    import keras

    from cnnedge.backends.keras import load_model

    monkeypatch.setattr(learner, "precision", lambda: "mixed_float16")
    monkeypatch.setattr("cnnedge.train.precision", lambda: "mixed_float16")
    computed = []
    measure = learner._mean

    def spy(step, batches, on_batch):
        computed.append(step)
        return measure(step, batches, on_batch)

    monkeypatch.setattr(learner, "_mean", spy)
    options = replace(OPTIONS, epochs=1)
    result = train_model("alexnet_v1", few_digits, tmp_path / "m.keras", options)
    graph = computed[0].get_concrete_function().graph
    assert "float16" in {op.outputs[0].dtype.name for op in graph.get_operations() if op.outputs}
    assert result.history[0].finite
    assert keras.config.dtype_policy().name == "float32"
    model, _ = load_model(result.path)
    layers = list(model._flatten_layers())
    assert {layer.compute_dtype for layer in layers} == {"float32"}
    assert {layer.dtype_policy.name for layer in layers} == {"float32"}


# --- stopped and resumed ----------------------------------------------------------------------


def test_a_resumed_run_ends_where_the_straight_one_did(straight, stopped_copy, few_digits):
    before, _ = straight
    seen = []
    result = train_model(
        MODEL, few_digits, stopped_copy, OPTIONS, resume=True, on_epoch=seen.append
    )
    assert [report.epoch for report in seen] == [3, 4]
    assert without_seconds(result.history) == without_seconds(before.history)
    for a, b in zip(weights(before.path), weights(stopped_copy), strict=True):
        np.testing.assert_array_equal(a, b)
    assert not stopped_copy.with_suffix(".ckpt").exists()


def test_weights_to_start_from_say_what_they_want_of_the_pixels(few_digits, tmp_path, monkeypatch):
    """And a resumed run, which does not read them again, remembers it."""
    from cnnedge.backends.keras import load_model

    scripted(monkeypatch, [0.5, 0.6])
    options = replace(OPTIONS, epochs=2, init="file.h5")
    monkeypatch.setattr(Learner, "init_from", lambda self, source: "caffe")

    def stop(report):
        raise StopError

    with pytest.raises(StopError):
        train_model(MODEL, few_digits, tmp_path / "m.keras", options, on_epoch=stop)
    monkeypatch.delattr(Learner, "init_from")
    train_model(MODEL, few_digits, tmp_path / "m.keras", options, resume=True)
    assert load_model(tmp_path / "m.keras")[1].normalization == "caffe"


def test_another_seed_ends_elsewhere(straight, few_digits, tmp_path):
    result = train_model(
        MODEL, few_digits, tmp_path / "m.keras", replace(OPTIONS, seed=4, epochs=1)
    )
    assert result.history[0].loss != straight[0].history[0].loss


@pytest.mark.slow
def test_a_killed_process_resumes(straight, few_digits, tmp_path):
    """A real SIGKILL, in the midst of an epoch."""
    code = (
        "import os, signal\n"
        "from cnnedge.data import open_source\n"
        "from tests.test_train import MODEL, OPTIONS, small, train_model\n"
        "def tell(task, done, total):\n"
        "    if task == 'train' and done == 9: os.kill(os.getpid(), signal.SIGKILL)\n"
        f"train_model(MODEL, small(open_source('digits')), {str(tmp_path / 'm.keras')!r}, OPTIONS,"
        " progress=tell)"
    )
    root = Path(__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["m.ckpt"]
    result = train_model(MODEL, few_digits, tmp_path / "m.keras", OPTIONS, resume=True)
    assert without_seconds(result.history) == without_seconds(straight[0].history)
    for a, b in zip(weights(straight[0].path), weights(result.path), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"batch_size": 16}, r"batch_size \(32 there, 16 now\)"),
        ({"image_size": (72, 64)}, "image_size"),
        ({"augment": False}, "augment"),
        ({"seed": 4, "learning_rate": 0.1}, r"seed .*, another learning_rate"),
    ],
    ids=lambda value: "" if isinstance(value, str) else "-".join(value),
)
def test_resuming_with_other_options_names_them(stopped_copy, few_digits, change, named):
    with pytest.raises(ModelError, match=named):
        train_model(MODEL, few_digits, stopped_copy, replace(OPTIONS, **change), resume=True)


def test_resuming_with_other_images_says_so(stopped_copy, digits):
    with pytest.raises(ModelError, match="another training images"):
        train_model(MODEL, digits, stopped_copy, OPTIONS, resume=True)


def test_resuming_from_nothing_says_so(few_digits, tmp_path):
    with pytest.raises(ModelError, match=r"no checkpoint .*m\.ckpt"):
        train_model(MODEL, few_digits, tmp_path / "m.keras", OPTIONS, resume=True)


def test_what_the_checkpoint_takes_is_not_asked_for_twice(stopped_copy, few_digits, monkeypatch):
    """A disk that was large enough to start on is large enough to resume on."""
    taken = (stopped_copy.with_suffix(".ckpt") / "state.npz").stat().st_size
    usage = namedtuple("Usage", "free")
    for weights_free, match in ((5.5, "it trained"), (4.5, "GB free")):
        free = usage(int(weights_free * taken / 4))
        monkeypatch.setattr(shutil, "disk_usage", lambda path, free=free: free)
        monkeypatch.setattr(Learner, "run_epoch", forbid)
        with pytest.raises((AssertionError, CnnEdgeError), match=match):
            train_model(MODEL, few_digits, stopped_copy, OPTIONS, resume=True)


# Where in an entry of the zip's directory stand the bits that say "encrypted", and the compression.
ZIP_FIELDS = {"encrypted": 8, "method": 10}


@pytest.mark.parametrize("damage", ["cut", "flipped", "emptied", *ZIP_FIELDS])
def test_a_damaged_checkpoint_is_told(stopped_copy, few_digits, damage):
    file = stopped_copy.with_suffix(".ckpt") / "state.npz"
    content = bytearray(file.read_bytes())
    if damage == "flipped":
        content[len(content) // 2] ^= 255
    if damage in ZIP_FIELDS:
        content[content.index(b"PK\x01\x02") + ZIP_FIELDS[damage]] ^= 1
    file.write_bytes(content[: {"cut": len(content) // 2, "emptied": 0}.get(damage)])
    with pytest.raises(ModelError, match=r"state\.npz is damaged"):
        train_model(MODEL, few_digits, stopped_copy, OPTIONS, resume=True)


# --- told before any training -----------------------------------------------------------------


@pytest.fixture
def no_training(monkeypatch):
    monkeypatch.setattr(Learner, "run_epoch", forbid)


@pytest.mark.usefixtures("no_training")
class TestToldBeforeTraining:
    def test_a_place_that_cannot_be_written(self, few_digits, tmp_path):
        (tmp_path / "file").touch()
        with pytest.raises(CnnEdgeError, match=r"cannot write .*file/m\.keras"):
            train_model(MODEL, few_digits, tmp_path / "file" / "m.keras", OPTIONS)

    def test_a_name_that_is_no_keras_file(self, few_digits, tmp_path):
        with pytest.raises(ModelError, match=r"does not end in \.keras"):
            train_model(MODEL, few_digits, tmp_path / "m.h5", OPTIONS)
        (tmp_path / "m.keras").mkdir()
        with pytest.raises(ModelError, match="is a folder"):
            train_model(MODEL, few_digits, tmp_path / "m.keras", OPTIONS)

    @pytest.mark.parametrize("name", ["m.ckpt/state.npz", "m.history.json", "m.history.png"])
    def test_a_folder_in_the_way(self, few_digits, tmp_path, name):
        (tmp_path / name).mkdir(parents=True)
        with pytest.raises(ModelError, match=rf"{Path(name).name} is a folder"):
            train_model(MODEL, few_digits, tmp_path / "m.keras", OPTIONS)

    def test_a_file_where_the_checkpoints_go(self, few_digits, tmp_path):
        (tmp_path / "m.ckpt").touch()
        with pytest.raises(ModelError, match=r"m\.ckpt is a file"):
            train_model(MODEL, few_digits, tmp_path / "m.keras", OPTIONS)

    def test_a_disk_too_full(self, few_digits, tmp_path, monkeypatch):
        usage = namedtuple("Usage", "free")
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**7))
        with pytest.raises(CnnEdgeError, match=r"0\.01 GB free, .* needs 0\.\d+ GB"):
            train_model(MODEL, few_digits, tmp_path / "m.keras", OPTIONS)
        assert not list(tmp_path.iterdir())

    def test_no_tensorflow(self, few_digits, tmp_path, monkeypatch):
        monkeypatch.setitem(sys.modules, "tensorflow", None)
        with pytest.raises(MissingExtraError, match=r"training needs .*tensorflow.*\[export\]"):
            train_model(MODEL, few_digits, tmp_path / "m.keras", OPTIONS)

    def test_a_class_too_small_to_validate_on(self, few_digits, tmp_path):
        single = np.flatnonzero(few_digits.train.targets == 0)[1:]
        kept = np.setdiff1d(np.arange(200), single)
        dataset = replace(few_digits, train=few_digits.train.select(kept))
        with pytest.raises(DataError, match="class 0 has 1 image"):
            train_model(MODEL, dataset, tmp_path / "m.keras", OPTIONS)

    def test_weights_to_start_from_that_do_not_fit(self, few_digits, tmp_path):
        with pytest.raises(ModelError, match="not a VGG network"):
            train_model(MODEL, few_digits, tmp_path / "m.keras", replace(OPTIONS, init="imagenet"))


@pytest.mark.parametrize(
    "wrong",
    [{"epochs": 0}, {"batch_size": 0}, {"patience": 0}, {"learning_rate": -1.0}, {"seed": -1}],
    ids=lambda value: next(iter(value)),
)
def test_options_out_of_range_are_refused(wrong):
    with pytest.raises(ModelError, match=next(iter(wrong))):
        TrainOptions(**wrong)


def test_the_largest_seed_works(few_digits):
    made = make_stream(few_digits.train, seed=2**32 - 1, augmented=True)
    assert next(made.training(1))[0].shape == (32, 16, 16, 3)


def test_vgg_learns_more_slowly_by_default():
    assert TrainOptions().rate_for("vgg16") == 1e-4
    assert TrainOptions().rate_for("alexnet") == 3e-4
    assert TrainOptions(learning_rate=0.5).rate_for("vgg16") == 0.5


def test_the_best_of_equals_has_the_lower_loss_and_then_comes_first():
    def report(epoch, accuracy, loss):
        return EpochReport(epoch, 9, 0.0, 0.0, loss, accuracy, 0.0)

    reports = [report(1, 0.9, 0.5), report(2, 0.9, 0.4), report(3, 0.8, 0.1), report(4, 0.9, 0.4)]
    assert best_epoch(reports) == 2
    assert best_epoch([]) == 0


def test_a_report_reads_as_one_line():
    report = EpochReport(3, 20, 0.1234, 0.9, 0.2, 0.972, 11.7)
    assert str(report) == "epoch 3/20: loss 0.123, validation 97.2 %, 12 s"
