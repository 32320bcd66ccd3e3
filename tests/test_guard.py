"""The guard: equivalent graphs that quantize better, layers' own noise, and a gate that holds."""

from __future__ import annotations

import json
from itertools import pairwise

import numpy as np
import pytest
from test_cli import error_of
from test_cli import run as run_command
from test_export import CASES, export, images, run, settle

from cnnedge.backends.onnxruntime import open_session
from cnnedge.comparison import Comparison, Verdict, compare, judge
from cnnedge.graph.precision import achieved_precision
from cnnedge.graph.write import serialize
from cnnedge.machine import this_machine
from cnnedge.quantize import (
    CPU,
    CPU_REDUCED,
    TRT,
    calibrate,
    choose_ranges,
    contract_violations,
    hold_gate,
    make_plan,
    quantize,
)
from cnnedge.quantize.equalize import equalize
from cnnedge.quantize.noise import correct_bias, layer_noise

pytestmark = pytest.mark.tf

TARGETS = {"cpu": CPU, "trt": TRT}


def everything_in(graph):
    tensors = [*make_plan(graph, CPU).tensors, *make_plan(graph, TRT).tensors]
    return list(dict.fromkeys(tensors))


def make_loud(model, layer, following, factor):
    """Make one channel ``factor`` times larger, and its readers' weights as much smaller.

    The network answers as before, where Relu and pooling are all that stands between. The channel
    is the one that carries most, so that its neighbours lose the most resolution.
    """
    kernel, bias = model.get_layer(layer).get_weights()
    channel = int(np.abs(kernel).sum(axis=tuple(range(kernel.ndim - 1))).argmax())
    kernel[..., channel] *= factor
    bias[channel] *= factor
    model.get_layer(layer).set_weights([kernel, bias])
    kernel, bias = model.get_layer(following).get_weights()
    kernel[..., channel, :] /= factor
    model.get_layer(following).set_weights([kernel, bias])


def copy_of(model):
    import keras

    copy = keras.models.clone_model(model)
    copy.set_weights(model.get_weights())
    return copy


@pytest.fixture(scope="module")
def hard_model(toy_model):
    """The toy, with one channel ×100 larger in each of two layers."""
    model = copy_of(toy_model)
    make_loud(model, "conv1", "conv2", 100)
    make_loud(model, "conv2", "conv3", 100)
    return model


@pytest.fixture(scope="module")
def held_out(digits, digit_contract):
    return [batch for batch, _ in digits.calibration.batches(digit_contract, 1)]


@pytest.fixture(scope="module")
def tested(digits, digit_contract):
    return next(iter(digits.test.batches(digit_contract, 400)))


# --- cross-layer equalisation ------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["plain", "residual", "preactivation", "alexnet_lrn", "vgg11"])
def test_an_equalized_graph_answers_the_same(kind, tmp_path):
    make, height, width, normalization = CASES[kind]
    graph = export(settle(make()), height, width, normalization=normalization).model
    batch = images(height, width, n=4)
    seen = calibrate(graph, everything_in(graph), [batch], tmp_path)
    found = equalize(graph, seen.peaks)
    expected = run(graph, batch)
    np.testing.assert_allclose(run(found.model, batch), expected, atol=1e-5)
    np.testing.assert_array_equal(run(graph, batch), expected)  # the original is left alone
    if kind in {"plain", "vgg11"}:
        assert found.factors


def test_it_brings_a_loud_channel_back(hard_model, held_out, tmp_path):
    graph = export(hard_model, 32, 32).model
    names = everything_in(graph)
    seen = calibrate(graph, names, held_out, tmp_path)
    balanced = equalize(graph, seen.peaks)
    again = calibrate(balanced.model, names, held_out, tmp_path)

    def spread(peaks):
        alive = peaks["conv2/relu"][peaks["conv2/relu"] > 0]
        return alive.max() / np.median(alive)

    assert spread(seen.peaks) > 50
    assert spread(again.peaks) < 10
    assert set(balanced.factors) == {"conv1", "conv2", "conv3", "fc1"}


