"""What a built engine consists of, read from the builder's log or from the engine inspector.

On a machine with a GPU the inspector describes an engine as JSON, whose fields changed between
TensorRT 10 and 11. Without one an engine cannot be loaded, but TensorRT-RTX's builder prints the
same description at the end of a build, one layer a line. Both become `EngineLayer`.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass, replace
from typing import Any

_LAYER = re.compile(
    r"^Name: (?P<name>.*?), LayerType: (?P<kind>\w+), "
    r"Inputs: \[(?P<inputs>.*?)\](?:, Constants: \[(?P<constants>.*?)\])?, "
    r"Outputs: \[(?P<outputs>.*?)\], TacticName: (?P<tactic>.*?), StreamId: .*?"
    r"(?:, Metadata: (?P<metadata>.*))?$"
)
_TENSOR = re.compile(
    r"\{ Name: (?P<name>.*?), Dimensions: \[(?P<dims>[-\d,]*)\].*?Datatype: (?P<dtype>\w+)"
)
_END = re.compile(r" \}(?:, |$)")
_ORIGIN = re.compile(r"\[ONNX Layer: (.*?)\]")
_PROFILE = re.compile(r"\[profile (\d+)\]")
_GRAPH = re.compile(r"_myl(\d+)(?:_|$)")
_IO = re.compile(
    r"^ Name: (?P<name>.*?), IOMode: (?P<mode>\w+), DataType: (?P<dtype>\w+), "
    r"Dimensions: \[(?P<dims>[-\d,]*)\]"
)
_DTYPES = {
    "float": "float32",
    "fp32": "float32",
    "half": "float16",
    "fp16": "float16",
    "bfloat16": "bfloat16",
    "bf16": "bfloat16",
    "int8": "int8",
    "uint8": "uint8",
    "int32": "int32",
    "int64": "int64",
    "int4": "int4",
    "fp8": "float8",
    "bool": "bool",
}
# TensorRT 10's inspector writes a type by itself ("Half", for gemm and generated kernels) or within
# a description of the format ("Channel major FP16 format where channel % 8 == 0").
_IN_WORDS = re.compile(rf"\b({'|'.join(_DTYPES)})\b", re.IGNORECASE)
UNKNOWN = "unknown"


@dataclass(frozen=True)
class EngineTensor:
    """A tensor of an engine: -1 stands for a dimension that is open; a type may be "unknown"."""

    name: str
    dims: tuple[int, ...]
    dtype: str

    @property
    def size(self) -> int:
        """How many values it has (of a constant; an open dimension counts as one)."""
        return math.prod(max(d, 1) for d in self.dims)


@dataclass(frozen=True)
class EngineLayer:
    """One kernel, or group of kernels, that an engine launches.

    Attributes:
        name: Its name.
        kind: What it is in the library's words: "correlation", "gemm", "kgen", "CaskConvolution" …
        profile: The optimisation profile it belongs to.
        inputs: What it reads; likewise ``outputs`` and the ``constants``, its weights.
        tactic: The kernel, where it is known.
        origins: The nodes of the ONNX graph that it computes, wholly or in part.
    """

    name: str
    kind: str
    profile: int
    inputs: tuple[EngineTensor, ...]
    constants: tuple[EngineTensor, ...]
    outputs: tuple[EngineTensor, ...]
    tactic: str
    origins: tuple[str, ...]


@dataclass(frozen=True)
class EngineDescription:
    """The layers of an engine, and its inputs and outputs as (tensor, "input" or "output")."""

    layers: tuple[EngineLayer, ...]
    tensors: tuple[tuple[EngineTensor, str], ...]


def read_log(text: str) -> EngineDescription:
    """Read the description that a verbose builder logs, which begins with ``Layers:``.

    Raises:
        ValueError: a layer's line is not as expected; the message has it.
    """
    layers, tensors = [], []
    lines = iter(text.splitlines()[1:])
    for line in lines:
        if not line.strip():
            break
        found = _LAYER.match(line)
        if found is None:
            raise ValueError(f"cannot read the engine's layer {line[:400]!r}")
        layers.append(_layer_of_log(found))
    for line in lines:
        io = _IO.match(line)
        if io is not None:
            tensor = EngineTensor(io["name"], _dims(io["dims"]), _dtype(io["dtype"]))
            tensors.append((tensor, io["mode"].lower()))
    return EngineDescription(_with_profiles(layers), tuple(tensors))


def read_inspector(text: str) -> EngineDescription:
    """Read the JSON of ``EngineInspector.get_engine_information``, of TensorRT 10 or 11.

    TensorRT 10 lists inputs and outputs by name alone; they are then taken from the engine.

    Raises:
        ValueError: it is not as expected.
    """
    document = json.loads(text)
    layers = []
    for layer in document["Layers"]:
        if not isinstance(layer, dict):
            raise ValueError("the engine was built without detailed profiling verbosity")
        layers.append(_layer_of_json(layer))
    tensors = tuple(
        (
            EngineTensor(io["Name"], tuple(io["Dimensions"]), _dtype(io["DataType"])),
            str(io["IOMode"]).lower(),
        )
        for io in document.get("I/O Tensors", ())
    )
    return EngineDescription(_with_profiles(layers), tensors)


def _layer_of_log(found: re.Match[str]) -> EngineLayer:
    name = found["name"]
    return EngineLayer(
        name=name,
        kind=found["kind"],
        profile=0,
        inputs=_tensors_of_log(found["inputs"]),
        constants=_tensors_of_log(found["constants"] or ""),
        outputs=_tensors_of_log(found["outputs"]),
        tactic=found["tactic"],
        origins=_origins(found["metadata"] or ""),
    )


def _tensors_of_log(text: str) -> tuple[EngineTensor, ...]:
    found = []
    for part in _END.split(text):
        tensor = _TENSOR.match(part.strip())
        if tensor is not None:
            found.append(
                EngineTensor(tensor["name"], _dims(tensor["dims"]), _dtype(tensor["dtype"]))
            )
    return tuple(found)


def _layer_of_json(layer: dict[str, Any]) -> EngineLayer:
    inputs = [_tensor_of_json(t) for t in layer.get("Inputs", ())]
    outputs = [_tensor_of_json(t) for t in layer.get("Outputs", ())]
    constants = [_tensor_of_json(t) for t in layer.get("Constants", ())]
    weights = layer.get("Weights")
    if isinstance(weights, dict) and weights.get("Count"):  # TensorRT's own convolutions
        size = (int(weights["Count"]),)
        constants.append(EngineTensor("weights", size, _dtype(weights["Type"])))
    name = str(layer["Name"])
    origins = _origins(str(layer.get("Metadata", "")))
    return EngineLayer(
        name=name,
        kind=str(layer.get("LayerType", "")),
        profile=0,
        inputs=tuple(inputs),
        constants=tuple(constants),
        outputs=tuple(outputs),
        tactic=str(layer.get("TacticName", "")),
        origins=origins or tuple(_PROFILE.sub("", name).strip().split(" + ")),
    )


def _tensor_of_json(tensor: dict[str, Any]) -> EngineTensor:
    described = next((tensor[key] for key in _TYPE_KEYS if tensor.get(key)), "")
    return EngineTensor(str(tensor["Name"]), tuple(tensor.get("Dimensions", ())), _dtype(described))


_TYPE_KEYS = ("Datatype", "DataType", "Format/Datatype")  # TensorRT 11, and 10


def _with_profiles(layers: list[EngineLayer]) -> tuple[EngineLayer, ...]:
    """Tell each layer's profile by the names in it; the first profile's mention none.

    A generated kernel need not mention one, but it bears the number of the graph it was generated
    from, and others of that graph do.
    """
    mentioned = [_mentioned(layer) for layer in layers]
    graphs = {
        _graph(layer): profile
        for layer, profile in zip(layers, mentioned, strict=True)
        if profile is not None
    }
    graphs.pop(None, None)
    return tuple(
        replace(layer, profile=graphs.get(_graph(layer), 0) if profile is None else profile)
        for layer, profile in zip(layers, mentioned, strict=True)
    )


def _mentioned(layer: EngineLayer) -> int | None:
    for name in (layer.name, *(t.name for t in (*layer.inputs, *layer.outputs))):
        found = _PROFILE.search(name)
        if found is not None:
            return int(found[1])
    return None


def _graph(layer: EngineLayer) -> str | None:
    found = _GRAPH.search(layer.name)
    return found[1] if found else None


def _origins(metadata: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(_ORIGIN.findall(metadata)))


def _dims(text: str) -> tuple[int, ...]:
    return tuple(int(d) for d in text.split(",") if d)


def _dtype(text: str) -> str:
    """Return the type that a description tells; what it does not tell is unknown, never a guess."""
    said = {_DTYPES[word.lower()] for word in _IN_WORDS.findall(str(text))}
    if len(said) == 1:
        return said.pop()
    return str(text).lower() if str(text).isalnum() else UNKNOWN
