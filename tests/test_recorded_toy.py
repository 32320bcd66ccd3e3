"""The recorded toy is what cnnedge makes today: its bundle is built anew and compared."""

from __future__ import annotations

import json

import onnx
import pytest
from record_toy import FOLDER, export_toy

from cnnedge.machine import this_machine

pytestmark = pytest.mark.tf

# What another machine, or another minute, may say otherwise.
OF_A_RUN = {"machine", "tools", "files"}
OF_A_VARIANT = {"latency", "recommendation"}
# What is computed: another CPU adds in another order, and the last bits differ.
COMPUTED = {"sha256", "bytes", "accuracy", "verdict", "convergence", "enough_images"}


def read(root):
    return json.loads((root / "manifest.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def anew(toy_file, tmp_path_factory):
    out = tmp_path_factory.mktemp("anew") / "bundle"
    export_toy(toy_file, out)
    return out


@pytest.fixture(scope="module")
def same_arithmetic():
    return read(FOLDER / "bundle")["machine"]["isa"] == list(this_machine().isa)


def test_its_graphs_are_the_recorded_ones(anew, same_arithmetic):
    recorded = FOLDER / "bundle"
    names = sorted(path.name for path in recorded.glob("*.onnx"))
    assert names == sorted(path.name for path in anew.glob("*.onnx"))
    assert names == [f"model.{name}.onnx" for name in ("fp16", "fp32", "int8-trt", "int8")]
    for name in names:
        if same_arithmetic or "int8" not in name:
            assert (anew / name).read_bytes() == (recorded / name).read_bytes(), name
        else:  # its scales were calibrated
            ours, theirs = onnx.load(anew / name).graph, onnx.load(recorded / name).graph
            assert list(ours.node) == list(theirs.node)


def test_its_manifest_says_the_same(anew, same_arithmetic):
    left_out = OF_A_VARIANT if same_arithmetic else OF_A_VARIANT | COMPUTED

    def without(value):
        if isinstance(value, dict):
            return {key: without(of) for key, of in value.items() if key not in left_out}
        return [without(of) for of in value] if isinstance(value, list) else value

    ours, theirs = read(anew), read(FOLDER / "bundle")
    assert ours["recipe"]["model"] == ours["model"]["origin"] == "toy.keras"
    assert ours["files"].keys() == theirs["files"].keys()
    for manifest in (ours, theirs):
        for field in OF_A_RUN:
            del manifest[field]
    assert without(ours) == without(theirs)
