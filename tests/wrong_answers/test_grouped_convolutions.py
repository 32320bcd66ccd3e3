"""A grouped convolution read "no PartitionedCall"; what cannot be converted names its layer."""

from __future__ import annotations

import keras
import numpy as np
import pytest
from keras import layers

from cnnedge.backends.keras import predict
from cnnedge.backends.onnxruntime import open_session
from cnnedge.errors import ModelError
from cnnedge.export import export_onnx
from cnnedge.graph.write import serialize
from cnnedge.image import ImageContract

pytestmark = pytest.mark.tf

SIZE = 32


def exported(model):
    contract = ImageContract(SIZE, SIZE)
    return export_onnx(model, name="m", labels=("a", "b", "c"), image=contract).model


def test_grouped_convolutions_answer_as_the_model():
    keras.utils.set_random_seed(0)
    image = keras.Input((SIZE, SIZE, 3))
    x = layers.Conv2D(16, 3, strides=2, activation="relu")(image)
    x = layers.Conv2D(32, 3, groups=2, activation="relu")(x)
    x = layers.Conv2D(32, 3, groups=8, padding="same", use_bias=False)(x)
    x = layers.GlobalAveragePooling2D()(x)
    model = keras.Model(image, layers.Dense(3, activation="softmax")(x))
    batch = np.random.default_rng(0).integers(0, 256, (4, SIZE, SIZE, 3)).astype(np.uint8)
    found = open_session(serialize(exported(model)))(batch)
    assert np.abs(found - predict(model, batch, "unit")).max() < 1e-6


def test_the_layer_that_cannot_be_converted_is_named():
    image = keras.Input((SIZE, SIZE, 3))
    x = layers.Conv2D(8, 3, strides=2)(image)
    x = layers.Lambda(lambda t: keras.ops.erfinv(keras.ops.tanh(t) / 2), name="odd_one")(x)
    model = keras.Model(image, layers.Dense(3)(layers.Flatten()(x)))
    with pytest.raises(ModelError, match="odd_one") as raised:
        exported(model)
    assert len(str(raised.value)) <= 300
    assert "replace" in str(raised.value)
