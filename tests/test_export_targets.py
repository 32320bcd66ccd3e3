"""The deployment targets: what of them can be run without the device."""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from cnnedge.plan import PlanNote
from cnnedge.recipe import read_recipe

TARGETS = Path(__file__).parents[1] / "export"
SCRIPT = TARGETS / "jetson-orin" / "build_plans.py"

# Stands in for NVIDIA's tool: tells its version as that does, and writes what it is told to.
TRTEXEC = """#!{python}
import json, os, sys
print("&&&& RUNNING TensorRT.trtexec [TensorRT v{version}] # trtexec")
options = dict(word.lstrip("-").partition("=")[::2] for word in sys.argv[1:])
if "help" in options:
    sys.exit(0)
print("[10/10/2026-10:00:00] [I] Compute Capability: 8.7")
if {fails!r}:
    print("[10/10/2026-10:00:00] [E] Error[9]: " + {fails!r})
    sys.exit(1)
for line in {log!r}:
    print(line)
open(options["saveEngine"], "wb").write(b"plan of " + open(options["onnx"], "rb").read()[:64])
layers = [
    {{"Name": "conv1 + Relu" + where, "LayerType": "CaskConvolution",
      "Inputs": [{{{key!r}: text}}]}}
    for where, text in (("", {datatype!r}), (" [profile 1]", "Row major linear FP32"))
]
json.dump({{"Layers": layers, "Bindings": ["image"]}}, open(options["exportLayerInfo"], "w"))
print("[10/10/2026-10:00:09] [I] GPU Compute Time: min = 1 ms, max = 2 ms, mean = 1.5 ms, "
      "median = 1.25 ms, percentile(90%) = 1.9 ms")
"""
INT8, HALF = (
    "Thirty-two wide channel vectorized row major Int8 format",
    "Row major linear FP16 format",
)
LISTED = ["[I] [TRT] [DlaLayer] {ForeignNode[conv1...fc8]}", "[I] [TRT] [GpuLayer] SHUFFLE: x"]


@pytest.fixture
def device(tmp_path):
    """Return a runner of the script on a device with a given TensorRT."""

    def run(bundle, *words, version="100300", fails="", datatype=INT8, log=LISTED):
        key = "Datatype" if version.startswith("11") else "Format/Datatype"
        tool = tmp_path / "trtexec"
        tool.write_text(
            TRTEXEC.format(
                python=sys.executable,
                version=version,
                fails=fails,
                datatype=datatype,
                log=log,
                key=key,
            )
        )
        tool.chmod(0o755)
        return subprocess.run(
            [sys.executable, SCRIPT, bundle, "-o", tmp_path / "plans", "--trtexec", tool, *words],
            capture_output=True,
            text=True,
            check=False,
            env={"PATH": os.environ["PATH"]},
        )

    return run


def command_lines(done):
    return [line.split() for line in done.stdout.splitlines()]


def test_it_runs_on_jetpack_6():
    for path in (SCRIPT, SCRIPT.with_name("classify.py")):
        tree = ast.parse(path.read_text(), feature_version=(3, 10))
        imported = {n.names[0].name for n in ast.walk(tree) if isinstance(n, ast.Import)}
        assert not any(name.startswith("cnnedge") for name in imported)
    names = {name.split(".")[0] for name in imported_by(SCRIPT)}
    assert names <= set(sys.stdlib_module_names)


