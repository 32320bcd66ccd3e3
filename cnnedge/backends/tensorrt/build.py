"""Build a plan from an ONNX file: one strongly typed path for both libraries."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cnnedge.backends.gpu import GpuFacts
from cnnedge.backends.tensorrt.layers import (
    EngineDescription,
    EngineLayer,
    EngineTensor,
    read_inspector,
    read_log,
)
from cnnedge.backends.tensorrt.library import Library, Messages
from cnnedge.errors import BackendError, one_line
from cnnedge.plan import PlanOptions, Profile


@dataclass(frozen=True)
class BuiltPlan:
    """A plan fresh from the builder.

    Attributes:
        plan: The serialized engine.
        compute_capabilities: The GPUs that it is for; none: it is portable.
        description: Its layers and types, read back from what was built.
        source: Where they were read: "engine inspector" or "builder log".
        weight_bytes: The weights inside it, as the library counts them, or None if it does not say.
        timing_cache: Kernel timings for later builds, or None where the library keeps none.
        seconds: How long building took, parsing included.
        warnings: What the builder warned of.
    """

    plan: bytes
    compute_capabilities: tuple[str, ...]
    description: EngineDescription
    source: str
    weight_bytes: int | None
    timing_cache: bytes | None
    seconds: float
    warnings: tuple[str, ...]


def build_plan(
    library: Library,
    onnx: Path,
    options: PlanOptions,
    gpu: GpuFacts | None,
    *,
    timing_cache: bytes = b"",
    causes: Mapping[str, str] | None = None,
) -> BuiltPlan:
    """Build a plan.

    Args:
        library: TensorRT or TensorRT-RTX.
        onnx: The model; its precisions are what is built.
        options: How.
        gpu: This machine's GPU, or None where there is none.
        timing_cache: Of an earlier build on this machine.
        causes: For nodes of the model, what about them a parser may refuse; told where it does.

    Raises:
        BackendError: the library refuses the model or an option, or runs out of memory.
    """
    library.check(options, None if gpu is None else gpu.compute_capability)
    targets = _targets(library, options, gpu)
    messages = Messages()
    logger = library.logger(messages)
    start = time.perf_counter()
    builder = _create(lambda: library.module.Builder(logger), library, messages)
    network = builder.create_network(library.network_flags())
    parser = library.module.OnnxParser(network, logger)
    library.adjust_parser(parser, options)
    if not parser.parse_from_file(str(onnx)):
        raise _refusal(library, parser, onnx, causes or {})
    config = builder.create_builder_config()
    library.configure(config, options, targets)
    _add_profiles(builder, config, network, options)
    cache = library.timing_cache(config, timing_cache)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise _failure(library, messages, options, onnx)
    built = bytes(plan)
    description, source, weight_bytes = _read_back(library, built, messages, gpu, options)
    return BuiltPlan(
        built,
        targets,
        description,
        source,
        weight_bytes,
        None if cache is None else bytes(cache.serialize()),
        time.perf_counter() - start,
        tuple(dict.fromkeys(messages.warnings)),
    )


def _targets(library: Library, options: PlanOptions, gpu: GpuFacts | None) -> tuple[str, ...]:
    """Return the GPUs that the plan will be for; none: any that a portable plan runs on."""
    if library.builds_without_gpu or gpu is None:
        return options.compute_capabilities
    return (gpu.compute_capability,)


def _failure(library: Library, messages: Messages, options: PlanOptions, onnx: Path) -> Exception:
    said = _in_short(messages.tell(), 140)
    if any("OutOfMemory" in e or "out of memory" in e.lower() for e in messages.errors):
        limit = options.workspace_bytes
        of = "" if limit is None else f" under the limit of {limit:,} bytes"
        return BackendError(
            f"{library.title} runs out of memory{of} when building {onnx.name}: {said}",
            fix="raise --workspace, or lower --max-batch",
        )
    return BackendError(
        f"{library.title} cannot build {onnx.name}: {said}",
        fix="try a smaller --max-batch, other GPUs with --sm, or another --variant",
    )


def _create(make: Any, library: Library, messages: Messages) -> Any:
    try:
        return make()
    except (TypeError, RuntimeError) as error:  # its factory returned a null pointer
        raise BackendError(
            f"{library.title} cannot start a build: {messages.tell()}",
            fix="`cnnedge doctor` says what this machine lacks",
        ) from error


def _add_profiles(builder: Any, config: Any, network: Any, options: PlanOptions) -> None:
    image = network.get_input(0)
    size = tuple(image.shape)[1:]
    for profile in options.profiles:
        shapes = [(n, *size) for n in (profile.smallest, profile.typical, profile.largest)]
        added = builder.create_optimization_profile()
        added.set_shape(image.name, *shapes)
        config.add_optimization_profile(added)


def _read_back(
    library: Library, plan: bytes, messages: Messages, gpu: GpuFacts | None, options: PlanOptions
) -> tuple[EngineDescription, str, int | None]:
    """Return what was built: from the engine where it can be loaded, else from the log.

    A plan of TensorRT-RTX may be for other GPUs than this machine's, or than the library knows.
    """
    try:
        if gpu is not None:
            try:
                trusted = options.version_compatible
                engine = library.deserialize(plan, messages, trust_code=trusted)
                description = _inspect(library, engine, options.profiles)
                weight_bytes = _weight_bytes(library, engine, messages)
            except BackendError:
                if not (library.builds_without_gpu and messages.layers):
                    raise
            else:
                return description, "engine inspector", weight_bytes
        if messages.layers:
            return read_log(messages.layers[-1]), "builder log", messages.weight_bytes
    except (ValueError, KeyError, TypeError) as error:
        raise BackendError(
            f"what {library.title} built cannot be read back: {error}",
            fix="report this, with the library's version",
        ) from error
    raise BackendError(
        f"{library.title} built a plan and did not describe it, so nothing of it can be checked",
        fix="build it on a machine with a GPU",
    )


def _inspect(library: Library, engine: Any, profiles: Sequence[Profile]) -> EngineDescription:
    """Read an engine's layers, those of each profile with a context that is set to it.

    Without one the inspector tells neither the types nor the formats of tensors whose batch is
    open: "Otherwise values for dynamic-shape dimensions will be displayed as -1 and format
    information will not be shown" (NvInferRuntime.h, IEngineInspector::setExecutionContext).
    """
    names = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
    modes = {name: engine.get_tensor_mode(name).name.lower() for name in names}
    (image,) = (name for name in names if modes[name] == "input")
    size = tuple(engine.get_tensor_shape(image))[1:]
    inspector = engine.create_engine_inspector()
    context = library.bare_context(engine)
    layers: list[EngineLayer] = []
    for index, profile in enumerate(profiles):
        # Queued on the default stream, before anything else is.
        if not (
            context.set_optimization_profile_async(index, 0)
            and context.set_input_shape(image, (profile.typical, *size))
        ):
            raise ValueError(f"its profile {index} takes no batch of {profile.typical}")
        inspector.execution_context = context
        text = inspector.get_engine_information(library.module.LayerInformationFormat.JSON)
        layers += [layer for layer in read_inspector(text).layers if layer.profile == index]
    tensors = tuple(
        (
            EngineTensor(
                name,
                tuple(engine.get_tensor_shape(name)),
                str(library.module.nptype(engine.get_tensor_dtype(name)).__name__),
            ),
            modes[name],
        )
        for name in names
    )
    return EngineDescription(tuple(layers), tensors)


def _weight_bytes(library: Library, engine: Any, messages: Messages) -> int | None:
    statistics = getattr(library.module, "EngineStat", None)  # from 10.7 on
    if statistics is None:
        return messages.weight_bytes
    return int(engine.get_engine_stat(statistics.TOTAL_WEIGHTS_SIZE))


# Where in its own source a library stands tells nobody what to do, and takes up the line.
_PLACES = re.compile(
    r"\bI\w+::\w+: |[\[(]*\w+\.(?:cpp|h|cu):\d+(?:: \w+)?[\])]* ?"
    r"|\.? ?In \w+ at [\w/.]+:\d+"
)


def _in_short(said: str, most: int) -> str:
    """Return what the library says, in so many characters, without where in its source it is."""
    return one_line(_PLACES.sub("", said), most)


def _refusal(library: Library, parser: Any, onnx: Path, causes: Mapping[str, str]) -> BackendError:
    """Name the node that a parser refused, why, and what about it in our graph is the cause."""
    errors = [parser.get_error(i) for i in range(parser.num_errors)]
    if not errors:
        return BackendError(f"{library.title} cannot read {onnx}", fix="export the bundle again")
    first = errors[0]
    node, operator = first.node_name(), first.node_operator()
    where = f"the node {node!r} ({operator})" if node else "the model"
    said = _in_short(first.desc(), 110)
    cause = causes.get(node)
    return BackendError(
        f"{library.title} refuses {where} of {onnx.name}: {said}"
        + (f"; cause: {cause}" if cause else ""),
        fix=None if cause else "choose another --variant, or leave that layer out of it",
    )
