"""No command opens a connection, or leaves a file in the user's home that he did not ask for."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
HOOK = """
import os, sys
def hook(event, arguments):
    if event in ("socket.connect", "socket.sendto", "socket.getaddrinfo", "socket.gethostbyname"):
        where = arguments[1] if event in ("socket.connect", "socket.sendto") else arguments[0]
        if not isinstance(where, (str, bytes)) or event not in ("socket.connect", "socket.sendto"):
            with open(os.environ["CONNECTIONS"], "a") as log:
                log.write(f"{event} {where!r}\\n")
sys.addaudithook(hook)
"""
LOAD = "import sys, cnnedge; print(cnnedge.load(sys.argv[1])(sys.argv[2])[0].label)"
FIGURES = "from cnnedge.quiet import import_matplotlib; import_matplotlib()"
CNNEDGE = ("-m", "cnnedge")


@pytest.fixture
def watched(tmp_path):
    """Return what runs Python in a home of its own, and says where it went and what it left."""
    for name in ("home", "hook"):
        (tmp_path / name).mkdir()
    (tmp_path / "hook" / "sitecustomize.py").write_text(HOOK)
    log = tmp_path / "connections.txt"
    kept = {
        n: v
        for n, v in os.environ.items()
        if not n.startswith(("XDG_", "ORT_", "KERAS_", "MPL", "CNNEDGE_"))
    }

    def run(*words, home=tmp_path / "home", tracer=(), **extra):
        environment = kept | {
            "HOME": str(home),
            "PYTHONPATH": os.pathsep.join([str(tmp_path / "hook"), str(ROOT)]),
            "CONNECTIONS": str(log),
        }
        done = subprocess.run(
            [*tracer, sys.executable, *map(str, words)],
            capture_output=True,
            text=True,
            env=environment | extra,
            timeout=300,
            cwd=tmp_path,
        )
        assert done.returncode == 0, done.stderr
        left = sorted(p.relative_to(home).as_posix() for p in home.rglob("*") if p.is_file())
        return left, log.read_text() if log.exists() else ""

    return run


@pytest.fixture(scope="module")
def image(toy_bundle):
    return sorted((toy_bundle.root / "selftest").glob("*.png"))[0]


@pytest.mark.system
def test_nothing_is_sent_and_nothing_is_left_behind(watched, toy_bundle, image):
    for words in (
        ("-c", LOAD, toy_bundle.root, image),
        (*CNNEDGE, "predict", toy_bundle.root, image),
        (*CNNEDGE, "verify", toy_bundle.root),
        (*CNNEDGE, "doctor"),
        (
            *CNNEDGE,
            "bench",
            toy_bundle.root,
            "--runtime",
            "cpu",
            "--seconds",
            "0.05",
            "--rounds",
            "1",
            "--scenarios",
            "single-stream",
        ),
    ):
        assert watched(*words) == ([], ""), words


def test_nor_by_an_export(watched, toy_file, tmp_path):
    words = ("--data", "digits", "--precision", "fp32", "--test-images", "20")
    assert watched(*CNNEDGE, "export", toy_file, "-o", tmp_path / "out", *words) == ([], "")
    assert (tmp_path / "out" / "manifest.json").is_file()


@pytest.mark.system
def test_nor_by_a_drawing(watched):
    pytest.importorskip("matplotlib")
    assert watched("-c", FIGURES) == ([], "")


@pytest.mark.system
def test_nor_by_openvino(watched, toy_bundle, image, tmp_path):
    pytest.importorskip("openvino")
    code = LOAD.replace("argv[1])", "argv[1], runtime='openvino')")
    assert watched("-c", code, toy_bundle.root, image) == ([], "")
    kept = "import openvino_telemetry; from cnnedge.quiet import import_openvino"
    again = f"{kept}; import sys; import_openvino(); assert sys.modules['openvino_telemetry']"
    watched("-c", again) if find_spec("openvino_telemetry") else None


@pytest.mark.system
def test_nor_by_the_app_without_cnnedge(watched, toy_bundle, image):
    bare = ROOT / "export" / "x86-cpu" / "bare.py"
    assert watched(bare, toy_bundle.path("model.int8.onnx"), image) == ([], "")


@pytest.mark.system
def test_a_home_that_cannot_be_written_is_no_hindrance(watched, toy_bundle, image, tmp_path):
    nowhere = Path("/proc/self/nowhere")
    assert watched("-c", LOAD, toy_bundle.root, image, home=nowhere) == ([], "")
    assert watched("-c", FIGURES, home=nowhere)[1] == ""


@pytest.mark.system
def test_the_system_sees_no_connection_either(watched, toy_bundle, image, tmp_path):
    """What native code does, no hook of Python's sees."""
    strace = shutil.which("strace")
    trace = tmp_path / "trace.txt"
    tracer = [strace, "-f", "-qq", "-e", "trace=connect,sendto", "-o", str(trace)]
    if strace is None or subprocess.run([*tracer, "true"], capture_output=True).returncode:
        pytest.skip("strace is not here, or may not trace")
    waited = LOAD + "; import time; time.sleep(3)"
    watched("-c", waited, toy_bundle.root, image, tracer=tracer)
    assert re.findall(r"(?:connect|sendto)\(.*AF_INET.*", trace.read_text()) == []


@pytest.mark.system
def test_who_wants_the_telemetry_keeps_his_setting(watched):
    said = "from cnnedge.quiet import import_onnxruntime; import os; import_onnxruntime()"
    check = f"{said}; assert os.environ['ORT_DISABLE_TELEMETRY'] == '0'"
    watched("-c", check, ORT_DISABLE_TELEMETRY="0")


@pytest.mark.tf
def test_keras_keeps_what_it_downloads_where_it_always_did(watched, tmp_path):
    pytest.importorskip("keras")
    check = (
        "from cnnedge.quiet import import_tensorflow; import_tensorflow(); import os, keras;"
        "from keras.src.backend import config;"
        "assert config.keras_home() == os.path.expanduser('~/.keras'), config.keras_home()"
    )
    assert watched("-c", check) == ([], "")


def _run_of(path):
    """A module's text without what types alone are imported for, which is never run."""
    return re.sub(r"^if TYPE_CHECKING:\n(?: {4}.*\n)+", "", path.read_text(), flags=re.M)


def test_no_onnxruntime_is_imported_but_by_the_one_place():
    """A second place would be one that forgets."""
    found = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "cnnedge").rglob("*.py")
        if re.search(
            r"^\s*(import onnxruntime\b(?!_)|from onnxruntime\b(?!_))", _run_of(path), re.M
        )
    }
    allowed = {
        "cnnedge/quiet.py",
        "cnnedge/backends/onnxruntime.py",
        "cnnedge/backends/onnxruntime_gpu.py",
    }
    assert found <= allowed
    for name in allowed - {"cnnedge/quiet.py"}:
        text = (ROOT / name).read_text()
        assert text.index("\nimport_onnxruntime()") < text.index("\nimport onnxruntime as ort")
