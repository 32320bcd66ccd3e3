"""Cross-layer equalisation: the channels of a tensor brought to ranges that fit one scale.

A channel may be divided by any positive number if whoever reads it multiplies by the same, and
nothing changes but the numbers in between: Relu, pooling and reshaping keep a channel's factor.
Nagel et al., "Data-free quantization through weight equalization and bias correction" (2019),
balance the weights of both layers; here weights have a scale per channel already, so what is
balanced against the reader's weights is the range of the activation itself, as in Xiao et al.,
"SmoothQuant" (2022) with a migration strength of one half.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from cnnedge.graph.edit import (
    WEIGHTED,
    constant,
    initializer,
    main_nodes,
    name_of,
    operand,
    optional_operand,
    rename_initializer,
)
from cnnedge.graph.passes import PassResult, named_in_errors

if TYPE_CHECKING:
    import onnx_ir as ir

# f(a * x) == a * f(x) for a > 0, channel by channel.
_KEEPS_FACTORS = frozenset(
    {"Relu", "MaxPool", "AveragePool", "GlobalAveragePool", "GlobalMaxPool", "Flatten"}
)
_LARGEST_FACTOR = 1e4  # beyond it a channel is as good as dead, and rounding would tell


@dataclass(frozen=True)
class Equalized(PassResult):
    """An equivalent graph whose channels are easier to quantize.

    Attributes:
        factors: By which the channels of each layer were divided, float32 ``[C]``, by its name.
    """

    factors: Mapping[str, np.ndarray]


@named_in_errors
def equalize(model: ir.Model, peaks: Mapping[str, np.ndarray]) -> Equalized:
    """Return an equivalent FP32 graph with balanced channels.

    Args:
        model: The FP32 ``onnx_ir.Model``, which is left as it is.
        peaks: The largest magnitude in each channel of each observed tensor, by name, as
            `calibrate` gives them. A layer whose result was not observed is left alone.
    """
    copy = model.clone()
    factors: dict[str, np.ndarray] = {}
    for node in main_nodes(copy, "Conv", "Gemm"):
        readers = _readers(node)
        if not readers:
            continue
        channels = _outputs(node)
        observed = [peaks[name] for name, _ in readers if name in peaks]
        peak = _per_channel(observed[0], channels) if observed else None
        if channels is None or peak is None:
            continue
        weights = [found for _, r in readers if (found := _input_peaks(r, channels)) is not None]
        if len(weights) < len(readers):
            continue
        largest = np.max(weights, axis=0)
        alive = (peak > 0) & (largest > 0)
        factor = np.ones(channels)
        factor[alive] = np.sqrt(peak[alive] / largest[alive])
        # One factor for all channels changes nothing: keep the tensor's own magnitude.
        factor[alive] /= np.exp(np.log(factor[alive]).mean()) if alive.any() else 1.0
        factor = np.clip(factor, 1 / _LARGEST_FACTOR, _LARGEST_FACTOR).astype(np.float32)
        _divide_outputs(copy, node, factor)
        for _, reader in readers:
            _multiply_inputs(copy, reader, factor)
        factors[name_of(node)] = factor
    return Equalized(copy, bool(factors), factors)


def _readers(node: ir.Node) -> list[tuple[str, ir.Node]]:
    """Return the layers that read a layer's result, each with the name of what it reads.

    None at all where anything reads it that may not be scaled.
    """
    readers, waiting = [], [node.outputs[0]]
    while waiting:
        value = waiting.pop()
        if value.is_graph_output():
            return []
        for user, index in value.uses():
            if index == 0 and _keeps_factors(user):
                waiting.append(user.outputs[0])
            elif user.op_type in {"Conv", "Gemm"} and index == 0:
                readers.append((name_of(value), user))
            else:
                return []
    return readers


def _keeps_factors(node: ir.Node) -> bool:
    """Tell whether channels leave a node as they entered it, each with its factor."""
    if node.op_type != "Reshape":
        return node.op_type in _KEEPS_FACTORS
    before, after = operand(node, 0).shape, node.outputs[0].shape
    if before is None or after is None or len(after) < 2:
        return False
    return len(after) == 2 or before[1] == after[1]  # a flattened tensor is still channel-major


def _outputs(node: ir.Node) -> int | None:
    weight = constant(node.inputs[1])
    if weight is None or node.op_type not in WEIGHTED:
        return None
    return int(weight.shape[0] if node.op_type == "Conv" or _transposed(node) else weight.shape[1])


def _per_channel(peak: np.ndarray, channels: int | None) -> np.ndarray | None:
    """Return the peak of each channel, where a flattened tensor has several values of each."""
    if channels is None or len(peak) % channels:
        return None
    return peak.reshape(channels, -1).max(axis=1).astype(np.float64)


def _input_peaks(reader: ir.Node, channels: int) -> np.ndarray | None:
    """Return the largest magnitude of a layer's weights for each channel that it reads."""
    view = _input_view(reader, channels)
    return None if view is None else np.abs(view).max(axis=(0, 2)).astype(np.float64)


def _input_view(reader: ir.Node, channels: int) -> np.ndarray | None:
    """Return a layer's weights as ``[outputs, channels, places]``."""
    weight = constant(reader.inputs[1])
    if weight is None:
        return None
    if reader.op_type == "Conv":
        if weight.shape[1] == channels:
            return weight.reshape(weight.shape[0], channels, -1)
        depthwise = weight.shape[1] == 1 and weight.shape[0] == channels
        return weight.reshape(1, channels, -1) if depthwise else None
    kernel = weight if _transposed(reader) else weight.T
    if kernel.shape[1] % channels:
        return None
    return kernel.reshape(kernel.shape[0], channels, -1)


def _divide_outputs(model: ir.Model, node: ir.Node, factor: np.ndarray) -> None:
    weight = constant(node.inputs[1])
    assert weight is not None
    rows = node.op_type == "Conv" or _transposed(node)
    shape = [-1] + [1] * (weight.ndim - 1) if rows else [1, -1]
    _replace(model, node, 1, weight / factor.reshape(shape))
    bias = constant(optional_operand(node, 2))
    if bias is not None:
        _replace(model, node, 2, bias / factor)


def _multiply_inputs(model: ir.Model, reader: ir.Node, factor: np.ndarray) -> None:
    weight = constant(reader.inputs[1])
    view = _input_view(reader, len(factor))
    assert weight is not None
    assert view is not None
    scaled = view * factor.reshape(1, -1, 1)
    if reader.op_type == "Conv" or _transposed(reader):
        _replace(model, reader, 1, scaled.reshape(weight.shape))
    else:
        _replace(model, reader, 1, np.ascontiguousarray(scaled.reshape(weight.T.shape).T))


def _replace(model: ir.Model, node: ir.Node, index: int, array: np.ndarray) -> None:
    """Give a node another constant, under the old one's name."""
    old = operand(node, index)
    name = name_of(old)
    new = initializer(model, f"{name}/equalized", array.astype(np.float32))
    node.replace_input_with(index, new)
    if not old.uses():
        del model.graph.initializers[name]
        rename_initializer(new, name)


def _transposed(node: ir.Node) -> bool:
    return node.attributes.get_int("transB", 0) == 1
