"""Calibration: the range that each activation takes over real images.

Only the reductions leave the runtime, never the activations, so memory does not grow with the
number of images.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from cnnedge.errors import DataError, MissingExtraError, ModelError
from cnnedge.graph.write import write_onnx
from cnnedge.progress import Progress, silent


@dataclass(frozen=True)
class Ranges:
    """What calibration saw.

    Attributes:
        limits: ``(lowest, highest)`` of each tensor, in the tensor's own units, by name.
        images: How many images it saw.
    """

    limits: Mapping[str, tuple[float, float]]
    images: int


def collect_ranges(
    model: Any,
    tensors: Iterable[str],
    batches: Iterable[np.ndarray],
    folder: Any,
    *,
    total: int = 0,
    progress: Progress = silent,
) -> Ranges:
    """Run images through an FP32 graph and return the min-max range of each named tensor.

    Args:
        model: The FP32 ``onnx_ir.Model``.
        tensors: Names of the values to watch.
        batches: Images as the graph takes them, uint8 ``[n, H, W, C]``; the last may be ragged.
        folder: A folder for the instrumented graph, which is removed afterwards.
        total: How many images there are, for the progress alone.
        progress: Told how many images have been seen.

    Raises:
        DataError: there are no images.
        ModelError: an activation is NaN or infinite; the message names it.
    """
    try:
        import onnx_ir as ir
        import onnxruntime as ort
    except ImportError as error:
        raise MissingExtraError(
            error.name or "onnxruntime", "cpu", purpose="calibrating"
        ) from error

    names = list(tensors)
    watched = model.clone()
    values = {value.name: value for node in watched.graph for value in node.outputs}
    values |= {value.name: value for value in watched.graph.inputs}
    for name in names:
        value = values[name]
        for op_type in ("ReduceMin", "ReduceMax"):
            node = ir.node(op_type, [value], {"keepdims": 0}, name=f"{name}/{op_type}")
            node.outputs[0].name = node.name
            node.outputs[0].shape = ir.Shape([])
            node.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
            watched.graph.append(node)
            watched.graph.outputs.append(node.outputs[0])
    path = folder / "calibration.onnx"
    write_onnx(watched, path)
    try:
        session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    finally:
        path.unlink()

    wanted = [f"{name}/{op_type}" for name in names for op_type in ("ReduceMin", "ReduceMax")]
    lowest, highest = np.full(len(names), np.inf), np.full(len(names), -np.inf)
    seen = 0
    for batch in batches:
        limits = np.array(session.run(wanted, {session.get_inputs()[0].name: batch}), np.float64)
        if not np.isfinite(limits).all():
            name = names[int(np.argmin(np.isfinite(limits))) // 2]
            raise ModelError(
                f"the activation {name!r} is not finite on the calibration images",
                fix="check the model's weights and its normalization",
            )
        lowest = np.minimum(lowest, limits[0::2])
        highest = np.maximum(highest, limits[1::2])
        seen += len(batch)
        progress("calibrate", seen, total)
    if not seen:
        raise DataError("no images to calibrate on", fix="give --data with a calibration split")
    pairs = zip(lowest.tolist(), highest.tolist(), strict=True)
    return Ranges(dict(zip(names, pairs, strict=True)), seen)
