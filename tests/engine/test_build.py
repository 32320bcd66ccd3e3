"""What a builder is told, on each library's own names: never a precision, always what was asked."""

from __future__ import annotations

import json

import pytest
from fakes import fake_module

from cnnedge.backends.tensorrt import build_plan, open_library
from cnnedge.errors import BackendError, MissingExtraError
from cnnedge.plan import PlanOptions

DESCRIPTION = json.dumps({"Layers": [{"Name": "conv1", "LayerType": "CaskConvolution"}]})


@pytest.fixture
def built(stand_in, surface, toy_bundle):
    """Return a maker of ``(plan, network, config)`` on this surface, on a machine with a GPU."""

    def make(options=None, *, timing_cache=b"", variant="fp16", **behaviour):
        library, gpu, _, module = stand_in(surface, **{"description": DESCRIPTION} | behaviour)
        found = build_plan(
            library,
            toy_bundle.path(f"model.{variant}.onnx"),
            options or PlanOptions(),
            gpu.facts,
            timing_cache=timing_cache,
        )
        (call,) = [call for call in module.calls if call[0] == "build"]
        return found, call[1], call[2]

    return make


def flags(config):
    aliases = {"WEIGHTLESS": "STRIP_PLAN"}  # as 10.3 first called it
    return {aliases.get(flag.name, flag.name) for flag in config._flags}


def test_precision_is_the_graphs_alone(built, surface):
    _, network, config = built()
    if surface == "tensorrt-10.3":  # there it has to be asked for, and the flags still exist
        assert network._flags == 1 << 1
    assert not flags(config) & {"FP16", "INT8", "BF16", "FP8", "INT4"}
    assert not hasattr(config, "int8_calibrator")
    assert config.profiling_verbosity.name == "DETAILED"


def test_fp32_is_not_tf32_unless_asked(built):
    assert "TF32" not in flags(built()[2])
    assert "TF32" in flags(built(PlanOptions(tf32=True))[2])


def test_profiles(built):
    size = (32, 32, 3)
    static = [((1, *size), (1, *size), (1, *size))]
    assert built(PlanOptions(max_batch=1))[2]._profiles == static
    assert built(PlanOptions(max_batch=32))[2]._profiles == [
        *static,
        ((1, *size), (16, *size), (32, *size)),
    ]


def test_a_workspace_and_a_level(built):
    _, _, config = built(PlanOptions(workspace_bytes=2**20, optimization_level=5))
    assert config._pools == {"WORKSPACE": 2**20}
    assert config.builder_optimization_level == 5
    assert built()[2]._pools == {}


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"strip_weights": True}, {"STRIP_PLAN", "REFIT_IDENTICAL"}),
        ({"refit": True}, {"REFIT"}),
        ({"strip_weights": True, "refit": True}, {"STRIP_PLAN", "REFIT"}),
    ],
)
def test_weights_left_out_or_replaceable(built, options, expected):
    assert flags(built(PlanOptions(**options))[2]) == expected


def test_plans_that_travel(built, surface):
    if surface.startswith("rtx"):
        with pytest.raises(BackendError, match="the very release that built it"):
            built(PlanOptions(version_compatible=True))
        with pytest.raises(BackendError, match="for the GPUs it names"):
            built(PlanOptions(hardware_compatible=True))
        return
    _, _, config = built(PlanOptions(version_compatible=True, hardware_compatible=True))
    assert flags(config) == {"VERSION_COMPATIBLE"}
    assert config.hardware_compatibility_level.name == "AMPERE_PLUS"


def test_targets(built, surface):
    if not surface.startswith("rtx"):
        found, _, config = built()
        assert found.compute_capabilities == ("8.9",)
        with pytest.raises(BackendError, match=r"for the GPU it runs on \(8\.9\), not for 8\.7"):
            built(PlanOptions(compute_capabilities=("8.7",)))
        return
    found, _, config = built()
    assert (found.compute_capabilities, config._targets) == ((), {})  # portable
    found, _, config = built(PlanOptions(compute_capabilities=("8.9", "12.0")))
    assert config.num_compute_capabilities == 2
    assert config._targets == {0: "SM89", 1: "SM120"}
    with pytest.raises(BackendError, match=r"does not build for compute capability 8\.7, 9\.0"):
        built(PlanOptions(compute_capabilities=("8.7", "9.0")))
    with pytest.raises(BackendError, match="one kind of GPU at a time"):
        built(PlanOptions(compute_capabilities=("8.6", "8.9"), refit=True))


