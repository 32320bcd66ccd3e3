"""Splits are stratified, seeded and disjoint; a folder's faults are named."""

from __future__ import annotations

import os
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cnnedge.data import findings, open_source
from cnnedge.data.split import Split, item_digest, stratified
from cnnedge.errors import DataError, ImageError
from cnnedge.image import ImageContract

SMALL = ImageContract(8, 8)


def make_folder(root, counts, *, suffix="png", seed=0):
    rng = np.random.default_rng(seed)
    for label, count in counts.items():
        (root / label).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            pixels = rng.integers(0, 256, (12, 16, 3), np.uint8)
            Image.fromarray(pixels).save(root / label / f"{i:03d}.{suffix}")
    return root


def contents(split):
    return {item_digest(item) for item in split.items}


def splits(dataset):
    return dataset.train, dataset.calibration, dataset.test


def assert_disjoint(dataset):
    train, calibration, test = map(contents, splits(dataset))
    assert not train & calibration
    assert not train & test
    assert not calibration & test


def test_digits_are_all_there_once():
    digits = open_source("digits")
    assert sum(map(len, splits(digits))) == 1797
    assert_disjoint(digits)
    for split, share in zip(splits(digits), (0.7, 0.1, 0.2), strict=True):
        assert len(split) / 1797 == pytest.approx(share, abs=0.01)
        shares = np.bincount(split.targets, minlength=10) / len(split)
        assert np.abs(shares - 0.1).max() < 0.015
    assert digits.labels == tuple("0123456789")
    assert digits.test.items[0].shape == (64, 64, 3)


def test_the_seed_decides_the_splits():
    one, again, other = (open_source("digits", seed=seed) for seed in (1, 1, 2))
    assert one.test.digest() == again.test.digest()
    assert one.test.digest() != other.test.digest()


def test_batches_come_in_order_with_the_ragged_last():
    test = open_source("digits").test
    batches = list(test.batches(SMALL, 100))
    assert [len(b) for b, _ in batches] == [100, 100, 100, len(test) - 300]
    images = np.concatenate([b for b, _ in batches])
    np.testing.assert_array_equal(np.concatenate([t for _, t in batches]), test.targets)
    for i in (0, 99, 100, len(test) - 1):
        np.testing.assert_array_equal(images[i], test.tensor(i, SMALL))


def test_batches_decode_no_further_ahead_than_they_must():
    class Counting(list):
        fetched = 0

        def __getitem__(self, index):
            Counting.fetched += 1
            return super().__getitem__(index)

    items = Counting([np.zeros((8, 8, 3), np.uint8)] * 1000)
    iterator = Split("test", items, np.zeros(1000, np.int64)).batches(SMALL, 4)
    next(iterator)
    iterator.close()
    assert Counting.fetched < 40


def test_take_is_stratified():
    test = open_source("digits").test
    some = test.take(50, seed=3)
    assert np.bincount(some.targets).tolist() == [5] * 10
    assert contents(some) <= contents(test)
    assert test.take(10_000, seed=0) is test


def test_stratified_gives_every_part_one_of_each():
    targets = np.repeat(np.arange(5), [3, 4, 10, 50, 100])
    parts = stratified(targets, (0.7, 0.1, 0.2), seed=0)
    assert np.array_equal(np.sort(np.concatenate(parts)), np.arange(len(targets)))
    for part in parts:
        assert set(targets[part]) == set(range(5))
    with pytest.raises(DataError, match="class 0 has 2 images"):
        stratified(np.array([0, 0, 1, 1, 1]), (0.7, 0.1, 0.2), seed=0)


def test_a_plain_folder(tmp_path):
    root = make_folder(tmp_path / "pets", {"dog": 20, "cat": 30})
    pets = open_source(str(root))
    assert pets.labels == ("cat", "dog")
    assert [len(s) for s in splits(pets)] == [35, 5, 10]
    assert_disjoint(pets)
    assert pets.skipped == ()
    assert all(
        item.parent.name == pets.labels[t]
        for item, t in zip(pets.test.items, pets.test.targets, strict=True)
    )


