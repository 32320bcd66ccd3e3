"""`cnnedge compress` as a user types it, and what the smaller network is good for afterwards."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import keras
import pytest
from click.testing import CliRunner
from PIL import Image

from cnnedge.backends.keras import ModelNote, save_model
from cnnedge.cli import main
from cnnedge.inspect import inspect_model
from cnnedge.pipeline import hardware

pytestmark = pytest.mark.tf

QUICK = ("--multiple", 4, "--epochs", 3, "--round-epochs", 1, "--learning-rate", "1e-3")


def run(*arguments):
    return CliRunner().invoke(main, [str(a) for a in arguments])


def error_of(result, code=1):
    assert result.exit_code == code, (result.output, result.exception)
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    return line


@pytest.fixture(scope="module")
def compressed(toy_file, tmp_path_factory):
    out = tmp_path_factory.mktemp("compressed") / "small.keras"
    result = run("compress", toy_file, "--macs", 0.5, "--max-drop", 10, *QUICK, "-o", out, "--json")
    assert result.exit_code == 0, (result.output, result.exception)
    return out, json.loads(result.stdout)


class TestTheResult:
    def test_every_version_was_measured(self, compressed):
        out, document = compressed
        versions = {(v["network"], v["form"]): v for v in document["versions"]}
        assert set(versions) == {
            (network, form)
            for network in ("reference", "compressed")
            for form in ("keras", "fp32", "int8")
        }
        for form in ("keras", "fp32", "int8"):
            small, whole = versions["compressed", form], versions["reference", form]
            assert small["bytes"] < whole["bytes"]
            assert small["latency"]["median_ms"] > 0
            assert small["comparison"]["n"] == document["test_images"] == 359
            assert small["comparison"]["top1"] > 0.8
        assert versions["reference", "keras"]["comparison"]["max_abs_diff"] == 0
        assert json.loads(out.with_suffix(".compress.json").read_text()) == document

    def test_the_json_says_what_was_removed(self, compressed):
        out, document = compressed
        layers = {row["layer"]: row for row in document["layers"]}
        assert list(layers) == ["conv1", "conv2", "conv3", "fc1", "fc2"]
        for row in layers.values():
            assert len(row["kept"]) == row["after"] <= row["before"]
        assert layers["fc2"]["after"] == 10
        reference, small = document["reference"], document["rounds"][-1]
        assert small["macs"] <= 0.5 * reference["macs"]
        assert small["params"] == inspect_model(str(out)).params

    def test_it_exports_quantizes_and_verifies(self, compressed, tmp_path):
        out, _ = compressed
        # Without FP16: these weights were trained here, to values of which no rounding error can be
        # told beforehand. `test_a_compressed_network_exports_to_fp16` has weights that are the same
        # on every CPU.
        options = ("--max-drop", 5, "--precision", "fp32,int8")
        exported = run("export", out, "-o", tmp_path / "bundle", *options)
        assert exported.exit_code == 0, exported.output
        verified = run("verify", tmp_path / "bundle", "--data", "digits", "--json")
        assert verified.exit_code == 0, verified.output
        image = tmp_path / "bundle" / "selftest" / "golden-00.png"
        assert run("predict", tmp_path / "bundle", image).exit_code == 0
        manifest = json.loads((tmp_path / "bundle" / "manifest.json").read_text())
        shares = {v["name"]: v["achieved"]["macs"] for v in manifest["variants"]}
        assert shares["int8"]["int8"] > 0.9

    def test_it_can_be_compressed_again(self, compressed, tmp_path):
        out, _ = compressed
        again = tmp_path / "smaller.keras"
        options = ("--macs", 0.6, "--max-drop", 100, *QUICK)
        assert run("compress", out, *options, "-o", again).exit_code == 0
        assert inspect_model(str(again)).macs <= 0.6 * inspect_model(str(out)).macs


def test_a_compressed_network_exports_to_fp16(toy_model, digits, digit_contract, tmp_path):
    """Seeded weights, a third of them cut away and hardly trained again: the same on every CPU."""
    keras.utils.set_random_seed(3)
    model = keras.models.clone_model(toy_model)
    source, out = tmp_path / "seeded.keras", tmp_path / "small.keras"
    save_model(
        model,
        source,
        ModelNote("toy", digits.labels, digit_contract, "unit", data="digits", seed=0),
    )
    once = ("--multiple", 4, "--epochs", 1, "--round-epochs", 1, "--learning-rate", "1e-9")
    result = run("compress", source, "--macs", 0.6, "--max-drop", 100, *once, "-o", out)
    assert result.exit_code == 0, result.output
    options = ("--max-drop", 100, "--precision", "fp32,fp16")
    exported = run("export", out, "-o", tmp_path / "bundle", *options)
    assert exported.exit_code == 0, exported.output
    manifest = json.loads((tmp_path / "bundle" / "manifest.json").read_text())
    fp16 = next(v for v in manifest["variants"] if v["name"] == "fp16")
    assert 0 < fp16["accuracy"]["max_abs_diff"] < 2e-3
    assert fp16["bytes"] < 0.6 * manifest["variants"][0]["bytes"]


def test_the_table_shows_before_and_after(toy_file, tmp_path):
    out = tmp_path / "small.keras"
    result = run("compress", toy_file, "--params", 0.5, "--max-drop", 10, *QUICK, "-o", out)
    assert result.exit_code == 0, result.output
    for text in ("reference, Keras", "compressed, ONNX INT8", "359 test images", "conv1 16→"):
        assert text in result.stdout
    assert "round 1, epoch 1/3" in result.stderr


def test_a_budget_that_costs_too_much_exits_with_3(toy_file, tmp_path):
    """A single epoch at next to no learning rate recovers nothing."""
    out = tmp_path / "small.keras"
    quick = ("--multiple", 4, "--epochs", 1, "--round-epochs", 1, "--learning-rate", "1e-9")
    result = run("compress", toy_file, "--macs", 0.2, "--max-drop", 0.5, *quick, "-o", out)
    line = error_of(result, 3)
    assert "the asked budget loses +" in line
    assert "0.5 are allowed" in line
    assert f"{out} has the smallest network that holds" in line
    kept = inspect_model(str(out)).macs
    document = json.loads(out.with_suffix(".compress.json").read_text())
    assert document["met"] is False
    costs = [document["reference"]["macs"], *(r["macs"] for r in document["rounds"])]
    assert costs[document["chosen_round"]] == kept > costs[-1]


def test_a_front_is_written_as_data_and_as_a_picture(toy_file, tmp_path):
    out = tmp_path / "front.keras"
    options = ("--pareto", "--points", "0.8,0.4", "--max-drop", 50, *QUICK)
    assert run("compress", toy_file, *options, "-o", out).exit_code == 0
    points = json.loads((tmp_path / "front.pareto.json").read_text())
    rows = list(csv.DictReader((tmp_path / "front.pareto.csv").open()))
    names = [("reference", "fp32"), ("reference", "int8"), ("macs 0.8", "fp32")]
    names += [("macs 0.8", "int8"), ("macs 0.4", "fp32"), ("macs 0.4", "int8")]
    assert [(p["network"], p["form"]) for p in points] == names
    assert [(r["network"], r["form"]) for r in rows] == names
    assert any(p["on_front"] for p in points)
    assert points[-1]["bytes"] < points[1]["bytes"]
    with Image.open(tmp_path / "front.pareto.png") as picture:
        assert min(picture.size) > 400
        assert len(picture.convert("RGB").getcolors(1 << 24)) > 50
    assert (tmp_path / "front.macs-0.4.keras").is_file()


def test_without_data_nothing_is_judged(toy_file, tmp_path):
    out = tmp_path / "small.keras"
    result = run("compress", toy_file, "--data-free", "--multiple", 4, "-o", out, "--json")
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout)
    assert document["test_images"] == 0
    assert {v["form"] for v in document["versions"]} == {"keras", "fp32"}
    assert all(v["comparison"] is None for v in document["versions"])
    assert inspect_model(str(out)).macs <= 0.25 * inspect_model(str(toy_file)).macs


def test_data_that_is_gone_is_not_needed_without_data(toy_model, toy_file, tmp_path):
    from cnnedge.backends.keras import load_model, save_model

    model, note = load_model(toy_file)
    moved, out = tmp_path / "moved.keras", tmp_path / "small.keras"
    save_model(model, moved, replace(note, data=str(tmp_path / "gone")))
    assert "there is no data source" in error_of(run("compress", moved, *QUICK, "-o", out))
    assert run("compress", moved, "--data-free", "--multiple", 4, "-o", out).exit_code == 0
    assert load_model(out)[1].labels == note.labels


def test_a_latency_budget_is_measured_on_this_machine(toy_file, tmp_path):
    """One that every network meets: what it takes to meet a shorter one is up to the machine."""
    out = tmp_path / "small.keras"
    options = ("--latency", "5s", "--max-drop", 100, *QUICK)
    result = run("compress", toy_file, *options, "-o", out, "--json")
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout)
    assert 0 < document["rounds"][-1]["seconds"] < 5
    assert inspect_model(str(out)).macs == inspect_model(str(toy_file)).macs


class TestTheMachine:
    def test_the_smallest_multiple_that_is_near_the_best(self, monkeypatch):
        def taking(penalty):
            """Seconds for a convolution whose channels are padded to a multiple."""

            def time_in_turn(calls, seconds):
                assert set(calls) == {96, 112, 120, 128, 136, 144, 160}
                return {c: (-(-c // penalty) * penalty) ** 2 for c in calls}

            return time_in_turn

        monkeypatch.setattr(hardware, "_ready", lambda model: None)
        for padded, expected in ((1, 8), (8, 8), (16, 16), (32, 32)):
            monkeypatch.setattr(hardware, "time_in_turn", taking(padded))
            found = hardware.measure_granularity(lambda *told: None)
            assert found.multiple == expected, padded

    def test_it_is_measured_on_real_convolutions(self):
        found = hardware.measure_granularity(lambda *told: None)
        assert found.multiple in (8, 16, 32)
        assert set(found.throughput) == {8, 16, 32}
        assert all(0 < share < 1.5 for share in found.throughput.values())

    def test_a_split_that_does_nothing_is_not_faster(self):
        # Three convolutions as wide as the one: five quarters of its work, and two calls more.
        assert not hardware.split_is_faster(14, 14, (3, 3, 64, 64), (1, 1), (64, 64))

    def test_layers_times_add_up_to_the_network(self, toy_file):
        from cnnedge.recipe import make_recipe
        from cnnedge.source import resolve

        source, _ = resolve(make_recipe(model=str(toy_file)))
        images = next(iter(source.dataset.calibration.batches(source.image, 8)))[0]
        timing = hardware.timer(source, images)(source.model)
        assert {"conv1", "conv2", "conv3", "fc1"} <= set(timing.by_layer)
        assert 0 < sum(timing.by_layer.values()) <= timing.seconds * 1.001


class TestBadInput:
    def test_what_cannot_be_read(self, toy_file, tmp_path):
        assert "no model file" in error_of(run("compress", tmp_path / "no.keras"))
        broken = tmp_path / "broken.keras"
        broken.write_bytes(toy_file.read_bytes()[:2000])
        assert "not a whole .keras file" in error_of(run("compress", broken))
        assert not list(tmp_path.glob("*compressed*"))

    def test_a_place_that_cannot_be_written(self, toy_file, tmp_path):
        line = error_of(run("compress", toy_file, *QUICK, "-o", tmp_path / "small.onnx"))
        assert "does not end in .keras" in line

    def test_a_budget_out_of_reach(self, toy_file, tmp_path):
        out = tmp_path / "small.keras"
        line = error_of(run("compress", toy_file, "--macs", 0.001, *QUICK, "-o", out))
        assert "the budget of 0.001 of the macs cannot be met" in line
        assert not list(tmp_path.iterdir())

    @pytest.mark.parametrize(
        ("options", "code", "named"),
        [
            (("--macs", "25"), 1, "macs is 25; pass a share such as 0.25"),
            (("--latency", "fast"), 2, "is no latency"),
            (("--latency", "-5ms"), 2, "is no latency"),
            (("--points", "0.5"), 2, "pass --pareto with them"),
            (("--pareto", "--macs", "0.5"), 2, "leave the others out"),
            (("--pareto", "--points", "a,b"), 2, "are no budgets"),
            (("--pareto", "--points", "0.5,3"), 1, "pass shares such as"),
            (("--energy", "2"), 1, "energy is 2"),
            (("--epochs", "0"), 2, "--epochs"),
            (("--resume",), 1, "there is no checkpoint"),
            (("--data", "nowhere"), 1, "there is no data source 'nowhere'"),
            (("--data", "signs:256"), 1, "has the classes"),
            (("--seed", "-1", "--data", "digits"), 1, "seed"),
        ],
        ids=lambda value: "-".join(value) if isinstance(value, tuple) else "",
    )
    def test_options_that_make_no_sense(self, toy_file, tmp_path, options, code, named):
        out = tmp_path / "small.keras"
        result = run("compress", toy_file, *options, "--multiple", 4, "-o", out)
        assert result.exit_code == code, (result.output, result.exception)
        assert named in " ".join(result.stderr.replace("│", " ").split())
        assert not out.exists()

    def test_a_model_without_weights(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        line = error_of(run("compress", "alexnet", "--image-size", "64,64", *QUICK))
        assert "alexnet has no trained weights to go by; train it first" in line

    def test_images_in_two_splits_are_told_beforehand(self, toy_file, tmp_path, monkeypatch):
        from cnnedge.pipeline import compress as flow

        def same_images(source, recipe):
            return source.dataset.test.take(5, 0)

        monkeypatch.setattr(flow, "calibration_split", same_images)
        out = tmp_path / "small.keras"
        assert "is also the test" in error_of(run("compress", toy_file, *QUICK, "-o", out))
        assert not list(tmp_path.iterdir())

    def test_a_model_that_does_not_say_what_it_knows(self, toy_model, tmp_path):
        mine = tmp_path / "mine.keras"
        toy_model.save(mine)
        line = error_of(run("compress", mine, "--preprocess", "unit", *QUICK))
        assert "does not say what it was trained on; pass --data FOLDER, or --data-free" in line
        assert "how it wants its pixels" in error_of(run("compress", mine, *QUICK))

    def test_a_termination_leaves_what_can_be_resumed(self, toy_file, tmp_path):
        out = tmp_path / "small.keras"
        options = ["--macs", "0.3", "--max-drop", "100", "--multiple", "4", "--epochs", "500"]
        command = [sys.executable, "-m", "cnnedge", "compress", toy_file, *options, "-o", out]
        process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=os.environ)
        for line in process.stderr:
            if "epoch 2/" in line:
                break
        time.sleep(0.2)
        process.send_signal(signal.SIGTERM)
        rest = process.stderr.read()
        process.stderr.close()
        assert process.wait() == 1
        assert "error: interrupted" in rest
        assert "Traceback" not in rest
        assert [path.name for path in tmp_path.iterdir()] == ["small.ckpt"]
        line = error_of(run("compress", toy_file, "--macs", 0.3, *QUICK, "-o", out, "--resume"))
        assert "of another run, with another" in line
