"""Record the toy and its bundle: `python tests/record_toy.py`, in the repository's root.

A classifier of digits, trained for a few seconds to about 97 %, and what `cnnedge export` makes of
it. `tests/test_recorded_toy.py` builds the bundle anew and compares.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np

SIZE = 32
FOLDER = Path(__file__).parent / "recorded" / "toy"


def train_toy() -> Any:
    """Three convolutions and two dense layers."""
    import keras
    from keras import layers

    from cnnedge.data import open_source
    from cnnedge.image import ImageContract, normalize

    digits, contract = open_source("digits"), ImageContract(SIZE, SIZE)
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [
            keras.Input((SIZE, SIZE, 3)),
            layers.Conv2D(16, 3, padding="same", activation="relu", name="conv1"),
            layers.MaxPooling2D(2, name="pool1"),
            layers.Conv2D(24, 3, padding="same", activation="relu", name="conv2"),
            layers.MaxPooling2D(2, name="pool2"),
            layers.Conv2D(32, 3, padding="same", activation="relu", name="conv3"),
            layers.MaxPooling2D(2, name="pool3"),
            layers.Flatten(name="flatten"),
            layers.Dense(48, activation="relu", name="fc1"),
            layers.Dense(10, name="fc2"),
            layers.Softmax(name="softmax"),
        ],
        name="toy",
    )
    images = np.stack([digits.train.tensor(i, contract) for i in range(len(digits.train))])
    model.compile(keras.optimizers.Adam(3e-3), "sparse_categorical_crossentropy")
    model.fit(normalize(images, "unit"), digits.train.targets, batch_size=64, epochs=5, verbose=0)
    return model


def save_toy(path: Path) -> None:
    """Write the toy as cnnedge's own training would have saved it."""
    from cnnedge.backends.keras import ModelNote, save_model
    from cnnedge.data import open_source
    from cnnedge.image import ImageContract

    contract = ImageContract(SIZE, SIZE)
    labels = open_source("digits").labels
    note = ModelNote("toy", labels, contract, "unit", data="digits", seed=0)
    save_model(train_toy(), path, note)


def export_toy(model: Path, out: Path) -> None:
    """Export it in `model`'s folder: the bundle names the file, not where it lies."""
    from cnnedge.pipeline import export_bundle
    from cnnedge.recipe import make_recipe

    # Weights of 7 bits answer alike on every CPU.
    recipe = make_recipe(model=model.name, max_drop=2.0, bench_seconds=0.2, dot_product=False)
    before = Path.cwd()
    os.chdir(model.parent)
    try:
        export_bundle(recipe, out)
    finally:
        os.chdir(before)


if __name__ == "__main__":
    shutil.rmtree(FOLDER, ignore_errors=True)
    FOLDER.mkdir(parents=True)
    save_toy(FOLDER / "toy.keras")
    # No test may see how busy the machine was that recorded it (conftest.py, quiet_machine).
    with (
        patch("cnnedge.benchmark.load.read_cpu_times", lambda: None),
        patch("cnnedge.benchmark.interleaved.instabilities", lambda *of: []),
    ):
        export_toy(FOLDER / "toy.keras", FOLDER / "bundle")
