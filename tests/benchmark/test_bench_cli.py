"""`cnnedge bench` as a user types it, with real runtimes in processes of their own."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from fake_runtime import answers_of
from PIL import Image

from cnnedge.benchmark.peaks import best_of
from cnnedge.benchmark.run import bench
from cnnedge.benchmark.suite import ModelEntry, Suite
from cnnedge.cli import main
from cnnedge.errors import BackendError, DataError

pytestmark = pytest.mark.system

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module", autouse=True)
def short_turns():
    """Let nobody take longer than it takes to see that it works; the arithmetic is tested apart."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("cnnedge.benchmark.rounds.TURN_SECONDS", 0.05)
        patch.setattr("cnnedge.benchmark.rounds.WARM_UP", 0.0)
        patch.setattr("cnnedge.benchmark.run.PEAK_SECONDS", 0.02)
        yield


BRIEF = ("--seconds", 0.3, "--rounds", 1, "--scenarios", "single-stream,waterfall")


def run(*arguments):
    return CliRunner().invoke(main, [str(a) for a in arguments])


def error_of(result, code=1):
    assert result.exit_code == code, (result.output, result.exception)
    assert "Traceback" not in result.output
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    return line


@pytest.fixture(scope="module")
def everything(toy_bundle, toy_file, tmp_path_factory):
    """One run of every scenario on every runtime of the CPU, and the files it wrote."""
    folder = tmp_path_factory.mktemp("bench")
    suite = folder / "all.toml"

    def roof(rounds):
        """A roof that nothing here runs faster than, however busy this machine is."""
        high = {mib: 1e11 for mib, _ in rounds[0]["bandwidth"]}
        return dataclasses.replace(best_of(rounds), fp32=2e11, int8=8e11, bandwidth=high)

    suite.write_text(
        'runtimes = ["cpu", "openvino", "litert"]\n'
        'scenarios = ["single-stream", "offline", "multi-stream", "server", "cold-start", '
        '"waterfall", "layers", "duty-cycle", "sustained"]\n'
        "seconds = 1\nrounds = 2\nbatches = [1, 4]\nclients = [1, 2]\nloads = [0.5]\n"
        "sustained_seconds = 0.4\nidle_seconds = 0.05\ntest_images = 60\n"
        f"[[model]]\nbundle = '{toy_bundle.root}'\nreference = '{toy_file}'\ndata = 'digits'\n"
    )
    out = {name: folder / f"bench.{name}" for name in ("html", "csv", "md", "json")}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("cnnedge.benchmark.run.best_of", roof)
        result = run(
            *("bench", suite, "--html", out["html"], "--csv", out["csv"], "--markdown", out["md"]),
            *("-o", out["json"]),
        )
    assert result.exit_code == 0, (result.output, result.exception)
    return result, json.loads(out["json"].read_text()), out


def rows_of(everything):
    (model,) = everything[1]["models"]
    return {row["name"]: row for row in model["contestants"]}


def test_everybody_takes_part(everything):
    rows = rows_of(everything)
    assert (
        list(rows)
        == [
            *("keras", "fp32@cpu", "fp16@cpu", "int8@cpu"),
            *("fp32@openvino", "int8@openvino", "fp32@litert", "int8@litert"),
        ]
        or "bf16@openvino" in rows
    )
    (model,) = everything[1]["models"]
    left_out = {left["name"]: left["why"] for left in model["left_out"]}
    assert "TensorRT" in left_out["int8-trt@cpu"]
    for row in rows.values():
        assert row["error"] is None
        assert row["provider"]
        assert row["bytes"] > 1000
        single = row["single_stream"]
        assert len(single["samples_ms"]) == 2
        assert single["n"] == sum(len(b) for r in single["samples_ms"] for b in r)
        assert single["p50_ms"] > 0
        assert row["memory"]["peak_mib"] > row["memory"]["before_mib"] > 10
        assert row["peer"] == (row["runtime"] in {"openvino", "litert"})
    assert rows["keras"]["provider"].startswith("TensorFlow")
    assert rows["int8@litert"]["provider"].startswith("LiteRT")


