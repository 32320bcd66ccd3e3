"""Dense layers with weights of 8 or 4 bits, block by block; everything else stays as it is.

A dense layer at batch 1 reads each weight once, so its time is its bytes: VGG's hold most of the
network's. The operator is ONNX Runtime's ``com.microsoft::MatMulNBits``: each output's weights are
cut along the inputs into blocks with a float scale each, ``w = (q - 2^(bits-1)) * scale``.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from cnnedge.errors import ModelError
from cnnedge.graph.edit import (
    WEIGHTED,
    constant,
    describe_like,
    erase,
    initializer,
    main_nodes,
    name_of,
    operand,
    optional_operand,
)
from cnnedge.graph.passes import drop_unused_initializers, named_in_errors, settle_names
from cnnedge.quantize.plan import SMALLEST_DENSE

if TYPE_CHECKING:
    import onnx_ir as ir

DOMAIN = "com.microsoft"
# Inputs in a block. Of 4 bits, finer blocks cost 1 bit per weight and no time, and halve the error;
# of 8 bits they cost half as much time again, and the error is below what activations bring.
BLOCK_SIZES = {4: 32, 8: 128}
# Compute in int8, activations quantized block by block as they come. On a 9216×4096 layer and two
# VNNI cores: 0.7 ms for 4 bits and 0.9 ms for 8, where float compute takes 1.9 and 91, Gemm 9.3.
ACCURACY_LEVEL = 4
_LEAST_SHARE = 0.5  # of the weights that must lie in such layers, or the variant is none
_CLIPS = np.linspace(1.0, 0.7, 7)  # shares of a block's range that are tried as its scale
_ROWS = 64  # outputs quantized at once: 25,088 inputs of 64 are 6 MB


@dataclass(frozen=True)
class WeightOnlyGraph:
    """A graph whose dense layers store their weights in few bits.

    Attributes:
        model: The ``onnx_ir.Model``.
        layers: Names of the layers that do.
        skipped: Dense layers that do not, and why.
    """

    model: ir.Model
    layers: tuple[str, ...]
    skipped: dict[str, str]


@named_in_errors
def quantize_dense_weights(model: ir.Model, bits: int) -> WeightOnlyGraph:
    """Return a copy of an FP32 graph with the weights of its dense layers in 8 or 4 bits.

    Args:
        model: The FP32 ``onnx_ir.Model``, which is left as it is.
        bits: 8 or 4.

    Raises:
        ModelError: the dense layers hold less than half of the weights, or the result breaks its
            contract.
    """
    copy = model.clone()
    block = BLOCK_SIZES[bits]
    layers: list[str] = []
    skipped: dict[str, str] = {}
    sizes: dict[str, int] = {}  # of each kernel, however many layers share it
    stored: dict[str, list[ir.Value]] = {}
    for node in main_nodes(copy, *WEIGHTED):
        weight = constant(node.inputs[1])
        if weight is None:
            continue
        name, kernel = name_of(node), name_of(operand(node, 1))
        sizes[kernel] = weight.size
        if node.op_type == "Conv":
            continue
        reason = _unfit(node, weight, block)
        if reason:
            skipped[name] = reason
            continue
        layers.append(name)
        if kernel not in stored:
            stored[kernel] = _store(copy, kernel, _oriented(node, weight), bits, block)
        _replace(copy, node, _oriented(node, weight).shape, stored[kernel], bits, block)
    held, total = sum(sizes[name] for name in stored), sum(sizes.values())
    if held < _LEAST_SHARE * total:
        why = "; ".join(f"{name}: {reason}" for name, reason in skipped.items())
        raise ModelError(
            f"the dense layers that {bits}-bit weights fit hold {held / max(total, 1):.0%} of the "
            f"weights{f' ({why})' if why else ''}",
            fix=f"leave int{bits}-weight out: it would hardly be smaller",
        )
    copy.graph.opset_imports[DOMAIN] = 1
    drop_unused_initializers(copy)
    settle_names(copy)
    broken = weight_only_violations(copy, bits)
    if broken:
        raise ModelError(
            f"the int{bits}-weight graph breaks its contract: {'; '.join(broken)}",
            fix="report this network",
        )
    return WeightOnlyGraph(copy, tuple(layers), skipped)


def quantize_blocks(weight: np.ndarray, bits: int, block: int) -> tuple[np.ndarray, np.ndarray]:
    """Quantize a kernel block by block, each block's scale the one with the least squared error.

    Args:
        weight: float32 ``[outputs, inputs]``; the last block is filled up with zeros.
        bits: 8 or 4.
        block: Inputs in a block.

    Returns:
        Levels uint8 ``[outputs, blocks, block]``, ``2^(bits-1)`` meaning zero, and scales float32
        ``[outputs, blocks]``.
    """
    outputs, inputs = weight.shape
    blocks = -(-inputs // block)
    zero, top = 2 ** (bits - 1), 2 ** (bits - 1) - 1
    levels = np.empty((outputs, blocks, block), np.uint8)
    scales = np.empty((outputs, blocks), np.float32)
    for start in range(0, outputs, _ROWS):
        rows = np.zeros((min(_ROWS, outputs - start), blocks * block), np.float32)
        rows[:, :inputs] = weight[start : start + _ROWS]
        rows = rows.reshape(-1, blocks, block)
        largest = np.abs(rows).max(axis=2)
        best = np.where(largest == 0, 1.0, largest / top).astype(np.float32)
        least = np.full(largest.shape, np.inf, np.float32)
        for clip in _CLIPS if bits == 4 else _CLIPS[:1]:  # 8 bits gain nothing from it
            scale = np.where(largest == 0, 1.0, clip * largest / top).astype(np.float32)
            rounded = np.clip(np.rint(rows / scale[..., None]), -zero, top) * scale[..., None]
            error = np.square(rounded - rows).sum(axis=2)
            best = np.where(error < least, scale, best)
            least = np.minimum(error, least)
        found = np.clip(np.rint(rows / best[..., None]), -zero, top) + zero
        levels[start : start + _ROWS] = found.astype(np.uint8)
        scales[start : start + _ROWS] = best
    return levels, scales


def pack(levels: np.ndarray, bits: int) -> np.ndarray:
    """Pack levels ``[outputs, blocks, block]`` as the operator stores them, uint8.

    Of 4 bits two share a byte, the earlier one in its lower half.
    """
    return levels if bits == 8 else levels[..., 0::2] | levels[..., 1::2] << 4


def unpack(packed: np.ndarray, bits: int) -> np.ndarray:
    """Undo `pack`."""
    if bits == 8:
        return packed
    return np.stack([packed & 15, packed >> 4], axis=-1).reshape(*packed.shape[:-1], -1)


def weight_only_violations(model: ir.Model, bits: int) -> list[str]:
    """Return what in a graph breaks the contract of a weight-only variant, one line each."""
    return list(_violations(model, bits))


def _violations(model: ir.Model, bits: int) -> Iterator[str]:
    block = BLOCK_SIZES[bits]
    if not any(node.op_type == "MatMulNBits" for node in model.graph):
        yield f"no layer has weights of {bits} bits"
    for node in main_nodes(model):
        if node.op_type in {"QuantizeLinear", "DequantizeLinear"}:
            yield f"{node.name}: activations must stay float"
        if node.op_type == "Gemm":
            weight = constant(node.inputs[1])
            if weight is not None and _unfit(node, weight, block) is None:
                yield f"{node.name}: its weights must have {bits} bits"
        if node.op_type != "MatMulNBits":
            continue
        attributes = {k: node.attributes[k].as_int() for k in ("K", "N", "bits", "block_size")}
        if attributes["bits"] != bits or attributes["block_size"] != block:
            yield f"{node.name}: its weights must have {bits} bits, {block} in a block"
            continue
        if node.attributes["accuracy_level"].as_int() != ACCURACY_LEVEL:
            yield f"{node.name}: computing in float is slower than the float layer it replaces"
        blocks = -(-attributes["K"] // block)
        stored = constant(node.inputs[1])
        wanted = (attributes["N"], blocks, block * bits // 8)
        if stored is None or stored.shape != wanted or stored.dtype != np.uint8:
            yield f"{node.name}: its weights must be uint8 {list(wanted)}"
        scales = constant(node.inputs[2])
        if scales is None or scales.size != attributes["N"] * blocks:
            yield f"{node.name}: each block must have one scale"
    if model.graph.opset_imports.get(DOMAIN) != 1:
        yield f"opset: {DOMAIN} must be imported"


def _unfit(node: ir.Node, weight: np.ndarray, block: int) -> str | None:
    """Return why a dense layer's weights stay float, or None."""
    if node.op_type != "Gemm" or weight.ndim != 2:
        return "not a dense layer over [N, features]"
    outputs, inputs = _oriented(node, weight).shape
    if outputs < SMALLEST_DENSE:
        return f"{outputs} outputs, fewer than {SMALLEST_DENSE}"
    return f"{inputs} inputs, fewer than a block of {block}" if inputs < block else None


