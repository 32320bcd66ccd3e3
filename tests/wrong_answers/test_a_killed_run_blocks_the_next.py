"""A run that was killed leaves nothing that stands in the way of the next, or stays for ever."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from click.testing import CliRunner

from cnnedge.cli import main
from cnnedge.errors import CnnEdgeError
from cnnedge.files import atomic_folder, atomic_path, require_writable, scratch_folder, write_text

KILLED = """
import os, signal, sys
from pathlib import Path
from cnnedge import files
path = Path(sys.argv[2])
block = {"file": files.atomic_path, "scratch": lambda path: files.scratch_folder(),
         "folder": lambda path: files.atomic_folder(path, overwrite=True)}[sys.argv[1]]
with block(path) as temporary:
    (temporary if sys.argv[1] == "file" else temporary / "model.onnx").write_bytes(b"half of it")
    print("writing", flush=True)
    if sys.stdin.readline() == "kill\\n":
        os.kill(os.getpid(), signal.SIGKILL)
"""


def writer(kind, path, **options):
    """Start a process that is in the middle of writing ``path``."""
    command = [sys.executable, "-c", KILLED, kind, path]
    started = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, **options
    )
    assert started.stdout.readline() == "writing\n"
    return started


def kill(process):
    process.communicate("kill\n", timeout=30)
    assert process.returncode == -signal.SIGKILL


@pytest.mark.system
@pytest.mark.parametrize(
    "name",
    ["b.zip", "m.onnx", "m.keras", "bundle.sig", "fp16.rtx.plan", "note.json", "run.tar.gz", "x"],
)
def test_half_a_file_is_swept_by_the_next_run(tmp_path, name):
    kill(writer("file", tmp_path / name))
    assert os.listdir(tmp_path), "this is what was left"
    write_text(tmp_path / "another.txt", "whole")
    assert os.listdir(tmp_path) == ["another.txt"]
    kill(writer("file", tmp_path / name))
    write_text(tmp_path / name, "whole")
    assert sorted(os.listdir(tmp_path)) == sorted(["another.txt", name])


@pytest.mark.system
def test_half_a_folder_is_swept_by_the_next_run(tmp_path):
    kill(writer("folder", tmp_path / "bundle"))
    assert os.listdir(tmp_path), "this is what was left"
    require_writable(tmp_path / "other.keras")  # which every run asks first
    assert os.listdir(tmp_path) == []


@pytest.mark.system
def test_what_is_unpacked_for_a_run_that_was_killed_is_swept_too(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    kill(writer("scratch", tmp_path / "-", env=os.environ | {"TMPDIR": str(tmp_path)}))
    assert os.listdir(tmp_path), "this is what was left"
    with scratch_folder():
        assert len(os.listdir(tmp_path)) == 1
    assert os.listdir(tmp_path) == []


@pytest.mark.system
@pytest.mark.parametrize("kind", ["file", "folder"])
def test_what_a_living_run_writes_stays(tmp_path, kind):
    alive, dead = (writer(kind, tmp_path / name) for name in ("slow", "dead"))
    before = set(os.listdir(tmp_path))
    kill(dead)
    write_text(tmp_path / "quick.txt", "whole")
    left = set(os.listdir(tmp_path)) - {"quick.txt"}
    assert len(left) == 1
    assert left < before
    alive.communicate("go on\n", timeout=30)
    assert alive.returncode == 0
    assert sorted(os.listdir(tmp_path)) == ["quick.txt", "slow"]


@pytest.mark.system
def test_two_runs_that_write_the_same_file_at_once_do_not_meet(tmp_path):
    path = tmp_path / "b.zip"
    one, two = writer("file", path), writer("file", path)
    for process in (one, two):
        process.communicate("go on\n", timeout=30)
        assert process.returncode == 0
    assert path.read_bytes() == b"half of it"
    assert os.listdir(tmp_path) == ["b.zip"]


def in_a_container(command):
    """Run it as process 1, as a container does; or skip where that is not allowed."""
    unshare = ["unshare", "--fork", "--pid", "--mount-proc"]
    if shutil.which("unshare") is None or subprocess.run([*unshare, "true"]).returncode:
        pytest.skip("this machine lets nobody make a namespace of processes")
    return subprocess.run(
        [*unshare, *map(str, command)], capture_output=True, text=True, timeout=120
    )


@pytest.mark.system
def test_in_a_container_a_killed_run_does_not_block_the_next(tmp_path, toy_bundle):
    package = (sys.executable, "-m", "cnnedge", "package", toy_bundle.root, "--triton")
    folder = tmp_path / "t"
    for name in (".t.1.partial", ".t.partial", ".t.1.old"):
        (tmp_path / name).mkdir()
    killed = in_a_container((sys.executable, "-c", KILLED_AS_ONE, folder))
    assert killed.returncode, "it was killed"
    for _ in range(2):
        done = in_a_container((*package, folder, "--force"))
        assert done.returncode == 0, done.stderr
        assert sorted(os.listdir(tmp_path)) == [".t.partial", "t"]


# Process 1 of a namespace takes no signal from within, so its parent, process 1, ends it.
KILLED_AS_ONE = """
import os, sys
from pathlib import Path
from cnnedge.files import atomic_folder
with atomic_folder(Path(sys.argv[1]), overwrite=True) as folder:
    (folder / "config.pbtxt").touch()
    os._exit(9)
