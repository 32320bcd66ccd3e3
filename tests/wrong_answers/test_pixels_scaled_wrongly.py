"""A model that was given other pixels than it was trained on, with exit code 0."""

from __future__ import annotations

import numpy as np
import pytest
from conftest import SIZE, write_photos

from cnnedge.errors import ModelError
from cnnedge.image import ImageContract, normalize
from cnnedge.recipe import make_recipe

keras = pytest.importorskip("keras")
from keras import layers as L  # noqa: E402, N812
from keras import ops  # noqa: E402

pytestmark = pytest.mark.tf

MEAN, DEVIATION = np.float32([0.485, 0.456, 0.406]), np.float32([0.229, 0.224, 0.225])


@keras.saving.register_keras_serializable(package="wrong_answers")
class LessMean(L.Layer):
    """A layer of the user's own, whose mean is a weight."""

    def build(self, shape):
        self.mean = self.add_weight(
            shape=(1, 1, 1, 3), initializer=keras.initializers.Constant(120.0), trainable=False
        )

    def call(self, x):
        return (x - self.mean) / 60.0


def adapted(scale, offset=0.0, **options):
    """Return a Normalization that was adapted on pixels of 0…255 scaled so."""
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (40, SIZE, SIZE, 3)) * np.float32([0.9, 0.6, 0.4])
    layer = L.Normalization(**options)
    layer.adapt(pixels.astype(np.float32) * scale + offset)
    return layer


def batch_norm(mean, variance):
    layer = L.BatchNormalization()
    layer.build((None, SIZE, SIZE, 3))
    layer.moving_mean.assign(np.full(3, mean))
    layer.moving_variance.assign(np.full(3, variance))
    return layer


def augmented(x):
    for layer in (L.RandomFlip(), L.RandomRotation(0.1), L.RandomZoom(0.1), L.RandomContrast(0.1)):
        x = layer(x)
    return L.Rescaling(1 / 255)(x)


def moved(x):
    x = L.CenterCrop(20, 20)(L.Resizing(24, 24)(x))
    return L.Permute((3, 1, 2))(L.Rescaling(1 / 255)(L.Identity()(L.ZeroPadding2D(2)(x))))


def backwards(x):
    return L.Permute((2, 3, 1))(x)


RAW = {
    "1/255": L.Rescaling(1 / 255),
    "1/127.5 - 1": L.Rescaling(1 / 127.5, -1),
    "1/128": L.Rescaling(1 / 128),
    "1/256": L.Rescaling(1 / 256),
    "0.0039": L.Rescaling(0.0039),
    "Normalization of raw pixels": adapted(1.0),
    "Normalization of raw pixels, position by position": adapted(1.0, axis=(1, 2, 3)),
    "behind augmentation": augmented,
    "behind layers that move pixels": lambda x: backwards(moved(x)),
    "division": lambda x: x / 255.0,
    "multiplication": lambda x: x * (1 / 255),
    "subtraction and division": lambda x: (x - 127.5) / 127.5,
    "keras.ops": lambda x: ops.subtract(ops.divide(x, 127.5), 1.0),
    "mean and deviation": lambda x: (x / 255 - MEAN) / DEVIATION,
    "two layers": lambda x: L.Normalization(mean=[0.5] * 3, variance=[0.08] * 3)(x / 255),
    "what mobilenet_v2 takes": keras.applications.mobilenet_v2.preprocess_input,
    "what vgg16 takes": keras.applications.vgg16.preprocess_input,
    "batch norm of raw pixels": batch_norm(118, 4900),
    "clipped": lambda x: ops.clip(x, 0, 255) / 255,
    "half precision": lambda x: ops.cast(x, "float16") / 255,
    "a layer of one's own": LessMean(),
}
UNSAID = {
    "nothing": lambda x: x,
    "Normalization of x/255": adapted(1 / 255),
    "Normalization of x/127.5 - 1": adapted(1 / 127.5, -1),
    "2x - 1": L.Rescaling(2.0, -1.0),
    "0.1": L.Rescaling(0.1),
    "1": L.Rescaling(1.0),
    "behind a convolution": lambda x: L.Rescaling(0.1)(L.Conv2D(3, 3)(x)),
    "1/255 behind a convolution": lambda x: L.Rescaling(1 / 255)(L.Conv2D(3, 3)(x)),
    "on one branch of two": lambda x: L.Concatenate()([x / 255.0, L.Conv2D(3, 1)(x)]),
    "on half of the channels": lambda x: L.Concatenate()([x / 255.0, x]),
    "twice": lambda x: L.Rescaling(1 / 255)(x / 255.0),
    "batch norm of x/255": batch_norm(0.45, 0.06),
    "batch norm as made": L.BatchNormalization(),
    "by the image's own maximum": lambda x: x / ops.max(x),
    "clipped to 0…1": lambda x: ops.clip(x, 0, 1),
}