def test_every_scenario_has_figures(everything):
    for name, row in rows_of(everything).items():
        serial = row["runtime"] == "litert"
        assert row["notes"].keys() <= {"layers", *(["multi-stream"] * serial)}, (name, row["notes"])
        assert [point["batch"] for point in row["offline"]] == [1, 4]
        clients = [point["clients"] for point in row["multi_stream"]]
        assert clients == ([1] if serial else [1, 2])
        (point,) = row["server"]
        assert point["n"] >= 64
        cold = row["cold_start"]
        parts = cold["import_ms"] + cold["load_ms"] + cold["first_ms"]
        assert parts == pytest.approx(cold["total_ms"], rel=0.5)
        assert len(row["sustained"]["windows"]) >= 4
        assert len(row["duty_cycle"]["first_ms"]) == 6
        assert row["duty_cycle"]["idle_s"] == 0.05
        stages = [stage["name"] for stage in row["waterfall"]["stages"]]
        assert stages == ["decode", "resize", "copy in", "compute", "copy out", "post"]
        assert row["waterfall"]["file"]["format"] == "JPEG"
        assert (row["waterfall"]["app_p50_ms"] is not None) == (name in APPS), name
        assert bool(row["layers"]) == (name in APPS), name
        assert 0 < row["roofline"]["fraction"] <= 1
        assert row["roofline"]["bound_ms"] > 0


APPS = {"fp32@cpu", "fp16@cpu", "int8@cpu", "fp32@openvino", "int8@openvino"}


def test_layers_are_named_as_in_the_model(everything):
    rows = rows_of(everything)
    for name in APPS:
        named = {layer["name"]: layer for layer in rows[name]["layers"]}
        assert {"conv1", "conv2", "conv3", "fc1", "fc2"} <= set(named), (name, list(named))
        assert named["conv2"]["macs"] == 16 * 24 * 9 * 16 * 16
        assert named["conv2"]["fraction"] > 0


def test_accuracy_is_of_the_same_images_for_all(everything, toy_bundle, digits):
    (model,) = everything[1]["models"]
    assert model["data"]["images"] == 60
    assert model["data"]["reference"] == "Keras, in this run"
    rows = rows_of(everything)
    assert rows["keras"]["accuracy"]["drop_points"] == 0
    assert rows["keras"]["accuracy"]["max_abs_diff"] == 0
    assert rows["fp32@openvino"]["accuracy"]["max_abs_diff"] < 1e-4
    for row in rows.values():
        assert row["accuracy"]["n"] == 60
        assert row["accuracy"]["top1"] > 0.8
        assert np.sum(row["confusion"]) == 60
        assert row["flipped"] == round(60 * (1 - row["accuracy"]["agreement"]))


def test_the_pick_is_one_of_them_and_says_why(everything):
    result, document, _ = everything
    (model,) = document["models"]
    pick = model["pick"]
    assert pick["name"] in rows_of(everything)
    assert "top-1 drops" in pick["why"]
    assert f"pick: {pick['title']}: " in result.stdout
    named = {other["name"] for other in pick["runners_up"]} | {pick["name"]}
    assert named == set(rows_of(everything))


def test_the_environment_is_in_the_result(everything):
    _, document, _ = everything
    env = document["environment"]
    assert env["machine"]["cpu"]
    assert env["machine"]["isa"]
    assert env["threads"] >= 1
    assert "onnxruntime" in env["tools"]
    assert set(env["conditions"]) == {
        *("governor", "clock_mhz", "virtual", "cpu_limit", "load", "steal", "others"),
    }
    assert len(document["peaks"]["fp32"]["samples"]) == 2
    assert document["peaks"]["int8"]["giga_per_second"] > 1
    assert document["suite"]["name"] == "all"


