"""Step: a Keras model becomes an FP32 ONNX graph that answers alike, and its FP16 sibling."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from cnnedge.errors import MissingExtraError
from cnnedge.export.contract import (
    give_probabilities,
    take_float32,
    take_uint8,
    write_metadata,
    write_names,
)
from cnnedge.export.fold import fold
from cnnedge.export.trace import classifier_shape, trace
from cnnedge.graph.edit import made_by
from cnnedge.graph.opset import lowest_opset
from cnnedge.graph.write import write_onnx
from cnnedge.head import PROBABILITIES, synthetic_images
from cnnedge.image import ImageContract

if TYPE_CHECKING:
    import keras
    import onnx_ir as ir

# What onnxruntime 1.10 (2021) and every runtime since can read.
IR_VERSION = 8


@dataclass(frozen=True)
class ExportedGraph:
    """An FP32 ONNX graph in memory.

    Attributes:
        model: The ``onnx_ir.Model``.
        emitted: What the Keras network gives: "probabilities", or "logits" (a softmax was added).
    """

    model: ir.Model
    emitted: str


def export_onnx(
    model: keras.Model,
    *,
    name: str,
    labels: tuple[str, ...],
    image: ImageContract,
    normalization: str = "unit",
    input_dtype: str = "uint8",
    emits: str | None = None,
) -> ExportedGraph:
    """Convert a Keras classifier to an ONNX graph that obeys the contract.

    Args:
        model: A ``keras.Model``: one image in, one score per class out.
        name: What the graph is called.
        labels: One label for each class.
        image: The image contract; its size replaces a size that the model leaves open.
        normalization: What the network wants of its pixels, a name in ``NORMALIZATIONS``.
        input_dtype: "uint8" (normalization in the graph) or "float32" (the Keras signature).
        emits: What the network gives, "probabilities" or "logits"; None: it is asked, on synthetic
            images.

    Raises:
        MissingExtraError: TensorFlow or tf2onnx is not installed.
        ModelError: the model is no image classifier, gives neither probabilities nor logits, or
            cannot be converted.
    """
    try:
        import onnx_ir  # noqa: F401
    except ImportError as error:
        raise MissingExtraError("onnx-ir", "export", purpose="exporting") from error
    skeleton = trace(model, image.height, image.width)
    graph = fold(skeleton)
    if emits is None:
        emits = _ask(model, graph, image, normalization)
    named = []
    if input_dtype == "uint8":
        named = take_uint8(graph, image, normalization)
    else:
        take_float32(graph, image)
    give_probabilities(graph, len(labels), emits)
    write_names(graph, skeleton.layers, named)
    write_metadata(graph, name=name, labels=labels, image=image)
    opset = lowest_opset(graph)
    graph.graph.doc_string = None  # the converter's, with a number that differs from run to run
    graph.graph.opset_imports.clear()
    graph.graph.opset_imports[""] = opset
    graph.ir_version = IR_VERSION
    return ExportedGraph(graph, emits)


def _ask(model: keras.Model, graph: ir.Model, image: ImageContract, normalization: str) -> str:
    """Return what a network gives, by its answers unless it ends in a softmax over its classes."""
    last = made_by(graph.graph.outputs[0], "Softmax")
    if last is not None and last.attributes.get_int("axis", -1) in (-1, 1):
        return PROBABILITIES
    from cnnedge.backends.keras import read_emits

    return read_emits(model, synthetic_images(image.shape), normalization)


__all__ = ["ExportedGraph", "classifier_shape", "export_onnx", "write_onnx"]
