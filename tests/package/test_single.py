"""One ONNX file as a classifier: it answers as the reference did, and says what it is."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from click.testing import CliRunner
from test_bundle import edit_manifest, rehash

import cnnedge
from cnnedge.bundle import open_bundle
from cnnedge.cli import main
from cnnedge.errors import BundleError, CnnEdgeError, ModelError
from cnnedge.files import sha256
from cnnedge.graph.write import metadata_bytes
from cnnedge.package.single import write_single
from cnnedge.runtime import choose
from cnnedge.selftest import TOLERANCE


def golden(bundle):
    """Return a bundle's golden image files, and the reference's answers to them."""
    index = json.loads(bundle.path("selftest/selftest.json").read_text())
    paths = [bundle.path(entry["file"]) for entry in index["images"]]
    return paths, index["answers"]


def run(*arguments):
    return CliRunner().invoke(main, [str(a) for a in arguments])


def error_of(result, code=1):
    assert result.exit_code == code, (result.output, result.exception)
    (line,) = [line for line in result.stderr.splitlines() if line]
    assert line.startswith("error: ")
    return line


@pytest.mark.parametrize("variant", ["fp32", "fp16", "int8", "int8-trt"])
def test_it_answers_as_the_bundle_does(toy_bundle, tmp_path, variant):
    found = write_single(toy_bundle, tmp_path / "app.onnx", variant=variant)
    classify = cnnedge.load(tmp_path / "app.onnx")
    paths, answers = golden(toy_bundle)
    given = classify.probabilities(paths)
    precision = toy_bundle.manifest.variant(variant).precision
    assert np.abs(given - np.array(answers[variant])).max() <= TOLERANCE[precision]
    reference = np.array(answers["reference"])
    assert (given.argmax(1) == reference.argmax(1)).all()
    if variant in {"fp32", "fp16"}:
        assert np.abs(given - reference).max() <= TOLERANCE[precision]
    assert (classify.variant, classify.labels) == (variant, toy_bundle.manifest.labels)
    assert classify.image == toy_bundle.manifest.image
    assert "app.onnx" in repr(classify)
    assert found.sha256 == sha256(tmp_path / "app.onnx")


def test_the_graph_is_the_verified_one(toy_bundle, tmp_path):
    write_single(toy_bundle, tmp_path / "app.onnx", variant="int8")
    source = toy_bundle.path("model.int8.onnx").read_bytes()
    packaged = (tmp_path / "app.onnx").read_bytes()
    assert packaged[: len(source)] == source
    before, after = onnx.load_from_string(source), onnx.load_from_string(packaged)
    onnx.checker.check_model(after)
    assert after.graph == before.graph
    keys = [entry.key for entry in after.metadata_props]
    assert len(set(keys)) == len(keys)


def test_its_metadata_tells_all(toy_bundle, tmp_path):
    write_single(toy_bundle, tmp_path / "app.onnx", variant="int8")
    metadata = ort.InferenceSession(tmp_path / "app.onnx").get_modelmeta().custom_metadata_map
    variant, manifest = toy_bundle.manifest.variant("int8"), toy_bundle.manifest
    assert json.loads(metadata["cnnedge.labels"]) == list(manifest.labels)
    assert json.loads(metadata["cnnedge.image"]) == manifest.image.to_dict()
    assert metadata["cnnedge.bundle"] == manifest.name
    assert metadata["cnnedge.variant"] == "int8"
    assert metadata["cnnedge.source_sha256"] == variant.sha256
    assert metadata["cnnedge.verdict"].startswith(variant.verdict.status + ": ")
    assert variant.verdict.reason in metadata["cnnedge.verdict"]


def test_every_variant_of_a_bundle_carries_labels_and_contract(toy_bundle):
    for variant in toy_bundle.manifest.variants:
        classify = cnnedge.load(toy_bundle.path(variant.file))
        assert classify.labels == toy_bundle.manifest.labels
        assert classify.image == toy_bundle.manifest.image


def test_without_a_variant_it_is_the_one_that_load_picks(toy_bundle, tmp_path):
    done = run("package", toy_bundle.root, "--onnx", tmp_path / "app.onnx")
    assert done.exit_code == 0, done.output
    choice = choose(toy_bundle)
    assert f"app.onnx: {choice.variant.name}, " in done.output
    assert choice.reason in done.output
    told = json.loads(
        run("package", toy_bundle.root, "--onnx", tmp_path / "b.onnx", "--json").output
    )
    assert told["onnx"]["variant"] == choice.variant.name
    assert told["onnx"]["source_sha256"] == choice.variant.sha256
    assert cnnedge.load(tmp_path / "b.onnx").variant == choice.variant.name


def test_labels_of_any_script_survive(toy_bundle):
    entries = {"cnnedge.labels": '["schön", "日本", "\\"q\\""]', "long": "x" * 70_000}
    extended = toy_bundle.path("model.fp32.onnx").read_bytes() + metadata_bytes(entries)
    found = {e.key: e.value for e in onnx.load_from_string(extended).metadata_props}
    assert {key: found[key] for key in entries} == entries


@pytest.mark.system
def test_an_app_needs_neither_onnx_nor_tensorflow(toy_bundle, tmp_path):
    write_single(toy_bundle, tmp_path / "app.onnx")
    code = (
        "import sys, json, cnnedge\n"
        f"classify = cnnedge.load({str(tmp_path / 'app.onnx')!r})\n"
        f"label = classify({str(toy_bundle.path('selftest/golden-00.png'))!r})[0].label\n"
        "print(json.dumps([label, sorted({m.split('.')[0] for m in sys.modules})]))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    label, modules = json.loads(done.stdout)
    assert label in toy_bundle.manifest.labels
    assert not {"tensorflow", "keras", "onnx", "onnx_ir"} & set(modules)


@pytest.mark.system
def test_packaging_needs_neither_onnx_nor_tensorflow(toy_bundle, tmp_path):
    words = ["package", str(toy_bundle.root), "--onnx", str(tmp_path / "app.onnx")]
    words += ["--zip", str(tmp_path / "b.zip"), "--triton", str(tmp_path / "models")]
    code = (
        "import sys\nfrom cnnedge.cli import main\n"
        f"main({words!r}, standalone_mode=False)\n"
        "assert not {'tensorflow', 'onnx', 'onnx_ir', 'google.protobuf'} & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


class TestAnySize:
    """The resize inside the graph: an app hands over what its decoder gave it."""

    def test_it_answers_an_image_of_any_size_as_the_bundle_does(self, toy_bundle, tmp_path):
        out = tmp_path / "app.onnx"
        assert run("package", toy_bundle.root, "--onnx", out, "--any-size").exit_code == 0
        session = ort.InferenceSession(out)
        assert session.get_inputs()[0].shape[1:] == ["H", "W", 3]
        classify, whole = cnnedge.load(out), cnnedge.load(toy_bundle.root)
        rng = np.random.default_rng(0)
        for shape in ((97, 53), (31, 200), (400, 300)):
            pixels = rng.integers(0, 256, (*shape, 3), np.uint8)
            (expected,) = whole.probabilities([pixels])
            ((bare,),) = session.run(None, {"image": pixels[None]})
            np.testing.assert_array_equal(bare, expected)
            np.testing.assert_array_equal(classify.probabilities([pixels])[0], expected)

    def test_one_that_answers_otherwise_is_not_written(self, toy_bundle, tmp_path, monkeypatch):
        from cnnedge.graph import resize

        def upside_down(model, image):
            changed = onnx.load_model_from_string(put_resize(model, image))
            dense = next(
                t for t in changed.graph.initializer if t.data_type == onnx.TensorProto.INT32
            )
            values = onnx.numpy_helper.to_array(dense)
            dense.CopyFrom(onnx.numpy_helper.from_array(values[::-1] * 3, dense.name))
            return changed.SerializeToString()

        put_resize = resize.put_resize
        monkeypatch.setattr(resize, "put_resize", upside_down)
        out = tmp_path / "app.onnx"
        result = run("package", toy_bundle.root, "--onnx", out, "--any-size", "--variant", "int8")
        assert "with the resize in the graph a probability differs" in error_of(result, 3)
        assert not list(tmp_path.iterdir())

    def test_it_needs_the_export_extra(self, toy_bundle, tmp_path, monkeypatch):
        monkeypatch.setitem(sys.modules, "onnx", None)
        result = run("package", toy_bundle.root, "--onnx", tmp_path / "app.onnx", "--any-size")
        assert "cnnedge[export]" in error_of(result)

    def test_alone_it_is_a_wrong_use(self, toy_bundle, tmp_path):
        result = run("package", toy_bundle.root, "--zip", tmp_path / "a.zip", "--any-size")
        assert result.exit_code == 2


def test_another_tools_onnx_is_refused(toy_bundle, tmp_path):
    model = onnx.load(toy_bundle.path("model.fp32.onnx"))
    del model.metadata_props[:]
    foreign = tmp_path / "foreign.onnx"
    onnx.save(model, foreign)
    with pytest.raises(ModelError, match="it is another tool's"):
        cnnedge.load(foreign)
    photo = toy_bundle.path("selftest/golden-00.png")
    assert "no labels and no image contract" in error_of(run("predict", foreign, photo))
    assert "neither a bundle's folder" in error_of(run("verify", foreign))
    foreign.write_bytes(b"no model")
    assert "cannot load" in error_of(run("predict", foreign, photo))
    assert "does not exist" in error_of(run("predict", tmp_path / "none.onnx", photo))


@pytest.mark.parametrize(
    ("key", "value", "why"),
    [
        ("cnnedge.labels", '["a", "b"]', "names 2 labels"),
        ("cnnedge.labels", "[1, 2]", "expected str, got int"),
        ("cnnedge.labels", "[", "cannot be read"),
        ("cnnedge.labels", "[" * 200_000, "cannot be read"),
        ("cnnedge.image", '{"height": 8, "width": 8}', "an image of 8×8×3"),
        ("cnnedge.image", "[]", "cannot be read"),
        ("cnnedge.image", '{"height": 1e999, "width": 8}', "cannot be read"),
        ("cnnedge.source_bytes", "many", "cannot be read"),
    ],
)
def test_metadata_that_the_graph_does_not_fit(toy_bundle, tmp_path, key, value, why):
    model = onnx.load(toy_bundle.path("model.fp32.onnx"))
    kept = {entry.key: entry.value for entry in model.metadata_props} | {key: value}
    onnx.helper.set_model_props(model, kept)
    onnx.save(model, tmp_path / "odd.onnx")
    with pytest.raises(ModelError, match=why):
        cnnedge.load(tmp_path / "odd.onnx")


def test_damage_to_the_weights_is_found(toy_bundle, tmp_path):
    write_single(toy_bundle, tmp_path / "app.onnx", variant="fp32")
    content = bytearray((tmp_path / "app.onnx").read_bytes())
    weight = onnx.load(tmp_path / "app.onnx").graph.initializer
    largest = max(weight, key=lambda tensor: len(tensor.raw_data)).raw_data
    content[content.index(largest) + len(largest) // 2] ^= 1
    (tmp_path / "app.onnx").write_bytes(content)
    with pytest.raises(BundleError, match="altered since"):
        cnnedge.load(tmp_path / "app.onnx")


def test_what_is_not_in_it_is_said(toy_bundle, tmp_path):
    write_single(toy_bundle, tmp_path / "app.onnx", variant="int8")
    assert cnnedge.load(tmp_path / "app.onnx", variant="int8").variant == "int8"
    with pytest.raises(BundleError, match="holds the variant 'int8' alone, and 'fp32'"):
        cnnedge.load(tmp_path / "app.onnx", variant="fp32")
    with pytest.raises(BundleError, match="no plan for rtx"):
        cnnedge.load(tmp_path / "app.onnx", runtime="rtx")


def test_it_runs_on_openvino(toy_bundle, tmp_path):
    pytest.importorskip("openvino", reason="OpenVINO is not installed")
    write_single(toy_bundle, tmp_path / "app.onnx", variant="fp32")
    paths, answers = golden(toy_bundle)
    given = cnnedge.load(tmp_path / "app.onnx", runtime="openvino").probabilities(paths)
    assert np.abs(given - np.array(answers["reference"])).max() <= TOLERANCE["fp32"]


def test_a_float32_graph_says_how_it_is_fed(toy_file, tmp_path):
    from cnnedge.pipeline import export_bundle
    from cnnedge.recipe import make_recipe

    recipe = make_recipe(
        model=str(toy_file), input="float32", precision=("fp32",), max_drop=3, bench_seconds=0.1
    )
    bundle, _ = export_bundle(recipe, tmp_path / "float")
    write_single(bundle, tmp_path / "app.onnx")
    paths, answers = golden(bundle)
    given = cnnedge.load(tmp_path / "app.onnx").probabilities(paths)
    assert np.abs(given - np.array(answers["reference"])).max() <= TOLERANCE["fp32"]
    with pytest.raises(ModelError, match="does not say how its pixels are normalized"):
        cnnedge.load(bundle.path("model.fp32.onnx"))


def test_a_file_with_other_labels_than_the_manifest_is_not_packaged(bundle_copy, tmp_path):
    edit_manifest(bundle_copy, lambda fields: fields.update(labels=list("abcdefghij")))
    with pytest.raises(BundleError, match=r"the labels in .* are not those of the manifest"):
        write_single(open_bundle(bundle_copy), tmp_path / "app.onnx")
    model = onnx.load(bundle_copy / "model.fp32.onnx")
    del model.metadata_props[:]
    onnx.save(model, bundle_copy / "model.fp32.onnx")
    rehash(bundle_copy, "model.fp32.onnx")
    with pytest.raises(ModelError, match="no labels"):
        write_single(open_bundle(bundle_copy), tmp_path / "app.onnx", variant="fp32")
    assert not (tmp_path / "app.onnx").exists()


def test_it_is_not_written_where_it_should_not_be(bundle_copy, tmp_path):
    out = tmp_path / "app.onnx"
    assert run("package", bundle_copy, "--onnx", out).exit_code == 0
    before = out.read_bytes()
    assert "exists already" in error_of(run("package", bundle_copy, "--onnx", out))
    assert "choose one of" in error_of(
        run("package", bundle_copy, "--onnx", out, "--variant", "int2", "--force")
    )
    assert out.read_bytes() == before
    changed = run("package", bundle_copy, "--onnx", out, "--variant", "fp16", "--force")
    assert changed.exit_code == 0
    assert cnnedge.load(out).variant == "fp16"
    inside = bundle_copy / "model.fp32.onnx"
    assert "inside the bundle" in error_of(run("package", bundle_copy, "--onnx", inside, "--force"))
    assert "does not end in .onnx" in error_of(
        run("package", bundle_copy, "--onnx", tmp_path / "a")
    )
    assert "cannot write" in error_of(run("package", bundle_copy, "--onnx", out / "b.onnx"))
    # One of several places that cannot be written: none is.
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "diary.txt").write_text("mine")
    words = ["--onnx", tmp_path / "new.onnx", "--triton", taken, "--force"]
    assert "is no model repository" in error_of(run("package", bundle_copy, *words))
    assert not (tmp_path / "new.onnx").exists()
    open_bundle(bundle_copy)


def test_nothing_half_written_is_left(bundle_copy, tmp_path, monkeypatch):
    bundle = open_bundle(bundle_copy)
    source = bundle_copy / "model.fp32.onnx"
    content = source.read_bytes()
    source.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(CnnEdgeError):
        write_single(bundle, tmp_path / "app.onnx", variant="fp32")
    assert {path.name for path in tmp_path.iterdir()} == {"toy"}
