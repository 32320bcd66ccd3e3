"""Moving a Transpose changes where values lie, never what they are."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

from cnnedge.export.layout import keep_nchw
from cnnedge.graph.write import serialize

SHAPE = [2, 3, 5, 7]  # NCHW, all different, so that no mix-up of axes goes unseen


def constant(name, array):
    return numpy_helper.from_array(np.asarray(array), name)


MIDDLES = {
    "relu": ([helper.make_node("Relu", ["x"], ["y"])], []),
    "clip": (
        [helper.make_node("Clip", ["x", "low", "high"], ["y"])],
        [constant("low", np.float32(-0.5)), constant("high", np.float32(0.5))],
    ),
    "per channel": (
        [helper.make_node("Add", ["x", "c"], ["y"])],
        [constant("c", np.arange(3, dtype=np.float32))],
    ),
    "per column": (
        [helper.make_node("Mul", ["c", "x"], ["y"])],
        [constant("c", np.arange(7, dtype=np.float32).reshape(7, 1))],
    ),
    "scalar": (
        [helper.make_node("Sub", ["c", "x"], ["y"])],
        [constant("c", np.float32(3))],
    ),
    "pad": (
        [helper.make_node("Pad", ["x", "p"], ["y"])],
        [constant("p", np.array([0, 0, 1, 0, 0, 2, 3, 0], np.int64))],
    ),
    "mean": (
        [helper.make_node("ReduceMean", ["x", "a"], ["y"], keepdims=1)],
        [constant("a", np.array([1, 2], np.int64))],
    ),
    "mean over rows": (
        [helper.make_node("ReduceMean", ["x", "a"], ["y"], keepdims=1)],
        [constant("a", np.array([1], np.int64))],
    ),
    "squeeze and excite": (
        [
            helper.make_node("ReduceMean", ["x", "a"], ["m"], keepdims=1),
            helper.make_node("Sigmoid", ["m"], ["s"]),
            helper.make_node("Mul", ["x", "s"], ["y"]),
        ],
        [constant("a", np.array([1, 2], np.int64))],
    ),
    "concat channels": (
        [
            helper.make_node("Relu", ["x"], ["r"]),
            helper.make_node("Concat", ["x", "r"], ["y"], axis=3),
        ],
        [],
    ),
    "concat rows": (
        [
            helper.make_node("Relu", ["x"], ["r"]),
            helper.make_node("Concat", ["x", "r"], ["y"], axis=-3),
        ],
        [],
    ),
}


def build(middle):
    nodes, constants = MIDDLES[middle]
    graph = helper.make_graph(
        [
            helper.make_node("Transpose", ["image"], ["x"], perm=[0, 2, 3, 1]),
            *nodes,
            helper.make_node("Transpose", ["y"], ["z"], perm=[0, 3, 1, 2]),
            helper.make_node("Identity", ["z"], ["out"]),
        ],
        "middle",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, SHAPE)],
        [helper.make_tensor_value_info("out", TensorProto.FLOAT, None)],
        constants,
    )
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
    return ir.from_proto(onnx.shape_inference.infer_shapes(proto))


def run(model, x):
    session = ort.InferenceSession(serialize(model), providers=["CPUExecutionProvider"])
    return session.run(None, {"image": x})[0]


@pytest.mark.parametrize("middle", MIDDLES)
def test_what_stands_between_two_transposes_is_moved_out(middle):
    model = build(middle)
    x = np.random.default_rng(0).normal(size=SHAPE).astype(np.float32)
    expected = run(model, x)
    assert keep_nchw(model).modified
    assert not keep_nchw(model).modified
    assert not [node for node in model.graph if node.op_type == "Transpose"]
    np.testing.assert_allclose(run(model, x), expected, rtol=1e-6, atol=1e-6)


def test_what_cares_about_its_layout_is_left_alone():
    graph = helper.make_graph(
        [
            helper.make_node("Transpose", ["image"], ["x"], perm=[0, 2, 3, 1]),
            helper.make_node("Softmax", ["x"], ["y"], axis=-1),
            helper.make_node("Transpose", ["y"], ["out"], perm=[0, 3, 1, 2]),
        ],
        "softmax",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, SHAPE)],
        [helper.make_tensor_value_info("out", TensorProto.FLOAT, SHAPE)],
    )
    model = ir.from_proto(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
    )
    assert not keep_nchw(model).modified
    assert [node.op_type for node in model.graph] == ["Transpose", "Softmax", "Transpose"]
