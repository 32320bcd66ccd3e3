"""Layers split by rank: exact where the rank is low, left alone where nothing is gained."""

from __future__ import annotations

import keras
import numpy as np
import pytest
from keras import layers

from cnnedge.compress.budget import costs
from cnnedge.compress.channels import map_channels
from cnnedge.compress.factorize import split_convolutions, split_dense

pytestmark = pytest.mark.tf

SHAPE = (16, 16, 3)


def network(seed=0, strides=1):
    """One convolution and one dense layer whose kernels have a rank of 8, and full ones beside."""
    rng = np.random.default_rng(seed)
    image = keras.Input(SHAPE)
    x = layers.Conv2D(32, 1, activation="relu", name="conv1")(image)
    x = layers.Conv2D(
        48, 3, strides=strides, padding="same", activation="relu", name="low", use_bias=True
    )(x)
    x = layers.Conv2D(24, 3, activation="relu", name="full")(x)
    x = layers.GlobalMaxPooling2D()(x)
    x = layers.Dense(64, activation="relu", name="fc_full")(x)
    x = layers.Dense(64, activation="relu", name="fc_low")(x)
    model = keras.Model(image, layers.Dense(10, name="fc3")(x))
    for variable in model.weights:
        variable.assign(rng.normal(size=variable.shape) * 0.2)
    read, made = rng.normal(size=(32, 8)), rng.normal(size=(48, 8))
    core = rng.normal(size=(3, 3, 8, 8)) * 0.02
    model.get_layer("low").kernel.assign(np.einsum("hwab,ia,ob->hwio", core, read, made))
    dense = rng.normal(size=(64, 8)) @ rng.normal(size=(8, 64)) * 0.1
    model.get_layer("fc_low").kernel.assign(dense)
    return model


def answers(model):
    images = np.random.default_rng(1).random((3, *SHAPE), np.float32)
    return model(images).numpy()


def close(split, model):
    scale = np.abs(answers(model)).max()
    np.testing.assert_allclose(answers(split), answers(model), rtol=0, atol=1e-5 * scale)


def test_a_dense_kernel_of_low_rank_is_split_without_loss():
    model = network()
    split, found = split_dense(model, SHAPE, energy=1.0, multiple=8)
    assert [(s.name, s.ranks, s.weights) for s in found] == [("fc_low", (8,), (4096, 1024))]
    assert str(found[0]) == "fc_low split at rank 8: 4,096 weights → 1,024"
    assert split.get_layer("fc_low_in").units == 8
    assert split.count_params() == model.count_params() - 4096 + 1024
    close(split, model)


@pytest.mark.parametrize("strides", [1, 2])
def test_a_convolution_of_low_rank_is_split_without_loss(strides):
    asked = []

    def faster(*case):
        asked.append(case)
        return True

    model = network(strides=strides)
    split, found = split_convolutions(model, SHAPE, energy=1.0, multiple=8, faster=faster)
    assert [(s.name, s.ranks) for s in found] == [("low", (8, 8))]
    # Those that would cost more are not even measured.
    assert asked == [(16, 16, (3, 3, 32, 48), (strides, strides), [8, 8])]
    assert [layer.kernel_size for layer in split.layers if layer.name.startswith("low")] == [
        *((1, 1), (3, 3), (1, 1))
    ]
    close(split, model)


def test_what_is_not_faster_stays():
    model = network()
    split, found = split_convolutions(
        model, SHAPE, energy=1.0, multiple=8, faster=lambda *case: False
    )
    assert (split is model, found) == (True, [])


def test_less_energy_means_a_lower_rank_and_another_answer():
    model = network()
    split, found = split_dense(model, SHAPE, energy=0.6, multiple=1)
    ranks = {s.name: s.ranks[0] for s in found}
    assert ranks["fc_low"] < 8
    assert "fc_full" in ranks
    kernel = np.array(model.get_layer("fc_low").kernel)
    approximate = np.array(split.get_layer("fc_low_in").kernel) @ np.array(
        split.get_layer("fc_low").kernel
    )
    lost = np.square(kernel - approximate).sum() / np.square(kernel).sum()
    assert 0 < lost <= 0.4 + 1e-6


def test_a_layer_used_twice_stays():
    image = keras.Input(SHAPE)
    twice = layers.Conv2D(32, 3, padding="same", name="twice")
    x = layers.GlobalMaxPooling2D()(twice(twice(layers.Conv2D(32, 1)(image))))
    model = keras.Model(image, layers.Dense(4)(x))
    kernel = np.zeros(twice.kernel.shape)
    kernel[:, :, 0, 0] = 1
    twice.kernel.assign(kernel)
    _, found = split_convolutions(model, SHAPE, energy=0.9, multiple=1, faster=lambda *case: True)
    assert not found


def test_what_lies_between_the_parts_can_be_pruned():
    split, _ = split_dense(network(), SHAPE, energy=1.0, multiple=8)
    channels = map_channels(split, SHAPE)
    assert "fc_low_in" in {group.name for group in channels.groups}
    _, params = costs(channels)
    assert params.at([len(group) for group in channels.groups]) == split.count_params()
