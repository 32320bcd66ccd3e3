"""What a network gives is told by its answers: probabilities got a second softmax, in silence.

The reference got it too, so every gate passed. Here the reference is Keras alone.
"""

from __future__ import annotations

import keras
import numpy as np
import onnxruntime as ort
import pytest
from click.testing import CliRunner
from keras import layers, ops

from cnnedge.backends.keras import read_emits
from cnnedge.cli import main
from cnnedge.errors import ModelError
from cnnedge.head import read_head, require_head
from cnnedge.pipeline import export_bundle
from cnnedge.recipe import make_recipe

pytestmark = pytest.mark.tf

SIZE = 32


def features(image):
    x = layers.Conv2D(16, 3, strides=2, activation="relu")(image)
    return layers.Conv2D(16, 3, strides=2, activation="relu")(x)


def pooled(x):
    return layers.GlobalAveragePooling2D()(x)


def soft(x):
    return layers.Dense(3, activation="softmax")(pooled(x))


def network(head, seed=0):
    keras.utils.set_random_seed(seed)
    image = keras.Input((SIZE, SIZE, 3))
    return keras.Model(image, head(features(image)))


def divided_by_its_sum(x):
    positive = layers.Dense(3, activation="softplus")(pooled(x))
    return positive / ops.sum(positive, axis=-1, keepdims=True)


def cosine(x):
    unit = layers.UnitNormalization()(layers.BatchNormalization()(pooled(x)))
    return layers.Dense(3, use_bias=False, kernel_constraint="unit_norm")(unit)


def sigmoids(x):
    return layers.Dense(3, activation="sigmoid")(pooled(x))


PROBABILITIES = {
    "softmax over a map": lambda x: pooled(layers.Conv2D(3, 1, activation="softmax")(x)),
    "flattened": lambda x: layers.Flatten()(layers.Conv2D(3, 7, activation="softmax")(x)),
    "reshaped": lambda x: layers.Reshape((3,))(layers.Reshape((1, 3))(soft(x))),
    "weighted sum": lambda x: layers.Add()(
        [layers.Rescaling(0.6)(soft(x)), layers.Rescaling(0.4)(soft(x))]
    ),
    "three thirds": lambda x: layers.Add()([layers.Rescaling(0.333)(soft(x)) for _ in range(3)]),
    "average": lambda x: layers.Average()([soft(x), soft(x)]),
    "mixed by a dense layer": lambda x: layers.Dense(
        3, use_bias=False, kernel_initializer=keras.initializers.Identity()
    )(soft(x)),
    "smoothed": lambda x: layers.Rescaling(0.9, 0.1 / 3)(soft(x)),
    "divided by its sum": divided_by_its_sum,
    "a temperature": lambda x: layers.Softmax()(layers.Dense(3)(pooled(x)) / 4.0),
}
LOGITS = {
    "a temperature": lambda x: layers.Dense(3)(pooled(x)) / 4.0,
    "a high temperature": lambda x: layers.Rescaling(1e-3)(layers.Dense(3)(pooled(x))),
    "cosines": cosine,
    "mean of a convolution": lambda x: pooled(layers.Conv2D(3, 1)(x)),
    "average": lambda x: layers.Average()([layers.Dense(3)(pooled(x)), layers.Dense(3)(pooled(x))]),
    "log_softmax": lambda x: layers.Dense(3, activation="log_softmax")(pooled(x)),
    "rectified": lambda x: layers.Dense(3, activation="relu", bias_initializer="ones")(pooled(x)),
}
NEITHER = {
    "sigmoids": (sigmoids, "lie in 0…1 and sum to"),
    "sigmoids moved up": (lambda x: layers.Rescaling(1.0, 0.001)(sigmoids(x)), "lie in 0…1"),
    "sigmoids moved down": (lambda x: layers.Rescaling(1.0, -0.001)(sigmoids(x)), "lie in 0…1"),
    "hard sigmoids": (
        lambda x: layers.Dense(3, activation="hard_sigmoid")(pooled(x)),
        "lie in 0…1",
    ),
    "half a softmax": (lambda x: layers.Rescaling(0.5)(soft(x)), "sum to 0.5…0.5"),
    "percents": (lambda x: layers.Rescaling(100.0)(soft(x)), "sum to 100 on every image"),
    "over the batch": (lambda x: layers.Softmax(axis=0)(layers.Dense(3)(pooled(x))), "lie in 0…1"),
    "nothing": (lambda x: layers.Dense(3, kernel_initializer="zeros")(pooled(x)), "are 0 on every"),
}