@pytest.mark.parametrize("held_out", ["val", "test"])
def test_a_folder_that_is_divided_already(tmp_path, held_out):
    make_folder(tmp_path / "train", {"a": 20, "b": 20})
    make_folder(tmp_path / held_out, {"a": 5, "b": 5}, seed=1)
    data = open_source(str(tmp_path))
    assert {item.parts[-3] for item in data.test.items} == {held_out}
    assert len(data.train) + len(data.calibration) == 40
    assert_disjoint(data)


def test_test_comes_before_val_and_train_may_stand_alone(tmp_path):
    make_folder(tmp_path / "train", {"a": 20, "b": 20})
    alone = open_source(str(tmp_path))
    assert alone.labels == ("a", "b")
    assert [len(s) for s in splits(alone)] == [28, 4, 8]
    make_folder(tmp_path / "val", {"a": 5, "b": 5}, seed=1)
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "unlabelled.png").write_bytes(b"")  # its answers are kept secret
    assert {item.parts[-3] for item in open_source(str(tmp_path)).test.items} == {"val"}
    make_folder(tmp_path / "test", {"a": 6, "b": 6}, seed=2)
    both = open_source(str(tmp_path))
    assert {item.parts[-3] for item in both.test.items} == {"test"}
    assert any("val: " in line and "is the test split" in line for line in both.skipped)


def test_links_that_lead_in_circles_and_pipes_are_survived(tmp_path):
    root = make_folder(tmp_path / "pets", {"dog": 6, "cat": 6})
    (root / "all").symlink_to(root)
    (root / "self").symlink_to(root / "self")
    (root / "dog" / "back").symlink_to(root)
    (root / "dog" / "gone.png").symlink_to(root / "nowhere.png")
    os.mkfifo(root / "cat" / "pipe.jpg")
    elsewhere = make_folder(tmp_path / "elsewhere", {"owl": 6}, seed=1)
    (root / "owl").symlink_to(elsewhere / "owl")
    pets = open_source(str(root))
    assert pets.labels == ("cat", "dog", "owl")
    assert sum(map(len, splits(pets))) == 18
    assert sorted(Path(line.split(" is no file")[0]).name for line in pets.skipped)[-1] == (
        "pipe.jpg"
    )
    assert any("gone.png" in line for line in pets.skipped)


def test_the_file_systems_order_does_not_matter(tmp_path, monkeypatch):
    root = make_folder(tmp_path / "pets", {"dog": 12, "cat": 12})
    (root / "dog" / "more").mkdir()
    (root / "dog" / "000.png").rename(root / "dog" / "more" / "000.png")
    one = open_source(str(root), seed=5)
    scandir = os.scandir
    monkeypatch.setattr(
        os, "scandir", lambda top: nullcontext(sorted(scandir(top), key=lambda e: e.name)[::-1])
    )
    other = open_source(str(root), seed=5)
    assert one.labels == other.labels
    for mine, theirs in zip(splits(one), splits(other), strict=True):
        assert mine.digest() == theirs.digest()