def imported_by(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield str(node.module)


@pytest.mark.system
def test_a_plan_comes_with_the_note_that_cnnedge_reads(device, toy_bundle, tmp_path):
    done = device(toy_bundle.root, "--variant", "int8-trt")
    assert done.returncode == 0, done.stderr
    plans = tmp_path / "plans"
    plan = plans / "int8-trt.tensorrt.plan"
    note = PlanNote.from_json((plans / "int8-trt.tensorrt.json").read_text(), "note")
    variant = toy_bundle.manifest.variant("int8-trt")
    assert note.sha256 == hashlib.sha256(plan.read_bytes()).hexdigest()
    assert (note.library, note.compute_capabilities) == ("10.3.0", ("8.7",))
    assert note.onnx_sha256 == variant.sha256
    assert note.calibration_sha256 == toy_bundle.manifest.calibration.sha256
    assert note.found["layer_types"] == {"int8": 1.0}
    assert "GPU Compute Time: median 1.25 ms" in done.stdout
    assert sorted(p.suffix for p in plans.iterdir()) == [".json", ".json", ".log", ".plan"]


@pytest.mark.system
def test_the_command_lines_of_both_generations(device, toy_bundle):
    older = command_lines(device(toy_bundle.root, "--dry-run"))
    newer = command_lines(device(toy_bundle.root, "--dry-run", version="110401"))
    assert [len(older), len(newer)] == [2, 2]
    for words in older:
        assert "--stronglyTyped" in words
        assert not {"--fp16", "--int8"} & set(words)
    assert all("--stronglyTyped" not in words for words in newer)
    image = toy_bundle.manifest.image
    size = f"{image.height}x{image.width}x{image.channels}"
    assert f"--maxShapes=image:8x{size}" in older[0]
    assert [word for word in older[0] if word.startswith("--profile=")] == [
        "--profile=0",
        "--profile=1",
    ]


@pytest.mark.system
def test_it_asks_of_trtexec_what_cnnedge_asks(device, toy_bundle):
    from cnnedge.engine import trtexec_lines
    from cnnedge.plan import PlanOptions

    (ours,) = trtexec_lines(
        toy_bundle.root, "tensorrt", PlanOptions(max_batch=4), variants=["int8-trt"]
    )
    (theirs,) = command_lines(
        device(toy_bundle.root, "--dry-run", "--variant", "int8-trt", "--max-batch", "4")
    )
    files = ("--onnx", "--saveEngine", "--exportLayerInfo")
    kept = [word for word in theirs[1:] if not word.startswith(files)]
    assert sorted(kept) == sorted(w for w in ours.split()[1:] if not w.startswith(files))


@pytest.mark.system
@pytest.mark.parametrize("version", ["100300", "110401"])
def test_what_was_built_is_read_in_both_generations_words(device, toy_bundle, version):
    for built, status in (("Int8", 0), (INT8, 0), ("Half", 3), (HALF, 3), ("Float", 3)):
        done = device(toy_bundle.root, "--variant", "int8-trt", version=version, datatype=built)
        assert done.returncode == status, (built, done.stderr)
        assert "warning" not in done.stderr
    for built in ("N/A due to dynamic shapes", "BFloat16", "UInt8"):
        done = device(toy_bundle.root, "--variant", "int8-trt", version=version, datatype=built)
        assert "could not be read back, so it is not checked" in done.stderr, built


@pytest.mark.system
def test_a_dla_has_its_rules(device, toy_bundle, tmp_path):
    (older,) = command_lines(device(toy_bundle.root, "--dla", "1", "--dry-run"))
    assert {"--useDLACore=1", "--allowGPUFallback", "--fp16"} <= set(older)
    assert "--stronglyTyped" not in older
    assert not any(word.startswith("--profile=") for word in older)
    (newer,) = command_lines(device(toy_bundle.root, "--dla", "1", "--dry-run", version="110401"))
    assert "--fp16" not in newer
    for version in ("101600", "110400"):
        done = device(toy_bundle.root, "--dla", "0", "--dry-run", version=version)
        assert (done.returncode, done.stdout) == (1, "")
        assert "knows no DLA" in done.stderr
    assert device(toy_bundle.root, "--dla", "0", "--variant", "int8-trt").returncode == 1
    done = device(toy_bundle.root, "--dla", "0", datatype=HALF)
    assert done.returncode == 0
    assert "1 pieces run on the DLA, 1 layers on the GPU" in done.stdout
    note = json.loads((tmp_path / "plans" / "fp16.tensorrt-dla0.json").read_text())
    assert note["options"]["dla_core"] == 0


@pytest.mark.system
def test_a_dla_that_runs_nothing_is_an_error(device, toy_bundle, tmp_path):
    done = device(toy_bundle.root, "--dla", "0", datatype=HALF, log=LISTED[1:])
    assert done.returncode == 3
    assert "all 1 layers run on the GPU" in done.stderr
    assert not list((tmp_path / "plans").glob("*.plan"))


@pytest.mark.system
@pytest.mark.parametrize(("variant", "built"), [("int8-trt", HALF), ("fp16", INT8)])
def test_another_precision_is_not_kept(device, toy_bundle, tmp_path, variant, built):
    done = device(toy_bundle.root, "--variant", variant, datatype=built)
    assert done.returncode == 3
    assert "was asked for, and 1 of 1" in done.stderr
    left = [p.name for p in (tmp_path / "plans").iterdir()]
    assert not [name for name in left if ".plan" in name or ".partial" in name]


@pytest.mark.system
def test_refusals_are_one_line(device, bundle_copy, tmp_path):
    def refused(*words, **how):
        done = device(bundle_copy, *words, **how)
        assert done.returncode == 1
        assert done.stderr.startswith("error: ")
        assert len(done.stderr.strip().splitlines()) == 1
        assert not list(tmp_path.glob("plans/*.plan*"))
        return done.stderr

    assert "is too old" in refused("--dry-run", version="8601")
    assert "written for CPUs" in refused("--variant", "int8")
    assert "no variant int9" in refused("--variant", "int9")
    assert "is not there" in refused("--trtexec", str(tmp_path / "missing"))
    (bundle_copy / "model.fp16.onnx").write_bytes(b"x")
    assert "altered or cut short" in refused("--variant", "fp16")
    (bundle_copy / "manifest.json").write_text("{")
    assert "no bundle's manifest" in refused()


@pytest.mark.system
def test_a_failing_build_names_the_cause_and_leaves_no_plan(device, toy_bundle, tmp_path):
    done = device(toy_bundle.root, fails="Out of memory: could not allocate workspace")
    assert done.returncode == 1
    assert "Out of memory: could not allocate workspace; see" in done.stderr
    assert [p.suffix for p in (tmp_path / "plans").iterdir()] == [".log"]


@pytest.mark.parametrize(
    "recipe", sorted(TARGETS.glob("*/recipe.toml")), ids=lambda p: p.parent.name
)
def test_every_recipe_is_one(recipe):
    assert read_recipe(recipe).model


def test_every_target_is_listed():
    listed = (TARGETS / "README.md").read_text()
    for folder in TARGETS.iterdir():
        if folder.is_dir():
            assert f"]({folder.name}/)" in listed
            assert (folder / "README.md").exists()


@pytest.mark.system
def test_the_jetpack_6_app(monkeypatch, toy_bundle, device, tmp_path, capsys):
    """Run on a stand-in for the device: what it answers is what lies in the GPU's memory."""
    assert device(toy_bundle.root, "--variant", "int8-trt").returncode == 0
    app, gpu = load_app(monkeypatch, toy_bundle)
    stem, photo = str(tmp_path / "plans" / "int8-trt.tensorrt"), next_golden(toy_bundle)
    app.main(toy_bundle.root, stem, photo)
    assert toy_bundle.manifest.labels[2] in capsys.readouterr().out
    size = toy_bundle.manifest.image
    assert gpu.seen.shape == (size.height, size.width, size.channels)
    Path(stem + ".plan").write_bytes(b"x")
    with pytest.raises(SystemExit, match="altered or cut short"):
        app.main(toy_bundle.root, stem, photo)


def next_golden(bundle):
    return next((bundle.root / "selftest").glob("*.png"))


def load_app(monkeypatch, bundle):
    image, labels = bundle.manifest.image, bundle.manifest.labels
    size = (image.height, image.width, image.channels)
    gpu = SimpleNamespace(memory={}, seen=None, addresses={}, pending=[])

    def malloc(count):
        buffer = np.zeros(count, np.uint8)
        gpu.memory[buffer.ctypes.data] = buffer
        return 0, buffer.ctypes.data

    def copy(to, source, count, kind, stream):
        import ctypes

        gpu.pending.append(lambda: ctypes.memmove(to, source, count))
        return (0,)

    def execute(stream):
        def work():
            gpu.seen = gpu.memory[gpu.addresses["image"]].reshape(size).copy()
            answers = np.zeros(len(labels), np.float32)
            answers[2] = 1.0
            gpu.memory[gpu.addresses["probabilities"]][:] = answers.view(np.uint8)

        gpu.pending.append(work)
        return True

    def synchronize(stream):
        while gpu.pending:
            gpu.pending.pop(0)()
        return (0,)

    runtime = SimpleNamespace(
        cudaError_t=SimpleNamespace(cudaSuccess=0),
        cudaMemcpyKind=SimpleNamespace(cudaMemcpyHostToDevice=1, cudaMemcpyDeviceToHost=2),
        cudaStreamCreate=lambda: (0, 7),
        cudaMalloc=malloc,
        cudaMemcpyAsync=copy,
        cudaStreamSynchronize=synchronize,
    )
    context = SimpleNamespace(
        set_input_shape=lambda name, shape: True,
        set_tensor_address=gpu.addresses.__setitem__,
        execute_async_v3=execute,
    )
    engine = SimpleNamespace(
        create_execution_context=lambda: context,
        get_tensor_shape=lambda name: (-1, *size) if name == "image" else (-1, len(labels)),
    )
    tensorrt = SimpleNamespace(
        __version__="10.3.0",
        Logger=type("Logger", (), {"ERROR": 1, "__init__": lambda self, level: None}),
        Runtime=lambda logger: SimpleNamespace(deserialize_cuda_engine=lambda content: engine),
    )
    monkeypatch.setitem(sys.modules, "tensorrt", tensorrt)
    monkeypatch.setitem(sys.modules, "cuda", SimpleNamespace(bindings=None))
    monkeypatch.setitem(sys.modules, "cuda.bindings", SimpleNamespace(runtime=runtime))
    spec = importlib.util.spec_from_file_location("jetson_app", SCRIPT.with_name("classify.py"))
    app = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(app)
    return app, gpu
