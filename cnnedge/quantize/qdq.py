"""Insert QuantizeLinear/DequantizeLinear pairs and int8 weights as a plan says.

Quantization follows the ONNX operators: ``q = clamp(round(x / scale) + zero_point)``,
``x = (q - zero_point) * scale``. Activations are per tensor, weights per output channel.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from cnnedge.errors import ModelError, first_line
from cnnedge.graph.edit import (
    NHWC_TO_NCHW,
    constant,
    erase,
    initializer,
    maker,
    name_of,
    operand,
    optional_operand,
    required_constant,
)
from cnnedge.graph.image_part import DEQUANTIZE, NCHW_UINT8, SCALE, image_part, scaled_image
from cnnedge.graph.passes import drop_unused_initializers, graph_pass
from cnnedge.quantize.calibrate import Ranges
from cnnedge.quantize.plan import Plan, Target

if TYPE_CHECKING:
    import onnx_ir as ir

_SMALLEST_HALF = 2.0**-24  # the smallest positive FP16
_LEAST_STEP = float(np.finfo(np.float32).tiny)  # below it, dividing by a step overflows
_CHANNELS = 64  # output channels whose weights are rounded at once


@dataclass(frozen=True)
class Scale:
    """How real numbers map to integers: ``x = (q - zero_point) * scale``."""

    scale: float
    zero_point: int
    dtype: type[np.uint8 | np.int8]


class LayerError(ModelError):
    """A layer cannot be quantized."""

    def __init__(self, layer: str, reason: str) -> None:
        self.layer, self.reason = layer, reason
        super().__init__(f"{layer}: {reason}")


def activation_scale(low: float, high: float, target: Target) -> Scale:
    """Return the scale that covers ``[low, high]``, zero always included exactly."""
    low, high = min(low, 0.0), max(high, 0.0)
    if target.symmetric:
        span = max(-low, high) or 1.0
        return Scale(_storable(max(span / 127, _LEAST_STEP), target), 0, np.int8)
    span = (high - low) or 1.0
    scale = float(np.float32(max(span / 255, _LEAST_STEP)))
    return Scale(scale, int(np.clip(round(-low / scale), 0, 255)), np.uint8)


def quantize_weight(
    weight: np.ndarray, axis: int, target: Target, smallest: np.ndarray | float = 0.0
) -> tuple[np.ndarray, np.ndarray]:
    """Quantize a kernel symmetrically, one scale per output channel.

    Args:
        weight: float32, any rank.
        axis: The output channel's axis.
        target: Its ``weight_limit`` is the largest magnitude.
        smallest: The least scale allowed, per channel or for all.

    Returns:
        The int8 kernel and its float32 scales ``[channels]``.
    """
    channels = weight.shape[axis]
    by_channel = np.moveaxis(weight, axis, 0)
    largest = np.array([np.abs(by_channel[c]).max(initial=0.0) for c in range(channels)])
    scales = np.maximum(largest / target.weight_limit, smallest)
    scales = np.where(scales == 0, 1.0, scales)
    scales = np.array([_storable(s, target) for s in scales], np.float32)
    levels = np.empty(weight.shape, np.int8)
    into = np.moveaxis(levels, axis, 0)
    for start in range(0, channels, _CHANNELS):  # a whole VGG kernel in float takes 400 MB
        part = slice(start, start + _CHANNELS)
        steps = scales[part].reshape(-1, *[1] * (weight.ndim - 1))
        rounded = np.rint(by_channel[part] / steps)
        into[part] = np.clip(rounded, -target.weight_limit, target.weight_limit)
    return levels, scales


def kernel_axis(node: ir.Node) -> int:
    """Return the axis of the output channels in a layer's kernel, as exported."""
    return 0 if node.op_type == "Conv" else 1


def image_scale(model: ir.Model, plan: Plan, tensor: str) -> Scale | None:
    """Return the scale of a tensor that is the uint8 image itself, or None where it is not."""
    if not plan.target.takes_uint8:
        return None
    exact = _image_as_it_is(model, plan)
    return exact[1] if exact is not None and exact[0].name == tensor else None


