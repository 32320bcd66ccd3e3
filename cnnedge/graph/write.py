"""Write an ONNX file with its weights streamed, one tensor in memory at a time.

Protobuf's own serializer holds the weights twice more; a network with 550 MB of them does not
need to. The file is the same: https://protobuf.dev/programming-guides/encoding/ lets a message's
fields come in any order, so the weights follow the rest of the graph.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from cnnedge.errors import ModelError
from cnnedge.files import atomic_path
from cnnedge.graph.edit import stored

if TYPE_CHECKING:
    import onnx_ir as ir

_MODEL_GRAPH = 7  # ModelProto.graph
_MODEL_METADATA = 14  # ModelProto.metadata_props
_ENTRY_KEY, _ENTRY_VALUE = 1, 2  # of StringStringEntryProto
_GRAPH_INITIALIZER = 5  # GraphProto.initializer
_TENSOR_RAW_DATA = 9  # TensorProto.raw_data
_LENGTH_DELIMITED = 2
_STREAMED = 4096  # bytes; smaller tensors go with the rest of the graph
PROTOBUF_LIMIT = 2**31 - 1


def write_onnx(model: ir.Model, path: Path | str) -> None:
    """Write an ``onnx_ir.Model`` to one ONNX file, whole or not at all.

    Raises:
        ModelError: the weights exceed protobuf's 2 GiB.
        CnnEdgeError: the file cannot be written.
    """
    parts = list(_parts(model))
    length = sum(part.nbytes for part in parts)
    if length > PROTOBUF_LIMIT:
        raise ModelError(
            f"{path} would take {length / 2**30:.1f} GiB, and one ONNX file holds 2 GiB",
            fix="compress the model first",
        )
    with atomic_path(Path(path)) as temporary, open(temporary, "wb") as file:
        for part in parts:
            file.write(part.read())


def serialize(model: ir.Model) -> bytes:
    """Return the bytes that `write_onnx` would write."""
    return b"".join(part.read() for part in _parts(model))


def metadata_bytes(entries: Mapping[str, str]) -> bytes:
    """Return ``metadata_props`` entries as bytes to append to an ONNX file.

    A repeated field's items may stand anywhere in a message, so what was there stays as it is.
    """
    written = bytearray()
    for key, value in entries.items():
        texts = ((_ENTRY_KEY, key.encode()), (_ENTRY_VALUE, value.encode()))
        entry = b"".join(_tag(field, len(text)) + text for field, text in texts)
        written += _tag(_MODEL_METADATA, len(entry)) + entry
    return bytes(written)


@dataclass(frozen=True)
class _Part:
    """A piece of the file: bytes at hand, or a weight to be read when its turn comes."""

    source: bytes | ir.TensorProtocol

    @property
    def nbytes(self) -> int:
        return len(self.source) if isinstance(self.source, bytes) else self.source.nbytes

    def read(self) -> bytes | memoryview:
        if isinstance(self.source, bytes):
            return self.source
        return np.ascontiguousarray(self.source.numpy()).reshape(-1).view(np.uint8).data


def _parts(model: ir.Model) -> Iterator[_Part]:
    import onnx
    import onnx_ir as ir

    with _large_set_aside(model) as large:
        proto = ir.to_proto(model)
    graph = [_Part(proto.graph.SerializeToString())]
    proto.ClearField("graph")
    for value in large:
        tensor = stored(value)
        header = onnx.TensorProto(
            dims=tensor.shape.numpy(), data_type=int(tensor.dtype), name=value.name
        ).SerializeToString() + _tag(_TENSOR_RAW_DATA, tensor.nbytes)
        graph.append(_Part(_tag(_GRAPH_INITIALIZER, len(header) + tensor.nbytes) + header))
        graph.append(_Part(tensor))
    yield _Part(proto.SerializeToString())
    yield _Part(_tag(_MODEL_GRAPH, sum(part.nbytes for part in graph)))
    yield from graph


@contextmanager
def _large_set_aside(model: ir.Model) -> Iterator[list[ir.Value]]:
    """Take the large initializers out of the graph while the rest is serialized."""
    initializers = model.graph.initializers
    large = {name: v for name, v in initializers.items() if stored(v).nbytes > _STREAMED}
    for name in large:
        del initializers[name]
    try:
        yield list(large.values())
    finally:
        initializers.update(large)


def _tag(field: int, length: int) -> bytes:
    """Return the key and the length that stand before a length-delimited field."""
    return _varint(field << 3 | _LENGTH_DELIMITED) + _varint(length)


def _varint(number: int) -> bytes:
    out = bytearray()
    while number > 0x7F:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    out.append(number)
    return bytes(out)
