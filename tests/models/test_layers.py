import logging

import keras
import numpy as np
import pytest
import tensorflow as tf

from cnnedge.errors import ModelError
from cnnedge.models.layers import LocalResponseNormalization, SortPool2D, smallest_input

pytestmark = pytest.mark.tf

IMAGES = np.random.default_rng(0).normal(size=(2, 7, 6, 8)).astype(np.float32)


def onnx_of(layer):
    """The layer's ONNX graph: its answer to IMAGES, and the operations it consists of."""
    import onnxruntime
    import tf2onnx

    logging.getLogger("tf2onnx").setLevel(logging.ERROR)
    signature = [tf.TensorSpec((None, *IMAGES.shape[1:]), tf.float32, name="x")]
    proto, _ = tf2onnx.convert.from_function(
        tf.function(layer, autograph=False, input_signature=signature), signature, opset=18
    )
    session = onnxruntime.InferenceSession(proto.SerializeToString())
    return session.run(None, {"x": IMAGES})[0], {node.op_type for node in proto.graph.node}


def windows(images):
    """The four activations of each 2x2 window, descending: [N, H // 2, W // 2, C, 4]."""
    n, h, w, c = images.shape
    even = images[:, : h // 2 * 2, : w // 2 * 2]
    blocks = even.reshape(n, h // 2, 2, w // 2, 2, c).transpose(0, 1, 3, 5, 2, 4)
    return -np.sort(-blocks.reshape(n, h // 2, w // 2, c, 4), axis=-1)


@pytest.mark.parametrize("pool_range", [2, 3, 4])
def test_sort_pooling_weighs_the_sorted_window(pool_range):
    layer = SortPool2D(pool_range)
    layer.build(IMAGES.shape)
    logits = np.array([0.3, -1.0, 2.0, 0.5], np.float32)[:pool_range]
    layer.logits.assign(logits)
    weights = np.exp(logits) / np.exp(logits).sum()

    expected = windows(IMAGES)[..., :pool_range] @ weights
    np.testing.assert_allclose(layer(IMAGES), expected, rtol=1e-5, atol=1e-6)
    assert layer.compute_output_shape(IMAGES.shape) == expected.shape == (2, 3, 3, 8)


def test_sort_pooling_starts_near_max_pooling():
    for pool_range in (2, 3, 4):
        layer = SortPool2D(pool_range)
        layer.build(IMAGES.shape)
        weights = keras.ops.softmax(layer.logits).numpy()
        np.testing.assert_allclose(weights[0], 0.9, rtol=1e-6)
        np.testing.assert_allclose(weights[1:], 0.1 / (pool_range - 1), rtol=1e-5)


@pytest.mark.parametrize("size", [(6, 6), (7, 6), (6, 7), (7, 7), (2, 3)])
def test_sort_pooling_of_range_one_is_max_pooling_to_the_bit(size):
    images = IMAGES[:, : size[0], : size[1]]
    if size[1] == 7:
        images = IMAGES.transpose(0, 2, 1, 3)[:, : size[0]]
    layer = SortPool2D(1)

    np.testing.assert_array_equal(layer(images), keras.layers.MaxPooling2D(2)(images))
    assert layer.weights == []


def test_every_rank_of_sort_pooling_has_a_gradient():
    layer = SortPool2D(4)
    images = tf.constant([[[[1.0], [4.0]], [[3.0], [2.0]]]])
    with tf.GradientTape() as tape:
        tape.watch(images)
        pooled = layer(images)
    to_images, to_logits = tape.gradient(pooled, [images, layer.logits])

    weights = keras.ops.softmax(layer.logits).numpy()
    np.testing.assert_allclose(np.ravel(to_images), weights[[3, 0, 1, 2]], rtol=1e-6)
    assert np.all(to_logits != 0)


@pytest.mark.parametrize("pool_range", [1, 2, 4])
def test_sort_pooling_exports_without_a_sort(pool_range):
    layer = SortPool2D(pool_range)
    answer, operations = onnx_of(layer)

    np.testing.assert_allclose(answer, layer(IMAGES), rtol=1e-6, atol=1e-6)
    assert "Max" in operations
    assert ("Min" in operations) == (pool_range > 1)
    assert not operations & {"TopK", "Sort", "Shape", "Loop"}


def test_lrn_is_the_formula_of_the_paper():
    images = IMAGES * 30  # large enough for alpha to tell
    layer = LocalResponseNormalization()
    squares = np.pad(images**2, ((0, 0), (0, 0), (0, 0), (2, 2)))
    neighbours = sum(squares[..., i : i + 8] for i in range(5))

    np.testing.assert_allclose(layer(images), images / (2 + 1e-4 * neighbours) ** 0.75, rtol=1e-5)


def test_lrn_exports_as_the_operation_of_that_name():
    layer = LocalResponseNormalization(size=3, k=1.0, alpha=0.1, beta=0.5)
    answer, operations = onnx_of(layer)

    assert "LRN" in operations
    np.testing.assert_allclose(answer, layer(IMAGES), rtol=1e-5)


def test_an_even_lrn_window_is_refused():
    with pytest.raises(ModelError, match="is 4"):
        LocalResponseNormalization(size=4)


@pytest.mark.parametrize(
    "layer", [LocalResponseNormalization(3, 1.0, 0.2, 0.5), SortPool2D(2)], ids=lambda la: la.name
)
def test_layers_rebuild_from_their_config(layer):
    config = keras.saving.serialize_keras_object(layer)
    again = keras.saving.deserialize_keras_object(config)

    assert config["registered_name"].startswith("cnnedge>")
    assert again.get_config() == layer.get_config()
    np.testing.assert_array_equal(again(IMAGES), layer(IMAGES))


def test_the_smallest_input_is_computed_from_the_layers():
    stack = [
        keras.layers.ZeroPadding2D(((1, 2), (0, 0))),
        keras.layers.Conv2D(2, (11, 5), strides=(4, 2)),
        keras.layers.ReLU(),
        keras.layers.Conv2D(2, 3, dilation_rate=2),
        keras.layers.Conv2D(2, 3, strides=2, padding="same"),
        SortPool2D(),
    ]
    # Backwards, height: 2, (2-1)*2+1 = 3, 3+4 = 7, (7-1)*4+11 = 35, less 3 of padding = 32.
    assert smallest_input(stack) == (32, 17)
    model = keras.Sequential(stack)
    assert model.compute_output_shape((1, 32, 17, 3)) == (1, 1, 1, 2)
    assert 0 in model.compute_output_shape((1, 32, 16, 3))