@graph_pass
def insert_pairs(model: ir.Model, plan: Plan, ranges: Ranges) -> None:
    """Rewrite a copy's graph in place as the plan says.

    Raises:
        LayerError: a layer cannot be quantized.
    """
    target = plan.target
    nodes = {node.name: node for node in model.graph}
    values = {name_of(v): v for node in model.graph for v in node.outputs}
    values |= {name_of(v): v for v in model.graph.inputs}
    exact = _image_as_it_is(model, plan) if target.takes_uint8 else None
    scales = {}
    for tensor in plan.tensors:
        if exact is not None and tensor == exact[0].name:
            scales[tensor] = exact[1]
        else:
            scales[tensor] = activation_scale(*ranges.limits[plan.scale_source(tensor)], target)
    for name in plan.folded:
        _fold_clamp(nodes[name], values)
    behind = {}
    for tensor in plan.tensors:
        if exact is not None and tensor == exact[0].name:
            behind[tensor] = _dequantize_image(model, exact[0], scales[tensor])
        else:
            behind[tensor] = _insert_pair(model, values[tensor], scales[tensor])
    stored: dict[tuple[str, int, bytes], _Stored] = {}
    for name in plan.compute:
        try:
            _quantize_parameters(model, nodes[name], target, behind, scales, stored)
        except Exception as error:  # whatever a layer's numbers or form lead to
            raise LayerError(name, f"it cannot be quantized ({first_line(error)})") from error
    drop_unused_initializers(model)


def _insert_pair(model: ir.Model, value: ir.Value, scale: Scale) -> ir.Value:
    """Insert Q and DQ behind a value, for everything that used it."""
    import onnx_ir as ir

    uses = list(value.uses())
    step, zero = _scale_inputs(model, name_of(value), scale)
    quantize = ir.node("QuantizeLinear", [value, step, zero], name=f"{value.name}/quantize")
    dequantize = ir.node(
        "DequantizeLinear", [quantize.outputs[0], step, zero], name=f"{value.name}/dequantize"
    )
    integer = ir.TensorType(ir.DataType.from_numpy(np.dtype(scale.dtype)))
    for node, kind in ((quantize, integer), (dequantize, value.type)):
        node.outputs[0].name = node.name
        node.outputs[0].shape, node.outputs[0].type = value.shape, kind
    producer = value.producer()
    if producer is None:
        model.graph.insert_before(next(iter(model.graph)), [quantize, dequantize])
    else:
        model.graph.insert_after(producer, [quantize, dequantize])
    for user, index in uses:
        user.replace_input_with(index, dequantize.outputs[0])
    return dequantize.outputs[0]


def _fold_clamp(clamp: ir.Node, values: dict[str, ir.Value]) -> None:
    """Remove a Relu or Relu6 whose quantized result clamps to the same range by itself."""
    source, result = operand(clamp, 0), clamp.outputs[0]
    result.replace_all_uses_with(source)
    name = name_of(result)
    erase(clamp)
    # The tensor keeps its name, and with it its calibrated range, though another node makes it.
    source.name = name
    values[name] = source


def _image_as_it_is(model: ir.Model, plan: Plan) -> tuple[ir.Value, Scale] | None:
    """Find a first layer fed by a uint8 image times one factor: that IS a quantized tensor.

    Returns:
        The scaled image and its scale, or None.
    """
    scaled = scaled_image(model)
    if scaled is None or scaled.name not in plan.tensors:
        return None
    factor = required_constant(maker(scaled).inputs[1])
    return scaled, Scale(float(factor.reshape(-1)[0]), 0, np.uint8)


def _dequantize_image(model: ir.Model, scaled: ir.Value, scale: Scale) -> ir.Value:
    """Replace cast, transpose and scale by a uint8 transpose and one DequantizeLinear."""
    import onnx_ir as ir

    chain = image_part(model)
    image = chain[0].inputs[0]
    transpose = ir.node("Transpose", [image], {"perm": NHWC_TO_NCHW}, name=NCHW_UINT8)
    step, zero = _scale_inputs(model, SCALE, scale)
    dequantize = ir.node("DequantizeLinear", [transpose.outputs[0], step, zero], name=DEQUANTIZE)
    for node, dtype in ((transpose, ir.DataType.UINT8), (dequantize, ir.DataType.FLOAT)):
        node.outputs[0].name = node.name
        node.outputs[0].shape, node.outputs[0].type = scaled.shape, ir.TensorType(dtype)
    model.graph.insert_before(next(iter(model.graph)), [transpose, dequantize])
    scaled.replace_all_uses_with(dequantize.outputs[0])
    for node in reversed(chain):
        erase(node)
    return dequantize.outputs[0]


