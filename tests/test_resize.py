"""The resize inside the graph gives Pillow's very pixels, and the model behind it its answers."""

from __future__ import annotations

import importlib.util
import itertools
import json
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper
from PIL import Image

from cnnedge.backends.onnxruntime import open_session
from cnnedge.errors import GateError, ModelError
from cnnedge.graph.resize import IN_THE_GRAPH, META_RESIZE, put_resize
from cnnedge.graph.resize_check import check_resize
from cnnedge.image import RESIZES, ImageContract, decode, fit

# Height and width of what the graphs resize to: one row or column, one group of 16 and several,
# a last group that is not full.
TARGETS = ((64, 64), (1, 1), (33, 100), (48, 31))
SETTINGS = settings(max_examples=150, deadline=None)


def identity(contract, dtype=TensorProto.UINT8, opset=13, metadata=True):
    """A model that hands its image on."""
    size = ["N", contract.height, contract.width, contract.channels]
    graph = helper.make_graph(
        [helper.make_node("Identity", ["image"], ["probabilities"])],
        "identity",
        [helper.make_tensor_value_info("image", dtype, size)],
        [helper.make_tensor_value_info("probabilities", dtype, size)],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)
    if metadata:
        helper.set_model_props(model, {"cnnedge.image": json.dumps(contract.to_dict())})
    return model.SerializeToString()


@pytest.fixture(scope="module")
def resizers():
    """What resizes by the graph, made once for each contract."""
    made = {}

    def resizer(contract):
        if contract not in made:
            made[contract] = open_session(put_resize(identity(contract), contract))
        return made[contract]

    return resizer


def noise(height, width, channels=3, seed=0):
    """Pixels that leave no rounding error hidden: extremes among them."""
    pixels = np.random.default_rng(seed).integers(-64, 320, (height, width, channels))
    return np.clip(pixels, 0, 255).astype(np.uint8)


def expected(pixels, contract):
    return fit(Image.fromarray(pixels if pixels.shape[2] == 3 else pixels[..., 0]), contract)


sides = st.integers(1, 200)


@SETTINGS
@given(sides, sides, st.sampled_from(RESIZES), st.sampled_from(TARGETS), st.integers(0, 2**32))
def test_every_pixel_is_pillows(resizers, height, width, mode, target, seed):
    contract = ImageContract(*target, resize=mode)
    pixels = noise(height, width, seed=seed)
    found = resizers(contract)(pixels[None])[0]
    np.testing.assert_array_equal(found, expected(pixels, contract))


@pytest.mark.parametrize("mode", RESIZES)
@pytest.mark.parametrize("size", [(427, 640), (1080, 1920), (2, 30000), (3000, 1), (64, 64)])
def test_and_those_of_large_and_narrow_images(resizers, size, mode):
    contract = ImageContract(64, 64, resize=mode)
    pixels = noise(*size)
    found = resizers(contract)(pixels[None])[0]
    np.testing.assert_array_equal(found, expected(pixels, contract))


@pytest.mark.parametrize("mode", RESIZES)
def test_and_those_of_photographs(resizers, mode):
    images = pytest.importorskip("sklearn.datasets").load_sample_images().images
    contract = ImageContract(224, 224, resize=mode)
    for pixels in images:
        found = resizers(contract)(np.ascontiguousarray(pixels)[None])[0]
        np.testing.assert_array_equal(found, expected(pixels, contract))


def test_where_python_rounds_half_to_even(resizers):
    # 5×5 into 2 high and 4 wide: 2.5 rows are cut out, which are 2; as letterbox likewise.
    for mode in ("crop", "letterbox"):
        for target in ((2, 4), (3, 2), (5, 6), (6, 5)):
            contract = ImageContract(*target, resize=mode)
            for height in range(1, 16):
                pixels = noise(height, 5)
                found = resizers(contract)(pixels[None])[0]
                np.testing.assert_array_equal(found, expected(pixels, contract), f"{mode} {height}")


def test_a_batch_and_grey(resizers):
    for channels in (1, 3):
        contract = ImageContract(40, 50, channels)
        batch = np.stack([noise(90, 70, channels, seed) for seed in range(3)])
        found = resizers(contract)(batch)
        assert found.shape == (3, 40, 50, channels)
        for pixels, own in zip(batch, found, strict=True):
            np.testing.assert_array_equal(own, expected(pixels, contract))


def triangle(source, target):
    """Pillow's weights from one size to another, int64 [target, source], of 22 bits."""
    scale = source / target
    reach = max(scale, 1.0)
    centres = (np.arange(target)[:, None] + 0.5) * scale
    near = np.maximum(0, 1 - np.abs(np.arange(source) + 0.5 - centres) / reach)
    return np.floor(near / near.sum(axis=1, keepdims=True) * 2**22 + 0.5).astype(np.int64)


@SETTINGS
@given(sides, sides, sides, sides)
def test_fit_is_the_same_for_every_version_of_pillow(height, width, high, wide):
    pixels = noise(height, width)
    narrow = (np.einsum("ox,hxc->hoc", triangle(width, wide), pixels) + 2**21) >> 22
    small = (np.einsum("oy,ywc->owc", triangle(height, high), narrow) + 2**21) >> 22
    np.testing.assert_array_equal(expected(pixels, ImageContract(high, wide)), small)


def test_another_resize_would_be_seen(resizers):
    contract = ImageContract(64, 64)
    pixels = noise(150, 170)
    other = Image.fromarray(pixels).resize((64, 64), Image.Resampling.BICUBIC)
    assert np.abs(resizers(contract)(pixels[None])[0].astype(int) - np.asarray(other)).max() > 3


# Models of a bundle


