"""From a bundle to a plan in it to answers from it, on stand-ins for the GPU and the libraries."""

from __future__ import annotations

import json
import logging
from dataclasses import replace

import numpy as np
import pytest
from click.testing import CliRunner
from fakes import fake_gpu, fake_module, inspector_json

import cnnedge
from cnnedge import change as change_module
from cnnedge.backends.tensorrt.library import open_library
from cnnedge.benchmark.run import bench
from cnnedge.benchmark.station import Station
from cnnedge.benchmark.suite import ModelEntry, Suite
from cnnedge.benchmark.worker import resolve
from cnnedge.bundle import open_bundle
from cnnedge.cli import main
from cnnedge.engine import build_engines
from cnnedge.errors import BackendError, BundleError
from cnnedge.plan import PlanOptions
from cnnedge.verify import verify_bundle


class InThisProcess:
    """A link to a station here: the stand-ins are of this process alone."""

    def __init__(self, contestant):
        options = dict(contestant.options)
        runner = resolve(contestant.opener)(contestant.model, threads=None, **options)
        self.station = Station(runner, (32, 32, 3))
        self.opened = {"provider": self.station.provider}

    def ask(self, do, **arguments):
        own = {"memory": {}, "app": {"samples": []}}
        return own[do] if do in own else getattr(self.station, do)(**arguments)

    def close(self):
        pass


@pytest.fixture
def machine(monkeypatch, bundle_copy):
    """Return a function that makes this a machine with TensorRT of some release and a GPU."""

    def become(surface="tensorrt-10.3", *, capability=(8, 9), variant="fp16", **behaviour):
        gpu, cuda = fake_gpu(capability=capability)
        behaviour.setdefault("description", inspector_json(bundle_copy / f"model.{variant}.onnx"))
        module = fake_module(surface, cuda, **behaviour)

        def library(runtime):
            return open_library(runtime, lambda name: module)

        monkeypatch.setattr("cnnedge.backends.tensorrt.open_library", library)
        monkeypatch.setattr("cnnedge.backends.gpu.open_gpu", lambda: gpu)
        become.cuda = cuda
        return module

    return become


RUNTIMES = {"tensorrt-10.3": "tensorrt", "tensorrt-11.4": "tensorrt", "rtx-1.7": "rtx"}


@pytest.fixture
def planned(machine, surface, bundle_copy):
    """A bundle with an FP16 plan, built on the machine that this is now."""
    machine(surface)
    runtime = RUNTIMES[surface]
    (built,) = build_engines(bundle_copy, runtime, variants=["fp16"])
    assert not built.failed, built.report.violations
    return bundle_copy, runtime, built


def test_it_is_built_checked_replayed_and_kept(planned):
    root, runtime, built = planned
    (engine,) = open_bundle(root).manifest.engines
    assert engine.sha256 == built.note.sha256
    beside = json.loads((root / engine.note).read_text())
    assert beside["found"]["achieved"]["macs"] == {"float16": 1.0}
    assert beside["found"]["source"] == "engine inspector"
    assert beside["gpu"]["name"] == "Fake RTX"
    assert beside["replay"]["diverged"] is None
    assert beside["onnx_sha256"] == open_bundle(root).manifest.variant("fp16").sha256
    if runtime == "tensorrt":
        cache = "engines/tensorrt-sm89.timing.cache"
        assert beside["timing_cache"]["file"] == cache
        assert cache in open_bundle(root).manifest.files
        assert beside["trtexec"].startswith("trtexec ")
        assert f"--timingCacheFile={cache}" in beside["trtexec"]


def test_kernel_timings_serve_the_next_build(machine, bundle_copy):
    module = machine("tensorrt-11.4")
    for _ in range(2):
        build_engines(bundle_copy, "tensorrt", variants=["fp16"])
    first, second = [c[2]._cache._content for c in module.calls if c[0] == "build"]
    assert (first, second) == (b"", b"+timed")


