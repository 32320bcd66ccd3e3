"""The few graph operations that every pass over an ``onnx_ir.Model`` needs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np


def constant(value: Any) -> np.ndarray | None:
    """Return the array of a value that is an initializer, else None."""
    if value is None or value.const_value is None or not value.is_initializer():
        return None
    return value.const_value.numpy()


def required_constant(value: Any) -> np.ndarray:
    """Return the array of a value that must be an initializer.

    Raises:
        ValueError: it is not.
    """
    array = constant(value)
    if array is None:
        raise ValueError(f"{value.name!r} is no constant")
    return array


def initializer(model: Any, name: str, array: np.ndarray) -> Any:
    """Register ``array`` as an initializer under ``name``, made unique, and return its value."""
    import onnx_ir as ir

    taken = model.graph.initializers
    unique, suffix = name, 1
    while unique in taken:
        suffix += 1
        unique = f"{name}_{suffix}"
    value = ir.Value(
        name=unique,
        shape=ir.Shape(array.shape),
        type=ir.TensorType(ir.DataType.from_numpy(array.dtype)),
        const_value=ir.tensor(array, name=unique),
    )
    model.graph.register_initializer(value)
    return value


def rename_initializer(graph: Any, value: Any, name: str) -> None:
    """Give an initializer another, unused name."""
    del graph.initializers[value.name]
    value.name = name
    value.const_value.name = name
    graph.initializers[name] = value


def attribute_ints(node: Any, name: str) -> list[int] | None:
    """Return a node's list-of-integers attribute, or None where it has none."""
    found = node.attributes.get(name)
    return None if found is None else [int(i) for i in found.as_ints()]


def single_consumer(value: Any) -> Any | None:
    """Return the one node that uses ``value``, or None if there are more, or it is an output.

    None too where that node is in the body of a loop or a branch, which may run often or never.
    """
    uses = value.uses()
    if len(uses) != 1 or value.is_graph_output():
        return None
    user, producer = next(iter(uses))[0], value.producer()
    return user if producer is None or user.graph is producer.graph else None


def replace_node(
    model: Any, node: Any, op_type: str, inputs: list[Any], attributes: dict[str, Any] | None = None
) -> Any:
    """Put a node of another operation in the place of ``node``, its results taken over."""
    import onnx_ir as ir

    new = ir.node(op_type, inputs, attributes or {}, name=node.name)
    old_value, new_value = node.outputs[0], new.outputs[0]
    new_value.name, new_value.shape, new_value.type = (
        old_value.name,
        old_value.shape,
        old_value.type,
    )
    model.graph.insert_before(node, new)
    old_value.replace_all_uses_with(new_value, replace_graph_outputs=True)
    erase(model, node)
    return new


def erase(model: Any, node: Any) -> None:
    """Remove a node whose results nothing uses."""
    node.graph.remove(node, safe=True)


def settle_names(model: Any) -> None:
    """Give every node and every value a name that no other has; the first keeps its own.

    Names made from a layer's (``conv1/quantize``) may be those of another layer, of a model that
    is nested under that name.
    """
    import onnx_ir.passes.common as passes

    passes.NameFixPass()(model)


def all_nodes(model: Any) -> Iterator[Any]:
    """Yield the nodes of the graph, each followed by those of the graphs that it runs.

    These are the bodies of Loop and Scan and the branches of If, which the graph's own iterator
    leaves out.
    """
    yield from model.graph.all_nodes()


def inner_graphs(node: Any) -> Iterator[Any]:
    """Yield the graphs that a node runs: the body of a Loop, the branches of an If."""
    import onnx_ir as ir

    for attribute in node.attributes.values():
        if attribute.type == ir.AttributeType.GRAPH:
            yield attribute.as_graph()


def main_nodes(model: Any, *op_types: str) -> Iterator[Any]:
    """Yield the graph's own nodes of the given operations, tolerant of changes on the way."""
    for node in list(model.graph):
        if node.graph is not None and (not op_types or node.op_type in op_types):
            yield node


def drop_unused_initializers(model: Any) -> None:
    """Forget the constants that no node uses any more."""
    initializers = model.graph.initializers
    for value in list(initializers.values()):
        if not value.uses() and not value.is_graph_output():
            del initializers[value.name]