def test_kernel_timings_are_used_and_extended(built, surface):
    found, _, config = built(timing_cache=b"known")
    if surface.startswith("rtx"):
        assert found.timing_cache is None  # setting one would make it ask for a GPU
        assert config._cache is None
    else:
        assert config._cache._content == b"known"
        assert found.timing_cache == b"known+timed"


def test_dla(built, surface):
    options = PlanOptions(dla_core=1, max_batch=1)
    if surface.startswith("rtx"):
        with pytest.raises(BackendError, match="has no DLA"):
            built(options)
        return
    with pytest.raises(BackendError, match="no strongly typed network on a DLA"):
        built(options)  # 10.3 and 11.4.0 alike
    if surface == "tensorrt-10.3":
        return
    _, network, config = built(options, version="11.4.1.5")
    assert (config.default_device_type.name, config.DLA_core) == ("DLA", 1)
    assert "GPU_FALLBACK" in flags(config)
    assert network._parser_flags == {"ADJUST_FOR_DLA"}
    with pytest.raises(BackendError, match="one fixed batch size"):
        built(PlanOptions(dla_core=0), version="11.4.1.5")


def test_the_inspector_serves_where_there_is_a_gpu(built, surface):
    found, _, _ = built()
    assert found.source == "engine inspector"
    assert [layer.name for layer in found.description.layers] == ["conv1"]
    types = {tensor.name: tensor.dtype for tensor, _ in found.description.tensors}
    assert types == {"image": "uint8", "probabilities": "float32"}
    # the statistic came after 10.3
    assert found.weight_bytes == (None if surface == "tensorrt-10.3" else 12345)


def test_what_cannot_be_read_back_is_not_believed(built):
    with pytest.raises(BackendError, match="cannot be read back: .*profiling verbosity"):
        built(description='{"Layers": ["conv1 + relu1"]}')
    with pytest.raises(BackendError, match="cannot be read back"):
        built(description='{"Bindings": []}')


def test_out_of_memory_is_named(built):
    said = "[codes] Error Code 2: OutOfMemory (Requested size was 29204884 bytes.)"
    with pytest.raises(BackendError) as caught:
        built(PlanOptions(workspace_bytes=2**20), build_error=said)
    assert "runs out of memory under the limit of 1,048,576 bytes" in str(caught.value)
    assert "lower --max-batch" in str(caught.value)
    with pytest.raises(BackendError, match="cannot build model.fp16.onnx: Error Code 9"):
        built(build_error="Error Code 9: something else")


@pytest.mark.parametrize("surface", ["tensorrt-10.3", "tensorrt-11.4"])
def test_tensorrt_needs_the_gpu_it_builds_for(surface, toy_bundle):
    library = open_library("tensorrt", lambda name: fake_module(surface, None))
    with pytest.raises(BackendError, match="builds on the GPU that it builds for"):
        build_plan(library, toy_bundle.path("model.fp16.onnx"), PlanOptions(), None)


@pytest.mark.parametrize("surface", ["tensorrt-10.3", "tensorrt-11.4"])
def test_a_builder_that_cannot_start_says_why(surface, stand_in, toy_bundle):
    _, gpu, _, _ = stand_in(surface)
    broken = open_library("tensorrt", lambda name: fake_module(surface, None))
    with pytest.raises(BackendError, match="cannot start a build: CUDA initialization failure"):
        build_plan(broken, toy_bundle.path("model.fp16.onnx"), PlanOptions(), gpu.facts)


def test_libraries_that_are_not_to_be_had():
    def missing(name):
        raise ImportError(f"No module named {name!r}", name=name)

    def broken(name):
        raise ImportError("libnvinfer.so.11: cannot open shared object file")

    with pytest.raises(MissingExtraError, match=r"TensorRT-RTX needs .*cnnedge\[rtx\]"):
        open_library("rtx", missing)
    with pytest.raises(BackendError, match=r"installed and cannot be loaded: libnvinfer\.so\.11"):
        open_library("tensorrt", broken)
    old = fake_module("tensorrt-10.3", None, version="8.6.1")
    with pytest.raises(BackendError, match=r"TensorRT 8\.6\.1 is too old"):
        open_library("tensorrt", lambda name: old)
