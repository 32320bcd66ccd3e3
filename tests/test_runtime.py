"""The app's side: three lines, every kind of image, the right variant, many threads."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import onnxruntime as ort
import pytest
from PIL import Image
from test_bundle import edit_manifest

import cnnedge
from cnnedge.backends.onnxruntime import open_session
from cnnedge.bundle import open_bundle
from cnnedge.errors import BackendError, BundleError, ImageError
from cnnedge.machine import Machine
from cnnedge.runtime import choice


def test_three_lines(toy_bundle, digits):
    classify = cnnedge.load(toy_bundle.root)
    found = classify(digits.test.items[0])
    assert found[0].label == digits.labels[digits.test.targets[0]]
    assert len(found) == 5
    assert [p.probability for p in found] == sorted((p.probability for p in found), reverse=True)


def test_every_kind_of_image_gets_the_same_answer(toy_bundle):
    classify = cnnedge.load(toy_bundle.root)
    path = toy_bundle.path("selftest/golden-00.png")
    expected = classify(path)
    with open(path, "rb") as file:
        for source in (str(path), path.read_bytes(), io.BytesIO(path.read_bytes()), file):
            assert classify(source) == expected
    assert classify(Image.open(path)) == expected
    assert classify(np.asarray(Image.open(path).convert("RGB"))) == expected


def test_a_batch_answers_as_its_images_do(toy_bundle, digits):
    classify = cnnedge.load(toy_bundle.root)
    images = [digits.test.items[i] for i in range(5)]
    together = classify.batch(images, top=3)
    for image, answers in zip(images, together, strict=True):
        alone = classify(image, top=3)
        assert [a.label for a in alone] == [a.label for a in answers]
        assert [a.probability for a in alone] == pytest.approx(
            [a.probability for a in answers], abs=1e-5
        )
    ready = np.stack([digits.test.tensor(i, classify.image) for i in range(5)])
    np.testing.assert_allclose(
        classify.probabilities(ready), classify.probabilities(images), atol=1e-6
    )


def test_it_answers_as_keras(toy_bundle, toy_model, digits):
    from cnnedge.backends.keras import predict

    classify = cnnedge.load(toy_bundle.root, variant="fp32")
    batch = np.stack([digits.test.tensor(i, classify.image) for i in range(20)])
    ours, theirs = classify.probabilities(batch), predict(toy_model, batch, "unit")
    assert np.abs(ours - theirs).max() <= 1e-5


def test_threads_share_one_classifier(toy_bundle, digits):
    classify = cnnedge.load(toy_bundle.root)
    images = [digits.test.items[i] for i in range(32)]
    alone = [classify(image) for image in images]
    with ThreadPoolExecutor(8) as pool:
        for _ in range(5):
            assert list(pool.map(classify, images)) == alone


def test_eight_threads_get_what_one_gets(toy_bundle):
    """With arrays that go to the runtime as they are: nothing but the session is shared."""
    classify = cnnedge.load(toy_bundle.root)
    size = (classify.image.height, classify.image.width, classify.image.channels)
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 64 + 6 * k, size, np.uint8) for k in range(32)]
    alone = [classify(image, top=10) for image in images]
    assert len({str(answers) for answers in alone}) == len(images), "they must differ"

    def work(first):
        order = [(first + k) % len(images) for k in range(200)]
        return [n for n in order if classify(images[n], top=10) != alone[n]]

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(work, range(0, 32, 4))) == [[]] * 8


@pytest.mark.parametrize("classes", [1, 2, 10, 39, 41, 1000])
def test_the_likeliest_are_those_of_a_full_sort(classes):
    from cnnedge.runtime import likeliest

    rng = np.random.default_rng(classes)
    rows = [rng.random(classes), rng.integers(0, 4, classes) / 4, np.zeros(classes)]
    for row in rows:
        row = row.astype(np.float32)
        for top in (0, 1, 3, 5, classes, classes + 1):
            expected = np.argsort(-row, kind="stable")[:top]
            np.testing.assert_array_equal(likeliest(row, top), expected)


def test_an_array_goes_to_the_runtime_uncopied(toy_bundle):
    classify = cnnedge.load(toy_bundle.root)
    seen = []
    run = classify._session
    classify._session = lambda batch: seen.append(batch) or run(batch)
    image = np.zeros((32, 32, 3), np.uint8)
    classify(image)
    assert seen[0].shape == (1, 32, 32, 3)
    assert np.shares_memory(seen[0], image)
    part = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)[::2, ::2]
    assert classify(part) == classify(part.copy())
    assert seen[-2].flags.c_contiguous


@pytest.mark.system
def test_memory_is_steady(toy_bundle):
    """Over 4,000 calls: 3 KiB kept of each, as its image takes, would be 12 MiB."""
    code = """
