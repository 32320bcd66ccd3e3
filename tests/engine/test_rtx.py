"""Real engines, built by TensorRT-RTX on this machine, which needs no GPU, and read back.

Proved here of every exported graph: it parses and builds, computes in what was asked, fuses its
Relus, takes and gives the tensors of the ONNX contract, and weighs what its weights do.
"""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest
from click.testing import CliRunner
from fakes import fake_gpu

from cnnedge.backends.tensorrt import build_plan, open_library
from cnnedge.bundle import open_bundle
from cnnedge.cli import main
from cnnedge.engine import build_engines
from cnnedge.engine.check import check_engine, refusal_causes
from cnnedge.errors import BackendError
from cnnedge.graph.precision import achieved_precision
from cnnedge.plan import PlanOptions

pytest.importorskip("tensorrt_rtx", reason="the extra `rtx` is not installed")
pytestmark = pytest.mark.system

MODELS = ("alexnet_v1", "alexnet_v2", "alexnet", "vgg16")
VARIANTS = ("fp32", "fp16", "int8-trt")
BYTES = {"float32": 4, "float16": 2, "int8": 1}


@pytest.fixture(scope="module")
def rtx():
    return open_library("rtx")


@pytest.fixture(scope="module")
def graphs(tmp_path_factory):
    """Return a maker of a built-in model's three graphs: random weights, real calibration."""
    folder = tmp_path_factory.mktemp("graphs")
    made = {}

    def make(name):
        if name not in made:
            made[name] = _export(name, folder / name)
        return made[name]

    return make


def _export(name, folder):
    import onnx_ir as ir

    from cnnedge.export import write_onnx
    from cnnedge.graph.float16 import to_float16
    from cnnedge.quantize import TRT, calibrate, choose_ranges, make_plan, quantize
    from cnnedge.recipe import make_recipe
    from cnnedge.source import resolve

    folder.mkdir()
    source, _ = resolve(make_recipe(model=name))
    exported = source.to_onnx().model
    write_onnx(exported, folder / "fp32.onnx")
    write_onnx(to_float16(exported).model, folder / "fp16.onnx")
    size = (1, source.image.height, source.image.width, source.image.channels)
    images = [np.random.default_rng(i).integers(0, 256, size, np.uint8) for i in range(2)]
    plan = make_plan(exported, TRT)
    seen = calibrate(exported, plan.tensors, images, folder)
    int8 = quantize(exported, plan, choose_ranges(seen, plan, "minmax")).model
    write_onnx(int8, folder / "int8-trt.onnx")
    return {v: (folder / f"{v}.onnx", ir.load(folder / f"{v}.onnx")) for v in VARIANTS}


def build(rtx, path, model, **options):
    chosen = PlanOptions(**options)
    built = build_plan(rtx, path, chosen, None)
    report = check_engine(
        model,
        built.description,
        profiles=len(chosen.profiles),
        source=built.source,
        weight_bytes=built.weight_bytes,
    )
    return built, report


def weight_bytes(model):
    """Return what a graph's weights take, in the types they are stored in."""
    from cnnedge.graph.precision import weighted_layers

    return sum(layer.weights * BYTES[layer.stored] for layer in weighted_layers(model))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", MODELS)
def test_it_builds_what_was_asked(rtx, graphs, name, variant):
    path, model = graphs(name)[variant]
    _, report = build(rtx, path, model, max_batch=8)
    assert report.violations == ()
    assert report.source == "builder log"
    asked = achieved_precision(model)
    for kind in ("macs", "weights"):
        assert report.achieved[kind] == pytest.approx(asked[kind], abs=1e-9)
    convolutions = sum(node.op_type == "Conv" for node in model.graph)
    assert len(report.fusions) == convolutions
    assert all(fusion.accepted for fusion in report.fusions)
    # INT8 kernels with a scale per channel hand FP32 on; their Relu is in the kernel behind them,
    # with bias and the next quantizer (TensorRT-RTX 1.7); float ones have it inside.
    expected = "a second pass" if variant == "int8-trt" else "one kernel"
    assert {fusion.where for fusion in report.fusions} == {expected}
    assert [(t["name"], t["mode"], t["dtype"]) for t in report.tensors] == [
        ("image", "input", "uint8"),
        ("probabilities", "output", "float32"),
    ]
    assert len(report.counts) == 2
    assert len(report.layers) == sum(report.counts)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_static_plan_weighs_what_its_weights_do(rtx, graphs, variant):
    path, model = graphs("vgg16")[variant]
    built, report = build(rtx, path, model, max_batch=1)
    assert report.weight_bytes == pytest.approx(weight_bytes(model), rel=0.05)
    assert len(built.plan) == pytest.approx(report.weight_bytes, rel=0.05)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("target", ["8.0", "8.6", "8.9", "12.0", "12.1"])
def test_it_builds_for_each_kind_of_gpu(rtx, graphs, target, variant):
    path, model = graphs("alexnet_v1")[variant]
    built, report = build(rtx, path, model, max_batch=1, compute_capabilities=(target,))
    assert built.compute_capabilities == (target,)
    assert report.violations == ()


