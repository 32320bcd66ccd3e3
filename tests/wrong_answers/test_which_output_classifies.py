"""A model that returns a dictionary, or several tensors: the one that classifies is named."""

from __future__ import annotations

import keras
import numpy as np
import onnxruntime as ort
import pytest
from click.testing import CliRunner
from keras import layers

from cnnedge.backends.keras_outputs import find_output, only_output, output_names
from cnnedge.cli import main
from cnnedge.errors import ModelError

pytestmark = pytest.mark.tf


def parts():
    keras.utils.set_random_seed(0)
    image = keras.Input((32, 32, 3))
    x = layers.GlobalAveragePooling2D()(layers.Conv2D(16, 3, activation="relu")(image))
    return image, x


def dense(x, name, activation="softmax", classes=3):
    return layers.Dense(classes, activation=activation, name=name)(x)


def of(make):
    image, x = parts()
    return keras.Model(image, make(x))


@keras.saving.register_keras_serializable("which output")
class OwnClass(keras.Model):
    def __init__(self, **options):
        super().__init__(**options)
        self.pool = layers.GlobalAveragePooling2D()
        self.first = layers.Dense(3, activation="softmax")
        self.second = layers.Dense(3, activation="softmax")

    def call(self, image):
        x = self.pool(image)
        return {"main": self.first(x), "aux": self.second(x)}


MODELS = {
    "one entry": (lambda: of(lambda x: {"p": dense(x, "d")}), ["p"]),
    "two entries": (
        lambda: of(lambda x: {"p": dense(x, "a"), "box": dense(x, "b", None, 4)}),
        ["box", "p"],
    ),
    "a list": (lambda: of(lambda x: [dense(x, "a"), dense(x, "b")]), ["a", "b"]),
    "a tuple": (lambda: of(lambda x: (dense(x, "a"), dense(x, "b"))), ["a", "b"]),
    "a list of one": (lambda: of(lambda x: [dense(x, "a")]), ["a"]),
    "one tensor": (lambda: of(lambda x: dense(x, "a")), ["a"]),
    "nested": (
        lambda: of(lambda x: {"p": {"a": dense(x, "a"), "b": dense(x, "b")}, "q": dense(x, "c")}),
        ["p.a", "p.b", "q"],
    ),
    "twice the same": (lambda: of(lambda x: [y := dense(x, "a"), y]), ["0", "1"]),
}


@pytest.mark.parametrize("kind", MODELS)
def test_each_output_has_a_name_and_is_what_it_names(kind, tmp_path):
    make, names = MODELS[kind]
    make().save(tmp_path / "m.keras")
    model = keras.models.load_model(tmp_path / "m.keras", compile=False)
    assert output_names(model) == names
    image = np.random.default_rng(0).random((2, 32, 32, 3), np.float32)
    whole = keras.tree.flatten_with_path(model(image))
    for name in names:
        position = find_output(model, name, "m.keras")
        path, own = whole[position]
        if kind in ("one entry", "two entries", "nested"):
            assert ".".join(path) == name
        np.testing.assert_array_equal(only_output(model, position)(image), own)


def test_a_class_of_the_users_own():
    model = OwnClass()
    image = np.random.default_rng(0).random((2, 32, 32, 3), np.float32)
    own = model(image)
    assert output_names(model) == ["aux", "main"]
    position = find_output(model, "main", "m.keras")
    np.testing.assert_array_equal(only_output(model, position)(image), own["main"])


@pytest.mark.parametrize("asked", [None, "nope"])
def test_several_are_listed(asked):
    with pytest.raises(ModelError, match="box, p; .*--output NAME"):
        find_output(MODELS["two entries"][0](), asked, "m.keras")


def test_many_names_fit_in_a_line():
    model = of(lambda x: {f"an output with a long name, {i}": dense(x, f"d{i}") for i in range(40)})
    with pytest.raises(ModelError, match="40 in all") as found:
        find_output(model, None, "m.keras")
    assert len(str(found.value)) <= 300


def run(*arguments):
    return CliRunner().invoke(main, [str(a) for a in arguments])


@pytest.mark.parametrize(("kind", "name"), [("one entry", None), ("two entries", "p")])
def test_the_file_answers_as_that_output(kind, name, three, tmp_path):
    path, out = tmp_path / "m.keras", tmp_path / "out"
    MODELS[kind][0]().save(path)
    recipe = tmp_path / "recipe.toml"
    output = "" if name is None else f'output = "{name}"\n'
    recipe.write_text(
        f'model = "m.keras"\ndata = "{three}"\npreprocess = "unit"\nprecision = ["fp32"]\n'
        f"bench_seconds = 0.02\n{output}"
    )
    done = run("export", recipe, "-o", out)
    assert done.exit_code == 0, done.output
    images = np.random.default_rng(0).integers(0, 256, (4, 32, 32, 3), np.uint8)
    session = ort.InferenceSession(str(out / "model.fp32.onnx"))
    (answers,) = session.run(["probabilities"], {"image": images})
    own = keras.models.load_model(path)(images.astype(np.float32) / 255)["p"]
    assert np.abs(answers - own).max() < 1e-5
    verified = run("verify", out, "--data", three, "--reference", path)
    assert verified.exit_code == 0, verified.output


def test_the_command_asks_which(three, tmp_path):
    path = tmp_path / "m.keras"
    MODELS["two entries"][0]().save(path)
    options = ("--data", three, "--preprocess", "unit", "-o", tmp_path / "out")
    for command in ("export", "compress"):
        output = options if command == "export" else (*options[:-1], tmp_path / "small.keras")
        done = run(command, path, *output)
        assert done.exit_code == 1, done.output
        (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
        assert "has 2 outputs: box, p; name the one that classifies: --output NAME" in line


def test_a_sequential_model_from_a_file_has_its_one_output(tmp_path):
    """Keras gives it `outputs` and no `output` until it is called."""
    file = tmp_path / "sequential.keras"
    keras.Sequential([keras.Input((4, 4, 3)), layers.Flatten(), layers.Dense(2)]).save(file)
    model = keras.saving.load_model(file, compile=False)
    assert len(output_names(model)) == 1
    assert find_output(model, None, "m") == 0
    assert only_output(model, 0) is model