def network(first, classes=3):
    inputs = keras.Input((SIZE, SIZE, 3))
    x = L.Conv2D(8, 3, strides=2, activation="relu")(first(inputs))
    outputs = L.Dense(classes, activation="softmax")(L.GlobalAveragePooling2D()(x))
    return keras.Model(inputs, outputs)


def nested(model):
    inputs = keras.Input((SIZE, SIZE, 3))
    return keras.Model(inputs, model(inputs))


def normalization_of(model, tmp_path, **fields):
    from cnnedge.source import resolve

    model.save(tmp_path / "m.keras")
    source, warnings = resolve(make_recipe(model=str(tmp_path / "m.keras"), **fields))
    return source.normalization, warnings


@pytest.mark.parametrize("how", RAW)
def test_a_model_that_scales_raw_pixels_is_given_raw_pixels(how, tmp_path):
    assert normalization_of(network(RAW[how]), tmp_path)[0] == "none"
    assert normalization_of(nested(network(RAW[how])), tmp_path)[0] == "none"


@pytest.mark.parametrize("how", UNSAID)
def test_a_model_that_does_not_say_is_asked_about(how, tmp_path):
    for model in (network(UNSAID[how]), nested(network(UNSAID[how]))):
        with pytest.raises(ModelError, match="does not say how it wants its pixels.*--preprocess"):
            normalization_of(model, tmp_path)


@pytest.mark.parametrize("name", ["EfficientNetB0", "MobileNetV3Small", "ConvNeXtTiny"])
def test_an_application_that_scales_inside_is_given_raw_pixels(name):
    from cnnedge.preprocessing import wanted

    build = getattr(keras.applications, name)
    inside = build(include_top=False, weights=None, input_shape=(SIZE, SIZE, 3))
    model = keras.Sequential([keras.Input((SIZE, SIZE, 3)), inside, L.Flatten(), L.Dense(3)])
    assert wanted(model, ImageContract(SIZE, SIZE), name) == "none"


def test_the_question_tells_what_was_found(tmp_path):
    first = adapted(1 / 255)
    with pytest.raises(ModelError) as caught:
        normalization_of(network(first), tmp_path)
    line = str(caught.value)
    assert f"{first.name} makes -" in line
    assert "as if for unit or tf" in line
    assert len(line) < 300 + len(str(tmp_path))


# --- told otherwise, and the answers show it ---------------------------------------------------


@pytest.fixture(scope="module")
def photos60(tmp_path_factory):
    return write_photos(tmp_path_factory.mktemp("photos") / "photos", 3, 60)


@pytest.fixture(scope="module")
def trained(photos60):
    """Networks that know the photos: one scales raw pixels, one was adapted on x/255."""
    from cnnedge.data import open_source

    split = open_source(str(photos60)).train
    images = np.stack([split.tensor(i, ImageContract(SIZE, SIZE)) for i in range(len(split))])
    found = {}
    for name, first, given in (
        ("scales", L.Rescaling(1 / 127.5, -1), "none"),
        ("adapted", adapted(1 / 255), "unit"),
        ("silent", L.Identity(), "unit"),
    ):
        keras.utils.set_random_seed(0)
        model = network(first)
        model.compile(keras.optimizers.Adam(0.02), "sparse_categorical_crossentropy")
        model.fit(normalize(images, given), split.targets, epochs=12, verbose=0)
        found[name] = model
    return found


