"""A bundle is whole or refused; what it holds is what the manifest says."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest

from cnnedge.bundle import MANIFEST, Manifest, check_place, open_bundle, write_labels
from cnnedge.errors import BundleError
from cnnedge.files import sha256


def edit_manifest(root, change):
    fields = json.loads((root / MANIFEST).read_text())
    change(fields)
    (root / MANIFEST).write_text(json.dumps(fields))


def rehash(root, name):
    """Make the manifest agree with a file that a test has changed on purpose."""

    def change(fields):
        for entry in [v for v in fields["variants"] if v["file"] == name]:
            entry["sha256"] = sha256(root / name)
        if name in fields["files"]:
            fields["files"][name]["sha256"] = sha256(root / name)

    edit_manifest(root, change)


def test_everything_in_the_folder_is_in_the_manifest(toy_bundle):
    there = {str(p.relative_to(toy_bundle.root)) for p in toy_bundle.root.rglob("*") if p.is_file()}
    listed = {v.file for v in toy_bundle.manifest.variants} | set(toy_bundle.manifest.files)
    assert there == listed | {MANIFEST}
    for variant in toy_bundle.manifest.variants:
        assert variant.bytes == toy_bundle.path(variant.file).stat().st_size


def test_the_manifest_says_where_everything_comes_from(toy_bundle, digits):
    m = toy_bundle.manifest
    assert [v.name for v in m.variants] == ["fp32", "fp16", "int8", "int8-trt"]
    assert (m.model.weights, m.normalization, m.input) == ("trained", "unit", "uint8")
    assert m.labels == digits.labels
    assert m.data.test_sha256 == digits.test.digest()
    assert m.calibration.split == "calibration"
    assert m.calibration.sha256 == digits.calibration.take(128, seed=0).digest()
    assert {"cnnedge", "python", "onnxruntime"} <= set(m.tools)
    assert m.machine.cores >= 1
    int8 = m.variant("int8")
    assert int8.achieved["macs"]["int8"] > 0.9
    assert int8.provider == "CPUExecutionProvider"
    assert int8.accuracy.n == len(digits.test)
    assert m.variant("fp32").accuracy.max_abs_diff <= 1e-5
    assert m.variant("fp16").accuracy.max_abs_diff <= 2e-3


def test_the_manifest_survives_its_own_json(toy_bundle):
    again = Manifest.from_json(toy_bundle.manifest.to_json())
    assert again.to_json() == toy_bundle.manifest.to_json()


@pytest.mark.parametrize("name", ["model.int8.onnx", "labels.txt", "selftest/tensors.npz"])
@pytest.mark.parametrize("damage", ["altered", "truncated", "missing"])
def test_a_damaged_file_is_named(bundle_copy, name, damage):
    path = bundle_copy / name
    content = path.read_bytes()
    if damage == "altered":
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    elif damage == "truncated":
        path.write_bytes(content[: len(content) // 2])
    else:
        path.unlink()
    with pytest.raises(BundleError, match=name):
        open_bundle(bundle_copy)


@pytest.mark.parametrize("name", ["../outside.txt", "/etc/hostname", "a/../../x", "c:\\x", "link"])
def test_a_path_that_leaves_the_bundle_is_refused(bundle_copy, tmp_path, name):
    (tmp_path / "outside.txt").write_text("secret")
    (bundle_copy / "link").symlink_to(tmp_path / "outside.txt")

    def change(fields):
        fields["files"][name] = {"bytes": 6, "sha256": sha256(tmp_path / "outside.txt")}

    edit_manifest(bundle_copy, change)
    with pytest.raises(BundleError, match="outside the bundle"):
        open_bundle(bundle_copy)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "cannot be read"),
        ("[]", "schema None"),
        ('{"schema": 99}', "schema 99"),
        ('{"schema": 1}', "cannot be read"),
    ],
)
def test_a_broken_manifest_is_refused(bundle_copy, text, message):
    (bundle_copy / MANIFEST).write_text(text)
    with pytest.raises(BundleError, match=message):
        open_bundle(bundle_copy)


def test_what_is_no_bundle_is_refused(tmp_path):
    with pytest.raises(BundleError, match="does not exist"):
        open_bundle(tmp_path / "nowhere")
    with pytest.raises(BundleError, match=r"no manifest\.json"):
        open_bundle(tmp_path)


@pytest.mark.parametrize("manifest", [None, '{"name": "a web page"}', "[]", "{"])
def test_force_replaces_a_bundle_and_no_other_folder(bundle_copy, tmp_path, manifest):
    check_place(bundle_copy, force=True)
    (bundle_copy / "model.fp32.onnx").write_bytes(b"damaged")
    check_place(bundle_copy, force=True)
    with pytest.raises(BundleError, match="exists already"):
        check_place(bundle_copy, force=False)
    other = tmp_path / "photos"
    other.mkdir()
    check_place(other, force=True)
    (other / "one.jpg").touch()
    if manifest is not None:
        (other / "manifest.json").write_text(manifest)
    for place in (other, other / "one.jpg"):
        with pytest.raises(BundleError, match="is no bundle, and is not replaced"):
            check_place(place, force=True)


def test_labels_with_line_breaks_are_refused(tmp_path):
    with pytest.raises(BundleError, match="line break"):
        write_labels(tmp_path, ("fine", "not\nfine"))
    write_labels(tmp_path, ("schön", "日本"))
    assert (tmp_path / "labels.txt").read_text(encoding="utf-8") == "schön\n日本\n"


def test_the_bundle_can_be_moved(toy_bundle, tmp_path):
    moved = shutil.copytree(toy_bundle.root, tmp_path / "elsewhere" / "bundle")
    assert open_bundle(moved).manifest == toy_bundle.manifest


def test_the_report_is_one_page_that_needs_no_network(toy_bundle):
    page = toy_bundle.path("report.html").read_text(encoding="utf-8")
    assert "Same answers as Keras?" in page
    assert "INT8 for CPUs" in page
    assert "http" not in page.replace("http-equiv", "")
    samples = json.loads(page.split('id="samples">')[1].split("</script>")[0])
    assert {m["name"] for m in samples["measurements"]} == {
        "keras",
        *(v.name for v in toy_bundle.manifest.variants if v.target != "trt"),
    }
    assert all(np.isfinite(m["samples_ms"]).all() for m in samples["measurements"])
