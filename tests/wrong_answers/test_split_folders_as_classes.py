"""``train/`` beside ``validation/`` is a split, whatever it is called; it is never a class."""

from __future__ import annotations

import shutil
import unicodedata

import numpy as np
import pytest
from PIL import Image

from cnnedge.data import open_source
from cnnedge.data.split import item_digest
from cnnedge.errors import DataError


def write(root, *folders, count=6):
    """Write photos of which no two are the same."""
    for number, folder in enumerate(folders):
        (root / folder).mkdir(parents=True, exist_ok=True)
        rng = np.random.default_rng((number, len(folder)))
        for at in range(count):
            pixels = rng.integers(0, 256, (12, 12, 3), np.uint8)
            Image.fromarray(pixels).save(root / folder / f"{at}.png")
    return root


def opened(root):
    return open_source(str(root))


def held_out(data, root):
    """The folders of the test images, relative to the source."""
    return {item.relative_to(root).parts[0] for item in data.test.items}


PAIRS = [
    ("train", "validation"),
    ("train", "valid"),
    ("Training", "Testing"),
    ("Train", "Val"),
    ("TRAIN", "TEST"),
    ("training", "evaluation"),
    ("train", "eval"),
    ("train", "dev"),
    ("training_set", "test_set"),
    ("trainset", "testset"),
    ("seg_train", "seg_test"),
    ("train2017", "val2017"),
    ("train-images", "holdout"),
]


@pytest.mark.parametrize(("train", "test"), PAIRS)
def test_the_usual_names_are_splits(tmp_path, train, test):
    write(tmp_path, f"{train}/cat", f"{train}/dog", f"{test}/cat", f"{test}/dog")
    data = opened(tmp_path)
    assert data.labels == ("cat", "dog")
    assert held_out(data, tmp_path) == {test}
    assert len(data.test) == 12
    assert {item.relative_to(tmp_path).parts[0] for item in data.train.items} == {train}
    assert {item.relative_to(tmp_path).parts[0] for item in data.calibration.items} == {train}


@pytest.mark.parametrize(
    ("held", "tests"),
    [
        (("test", "val"), "test"),
        (("Testing", "validation"), "Testing"),
        (("eval", "valid"), "eval"),
        (("test", "eval", "dev"), "test"),
    ],
)
def test_of_several_the_test_split_tests_and_the_others_are_left_alone(tmp_path, held, tests):
    names = ("train", *held)
    write(tmp_path, *(f"{name}/{label}" for name in names for label in ("a", "b")))
    data = opened(tmp_path)
    assert held_out(data, tmp_path) == {tests}
    for name in set(held) - {tests}:
        assert any(f"{name}: " in line and "test split" in line for line in data.skipped)
    seen = [item_digest(item) for part in (data.train, data.calibration) for item in part.items]
    assert not {item_digest(item) for item in data.test.items} & set(seen)


@pytest.mark.parametrize("name", ["train", "Train", "training", "images/train", "train/images"])
def test_train_alone_is_divided(tmp_path, name):
    data = opened(write(tmp_path, f"{name}/a", f"{name}/b"))
    assert data.labels == ("a", "b")
    assert len(data.train) + len(data.calibration) + len(data.test) == 12


def test_a_folder_around_the_splits_is_looked_through(tmp_path):
    for around in ("images", "data", "flowers"):
        root = tmp_path / around / "flowers"
        inner = root / around
        write(inner, *(f"{split}/{label}" for split in ("train", "val") for label in "ab"))
        data = opened(root)
        assert data.labels == ("a", "b")
        assert held_out(data, inner) == {"val"}
    kaggle = tmp_path / "archive"
    write(kaggle, *(f"seg_{s}/seg_{s}/{c}" for s in ("train", "test") for c in ("sea", "wood")))
    write(kaggle, "seg_pred/seg_pred")
    data = opened(kaggle)
    assert data.labels == ("sea", "wood")
    assert held_out(data, kaggle) == {"seg_test"}


