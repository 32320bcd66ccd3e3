"""A sweep answers like the plain loop, in bounded memory, and goes on after whatever stopped it."""

from __future__ import annotations

import errno
import json
import os
import time
from collections.abc import Sequence

import numpy as np
import pytest
from PIL import Image

from cnnedge import sweep as module
from cnnedge.data import split as splits
from cnnedge.data.split import Split
from cnnedge.errors import BackendError, CnnEdgeError, DataError, ImageError, ModelError
from cnnedge.image import ImageContract
from cnnedge.sweep import STATE, sweep

SMALL = ImageContract(8, 8)
COUNT, SIZE = 53, 8  # the last batch is a ragged one
MEAN = np.random.default_rng(0).normal(size=(8 * 8 * 3, 7)).astype(np.float32)


def mean(batch):
    return batch.reshape(len(batch), -1).astype(np.float32) @ MEAN


def brightest(batch):
    return batch.reshape(len(batch), -1, 3).max(1).astype(np.float32)


RUNNERS = {"mean": mean, "brightest": brightest}


@pytest.fixture
def images():
    return np.random.default_rng(1).integers(0, 256, (COUNT, 8, 8, 3), np.uint8)


@pytest.fixture
def split(images):
    return Split("test", images, np.arange(COUNT))


@pytest.fixture
def eager(monkeypatch):
    """Save after every batch, as in a run that has gone on for long."""
    monkeypatch.setattr(module, "FIRST_SAVE_SECONDS", 0.0)
    monkeypatch.setattr(module, "SAVE_SECONDS", 0.0)


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "kept" / "run"


def plain(images, runner):
    return np.concatenate([runner(images[i : i + SIZE]) for i in range(0, COUNT, SIZE)])


def assert_right(answers, images):
    assert list(answers) == list(RUNNERS)
    for name, runner in RUNNERS.items():
        assert answers[name].dtype == np.float32
        assert answers[name].tobytes() == plain(images, runner).tobytes()


class StopError(Exception):
    """What a test stops a run with."""


def stopping(after, error):
    """Runners of which one raises instead of answering its batch number ``after``."""
    calls = iter(range(1000))

    def stops(batch):
        if next(calls) == after:
            raise error
        return brightest(batch)

    return RUNNERS | {"brightest": stops}


def stop(split, folder, after=3, error=None, **options):
    """Run until a batch that is not answered, and let the checkpoint of the others lie."""
    runners = stopping(after, error or StopError())
    with pytest.raises(type(error or StopError())) as raised:
        sweep(split, SMALL, runners, batch_size=SIZE, checkpoint=folder, **options)
    return raised.value


def resume(split, folder, **options):
    options = {"batch_size": SIZE, "checkpoint": folder, "resume": True, **options}
    return sweep(split, SMALL, RUNNERS, **options)


# --- the answers -------------------------------------------------------------------------------


def test_it_answers_like_the_plain_loop(split, images):
    told = []
    answers = sweep(
        split, SMALL, RUNNERS, batch_size=SIZE, progress=lambda *event: told.append(event)
    )
    assert_right(answers, images)
    done = [0, 8, 16, 24, 32, 40, 48, 53]
    assert told == [("verify", n, COUNT) for n in done]


@pytest.mark.parametrize("kept", [False, True])
def test_it_answers_so_from_files_too(split, images, folder, monkeypatch, kept):
    monkeypatch.setattr(module, "BUFFER_BYTES", 700)
    answers = sweep(split, SMALL, RUNNERS, batch_size=SIZE, checkpoint=folder if kept else None)
    assert isinstance(answers["mean"].base, np.memmap)  # it did take the way over a file
    assert answers["mean"].flags.writeable  # else argmax would copy it into memory
    assert_right(answers, images)
    assert not folder.exists()


def test_every_batch_is_decoded_once_and_seen_by_all(split):
    seen = {"one": [], "other": []}
    runners = {name: lambda b, s=s: s.append(b) or mean(b) for name, s in seen.items()}
    sweep(split, SMALL, runners, batch_size=SIZE)
    assert all(a is b for a, b in zip(seen["one"], seen["other"], strict=True))
    assert [len(b) for b in seen["one"]] == [8] * 6 + [5]


def test_large_images_come_few_at_a_time(split):
    sizes = []
    sweep(
        split,
        ImageContract(224, 224),
        {"one": lambda b: sizes.append(len(b)) or mean(b[:, :8, :8])},
    )
    assert set(sizes) == {2, 1}