@pytest.fixture(scope="module")
def images(three):
    from PIL import Image

    return np.stack([np.asarray(Image.open(path)) for path in sorted(three.rglob("*.png"))])


def by_keras(path, images):
    """What the user gets: the file, loaded and called by Keras alone."""
    model = keras.models.load_model(path, compile=False)
    return model.predict(images.astype(np.float32) / 255, verbose=0)


def by_the_file(bundle, variant, images):
    path = bundle.path(bundle.manifest.variant(variant).file)
    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return session.run(["probabilities"], {"image": images})[0]


def exported(model, folder, three, *precision):
    path = folder / "m.keras"
    model.save(path)
    recipe = make_recipe(
        model=str(path),
        data=str(three),
        preprocess="unit",
        precision=precision,
        bench_seconds=0.02,
    )
    return path, export_bundle(recipe, folder / "out")[0]


def softmax(logits):
    exponent = np.exp(logits - logits.max(axis=1, keepdims=True))
    return exponent / exponent.sum(axis=1, keepdims=True)


@pytest.mark.parametrize("head", PROBABILITIES)
@pytest.mark.parametrize("seed", [0, 1])
def test_rows_that_sum_to_one_are_probabilities(head, seed, images):
    assert read_emits(network(PROBABILITIES[head], seed), images, "unit") == "probabilities"


@pytest.mark.parametrize("head", LOGITS)
@pytest.mark.parametrize("seed", [0, 1])
def test_anything_else_is_logits(head, seed, images):
    assert read_emits(network(LOGITS[head], seed), images, "unit") == "logits"


@pytest.mark.parametrize("head", NEITHER)
def test_what_is_neither_is_refused_in_one_line(head, images):
    make, why = NEITHER[head]
    with pytest.raises(ModelError, match="neither probabilities nor logits") as found:
        read_emits(network(make), images, "unit", name="m.keras")
    assert why in str(found.value)
    assert "m.keras" in str(found.value)
    assert len(str(found.value)) < 300


@pytest.mark.parametrize("head", ["softmax over a map", "weighted sum", "mixed by a dense layer"])
def test_the_file_answers_with_the_networks_own_probabilities(head, three, images, tmp_path):
    precisions = ["fp32", "fp16"] + (["int8"] if head == "weighted sum" else [])
    path, bundle = exported(network(PROBABILITIES[head]), tmp_path, three, *precisions)
    own = by_keras(path, images)
    assert np.abs(own.sum(axis=1) - 1).max() < 1e-6
    limits = {"fp32": 1e-5, "fp16": 2e-3, "int8": 2e-2, "int8-trt": 2e-2}
    for variant in bundle.manifest.variants:
        answers = by_the_file(bundle, variant.name, images)
        assert np.abs(answers - own).max() < limits[variant.name]
    assert bundle.manifest.model.emits == "probabilities"


@pytest.mark.parametrize("head", ["cosines", "mean of a convolution", "average", "log_softmax"])
def test_logits_that_no_dense_layer_ends_get_a_softmax(head, three, images, tmp_path):
    path, bundle = exported(network(LOGITS[head]), tmp_path, three, "fp32", "fp16")
    own = softmax(by_keras(path, images))
    assert np.abs(by_the_file(bundle, "fp32", images) - own).max() < 1e-5
    assert np.abs(by_the_file(bundle, "fp16", images) - own).max() < 2e-3
    assert all(v.verified for v in bundle.manifest.variants)
    if head == "mean of a convolution":
        verified = CliRunner().invoke(
            main, ["verify", str(bundle.root), "--data", str(three), "--reference", str(path)]
        )
        assert verified.exit_code == 0, verified.output


