"""Plans that travel: what differs where one does not fit, and a bundle that survives a kill."""

from __future__ import annotations

import json
import os
from dataclasses import replace

import pytest

from cnnedge.bundle import open_bundle
from cnnedge.change import put_engine
from cnnedge.engine.trtexec import trtexec_line
from cnnedge.errors import BundleError, CnnEdgeError
from cnnedge.plan import (
    Here,
    PlanNote,
    PlanOptions,
    differences,
    parse_bytes,
    parse_compute_capability,
    plan_file,
    same_gpu_model,
)


def note(runtime="tensorrt", **fields):
    base = PlanNote(
        variant="fp16",
        precision="fp16",
        runtime=runtime,
        library="10.9.0" if runtime == "tensorrt" else "1.7.1.116",
        file=f"engines/fp16.{runtime}.plan",
        sha256="e" * 64,
        bytes=4,
        onnx_sha256="0" * 64,
        calibration_sha256=None,
        compute_capabilities=("8.9",) if runtime == "tensorrt" else (),
        gpu={"name": "RTX 4090", "driver": "13.0"} if runtime == "tensorrt" else None,
        options=PlanOptions(),
    )
    return replace(base, **fields)


def here(library="10.9.0", cc="8.9", gpu="RTX 4090", driver="13.0"):
    return Here(library, cc, gpu, driver)


def found(a_note, a_machine, onnx="0" * 64):
    return differences(a_note, a_machine, onnx)


def test_a_plan_fits_the_machine_it_was_built_on():
    assert found(note(), here()) == []
    assert found(note("rtx"), here(library="1.7.1.116", cc="12.0")) == []


@pytest.mark.parametrize(
    ("machine", "onnx", "says"),
    [
        (here(library="10.10.0"), "0" * 64, "built by TensorRT 10.9.0, and 10.10.0 is installed"),
        (here(cc="8.7", gpu="Orin"), "0" * 64, r"8\.9, and this GPU \(Orin\) has 8\.7"),
        (here(driver="12.8"), "0" * 64, r"driver for CUDA 13\.0, and this one supports 12\.8"),
        (here(), "x" * 64, "built from another fp16 ONNX file"),
    ],
    ids=["library", "gpu", "driver", "onnx"],
)
def test_what_differs_is_said(machine, onnx, says):
    import re

    (line,) = found(note(), machine, onnx)
    assert re.search(says, line), line


def test_a_newer_driver_of_the_same_major_is_no_difference():
    assert found(note(), here(driver="13.2")) == []
    assert found(note(gpu={"name": "x", "driver": "13.2"}), here(driver="13.0")) == []


def test_everything_that_differs_is_said_at_once():
    assert len(found(note(), here("11.4.0", "9.0", "H200", "12.0"), "x")) == 4


def test_version_compatible_plans_run_on_later_releases_of_the_same_major():
    compatible = note(options=PlanOptions(version_compatible=True))
    assert found(compatible, here(library="10.10.0")) == []
    assert found(compatible, here(library="10.8.0"))
    assert found(compatible, here(library="11.0.0"))


def test_hardware_compatible_plans_run_from_ampere_on():
    compatible = note(options=PlanOptions(hardware_compatible=True))
    assert found(compatible, here(cc="8.0")) == []
    assert found(compatible, here(cc="12.0")) == []
    assert found(compatible, here(cc="7.5"))


def test_portable_rtx_plans_run_from_8_6_on():
    portable = note("rtx")
    for cc, fits in (("8.6", True), ("8.9", True), ("12.1", True), ("8.0", False), ("7.5", False)):
        assert (found(portable, here("1.7.1.116", cc)) == []) is fits, cc
    turing = note("rtx", compute_capabilities=("7.5",))
    assert found(turing, here("1.7.1.116", "7.5")) == []
    assert found(turing, here("1.7.1.116", "8.9"))
    assert found(portable, here("1.8.0.0", "8.9"))  # each release has its own


def test_another_model_of_the_same_kind_is_told():
    assert same_gpu_model(note(), here())
    assert not same_gpu_model(note(), here(gpu="RTX 4060"))
    assert same_gpu_model(note("rtx"), here(gpu="RTX 4060"))  # built without a GPU


def test_a_note_survives_its_file():
    options = PlanOptions(max_batch=4, compute_capabilities=("8.9",), workspace_bytes=7)
    written = note(options=options, found={"violations": []}, replay={"diverged": None})
    assert PlanNote.from_json(written.to_json(), "x") == written
    assert json.loads(written.to_json())["profiles"] == [
        {"smallest": 1, "typical": 1, "largest": 1},
        {"smallest": 1, "typical": 2, "largest": 4},
    ]
    foreign = ("", "[]", "{}", '{"schema": 2}', written.to_json().replace("variant", "v"))
    for text in (*foreign, "[" * 100_000):
        with pytest.raises(BundleError, match=r"engines/x\.json is no plan's note"):
            PlanNote.from_json(text, "engines/x.json")


def test_sizes_and_targets_are_parsed():
    assert [parse_bytes(t) for t in ("512M", "2g", "1.5K", "7")] == [2**29, 2**31, 1536, 7]
    assert [parse_compute_capability(t) for t in ("8.9", "89", "sm_120", "SM87")] == [
        *("8.9", "8.9", "12.0", "8.7")
    ]
    for text in ("", "M", "-1M", "0", "1T", "infM"):
        with pytest.raises(CnnEdgeError, match="is no size"):
            parse_bytes(text)
    for text in ("", "8", "ada", "8.9.0.1"):
        with pytest.raises(CnnEdgeError, match="no compute capability"):
            parse_compute_capability(text)


