"""What a pass over a graph is, and the few that every flow needs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import wraps
from typing import TYPE_CHECKING, Concatenate, ParamSpec, TypeVar

from cnnedge.errors import CnnEdgeError, ModelError, first_line
from cnnedge.graph.edit import inner_graphs, name_of

if TYPE_CHECKING:
    import onnx_ir as ir

P = ParamSpec("P")
R = TypeVar("R")


@dataclass(frozen=True)
class PassResult:
    """What a pass gives.

    Attributes:
        model: The model, the very one that was given where the pass works in place.
        modified: Whether it differs from what was given.
    """

    model: ir.Model
    modified: bool


def named_in_errors(function: Callable[P, R]) -> Callable[P, R]:
    """Let whatever goes wrong in a pass end in one line that names the pass."""

    @wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return function(*args, **kwargs)
        except (CnnEdgeError, MemoryError, OSError):  # these say themselves what is wrong
            raise
        except Exception as error:
            raise ModelError(
                f"the pass {function.__name__} fails on this network's graph ({first_line(error)})",
                fix="report this network: its structure is one that cnnedge does not know yet",
            ) from error

    return run


def graph_pass(
    change: Callable[Concatenate[ir.Model, P], None],
) -> Callable[Concatenate[ir.Model, P], PassResult]:
    """Make a pass of a function that changes a model in place.

    Whether it changed anything is read off the graph, so that no pass can forget to say it.
    """

    @named_in_errors
    @wraps(change)
    def run(model: ir.Model, /, *args: P.args, **kwargs: P.kwargs) -> PassResult:
        before = list(_structure(model.graph))
        change(model, *args, **kwargs)
        return PassResult(model, list(_structure(model.graph)) != before)

    return run


def _structure(graph: ir.Graph) -> Iterator[tuple[object, ...]]:
    """Yield all of a graph that a pass may change, to be compared; objects by their identity."""
    yield tuple(graph.opset_imports.items())
    yield (*map(_described, graph.inputs), None, *map(_described, graph.outputs))
    for value in graph.initializers.values():
        yield value, value.name
    for node in graph:
        results = map(_described, node.outputs)
        yield node, node.name, *node.inputs, *node.attributes.values(), *results
        for body in inner_graphs(node):
            yield from _structure(body)


def _described(value: ir.Value) -> tuple[object, ...]:
    return value, value.name, value.dtype, None if value.shape is None else value.shape.dims


@graph_pass
def settle_names(model: ir.Model) -> None:
    """Give every node and every value a name that no other has; the first keeps its own.

    Names made from a layer's (``conv1/quantize``) may be those of another layer, of a model that
    is nested under that name.
    """
    import onnx_ir.passes.common as passes

    passes.NameFixPass()(model)


@graph_pass
def infer_shapes(model: ir.Model) -> None:
    """Give each value the shape and the type that ONNX infers for it."""
    import onnx_ir.passes.common as passes

    passes.ShapeInferencePass()(model)


@graph_pass
def drop_unused_nodes(model: ir.Model) -> None:
    """Forget the nodes and constants of which nothing reaches an output."""
    import onnx_ir.passes.common as passes

    passes.RemoveUnusedNodesPass()(model)


@graph_pass
def sort_nodes(model: ir.Model) -> None:
    """Bring the nodes into an order in which each comes after those that it reads."""
    import onnx_ir.passes.common as passes

    passes.TopologicalSortPass()(model)


@graph_pass
def drop_unused_initializers(model: ir.Model) -> None:
    """Forget the constants that no node uses any more."""
    initializers = model.graph.initializers
    for value in list(initializers.values()):
        if not value.uses() and not value.is_graph_output():
            del initializers[name_of(value)]