def test_scaling_twice_is_refused_where_the_answers_show_it(trained, photos60, tmp_path):
    for asked in ("unit", "tf", "torch"):
        with pytest.raises(ModelError, match=r"rescaling.*% of 36 test .* --preprocess none"):
            normalization_of(trained["scales"], tmp_path, preprocess=asked, data=str(photos60))
    assert normalization_of(trained["scales"], tmp_path, preprocess="none", data=str(photos60)) == (
        "none",
        [],
    )


def test_scaling_twice_is_refused_without_labels_where_every_image_gets_one_answer(
    trained, tmp_path
):
    with pytest.raises(ModelError, match="hardly depend on the image; pass --preprocess none"):
        normalization_of(trained["scales"], tmp_path, preprocess="unit")


def test_scaling_twice_is_told_where_the_answers_do_not_show_it(trained, tmp_path):
    found, warnings = normalization_of(trained["scales"], tmp_path, preprocess="caffe")
    assert found == "caffe"
    assert [line.startswith("--preprocess caffe of a model that scales") for line in warnings] == [
        True
    ]


def test_a_model_that_was_trained_on_twice_scaled_pixels_may_be_given_them(photos60, tmp_path):
    from cnnedge.data import open_source

    split = open_source(str(photos60)).train
    images = np.stack([split.tensor(i, ImageContract(SIZE, SIZE)) for i in range(len(split))])
    keras.utils.set_random_seed(0)
    inputs = keras.Input((SIZE, SIZE, 3))
    x = L.BatchNormalization()(L.Conv2D(8, 3, strides=2)(L.Rescaling(1 / 255)(inputs)))
    model = keras.Model(inputs, L.Dense(3, "softmax")(L.GlobalAveragePooling2D()(x)))
    model.compile(keras.optimizers.Adam(0.02), "sparse_categorical_crossentropy")
    model.fit(normalize(images, "unit"), split.targets, epochs=25, verbose=0)
    found, warnings = normalization_of(model, tmp_path, preprocess="unit", data=str(photos60))
    assert found == "unit"
    assert len(warnings) == 1


def test_raw_pixels_for_a_model_of_small_ones_are_refused_where_the_answers_show_it(
    trained, photos60, tmp_path
):
    with pytest.raises(ModelError, match=r"normalization.*% of 36 .*pass --preprocess (unit|tf)"):
        normalization_of(trained["adapted"], tmp_path, preprocess="none", data=str(photos60))
    assert (
        normalization_of(trained["adapted"], tmp_path, preprocess="unit", data=str(photos60))[1]
        == []
    )


def test_another_preprocessing_that_does_better_is_told(trained, photos60, tmp_path):
    found, warnings = normalization_of(
        trained["silent"], tmp_path, preprocess="caffe", data=str(photos60)
    )
    assert found == "caffe"
    assert len(warnings) == 1
    assert "with unit 100.0%" in warnings[0]


# --- one channel ---------------------------------------------------------------------------------


def grey(scaling):
    inputs = keras.Input((SIZE, SIZE, 1))
    x = L.Conv2D(4, 3, strides=2, activation="relu")(scaling(inputs))
    outputs = L.Dense(10, activation="softmax")(L.GlobalAveragePooling2D()(x))
    return keras.Model(inputs, outputs)


def test_a_grey_model_is_asked_about_what_one_channel_can_have(tmp_path):
    """Normalizations with three numbers were tried on its one channel, and ended in a traceback."""
    assert normalization_of(grey(L.Rescaling(1 / 255)), tmp_path)[0] == "none"
    with pytest.raises(ModelError, match="does not say how it wants its pixels"):
        normalization_of(grey(L.Identity()), tmp_path)
    for name in ("unit", "tf", "none"):
        asked = {"preprocess": name, "data": "digits"}
        assert normalization_of(grey(L.Identity()), tmp_path, **asked)[0] == name


@pytest.mark.parametrize("name", ["caffe", "torch"])
def test_three_numbers_for_one_channel_are_refused(name, tmp_path):
    with pytest.raises(ModelError, match=f"--preprocess {name} has a number for each of three"):
        normalization_of(grey(L.Identity()), tmp_path, preprocess=name, data="digits")