@pytest.mark.parametrize("rows", [0, 3, 9])
def test_a_runner_that_miscounts_is_named(split, rows):
    with pytest.raises(BackendError, match=r"bad gave answers of shape \[\d, 4\] to 8 images"):
        sweep(split, SMALL, {"bad": lambda b: np.zeros((rows, 4))}, batch_size=SIZE)


def test_an_output_that_changes_its_size_is_refused(split):
    widths = iter(range(3, 30))
    with pytest.raises(BackendError, match=r"\[4\] classes, and had \[3\] before"):
        sweep(split, SMALL, {"odd": lambda b: np.zeros((len(b), next(widths)))}, batch_size=SIZE)


def test_an_empty_split_is_refused(split):
    with pytest.raises(DataError, match="the test split is empty"):
        sweep(split.select(np.arange(0)), SMALL, RUNNERS)


# --- memory ------------------------------------------------------------------------------------


class Alive(Sequence):
    """Images that count how many of them are decoded and not yet let go."""

    def __init__(self, count):
        self.count = count
        self.fetched = 0

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        self.fetched += 1
        return np.full((8, 8, 3), index % 251, np.uint8)


@pytest.mark.parametrize("count", [200, 2000])
def test_what_is_decoded_ahead_does_not_grow_with_the_images(count, monkeypatch):
    monkeypatch.setattr(splits, "workers", lambda: 3)
    items = Alive(count)
    ahead, done = [], 0

    def look(batch):
        nonlocal done
        time.sleep(1e-4)  # let the threads get as far as they may
        ahead.append(items.fetched - done)
        done += len(batch)
        return mean(batch)

    sweep(Split("test", items, np.zeros(count, np.int64)), SMALL, {"one": look}, batch_size=SIZE)
    assert items.fetched == count
    assert max(ahead) <= SIZE + (SIZE + 2 * 3 + 1)  # its batch, and what waits


def test_what_waits_is_bounded_in_bytes(monkeypatch):
    """Of a large batch no more is decoded ahead than fits."""
    monkeypatch.setattr(splits, "workers", lambda: 3)
    monkeypatch.setattr(splits, "AHEAD_BYTES", 10 * 8 * 8 * 3)
    items = Alive(500)
    batches = Split("test", items, np.zeros(500, np.int64)).batches(SMALL, 100)
    next(batches)
    batches.close()
    assert 100 <= items.fetched <= 100 + 10 + 1


def test_answers_do_not_pile_up_in_memory(split, monkeypatch):
    monkeypatch.setattr(module, "BUFFER_BYTES", 1000)
    most, save = 0, module._Answers.save_if_due

    def watch(self):
        nonlocal most
        save(self)
        most = max(most, self._buffered)

    monkeypatch.setattr(module._Answers, "save_if_due", watch)
    sweep(split, SMALL, RUNNERS, batch_size=SIZE)
    assert 0 < most <= 1000


# --- the checkpoint ----------------------------------------------------------------------------


def test_a_short_run_leaves_nothing_behind(split, folder, tmp_path):
    sweep(split, SMALL, RUNNERS, batch_size=SIZE, checkpoint=folder)
    stop(split, folder)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("eager")
def test_a_stopped_run_goes_on_to_the_same_answers(split, images, folder):
    stop(split, folder, after=3)
    assert json.loads((folder / STATE).read_text())["done"] == 24
    assert not list(folder.glob(".*"))
    told = []
    answers = resume(split, folder, progress=lambda *event: told.append(event))
    assert_right(answers, images)
    assert told[0] == ("verify", 24, COUNT)
    assert len(told) == 5  # and none of the first 24 was run again
    assert not folder.exists()
    with pytest.raises(ModelError, match="no checkpoint"):
        resume(split, folder)


@pytest.mark.usefixtures("eager")
def test_it_may_be_stopped_again_and_again(split, images, folder):
    stop(split, folder, after=0)
    assert not folder.exists()
    stop(split, folder, after=1)
    for _ in range(5):
        stop(split, folder, after=1, resume=True)
    assert_right(resume(split, folder), images)


@pytest.mark.usefixtures("eager")
def test_a_run_that_was_done_needs_no_image(split, images, folder, monkeypatch):
    """A kill may strike between the last save and the end."""
    with monkeypatch.context() as patch:
        patch.setattr(module._Answers, "finish", lambda self: (_ for _ in ()).throw(StopError()))
        with pytest.raises(StopError):
            sweep(split, SMALL, RUNNERS, batch_size=SIZE, checkpoint=folder)
    gone = Split("test", [None] * COUNT, split.targets)
    assert_right(resume(gone, folder), images)


