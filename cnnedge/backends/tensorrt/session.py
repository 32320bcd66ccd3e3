"""Run a plan on a GPU: nothing is allocated in a call, and what a call costs is known by part.

A session owns one stream. Each batch size whose kernels are replayed as a CUDA graph, or else each
optimisation profile that is used, has a lane: an execution context with its own buffers,
page-locked on the host, plain on the device, and kept. A call copies in, enqueues, copies out, and
waits once.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cnnedge.backends.gpu import Gpu
from cnnedge.backends.tensorrt.library import Library, Messages
from cnnedge.errors import BackendError
from cnnedge.files import atomic_path
from cnnedge.measurement import GpuTimes
from cnnedge.metadata import Ends, TensorFacts
from cnnedge.plan import Profile

log = logging.getLogger("cnnedge.tensorrt")


# Lanes that are kept: an app uses one or two batch sizes, and each holds memory of the GPU.
_MOST_LANES = 8


@dataclass
class _Lane:
    """An execution context with its buffers.

    A captured graph holds its context's addresses and shapes, so where calls replay one, the
    context serves that batch size alone; see "CUDA graphs" in TensorRT's documentation.
    """

    context: Any
    host_in: np.ndarray
    host_out: np.ndarray
    device_in: int
    device_out: int
    batch: int = 0  # that the context's shapes are set to
    graph: int | None = None


class PlanSession:
    """A plan loaded on a GPU; callable from many threads, which take turns.

    Attributes:
        provider: The library that runs it, with its version.
        graphs: Whether calls replay a CUDA graph.
        facts: The plan's input and output.
    """

    def __init__(
        self,
        library: Library,
        gpu: Gpu,
        engine: Any,
        profiles: Sequence[Profile],
        *,
        graphs: bool = True,
        kernel_cache: Path | None = None,
    ) -> None:
        self.provider = library.title
        self.graphs = graphs
        self._library, self._gpu, self._engine = library, gpu, engine
        self._profiles = tuple(profiles)
        self._kernel_file = kernel_cache
        self._kernels = _read_kernels(kernel_cache)
        self._kernel_cache: Any = None
        self._lock = threading.Lock()
        self._lanes: OrderedDict[tuple[int, int], _Lane] = OrderedDict()
        self._closed = False
        names = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
        mode = library.module.TensorIOMode
        (self._input,) = [n for n in names if engine.get_tensor_mode(n) == mode.INPUT]
        (self._output,) = [n for n in names if engine.get_tensor_mode(n) == mode.OUTPUT]
        nptype = library.module.nptype
        self._in_type = np.dtype(nptype(engine.get_tensor_dtype(self._input)))
        self._out_type = np.dtype(nptype(engine.get_tensor_dtype(self._output)))
        self._in_size = tuple(engine.get_tensor_shape(self._input))[1:]
        self._out_size = tuple(engine.get_tensor_shape(self._output))[1:]
        self.facts = Ends(
            TensorFacts(self._input, str(self._in_type), (None, *self._in_size)),
            TensorFacts(self._output, str(self._out_type), (None, *self._out_size)),
        )
        self._stream = gpu.stream()
        self._events = [gpu.event() for _ in range(4)]
        self._largest = max(profile.largest for profile in self._profiles)

    def __call__(self, batch: np.ndarray) -> np.ndarray:
        """Return probabilities, float32 ``[N, classes]``, of a batch as the graph takes it.

        A batch larger than the plan's largest is run in parts.

        Raises:
            BackendError: the batch has another shape or type than the plan takes, or it cannot run.
        """
        self._check(batch)
        with self._lock:
            self._open()
            parts = [
                self._run(batch[start : start + self._largest])
                for start in range(0, len(batch), self._largest)
            ]
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def timed(self, batch: np.ndarray) -> GpuTimes:
        """Run a batch that the plan takes whole, and return what it cost by part.

        Raises:
            BackendError: as for a call; or the batch is larger than the plan's largest.
        """
        self._check(batch)
        if len(batch) > self._largest:
            raise BackendError(
                f"a batch of {len(batch)} cannot be timed: the plan takes {self._largest}",
                fix="build it with a larger --max-batch",
            )
        with self._lock:
            self._open()
            self._run(batch, timing=True)
            between, events = self._gpu.seconds_between, self._events
            copy_in, compute, copy_out = (between(*events[i : i + 2]) for i in range(3))
        return GpuTimes(copy_in, compute, copy_out, self._enqueued)

    def close(self) -> None:
        """Give everything on the GPU back; the session cannot be used afterwards."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            gpu = self._gpu
            gpu.activate()
            while self._lanes:
                self._tear_down(self._lanes.popitem()[1])
            for event in self._events:
                gpu.release_event(event)
            gpu.release_stream(self._stream)
            self._engine = None

    def __del__(self) -> None:
        with contextlib.suppress(Exception):  # the interpreter may be shutting down
            self.close()

    def _check(self, batch: np.ndarray) -> None:
        if batch.dtype != self._in_type or batch.shape[1:] != self._in_size or not len(batch):
            wanted = " × ".join(["N", *map(str, self._in_size)])
            raise BackendError(
                f"the plan takes {self._in_type} {wanted}, not {batch.dtype} "
                f"{' × '.join(map(str, batch.shape))}",
                fix="give it tensors as the bundle's image contract describes them",
            )

    def _open(self) -> None:
        if self._closed:
            raise BackendError("the session is closed", fix="load the bundle again")
        self._gpu.activate()  # the current GPU is a setting of each thread

    def _run(self, batch: np.ndarray, *, timing: bool = False) -> np.ndarray:
        """Run what fits under one profile. The lock is held."""
        gpu, stream, n = self._gpu, self._stream, len(batch)
        lane = self._lane(n)
        image, answers = lane.host_in[:n], lane.host_out[:n]
        np.copyto(image, batch)
        self._prepare(lane, n)
        start = time.perf_counter()
        self._mark(0, timing)
        gpu.copy_in(lane.device_in, image, stream)
        self._mark(1, timing)
        self._enqueue(lane)
        self._mark(2, timing)
        gpu.copy_out(answers, lane.device_out, stream)
        self._mark(3, timing)
        self._enqueued = time.perf_counter() - start
        gpu.synchronize(stream)
        return answers.astype(np.float32, copy=True)

    def _mark(self, index: int, timing: bool) -> None:
        if timing:
            self._gpu.record(self._events[index], self._stream)

    def _lane(self, batch: int) -> _Lane:
        """Return the lane of a batch size, under the narrowest profile that holds it."""
        fitting = [i for i, profile in enumerate(self._profiles) if profile.holds(batch)]
        index = min(fitting, key=lambda i: self._profiles[i].largest)
        largest = batch if self._captures else self._profiles[index].largest
        lane = self._lanes.get((index, largest))
        if lane is None:
            while len(self._lanes) >= _MOST_LANES:
                self._tear_down(self._lanes.popitem(last=False)[1])
            lane = self._lanes[index, largest] = self._set_up(index, largest)
        self._lanes.move_to_end((index, largest))
        return lane

    @property
    def _captures(self) -> bool:
        """Whether graphs are captured here, and not by the library itself."""
        return self.graphs and not self._library.replays_graphs

    def _set_up(self, index: int, largest: int) -> _Lane:
        gpu = self._gpu
        context, cache = self._library.create_context(
            self._engine, graphs=self.graphs, kernels=self._kernels
        )
        if context is None:
            raise BackendError(
                f"{self.provider} cannot set up the plan on this GPU, whose memory may be full",
                fix="free some GPU memory, or build it with a smaller --max-batch",
            )
        self._kernel_cache = cache or self._kernel_cache
        if not context.set_optimization_profile_async(index, self._stream):
            raise BackendError(f"{self.provider} refuses the plan's profile {index}")
        gpu.synchronize(self._stream)
        host_in = gpu.pinned((largest, *self._in_size), self._in_type)
        host_out = gpu.pinned((largest, *self._out_size), self._out_type)
        device_in, device_out = gpu.allocate(host_in.nbytes), gpu.allocate(host_out.nbytes)
        context.set_tensor_address(self._input, device_in)
        context.set_tensor_address(self._output, device_out)
        return _Lane(context, host_in, host_out, device_in, device_out)

    def _tear_down(self, lane: _Lane) -> None:
        gpu = self._gpu
        if lane.graph is not None:
            gpu.release_graph(lane.graph)
        gpu.release(lane.device_in)
        gpu.release(lane.device_out)
        gpu.release_pinned(lane.host_in)
        gpu.release_pinned(lane.host_out)

    def _prepare(self, lane: _Lane, batch: int) -> None:
        """Set a lane's shapes to a batch and, where the caller does that, capture its graph."""
        if lane.batch != batch:
            if not lane.context.set_input_shape(self._input, (batch, *self._in_size)):
                raise BackendError(f"{self.provider} refuses a batch of {batch}")
            lane.batch = batch
            self._execute(lane)  # compiles and allocates what it has to, this once
            self._gpu.synchronize(self._stream)
            self._keep_kernels()
        if self._captures and lane.graph is None:
            self._capture(lane)

    def _keep_kernels(self) -> None:
        """Write the just-in-time compiled kernels, where that is asked for."""
        if self._kernel_cache is None or self._kernel_file is None:
            return
        with atomic_path(self._kernel_file) as temporary:
            temporary.write_bytes(bytes(self._kernel_cache.serialize()))

    def _capture(self, lane: _Lane) -> None:
        """Record a lane's kernels as a graph; go without where the plan does not allow it."""
        gpu, stream = self._gpu, self._stream
        gpu.begin_capture(stream)
        try:
            self._execute(lane)
        except BackendError as error:
            with contextlib.suppress(BackendError):
                gpu.release_graph(gpu.end_capture(stream))
            self._go_without(error.what)
            return
        try:
            lane.graph = gpu.end_capture(stream)
        except BackendError as error:
            self._go_without(error.what)

    def _go_without(self, why: str) -> None:
        self.graphs = False
        log.warning("%s: no CUDA graph: %s", self.provider, why)

    def _enqueue(self, lane: _Lane) -> None:
        if lane.graph is not None:
            self._gpu.launch(lane.graph, self._stream)
        else:
            self._execute(lane)

    def _execute(self, lane: _Lane) -> None:
        if not lane.context.execute_async_v3(self._stream):
            raise BackendError(
                f"{self.provider} cannot run the plan",
                fix="see the log of cnnedge.tensorrt; build the engine again on this machine",
            )


