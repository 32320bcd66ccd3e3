"""TensorRT-RTX: FP16 is what is built and run; INT8 there is no precision that NVIDIA lists."""

from __future__ import annotations

from dataclasses import replace

import pytest

from cnnedge.engine import choose_variants
from cnnedge.errors import BundleError
from cnnedge.runtime.choice import choose


def without(bundle, *names):
    kept = tuple(v for v in bundle.manifest.variants if v.name not in names)
    return replace(bundle, manifest=replace(bundle.manifest, variants=kept))


def test_plans_are_built_of_fp16(toy_bundle):
    assert [v.name for v in choose_variants(toy_bundle, "rtx", None)] == ["fp16"]
    assert [v.name for v in choose_variants(toy_bundle, "tensorrt", None)] == ["fp16", "int8-trt"]
    bare = without(toy_bundle, "fp16")
    assert [v.name for v in choose_variants(bare, "rtx", None)] == ["fp32"]
    with pytest.raises(BundleError, match="no verified variant"):
        choose_variants(without(toy_bundle, "fp16", "fp32"), "rtx", None)
    assert [v.name for v in choose_variants(toy_bundle, "rtx", ["int8-trt"])] == ["int8-trt"]


@pytest.mark.parametrize("runtime", ["rtx", "ort-rtx"])
def test_fp16_is_run_and_int8_says_what_it_is(toy_bundle, runtime):
    assert choose(toy_bundle, runtime=runtime).variant.name == "fp16"
    assert choose(without(toy_bundle, "fp16"), runtime=runtime).variant.name == "fp32"
    alone = choose(toy_bundle, runtime=runtime, usable=["int8-trt"])
    named = choose(toy_bundle, "int8-trt", runtime=runtime)
    for choice in (alone, named):
        assert choice.variant.name == "int8-trt"
        assert "outside NVIDIA's support matrix" in choice.reason
        assert "never timed" in choice.reason
    assert "matrix" not in choose(toy_bundle, "fp16", runtime=runtime).reason


def test_tensorrt_keeps_int8_first(toy_bundle):
    for runtime in ("tensorrt", "ort-tensorrt"):
        chosen = choose(toy_bundle, runtime=runtime)
        assert chosen.variant.name == "int8-trt"
        assert "matrix" not in chosen.reason
