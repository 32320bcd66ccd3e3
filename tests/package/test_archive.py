"""A bundle in one zip file: it opens as the folder does, and a hostile one does nothing."""

from __future__ import annotations

import io
import json
import os
import shutil
import stat
import struct
import subprocess
import sys
import tempfile
import zipfile
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from msgspec.structs import asdict
from test_bundle import edit_manifest, rehash
from test_single import error_of, run

import cnnedge
from cnnedge import archive as reading
from cnnedge.bundle import MANIFEST, Manifest, Variant, describe_files, open_bundle
from cnnedge.change import put_engine
from cnnedge.errors import BackendError, BundleError, CnnEdgeError
from cnnedge.files import sha256
from cnnedge.image import ImageContract
from cnnedge.package.archive import write_archive
from cnnedge.sections import ModelRecord


@pytest.fixture
def tiny(tmp_path):
    """A bundle whose model is noise: it opens, and nothing runs it."""
    root = tmp_path / "tiny"
    (root / "selftest").mkdir(parents=True)
    (root / "model.fp32.onnx").write_bytes(np.random.default_rng(0).bytes(9000))
    (root / "labels.txt").write_text("a\nb\n")
    (root / "selftest" / "selftest.json").write_text(json.dumps({"answers": [0.25] * 400}))
    described = asdict(describe_files(root, ["model.fp32.onnx"])["model.fp32.onnx"])
    variant = Variant("fp32", "model.fp32.onnx", precision="fp32", target="any", **described)
    manifest = Manifest(
        *("tiny", ModelRecord(weights="trained"), ImageContract(8, 8), "unit", "uint8", ("a", "b")),
        (variant,),
        files=describe_files(root, ["labels.txt", "selftest/selftest.json"]),
    )
    (root / MANIFEST).write_text(manifest.to_json())
    return root


@pytest.fixture
def temporary(tmp_path, monkeypatch):
    """The only place where an archive may be unpacked; empty again in the end."""
    place = tmp_path / "temporary"
    place.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(place))
    return place


def zipped(root, out=None):
    out = out or root.with_suffix(".zip")
    write_archive(open_bundle(root), out)
    return out


def contents(archive):
    with zipfile.ZipFile(archive) as opened:
        return [(info, opened.read(info)) for info in opened.infolist()]


def written(path, entries):
    """Write an archive of (ZipInfo or name, content) pairs, as they are."""
    with zipfile.ZipFile(path, "w") as archive:
        for info, content in entries:
            archive.writestr(info, content)
    return path


def link(name, mode=stat.S_IFLNK | 0o777):
    info = zipfile.ZipInfo(name)
    info.create_system = 3
    info.external_attr = mode << 16
    return info


def test_it_opens_as_the_folder_does(toy_bundle, tmp_path, temporary):
    bundle = open_bundle(zipped(toy_bundle.root, tmp_path / "toy.zip"))
    assert bundle.manifest == toy_bundle.manifest
    there = {p.relative_to(bundle.root) for p in bundle.root.rglob("*") if p.is_file()}
    for name in there:
        assert bundle.path(str(name)).read_bytes() == toy_bundle.path(str(name)).read_bytes()
    assert there == {
        p.relative_to(toy_bundle.root) for p in toy_bundle.root.rglob("*") if p.is_file()
    }
    assert bundle.origin == tmp_path / "toy.zip"
    assert bundle.root.is_relative_to(temporary)
    assert stat.S_IMODE(bundle.root.stat().st_mode) == 0o700


def test_it_answers_as_the_folder_does(toy_bundle, tmp_path, temporary, digits):
    archive = zipped(toy_bundle.root, tmp_path / "toy.zip")
    classify = cnnedge.load(archive)
    folder = cnnedge.load(toy_bundle.root)
    assert classify.variant == folder.variant
    images = [digits.test.items[i] for i in range(16)]
    np.testing.assert_array_equal(classify.probabilities(images), folder.probabilities(images))
    assert list(temporary.iterdir()) == []  # the session has read what it needs
    with classify:
        pass
    with pytest.raises(BackendError, match="closed"):
        classify(images[0])
    assert list(temporary.iterdir()) == []


def test_the_folder_goes_with_the_bundle(tiny, temporary):
    bundle = open_bundle(zipped(tiny))
    copy = replace(bundle)
    del bundle
    assert copy.path("labels.txt").read_text() == "a\nb\n"
    del copy
    assert list(temporary.iterdir()) == []


