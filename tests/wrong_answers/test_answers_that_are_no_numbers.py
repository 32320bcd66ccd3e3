"""An answer that is NaN or infinite fails every gate, and no app is given it as a probability."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from test_bundle import edit_manifest, rehash

import cnnedge
from cnnedge import sweep
from cnnedge.benchmark.accuracy import Answers, describe
from cnnedge.benchmark.pick import pick
from cnnedge.benchmark.station import Station
from cnnedge.bundle import open_bundle
from cnnedge.cli import main
from cnnedge.comparison import DATA_TYPES, compare, judge
from cnnedge.data import open_source
from cnnedge.errors import BackendError, GateError, ModelError
from cnnedge.package.archive import write_archive
from cnnedge.package.single import write_single
from cnnedge.pipeline import build, export_bundle
from cnnedge.recipe import make_recipe
from cnnedge.runtime import Choice, Classifier
from cnnedge.selftest import INDEX, run_selftest
from cnnedge.verify import verify_bundle

ROOT = Path(__file__).parents[2]
NO_NUMBERS = pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])


def poison(root: Path, file: str, value: float) -> None:
    """Let one class of a bundle's model be answered with a value, and the manifest vouch for it."""
    poison_file(root / file, value)
    rehash(root, file)

    def change(fields):
        for entry in [v for v in fields["variants"] if v["file"] == file]:
            entry["bytes"] = (root / file).stat().st_size

    edit_manifest(root, change)


def poison_file(path: Path, value: float) -> None:
    model = onnx.load(path)
    output = model.graph.output[0]
    (last,) = [node for node in model.graph.node if output.name in node.output]
    classes = output.type.tensor_type.shape.dim[1].dim_value
    last.output[0] = "sound"
    added = np.where(np.arange(classes) == 0, value, 0).astype(np.float32)
    model.graph.initializer.append(onnx.numpy_helper.from_array(added, "poison"))
    model.graph.node.append(onnx.helper.make_node("Add", ["sound", "poison"], [output.name]))
    onnx.save(model, path)


# --- the gates ---------------------------------------------------------------------------------


@NO_NUMBERS
@pytest.mark.parametrize("precision", sorted(DATA_TYPES))
@pytest.mark.parametrize("trained", [True, False])
def test_one_such_answer_of_a_thousand_fails_the_gate(value, precision, trained):
    reference = np.full((1000, 3), 0.1, np.float32)
    reference[:, 0] = 0.8
    answers = reference.copy()
    answers[417, 0] = value  # NumPy's argmax takes a NaN for the largest: the right class
    found = compare(answers, reference, np.zeros(1000, int))
    achieved = {kind: {DATA_TYPES[precision]: 1.0} for kind in ("macs", "weights")}
    verdict = judge(found, precision=precision, max_drop=100.0, trained=trained, achieved=achieved)
    assert (verdict.failed, found.not_finite, found.lost) == (True, 1, 1)
    assert "1 of 1000 answers" in verdict.reason
    assert (found.top1, found.agreement, found.top5) == (0.999, 0.999, 0.999)
    json.dumps(found.to_dict(), allow_nan=False)


@NO_NUMBERS
def test_verify_fails_such_a_variant(bundle_copy, value):
    poison(bundle_copy, "model.int8.onnx", value)
    alone = verify_bundle(bundle_copy)
    assert [v.name for v in alone.variants if v.failed] == ["int8"]
    command = ["verify", str(bundle_copy), "--data", "digits", "--test-images", "20", "--json"]
    ran = CliRunner().invoke(main, [*command, "--max-drop", "100"])
    assert ran.exit_code == 3
    found = json.loads(ran.stdout, parse_constant=pytest.fail)["variants"]
    (int8,) = [v for v in found if v["verdict"]["status"] == "failed"]
    assert int8["accuracy"]["not_finite"] == 20
    assert "NaN or infinity" in int8["verdict"]["reason"]


