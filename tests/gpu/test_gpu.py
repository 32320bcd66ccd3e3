"""On a machine with an NVIDIA GPU: real plans and providers, held against FP32 on the CPU.

They need neither TensorFlow nor trained weights (see benchmarks/gpu.py), so that a bare machine
runs them: ``pytest -m gpu tests/gpu``. Elsewhere each is skipped, and says why.
"""

from __future__ import annotations

import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest

import cnnedge
from cnnedge.backends.gpu import find_gpu, open_gpu
from cnnedge.bundle import open_bundle
from cnnedge.engine import build_engines
from cnnedge.errors import BackendError, BundleError, CnnEdgeError
from cnnedge.plan import PlanOptions
from cnnedge.runtime import RunSettings, open_variant

FACTS, WHY = find_gpu()
pytestmark = [pytest.mark.system, pytest.mark.gpu, pytest.mark.skipif(FACTS is None, reason=WHY)]
PLANS = ("rtx", "tensorrt")
PROVIDERS = ("cuda", "ort-tensorrt", "ort-rtx")
# Against FP32 on the CPU; the weights are drawn, so the answers are spread over 1000 classes.
LIMITS = {"fp32": 1e-5, "fp16": 2e-3, "int8-trt": 5e-2}


@pytest.fixture(scope="session")
def drawn(benchmark, tmp_path_factory):
    """AlexNet v1 with drawn weights, and plans of it wherever a library is installed."""
    images = benchmark.draw_images(224, 224, 24, seed=1)
    folder = tmp_path_factory.mktemp("gpu") / "alexnet_v1"
    skeleton = benchmark.SKELETONS / "alexnet_v1.onnx"
    bundle = benchmark.make_bundle(skeleton, folder, images=images)
    refused = {}
    for runtime in PLANS:
        try:
            build_engines(folder, runtime, variants=["fp32", "fp16", "int8-trt"])
        except CnnEdgeError as error:
            refused[runtime] = str(error)
    reference = open_variant(bundle, bundle.manifest.variant("fp32"))
    return open_bundle(folder), images, reference(images), refused


@pytest.fixture
def open_on(drawn):
    """Return a maker of a session; skips where the runtime is not to be had."""
    bundle, _, _, refused = drawn

    def make(runtime, variant, **settings):
        if runtime in refused:
            pytest.skip(refused[runtime])
        try:
            return open_variant(
                bundle, bundle.manifest.variant(variant), RunSettings(runtime, **settings)
            )
        except BackendError as error:
            if "no INT8 convolution" in str(error):
                pytest.skip("the CUDA provider has no INT8")
            raise
        except CnnEdgeError as error:
            pytest.skip(str(error))

    return make


@pytest.mark.parametrize("variant", LIMITS)
@pytest.mark.parametrize("runtime", [*PLANS, *PROVIDERS])
def test_it_answers_as_the_cpu_does(open_on, drawn, runtime, variant):
    _, images, expected, _ = drawn
    session = open_on(runtime, variant)
    for n in (1, 3, 8, 20, 1):
        found = session(images[:n])
        assert np.abs(found - expected[:n]).max() <= LIMITS[variant]


@pytest.mark.parametrize("runtime", PLANS)
def test_graphs_change_no_answer(open_on, drawn, runtime):
    _, images, _, _ = drawn
    replayed, plain = open_on(runtime, "fp16"), open_on(runtime, "fp16", graphs=False)
    for n in (1, 4, 1, 4):
        np.testing.assert_array_equal(replayed(images[:n]), plain(images[:n]))
    assert replayed.graphs
    assert not plain.graphs


@pytest.mark.parametrize("runtime", PLANS)
def test_the_parts_of_a_call(open_on, drawn, runtime):
    _, images, _, _ = drawn
    session = open_on(runtime, "fp16")
    session(images[:1])
    times = session.timed(images[:1])
    for part in (times.copy_in, times.compute, times.copy_out, times.enqueue):
        assert 0 < part < 1


@pytest.mark.parametrize("runtime", PLANS)
def test_threads_share_a_plan(open_on, drawn, runtime):
    _, images, _, _ = drawn
    session = open_on(runtime, "fp16")
    alone = [session(images[i : i + 1]) for i in range(16)]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(lambda i: session(images[i : i + 1]), range(16)))
    for one, other in zip(alone, together, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("runtime", PLANS)
def test_memory_is_steady(open_on, drawn, runtime):
    _, images, _, _ = drawn
    session = open_on(runtime, "fp16")
    for n in (1, 8):
        session(images[:n])
    before = open_gpu().facts.memory_free_gib
    for _ in range(2000):
        session(images[:1])
    assert before - open_gpu().facts.memory_free_gib <= 0.02


@pytest.mark.parametrize("runtime", PLANS)
def test_closing_gives_the_memory_back(open_on, drawn, runtime):
    _, images, _, _ = drawn
    before = open_gpu().facts.memory_free_gib
    for _ in range(5):
        session = open_on(runtime, "fp32")
        session(images[:8])
        session.close()
    assert before - open_gpu().facts.memory_free_gib <= 0.3


def test_an_rtx_plan_for_another_gpu_is_refused_in_one_line(drawn, tmp_path):
    bundle, _, _, refused = drawn
    if "rtx" in refused:
        pytest.skip(refused["rtx"])
    other = "7.5" if FACTS.compute_capability != "7.5" else "8.9"
    root = shutil.copytree(
        bundle.root, tmp_path / "other", ignore=shutil.ignore_patterns("engines")
    )
    files = {k: v for k, v in bundle.manifest.files.items() if not k.startswith("engines/")}
    manifest = replace(bundle.manifest, engines=(), files=files)
    (root / "manifest.json").write_text(manifest.to_json())
    build_engines(root, "rtx", PlanOptions(compute_capabilities=(other,)), variants=["fp16"])
    with pytest.raises(BackendError, match=f"has {FACTS.compute_capability}"):
        cnnedge.load(root, runtime="rtx")


def test_a_truncated_plan_is_refused(drawn, tmp_path):
    bundle, _, _, _ = drawn
    if not bundle.manifest.engines:
        pytest.skip("no plan could be built")
    root = shutil.copytree(bundle.root, tmp_path / "cut")
    plan = root / bundle.manifest.engines[0].file
    plan.write_bytes(plan.read_bytes()[:1000])
    with pytest.raises(BundleError, match="altered or cut short"):
        cnnedge.load(root, runtime=bundle.manifest.engines[0].runtime)
