"""The command line as a user types it: output, exit codes, one line for what went wrong."""

from __future__ import annotations

import json
import shutil
import zipfile

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from cnnedge.cli import main


def run(*arguments):
    return CliRunner().invoke(main, [str(a) for a in arguments])


def error_of(result, code=1):
    assert result.exit_code == code, (result.output, result.exception)
    assert "Traceback" not in result.output
    lines = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    return lines[0]


COMMANDS = sorted(main.commands)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_helps_with_an_example(command):
    result = run(command, "--help")
    assert result.exit_code == 0
    assert f"Example:\n  cnnedge {command}" in result.output
    assert "--json" in result.output


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_is_in_the_readme(command):
    from pathlib import Path

    assert f"cnnedge {command}" in (Path(__file__).parents[1] / "README.md").read_text()


def test_usage_errors_exit_with_2():
    for arguments in (["no-such"], ["export"], ["inspect"], ["bench", "x", "--seconds", "0"]):
        assert run(*arguments).exit_code == 2
    assert run("inspect", "alexnet", "--image-size", "big").exit_code == 2


def test_models():
    listed = run("models").output
    assert "72,342,312" in listed
    names = {row["name"] for row in json.loads(run("models", "--json").output)}
    assert {"alexnet", "alexnet_v1", "alexnet_v2", "vgg11", "vgg16", "vgg19"} <= names


def test_inspect(toy_file, toy_bundle):
    shown = run("inspect", "alexnet_v1")
    assert shown.exit_code == 0
    assert "16,630,440" in shown.output
    for target in (toy_file, toy_bundle.path("model.int8.onnx")):
        document = json.loads(run("inspect", target, "--json").output)
        assert document["layers"]
    stack = run("inspect", "--stack", "3x3,3x3,3x3")
    assert "27" in stack.output
    assert "49" in stack.output
    assert "nonsense" in error_of(run("inspect", "nonsense"))
    error_of(run("inspect", "--stack", "3y3"))


def test_export_a_user_model(tmp_path, toy_model, digits):
    path = tmp_path / "mine.keras"
    toy_model.save(path)
    message = error_of(run("export", path, "-o", tmp_path / "out"))
    assert "does not say how it wants its pixels" in message
    assert not (tmp_path / "out").exists()

    result = run(
        *("export", path, "-o", tmp_path / "out", "--preprocess", "unit", "--data", "digits"),
        *("--max-drop", 3, "--json"),
    )
    assert result.exit_code == 0, result.output
    manifest = json.loads(result.stdout)
    assert [v["name"] for v in manifest["variants"]] == ["fp32", "fp16", "int8", "int8-trt"]
    assert manifest["model"]["weights"] == "user"

    assert "exists already" in error_of(run("export", path, "-o", tmp_path / "out"))
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "one.jpg").touch()
    forced = run("export", path, "-o", tmp_path / "photos", "--force")
    assert "is no bundle, and is not replaced" in error_of(forced)
    assert (tmp_path / "photos" / "one.jpg").exists()
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]

    without_data = run("export", path, "-o", tmp_path / "two", "--preprocess", "unit")
    assert without_data.exit_code == 0, without_data.output
    assert "leaving INT8 out" in without_data.stderr
    assert "FP16" in without_data.stdout
    assert "INT8" not in without_data.stdout