def open_plan(
    library: Library,
    gpu: Gpu,
    plan: bytes,
    profiles: Sequence[Profile],
    *,
    weights: bytes | None = None,
    trust_code: bool = False,
    graphs: bool = True,
    kernel_cache: Path | None = None,
) -> PlanSession:
    """Load a plan whose hash was checked.

    Args:
        library: The library that built it.
        gpu: Where to run it.
        plan: The plan; it is executable content, so never of an unchecked file.
        profiles: Its optimisation profiles.
        weights: The ONNX model that a stripped plan takes its weights from.
        trust_code: Whether it brings host code, as version-compatible plans do.
        graphs: Whether to replay calls as CUDA graphs.
        kernel_cache: Where to keep kernels that the library compiles just in time for the next
            start. It is executable content too: a file that nobody else can write.

    Raises:
        BackendError: the library refuses it.
    """
    messages = Messages()
    gpu.activate()
    engine = library.deserialize(plan, messages, trust_code=trust_code)
    if weights is not None:
        library.refit(engine, weights, messages)
    return PlanSession(library, gpu, engine, profiles, graphs=graphs, kernel_cache=kernel_cache)


def _read_kernels(path: Path | None) -> bytes:
    try:
        return b"" if path is None else path.read_bytes()
    except FileNotFoundError:  # the first start
        return b""
