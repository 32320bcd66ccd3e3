"""The structural contract of each quantized graph, checked on the graph itself.

A graph that breaks a rule still runs somewhere, slower or in another precision than asked: that is
what these checks are for. Rules and their reasons: ONNX Runtime's and TensorRT's documentation of
explicit quantization.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from cnnedge.graph.edit import constant, main_nodes, required_constant, single_consumer
from cnnedge.graph.image_part import scaled_image
from cnnedge.graph.opset import lowest_opset
from cnnedge.quantize.plan import WEIGHTED, Target


def contract_violations(model: Any, target: Target) -> list[str]:
    """Return what in a quantized graph breaks its target's contract, one line each."""
    found = [*_common(model), *(_trt(model) if target.symmetric else _cpu(model, target))]
    return sorted(set(found))


def _common(model: Any) -> Iterator[str]:
    for node in main_nodes(model, "QuantizeLinear"):
        producer = node.inputs[0].producer()
        if producer is not None and producer.op_type == "Softmax":
            yield f"{node.name}: a softmax must stay float"
        if required_constant(node.inputs[1]).size != 1:
            yield f"{node.name}: activations are quantized per tensor"
    for value in model.graph.outputs:
        if value.producer().op_type == "DequantizeLinear":
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


def _cpu(model: Any, target: Target) -> Iterator[str]:
    if model.graph.opset_imports[""] > lowest_opset(model):
        yield f"opset: {lowest_opset(model)} describes this graph, and older runtimes load that"
    image = scaled_image(model) if target.takes_uint8 else None
    if image is not None:
        for node in main_nodes(model, "QuantizeLinear"):
            if node.inputs[0] is image:
                yield f"{node.name}: the uint8 image must be taken as it is, not quantized anew"
    for node in main_nodes(model, "QuantizeLinear"):
        zero = constant(node.inputs[2])
        producer = node.inputs[0].producer()
        if zero is None or zero.dtype != np.uint8:
            yield f"{node.name}: activations must be uint8"
        if producer is not None and producer.op_type in {"Relu", "Clip"}:
            source = producer.inputs[0].producer()
            if source is not None and source.op_type in WEIGHTED and _is_quantized(source):
                yield f"{producer.name}: must be folded into the result's clamp"
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


def _trt(model: Any) -> Iterator[str]:
    if model.graph.opset_imports[""] < 19:
        yield "opset: FP16 scales need opset 19"
    for node in main_nodes(model, "QuantizeLinear", "DequantizeLinear"):
        zero = constant(node.inputs[2]) if len(node.inputs) > 2 else None
        if zero is not None and (zero.dtype != np.int8 or np.any(zero)):
            yield f"{node.name}: must be int8 with zero point 0"
        if required_constant(node.inputs[1]).dtype != np.float16:
            yield f"{node.name}: its scale must be FP16, as what stays float is"
    for node in main_nodes(model, "QuantizeLinear"):
        producer = node.inputs[0].producer()
        others = [user for user, _ in node.inputs[0].uses() if user is not node]
        if producer is not None and producer.op_type == "Conv":
            behind = [u for u in _users_behind(node) if u.op_type == "Relu"]
            if behind or any(user.op_type == "Relu" for user in others):
                yield f"{node.name}: breaks the fusion of a convolution and its Relu"
    for node in main_nodes(model, *WEIGHTED):
        weight = _dequantize(node.inputs[1])
        if weight is None:
            if getattr(constant(node.inputs[1]), "dtype", None) == np.float32:
                yield f"{node.name}: what stays float must be FP16"
            continue
        axis = weight.attributes["axis"].as_int() if "axis" in weight.attributes else 1
        if axis != 0:
            yield f"{node.name}: weight scales must run along axis 0"
        if len(node.inputs) > 2 and _dequantize(node.inputs[2]) is not None:
            yield f"{node.name}: its bias must not be quantized"


def _users_behind(quantize: Any) -> Iterator[Any]:
    for dequantize, _ in quantize.outputs[0].uses():
        for user, _ in dequantize.outputs[0].uses():
            yield user


def _dequantize(value: Any) -> Any | None:
    producer = None if value is None else value.producer()
    return producer if producer is not None and producer.op_type == "DequantizeLinear" else None


def _is_quantized(node: Any) -> bool:
    return _dequantize(node.inputs[1]) is not None
