"""The quantized graph: a plan and its ranges carried out, and the contract checked."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from cnnedge.errors import ModelError
from cnnedge.graph.float16 import to_float16
from cnnedge.graph.opset import lowest_opset
from cnnedge.quantize.calibrate import Ranges
from cnnedge.quantize.check import contract_violations
from cnnedge.quantize.plan import Plan
from cnnedge.quantize.qdq import insert_pairs

TRT_OPSET = 19  # the first whose QuantizeLinear takes FP16 scales


@dataclass(frozen=True)
class QuantizedGraph:
    """An INT8 graph and how it came about.

    Attributes:
        model: The ``onnx_ir.Model`` with Q/DQ pairs.
        plan: What was quantized and what was left in float, with the reasons.
        images: How many images gave the activation ranges.
    """

    model: Any
    plan: Plan
    images: int


def quantize(model: Any, plan: Plan, ranges: Ranges) -> QuantizedGraph:
    """Return the INT8 graph of an FP32 graph.

    Args:
        model: The FP32 ``onnx_ir.Model``, which is left as it is.
        plan: What `make_plan` decided for it.
        ranges: What `choose_ranges` kept of the plan's tensors.

    Raises:
        ModelError: the result breaks its target's contract.
    """
    copy = model.clone()
    insert_pairs(copy, plan, ranges)
    if plan.target.float16:
        copy = to_float16(copy).model
        copy.graph.opset_imports[""] = max(TRT_OPSET, copy.graph.opset_imports[""])
        copy.ir_version = 9  # the ONNX release that brought opset 19
    else:  # operators that were folded away may have been the newest
        copy.graph.opset_imports[""] = lowest_opset(copy)
    broken = contract_violations(copy, plan.target)
    if broken:
        raise ModelError(
            f"the int8 graph breaks the contract of {plan.target.name!r}: {'; '.join(broken)}",
            fix="report this network: its structure is one that cnnedge does not quantize yet",
        )
    return QuantizedGraph(copy, plan, ranges.images)
