"""The graphs of cnnedge/benchmark/probes: run this to write them anew (it needs onnx)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

FOLDER = Path(__file__).parents[2] / "cnnedge" / "benchmark" / "probes"
SIZE = 1024


def gemm(name: str, op: str, left: int, right: int, result: int) -> onnx.ModelProto:
    """Return a product of two matrices of ``SIZE``, the right one constant, as weights are."""
    shape = numpy_helper.from_array(np.array([SIZE, SIZE]), "shape")
    value = helper.make_tensor("value", right, [1], [1])
    nodes = [
        helper.make_node("ConstantOfShape", ["shape"], ["b"], "weights", value=value),
        helper.make_node(op, ["a", "b"], ["c"], "gemm"),
    ]
    graph = helper.make_graph(
        nodes,
        name,
        [helper.make_tensor_value_info("a", left, ["N", SIZE])],
        [helper.make_tensor_value_info("c", result, ["N", SIZE])],
        [shape],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)


PROBES = {
    "fp32-gemm.onnx": gemm(
        "fp32-gemm", "MatMul", TensorProto.FLOAT, TensorProto.FLOAT, TensorProto.FLOAT
    ),
    "int8-gemm.onnx": gemm(
        "int8-gemm", "MatMulInteger", TensorProto.UINT8, TensorProto.INT8, TensorProto.INT32
    ),
}

if __name__ == "__main__":
    for name, model in PROBES.items():
        onnx.save(model, FOLDER / name)
