"""Of a signed bundle the very bytes that were checked are run, whatever stands there by then."""

from __future__ import annotations

import shutil
import subprocess

import numpy as np
import pytest
from test_bundle import edit_manifest

import cnnedge
from cnnedge.bundle import MANIFEST, open_bundle
from cnnedge.errors import BundleError, CnnEdgeError, SignatureError
from cnnedge.files import sha256

pytest.importorskip("model_signing", reason="the extra `sign` is not installed: model-signing")

from cnnedge import bundle as bundle_module
from cnnedge import signature
from cnnedge.runtime import opening
from cnnedge.signature import open_signed, sign_bundle

pytestmark = pytest.mark.system


@pytest.fixture(scope="module")
def keys(tmp_path_factory):
    folder = tmp_path_factory.mktemp("keys")
    for name in ("maker", "stranger"):
        key = ["-out", folder / f"{name}.pem"]
        subprocess.run(
            ["openssl", "ecparam", "-name", "prime256v1", "-genkey", "-noout", *key], check=True
        )
        out = ["-pubout", "-out", folder / f"{name}.pub.pem"]
        subprocess.run(
            ["openssl", "ec", "-in", folder / f"{name}.pem", *out], check=True, capture_output=True
        )
    return folder


@pytest.fixture
def signed(bundle_copy, keys):
    sign_bundle(bundle_copy, keys / "maker.pem")
    return bundle_copy


def forge(root):
    """Make of a bundle one whose labels are turned round; its own hashes are right."""
    labels = root / "labels.txt"
    labels.write_text("".join(f"{9 - i}\n" for i in range(10)))

    def turn(fields):
        fields["labels"].reverse()
        fields["files"]["labels.txt"].update(sha256=sha256(labels), bytes=labels.stat().st_size)

    edit_manifest(root, turn)
    return root


def after(module, name, monkeypatch, swap, *, before=False):
    """Swap something just after, or before, a function is called."""
    original = getattr(module, name)

    def call(*arguments, **options):
        if before:
            swap()
            return original(*arguments, **options)
        found = original(*arguments, **options)
        swap()
        return found

    monkeypatch.setattr(module, name, call)


def test_a_manifest_swapped_after_the_signature_was_checked(signed, keys, tmp_path, monkeypatch):
    forged = forge(shutil.copytree(signed, tmp_path / "forged"))

    def swap():
        for name in (MANIFEST, "labels.txt"):
            shutil.copy(forged / name, signed / name)

    after(signature, "_checked", monkeypatch, swap)
    with pytest.raises(SignatureError, match="is not the one that was signed"):
        cnnedge.load(signed, public_key=keys / "maker.pub.pem")
    open_bundle(signed)  # by its own hashes it is whole


def test_a_signature_swapped_after_it_was_read(signed, keys, tmp_path, monkeypatch):
    """A stranger's list of hashes is not believed since the maker's was checked."""
    forged = forge(shutil.copytree(signed, tmp_path / "forged"))
    sign_bundle(forged, keys / "stranger.pem", overwrite=True)
    honest = shutil.copytree(signed, tmp_path / "honest")
    shutil.copytree(forged, signed, dirs_exist_ok=True)

    def swap():
        shutil.copytree(honest, signed, dirs_exist_ok=True)

    after(signature, "_read", monkeypatch, swap)
    with pytest.raises(SignatureError):
        open_signed(signed, keys / "maker.pub.pem")


@pytest.mark.parametrize("where", ["opened", "chosen"])
def test_a_model_swapped_after_its_hash_was_taken(signed, keys, monkeypatch, where):
    image = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
    expected = cnnedge.load(signed, variant="fp32")(image)

    def swap():
        shutil.copy(signed / "model.int8.onnx", signed / "model.fp32.onnx")

    if where == "opened":
        after(bundle_module, "_read_checked_manifest", monkeypatch, swap)
        with pytest.raises(BundleError, match=r"model\.fp32\.onnx is not what the manifest names"):
            cnnedge.load(signed, variant="fp32", public_key=keys / "maker.pub.pem")
    else:
        after(opening, "_open_graph", monkeypatch, swap, before=True)
        found = cnnedge.load(signed, variant="fp32", public_key=keys / "maker.pub.pem")
        assert found(image) == expected, "what was checked is what runs"
        assert sha256(signed / "model.fp32.onnx") == sha256(signed / "model.int8.onnx")


def test_a_signature_that_names_no_manifest_vouches_for_none(bundle_copy, keys, monkeypatch):
    with pytest.raises(CnnEdgeError, match="not the one that was signed"):
        open_bundle(bundle_copy, manifest_sha256="")
