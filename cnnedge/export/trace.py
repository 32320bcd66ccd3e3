"""Keras model → ONNX skeleton: the graph alone, its large weights left out as inputs.

tf2onnx spends its time on weights carried as graph constants (a minute for VGG-16). Traced as a
function whose large weights are *arguments*, the same network converts in well under a second;
small tensors (biases, batch-norm statistics) stay constants, so that tf2onnx's own folding of
layouts and batch norms works on them as usual.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from cnnedge.errors import MissingExtraError, ModelError
from cnnedge.quiet import import_tensorflow

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

    proto: Any
    weights: dict[str, np.ndarray]
    layers: frozenset[str]


def trace(model: Any, height: int, width: int) -> Skeleton:
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
        def value(v: Any) -> Any:
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
    with _quiet_tf2onnx() as messages:
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
    _require_known_operations(proto, model.name)
    # Through a tensor, numpy sees TF's own memory; a variable's .numpy() would copy it.
    weights = {
        f"{WEIGHT}{k}": np.asarray(tf.convert_to_tensor(v.value)) for k, v in enumerate(large)
    }
    weights |= {placeholder.name: np.asarray(tensor) for tensor, placeholder in captures}
    return Skeleton(proto, weights, frozenset(_layer_names(model)))


def _require_known_operations(proto: Any, name: str) -> None:
    """Refuse a graph in which tf2onnx left an operation as TensorFlow's."""
    import onnx

    for node in proto.graph.node:
        if not onnx.defs.has(node.op_type, node.domain):
            raise ModelError(
                f"tf2onnx cannot convert {name!r}: ONNX has no {node.op_type} ({node.name})",
                fix="replace the layer that it comes from",
            )


def classifier_shape(model: Any) -> tuple[int | None, int | None, int, int]:
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


def _layer_names(model: Any) -> Iterator[str]:
    for layer in model._flatten_layers(include_self=False):  # Keras has no public recursive walk
        yield layer.name


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
