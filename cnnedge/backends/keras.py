"""Keras models on disk and as the reference that every exported variant is held against."""

from __future__ import annotations

import json
import re
import struct
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from cnnedge.protocols import Runner
from cnnedge.quiet import import_tensorflow

import_tensorflow()  # before anything else loads it, with all that it prints

import keras
import numpy as np

from cnnedge.backends.keras_outputs import find_output
from cnnedge.documents import Labels, read_as
from cnnedge.errors import ModelError, first_line, one_line
from cnnedge.files import atomic_path, require_keras_file
from cnnedge.head import LOGITS, SINGLE, as_probabilities, read_head
from cnnedge.image import ImageContract, normalizations_of, normalize
from cnnedge.kind import HDF5, kind_of
from cnnedge.sections import Weights

NOTE_ENTRY = "cnnedge.json"
ASKED_AT_ONCE = 8  # images, so that what a large network holds of them stays small


@dataclass(frozen=True)
class ModelNote:
    """What a `.keras` file cannot say by itself: what its input and its outputs mean.

    It travels as one more entry of the `.keras` zip, which Keras itself ignores.
    """

    model: str
    labels: Labels
    image: ImageContract
    normalization: str
    weights: Weights = "trained"
    data: str | None = None
    seed: int | None = None
    metrics: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> str:
        """Return the note as a JSON document."""
        return json.dumps(asdict(self) | {"image": self.image.to_dict()}, indent=1)

    @staticmethod
    def from_json(text: str | bytes) -> ModelNote:
        """Read what `to_json` wrote.

        Raises:
            ValueError: it is no note; the message says why.
        """
        note = read_as(text, ModelNote)
        if note.normalization not in normalizations_of(note.image.channels):
            raise ValueError(f"unknown normalization {note.normalization[:40]!r}")
        return note


def save_model(model: keras.Model, path: Path | str, note: ModelNote) -> None:
    """Write ``model`` and its note to a `.keras` file, whole or not at all.

    Raises:
        ModelError: ``path`` does not end in `.keras`.
        CnnEdgeError: the file cannot be written.
    """
    path = Path(path)
    require_keras_file(path)
    with atomic_path(path) as temporary:
        model.save(temporary)
        with zipfile.ZipFile(temporary, "a") as archive:
            archive.writestr(NOTE_ENTRY, note.to_json())


def load_model(path: Path | str) -> tuple[keras.Model, ModelNote | None]:
    """Load a `.keras` file, and its note where cnnedge wrote one.

    Raises:
        ModelError: the file is missing, truncated, not a Keras model, or needs code it lacks.
    """
    # Registers the layers of the built-in models, so that their files load.
    from cnnedge.models import alexnet, layers, vgg  # noqa: F401

    path = Path(path)
    if not path.is_file():
        raise ModelError(f"no model file {path}: it is {kind_of(path)}", fix="check the path")
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
            note = ModelNote.from_json(archive.read(NOTE_ENTRY)) if NOTE_ENTRY in names else None
    # zipfile raises the last two for a flipped bit that says "encrypted" or another compression.
    except (
        *(zipfile.BadZipFile, zlib.error, struct.error),
        *(OSError, EOFError, RuntimeError, NotImplementedError),
    ) as error:
        found = kind_of(path)
        raise ModelError(
            f"{path} is not a whole .keras file, it is {found} ({error})",
            fix=_CONVERT if found == HDF5 else "save or copy the model again",
        ) from error
    except (KeyError, TypeError, ValueError) as error:
        raise ModelError(
            f"the note {NOTE_ENTRY} inside {path} is damaged ({error})",
            fix="train or save the model again",
        ) from error
    try:
        model = keras.saving.load_model(path, compile=False)
    except Exception as error:  # Keras raises whatever its readers raise
        raise _unloadable(path, error) from error
    return model, note


_CONVERT = 'convert it: keras.models.load_model("x.h5").save("x.keras")'
_UNKNOWN = re.compile(r"(?:Could not locate|Unknown) (class|function|layer|object):? '?([\w.>]+)")
_ENCOUNTERED = "Exception encountered: "


def _unloadable(path: Path, error: Exception) -> ModelError:
    """Return what Keras' reader says, which puts the cause behind the whole configuration."""
    text = str(error)
    if missing := _UNKNOWN.search(text):
        return ModelError(
            f"Keras cannot load {path}: it does not know the {missing[1]} "
            f"{one_line(missing[2], 60)!r}, whose code is not in the file",
            fix="register it: @keras.saving.register_keras_serializable() where it is defined, and "
            "import that before; or save the model without it",
        )
    _, _, cause = text.rpartition(_ENCOUNTERED)
    return ModelError(
        f"Keras cannot load {path}: {first_line(ValueError(cause or repr(error)))}",
        fix="check that it is whole, and save it again with the Keras that is installed",
    )


