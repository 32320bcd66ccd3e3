"""Memory, streams, events and graphs of an NVIDIA GPU, through whichever kept library is there.

`cuda-python` (the package ``cuda-bindings``) and CuPy wrap the same CUDA runtime calls; both are
used at that level, by pointer, so that TensorRT's buffers stay put and nothing is allocated in a
call. https://docs.nvidia.com/cuda/cuda-runtime-api/ describes each of them.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import numpy as np

from cnnedge.errors import BackendError, CnnEdgeError

_TO_DEVICE, _TO_HOST = 1, 2  # cudaMemcpyKind
_NON_BLOCKING = 1  # cudaStreamNonBlocking: does not wait for the default stream
_THREAD_LOCAL = 1  # cudaStreamCaptureModeThreadLocal: other threads' calls do not end the capture
_DEFAULT = 0
_NO_DEVICE, _INSUFFICIENT_DRIVER = 100, 35  # cudaError_t


@dataclass(frozen=True)
class GpuFacts:
    """A GPU by what a plan and a figure measured on it depend on.

    Attributes:
        name: Its model name.
        compute_capability: "8.9" and the like.
        driver: The CUDA version that its driver supports, "13.0" and the like.
        memory_gib: Its memory; on a Jetson it is shared with the CPU.
        memory_free_gib: What was free of it when this was read.
    """

    name: str
    compute_capability: str
    driver: str
    memory_gib: float
    memory_free_gib: float

    def to_dict(self) -> dict[str, Any]:
        """Return it as JSON-able data."""
        return asdict(self)


class CudaRuntime(Protocol):
    """The CUDA runtime calls that a session needs; pointers and handles are integers.

    Each raises `BackendError` where CUDA reports an error.
    """

    library: str

    def call(self, name: str, *arguments: Any) -> Any:
        """Call ``cuda<Name>`` and return its one result, its results as a tuple, or None."""


class _CudaPython:
    """The runtime calls through cuda-python."""

    def __init__(self) -> None:
        try:
            from cuda.bindings import runtime
        except ImportError:  # before 12.6 the module was elsewhere
            from cuda import cudart as runtime
        import importlib.metadata

        self._runtime = runtime
        self.library = f"cuda-bindings {importlib.metadata.version('cuda-bindings')}"

    def call(self, name: str, *arguments: Any) -> Any:
        arguments = self._typed(name, arguments)
        error, *results = getattr(self._runtime, f"cuda{name[0].upper()}{name[1:]}")(*arguments)
        if int(error) != 0:
            raise CudaError(int(error), name, f"{error.name} ({int(error)})")
        found = [
            r if isinstance(r, float) or not hasattr(r, "__int__") else int(r) for r in results
        ]
        return None if not found else found[0] if len(found) == 1 else tuple(found)

    def _typed(self, name: str, arguments: Sequence[Any]) -> tuple[Any, ...]:
        """Wrap the plain integers that these bindings want as enumerations."""
        kinds = {
            "memcpyAsync": (3, "cudaMemcpyKind"),
            "streamBeginCapture": (1, "cudaStreamCaptureMode"),
            "deviceGetAttribute": (0, "cudaDeviceAttr"),
        }
        typed = list(arguments)
        if name in kinds:
            at, enumeration = kinds[name]
            typed[at] = getattr(self._runtime, enumeration)(typed[at])
        return tuple(typed)


class _Cupy:
    """The runtime calls through CuPy."""

    def __init__(self) -> None:
        import cupy
        from cupy.cuda import runtime

        self._runtime, self._error = runtime, runtime.CUDARuntimeError
        self.library = f"cupy {cupy.__version__}"

    def call(self, name: str, *arguments: Any) -> Any:
        if name == "eventCreate":
            arguments = ()
        elif name == "graphInstantiate":
            arguments = arguments[:1]
        try:
            return getattr(self._runtime, name)(*arguments)
        except self._error as error:
            raise CudaError(int(error.status), name, str(error)) from error


class CudaError(BackendError):
    """A CUDA runtime call failed.

    Attributes:
        code: The ``cudaError_t``.
    """

    def __init__(self, code: int, call: str, text: str) -> None:
        self.code = code
        super().__init__(f"CUDA refused {call}: {text}", fix="see `cnnedge doctor`")


class Gpu:
    """One GPU: what it is, and the few operations that running a plan takes.

    Attributes:
        facts: What it is.
        library: The library that its calls go through, with its version.
    """

    def __init__(self, runtime: CudaRuntime, device: int = 0) -> None:
        self._runtime = runtime
        self._device = device
        self.library = runtime.library
        self.activate()
        self.facts = self._read_facts()

    def activate(self) -> None:
        """Make this GPU the current one of the calling thread."""
        self._runtime.call("setDevice", self._device)

    def _read_facts(self) -> GpuFacts:
        properties = self._runtime.call("getDeviceProperties", self._device)
        get = properties.get if isinstance(properties, dict) else lambda k: getattr(properties, k)
        name = get("name")
        free, total = self._runtime.call("memGetInfo")
        return GpuFacts(
            name=name.decode() if isinstance(name, bytes) else str(name),
            compute_capability=f"{get('major')}.{get('minor')}",
            driver=_version(self._runtime.call("driverGetVersion")),
            memory_gib=round(total / 2**30, 2),
            memory_free_gib=round(free / 2**30, 2),
        )

    def allocate(self, nbytes: int) -> int:
        """Return the address of so many bytes of the GPU's memory."""
        return self._runtime.call("malloc", nbytes)

    def release(self, address: int) -> None:
        """Give memory of `allocate` back."""
        self._runtime.call("free", address)

    def pinned(self, shape: Sequence[int], dtype: Any) -> np.ndarray:
        """Return an array in page-locked memory of the host, which copies overlap with.

        It stays until `release_pinned`.
        """
        dtype = np.dtype(dtype)
        nbytes = int(np.prod(shape)) * dtype.itemsize
        address = self._runtime.call("hostAlloc", nbytes, _DEFAULT)
        # A view of memory that CUDA owns: ctypes here names an address, it allocates nothing.
        view = (ctypes.c_uint8 * nbytes).from_address(address)
        return np.frombuffer(view, dtype).reshape(tuple(shape))

    def release_pinned(self, array: np.ndarray) -> None:
        """Give an array of `pinned` back; it must not be touched afterwards."""
        self._runtime.call("freeHost", array.ctypes.data)

    def stream(self) -> int:
        """Return a new stream, which does not wait for the default one."""
        return self._runtime.call("streamCreateWithFlags", _NON_BLOCKING)

    def release_stream(self, stream: int) -> None:
        """Destroy a stream."""
        self._runtime.call("streamDestroy", stream)

    def synchronize(self, stream: int) -> None:
        """Wait until everything enqueued on a stream is done."""
        self._runtime.call("streamSynchronize", stream)

    def copy_in(self, address: int, array: np.ndarray, stream: int) -> None:
        """Enqueue a copy of a contiguous array to the GPU."""
        pointer = array.ctypes.data
        self._runtime.call("memcpyAsync", address, pointer, array.nbytes, _TO_DEVICE, stream)

    def copy_out(self, array: np.ndarray, address: int, stream: int) -> None:
        """Enqueue a copy from the GPU into a contiguous array."""
        pointer = array.ctypes.data
        self._runtime.call("memcpyAsync", pointer, address, array.nbytes, _TO_HOST, stream)

    def event(self) -> int:
        """Return a new event."""
        return self._runtime.call("eventCreate")

    def record(self, event: int, stream: int) -> None:
        """Enqueue the recording of an event."""
        self._runtime.call("eventRecord", event, stream)

    def seconds_between(self, start: int, end: int) -> float:
        """Return the time between two recorded events; it is known once the stream is done."""
        return self._runtime.call("eventElapsedTime", start, end) / 1e3

    def release_event(self, event: int) -> None:
        """Destroy an event."""
        self._runtime.call("eventDestroy", event)

    def begin_capture(self, stream: int) -> None:
        """Record what is enqueued on a stream from here on instead of running it."""
        self._runtime.call("streamBeginCapture", stream, _THREAD_LOCAL)

    def end_capture(self, stream: int) -> int:
        """Return what was recorded as an executable graph."""
        graph = self._runtime.call("streamEndCapture", stream)
        try:
            return self._runtime.call("graphInstantiate", graph, 0)
        finally:
            self._runtime.call("graphDestroy", graph)

    def launch(self, graph: int, stream: int) -> None:
        """Enqueue an executable graph."""
        self._runtime.call("graphLaunch", graph, stream)

    def release_graph(self, graph: int) -> None:
        """Destroy an executable graph."""
        self._runtime.call("graphExecDestroy", graph)