def test_every_field_is_documented(everything):
    _, document, _ = everything
    page = (ROOT / "docs" / "benchmark.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`\.?([a-z0-9_.]+)(?:\[\])?`", page))
    named |= {part for name in named for part in name.split(".")}
    (model,) = document["models"]
    row = rows_of(everything)["int8@cpu"]
    fields = {*document, *model, *row, *row["single_stream"], *row["waterfall"], *row["memory"]}
    fields |= {*row["cold_start"], *row["sustained"], *row["duty_cycle"], *row["roofline"]}
    fields |= {*row["offline"][0], *row["multi_stream"][0], *row["server"][0], *row["layers"][0]}
    fields |= {*row["sustained"]["windows"][0], *model["pick"], *document["peaks"]["fp32"]}
    fields |= {*document["environment"], *document["environment"]["conditions"]}
    assert sorted(fields - named) == []


def test_tables_of_every_kind(everything):
    result, document, out = everything
    for word in ("OpenVINO INT8", "LiteRT FP32", "offline, images/s", "multi-stream", "server"):
        assert word in result.stdout
    for word in ("to a label", "after 0.05 s of idling", "sustained", "timed: a call"):
        assert word in result.stdout
    markdown = out["md"].read_text()
    assert "| contestant |" in markdown
    assert f"**{document['models'][0]['pick']['title']}" in markdown
    table = list(csv.DictReader(io.StringIO(out["csv"].read_text())))
    p50 = {
        r["contestant"]: r["value"]
        for r in table
        if (r["scenario"], r["figure"]) == ("single_stream", "p50_ms")
    }
    assert float(p50["keras"]) == rows_of(everything)["keras"]["single_stream"]["p50_ms"]
    scenarios = {r["scenario"] for r in table}
    assert scenarios >= {"accuracy", "offline", "server", "waterfall", "layers", "sustained"}
    assert "<html" in out["html"].read_text()


def test_a_result_is_shown_and_written_anew(everything, tmp_path):
    result, _, out = everything
    again = run("bench", out["json"], "--markdown", tmp_path / "again.md")
    assert again.exit_code == 0, again.output
    assert again.stdout == result.stdout
    assert (tmp_path / "again.md").read_text() == out["md"].read_text()


def test_compare(everything, tmp_path):
    _, document, _ = everything
    document = json.loads(json.dumps(document))
    document["peaks"]["fp32"]["samples"] = [1e11, 1e11]  # or a machine that swings hides it all
    before = tmp_path / "before.json"
    before.write_text(json.dumps(document))
    same = run("bench", "--compare", before, before)
    assert same.exit_code == 0, same.output
    row = next(r for r in document["models"][0]["contestants"] if r["name"] == "int8@cpu")
    row["single_stream"]["samples_ms"] = [
        [[3 * s for s in block] for block in r] for r in row["single_stream"]["samples_ms"]
    ]
    slower = tmp_path / "slower.json"
    slower.write_text(json.dumps(document))
    found = run("bench", "--compare", before, slower)
    assert "int8@cpu (p50)" in error_of(found, code=3)
    assert "3.000× [" in found.stdout
    told = json.loads(run("bench", "--compare", before, slower, "--json").stdout)
    assert told["regressed"] is True
    assert run("bench", "--compare", slower, before).exit_code == 0


def test_bad_results_are_refused_in_one_line(everything, tmp_path, toy_bundle):
    _, document, out = everything
    for name, text, message in (
        ("cut.json", out["json"].read_text()[:500], "no whole JSON"),
        ("other.json", "{}", "no result of `cnnedge bench --json`"),
        ("new.json", json.dumps(document | {"schema": 99}), "schema 99, this cnnedge reads 1"),
        ("list.json", "[]", "no result of"),
    ):
        (tmp_path / name).write_text(text)
        assert message in error_of(run("bench", "--compare", out["json"], tmp_path / name))
        assert message in error_of(run("bench", tmp_path / name))
    assert "cannot read" in error_of(run("bench", "--compare", tmp_path / "none", out["json"]))


