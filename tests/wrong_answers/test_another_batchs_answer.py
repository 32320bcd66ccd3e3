"""A GPU's captured graph reads and writes the memory of its capture, whoever owns that now.

The stand-ins keep the addresses that each graph was captured with, as ONNX Runtime's providers do:
CUDA's a graph for each id (microsoft/onnxruntime pull request 10859), TensorRT's a single one
whatever the id (pull request 16081, issue 20050).
"""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import onnxruntime as ort
import pytest

from cnnedge.backends import onnxruntime_gpu as backend
from cnnedge.backends.onnxruntime_gpu import GpuSession, GpuSettings

SIZE = (2, 2, 3)


def answer(images):
    return images.reshape(len(images), -1).sum(axis=1, keepdims=True).astype(np.float32)


class Provider:
    """A session that answers the sum of an image's pixels, and replays what it captured."""

    def __init__(self, *, graphs=True, by_id=True):
        self.graphs, self.by_id, self.captured = graphs, by_id, {}

    def get_inputs(self):
        return [SimpleNamespace(name="image", type="tensor(uint8)", shape=["N", *SIZE])]

    def get_outputs(self):
        return [SimpleNamespace(name="probabilities", type="tensor(float)", shape=["N", 1])]

    def io_binding(self):
        bound = {}
        return SimpleNamespace(
            bound=bound,
            bind_ortvalue_input=lambda name, value: bound.__setitem__("in", value),
            bind_ortvalue_output=lambda name, value: bound.__setitem__("out", value),
        )

    def run_with_iobinding(self, binding, options):
        taken, given = binding.bound["in"], binding.bound["out"]
        name = options.get_run_config_entry("gpu_graph_id") if self.by_id else "the only one"
        if self.graphs and name != "-1":
            taken, given = self.captured.setdefault(name, (taken, given))
        given.update_inplace(answer(taken.numpy()))

    def run(self, outputs, feed, options=None):
        if self.graphs and self.by_id:
            told = options is not None and options.get_run_config_entry("gpu_graph_id")
            assert told == "-1", "a graph is captured of memory that goes with this call"
        assert self.by_id or not self.captured, "the one graph answers for every batch"
        return [answer(feed["image"])]


@pytest.fixture
def on_host(monkeypatch):
    make = ort.OrtValue.ortvalue_from_shape_and_type
    monkeypatch.setattr(
        ort.OrtValue,
        "ortvalue_from_shape_and_type",
        staticmethod(lambda shape, dtype, device, index: make(shape, dtype, "cpu", 0)),
    )


def images(count):
    return np.random.default_rng(count).integers(1, 256, (count, *SIZE), np.uint8)


@pytest.mark.parametrize("order", [[*range(1, 10), 1], [*range(1, 21)] * 3, [9, 1] * 20])
def test_a_batch_size_that_returns_is_answered_from_its_own_memory(on_host, order):
    session = GpuSession(Provider(), "CUDAExecutionProvider", bound=True, graphs=True)
    for number, size in enumerate(order):
        batch = images(size) // (1 + number % 3)
        np.testing.assert_array_equal(session(batch), answer(batch), err_msg=f"batch of {size}")


def opened(max_batch):
    """Return a session of the TensorRT provider as `open_gpu_session` sets it up."""
    settings = GpuSettings("fp16", SIZE, max_batch=max_batch)
    graphs = backend.tensorrt_options(settings)["trt_cuda_graph_enable"] == "1"
    provider = Provider(graphs=graphs, by_id=False)
    return graphs, GpuSession(
        provider, "TensorrtExecutionProvider", bound=True, graphs=False, largest=max_batch
    )


@pytest.mark.parametrize("max_batch", [1, 2, 8])
def test_tensorrts_one_graph_serves_one_batch_size(on_host, max_batch):
    graphs, session = opened(max_batch)
    assert graphs == (max_batch == 1)
    for size in (1, 3, 8, 1, 20, 3):
        batch = images(size)
        np.testing.assert_array_equal(session(batch), answer(batch), err_msg=f"batch of {size}")


def test_sessions_are_opened_so(toy_bundle, monkeypatch):
    """What `open_gpu_session` makes of a provider: its graphs, and how large its batches are."""
    made = {}
    provider = SimpleNamespace(
        get_providers=lambda: ["TensorrtExecutionProvider"],
        get_inputs=Provider().get_inputs,
        get_outputs=Provider().get_outputs,
    )

    def session(path, options, providers, **rest):
        made.update(providers[0][1])
        return provider

    monkeypatch.setattr(ort, "get_available_providers", lambda: ["TensorrtExecutionProvider"])
    monkeypatch.setattr(ort, "InferenceSession", session)
    path = toy_bundle.path("model.fp16.onnx")
    for max_batch in (1, 8):
        settings = GpuSettings("fp16", SIZE, max_batch=max_batch)
        opened = backend.open_gpu_session(path, "ort-tensorrt", settings)
        assert made["trt_cuda_graph_enable"] == ("1" if max_batch == 1 else "0")
        assert (opened._largest, opened._graphs) == (max_batch, False)
