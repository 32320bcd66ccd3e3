"""The table of runtimes: what each row says is so, and a row and a file are all a new one takes."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest

import cnnedge
from cnnedge.benchmark.contestants import enter, installed_runtimes
from cnnedge.benchmark.pick import how
from cnnedge.benchmark.suite import ModelEntry, Suite
from cnnedge.errors import BackendError, MissingExtraError
from cnnedge.image import normalize
from cnnedge.runtime.opening import open_file
from cnnedge.runtimes import KERAS, LITERT, RUNTIMES, GraphFile, RunSettings, Runtime

ROOT = Path(cnnedge.__file__).parents[1]
TOY = """
import onnxruntime

class Toy:
    provider = "Toy 1.0"

    def __init__(self, path):
        self.session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])

    def __call__(self, batch):
        return self.session.run(None, {self.session.get_inputs()[0].name: batch})[0]

def open_graph(graph, settings):
    return Toy(str(graph.path))
"""
ROW = {
    "name": "toy",
    "title": "Toy",
    "about": "a toy",
    "module": "toy_backend",
    "package": "toy_backend",
    "extra": "toy",
    "device": "cpu",
    "read_back": "it says so",
    "variants": ("fp32",),
}


@pytest.fixture
def toy(tmp_path, monkeypatch):
    """A runtime that is in the table, and nowhere else."""
    (tmp_path / "toy_backend.py").write_text(TOY)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "toy_backend", raising=False)
    monkeypatch.setitem(RUNTIMES, "toy", Runtime(**ROW))
    return tmp_path


def test_a_new_runtime_is_loaded_verified_and_measured(toy, toy_bundle, digits):
    loaded = cnnedge.load(toy_bundle.root, runtime="toy")
    assert (loaded.variant, loaded.provider) == ("fp32", "Toy 1.0")
    images = np.random.default_rng(0).integers(0, 256, (3, *loaded.image.shape), np.uint8)
    expected = cnnedge.load(toy_bundle.root, variant="fp32").probabilities(images)
    np.testing.assert_allclose(loaded.probabilities(images), expected, atol=1e-6)

    (report,) = cnnedge.verify_bundle(toy_bundle.root, digits, limit=20, runtime="toy").variants
    assert (report.name, report.provider, report.failed) == ("fp32", "Toy 1.0", False)

    entry = ModelEntry(bundle=toy_bundle.root)
    field = enter(toy_bundle, entry, Suite(models=(entry,), runtimes=("toy",)), {})
    (one,) = field.contestants
    assert (one.name, one.title, one.on_gpu, one.peer) == ("fp32@toy", "Toy FP32", False, False)
    assert ("fp16@toy", "stored for ONNX Runtime alone") in field.left_out
    assert "toy" in installed_runtimes()
    row = {"runtime": "toy", "variant": "fp32", "precision": "fp32"}
    assert how(row, "b") == (
        'pip install "cnnedge[toy]"; cnnedge.load("b", variant="fp32", runtime="toy")'
    )


def test_a_new_runtime_that_is_not_installed_says_what_brings_it(toy, toy_bundle):
    (toy / "toy_backend.py").unlink()
    with pytest.raises(MissingExtraError, match=r'running on Toy.*cnnedge\[toy\]"'):
        cnnedge.load(toy_bundle.root, runtime="toy")
    (toy / "toy_backend.py").write_text("import what_it_needs_in_turn")
    with pytest.raises(BackendError, match="Toy is installed and cannot be loaded: No module"):
        cnnedge.load(toy_bundle.root, runtime="toy")


@pytest.mark.system
def test_a_new_runtime_is_an_option_of_the_commands(toy, toy_bundle):
    code = "from cnnedge.runtimes import RUNTIMES, Runtime\n"
    code += f"RUNTIMES['toy'] = Runtime(**{ROW!r})\n"
    code += "from cnnedge.cli import main\nmain()"

    def run(*arguments):
        command = [sys.executable, "-c", code, *arguments]
        paths = os.pathsep.join([str(toy), str(ROOT)])
        env = {**os.environ, "PYTHONPATH": paths}
        return subprocess.run(command, capture_output=True, text=True, env=env)

    image = str(toy_bundle.root / "selftest" / "golden-00.png")
    done = run("predict", str(toy_bundle.root), image, "--runtime", "toy", "--json")
    assert done.returncode == 0, done.stderr
    assert "toy" in run("verify", "--help").stdout
    wrong = run("predict", str(toy_bundle.root), image, "--runtime", "toys")
    assert wrong.returncode == 2


@pytest.mark.parametrize("scaling", [None, "unit"])
def test_a_runner_takes_uint8_whatever_its_graph_takes(toy, monkeypatch, scaling):
    taken = []

    class Session:
        provider = "Toy 1.0"

        def __call__(self, batch):
            taken.append(batch)
            return np.ones((len(batch), 1), np.float32)

        def close(self):
            taken.append("closed")

    import toy_backend

    monkeypatch.setattr(toy_backend, "open_graph", lambda graph, settings: Session())
    graph = GraphFile(Path("x.onnx"), "fp32", "0" * 64, "fp32", (2, 2, 3), scaling)
    runner = open_file(graph, RunSettings("toy"))
    batch = np.arange(12, dtype=np.uint8).reshape(1, 2, 2, 3)
    assert runner(batch).shape == (1, 1)
    (given,) = taken
    if scaling is None:
        assert given is batch
    else:
        assert given.dtype == np.float32
        np.testing.assert_array_equal(given, normalize(batch, scaling))
    assert runner.provider == "Toy 1.0"
    runner.close()
    assert taken[-1] == "closed"


@pytest.mark.parametrize("row", [*RUNTIMES.values(), KERAS, LITERT], ids=lambda row: row.name)
def test_a_row_says_what_is_there(row):
    with open(ROOT / "pyproject.toml", "rb") as file:
        extras = tomllib.load(file)["project"]["optional-dependencies"]
    assert row.extra in extras
    assert all((row.title, row.about, row.read_back))
    place = ROOT.joinpath(*row.module.split("."))
    file = place / "__init__.py" if place.is_dir() else place.with_suffix(".py")
    functions = {n.name for n in ast.parse(file.read_text()).body if isinstance(n, ast.FunctionDef)}
    if row.name in RUNTIMES and not row.runs_plans:
        assert "open_graph" in functions
    if row.profiler:
        module, _, name = row.profiler.partition(":")
        assert f"def {name}(" in ROOT.joinpath(*module.split(".")).with_suffix(".py").read_text()


@pytest.mark.system
def test_the_table_imports_no_backend():
    code = "import sys, cnnedge.runtimes; print(*(m for m in sys.modules if 'backends' in m))"
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert done.stdout.split() == [], done.stderr
