"""The image's part of a graph: what makes of the uint8 image the numbers that the network takes.

It is found by what it is, from the graph's input on, and never by a name: a user's own layer may
bear any. The export writes it as a cast, the turn to NCHW, the order of the channels, a factor and
a shift, each of them only where it is needed, under the names that stand here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from cnnedge.graph.edit import NHWC_TO_NCHW, attribute_ints, constant, operand, single_consumer

if TYPE_CHECKING:
    import onnx_ir as ir

# Names that the image's nodes are given, for whoever reads a graph: never looked for.
CAST, NCHW, BGR, SCALE, SHIFT = (
    "image/cast",
    "image/nchw",
    "image/bgr",
    "image/scale",
    "image/shift",
)
NCHW_UINT8, DEQUANTIZE = "image/nchw/uint8", "image/dequantize"  # of what takes it quantized
RESIZE = "image/resize"  # before the names of what resizes it
_ORDER = ("Cast", "Transpose", "Gather", "Mul", "Add")


def image_part(model: ir.Model) -> list[ir.Node]:
    """Return the nodes of an ``onnx_ir.Model`` that belong to the image, in order.

    Empty where the graph takes float32 images, which are normalized already. A network's own factor
    or shift of all pixels, where it comes first, is the image's as well: nothing tells them apart.
    """
    import onnx_ir as ir

    images = [value for value in model.graph.inputs if not value.is_initializer()]
    if len(images) != 1 or images[0].dtype != ir.DataType.UINT8:
        return []
    shape = images[0].shape
    last = shape[-1] if shape is not None and len(shape) == 4 else 1
    channels = last if isinstance(last, int) else 1
    found: list[ir.Node] = []
    value = images[0]
    for op_type in _ORDER:
        node = single_consumer(value)
        if node is None or node.op_type != op_type:
            continue
        operands = [constant(other) for other in node.inputs if other is not value]
        elsewhere = op_type == "Transpose" and attribute_ints(node, "perm") != NHWC_TO_NCHW
        if elsewhere or any(array is None or array.size > channels for array in operands):
            break
        found.append(node)
        value = node.outputs[0]
    return found if found and found[0].op_type == "Cast" else []


def scaled_image(model: ir.Model) -> ir.Value | None:
    """Return the value that is the image in NCHW times one factor, or None where there is none.

    It is a quantized tensor as it stands: the uint8 image, with that factor for a scale.
    """
    part = image_part(model)
    if [node.op_type for node in part] != ["Cast", "Transpose", "Mul"]:
        return None
    factor = constant(operand(part[-1], 1))
    return part[-1].outputs[0] if factor is not None and factor.size == 1 else None
