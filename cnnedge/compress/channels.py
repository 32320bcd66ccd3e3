"""Which channels of a network stand or fall together, read from its graph.

Every channel that a convolution or a dense layer makes is followed to wherever it is read: through
poolings, batch norm and depthwise convolutions, into every position of a flattened vector, across
residual adds (where channels of several layers become one) and concatenations (where they stay
apart). What is left is a set of units, each of which can be removed from the whole network without
a trace, as in Fang et al., "DepGraph: Towards Any Structural Pruning" (2023).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import prod
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import keras

    from cnnedge.backends.keras_graph import Call, KerasGraph

Labels = np.ndarray
"""The unit of each place along an axis, int64; -1 where it has to stay."""

PINNED = -1

# Whatever else they do, they do it to each channel by itself, with no weights of its own.
_CHANNEL_BY_CHANNEL = frozenset(
    {
        *("Activation", "ReLU", "LeakyReLU", "ELU", "Identity", "ActivityRegularization"),
        *("Dropout", "SpatialDropout2D", "AlphaDropout", "GaussianDropout", "GaussianNoise"),
        *("MaxPooling2D", "AveragePooling2D", "GlobalAveragePooling2D", "GlobalMaxPooling2D"),
        *("ZeroPadding2D", "Cropping2D", "UpSampling2D", "Resizing", "SortPool2D"),
        # of keras.ops
        *("Relu", "Relu6", "LeakyRelu", "Elu", "Selu", "Gelu", "Silu", "Sigmoid", "HardSigmoid"),
        *("HardSilu", "HardTanh", "Tanh", "Softplus", "Absolute", "Square", "Sqrt", "Negative"),
        *("Clip", "Cast"),
    }
)
_ELEMENT_BY_ELEMENT = frozenset(
    {
        *("Add", "Subtract", "Multiply", "Divide", "TrueDivide"),
        *("Maximum", "Minimum", "Average"),
    }
)
_REDUCTIONS = frozenset({"Mean", "Max", "Sum"})
_MIXING = frozenset({"softmax", "log_softmax", "glu", "sparsemax"})  # as activations of a layer
_PRODUCERS = {
    "Conv2D": "filters",
    "SeparableConv2D": "filters",
    "Conv2DTranspose": "filters",
    "Dense": "units",
}


@dataclass(frozen=True)
class Group:
    """Units that the same layers make: what is rounded to a multiple together.

    Attributes:
        name: The layers, joined by "+".
        units: Their numbers, ascending.
    """

    name: str
    units: np.ndarray

    def __len__(self) -> int:
        return len(self.units)


@dataclass
class LayerChannels:
    """What removing channels does to one layer.

    Attributes:
        name: The layer's name, after those of the models it is nested in.
        layer: The layer or operation itself.
        axes: For each of its weights, the labels along each axis; None: an axis without channels.
        width: The labels of its output's channels, where it makes them.
        resize: What of its configuration says how many: "filters", "units" or "target_shape".
        taken: The labels of what it reads, where these are known.
        work: For each of its weights that are kernels, how often it is applied; by weight index.
    """

    name: str
    layer: keras.Layer
    axes: list[tuple[Labels | None, ...]] = field(default_factory=list)
    width: Labels | None = None
    resize: str | None = None
    taken: Labels | None = None
    work: dict[int, int] = field(default_factory=dict)


@dataclass(frozen=True)
class ChannelMap:
    """A network's graph and the units of its channels.

    Attributes:
        graph: Its calls.
        layers: What removing does to each layer, by the ``id`` of the layer.
        groups: Every unit belongs to one.
        units: How many there are.
        notes: What had to stay as it is, and why.
    """

    graph: KerasGraph
    layers: dict[int, LayerChannels]
    groups: tuple[Group, ...]
    units: int
    notes: tuple[str, ...]


def map_channels(model: keras.Model, shape: tuple[int, int, int]) -> ChannelMap:
    """Follow the channels of a classifier.

    Args:
        model: A built ``keras.Model`` with one image input.
        shape: ``(height, width, channels)`` of the image.

    Raises:
        ModelError: it cannot be traced on that size.
    """
    from cnnedge.backends.keras_graph import trace_calls

    graph = trace_calls(model, [shape])
    walk = _Walk()
    values = {id(graph.inputs[0]): walk.pinned(shape[-1])}
    for call in graph.calls:
        taken = [values[id(tensor)] for tensor in call.inputs]
        made = walk.follow(call, taken)
        values.update(zip(map(id, call.outputs), made, strict=True))
    for tensor in graph.outputs:
        walk.pin(values[id(tensor)])
    return walk.finish(graph)


class _Walk:
    """Hands out a number to each channel, and unites those that turn out to be one."""

    def __init__(self) -> None:
        self.parents: list[int] = [0]  # number 0: whatever has to stay
        self.makers: list[str] = [""]
        self.layers: dict[int, LayerChannels] = {}
        self.notes: list[str] = []

    def fresh(self, count: int, maker: str) -> Labels:
        """Return new numbers for the channels that a layer makes."""
        start = len(self.parents)
        self.parents += range(start, start + count)
        self.makers += [maker] * count
        return np.arange(start, start + count)

    def pinned(self, count: int) -> Labels:
        """Return the labels of channels that have to stay."""
        return np.zeros(count, np.int64)

    def pin(self, labels: Labels) -> None:
        """Make channels stay."""
        self.unite(labels, self.pinned(len(labels)))

    def root(self, number: int) -> int:
        """Return the number that stands for all that ``number`` was united with."""
        while self.parents[number] != number:
            self.parents[number] = number = self.parents[self.parents[number]]
        return number

    def unite(self, ours: Labels, theirs: Labels) -> None:
        """Make two axes' channels the same, one by one."""
        for one, other in zip(ours.tolist(), theirs.tolist(), strict=True):
            low, high = sorted((self.root(one), self.root(other)))
            self.parents[high] = low  # the lower: 0 wins

    def follow(self, call: Call, taken: list[Labels]) -> list[Labels]:
        """Return the labels of what a call makes."""
        kind = call.kind
        first_call = id(call.operation) not in self.layers
        channels_first = getattr(call.operation, "data_format", None) == "channels_first"
        if len(call.outputs) == 1 and taken and not channels_first:
            if kind in _PRODUCERS and getattr(call.operation, "groups", 1) == 1:
                return [self._produce(call, taken[0])]
            if kind == "DepthwiseConv2D":
                return [self._depthwise(call, taken[0])]
            if kind in ("BatchNormalization", "PReLU"):
                return [self._along(call, taken[0])]
            made = self._weightless(call, taken)
            if made is not None:
                self._register(call, LayerChannels(call.name, call.operation, taken=taken[0]))
                return [made]
            if kind in ("Reshape", "Flatten"):
                made = self._reshape(call, taken[0])
                if made is not None:
                    return [made]
        for labels in taken:
            self.pin(labels)
        # Dimensions other than of images and vectors are no channels of anyone's.
        if first_call and kind != "Softmax":  # at the end, and the classes stay anyway
            layout = ", channels first" if channels_first else ""
            self.notes.append(f"{call.name} ({kind}{layout}): the channels it reads and makes stay")
        self._register(call, LayerChannels(call.name, call.operation))
        return [self.pinned(_last(tensor)) for tensor in call.outputs]

    def _weightless(self, call: Call, taken: list[Labels]) -> Labels | None:
        """Return the labels of what a call without weights makes; None where it mixes channels."""
        kind, operation = call.kind, call.operation
        rank = len(call.outputs[0].shape)
        if kind in _CHANNEL_BY_CHANNEL and _last(call.outputs[0]) == len(taken[0]):
            return None if _mixes(operation) else taken[0]
        if kind == "Rescaling" and np.size(operation.scale) == np.size(operation.offset) == 1:
            return taken[0]
        if kind in _REDUCTIONS:
            return taken[0] if _keeps_last(operation, len(call.inputs[0].shape)) else None
        if kind == "Concatenate":
            if operation.axis in (-1, rank - 1):
                return np.concatenate(taken)
            for other in taken[1:]:
                self.unite(taken[0], other)
            return taken[0]
        if kind in _ELEMENT_BY_ELEMENT and not _has_array(call):
            widest = max(taken, key=len)
            for other in taken:
                if len(other) == len(widest):
                    self.unite(widest, other)
                else:  # one channel for all of them
                    self.pin(other)
            return widest
        return None

    def _reshape(self, call: Call, taken: Labels) -> Labels | None:
        """Follow Flatten, and those Reshapes that are one, or that leave the channels alone."""
        before = tuple(call.inputs[0].shape)[1:]
        after = tuple(call.outputs[0].shape)[1:]
        is_layer = hasattr(call.operation, "target_shape") or call.kind == "Flatten"
        if not is_layer or None in before:
            return None
        if len(after) == 1:
            labels = np.tile(taken, prod(before[:-1]))
        elif after[-1] == before[-1]:
            labels = taken
        else:
            return None
        resize = "target_shape" if call.kind == "Reshape" else None
        self._register(call, LayerChannels(call.name, call.operation, width=labels, resize=resize))
        return labels

    def _produce(self, call: Call, taken: Labels) -> Labels:
        layer, kind = call.operation, call.kind
        known = self.layers.get(id(layer))
        made = self.fresh(_last(call.outputs[0]), call.name) if known is None else known.width
        assert made is not None
        if _mixes(layer):
            self.pin(made)
        if kind == "Dense":
            axes: dict[str, tuple[Labels | None, ...]] = {"kernel": (taken, made)}
        elif kind == "Conv2DTranspose":
            axes = {"kernel": (None, None, made, taken)}
        elif kind == "SeparableConv2D":
            repeated = np.repeat(taken, layer.depth_multiplier)
            axes = {
                "depthwise_kernel": (None, None, taken, None),
                "pointwise_kernel": (None, None, repeated, made),
            }
        else:
            axes = {"kernel": (None, None, taken, made)}
        self._slice(call, axes | {"bias": (made,)}, taken, made, _PRODUCERS[kind])
        return made

    def _depthwise(self, call: Call, taken: Labels) -> Labels:
        made = np.repeat(taken, call.operation.depth_multiplier)
        axes = {"kernel": (None, None, taken, None), "bias": (made,)}
        self._slice(call, axes, taken, None, None)
        return made

    def _along(self, call: Call, taken: Labels) -> Labels:
        """Batch norm and PReLU: weights of their own for each channel."""
        layer, rank = call.operation, len(call.inputs[0].shape)
        if call.kind == "PReLU":
            shape = layer.alpha.shape
            own = taken if shape[-1] == len(taken) else None
            axes: dict[str, tuple[Labels | None, ...]] = {
                "alpha": (*([None] * (len(shape) - 1)), own)
            }
        elif layer.axis in (-1, rank - 1):
            names = ("gamma", "beta", "moving_mean", "moving_variance")
            axes = dict.fromkeys(names, (taken,))
        else:
            self.pin(taken)
            axes = {}
        self._slice(call, axes, None, None, None)
        return taken

    def _slice(
        self,
        call: Call,
        axes: dict[str, tuple[Labels | None, ...]],
        taken: Labels | None,
        made: Labels | None,
        resize: str | None,
    ) -> None:
        from cnnedge.backends.keras_graph import kernels, positions

        layer = call.operation
        by_variable = {
            id(getattr(layer, name)): along
            for name, along in axes.items()
            if getattr(layer, name, None) is not None
        }
        counted = {id(kernel) for kernel in kernels(layer)}
        times = positions(layer, call.inputs[0].shape[1:], call.outputs[0].shape[1:])
        found = LayerChannels(call.name, layer, width=made, resize=resize, taken=taken)
        for index, variable in enumerate(layer.weights):
            whole = (None,) * len(variable.shape)
            found.axes.append(by_variable.get(id(variable), whole))
            if id(variable) in counted:
                found.work[index] = times
        self._register(call, found)

    def _register(self, call: Call, found: LayerChannels) -> None:
        """Remember a layer; a second use of it makes both uses' channels the same."""
        known = self.layers.setdefault(id(call.operation), found)
        if known is found:
            return
        for ours, theirs in zip(known.axes, found.axes, strict=True):
            for one, other in zip(ours, theirs, strict=True):
                if one is not None and other is not None:
                    self.unite(one, other)
        if known.width is not None and found.width is not None:
            if len(known.width) == len(found.width):
                self.unite(known.width, found.width)
            else:
                self.pin(known.width)
                self.pin(found.width)
        for index, times in found.work.items():
            known.work[index] += times

    def finish(self, graph: KerasGraph) -> ChannelMap:
        """Number the units, and say everything in these numbers."""
        roots = np.array([self.root(number) for number in range(len(self.parents))])
        makers: dict[int, dict[str, None]] = {}  # dicts for their order
        for number, root in enumerate(roots.tolist()):
            if root:
                makers.setdefault(root, {})[self.makers[number]] = None
        unit_of = np.full(len(roots), PINNED)
        groups: dict[tuple[str, ...], list[int]] = {}
        for unit, (root, names) in enumerate(makers.items()):
            unit_of[root] = unit
            groups.setdefault(tuple(names), []).append(unit)
        number_to_unit = unit_of[roots]

        def final(labels: Labels | None) -> Labels | None:
            return None if labels is None else number_to_unit[labels]

        for found in self.layers.values():
            found.axes = [tuple(map(final, along)) for along in found.axes]
            found.width, found.taken = final(found.width), final(found.taken)
        return ChannelMap(
            graph,
            self.layers,
            tuple(Group("+".join(names), np.array(units)) for names, units in groups.items()),
            len(makers),
            tuple(dict.fromkeys(self.notes)),
        )


def _last(tensor: Any) -> int:
    return int(tensor.shape[-1]) if len(tensor.shape) > 1 and tensor.shape[-1] else 1


def _mixes(layer: keras.Layer) -> bool:
    """Tell whether a layer's activation works across channels."""
    return getattr(getattr(layer, "activation", None), "__name__", "") in _MIXING


def _keeps_last(operation: keras.Operation, rank: int) -> bool:
    """Tell whether a reduction leaves the last axis alone."""
    axis = operation.axis
    if axis is None:
        return False
    axes = {a % rank for a in (axis if isinstance(axis, Sequence) else (axis,))}
    return rank - 1 not in axes


def _has_array(call: Call) -> bool:
    """Tell whether an operation has a constant of more than one number among its arguments."""
    import keras

    if isinstance(call.operation, keras.layers.Layer):  # these take tensors, in a list
        return False
    arguments, keywords = call.node.arguments.fill_in({id(t): 0.0 for t in call.inputs})
    return any(
        np.size(value) > 1 for value in (*arguments, *keywords.values()) if value is not None
    )
