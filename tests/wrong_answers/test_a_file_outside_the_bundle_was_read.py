"""Whatever document of a bundle names a file, the file lies in the bundle, and it is no link."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from cnnedge.bundle import MANIFEST, open_bundle
from cnnedge.change import put_engine
from cnnedge.demo import find_runtime, lay_site
from cnnedge.demo.runtime import FILES
from cnnedge.errors import BundleError, CnnEdgeError
from cnnedge.files import sha256
from cnnedge.package.archive import write_archive
from cnnedge.plan import PlanNote, PlanOptions
from cnnedge.selftest import INDEX
from cnnedge.verify import verify_bundle

SECRET = b"\x89PNG nobody's business"


@pytest.fixture
def secret(tmp_path) -> Path:
    path = tmp_path / "secret.png"
    path.write_bytes(SECRET)
    return path


@pytest.fixture
def runtime(tmp_path):
    folder = tmp_path / "dist"
    folder.mkdir()
    for name in FILES:
        (folder / name).write_bytes(b"x")
    return find_runtime(folder)


def edit(root: Path, name: str, change) -> None:
    """Change a document of a bundle, and have the manifest vouch for it."""
    found = json.loads((root / name).read_text())
    change(found)
    (root / name).write_text(json.dumps(found))
    if name != MANIFEST:
        entry = {"bytes": (root / name).stat().st_size, "sha256": sha256(root / name)}
        edit(root, MANIFEST, lambda fields: fields["files"].update({name: entry}))


def holds(folder: Path, content: bytes) -> bool:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return any(content in path.read_bytes() for path in files)


def golden(found, name) -> None:
    found["images"][0]["file"] = name


@pytest.mark.parametrize(
    "name",
    [
        "../secret.png",
        "selftest/../../secret.png",
        "/etc/hostname",
        "selftest/link.png",
        "folder/secret.png",
        "selftest/unlisted.png",
        "manifest.json/../../secret.png",
        "..\\secret.png",
        "c:secret.png",
        "selftest/golden-00.png\0.png",
        "",
        ".",
    ],
)
def test_the_self_test_names_only_what_the_manifest_lists(
    recorded, secret, runtime, tmp_path, name
):
    (recorded / "selftest" / "link.png").symlink_to(secret)
    (recorded / "folder").symlink_to(secret.parent)
    shutil.copy(secret, recorded / "selftest" / "unlisted.png")
    edit(recorded, INDEX, lambda found: golden(found, name))
    bundle = open_bundle(recorded)
    with pytest.raises(BundleError):
        lay_site(bundle, tmp_path / "site", runtime)
    assert not (tmp_path / "site").exists()
    with pytest.raises(BundleError):
        verify_bundle(recorded)


def test_a_listed_link_is_refused_wherever_it_leads(recorded, secret):
    """Its hash is right: the bundle of another machine, or of tomorrow, would hold another file."""
    place = recorded / "selftest" / "golden-00.png"
    inside = recorded / "selftest" / "golden-02.png"
    for target in (secret, inside):
        place.unlink()
        place.symlink_to(target)
        entry = {"bytes": target.stat().st_size, "sha256": sha256(target)}
        edit(
            recorded,
            MANIFEST,
            lambda fields, entry=entry: fields["files"].update({"selftest/golden-00.png": entry}),
        )
        with pytest.raises(BundleError, match=r"golden-00\.png.*link"):
            open_bundle(recorded)


def test_a_folder_on_the_way_is_no_link(recorded, tmp_path):
    os.rename(recorded / "selftest", tmp_path / "elsewhere")
    (recorded / "selftest").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(BundleError, match="link"):
        open_bundle(recorded)


def test_the_manifest_is_no_link(recorded, tmp_path):
    os.rename(recorded / MANIFEST, tmp_path / "m.json")
    (recorded / MANIFEST).symlink_to(tmp_path / "m.json")
    with pytest.raises(BundleError, match="link"):
        open_bundle(recorded)


def test_a_bundle_may_itself_stand_behind_a_link(recorded, tmp_path):
    (tmp_path / "latest").symlink_to(recorded)
    assert open_bundle(tmp_path / "latest").manifest.name == "tiny"


def test_a_pipe_is_not_waited_for(recorded):
    (recorded / "labels.txt").unlink()
    os.mkfifo(recorded / "labels.txt")
    with pytest.raises(BundleError, match="no ordinary file"):
        open_bundle(recorded)


def test_the_self_test_itself_has_to_be_listed(recorded, runtime, tmp_path):
    edit(recorded, MANIFEST, lambda fields: fields["files"].pop(INDEX))
    bundle = open_bundle(recorded)
    with pytest.raises(BundleError, match="selftest"):
        lay_site(bundle, tmp_path / "site", runtime)
    with pytest.raises(BundleError, match="selftest"):
        verify_bundle(recorded)


def test_a_linked_signature_is_not_packaged(recorded, secret, tmp_path):
    (recorded / "bundle.sig").symlink_to(secret)
    with pytest.raises(BundleError, match="link"):
        write_archive(open_bundle(recorded), tmp_path / "b.zip")
    assert not (tmp_path / "b.zip").exists()


def plan_note(file: str, cache: str | None = None) -> PlanNote:
    return PlanNote(
        "fp16",
        "fp16",
        "rtx",
        "1.0",
        file,
        "0" * 64,
        4,
        "0" * 64,
        None,
        (),
        None,
        PlanOptions(),
        timing_cache=None if cache is None else {"file": cache, "sha256": "0" * 64},
    )


@pytest.mark.parametrize(
    ("file", "cache"),
    [
        ("engines/../../stolen.plan", None),
        ("engines/a.plan", "../stolen.cache"),
        ("engines/a.plan", None),
        ("selftest/a.plan", "engines/c.cache"),
    ],
)
def test_a_plan_is_written_into_the_bundle(recorded, tmp_path, file, cache):
    """A variant's name is part of its plan's, and `engines` may be a link laid by the maker."""
    outside = tmp_path / "outside"
    outside.mkdir()
    shutil.rmtree(recorded / "engines")
    edit(recorded, MANIFEST, lambda fields: fields.update(engines=[]))
    edit(recorded, MANIFEST, lambda fields: fields["files"].pop("engines/rtx.timing.cache"))
    (recorded / "engines").symlink_to(outside)
    before = (recorded / MANIFEST).read_bytes()
    with pytest.raises(BundleError):
        put_engine(open_bundle(recorded), plan_note(file, cache), b"plan", b"timings")
    assert not list(outside.iterdir())
    assert not list(tmp_path.glob("stolen*"))
    assert (recorded / MANIFEST).read_bytes() == before


def test_two_models_of_one_name_do_not_take_each_others_place(recorded, runtime, tmp_path):
    """The page has one folder of models; a variant would have run another's graph."""
    (recorded / "a").mkdir()
    (recorded / "a" / "model.int8.onnx").write_bytes((recorded / "model.fp32.onnx").read_bytes())

    def change(fields):
        (fp32,) = [v for v in fields["variants"] if v["name"] == "fp32"]
        fp32["file"] = "a/model.int8.onnx"

    edit(recorded, MANIFEST, change)
    with pytest.raises(CnnEdgeError, match="one name"):
        lay_site(open_bundle(recorded), tmp_path / "site", runtime)
