"""Keras → ONNX: the contract, the folding, and the same answers, for models of many kinds."""

from __future__ import annotations

from collections import Counter

import keras
import numpy as np
import onnx
import onnxruntime as ort
import pytest
from keras import layers

from cnnedge.backends.keras import predict
from cnnedge.errors import ModelError
from cnnedge.export import classifier_shape, export_onnx
from cnnedge.graph.float16 import to_float16
from cnnedge.graph.write import serialize, write_onnx
from cnnedge.image import ImageContract
from cnnedge.models import build

pytestmark = pytest.mark.tf


def images(height, width, channels=3, n=4):
    """Smooth pictures rather than noise: what a camera gives."""
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 256, (n, 6, 6, channels)).astype(np.float32)
    rows = np.linspace(0, 5, height).round().astype(int)
    columns = np.linspace(0, 5, width).round().astype(int)
    return coarse[:, rows][:, :, columns].astype(np.uint8)


def settle(model):
    """Give biases and batch norms values that a trained network has, none of them 0 or 1."""
    rng = np.random.default_rng(1)
    for variable in model.variables:
        if variable.path.endswith(("bias", "beta", "moving_mean")):
            variable.assign(rng.normal(0, 0.1, variable.shape))
        elif variable.path.endswith(("gamma", "moving_variance")):
            variable.assign(rng.uniform(0.5, 1.5, variable.shape))
    return model


def export(model, height, width, *, normalization="unit", **options):
    channels, classes = classifier_shape(model)[2:]
    return export_onnx(
        model,
        name=model.name,
        labels=tuple(f"class {i}" for i in range(classes)),
        image=ImageContract(height, width, channels),
        normalization=normalization,
        **options,
    )


def run(model, batch):
    session = ort.InferenceSession(serialize(model), providers=["CPUExecutionProvider"])
    return session.run(["probabilities"], {"image": batch})[0]


def plain_cnn():
    return keras.Sequential(
        [
            keras.Input((32, 32, 3)),
            layers.ZeroPadding2D(((1, 2), (1, 2))),
            layers.Conv2D(8, 5, strides=2, activation="relu", name="conv1"),
            layers.MaxPooling2D(3, 2, name="pool1"),
            layers.Flatten(),
            layers.Dropout(0.5),
            layers.Dense(20, activation="relu", name="fc1"),
            layers.Dense(7, name="fc2"),
            layers.Softmax(),
        ],
        name="plain",
    )


def residual_cnn():
    image = keras.Input((48, 40, 3))
    x = layers.Conv2D(16, 3, strides=2, padding="same", use_bias=False, name="stem")(image)
    x = layers.ReLU(6.0)(layers.BatchNormalization()(x))
    for k in range(2):
        y = layers.DepthwiseConv2D(3, padding="same", use_bias=False, name=f"dw{k}")(x)
        y = layers.Activation("relu")(layers.BatchNormalization()(y))
        y = layers.BatchNormalization()(layers.Conv2D(16, 1, name=f"pw{k}")(y))
        x = layers.Add()([x, y])
    x = layers.SeparableConv2D(32, 3, activation="swish")(x)
    x = layers.Concatenate()([x, layers.Conv2D(8, 1)(x)])
    x = layers.GlobalAveragePooling2D()(x)
    return keras.Model(image, layers.Dense(5)(x), name="residual")


def preactivation_cnn():
    """ResNetV2's order: batch norm and Relu before the convolution, so nothing to fold into."""
    image = keras.Input((32, 32, 3))
    x = layers.Rescaling(1 / 127.5, offset=-1)(image)
    x = layers.Conv2D(8, 3, padding="same")(x)
    x = layers.MaxPooling2D(2)(x)
    x = layers.Activation("relu")(layers.BatchNormalization()(x))
    x = layers.Conv2D(8, 3, dilation_rate=2)(x)
    x = layers.AveragePooling2D(2)(x)
    x = layers.GlobalMaxPooling2D()(x)
    return keras.Model(image, layers.Dense(4, activation="softmax")(x), name="preactivation")