@pytest.mark.parametrize("variant", ["fp32", "fp16", "int8"])
def test_a_bundles_variant_answers_alike(toy_bundle, variant):
    manifest = toy_bundle.manifest
    plain = toy_bundle.path(manifest.variant(variant).file).read_bytes()
    any_size = put_resize(plain, manifest.image)
    golden = sorted((toy_bundle.root / "selftest").glob("golden-*"))
    found = check_resize(plain, any_size, manifest.image, golden, precision=variant)
    assert (found.n, found.flips) == (3 * len(golden), 0)
    assert found.max_abs_diff < 1e-6  # it is the same pixels through the same kernels
    picture = np.asarray(decode(golden[0]).resize((231, 129)))
    batch = np.stack([picture, picture[::-1]])
    both = open_session(any_size)(batch)
    for image, answers in zip(batch, both, strict=True):
        tensor = expected(np.ascontiguousarray(image), manifest.image)
        np.testing.assert_allclose(open_session(plain)(tensor[None])[0], answers, atol=1e-5)


def test_it_says_so_and_keeps_the_rest(toy_bundle):
    plain = onnx.load(toy_bundle.path("model.int8.onnx"))
    made = onnx.load_from_string(put_resize(plain.SerializeToString(), toy_bundle.manifest.image))
    onnx.checker.check_model(made, full_check=True)
    before, after = ({p.key: p.value for p in m.metadata_props} for m in (plain, made))
    assert after == before | {META_RESIZE: IN_THE_GRAPH}
    assert [(o.domain, o.version) for o in made.opset_import] == [
        (o.domain, o.version) for o in plain.opset_import
    ]
    assert made.ir_version == plain.ir_version
    (taken,) = made.graph.input
    dims = taken.type.tensor_type.shape.dim
    assert (taken.name, taken.type.tensor_type.elem_type) == ("image", TensorProto.UINT8)
    assert [d.dim_param or d.dim_value for d in dims] == ["N", "H", "W", 3]
    assert made.graph.output == plain.graph.output
    names = [node.name for node in made.graph.node]
    assert len(set(names)) == len(names)


def test_what_is_no_model_of_a_bundle_is_refused():
    contract = ImageContract(32, 32)
    done = put_resize(identity(contract), contract)
    for model, given_contract, reason in (
        (b"not a model", contract, "no ONNX model"),
        (b"", contract, "takes nothing|no ONNX model"),
        (identity(contract, TensorProto.FLOAT), contract, "takes float"),
        (identity(contract), ImageContract(32, 33), r"uint8 \[N, 32, 33, 3\]"),
        (identity(contract), ImageContract(32, 32, resize="crop"), "was exported for"),
        (identity(contract, opset=12), contract, "opset 12"),
        (done, contract, "inside already"),
    ):
        with pytest.raises(ModelError, match=reason):
            put_resize(model, given_contract)
    put_resize(identity(contract, metadata=False), contract)  # which says nothing of its image
    broken = onnx.load_from_string(identity(contract, metadata=False))
    helper.set_model_props(broken, {"cnnedge.image": "{"})
    with pytest.raises(ModelError, match="cannot be read"):
        put_resize(broken.SerializeToString(), contract)


@pytest.mark.parametrize("what", ["half", "weight"])
def test_a_broken_resize_is_caught(toy_bundle, what):
    manifest = toy_bundle.manifest
    plain = toy_bundle.path(manifest.variant("fp32").file).read_bytes()
    broken = onnx.load_from_string(put_resize(plain, manifest.image))
    for node in broken.graph.node:
        if what == "half" and node.name == "image/resize/width/half":
            node.input[1] = node.input[0]  # every level doubled
        if what == "weight" and node.name == "image/resize/height/near":
            node.input[0], node.input[1] = node.input[1], node.input[0]
    golden = sorted((toy_bundle.root / "selftest").glob("golden-*"))
    with pytest.raises(GateError, match="a probability differs by"):
        check_resize(plain, broken.SerializeToString(), manifest.image, golden, precision="fp32")
    with pytest.raises(GateError, match="no image"):
        check_resize(plain, plain, manifest.image, [], precision="fp32")


# Other runtimes


@pytest.mark.parametrize("mode", RESIZES)
def test_openvino_gives_the_same_pixels(mode):
    ov = pytest.importorskip("openvino", reason="OpenVINO is not installed")
    contract = ImageContract(40, 56, resize=mode)
    core = ov.Core()
    model = core.read_model(put_resize(identity(contract), contract))
    options = {"INFERENCE_PRECISION_HINT": "f32"}
    compiled = core.compile_model(model, "CPU", options)
    for size in ((90, 70), (300, 411), (17, 23)):
        pixels = noise(*size)
        found = compiled(pixels[None])[0][0]
        np.testing.assert_array_equal(found, expected(pixels, contract))


# What is recorded


def test_the_documentation_says_what_was_measured():
    path = Path(__file__).parents[1] / "benchmarks" / "resize" / "tables.py"
    spec = importlib.util.spec_from_file_location("resize_tables", path)
    tables = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = tables
    spec.loader.exec_module(tables)
    recorded = dict(tables.documents())
    assert {part for document in recorded.values() for part in document} >= {"apps", "time"}
    for document in recorded.values():
        assert document["machine"]["cpu"]
        rows = {row["name"]: row for row in document.get("apps", {"rows": []})["rows"]}
        assert not rows or rows["the resize in the graph"]["pixels"]["max"] == 0
        assert all(row["samples_ms"] for row in document.get("time", []))
    lines = tables.generated().splitlines()
    for line, after in itertools.pairwise(lines):
        # else Markdown takes what follows a table for its last row
        assert not line.startswith("|") or after == "" or after.startswith("|")
    assert tables.check()
