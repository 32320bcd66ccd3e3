"""ONNX Runtime: sessions that run where they were asked to, or say that they do not."""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cnnedge.errors import BackendError, ModelError, first_line
from cnnedge.files import scratch_folder
from cnnedge.measurement import Staged
from cnnedge.metadata import Ends, TensorFacts
from cnnedge.quiet import import_onnxruntime
from cnnedge.runtimes import RUNTIMES, GraphFile, RunSettings

import_onnxruntime()  # before anything else loads it, and it talks to its maker

import onnxruntime as ort

# ORT rewrites a float bias between FP16 Q/DQ pairs as int32 with a scale computed in FP16, which
# underflows: a VGG-16 then answers at random. Our CPU graphs carry int32 biases already, so
# nothing is lost. See docs/decisions/ort-bias-quantization.md.
DISABLED_OPTIMIZERS = ["WeightBiasQuantization"]
CPU_PROVIDER = str(RUNTIMES["cpu"].provider)
PROFILE_WARM_UP = 5  # calls
_BOILERPLATE = re.compile(
    r"\[ONNXRuntimeError\] : \d+ : \w+ : |Load model from \S+ failed: *|/onnxruntime_src/\S+ "
)


def _reason(error: Exception) -> str:
    """Return why ONNX Runtime loads a file not, without its codes and its sources' file names."""
    return first_line(ValueError(_BOILERPLATE.sub("", str(error))))


@dataclass(frozen=True)
class ModelFacts(Ends):
    """What an ONNX file says of itself: its one input, its one output, its ``metadata_props``."""

    metadata: Mapping[str, str]


@dataclass(frozen=True)
class Session:
    """A model that ONNX Runtime has loaded; callable from many threads at once.

    Attributes:
        session: The ``onnxruntime.InferenceSession``.
        provider: The provider that really runs it.
        facts: What the file says of itself.
    """

    session: Any
    provider: str
    facts: ModelFacts

    def __call__(self, batch: np.ndarray) -> np.ndarray:
        """Return probabilities, float32 ``[N, classes]``, of a batch as the graph takes it.

        Raises:
            BackendError: the runtime refused the batch.
        """
        try:
            (answers,) = self.session.run([self.facts.output.name], {self.facts.input.name: batch})
        except Exception as error:  # ORT's exceptions share no public base
            raise BackendError(
                f"ONNX Runtime cannot run this batch: {first_line(error)}"
            ) from error
        declared = self.facts.output.shape[1:]
        if answers.shape[1:] != declared and None not in declared:
            raise BackendError(
                f"the graph declares {list(declared)} answers an image, and gave "
                f"{list(answers.shape[1:])}",
                fix="export it again",
            )
        return answers

    def staged(self, batch: np.ndarray) -> Staged:
        """Run a batch with the hand-over of its tensors timed apart from the computation.

        On the CPU the runtime reads the image where it lies, so copying in costs next to nothing.
        """
        begin = time.perf_counter()
        image = ort.OrtValue.ortvalue_from_numpy(batch)
        taken = time.perf_counter()
        (found,) = self.session.run_with_ort_values(
            [self.facts.output.name], {self.facts.input.name: image}
        )
        computed = time.perf_counter()
        answers = found.numpy()
        return Staged(answers, taken - begin, computed - taken, time.perf_counter() - computed)


def open_graph(graph: GraphFile, settings: RunSettings) -> Session:
    """Load a variant; see `open_session`."""
    return open_session(graph.path, threads=settings.threads)


def open_session(
    model: Path | str | bytes, *, threads: int | None = None, provider: str = CPU_PROVIDER
) -> Session:
    """Load an ONNX model.

    Args:
        model: A file, or the model's bytes.
        threads: How many threads one call may use; None lets the runtime decide.
        provider: The execution provider to use.

    Raises:
        BackendError: the runtime cannot load the model, or would run it on another provider.
        ModelError: it is no graph of one tensor to another.
    """
    if provider not in ort.get_available_providers():
        raise BackendError(
            f"this ONNX Runtime {ort.__version__} is built without {provider}",
            fix="run `cnnedge doctor` to see what this machine lacks",
        )
    options = _options(threads)
    source = model if isinstance(model, bytes) else os.fspath(model)
    name = "the model" if isinstance(model, bytes) else os.fspath(model)
    session = _load(source, options, name, provider, disabled_optimizers=DISABLED_OPTIMIZERS)
    ran = session.get_providers()[0]
    if ran != provider:
        raise BackendError(
            f"{name} was to run on {provider}, and ONNX Runtime fell back to {ran}",
            fix="run `cnnedge doctor` to see what this machine lacks",
        )
    # A model that is given as bytes is ours, and may have more outputs, which are looked into.
    return Session(session, ran, facts_of(session, name, ours=isinstance(model, bytes)))