"""


def test_a_part_of_an_older_release_that_bears_our_own_id_is_in_nobodys_way(tmp_path):
    for ending in ("partial", "old"):
        (tmp_path / f".t.{os.getpid()}.{ending}").mkdir()
    (tmp_path / f".b.{os.getpid()}.partial.zip").touch()
    with atomic_folder(tmp_path / "t", overwrite=True):
        pass
    write_text(tmp_path / "b.zip", "whole")
    assert sorted(os.listdir(tmp_path)) == ["b.zip", "t"]


def test_an_older_releases_parts_are_swept_and_nobody_elses_are(tmp_path):
    gone = [".b.99999999.partial.zip", ".b.zip.99999999.partial"]
    stay = [
        ".b.1.partial.zip",  # of process 1, which lives
        ".b.2024.old.txt",
        ".b.partial.zip",
        ".bashrc.2023.old",
        ".c.99999999.partial.zip",
        ".cnnedge.partial",
        "b.99999999.partial.zip",
    ]
    for name in gone + stay:
        (tmp_path / name).touch()
    write_text(tmp_path / "b.zip", "whole")
    assert sorted(os.listdir(tmp_path)) == sorted([*stay, "b.zip"])


def test_where_there_are_no_locks_nothing_of_a_living_run_is_swept(tmp_path, monkeypatch):
    from cnnedge import partial

    monkeypatch.setattr(partial, "fcntl", None)
    with atomic_path(tmp_path / "slow.txt") as slow:
        slow.write_text("whole")
        write_text(tmp_path / "quick.txt", "whole")
        monkeypatch.undo()  # and by somebody who has them neither
        write_text(tmp_path / "quick.txt", "again")
    assert sorted(os.listdir(tmp_path)) == ["quick.txt", "slow.txt"]


def test_locks_that_the_file_system_refuses_are_done_without(tmp_path, monkeypatch):
    from cnnedge import partial

    def refuse(*arguments):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(partial.fcntl, "flock", refuse)
    with atomic_folder(tmp_path / "slow", overwrite=False) as slow:
        write_text(tmp_path / "quick.txt", "whole")
        (slow / "a").touch()
    assert sorted(os.listdir(tmp_path)) == ["quick.txt", "slow"]


def test_a_pipe_or_a_link_in_the_place_of_a_lock_is_passed_over(tmp_path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "mine.txt").touch()
    for token, make in (("0" * 16, os.mkfifo), ("1" * 16, lambda p: p.symlink_to(elsewhere))):
        folder = tmp_path / f".cnnedge.{token}.partial"
        folder.mkdir()
        make(folder / "lock")
    (tmp_path / f".cnnedge.{'2' * 16}.partial").symlink_to(elsewhere)
    write_text(tmp_path / "a.txt", "whole")
    assert (elsewhere / "mine.txt").exists()
    assert (tmp_path / "a.txt").read_text() == "whole"


def test_a_name_as_long_as_names_may_be_can_be_written(tmp_path):
    path = tmp_path / ("n" * 250 + ".html")
    require_writable(path)
    write_text(path, "whole")
    assert os.listdir(tmp_path) == [path.name]


def test_a_disk_that_cannot_be_written_is_one_line(tmp_path, toy_bundle):
    # /proc takes no folder, not even root's.
    with pytest.raises(CnnEdgeError, match="cannot write /proc/self/b.zip"):
        write_text(Path("/proc/self/b.zip"), "whole")
    done = CliRunner().invoke(main, ["package", str(toy_bundle.root), "--zip", "/proc/b.zip"])
    assert done.exit_code == 1
    assert done.stderr.startswith("error: cannot write /proc/b.zip: ")
    assert len(done.stderr.splitlines()) == 1
