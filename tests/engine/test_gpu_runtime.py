"""The CUDA runtime through either library, and what is said where there is no GPU."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
from fakes import FakeCuda

from cnnedge.backends import gpu as backend
from cnnedge.backends.gpu import CudaError, Gpu, find_gpu, open_gpu
from cnnedge.errors import BackendError


def on(monkeypatch, cuda):
    monkeypatch.setattr(backend, "_find_runtime", lambda: cuda)


def test_a_gpu_is_described(monkeypatch):
    on(monkeypatch, FakeCuda(capability=(12, 0), driver=12080))
    facts = open_gpu().facts
    assert (facts.name, facts.compute_capability, facts.driver) == ("Fake RTX", "12.0", "12.8")
    assert (facts.memory_gib, facts.memory_free_gib) == (8.0, 6.0)
    assert find_gpu() == (facts, "Fake RTX, compute capability 12.0")


def test_no_driver_an_old_driver_no_device_are_told_apart(monkeypatch):
    on(monkeypatch, FakeCuda(driver=0))
    assert find_gpu() == (None, "this machine has no NVIDIA driver, hence no GPU to run on")
    on(monkeypatch, FakeCuda(devices=0))
    assert find_gpu() == (None, "this machine has no NVIDIA GPU")
    old = FakeCuda(driver=12040)

    def refuse():
        raise CudaError(35, "getDeviceCount", "insufficient driver")

    old.getDeviceCount = refuse
    on(monkeypatch, old)
    with pytest.raises(BackendError) as caught:
        open_gpu()
    assert "driver is too old: it supports CUDA 12.4" in str(caught.value)
    assert "needs 13.0; update the driver" in str(caught.value)


def test_neither_library_is_said(monkeypatch):
    def missing():
        raise ImportError("cuda")

    monkeypatch.setattr(backend, "_CudaPython", missing)
    monkeypatch.setattr(backend, "_Cupy", missing)
    with pytest.raises(BackendError, match=r"neither is installed; run: pip install cuda-bindings"):
        open_gpu()


def test_memory_goes_there_and_back():
    cuda = FakeCuda()
    gpu = Gpu(cuda)
    stream, address = gpu.stream(), gpu.allocate(24)
    there, back = gpu.pinned((2, 3), np.float32), gpu.pinned((2, 3), np.float32)
    there[:] = np.arange(6).reshape(2, 3)
    back[:] = 0
    gpu.copy_in(address, there, stream)
    gpu.copy_out(back, address, stream)
    assert not back.any()  # nothing has run yet
    gpu.synchronize(stream)
    np.testing.assert_array_equal(back, there)
    gpu.release_pinned(there)
    gpu.release_pinned(back)
    gpu.release(address)
    assert not cuda.memory


@pytest.mark.system
class TestCudaPython:
    """cuda-bindings returns (error, results…), handles as objects, and wants enumerations."""

    @pytest.fixture
    def calls(self, monkeypatch):
        pytest.importorskip("cuda.bindings.runtime", reason="cuda-bindings is not installed")
        return backend._CudaPython()

    def stub(self, calls, monkeypatch, name, returns):
        taken = []

        def call(*arguments):
            taken.append(arguments)
            return returns

        monkeypatch.setattr(calls._runtime, name, call)
        return taken

    def test_results(self, calls, monkeypatch):
        success = calls._runtime.cudaError_t.cudaSuccess
        for returns, expected in (
            ((success,), None),
            ((success, 7), 7),
            ((success, 0.25), 0.25),  # a time, which must not become an integer
            ((success, calls._runtime.cudaStream_t(77)), 77),
            ((success, 6, 8), (6, 8)),
        ):
            self.stub(calls, monkeypatch, "cudaEventElapsedTime", returns)
            assert calls.call("eventElapsedTime", 1, 2) == expected

    def test_enumerations(self, calls, monkeypatch):
        taken = self.stub(
            calls, monkeypatch, "cudaMemcpyAsync", (calls._runtime.cudaError_t.cudaSuccess,)
        )
        calls.call("memcpyAsync", 1, 2, 3, 1, 5)
        kind = calls._runtime.cudaMemcpyKind.cudaMemcpyHostToDevice
        assert taken == [(1, 2, 3, kind, 5)]

    def test_errors(self, calls, monkeypatch):
        error = calls._runtime.cudaError_t.cudaErrorMemoryAllocation
        self.stub(calls, monkeypatch, "cudaMalloc", (error, None))
        with pytest.raises(CudaError, match=r"refused malloc: cudaErrorMemoryAllocation \(2\)"):
            calls.call("malloc", 1 << 60)

    def test_every_call_exists(self, calls):
        """Every operation of `Gpu` reaches the library with arguments that it takes.

        Without a driver each is refused by CUDA itself (35), not by the bindings.
        """
        if find_gpu()[0] is not None:
            pytest.skip("there is a GPU here: test_gpu.py runs them for real")
        gpu = Gpu.__new__(Gpu)
        gpu._runtime, gpu._device = calls, 0
        array = np.zeros(4, np.uint8)
        for operation in (
            *(gpu.activate, gpu.stream, gpu.event, gpu._read_facts),
            *(lambda: gpu.allocate(8), lambda: gpu.release(0), lambda: gpu.pinned((1,), "u1")),
            *(lambda: gpu.copy_in(0, array, 0), lambda: gpu.copy_out(array, 0, 0)),
            *(lambda: gpu.synchronize(0), lambda: gpu.record(0, 0), lambda: gpu.begin_capture(0)),
            *(lambda: gpu.seconds_between(0, 0), lambda: gpu.end_capture(0)),
            *(lambda: gpu.launch(0, 0), lambda: gpu.release_graph(0), lambda: gpu.release_event(0)),
            *(lambda: gpu.release_stream(0), lambda: gpu.release_pinned(array)),
            *(lambda: calls.call("graphInstantiate", 0, 0), lambda: calls.call("graphDestroy", 0)),
        ):
            with pytest.raises(CudaError) as caught:
                operation()
            assert caught.value.code == 35


def test_cupy_is_called_in_its_own_way():
    """CuPy returns plain results, raises its own error, and takes fewer arguments in two calls."""
    taken = []

    class RefusedError(RuntimeError):
        status = 2

    def refuse(size):
        raise RefusedError("cudaErrorMemoryAllocation: out of memory")

    calls = backend._Cupy.__new__(backend._Cupy)
    calls._error = RefusedError
    calls._runtime = SimpleNamespace(
        eventCreate=lambda *a: taken.append(("eventCreate", a)) or 7,
        graphInstantiate=lambda *a: taken.append(("graphInstantiate", a)) or 8,
        memGetInfo=lambda: (6, 8),
        malloc=refuse,
    )
    assert calls.call("eventCreate") == 7
    assert calls.call("graphInstantiate", 5, 0) == 8
    assert calls.call("memGetInfo") == (6, 8)
    assert taken == [("eventCreate", ()), ("graphInstantiate", (5,))]
    with pytest.raises(CudaError) as caught:
        calls.call("malloc", 1 << 60)
    assert caught.value.code == 2


@pytest.mark.system
def test_the_copy_kinds_are_cudas():
    runtime = pytest.importorskip("cuda.bindings.runtime", reason="cuda-bindings is not installed")
    kinds = runtime.cudaMemcpyKind
    assert int(kinds.cudaMemcpyHostToDevice) == backend._TO_DEVICE
    assert int(kinds.cudaMemcpyDeviceToHost) == backend._TO_HOST
    mode = runtime.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
    assert int(mode) == backend._THREAD_LOCAL