@dataclass(frozen=True)
class _Stored:
    """Integers in the graph, with their scales and zero points: what DequantizeLinear takes."""

    inputs: tuple[ir.Value, ir.Value, ir.Value]
    steps: np.ndarray
    axis: int


def _quantize_parameters(
    model: ir.Model,
    node: ir.Node,
    target: Target,
    behind: dict[str, ir.Value],
    scales: dict[str, Scale],
    stored: dict[tuple[str, int, bytes], _Stored],
) -> None:
    """Store a layer's kernel as int8, and its bias as int32 where the target wants it.

    Layers that share a kernel share its integers too, each with a DequantizeLinear of its own: that
    is what runtimes fuse.
    """
    import onnx_ir as ir

    kernel = name_of(operand(node, 1))
    weight = required_constant(node.inputs[1])
    axis = kernel_axis(node)
    if node.op_type == "Gemm" and target.output_channel_first:
        weight, axis = np.ascontiguousarray(weight.T), 0
        node.attributes["transB"] = ir.AttrInt64("transB", 1)
    tensor = next(name for name, value in behind.items() if value is node.inputs[0])
    input_scale = scales[tensor].scale
    bias = constant(optional_operand(node, 2))
    smallest: np.ndarray | float = 0.0
    if bias is not None and target.quantizes_bias:
        # A bias far larger than its weights must still fit 32 bits at scale s_x * s_w.
        smallest = np.abs(bias.astype(np.float64)) / (input_scale * (2.0**31 - 1))
    levels, steps = quantize_weight(weight, axis, target, smallest)
    own = (kernel, axis, steps.tobytes())  # of two scales, two kernels of integers
    if own not in stored:
        zeros = np.zeros(len(steps), np.int8)
        stored[own] = _store(model, kernel, levels, steps, zeros, axis)
    node.replace_input_with(1, _dequantized(model, node, kernel, stored[own]))
    if bias is not None and target.quantizes_bias:
        bias_steps = (steps.astype(np.float64) * input_scale).astype(np.float32)
        bias_steps = np.maximum(bias_steps, np.float32(_LEAST_STEP))
        integers = np.rint(bias / bias_steps.astype(np.float64))
        integers = np.clip(integers, -(2**31) + 1, 2**31 - 1).astype(np.int32)
        name = name_of(operand(node, 2))
        zeros32 = np.zeros(len(steps), np.int32)
        made = _store(model, name, integers, bias_steps, zeros32, 0)
        node.replace_input_with(2, _dequantized(model, node, name, made))


def _store(
    model: ir.Model,
    name: str,
    integers: np.ndarray,
    steps: np.ndarray,
    zeros: np.ndarray,
    axis: int,
) -> _Stored:
    inputs = (
        initializer(model, f"{name}/quantized", integers),
        initializer(model, f"{name}/scale", steps),
        initializer(model, f"{name}/zero_point", zeros),
    )
    return _Stored(inputs, steps, axis)


def _dequantized(model: ir.Model, before: ir.Node, name: str, stored: _Stored) -> ir.Value:
    import onnx_ir as ir

    node = ir.node(
        "DequantizeLinear", list(stored.inputs), {"axis": stored.axis}, name=f"{name}/dequantize"
    )
    node.outputs[0].name = node.name
    node.outputs[0].shape = stored.inputs[0].shape
    node.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
    model.graph.insert_before(before, node)
    return node.outputs[0]


def _scale_inputs(model: ir.Model, tensor: str, scale: Scale) -> tuple[ir.Value, ir.Value]:
    step = initializer(model, f"{tensor}/step", np.array(scale.scale, np.float32))
    zero = initializer(model, f"{tensor}/zero_point", np.array(scale.zero_point, scale.dtype))
    return step, zero


def _storable(scale: float, target: Target) -> float:
    """Round a scale up to what its target can store, so that what it covered stays covered."""
    if not target.float16:
        return float(np.float32(scale))
    half = np.float16(max(scale, _SMALLEST_HALF))
    return float(half if half >= scale else np.nextafter(half, np.float16(np.inf)))
