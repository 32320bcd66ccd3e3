"""Where ONNX Runtime's files for browsers come from, and what is refused."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import os
import sys
import tarfile
from pathlib import Path

import pytest

from cnnedge.demo import runtime
from cnnedge.errors import CnnEdgeError

EXPORT = Path(__file__).parents[2] / "export"
NPM = """#!{python}
import shutil, sys
sys.stderr.write({says!r})
if {tarball!r}:
    folder = sys.argv[sys.argv.index("--pack-destination") + 1]
    shutil.copy({tarball!r}, folder + "/onnxruntime-web.tgz")
open({calls!r}, "a").write(" ".join(sys.argv[1:]) + "\\n")
sys.exit({code})
"""


def tarball(path, entries):
    with tarfile.open(path, "w:gz") as archive:
        for name, content in entries:
            member = tarfile.TarInfo(name)
            if content is None:
                member.type, member.linkname = tarfile.SYMTYPE, "/etc/hostname"
                archive.addfile(member)
            else:
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    return path


@pytest.fixture
def contents():
    return {name: f"// {name}".encode() for name in runtime.FILES}


@pytest.fixture
def fake_npm(tmp_path, monkeypatch, contents):
    """Put an npm first that packs a given tarball; the pins are that tarball's."""
    calls = tmp_path / "calls"
    calls.touch()

    def install(entries, *, code=0, says="", pin=True):
        package = None if entries is None else tarball(tmp_path / "p.tgz", entries)
        if package is not None and pin:
            digest = base64.b64encode(hashlib.sha512(package.read_bytes()).digest()).decode()
            monkeypatch.setattr(runtime, "INTEGRITY", f"sha512-{digest}")
        npm = tmp_path / "bin" / "npm"
        npm.parent.mkdir(exist_ok=True)
        npm.write_text(
            NPM.format(
                python=sys.executable,
                says=says,
                tarball=str(package or ""),
                calls=str(calls),
                code=code,
            )
        )
        npm.chmod(0o755)
        return calls

    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("CNNEDGE_CACHE", str(tmp_path / "cache"))
    digests = {name: hashlib.sha256(content).hexdigest() for name, content in contents.items()}
    monkeypatch.setattr(runtime, "FILES", digests)
    return install


def packed(contents):
    return [(f"package/dist/{name}", content) for name, content in contents.items()]


@pytest.mark.system
def test_npm_is_asked_once_and_the_cache_afterwards(fake_npm, contents, tmp_path):
    calls = fake_npm([("package/README.md", b"x"), *packed(contents)])
    told = []
    first = runtime.find_runtime(tell=told.append)
    assert first.folder == tmp_path / "cache" / f"onnxruntime-web-{runtime.VERSION}"
    assert sorted(p.name for p in first.folder.iterdir()) == sorted(contents)
    assert len(told) == 1
    assert runtime.find_runtime(tell=told.append) == first
    assert len(told) == len(calls.read_text().splitlines()) == 1
    assert f"onnxruntime-web@{runtime.VERSION}" in calls.read_text()


@pytest.mark.system
def test_a_damaged_cache_is_fetched_anew(fake_npm, contents):
    calls = fake_npm(packed(contents))
    folder = runtime.find_runtime().folder
    (folder / "ort.wasm.min.mjs").write_text("cut")
    assert runtime.find_runtime().folder == folder
    assert (folder / "ort.wasm.min.mjs").read_bytes() == contents["ort.wasm.min.mjs"]
    assert len(calls.read_text().splitlines()) == 2


@pytest.mark.system
def test_another_tarball_than_the_pinned_one_is_refused(fake_npm, contents, tmp_path):
    fake_npm(packed(contents), pin=False)
    with pytest.raises(CnnEdgeError, match="is not onnxruntime-web 1.30.0: its sha512 differs"):
        runtime.find_runtime()
    assert list((tmp_path / "cache").glob("**/*")) == []


def test_a_tarball_writes_nothing_but_the_named_files(tmp_path, contents):
    entries = [
        ("../escaped.mjs", b"x"),
        ("/tmp/escaped.mjs", b"x"),
        ("package/dist/../../../escaped.mjs", b"x"),
        ("package/dist/other.mjs", b"x"),
        *packed(contents),
    ]
    (tmp_path / "a" / "b" / "c").mkdir(parents=True)
    runtime.take_files(tarball(tmp_path / "p.tgz", entries), tmp_path / "a" / "b" / "c")
    written = {str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file()}
    assert written == {"p.tgz"} | {f"a/b/c/{name}" for name in contents}
    assert not Path("/tmp/escaped.mjs").exists()


def test_a_link_in_the_place_of_a_file_is_refused(tmp_path, contents):
    contents["ort.wasm.min.mjs"] = None
    (tmp_path / "out").mkdir()
    with pytest.raises(CnnEdgeError, match=r"has no package/dist/ort\.wasm\.min\.mjs"):
        runtime.take_files(tarball(tmp_path / "p.tgz", packed(contents)), tmp_path / "out")


@pytest.mark.system
def test_npm_that_fails_is_quoted(fake_npm, tmp_path):
    fake_npm(None, code=1, says="npm error code ENOTFOUND\nnpm error network\n")
    with pytest.raises(
        CnnEdgeError, match=r"could not fetch .* \(npm error code ENOTFOUND\); where"
    ):
        runtime.find_runtime()
    assert not (tmp_path / "cache").exists()


def test_without_npm_the_way_by_hand_is_said(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CNNEDGE_CACHE", str(tmp_path / "cache"))
    with pytest.raises(
        CnnEdgeError, match=r"no npm here.*npm pack onnxruntime-web@.*--runtime-dir"
    ):
        runtime.find_runtime()


def test_a_folder_of_ones_own_is_taken(pretend_runtime, tmp_path):
    assert runtime.find_runtime(pretend_runtime.folder) == pretend_runtime
    assert runtime.find_runtime(tmp_path) == pretend_runtime  # its dist
    (pretend_runtime.folder / "ort-wasm-simd-threaded.wasm").unlink()
    with pytest.raises(CnnEdgeError, match=r"dist has no ort-wasm-simd-threaded\.wasm"):
        runtime.find_runtime(tmp_path)
    with pytest.raises(CnnEdgeError, match="nothing has no ort"):
        runtime.find_runtime(tmp_path / "nothing")


def test_one_version_is_pinned_everywhere():
    pins = {
        name: json.loads((EXPORT / folder / "package.json").read_text())["dependencies"][name]
        for folder, name in (("browser", "onnxruntime-web"), ("node", "onnxruntime-node"))
    }
    assert set(pins.values()) == {runtime.VERSION}
