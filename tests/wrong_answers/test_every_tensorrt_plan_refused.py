"""A right plan is kept, a wrong one is not, in the words that TensorRT 10 and 11 really write.

The stand-in's inspector tells types for the profile that its execution context is set to, and "N/A
due to dynamic shapes" for all else (NvInferRuntime.h, IEngineInspector::setExecutionContext).
"""

from __future__ import annotations

import json

import onnx_ir as ir
import pytest
from fakes import fake_gpu, fake_module, inspector_json

from cnnedge.backends.tensorrt import build_plan, open_library
from cnnedge.backends.tensorrt.layers import read_inspector
from cnnedge.engine.check import check_engine
from cnnedge.plan import PlanOptions


@pytest.fixture
def checked(toy_bundle):
    """Return what builds a plan on a stand-in and holds it against its graph."""

    def build(surface, variant, max_batch, description=None):
        release = 11 if surface == "tensorrt-11.4" else 10
        path = toy_bundle.path(f"model.{variant}.onnx")
        gpu, cuda = fake_gpu()
        described = description or inspector_json(path, release=release)
        module = fake_module(surface, cuda, description=described)
        runtime = "rtx" if surface.startswith("rtx") else "tensorrt"
        options = PlanOptions(max_batch=max_batch)
        library = open_library(runtime, lambda name: module)
        built = build_plan(library, path, options, gpu.facts)
        return check_engine(
            ir.load(path),
            built.description,
            profiles=len(options.profiles),
            source=built.source,
            weight_bytes=None,
        )

    return build


@pytest.mark.parametrize("max_batch", [1, 8])
@pytest.mark.parametrize("variant", ["fp32", "fp16", "int8-trt"])
@pytest.mark.parametrize("surface", ["tensorrt-10.3", "tensorrt-11.4", "rtx-1.7"])
def test_a_plan_that_is_what_was_asked_is_kept(checked, surface, variant, max_batch):
    report = checked(surface, variant, max_batch)
    assert report.violations == ()
    assert len(report.counts) == (1 if max_batch == 1 else 2)
    assert all(report.counts)


@pytest.mark.parametrize("profile", [0, 1])
def test_a_layer_in_another_type_is_refused_in_either_profile(checked, toy_bundle, profile):
    document = json.loads(inspector_json(toy_bundle.path("model.fp16.onnx")))
    (layer,) = (
        layer
        for layer in document["Layers"]
        if layer["Name"] == ("fc1" if profile == 0 else "fc1 [profile 1]")
    )
    layer["Inputs"][0]["Format/Datatype"] = "Float"
    layer["Constants"][0]["Format/Datatype"] = "Float"
    (line,) = checked("tensorrt-10.3", "fp16", 8, json.dumps(document)).violations
    assert line == f"fc1: float16 was asked for, and float32 was built (profile {profile})"


def test_an_int8_layer_whose_types_are_not_told_is_no_float32(checked, toy_bundle):
    document = json.loads(inspector_json(toy_bundle.path("model.int8-trt.onnx")))
    for layer in document["Layers"]:
        if layer["Name"] == "conv2":
            layer["Inputs"][0]["Format/Datatype"] = "something nobody has seen yet"
    (line,) = checked("tensorrt-10.3", "int8-trt", 8, json.dumps(document)).violations
    assert line == "conv2: int8 was asked for, and unknown was built (profile 0)"


@pytest.mark.parametrize(
    ("told", "dtype"),
    [
        ("Half", "float16"),
        ("Float", "float32"),
        ("BFloat16", "bfloat16"),
        ("FP8", "float8"),
        ("Int8", "int8"),
        ("Row major linear FP32", "float32"),
        ("Channel major FP16 format where channel % 8 == 0", "float16"),
        ("Thirty-two wide channel vectorized row major Int8 format", "int8"),
        ("Two wide channel vectorized row major BF16 format", "bfloat16"),
        ("Row major linear UInt8 format", "uint8"),
        ("N/A due to dynamic shapes", "unknown"),
        ("", "unknown"),
    ],
)
def test_types_in_the_inspectors_words(told, dtype):
    for key in ("Format/Datatype", "Datatype"):
        layer = {"Name": "x", "LayerType": "kgen", "Inputs": [{"Name": "y", key: told}]}
        (found,) = read_inspector(json.dumps({"Layers": [layer]})).layers
        assert found.inputs[0].dtype == dtype