def test_it_is_loaded_and_answers(planned, digits):
    root, runtime, _ = planned
    classify = cnnedge.load(root, runtime=runtime)
    assert classify.variant == "fp16"
    expected = "int8-trt, fp16, fp32" if runtime == "tensorrt" else "fp16, fp32, int8-trt"
    assert classify.choice.reason == f"the first of {expected} that was verified"
    assert classify.provider.startswith("TensorRT")
    on_cpu = cnnedge.load(root, variant="fp16")
    images = [digits.test.items[i] for i in range(10)]
    np.testing.assert_allclose(
        classify.probabilities(images), on_cpu.probabilities(images), atol=1e-6
    )


def test_a_closed_classifier_holds_nothing_of_the_gpu(planned, machine):
    root, runtime, _ = planned
    before = set(machine.cuda.memory)
    with cnnedge.load(root, runtime=runtime) as classify:
        classify(root / "selftest/golden-00.png")
        assert set(machine.cuda.memory) > before
    assert set(machine.cuda.memory) == before


@pytest.mark.system
def test_verify_and_bench_run_it(planned, digits):
    root, runtime, _ = planned
    found = verify_bundle(root, digits, runtime=runtime, limit=40)
    (report,) = found.variants
    assert (report.name, report.selftest.stage, report.verdict.failed) == ("fp16", None, False)
    assert report.provider.startswith("TensorRT")
    scenarios = ("single-stream", "offline", "waterfall")
    suite = Suite(
        (ModelEntry(root),), runtimes=("cpu", runtime), scenarios=scenarios, seconds=0.05, rounds=1
    )
    (model,) = bench(suite, start=InThisProcess)["models"]
    row = next(r for r in model["contestants"] if r["name"] == f"fp16@{runtime}")
    on_gpu = row["single_stream"]["gpu"]
    assert on_gpu["GPU Compute Time (ms)"] == 5.0
    assert on_gpu["Latency (ms)"] == 8.0
    assert {"Enqueue Time (ms)", "H2D Latency (ms)", "D2H Latency (ms)"} <= set(on_gpu)
    assert row["provider"].startswith("TensorRT")
    stages = {stage["name"]: stage["p50_ms"] for stage in row["waterfall"]["stages"]}
    assert stages["copy in"] == on_gpu["H2D Latency (ms)"]
    assert stages["copy out"] == on_gpu["D2H Latency (ms)"]


def test_a_plan_for_a_signed_bundle_says_that_it_must_be_signed_again(machine, bundle_copy):
    machine()
    words = ["engine", str(bundle_copy), "--runtime", "tensorrt", "--variant", "fp16"]
    assert "sign it again" not in CliRunner().invoke(main, words).stderr
    (bundle_copy / "bundle.sig").write_text("{}")
    result = CliRunner().invoke(main, words)
    assert result.exit_code == 0, result.output
    assert f"sign it again: cnnedge sign {bundle_copy} --key" in result.stderr


def test_another_gpu_is_said_in_one_line_and_built_anew_if_asked(planned, machine, surface, caplog):
    root, runtime, _ = planned
    cc = (7, 5)
    module = machine(surface, capability=cc)
    with pytest.raises(BackendError) as caught:
        cnnedge.load(root, runtime=runtime)
    assert "and this GPU (Fake RTX) has 7.5" in str(caught.value)
    assert "rebuild=True" in str(caught.value)
    with pytest.raises(BackendError, match=r"has 7\.5"):
        cnnedge.load(root, runtime=runtime, variant="fp16")
    assert not [call for call in module.calls if call[0] == "deserialize"]
    caplog.set_level(logging.WARNING, logger="cnnedge")
    classify = cnnedge.load(root, runtime=runtime, variant="fp16", rebuild=True)
    assert classify(root / "selftest/golden-00.png")
    assert "building a TensorRT" in caplog.text
    assert len(open_bundle(root).manifest.engines) == 1  # in memory alone


def test_another_release_is_said(planned, machine, surface):
    root, runtime, _ = planned
    machine(surface, version="11.9.1.2" if runtime == "tensorrt" else "1.9.0.1")
    with pytest.raises(BackendError, match=r"built by TensorRT.* is installed"):
        cnnedge.load(root, runtime=runtime)


