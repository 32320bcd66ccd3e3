"""Stand-ins for a GPU and for the TensorRT libraries, as strict as what they stand in for.

The fake libraries have exactly the names that were recorded from the real Python bindings
(`surfaces/`): to use one that a release lacks raises AttributeError, as it would there. The fake
GPU keeps its streams lazy: what is enqueued runs when the stream is waited for, so a forgotten wait
reads old memory; and it counts what is allocated, so a leak or an allocation in a call shows.
"""

from __future__ import annotations

import ctypes
import enum
import hashlib
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np

from cnnedge.backends.gpu import CudaError, Gpu

SURFACES = Path(__file__).parent / "surfaces"
NAMES = ("tensorrt-10.3", "tensorrt-11.4", "rtx-1.7")


class FakeCuda:
    """The CUDA runtime calls on the host's memory, with lazy streams."""

    library = "fake-cuda 1.0"

    def __init__(self, *, capability=(8, 9), devices=1, driver=13000, capture_fails=False):
        self.capability, self.devices, self.driver = capability, devices, driver
        self.capture_fails = capture_fails
        self.memory: dict[int, object] = {}
        self.allocations = 0
        self.pending: dict[int, list] = {}
        self.capturing: dict[int, list] = {}
        self.graphs: dict[int, list] = {}
        self.events: dict[int, float] = {}
        self.clock = 0.0
        self.launches = 0
        self.handle = 100

    def call(self, name, *arguments):
        return getattr(self, name)(*arguments)

    def _new(self):
        self.handle += 1
        return self.handle

    def _enqueue(self, stream, operation):
        assert stream in self.pending, "no such stream"
        queue = self.capturing.get(stream, self.pending[stream])
        queue.append(operation)

    def getDeviceCount(self):  # noqa: N802
        if self.driver == 0:
            raise CudaError(35, "getDeviceCount", "insufficient driver")
        return self.devices

    def driverGetVersion(self):  # noqa: N802
        return self.driver

    def runtimeGetVersion(self):  # noqa: N802
        return 13000

    def setDevice(self, device):  # noqa: N802
        assert device < self.devices

    def getDeviceProperties(self, device):  # noqa: N802
        major, minor = self.capability
        return {"name": b"Fake RTX", "major": major, "minor": minor}

    def memGetInfo(self):  # noqa: N802
        return 6 * 2**30, 8 * 2**30

    def malloc(self, size):
        block = (ctypes.c_uint8 * size)()
        address = ctypes.addressof(block)
        self.memory[address] = block
        self.allocations += 1
        return address

    def free(self, address):
        del self.memory[address]

    def hostAlloc(self, size, flags):  # noqa: N802
        return self.malloc(size)

    def freeHost(self, address):  # noqa: N802
        del self.memory[address]

    def streamCreateWithFlags(self, flags):  # noqa: N802
        assert flags == 1, "a stream that waits for the default one"
        stream = self._new()
        self.pending[stream] = []
        return stream

    def streamDestroy(self, stream):  # noqa: N802
        del self.pending[stream]

    def streamSynchronize(self, stream):  # noqa: N802
        assert stream not in self.capturing, "a wait inside a capture"
        operations, self.pending[stream] = self.pending[stream], []
        for operation in operations:
            operation()

    def memcpyAsync(self, target, source, size, kind, stream):  # noqa: N802
        assert kind in (1, 2)

        def copy():
            ctypes.memmove(target, source, size)
            self.clock += 2.0 if kind == 1 else 1.0

        self._enqueue(stream, copy)

    def eventCreate(self):  # noqa: N802
        event = self._new()
        self.events[event] = float("nan")
        return event

    def eventDestroy(self, event):  # noqa: N802
        del self.events[event]

    def eventRecord(self, event, stream):  # noqa: N802
        self._enqueue(stream, lambda: self.events.__setitem__(event, self.clock))

    def eventElapsedTime(self, start, end):  # noqa: N802
        return self.events[end] - self.events[start]

    def streamBeginCapture(self, stream, mode):  # noqa: N802
        assert not self.pending[stream], "a capture beside work in flight"
        self.capturing[stream] = []

    def streamEndCapture(self, stream):  # noqa: N802
        operations = self.capturing.pop(stream)
        if self.capture_fails:
            raise CudaError(901, "streamEndCapture", "operation not permitted")
        graph = self._new()
        self.graphs[graph] = operations
        return graph

    def graphInstantiate(self, graph, flags):  # noqa: N802
        executable = self._new()
        self.graphs[executable] = list(self.graphs[graph])
        return executable

    def graphDestroy(self, graph):  # noqa: N802
        del self.graphs[graph]

    def graphExecDestroy(self, graph):  # noqa: N802
        del self.graphs[graph]

    def graphLaunch(self, graph, stream):  # noqa: N802
        self.launches += 1
        for operation in self.graphs[graph]:
            self._enqueue(stream, operation)