@pytest.mark.system
def test_the_folder_goes_at_exit(tiny, tmp_path):
    place = tmp_path / "of-the-process"
    place.mkdir()
    code = (
        "import os, sys, cnnedge\n"
        f"bundle = cnnedge.open_bundle({str(zipped(tiny))!r})\n"
        "child = os.fork()\n"
        "if child == 0:\n"
        "    sys.exit(0)\n"  # which runs what is to be done at exit
        "os.waitpid(child, 0)\n"
        "print(bundle.path('labels.txt').is_file())\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"TMPDIR": str(place)},
    )
    assert done.stdout.strip() == "True"
    assert list(place.iterdir()) == []


def test_the_same_bundle_gives_the_same_bytes(tiny, tmp_path):
    first = zipped(tiny)
    other = tmp_path / "copy" / "tiny"
    shutil.copytree(tiny, other)
    for path in other.rglob("*"):
        os.utime(path, (1, 1))
        path.chmod(0o700)
    assert zipped(other).read_bytes() == first.read_bytes()
    infos = [info for info, _ in contents(first)]
    assert [info.filename for info in infos] == sorted(info.filename for info in infos)
    assert {info.date_time for info in infos} == {(1980, 1, 1, 0, 0, 0)}


def test_only_what_pays_is_deflated(tiny):
    (tiny / "model.fp32.onnx").write_bytes(bytes(9000))  # as if pruned to nothing
    rehash(tiny, "model.fp32.onnx")
    packed = {info.filename: info.compress_type for info, _ in contents(zipped(tiny))}
    assert packed["model.fp32.onnx"] == packed["selftest/selftest.json"] == zipfile.ZIP_DEFLATED
    (tiny / "model.fp32.onnx").write_bytes(np.random.default_rng(1).bytes(9000))
    rehash(tiny, "model.fp32.onnx")
    packed = {i.filename: i.compress_type for i, _ in contents(zipped(tiny, tiny / "../b.zip"))}
    assert packed["model.fp32.onnx"] == zipfile.ZIP_STORED


def test_a_signature_travels_along(tiny):
    (tiny / "bundle.sig").write_bytes(b"signed")
    assert open_bundle(zipped(tiny)).path("bundle.sig").read_bytes() == b"signed"


def test_an_archive_of_another_tool_opens(tiny, tmp_path):
    other = shutil.make_archive(str(tmp_path / "other"), "zip", tiny)
    assert any(info.is_dir() for info, _ in contents(other))
    assert open_bundle(other).manifest == open_bundle(tiny).manifest


def refused(path, temporary):
    """Return the one line that refuses an archive; nothing may be left of it."""
    around = set(temporary.parent.rglob("*"))
    with pytest.raises(BundleError) as caught:
        open_bundle(path)
    assert len(str(caught.value).splitlines()) == 1
    assert str(path) in str(caught.value)
    assert set(temporary.parent.rglob("*")) == around
    return str(caught.value)


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("/etc/passwd", "does not stay inside"),
        ("../outside.txt", "does not stay inside"),
        ("selftest/../../outside.txt", "does not stay inside"),
        ("selftest//x", "does not stay inside"),
        ("./labels.txt", "does not stay inside"),
        ("selftest\\x", "path of another system"),
        ("C:/x", "path of another system"),
        ("C:x", "path of another system"),
        ("lab\x1bels", "no name should have"),
        ("x" * 300, "too long"),
        ("extra.txt", "knows nothing"),
        ("selftest/bundle.sig", "knows nothing"),
        ("other/", "knows nothing"),
        ("labels.txt", "twice"),
        ("LABELS.TXT", "differs by case"),
        ("Selftest/selftest.json", "differs by case"),
    ],
)
@pytest.mark.parametrize("first", [True, False])
@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_a_name_that_should_not_be_there(tiny, tmp_path, temporary, name, why, first):
    entries = contents(zipped(tiny))
    entries.insert(0 if first else len(entries), (name, b"" if name.endswith("/") else b"x"))
    assert why in refused(written(tmp_path / "bad.zip", entries), temporary)


def test_a_manifest_that_lists_it_does_not_help(tiny, tmp_path, temporary):
    for name in ("../outside.txt", "/tmp/outside.txt", "a\\b"):
        entries = {info.filename: content for info, content in contents(zipped(tiny))}
        fields = json.loads(entries[MANIFEST])
        fields["files"][name] = {"bytes": 1, "sha256": sha256(tiny / "labels.txt")}
        entries |= {MANIFEST: json.dumps(fields).encode(), name: b"x"}
        refused(written(tmp_path / "bad.zip", entries.items()), temporary)
        (tiny.with_suffix(".zip")).unlink()