import os, sys, numpy as np, cnnedge
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
classify = cnnedge.load(sys.argv[1])
image, path = np.zeros((32, 32, 3), np.uint8), sys.argv[1] + "/selftest/golden-01.jpg"
def calls(count):
    for k in range(count):
        classify(image if k % 4 else path)
calls(1000)
before = resident()
calls(4000)
print(resident() - before)
"""
    if not os.path.exists("/proc/self/statm"):
        pytest.skip("resident memory is read from Linux' /proc")
    done = subprocess.run(
        [sys.executable, "-c", code, toy_bundle.root], capture_output=True, text=True, check=True
    )
    assert int(done.stdout) < 2 * 2**20


def machine(cpu="another", isa=()):
    return Machine(cpu, 2, tuple(isa), 8.0, "Linux x86_64")


@pytest.mark.parametrize(
    ("milliseconds", "recommended", "expected"),
    [
        ({"fp32": 3.0, "fp16": 6.0, "int8": 1.0}, {"fp32", "int8"}, "int8"),
        ({"fp32": 3.0, "fp16": 6.0, "int8": 4.0}, {"fp32"}, "fp32"),
        ({"fp32": 3.0, "fp16": 6.0, "int8": 2.99}, {"fp32"}, "fp32"),  # faster, not by enough
    ],
)
def test_the_fastest_recommended_is_chosen_where_it_was_measured(
    bundle_copy, monkeypatch, milliseconds, recommended, expected
):
    def time_it(fields):
        for variant in fields["variants"]:
            if variant["name"] in milliseconds:
                variant["latency"]["median_ms"] = milliseconds[variant["name"]]
            advice = {"recommended": variant["name"] in recommended, "reason": "made up"}
            variant["recommendation"] = advice

    edit_manifest(bundle_copy, time_it)
    bundle = open_bundle(bundle_copy)
    measured_on = bundle.manifest.machine.cpu
    monkeypatch.setattr(choice, "this_machine", lambda: machine(measured_on))
    found = choice.choose(bundle)
    assert found.variant.name == expected
    assert "as measured on this CPU model" in found.reason


@pytest.mark.parametrize(("isa", "expected"), [(["avx512_vnni"], "int8"), (["avx2"], "fp32")])
def test_elsewhere_the_instruction_set_decides(toy_bundle, monkeypatch, isa, expected):
    monkeypatch.setattr(choice, "this_machine", lambda: machine(isa=isa))
    found = choice.choose(toy_bundle)
    assert found.variant.name == expected
    assert "int8 dot product" in found.reason


def test_a_variant_that_failed_its_gate_is_not_chosen(bundle_copy, monkeypatch):
    monkeypatch.setattr(choice, "this_machine", lambda: machine(isa=["avx512_vnni"]))

    def fail(fields):
        for variant in fields["variants"]:
            if variant["name"] == "int8":
                variant["verdict"] = {"status": "failed", "reason": "made to"}

    edit_manifest(bundle_copy, fail)
    classify = cnnedge.load(bundle_copy)
    assert classify.variant != "int8"
    assert cnnedge.load(bundle_copy, variant="int8").variant == "int8"

    edit_manifest(bundle_copy, lambda f: [v.update(verdict=None) for v in f["variants"]])
    with pytest.raises(BundleError, match="was verified"):
        cnnedge.load(bundle_copy)


def test_it_says_which_variant_runs(toy_bundle, caplog):
    caplog.set_level("INFO", logger="cnnedge")
    classify = cnnedge.load(toy_bundle.root, variant="fp16")
    assert "fp16" in repr(classify)
    assert "running fp16: asked for by name" in caplog.text


def test_what_goes_wrong_is_said(toy_bundle, tmp_path):
    with pytest.raises(BundleError, match="choose one of: fp32, fp16, int8, int8-trt"):
        cnnedge.load(toy_bundle.root, variant="int4")
    classify = cnnedge.load(toy_bundle.root)
    with pytest.raises(ImageError, match=r"nowhere\.jpg"):
        classify("nowhere.jpg")
    with pytest.raises(ImageError, match="no image was given"):
        classify.batch([])
    broken = tmp_path / "broken.onnx"
    broken.write_bytes(toy_bundle.path("model.fp32.onnx").read_bytes()[:5000])
    with pytest.raises(BackendError, match=r"cannot load .*broken\.onnx"):
        open_session(broken)
    session = open_session(toy_bundle.path("model.fp32.onnx"))
    with pytest.raises(BackendError, match="cannot run this batch"):
        session(np.zeros((1, 5, 5, 3), np.uint8))


def test_a_closed_classifier_says_so(toy_bundle):
    image = toy_bundle.path("selftest/golden-00.png")
    with cnnedge.load(toy_bundle.root) as classify:
        assert classify(image)
    for call in (classify, lambda image: classify.batch([image])):
        with pytest.raises(BackendError, match="the classifier is closed; load the bundle again"):
            call(image)
    classify.close()
    assert classify.provider == "CPUExecutionProvider"


def test_a_silent_fall_back_is_an_error(toy_bundle, monkeypatch):
    model = toy_bundle.path("model.fp32.onnx")
    with pytest.raises(BackendError, match="is built without NoSuchExecutionProvider"):
        open_session(model, provider="NoSuchExecutionProvider")

    class FellBack:
        def __init__(self, *arguments, **options):
            pass

        def get_providers(self):
            return ["CPUExecutionProvider"]

    monkeypatch.setattr(ort, "get_available_providers", lambda: ["CUDAExecutionProvider"])
    monkeypatch.setattr(ort, "InferenceSession", FellBack)
    with pytest.raises(BackendError, match="fell back to CPUExecutionProvider"):
        open_session(model, provider="CUDAExecutionProvider")


@pytest.mark.system
def test_an_app_needs_neither_tensorflow_nor_onnx(toy_bundle):
    code = (
        "import sys, json, cnnedge\n"
        f"classify = cnnedge.load({str(toy_bundle.root)!r})\n"
        f"label = classify({str(toy_bundle.path('selftest/golden-00.png'))!r})[0].label\n"
        "print(json.dumps([label, sorted({m.split('.')[0] for m in sys.modules})]))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    label, modules = json.loads(done.stdout)
    assert label in toy_bundle.manifest.labels
    heavy = {"tensorflow", "keras", "onnx", "onnx_ir", "rich", "pydantic", "matplotlib", "sklearn"}
    assert not heavy & set(modules)
    assert {"numpy", "PIL", "onnxruntime"} <= set(modules)


def test_an_app_without_cnnedge_reads_the_contract_from_the_model(toy_bundle):
    """onnxruntime and numpy alone: what the ONNX file says of itself is enough."""
    session = ort.InferenceSession(str(toy_bundle.path("model.int8.onnx")))
    metadata = session.get_modelmeta().custom_metadata_map
    contract, labels = (json.loads(metadata[f"cnnedge.{key}"]) for key in ("image", "labels"))
    picture = Image.open(toy_bundle.path("selftest/golden-00.png")).convert("RGB")
    size = (contract["width"], contract["height"])
    tensor = np.asarray(picture.resize(size, Image.Resampling.BILINEAR))[None]
    (probabilities,) = session.run(["probabilities"], {"image": tensor})
    ours = cnnedge.load(toy_bundle.root, variant="int8")
    expected = ours(toy_bundle.path("selftest/golden-00.png"))[0]
    assert labels[probabilities[0].argmax()] == expected.label


def test_a_float32_bundle_answers_alike(toy_file, tmp_path, toy_bundle, digits):
    from cnnedge.pipeline import export_bundle
    from cnnedge.recipe import make_recipe

    recipe = make_recipe(
        model=str(toy_file), input="float32", precision=("int8",), max_drop=3, bench_seconds=0.1
    )
    bundle, _ = export_bundle(recipe, tmp_path / "float")
    uint8, float32 = (cnnedge.load(b.root, variant="fp32") for b in (toy_bundle, bundle))
    image = digits.test.items[3]
    assert [p.label for p in float32(image)] == [p.label for p in uint8(image)]
    assert cnnedge.verify_bundle(bundle.root, digits, limit=20).failed is False
