"""ONNX Runtime on an NVIDIA GPU: the CUDA, TensorRT and TensorRT-RTX providers.

ONNX Runtime answers on the CPU, without a word that a program sees, when a provider cannot be
loaded or leaves a node out. Here both are errors: the fall-back is switched off, and where the
nodes really went is read back from the session.
"""

from __future__ import annotations

import logging
import re
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cnnedge.backends.onnxruntime import CPU_PROVIDER, DISABLED_OPTIMIZERS, tensor_facts
from cnnedge.errors import BackendError, CnnEdgeError, MissingExtraError, first_line
from cnnedge.metadata import Ends
from cnnedge.quiet import import_onnxruntime, native_stderr_aside
from cnnedge.runtimes import RUNTIMES, GraphFile, RunSettings

import_onnxruntime()  # before anything else loads it, and it talks to its maker

import onnxruntime as ort

log = logging.getLogger("cnnedge")

_MOST_BINDINGS = 8  # batch sizes that keep buffers and a graph; an app uses one or two
_NO_GRAPH = "-1"  # the id under which the CUDA provider captures and replays nothing


@dataclass(frozen=True)
class GpuSettings:
    """How a provider is set up.

    Attributes:
        precision: The variant's: TensorRT has to be told which types its kernels may have.
        image: Height, width and channels of the input.
        max_batch: The largest batch that TensorRT's engine is built for.
        graphs: Whether calls replay a CUDA graph, where the provider tells those of several batch
            sizes apart, or there is one size alone.
        cache: A folder for engines, kernel timings and compiled kernels, which nobody else can
            write: they are executable content. None: everything is built at every start.
    """

    precision: str
    image: tuple[int, int, int]
    max_batch: int = 8
    graphs: bool = True
    cache: Path | None = None


@dataclass
class _Binding:
    """The buffers of one batch size, on the GPU, and the graph that holds their addresses.

    A captured graph reads and writes those very addresses, and ONNX Runtime has no call that
    forgets one. So a binding is never given up, and its graph's id never serves another.
    """

    binding: Any
    image: Any
    answers: Any
    options: Any


class GpuSession:
    """A model that ONNX Runtime runs on a GPU; callable from many threads, which take turns.

    The first eight batch sizes keep their buffers, and replay a CUDA graph where that is asked for;
    others are copied at each call. A batch beyond ``largest`` is run in parts.

    Attributes:
        provider: The provider that really runs it.
        facts: The graph's input and output.
    """

    def __init__(
        self, session: Any, provider: str, *, bound: bool, graphs: bool, largest: int | None = None
    ) -> None:
        self.provider = provider
        self._session, self._bound, self._graphs = session, bound, graphs
        self._largest = largest
        (image,), (answers,) = session.get_inputs(), session.get_outputs()
        self.facts = Ends(tensor_facts(image), tensor_facts(answers))
        self._input, self._output, self._classes = image.name, answers.name, answers.shape[-1]
        self._dtype = np.uint8 if "uint8" in image.type else np.float32
        self._size = tuple(image.shape[1:])
        self._bindings: dict[int, _Binding] = {}
        self._lock = threading.Lock()

    def __call__(self, batch: np.ndarray) -> np.ndarray:
        """Return probabilities, float32 ``[N, classes]``, of a batch as the graph takes it.

        Raises:
            BackendError: the runtime refused the batch.
        """
        if batch.dtype != self._dtype or batch.shape[1:] != self._size or not len(batch):
            raise BackendError(
                f"the model takes {np.dtype(self._dtype)} N×{'×'.join(map(str, self._size))}, "
                f"not {batch.dtype} {'×'.join(map(str, batch.shape))}"
            )
        size = self._largest or len(batch)
        answers = np.empty((len(batch), self._classes), np.float32)
        with self._lock:
            try:
                for start in range(0, len(batch), size):
                    part = slice(start, start + size)
                    answers[part] = self._run(batch[part])
            except Exception as error:  # ORT's exceptions share no public base
                raise BackendError(f"{self.provider} cannot run: {first_line(error)}") from error
        return answers

    def _run(self, batch: np.ndarray) -> np.ndarray:
        """Run what one call of the provider takes. The lock is held."""
        bound = self._bindings.get(len(batch))
        if bound is None and self._bound and len(self._bindings) < _MOST_BINDINGS:
            bound = self._bindings[len(batch)] = self._bind(len(batch))
        if bound is None:
            # Without an id the provider would capture a graph that holds this call's own memory.
            options = _run_options(_NO_GRAPH) if self._bound else None
            return self._session.run([self._output], {self._input: batch}, options)[0]
        bound.image.update_inplace(np.ascontiguousarray(batch))
        self._session.run_with_iobinding(bound.binding, bound.options)
        return bound.answers.numpy()

    def _bind(self, batch: int) -> _Binding:
        """Put a batch size's buffers on the GPU, where they stay as long as the session does."""
        make = ort.OrtValue.ortvalue_from_shape_and_type
        image = make((batch, *self._size), self._dtype, "cuda", 0)
        answers = make((batch, self._classes), np.float32, "cuda", 0)
        binding = self._session.io_binding()
        binding.bind_ortvalue_input(self._input, image)
        binding.bind_ortvalue_output(self._output, answers)
        # A captured graph is found again by its id, which is this batch size's alone.
        options = _run_options(str(batch) if self._graphs else _NO_GRAPH)
        return _Binding(binding, image, answers, options)


