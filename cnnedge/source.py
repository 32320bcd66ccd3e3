"""What a recipe means: the model it names, what its file leaves unsaid, and its data."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cnnedge.data import Dataset, open_source
from cnnedge.data.labels import as_label, difference, in_order, read_labels, same_names
from cnnedge.errors import DataError, MissingExtraError, ModelError
from cnnedge.export import ExportedGraph, classifier_shape, export_onnx
from cnnedge.head import SINGLE
from cnnedge.image import ImageContract, normalizations_of
from cnnedge.kind import HDF5, kind_of
from cnnedge.models import MODELS, build
from cnnedge.preprocessing import check_preprocessing, wanted
from cnnedge.progress import Progress, silent
from cnnedge.protocols import Runner
from cnnedge.recipe import Recipe, make_recipe
from cnnedge.sections import Weights

if TYPE_CHECKING:
    import keras

ASKED = 24  # images that tell what a model gives


@dataclass(frozen=True)
class Source:
    """A model to export, with all that a `.keras` file may leave unsaid.

    Attributes:
        model: The ``keras.Model``.
        name: What it is called.
        labels: One per class.
        image: The image contract.
        normalization: What the network wants of its pixels.
        weights: "random", "trained" or "user".
        origin: The file or the built-in model it comes from.
        dataset: Images to calibrate and verify on.
        may_calibrate: Whether that data is the model's own, so that INT8 ranges mean something.
        seed: What the data is split by: the recipe's, else the one the model was trained with.
        note: What the `.keras` file said by itself, or what was said for it.
        emits: What the model gives, "probabilities" or "logits"; it was asked.
        saved: The model as its file defines it, which answers are held against; None: ``model``.
        output: Which of its outputs classifies, by name; None: it has but one.
        position: The same, as Keras counts them.
        computes_in: The types other than float32 that ``saved`` computes in.
        rounding: The unit roundoff of the coarsest of its types.
        rounds_as: That type where it is coarser than float32: "float16" or "bfloat16".
    """

    model: keras.Model
    name: str
    labels: tuple[str, ...]
    image: ImageContract
    normalization: str
    weights: Weights
    origin: str
    dataset: Dataset
    may_calibrate: bool = True
    seed: int = 0
    note: Any = None
    emits: str | None = None
    saved: keras.Model | None = None
    output: str | None = None
    position: int = 0
    computes_in: tuple[str, ...] = ()
    rounding: float = SINGLE
    rounds_as: str | None = None

    def reference(self) -> Runner:
        """Return the model as Keras runs it: uint8 ``[N, H, W, C]`` → probabilities."""
        from cnnedge.backends.keras import KerasReference

        model = self.model if self.saved is None else self.saved
        return KerasReference(model, self.normalization, self.emits, self.position)

    def to_onnx(self, input_dtype: str = "uint8") -> ExportedGraph:
        """Convert it to its FP32 graph; see `export_onnx`."""
        return export_onnx(
            self.model,
            name=self.name,
            labels=self.labels,
            image=self.image,
            normalization=self.normalization,
            input_dtype=input_dtype,
            emits=self.emits,
        )


def resolve(
    recipe: Recipe, *, without_data: bool = False, progress: Progress = silent
) -> tuple[Source, list[str]]:
    """Load or build the model that a recipe names, and open the data it is verified on.

    Args:
        recipe: What is asked for.
        without_data: Leave the model's own data alone, which need not be there any more; the
            embedded digits stand in for it.
        progress: Told how many of a folder's files are looked at.

    Raises:
        ModelError: there is no such model, or it leaves something unsaid that must be given.
        DataError: the data does not fit the model.
    """
    recipe = make_recipe(**recipe.to_dict())  # one that was made by hand was not looked at
    try:
        from cnnedge.backends.keras import ModelNote
        from cnnedge.backends.keras_network import open_network
        from cnnedge.backends.keras_outputs import find_output
    except ImportError as error:
        raise MissingExtraError(error.name or "keras", "export", purpose="exporting") from error

    warnings: list[str] = []
    path = Path(recipe.model)
    found = Path(f"{recipe.model}.keras")
    if recipe.model in MODELS and not found.is_file():
        height, width = recipe.image_size or (None, None)
        model = build(
            recipe.model, height=height, width=width, classes=recipe.classes, seed=recipe.seed or 0
        )
        warnings.append(
            f"no trained weights for {recipe.model} (looked for ./{found}): exporting random ones; "
            "parity, size and latency count, accuracy means nothing yet"
        )
        find_output(model, recipe.output, recipe.model)
        height, width, channels, _ = classifier_shape(model)
        assert height is not None
        assert width is not None
        contract = ImageContract(height, width, channels)
        labels = tuple(f"class {i}" for i in range(recipe.classes))
        dataset = open_source(recipe.data or "digits", seed=recipe.seed or 0, progress=progress)
        normalization = recipe.preprocess or MODELS[recipe.model].normalization
        source = Source(
            model, recipe.model, labels, contract, normalization, "random", recipe.model, dataset
        )
        return _asked(source), warnings
    if recipe.model in MODELS:
        path = found
    elif path.suffix != ".keras":
        raise _no_keras_file(recipe.model)
    network = open_network(path, recipe.output)
    model, note = network.model, network.note
    if network.computes_in:
        warnings.append(
            f"{path} computes in {', '.join(network.computes_in)}: its graphs start from float32 "
            "instead, and are held against the model as saved, as closely as that rounds"
        )
    if note is None:
        note = _note_of_user_model(model, path, recipe)
    spec = None if without_data else recipe.data or note.data
    # Another seed would make test images of what the model was trained on.
    seed = (note.seed or 0) if recipe.seed is None else recipe.seed
    dataset = open_source(spec or "digits", seed=seed, progress=progress)
    labels = _labels(recipe, note.labels, dataset if spec else None, model)
    if spec is not None:
        dataset = _in_order(dataset, labels)
    image = replace(note.image, resize=recipe.resize or note.image.resize)
    normalization = recipe.preprocess or note.normalization
    _require_fitting(normalization, image)
    if recipe.preprocess or note.weights == "user":
        warnings += check_preprocessing(
            model, image, normalization, dataset.test, labelled=spec is not None
        )
    name = note.model if isinstance(note, ModelNote) else path.stem
    source = Source(
        model,
        name,
        labels,
        image,
        normalization,
        note.weights if spec is not None or note.weights == "random" else "user",
        path.name,
        dataset,
        may_calibrate=spec is not None,
        seed=seed,
        note=replace(note, labels=labels, image=image, normalization=normalization),
        saved=network.saved,
        output=recipe.output,
        position=network.position,
        computes_in=network.computes_in,
        rounding=network.rounding,
        rounds_as=network.rounds_as,
    )
    return _asked(source), warnings


def _require_fitting(normalization: str, image: ImageContract) -> None:
    fitting = normalizations_of(image.channels)
    if normalization not in fitting:
        raise ModelError(
            f"--preprocess {normalization} has a number for each of three channels, and the model "
            f"takes {image.channels}",
            fix=f"choose one of {', '.join(fitting)}",
        )


def _asked(source: Source) -> Source:
    """Ask a model on some images of its data, else of the stand-in's, what it gives."""
    from cnnedge.backends.keras import read_emits

    some = source.dataset.test.take(ASKED, seed=0)
    images = np.concatenate([batch for batch, _ in some.batches(source.image, ASKED)])
    emits = read_emits(
        source.model if source.saved is None else source.saved,
        images,
        source.normalization,
        output=source.position,
        name=source.origin,
        rounding=source.rounding,
    )
    return replace(source, emits=emits)


