"""What a built engine is held to, on descriptions of engines that were altered by a hand."""

from __future__ import annotations

import json
from dataclasses import replace

import onnx_ir as ir
import pytest
from fakes import inspector_json

from cnnedge.backends.tensorrt.layers import EngineTensor, read_inspector
from cnnedge.engine.check import check_engine


@pytest.fixture
def checked(toy_bundle):
    """Return a function that checks an engine of the FP16 graph, altered by another."""
    path = toy_bundle.path("model.fp16.onnx")
    image = toy_bundle.manifest.image
    tensors = (
        (EngineTensor("image", (-1, image.height, image.width, 3), "uint8"), "input"),
        (EngineTensor("probabilities", (-1, 4), "float32"), "output"),
    )

    def check(alter=lambda layers: None, tensors=tensors):
        document = json.loads(inspector_json(path))
        alter(document["Layers"])
        description = replace(read_inspector(json.dumps(document)), tensors=tensors)
        return check_engine(
            ir.load(path), description, profiles=2, source="a hand", weight_bytes=None
        )

    check.tensors = tensors
    return check


def test_what_the_graph_asks_is_no_violation(checked):
    assert checked().violations == ()


def test_a_relu_in_a_kernel_of_its_own_is_one(checked):
    def part(layers):
        first = layers[0]
        name, relu = first["Name"], f"{first['Name']}/relu"
        assert relu in first["Metadata"]
        first["Metadata"] = f"[ONNX Layer: {name}]"
        layers.insert(
            1,
            {
                "Name": relu,
                "LayerType": "PointWise",
                "Inputs": [{"Name": "elsewhere", "Format/Datatype": "linear FP16 format"}],
                "Outputs": [],
                "Metadata": f"[ONNX Layer: {relu}]",
            },
        )

    (line,) = checked(part).violations
    assert line == "conv1: conv1/relu was built as a kernel of its own (profile 0)"


def test_a_layer_that_is_nowhere_is_one(checked):
    (first, *_) = checked(lambda layers: layers.pop(0)).violations
    assert first == "conv1: no kernel of the engine has its weights (profile 0)"


@pytest.mark.parametrize(
    ("name", "dtype"), [("image", "float32"), ("probabilities", "float16"), ("image", None)]
)
def test_inputs_and_outputs_have_the_contracts_types(checked, name, dtype):
    tensors = tuple(
        (replace(tensor, dtype=dtype) if tensor.name == name else tensor, mode)
        for tensor, mode in checked.tensors
        if tensor.name != name or dtype is not None
    )
    asked = {"image": "uint8", "probabilities": "float32"}[name]
    assert checked(tensors=tensors).violations == (
        f"{name}: {asked} in the graph, {dtype or 'missing'} in the engine",
    )
