import keras
import numpy as np
import pytest

from cnnedge.errors import ModelError
from cnnedge.models import build
from cnnedge.models.layers import SortPool2D
from cnnedge.models.vgg import make_feature, vgg

pytestmark = pytest.mark.tf

SMALL = {"height": 32, "width": 32, "classes": 3, "fc_units": 8}


def test_the_paper_s_vgg16_has_fully_connected_layers_of_4096():
    assert build("vgg16", fc_units=4096).count_params() == 138_357_544


@pytest.mark.parametrize(
    ("name", "per_block"),
    [
        ("vgg11", [1, 1, 2, 2, 2]),
        ("vgg13", [2, 2, 2, 2, 2]),
        ("vgg16", [2, 2, 3, 3, 3]),
        ("vgg19", [2, 2, 4, 4, 4]),
    ],
)
def test_the_layers_are_named_by_block(name, per_block):
    expected = ["image"]
    for block, count in enumerate(per_block, 1):
        expected += [f"conv{block}_{i}" for i in range(1, count + 1)] + [f"pool{block}"]
    expected += ["flatten", "dropout1", "fc1", "dropout2", "fc2", "fc3", "predictions"]

    assert [layer.name for layer in build(name, **SMALL).layers] == expected


def test_the_initializers_have_the_source_s_spread():
    # At 2 * k * k * kernels fan-out, the variance of conv5_1 is 2 / (9 * 512).
    model = build("vgg11", **SMALL | {"fc_units": 512})
    convolution = model.get_layer("conv5_1").kernel.numpy()
    dense = model.get_layer("fc1").kernel.numpy()

    assert convolution.std() == pytest.approx((2 / (9 * 512)) ** 0.5, rel=0.02)
    assert dense.std() == pytest.approx((1 / 3 / 512) ** 0.5, rel=0.02)
    assert abs(dense).max() <= (3 * 1 / 3 / 512) ** 0.5  # uniform: bounded by sqrt(3 * variance)
    assert [model.get_layer(f"dropout{i}").rate for i in (1, 2)] == [0.5, 0.5]


def test_sort_pooling_takes_the_place_of_every_max_pooling():
    model = build("vgg11", pool="sort", pool_range=3, **SMALL)
    pools = [layer for layer in model.layers if layer.name.startswith("pool")]

    assert [type(pool) for pool in pools] == [SortPool2D] * 5
    assert [pool.pool_range for pool in pools] == [3] * 5


def test_a_configuration_of_one_s_own_mixes_the_poolings():
    model = build("vgg11", cfg=[4, "M", 6, 5, "S"], **SMALL)
    kinds = [(layer.name, type(layer).__name__) for layer in model.layers[1:6]]

    assert kinds == [
        ("conv1_1", "Conv2D"),
        ("pool1", "MaxPooling2D"),
        ("conv2_1", "Conv2D"),
        ("conv2_2", "Conv2D"),
        ("pool2", "SortPool2D"),
    ]
    assert model.get_layer("pool2").pool_range == 4
    assert vgg("tiny", 4, 4, 2, cfg=[4, "M", 6, 5, "S"], fc_units=2).output_shape == (None, 2)
    with pytest.raises(ModelError, match=r"3x4 is too small for tiny; .* 4x4"):
        vgg("tiny", 3, 4, 2, cfg=[4, "M", 6, 5, "S"], fc_units=2)


def test_sort_pooling_over_one_activation_is_the_max_pooled_network():
    images = np.random.default_rng(0).random((2, 35, 33, 3), np.float32)
    size = SMALL | {"height": 35, "width": 33}
    with_max, with_sort = build("vgg11", **size), build("vgg11", pool="sort", pool_range=1, **size)

    np.testing.assert_array_equal(with_max(images), with_sort(images))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pool": "average"}, "pool of vgg11 is 'average'"),
        ({"pool_range": 2}, "pool_range of vgg11 has no effect on max pooling"),
        ({"pool": "sort", "pool_range": 5}, "pool_range of pool1 is 5"),
        ({"fc_units": 0}, "fc_units of vgg11 is 0"),
        ({"cfg": [64, "m"]}, "'m' is no token of a VGG configuration"),
        ({"cfg": [64, -2]}, "-2 is no token"),
        ({"cfg": [True]}, "True is no token"),
    ],
)
def test_options_that_make_no_sense_are_refused(options, message):
    with pytest.raises(ModelError, match=message):
        build("vgg11", **SMALL | options)


def test_a_sort_pooled_network_trains_saves_and_loads(tmp_path):
    random = np.random.default_rng(0)
    images = random.random((8, 8, 8, 1), np.float32)
    labels = np.arange(8) % 2
    model = vgg("tiny", 8, 8, 2, 1, cfg=[4, "S", 4, "S"], pool_range=3, fc_units=8)
    before = model.get_layer("pool1").logits.numpy()
    model.compile(keras.optimizers.Adam(0.01), "sparse_categorical_crossentropy")
    model.fit(images, labels, epochs=3, verbose=0)

    assert not np.array_equal(model.get_layer("pool1").logits.numpy(), before)
    model.save(tmp_path / "tiny.keras")
    loaded = keras.saving.load_model(tmp_path / "tiny.keras")
    assert loaded.get_layer("pool1").pool_range == 3
    np.testing.assert_array_equal(loaded(images), model(images))


def test_make_feature_gives_one_layer_a_token():
    assert [layer.name for layer in make_feature(["S", 3])] == ["pool1", "conv2_1"]
