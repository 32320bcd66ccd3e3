"""One layer that cannot be INT8 or FP16 stopped the whole variant: it stays float, and is named."""

from __future__ import annotations

import keras
import numpy as np
import pytest
from keras import layers

from cnnedge.backends.keras import predict
from cnnedge.backends.onnxruntime import open_session
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
    contract_violations,
    make_plan,
    quantize,
)
from cnnedge.quantize.qdq import activation_scale

pytestmark = pytest.mark.tf

SIZE = 32
TARGETS = pytest.mark.parametrize("target", [CPU, TRT], ids=["cpu", "trt"])


def unsuitable():
    """Ordinary layers, and between them one of each kind that has no INT8 or no FP16 form."""
    image = keras.Input((SIZE, SIZE, 3))
    x = layers.Conv2D(16, 3, strides=2, activation="relu", name="stem")(image)
    gate = layers.Softmax(axis=[1, 2], name="where")(layers.Conv2D(1, 1, name="mask")(x))
    x = layers.Add()([x, gate])
    x = layers.Conv2D(16, 3, padding="same", name="shrunk")(x)
    x = layers.Activation("gelu")(layers.Activation("soft_shrink")(x))
    shares = layers.Conv2D(16, 1, activation="softmax", name="shares")(x)
    x = layers.Concatenate()([layers.Conv2D(16, 3, padding="same", name="behind")(shares), x])
    x = layers.Conv2DTranspose(16, 3, activation="relu", name="up")(x)
    x = layers.GlobalAveragePooling2D()(layers.Conv2D(32, 3, activation="relu", name="last")(x))
    return keras.Model(image, layers.Dense(3, activation="softmax", name="head")(x))


def exported(model):
    contract = ImageContract(SIZE, SIZE)
    return export_onnx(model, name="odd", labels=("a", "b", "c"), image=contract).model


def quantized(graph, target, batch, folder):
    plan = make_plan(graph, target)
    ranges = choose_ranges(calibrate(graph, plan.tensors, [batch], folder), plan, "minmax")
    return quantize(graph, plan, ranges)


@pytest.fixture(scope="module")
def case():
    keras.utils.set_random_seed(2)
    model = unsuitable()
    rng = np.random.default_rng(0)
    for variable in model.trainable_variables:
        scale = 0.1 if variable.path.endswith("bias") else 1.5 * np.std(variable.numpy()) or 0.1
        variable.assign(rng.normal(0, scale, variable.shape))
    head = model.get_layer("head").kernel
    head.assign(20 * head)  # so that the answers say something
    batch = rng.integers(0, 256, (12, SIZE, SIZE, 3)).astype(np.uint8)
    return exported(model), batch, predict(model, batch, "unit")


def test_fp32_answers_as_the_model(case):
    graph, batch, expected = case
    assert np.abs(open_session(serialize(graph))(batch) - expected).max() < 1e-6
    assert np.ptp(expected, axis=1).mean() > 0.05  # else the rest would mean little


@TARGETS
def test_int8_goes_on_without_them(case, target, tmp_path):
    graph, batch, expected = case
    found = quantized(graph, target, batch, tmp_path)
    assert contract_violations(found.model, target) == []
    kept = {"mask", "up", "head", "behind"} | ({"shares"} if target is CPU else set())
    assert set(found.plan.skipped) == kept
    assert all(found.plan.skipped.values())
    assert {"stem", "shrunk", "last"} <= set(found.plan.compute)
    assert np.abs(open_session(serialize(found.model))(batch) - expected).max() < 0.03


def test_fp16_goes_on_without_them(case):
    graph, batch, expected = case
    half = to_float16(graph)
    assert np.abs(open_session(serialize(half.model))(batch) - expected).max() < 2e-3
    assert achieved_precision(half.model)["macs"] == {"float16": 1.0}
    assert all("ONNX has no FP16" in reason for reason in half.kept_float.values())
    assert len(half.kept_float) == 1  # the test for infinity inside the softmax over two axes


@TARGETS
def test_a_layer_that_raises_stays_float(case, target, tmp_path, monkeypatch):
    from cnnedge.quantize import qdq

    graph, batch, expected = case
    real = qdq.quantize_weight

    def stumbles(weight, *rest):
        if weight.shape[:2] == (32, 16):
            raise ZeroDivisionError("a scale of zero")
        return real(weight, *rest)

    monkeypatch.setattr(qdq, "quantize_weight", stumbles)
    found = quantized(graph, target, batch, tmp_path)
    assert "a scale of zero" in found.plan.skipped["last"]
    assert "shrunk" in found.plan.compute
    assert np.abs(open_session(serialize(found.model))(batch) - expected).max() < 0.03


@TARGETS
def test_ranges_that_are_next_to_nothing_have_a_scale(target):
    for low, high in ((0.0, 0.0), (-1e-44, 1e-44), (0.0, 3e-43)):
        scale = activation_scale(low, high, target)
        assert scale.scale > 0
        assert np.isfinite(np.float32(1) / np.float32(scale.scale))


@TARGETS
def test_a_layer_whose_weights_are_not_finite_is_named(target):
    model = unsuitable()
    bias = model.get_layer("last").bias
    bias.assign([np.inf, *[0.0] * 31])
    assert "not finite" in make_plan(exported(model), target).skipped["last"]


def test_a_bound_beyond_fp16_is_no_weight_to_warn_of():
    image = keras.Input((SIZE, SIZE, 3))
    x = layers.UnitNormalization()(layers.Conv2D(16, 3, strides=2)(image))
    x = layers.Dense(3, activation="softmax")(layers.GlobalAveragePooling2D()(x))
    model = keras.Model(image, x)
    half = to_float16(exported(model))
    assert half.kept_float == {}
    batch = np.random.default_rng(0).integers(0, 256, (4, SIZE, SIZE, 3)).astype(np.uint8)
    found = open_session(serialize(half.model))(batch)
    assert np.abs(found - predict(model, batch, "unit")).max() < 2e-3


def test_a_network_without_a_layer_for_int8_is_exported_without_it(photos, tmp_path):
    from cnnedge.errors import ModelError
    from cnnedge.pipeline import export_bundle
    from cnnedge.recipe import make_recipe

    image = keras.Input((SIZE, SIZE, 3))
    x = layers.Flatten()(layers.Conv2D(1, 3, strides=2, activation="relu", name="only")(image))
    path = tmp_path / "only.keras"
    keras.Model(image, layers.Dense(3, activation="softmax", name="head")(x)).save(path)
    asked = {"model": str(path), "data": str(photos()), "preprocess": "unit", "bench_seconds": 0.05}
    bundle, warnings = export_bundle(make_recipe(**asked), tmp_path / "bundle")
    assert [variant.name for variant in bundle.manifest.variants] == ["fp32", "fp16"]
    (told,) = [line for line in warnings if "INT8" in line]
    assert "only" in told
    assert len(told) <= 300
    with pytest.raises(ModelError, match="only"):
        export_bundle(make_recipe(**asked, precision=("int8",)), tmp_path / "other")
