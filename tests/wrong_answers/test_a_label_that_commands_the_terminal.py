"""What a label, a file's name or a message holds is shown, on any terminal, and never obeyed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import click
import numpy as np
import pytest
from click.testing import CliRunner
from test_bundle import edit_manifest

from cnnedge.cli import main
from cnnedge.cli.shell import say
from cnnedge.cli.show import print_json, print_table
from cnnedge.errors import CnnEdgeError, printable

RESULTS = sorted((Path(__file__).parents[2] / "benchmarks" / "results").glob("edge-cpu-*.json"))
EVIL = ["\x1b[31mred", "\x9b2Jcleared", "\u202etxet", "bell\x07", "Blüte × … 猫"]
COMMANDS_IT = "\x1b\x9b\u202e\x07\r\x00"


@pytest.fixture
def evil(bundle_copy):
    """A bundle whose labels would command a terminal."""

    def change(fields):
        fields["labels"][: len(EVIL)] = EVIL

    edit_manifest(bundle_copy, change)
    return bundle_copy


@pytest.fixture
def photo(tmp_path):
    from PIL import Image

    path = tmp_path / "a\x1b[2Jb.png"
    Image.fromarray(np.zeros((32, 32, 3), np.uint8)).save(path)
    return path


def harmless(text: str) -> bool:
    return not set(text) & set(COMMANDS_IT)


def test_labels_and_names_are_shown_and_not_obeyed(evil, photo):
    run = CliRunner().invoke
    shown = run(main, ["predict", str(evil), str(photo), "--top", "10"])
    assert shown.exit_code == 0, shown.output
    assert harmless(shown.output)
    assert r"\x1b[31mred" in shown.stdout
    assert "Blüte × … 猫" in shown.stdout  # what is text stays as it is
    assert r"a\x1b[2Jb.png" in shown.stdout
    assert len(shown.stdout.splitlines()) == 1
    document = run(main, ["predict", str(evil), str(photo), "--top", "10", "--json"])
    assert harmless(document.stdout)
    found = {answer["label"] for answer in json.loads(document.stdout)["images"][0]["answers"]}
    assert set(EVIL) <= found  # and a program gets the label itself
    refused = run(main, ["verify", str(evil), "--data", str(photo)])
    assert refused.exit_code == 1
    assert harmless(refused.output)


def test_a_table_an_error_and_a_line_escape_alike(capsys):
    text = "\x1b[31mred\nerror: a line of its own\u2028\u202e\udcff"
    shown = printable(text)
    assert shown == r"\x1b[31mred\nerror: a line of its own\u2028\u202e\udcff"
    assert printable("Blüte × 猫 👩\u200d🔬") == "Blüte × 猫 👩\u200d🔬"
    print_table(("label",), [(text,)])
    say(text)
    print_json({"label": text})
    out = capsys.readouterr().out
    assert harmless(out)
    assert out.count("\\x1b[31mred\\nerror: a line") == 2
    error = str(CnnEdgeError(text, fix=text))
    assert harmless(error)
    assert len(error.splitlines()) == 1


# --- a terminal that has nothing but ASCII -------------------------------------------------------


def every_help() -> list[list[str]]:
    context = click.Context(main)
    return [["--help"], *([name, "--help"] for name in main.list_commands(context))]


@pytest.mark.parametrize("words", every_help(), ids=" ".join)
def test_help_is_shown_on_an_ascii_terminal(words):
    ran = CliRunner(charset="ascii").invoke(main, words)
    assert (ran.exit_code, ran.exception) == (0, None)


@pytest.mark.tf
def test_no_command_dies_of_an_ascii_terminal(evil, photo):
    commands = [
        ["models"],
        ["models", "--json"],
        ["doctor"],
        ["inspect", str(evil / "model.fp32.onnx")],
        ["inspect", "--stack", "3x3,3x3"],
        ["inspect", "猫"],
        ["predict", str(evil), str(photo), "--top", "10"],
        ["predict", str(evil), str(photo), "--json", "--top", "10"],
        ["predict", str(evil), "猫×.png"],
        ["verify", str(evil)],
        ["bench", str(RESULTS[0])],
        ["bench", "--compare", str(RESULTS[0]), str(RESULTS[0])],
        ["package", str(evil), "--zip", str(photo.parent / "ü.zip")],
    ]
    for words in commands:
        ran = CliRunner(charset="ascii").invoke(main, words)
        assert ran.exception is None or isinstance(ran.exception, SystemExit), (
            words,
            ran.exception,
        )
        assert ran.stdout_bytes.isascii(), words
        if "--json" in words:
            json.loads(ran.stdout)
        assert len(ran.output) > 20


@pytest.mark.system
def test_a_real_process_says_it_in_ascii(evil, photo):
    plain = {"PYTHONIOENCODING": "ascii", "LC_ALL": "C", "PYTHONUTF8": "0"}
    environment = os.environ | plain | {"PYTHONCOERCECLOCALE": "0"}
    for words in (["predict", str(evil), str(photo), "--top=10"], ["bench", str(RESULTS[0])]):
        command = [sys.executable, "-m", "cnnedge", *words]
        ran = subprocess.run(
            command, capture_output=True, env=environment, timeout=300, check=False
        )
        assert ran.returncode == 0, ran.stderr
        assert ran.stdout.isascii()
        assert b"Traceback" not in ran.stderr


@pytest.mark.system
@pytest.mark.skipif(sys.platform != "linux", reason="names of files are bytes there")
def test_a_file_whose_name_is_no_text_is_named(evil, photo):
    odd = os.fsdecode(os.fsencode(photo.parent) + b"/\xff.png")
    os.link(photo, odd)
    for form in ([], ["--json"]):
        command = [sys.executable, "-m", "cnnedge", "predict", str(evil), odd, *form]
        ran = subprocess.run(command, capture_output=True, timeout=300, check=False)
        assert ran.returncode == 0, ran.stderr
        assert b"\\udcff" in ran.stdout
