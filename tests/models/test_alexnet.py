import keras
import numpy as np
import pytest

from cnnedge.models import build
from cnnedge.models.alexnet import AlexNetV2, alexnet, alexnet_v1

pytestmark = pytest.mark.tf

IMAGES = np.random.default_rng(0).random((2, 64, 72, 3), np.float32)


def test_the_sizes_are_those_of_the_paper():
    model = alexnet_v1()
    sizes = {layer.name: layer.output.shape[1] for layer in model.layers[1:11]}

    expected = {"pad1": 227, "conv1": 55, "pool1": 27, "conv2": 27, "pool2": 13}
    expected |= {"conv3": 13, "conv4": 13, "conv5": 13, "pool3": 6}
    assert sizes == expected | {"flatten": 6 * 6 * 128}


def test_the_layers_are_named_and_in_order():
    model = alexnet(64, 64, 5)
    names = [layer.name for layer in model.layers]

    assert names[-7:] == ["flatten", "dropout1", "fc1", "dropout2", "fc2", "fc3", "predictions"]
    assert [model.get_layer(f"conv{i}").filters for i in range(1, 6)] == [96, 256, 384, 384, 256]
    assert [model.get_layer(f"dropout{i}").rate for i in (1, 2)] == [0.2, 0.2]


def test_lrn_stands_between_the_first_two_convolutions_and_their_pools():
    names = [layer.name for layer in build("alexnet", height=64, width=64, lrn=True).layers]

    assert names[2:8] == ["conv1", "lrn1", "pool1", "conv2", "lrn2", "pool2"]
    assert "lrn1" not in [layer.name for layer in alexnet(64, 64).layers]


@pytest.fixture(scope="module")
def v2():
    return build("alexnet_v2", height=64, width=72, classes=4)


def test_v2_is_a_subclassed_model_in_three_parts(v2):
    assert isinstance(v2, AlexNetV2)
    assert "call" in vars(type(v2))
    assert v2.input_shape == (None, 64, 72, 3)
    units = [layer.units for layer in v2.classifier.layers if hasattr(layer, "units")]
    assert units == [1024, 128, 4]
    kernels = [layer.filters for layer in v2.features.layers if hasattr(layer, "filters")]
    assert kernels == [48, 128, 192, 192, 128]
    by_hand = v2.classifier(v2.flatten(v2.features(IMAGES)))
    np.testing.assert_array_equal(v2(IMAGES), by_hand)


def test_v2_comes_back_from_its_file(v2, tmp_path):
    v2.save(tmp_path / "v2.keras")
    loaded = keras.saving.load_model(tmp_path / "v2.keras")

    assert type(loaded) is AlexNetV2
    assert loaded.input_shape == v2.input_shape
    np.testing.assert_array_equal(loaded(IMAGES), v2(IMAGES))


def test_v2_rebuilds_from_its_config():
    model = AlexNetV2.from_config(AlexNetV2(9, name="mine").get_config())

    assert (model.name, model.num_classes) == ("mine", 9)


def test_v2_builds_at_its_first_call():
    model = AlexNetV2(3)

    assert model(IMAGES).shape == (2, 3)
    assert model.input_shape == (None, 64, 72, 3)


def test_dropout_acts_in_training_only(v2):
    np.testing.assert_array_equal(v2(IMAGES, training=False), v2(IMAGES))
    assert not np.array_equal(v2(IMAGES, training=True), v2(IMAGES))
