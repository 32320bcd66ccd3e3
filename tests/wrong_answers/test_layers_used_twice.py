"""A layer used twice: INT8 was an invalid graph, and the whole export died of it."""

from __future__ import annotations

import keras
import numpy as np
import pytest
from keras import layers

from cnnedge.backends.keras import predict
from cnnedge.backends.onnxruntime import open_session
from cnnedge.comparison import Verdict, compare
from cnnedge.export import export_onnx
from cnnedge.graph.float16 import to_float16
from cnnedge.graph.precision import achieved_precision
from cnnedge.graph.write import serialize
from cnnedge.image import ImageContract
from cnnedge.quantize import (
    CPU,
    TRT,
    calibrate,
    choose_ranges,
    hold_gate,
    make_plan,
    quantize,
    quantize_dense_weights,
)

pytestmark = pytest.mark.tf

SIZE = 32
WIDTH = 128  # of the dense layer that is used twice: a block of 8-bit weights


def network(shared: bool) -> keras.Model:
    """A convolution, a separable one, a dense layer, a tower and steps in time, each used twice.

    Not shared, each use is a layer of its own with the same weights.
    """

    def twice(make):
        first = make()
        return (first, first) if shared else (first, make())

    def tower():
        return keras.Sequential(
            [
                keras.Input((SIZE, SIZE, 3)),
                layers.Conv2D(8, 3, strides=4, activation="relu"),
                layers.Flatten(),
                layers.Dense(32, activation="relu"),
            ]
        )

    keras.utils.set_random_seed(0)
    image = keras.Input((SIZE, SIZE, 3))
    x = layers.Conv2D(16, 3, strides=2, activation="relu")(image)
    for layer in twice(lambda: layers.Conv2D(16, 3, padding="same", activation="relu")):
        x = layer(x)
    for layer in twice(lambda: layers.SeparableConv2D(16, 3, activation="relu")):
        x = layer(x)
    x = layers.Dense(WIDTH, activation="relu")(layers.Flatten()(x))
    for layer in twice(lambda: layers.Dense(WIDTH, activation="relu")):
        x = layer(x)
    one, other = twice(tower)
    sides = [one(image), other(layers.Rescaling(-1.0, 1.0)(image))]
    return keras.Model(
        image, layers.Dense(3, activation="softmax")(layers.Concatenate()([x, *sides]))
    )


@pytest.fixture(scope="module")
def both():
    """The network and its twin with nothing shared: the models, their graphs, images."""
    shared, apart = network(shared=True), network(shared=False)
    rng = np.random.default_rng(0)
    for variable in shared.trainable_variables:
        if variable.path.endswith("bias"):
            variable.assign(rng.normal(0, 0.1, variable.shape))
    of_use = {}  # by name without what Keras counts it with
    for old in shared._flatten_layers(include_self=False):
        of_use.setdefault((type(old), *(tuple(v.shape) for v in old.weights)), old)
    for new in apart._flatten_layers(include_self=False):
        if not isinstance(new, keras.Sequential):
            key = (type(new), *(tuple(v.shape) for v in new.weights))
            new.set_weights(of_use[key].get_weights())
    images = rng.integers(0, 256, (12, SIZE, SIZE, 3)).astype(np.uint8)
    contract = ImageContract(SIZE, SIZE)
    graphs = [
        export_onnx(model, name="twice", labels=("a", "b", "c"), image=contract).model
        for model in (shared, apart)
    ]
    return shared, apart, graphs, images


def run(model, images):
    return open_session(serialize(model))(images)


def ranges(graph, plan, images, folder):
    return choose_ranges(calibrate(graph, plan.tensors, [images], folder), plan, "minmax")


def test_float_answers_are_the_models(both):
    shared, apart, graphs, images = both
    expected = predict(shared, images, "unit")
    assert np.abs(expected - predict(apart, images, "unit")).max() < 1e-6
    assert np.ptp(expected, axis=1).mean() > 0.05  # else the rest would mean little
    assert np.abs(run(graphs[0], images) - expected).max() < 1e-6
    assert np.abs(run(to_float16(graphs[0]).model, images) - expected).max() < 2e-3


@pytest.mark.parametrize("target", [CPU, TRT], ids=["cpu", "trt"])
def test_int8_answers_as_without_sharing(both, target, tmp_path):
    *_, graphs, images = both
    found = []
    for graph in graphs:
        plan = make_plan(graph, target)
        found.append(quantize(graph, plan, ranges(graph, plan, images, tmp_path)).model)
    np.testing.assert_array_equal(run(found[0], images), run(found[1], images))
    one, other = map(achieved_precision, found)
    assert one["macs"] == other["macs"]
    assert one["macs"]["int8"] > 0.99
    # the dense kernel alone, which is stored once
    assert len(serialize(found[1])) - len(serialize(found[0])) >= WIDTH**2


@pytest.mark.parametrize("bits", [8, 4])
def test_weights_alone_are_stored_once(both, bits):
    *_, graphs, images = both
    one, other = (quantize_dense_weights(graph, bits).model for graph in graphs)
    np.testing.assert_array_equal(run(one, images), run(other, images))
    assert len(serialize(other)) - len(serialize(one)) >= WIDTH**2 * bits // 8


def test_the_guard_goes_through_all_it_has(both, tmp_path):
    *_, graphs, images = both
    images = images[:4]
    expected = run(graphs[0], images)
    worst = []

    def evaluate(model):
        answers = run(model, images)
        worst.append(np.abs(answers - expected).max())
        return compare(answers, expected, expected.argmax(1)), Verdict("failed", "none will do")

    plan = make_plan(graphs[0], CPU)
    calibration = calibrate(graphs[0], plan.tensors, [images], tmp_path)
    found = hold_gate(graphs[0], plan, calibration, lambda: [images], evaluate, tmp_path)
    steps = {attempt.step for attempt in found.attempts}
    assert {"plain", "equalize", "bias", "mixed"} <= steps
    assert max(worst) < 0.05