def _oriented(node: ir.Node, weight: np.ndarray) -> np.ndarray:
    """Return a kernel as ``[outputs, inputs]``."""
    return weight if node.attributes.get_int("transB", 0) else weight.T


def _store(model: ir.Model, name: str, kernel: np.ndarray, bits: int, block: int) -> list[ir.Value]:
    """Register a kernel's blocks and their scales; return the two values."""
    levels, scales = quantize_blocks(kernel, bits, block)
    return [
        initializer(model, f"{name}/quantized", pack(levels, bits)),
        initializer(model, f"{name}/scale", scales.reshape(-1)),
    ]


def _replace(
    model: ir.Model,
    node: ir.Node,
    shape: tuple[int, ...],
    stored: list[ir.Value],
    bits: int,
    block: int,
) -> None:
    """Put MatMulNBits, and an Add for the bias, in the place of a Gemm.

    The operator takes a bias itself only since later releases of ONNX Runtime; the Add costs
    nothing that can be measured.
    """
    import onnx_ir as ir

    inputs = [node.inputs[0], *stored]
    attributes = {
        "K": shape[1],
        "N": shape[0],
        "bits": bits,
        "block_size": block,
        "accuracy_level": ACCURACY_LEVEL,
    }
    product = ir.node("MatMulNBits", inputs, attributes, domain=DOMAIN, name=node.name)
    last = product
    model.graph.insert_before(node, product)
    result = node.outputs[0]
    if (bias := optional_operand(node, 2)) is not None:
        value = product.outputs[0]
        value.name = f"{result.name}/product"
        value.shape, value.type = result.shape, result.type
        last = ir.node("Add", [value, bias], name=f"{node.name}/bias")
        model.graph.insert_before(node, last)
    describe_like(last.outputs[0], result)
    result.replace_all_uses_with(last.outputs[0], replace_graph_outputs=True)
    erase(node)
