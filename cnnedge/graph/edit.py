"""The few graph operations that every pass over an ``onnx_ir.Model`` needs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, TypeVar

import numpy as np

if TYPE_CHECKING:
    import onnx_ir as ir

T = TypeVar("T")

NHWC_TO_NCHW = [0, 3, 1, 2]
NCHW_TO_NHWC = [0, 2, 3, 1]
# Layers with weights: the second operand is their kernel, where it is a constant.
WEIGHTED = frozenset({"Conv", "Gemm", "MatMul"})
WEIGHTED_OR_TRANSPOSED = WEIGHTED | {"ConvTranspose"}


def _known(thing: T | None, what: str) -> T:
    if thing is None:
        raise ValueError(f"{what} is not known")
    return thing


# What onnx_ir leaves open, and a graph that is complete has; a ValueError where it has not.


def name_of(named: ir.Node | ir.Value) -> str:
    """Return the name of a node or a value: onnx_ir names all that is put into a graph."""
    return _known(named.name, "a node's or a value's name")


def operand(node: ir.Node, index: int) -> ir.Value:
    """Return an operand that a node must have."""
    return _known(optional_operand(node, index), f"operand {index} of {node.name!r}")


def maker(value: ir.Value) -> ir.Node:
    """Return the node that makes a value, which is neither an input nor a constant."""
    return _known(value.producer(), f"what makes {value.name!r}")


def shape_of(value: ir.Value) -> ir.Shape:
    """Return the shape of a value."""
    return _known(value.shape, f"the shape of {value.name!r}")


def stored(value: ir.Value) -> ir.TensorProtocol:
    """Return what an initializer holds, which need not be in memory."""
    return _known(value.const_value, f"the content of {value.name!r}")


def required_constant(value: ir.Value | None) -> np.ndarray:
    """Return the array of a value that must be an initializer."""
    return _known(constant(value), f"the content of {None if value is None else value.name!r}")


def optional_operand(node: ir.Node, index: int) -> ir.Value | None:
    """Return an operand that a node may leave out, or None."""
    return node.inputs[index] if index < len(node.inputs) else None


def made_by(value: ir.Value | None, *op_types: str) -> ir.Node | None:
    """Return the node that makes a value if it is of one of the given operations, else None."""
    producer = None if value is None else value.producer()
    return producer if producer is not None and producer.op_type in op_types else None


def constant(value: ir.Value | None) -> np.ndarray | None:
    """Return the array of a value that is an initializer, else None."""
    if value is None or value.const_value is None or not value.is_initializer():
        return None
    return value.const_value.numpy()


def initializer(model: ir.Model, name: str, array: np.ndarray) -> ir.Value:
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


def rename_initializer(value: ir.Value, name: str) -> None:
    """Give an initializer another, unused name."""
    graph = _known(value.graph, f"the graph of {value.name!r}")
    del graph.initializers[name_of(value)]
    value.name = name
    stored(value).name = name
    graph.initializers[name] = value


def attribute_ints(node: ir.Node, name: str) -> list[int] | None:
    """Return a node's list-of-integers attribute, or None where it has none."""
    integers = node.attributes.get_ints(name)
    return None if integers is None else [int(i) for i in integers]


def single_consumer(value: ir.Value) -> ir.Node | None:
    """Return the one node that uses ``value``, or None if there are more, or it is an output.

    None too where that node is in the body of a loop or a branch, which may run often or never.
    """
    uses = value.uses()
    if len(uses) != 1 or value.is_graph_output():
        return None
    user, producer = next(iter(uses))[0], value.producer()
    return user if producer is None or user.graph is producer.graph else None


def describe_like(value: ir.Value, other: ir.Value) -> None:
    """Give a value the name, the shape and the type of another."""
    value.name, value.shape, value.type = other.name, other.shape, other.type


def replace_node(
    model: ir.Model, node: ir.Node, op_type: str, inputs: Sequence[ir.Value | None]
) -> ir.Node:
    """Put a node of another operation in the place of ``node``, its results taken over."""
    import onnx_ir as ir

    new = ir.node(op_type, inputs, name=node.name)
    old_value, new_value = node.outputs[0], new.outputs[0]
    describe_like(new_value, old_value)
    model.graph.insert_before(node, new)
    old_value.replace_all_uses_with(new_value, replace_graph_outputs=True)
    erase(node)
    return new


def erase(node: ir.Node) -> None:
    """Remove a node whose results nothing uses."""
    _known(node.graph, f"the graph of {node.name!r}").remove(node, safe=True)


def all_nodes(model: ir.Model) -> Iterator[ir.Node]:
    """Yield the nodes of the graph, each followed by those of the graphs that it runs.

    These are the bodies of Loop and Scan and the branches of If, which the graph's own iterator
    leaves out.
    """
    yield from model.graph.all_nodes()


def inner_graphs(node: ir.Node) -> Iterator[ir.Graph]:
    """Yield the graphs that a node runs: the body of a Loop, the branches of an If."""
    import onnx_ir as ir

    for attribute in node.attributes.values():
        if attribute.type == ir.AttributeType.GRAPH:
            yield attribute.as_graph()


def main_nodes(model: ir.Model, *op_types: str) -> Iterator[ir.Node]:
    """Yield the graph's own nodes of the given operations, tolerant of changes on the way."""
    for node in list(model.graph):
        if node.graph is not None and (not op_types or node.op_type in op_types):
            yield node
