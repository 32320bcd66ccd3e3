"""A pass says whether it changed anything, and an error in it names it."""

from __future__ import annotations

import onnx_ir as ir
import pytest
from test_export import export

from cnnedge.errors import DataError, ModelError
from cnnedge.export.fold import (
    drop_identities,
    fix_reshape_targets,
    fold_batch_norm,
    fold_constants,
    fold_flatten,
    fold_padding,
    fold_scale_and_shift,
    free_loops_of_constants,
    fuse_dense,
    merge_reshapes,
    name_pooling,
)
from cnnedge.export.layout import keep_nchw
from cnnedge.graph.passes import (
    drop_unused_initializers,
    drop_unused_nodes,
    graph_pass,
    infer_shapes,
    settle_names,
    sort_nodes,
)
from cnnedge.graph.write import serialize

pytestmark = pytest.mark.tf

PASSES = [
    infer_shapes,
    fix_reshape_targets,
    free_loops_of_constants,
    fold_constants,
    fold_batch_norm,
    keep_nchw,
    fold_padding,
    fold_scale_and_shift,
    name_pooling,
    fold_flatten,
    merge_reshapes,
    fuse_dense,
    drop_identities,
    drop_unused_nodes,
    drop_unused_initializers,
    sort_nodes,
    settle_names,
]


@pytest.fixture
def model():
    image = ir.Value(name="image", shape=ir.Shape([1]), type=ir.TensorType(ir.DataType.FLOAT))
    node = ir.node("Relu", [image], name="relu")
    graph = ir.Graph([image], [node.outputs[0]], nodes=[node], opset_imports={"": 18})
    return ir.Model(graph, ir_version=8)


def test_what_is_folded_stays_as_it_is(toy_model):
    graph = export(toy_model, 32, 32).model
    infer_shapes(graph)  # those that the export leaves out
    written = serialize(graph)
    assert [step.__name__ for step in PASSES if step(graph).modified] == []
    assert serialize(graph) == written


def another_name(model):
    model.graph[0].name = "other"


def another_shape(model):
    model.graph.outputs[0].shape = ir.Shape([1])


def another_attribute(model):
    model.graph[0].attributes["alpha"] = ir.AttrFloat32("alpha", 1.0)


def another_operand(model):
    value = ir.Value(name="other")
    model.graph.inputs.append(value)
    model.graph[0].replace_input_with(0, value)


def another_opset(model):
    model.graph.opset_imports[""] = 19


def nothing(model):
    list(model.graph)


@pytest.mark.parametrize(
    "change", [another_name, another_shape, another_attribute, another_operand, another_opset]
)
def test_a_pass_says_whether_it_changed_anything(model, change):
    assert not graph_pass(nothing)(model).modified
    result = graph_pass(change)(model)
    assert (result.model, result.modified) == (model, True)


def test_an_error_in_a_pass_names_the_pass(model):
    @graph_pass
    def stumble(model):
        raise ZeroDivisionError("twice\nover")

    with pytest.raises(ModelError) as caught:
        stumble(model)
    assert str(caught.value).startswith("the pass stumble fails on this network's graph (twice);")
    assert isinstance(caught.value.__cause__, ZeroDivisionError)


@pytest.mark.parametrize("error", [DataError("no images"), OSError("no room"), MemoryError()])
def test_what_says_itself_what_is_wrong_is_handed_on(model, error):
    @graph_pass
    def stumble(model):
        raise error

    with pytest.raises(type(error)) as caught:
        stumble(model)
    assert caught.value is error
