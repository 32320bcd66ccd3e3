"""INT8: each target's contract, each rule broken once, and answers that hold."""

from __future__ import annotations

from collections import Counter

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
from test_export import CASES, export, images, run, settle

from cnnedge.backends.onnxruntime import DISABLED_OPTIMIZERS, open_session
from cnnedge.errors import ModelError
from cnnedge.export import classifier_shape
from cnnedge.graph.edit import constant, initializer
from cnnedge.graph.precision import achieved_precision
from cnnedge.graph.write import serialize
from cnnedge.quantize import (
    CPU,
    CPU_REDUCED,
    TRT,
    calibrate,
    choose_ranges,
    contract_violations,
    make_plan,
    quantize,
)
from cnnedge.quantize.plan import Target
from cnnedge.quantize.qdq import activation_scale, quantize_weight

pytestmark = pytest.mark.tf

TARGETS = {"cpu": CPU, "cpu-reduced": CPU_REDUCED, "trt": TRT}


@pytest.fixture(scope="module")
def toy_graph(toy_model):
    return export(toy_model, 32, 32).model


def quantized(graph, target, batches, tmp_path):
    plan = make_plan(graph, target)
    return quantize(graph, plan, ranges_of(graph, plan, batches, tmp_path))


def ranges_of(graph, plan, batches, folder, method="minmax"):
    return choose_ranges(calibrate(graph, plan.tensors, batches, folder), plan, method)


@pytest.fixture(scope="module")
def toy_int8(toy_graph, digits, digit_contract, tmp_path_factory):
    batches = [batch for batch, _ in digits.calibration.batches(digit_contract, 32)]
    folder = tmp_path_factory.mktemp("calibration")
    return {name: quantized(toy_graph, t, batches, folder).model for name, t in TARGETS.items()}


@pytest.mark.parametrize("target", TARGETS)
def test_the_contract_holds_and_so_does_the_accuracy(toy_int8, toy_graph, target, digits):
    from cnnedge.image import ImageContract

    model = toy_int8[target]
    assert contract_violations(model, TARGETS[target]) == []
    batch, truth = next(iter(digits.test.batches(ImageContract(32, 32), 400)))
    answers = open_session(serialize(model))(batch).argmax(1)
    expected = run(toy_graph, batch).argmax(1)
    assert (expected == truth).mean() > 0.9  # else the comparison would mean little
    assert (answers == expected).mean() > 0.97


@pytest.mark.parametrize("kind", ["residual", "preactivation", "alexnet_lrn", "vgg11", "grey"])
@pytest.mark.parametrize("target", TARGETS)
def test_other_networks_keep_their_contract_too(kind, target, tmp_path):
    make, height, width, normalization = CASES[kind]
    model = settle(make())
    graph = export(model, height, width, normalization=normalization).model
    batch = images(height, width, classifier_shape(model)[2], n=8)
    found = quantized(graph, TARGETS[target], [batch[:5], batch[5:]], tmp_path)
    assert contract_violations(found.model, TARGETS[target]) == []
    answers, expected = open_session(serialize(found.model))(batch), run(graph, batch)
    # relative to how much the answers say at all: untrained networks are nearly undecided
    spread = max(np.ptp(expected, axis=1).mean(), 1e-3)
    assert np.abs(answers - expected).max() < 0.5 * spread


def test_cpu_runtimes_compute_the_whole_network_in_int8(toy_int8, tmp_path):
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    options.log_severity_level = 3
    ort.InferenceSession(
        serialize(toy_int8["cpu"]), options, disabled_optimizers=DISABLED_OPTIMIZERS
    )
    kinds = Counter(node.op_type for node in ir.load(tmp_path / "optimized.onnx").graph)
    assert kinds["QLinearConv"] == 3
    assert kinds["QGemm"] == 1
    assert kinds["Conv"] + kinds["FusedConv"] + kinds["FusedGemm"] == 0
    assert kinds["QuantizeLinear"] == 0  # the uint8 image goes into the first layer as it is


def test_the_uint8_image_is_taken_without_loss(toy_int8):
    graph = toy_int8["cpu"].graph
    (first,) = [n for n in graph if n.name == "image/dequantize"]
    assert constant(first.inputs[1]) == np.float32(1 / 255)
    assert constant(first.inputs[2]) == 0
    assert not any(node.op_type == "Cast" for node in graph)


def test_the_head_stays_float(toy_graph):
    plan = make_plan(toy_graph, CPU)
    assert plan.skipped == {"fc2": "10 outputs, fewer than 16"}
    assert plan.compute == ("conv1", "conv2", "conv3", "fc1")


def test_layers_can_be_kept_float(toy_graph, digits, digit_contract, tmp_path):
    plan = make_plan(toy_graph, CPU, keep_float=frozenset({"conv2"}))
    batches = [batch for batch, _ in digits.calibration.batches(digit_contract, 64)]
    model = quantize(toy_graph, plan, ranges_of(toy_graph, plan, batches, tmp_path))
    shares = achieved_precision(model.model)
    all_int8 = achieved_precision_of(toy_graph, digits, digit_contract, tmp_path)
    assert 0 < shares["macs"]["int8"] < all_int8["macs"]["int8"]
    assert shares["macs"]["int8"] + shares["macs"]["float32"] == pytest.approx(1)