def _note_of_user_model(model: keras.Model, path: Path, recipe: Recipe) -> Any:
    """Say for a user's own `.keras` file what it does not say itself, or refuse to guess."""
    from cnnedge.backends.keras import ModelNote

    height, width, channels, _ = classifier_shape(model)
    if recipe.image_size is not None:
        height, width = height or recipe.image_size[0], width or recipe.image_size[1]
    if height is None or width is None:
        raise ModelError(f"{path} takes images of any size", fix="pass --image-size HEIGHT,WIDTH")
    contract = ImageContract(height, width, channels)
    normalization = recipe.preprocess or wanted(model, contract, str(path))
    return ModelNote(path.stem, (), contract, normalization, weights="user")


def _labels(
    recipe: Recipe, noted: tuple[str, ...], dataset: Dataset | None, model: keras.Model
) -> tuple[str, ...]:
    classes = classifier_shape(model)[3]
    if recipe.labels is not None:
        known = noted or (() if dataset is None else dataset.labels)
        labels = read_labels(Path(recipe.labels), known)
        if same_names(labels, noted) and list(map(as_label, noted)) != list(labels):
            raise DataError(
                f"{recipe.labels} has the labels of {recipe.model} in another order than its file",
                fix="leave --labels out: the file knows the order of its outputs",
            )
    elif noted:
        labels = noted
    elif dataset is not None:
        labels = dataset.labels
    else:
        labels = tuple(f"class {i}" for i in range(classes))
    if len(labels) != classes:
        raise DataError(
            f"{len(labels)} labels for a model of {classes} classes",
            fix="give one label a line with --labels, in the order of the output",
        )
    return labels


def _in_order(dataset: Dataset, labels: tuple[str, ...]) -> Dataset:
    """Return the data with its classes numbered as the model's outputs are."""
    found = in_order(dataset, labels)
    if found is None:
        raise DataError(
            f"{dataset.spec} has the classes {_brief(dataset.labels)}, the model has "
            f"{_brief(labels)} ({difference(dataset.labels, labels)})",
            fix="give the data that the model was trained on, or its labels with --labels",
        )
    return found


def _no_keras_file(name: str) -> ModelError:
    found = kind_of(name)
    if found == "not there":
        known = ", ".join(MODELS)
        return ModelError(
            f"no model {name!r}", fix=f"give a .keras file, a recipe or one of: {known}"
        )
    fixes = {
        HDF5: 'convert it: keras.models.load_model("x.h5").save("x.keras")',
        "a Keras model": "let its name end in .keras",
        "a bundle": "it is exported already: see `cnnedge verify`, `package` and `bench`",
        "a bundle's zip archive": "it is exported already: see `cnnedge verify` and `bench`",
        "an ONNX model": "give the .keras file that it was exported from",
        "a TensorFlow SavedModel": 'load it where it was made, and model.save("x.keras")',
    }
    other = "give a .keras file, a recipe .toml or the name of a built-in model"
    return ModelError(f"{name} is {found}, and no .keras file", fix=fixes.get(found, other))


def _brief(labels: tuple[str, ...]) -> str:
    head = ", ".join(labels[:3])
    return f"{len(labels)} ({head}{', …' if len(labels) > 3 else ''})"