def squeezing_cnn():
    """MobileNetV3's parts: hard-swish, squeeze-and-excite, uneven padding, a captured mean."""
    image = keras.Input((40, 40, 3))
    x = layers.Normalization(mean=[0.4, 0.5, 0.6], variance=[0.04, 0.05, 0.06])(image)
    x = layers.Conv2D(16, 3, strides=2, padding="same", use_bias=False)(x)
    x = layers.Activation("hard_swish")(layers.BatchNormalization()(x))
    for k in range(2):
        y = layers.ZeroPadding2D(((0, 1), (1, 2)))(x)
        y = layers.DepthwiseConv2D(3, use_bias=False, name=f"dw{k}")(y)
        y = layers.ReLU()(layers.BatchNormalization()(y))
        s = layers.GlobalAveragePooling2D(keepdims=True)(y)
        s = layers.Conv2D(8, 1, activation="relu", name=f"squeeze{k}")(s)
        s = layers.Conv2D(16, 1, activation="hard_sigmoid", name=f"excite{k}")(s)
        y = layers.Activation("hard_swish")(layers.Multiply()([y, s]))
        x = layers.Conv2D(16, 1, name=f"mix{k}")(layers.Concatenate()([y, y]))
    x = layers.GlobalAveragePooling2D()(x)
    return keras.Model(image, layers.Dense(5, activation="softmax")(x), name="squeezing")


CASES = {
    "squeezing": (squeezing_cnn, 40, 40, "unit"),
    "plain": (plain_cnn, 32, 32, "unit"),
    "residual": (residual_cnn, 48, 40, "caffe"),
    "preactivation": (preactivation_cnn, 32, 32, "none"),
    "alexnet_v1": (lambda: build("alexnet_v1", height=96, width=80, classes=7), 96, 80, "unit"),
    "alexnet_v2": (lambda: build("alexnet_v2", height=96, width=96, classes=7), 96, 96, "tf"),
    "alexnet_lrn": (
        lambda: build("alexnet", height=96, width=96, classes=7, lrn=True),
        96,
        96,
        "unit",
    ),
    "vgg11": (
        lambda: build("vgg11", height=64, width=32, classes=7, fc_units=64),
        64,
        32,
        "torch",
    ),
    "vgg11_sort": (
        lambda: build("vgg11", height=32, width=32, classes=7, fc_units=64, pool="sort"),
        32,
        32,
        "unit",
    ),
    "grey": (
        lambda: build("alexnet_v1", height=96, width=96, channels=1, classes=3),
        96,
        96,
        "unit",
    ),
}


@pytest.fixture(scope="module", params=CASES)
def case(request):
    make, height, width, normalization = CASES[request.param]
    keras.utils.set_random_seed(0)
    model = settle(make())
    batch = images(height, width, classifier_shape(model)[2])
    graph = export(model, height, width, normalization=normalization)
    reference = predict(model, batch, normalization)
    if graph.emitted == "logits":
        reference = keras.ops.convert_to_numpy(keras.ops.softmax(reference))
    return request.param, graph, batch, reference


def test_fp32_answers_as_keras(case):
    _, graph, batch, reference = case
    assert np.abs(run(graph.model, batch) - reference).max() <= 1e-5
    # the batch is free: one image gives what it gave among others
    np.testing.assert_allclose(run(graph.model, batch[:1]), reference[:1], atol=1e-5)


def test_fp16_answers_as_keras(case):
    _, graph, batch, reference = case
    half = to_float16(graph.model)
    assert half.kept_float == {}
    assert np.abs(run(half.model, batch) - reference).max() <= 2e-3
    floats = [v for v in half.model.graph.initializers.values() if v.dtype.name == "FLOAT"]
    assert sum(v.const_value.size for v in floats) <= 6  # the normalization alone stays FP32


def test_the_contract_holds(case):
    _, graph, batch, _ = case
    proto = onnx.load_from_string(serialize(graph.model))
    onnx.checker.check_model(proto, full_check=True)
    (image,), (probabilities,) = proto.graph.input, proto.graph.output
    shape = image.type.tensor_type.shape.dim
    assert (image.name, image.type.tensor_type.elem_type) == ("image", onnx.TensorProto.UINT8)
    assert [d.dim_param or d.dim_value for d in shape] == ["N", *batch.shape[1:]]
    assert probabilities.name == "probabilities"
    assert probabilities.type.tensor_type.elem_type == onnx.TensorProto.FLOAT
    metadata = {p.key: p.value for p in proto.metadata_props}
    assert {"cnnedge.labels", "cnnedge.image", "cnnedge.model"} <= set(metadata)


def test_no_layout_operation_is_left_but_the_one_at_the_input(case):
    _, graph, _, _ = case
    kinds = Counter(node.op_type for node in graph.model.graph)
    assert kinds["Transpose"] == 1
    leftovers = {"Shape", "Gather", "Slice", "Squeeze", "Reshape", "Identity", "MatMul", "Pad"}
    allowed = {"residual": {"Gather"}, "vgg11_sort": {"Slice"}}.get(case[0], set())
    assert not (set(kinds) & leftovers) - allowed