@pytest.mark.tf
def test_export_without_trained_weights(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = run(
        *("export", "alexnet_v1", "--image-size", "96,96", "--classes", 20, "--test-images", 8)
    )
    assert result.exit_code == 0, result.output
    (warning,) = [line for line in result.stderr.splitlines() if line.startswith("warning: ")]
    assert "accuracy means nothing yet" in warning
    manifest = json.loads((tmp_path / "alexnet_v1" / "manifest.json").read_text())
    assert manifest["model"]["weights"] == "random"
    assert {v["verdict"]["status"] for v in manifest["variants"]} == {"not judged"}
    for variant in manifest["variants"]:
        if variant["target"] != "trt":
            assert variant["latency"]["median_ms"] > 0
    assert "not judged" in result.stdout


def test_export_finds_trained_weights_beside_it(tmp_path, monkeypatch, toy_file):
    monkeypatch.chdir(tmp_path)
    shutil.copy(toy_file, tmp_path / "alexnet.keras")
    result = run("export", "alexnet", "--precision", "fp32", "--test-images", 40)
    assert result.exit_code == 0, result.output
    manifest = json.loads((tmp_path / "alexnet" / "manifest.json").read_text())
    assert manifest["model"]["weights"] == "trained"


def test_a_failed_gate_writes_the_bundle_and_exits_with_3(tmp_path, toy_model, digits):
    """A network whose first layer has one channel ×1000 louder than the rest loses them in INT8."""
    import keras

    from cnnedge.backends.keras import ModelNote, save_model
    from cnnedge.image import ImageContract

    hard = keras.models.clone_model(toy_model)
    hard.set_weights(toy_model.get_weights())
    kernel, bias = hard.get_layer("conv1").get_weights()
    kernel[..., 0] *= 3000
    hard.get_layer("conv1").set_weights([kernel, bias])
    following, bias2 = hard.get_layer("conv2").get_weights()
    following[:, :, 0] /= 3000
    hard.get_layer("conv2").set_weights([following, bias2])
    note = ModelNote("hard", digits.labels, ImageContract(32, 32), "unit", data="digits", seed=0)
    save_model(hard, tmp_path / "hard.keras", note)

    result = run("export", tmp_path / "hard.keras", "-o", tmp_path / "hard", "--no-guard")
    message = error_of(result, code=3)
    assert "a gate failed: int8" in message
    assert "top-1 drops" in message
    manifest = json.loads((tmp_path / "hard" / "manifest.json").read_text())
    status = {v["name"]: v["verdict"]["status"] for v in manifest["variants"]}
    assert status["int8"] == "failed"
    assert status["fp32"] != "failed"
    shown = run("predict", tmp_path / "hard", tmp_path / "hard/selftest/golden-00.png", "--json")
    assert json.loads(shown.stdout)["variant"] == "fp32" or "fp16" in shown.stdout
    assert error_of(run("verify", tmp_path / "hard", "--data", "digits"), code=3)


def test_a_recipe(tmp_path, toy_file):
    shutil.copy(toy_file, tmp_path / "toy.keras")
    recipe = tmp_path / "toy.toml"
    recipe.write_text('model = "toy.keras"\nprecision = ["fp32", "fp16"]\ntest_images = 40\n')
    result = run("export", recipe, "-o", tmp_path / "out", "--json")
    assert result.exit_code == 0, result.output
    assert [v["name"] for v in json.loads(result.stdout)["variants"]] == ["fp32", "fp16"]
    for text, message in (
        ('model = "toy.keras"\ncolour = "red"\n', "colour"),
        ('model = "toy.keras"\nmax_drop = -1\n', "max_drop"),
        ('model = "toy.keras"\npreprocess = "magic"\n', "preprocess"),
        ("model = \n", "is no TOML"),
    ):
        recipe.write_text(text)
        assert message in error_of(run("export", recipe, "-o", tmp_path / "out2"))
    assert "cannot read the recipe" in error_of(run("export", tmp_path / "none.toml"))


def test_predict(toy_bundle, tmp_path):
    golden = toy_bundle.path("selftest/golden-00.png")
    result = run("predict", toy_bundle.root, golden, "--top", 2)
    assert result.exit_code == 0
    assert result.stdout.startswith(f"{golden}: ")
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(b"")
    mixed = run("predict", toy_bundle.root, broken, golden, "--json")
    assert "broken.jpg is no image" in error_of(mixed)
    (answered,) = json.loads(mixed.stdout)["images"]
    assert answered["image"] == str(golden)
    assert "does not exist" in error_of(run("predict", tmp_path / "none", golden))


def test_verify(toy_bundle):
    shown = run("verify", toy_bundle.root, "--data", "digits")
    assert shown.exit_code == 0, shown.output
    assert "the smallest drop that" in shown.output
    document = json.loads(run("verify", toy_bundle.root, "--json").output)
    assert document["failed"] is False


def test_verify_reports_a_damaged_bundle(bundle_copy):
    (bundle_copy / "model.int8.onnx").write_bytes(b"x")
    assert "model.int8.onnx is not what the manifest names" in error_of(run("verify", bundle_copy))


@pytest.mark.tf
def test_doctor():
    document = json.loads(run("doctor", "--json").output)
    assert document["machine"]["cores"] >= 1
    ready = {a["name"]: a["ready"] for a in document["abilities"]}
    assert ready["run bundles on the CPU"]
    for ability in document["abilities"]:
        assert ability["ready"] or ability["fix"]
    assert run("doctor").exit_code == 0


def damaged_keras_files(tmp_path, toy_file):
    whole = toy_file.read_bytes()
    yield "missing.keras", None, "no model file"
    yield "empty.keras", b"", "not a whole .keras file"
    yield "cut.keras", whole[: len(whole) // 2], "not a whole .keras file"
    yield "text.keras", b"hello", "not a whole .keras file"
    path = tmp_path / "zip.keras"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("hello.txt", "hello")
    yield "zip.keras", path.read_bytes(), "Keras cannot load"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("cnnedge.json", "{}")
    yield "note.keras", path.read_bytes(), "note .* is damaged"


def test_damaged_models_are_refused_in_one_line(tmp_path, toy_file):
    import re

    for name, content, message in damaged_keras_files(tmp_path, toy_file):
        path = tmp_path / name
        if content is not None:
            path.write_bytes(content)
        assert re.search(message, error_of(run("export", path, "-o", tmp_path / "out"))), name
    assert not (tmp_path / "out").exists()


def test_data_that_does_not_fit_is_refused(tmp_path, toy_file):
    for label in ("cat", "dog"):
        (tmp_path / "pets" / label).mkdir(parents=True)
        for i in range(4):
            pixels = np.random.default_rng(i + len(label) * ord(label[0])).integers(
                0, 256, (8, 8, 3), np.uint8
            )
            Image.fromarray(pixels).save(tmp_path / "pets" / label / f"{i}.png")
    message = error_of(run("export", toy_file, "--data", tmp_path / "pets", "-o", tmp_path / "o"))
    assert "2 (cat, dog), the model has 10 (0, 1, 2, …)" in message
    labels = tmp_path / "labels.txt"
    labels.write_text("one\ntwo\n")
    message = error_of(run("export", toy_file, "--labels", labels, "-o", tmp_path / "o"))
    assert "2 labels for a model of 10 classes" in message
    assert "did you mean digits" in error_of(
        run("export", toy_file, "--data", "digts", "-o", tmp_path / "o")
    )


def test_a_full_disk_leaves_nothing(tmp_path, toy_file, monkeypatch):
    from cnnedge.pipeline import build

    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(build, "write_labels", full)
    result = run("export", toy_file, "-o", tmp_path / "out", "--test-images", 20)
    assert "No space left on device" in error_of(result)
    assert list(tmp_path.iterdir()) == []
