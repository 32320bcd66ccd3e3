"""A user's `.keras` file, twice: as it is, and as the network that is exported."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import keras

from cnnedge.backends.keras import ModelNote, load_model
from cnnedge.backends.keras_outputs import find_output, only_output
from cnnedge.backends.keras_precision import coarsest, computes_in, load_in_float32, roundoff
from cnnedge.head import SINGLE


@dataclass(frozen=True)
class Network:
    """A model in two forms, which are one where nothing had to be done to it.

    Attributes:
        saved: As the file defines it: what every answer is held against.
        model: In float32, with one output, a tensor: what is exported.
        note: What cnnedge noted in the file, or None.
        position: Which of the outputs of ``saved`` classifies; see `find_output`.
        computes_in: The types other than float32 that ``saved`` computes in.
        rounding: The unit roundoff of the coarsest of its types.
        rounds_as: That type where it is coarser than float32: "float16" or "bfloat16".
    """

    saved: keras.Model
    model: keras.Model
    note: ModelNote | None
    position: int = 0
    computes_in: tuple[str, ...] = ()
    rounding: float = SINGLE
    rounds_as: str | None = None


def open_network(path: Path, output: str | None = None) -> Network:
    """Load a `.keras` file.

    Args:
        path: The file.
        output: Which of several outputs classifies, by name.

    Raises:
        ModelError: it cannot be loaded, or has several outputs and none of that name.
    """
    saved, note = load_model(path)
    position = find_output(saved, output, str(path))
    others = computes_in(path)
    whole = load_in_float32(path) if others else saved
    model = only_output(whole, position)
    return Network(saved, model, note, position, others, roundoff(others), coarsest(others))