def test_broken_and_repeated_images_are_left_out_by_name(tmp_path):
    root = make_folder(tmp_path / "pets", {"dog": 10, "cat": 10})
    (root / "cat" / "broken.JPG").write_bytes(b"nonsense")
    whole = (root / "dog" / "000.png").read_bytes()
    (root / "dog" / "cut.png").write_bytes(whole[: len(whole) // 2])
    (root / "cat" / "twin.png").write_bytes(whole)
    (root / "cat" / ".hidden.png").write_bytes(b"")
    (root / "cat" / "notes.txt").write_text("not an image")
    pets = open_source(str(root))
    assert sum(map(len, splits(pets))) == 20
    assert len(pets.skipped) == 3
    assert any("broken.JPG is no image" in line for line in pets.skipped)
    assert any("cut.png cannot be decoded" in line for line in pets.skipped)
    assert any("the same content as" in line for line in pets.skipped)
    assert_disjoint(pets)


def test_a_test_image_that_was_trained_on_is_left_out(tmp_path):
    make_folder(tmp_path / "train", {"a": 5, "b": 5})
    make_folder(tmp_path / "val", {"a": 5, "b": 5}, seed=1)
    leaked = tmp_path / "val" / "a" / "leak.png"
    leaked.write_bytes((tmp_path / "train" / "a" / "000.png").read_bytes())
    data = open_source(str(tmp_path))
    assert len(data.test) == 10
    assert any("leak.png" in line and "trained on" in line for line in data.skipped)


def test_an_image_that_breaks_later_is_named(tmp_path):
    root = make_folder(tmp_path / "pets", {"dog": 10, "cat": 10})
    pets = open_source(str(root))
    victim = pets.test.items[0]
    victim.write_bytes(b"")
    with pytest.raises(ImageError, match=victim.name):
        list(pets.test.batches(SMALL, 4))


@pytest.mark.parametrize(
    ("counts", "message"),
    [({}, "0 class"), ({"a": 9}, "1 class"), ({"a": 9, "b": 2}, "'b' .* has 2")],
)
def test_a_folder_that_cannot_be_split(tmp_path, counts, message):
    with pytest.raises(DataError, match=message):
        open_source(str(make_folder(tmp_path, counts)))


# --- what was found of a folder's files is kept ------------------------------------------------


@pytest.fixture
def reads(monkeypatch, tmp_path):
    """The names of the files that were read; what is found of them is kept at once."""
    monkeypatch.setenv("CNNEDGE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(findings, "_FEWEST", 10)
    monkeypatch.setattr(findings, "_SETTLED_NS", -(10**12))
    names, decode = [], findings.decode
    monkeypatch.setattr(findings, "decode", lambda p, c: names.append(p.name) or decode(p, c))
    return names


def kept_in(tmp_path):
    return list((tmp_path / "cache").rglob("*"))


def same(one, other):
    return one.skipped == other.skipped and all(
        mine.items == theirs.items and mine.digest() == theirs.digest()
        for mine, theirs in zip(splits(one), splits(other), strict=True)
    )


def test_a_folder_is_read_once(tmp_path, reads):
    root = make_folder(tmp_path / "pets", {"dog": 20, "cat": 20})
    (root / "cat" / "broken.png").write_bytes(b"nonsense")
    told = []
    one = open_source(str(root), progress=lambda *event: told.append(event))
    assert len(reads) == 41
    assert told[-1] == ("open", 41, 41)
    assert len(told) > 1
    reads.clear()
    other = open_source(str(root), progress=lambda *event: told.append(event))
    assert reads == []
    assert told[-1] == ("open", 41, 41)
    assert same(one, other)
    assert "broken.png is no image" in other.skipped[0]


def test_a_broken_file_is_named_as_the_folder_was(tmp_path, reads, monkeypatch):
    root = make_folder(tmp_path / "pets", {"dog": 20, "cat": 20})
    (root / "cat" / "broken.png").write_bytes(b"nonsense")
    open_source(str(root))
    monkeypatch.chdir(tmp_path)
    reads.clear()
    assert open_source("pets").skipped[0].startswith("pets/cat/broken.png is no image")
    assert reads == []


def test_what_changed_is_read_again(tmp_path, reads):
    root = make_folder(tmp_path / "pets", {"dog": 20, "cat": 20}, suffix="bmp")
    before = open_source(str(root))
    victim, other = root / "dog" / "003.bmp", root / "cat" / "004.bmp"
    times = victim.stat().st_atime_ns, victim.stat().st_mtime_ns
    content = bytearray(victim.read_bytes())
    content[-1] ^= 1  # a pixel
    victim.write_bytes(content)
    os.utime(victim, ns=times)  # the same size and time: only that something changed is left
    other.write_bytes(b"nonsense")
    (root / "cat" / "005.bmp").unlink()
    make_folder(root, {"new": 20}, suffix="bmp", seed=5)
    reads.clear()
    after = open_source(str(root))
    assert sorted(reads) == sorted(["003.bmp", "004.bmp", *(f"{i:03d}.bmp" for i in range(20))])
    assert not same(before, after)
    assert len(after.skipped) == 1
    reads.clear()
    assert same(after, open_source(str(root)))
    assert reads == []


def test_a_file_that_may_still_be_written_to_is_not_kept(tmp_path, reads, monkeypatch):
    monkeypatch.setattr(findings, "_SETTLED_NS", 10**12)
    root = make_folder(tmp_path / "pets", {"dog": 20, "cat": 20})
    for _ in range(2):
        open_source(str(root))
    assert len(reads) == 80


def test_a_passing_failure_is_not_kept(tmp_path, reads, monkeypatch):
    """What lacked memory, or could not be read from the network, is an image the next time."""
    root = make_folder(tmp_path / "pets", {"dog": 20, "cat": 20})
    with monkeypatch.context() as patch:
        for number, cause in enumerate((MemoryError("none"), OSError(5, "Input/output error"))):
            patch.setattr(
                "PIL.Image.open", lambda path, formats, cause=cause: (_ for _ in ()).throw(cause)
            )
            with pytest.raises(DataError, match="0 usable"):
                open_source(str(root))
            assert len(reads) == 40 * (number + 1)
    assert open_source(str(root)).skipped == ()


def cut(path):
    path.write_bytes(path.read_bytes()[:-1])


def flip_a_digest(path):
    content = path.read_text()
    place = content.index('", ""]') - 1
    digit = "0" if content[place] != "0" else "1"
    path.write_text(content[:place] + digit + content[place + 1 :])


@pytest.mark.parametrize(
    "damage", [cut, flip_a_digest, lambda p: p.write_bytes(b"\xff"), lambda p: p.unlink()]
)
def test_a_damaged_cache_counts_for_nothing(tmp_path, reads, damage):
    root = make_folder(tmp_path / "pets", {"dog": 20, "cat": 20})
    one = open_source(str(root))
    (kept,) = [path for path in kept_in(tmp_path) if path.is_file()]
    damage(kept)
    reads.clear()
    assert same(one, open_source(str(root)))
    assert len(reads) == 40
    reads.clear()
    assert same(one, open_source(str(root)))
    assert reads == []


def test_another_release_looks_for_itself(tmp_path, reads, monkeypatch):
    root = make_folder(tmp_path / "pets", {"dog": 20, "cat": 20})
    open_source(str(root))
    monkeypatch.setattr("PIL.__version__", "0.9")
    open_source(str(root))
    assert len(reads) == 80


def test_what_was_found_before_a_stop_is_kept(tmp_path, reads, monkeypatch):
    monkeypatch.setattr(findings, "_CHUNK", 4)
    monkeypatch.setattr("cnnedge.data.findings.workers", lambda: 1)
    root = make_folder(tmp_path / "pets", {"dog": 40, "cat": 40})

    def stop(task, done, total):
        if done >= 20:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        open_source(str(root), progress=stop)
    before = set(reads)
    reads.clear()
    open_source(str(root))
    assert len(before) < 80
    assert len(reads) == 60


def test_small_folders_and_full_disks_leave_nothing(tmp_path, reads, monkeypatch):
    root = make_folder(tmp_path / "pets", {"dog": 20, "cat": 20})
    with monkeypatch.context() as patch:
        patch.setattr(findings, "_FEWEST", 41)
        open_source(str(root))
    assert kept_in(tmp_path) == []

    def full(descriptor):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", full)
        open_source(str(root))
    assert [path for path in kept_in(tmp_path) if path.is_file()] == []
    assert len(reads) == 80


def test_what_is_hashed_once_is_not_hashed_again(tmp_path, monkeypatch):
    root = make_folder(tmp_path / "train", {"a": 20, "b": 20}).parent
    make_folder(tmp_path / "val", {"a": 5, "b": 5}, seed=1)
    for data in (open_source(str(root)), open_source(str(root / "train"))):
        for part in splits(data):
            for one in (part, part.take(7, seed=0), part.select(np.array([3, 1]))):
                assert list(one.digests) == [item_digest(item) for item in one.items]
                assert one.hashed() is one
                fresh = Split(one.name, one.items, one.targets)
                assert one.digest() == fresh.digest() == fresh.hashed().digest()
    monkeypatch.setattr("cnnedge.data.split.item_digest", None)
    assert data.test.digest()


def test_classes_known_to_the_test_split_alone_are_refused(tmp_path):
    make_folder(tmp_path / "train", {"a": 5, "b": 5})
    make_folder(tmp_path / "val", {"a": 5, "c": 5})
    with pytest.raises(DataError, match=r"classes that .* lacks: c"):
        open_source(str(tmp_path))


def test_a_misspelt_source_is_explained():
    with pytest.raises(DataError, match="did you mean digits"):
        open_source("digit")
    with pytest.raises(DataError, match="a folder of class sub-folders"):
        open_source("no/such/folder")
