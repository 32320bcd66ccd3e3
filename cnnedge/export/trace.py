"""Keras model → ONNX skeleton: the graph alone, its large weights left out as inputs.

tf2onnx spends its time on weights carried as graph constants (a minute for VGG-16). Traced as a
function whose large weights are *arguments*, the same network converts in well under a second;
small tensors (biases, batch-norm statistics) stay constants, so that tf2onnx's own folding of
layouts and batch norms works on them as usual.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np

from cnnedge.errors import MissingExtraError, ModelError
from cnnedge.quiet import import_tensorflow

if TYPE_CHECKING:
    import keras
    import onnx

# The highest opset that tf2onnx writes; `lowest_opset` declares a lower one where it can.
TRACE_OPSET = 18
# Kernels above this many elements travel as arguments; below it, constants cost nothing.
SMALL = 4096
WEIGHT = "cnnedge_weight_"


@dataclass(frozen=True)
class Skeleton:
    """An ONNX graph whose large weights are still inputs named ``cnnedge_weight_<k>``.

    Attributes:
        proto: The ``onnx.ModelProto``; input ``image`` is float32 ``[N, H, W, C]``.
        weights: The arrays to bind, by input name, in Keras' own layouts.
        layers: Names of the model's layers, which node names are derived from.
    """

    proto: onnx.ModelProto
    weights: dict[str, np.ndarray]
    layers: frozenset[str]


def trace(model: keras.Model, height: int, width: int) -> Skeleton:
    """Trace a Keras classifier at inference into an ONNX skeleton.

    Args:
        model: A ``keras.Model`` with one image input ``[N, H, W, C]`` and one output
            ``[N, classes]``.
        height: Input height in pixels, where the model leaves it open.
        width: Input width in pixels, likewise.

    Raises:
        MissingExtraError: TensorFlow or tf2onnx is not installed.
        ModelError: the model is not an image classifier, or tf2onnx cannot convert an operation.
    """
    try:
        tf = import_tensorflow()
        import tf2onnx
    except ImportError as error:
        raise MissingExtraError(error.name or "tf2onnx", "export", purpose="exporting") from error

    channels = classifier_shape(model)[2]
    variables = list(model.trainable_variables) + list(model.non_trainable_variables)
    large = [v for v in variables if np.prod(v.shape) > SMALL]
    argument = {id(v): k for k, v in enumerate(large)}
    # Read before tracing: inside a graph a variable has no value to read. Dropout's seed state
    # is among them, and is never used at inference.
    constant = {id(v): v.numpy() for v in variables if id(v) not in argument}

    def forward(image: Any, *weights: Any) -> Any:
        def value(v: keras.Variable) -> Any:
            return weights[argument[id(v)]] if id(v) in argument else tf.constant(constant[id(v)])

        output, _ = model.stateless_call(
            [value(v) for v in model.trainable_variables],
            [value(v) for v in model.non_trainable_variables],
            image,
            training=False,
        )
        return tf.nest.flatten(output)[0]  # of a dictionary of one, too

    signature = [tf.TensorSpec((None, height, width, channels), tf.float32, name="image")]
    signature += [tf.TensorSpec(v.shape, v.dtype, f"{WEIGHT}{k}") for k, v in enumerate(large)]
    function = tf.function(forward, autograph=False, input_signature=signature)
    with _quiet_tf2onnx() as messages, _inlined(tf):
        try:
            # What the model holds beside its variables (a Normalization layer's mean, say) is
            # captured by the function and comes out as further inputs.
            captures = function.get_concrete_function(*signature).graph.captures
            proto, _ = tf2onnx.convert.from_function(
                function, input_signature=signature, opset=TRACE_OPSET
            )
        except Exception as error:  # tf2onnx and TF raise whatever their rewriters raise
            raise ModelError(
                f"tf2onnx cannot convert {model.name!r}: {messages or _first_line(error)}",
                fix="replace the operation it names by one that ONNX has",
            ) from error
    layers = frozenset(_layer_names(model))
    _spell_out_erfc(proto.graph)
    _require_known_operations(proto, layers, model.name)
    # Through a tensor, numpy sees TF's own memory; a variable's .numpy() would copy it.
    weights = {
        f"{WEIGHT}{k}": np.asarray(tf.convert_to_tensor(v.value)) for k, v in enumerate(large)
    }
    weights |= {placeholder.name: np.asarray(tensor) for tensor, placeholder in captures}
    return Skeleton(proto, weights, layers)


def _require_known_operations(proto: onnx.ModelProto, layers: frozenset[str], name: str) -> None:
    """Refuse a graph in which tf2onnx left an operation as TensorFlow's."""
    import onnx

    for node in _nodes(proto.graph):
        if not onnx.defs.has(node.op_type, node.domain):
            layer = layer_in(node.name, layers)
            where = f"the layer {layer!r} of {name!r}" if layer else f"{node.name!r} of {name!r}"
            raise ModelError(
                f"tf2onnx cannot convert {where}: ONNX has no {node.op_type}",
                fix="replace that layer by others that compute the same",
            )