class Struck:
    """Ctrl-C at one of many calls, counted over all that are wrapped."""

    def __init__(self, at):
        self.calls, self.at = 0, at

    def strikes(self):
        self.calls += 1
        return self.calls == self.at

    def wrap(self, real):
        def wrapper(*args, **kwargs):
            if self.strikes():
                raise KeyboardInterrupt
            return real(*args, **kwargs)

        return wrapper

    def wrap_files(self, opened):
        return lambda *args: [HalfWritten(file, self) for file in opened(*args)]


class HalfWritten:
    """A file of which a write may be cut short."""

    def __init__(self, file, struck):
        self.file, self.struck = file, struck

    def __getattr__(self, name):
        return getattr(self.file, name)

    def write(self, data):
        if self.struck.strikes():
            self.file.write(bytes(data)[:5])
            raise KeyboardInterrupt
        return self.file.write(data)


@pytest.mark.usefixtures("eager")
@pytest.mark.parametrize("strike", range(1, 75))
def test_a_signal_may_strike_anywhere_in_a_save(split, images, folder, monkeypatch, strike):
    struck = Struck(strike)
    with monkeypatch.context() as patch:
        patch.setattr(module, "write_text", struck.wrap(module.write_text))
        patch.setattr(module, "_Stage", struck.wrap(module._Stage))
        patch.setattr(os, "fsync", struck.wrap(os.fsync))
        patch.setattr(module._Answers, "_opened", struck.wrap_files(module._Answers._opened))
        try:
            answers = sweep(split, SMALL, RUNNERS, batch_size=SIZE, checkpoint=folder)
        except KeyboardInterrupt as stopped:
            kept = str(stopped)
        else:
            assert struck.calls < strike
            assert_right(answers, images)
            return
    if not folder.exists():
        assert kept == ""
        return
    assert kept.endswith("of 53 images are done and kept, --resume goes on")
    assert int(kept.split()[0]) == json.loads((folder / STATE).read_text())["done"]
    assert_right(resume(split, folder), images)


@pytest.mark.usefixtures("eager")
def test_a_run_that_is_started_anew_leaves_one_under_way_alone(split, images, folder):
    others = Split("test", images[::-1], split.targets)

    def disturbed(batch):
        if (batch[0] == images[32]).all():
            stop(others, folder, after=6)
        return brightest(batch)

    answers = sweep(
        split, SMALL, RUNNERS | {"brightest": disturbed}, batch_size=SIZE, checkpoint=folder
    )
    assert_right(answers, images)


@pytest.mark.usefixtures("eager")
def test_what_was_written_after_the_last_save_is_not_trusted(split, images, folder):
    stop(split, folder)
    for file in folder.glob("*.f32"):
        with open(file, "ab") as end:
            end.write(os.urandom(1000))
    assert_right(resume(split, folder), images)


@pytest.mark.usefixtures("eager")
@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"key": {"test images": "other"}}, "another test images"),
        ({"batch_size": 7}, r"another batch size \(8 there, 7 now\)"),
    ],
)
def test_another_run_is_refused(split, folder, change, named):
    stop(split, folder, key={"test images": "these"})
    before = (folder / STATE).read_bytes()
    with pytest.raises(ModelError, match=named) as raised:
        resume(split, folder, **({"key": {"test images": "these"}} | change))
    assert "\n" not in str(raised.value)
    assert (folder / STATE).read_bytes() == before


@pytest.mark.usefixtures("eager")
def test_other_runners_versions_and_cores_are_refused(split, folder, monkeypatch):
    stop(split, folder)
    with pytest.raises(ModelError, match="another runners"):
        sweep(split, SMALL, {"mean": mean}, batch_size=SIZE, checkpoint=folder, resume=True)
    with monkeypatch.context() as patch:
        versions = module.tool_versions() | {"numpy": "0.9"}
        patch.setattr(module, "tool_versions", lambda: versions)
        with pytest.raises(ModelError, match="another numpy"):
            resume(split, folder)
    state = json.loads((folder / STATE).read_text())
    state["run"]["number of cores"] += 1
    (folder / STATE).write_text(json.dumps(state))
    with pytest.raises(ModelError, match="another number of cores"):
        resume(split, folder)


