"""The structural contract of each quantized graph, checked on the graph itself.

A graph that breaks a rule still runs somewhere, slower or in another precision than asked: that is
what these checks are for. Rules and their reasons: ONNX Runtime's and TensorRT's documentation of
explicit quantization.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from cnnedge.graph.edit import (
    WEIGHTED,
    constant,
    made_by,
    main_nodes,
    operand,
    optional_operand,
    required_constant,
    single_consumer,
)
from cnnedge.graph.image_part import scaled_image
from cnnedge.graph.opset import lowest_opset
from cnnedge.quantize.plan import Target

if TYPE_CHECKING:
    import onnx_ir as ir


def contract_violations(model: ir.Model, target: Target) -> list[str]:
    """Return what in a quantized graph breaks its target's contract, one line each."""
    found = [*_common(model), *(_trt(model) if target.symmetric else _cpu(model, target))]
    return sorted(set(found))


def _common(model: ir.Model) -> Iterator[str]:
    for node in main_nodes(model, "QuantizeLinear"):
        if made_by(node.inputs[0], "Softmax") is not None:
            yield f"{node.name}: a softmax must stay float"
        if required_constant(node.inputs[1]).size != 1:
            yield f"{node.name}: activations are quantized per tensor"
    for value in model.graph.outputs:
        if _dequantize(value) is not None:
            yield f"{value.name}: an output must not be quantized"
    for node in main_nodes(model, *WEIGHTED):
        weight = _dequantize(node.inputs[1])
        if weight is None:
            continue
        levels, steps, zeros = (required_constant(v) for v in weight.inputs)
        if levels.dtype != np.int8 or np.any(zeros):
            yield f"{node.name}: weights must be int8 with zero point 0"
        if steps.size < 2:
            yield f"{node.name}: weights must have one scale per output channel"
        if _dequantize(node.inputs[0]) is None:
            yield f"{node.name}: int8 weights with float activations compute in float"


def _cpu(model: ir.Model, target: Target) -> Iterator[str]:
    if model.graph.opset_imports[""] > lowest_opset(model):
        yield f"opset: {lowest_opset(model)} describes this graph, and older runtimes load that"
    image = scaled_image(model) if target.takes_uint8 else None
    if image is not None:
        for node in main_nodes(model, "QuantizeLinear"):
            if node.inputs[0] is image:
                yield f"{node.name}: the uint8 image must be taken as it is, not quantized anew"
    for node in main_nodes(model, "QuantizeLinear"):
        zero = constant(node.inputs[2])
        if zero is None or zero.dtype != np.uint8:
            yield f"{node.name}: activations must be uint8"
        clamp = made_by(node.inputs[0], "Relu", "Clip")
        if clamp is not None:
            source = made_by(clamp.inputs[0], *WEIGHTED)
            if source is not None and _dequantize(source.inputs[1]) is not None:
                yield f"{clamp.name}: must be folded into the result's clamp"
    for node in main_nodes(model, *WEIGHTED):
        weight = _dequantize(node.inputs[1])
        if weight is None:
            continue
        levels = required_constant(weight.inputs[0])
        if max(-int(levels.min()), int(levels.max())) > target.weight_limit:
            yield f"{node.name}: weights beyond ±{target.weight_limit} may saturate on this CPU"
        bias = _dequantize(node.inputs[2]) if len(node.inputs) > 2 else weight
        if bias is None or (
            bias is not weight and required_constant(bias.inputs[0]).dtype != np.int32
        ):
            yield f"{node.name}: its bias must be int32"
        if node.op_type == "Conv":
            user = single_consumer(node.outputs[0])
            if user is None or user.op_type != "QuantizeLinear":
                yield f"{node.name}: an integer convolution needs its result quantized"


def _trt(model: ir.Model) -> Iterator[str]:
    if model.graph.opset_imports[""] < 19:
        yield "opset: FP16 scales need opset 19"
    for node in main_nodes(model, "QuantizeLinear", "DequantizeLinear"):
        zero = constant(optional_operand(node, 2))
        if zero is not None and (zero.dtype != np.int8 or np.any(zero)):
            yield f"{node.name}: must be int8 with zero point 0"
        if required_constant(node.inputs[1]).dtype != np.float16:
            yield f"{node.name}: its scale must be FP16, as what stays float is"
    for node in main_nodes(model, "QuantizeLinear"):
        value = operand(node, 0)
        others = [user for user, _ in value.uses() if user is not node]
        if made_by(value, "Conv") is not None:
            behind = [u for u in _users_behind(node) if u.op_type == "Relu"]
            if behind or any(user.op_type == "Relu" for user in others):
                yield f"{node.name}: breaks the fusion of a convolution and its Relu"
    for node in main_nodes(model, *WEIGHTED):
        weight = _dequantize(node.inputs[1])
        if weight is None:
            if getattr(constant(node.inputs[1]), "dtype", None) == np.float32:
                yield f"{node.name}: what stays float must be FP16"
            continue
        if weight.attributes.get_int("axis", 1) != 0:
            yield f"{node.name}: weight scales must run along axis 0"
        if _dequantize(optional_operand(node, 2)) is not None:
            yield f"{node.name}: its bias must not be quantized"


def _users_behind(quantize: ir.Node) -> Iterator[ir.Node]:
    for dequantize, _ in quantize.outputs[0].uses():
        for user, _ in dequantize.outputs[0].uses():
            yield user


def _dequantize(value: ir.Value | None) -> ir.Node | None:
    return made_by(value, "DequantizeLinear")
