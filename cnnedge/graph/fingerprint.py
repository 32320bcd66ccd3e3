"""A few numbers for each layer's result: enough to tell at which layer two machines part."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from cnnedge.graph.edit import name_of
from cnnedge.graph.image_part import image_part
from cnnedge.graph.write import serialize
from cnnedge.selftest import Fingerprints, fingerprint_of


def layer_fingerprints(path: Path, batch: np.ndarray) -> Fingerprints:
    """Return a fingerprint of every layer's result, in graph order.

    In a quantized graph the integers behind QuantizeLinear are taken, since asking a runtime for
    the float results would undo the very fusions that are to be tested.
    """
    import onnx_ir as ir

    from cnnedge.backends.onnxruntime import open_session

    model = ir.load(path)
    nodes = [node for node in model.graph if node.op_type == "QuantizeLinear"]
    if not nodes:
        of_the_image = image_part(model)
        nodes = [node for node in model.graph if node not in of_the_image]
    values = [n.outputs[0] for n in nodes if not n.outputs[0].is_graph_output()]
    model.graph.outputs.extend(values)
    opened = open_session(serialize(model))
    names = [name_of(value) for value in values]
    feed = {opened.session.get_inputs()[0].name: batch}
    return {
        name: fingerprint_of(array)
        for name, array in zip(names, opened.session.run(names, feed), strict=True)
    }