def test_one_plan_for_several_kinds(rtx, graphs):
    path, model = graphs("alexnet_v1")["int8-trt"]
    _, report = build(rtx, path, model, compute_capabilities=("8.0", "8.6", "8.9", "12.0"))
    assert report.violations == ()


def test_turing_drags_int8_down_to_fp16_and_that_is_found(rtx, graphs):
    """A plan is made of what all its GPUs have; the builder does not say so, the engine does."""
    path, model = graphs("alexnet_v1")["int8-trt"]
    _, report = build(rtx, path, model, max_batch=1, compute_capabilities=("7.5", "8.9"))
    assert len(report.violations) == 5
    assert report.violations[0] == "conv1: int8 was asked for, and float16 was built"
    assert report.achieved["macs"]["float16"] > 0.9


def test_turing_has_no_fp32_products(rtx, graphs):
    path, model = graphs("alexnet_v1")["fp32"]
    with pytest.raises(BackendError, match="FP32 GEMM is not supported"):
        build(rtx, path, model, compute_capabilities=("7.5",))
    path, model = graphs("alexnet_v1")["fp16"]
    assert build(rtx, path, model, compute_capabilities=("7.5",))[1].violations == ()


def with_a_quantizer_before_relu(path, into):
    """Write a graph with a Q/DQ pair between its first convolution and that one's Relu."""
    import onnx
    from onnx import helper

    model = onnx.load(path)
    nodes = model.graph.node
    relu = next(i for i, node in enumerate(nodes) if node.op_type == "Relu")
    scale = next(node.input[1] for node in nodes if node.op_type == "QuantizeLinear")
    zero = next(node.input[2] for node in nodes if node.op_type == "QuantizeLinear")
    before = nodes[relu].input[0]
    pair = [
        helper.make_node("QuantizeLinear", [before, scale, zero], ["early_q"], name="early/q"),
        helper.make_node("DequantizeLinear", ["early_q", scale, zero], ["early"], name="early/dq"),
    ]
    nodes[relu].input[0] = "early"
    for offset, node in enumerate(pair):
        nodes.insert(relu + offset, node)
    onnx.save(model, into)


def test_a_quantizer_that_breaks_a_fusion_is_found(rtx, toy_bundle, tmp_path):
    import onnx_ir as ir

    path = tmp_path / "broken.onnx"
    with_a_quantizer_before_relu(toy_bundle.path("model.int8-trt.onnx"), path)
    _, report = build(rtx, path, ir.load(path), max_batch=1)
    assert report.violations == (
        "conv1: a quantizer stands between it and conv1/relu, which breaks their fusion",
    )
    whole = toy_bundle.path("model.int8-trt.onnx")
    assert build(rtx, whole, ir.load(whole), max_batch=1)[1].violations == ()


def refusal(rtx, path):
    import onnx_ir as ir

    with pytest.raises(BackendError) as caught:
        build_plan(rtx, path, PlanOptions(), None, causes=refusal_causes(ir.load(path)))
    return str(caught.value)


def test_a_refusal_names_the_node_and_the_cause(rtx, toy_bundle, graphs, tmp_path):
    from cnnedge.graph.write import write_onnx
    from cnnedge.quantize import quantize_dense_weights

    said = refusal(rtx, toy_bundle.path("model.int8.onnx"))
    assert "refuses the node 'image/nchw/uint8' (Transpose) of model.int8.onnx" in said
    assert "cause: it works on uint8 values, as graphs for CPUs do" in said
    _, model = graphs("alexnet_v1")["fp32"]
    write_onnx(quantize_dense_weights(model, 4).model, tmp_path / "model.int4-weight.onnx")
    said = refusal(rtx, tmp_path / "model.int4-weight.onnx")
    assert "refuses the node 'fc1' (MatMulNBits) of model.int4-weight.onnx" in said
    assert "cause: MatMulNBits is ONNX Runtime's own operation" in said


def test_a_zero_point_is_named_as_the_cause(rtx, toy_bundle, tmp_path):
    import onnx

    model = onnx.load(toy_bundle.path("model.int8-trt.onnx"))
    first = next(node for node in model.graph.node if node.op_type == "QuantizeLinear")
    for tensor in model.graph.initializer:
        if tensor.name == first.input[2]:
            tensor.CopyFrom(onnx.numpy_helper.from_array(np.int8(3), tensor.name))
    path = tmp_path / "shifted.onnx"
    onnx.save(model, path)
    said = refusal(rtx, path)
    assert "on-zero zero point" in said
    assert "cause: its zero point is 3, as CPUs want it: build the int8-trt" in said


def test_a_workspace_too_small_is_named(rtx, graphs):
    path, model = graphs("alexnet_v1")["fp16"]
    with pytest.raises(BackendError) as caught:
        build(rtx, path, model, max_batch=128, workspace_bytes=1024)
    assert "runs out of memory under the limit of 1,024 bytes" in str(caught.value)


