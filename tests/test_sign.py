"""A signature tells the maker's bundle from every other, in whatever way it was changed."""

from __future__ import annotations

import base64
import errno
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import threading

import pytest
from click.testing import CliRunner
from test_bundle import edit_manifest

import cnnedge
from cnnedge.bundle import MANIFEST, SIGNATURE, open_bundle
from cnnedge.cli import main
from cnnedge.errors import BundleError, CnnEdgeError, MissingExtraError, SignatureError
from cnnedge.files import sha256

pytest.importorskip("model_signing", reason="the extra `sign` is not installed: model-signing")

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa

from cnnedge.package.archive import write_archive
from cnnedge.signature import check_signature, sign_bundle

PEM = serialization.Encoding.PEM
PLAIN = serialization.NoEncryption()


def write_pair(folder, name, key, encryption=PLAIN):
    """Write a key's two halves as openssl would; return their paths."""
    private, public = folder / f"{name}.pem", folder / f"{name}.pub.pem"
    kind = serialization.PrivateFormat.PKCS8
    private.write_bytes(key.private_bytes(PEM, kind, encryption))
    kind = serialization.PublicFormat.SubjectPublicKeyInfo
    public.write_bytes(key.public_key().public_bytes(PEM, kind))
    return private, public


@pytest.fixture(scope="module")
def keys(tmp_path_factory):
    """The maker's key, and a stranger's."""
    folder = tmp_path_factory.mktemp("keys")
    return {
        name: write_pair(folder, name, ec.generate_private_key(ec.SECP256R1()))
        for name in ("maker", "stranger")
    }


@pytest.fixture
def signed(bundle_copy, keys):
    sign_bundle(bundle_copy, keys["maker"][0])
    return bundle_copy


def files_of(root):
    return sorted(p for p in root.rglob("*") if p.is_file() and p.name != SIGNATURE)


def no_partial_left(root):
    return not [p for p in root.rglob("*") if "partial" in p.name]


def run(*words):
    return CliRunner().invoke(main, [str(word) for word in words])


def one_line(result, code):
    assert result.exit_code == code, result.output
    (line,) = result.stderr.strip().splitlines()
    assert line.startswith("error: ")
    return line


def test_a_signed_bundle_is_loaded(toy_bundle, signed, keys, digits):
    classify = cnnedge.load(signed, public_key=keys["maker"][1])
    assert classify(digits.test.items[0]) == cnnedge.load(signed)(digits.test.items[0])
    assert open_bundle(signed).manifest == toy_bundle.manifest
    signature = check_signature(str(signed), str(keys["maker"][1]))
    assert signature.files == len(files_of(signed))
    assert signature.key_sha256 == sha256(keys["maker"][1])
    assert no_partial_left(signed)


def test_nothing_of_a_refused_bundle_is_opened(bundle_copy, keys, monkeypatch):
    def opened(*arguments, **options):
        raise AssertionError("it was opened")

    monkeypatch.setattr("cnnedge.runtime.open_bundle", opened)
    monkeypatch.setattr("cnnedge.runtime.open_variant", opened)
    with pytest.raises(BundleError, match=f"is not signed: it has no {SIGNATURE}"):
        cnnedge.load(bundle_copy, public_key=keys["maker"][1])


def test_every_file_is_covered(signed, keys):
    names = {str(path.relative_to(signed)) for path in files_of(signed)}
    assert {MANIFEST, "report.html", "labels.txt", "selftest/selftest.json"} <= names
    for path in files_of(signed):
        content = path.read_bytes()
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        with pytest.raises(SignatureError, match=rf"\(altered: {path.relative_to(signed)}\)"):
            check_signature(signed, keys["maker"][1])
        path.write_bytes(content)
    check_signature(signed, keys["maker"][1])


def test_hashes_altered_along_with_a_file_do_not_help(signed, keys):
    labels = signed / "labels.txt"
    labels.write_text("".join(f"{9 - int(line)}\n" for line in labels.read_text().split()))
    edit_manifest(
        signed, lambda fields: fields["files"]["labels.txt"].update(sha256=sha256(labels))
    )
    open_bundle(signed)  # the manifest alone is deceived
    with pytest.raises(BundleError, match=r"altered: labels.txt, manifest\.json"):
        cnnedge.load(signed, public_key=keys["maker"][1])