@pytest.mark.parametrize("mode", [stat.S_IFLNK, stat.S_IFIFO, stat.S_IFCHR, stat.S_IFDIR])
def test_links_and_special_files_are_refused(tiny, tmp_path, temporary, mode):
    entries = [
        (link(info.filename, mode | 0o777) if info.filename == "labels.txt" else info, content)
        for info, content in contents(zipped(tiny))
    ]
    assert "special file" in refused(written(tmp_path / "bad.zip", entries), temporary)


def with_entry(tiny, tmp_path, name, change):
    """Write an archive of which one entry's declaration was changed in place."""
    archive = zipped(tiny)
    content = bytearray(archive.read_bytes())
    with zipfile.ZipFile(archive) as opened:
        local = opened.getinfo(name).header_offset
    encoded = name.encode()
    central = content.index(b"PK\1\2")
    while content[central + 46 : central + 46 + len(encoded)] != encoded:
        central = content.index(b"PK\1\2", central + 4)
    change(content, local, central)
    bad = tmp_path / "bad.zip"
    bad.write_bytes(content)
    return bad


def test_an_encrypted_entry_is_refused(tiny, tmp_path, temporary):
    def encrypt(content, local, central):
        content[local + 6] |= 1
        content[central + 8] |= 1

    bad = with_entry(tiny, tmp_path, "labels.txt", encrypt)
    assert "which is encrypted" in refused(bad, temporary)


@pytest.mark.parametrize("size", [0, 1, 8999, 9001, 2**31, 2**32 - 2])
def test_a_size_other_than_the_manifests_is_refused(tiny, tmp_path, temporary, size):
    def declare(content, local, central):
        struct.pack_into("<I", content, local + 22, size)
        struct.pack_into("<I", content, central + 24, size)

    bad = with_entry(tiny, tmp_path, "model.fp32.onnx", declare)
    assert f"with {size} bytes, and not 9000" in refused(bad, temporary)


