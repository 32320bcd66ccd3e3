"""Weight-only variants: the stored format, the answers, each rule broken once."""

from __future__ import annotations

import json

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_cli import error_of
from test_cli import run as run_command
from test_export import export, run

from cnnedge.backends.onnxruntime import open_session
from cnnedge.errors import ModelError
from cnnedge.graph.edit import constant, initializer
from cnnedge.graph.precision import achieved_precision
from cnnedge.graph.write import serialize
from cnnedge.quantize import quantize_dense_weights
from cnnedge.quantize.weight_only import (
    ACCURACY_LEVEL,
    BLOCK_SIZES,
    pack,
    quantize_blocks,
    unpack,
    weight_only_violations,
)

pytestmark = pytest.mark.tf


def dense_graph(inputs, outputs, *, transposed=False, bias=True, seed=0):
    """Return an ONNX graph of one dense layer, and its kernel ``[outputs, inputs]``."""
    rng = np.random.default_rng(seed)
    kernel = rng.normal(0, 0.05, (outputs, inputs)).astype(np.float32)
    x = ir.Value(name="x", shape=ir.Shape(["N", inputs]), type=ir.TensorType(ir.DataType.FLOAT))
    graph = ir.Graph([x], [], nodes=[], opset_imports={"": 14}, name="dense")
    model = ir.Model(graph, ir_version=8)
    operands = [x, initializer(model, "fc/weight", kernel if transposed else kernel.T.copy())]
    if bias:
        operands.append(initializer(model, "fc/bias", rng.normal(size=outputs).astype(np.float32)))
    node = ir.node("Gemm", operands, {"transB": 1} if transposed else {}, name="fc")
    node.outputs[0].name = "fc"
    node.outputs[0].shape = ir.Shape(["N", outputs])
    node.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
    graph.append(node)
    graph.outputs.append(node.outputs[0])
    return model, kernel


def dequantized(levels, scales, bits, inputs):
    real = (levels.astype(np.float32) - 2 ** (bits - 1)) * scales[..., None]
    return real.reshape(len(levels), -1)[:, :inputs]


# --- blocks ------------------------------------------------------------------------------------


