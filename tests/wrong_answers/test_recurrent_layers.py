"""LSTM, GRU and their like: the declared opset ignored loops, and no runtime took the file."""

from __future__ import annotations

import keras
import numpy as np
import onnx
import pytest
from keras import layers

from cnnedge.backends.keras import predict
from cnnedge.backends.onnxruntime import open_session
from cnnedge.export import export_onnx, write_onnx
from cnnedge.graph.edit import all_nodes
from cnnedge.graph.fingerprint import layer_fingerprints
from cnnedge.graph.float16 import to_float16
from cnnedge.graph.precision import achieved_precision, weighted_layers
from cnnedge.graph.write import serialize
from cnnedge.image import ImageContract
from cnnedge.quantize import CPU, TRT, calibrate, choose_ranges, make_plan, quantize

pytestmark = pytest.mark.tf

SIZE = 32


def rows():
    """Three recurrent layers over the rows of a feature map."""
    image = keras.Input((SIZE, SIZE, 3))
    x = layers.Conv2D(16, 3, strides=2, activation="relu", name="stem")(image)
    x = layers.Conv2D(16, 3, strides=2, activation="relu", name="second")(x)
    x = layers.Reshape((7, 7 * 16))(x)
    x = layers.Bidirectional(layers.LSTM(16, return_sequences=True), name="both")(x)
    x = layers.GRU(16, return_sequences=True, name="gru")(x)
    x = layers.SimpleRNN(16, go_backwards=True, name="back")(x)
    x = layers.Dense(32, activation="relu", name="dense")(x)
    return keras.Model(image, layers.Dense(3, activation="softmax", name="head")(x))


def strips():
    """A convolutional one over strips of the image, with a convolution behind it."""
    image = keras.Input((SIZE, SIZE, 3))
    x = layers.ConvLSTM2D(16, 3, name="lstm")(layers.Reshape((4, 8, SIZE, 3))(image))
    x = layers.Conv2D(32, 3, activation="relu", name="last")(x)
    x = layers.GlobalAveragePooling2D()(x)
    return keras.Model(image, layers.Dense(3, activation="softmax", name="head")(x))


@pytest.fixture(scope="module", params=[rows, strips], ids=["rows", "strips"])
def case(request):
    keras.utils.set_random_seed(3)
    model = request.param()
    rng = np.random.default_rng(0)
    for variable in model.trainable_variables:
        if variable.path.endswith("bias"):
            variable.assign(rng.normal(0, 0.2, variable.shape))
    batch = rng.integers(0, 256, (6, SIZE, SIZE, 3)).astype(np.uint8)
    contract = ImageContract(SIZE, SIZE)
    graph = export_onnx(model, name="r", labels=("a", "b", "c"), image=contract).model
    return model, graph, batch, predict(model, batch, "unit")


def test_the_answers_are_the_models(case):
    _, graph, batch, expected = case
    run = open_session(serialize(graph))
    assert np.abs(run(batch) - expected).max() < 1e-5
    assert np.abs(run(batch[:1]) - expected[:1]).max() < 1e-5
    assert np.abs(open_session(serialize(to_float16(graph).model))(batch) - expected).max() < 2e-3


def test_the_declared_opset_describes_the_bodies_too(case):
    _, graph, _, _ = case
    proto = onnx.load_from_string(serialize(graph))
    onnx.checker.check_model(proto, full_check=True)
    opset = graph.graph.opset_imports[""]
    for node in all_nodes(graph):
        assert onnx.defs.get_schema(node.op_type, 18, "").since_version <= opset
    names = [node.name for node in all_nodes(graph)]
    assert len(names) == len(set(names))
    assert any(node.graph is not graph.graph for node in all_nodes(graph))


def test_half_precision_reaches_the_bodies(case):
    _, graph, _, _ = case
    assert achieved_precision(to_float16(graph).model)["macs"]["float16"] == 1.0


def test_the_work_of_every_step_is_counted(case):
    model, graph, _, _ = case
    inside = [layer for layer in weighted_layers(graph) if layer.op_type != "Gemm"]
    if model.name and any(layer.name == "gru" for layer in model.layers):
        steps = [layer for layer in inside if layer.op_type == "MatMul"]
        kernels = {"both": 2 * (112 * 64 + 16 * 64), "gru": 32 * 48 + 16 * 48, "back": 2 * 16 * 16}
        assert sum(layer.weights for layer in steps) == sum(kernels.values())
        assert sum(layer.macs for layer in steps) == 7 * sum(kernels.values())
    else:  # four strips of 8x32, and the state of 6x30 that goes round with them
        convolutions = [layer for layer in inside if layer.op_type == "Conv"]
        assert sum(layer.weights for layer in convolutions) == 9 * (3 + 16) * 64 + 9 * 16 * 32
        inner = 4 * 6 * 30 * 9 * (3 + 16) * 64
        assert sum(layer.macs for layer in convolutions) == inner + 4 * 28 * 9 * 16 * 32


@pytest.mark.parametrize("target", [CPU, TRT], ids=["cpu", "trt"])
def test_int8_takes_what_is_outside_and_names_what_is_inside(case, target, tmp_path):
    _, graph, batch, expected = case
    plan = make_plan(graph, target)
    ranges = choose_ranges(calibrate(graph, plan.tensors, [batch], tmp_path), plan, "minmax")
    found = quantize(graph, plan, ranges)
    assert any("inside a loop" in why for why in found.plan.skipped.values())
    assert np.abs(open_session(serialize(found.model))(batch) - expected).max() < 0.05


def test_what_else_walks_the_graph_walks_it(case, tmp_path):
    _, graph, batch, _ = case
    path = tmp_path / "model.onnx"
    write_onnx(graph, path)
    fingerprints = layer_fingerprints(path, batch[:1])
    assert len(fingerprints) > 5