@pytest.mark.parametrize(
    "name", ["notes.txt", ".hidden", ".git/config", ".gitignore", "engines/evil.plan", "a/b/c"]
)
def test_a_file_that_was_added_is_found(signed, keys, name):
    (signed / name).parent.mkdir(parents=True, exist_ok=True)
    (signed / name).write_text("x")
    with pytest.raises(SignatureError, match=rf"\(added: {name}\)"):
        check_signature(signed, keys["maker"][1])


def test_what_a_signature_leaves_out_is_found(bundle_copy, keys):
    """The library signs with any list of what is not covered, and checks by that list."""
    from model_signing import hashing, signing

    config = signing.Config().use_elliptic_key_signer(private_key=keys["maker"][0])
    left_out = [bundle_copy / name for name in (SIGNATURE, "report.html")]
    config.set_hashing_config(hashing.Config().set_ignored_paths(paths=left_out))
    config.sign(bundle_copy, bundle_copy / SIGNATURE)
    with pytest.raises(SignatureError, match=r"does not cover report\.html"):
        check_signature(bundle_copy, keys["maker"][1])


def test_a_file_that_was_removed_is_found(signed, keys):
    (signed / "report.html").unlink()
    with pytest.raises(SignatureError, match=r"\(missing: report\.html\)"):
        check_signature(signed, keys["maker"][1])


def test_links_are_refused(signed, keys, tmp_path):
    shutil.move(signed / "report.html", tmp_path / "report.html")
    (signed / "report.html").symlink_to(tmp_path / "report.html")
    with pytest.raises(SignatureError, match=r"report\.html .* is a link"):
        check_signature(signed, keys["maker"][1])
    with pytest.raises(BundleError, match="link|outside"):
        sign_bundle(signed, keys["maker"][0], overwrite=True)


def test_the_folder_may_be_moved_renamed_and_linked_to(signed, keys, tmp_path):
    moved = tmp_path / "releases" / "7"
    shutil.copytree(signed, moved)
    (tmp_path / "current").symlink_to(moved)
    check_signature(tmp_path / "current", keys["maker"][1])
    assert cnnedge.load(tmp_path / "current", public_key=keys["maker"][1]).labels


def test_another_key_is_refused(signed, keys):
    with pytest.raises(SignatureError, match="was signed with another key"):
        check_signature(signed, keys["stranger"][1])


def test_a_stranger_who_claims_the_makers_key_is_refused(bundle_copy, keys):
    sign_bundle(bundle_copy, keys["stranger"][0])
    content = json.loads((bundle_copy / SIGNATURE).read_text())
    content["verificationMaterial"]["publicKey"]["hint"] = sha256(keys["maker"][1])
    (bundle_copy / SIGNATURE).write_text(json.dumps(content))
    with pytest.raises(SignatureError, match="forged or was altered"):
        check_signature(bundle_copy, keys["maker"][1])


def test_an_altered_list_of_hashes_is_refused(signed, keys):
    """Alter a file, and its hash in the signature: what is signed is that list."""
    (signed / "report.html").write_text("altered")
    content = json.loads((signed / SIGNATURE).read_text())
    statement = json.loads(base64.b64decode(content["dsseEnvelope"]["payload"]))
    for entry in statement["predicate"]["resources"]:
        if entry["name"] == "report.html":
            entry["digest"] = sha256(signed / "report.html")
    payload = base64.b64encode(json.dumps(statement).encode()).decode()
    content["dsseEnvelope"]["payload"] = payload
    (signed / SIGNATURE).write_text(json.dumps(content))
    with pytest.raises(SignatureError, match="forged or was altered"):
        check_signature(signed, keys["maker"][1])


def test_another_bundles_signature_is_refused(signed, keys, tmp_path):
    other = shutil.copytree(signed, tmp_path / "other")
    edit_manifest(other, lambda fields: fields.update(name="other"))
    sign_bundle(other, keys["maker"][0], overwrite=True)
    shutil.copy(other / SIGNATURE, signed / SIGNATURE)
    with pytest.raises(SignatureError, match=r"altered: manifest\.json"):
        check_signature(signed, keys["maker"][1])


def drop(*path):
    def change(content):
        fields = json.loads(content)
        inner = fields
        for name in path[:-1]:
            inner = inner[name]
        del inner[path[-1]]
        return json.dumps(fields).encode()

    return change


