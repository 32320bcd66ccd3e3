"""A pipe, a socket, a device or a link in a circle is refused in one line, and never waited for."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import zipfile

import numpy as np
import pytest

from cnnedge.checkpoint import read_checkpoint, write_checkpoint
from cnnedge.errors import CnnEdgeError, ModelError
from cnnedge.files import write_text

# What takes a path, with BAD in its place; the rest is whole.
COMMANDS = [
    ("predict", "BUNDLE", "BAD"),
    ("predict", "BAD", "IMAGE"),
    ("verify", "BAD"),
    ("verify", "BUNDLE", "--data", "BAD"),
    ("verify", "BUNDLE", "--reference", "BAD"),
    ("verify", "BUNDLE", "--signature", "BAD"),
    ("bench", "BAD"),
    ("bench", "BAD.toml"),
    ("bench", "BAD.json"),
    ("bench", "BUNDLE", "--html", "BAD"),
    ("bench", "BUNDLE", "--image", "BAD"),
    ("bench", "--compare", "BAD", "BAD"),
    ("export", "BAD", "-o", "OUT"),
    ("export", "BAD.toml", "-o", "OUT"),
    ("export", "BAD.keras", "-o", "OUT"),
    ("export", "MODEL", "-o", "BAD"),
    ("export", "MODEL", "-o", "OUT", "--data", "BAD"),
    ("export", "MODEL", "-o", "OUT", "--labels", "BAD"),
    ("train", "alexnet_v1", "--data", "BAD", "-o", "OUT.keras"),
    ("train", "alexnet_v1", "-o", "BAD.keras"),
    ("compress", "BAD.keras", "-o", "OUT.keras"),
    ("inspect", "BAD"),
    ("inspect", "BAD.onnx"),
    ("engine", "BAD", "--runtime", "rtx"),
    ("package", "BAD", "--zip", "OUT.zip"),
    ("package", "BUNDLE", "--zip", "BAD.zip"),
    ("package", "BUNDLE", "--onnx", "BAD"),
    ("package", "BUNDLE", "--triton", "BAD"),
    ("sign", "BAD", "--key", "KEY"),
    ("sign", "BUNDLE", "--key", "BAD"),
    ("demo", "BAD"),
    ("demo", "BUNDLE", "--out", "BAD"),
    ("demo", "BUNDLE", "--runtime-dir", "BAD"),
]
RUN = """
import json, sys
from click.testing import CliRunner
from cnnedge.cli import main
for words in json.load(sys.stdin):
    print(json.dumps(["begun", words]), flush=True)
    done = CliRunner().invoke(main, words)
    raised = done.exception if not isinstance(done.exception, SystemExit) else None
    print(json.dumps([done.exit_code, done.stderr, repr(raised)]), flush=True)
"""


def make(kind, path):
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "socket":
        socket.socket(socket.AF_UNIX).bind(str(path))
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "link to itself":
        path.symlink_to(path.name)
    else:
        path.symlink_to(f"{path.name}.back")
        path.with_name(f"{path.name}.back").symlink_to(path.name)


@pytest.mark.parametrize(
    "kind", ["pipe", "socket", "device", "link to itself", "links in a circle"]
)
def test_no_command_waits_for_what_is_no_file(tmp_path, monkeypatch, toy_bundle, toy_file, kind):
    monkeypatch.chdir(tmp_path)  # a socket's name must be short
    for ending in ("", ".toml", ".json", ".keras", ".onnx", ".zip"):
        make(kind, (tmp_path / f"bad{ending}").relative_to(tmp_path))
    (tmp_path / "key.pem").write_text("no key")
    image = next((toy_bundle.root / "selftest").glob("*.png"))
    places = {"BUNDLE": toy_bundle.root, "IMAGE": image, "MODEL": toy_file, "KEY": "key.pem"}
    lines = [
        [str(places.get(word, word)).replace("BAD", "bad").replace("OUT", "out") for word in words]
        for words in COMMANDS
    ]
    done = subprocess.run(
        [sys.executable, "-c", RUN],
        input=json.dumps(lines),
        capture_output=True,
        text=True,
        timeout=240,
        cwd=tmp_path,
    )
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(found) == 2 * len(COMMANDS), f"{found[-1:]} {done.stderr}"
    for words, (code, said, raised) in zip(lines, found[1::2], strict=True):
        said = [line for line in said.splitlines() if line.strip()]
        assert raised == "None", (words, raised)
        assert code == 1, (words, code, said)
        assert len(said) == 1, (words, said)
        assert said[0].startswith("error: "), (words, said)
        assert len(said[0]) <= 300 + len(str(tmp_path)), words
    assert not list(tmp_path.glob("out*"))
    assert not list(tmp_path.glob(".cnnedge*"))


def test_a_folder_of_photos_with_a_pipe_and_a_circle_is_read(photos, tmp_path):
    from cnnedge.data import open_source

    folder = photos(3)
    os.mkfifo(folder / "a" / "pipe.png")
    (folder / "a" / "self.png").symlink_to("self.png")
    (folder / "b" / "round").symlink_to(folder)
    os.mkfifo(folder / "pipe")
    dataset = open_source(str(folder))
    assert dataset.labels == ("a", "b", "c")
    assert any("pipe.png" in line for line in dataset.skipped)
    items = [item for split in (dataset.train, dataset.test) for item in split.items]
    assert not [item for item in items if str(item).endswith(("pipe.png", "self.png"))]


def test_what_a_library_call_names_is_not_waited_for_either(tmp_path, toy_bundle):
    import cnnedge

    pipe = tmp_path / "pipe.png"
    os.mkfifo(pipe)
    classify = cnnedge.load(toy_bundle.root)
    for call in (
        lambda: classify(pipe),
        lambda: classify(str(pipe)),
        lambda: cnnedge.load(pipe),
        lambda: cnnedge.load(toy_bundle.root, public_key=pipe),
        lambda: write_text(pipe, "x"),
        lambda: write_text(os.devnull, "x"),
    ):
        with pytest.raises(CnnEdgeError, match=r"is a (pipe|device)|does not exist|no bundle"):
            call()


def flip(path, name):
    """Change a byte in the middle of what an archive has deflated."""
    with zipfile.ZipFile(path) as archive:
        info = archive.getinfo(name)
    content = bytearray(path.read_bytes())
    start = info.header_offset + 30 + len(name)
    content[start : start + info.compress_size] = b"\xff" * info.compress_size
    path.write_bytes(content)


def test_a_damaged_note_of_a_model_is_one_line(tmp_path, toy_file):
    from cnnedge.backends.keras import NOTE_ENTRY, load_model

    path = tmp_path / "toy.keras"
    with zipfile.ZipFile(toy_file) as source, zipfile.ZipFile(path, "w") as target:
        for info in source.infolist():
            target.writestr(info.filename, source.read(info), zipfile.ZIP_DEFLATED)
    flip(path, NOTE_ENTRY)
    with pytest.raises(ModelError, match=r"toy\.keras is not a whole \.keras file"):
        load_model(path)


def test_a_damaged_checkpoint_is_one_line(tmp_path):
    path = tmp_path / "run.npz"
    write_checkpoint(path, {"a": 1}, {}, {"weights": [np.zeros(1000)]})
    with zipfile.ZipFile(path) as source:
        content = {info.filename: source.read(info) for info in source.infolist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as target:
        for name, what in content.items():
            target.writestr(name, what)
    flip(path, "about.npy")
    with pytest.raises(ModelError, match="is damaged"):
        read_checkpoint(path, {"a": 1})
