"""Build the smaller network: the same calls, each layer anew with the channels that are kept."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from cnnedge.compress.channels import ChannelMap, LayerChannels

if TYPE_CHECKING:
    import keras

    from cnnedge.backends.keras_graph import KerasGraph

_DROPOUTS = frozenset({"Dropout", "SpatialDropout2D", "AlphaDropout", "GaussianDropout"})
Substitute = Callable[[Any, str, Any], Any]
"""From a layer, its new name and the tensor it reads to what it makes; None: build it as usual."""


def kept_places(labels: np.ndarray, kept: np.ndarray) -> np.ndarray:
    """Return the places along an axis that stay.

    Args:
        labels: The unit of each place, int64; -1 where it has to stay.
        kept: For each unit whether it stays, bool.
    """
    return np.flatnonzero((labels < 0) | kept[labels])


def remove_channels(model: keras.Model, channels: ChannelMap, kept: np.ndarray) -> keras.Model:
    """Return a network without the units that are not kept; ``model`` stays as it is.

    The result is a functional model of its own layers: models nested in it are taken apart, and
    subclassed ones too. A dropout's rate shrinks with the share of what it reads that is kept (Han
    et al., "Learning both Weights and Connections", 2015, section 3.2).

    Args:
        model: What ``channels`` was read from.
        channels: Its channels.
        kept: For each unit whether it stays, bool.
    """

    def configure(layer: keras.Layer) -> dict[str, Any]:
        found = channels.layers[id(layer)]
        changes: dict[str, Any] = {}
        if found.resize is not None and found.width is not None:
            width = len(kept_places(found.width, kept))
            changes[found.resize] = width
            if found.resize == "target_shape":
                shape = tuple(layer.target_shape)
                changes[found.resize] = shape if shape[-1] == -1 else (*shape[:-1], width)
        if type(layer).__name__ in _DROPOUTS and found.taken is not None and len(found.taken):
            share = len(kept_places(found.taken, kept)) / len(found.taken)
            changes["rate"] = layer.rate * share
        return changes

    def weights(layer: keras.Layer) -> list[np.ndarray]:
        return sliced_weights(channels.layers[id(layer)], kept)

    return rebuild(model, channels.graph, configure, weights)


def sliced_weights(found: LayerChannels, kept: np.ndarray) -> list[np.ndarray]:
    """Return a layer's weights without the units that are not kept."""
    arrays = [np.array(variable) for variable in getattr(found.layer, "weights", ())]
    for index, along in enumerate(found.axes):
        for axis, labels in enumerate(along):
            if labels is not None:
                arrays[index] = np.take(arrays[index], kept_places(labels, kept), axis)
    return arrays


def rebuild(
    model: keras.Model,
    graph: KerasGraph,
    configure: Callable[[keras.Layer], Mapping[str, Any]] = lambda layer: {},
    weights: Callable[[keras.Layer], list[np.ndarray]] = lambda layer: layer.get_weights(),
    substitute: Substitute = lambda layer, name, taken: None,
) -> keras.Model:
    """Build a network anew, call by call, sharing nothing with the old one.

    Args:
        model: The network.
        graph: Its calls, traced on an image of a certain size.
        configure: What of a layer's configuration to change.
        weights: The new layer's weights, in the order of the old one's.
        substitute: What to put in the place of a layer.

    Returns:
        A functional ``keras.Model`` that takes what ``model`` takes.
    """
    import keras

    from cnnedge.backends.keras_graph import trace_calls

    shapes = [tuple(tensor.shape)[1:] for tensor in getattr(model, "inputs", None) or graph.inputs]
    if shapes != [tuple(tensor.shape)[1:] for tensor in graph.inputs]:
        # The sizes that it leaves open stay open; the calls and their order are the same.
        graph = trace_calls(model, shapes)
    names = _Names()
    made: dict[int, Any] = {}  # by the id of the old layer
    inputs = [keras.Input(shape) for shape in shapes]
    values: dict[int, Any] = dict(zip(map(id, graph.inputs), inputs, strict=True))
    for call in graph.calls:
        old = call.operation
        if not isinstance(old, keras.layers.Layer):
            call.replay(type(old).from_config(old.get_config()), values)
            continue
        if id(old) not in made:
            name = names.unused(call.name)
            replaced = substitute(old, name, values[id(call.inputs[0])])
            if replaced is not None:
                values[id(call.outputs[0])] = replaced
                continue
            made[id(old)] = _anew(old, name, configure(old))
            call.replay(made[id(old)], values)
            for variable, value in zip(made[id(old)].weights, weights(old), strict=True):
                variable.assign(value)
        else:
            call.replay(made[id(old)], values)
    outputs = [values[id(tensor)] for tensor in graph.outputs]
    return keras.Model(
        inputs[0] if len(inputs) == 1 else inputs,
        outputs[0] if len(outputs) == 1 else outputs,
        name=model.name,
    )


def _anew(layer: keras.Layer, name: str, changes: Mapping[str, Any]) -> Any:
    config = layer.get_config() | {"name": name, **changes}
    if "seed" in config and config["seed"] is None:
        # Keras would draw one at random, and a resumed run would draw another.
        config["seed"] = 0
    return type(layer).from_config(config)


class _Names:
    """Makes the names of layers of nested models unique in a flat one."""

    def __init__(self) -> None:
        self.taken: set[str] = set()

    def unused(self, path: str) -> str:
        """Return the layer's own name where it is free, else one with its model's before it."""
        parts = path.split("/")
        candidates = ["_".join(parts[-n:]) for n in range(1, len(parts) + 1)]
        number = 2
        while candidates[0] in self.taken:
            candidates = candidates[1:] or [f"{'_'.join(parts)}_{number}"]
            number += 1
        self.taken.add(candidates[0])
        return candidates[0]