def achieved_precision_of(graph, digits, contract, tmp_path):
    batches = [batch for batch, _ in digits.calibration.batches(contract, 64)]
    return achieved_precision(quantized(graph, CPU, batches, tmp_path).model)


def test_achieved_precision_is_read_from_the_graph(toy_graph, toy_int8):
    assert achieved_precision(toy_graph) == {"macs": {"float32": 1.0}, "weights": {"float32": 1.0}}
    # MACs by hand: conv1 32²·16·27, conv2 16²·24·144, conv3 8²·32·216, fc1 512·48, fc2 48·10
    int8 = 32**2 * 16 * 27 + 16**2 * 24 * 144 + 8**2 * 32 * 216 + 512 * 48
    shares = achieved_precision(toy_int8["cpu"])
    assert shares["macs"]["int8"] == pytest.approx(int8 / (int8 + 480))
    assert achieved_precision(toy_int8["trt"])["macs"].keys() == {"int8", "float16"}


def test_int8_weights_fed_with_floats_do_not_count_as_int8(toy_int8):
    model = toy_int8["cpu"].clone()
    conv = next(n for n in model.graph if n.name == "conv2")
    quantize_node = conv.inputs[0].producer().inputs[0].producer()
    conv.replace_input_with(0, quantize_node.inputs[0])
    before = achieved_precision(toy_int8["cpu"])["macs"]["int8"]
    assert achieved_precision(model)["macs"]["int8"] < before
    assert any("compute in float" in line for line in contract_violations(model, CPU))


# --- each rule of the contract, broken once ----------------------------------------------------


def node(model, name):
    return next(n for n in model.graph if n.name == name)


def relu_unfolded(model):
    target = node(model, "conv1/relu/quantize")
    relu = ir.node("Relu", [target.inputs[0]], name="unfolded")
    model.graph.insert_before(target, relu)
    target.replace_input_with(0, relu.outputs[0])


def change_constant(name, index, change):
    def apply(model):
        found = node(model, name)
        value = constant(found.inputs[index])
        found.replace_input_with(index, initializer(model, f"{name}/changed", change(value)))

    return apply


def quantize_between_conv_and_relu(model):
    relu = node(model, "conv2/relu")
    scale = initializer(model, "s", np.array(0.1, np.float16))
    zero = initializer(model, "z", np.array(0, np.int8))
    q = ir.node("QuantizeLinear", [relu.inputs[0], scale, zero], name="between")
    dq = ir.node("DequantizeLinear", [q.outputs[0], scale, zero])
    model.graph.insert_before(relu, [q, dq])
    relu.replace_input_with(0, dq.outputs[0])


def quantize_the_output(model):
    (output,) = model.graph.outputs
    scale = initializer(model, "s", np.array(1 / 255, np.float32))
    zero = initializer(model, "z", np.array(0, np.uint8))
    q = ir.node("QuantizeLinear", [output, scale, zero], name="of the softmax")
    dq = ir.node("DequantizeLinear", [q.outputs[0], scale, zero])
    model.graph.extend([q, dq])
    model.graph.outputs[0] = dq.outputs[0]


def quantize_a_bias(model):
    conv = node(model, "conv2")
    bias = conv.inputs[2]
    scale = initializer(model, "s", np.array(0.1, np.float16))
    integer = initializer(model, "b", np.zeros(bias.shape.numpy(), np.int8))
    dq = ir.node("DequantizeLinear", [integer, scale], name="bias")
    model.graph.insert_before(conv, dq)
    conv.replace_input_with(2, dq.outputs[0])


def lower_opset(model):
    model.graph.opset_imports[""] = 17


def higher_opset(model):
    model.graph.opset_imports[""] = 18


def quantize_the_image_anew(model):
    """As a graph looks whose image is cast and scaled before it is quantized."""
    (first,) = [n for n in model.graph if n.name == "image/dequantize"]
    (transpose,) = [n for n in model.graph if n.name == "image/nchw/uint8"]
    transpose.name = "image/nchw"
    cast = ir.node("Cast", [model.graph.inputs[0]], {"to": 1}, name="image/cast")
    transpose.replace_input_with(0, cast.outputs[0])
    factor = initializer(model, "factor", np.array(1 / 255, np.float32))
    scale = ir.node("Mul", [transpose.outputs[0], factor], name="image/scale")
    quantize = ir.node("QuantizeLinear", [scale.outputs[0], *first.inputs[1:]], name="image/q")
    model.graph.insert_before(transpose, [cast])
    model.graph.insert_before(first, [scale, quantize])
    first.replace_input_with(0, quantize.outputs[0])