def test_a_bundle_without_data_or_reference(toy_bundle):
    result = run("bench", toy_bundle.root, *BRIEF, "--runtime", "cpu", "--json")
    assert result.exit_code == 0, result.output
    (model,) = json.loads(result.stdout)["models"]
    assert [row["name"] for row in model["contestants"]] == ["fp32@cpu", "fp16@cpu", "int8@cpu"]
    assert model["baseline"] == "fp32@cpu"
    assert model["data"] is None
    assert {row["accuracy_note"] for row in model["contestants"]} == {
        "as recorded at export, on ONNX Runtime"
    }


def test_recorded_answers_are_the_reference_where_there_is_no_keras(toy_bundle):
    result = run(
        *("bench", toy_bundle.root, *BRIEF, "--runtime", "cpu", "--data", "digits", "--json"),
    )
    (model,) = json.loads(result.stdout)["models"]
    assert model["data"]["reference"] == "Keras, as recorded at export"
    assert model["contestants"][0]["accuracy"]["max_abs_diff"] < 1e-5
    assert model["contestants"][0]["offline"] == []


def test_a_users_own_runtime_takes_part_by_import_string(toy_bundle, tmp_path, monkeypatch):
    monkeypatch.setenv("FAKE_RUNTIME", json.dumps({"seconds": 0.005}))
    result = run(
        *("bench", toy_bundle.root, *BRIEF, "--runtime", "cpu,fake_runtime:open_fake", "--json"),
    )
    assert result.exit_code == 0, result.output
    rows = {row["name"]: row for row in json.loads(result.stdout)["models"][0]["contestants"]}
    fake = rows["int8@fake_runtime:open_fake"]
    assert fake["provider"] == "Fake 1.0, None threads"
    assert 5 <= fake["single_stream"]["p50_ms"] < 500  # a sleep of five milliseconds
    assert fake["peer"]


def test_who_dies_is_told_and_the_others_are_measured(toy_bundle, monkeypatch):
    monkeypatch.setenv("FAKE_RUNTIME", json.dumps({"dies_at": 20}))
    result = run(
        "bench", toy_bundle.root, *BRIEF, "--runtime", "cpu,fake_runtime:open_fake", "--json"
    )
    assert result.exit_code == 0, result.output
    rows = {row["name"]: row for row in json.loads(result.stdout)["models"][0]["contestants"]}
    assert "Segmentation fault" in rows["fp32@fake_runtime:open_fake"]["error"]
    assert rows["fp32@cpu"]["error"] is None


def test_bad_input_is_one_line(toy_bundle, toy_file, tmp_path):
    root = toy_bundle.root
    assert "no runtime 'tpu'" in error_of(run("bench", root, "--runtime", "tpu"))
    assert "no runtime" not in error_of(run("bench", tmp_path / "none"))
    assert "scenarios[0] 'fast'" in error_of(run("bench", root, "--scenarios", "fast"))
    assert "batches[0] 0" in error_of(run("bench", root, "--batches", "0"))
    assert "no image" in error_of(run("bench", root, "--image", tmp_path / "none.jpg"))
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(b"no image")
    assert "broken.jpg is no image" in error_of(run("bench", root, "--image", broken))
    assert "pass --reference" in error_of(run("bench", root, "--runtime", "keras"))
    missing = run("bench", root, "--runtime", "keras", "--reference", tmp_path / "no.keras")
    assert "no model file" in error_of(missing)
    assert "nothing of" in error_of(run("bench", root, "--runtime", "tensorrt"))
    assert "cannot read the suite" in error_of(run("bench", tmp_path / "none.toml"))
    assert "is a folder" in error_of(run("bench", root, "--html", tmp_path))
    for arguments in ((), (root, "--seconds", "0"), (root, "--batches", "x"), ("--compare", "a")):
        assert run("bench", *arguments).exit_code == 2
    assert run("bench", tmp_path / "s.toml", "--data", "digits").exit_code == 2
    (tmp_path / "pets" / "cat").mkdir(parents=True)
    (tmp_path / "pets" / "dog").mkdir()
    for label in ("cat", "dog"):
        for i in range(6):
            pixels = np.random.default_rng(i + 100 * ord(label[0])).integers(
                0, 256, (8, 8, 3), np.uint8
            )
            Image.fromarray(pixels).save(tmp_path / "pets" / label / f"{i}.png")
    message = error_of(run("bench", root, "--data", tmp_path / "pets"))
    assert "are not those of" in message