def test_lrn_is_the_onnx_operator():
    model = build("alexnet", height=96, width=96, classes=7, lrn=True)
    graph = export(model, 96, 96).model
    found = [node for node in graph.graph if node.op_type == "LRN"]
    assert len(found) == 2
    for node in found:
        assert node.attributes["size"].as_int() == 5
        assert node.attributes["bias"].as_float() == 2.0
        assert node.attributes["beta"].as_float() == 0.75
        assert node.attributes["alpha"].as_float() / 5 == pytest.approx(1e-4)  # ONNX divides


def test_nodes_bear_the_layers_names():
    model = settle(build("vgg11", height=32, width=32, classes=7, fc_units=64))
    graph = export(model, 32, 32).model
    names = [node.name for node in graph.graph]
    assert {"conv1_1", "conv1_1/relu", "pool1", "conv5_2", "fc1", "fc1/relu"} <= set(names)
    assert len(names) == len(set(names))
    assert {"conv1_1/weight", "fc1/bias"} <= set(graph.graph.initializers)


def test_float32_input_keeps_the_keras_signature(toy_model, digits, digit_contract):
    graph = export(toy_model, 32, 32, input_dtype="float32")
    batch = np.stack([digits.test.tensor(i, digit_contract) for i in range(4)])
    answers = run(graph.model, batch.astype(np.float32) / 255)
    assert np.abs(answers - predict(toy_model, batch, "unit")).max() <= 1e-5


def test_old_runtimes_can_read_it():
    graph = export(plain_cnn(), 32, 32).model
    assert graph.graph.opset_imports[""] <= 14
    assert graph.ir_version <= 8


def test_the_streamed_file_is_the_one_that_onnx_writes(tmp_path):
    import onnx_ir as ir

    graph = export(plain_cnn(), 32, 32).model
    write_onnx(graph, tmp_path / "ours.onnx")
    ours, theirs = onnx.load(tmp_path / "ours.onnx"), ir.to_proto(graph)
    as_arrays = [
        {t.name: onnx.numpy_helper.to_array(t) for t in proto.graph.initializer}
        for proto in (ours, theirs)
    ]
    assert as_arrays[0].keys() == as_arrays[1].keys()
    for name, array in as_arrays[0].items():
        np.testing.assert_array_equal(array, as_arrays[1][name])
    for proto in (ours, theirs):
        del proto.graph.initializer[:], proto.graph.value_info[:]
    assert ours == theirs


def test_an_operation_that_onnx_lacks_is_named():
    image = keras.Input((8, 8, 3))
    x = layers.Lambda(lambda t: keras.ops.fft2((t, t))[0])(image)
    model = keras.Model(image, layers.Dense(3)(layers.Flatten()(x)))
    with pytest.raises(ModelError, match="tf2onnx cannot convert"):
        export(model, 8, 8)


def test_fp16_leaves_a_layer_float_whose_weights_it_cannot_hold():
    model = plain_cnn()
    kernel = keras.ops.convert_to_numpy(model.get_layer("fc1").kernel).copy()
    kernel[0, 0] = 1e6
    model.get_layer("fc1").kernel.assign(kernel)
    half = to_float16(export(model, 32, 32).model)
    assert list(half.kept_float) == ["fc1"]
    assert "1e+06" in half.kept_float["fc1"]
    assert (
        np.abs(run(half.model, images(32, 32)) - predict(model, images(32, 32), "unit")).max()
        < 2e-3
    )


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: keras.Sequential([keras.Input((8,)), layers.Dense(3)]), "input of .* is"),
        (
            lambda: keras.Sequential([keras.Input((8, 8, 3)), layers.Conv2D(3, 3)]),
            "output of .* is",
        ),
        (
            lambda: keras.Sequential(
                [keras.Input((8, 8, 3)), layers.Flatten(), layers.Dense(3, activation="sigmoid")]
            ),
            "neither probabilities nor logits",
        ),
        (
            lambda: keras.Sequential([keras.Input((8, 8, 5)), layers.Flatten(), layers.Dense(3)]),
            "input of .* is",
        ),
    ],
    ids=["no image", "no classifier", "sigmoid", "five channels"],
)
def test_what_is_no_image_classifier_is_refused(make, message):
    with pytest.raises(ModelError, match=message):
        export(make(), 8, 8)