@pytest.mark.usefixtures("eager")
def test_what_is_not_resumed_is_replaced(split, images, folder):
    stop(split, folder, key={"test images": "others"})
    stop(split, folder, after=2, key={})
    assert json.loads((folder / STATE).read_text())["done"] == 16
    assert_right(resume(split, folder), images)


def cut(path):
    path.write_bytes(path.read_bytes()[:-1])


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


def edit(**fields):
    return lambda path: path.write_text(json.dumps(json.loads(path.read_text()) | fields))


@pytest.mark.usefixtures("eager")
@pytest.mark.parametrize(
    ("file", "damage"),
    [
        ("answers-0.f32", cut),
        ("answers-1.f32", flip),
        ("answers-1.f32", lambda path: path.unlink()),
        (STATE, cut),
        (STATE, lambda path: path.write_text("")),
        (STATE, lambda path: path.write_text("[]")),
        (STATE, lambda path: path.write_bytes(b"\xff\xfe")),
        (STATE, edit(done=16)),
        (STATE, edit(done=10**9)),
        (STATE, edit(done=-1)),
        (STATE, edit(classes=[7])),
        (STATE, edit(classes=[3, 7])),
        (STATE, edit(sha256=None)),
    ],
)
def test_a_damaged_checkpoint_is_refused(split, images, folder, file, damage):
    stop(split, folder)
    damage(folder / file)
    with pytest.raises(ModelError, match=r"is damaged .*without --resume") as raised:
        resume(split, folder)
    assert "\n" not in str(raised.value)
    assert_right(sweep(split, SMALL, RUNNERS, batch_size=SIZE, checkpoint=folder), images)
    assert not folder.exists()


@pytest.mark.usefixtures("eager")
def test_a_full_disk_is_one_line_and_what_was_kept_stays(split, images, folder, monkeypatch):
    real, calls = os.fsync, iter(range(1000))

    def full(descriptor):
        if next(calls) >= 7:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(CnnEdgeError, match="cannot write .*: No space left.*free some space"):
            sweep(split, SMALL, RUNNERS, batch_size=SIZE, checkpoint=folder)
    assert json.loads((folder / STATE).read_text())["done"] == 16
    assert_right(resume(split, folder), images)


@pytest.mark.usefixtures("eager")
def test_a_disk_that_is_full_at_once_is_left_as_it_was(split, folder, tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(CnnEdgeError, match="No space left"):
            sweep(split, SMALL, RUNNERS, batch_size=SIZE, checkpoint=folder)
    assert list(folder.parent.glob("*")) == []
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 100})())
    with pytest.raises(CnnEdgeError, match=r"GB free, and keeping the answers there needs"):
        sweep(split, SMALL, RUNNERS, batch_size=SIZE, checkpoint=folder)
    assert list(folder.parent.glob("*")) == []


@pytest.mark.usefixtures("eager")
def test_where_no_folder_can_be_made_the_run_goes_on(split, images, tmp_path):
    (tmp_path / "file").write_text("")
    answers = sweep(split, SMALL, RUNNERS, batch_size=SIZE, checkpoint=tmp_path / "file" / "run")
    assert_right(answers, images)
    with pytest.raises(CnnEdgeError, match="set CNNEDGE_CACHE"):
        sweep(split, SMALL, RUNNERS, resume=True)


@pytest.mark.usefixtures("eager")
def test_a_broken_image_is_named_and_the_others_are_kept(folder, tmp_path):
    rng = np.random.default_rng(0)
    paths = [tmp_path / f"{i:02d}.png" for i in range(COUNT)]
    pictures = rng.integers(0, 256, (COUNT, 8, 8, 3), np.uint8)
    for path, pixels in zip(paths, pictures, strict=True):
        Image.fromarray(pixels).save(path)
    whole = paths[30].read_bytes()
    paths[30].write_bytes(whole[:-30])
    split = Split("test", paths, np.arange(COUNT))
    with pytest.raises(ImageError, match=r"30\.png cannot be decoded") as raised:
        sweep(split, SMALL, RUNNERS, batch_size=SIZE, checkpoint=folder)
    assert "\n" not in str(raised.value)
    assert json.loads((folder / STATE).read_text())["done"] == 24
    paths[30].write_bytes(whole)
    assert_right(resume(split, folder), pictures)


def test_a_runner_that_raises_is_told_as_it_is(split, folder):
    error = BackendError("the graph cannot run this batch", fix="export it again")
    assert stop(split, folder, error=error) is error