def test_a_damaged_bundle_and_one_whose_process_fails(bundle_copy):
    (bundle_copy / "model.int8.onnx").write_bytes(b"x")
    assert "model.int8.onnx is not what the manifest names" in error_of(run("bench", bundle_copy))


def test_a_run_that_is_stopped_leaves_neither_files_nor_processes(toy_bundle, tmp_path):
    page = tmp_path / "bench.html"
    command = [sys.executable, "-m", "cnnedge", "bench", str(toy_bundle.root), "--seconds", "60"]
    child = subprocess.Popen(
        [*command, "--runtime", "cpu", "--html", str(page)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )
    begun = measuring = set()
    for _ in range(600):
        begun, measuring = measuring, measuring | children_of(child.pid)
        if len(measuring) >= 3:
            break
        time.sleep(0.1)
    child.send_signal(signal.SIGTERM)
    out, err = child.communicate(timeout=60)
    assert child.returncode == 1
    assert out == ""
    assert err.splitlines()[-1].startswith("error: interrupted")
    assert begun
    assert not [pid for pid in begun if is_alive(pid)]
    for _ in range(300):  # one that was just being started ends with its input, a moment later
        if not any(map(is_alive, measuring)):
            break
        time.sleep(0.1)
    assert not [pid for pid in measuring if is_alive(pid)]
    assert list(tmp_path.iterdir()) == []


def is_alive(pid):
    try:
        return bool(Path(f"/proc/{pid}/cmdline").read_bytes())  # empty: ended, and not yet reaped
    except OSError:
        return False


def children_of(pid):
    try:
        text = Path(f"/proc/{pid}/task/{pid}/children").read_text()
    except OSError:
        return set()
    return {int(child) for child in text.split()}


def test_a_full_disk_keeps_what_was_there(everything, tmp_path, monkeypatch):
    _, _, out = everything
    page = tmp_path / "bench.html"
    page.write_text("yesterday's")

    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    assert "No space left" in error_of(run("bench", out["json"], "--html", page))
    assert page.read_text() == "yesterday's"
    assert list(tmp_path.iterdir()) == [page]


class Answering:
    """A link in this process that answers from a table and dies at a given batch."""

    def __init__(self, dies_at=None):
        self.asked, self.dies_at = 0, dies_at
        self.opened = {"provider": "Fake"}

    def ask(self, do, **arguments):
        if do == "answers":
            self.asked += 1
            if self.asked == self.dies_at:
                raise BackendError("fp32@cpu: its process was killed by signal 9")
            np.save(arguments["out"], answers_of(np.load(arguments["images"])))
            return {}
        return {"warm_up": {"seconds": 1.0, "settled": True}, "memory": {}}.get(
            do, {"samples": [0.001] * 8, "gpu": []}
        )

    def close(self):
        pass


def bench_in_this_process(bundle, link, **options):
    suite = Suite((ModelEntry(bundle.root, data="digits"),), scenarios=("single-stream",), rounds=1)
    return bench(suite, start=lambda contestant: link, **options)["models"][0]


def test_latencies_outlive_a_process_that_dies_answering(toy_bundle, tmp_path, monkeypatch):
    monkeypatch.setenv("CNNEDGE_CACHE", str(tmp_path))
    model = bench_in_this_process(toy_bundle, Answering(dies_at=8))
    assert model["contestants"][0]["single_stream"]["p50_ms"] == 1.0
    assert model["data"] is None
    left_out = {left["name"]: left["why"] for left in model["left_out"]}
    assert "killed by signal 9" in left_out["accuracy"]


def test_answers_that_were_kept_are_not_asked_for_again(toy_bundle, tmp_path, monkeypatch):
    monkeypatch.setenv("CNNEDGE_CACHE", str(tmp_path))
    monkeypatch.setattr("cnnedge.sweep.FIRST_SAVE_SECONDS", 0.0)
    monkeypatch.setattr("cnnedge.sweep.SAVE_SECONDS", 0.0)
    monkeypatch.setattr("cnnedge.sweep.BATCH_PIXELS", 8 * 32 * 32)
    whole = Answering()
    straight = bench_in_this_process(toy_bundle, whole)
    bench_in_this_process(toy_bundle, Answering(dies_at=100))
    rest = Answering()
    resumed = bench_in_this_process(toy_bundle, rest, resume=True)
    assert rest.asked < whole.asked - 50
    for one, other in zip(straight["contestants"], resumed["contestants"], strict=True):
        assert one["accuracy"] == other["accuracy"]
        assert one["right"] == other["right"]
    assert resumed["data"]["images"] == 359


def test_calibration_images_are_refused_before_anything_is_measured(toy_bundle, monkeypatch):
    from cnnedge.benchmark import run as benchmark

    dataset = benchmark.open_source("digits")
    leaky = dataclasses.replace(dataset, test=dataset.calibration)
    monkeypatch.setattr(benchmark, "open_source", lambda *a, **k: leaky)
    started = []
    with pytest.raises(DataError, match="was calibrated on"):
        bench(
            Suite((ModelEntry(toy_bundle.root, data="digits"),)),
            start=started.append,
        )
    assert not started


def test_the_suites_of_the_repository_are_valid():
    from cnnedge.benchmark.suite import read_suite

    files = sorted((ROOT / "benchmarks").glob("*.toml"))
    assert [f.name for f in files] == [
        *("edge-cpu.toml", "gpu.toml", "smoke-cpu.toml", "sustained-cpu.toml")
    ]
    for file in files:
        assert read_suite(file, {}).models


def test_a_bundle_that_takes_floats_is_fed_images_like_every_other(toy_file, tmp_path):
    from cnnedge.pipeline import export_bundle
    from cnnedge.recipe import make_recipe

    recipe = make_recipe(
        model=str(toy_file), input="float32", precision=("fp32",), bench_seconds=0.1, test_images=40
    )
    export_bundle(recipe, tmp_path / "floats")
    result = run(
        *("bench", tmp_path / "floats", "--reference", toy_file, "--data", "digits", "--json"),
        *("--runtime", "cpu,openvino", "--test-images", 40, "--seconds", 0.2, "--rounds", 1),
        *("--scenarios", "single-stream,layers"),
    )
    assert result.exit_code == 0, result.output
    (model,) = json.loads(result.stdout)["models"]
    assert model["layout"] == "float32 NHWC [N, 32, 32, 3]"
    rows = {row["name"]: row for row in model["contestants"]}
    for name in ("fp32@cpu", "fp32@openvino"):
        assert rows[name]["accuracy"]["max_abs_diff"] < 1e-4
        assert rows[name]["layers"]


def test_a_bench_without_a_roof_still_measures(toy_bundle, monkeypatch):
    from cnnedge.benchmark import run as benchmark

    def refuse(*arguments, **options):
        raise BackendError("peaks: no such file")

    monkeypatch.setattr(benchmark, "call", refuse)
    result = run("bench", toy_bundle.root, *BRIEF, "--runtime", "cpu", "--json")
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout)
    (model,) = document["models"]
    assert document["peaks"] is None
    assert {"name": "peaks", "why": "peaks: no such file"} in model["left_out"]
    for row in model["contestants"]:
        assert row["single_stream"]["p50_ms"] > 0
        assert row["roofline"]["why"] == "the machine's peaks were not measured"
