"""A Keras model as a flat list of calls, whatever form it had: functional, sequential, subclassed.

The model's `call` is traced on symbolic images, and so is that of every model inside it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import keras

from cnnedge.errors import ModelError, first_line


@dataclass(frozen=True)
class Call:
    """One use of a layer, or of an operation of `keras.ops`.

    Attributes:
        operation: The layer or operation; one that is used twice appears in two calls.
        name: Its name, after those of the models it is nested in: "features/conv1".
        inputs: The symbolic tensors it takes, in order.
        outputs: Those it makes.
        node: Keras' own record of the call.
    """

    operation: keras.Operation
    name: str
    inputs: tuple[keras.KerasTensor, ...]
    outputs: tuple[keras.KerasTensor, ...]
    node: Any

    @property
    def kind(self) -> str:
        """The class of the layer or operation."""
        return type(self.operation).__name__

    def replay(self, operation: Callable[..., Any], values: dict[int, Any]) -> None:
        """Call ``operation`` as this call was made.

        Args:
            operation: What to call instead of the call's own.
            values: What stands for each symbolic tensor, by its ``id``; the call's outputs are
                added to it.
        """
        arguments, keywords = self.node.arguments.fill_in(values)
        keywords = {k: v for k, v in keywords.items() if not (k == "training" and v is None)}
        results = keras.tree.flatten(operation(*arguments, **keywords))
        values.update(zip(map(id, self.outputs), results, strict=True))


@dataclass(frozen=True)
class KerasGraph:
    """A model's calls, in an order in which they can be made.

    Attributes:
        inputs: The symbolic tensors that stand for the model's inputs.
        calls: Every call, those of nested models in their place.
        outputs: The symbolic tensors that the model returns.
    """

    inputs: tuple[keras.KerasTensor, ...]
    calls: tuple[Call, ...]
    outputs: tuple[keras.KerasTensor, ...]


def trace_calls(model: keras.Model, shapes: Sequence[tuple[int | None, ...]]) -> KerasGraph:
    """Trace a model.

    Args:
        model: A built ``keras.Model``.
        shapes: The shape of each of its inputs, without the batch.

    Raises:
        ModelError: it does not take those shapes, or computes something that Keras cannot trace.
    """
    inputs = tuple(keras.Input(shape) for shape in shapes)
    calls: list[Call] = []
    outputs = _through(model, inputs, "", calls)
    return KerasGraph(inputs, tuple(calls), tuple(outputs))


def _through(
    model: keras.Model, taken: Sequence[keras.KerasTensor], prefix: str, calls: list[Call]
) -> list[keras.KerasTensor]:
    """Append the calls of ``model`` applied to ``taken``; return its outputs."""
    inputs = [keras.Input(tuple(tensor.shape)[1:]) for tensor in taken]
    try:
        outputs = model.call(inputs[0] if len(inputs) == 1 else inputs)
        graph = keras.Function(inputs, outputs)
    except Exception as error:  # whatever the model's own code raises
        reason = first_line(error)
        size = " and ".join("x".join(map(str, tuple(tensor.shape)[1:])) for tensor in taken)
        raise ModelError(
            f"{model.name!r} cannot be traced on an input of {size}: {reason}",
            fix="pass a size that it takes; its call must consist of layers and keras.ops",
        ) from error
    made = {id(inner): outer for inner, outer in zip(inputs, taken, strict=True)}
    for node in _nodes(graph):
        arguments = tuple(made[id(tensor)] for tensor in node.arguments.keras_tensors)
        kind = type(node.operation).__name__
        if kind == "ConvertToTensor" and len(arguments) == 1:  # the trace's own
            results: Sequence[Any] = arguments
        elif isinstance(node.operation, keras.Model):
            nested = f"{prefix}{node.operation.name}/"
            results = _through(node.operation, arguments, nested, calls)
        else:
            results = tuple(node.outputs)
            name = prefix + node.operation.name
            calls.append(Call(node.operation, name, arguments, results, _Bound(node, made)))
        made.update(zip(map(id, node.outputs), results, strict=True))
    return [made[id(tensor)] for tensor in keras.tree.flatten(outputs)]


class _Bound:
    """A node's arguments, in terms of the tensors outside the model that it is nested in."""

    def __init__(self, node: Any, made: dict[int, Any]) -> None:
        self.arguments = self
        self._node = node
        self._outer = {id(t): made[id(t)] for t in node.arguments.keras_tensors}

    def fill_in(self, values: dict[int, Any]) -> tuple[Any, Any]:
        """Return the positional and the keyword arguments with each tensor's value."""
        inner = {key: values[id(tensor)] for key, tensor in self._outer.items()}
        return self._node.arguments.fill_in(inner)


def _nodes(graph: Any) -> Iterator[Any]:
    """Yield a Keras graph's nodes in order.

    Keras has no public list of them; its operations alone would merge the uses of a layer that is
    called twice.
    """
    for depth in sorted(graph._nodes_by_depth, reverse=True):
        for node in graph._nodes_by_depth[depth]:
            if not node.is_input:
                yield node


def kernels(layer: keras.Layer) -> list[keras.Variable]:
    """Return the variables of a layer that are multiplied by activations, position by position."""
    kind = type(layer).__name__
    if kind in ("Conv2D", "DepthwiseConv2D", "Conv2DTranspose", "Dense"):
        return [layer.kernel]
    if kind == "SeparableConv2D":
        return [layer.depthwise_kernel, layer.pointwise_kernel]
    return []


def positions(layer: keras.Layer, taken: Sequence[int], made: Sequence[int]) -> int:
    """Return how often a layer applies its kernels: once per pixel of a map, or of a vector.

    Args:
        layer: One that has `kernels`.
        taken: Its input's shape without the batch.
        made: Its output's.
    """
    shape = taken if type(layer).__name__ == "Conv2DTranspose" else made
    if getattr(layer, "data_format", None) == "channels_first":
        return prod(shape[1:])
    return prod(shape[:-1])