def test_names_of_plans():
    assert plan_file("fp16", "rtx", ()) == "engines/fp16.rtx.plan"
    assert plan_file("int8-trt", "tensorrt", ("8.7",)) == "engines/int8-trt.tensorrt-sm87.plan"
    assert plan_file("fp16", "rtx", ("8.9", "12.0")) == "engines/fp16.rtx-sm89-sm120.plan"


class TestKeeping:
    """A plan is put into a bundle so that whatever stops it leaves a bundle."""

    def put(self, root, plan=b"plan", **fields):
        import hashlib

        a_note = note(sha256=hashlib.sha256(plan).hexdigest(), bytes=len(plan), **fields)
        return put_engine(open_bundle(root), a_note, plan, fields.get("timing_cache") and b"times")

    def test_it_is_listed_and_checked(self, bundle_copy):
        self.put(bundle_copy)
        (engine,) = open_bundle(bundle_copy).manifest.engines
        assert engine.file == "engines/fp16.tensorrt.plan"
        assert engine.note == "engines/fp16.tensorrt.json"
        (bundle_copy / engine.file).write_bytes(b"Plan")
        with pytest.raises(BundleError, match=r"fp16\.tensorrt\.plan is not what the manifest"):
            open_bundle(bundle_copy)

    def test_a_truncated_or_altered_note_is_found_too(self, bundle_copy):
        self.put(bundle_copy)
        path = bundle_copy / "engines/fp16.tensorrt.json"
        path.write_text(path.read_text()[:-20])
        with pytest.raises(BundleError, match="altered or cut short"):
            open_bundle(bundle_copy)

    def test_a_plan_is_replaced(self, bundle_copy):
        cache = {"file": "engines/tensorrt-sm89.timing.cache", "sha256": "x"}
        self.put(bundle_copy, timing_cache=cache)
        self.put(bundle_copy, b"another", timing_cache=cache)
        again = open_bundle(bundle_copy)
        assert len(again.manifest.engines) == 1
        assert again.path("engines/fp16.tensorrt.plan").read_bytes() == b"another"
        assert cache["file"] in again.manifest.files
        assert not list(bundle_copy.rglob("*.partial*"))

    @pytest.mark.parametrize("stop", range(6))
    def test_a_stop_at_any_write_leaves_a_bundle(self, bundle_copy, monkeypatch, stop):
        self.put(bundle_copy)
        writes = []

        original = os.replace

        def put_in_place(*arguments):
            if len(writes) == stop:
                raise KeyboardInterrupt
            writes.append(arguments)
            return original(*arguments)

        monkeypatch.setattr(os, "replace", put_in_place)
        if stop < 4:  # manifest, plan, note, manifest
            with pytest.raises(KeyboardInterrupt):
                self.put(bundle_copy, b"another")
        else:
            self.put(bundle_copy, b"another")
        left = open_bundle(bundle_copy).manifest.engines
        kept = {0: [b"plan"], 1: [], 2: [], 3: []}.get(stop, [b"another"])
        assert [(bundle_copy / e.file).read_bytes() for e in left] == kept
        assert not list(bundle_copy.rglob("*.partial*"))

    def test_a_full_disk_is_one_line_and_leaves_the_bundle(self, bundle_copy, monkeypatch):
        def full(*arguments):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(os, "fsync", full)
        with pytest.raises(CnnEdgeError, match="cannot write .*: No space left on device"):
            self.put(bundle_copy)
        monkeypatch.undo()
        assert open_bundle(bundle_copy).manifest.engines == ()


class TestTrtexec:
    """The line that NVIDIA's tool takes; its options are those of `trtexec --help`, 10.x."""

    def line(self, runtime="tensorrt", **options):
        words = trtexec_line(
            runtime, "model.fp16.onnx", "engines/x.plan", PlanOptions(**options), (8, 9, 3)
        )
        return words.split()

    def test_a_static_plan(self):
        assert self.line(max_batch=1) == [
            "trtexec",
            "--onnx=model.fp16.onnx",
            "--saveEngine=engines/x.plan",
            "--stronglyTyped",
            "--profilingVerbosity=detailed",
            "--noTF32",
            "--minShapes=image:1x8x9x3",
            "--optShapes=image:1x8x9x3",
            "--maxShapes=image:1x8x9x3",
            "--useCudaGraph",
            "--useSpinWait",
        ]

    def test_two_profiles(self):
        words = self.line(max_batch=8)
        at = words.index("--profile=1")
        assert words.index("--profile=0") < at
        assert words[at + 1 : at + 4] == [
            "--minShapes=image:1x8x9x3",
            "--optShapes=image:4x8x9x3",
            "--maxShapes=image:8x8x9x3",
        ]

    @pytest.mark.parametrize(
        ("options", "words"),
        [
            ({"workspace_bytes": 1024}, ["--memPoolSize=workspace:1024B"]),
            ({"version_compatible": True}, ["--versionCompatible"]),
            ({"hardware_compatible": True}, ["--hardwareCompatibilityLevel=ampere+"]),
            ({"strip_weights": True}, ["--stripWeights", "--skipInference"]),
            ({"refit": True}, ["--refit"]),
            ({"dla_core": 1, "max_batch": 1}, ["--useDLACore=1", "--allowGPUFallback"]),
            ({"optimization_level": 5}, ["--builderOptimizationLevel=5"]),
        ],
    )
    def test_options(self, options, words):
        assert set(words) <= set(self.line(**options))

    def test_tf32_is_left_on_where_asked(self):
        assert "--noTF32" not in self.line(tf32=True)

    def test_rtx_has_its_own_tool(self):
        words = self.line("rtx", compute_capabilities=("8.9", "12.0"))
        assert words[0] == "tensorrt_rtx"
        assert "--computeCapabilities=89,120" in words
        assert not {"--stronglyTyped", "--useCudaGraph"} & set(words)