def _load(source: str | bytes, options: Any, name: str, provider: str, **more: Any) -> Any:
    try:
        # Without its fall-back, of which it tells on the standard output: there is no other.
        return ort.InferenceSession(
            source, options, providers=[provider], enable_fallback=0, **more
        )
    except Exception as error:  # ORT's exceptions share no public base
        raise BackendError(
            f"ONNX Runtime {ort.__version__} cannot load {name}: {_reason(error)}",
            fix="export the bundle again, or update onnxruntime",
        ) from error


def read_facts(model: Path | str) -> ModelFacts:
    """Return what an ONNX file says of itself.

    Raises:
        BackendError: the runtime cannot load it.
        ModelError: it is no graph of one tensor to another.
    """
    options = _options(1)
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL  # in less time
    session = _load(os.fspath(model), options, str(model), CPU_PROVIDER)
    return facts_of(session, str(model))


def facts_of(session: Any, where: str, *, ours: bool = False) -> ModelFacts:
    """Return what the file of an ``InferenceSession`` says of itself.

    Args:
        session: The session.
        where: The file, for messages.
        ours: Whether only the first output counts, of several.

    Raises:
        ModelError: it is no graph of one tensor to another.
    """
    ends = []
    try:
        metadata = session.get_modelmeta().custom_metadata_map
        tensors = (("input", session.get_inputs()), ("output", session.get_outputs()))
    except UnicodeDecodeError as error:
        raise ModelError(f"{where} holds names that are no text", fix="export it again") from error
    for what, nodes in tensors:
        kinds = [node.type for node in nodes]
        if ours and what == "output":
            kinds = kinds[:1]
        if len(kinds) != 1 or not kinds[0].startswith("tensor("):
            shown = ", ".join(kinds[:3]) + (", …" if len(kinds) > 3 else "")
            raise ModelError(
                f"{where} has {len(kinds)} {what}s ({shown or 'none'}), a classifier one tensor",
                fix="export it from its Keras model, or cut the graph",
            )
        ends.append(tensor_facts(nodes[0]))
    image, answers = ends
    return ModelFacts(image, answers, metadata)


_NUMPY_NAMES = {"float": "float32", "double": "float64"}


def tensor_facts(node: Any) -> TensorFacts:
    """Return what ONNX Runtime says of an input or output."""
    dtype = node.type.removeprefix("tensor(").removesuffix(")")
    shape = tuple(size if isinstance(size, int) else None for size in node.shape)
    return TensorFacts(node.name, _NUMPY_NAMES.get(dtype, dtype), shape)


def profile(
    model: Path | str | bytes, batch: np.ndarray, *, calls: int = 20, threads: int | None = None
) -> dict[str, float]:
    """Return the mean seconds of each node, by the name it has in the graph.

    A node that the runtime fuses with others counts under the name of one of them.

    Args:
        model: The ONNX model's file or bytes.
        batch: What it is called with.
        calls: How often, after a few that are not counted.
        threads: How many threads one call may use; None lets the runtime decide.
    """
    options = _options(threads)
    options.enable_profiling = True
    with scratch_folder() as folder:
        options.profile_file_prefix = str(folder / "profile")
        session = ort.InferenceSession(
            model if isinstance(model, bytes) else os.fspath(model),
            options,
            providers=[CPU_PROVIDER],
            disabled_optimizers=DISABLED_OPTIMIZERS,
        )
        name = session.get_inputs()[0].name
        for _ in range(calls + PROFILE_WARM_UP):
            session.run(None, {name: batch})
        events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
    taken: dict[str, list[float]] = {}
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            # ORT appends "_token_N" where it has changed a node's layout.
            node = event["name"].removesuffix("_kernel_time").split("_token_")[0]
            taken.setdefault(node, []).append(event["dur"] * 1e-6)
    per_call = calls + PROFILE_WARM_UP
    return {
        node: sum(times[len(times) * PROFILE_WARM_UP // per_call :]) / calls
        for node, times in taken.items()
    }


def _options(threads: int | None) -> Any:
    options = ort.SessionOptions()
    options.log_severity_level = 3  # errors alone; warnings of its optimizers are not the user's
    if threads is not None:
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
    return options


def version() -> str:
    """Return the version of ONNX Runtime."""
    return str(ort.__version__)
