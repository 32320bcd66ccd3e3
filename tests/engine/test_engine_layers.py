"""What an engine says of itself: the builder's log, and the inspector's JSON of TensorRT 10 and 11.

The log's lines are TensorRT-RTX 1.7's, shortened. The JSON follows NVIDIA's documentation of the
engine inspector and of its change from 10 to 11.
"""

from __future__ import annotations

import json

import pytest

from cnnedge.backends.tensorrt.layers import read_inspector, read_log

LOG = """Layers:
Name: conv1_U38_myl0_2, LayerType: correlation, Inputs: [ { Name: before, Dimensions: [1,4,8,8], \
Strides: [256,1,32,4], StrideOrder: [3,0,2,1], Datatype: Int8, Format: (NHWC) Channel major format \
}], Constants: [ { Name: w, Dimensions: [16,4,3,3], Strides: [36,1,12,4], StrideOrder: [3,0,2,1], \
Datatype: Int8, Format: (NHWC) Channel major format }, { Name: s, Dimensions: [1,16,1,1], Strides: \
[16,1,16,16], StrideOrder: [3,0,2,1], Datatype: Float, Format: (NHWC) Channel major format }], \
Outputs: [ { Name: behind, Dimensions: [1,16,8,8], Strides: [1024,1,128,16], StrideOrder: \
[3,0,2,1], Datatype: Float, Format: (NHWC) Channel major format }], TacticName: stub, \
StreamId: 0, Metadata: [ONNX Layer: conv1][ONNX Layer: conv1/weight/dequantize]
Name: __myl_Resh_myl0_3, LayerType: kgen, Inputs: [ { Name: behind, Dimensions: [1,16,8,8], \
Strides: [1], StrideOrder: [0], Datatype: Float, Format: (Linear) Row major linear format }], \
Constants: [], Outputs: [ { Name: flat, Dimensions: [1,1024], Strides: [1], StrideOrder: [0], \
Datatype: Half, Format: (Linear) Row major linear format }], TacticName: x, StreamId: 0, Metadata: \
[ONNX Layer: flatten]
Name: conv1 [profile 1]_U38_myl1_4, LayerType: correlation, Inputs: [ { Name: before [profile 1], \
Dimensions: [-1,4,8,8], Strides: [256,1,32,4], StrideOrder: [3,0,2,1], Datatype: Int8, Format: \
(NHWC) Channel major format }], Constants: [], Outputs: [], TacticName: x, StreamId: 0, Metadata: \
[ONNX Layer: conv1]
Name: __myl_Resh_myl1_5, LayerType: kgen, Inputs: [], Constants: [], Outputs: [], TacticName: x, \
StreamId: 0, EventId: 7, Metadata:

I/O Tensors:
 Name: image, IOMode: Input, DataType: UInt8, Dimensions: [-1,8,8,3], Location: Device, ProfileInfo
 Name: probabilities, IOMode: Output, DataType: Float, Dimensions: [1,10], Location: Device
"""


def test_the_builders_log():
    found = read_log(LOG)
    conv, reshape, second, third = found.layers
    assert (conv.name, conv.kind) == ("conv1_U38_myl0_2", "correlation")
    assert [(t.name, t.dims, t.dtype) for t in conv.inputs] == [("before", (1, 4, 8, 8), "int8")]
    assert [(t.dtype, t.size) for t in conv.constants] == [("int8", 576), ("float32", 16)]
    assert [t.name for t in conv.outputs] == ["behind"]
    assert conv.origins == ("conv1", "conv1/weight/dequantize")
    assert reshape.origins == ("flatten",)
    # a kernel that names no profile belongs to that of the others of its graph
    assert [layer.profile for layer in (conv, reshape, second, third)] == [0, 0, 1, 1]
    assert [(t.name, t.dtype, mode) for t, mode in found.tensors] == [
        ("image", "uint8", "input"),
        ("probabilities", "float32", "output"),
    ]


def test_a_line_that_is_not_understood_is_an_error():
    with pytest.raises(ValueError, match="cannot read the engine's layer 'Layer"):
        read_log("Layers:\nLayer(Cask): conv1 + relu1\n")


def layer_of_10():
    return {
        "Name": "conv1 + relu1",
        "LayerType": "CaskConvolution",
        "Inputs": [
            {
                "Name": "image",
                "Location": "Device",
                "Dimensions": [1, 3, 8, 8],
                "Format/Datatype": "Four wide channel vectorized row major Int8 format",
            }
        ],
        "Outputs": [
            {
                "Name": "relu1",
                "Location": "Device",
                "Dimensions": [1, 16, 8, 8],
                "Format/Datatype": "Channel major FP16 format where channel % 8 == 0",
            }
        ],
        "ParameterType": "Convolution",
        "Weights": {"Type": "Int8", "Count": 432},
        "Bias": {"Type": "Float", "Count": 16},
        "HasReLU": 1,
        "TacticName": "sm80_xmma_fprop",
        "Metadata": "[ONNX Layer: conv1]\x1e[ONNX Layer: relu1]",
    }


def test_the_inspector_of_tensorrt_10():
    document = {"Layers": [layer_of_10()], "Bindings": ["image", "probabilities"]}
    (layer,) = read_inspector(json.dumps(document)).layers
    assert layer.origins == ("conv1", "relu1")
    assert (layer.inputs[0].dtype, layer.outputs[0].dtype) == ("int8", "float16")
    assert [(t.dtype, t.size) for t in layer.constants] == [("int8", 432)]


def test_names_serve_where_a_plan_has_no_metadata():
    bare = layer_of_10() | {"Metadata": "", "Name": "conv1 + relu1 [profile 1]"}
    (layer,) = read_inspector(json.dumps({"Layers": [bare]})).layers
    assert (layer.origins, layer.profile) == (("conv1", "relu1"), 1)


def test_the_inspector_of_tensorrt_11():
    tensor = {"Name": "image", "Dimensions": [1, 3, 8, 8], "Format": "NCHW", "Datatype": "Half"}
    document = {
        "Layers": [{"Name": "fc1", "LayerType": "gemm", "Inputs": [tensor], "Constants": [tensor]}],
        "I/O Tensors": [
            {"Name": "image", "IOMode": "Input", "DataType": "UInt8", "Dimensions": [-1, 8, 8, 3]}
        ],
    }
    found = read_inspector(json.dumps(document))
    assert found.layers[0].constants[0].dtype == "float16"
    ((image, mode),) = found.tensors
    assert (image.dtype, image.dims, mode) == ("uint8", (-1, 8, 8, 3), "input")


def test_a_plan_without_detail_is_refused():
    with pytest.raises(ValueError, match="without detailed profiling verbosity"):
        read_inspector('{"Layers": ["conv1 + relu1"]}')
