"""Verification says whether, and where, the answers part from the reference's."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import onnx_ir as ir
import pytest
from test_bundle import edit_manifest, rehash

from cnnedge import selftest
from cnnedge.backends.keras import predict
from cnnedge.data import open_source
from cnnedge.errors import BundleError, DataError
from cnnedge.graph.edit import constant, initializer
from cnnedge.graph.write import write_onnx
from cnnedge.verify import verify_bundle

pytestmark = pytest.mark.tf


def stages(found):
    return {v.name: v.selftest.stage for v in found.variants}


def test_a_fresh_bundle_passes(toy_bundle, digits):
    found = verify_bundle(toy_bundle.root, digits)
    assert not found.failed
    assert set(stages(found).values()) == {None}
    assert found.reference == "Keras, as recorded at export"
    for variant in found.variants:
        assert variant.provider == "CPUExecutionProvider"
        recorded = toy_bundle.manifest.variant(variant.name).accuracy
        assert variant.comparison.top1 == recorded.top1
        assert variant.comparison.n == len(digits.test)
    document = json.loads(json.dumps(found.to_dict()))
    accuracy = document["variants"][2]["accuracy"]
    assert {"top1", "top5", "agreement", "max_abs_diff", "smallest_drop_points"} <= set(accuracy)
    assert accuracy["drop_interval_points"][0] < accuracy["drop_interval_points"][1]


def test_the_recorded_reference_is_keras(toy_bundle, digits, toy_model):
    batch = np.stack([digits.test.tensor(i, toy_bundle.manifest.image) for i in range(30)])
    with np.load(toy_bundle.path("selftest/reference.npz")) as stored:
        np.testing.assert_allclose(
            stored["answers"][:30], predict(toy_model, batch, "unit"), atol=1e-6
        )


def test_other_images_are_held_against_the_fp32_variant_or_keras(toy_bundle, toy_model):
    others = open_source("digits", seed=7)
    found = verify_bundle(toy_bundle.root, others, limit=40)
    assert found.reference.startswith("the FP32 variant")
    assert found.variants[0].comparison.max_abs_diff == 0.0
    keras = verify_bundle(
        toy_bundle.root, others, limit=40, reference=lambda x: predict(toy_model, x, "unit")
    )
    assert keras.reference == "Keras"
    assert 0 < keras.variants[0].comparison.max_abs_diff <= 1e-5


def test_the_self_test_alone_needs_no_data(toy_bundle):
    found = verify_bundle(toy_bundle.root)
    assert not found.failed
    assert all(v.comparison is None and v.verdict is None for v in found.variants)


def test_other_labels_are_refused(bundle_copy, digits):
    edit_manifest(bundle_copy, lambda f: f.update(labels=[*"ABCDEFGHIJ"]))
    with pytest.raises(DataError, match="labels of digits are not those of"):
        verify_bundle(bundle_copy, digits)


def test_the_gate_stops_a_drop(toy_bundle, digits, toy_model):
    """A reference that is always right makes every mistake of a variant a loss."""
    truth = iter(np.eye(10, dtype=np.float32)[digits.test.targets])
    found = verify_bundle(
        toy_bundle.root,
        digits,
        reference=lambda x: np.stack([next(truth) for _ in x]),
        max_drop=0.0,
    )
    assert found.failed
    int8 = found.variants[2]
    assert int8.verdict.status == "failed"
    assert int8.comparison.drop == pytest.approx(100 * (1 - int8.comparison.top1))


# --- which stage diverged ----------------------------------------------------------------------


def test_a_machine_that_decodes_otherwise(toy_bundle, monkeypatch):
    real = selftest.decode

    def decode(path, image=None):
        return real(path, image).point(lambda level: min(255, level + 1))

    monkeypatch.setattr(selftest, "decode", decode)
    found = verify_bundle(toy_bundle.root)
    assert set(stages(found).values()) == {"decode"}
    assert "golden-00.png" in found.variants[0].selftest.detail


def test_a_machine_that_resizes_otherwise(toy_bundle, monkeypatch):
    real = selftest.to_tensor

    def to_tensor(path, image):
        return np.roll(real(path, image), 1, axis=0)

    monkeypatch.setattr(selftest, "to_tensor", to_tensor)
    found = verify_bundle(toy_bundle.root)
    assert set(stages(found).values()) == {"resize"}
    assert "levels off" in found.variants[0].selftest.detail


def change_weight(root, file, node, change):
    model = ir.load(root / file)
    (found,) = [n for n in model.graph if n.name == node]
    values = change(constant(found.inputs[1]))
    found.replace_input_with(1, initializer(model, "changed", values))
    write_onnx(model, root / file)
    rehash(root, file)


@pytest.mark.parametrize(
    ("file", "node", "first"),
    [
        ("model.fp32.onnx", "conv2", "conv2"),
        ("model.fp16.onnx", "fc1", "fc1"),
        ("model.int8.onnx", "conv3/weight/dequantize", "conv3/relu/quantize"),
    ],
)
def test_a_layer_that_computes_otherwise_is_named(bundle_copy, file, node, first):
    change_weight(bundle_copy, file, node, lambda w: w * np.asarray(3, w.dtype))
    found = verify_bundle(bundle_copy)
    broken = file.split(".")[1]
    assert found.failed
    assert stages(found) == {v.name: "layer" if v.name == broken else None for v in found.variants}
    detail = next(v.selftest.detail for v in found.variants if v.name == broken)
    assert f"the first layer that differs is {first} " in detail


def test_int8_that_is_float_inside_is_found_out(bundle_copy, digits):
    """The file says int8 and holds the FP32 graph: the same answers, and not what was asked."""
    (bundle_copy / "model.int8.onnx").write_bytes((bundle_copy / "model.fp32.onnx").read_bytes())
    rehash(bundle_copy, "model.int8.onnx")
    found = verify_bundle(bundle_copy, digits, limit=20, max_drop=100)
    int8 = found.variants[2]
    assert int8.achieved["macs"] == {"float32": 1.0}
    assert int8.verdict.status == "failed"
    assert "int8 was asked for" in int8.verdict.reason


def test_a_softmax_that_computes_otherwise_is_the_output(bundle_copy):
    model = ir.load(bundle_copy / "model.fp32.onnx")
    (softmax,) = [n for n in model.graph if n.op_type == "Softmax"]
    half = ir.node("Mul", [softmax.inputs[0], initializer(model, "h", np.float32([0.5]))])
    half.outputs[0].type = softmax.inputs[0].type
    softmax.prepend(half)
    half.name, half.outputs[0].name = "image/late", "late"  # no layer of its own
    softmax.replace_input_with(0, half.outputs[0])
    write_onnx(model, bundle_copy / "model.fp32.onnx")
    rehash(bundle_copy, "model.fp32.onnx")
    assert stages(verify_bundle(bundle_copy))["fp32"] == "output"


def test_a_bundle_without_a_self_test_is_refused(bundle_copy):
    (bundle_copy / selftest.INDEX).write_text("{}")
    rehash(bundle_copy, selftest.INDEX)
    with pytest.raises(BundleError, match="no self-test"):
        verify_bundle(bundle_copy)


def test_golden_images_are_real_files_of_two_kinds(toy_bundle):
    names = [n for n in toy_bundle.manifest.files if "golden" in n]
    assert len(names) == selftest.GOLDEN
    assert {n.rsplit(".")[-1] for n in names} == {"png", "jpg"}


def test_images_that_the_scales_were_taken_from_are_refused(toy_bundle, digits):
    seen = replace(digits, test=digits.calibration)
    with pytest.raises(DataError, match="is one that toy was calibrated on"):
        verify_bundle(toy_bundle.root, seen)