def open_gpu(device: int = 0) -> Gpu:
    """Return a GPU of this machine.

    Raises:
        BackendError: there is none, its driver is too old, or neither library is installed.
    """
    runtime = _find_runtime()
    try:
        count = runtime.call("getDeviceCount")
        if device >= count:
            raise CudaError(_NO_DEVICE, "getDeviceCount", f"{count} devices")
    except CudaError as error:
        raise _no_gpu(runtime, error) from error
    return Gpu(runtime, device)


def find_gpu() -> tuple[GpuFacts | None, str]:
    """Return what GPU there is; or None, and why not."""
    try:
        gpu = open_gpu()
    except CnnEdgeError as error:
        return None, error.what
    return gpu.facts, f"{gpu.facts.name}, compute capability {gpu.facts.compute_capability}"


def _find_runtime() -> CudaRuntime:
    for library in (_CudaPython, _Cupy):
        try:
            return library()
        except ImportError:
            continue
    raise BackendError(
        "the GPU's memory is managed through cuda-python or CuPy, and neither is installed",
        fix="run: pip install cuda-bindings",
    )


def _no_gpu(runtime: CudaRuntime, error: CudaError) -> BackendError:
    """Tell apart: no driver, one that is too old, no device."""
    driver = runtime.call("driverGetVersion")
    if driver == 0:
        return BackendError(
            "this machine has no NVIDIA driver, hence no GPU to run on",
            fix="install NVIDIA's driver, or run it on a machine that has a GPU",
        )
    if error.code == _INSUFFICIENT_DRIVER:
        needed = _version(runtime.call("runtimeGetVersion"))
        return BackendError(
            f"the NVIDIA driver is too old: it supports CUDA {_version(driver)}, and "
            f"{runtime.library} needs {needed}",
            fix="update the driver, or install packages for the older CUDA",
        )
    if error.code == _NO_DEVICE:
        return BackendError(
            "this machine has no NVIDIA GPU", fix="run it on a machine that has one"
        )
    return error


def _version(number: int) -> str:
    """Return CUDA's version number, 1000 * major + 10 * minor, as people write it."""
    return f"{number // 1000}.{number % 1000 // 10}"
