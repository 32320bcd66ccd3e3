from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

from cnnedge.errors import CnnEdgeError
from cnnedge.files import atomic_folder, atomic_path, write_text


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.txt"
    write_text(path, "old")
    with pytest.raises(RuntimeError), atomic_path(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["a.txt"]


def test_a_full_disk_is_one_clear_error(tmp_path):
    with pytest.raises(CnnEdgeError, match="No space left on device"):
        with atomic_path(tmp_path / "a.txt") as temporary:
            temporary.write_text("half")
            with open("/dev/full", "w") as full:
                full.write("x")
    assert os.listdir(tmp_path) == []


def test_a_failed_folder_is_absent_and_the_old_one_stays(tmp_path):
    folder = tmp_path / "bundle"
    folder.mkdir()
    (folder / "old").touch()
    with pytest.raises(RuntimeError), atomic_folder(folder, overwrite=True) as temporary:
        (temporary / "new").touch()
        raise RuntimeError
    assert os.listdir(folder) == ["old"]
    assert os.listdir(tmp_path) == ["bundle"]


def test_a_folder_is_replaced_only_when_asked(tmp_path):
    folder = tmp_path / "bundle"
    folder.mkdir()
    with pytest.raises(CnnEdgeError, match="exists already"):
        with atomic_folder(folder, overwrite=False):
            pass
    with atomic_folder(folder, overwrite=True) as temporary:
        (temporary / "new").touch()
    assert os.listdir(folder) == ["new"]
    assert os.listdir(tmp_path) == ["bundle"]


def test_what_a_killed_export_left_is_swept_up(tmp_path):
    dead, alive = tmp_path / ".bundle.99999999.partial", tmp_path / ".bundle.1.partial"
    for left in (dead, alive):
        left.mkdir()
        (left / "model.onnx").touch()
    with atomic_folder(tmp_path / "bundle", overwrite=False):
        pass
    assert sorted(os.listdir(tmp_path)) == [".bundle.1.partial", "bundle"]


KILLED = """
import os, signal, sys
from pathlib import Path
from cnnedge.files import atomic_folder
replace, calls = os.replace, []
def stop(*paths):
    calls.append(paths)
    if len(calls) == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    replace(*paths)
os.replace = stop
with atomic_folder(Path(sys.argv[1]), overwrite=True) as folder:
    (folder / "new").touch()
"""


@pytest.mark.system
def test_killed_between_the_two_renames_the_old_folder_comes_back(tmp_path):
    folder = tmp_path / "net.v2"
    folder.mkdir()
    (folder / "old").touch()
    done = subprocess.run([sys.executable, "-c", KILLED, folder])
    assert done.returncode == -signal.SIGKILL
    assert not folder.exists(), "this is the moment in question"
    with (
        pytest.raises(CnnEdgeError, match="exists already"),
        atomic_folder(folder, overwrite=False),
    ):
        pass
    assert os.listdir(folder) == ["old"]
    assert os.listdir(tmp_path) == ["net.v2"]


def test_a_new_folder_that_cannot_be_put_there_leaves_the_old_one(tmp_path, monkeypatch):
    folder = tmp_path / "bundle"
    folder.mkdir()
    (folder / "old").touch()
    replace = os.replace

    def refuse(source, target):
        if source.parent.name == "new":
            raise OSError(28, "No space left on device")
        replace(source, target)

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(CnnEdgeError, match="No space left"), atomic_folder(folder, overwrite=True):
        pass
    assert os.listdir(folder) == ["old"]
    assert os.listdir(tmp_path) == ["bundle"]


def test_of_a_link_the_folder_behind_it_is_replaced(tmp_path):
    behind, link = tmp_path / "disk" / "bundle", tmp_path / "bundle"
    behind.mkdir(parents=True)
    (behind / "old").touch()
    link.symlink_to(behind)
    with atomic_folder(link, overwrite=True) as temporary:
        (temporary / "new").touch()
    assert link.is_symlink()
    assert os.listdir(behind) == os.listdir(link) == ["new"]
    assert sorted(os.listdir(tmp_path)) == ["bundle", "disk"]


def test_an_unwritable_place_is_one_clear_error(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(CnnEdgeError, match="cannot write"):
        with atomic_folder(tmp_path / "file" / "bundle", overwrite=False):
            pass
    with pytest.raises(CnnEdgeError, match="cannot write"):
        write_text(tmp_path / "file" / "a.txt", "text")
