"""What to build: a recipe, from the command line or a TOML file, validated before any work."""

from __future__ import annotations

import os
from collections.abc import Mapping
from math import isqrt
from pathlib import Path
from typing import Annotated, Any, Literal

from msgspec import Meta, Struct, to_builtins

from cnnedge.documents import Points, hold_options
from cnnedge.errors import CnnEdgeError
from cnnedge.files import read_toml
from cnnedge.image import MOST_PIXELS
from cnnedge.manifest import MANIFEST, Precision

# Images larger than what is read of any file are no network's input.
Pixels = Annotated[int, Meta(ge=1, le=isqrt(MOST_PIXELS))]
AtLeastOne = Annotated[int, Meta(ge=1)]


class Recipe(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Everything that decides what `cnnedge export` builds.

    Attributes:
        model: A built-in model's name, or the path of a `.keras` file.
        data: A data source: "digits", "signs", "signs:N" or a folder; None: the one the model was
            trained on, or the embedded digits for a built-in model without trained weights.
        precision: What to build. FP32 is always built: the others are derived from it.
            "int8-weight" and "int4-weight" store the dense layers' weights in so many bits, block
            by block, and compute the rest in FP32.
        max_drop: The largest top-1 drop to the Keras reference that passes, in points.
        input: "uint8" (scaling in the graph) or "float32" (the Keras signature).
        preprocess: What the network wants of its pixels; None: as the `.keras` file notes.
        resize: How an image is fitted to the input; None: as noted, else "stretch".
        labels: A file with one label a line; None: as noted, else the data's.
        output: Which of a model's outputs classifies, by name; None: its only one.
        image_size: ``(height, width)``, for a built-in model or one that leaves it open.
        classes: Number of classes of a built-in model without trained weights.
        calibration_images: At most so many images give the activation ranges.
        calibration: How the part of an activation's range is chosen that is kept.
        guard: Whether an INT8 variant that fails its gate is worked on until it holds.
        dot_product: Whether the CPU that will run INT8 has an int8 dot product (VNNI, or Arm's);
            without one, weights keep 7 bits so that sums cannot saturate. None: as this machine.
        test_images: At most so many images are verified on; None: the whole test split, or 32
            where the weights are random.
        engines: TensorRT plans to build into the bundle: "tensorrt" (on this machine's GPU), "rtx".
        max_batch: The largest batch that those take.
        bench_seconds: About how long the latencies are measured, warm-up aside.
        seed: Seeds weights, splits and subsets; None: 0, and splits as the model was trained on.

    Examples:
        >>> recipe = cnnedge.Recipe(model="digits.keras", precision=("int8",), max_drop=1.0)
        >>> recipe.input
        'uint8'
    """

    model: str
    data: str | None = None
    precision: tuple[Precision, ...] | None = None
    max_drop: Points = 0.5
    input: Literal["uint8", "float32"] = "uint8"
    preprocess: Literal["none", "unit", "tf", "caffe", "torch"] | None = None
    resize: Literal["stretch", "crop", "letterbox"] | None = None
    labels: str | None = None
    output: str | None = None
    image_size: tuple[Pixels, Pixels] | None = None
    classes: Annotated[int, Meta(ge=2, le=1_000_000)] = 1000
    calibration_images: AtLeastOne = 128
    calibration: Literal["minmax", "percentile", "entropy", "mse"] = "minmax"
    guard: bool = True
    dot_product: bool | None = None
    test_images: AtLeastOne | None = None
    engines: tuple[Literal["tensorrt", "rtx"], ...] = ()
    max_batch: AtLeastOne = 8
    bench_seconds: Annotated[float, Meta(gt=0)] = 8.0
    seed: Annotated[int, Meta(ge=0, lt=2**32)] | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return all of it that is not None, as JSON-able data."""
        return {key: value for key, value in to_builtins(self).items() if value is not None}


def make_recipe(*, options: Mapping[str, str] | None = None, **fields: Any) -> Recipe:
    """Return a validated recipe.

    Args:
        options: What a message calls a field that was given as an option, such as "--precision".
        **fields: Those of `Recipe`.

    Raises:
        CnnEdgeError: a field is unknown or has a value it may not have; the message names it.

    Examples:
        >>> cnnedge.make_recipe(model="alexnet", image_size=(96, 96)).max_drop
        0.5
        >>> cnnedge.make_recipe(model="alexnet", colour="red")
        Traceback (most recent call last):
        cnnedge.errors.CnnEdgeError: ...colour...
    """
    help_of = "see `cnnedge export --help`"
    return hold_options(fields, Recipe, "recipe", fix=help_of, options=options)


def read_recipe(path: Path | str) -> Recipe:
    """Read a recipe from a TOML file, or from the manifest of a bundle that was built by it.

    Paths in it are relative to that file, where they lead somewhere from there.

    Raises:
        CnnEdgeError: the file is missing, is no TOML and no manifest, or holds a wrong value.
    """
    path = Path(path)
    fields = _of_manifest(path) if path.name == MANIFEST else read_toml(path, "recipe", see=_SEE)
    for key in ("model", "labels", "data"):
        value = fields.get(key)
        if isinstance(value, str) and os.path.exists(path.parent / value):
            fields[key] = str(path.parent / value)
    return make_recipe(**fields)


_SEE = "export/README.md"


def _of_manifest(path: Path) -> dict[str, Any]:
    from cnnedge.bundle import read_manifest

    recipe = read_manifest(path.parent, path.parent).recipe
    if recipe is None:
        raise CnnEdgeError(
            f"{path} names no recipe: an earlier cnnedge wrote it", fix=f"write one; see {_SEE}"
        )
    return dict(recipe)
