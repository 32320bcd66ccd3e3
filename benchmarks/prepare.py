"""Make what the suites measure: AlexNet v1 trained on real digits, VGG-16 with random weights.

    python benchmarks/prepare.py build/bench

What is there already is kept.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from cnnedge.backends.keras import ModelNote, save_model
from cnnedge.data import open_source
from cnnedge.pipeline import export_bundle
from cnnedge.recipe import make_recipe
from cnnedge.source import resolve
from cnnedge.train import TrainOptions, train_model

EPOCHS = 3


def main() -> None:
    """Make every file that is missing."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)
    alexnet, vgg = folder / "alexnet_v1.keras", folder / "vgg16.keras"
    if not alexnet.exists():
        tell(f"training {alexnet}")
        train_model("alexnet_v1", open_source("digits"), alexnet, TrainOptions(epochs=EPOCHS))
    if not vgg.exists():
        tell(f"drawing the weights of {vgg}")
        draw_weights("vgg16", vgg)
    for recipe, bundle in (
        (make_recipe(model=str(alexnet), bench_seconds=1), alexnet.with_suffix("")),
        # By its name: a built-in model's seeded weights are the ones just drawn. They lose no
        # accuracy that could be guarded, and 16 images calibrate a speed.
        (
            make_recipe(
                model="vgg16",
                precision=("fp32", "int8"),
                calibration_images=16,
                guard=False,
                bench_seconds=1,
            ),
            vgg.with_suffix(""),
        ),
    ):
        if not bundle.exists():
            tell(f"exporting {bundle}")
            export_bundle(recipe, bundle)


def draw_weights(model: str, path: Path) -> None:
    """Save a built-in model with its seeded initial weights."""
    source, _ = resolve(make_recipe(model=model))
    note = ModelNote(model, source.labels, source.image, source.normalization, weights="random")
    save_model(source.model, path, note)


def tell(text: str) -> None:
    """Say what is being done."""
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
