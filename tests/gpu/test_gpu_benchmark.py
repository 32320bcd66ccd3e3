"""benchmarks/gpu.py as one command, on whatever machine this is."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.system
def test_it_runs_and_names_what_it_lacks(tmp_path):
    out = tmp_path / "gpu.json"
    done = subprocess.run(
        [
            *(sys.executable, ROOT / "benchmarks" / "gpu.py", "--models", "alexnet_v1"),
            *("--batches", "1", "--seconds", "0.1", "-o", out),
        ],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr
    document = json.loads(out.read_text())
    assert (document["gpu"] is None) == bool(document["no_gpu_because"])
    (result,) = document["results"]
    assert "fp32@cpu" in {row["name"] for row in result["latency"]}
    named = set(result["answers"]) | set(result["skipped"])
    for runtime in ("cuda", "ort-tensorrt", "ort-rtx", "tensorrt", "rtx"):
        assert any(runtime in name for name in named), f"{runtime} was left out without a word"
    assert str(tmp_path.parents[2]) not in json.dumps(result["skipped"])
    for plan in result["plans"]:
        assert plan["violations"] == []
        assert plan["found"]["achieved"]["macs"]


@pytest.mark.tf
def test_the_skeletons_are_todays_graphs(benchmark, tmp_path):
    """Drawn weights aside, they are what `cnnedge export` makes of the models."""
    import onnx

    benchmark.make_skeleton("alexnet_v1", tmp_path / "alexnet_v1.onnx")
    fresh, kept = (onnx.load(f / "alexnet_v1.onnx") for f in (tmp_path, benchmark.SKELETONS))
    assert [n.SerializeToString() for n in fresh.graph.node] == [
        n.SerializeToString() for n in kept.graph.node
    ]
    about = {entry.key: entry.value for entry in kept.metadata_props}
    weights = json.loads(about["cnnedge.skeleton"])
    assert weights["conv2/weight"] == [128, 48, 5, 5]