def fake_gpu(**options) -> tuple[Gpu, FakeCuda]:
    """Return a GPU and the runtime under it."""
    runtime = FakeCuda(**options)
    return Gpu(runtime), runtime


def fake_module(surface: str, cuda: FakeCuda | None, **behaviour):
    """Return a TensorRT module with the recorded names, which runs ONNX models on the CPU.

    Args:
        surface: One of `NAMES`.
        cuda: The GPU that it enqueues on; None: the machine has none.
        behaviour: `version`, to be another release; `validity`, a name and diagnostic bits;
            `contexts`, False: no context can be made; `runs`, False: none runs; `build_error`, what
            a build logs and fails with; `description`, the JSON of the engine inspector.
    """
    recorded = json.loads((SURFACES / f"{surface}.json").read_text())
    names = recorded["names"]
    module = SimpleNamespace(__version__=behaviour.get("version", recorded["version"]))
    module.calls = []
    for name, members in names.items():
        if isinstance(members, dict):
            setattr(module, name, enum.IntEnum(name, members))
    severity = enum.Enum(
        "Severity", {"INTERNAL_ERROR": 0, "ERROR": 1, "WARNING": 2, "INFO": 3, "VERBOSE": 4}
    )

    def strict(cls):
        """Take away what the recorded class lacks, and refuse to set it."""
        known = set(names.get(cls.__name__, ()))
        for name in [n for n in vars(cls) if not n.startswith("_") and n not in known]:
            delattr(cls, name)

        def set_known(self, name, value):
            if not name.startswith("_") and name not in known:
                raise AttributeError(f"{cls.__name__} of {surface} has no attribute {name!r}")
            object.__setattr__(self, name, value)

        cls.__setattr__ = set_known
        setattr(module, cls.__name__, cls)
        return cls

    module.nptype = lambda dtype: {"UINT8": np.uint8, "FLOAT": np.float32}[dtype.name]

    @strict
    class ILogger:
        Severity = severity

        def __init__(self):
            pass

        def log(self, severity, text):
            raise NotImplementedError

    @strict
    class ITimingCache:
        def __init__(self, content):
            self._content = content

        def serialize(self):
            return self._content + b"+timed"

    class Config:
        def __init__(self):
            self._flags = {module.BuilderFlag.TF32}
            self._pools, self._profiles, self._targets, self._cache = {}, [], {}, None

        def set_flag(self, flag):
            self._flags.add(module.BuilderFlag(flag))

        def clear_flag(self, flag):
            self._flags.discard(module.BuilderFlag(flag))

        def set_memory_pool_limit(self, pool, size):
            self._pools[module.MemoryPoolType(pool).name] = size

        def add_optimization_profile(self, profile):
            self._profiles.append(profile._shapes)
            return len(self._profiles) - 1

        def create_timing_cache(self, content):
            return ITimingCache(bytes(content))

        def set_timing_cache(self, cache, ignore_mismatch):
            assert ignore_mismatch is False
            self._cache = cache
            return True

        def set_compute_capability(self, capability, index):
            self._targets[index] = module.ComputeCapability(capability).name
            return True

    Config.__name__ = "IBuilderConfig"
    strict(Config)

    @strict
    class IOptimizationProfile:
        def set_shape(self, name, smallest, typical, largest):
            self._shapes = (smallest, typical, largest)

    @strict
    class INetworkDefinition:
        def get_input(self, index):
            return SimpleNamespace(name="image", shape=(-1, *self._size))

    @strict
    class OnnxParser:
        def __init__(self, network, logger):
            self._network, self._flags = network, set()
            self._errors = []

        @property
        def num_errors(self):
            return len(self._errors)

        def get_error(self, index):
            return self._errors[index]

        def set_flag(self, flag):
            self._flags.add(module.OnnxParserFlag(flag).name)

        def parse_from_file(self, path):
            import onnxruntime as ort

            content = Path(path).read_bytes()
            shape = ort.InferenceSession(content).get_inputs()[0].shape
            self._network._size, self._network._onnx = tuple(shape[1:]), content
            self._network._parser_flags = self._flags
            return True

    @strict
    class Builder:
        def __init__(self, logger):
            if cuda is None and not hasattr(module, "ComputeCapability"):
                logger.log(severity.ERROR, "CUDA initialization failure with error: 35")
                raise TypeError("pybind11::init(): factory function returned nullptr")
            self._logger = logger

        def create_network(self, flags):
            network = INetworkDefinition()
            network._flags = flags
            return network

        def create_builder_config(self):
            return Config()

        def create_optimization_profile(self):
            return IOptimizationProfile()

        def build_serialized_network(self, network, config):
            if "build_error" in behaviour:
                self._logger.log(severity.ERROR, behaviour["build_error"])
                return None
            module.calls.append(("build", network, config))
            module.onnx = network._onnx
            head = {
                "onnx": hashlib.sha256(network._onnx).hexdigest(),
                "flags": sorted(flag.name for flag in config._flags),
                "profiles": config._profiles,
                "stripped": module.BuilderFlag.STRIP_PLAN in config._flags,
            }
            return json.dumps(head).encode() + b"\0" + network._onnx

    @strict
    class IRuntimeCache:
        def __init__(self):
            self._loaded = b""

        def deserialize(self, blob):
            self._loaded = bytes(blob)
            module.calls.append(("kernels", self._loaded))
            return self._loaded == b"kernels"

        def serialize(self):
            return b"kernels"

    @strict
    class IRuntimeConfig:
        def create_runtime_cache(self):
            return IRuntimeCache()

        def set_runtime_cache(self, cache):
            self._cache = cache
            return True

    @strict
    class IExecutionContext:
        def __init__(self, engine, settings=None):
            self._engine, self._settings = engine, settings
            self._shape = self._profile = self._index = None
            self._addresses: dict[str, int] = {}

        def set_optimization_profile_async(self, index, stream):
            self._profile, self._index = self._engine._head["profiles"][index], index
            self._shape = None
            return True

        def set_tensor_address(self, name, address):
            self._addresses[name] = address
            return True

        def set_input_shape(self, name, shape):
            smallest, _, largest = self._profile
            if not smallest[0] <= shape[0] <= largest[0]:
                return False
            self._shape = tuple(shape)
            return True

        def execute_async_v3(self, stream):
            if behaviour.get("runs") is False:
                return False
            module.calls.append(("execute", self._shape, self._settings))
            shape, addresses = self._shape, dict(self._addresses)
            engine = self._engine

            def run():
                size = int(np.prod(shape))
                view = (ctypes.c_uint8 * size).from_address(addresses["image"])
                (answers,) = engine._session().run(
                    None, {"image": np.frombuffer(view, np.uint8).reshape(shape)}
                )
                answers = np.ascontiguousarray(answers, np.float32)
                ctypes.memmove(addresses["probabilities"], answers.ctypes.data, answers.nbytes)
                cuda.clock += 5.0

            cuda._enqueue(stream, run)
            return True

    @strict
    class EngineInspector:
        """Tells types and formats for the profile that its context is set to, and no others'."""

        def __init__(self, engine):
            self.execution_context = None

        def get_engine_information(self, form):
            assert form.name == "JSON"
            document = json.loads(behaviour.get("description", '{"Layers": []}'))
            context, shown = self.execution_context, None
            if context is not None and context._shape is not None:
                shown = context._index
            for layer in document.get("Layers", ()):
                if isinstance(layer, dict) and f" [profile {shown}]" not in layer["Name"]:
                    if shown == 0 and " [profile " not in layer["Name"]:
                        continue
                    for tensor in (*layer.get("Inputs", ()), *layer.get("Outputs", ())):
                        for key in {"Format/Datatype", "Datatype"} & set(tensor):
                            tensor[key] = "N/A due to dynamic shapes"
            return json.dumps(document)

    @strict
    class ICudaEngine:
        def __init__(self, head, onnx):
            self._head, self._onnx, self._opened = head, onnx, None

        def _session(self):
            import onnxruntime as ort

            assert self._onnx, "a stripped engine ran before its weights were put back"
            if self._opened is None:
                self._opened = ort.InferenceSession(self._onnx)
            return self._opened

        @property
        def num_io_tensors(self):
            return 2

        def get_tensor_name(self, index):
            return ("image", "probabilities")[index]

        def get_tensor_mode(self, name):
            return module.TensorIOMode.INPUT if name == "image" else module.TensorIOMode.OUTPUT

        def get_tensor_dtype(self, name):
            return module.DataType.UINT8 if name == "image" else module.DataType.FLOAT

        def get_tensor_shape(self, name):
            size = self._head["profiles"][0][0][1:]
            return (-1, *size) if name == "image" else (-1, self._head.get("classes", 10))

        def create_engine_inspector(self):
            return EngineInspector(self)

        def get_engine_stat(self, stat):
            return 12345

        def create_runtime_config(self):
            return IRuntimeConfig()

        def create_execution_context(self, settings=None):
            if behaviour.get("contexts") is False:
                return None
            return IExecutionContext(self, settings)

    @strict
    class Refitter:
        def __init__(self, engine, logger):
            self._engine, self._new = engine, None

        def refit_cuda_engine(self):
            self._engine._onnx = self._new
            return True

    @strict
    class OnnxParserRefitter:
        def __init__(self, refitter, logger):
            self._refitter, self._logger = refitter, logger

        def refit_from_bytes(self, onnx):
            if hashlib.sha256(onnx).hexdigest() != self._refitter._engine._head["onnx"]:
                self._logger.log(severity.ERROR, "weights do not match")
                return False
            self._refitter._new = bytes(onnx)
            return True

    @strict
    class Runtime:
        def __init__(self, logger):
            self._logger = logger

        def get_engine_validity(self, plan):
            name, bits = behaviour.get("validity", ("VALID", 0))
            return module.EngineValidity[name], bits

        def deserialize_cuda_engine(self, plan):
            module.calls.append(("deserialize", getattr(self, "engine_host_code_allowed", False)))
            head, _, onnx = bytes(plan).partition(b"\0")
            try:
                described = json.loads(head)
            except ValueError:
                self._logger.log(severity.ERROR, "Serialization assertion failed.")
                return None
            return ICudaEngine(described, b"" if described["stripped"] else onnx)

    for name in list(vars(module)):
        if name[0].isupper() and name not in names:
            delattr(module, name)
    return module


