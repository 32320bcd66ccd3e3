"""OpenVINO: the bundle's own ONNX graphs on Intel's runtime."""

from __future__ import annotations

import os
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from cnnedge.errors import BackendError, first_line
from cnnedge.metadata import Ends, TensorFacts
from cnnedge.quiet import import_openvino
from cnnedge.runtimes import GraphFile, RunSettings

import_openvino()  # before anything else loads it, and it talks to its maker

import openvino

# What OpenVINO computes in where the graph says float32. Left to itself it takes bfloat16 on CPUs
# that have it, without a word: an FP32 figure would be none.
_HINTS = {"fp32": "f32", "bf16": "bf16"}


@dataclass(frozen=True)
class OpenVinoSession:
    """A model that OpenVINO has compiled; callable from many threads at once.

    Attributes:
        compiled: The ``openvino.CompiledModel``.
        provider: The library with its version, the device and what floats are computed in.
    """

    compiled: Any
    provider: str
    _requests: threading.local

    def __call__(self, batch: np.ndarray) -> np.ndarray:
        """Return probabilities, float32 ``[N, classes]``, of a batch as the graph takes it.

        Raises:
            BackendError: the runtime refused the batch.
        """
        request = self._request()
        try:
            # The image is read where it lies; the answer is the request's own memory, which the
            # next call overwrites: it is a few numbers, and copied.
            return request.infer([batch], share_inputs=True)[0]
        except Exception as error:  # OpenVINO raises RuntimeError for everything
            raise BackendError(f"OpenVINO cannot run this batch: {first_line(error)}") from error

    @property
    def facts(self) -> Ends:
        """The graph's input and output."""
        return Ends(*(_facts(port) for port in (self.compiled.input(0), self.compiled.output(0))))

    def layer_times(self, batch: np.ndarray, calls: int) -> dict[str, float]:
        """Return the mean seconds of each node that was executed, by its name in the graph.

        The model must have been opened with ``profiling``.
        """
        request = self._request()
        taken: dict[str, float] = {}
        for _ in range(calls):
            request.infer([batch], share_inputs=True)
            for entry in request.profiling_info:
                if entry.status == entry.status.EXECUTED:
                    spent = entry.real_time.total_seconds() / calls
                    taken[entry.node_name] = taken.get(entry.node_name, 0.0) + spent
        return taken

    def _request(self) -> Any:
        if not hasattr(self._requests, "own"):
            self._requests.own = self.compiled.create_infer_request()
        return self._requests.own


def open_graph(graph: GraphFile, settings: RunSettings) -> OpenVinoSession:
    """Load a variant; see `open_openvino`."""
    return open_openvino(graph.path, threads=settings.threads)


def open_openvino(
    model: Path | str,
    *,
    threads: int | None = None,
    floats: Literal["fp32", "bf16"] = "fp32",
    profiling: bool = False,
) -> OpenVinoSession:
    """Compile an ONNX model for the CPU.

    Args:
        model: The file.
        threads: How many threads one call may use; None lets the runtime decide.
        floats: What layers that are float32 in the graph are computed in.
        profiling: Whether each node is timed, which costs some speed.

    Raises:
        BackendError: the runtime cannot load the model, or would compute in another type.
    """
    config: dict[str, Any] = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": _HINTS[floats],
        "PERF_COUNT": profiling,
    }
    if threads is not None:
        config["INFERENCE_NUM_THREADS"] = threads
    try:
        compiled = openvino.Core().compile_model(os.fspath(model), "CPU", config)
        ran = compiled.get_property("INFERENCE_PRECISION_HINT").get_type_name()
    except Exception as error:
        raise BackendError(
            f"OpenVINO {openvino.__version__.split('-')[0]} cannot load {model}: "
            f"{first_line(error)}",
            fix="run this variant on another runtime",
        ) from error
    if ran != _HINTS[floats]:
        raise BackendError(
            f"OpenVINO was to compute floats in {floats}, and this CPU makes it {ran}",
            fix="leave this contestant out",
        )
    provider = f"OpenVINO {openvino.__version__.split('-')[0]} on CPU, floats in {ran}"
    if (len(compiled.inputs), len(compiled.outputs)) != (1, 1):
        raise BackendError(f"{model} is no graph of one tensor to another", fix="export it again")
    return OpenVinoSession(compiled, provider, threading.local())


def _facts(port: Any) -> TensorFacts:
    """Return what OpenVINO says of an input or output."""
    shape = (None if size.is_dynamic else size.get_length() for size in port.partial_shape)
    return TensorFacts(port.any_name, port.element_type.to_dtype().name, tuple(shape))
