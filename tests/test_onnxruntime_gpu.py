"""ONNX Runtime's GPU providers: what they are told, and that they never fall back unseen."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnxruntime as ort
import pytest

import cnnedge
from cnnedge.backends import onnxruntime_gpu as backend
from cnnedge.backends.onnxruntime_gpu import GpuSession, GpuSettings, open_gpu_session
from cnnedge.errors import BackendError, MissingExtraError

SETTINGS = GpuSettings("fp16", (32, 32, 3), max_batch=16)


def test_what_cuda_is_told():
    told = backend.cuda_options(SETTINGS)
    assert (told["enable_cuda_graph"], told["use_tf32"]) == ("1", "0")
    assert backend.cuda_options(GpuSettings("fp16", (1, 1, 3), graphs=False)) != told


@pytest.mark.parametrize(
    ("precision", "half", "int8"), [("fp32", "0", "0"), ("fp16", "1", "0"), ("int8", "1", "1")]
)
def test_what_tensorrt_is_told(precision, half, int8, tmp_path):
    told = backend.tensorrt_options(
        GpuSettings(precision, (32, 48, 3), max_batch=16, cache=tmp_path)
    )
    assert (told["trt_fp16_enable"], told["trt_int8_enable"]) == (half, int8)
    assert told["trt_profile_min_shapes"] == "image:1x32x48x3"
    assert told["trt_profile_max_shapes"] == "image:16x32x48x3"
    assert told["trt_engine_cache_path"] == told["trt_timing_cache_path"] == str(tmp_path)
    assert "trt_engine_cache_path" not in backend.tensorrt_options(SETTINGS)


def test_what_rtx_is_told(tmp_path):
    told = backend.rtx_options(GpuSettings("int8", (32, 32, 3), cache=tmp_path))
    assert told["nv_profile_max_shapes"] == "image:8x32x32x3"
    assert told["nv_runtime_cache_path"] == str(tmp_path)


def test_options_are_ones_that_onnxruntime_documents():
    """Misspelt options of the plugin are ignored: its own header has their names."""
    pytest.importorskip("onnxruntime_ep_nv_tensorrt_rtx", reason="the plugin is not installed")
    import onnxruntime_ep_nv_tensorrt_rtx as plugin

    header = (Path(plugin.__file__).parent / "tensorrt_rtx_provider_options.h").read_text()
    for name in backend.rtx_options(GpuSettings("fp16", (1, 1, 3), cache=Path("x"))):
        assert f'"{name}"' in header


def test_int8_on_cuda_is_refused(toy_bundle):
    with pytest.raises(BackendError, match="no INT8 convolution"):
        cnnedge.load(toy_bundle.root, runtime="cuda", variant="int8-trt")


def test_a_build_without_the_provider_is_named(toy_bundle):
    if "CUDAExecutionProvider" in ort.get_available_providers():
        pytest.skip("this ONNX Runtime is built with CUDA")
    for runtime in ("cuda", "ort-tensorrt"):
        with pytest.raises(BackendError, match=r"is built without .*ExecutionProvider; run: pip"):
            cnnedge.load(toy_bundle.root, runtime=runtime)


def test_a_missing_plugin_is_named(toy_bundle, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "onnxruntime_ep_nv_tensorrt_rtx", None)
    with pytest.raises(MissingExtraError, match=r"cnnedge\[ort-rtx\]"):
        cnnedge.load(toy_bundle.root, runtime="ort-rtx")


@pytest.fixture
def on_cpu(toy_bundle):
    """A real session whose nodes ran on the CPU, with where they went recorded."""
    options = ort.SessionOptions()
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    return ort.InferenceSession(str(toy_bundle.path("model.fp16.onnx")), options)


def test_a_fall_back_is_an_error(on_cpu):
    with pytest.raises(BackendError, match="fell back to CPUExecutionProvider"):
        backend._refuse_elsewhere(on_cpu, "CUDAExecutionProvider", Path("m.onnx"))
    backend._refuse_elsewhere(on_cpu, "CPUExecutionProvider", Path("m.onnx"))


def test_a_node_that_ran_elsewhere_is_an_error(on_cpu):
    """The session says CUDA; its nodes say otherwise."""
    session = SimpleNamespace(
        get_providers=lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"],
        get_provider_graph_assignment_info=on_cpu.get_provider_graph_assignment_info,
    )
    with pytest.raises(BackendError) as caught:
        backend._refuse_elsewhere(session, "CUDAExecutionProvider", Path("m.onnx"))
    assert "leaves out" in str(caught.value)
    assert "(Cast) on the CPU" in str(caught.value)


def test_the_fall_back_is_switched_off(toy_bundle, monkeypatch):
    """Both of ONNX Runtime's: its own, and that of its Python wrapper."""
    seen = {}

    def session(path, options, **arguments):
        seen.update(arguments, options=options)
        raise RuntimeError("no CUDA here")

    monkeypatch.setattr(ort, "get_available_providers", lambda: ["CUDAExecutionProvider"])
    monkeypatch.setattr(ort, "InferenceSession", session)
    with pytest.raises(BackendError, match="no CUDA here"):
        open_gpu_session(toy_bundle.path("model.fp16.onnx"), "cuda", SETTINGS)
    assert seen["enable_fallback"] == 0
    entry = seen["options"].get_session_config_entry
    assert entry("session.disable_cpu_ep_fallback") == "1"
    assert seen["providers"][0][0] == "CUDAExecutionProvider"