def inspector_json(path, *, release=10):
    """Describe an engine that has every layer of a graph as its graph asks, Relus fused.

    In TensorRT 10's words, which differ between convolutions and gemm (the README of
    samples/sampleEditableTimingCache in release/10.13), or in TensorRT 11's.
    """
    import onnx_ir as ir

    from cnnedge.graph.precision import weighted_layers

    model = ir.load(path)
    relus = {
        node.inputs[0].producer().name: node.name for node in model.graph if node.op_type == "Relu"
    }
    kinds = {node.name: node.op_type for node in model.graph}
    words = {"float32": "FP32", "float16": "FP16", "int8": "Int8"}
    bare = {"float32": "Float", "float16": "Half", "int8": "Int8"}

    def tensor(name, dtype, *, gemm, size=None):
        told = bare[dtype] if gemm or release == 11 else f"linear {words[dtype]} format"
        key = "Datatype" if release == 11 else "Format/Datatype"
        return {"Name": name, key: told, "Dimensions": [-1] if size is None else [size]}

    def layer_of(layer, suffix):
        gemm = kinds[layer.name] != "Conv"
        weights = {
            "Weights": {"Type": bare[layer.stored], "Count": layer.weights},
        }
        if gemm:
            weights = {"Constants": [tensor("w", layer.stored, gemm=True, size=layer.weights)]}
        return {
            "Name": f"{layer.name}{suffix}",
            "LayerType": "gemm" if gemm else "CaskConvolution",
            "Inputs": [tensor(f"x{suffix}", layer.computed, gemm=gemm)],
            "Outputs": [],
            "Metadata": f"[ONNX Layer: {layer.name}][ONNX Layer: {relus.get(layer.name, '')}]",
        } | weights

    layers = [
        layer_of(layer, suffix)
        for suffix in ("", " [profile 1]")
        for layer in weighted_layers(model)
    ]
    return json.dumps({"Layers": layers, "Bindings": ["image", "probabilities"]})