def _run_options(graph_id: str) -> Any:
    options = ort.RunOptions()
    options.add_run_config_entry("gpu_graph_id", graph_id)
    return options


def open_graph(graph: GraphFile, settings: RunSettings) -> GpuSession:
    """Load a variant; see `open_gpu_session`."""
    chosen = GpuSettings(
        precision=graph.precision,
        image=graph.image,
        max_batch=settings.max_batch,
        graphs=settings.graphs,
        cache=None if settings.cache is None else settings.cache / graph.sha256[:16],
    )
    return open_gpu_session(graph.path, settings.runtime, chosen)


def open_gpu_session(model: Path, runtime: str, settings: GpuSettings) -> GpuSession:
    """Load a model on the GPU.

    Args:
        model: The ONNX file.
        runtime: Which provider, by its name in `RUNTIMES`.
        settings: How.

    Raises:
        MissingExtraError: the provider's package is not installed.
        BackendError: it cannot be loaded here, would compute in another type than the model's, or
            a node would run elsewhere.
    """
    if runtime == "cuda" and settings.precision == "int8":
        raise BackendError(
            "the CUDA provider has no INT8 convolution: it would compute in float and be slower",
            fix="use the fp16 variant there, or another runtime for int8-trt",
        )
    provider = str(RUNTIMES[runtime].provider)
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    open_it = _open_plugin if runtime == "ort-rtx" else _open_builtin
    try:
        with native_stderr_aside() as said:
            if runtime != "ort-rtx" and hasattr(ort, "preload_dlls"):
                ort.preload_dlls()  # CUDA's and cuDNN's libraries, from their packages
            session = open_it(model, provider, options, settings)
    except CnnEdgeError:
        raise
    except Exception as error:
        log.debug("%s", said.text)
        raise BackendError(
            f"ONNX Runtime {ort.__version__} cannot run {model} on {provider}: "
            f"{_cause(str(error)) or _cause(said.text) or first_line(error)}",
            fix="run `cnnedge doctor` to see what this machine lacks",
        ) from error
    _refuse_elsewhere(session, provider, model)
    # A plugin's memory is not to be had through ONNX Runtime's "cuda" allocator, which a build for
    # CPUs lacks: it copies by itself, and replays no graph, which needs fixed addresses.
    bound = runtime != "ort-rtx"
    return GpuSession(
        session,
        provider,
        bound=bound,
        graphs=settings.graphs and runtime == "cuda",  # others know no graph ids
        largest=None if runtime == "cuda" else settings.max_batch,
    )


def _cause(said: str) -> str | None:
    """Return what the runtime logged as the cause: its exceptions tell of the consequence."""
    missing = re.findall(r"(lib[\w.+-]+): cannot open shared object file", said)
    if "libcuda.so.1" in missing:
        return "this machine has no NVIDIA driver (libcuda.so.1)"
    if missing:
        return f"{missing[0]} is not installed"
    unfit = re.search(
        r"(CUDA driver version is insufficient[^\n]*|no CUDA-capable device[^\n]*)", said
    )
    return unfit[1] if unfit else None


def _open_builtin(model: Path, provider: str, options: Any, settings: GpuSettings) -> Any:
    if provider not in ort.get_available_providers():
        raise BackendError(
            f"this ONNX Runtime {ort.__version__} is built without {provider}",
            fix='run: pip uninstall onnxruntime; pip install "cnnedge[gpu]"',
        )
    chosen, source = cuda_options(settings), model
    if provider == RUNTIMES["ort-tensorrt"].provider:
        chosen, source = tensorrt_options(settings), _with_context(model, options, settings)
    return ort.InferenceSession(
        str(source),
        options,
        providers=[(provider, dict(chosen))],
        enable_fallback=0,  # the Python wrapper would open a session on the CPU instead
        disabled_optimizers=DISABLED_OPTIMIZERS,
    )