def test_what_does_not_keep_a_factor_is_left_alone(tmp_path):
    """A sigmoid of twice the input is not twice the sigmoid; a sum has another reader."""
    import keras
    from keras import layers

    keras.utils.set_random_seed(0)
    image = keras.Input((16, 16, 3))
    x = layers.Conv2D(8, 3, padding="same", activation="sigmoid", name="a")(image)
    y = layers.Conv2D(8, 3, padding="same", activation="relu", name="b")(x)
    x = layers.Add()([x, y])
    x = layers.Conv2D(8, 3, padding="same", activation="relu6", name="c")(x)
    x = layers.Conv2D(8, 3, padding="same", activation="relu", name="d")(x)
    model = keras.Model(image, layers.Dense(20, name="e")(layers.Flatten()(x)))
    graph = export(settle(model), 16, 16).model
    batch = images(16, 16, n=4)
    seen = calibrate(graph, everything_in(graph), [batch], tmp_path)
    found = equalize(graph, seen.peaks)
    assert set(found.factors) == {"d"}
    np.testing.assert_allclose(run(found.model, batch), run(graph, batch), atol=1e-5)


# --- each layer's own noise --------------------------------------------------------------------


def noise_of(graph, target, batches, folder):
    plan = make_plan(graph, target)
    ranges = choose_ranges(calibrate(graph, plan.tensors, batches, folder), plan, "minmax")
    return plan, ranges, layer_noise(graph, plan, ranges, batches, folder)


@pytest.mark.parametrize("target", TARGETS)
def test_the_noise_of_a_layer_by_hand(toy_model, held_out, tmp_path, target):
    graph = export(toy_model, 32, 32).model
    plan, ranges, noise = noise_of(graph, TARGETS[target], held_out[:8], tmp_path)
    assert list(noise) == ["conv1", "conv2", "conv3", "fc1"]
    # fc1 in numpy: float input, rounded input and weights
    from cnnedge.graph.edit import constant
    from cnnedge.quantize.qdq import activation_scale, quantize_weight

    node = next(n for n in graph.graph if n.name == "fc1")
    exposed = graph.clone()
    results = {v.name: v for n in exposed.graph for v in n.outputs}
    exposed.graph.outputs.append(results[node.inputs[0].name])
    session = open_session(serialize(exposed)).session
    x = np.concatenate([session.run([node.inputs[0].name], {"image": b})[0] for b in held_out[:8]])
    scale = activation_scale(
        *ranges.limits[plan.scale_source(node.inputs[0].name)], TARGETS[target]
    )
    ends = np.iinfo(scale.dtype)
    levels = np.clip(np.rint(x / scale.scale) + scale.zero_point, ends.min, ends.max)
    rounded = (levels - scale.zero_point) * scale.scale
    weight = constant(node.inputs[1])
    integers, steps = quantize_weight(weight, 1, TARGETS[target])
    exact, moved = x @ weight, rounded @ (integers * steps)
    np.testing.assert_allclose(noise["fc1"].shift, (exact - moved).mean(axis=0), atol=1e-4)
    bias = constant(node.inputs[2])
    ratio = ((exact + bias) ** 2).sum() / ((exact - moved) ** 2).sum()
    assert noise["fc1"].sqnr_db == pytest.approx(10 * np.log10(ratio), abs=0.05)


def test_corrected_biases_undo_the_shift(hard_model, held_out, tmp_path):
    graph = export(hard_model, 32, 32).model
    # The runtime's real sums are looked at: without an int8 dot product full-range ones saturate.
    target = CPU if this_machine().has_int8_dot_product else CPU_REDUCED
    plan, ranges, before = noise_of(graph, target, held_out[:32], tmp_path)
    corrected = correct_bias(graph, before).model
    quantized = quantize(corrected, plan, ranges).model
    plain = quantize(graph, plan, ranges).model
    first = next(n for n in graph.graph if n.name == "conv1/relu").outputs[0].name

    def mean_of(model):
        exposed = model.clone()
        value = next(v for n in exposed.graph for v in n.outputs if v.name == f"{first}/dequantize")
        exposed.graph.outputs.append(value)
        session = open_session(serialize(exposed)).session
        found = [session.run([value.name], {"image": b})[0] for b in held_out[:32]]
        return np.concatenate(found).mean(axis=(0, 2, 3))

    exposed = graph.clone()
    exposed.graph.outputs.append(
        next(v for n in exposed.graph for v in n.outputs if v.name == first)
    )
    session = open_session(serialize(exposed)).session
    exact = np.concatenate([session.run([first], {"image": b})[0] for b in held_out[:32]])
    exact = exact.mean(axis=(0, 2, 3))
    assert contract_violations(quantized, target) == []
    assert np.abs(mean_of(quantized) - exact).sum() < np.abs(mean_of(plain) - exact).sum()


# --- the gate ----------------------------------------------------------------------------------


