"""The folder that `cnnedge demo` lays, and the server that serves it."""

from __future__ import annotations

import http.client
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from browsing import served
from click.testing import CliRunner

from cnnedge.bundle import Bundle
from cnnedge.cli import main
from cnnedge.comparison import Verdict
from cnnedge.demo import lay_site, open_server, page_variants
from cnnedge.demo.runtime import FILES
from cnnedge.errors import BundleError, CnnEdgeError


def demo(*arguments):
    return CliRunner().invoke(main, ["demo", *map(str, arguments)])


def files_in(folder):
    return {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}


def test_the_site_is_complete(toy_bundle, pretend_runtime, tmp_path):
    site = lay_site(toy_bundle, tmp_path / "site", pretend_runtime)
    found = files_in(site)
    described = json.loads((site / "site.json").read_text())
    assert [v["name"] for v in described["variants"]] == ["int8", "fp16", "fp32"]
    assert {v["file"] for v in described["variants"]} <= found
    assert {s["file"] for s in described["samples"]} <= found
    assert len(described["samples"]) == 8
    assert {f"ort/{name}" for name in FILES} | {"ort/LICENSE.txt"} <= found
    assert "MIT License" in (site / "ort" / "LICENSE.txt").read_text()
    for page in ("index.html", "app.mjs", "worker.mjs", "lib/image.mjs"):
        assert page in found
    assert not any(p.is_symlink() for p in site.rglob("*"))
    index = json.loads(toy_bundle.path("selftest/selftest.json").read_text())
    for sample, answers in zip(described["samples"], index["answers"]["reference"], strict=True):
        best = sample["reference"]
        assert best["probability"] == max(answers) == answers[best["index"]]
        assert best["label"] == toy_bundle.manifest.labels[best["index"]]


def test_the_page_refers_to_nothing_elsewhere(toy_bundle, pretend_runtime, tmp_path):
    site = lay_site(toy_bundle, tmp_path / "site", pretend_runtime)
    for path in site.rglob("*"):
        if path.suffix in {".html", ".mjs", ".css", ".svg"} and path.parent.name != "ort":
            text = path.read_text().replace("http://www.w3.org/2000/svg", "")
            assert "http:" not in text, path
            assert "https:" not in text, path


def test_one_variant_alone(toy_bundle, pretend_runtime, tmp_path):
    site = lay_site(toy_bundle, tmp_path / "site", pretend_runtime, variant="fp32")
    assert [p.name for p in (site / "models").iterdir()] == ["model.fp32.onnx"]


def test_variants_that_browsers_cannot_run_are_refused(toy_bundle):
    with pytest.raises(BundleError, match="int8-trt .* written for TensorRT.*fp32, fp16, int8"):
        page_variants(toy_bundle, "int8-trt")
    with pytest.raises(BundleError, match="no variant 'int9'"):
        page_variants(toy_bundle, "int9")
    floats = Bundle(toy_bundle.root, replace(toy_bundle.manifest, input="float32"))
    with pytest.raises(BundleError, match="take float32"):
        page_variants(floats)
    unverified = tuple(replace(v, verdict=None) for v in toy_bundle.manifest.variants)
    with pytest.raises(BundleError, match="no variant .* was verified"):
        page_variants(Bundle(toy_bundle.root, replace(toy_bundle.manifest, variants=unverified)))


def test_a_failed_variant_is_not_offered(toy_bundle):
    failed = tuple(
        replace(v, verdict=Verdict("failed", "")) if v.name == "int8" else v
        for v in toy_bundle.manifest.variants
    )
    bundle = Bundle(toy_bundle.root, replace(toy_bundle.manifest, variants=failed))
    assert [v.name for v in page_variants(bundle)] == ["fp16", "fp32"]
    assert [v.name for v in page_variants(bundle, "int8")] == ["int8"]  # by name, whatever it is


def test_only_a_site_is_replaced(toy_bundle, pretend_runtime, tmp_path):
    arguments = (toy_bundle.root, "--runtime-dir", pretend_runtime.folder, "--out")
    assert demo(*arguments, tmp_path / "site").exit_code == 0
    again = demo(*arguments, tmp_path / "site")
    assert (again.exit_code, "--force" in again.stderr) == (1, True)
    assert demo(*arguments, tmp_path / "site", "--force", "--variant", "fp32").exit_code == 0
    assert [p.name for p in (tmp_path / "site" / "models").iterdir()] == ["model.fp32.onnx"]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis").write_text("years of work")
    (tmp_path / "mine" / "site.json").write_text('{"title": "of another program"}')
    refused = demo(*arguments, tmp_path / "mine", "--force")
    assert (refused.exit_code, "is not a site" in refused.stderr) == (1, True)
    assert (tmp_path / "mine" / "thesis").read_text() == "years of work"