def _spell_out_erfc(graph: onnx.GraphProto) -> None:
    """Write the complement of the error function, Keras' GELU, as ``1 - erf(x)``.

    ONNX has no such operation, and tf2onnx leaves it as TensorFlow's.
    """
    from onnx import helper, numpy_helper

    nodes = list(graph.node)
    del graph.node[:]
    for node in nodes:
        for attribute in node.attribute:
            if attribute.HasField("g"):
                _spell_out_erfc(attribute.g)
        if node.op_type != "Erfc":
            graph.node.append(node)
            continue
        one, erf = f"{node.output[0]}/one", f"{node.output[0]}/erf"
        graph.initializer.append(numpy_helper.from_array(np.array(1.0, np.float32), one))
        graph.node.append(helper.make_node("Erf", node.input, [erf], f"{node.name}/erf"))
        graph.node.append(helper.make_node("Sub", [one, erf], node.output, node.name))


def _nodes(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    """Yield the nodes of a ``GraphProto`` and of the graphs inside them."""
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            for inner in (attribute.g, *attribute.graphs):
                yield from _nodes(inner)


def layer_in(operation: str, layers: frozenset[str]) -> str:
    """Return the path of the layers in a TF operation's name; empty where it names none.

    TF appends ``_1``, ``_2`` … to a scope that it enters again, so ``model_1/conv2_1_1/Relu``
    comes from the layer ``conv2_1``; scopes that name no layer are left out.
    """
    found = []
    for scope in operation.split("/"):
        stripped = re.sub(r"_\d+$", "", scope)
        if stripped in layers:
            found.append(stripped)
        elif scope in layers:
            found.append(scope)
    return "/".join(found)


def classifier_shape(model: keras.Model) -> tuple[int | None, int | None, int, int]:
    """Return the ``(height, width, channels, classes)`` of a Keras classifier.

    Height and width are None where the model leaves them open.

    Raises:
        ModelError: it has not one image input and one output ``[N, classes]``.
    """
    try:
        inputs, outputs = model.inputs, model.outputs
    except AttributeError:
        inputs = outputs = None
    if not inputs and getattr(model, "input_shape", None):
        shapes = [tuple(model.input_shape)]
        output_shapes = [tuple(model.compute_output_shape(model.input_shape))]
    else:
        shapes = [tuple(tensor.shape) for tensor in inputs or ()]
        output_shapes = [tuple(tensor.shape) for tensor in outputs or ()]
    if len(shapes) != 1 or len(output_shapes) != 1:
        raise ModelError(
            f"{model.name!r} has {len(shapes)} inputs and {len(output_shapes)} outputs",
            fix="cnnedge takes a built classifier with one image input and one output",
        )
    if len(shapes[0]) != 4 or shapes[0][3] not in (1, 3):
        raise ModelError(
            f"the input of {model.name!r} is {shapes[0]}",
            fix="cnnedge takes images [N, H, W, 3] or [N, H, W, 1]",
        )
    if len(output_shapes[0]) != 2 or not output_shapes[0][1] or output_shapes[0][1] < 2:
        raise ModelError(
            f"the output of {model.name!r} is {output_shapes[0]}",
            fix="cnnedge takes a classifier over two classes or more: [N, classes]",
        )
    return shapes[0][1], shapes[0][2], int(shapes[0][3]), int(output_shapes[0][1])


def _layer_names(model: keras.Model) -> Iterator[str]:
    for layer in model._flatten_layers(include_self=False):  # Keras has no public recursive walk
        yield layer.name


@contextmanager
def _inlined(tf: ModuleType) -> Iterator[None]:
    """Trace functions inside the model as if they were part of it.

    Keras wraps a grouped convolution in one that asks to be compiled; the converter would see the
    call and not what is called.
    """
    before = tf.config.functions_run_eagerly()
    tf.config.run_functions_eagerly(True)
    try:
        yield
    finally:
        tf.config.run_functions_eagerly(before)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [repr(error)])[0]


@contextmanager
def _quiet_tf2onnx() -> Iterator[list[str]]:
    """Keep tf2onnx's log off the terminal, and its errors for our own message."""
    messages: list[str] = []

    class Collect(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if record.levelno >= logging.ERROR:
                messages.append(record.getMessage().strip().splitlines()[0])

    logger = logging.getLogger("tf2onnx")
    level, propagate, handler = logger.level, logger.propagate, Collect()
    logger.setLevel(logging.ERROR)
    logger.propagate = False
    logger.addHandler(handler)
    try:
        yield messages
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
        logger.propagate = propagate
