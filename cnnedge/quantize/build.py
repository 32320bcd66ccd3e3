"""The quantized graph: a plan and its ranges carried out, and the contract checked."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from cnnedge.errors import ModelError
from cnnedge.graph.edit import WEIGHTED, main_nodes, name_of
from cnnedge.graph.float16 import to_float16
from cnnedge.graph.opset import lowest_opset
from cnnedge.graph.passes import settle_names
from cnnedge.quantize.calibrate import Ranges
from cnnedge.quantize.check import contract_violations
from cnnedge.quantize.plan import ASKED_FOR, Plan, make_plan
from cnnedge.quantize.qdq import LayerError, insert_pairs

if TYPE_CHECKING:
    import onnx_ir as ir

TRT_OPSET = 19  # the first whose QuantizeLinear takes FP16 scales


@dataclass(frozen=True)
class QuantizedGraph:
    """An INT8 graph and how it came about.

    Attributes:
        model: The ``onnx_ir.Model`` with Q/DQ pairs.
        plan: What was quantized and what was left in float, with the reasons.
        images: How many images gave the activation ranges.
    """

    model: ir.Model
    plan: Plan
    images: int


def quantize(model: ir.Model, plan: Plan, ranges: Ranges) -> QuantizedGraph:
    """Return the INT8 graph of an FP32 graph.

    A layer that turns out not to be quantizable stays float, and the plan of the result says why.

    Args:
        model: The FP32 ``onnx_ir.Model``, which is left as it is.
        plan: What `make_plan` decided for it.
        ranges: What `choose_ranges` kept of the plan's tensors.

    Raises:
        ModelError: the result breaks its target's contract, or no layer is left.
    """
    while True:
        try:
            copy, broken = _build(model, plan, ranges), []
            broken = contract_violations(copy, plan.target)
            if not broken:
                return QuantizedGraph(copy, plan, ranges.images)
            unfit = _blamed(copy, plan, broken)
        except LayerError as error:
            unfit = {error.layer: error.reason}
        if not unfit:
            raise ModelError(
                f"the int8 graph breaks the contract of {plan.target.name!r}: {'; '.join(broken)}",
                fix="report this network: its structure is one that cnnedge does not quantize yet",
            )
        asked = frozenset(name for name, why in plan.skipped.items() if why == ASKED_FOR)
        plan = make_plan(model, plan.target, keep_float=asked, unfit={**plan.skipped, **unfit})


def _build(model: ir.Model, plan: Plan, ranges: Ranges) -> ir.Model:
    copy = model.clone()
    insert_pairs(copy, plan, ranges)
    settle_names(copy)
    if plan.target.float16:
        copy.graph.opset_imports[""] = max(TRT_OPSET, copy.graph.opset_imports[""])
        copy = to_float16(copy).model
        copy.ir_version = 9  # the ONNX release that brought opset 19
    else:  # operators that were folded away may have been the newest
        copy.graph.opset_imports[""] = lowest_opset(copy)
    return copy


def _blamed(model: ir.Model, plan: Plan, broken: list[str]) -> dict[str, str]:
    """Return the layers that broken rules are about, each with its rule.

    A rule names a layer, or the quantizer of an activation: then it is about whoever reads that.
    """
    blamed: dict[str, str] = {}
    for line in broken:
        name, _, rule = line.partition(": ")
        for node in main_nodes(model):
            if node.name != name:
                continue
            readers = [node] if node.name in plan.compute else _readers(node)
            blamed |= {name_of(r): rule for r in readers if r.name in plan.compute}
    return blamed


def _readers(quantizer: ir.Node) -> list[ir.Node]:
    """Return the nodes that read a quantizer's result, past what moves it."""
    readers: list[ir.Node] = []
    waiting = [quantizer]
    while waiting:
        for value in waiting.pop().outputs:
            for user, _ in value.uses():
                if user not in readers:
                    readers.append(user)
                    if user.op_type not in WEIGHTED:
                        waiting.append(user)
    return readers