def _open_plugin(model: Path, provider: str, options: Any, settings: GpuSettings) -> Any:
    try:
        import onnxruntime_ep_nv_tensorrt_rtx as plugin
    except ImportError as error:
        raise MissingExtraError(
            "onnxruntime-ep-nv-tensorrt-rtx", "ort-rtx", purpose="ONNX Runtime's RTX provider"
        ) from error
    if not hasattr(ort, "get_ep_devices"):  # before 1.23
        raise BackendError(
            f"ONNX Runtime {ort.__version__} takes no plugin providers",
            fix="update onnxruntime",
        )
    if not any(device.ep_name == provider for device in ort.get_ep_devices()):
        ort.register_execution_provider_library(plugin.get_ep_name(), plugin.get_library_path())
    devices = [device for device in ort.get_ep_devices() if device.ep_name == provider]
    if not devices:
        raise BackendError(
            f"{provider} finds no GPU that it runs on", fix="run `cnnedge doctor` to see why"
        )
    options.add_provider_for_devices(devices[:1], dict(rtx_options(settings)))
    source = _with_context(model, options, settings)
    return ort.InferenceSession(str(source), options, disabled_optimizers=DISABLED_OPTIMIZERS)


def _with_context(model: Path, options: Any, settings: GpuSettings) -> Path:
    """Return the compiled form of a model, an EP-context model, where there is one.

    Where there is none and a cache, have it written: the next start takes it.
    """
    if settings.cache is None:
        return model
    settings.cache.mkdir(parents=True, exist_ok=True, mode=0o700)
    compiled = settings.cache / f"{model.stem}.context.onnx"
    if compiled.exists():
        return compiled
    options.add_session_config_entry("ep.context_enable", "1")
    options.add_session_config_entry("ep.context_embed_mode", "1")
    options.add_session_config_entry("ep.context_file_path", str(compiled))
    return model


def cuda_options(settings: GpuSettings) -> Mapping[str, str]:
    """Return the CUDA provider's options."""
    return {
        "device_id": "0",
        "cudnn_conv_algo_search": "EXHAUSTIVE",
        "enable_cuda_graph": _flag(settings.graphs),
        "use_tf32": "0",  # FP32 is held to Keras within 1e-5
    }


def tensorrt_options(settings: GpuSettings) -> Mapping[str, str]:
    """Return the TensorRT provider's options: profile, types, caches."""
    smallest, largest = (_shape(n, settings) for n in (1, settings.max_batch))
    chosen = {
        "device_id": "0",
        "trt_profile_min_shapes": smallest,
        "trt_profile_opt_shapes": smallest,
        "trt_profile_max_shapes": largest,
        "trt_fp16_enable": _flag(settings.precision in {"fp16", "int8"}),
        "trt_int8_enable": _flag(settings.precision == "int8"),
        # It keeps one graph for all batch sizes, whatever id a call bears (onnxruntime pull request
        # 16081, issue 20050): a second size would be answered from the first one's buffers.
        "trt_cuda_graph_enable": _flag(settings.graphs and settings.max_batch == 1),
    }
    if settings.cache is not None:
        folder = str(settings.cache)
        chosen |= {
            "trt_engine_cache_enable": "1",
            "trt_engine_cache_path": folder,
            "trt_timing_cache_enable": "1",
            "trt_timing_cache_path": folder,
        }
    return chosen


def rtx_options(settings: GpuSettings) -> Mapping[str, str]:
    """Return the TensorRT-RTX provider's options."""
    smallest, largest = (_shape(n, settings) for n in (1, settings.max_batch))
    chosen = {
        "nv_profile_min_shapes": smallest,
        "nv_profile_opt_shapes": smallest,
        "nv_profile_max_shapes": largest,
    }
    if settings.cache is not None:
        chosen["nv_runtime_cache_path"] = str(settings.cache)
    return chosen


def _refuse_elsewhere(session: Any, provider: str, model: Path) -> None:
    """Read back where the nodes went; any but the asked provider is an error."""
    ran = session.get_providers()[0]
    if ran != provider:
        raise BackendError(
            f"{model} was to run on {provider}, and ONNX Runtime fell back to {ran}",
            fix="run `cnnedge doctor` to see what this machine lacks",
        )
    if not hasattr(session, "get_provider_graph_assignment_info"):  # before 1.24
        return
    elsewhere = [
        f"{node.name} ({node.op_type}) on {part.ep_name}"
        for part in session.get_provider_graph_assignment_info()
        if part.ep_name != provider
        for node in part.get_nodes()
    ]
    if elsewhere:
        raise BackendError(
            f"{provider} leaves out {len(elsewhere)} nodes of {model}, the first "
            f"{elsewhere[0].replace(CPU_PROVIDER, 'the CPU')}",
            fix="use another runtime or variant",
        )


def _shape(batch: int, settings: GpuSettings) -> str:
    return "image:" + "x".join(str(d) for d in (batch, *settings.image))


def _flag(value: bool) -> str:
    return "1" if value else "0"
