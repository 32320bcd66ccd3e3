"""Graphs that do nothing but resize: ours, and ONNX's Resize in each way that it can be asked."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from cnnedge.backends.onnxruntime import open_session
from cnnedge.graph.resize import put_resize
from cnnedge.image import ImageContract

OURS = "matrix products (ours)"


def resize_graphs(contract: ImageContract) -> dict[str, bytes]:
    """Return the graphs by what they do: uint8 ``[N, any, any, 3]`` → ``[N, h, w, 3]``."""
    return {
        OURS: put_resize(_identity(contract), contract),
        "`Resize` uint8, NCHW": _onnx_resize(contract),
        "`Resize` uint8, NHWC": _onnx_resize(contract, channels_first=False),
        "`Resize` uint8, NCHW, `exclude_outside=0`": _onnx_resize(contract, exclude_outside=0),
        "`Resize` float32, then rounded": _onnx_resize(contract, as_float=True),
        "`Resize` uint8, no `antialias`": _onnx_resize(contract, exclude_outside=0, antialias=0),
    }


def runner(graph: bytes, threads: int | None = None) -> Callable[[np.ndarray], np.ndarray]:
    """Return a graph as a function of one picture."""
    session = open_session(graph, threads=threads)
    return lambda pixels: session(pixels[None])[0]


def _identity(contract: ImageContract) -> bytes:
    from onnx import TensorProto, helper

    size = ["N", contract.height, contract.width, contract.channels]
    return _model(
        [helper.make_node("Identity", ["image"], ["pixels"])], size, [], TensorProto.UINT8
    )


def _onnx_resize(
    contract: ImageContract,
    *,
    channels_first: bool = True,
    as_float: bool = False,
    exclude_outside: int = 1,
    antialias: int = 1,
) -> bytes:
    from onnx import TensorProto, helper, numpy_helper

    nodes: list[Any] = []
    last = "image"

    def add(op_type: str, *others: str, **attributes: Any) -> None:
        nonlocal last
        result = f"{op_type}{len(nodes)}"
        nodes.append(helper.make_node(op_type, [last, *others], [result], **attributes))
        last = result

    if as_float:
        add("Cast", to=TensorProto.FLOAT)
    if channels_first:
        add("Transpose", perm=[0, 3, 1, 2])
    add(
        "Resize",
        *("", "", "size"),
        mode="linear",
        coordinate_transformation_mode="half_pixel",
        antialias=antialias,
        exclude_outside=exclude_outside,
    )
    if as_float:
        add("Round")
        add("Cast", to=TensorProto.UINT8)
    if channels_first:
        add("Transpose", perm=[0, 2, 3, 1])
    nodes.append(helper.make_node("Identity", [last], ["pixels"]))
    target, channels = [contract.height, contract.width], [contract.channels]
    whole = channels + target if channels_first else target + channels
    size = np.array([1, *whole], np.int64)  # for one picture at a time
    shape = ["N", "H", "W", contract.channels]
    return _model(nodes, shape, [numpy_helper.from_array(size, "size")], TensorProto.UINT8)


def _model(nodes: list[Any], shape: list[Any], constants: list[Any], kind: int) -> bytes:
    from onnx import helper

    graph = helper.make_graph(
        nodes,
        "resize",
        [helper.make_tensor_value_info("image", kind, shape)],
        [helper.make_tensor_value_info("pixels", kind, ["N", "h", "w", shape[-1]])],
        constants,
    )
    opset = [helper.make_opsetid("", 18)]
    return helper.make_model(graph, opset_imports=opset, ir_version=8).SerializeToString()