def gate_of(graph, tested, max_drop=0.5):
    batch, truth = tested
    expected = run(graph, batch)
    asked = []

    def evaluate(model):
        asked.append(model)
        found = compare(open_session(serialize(model))(batch), expected, truth)
        achieved = achieved_precision(model)
        return found, judge(
            found, precision="int8", max_drop=max_drop, trained=True, achieved=achieved
        )

    return evaluate, asked


def guarded(graph, target, held_out, evaluate, folder, **options):
    seen = calibrate(graph, everything_in(graph), held_out, folder)
    plan = make_plan(graph, target)
    return hold_gate(graph, plan, seen, lambda: iter(held_out), evaluate, folder, **options)


@pytest.mark.parametrize("target", TARGETS)
def test_a_hard_model_fails_plain_and_passes_guarded(
    hard_model, held_out, tested, tmp_path, target
):
    graph = export(hard_model, 32, 32).model
    evaluate, _ = gate_of(graph, tested)
    found = guarded(graph, TARGETS[target], held_out, evaluate, tmp_path)
    plain = found.attempts[0]
    assert plain.step == "plain"
    assert plain.verdict.failed
    assert plain.comparison.drop > 0.5
    assert found.holds
    kept = found.attempts[found.chosen]
    assert kept.comparison.drop <= 0.5
    assert achieved_precision(found.graph.model)["macs"]["int8"] > 0.9
    assert contract_violations(found.graph.model, TARGETS[target]) == []
    # what the report says was kept is the graph that is handed over
    again, _ = evaluate(found.graph.model)
    assert again == kept.comparison
    gains = [a.gained for a in found.attempts[1:]]
    drops = [a.comparison.drop for a in found.attempts]
    assert gains == pytest.approx([x - y for x, y in pairwise(drops)])


def test_a_gate_that_holds_is_not_worked_on(toy_model, held_out, tested, tmp_path):
    graph = export(toy_model, 32, 32).model
    evaluate, asked = gate_of(graph, tested, max_drop=3.0)
    found = guarded(graph, CPU, held_out, evaluate, tmp_path)
    assert [a.step for a in found.attempts] == ["plain"]
    assert len(asked) == 1


def test_what_is_known_of_the_first_attempt_is_not_evaluated_again(
    toy_model, held_out, tested, tmp_path
):
    graph = export(toy_model, 32, 32).model
    evaluate, asked = gate_of(graph, tested)
    nothing = compare(run(graph, tested[0]), run(graph, tested[0]), tested[1])
    known = (nothing, Verdict("passed", "known"))
    found = guarded(graph, CPU, held_out, evaluate, tmp_path, plain=known)
    assert found.attempts[0].verdict.reason == "known"
    assert asked == []


def scripted(good):
    """Return an evaluation that passes where ``good`` says so of the layers that stay float."""
    calls = []

    def evaluate(model):
        floats = {
            n.name
            for n in model.graph
            if n.op_type in {"Conv", "Gemm"}
            and n.inputs[1].producer() is None
            and n.name != "fc2"  # too small for int8 in any case
        }
        calls.append(floats)
        lost = 0 if good(floats) else 50
        found = Comparison(1000, 0.9, 0.9, 1.0, 1.0, 0.9, 0.5, lost, 0)
        return found, Verdict("passed" if good(floats) else "failed", "scripted")

    return evaluate, calls


@pytest.mark.parametrize("needed", [1, 2])
def test_the_fewest_most_sensitive_layers_are_kept(hard_model, held_out, tmp_path, needed):
    graph = export(hard_model, 32, 32).model
    evaluate, _ = scripted(lambda floats: len(floats) >= needed)
    found = guarded(graph, CPU, held_out[:24], evaluate, tmp_path)
    order = [layer.layer for layer in found.sensitivity]
    effect = [layer.divergence for layer in found.sensitivity]
    assert sorted(order) == ["conv1", "conv2", "conv3", "fc1"]
    assert effect == sorted(effect, reverse=True)
    steps = [a.step for a in found.attempts]
    assert steps[0] == "plain"
    assert steps[-1] == "mixed"
    assert {"equalize", "bias"} < set(steps)
    assert set(found.graph.plan.skipped) - {"fc2"} == set(order[:needed])
    assert found.holds
    assert achieved_precision(found.graph.model)["macs"]["int8"] >= 0.5


