"""The GPU benchmark as a module: its graphs need neither TensorFlow nor trained weights."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

FILE = Path(__file__).parents[2] / "benchmarks" / "gpu.py"


@pytest.fixture(scope="session")
def benchmark():
    spec = importlib.util.spec_from_file_location("gpu_benchmark", FILE)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
