"""The Keras reference as rounding moves it, and what in it is no number."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from cnnedge.data import Split
from cnnedge.head import as_probabilities
from cnnedge.pipeline.limits import Moved
from cnnedge.protocols import Runner
from cnnedge.source import Source

if TYPE_CHECKING:
    import keras


def moved_reference(source: Source) -> Moved:
    """Return the reference with all that is rounded moved by as much; see `measure_limits`."""
    from cnnedge.backends.keras import predict
    from cnnedge.backends.keras_rounding import moved, weights_moved

    @contextmanager
    def of(precision: str, draw: int) -> Iterator[Runner]:
        rng = np.random.default_rng(draw)
        move = partial(moved, precision=precision, rng=rng)

        def answer(batch: np.ndarray) -> np.ndarray:
            scores = predict(source.model, batch, source.normalization, move=move)
            return as_probabilities(scores, source.emits)

        with weights_moved(source.model, precision, rng):
            yield answer

    return of


def answers_in_float32(source: Source, test: Split) -> np.ndarray:
    """Return what a model that is saved in another type answers in float32, as Keras runs it.

    Moved from these, its answers tell how far rounding moves them, and nothing else.
    """
    answer = replace(source, saved=source.model, position=0).reference()
    return np.concatenate([answer(batch) for batch, _ in test.batches(source.image, 32)])


def weights_not_finite(model: keras.Model) -> str:
    """Name the first weights that hold NaN or infinity, as a message goes on; or nothing."""
    for variable in model.variables:
        if not np.isfinite(values := variable.numpy().astype(np.float64)).all():
            wrong = values.size - int(np.isfinite(values).sum())
            return f", in which {wrong:,} of the weights of {variable.path} are NaN or infinite,"
    return ""