def test_a_gate_that_nothing_holds_keeps_the_best(hard_model, held_out, tmp_path, monkeypatch):
    graph = export(hard_model, 32, 32).model
    evaluate, calls = scripted(lambda floats: False)
    plans = []

    def only_where_layers_are_kept(*arguments, keep_float):
        plans.append(keep_float)
        return make_plan(*arguments, keep_float=keep_float)

    monkeypatch.setattr("cnnedge.quantize.guard.make_plan", only_where_layers_are_kept)
    found = guarded(graph, CPU, held_out[:24], evaluate, tmp_path)
    assert not found.holds
    assert len(calls) == len(found.attempts)
    assert achieved_precision(found.graph.model)["macs"]["int8"] >= 0.5
    assert any("kept in FP32" in a.detail for a in found.attempts)
    assert plans
    assert all(plans)  # one plan serves whatever keeps no layer


def test_a_layer_that_cannot_be_equalized_is_kept_in_float(toy_model, held_out, tested, tmp_path):
    """An ELU keeps no factor, so its loud channel stays loud, and the layer behind it float."""
    import keras
    from keras import layers

    from cnnedge.image import normalize

    keras.utils.set_random_seed(1)
    image = keras.Input((32, 32, 3))
    x = layers.Conv2D(16, 3, strides=2, padding="same", activation="elu", name="conv1")(image)
    x = layers.Conv2D(32, 3, strides=2, padding="same", activation="relu", name="conv2")(x)
    x = layers.Conv2D(64, 3, strides=2, padding="same", activation="relu", name="conv3")(x)
    model = keras.Model(image, layers.Dense(10, activation="softmax")(layers.Flatten()(x)))
    model.compile(keras.optimizers.Adam(3e-3), "sparse_categorical_crossentropy")
    batch, truth = tested
    model.fit(normalize(batch, "unit"), truth, batch_size=32, epochs=8, verbose=0)
    make_loud(model, "conv1", "conv2", 3000)
    graph = export(model, 32, 32).model
    evaluate, _ = gate_of(graph, tested)
    found = guarded(graph, CPU, held_out, evaluate, tmp_path)
    assert found.attempts[0].verdict.failed
    assert found.holds
    assert found.attempts[found.chosen].step == "mixed"
    assert found.sensitivity[0].layer == "conv2"
    assert "conv2" in found.graph.plan.skipped
    macs = achieved_precision(found.graph.model)["macs"]
    assert 0.5 <= macs["int8"] < 1


# --- in the product ----------------------------------------------------------------------------


def test_the_bundle_of_a_hard_model_says_what_was_tried(hard_model, digits, tmp_path):
    from cnnedge.backends.keras import ModelNote, save_model
    from cnnedge.image import ImageContract

    note = ModelNote("hard", digits.labels, ImageContract(32, 32), "unit", data="digits", seed=0)
    save_model(hard_model, tmp_path / "hard.keras", note)
    plain = run_command("export", tmp_path / "hard.keras", "-o", tmp_path / "plain", "--no-guard")
    assert "int8" in error_of(plain, code=3)
    done = run_command("export", tmp_path / "hard.keras", "-o", tmp_path / "hard")
    assert done.exit_code == 0
    assert "minmax calibration: drop" in done.stdout
    assert "(kept)" in done.stdout
    manifest = json.loads((tmp_path / "hard" / "manifest.json").read_text())
    (int8,) = [v for v in manifest["variants"] if v["name"] == "int8"]
    record = int8["quantization"]
    assert record["attempts"][0]["status"] == "failed"
    assert record["attempts"][record["chosen"]]["status"] != "failed"
    assert int8["verdict"]["status"] != "failed"
    assert record["attempts"][record["chosen"]]["drop_points"] == int8["accuracy"]["drop_points"]
    page = (tmp_path / "hard" / "report.html").read_text()
    assert "what was tried to hold the gate" in page
    assert "How many calibration images were enough?" in page
    assert run_command("verify", tmp_path / "hard", "--data", "digits").exit_code == 0


def test_weights_keep_seven_bits_for_a_cpu_without_a_dot_product(toy_file, tmp_path):
    done = run_command(
        *("export", toy_file, "-o", tmp_path / "toy", "--max-drop", 3, "--precision", "int8"),
        "--no-dot-product",
    )
    assert done.exit_code == 0, done.output
    manifest = json.loads((tmp_path / "toy" / "manifest.json").read_text())
    limits = {
        v["name"]: v["quantization"]["weight_limit"]
        for v in manifest["variants"]
        if v["precision"] == "int8"
    }
    assert limits == {"int8": 63, "int8-trt": 127}