def test_another_model_of_gpu_is_warned_of(planned, machine, surface, monkeypatch, caplog):
    root, runtime, _ = planned
    gpu, cuda = fake_gpu()
    monkeypatch.setattr(gpu, "facts", type(gpu.facts)("Another", "8.9", "13.0", 8.0, 6.0))
    module = fake_module(surface, cuda)
    monkeypatch.setattr(
        "cnnedge.backends.tensorrt.open_library",
        lambda runtime: open_library(runtime, lambda name: module),
    )
    monkeypatch.setattr("cnnedge.backends.gpu.open_gpu", lambda: gpu)
    caplog.set_level(logging.WARNING, logger="cnnedge")
    cnnedge.load(root, runtime=runtime)
    assert "tuned on another GPU model" in caplog.text


def test_an_altered_plan_is_never_deserialized(planned, machine, surface):
    root, runtime, built = planned
    module = machine(surface)
    plan = root / built.note.file
    plan.write_bytes(plan.read_bytes()[:-1])
    with pytest.raises(BundleError, match="altered or cut short"):
        cnnedge.load(root, runtime=runtime)
    assert not module.calls


def test_a_plan_altered_after_the_bundle_was_opened_is_not_loaded_either(
    planned, machine, surface, monkeypatch
):
    root, runtime, built = planned
    module = machine(surface)
    opened = open_bundle(root)
    monkeypatch.setattr("cnnedge.runtime.open_bundle", lambda path: opened)
    plan = root / built.note.file
    plan.write_bytes(plan.read_bytes() + b"!")
    with pytest.raises(BundleError, match="altered or cut short"):
        cnnedge.load(root, runtime=runtime)
    assert not [call for call in module.calls if call[0] == "deserialize"]


def test_no_plan_is_said(machine, bundle_copy):
    machine("rtx-1.7")
    with pytest.raises(BundleError, match=r"has no TensorRT-RTX plan; build one: cnnedge engine"):
        cnnedge.load(bundle_copy, runtime="rtx")
    with pytest.raises(BundleError, match=r"has no TensorRT plan of fp16; .*--variant fp16"):
        cnnedge.load(bundle_copy, runtime="tensorrt", variant="fp16")


def test_a_plan_that_is_not_what_was_asked_is_not_kept(machine, bundle_copy):
    machine("tensorrt-11.4", variant="fp32")  # the inspector tells of FP32 kernels
    (built,) = build_engines(bundle_copy, "tensorrt", variants=["fp16"])
    assert built.failed
    assert "conv1: float16 was asked for, and float32 was built" in built.report.violations[0]
    assert open_bundle(bundle_copy).manifest.engines == ()
    result = CliRunner().invoke(
        main, ["engine", str(bundle_copy), "--runtime", "tensorrt", "--variant", "fp16"]
    )
    assert result.exit_code == 3
    assert "built something else than was asked" in result.stderr


def test_a_diverging_plan_is_told(machine, bundle_copy, monkeypatch):
    machine("tensorrt-11.4")
    from cnnedge import selftest

    monkeypatch.setattr(selftest, "tolerance", lambda variant: -1.0)
    (built,) = build_engines(bundle_copy, "tensorrt", variants=["fp16"])
    assert built.note.replay["diverged"] == "output"


def test_a_plan_that_answers_nan_is_not_kept(machine, bundle_copy, monkeypatch):
    from cnnedge.backends.tensorrt.session import PlanSession

    machine("tensorrt-11.4")
    answer = PlanSession.__call__
    monkeypatch.setattr(PlanSession, "__call__", lambda self, x: np.nan * answer(self, x))
    (built,) = build_engines(bundle_copy, "tensorrt", variants=["fp16"])
    assert built.failed
    assert "NaN or infinity" in built.report.violations[0]
    assert open_bundle(bundle_copy).manifest.engines == ()


