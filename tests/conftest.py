"""A toy classifier of real digits, and its bundle: what most tests look at."""

from __future__ import annotations

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
# Every core runs a part of the suite already; small networks gain nothing from more threads.
os.environ.setdefault("TF_NUM_INTRAOP_THREADS", "1")
os.environ.setdefault("TF_NUM_INTEROP_THREADS", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import json
import platform
import re
import shutil
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
from record_toy import FOLDER as TOY
from record_toy import SIZE

KINDS = ("unit", "tf", "system")
KIND_OF_FIXTURE = {
    "browser": "system",
    "toy_model": "tf",
    "toy_file": "tf",
}
WHOLE_FILE = re.compile(r"^pytestmark = (\[\s*)?pytest\.mark\.(tf|system)\b", re.MULTILINE)


def pytest_ignore_collect(collection_path, config):
    """Where only `unit` is asked for, do not import a file of tests of another kind."""
    if config.option.markexpr != "unit" or collection_path.suffix != ".py":
        return None
    return bool(WHOLE_FILE.search(collection_path.read_text(encoding="utf-8"))) or None


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Give each test one kind: what it is marked, else what its fixtures are, else `unit`."""
    for item in items:
        marked = [mark.name for mark in item.iter_markers() if mark.name in KINDS]
        if len(marked) > 1:
            raise pytest.UsageError(f"{item.nodeid} is of two kinds: {', '.join(marked)}")
        if not marked:
            kinds = {KIND_OF_FIXTURE.get(name, "unit") for name in item.fixturenames}
            item.add_marker(max(kinds, key=KINDS.index))


@pytest.fixture(autouse=True)
def what_unit_means(request, monkeypatch):
    """Fail a test of the kind `unit` that starts a process or loads TensorFlow.

    Among tests of other kinds one of those may have loaded it, and only who is first is told.
    """
    if request.node.get_closest_marker("unit") is None:
        yield
        return

    def refuse(process, *args, **options):
        process.returncode = 0  # there is nothing to wait for
        pytest.fail(f"a test marked `unit` starts {args}: mark it `system`", pytrace=False)

    platform.processor()  # asks `uname`, and remembers what it said
    alone = request.config.option.markexpr == "unit"
    heavy = {"keras", "tensorflow"} - (set() if alone else sys.modules.keys())
    monkeypatch.setattr(subprocess.Popen, "__init__", refuse)
    yield
    if loaded := heavy & sys.modules.keys():
        pytest.fail(f"a test marked `unit` loads {min(loaded)}: mark it `tf`", pytrace=False)


@pytest.fixture(scope="session", autouse=True)
def quiet_machine():
    """Let no test see how busy this machine is: what it asserts would hang on who else runs here.

    What is timed in this process counts as stable, and nothing is known of others. A test of a busy
    machine says what is read.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("cnnedge.benchmark.load.read_cpu_times", lambda: None)
        for module in ("rows", "interleaved"):
            patch.setattr(f"cnnedge.benchmark.{module}.instabilities", lambda *of: [])
        yield


@pytest.fixture(scope="session", autouse=True)
def no_spinning():
    """Let ONNX Runtime's threads sleep between calls; others have work for the cores meanwhile."""
    from cnnedge.backends import onnxruntime as backend

    whole = backend._options

    def sleeping(threads):
        options = whole(threads)
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        return options

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backend, "_options", sleeping)
        yield


@pytest.fixture(scope="session", autouse=True)
def brief_timing():
    """Let an export and a compression time its graphs for a moment: no test asserts a time.

    It would be most of what the suite takes. How blocks take turns is tested where this is undone.
    """
    from cnnedge.benchmark import interleaved

    whole = interleaved.measure_interleaved

    def brief(contestants, *, seconds, **others):
        return whole(contestants, seconds=min(seconds, 0.05), **others)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interleaved, "measure_interleaved", brief)
        for name, value in {"WARM_UP_SECONDS": 0.0, "SETTLE_SECONDS": 0.0, "BLOCK": 4}.items():
            patch.setattr(interleaved, name, value)
        patch.setattr("cnnedge.benchmark.load.LOOK_SECONDS", 0.0)
        yield


@pytest.fixture(scope="session")
def digits():
    from cnnedge.data import open_source

    return open_source("digits")


@pytest.fixture(scope="session")
def digit_contract():
    from cnnedge.image import ImageContract

    return ImageContract(SIZE, SIZE)


@pytest.fixture(scope="session")
def toy_file(tmp_path_factory) -> Path:
    """The toy as cnnedge's own training would have saved it."""
    return Path(shutil.copy(TOY / "toy.keras", tmp_path_factory.mktemp("toy")))


@pytest.fixture(scope="session")
def toy_model(toy_file):
    """Three convolutions and two dense layers that know 97 % of the digits."""
    from cnnedge.backends.keras import load_model

    return load_model(toy_file)[0]


@pytest.fixture(scope="session")
def toy_bundle(tmp_path_factory):
    """The toy's bundle, as if it had been exported on this machine."""
    from cnnedge.bundle import open_bundle
    from cnnedge.machine import this_machine

    folder = tmp_path_factory.mktemp("bundles")
    root = shutil.copytree(TOY / "bundle", folder / "toy")
    manifest = json.loads((root / "manifest.json").read_text(encoding="utf-8"))
    manifest["machine"] = asdict(this_machine())
    manifest["recipe"]["model"] = str(shutil.copy(TOY / "toy.keras", folder))
    (root / "manifest.json").write_text(json.dumps(manifest, indent=1), encoding="utf-8")
    return open_bundle(root)


@pytest.fixture
def bundle_copy(toy_bundle, tmp_path) -> Path:
    """A copy of the toy's bundle that a test may damage."""
    return Path(shutil.copytree(toy_bundle.root, tmp_path / "toy"))
