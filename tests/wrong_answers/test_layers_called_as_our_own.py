"""Layers called as cnnedge's own nodes: FP16 stayed float32, int8-trt was refused."""

from __future__ import annotations

import keras
import numpy as np
import pytest
from keras import layers

from cnnedge.backends.keras import predict
from cnnedge.backends.onnxruntime import open_session
from cnnedge.export import export_onnx, write_onnx
from cnnedge.graph.edit import all_nodes
from cnnedge.graph.fingerprint import layer_fingerprints
from cnnedge.graph.float16 import to_float16
from cnnedge.graph.precision import achieved_precision
from cnnedge.graph.resize import put_resize
from cnnedge.graph.write import serialize
from cnnedge.image import ImageContract
from cnnedge.quantize import (
    CPU,
    TRT,
    calibrate,
    choose_ranges,
    contract_violations,
    make_plan,
    quantize,
)

pytestmark = pytest.mark.tf

SIZE = 32


def backbone():
    """A backbone called ``image``, its layers called as the nodes that scale the image are."""
    convolution = {"filters": 16, "kernel_size": 3, "activation": "relu"}
    inner = keras.Sequential(
        [
            keras.Input((SIZE, SIZE, 3)),
            layers.Conv2D(**convolution, strides=2, name="cast"),
            layers.Conv2D(**convolution, name="scale"),
            layers.Conv2D(**convolution, name="nchw"),
            layers.Conv2D(**convolution, name="shift"),
            layers.MaxPooling2D(name="resize"),
            layers.Conv2D(**convolution, name="dequantize"),
        ],
        name="image",
    )
    image = keras.Input((SIZE, SIZE, 3))
    x = layers.GlobalAveragePooling2D(name="probabilities")(inner(image))
    return keras.Model(image, layers.Dense(3, name="softmax")(x))


def observed():
    """Models called as what watches a calibration, and as a quantizer."""

    def block(name, *layer_names):
        return keras.Sequential(
            [layers.Conv2D(16, 3, activation="relu", name=n) for n in layer_names], name=name
        )

    image = keras.Input((SIZE, SIZE, 3))
    x = layers.Rescaling(0.5, name="image")(image)
    x = block("calibration", "phase", "flat", "axis")(x)
    x = block("conv", "quantize", "weight", "noise")(x)
    x = layers.Conv2D(16, 3, name="N")(x)
    x = layers.GlobalAveragePooling2D(name="reduced")(x)
    return keras.Model(image, layers.Dense(3, activation="softmax", name="probabilities")(x))


@pytest.fixture(scope="module", params=[backbone, observed], ids=["backbone", "observed"])
def case(request):
    keras.utils.set_random_seed(0)
    model = request.param()
    rng = np.random.default_rng(0)
    for variable in model.trainable_variables:
        if variable.path.endswith("bias"):
            variable.assign(rng.normal(0, 0.2, variable.shape))
    batch = rng.integers(0, 256, (8, SIZE, SIZE, 3)).astype(np.uint8)
    contract = ImageContract(SIZE, SIZE)
    made = export_onnx(model, name="m", labels=("a", "b", "c"), image=contract)
    expected = predict(model, batch, "unit")
    if request.param is backbone:  # it gives logits
        expected = keras.ops.convert_to_numpy(keras.ops.softmax(expected))
    return made.model, batch, expected, contract


def test_every_precision_is_built_and_answers(case, tmp_path):
    graph, batch, expected, _ = case
    assert np.abs(open_session(serialize(graph))(batch) - expected).max() < 1e-6
    half = to_float16(graph).model
    assert achieved_precision(half)["macs"] == {"float16": 1.0}
    assert np.abs(open_session(serialize(half))(batch) - expected).max() < 2e-3
    for target in (CPU, TRT):
        plan = make_plan(graph, target)
        ranges = choose_ranges(calibrate(graph, plan.tensors, [batch], tmp_path), plan, "minmax")
        found = quantize(graph, plan, ranges).model
        assert contract_violations(found, target) == []
        assert achieved_precision(found)["macs"]["int8"] > 0.9
        assert np.abs(open_session(serialize(found))(batch) - expected).max() < 0.05
        names = [node.name for node in all_nodes(found)]
        assert len(names) == len(set(names))


def test_its_layers_have_fingerprints(case, tmp_path):
    graph, batch, _, _ = case
    write_onnx(graph, tmp_path / "model.onnx")
    found = layer_fingerprints(tmp_path / "model.onnx", batch[:1])
    convolutions = [node.outputs[0].name for node in graph.graph if node.op_type == "Conv"]
    assert set(convolutions) <= set(found)
    assert "image/cast" not in found


def test_the_resize_goes_in_front(case):
    graph, batch, expected, contract = case
    resized = open_session(put_resize(serialize(graph), contract))
    assert np.abs(resized(batch) - expected).max() < 1e-6  # of this size already