def test_a_bundle_without_a_selftest_gets_its_plan_all_the_same(machine, bundle_copy):
    machine("tensorrt-11.4")
    bundle = open_bundle(bundle_copy)
    files = {k: v for k, v in bundle.manifest.files.items() if not k.startswith("selftest/")}
    (bundle_copy / "manifest.json").write_text(replace(bundle.manifest, files=files).to_json())
    (built,) = build_engines(bundle_copy, "tensorrt", variants=["fp16"])
    assert built.note.replay is None
    assert len(open_bundle(bundle_copy).manifest.engines) == 1


def test_a_gpu_that_does_not_run_its_plan_loses_nobody_the_plan(machine, bundle_copy):
    machine("tensorrt-11.4", runs=False)
    (built,) = build_engines(bundle_copy, "tensorrt", variants=["fp16"])
    assert built.note.replay["diverged"] == "runtime"
    assert len(open_bundle(bundle_copy).manifest.engines) == 1


def test_a_plan_that_cannot_be_read_back_is_not_kept(machine, bundle_copy):
    machine("tensorrt-11.4", contexts=False)
    with pytest.raises(BackendError, match="cannot set up the plan to read it back"):
        build_engines(bundle_copy, "tensorrt", variants=["fp16"])
    assert open_bundle(bundle_copy).manifest.engines == ()


@pytest.mark.parametrize(("killed_at", "left"), [(1, 1), (2, 0)])
def test_a_kill_while_a_plan_is_replaced_leaves_a_bundle(
    machine, bundle_copy, monkeypatch, killed_at, left
):
    """Killed as the manifest forgets the old plan, which stays then, and as it names the new."""
    machine("tensorrt-11.4")
    build_engines(bundle_copy, "tensorrt", variants=["fp16"])
    write, written = change_module.write_text, []

    def killed(path, text):
        written.append(path.name)
        if len(written) == killed_at:
            raise KeyboardInterrupt
        write(path, text)

    monkeypatch.setattr(change_module, "write_text", killed)
    with pytest.raises(KeyboardInterrupt):
        build_engines(bundle_copy, "tensorrt", PlanOptions(max_batch=1), variants=["fp16"])
    assert written == ["manifest.json"] * killed_at
    assert len(open_bundle(bundle_copy).manifest.engines) == left


def test_stripped_plans_are_loaded_with_the_bundles_weights(machine, bundle_copy):
    machine("tensorrt-11.4")
    options = PlanOptions(strip_weights=True)
    (built,) = build_engines(bundle_copy, "tensorrt", options, variants=["fp16"])
    assert built.note.replay["diverged"] is None
    classify = cnnedge.load(bundle_copy, runtime="tensorrt")
    assert classify(bundle_copy / "selftest/golden-00.png")


def test_no_gpu_is_said(planned, monkeypatch):
    root, runtime, _ = planned

    def none():
        raise BackendError("this machine has no NVIDIA GPU")

    monkeypatch.setattr("cnnedge.backends.gpu.open_gpu", none)
    with pytest.raises(BackendError, match="no NVIDIA GPU"):
        cnnedge.load(root, runtime=runtime)


def test_variants_for_cpus_are_refused_by_name(machine, bundle_copy):
    machine("rtx-1.7")
    with pytest.raises(BundleError, match="the variant int8 is written for CPUs"):
        build_engines(bundle_copy, "rtx", variants=["int8"])
    with pytest.raises(BundleError, match="has no variant 'int4'"):
        build_engines(bundle_copy, "rtx", variants=["int4"])


def test_the_trtexec_line_needs_nothing_of_nvidias(bundle_copy, monkeypatch):
    monkeypatch.setattr(
        "cnnedge.backends.tensorrt.open_library", lambda runtime: pytest.fail("was loaded")
    )
    arguments = ["engine", str(bundle_copy), "--runtime", "tensorrt", "--print-trtexec"]
    result = CliRunner().invoke(main, [*arguments, "--max-batch", "1"])
    assert result.exit_code == 0, result.output
    lines = result.output.splitlines()
    assert [line.split()[1] for line in lines] == [
        "--onnx=model.fp16.onnx",
        "--onnx=model.int8-trt.onnx",
    ]
    as_json = CliRunner().invoke(main, [*arguments, "--max-batch", "1", "--json"])
    assert json.loads(as_json.output) == lines