def float_bias(model):
    conv = node(model, "conv2")
    conv.replace_input_with(2, initializer(model, "b", np.zeros(24, np.float32)))


def axis_one(model):
    node(model, "fc1/weight/dequantize").attributes["axis"] = ir.AttrInt64("axis", 1)


BREAKAGES = [
    ("cpu", relu_unfolded, "must be folded"),
    ("cpu", quantize_the_output, "output must not be quantized"),
    ("cpu", quantize_the_output, "softmax must stay float"),
    ("cpu", float_bias, "bias must be int32"),
    ("cpu", higher_opset, "older runtimes load that"),
    ("cpu", quantize_the_image_anew, "must be taken as it is"),
    (
        "cpu",
        change_constant("conv1/relu/quantize", 2, lambda z: z.astype(np.int8)),
        "activations must be uint8",
    ),
    (
        "cpu",
        change_constant("conv2/weight/dequantize", 2, lambda z: z + np.int8(3)),
        "weights must be int8 with zero point 0",
    ),
    (
        "cpu",
        change_constant("conv2/weight/dequantize", 1, lambda s: s[:1].reshape(())),
        "one scale per output channel",
    ),
    (
        "cpu",
        change_constant("conv1/relu/quantize", 1, lambda s: np.full(16, s)),
        "quantized per tensor",
    ),
    ("cpu-reduced", None, "may saturate"),
    ("trt", quantize_between_conv_and_relu, "breaks the fusion"),
    ("trt", quantize_a_bias, "bias must not be quantized"),
    ("trt", lower_opset, "opset"),
    ("trt", axis_one, "axis 0"),
    (
        "trt",
        change_constant("pool1/quantize", 2, lambda z: z + np.int8(1)),
        "zero point 0",
    ),
    (
        "trt",
        change_constant("pool1/quantize", 1, lambda s: s.astype(np.float32)),
        "scale must be FP16",
    ),
    (
        "trt",
        change_constant("fc2", 1, lambda w: w.astype(np.float32)),
        "what stays float must be FP16",
    ),
]


@pytest.mark.parametrize(("target", "breakage", "message"), BREAKAGES)
def test_each_broken_rule_is_caught(toy_int8, target, breakage, message):
    if breakage is None:  # full-range weights where the CPU would saturate
        model = toy_int8["cpu"]
    else:
        model = toy_int8[target].clone()
        breakage(model)
    assert any(message in line for line in contract_violations(model, TARGETS[target]))


# --- arithmetic --------------------------------------------------------------------------------


@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)
@pytest.mark.parametrize(
    ("low", "high"), [(0.0, 6.0), (-1.0, 3.0), (-5.0, -1.0), (2.0, 9.0), (0, 0)]
)
def test_activation_scales_cover_the_range_and_hold_zero(target: Target, low, high):
    found = activation_scale(low, high, target)
    limits = np.iinfo(found.dtype)
    bottom = (limits.min - found.zero_point) * found.scale
    top = (limits.max - found.zero_point) * found.scale
    slack = found.scale  # the zero point is rounded to a whole step
    assert bottom <= min(low, 0) + slack
    assert top >= max(high, 0) - slack
    assert limits.min <= found.zero_point <= limits.max


@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)
def test_weights_come_back_within_half_a_step(target):
    weight = np.random.default_rng(0).normal(0, 0.05, (8, 3, 3, 3)).astype(np.float32)
    weight[3] *= 100  # one loud channel must not cost the others their resolution
    weight[5] = 0  # and a dead one must not divide by zero
    levels, steps = quantize_weight(weight, 0, target)
    back = levels * steps.reshape(-1, 1, 1, 1)
    assert levels.dtype == np.int8
    assert np.abs(levels.astype(int)).max() <= target.weight_limit
    assert (np.abs(back - weight) <= 0.5001 * steps.reshape(-1, 1, 1, 1)).all()
    if target.float16:
        assert (steps == steps.astype(np.float16)).all()


def test_a_bias_far_larger_than_its_weights_still_fits(tmp_path):
    make, height, width, _ = CASES["plain"]
    model = settle(make())
    layer = model.get_layer("conv1")
    layer.kernel.assign(layer.kernel * 1e-9)
    layer.bias.assign(layer.bias * 0 + 5.0)
    graph = export(model, height, width).model
    batch = images(height, width)
    found = quantized(graph, CPU, [batch], tmp_path)
    answers, expected = open_session(serialize(found.model))(batch), run(graph, batch)
    assert np.abs(answers - expected).max() < 0.02


# --- what goes wrong ---------------------------------------------------------------------------


def test_a_network_without_an_int8_layer_is_refused(tmp_path):
    import keras
    from keras import layers

    model = keras.Sequential([keras.Input((8, 8, 3)), layers.Flatten(), layers.Dense(3)])
    graph = export(model, 8, 8).model
    with pytest.raises(ModelError, match="fewer than 16"):
        quantized(graph, CPU, [images(8, 8)], tmp_path)
