"""A self-test on images of one class shows that a model still gives one answer, and no more."""

from __future__ import annotations

import json

import numpy as np
import pytest

from cnnedge.data import open_source
from cnnedge.data.split import Split
from cnnedge.selftest import GOLDEN, golden_images


def split_of(counts, answer_of=lambda target, at: target, classes=None):
    """Return a split sorted by class, as folders are, and answers to it."""
    targets = np.repeat(np.arange(len(counts)), counts)
    answers = np.zeros((len(targets), classes or len(counts)))
    answers[range(len(targets)), [answer_of(t, at) for at, t in enumerate(targets)]] = 1
    return Split("test", list(range(len(targets))), targets), answers


@pytest.mark.parametrize(
    "counts", [(20, 20), (50, 3, 3), (9,) * 8, (40,) * 12, (1, 60, 1), (30, 1, 30, 2, 30, 4, 30, 9)]
)
def test_there_is_one_of_each_of_the_commonest_classes(counts):
    split, answers = split_of(counts)
    chosen = golden_images(split, answers)
    assert len(set(chosen)) == len(chosen) == min(GOLDEN, sum(counts))
    assert chosen == sorted(chosen)
    assert len(set(split.targets[chosen])) == min(GOLDEN, len(counts))
    assert chosen == golden_images(split, answers)


def test_rare_classes_give_way():
    counts = [2, 30, 2, 30, 30, 30, 2, 30, 30, 30, 30]
    split, answers = split_of(counts)
    found = set(split.targets[golden_images(split, answers)])
    assert found == {k for k, count in enumerate(counts) if count == 30}


def test_classes_share_the_images_evenly():
    split, answers = split_of((100, 10, 10))
    assert sorted(np.bincount(split.targets[golden_images(split, answers)])) == [2, 3, 3]


@pytest.mark.parametrize("other", [0, 19, 20, 39, 159])
def test_answers_differ_where_any_do(other):
    """A model that gives the first answer to all images but one."""
    for counts in ((20,) * 8, (40, 40, 80), (160,)):
        split, answers = split_of(counts, lambda t, at: int(at == other), classes=8)
        assert len(set(answers[golden_images(split, answers)].argmax(1))) == 2


def test_a_test_split_smaller_than_a_self_test_is_taken_whole():
    split, answers = split_of((2, 1, 1))
    assert golden_images(split, answers) == [0, 1, 2, 3]


@pytest.mark.tf
def test_a_bundle_of_folders_holds_images_of_all_classes(photos, tmp_path):
    import keras
    from keras import layers

    from cnnedge.pipeline import export_bundle
    from cnnedge.recipe import make_recipe

    root = photos(3, count=50)  # ten of each are tested on: the first eight are all of ``a``
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [
            keras.Input((32, 32, 3)),
            layers.Conv2D(8, 3, strides=2, activation="relu"),
            layers.GlobalAveragePooling2D(),
            layers.Dense(3, activation="softmax"),
        ]
    )
    model.save(tmp_path / "m.keras")
    recipe = make_recipe(
        model=str(tmp_path / "m.keras"),
        data=str(root),
        preprocess="unit",
        precision=("fp32",),
        bench_seconds=0.05,
    )
    bundle, _ = export_bundle(recipe, tmp_path / "m")
    index = json.loads((bundle.root / "selftest" / "selftest.json").read_text())
    known = {
        item.read_bytes(): int(target)
        for part in [open_source(str(root)).test]
        for item, target in zip(part.items, part.targets, strict=True)
    }
    classes = [known[(bundle.root / entry["file"]).read_bytes()] for entry in index["images"]]
    assert sorted(np.bincount(classes)) == [2, 3, 3]