def predict(
    model: keras.Model,
    batch: np.ndarray,
    normalization: str,
    *,
    output: int = 0,
    batch_size: int = 32,
    move: Callable[[np.ndarray], np.ndarray] = lambda values: values,
) -> np.ndarray:
    """Return the reference answers to uint8 images.

    Args:
        model: A Keras classifier.
        batch: Images, uint8 ``[N, H, W, C]``.
        normalization: What the graph wants of its pixels, a name in `NORMALIZATIONS`.
        output: Which of the model's outputs; see `find_output`.
        batch_size: How many images Keras sees at once.
        move: Applied to the normalized values.

    Returns:
        float32 ``[N, classes]``.
    """
    answers = [
        _output(model, move(normalize(batch[i : i + batch_size], normalization)), output).numpy()
        for i in range(0, len(batch), batch_size)
    ]
    return np.concatenate(answers).astype(np.float32, copy=False)


def _output(model: keras.Model, pixels: Any, position: int) -> Any:
    """Call a model and return one of its outputs, a tensor ``[N, classes]``."""
    return keras.tree.flatten(model(pixels, training=False))[position]


def compiled(model: keras.Model, normalization: str, *, output: int = 0) -> Runner:
    """Return the model as one traced ``tf.function``: uint8 ``[N, H, W, C]`` → its answers.

    That is what its latency is measured on. `predict` calls layer by layer and takes longer; it
    is what the answers are held against.
    """
    import tensorflow as tf

    function = tf.function(
        lambda images: _output(model, images, output), autograph=False, reduce_retracing=True
    )
    return lambda batch: function(tf.constant(normalize(batch, normalization))).numpy()


@dataclass(frozen=True)
class KerasReference:
    """A model as its file defines it, called by Keras: what every answer is held against.

    Attributes:
        model: The model; nothing that is done to it for the export is done to this one.
        normalization: What it wants of its pixels.
        emits: "probabilities" or "logits".
        output: Which of the model's outputs; see `find_output`.
    """

    model: keras.Model
    normalization: str
    emits: str | None
    output: int = 0

    def __call__(self, batch: np.ndarray) -> np.ndarray:
        """Return probabilities, float32 ``[N, classes]``, of uint8 images ``[N, H, W, C]``."""
        scores = predict(self.model, batch, self.normalization, output=self.output)
        return as_probabilities(scores, self.emits)


class CompiledReference:
    """The same as one traced ``tf.function``, for its latency; callable from many threads.

    Attributes:
        provider: What runs it.
    """

    def __init__(
        self, model: keras.Model, normalization: str, emits: str | None, *, output: int = 0
    ) -> None:
        import tensorflow as tf

        self.provider = f"TensorFlow {tf.__version__}"
        self._call, self._emits = compiled(model, normalization, output=output), emits

    def __call__(self, batch: np.ndarray) -> np.ndarray:
        """Return probabilities, float32 ``[N, classes]``, of uint8 images ``[N, H, W, C]``."""
        return as_probabilities(self._call(batch).astype(np.float32, copy=False), self._emits)


def open_reference(
    model: str,
    *,
    threads: int | None,
    normalization: str,
    emits: str | None = None,
    output: str | None = None,
) -> CompiledReference:
    """Load a `.keras` file as the reference that latencies are held against.

    Args:
        model: The file.
        threads: Threads of an operation; None: all cores. It is the whole process's setting.
        normalization: What the model wants of its pixels.
        emits: "probabilities" or "logits".
        output: Which of several outputs, by name.
    """
    import tensorflow as tf

    if threads is not None:
        tf.config.threading.set_intra_op_parallelism_threads(threads)
        tf.config.threading.set_inter_op_parallelism_threads(1)
    loaded, _ = load_model(model)
    position = find_output(loaded, output, model)
    return CompiledReference(loaded, normalization, emits, output=position)


def read_emits(
    model: keras.Model,
    images: np.ndarray,
    normalization: str,
    *,
    output: int = 0,
    name: str | None = None,
    rounding: float = SINGLE,
) -> str:
    """Ask a model what it gives, "probabilities" or "logits"; see `cnnedge.head.read_head`.

    Args:
        model: A classifier.
        images: Real images, uint8 ``[N, H, W, C]``.
        normalization: What the model wants of its pixels.
        output: Which of its outputs; see `find_output`.
        name: What messages call it; None: as it calls itself.
        rounding: The unit roundoff of the coarsest type that it computes in.

    Raises:
        ModelError: it gives neither.
    """

    def scores(pixels: np.ndarray) -> np.ndarray:
        parts = (pixels[i : i + ASKED_AT_ONCE] for i in range(0, len(pixels), ASKED_AT_ONCE))
        return np.concatenate([_output(model, part, output).numpy() for part in parts])

    return read_head(scores, images, normalization, name=name or model.name, rounding=rounding)


def ending_in_softmax(model: keras.Model, emits: str | None) -> keras.Model:
    """Return a model that gives probabilities, for converters that take a Keras model whole."""
    if emits != LOGITS:
        return model
    image = keras.Input(model.input_shape[1:])
    return keras.Model(image, keras.layers.Softmax()(model(image)), name=model.name)
