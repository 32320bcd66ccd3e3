from __future__ import annotations

import os

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


def test_an_unwritable_place_is_one_clear_error(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(CnnEdgeError, match="cannot write"):
        with atomic_folder(tmp_path / "file" / "bundle", overwrite=False):
            pass
    with pytest.raises(CnnEdgeError, match="cannot write"):
        write_text(tmp_path / "file" / "a.txt", "text")
