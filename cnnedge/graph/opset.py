"""The lowest opset that describes a graph: see docs/decisions/lowest-opset.md."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cnnedge.graph.edit import all_nodes

if TYPE_CHECKING:
    import onnx_ir as ir


def lowest_opset(model: ir.Model) -> int:
    """Return the lowest opset that describes the graph, so that old runtimes load it."""
    import onnx

    traced = model.graph.opset_imports[""]
    since = [
        onnx.defs.get_schema(node.op_type, traced, "").since_version
        for node in all_nodes(model)  # the body of a loop too
        if node.domain == ""
    ]
    return max([13, *since])  # 13: per-channel DequantizeLinear, Softmax over one axis