def test_a_file_that_is_no_model_is_refused(rtx, tmp_path):
    path = tmp_path / "cut.onnx"
    path.write_bytes(b"\x08\x07\x12")
    with pytest.raises(BackendError, match=r"refuses the model of cut\.onnx|cannot read"):
        build_plan(rtx, path, PlanOptions(), None)


def test_the_command(bundle_copy):
    arguments = ["engine", str(bundle_copy), "--runtime", "rtx", "--max-batch", "4"]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.output
    assert "8.6 and later" in result.output
    assert "not run: no such GPU here" in result.output
    assert "matrix" not in result.output
    files = [engine.file for engine in open_bundle(bundle_copy).manifest.engines]
    assert files == ["engines/fp16.rtx.plan"]
    result = CliRunner().invoke(main, [*arguments, "--variant", "int8-trt"])
    assert "int8-trt: outside NVIDIA's support matrix for TensorRT-RTX" in result.output
    assert "in a second pass" in result.output
    bundle = open_bundle(bundle_copy)
    note = json.loads(bundle.path("engines/int8-trt.rtx.json").read_text())
    assert note["calibration_sha256"] == bundle.manifest.calibration.sha256
    assert note["replay"] is None
    assert note["found"]["violations"] == []
    assert [profile["largest"] for profile in note["profiles"]] == [1, 4]
    # again, in the same place; and for a GPU of its own beside it
    assert CliRunner().invoke(main, arguments).exit_code == 0
    (ada,) = json.loads(
        CliRunner().invoke(main, [*arguments, "--sm", "8.9", "--variant", "fp16", "--json"]).stdout
    )
    assert ada["kept"]
    assert len(open_bundle(bundle_copy).manifest.engines) == 3


def test_a_plan_that_is_not_kept_exits_with_3(bundle_copy):
    arguments = ["engine", str(bundle_copy), "--runtime", "rtx", "--sm", "7.5,8.9"]
    variants = ["--variant", "fp16,int8-trt"]
    result = CliRunner().invoke(main, [*arguments, *variants])
    assert result.exit_code == 3
    assert "int8 was asked for, and float16 was built" in result.stderr
    kept = open_bundle(bundle_copy).manifest.engines
    assert [engine.variant for engine in kept] == ["fp16"]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--sm", "9.0"], "does not build for compute capability 9.0"),
        (["--sm", "big"], "is no compute capability"),
        (["--workspace", "lots"], "is no size in bytes"),
        (["--variant", "int8"], "is written for CPUs"),
        (["--version-compatible"], "the very release that built it"),
        (["--strip-weights"], "on a machine with a GPU alone"),
        (["--dla", "0"], "has no DLA"),
    ],
)
def test_what_cannot_be_built_is_one_line(bundle_copy, options, says):
    result = CliRunner().invoke(main, ["engine", str(bundle_copy), "--runtime", "rtx", *options])
    assert result.exit_code == 1
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert says in line
    assert open_bundle(bundle_copy).manifest.engines == ()


def test_export_builds_engines_too(toy_file, tmp_path):
    arguments = ["export", str(toy_file), "-o", str(tmp_path / "toy"), "--max-drop", "3"]
    result = CliRunner().invoke(main, [*arguments, "--engine", "rtx", "--test-images", "40"])
    assert result.exit_code == 0, result.output
    engines = open_bundle(tmp_path / "toy").manifest.engines
    assert [engine.variant for engine in engines] == ["fp16"]
    result = CliRunner().invoke(main, [*arguments, "--engine", "coreml", "--force"])
    assert result.exit_code == 1
    assert "--engine " in result.stderr


def test_a_kill_in_mid_build_leaves_the_bundle(bundle_copy):
    """Killed while the library builds: nothing is listed that is not whole."""
    code = (
        "import os, cnnedge.change as b\n"
        "from cnnedge.engine import build_engines\n"
        "b.write_text = lambda *a: os._exit(9)\n"
        f"build_engines({str(bundle_copy)!r}, 'rtx', variants=['fp16'])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True)
    assert done.returncode == 9
    assert open_bundle(bundle_copy).manifest.engines == ()
    build_engines(bundle_copy, "rtx", variants=["fp16"])
    assert len(open_bundle(bundle_copy).manifest.engines) == 1


@pytest.mark.parametrize(("sm", "replayed"), [(("12.0",), None), ((), "runtime")])
def test_a_gpu_that_cannot_load_the_plan_does_not_stop_the_build(
    bundle_copy, monkeypatch, sm, replayed
):
    """The GPU is a stand-in, which the real library finds no driver for: as it would on Hopper."""
    gpu, _ = fake_gpu(capability=(8, 9))
    monkeypatch.setattr("cnnedge.backends.gpu.open_gpu", lambda: gpu)
    options = PlanOptions(compute_capabilities=sm)
    (built,) = build_engines(bundle_copy, "rtx", options, variants=["fp16"])
    assert built.report.source == "builder log"
    assert not built.failed
    assert (built.note.replay or {}).get("diverged") == replayed
    (engine,) = open_bundle(bundle_copy).manifest.engines
    assert engine.sha256 == built.note.sha256