@given(
    bits=st.sampled_from([4, 8]),
    outputs=st.integers(1, 70),
    inputs=st.integers(1, 300),
    seed=st.integers(0, 99),
)
@settings(deadline=None, max_examples=40)
def test_each_block_errs_by_no_more_than_its_own_range_allows(bits, outputs, inputs, seed):
    block = BLOCK_SIZES[bits]
    weight = np.random.default_rng(seed).normal(size=(outputs, inputs)).astype(np.float32)
    weight[0] = 0
    levels, scales = quantize_blocks(weight, bits, block)
    assert levels.shape == (outputs, -(-inputs // block), block)
    assert levels.max() < 2**bits
    error = np.abs(dequantized(levels, scales, bits, inputs) - weight)
    filled = np.pad(weight, ((0, 0), (0, -inputs % block))).reshape(outputs, -1, block)
    largest = np.abs(filled).max(axis=2)
    top = 2 ** (bits - 1) - 1
    # half a step, or what clipping to seven tenths of the range costs the largest
    allowed = np.maximum(largest / top / 2, 0.31 * largest if bits == 4 else 0) * 1.001
    by_block = np.pad(error, ((0, 0), (0, -inputs % block))).reshape(outputs, -1, block)
    assert (by_block.max(axis=2) <= allowed + 1e-7).all()
    assert (error[0] == 0).all()


def test_searched_scales_err_less_than_the_plain_ones():
    weight = np.random.default_rng(0).standard_t(4, (64, 1024)).astype(np.float32)
    levels, scales = quantize_blocks(weight, 4, 32)
    searched = np.square(dequantized(levels, scales, 4, 1024) - weight).mean()
    blocks = weight.reshape(64, -1, 32)
    plain = np.abs(blocks).max(axis=2, keepdims=True) / 7
    simple = np.square(np.rint(blocks / plain) * plain - blocks).mean()
    assert searched < 0.95 * simple


@pytest.mark.parametrize("bits", [4, 8])
def test_packing_is_undone(bits):
    levels = np.random.default_rng(0).integers(0, 2**bits, (5, 3, 32), np.uint8)
    packed = pack(levels, bits)
    assert packed.nbytes == levels.size * bits // 8
    np.testing.assert_array_equal(unpack(packed, bits), levels)


# --- over a graph ------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(
    ("inputs", "outputs", "transposed", "bias"),
    [
        (256, 32, False, True),
        (300, 33, True, True),
        (131, 17, False, False),
        (1030, 100, True, False),
    ],
)
def test_the_runtime_reads_what_was_written(bits, inputs, outputs, transposed, bias):
    """Against the stored integers multiplied out in numpy: ragged, odd and transposed ones too."""
    model, kernel = dense_graph(inputs, outputs, transposed=transposed, bias=bias)
    found = quantize_dense_weights(model, bits)
    assert found.layers == ("fc",)
    assert weight_only_violations(found.model, bits) == []
    node = next(n for n in found.model.graph if n.op_type == "MatMulNBits")
    stored, scales = constant(node.inputs[1]), constant(node.inputs[2])
    levels = unpack(stored, bits)
    real = dequantized(levels, scales.reshape(levels.shape[:2]), bits, inputs)
    x = np.random.default_rng(1).normal(size=(3, inputs)).astype(np.float32)
    expected = x @ real.T + (constant(model.graph.initializers["fc/bias"]) if bias else 0)
    import onnxruntime as ort

    session = ort.InferenceSession(serialize(found.model))
    (answers,) = session.run(None, {"x": x})
    # the runtime rounds activations to 8 bits, block by block
    assert np.abs(answers - expected).max() < 0.02 * np.abs(expected).max()
    assert np.corrcoef(answers.ravel(), expected.ravel())[0, 1] > 0.9999
    assert (
        np.square(real - kernel).mean() < (0.02 if bits == 4 else 1e-4) * np.square(kernel).mean()
    )


@pytest.fixture(scope="module")
def wide_model(toy_model, digits, digit_contract):
    """The toy with a dense layer that holds most of the weights."""
    import keras
    from keras import layers

    from cnnedge.image import normalize

    keras.utils.set_random_seed(0)
    front = keras.models.clone_model(toy_model)
    front.set_weights(toy_model.get_weights())
    image = keras.Input((32, 32, 3))
    x = image
    for name in ("conv1", "pool1", "conv2", "pool2", "conv3", "pool3"):
        x = front.get_layer(name)(x)
    x = layers.Flatten()(x)
    x = layers.Dense(300, activation="relu", name="fc1")(x)
    model = keras.Model(image, layers.Dense(10, activation="softmax", name="fc2")(x))
    images = np.stack([digits.train.tensor(i, digit_contract) for i in range(len(digits.train))])
    model.compile(keras.optimizers.Adam(3e-3), "sparse_categorical_crossentropy")
    model.fit(normalize(images, "unit"), digits.train.targets, batch_size=64, epochs=4, verbose=0)
    return model


@pytest.mark.parametrize("bits", [4, 8])
def test_answers_and_shares(wide_model, digits, digit_contract, bits):
    graph = export(wide_model, 32, 32).model
    found = quantize_dense_weights(graph, bits)
    assert found.layers == ("fc1",)
    assert found.skipped == {"fc2": "10 outputs, fewer than 16"}
    batch, truth = next(iter(digits.test.batches(digit_contract, 400)))
    expected = run(graph, batch)
    answers = open_session(serialize(found.model))(batch)
    assert (expected.argmax(1) == truth).mean() > 0.9
    assert (answers.argmax(1) == expected.argmax(1)).mean() > 0.97
    shares = achieved_precision(found.model)
    inside = 512 * 300
    convolutions = 16 * 27 + 24 * 144 + 32 * 216
    total = inside + convolutions + 3000
    assert shares["weights"][f"int{bits}"] == pytest.approx(inside / total)
    assert shares["weights"]["float32"] == pytest.approx(1 - inside / total)
    assert "int8" in shares["macs"]  # with activations quantized as they come
    bytes_each = bits / 8 + 4 / BLOCK_SIZES[bits]
    size = len(serialize(found.model))
    assert size < bytes_each * inside + 4 * (total - inside) + 12_000
    assert "fc1/weight" not in found.model.graph.initializers  # no float copy is left


def node_of(model, name):
    return next(n for n in model.graph if n.name == name)


def set_attribute(key, value):
    def apply(model):
        node_of(model, "fc1").attributes[key] = ir.AttrInt64(key, value)

    return apply


def another_constant(index, change):
    def apply(model):
        node = node_of(model, "fc1")
        array = change(constant(node.inputs[index]))
        node.replace_input_with(index, initializer(model, "changed", array))

    return apply


def float_again(model):
    node = node_of(model, "fc1")
    weight = initializer(model, "float", np.zeros((512, 300), np.float32))
    gemm = ir.node("Gemm", [node.inputs[0], weight], name="fc1")
    gemm.outputs[0].name = "again"
    model.graph.insert_before(node, gemm)
    node.outputs[0].replace_all_uses_with(gemm.outputs[0])
    model.graph.remove(node, safe=True)


def quantize_an_activation(model):
    node = node_of(model, "fc1")
    scale = initializer(model, "s", np.array(0.1, np.float32))
    zero = initializer(model, "z", np.array(0, np.uint8))
    pair = ir.node("QuantizeLinear", [node.inputs[0], scale, zero], name="q")
    back = ir.node("DequantizeLinear", [pair.outputs[0], scale, zero], name="dq")
    model.graph.insert_before(node, [pair, back])
    node.replace_input_with(0, back.outputs[0])


@pytest.mark.parametrize(
    ("breakage", "message"),
    [
        (set_attribute("bits", 8), "must have 4 bits"),
        (set_attribute("block_size", 64), "32 in a block"),
        (set_attribute("accuracy_level", 0), "computing in float"),
        (another_constant(1, lambda w: w[:, :-1]), "its weights must be uint8"),
        (another_constant(2, lambda s: s[:-1]), "one scale"),
        (float_again, "fc1: its weights must have 4 bits"),
        (float_again, "no layer has weights of 4 bits"),
        (quantize_an_activation, "activations must stay float"),
        (lambda model: model.graph.opset_imports.pop("com.microsoft"), "must be imported"),
    ],
)
def test_each_broken_rule_is_caught(wide_model, breakage, message):
    assert ACCURACY_LEVEL == 4
    model = quantize_dense_weights(export(wide_model, 32, 32).model, 4).model
    assert weight_only_violations(model, 4) == []
    breakage(model)
    assert any(message in line for line in weight_only_violations(model, 4))


def test_a_network_without_large_dense_layers_is_refused():
    import keras
    from keras import layers

    model = keras.Sequential(
        [
            keras.Input((16, 16, 3)),
            layers.Conv2D(32, 3, name="conv"),
            layers.GlobalAveragePooling2D(),
            layers.Dense(10, name="head"),
        ]
    )
    with pytest.raises(ModelError, match=r"hold 0% of the weights \(head: 10 outputs"):
        quantize_dense_weights(export(model, 16, 16).model, 4)


def test_in_the_product(wide_model, toy_file, digits, tmp_path):
    from cnnedge.backends.keras import ModelNote, save_model
    from cnnedge.image import ImageContract

    note = ModelNote("wide", digits.labels, ImageContract(32, 32), "unit", data="digits", seed=0)
    save_model(wide_model, tmp_path / "wide.keras", note)
    done = run_command(
        *("export", tmp_path / "wide.keras", "-o", tmp_path / "wide", "--max-drop", 3),
        *("--precision", "int8-weight,int4-weight"),
    )
    assert done.exit_code == 0, done.output
    variants = {
        v["name"]: v
        for v in json.loads((tmp_path / "wide" / "manifest.json").read_text())["variants"]
    }
    assert list(variants) == ["fp32", "int8-weight", "int4-weight"]
    size = {name: v["bytes"] for name, v in variants.items()}
    assert size["int4-weight"] < size["int8-weight"] < 0.5 * size["fp32"]
    assert variants["int4-weight"]["achieved"]["weights"]["int4"] > 0.9
    assert variants["int4-weight"]["verdict"]["status"] != "failed"
    assert variants["int4-weight"]["recommendation"]["against"] == "fp32"
    assert run_command("verify", tmp_path / "wide", "--data", "digits").exit_code == 0
    refused = run_command("export", toy_file, "-o", tmp_path / "toy", "--precision", "int5-weight")
    assert "int5-weight" in error_of(refused)