@pytest.mark.parametrize(
    "classes",
    [
        ("bus", "car", "train"),
        ("bus", "test", "train"),
        ("bus/city", "car/old", "train/steam"),
        ("bus", "car", "train/photos"),
        ("bus/city", "bus/tour", "train/steam", "train/diesel"),
        ("dev", "ops"),
    ],
)
def test_a_class_may_be_called_as_a_split_is(tmp_path, classes):
    data = opened(write(tmp_path, *classes))
    assert data.labels == tuple(sorted({name.split("/")[0] for name in classes}))


def test_photos_of_a_split_without_classes_are_no_class(tmp_path):
    """A competition's test photos lie in one folder: their classes are the question."""
    write(tmp_path, "train/a", "train/b", "test")
    data = opened(tmp_path)
    assert data.labels == ("a", "b")
    assert held_out(data, tmp_path) == {"train"}
    assert any("test: " in line for line in data.skipped)


REFUSED = [
    (("fold1/a", "fold1/b", "fold2/a", "fold2/b"), "fold1, fold2 .* same sub-folders .a, b."),
    (("one/a", "one/b", "one/c", "two/a", "two/b"), "one, two .* same sub-folders .a, b."),
    (("cat/train", "cat/test", "dog/train", "dog/test"), "cat, dog .* same sub-folders"),
    (("train/a", "train/b", "rest/a", "rest/b"), "rest, train .* same sub-folders"),
    (("train/x/a", "train/x/b", "train/y/a", "train/y/b"), "x, y in .*train hold the same"),
    (("train/a", "train/b", "unlabelled"), "holds train .* beside unlabelled"),
    (("train", "test"), "no train folder with class folders"),
    (("train", "validation"), "no train folder with class folders"),
    (("val/a", "val/b", "test/a", "test/b"), "no train folder"),
    (("train/a", "train/b", "Train/a", "Train/b"), "Train and train"),
    (("train/a", "train/b", "val/a", "val/b", "validation/a", "validation/b"), "val and valid"),
    (("train/a", "train/b", "val/a", "val/c"), "has classes .* lacks: c; it lacks .* has: b"),
    (("train/a", "train/b", "train/c", "val/a", "val/b"), "lacks classes .*train has: c"),
    (("train/a", "train/b", "test/a", "test/b", "val/a", "val/z"), "val has classes"),
    (("train/a", "train/b", "val/a"), "val lacks classes"),
]


@pytest.mark.parametrize(("folders", "message"), REFUSED)
def test_what_may_be_either_is_refused_by_name(tmp_path, folders, message):
    write(tmp_path, *folders)
    with pytest.raises(DataError, match=message) as caught:
        opened(tmp_path)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value).replace(str(tmp_path), "")) <= 300


def test_one_kind_of_sub_folder_in_every_class_is_no_split(tmp_path):
    """Tiny ImageNet has its photos in ``n01443537/images``."""
    data = opened(write(tmp_path, "n01443537/images", "n01629819/images"))
    assert data.labels == ("n01443537", "n01629819")


def test_splits_written_in_two_forms_of_unicode_have_the_same_classes(tmp_path):
    composed, apart = (unicodedata.normalize(form, "café") for form in ("NFC", "NFD"))
    write(tmp_path, f"train/{composed}", "train/bar", f"test/{apart}", "test/bar")
    data = opened(tmp_path)
    assert data.labels == ("bar", composed)
    assert len(data.test) == 12
    shutil.rmtree(tmp_path / "test")
    write(tmp_path, f"train/{apart}")
    with pytest.raises(DataError, match="two folders called"):
        opened(tmp_path)


def test_a_name_that_is_no_label_is_refused(tmp_path):
    write(tmp_path, "a", "b\nc")
    with pytest.raises(DataError, match="cannot be a label"):
        opened(tmp_path)