def test_the_reference_is_not_what_was_exported(three, tmp_path, monkeypatch):
    """A softmax too many in the export alone: it was in the reference too, and nobody saw it."""
    from cnnedge import export
    from cnnedge.errors import GateError

    def always(model, classes, emits, add=export.give_probabilities):
        add(model, classes, "logits")

    monkeypatch.setattr(export, "give_probabilities", always)
    model = network(lambda x: layers.Dense(3, activation="softmax")(5 * pooled(x)))
    try:
        _, bundle = exported(model, tmp_path, three, "fp32")
    except GateError:
        return
    (fp32,) = bundle.manifest.variants
    assert fp32.verdict.status == "failed"


def test_sigmoids_are_refused_by_the_command(three, tmp_path):
    path = tmp_path / "m.keras"
    network(NEITHER["sigmoids moved up"][0]).save(path)
    arguments = ["export", path, "--data", three, "--preprocess", "unit", "-o", tmp_path / "out"]
    done = CliRunner().invoke(main, [str(a) for a in arguments])
    assert done.exit_code == 1
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert "sigmoids" in line
    assert not (tmp_path / "out").exists()


class TestRows:
    """Answers as tables, for what no small network gives at will."""

    PICTURES = np.random.default_rng(0).integers(0, 256, (40, 8, 8, 3)).astype(np.uint8)

    @staticmethod
    def told(scores):
        return read_head(scores, TestRows.PICTURES, "unit", name="m.keras")

    @staticmethod
    def shares(pixels, rng=7):
        return np.random.default_rng(rng).dirichlet([1, 1, 1], len(pixels))

    def test_one_photo_without_a_sum_of_one_is_enough(self):
        def scores(pixels):
            rows = self.shares(pixels)
            rows[0] *= 0.9
            return rows

        with pytest.raises(ModelError, match="sum to 1 on .* images only"):
            self.told(scores)

    def test_two_sigmoids_that_add_up_on_photos_alone_are_refused(self):
        def scores(pixels):
            first = np.where(np.arange(len(pixels)) % 2, 0.9999, 0.0001)
            photos = len(pixels) == len(self.PICTURES)
            return np.stack([first, (1 - first) if photos else first], axis=1)

        with pytest.raises(ModelError, match="sum to 1 on .* images only"):
            self.told(scores)

    def test_rows_of_zeros_tell_nothing(self):
        def scores(pixels):
            rows = self.shares(pixels)
            rows[::3] = 0
            return rows

        assert self.told(scores) == "probabilities"

    def test_rows_that_are_no_numbers_tell_nothing(self):
        def scores(pixels):
            rows = self.shares(pixels)
            rows[::3] = np.nan
            return rows

        assert self.told(scores) == "probabilities"

    def test_what_sums_to_one_and_leaves_the_range_is_refused(self):
        def scores(pixels):
            rows = np.random.default_rng(1).normal(0, 1, (len(pixels), 3))
            return rows - rows.mean(axis=1, keepdims=True) + 1 / 3

        with pytest.raises(ModelError, match="sum to 1 on every image and are not in"):
            self.told(scores)

    @pytest.mark.parametrize("kind", ["float16", "bfloat16"])
    def test_half_precision_rounds_a_sum(self, kind):
        import ml_dtypes

        dtype, rounding = {
            "float16": (np.float16, 2.0**-11),
            "bfloat16": (ml_dtypes.bfloat16, 2.0**-8),
        }[kind]

        def scores(pixels):
            return self.shares(pixels).astype(dtype)

        told = read_head(scores, self.PICTURES, "unit", name="m.keras", rounding=rounding)
        assert told == "probabilities"

    def test_all_test_images_are_held_to_it(self):
        answers = self.shares(range(500))
        require_head(answers, "probabilities", name="m.keras")
        answers[499] *= 0.5
        with pytest.raises(ModelError, match="do not sum to 1 on 1 of 500 test images"):
            require_head(answers, "probabilities", name="m.keras")