def test_more_than_was_declared_never_comes_out(tiny, tmp_path, temporary):
    """The entry inflates to a thousand times what header and manifest say."""
    (tiny / "model.fp32.onnx").write_bytes(bytes(9_000_000))
    rehash(tiny, "model.fp32.onnx")
    edit_manifest(tiny, lambda f: f["variants"][0].update(bytes=9_000_000))

    def declare(content, local, central):
        struct.pack_into("<I", content, local + 22, 9000)
        struct.pack_into("<I", content, central + 24, 9000)

    bad = with_entry(tiny, tmp_path, "model.fp32.onnx", declare)
    entries = {info.filename: info for info, _ in contents(zipped(tiny, tmp_path / "good.zip"))}
    assert entries["model.fp32.onnx"].compress_type == zipfile.ZIP_DEFLATED
    assert "and not 9000000" in refused(bad, temporary)
    # And where the manifest agrees with the small number:
    bad.unlink()
    edit_manifest(tiny, lambda f: f["variants"][0].update(bytes=9000))
    (tiny / "bomb").write_bytes(bytes(9_000_000))
    with zipfile.ZipFile(bad, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in (MANIFEST, "labels.txt", "selftest/selftest.json"):
            archive.write(tiny / name, name)
        archive.write(tiny / "bomb", "model.fp32.onnx")
        place = archive.getinfo("model.fp32.onnx").header_offset
    content = bytearray(bad.read_bytes())
    struct.pack_into("<I", content, place + 22, 9000)
    struct.pack_into("<I", content, content.rindex(b"PK\1\2") + 24, 9000)
    bad.write_bytes(content)
    assert "damaged or cut short" in refused(bad, temporary)


def test_bombs_are_refused(tiny, tmp_path, temporary, monkeypatch):
    (tiny / "model.fp32.onnx").write_bytes(bytes(50_000_000))
    rehash(tiny, "model.fp32.onnx")
    edit_manifest(tiny, lambda f: f["variants"][0].update(bytes=50_000_000))
    assert "50 MB in" in refused(zipped(tiny), temporary)


def test_an_endless_manifest_is_refused(tiny, tmp_path, temporary):
    entries = [(i.filename, c) for i, c in contents(zipped(tiny)) if i.filename != MANIFEST]
    with zipfile.ZipFile(tmp_path / "bad.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(MANIFEST, bytes(reading.MOST_TEXT + 1))
        for name, content in entries:
            archive.writestr(name, content)
    assert f"{MANIFEST} with {reading.MOST_TEXT + 1} bytes" in refused(
        tmp_path / "bad.zip", temporary
    )


def test_too_many_entries_are_refused(tiny, tmp_path, temporary):
    entries = [(i.filename, c) for i, c in contents(zipped(tiny))]
    few = entries + [(f"f{i}", b"") for i in range(reading.MOST_ENTRIES)]
    assert f"{len(few)} entries" in refused(written(tmp_path / "bad.zip", few), temporary)
    many = entries + [(f"{i:0200d}", b"") for i in range(20_000)]
    assert "directory is larger" in refused(written(tmp_path / "worse.zip", many), temporary)


def test_what_lacks_a_file_or_the_manifest_is_refused(tiny, tmp_path, temporary):
    entries = contents(zipped(tiny))
    for name, why in (("labels.txt", "lacks labels.txt"), (MANIFEST, "no manifest.json at its")):
        kept = [(info, content) for info, content in entries if info.filename != name]
        assert why in refused(written(tmp_path / "bad.zip", kept), temporary)
    nested = [(f"tiny/{info.filename}", content) for info, content in entries]
    assert "at its root" in refused(written(tmp_path / "nested.zip", nested), temporary)
    (tmp_path / "none.zip").write_bytes(b"PK\5\6" + bytes(18))
    assert "no manifest.json" in refused(tmp_path / "none.zip", temporary)


def test_an_altered_file_is_named(tiny, tmp_path, temporary):
    entries = [
        (i.filename, c.replace(b"a\n", b"c\n") if i.filename == "labels.txt" else c)
        for i, c in contents(zipped(tiny))
    ]
    assert "bad.zip/labels.txt is not what the manifest names" in refused(
        written(tmp_path / "bad.zip", entries), temporary
    )


@pytest.mark.parametrize(
    "change",
    [
        lambda f: f["files"].update(x=[]),
        lambda f: f["files"]["labels.txt"].pop("bytes"),
        lambda f: f["files"]["labels.txt"].update(bytes="3"),
        lambda f: f["variants"][0].update(file=["x"]),
        lambda f: f.update(variants=3),
        lambda f: f["image"].update(height=float("inf")),
        lambda f: f.update(files=[]),
    ],
)
def test_a_manifest_of_nonsense_is_refused(tiny, tmp_path, temporary, change):
    entries = {i.filename: c for i, c in contents(zipped(tiny))}
    fields = json.loads(entries[MANIFEST])
    change(fields)
    entries[MANIFEST] = json.dumps(fields).encode()
    line = refused(written(tmp_path / "bad.zip", entries.items()), temporary)
    assert "the manifest of" in line
    edit_manifest(tiny, change)
    with pytest.raises(BundleError, match="manifest"):
        open_bundle(tiny)


def opens_whole_or_not_at_all(content, place, tiny):
    path = place.parent / "damaged.zip"
    path.write_bytes(content)
    with suppress(CnnEdgeError):
        assert open_bundle(path).manifest == open_bundle(tiny).manifest
    assert list(place.iterdir()) == []


def test_one_that_is_cut_short_does_not_open(tiny, temporary):
    content = zipped(tiny).read_bytes()
    for length in {*range(2, len(content), 97), len(content) - 1}:
        path = temporary.parent / "cut.zip"
        path.write_bytes(content[:length])
        assert "damaged or cut short" in refused(path, temporary)


@settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_damage_is_told_or_does_no_harm(tiny, temporary, data):
    """Bytes changed, put in, or taken out, above all where the archive describes itself."""
    if not tiny.with_suffix(".zip").exists():
        zipped(tiny)
    content = bytearray(tiny.with_suffix(".zip").read_bytes())
    described = content.index(b"PK\1\2")
    for _ in range(data.draw(st.integers(1, 4))):
        start = data.draw(st.sampled_from([0, described, described]))
        place = data.draw(st.integers(start, len(content) - 1))
        kind = data.draw(st.sampled_from(["change", "insert", "delete"]))
        piece = data.draw(st.binary(min_size=1, max_size=8))
        if kind == "change":
            content[place : place + len(piece)] = piece
        elif kind == "insert":
            content[place:place] = piece
        else:
            del content[place : place + len(piece)]
    opens_whole_or_not_at_all(bytes(content), temporary, tiny)


def test_a_full_disk_is_not_taken_for_damage(tiny, temporary, monkeypatch):
    path = zipped(tiny)

    def full(folder, needed, purpose):
        raise CnnEdgeError(f"{folder} has no room")

    monkeypatch.setattr(reading, "require_space", full)
    with pytest.raises(CnnEdgeError, match="no room"):
        open_bundle(path)
    monkeypatch.undo()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    real = open

    class Full(io.BytesIO):
        def write(self, _):
            raise OSError(28, "No space left on device")

    def opened(file, mode="r", *arguments, **options):
        return Full() if mode == "wb" else real(file, mode, *arguments, **options)

    monkeypatch.setattr(reading, "open", opened, raising=False)
    with pytest.raises(CnnEdgeError, match="No space left on device"):
        open_bundle(path)
    assert list(temporary.iterdir()) == []


@pytest.mark.system
def test_every_command_opens_it(toy_bundle, tmp_path, temporary):
    archive = tmp_path / "toy.zip"
    packed = run("package", toy_bundle.root, "--zip", archive, "--json")
    assert packed.exit_code == 0, packed.output
    told = json.loads(packed.output)["zip"]
    assert told["sha256"] == sha256(archive)
    assert told["bytes"] == archive.stat().st_size
    verified = run("verify", archive, "--json")
    assert verified.exit_code == 0, verified.output
    assert json.loads(verified.output)["bundle"] == str(archive)
    golden = toy_bundle.path("selftest/golden-00.png")
    answers = [json.loads(run("predict", b, golden, "--json").output)["images"] for b in
               (archive, toy_bundle.root)]  # fmt: skip
    assert answers[0] == answers[1]
    short = ("--scenarios", "single-stream", "--runtime", "cpu", "--rounds", 1, "--seconds", 0.1)
    measured = run("bench", archive, *short, "--json")
    assert measured.exit_code == 0, measured.output
    again = run("package", archive, "--zip", tmp_path / "again.zip")
    assert again.exit_code == 0, again.output
    assert (tmp_path / "again.zip").read_bytes() == archive.read_bytes()
    assert list(temporary.iterdir()) == []


def test_what_writes_into_a_bundle_wants_the_folder(tiny, temporary, monkeypatch):
    archive = zipped(tiny)
    before = archive.read_bytes()
    line = error_of(run("engine", archive, "--runtime", "rtx"))
    assert f"{archive} is a zip archive, and building engines writes into the bundle" in line
    with pytest.raises(BundleError, match="zip archive"):
        put_engine(open_bundle(archive), None, b"")
    assert archive.read_bytes() == before


def test_it_is_not_written_where_it_should_not_be(tiny, tmp_path):
    out = tmp_path / "out.zip"
    assert run("package", tiny, "--zip", out).exit_code == 0
    before = out.read_bytes()
    assert "exists already" in error_of(run("package", tiny, "--zip", out))
    assert run("package", tiny, "--zip", out, "--force").exit_code == 0
    assert run("package", out, "--zip", out, "--force").exit_code == 0
    assert out.read_bytes() == before
    assert "inside the bundle" in error_of(run("package", tiny, "--zip", tiny / "labels.txt"))
    assert "inside the bundle" in error_of(
        run("package", tiny, "--zip", tiny / MANIFEST, "--force")
    )
    assert "is a folder" in error_of(run("package", tiny, "--zip", tmp_path, "--force"))
    assert "cannot write" in error_of(run("package", tiny, "--zip", out / "x.zip"))
    assert "does not exist" in error_of(run("package", tmp_path / "none", "--zip", tmp_path / "z"))
    photo = tmp_path / "photo.jpg"
    photo.write_bytes(b"\xff\xd8\xff")
    assert "neither a bundle's folder nor a zip" in error_of(run("verify", photo))
    new = tmp_path / "new"
    for words in (
        [],
        ["--zip", out, "--variant", "fp32"],
        ["--zip", new, "--triton", new],
        ["--zip", new / "../new/a.zip", "--triton", new],
        ["--onnx", new / "a.onnx", "--zip", new],
    ):
        assert run("package", tiny, *words).exit_code == 2, words
    assert not new.exists()
    open_bundle(tiny)


def test_a_bundle_that_changes_meanwhile_gives_no_archive(tiny, tmp_path):
    bundle = open_bundle(tiny)
    (tiny / "labels.txt").write_text("c\nd\n")
    with pytest.raises(BundleError, match="changed while it was read"):
        write_archive(bundle, tmp_path / "out.zip")
    rehash(tiny, "labels.txt")  # as an export to the same place would
    with pytest.raises(BundleError, match="changed since it was opened"):
        write_archive(bundle, tmp_path / "out.zip")
    (tiny / MANIFEST).unlink()
    with pytest.raises(BundleError, match="changed since it was opened"):
        write_archive(bundle, tmp_path / "out.zip")
    assert {Path(p).name for p in tmp_path.iterdir()} == {"tiny"}