def test_nothing_half_written_is_left(toy_bundle, pretend_runtime, tmp_path):
    def full(source, target):
        if source.suffix == ".onnx":
            raise OSError(28, "No space left on device")
        return shutil.copyfile(source, target)

    with pytest.raises(CnnEdgeError, match="cannot write .*: No space left on device"):
        lay_site(toy_bundle, tmp_path / "new" / "site", pretend_runtime, place=full)
    assert list((tmp_path / "new").iterdir()) == []


def test_json_says_where_it_lies(toy_bundle, pretend_runtime, tmp_path):
    done = demo(
        *(toy_bundle.root, "--runtime-dir", pretend_runtime.folder),
        *("--out", tmp_path / "site", "--json"),
    )
    expected = {"folder": str(tmp_path / "site"), "variants": ["int8", "fp16", "fp32"]}
    assert json.loads(done.stdout) == expected
    assert "another version than was tested" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "nowhere does not exist"),
        (["BUNDLE", "--runtime-dir", "nowhere"], "nowhere has no ort"),
        (["BUNDLE", "--variant", "int8-trt"], "written for TensorRT"),
        (["BUNDLE", "--runtime-dir", "RUNTIME", "--host", "203.0.113.1"], "cannot serve on 203.0"),
        (["BUNDLE", "--runtime-dir", "RUNTIME", "--out", "/proc/site"], "cannot write /proc/site"),
    ],
    ids=["no bundle", "no runtime", "trt", "host", "unwritable"],
)
def test_a_failure_is_one_line(toy_bundle, pretend_runtime, arguments, message):
    places = {"BUNDLE": str(toy_bundle.root), "RUNTIME": str(pretend_runtime.folder)}
    done = demo(*(places.get(a, a) for a in arguments))
    assert done.exit_code == 1
    lines = [line for line in done.stderr.splitlines() if not line.startswith("warning: ")]
    assert len(lines) == 1
    assert lines[0].startswith("error: ")
    assert message in lines[0]


def test_a_port_in_use_is_one_line(toy_bundle, pretend_runtime):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = demo(toy_bundle.root, "--runtime-dir", pretend_runtime.folder, "--port", port)
    assert done.exit_code == 1
    assert f"error: port {port} of 127.0.0.1 is in use; choose another" in done.stderr


def get(address, path):
    parts = urlsplit(address)
    connection = http.client.HTTPConnection(parts.hostname, parts.port, timeout=10)
    connection.request("GET", path)
    response = connection.getresponse()
    body = response.read()
    connection.close()
    return response, body


@pytest.fixture
def laid(toy_bundle, pretend_runtime, tmp_path):
    return lay_site(toy_bundle, tmp_path / "site", pretend_runtime, place=os.symlink)


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("/", "text/html"),
        ("/app.mjs", "text/javascript"),
        ("/ort/ort-wasm-simd-threaded.wasm", "application/wasm"),
        ("/site.json", "application/json"),
        ("/samples/golden-00.png", "image/png"),
        ("/models/model.int8.onnx", "application/octet-stream"),
    ],
)
def test_files_come_with_their_type_and_isolated(laid, path, kind):
    with served(laid) as address:
        response, body = get(address, path)
    assert response.status == 200
    assert response.getheader("Content-Type").split(";")[0] == kind
    assert response.getheader("Cross-Origin-Opener-Policy") == "same-origin"
    assert response.getheader("Cross-Origin-Embedder-Policy") == "require-corp"
    name = path.strip("/") or "index.html"
    assert body == (laid / name).read_bytes()


@pytest.mark.parametrize(
    "path", ["/models/", "/../beside", "/%2e%2e/beside", "/ort/..%2f../beside", "/nothing"]
)
def test_nothing_else_is_served(laid, path):
    (laid.parent / "beside").write_text("no part of the site")
    with served(laid) as address:
        assert get(address, path)[0].status == 404


def test_the_address_is_one_that_a_browser_can_go_to(laid):
    for host, shown in (("127.0.0.1", "127.0.0.1"), ("0.0.0.0", "127.0.0.1")):
        with open_server(laid, host, 0) as server:
            assert server.url == f"http://{shown}:{server.server_address[1]}/"


@pytest.mark.system
@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGTERM])
def test_it_serves_until_it_is_ended_and_cleans_up(toy_bundle, pretend_runtime, end):
    command = [sys.executable, "-m", "cnnedge", "demo", toy_bundle.root, "--port", "0", "--json"]
    process = subprocess.Popen(
        [*command, "--runtime-dir", pretend_runtime.folder],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A shell's background jobs ignore Ctrl-C, and so would what they start.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    text = ""
    while not text.rstrip().endswith("}"):
        line = process.stdout.readline()
        assert line, process.stderr.read()
        text += line
    found = json.loads(text)
    assert get(found["url"], "/site.json")[0].status == 200
    assert Path(found["folder"]).is_dir()
    process.send_signal(end)
    rest, complaints = process.communicate(timeout=30)
    assert process.returncode == 0, complaints
    assert rest == ""
    assert "Traceback" not in complaints
    assert not Path(found["folder"]).parent.exists()
