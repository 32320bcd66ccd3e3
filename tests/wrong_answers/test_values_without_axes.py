"""A value of no axes, a single number, ended in an IndexError; any first axis was the batch."""

from __future__ import annotations

import keras
import numpy as np
import pytest
from keras import layers, ops

from cnnedge.backends.keras import predict
from cnnedge.backends.onnxruntime import open_session
from cnnedge.export import export_onnx
from cnnedge.graph.edit import all_nodes
from cnnedge.graph.float16 import to_float16
from cnnedge.graph.write import serialize
from cnnedge.image import ImageContract
from cnnedge.quantize import CPU, TRT, calibrate, choose_ranges, make_plan, quantize

pytestmark = pytest.mark.tf

SIZE = 32


def ended(image, x):
    x = layers.Conv2D(16, 3, strides=2, activation="relu")(x)
    x = layers.GlobalAveragePooling2D()(x)
    return keras.Model(image, layers.Dense(3, activation="softmax", name="head")(x))


def cropped():
    image = keras.Input((SIZE, SIZE, 3))
    return ended(image, layers.Resizing(24, 28, crop_to_aspect_ratio=True)(image))


def padded():
    image = keras.Input((SIZE, SIZE, 3))
    return ended(image, layers.Resizing(24, 28, pad_to_aspect_ratio=True)(image))


def divided():
    image = keras.Input((SIZE, SIZE, 3))
    x = layers.Conv2D(16, 3, activation="relu")(image / (ops.max(image) + 1e-3))
    total = ops.reshape(ops.sum(ops.abs(x)), ())
    return ended(image, x / (1 + 1e-3 * total) - ops.mean(x))


def dense_on_a_map():
    image = keras.Input((SIZE, SIZE, 3))
    x = layers.Conv2D(16, 3, strides=2, activation="relu")(image)
    return ended(image, layers.Dense(24, activation="relu")(layers.Dense(32)(x)))


MODELS = [cropped, padded, divided, dense_on_a_map]


@pytest.mark.parametrize("make", MODELS, ids=[make.__name__ for make in MODELS])
def test_the_answers_are_the_models(make, tmp_path):
    keras.utils.set_random_seed(1)
    model = make()
    batch = np.random.default_rng(0).integers(0, 256, (6, SIZE, SIZE, 3)).astype(np.uint8)
    expected = predict(model, batch, "unit")
    contract = ImageContract(SIZE, SIZE)
    graph = export_onnx(model, name="m", labels=("a", "b", "c"), image=contract).model
    assert [str(value.shape) for value in graph.graph.outputs] == ["[N,3]"]
    assert np.abs(open_session(serialize(graph))(batch) - expected).max() < 1e-6
    assert np.abs(open_session(serialize(to_float16(graph).model))(batch) - expected).max() < 2e-3
    for target in (CPU, TRT):
        plan = make_plan(graph, target)
        ranges = choose_ranges(calibrate(graph, plan.tensors, [batch], tmp_path), plan, "minmax")
        found = open_session(serialize(quantize(graph, plan, ranges).model))
        assert np.abs(found(batch) - expected).max() < 0.05


def test_only_the_batch_is_called_so():
    """Runtimes plan their memory by names of axes: one name is one length."""
    image = keras.Input((SIZE, SIZE, 3))
    x = layers.Reshape((4, 8, SIZE, 3))(image)
    x = layers.TimeDistributed(layers.Dense(16))(x)
    x = layers.LSTM(8)(layers.Reshape((4, 8 * SIZE * 16))(x))
    model = keras.Model(image, layers.Dense(3, activation="softmax")(x))
    contract = ImageContract(SIZE, SIZE)
    graph = export_onnx(model, name="m", labels=("a", "b", "c"), image=contract).model
    values = {
        value.name: value
        for node in graph.graph
        for value in node.outputs
        if value.shape is not None and "N" in map(str, value.shape.dims[:1])
    }
    assert len(values) > 3
    assert list(all_nodes(graph))
    given = [value for value in values.values() if not value.is_graph_output()]
    graph.graph.outputs.extend(given)
    batch = np.zeros((5, SIZE, SIZE, 3), np.uint8)
    session = open_session(serialize(graph)).session
    found = session.run([value.name for value in given], {"image": batch})
    assert {array.shape[0] for array in found} == {5}