BROKEN = {
    "empty": lambda content: b"",
    "cut": lambda content: content[: len(content) // 2],
    "binary": lambda content: bytes(range(256)),
    "list": lambda content: b"[]",
    "null": lambda content: b"null",
    "deep": lambda content: b"[" * 200_000,
    "no key": drop("verificationMaterial", "publicKey"),
    "no key's name": drop("verificationMaterial", "publicKey", "hint"),
    "no name": lambda content: re.sub(rb'"hint": ?"[0-9a-f]+"', b'"hint": null', content),
    "no payload": drop("dsseEnvelope", "payload"),
    "no signature": drop("dsseEnvelope", "signatures", 0),
    "no media type": drop("mediaType"),
}


@pytest.mark.parametrize("damage", BROKEN)
def test_a_broken_signature_file_is_refused_in_one_line(signed, keys, damage):
    path = signed / SIGNATURE
    path.write_bytes(BROKEN[damage](path.read_bytes()))
    line = one_line(run("verify", signed, "--signature", keys["maker"][1]), 3)
    assert "no signature of a bundle" in line or "does not hold" in line


def test_a_huge_signature_file_is_not_read(signed, keys):
    with open(signed / SIGNATURE, "r+b") as file:
        file.truncate(1 << 30)
    with pytest.raises(SignatureError, match="too large"):
        check_signature(signed, keys["maker"][1])


def test_an_engine_built_after_signing_is_said(signed, keys):
    (signed / "engines").mkdir()
    (signed / "engines" / "fp16.rtx.plan").write_bytes(b"plan")
    edit_manifest(signed, lambda fields: fields.update(tools={}))
    with pytest.raises(SignatureError, match="added: engines/fp16.rtx.plan.*`cnnedge engine`"):
        check_signature(signed, keys["maker"][1])
    (signed / "labels.txt").write_text("x")
    with pytest.raises(SignatureError, match="do not use it"):
        check_signature(signed, keys["maker"][1])


def test_signing_again_takes_force(signed, keys):
    before = (signed / SIGNATURE).read_bytes()
    assert "signed already" in one_line(run("sign", signed, "--key", keys["stranger"][0]), 1)
    assert (signed / SIGNATURE).read_bytes() == before
    assert run("sign", signed, "--key", keys["stranger"][0], "--force").exit_code == 0
    check_signature(signed, keys["stranger"][1])


def test_what_is_no_whole_bundle_is_not_signed(bundle_copy, keys, tmp_path):
    private = keys["maker"][0]
    with pytest.raises(BundleError, match="does not exist"):
        sign_bundle(tmp_path / "nowhere", private)
    with pytest.raises(BundleError, match="does not exist"):
        check_signature(tmp_path / "nowhere", keys["maker"][1])
    (bundle_copy / "notes.txt").write_text("mine")
    with pytest.raises(BundleError, match=r"does not name: notes\.txt"):
        sign_bundle(bundle_copy, private)
    (bundle_copy / "notes.txt").unlink()
    with pytest.raises(BundleError, match="private key .* lies in the bundle"):
        sign_bundle(bundle_copy, shutil.copy(private, bundle_copy / "key.pem"))
    (bundle_copy / "key.pem").unlink()
    (bundle_copy / "labels.txt").write_text("altered")
    with pytest.raises(BundleError, match="altered or cut short"):
        sign_bundle(bundle_copy, private)
    assert not (bundle_copy / SIGNATURE).exists()


@pytest.mark.parametrize("curve", [ec.SECP256R1, ec.SECP384R1, ec.SECP521R1])
def test_each_curve_serves(bundle_copy, tmp_path, curve):
    private, public = write_pair(tmp_path, "key", ec.generate_private_key(curve()))
    sign_bundle(bundle_copy, private)
    check_signature(bundle_copy, public)


def bad_keys(folder, keys):
    """Return key files that cannot be used: for signing, for checking, and what is said."""
    password = serialization.BestAvailableEncryption(b"secret")
    encrypted, _ = write_pair(folder, "enc", ec.generate_private_key(ec.SECP256R1()), password)
    _, rsa_public = rsa_pair = write_pair(folder, "rsa", rsa.generate_private_key(65537, 2048))
    ed_pair = write_pair(folder, "ed", ed25519.Ed25519PrivateKey.generate())
    k1_pair = write_pair(folder, "k1", ec.generate_private_key(ec.SECP256K1()))
    garbage = folder / "garbage.pem"
    garbage.write_bytes(b"-----BEGIN EC PRIVATE KEY-----\nxx\n-----END EC PRIVATE KEY-----\n")
    binary = folder / "binary.pem"
    binary.write_bytes(bytes(range(256)))
    private, public = keys["maker"]
    signing = [
        (encrypted, "is encrypted"),
        (rsa_pair[0], "no elliptic-curve key"),
        (ed_pair[0], "no elliptic-curve key"),
        (k1_pair[0], "no elliptic-curve key"),
        (public, "is a public key"),
        (garbage, "no private key in PEM form"),
        (binary, "no private key in PEM form"),
        (folder / "nowhere.pem", "cannot read the private key"),
        (folder, "cannot read the private key"),
    ]
    checking = [
        (rsa_public, "no elliptic-curve key"),
        (ed_pair[1], "no elliptic-curve key"),
        (k1_pair[1], "no elliptic-curve key"),
        (private, "is a private key, which belongs on no device"),
        (binary, "no public key in PEM form"),
        (folder / "nowhere.pem", "cannot read the public key"),
        (folder, "cannot read the public key"),
    ]
    return signing, checking


def test_a_key_that_cannot_be_used_is_said_in_one_line(bundle_copy, keys, tmp_path):
    signing, checking = bad_keys(tmp_path, keys)
    for key, message in signing:
        line = one_line(run("sign", bundle_copy, "--key", key), 1)
        assert message in line, key
        assert not (bundle_copy / SIGNATURE).exists()
    sign_bundle(bundle_copy, keys["maker"][0])
    for key, message in checking:  # a bad key is no verdict on the bundle: 1, not 3
        line = one_line(run("verify", bundle_copy, "--signature", key), 1)
        assert message in line, key


def test_a_key_may_come_through_a_pipe(bundle_copy, keys, tmp_path):
    os.mkfifo(tmp_path / "key")
    content = keys["maker"][0].read_bytes()
    threading.Thread(target=(tmp_path / "key").write_bytes, args=(content,), daemon=True).start()
    sign_bundle(bundle_copy, tmp_path / "key")
    check_signature(bundle_copy, keys["maker"][1])


def test_the_old_signature_stays_where_the_new_one_cannot_be_written(signed, keys, monkeypatch):
    from model_signing import signing

    before = (signed / SIGNATURE).read_bytes()

    def fill_the_disk(self, model, path):
        path.write_bytes(b"{half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(signing.Config, "sign", fill_the_disk)
    line = one_line(run("sign", signed, "--key", keys["maker"][0], "--force"), 1)
    assert "cannot write" in line
    assert "No space left" in line
    assert (signed / SIGNATURE).read_bytes() == before
    assert no_partial_left(signed)


def test_a_folder_in_the_signatures_place_is_said(bundle_copy, keys):
    (bundle_copy / SIGNATURE).mkdir()
    line = one_line(run("sign", bundle_copy, "--key", keys["maker"][0], "--force"), 1)
    assert "cannot write" in line
    assert "is not signed" in one_line(
        run("verify", bundle_copy, "--signature", keys["maker"][1]), 3
    )


def test_no_network_is_used(bundle_copy, keys, monkeypatch):
    def connect(self, *address):
        raise AssertionError(f"a connection was opened to {address}")

    monkeypatch.setattr(socket.socket, "connect", connect)
    monkeypatch.setattr(socket, "getaddrinfo", connect)
    sign_bundle(bundle_copy, keys["maker"][0])
    check_signature(bundle_copy, keys["maker"][1])


def test_the_command_line(bundle_copy, keys):
    result = run("sign", bundle_copy, "--key", keys["maker"][0])
    assert result.exit_code == 0, result.output
    fingerprint = sha256(keys["maker"][1])
    count = len(files_of(bundle_copy))
    assert f"{SIGNATURE}: {count} files, with the key {fingerprint}" in result.stdout
    result = run("verify", bundle_copy, "--signature", keys["maker"][1])
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith("signed: ")
    assert "self-test" in result.stdout
    result = run("verify", bundle_copy, "--signature", keys["maker"][1], "--json")
    found = json.loads(result.stdout)
    assert found["signature"]["key_sha256"] == fingerprint
    assert len(found["variants"]) == 4
    result = run("sign", bundle_copy, "--key", keys["maker"][0], "--force", "--json")
    assert json.loads(result.stdout)["files"] == count


@pytest.mark.parametrize(
    "damage", ["unsigned", "another key", "altered"], ids=lambda name: name.replace(" ", "-")
)
def test_a_refused_signature_is_a_gate_that_failed(signed, keys, monkeypatch, damage):
    def verified(*arguments, **options):
        raise AssertionError("it was run")

    monkeypatch.setattr("cnnedge.verify.verify_bundle", verified)
    if damage == "unsigned":
        (signed / SIGNATURE).unlink()
    elif damage == "altered":
        (signed / "report.html").write_text("x")
    key = keys["stranger" if damage == "another key" else "maker"][1]
    one_line(run("verify", signed, "--signature", key), 3)


@pytest.mark.system
def test_the_librarys_own_command_agrees(signed, keys):
    """What we sign is in the common format: another tool checks it too."""
    words = [sys.executable, "-m", "model_signing", "verify", "key", signed]
    words += ["--signature", signed / SIGNATURE, "--public_key", keys["maker"][1]]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (signed / "report.html").write_text("x")
    assert subprocess.run(words, capture_output=True).returncode != 0


def test_without_the_library_the_extra_is_named(toy_bundle, keys, monkeypatch):
    monkeypatch.setitem(sys.modules, "model_signing", None)
    for part in ("signing", "verifying"):
        monkeypatch.delitem(sys.modules, f"model_signing.{part}", raising=False)
    with pytest.raises(MissingExtraError, match=r"cnnedge\[sign\]"):
        sign_bundle(toy_bundle.root, keys["maker"][0])
    with pytest.raises(MissingExtraError, match=r"cnnedge\[sign\]"):
        cnnedge.load(toy_bundle.root, public_key=keys["maker"][1])


def test_a_file_that_cannot_be_read_is_said(signed, keys, monkeypatch):
    from model_signing import verifying

    def deny(self, model, signature):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(verifying.Config, "verify", deny)
    with pytest.raises(CnnEdgeError, match="cannot be read: Permission denied"):
        check_signature(signed, keys["maker"][1])


class TestAZipFile:
    """What was signed as a folder holds in one file, too."""

    @pytest.fixture
    def packed(self, signed, tmp_path):
        write_archive(open_bundle(signed), tmp_path / "signed.zip")
        return tmp_path / "signed.zip"

    def test_its_signature_is_checked(self, packed, signed, keys):
        found = check_signature(packed, keys["maker"][1])
        assert found.file == str(packed / SIGNATURE)
        assert found.files == len(files_of(signed))
        golden = next((signed / "selftest").glob("golden-*"))
        classify = cnnedge.load(packed, public_key=keys["maker"][1])
        assert classify(golden)[0].label == cnnedge.load(signed)(golden)[0].label
        with pytest.raises(SignatureError, match=r"signed\.zip was signed with another key"):
            cnnedge.load(packed, public_key=keys["stranger"][1])

    def test_one_that_was_made_of_another_bundle_is_refused(self, signed, tmp_path, keys):
        """Altered and with hashes that fit: only the signature can tell."""
        edit_manifest(signed, lambda manifest: manifest.update(name="another"))
        write_archive(open_bundle(signed), tmp_path / "forged.zip")
        assert cnnedge.load(tmp_path / "forged.zip")
        with pytest.raises(SignatureError, match="altered: manifest.json"):
            cnnedge.load(tmp_path / "forged.zip", public_key=keys["maker"][1])

    def test_one_without_is_refused(self, bundle_copy, tmp_path, keys):
        write_archive(open_bundle(bundle_copy), tmp_path / "plain.zip")
        with pytest.raises(SignatureError, match=r"plain\.zip is not signed"):
            cnnedge.load(tmp_path / "plain.zip", public_key=keys["maker"][1])

    def test_it_is_signed_as_a_folder(self, packed, keys):
        line = one_line(run("sign", packed, "--key", keys["maker"][0], "--force"), 1)
        assert "is a zip archive, and signing writes into the bundle" in line


def test_one_onnx_file_carries_no_signature(bundle_copy, keys):
    with pytest.raises(SignatureError, match="carries no signature"):
        cnnedge.load(bundle_copy / "model.int8.onnx", public_key=keys["maker"][1])