def test_a_resumed_verification_fails_it_too(bundle_copy, tmp_path, monkeypatch):
    monkeypatch.setenv("CNNEDGE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(sweep, "BATCH_PIXELS", 4 * 32 * 32)
    for name in ("FIRST_SAVE_SECONDS", "SAVE_SECONDS"):
        monkeypatch.setattr(sweep, name, 0)
    poison(bundle_copy, "model.int8.onnx", np.nan)

    def stop(task: str, done: int, total: int) -> None:
        if task == "verify" and done >= 8:
            raise KeyboardInterrupt

    data, options = open_source("digits"), {"limit": 20, "max_drop": 100.0}
    with pytest.raises(KeyboardInterrupt, match="--resume"):
        verify_bundle(bundle_copy, data, progress=stop, **options)
    found = verify_bundle(bundle_copy, data, resume=True, **options)
    assert [v.comparison.not_finite for v in found.variants] == [0, 0, 20, 0]
    assert [v.name for v in found.variants if v.verdict.failed] == ["int8"]


def test_a_reference_that_answers_so_is_named_with_the_image(bundle_copy):
    poison(bundle_copy, "model.fp32.onnx", np.nan)
    others = open_source("digits", seed=7)
    with pytest.raises(GateError, match="FP32 variant .* answers NaN or infinity to image 0 and"):
        verify_bundle(bundle_copy, others, limit=20)
    broken = np.full((1, 10), np.nan, np.float32)
    with pytest.raises(ModelError, match="^Keras answers NaN"):
        verify_bundle(bundle_copy, others, limit=20, reference=lambda x: broken.repeat(len(x), 0))


# --- export ------------------------------------------------------------------------------------


def saved(path: Path, change=lambda model: None) -> Path:
    import keras
    from keras import layers

    keras.utils.set_random_seed(0)
    image = keras.Input((32, 32, 3))
    x = layers.Conv2D(8, 3, strides=2, activation="relu")(image)
    x = layers.GlobalAveragePooling2D()(x)
    model = keras.Model(image, layers.Dense(3, activation="softmax", name="head")(x))
    change(model)
    model.save(path)
    return path


def export(path: Path, data: Path, out: Path, *more: str):
    options = ("--data", str(data), "--preprocess", "unit", "-o", str(out), *more)
    return CliRunner().invoke(main, ["export", str(path), *options])


@pytest.mark.tf
def test_a_model_that_answers_so_is_not_exported(three, tmp_path):
    def change(model):
        head = model.get_layer("head")
        head.bias.assign([0.0, np.inf, 0.0])

    path = saved(tmp_path / "m.keras", change)
    ran = export(path, three, tmp_path / "out")
    assert ran.exit_code == 1
    data, line = ran.stderr.splitlines()
    assert data == "30 images, 3 classes"
    assert "the model itself" in line
    assert "head/bias" in line
    assert ".png" in line
    assert len(line) <= 300
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def overflowing(three, tmp_path_factory):
    """A bundle whose FP16 variant overflows, as it would where halves are really computed with."""
    folder = tmp_path_factory.mktemp("overflowing")
    write = build.write_onnx

    def written(model, path):
        write(model, path)
        if path.name == "model.fp16.onnx":
            poison_file(path, np.nan)

    recipe = make_recipe(
        model=str(saved(folder / "m.keras")),
        data=str(three),
        preprocess="unit",
        precision=("fp32", "fp16"),
        max_drop=100,
        bench_seconds=0.05,
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "write_onnx", written)
        return export_bundle(recipe, folder / "out")[0]


@pytest.mark.tf
def test_what_half_precision_cannot_hold_fails_and_is_not_loaded(overflowing, three):
    fp32, fp16 = overflowing.manifest.variants
    assert fp32.verified
    assert not fp16.verified
    assert "answers are no numbers" in fp16.verdict.reason
    for document in (overflowing.path("manifest.json"), overflowing.path(INDEX)):
        json.loads(document.read_text(), parse_constant=pytest.fail)  # JSON knows no NaN
    assert cnnedge.load(overflowing.root).variant == "fp32"
    photo = next(three.rglob("*.png"))
    with pytest.raises(BackendError, match=f"fp16, run by .*NaN or infinity to {photo}"):
        cnnedge.load(overflowing.root, variant="fp16")(photo)
    ran = CliRunner().invoke(main, ["predict", str(overflowing.root), str(photo), "--variant=fp16"])
    assert (ran.exit_code, ran.stdout) == (1, "")
    assert str(photo) in ran.stderr
    stage = run_selftest(overflowing, {"fp16": lambda x: np.full((len(x), 3), np.nan)})[0]
    assert (stage.stage, stage.finite) == ("output", False)  # as recorded, and none the better


# --- the classifier ----------------------------------------------------------------------------


@NO_NUMBERS
@pytest.mark.parametrize(("classes", "at"), [(2, 1), (10, 0), (33, 32), (1000, 0), (1000, 617)])
def test_no_path_of_the_classifier_returns_them(toy_bundle, value, classes, at):
    rows = np.full((4, classes), 1 / classes, np.float32)
    image = toy_bundle.manifest.image
    choice = Choice(toy_bundle.manifest.variant("int8"), "")
    labels = [f"class {i}" for i in range(classes)]
    classify = Classifier(lambda batch: rows[: len(batch)], choice, labels, image)
    images = np.zeros((4, *image.shape), np.uint8)
    assert len(classify(images[0])) == min(5, classes)
    assert len(classify.batch(images)) == 4
    rows[0, at] = value
    with pytest.raises(BackendError, match="NaN or infinity to the array"):
        classify(images[0])
    rows[[0, 2]] = rows[[2, 0]]
    for answer in (classify.batch, classify.probabilities):
        for given in (images, list(images)):
            with pytest.raises(BackendError, match="image 3 of 4"):
                answer(given)


@pytest.mark.parametrize("form", ["folder", "zip", "onnx"])
def test_no_form_of_a_bundle_returns_them(bundle_copy, tmp_path, form):
    poison(bundle_copy, "model.fp32.onnx", np.inf)
    where = bundle_copy
    if form == "zip":
        where = tmp_path / "b.zip"
        write_archive(open_bundle(bundle_copy), where)
    if form == "onnx":
        where = tmp_path / "m.onnx"
        write_single(open_bundle(bundle_copy), where, variant="fp32")
    classify = cnnedge.load(where, variant="fp32")
    with pytest.raises(BackendError, match="NaN or infinity"):
        classify(np.zeros((32, 32, 3), np.uint8))


# --- the benchmark -----------------------------------------------------------------------------


def test_a_contestant_that_answers_so_is_neither_timed_nor_picked(toy_bundle):
    def broken(batch):
        return np.full((len(batch), 3), np.nan, np.float32)

    with pytest.raises(BackendError, match="answers NaN or infinity"):
        Station(broken, (8, 8, 3)).require_numbers()
    split = open_source("digits").test.take(20, seed=0)
    expected = np.eye(10, dtype=np.float32)[split.targets]
    mine = expected.copy()
    mine[3] = np.nan
    labels = [str(i) for i in range(10)]
    found = describe(Answers(split, expected, "Keras", {"x": mine}, "digits"), "x", labels)
    assert sum(map(sum, found["confusion"])) == 19
    assert (found["confused"], found["flips"], found["flipped"]) == ([], [], 1)
    row = {"name": "x", "title": "x", "single_stream": {"p50_ms": 1.0}, **found}
    chosen = pick([row], bundle="b", max_drop=100.0, judged=False)
    assert chosen["name"] is None


# --- the apps of export/ ------------------------------------------------------------------------


@pytest.mark.system
def test_the_smallest_python_app_says_so(bundle_copy, three):
    poison(bundle_copy, "model.fp32.onnx", np.nan)
    app, photo = ROOT / "export" / "x86-cpu" / "bare.py", next(three.rglob("*.png"))
    command = [sys.executable, str(app), str(bundle_copy / "model.fp32.onnx"), str(photo)]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert (ran.returncode, ran.stdout) == (1, "")
    assert ran.stderr.startswith(f"error: {photo}: the model answers with NaN or infinity")


@pytest.mark.system
@pytest.mark.skipif(shutil.which("node") is None, reason="no Node on this machine")
@pytest.mark.parametrize("value", ["NaN", "Infinity", "-Infinity"])
def test_the_page_and_node_say_so(value):
    lib = ROOT / "cnnedge" / "demo" / "page" / "lib" / "answers.mjs"
    script = f'import {{ rank }} from "{lib}"; rank(Float32Array.of(0.5, {value}), ["a", "b"]);'
    command = ["node", "--input-type=module", "-e", script]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert ran.returncode == 1
    assert "answers with NaN or infinity" in ran.stderr
