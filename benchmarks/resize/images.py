"""Pictures large enough that their resize matters, and a network trained on smaller ones."""

from __future__ import annotations

import sys
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from cnnedge.bundle import Bundle, open_bundle
from cnnedge.data import open_source
from cnnedge.data.signs import LABELS, camera, drawing
from cnnedge.image import ImageContract, normalize

SIDE = 320  # pixels of a picture
NETWORK = 64  # pixels that the network takes
TEMPLATE = 288  # pixels of a sign before it is seen; the camera enlarges none that is smaller
QUALITY = 90  # of the JPEG
SEED = 7  # of the pictures; the network learns from those of seed 0
DATA = "signs:4000"  # what it learns from: the same camera with 112×112 pixels


def tell(text: str) -> None:
    """Say what is being done."""
    print(text, file=sys.stderr, flush=True)


def sharpen() -> None:
    """Give the road-sign camera of `signs` more pixels: same scenes, finer detail and noise."""
    camera.SIZE, camera._CANVAS, drawing.TEMPLATE_SIZE = SIDE, 2 * SIDE, TEMPLATE
    row, column = np.mgrid[0:SIDE, 0:SIDE].astype(np.float32) / np.float32(SIDE)
    camera._ROW, camera._COLUMN = row, column


def make_images(folder: Path, count: int, workers: int) -> None:
    """Write JPEGs, in a folder for each class."""
    if (folder / ".complete").exists():
        return
    tell(f"drawing {count} pictures")
    for label in LABELS:
        (folder / label).mkdir(parents=True, exist_ok=True)
    with ProcessPoolExecutor(workers, initializer=sharpen) as pool:
        list(pool.map(partial(_draw, folder), range(count), chunksize=20))
    (folder / ".complete").touch()


def _draw(folder: Path, index: int) -> None:
    from PIL import Image

    label = LABELS[camera.label_of(index)]
    picture = Image.fromarray(camera.render(SEED, index))
    picture.save(folder / label / f"{index:05d}.jpg", quality=QUALITY)


def make_bundle(folder: Path, epochs: int) -> Bundle:
    """Train a small network on `DATA`, as cnnedge reads it, and export it."""
    keras_file, bundle = folder / "signs.keras", folder / "signs"
    if not keras_file.exists():
        tell("training")
        _train(keras_file, epochs)
    if not bundle.exists():
        from cnnedge.pipeline import export_bundle
        from cnnedge.recipe import make_recipe

        tell("exporting")
        recipe = make_recipe(
            model=str(keras_file),
            data=DATA,
            precision=("fp32", "int8"),
            max_drop=1.0,
            guard=False,
            bench_seconds=0.2,
        )
        export_bundle(recipe, bundle)
    return open_bundle(bundle)


def _train(path: Path, epochs: int) -> None:
    import keras
    from keras import layers

    from cnnedge.backends.keras import ModelNote, save_model

    contract = ImageContract(NETWORK, NETWORK)
    dataset = open_source(DATA)
    split = dataset.train
    pixels = np.concatenate([batch for batch, _ in split.batches(contract, 256)])
    keras.utils.set_random_seed(0)
    stack: list[Any] = [
        keras.Input((NETWORK, NETWORK, 3)),
        layers.Conv2D(24, 5, strides=2, padding="same", activation="relu", name="conv1"),
    ]
    for block, channels in enumerate((48, 64, 96), start=2):
        convolution = layers.Conv2D(
            channels, 3, padding="same", activation="relu", name=f"conv{block}"
        )
        stack += [convolution, layers.MaxPooling2D(2, name=f"pool{block}")]
    stack += [
        layers.Flatten(name="flatten"),
        layers.Dropout(0.3, name="drop"),
        layers.Dense(128, activation="relu", name="fc1"),
        layers.Dense(len(dataset.labels), name="fc2"),
        layers.Softmax(name="softmax"),
    ]
    model = keras.Sequential(stack, name="signs64")
    schedule = keras.optimizers.schedules.CosineDecay(2e-3, epochs * -(-len(split) // 64))
    model.compile(
        keras.optimizers.Adam(schedule), "sparse_categorical_crossentropy", metrics=["accuracy"]
    )
    model.fit(normalize(pixels, "unit"), split.targets, batch_size=64, epochs=epochs, verbose=2)
    note = ModelNote("signs64", dataset.labels, contract, "unit", data=DATA, seed=0)
    save_model(model, path, note)
