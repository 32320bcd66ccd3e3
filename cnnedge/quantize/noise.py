"""What quantization does to each layer by itself, on real images.

Each quantized layer is computed twice from the same float input: as it is, and with input and
weights rounded as they will be. So a layer's figures are its own, whatever happens before it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cnnedge.graph.edit import constant, initializer, main_nodes
from cnnedge.quantize.calibrate import Ranges, but_channels, open_scratch
from cnnedge.quantize.plan import Plan
from cnnedge.quantize.qdq import activation_scale, image_scale, kernel_axis, quantize_weight


@dataclass(frozen=True)
class LayerNoise:
    """What quantizing one layer does to that layer's result.

    Attributes:
        sqnr_db: Signal to quantization noise, ``10 log10(E[y²] / E[(y - ŷ)²])``, decibels.
        shift: How far each channel's mean moves, ``E[y - ŷ]``, float64 ``[C]``.
    """

    sqnr_db: float
    shift: np.ndarray


def layer_noise(
    model: Any, plan: Plan, ranges: Ranges, batches: Iterable[np.ndarray], folder: Path
) -> dict[str, LayerNoise]:
    """Return the noise of each layer that the plan quantizes, by its name, in graph order.

    Args:
        model: The FP32 ``onnx_ir.Model``.
        plan: What is quantized.
        ranges: Of the plan's tensors.
        batches: Images as the graph takes them.
        folder: Where the instrumented graph is kept for a moment.
    """
    watched, wanted = _watched(model, plan, ranges)
    session = open_scratch(watched, folder)
    del watched  # it holds every weight twice
    sums: list[Any] = [0.0] * len(wanted)
    seen = 0
    for batch in batches:
        found = session.run(wanted, {session.get_inputs()[0].name: batch})
        for i, (name, value) in enumerate(zip(wanted, found, strict=True)):
            weighted = len(batch) if name.endswith("/shift") else 1
            sums[i] = sums[i] + weighted * np.asarray(value, np.float64)
        seen += len(batch)
    layers = [name for name in wanted if name.endswith("/shift")]
    noise = {}
    for i, name in enumerate(layers):
        shift, lost, signal = sums[3 * i : 3 * i + 3]
        ratio = float(signal) / max(float(lost), 1e-30)
        noise[name.removesuffix("//noise/shift")] = LayerNoise(
            10 * float(np.log10(max(ratio, 1e-30))), shift / seen
        )
    return noise


def correct_bias(model: Any, noise: Mapping[str, LayerNoise]) -> Any:
    """Return a copy of an FP32 graph whose biases undo the shift that quantization will bring.

    Nagel et al. (2019), section 4.2, with the shift measured on images instead of estimated.
    """
    copy = model.clone()
    for node in main_nodes(copy):
        if node.name not in noise or len(node.inputs) < 3:
            continue
        bias = constant(node.inputs[2])
        if bias is None:
            continue
        corrected = (bias + noise[node.name].shift).astype(np.float32)
        name = f"{node.inputs[2].name}/corrected"
        node.replace_input_with(2, initializer(copy, name, corrected))
    return copy


def _watched(model: Any, plan: Plan, ranges: Ranges) -> tuple[Any, list[str]]:
    """Return a copy of a graph with each layer's noise as outputs, and their names.

    Three for each layer, in this order: shift, energy lost, energy of the signal.
    """
    import onnx_ir as ir

    watched = model.clone()
    wanted: list[str] = []

    def append(op_type: str, inputs: list[Any], name: str, **attributes: Any) -> Any:
        node = ir.node(op_type, inputs, attributes, name=name)
        node.outputs[0].name = name
        watched.graph.append(node)
        return node.outputs[0]

    def observe(op_type: str, inputs: list[Any], name: str, **attributes: Any) -> None:
        result = append(op_type, inputs, name, **attributes)
        result.type = ir.TensorType(ir.DataType.FLOAT)
        watched.graph.outputs.append(result)
        wanted.append(name)

    for node in list(main_nodes(watched)):
        if node.name not in plan.compute:
            continue
        tensor = node.inputs[0].name
        scale = image_scale(watched, plan, tensor) or activation_scale(
            *ranges.limits[plan.scale_source(tensor)], plan.target
        )
        weight = constant(node.inputs[1])
        assert weight is not None
        axis = kernel_axis(node)
        levels, steps = quantize_weight(weight, axis, plan.target)
        shape = [-1 if i == axis else 1 for i in range(weight.ndim)]
        name = f"{node.name}//noise"
        rounded = initializer(watched, f"{name}/weight", levels * steps.reshape(shape))
        step = initializer(watched, f"{name}/step", np.array(scale.scale, np.float32))
        zero = initializer(watched, f"{name}/zero", np.array(scale.zero_point, scale.dtype))
        integers = append("QuantizeLinear", [node.inputs[0], step, zero], f"{name}/q")
        image = append("DequantizeLinear", [integers, step, zero], f"{name}/dq")
        copy = ir.node(
            node.op_type,
            [image, rounded, *list(node.inputs)[2:]],
            dict(node.attributes),
            name=f"{name}/y",
        )
        copy.outputs[0].name = copy.name
        watched.graph.append(copy)
        error = append("Sub", [node.outputs[0], copy.outputs[0]], f"{name}/error")
        error.shape, error.type = node.outputs[0].shape, ir.TensorType(ir.DataType.FLOAT)
        inputs, attributes = but_channels(watched, error)
        observe("ReduceMean", inputs, f"{name}/shift", **attributes)
        observe("ReduceSumSquare", [error], f"{name}/lost", keepdims=0)
        observe("ReduceSumSquare", [node.outputs[0]], f"{name}/signal", keepdims=0)
    return watched, wanted
