"""Layers split in cheaper ones of lower rank: dense ones in two, convolutions in three.

What is between them are channels like any other's, so that pruning may take more of them later.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING

import numpy as np

from cnnedge.compress.rewrite import rebuild

if TYPE_CHECKING:
    import keras

    from cnnedge.backends.keras_graph import Call

Faster = Callable[[int, int, Sequence[int], Sequence[int], Sequence[int]], bool]
"""Of a convolution: height, width, kernel shape, strides, and the two ranks in the middle."""


@dataclass(frozen=True)
class Split:
    """A layer that was split.

    Attributes:
        name: Its name, which its last part keeps; those before are ``name_in`` and, of a
            convolution, ``name_core``.
        ranks: The channels between its parts.
        weights: Its parameters before and after.
    """

    name: str
    ranks: tuple[int, ...]
    weights: tuple[int, int]

    def __str__(self) -> str:
        ranks = " and ".join(map(str, self.ranks))
        return (
            f"{self.name} split at rank {ranks}: {self.weights[0]:,} weights → {self.weights[1]:,}"
        )


def split_dense(
    model: keras.Model, shape: tuple[int, int, int], *, energy: float, multiple: int
) -> tuple[keras.Model, list[Split]]:
    """Split the dense layers whose kernel has so low a rank that two have fewer weights.

    The kernel's singular value decomposition, cut off where the squared singular values kept reach
    ``energy`` of all (Denil et al., "Predicting Parameters in Deep Learning", 2013; Xue et al.,
    "Restructuring of Deep Neural Network Acoustic Models with Singular Value Decomposition", 2013).

    Args:
        model: A classifier.
        shape: ``(height, width, channels)`` of its image.
        energy: The share to keep, 0…1.
        multiple: What a rank is rounded up to.
    """

    def plan(call: Call) -> tuple[np.ndarray, ...] | None:
        if call.kind != "Dense" or len(call.inputs[0].shape) != 2:
            return None
        kernel = np.array(call.operation.kernel, np.float64)
        left, values, right = np.linalg.svd(kernel, full_matrices=False)
        rank = _rank(values, energy, multiple)
        if rank * sum(kernel.shape) >= prod(kernel.shape):
            return None
        root = np.sqrt(values[:rank])  # shared between the two, so that both stay in range
        return left[:, :rank] * root, root[:, None] * right[:rank]

    def build(
        layer: keras.Layer, name: str, kernels: tuple[np.ndarray, ...], taken: keras.KerasTensor
    ) -> keras.KerasTensor:
        import keras

        first = keras.layers.Dense(kernels[0].shape[1], use_bias=False, name=f"{name}_in")
        second = type(layer).from_config(layer.get_config() | {"name": name})
        made = second(first(taken))
        first.kernel.assign(kernels[0])
        second.kernel.assign(kernels[1])
        if layer.use_bias:
            second.bias.assign(layer.bias)
        return made

    return _split(model, shape, plan, build)


def split_convolutions(
    model: keras.Model, shape: tuple[int, int, int], *, energy: float, multiple: int, faster: Faster
) -> tuple[keras.Model, list[Split]]:
    """Split convolutions in 1x1, kxk and 1x1 where that is faster.

    Tucker-2: the kernel's unfoldings along the channels it reads and makes, each cut off where the
    squared singular values kept reach ``energy`` of all, by the higher-order singular value
    decomposition (Kim et al., "Compression of Deep Convolutional Neural Networks for Fast and Low
    Power Mobile Applications", 2016, section 3).

    Args:
        model: A classifier.
        shape: ``(height, width, channels)`` of its image.
        energy: The share to keep of each unfolding, 0…1.
        multiple: What the ranks are rounded up to.
        faster: Whether a split is worth it; asked of those that have fewer multiply-accumulates.
    """

    def plan(call: Call) -> tuple[np.ndarray, ...] | None:
        layer = call.operation
        if call.kind != "Conv2D" or layer.groups != 1 or prod(layer.kernel_size) == 1:
            return None
        if layer.data_format == "channels_first" or set(layer.dilation_rate) != {1}:
            return None
        kernel = np.array(layer.kernel, np.float64)
        reads, makes = kernel.shape[2:]
        along = [_unfolding(kernel, axis) for axis in (2, 3)]
        ranks = [_rank(values, energy, multiple) for _, values in along]
        height, width = (int(size) for size in call.inputs[0].shape[1:3])
        steps = prod(layer.strides)
        before = prod(kernel.shape) / steps
        after = reads * ranks[0] + (prod(kernel.shape[:2]) * prod(ranks) + ranks[1] * makes) / steps
        if ranks[0] >= reads or ranks[1] >= makes or after >= before:
            return None
        if not faster(height, width, kernel.shape, layer.strides, ranks):
            return None
        first, last = (vectors[:, :rank] for (vectors, _), rank in zip(along, ranks, strict=True))
        core = np.einsum("hwio,ir,os->hwrs", kernel, first, last)
        return first[None, None], core, last.T[None, None]

    def build(
        layer: keras.Layer, name: str, kernels: tuple[np.ndarray, ...], taken: keras.KerasTensor
    ) -> keras.KerasTensor:
        import keras

        first = keras.layers.Conv2D(kernels[0].shape[3], 1, use_bias=False, name=f"{name}_in")
        middle = keras.layers.Conv2D(
            kernels[1].shape[3],
            layer.kernel_size,
            layer.strides,
            padding=layer.padding,
            use_bias=False,
            name=f"{name}_core",
        )
        third = keras.layers.Conv2D(
            kernels[2].shape[3],
            1,
            activation=layer.activation,
            use_bias=layer.use_bias,
            name=name,
        )
        made = third(middle(first(taken)))
        for part, kernel in zip((first, middle, third), kernels, strict=True):
            part.kernel.assign(kernel)
        if layer.use_bias:
            third.bias.assign(layer.bias)
        return made

    return _split(model, shape, plan, build)


def _split(
    model: keras.Model,
    shape: tuple[int, int, int],
    plan: Callable[[Call], tuple[np.ndarray, ...] | None],
    build: Callable[
        [keras.Layer, str, tuple[np.ndarray, ...], keras.KerasTensor], keras.KerasTensor
    ],
) -> tuple[keras.Model, list[Split]]:
    """Return the network with every layer split that the plan has kernels for.

    A layer that is used twice stays: its parts would have to be shared too.
    """
    from cnnedge.backends.keras_graph import trace_calls

    graph = trace_calls(model, [shape])
    uses: dict[int, int] = {}
    for call in graph.calls:
        uses[id(call.operation)] = uses.get(id(call.operation), 0) + 1
    found = {
        id(call.operation): kernels
        for call in graph.calls
        if uses[id(call.operation)] == 1 and (kernels := plan(call)) is not None
    }
    if not found:
        return model, []
    splits: list[Split] = []

    def substitute(layer: keras.Layer, name: str, taken: keras.KerasTensor) -> keras.KerasTensor:
        kernels = found.get(id(layer))
        if kernels is None:
            return None
        before, after = prod(layer.kernel.shape), sum(kernel.size for kernel in kernels)
        ranks = tuple(int(kernel.shape[-1]) for kernel in kernels[:-1])
        splits.append(Split(name, ranks, (int(before), int(after))))
        return build(layer, name, kernels, taken)

    return rebuild(model, graph, substitute=substitute), splits


def _unfolding(kernel: np.ndarray, axis: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the left singular vectors and the singular values along an axis."""
    flat = np.moveaxis(kernel, axis, 0).reshape(kernel.shape[axis], -1)
    vectors, values, _ = np.linalg.svd(flat, full_matrices=False)
    return vectors, values


def _rank(values: np.ndarray, energy: float, multiple: int) -> int:
    """Return the smallest rank that keeps the energy, rounded up to the multiple."""
    shares = np.cumsum(np.square(values)) / max(float(np.sum(np.square(values))), 1e-30)
    rank = int(np.searchsorted(shares, energy - 1e-12) + 1)
    return min(-(-rank // multiple) * multiple, len(values))
