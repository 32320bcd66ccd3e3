"""What quantization does to each layer by itself, on real images.

Each quantized layer is computed twice from the same float input: as it is, and with input and
weights rounded as they will be. So a layer's figures are its own, whatever happens before it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from cnnedge.graph.edit import (
    constant,
    initializer,
    main_nodes,
    name_of,
    operand,
    optional_operand,
    required_constant,
)
from cnnedge.graph.passes import PassResult, named_in_errors
from cnnedge.quantize.calibrate import Ranges, but_channels, open_scratch
from cnnedge.quantize.plan import Plan
from cnnedge.quantize.qdq import activation_scale, image_scale, kernel_axis, quantize_weight

if TYPE_CHECKING:
    import onnx_ir as ir


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
    model: ir.Model, plan: Plan, ranges: Ranges, batches: Iterable[np.ndarray], folder: Path
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
    sums = [np.zeros(())] * len(wanted)
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


@named_in_errors
def correct_bias(model: ir.Model, noise: Mapping[str, LayerNoise]) -> PassResult:
    """Return a copy of an FP32 graph whose biases undo the shift that quantization will bring.

    Nagel et al. (2019), section 4.2, with the shift measured on images instead of estimated.
    """
    copy, modified = model.clone(), False
    for node in main_nodes(copy):
        value, shifted = optional_operand(node, 2), noise.get(name_of(node))
        bias = constant(value)
        if shifted is None or value is None or bias is None:
            continue
        corrected = (bias + shifted.shift).astype(np.float32)
        node.replace_input_with(2, initializer(copy, f"{value.name}/corrected", corrected))
        modified = True
    return PassResult(copy, modified)


def _watched(model: ir.Model, plan: Plan, ranges: Ranges) -> tuple[ir.Model, list[str]]:
    """Return a copy of a graph with each layer's noise as outputs, and their names.

    Three for each layer, in this order: shift, energy lost, energy of the signal.
    """
    import onnx_ir as ir

    watched = model.clone()
    wanted: list[str] = []

    def append(
        op_type: str, inputs: list[ir.Value], name: str, **attributes: int | list[int]
    ) -> ir.Value:
        node = ir.node(op_type, inputs, attributes, name=name)
        node.outputs[0].name = name
        watched.graph.append(node)
        return node.outputs[0]

    def observe(
        op_type: str, inputs: list[ir.Value], name: str, **attributes: int | list[int]
    ) -> None:
        result = append(op_type, inputs, name, **attributes)
        result.type = ir.TensorType(ir.DataType.FLOAT)
        watched.graph.outputs.append(result)
        wanted.append(name)

    for node in list(main_nodes(watched)):
        if node.name not in plan.compute:
            continue
        image = operand(node, 0)
        tensor = name_of(image)
        scale = image_scale(watched, plan, tensor) or activation_scale(
            *ranges.limits[plan.scale_source(tensor)], plan.target
        )
        weight = required_constant(node.inputs[1])
        axis = kernel_axis(node)
        levels, steps = quantize_weight(weight, axis, plan.target)
        shape = [-1 if i == axis else 1 for i in range(weight.ndim)]
        name = f"{node.name}//noise"
        rounded = initializer(watched, f"{name}/weight", levels * steps.reshape(shape))
        step = initializer(watched, f"{name}/step", np.array(scale.scale, np.float32))
        zero = initializer(watched, f"{name}/zero", np.array(scale.zero_point, scale.dtype))
        integers = append("QuantizeLinear", [image, step, zero], f"{name}/q")
        rounded_image = append("DequantizeLinear", [integers, step, zero], f"{name}/dq")
        copy = ir.node(
            node.op_type,
            [rounded_image, rounded, *list(node.inputs)[2:]],
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
