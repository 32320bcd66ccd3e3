"""Models saved in mixed or other precision: exported from float32, held against themselves."""

from __future__ import annotations

import json

import keras
import numpy as np
import onnxruntime as ort
import pytest
from keras import layers

from cnnedge.backends.keras_network import open_network
from cnnedge.backends.keras_precision import coarsest, computes_in
from cnnedge.comparison import limit_of
from cnnedge.errors import ModelError
from cnnedge.pipeline import export_bundle
from cnnedge.recipe import make_recipe

pytestmark = pytest.mark.tf

POLICIES = ("mixed_float16", "float16", "mixed_bfloat16", "bfloat16", "float64")


def small(x, **last):
    x = layers.Conv2D(16, 3, strides=2, activation="relu")(x)
    x = layers.BatchNormalization()(x)
    return layers.Dense(3, activation="softmax", **last)(layers.GlobalAveragePooling2D()(x))


def plain():
    image = keras.Input((32, 32, 3))
    return keras.Model(image, small(image))


def nested():
    image = keras.Input((32, 32, 3))
    back = [layers.SeparableConv2D(8, 3, activation="relu"), layers.MaxPooling2D()]
    return keras.Model(image, small(keras.Sequential(back, name="back")(image)))


def probabilities_in_float32():
    image = keras.Input((32, 32, 3))
    return keras.Model(image, small(image, dtype="float32"))


def a_layer_of_its_own():
    image = keras.Input((32, 32, 3))
    x = layers.Conv2D(8, 3, dtype="float64")(image)
    return keras.Model(image, small(x))


def a_cast():
    image = keras.Input((32, 32, 3))
    return keras.Model(image, small(keras.ops.cast(image, "float16")))


def saved(make, policy, path):
    keras.utils.set_random_seed(0)
    keras.config.set_dtype_policy(policy)
    try:
        model = make()
    finally:
        keras.config.set_dtype_policy("float32")
    model.save(path)
    return path


def numbers(values):
    return np.asarray(keras.ops.convert_to_numpy(values)).astype(np.float64)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("make", [plain, nested, probabilities_in_float32, a_layer_of_its_own])
def test_the_network_in_float32_has_the_same_weights(make, policy, tmp_path):
    path = saved(make, policy, tmp_path / "m.keras")
    network = open_network(path)
    assert policy in network.computes_in
    assert {layer.compute_dtype for layer in network.model._flatten_layers()} == {"float32"}
    own = keras.saving.load_model(path, compile=False)
    for theirs, ours in zip(own.variables, network.model.variables, strict=True):
        np.testing.assert_array_equal(numbers(theirs).astype(np.float32), numbers(ours))
    assert {v.dtype for v in network.saved.variables} == {v.dtype for v in own.variables}
    image = np.random.default_rng(0).random((4, 32, 32, 3), np.float32)
    moved = np.abs(numbers(network.model(image)) - numbers(own(image))).max()
    assert moved < {"float16": 5e-3, "bfloat16": 4e-2, None: 1e-6}[coarsest(network.computes_in)]


def test_a_cast_is_none_any_more(tmp_path):
    network = open_network(saved(a_cast, "float32", tmp_path / "m.keras"))
    assert network.computes_in == ("float16",)


def test_float32_is_left_alone(tmp_path):
    path = saved(plain, "float32", tmp_path / "m.keras")
    assert computes_in(path) == ()
    network = open_network(path)
    assert network.model is network.saved


@keras.saving.register_keras_serializable("mixed precision")
class Stubborn(layers.Dense):
    def __init__(self, *sizes, **options):
        super().__init__(*sizes, **(options | {"dtype": "mixed_float16"}))


def test_a_layer_that_insists_is_named(tmp_path):
    image = keras.Input((32, 32, 3))
    last = Stubborn(3, activation="softmax", name="insists")
    model = keras.Model(image, last(layers.GlobalAveragePooling2D()(image)))
    model.save(tmp_path / "m.keras")
    with pytest.raises(ModelError, match="'insists'.*its own code sets"):
        open_network(tmp_path / "m.keras")


def test_the_limit_is_the_references_own():
    assert limit_of("fp32") == 1e-5
    assert limit_of("fp32", None, "float16") == 2e-3
    assert limit_of("fp16", None, "bfloat16") == 1.6e-2
    assert limit_of("fp32", 1e9, "float16") == pytest.approx(0.1)
    assert limit_of("int8", None, "float16") is None


@pytest.mark.parametrize("policy", ["mixed_float16", "bfloat16", "float64"])
def test_the_file_answers_as_the_model_was_saved(policy, three, tmp_path):
    from PIL import Image

    path = saved(plain, policy, tmp_path / "m.keras")
    recipe = make_recipe(
        model=str(path),
        data=str(three),
        preprocess="unit",
        precision=("fp32", "fp16"),
        bench_seconds=0.02,
    )
    bundle, warnings = export_bundle(recipe, tmp_path / "out")
    assert any(policy in line and "as saved" in line for line in warnings)
    images = np.stack([np.asarray(Image.open(p)) for p in sorted(three.rglob("*.png"))])
    own = numbers(keras.saving.load_model(path)(images.astype(np.float32) / 255))
    limit = {"mixed_float16": 2e-3, "bfloat16": 1.6e-2, "float64": 1e-5}[policy]
    session = ort.InferenceSession(str(bundle.path("model.fp32.onnx")))
    assert np.abs(session.run(None, {"image": images})[0] - own).max() < limit
    fp32 = bundle.manifest.variant("fp32")
    assert fp32.verified
    assert fp32.accuracy.limit >= limit
    recorded = json.loads((bundle.root / "selftest/selftest.json").read_text())
    with np.load(bundle.path("selftest/tensors.npz")) as stored:
        golden = stored["tensors"]
    again = numbers(keras.saving.load_model(path)(golden.astype(np.float32) / 255))
    assert np.abs(np.array(recorded["answers"]["reference"]) - again).max() < 1e-6