def test_the_cause_is_taken_from_what_was_logged(toy_bundle, monkeypatch, capfd):
    def session(path, options, **arguments):
        import os

        os.write(2, b"Failed to load provider: libcudnn.so.9: cannot open shared object file\n")
        print("*** EP Error ***")
        raise RuntimeError("nodes are assigned to the default CPU EP")

    monkeypatch.setattr(ort, "get_available_providers", lambda: ["CUDAExecutionProvider"])
    monkeypatch.setattr(ort, "InferenceSession", session)
    with pytest.raises(BackendError, match=r"CUDAExecutionProvider: libcudnn\.so\.9 is not inst"):
        open_gpu_session(toy_bundle.path("model.fp16.onnx"), "cuda", SETTINGS)
    captured = capfd.readouterr()
    assert (captured.out, captured.err) == ("", "")  # one clear line, which is the exception's


@pytest.mark.parametrize(
    ("said", "cause"),
    [
        ("x: libcuda.so.1: cannot open shared object file", "no NVIDIA driver"),
        ("CUDA failure 35: CUDA driver version is insufficient for CUDA", "driver version is ins"),
        ("CUDA failure 100: no CUDA-capable device is detected ; GPU=0", "no CUDA-capable device"),
    ],
)
def test_causes(said, cause):
    assert cause in backend._cause(said)
    assert backend._cause("something else") is None


class Bound:
    """A session as `GpuSession` uses it, with buffers that stay where they are."""

    def __init__(self, session):
        self.session, self.runs = session, []

    def get_inputs(self):
        return self.session.get_inputs()

    def get_outputs(self):
        return self.session.get_outputs()

    def io_binding(self):
        self.bound = {}
        return SimpleNamespace(
            bind_ortvalue_input=lambda name, value: self.bound.__setitem__("in", value),
            bind_ortvalue_output=lambda name, value: self.bound.__setitem__("out", value),
            values=self.bound,
        )

    def run(self, outputs, feed, options):
        return self.session.run(outputs, feed)

    def run_with_iobinding(self, binding, options):
        self.runs.append((binding.values["in"].data_ptr(), options))
        feed = {"image": binding.values["in"].numpy()}
        binding.values["out"].update_inplace(self.session.run(None, feed)[0])


def test_buffers_stay_and_answers_are_right(toy_bundle, monkeypatch, digits, digit_contract):
    make = ort.OrtValue.ortvalue_from_shape_and_type

    def on_host(shape, dtype, device, index):
        assert (device, index) == ("cuda", 0)
        return make(shape, dtype, "cpu", 0)

    monkeypatch.setattr(ort.OrtValue, "ortvalue_from_shape_and_type", staticmethod(on_host))
    plain = ort.InferenceSession(str(toy_bundle.path("model.fp32.onnx")))
    bound = Bound(plain)
    session = GpuSession(bound, "CUDAExecutionProvider", bound=True, graphs=True)
    images = np.stack([digits.test.tensor(i, digit_contract) for i in range(12)])
    for n in (1, 3, 1, 3, 1):
        found = session(images[:n])
        np.testing.assert_allclose(found, plain.run(None, {"image": images[:n]})[0], atol=1e-6)
    addresses = [address for address, _ in bound.runs]
    assert addresses[0] == addresses[2] == addresses[4]
    assert addresses[1] == addresses[3]
    for n in range(1, 13):
        session(images[:n])
    assert len(session._bindings) == 8
    with pytest.raises(BackendError, match="the model takes uint8 N×32×32×3, not float32 1×32"):
        session(images[:1].astype(np.float32))
