"""A Keras model with its input and its weights moved as rounding may move them.

Nothing of it is shared with the export: neither the conversion to FP16 nor the graph.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import keras

# Of each format: bits of a significand after the first, lowest and highest exponent
_FORMATS = {"fp32": (23, -126, 127), "fp16": (10, -14, 15), "bf16": (7, -126, 127)}
_EXPONENT = np.int32(0x7F800000)  # its bits in a float32


def moved(values: np.ndarray, precision: str, rng: np.random.Generator) -> np.ndarray:
    """Return each value half a unit in its last place up or down, which is as far as rounding goes.

    Half a unit of float32 is one or none in equal shares, as the sum is rounded.

    Args:
        values: float32, of any shape.
        precision: "fp32", "fp16" or "bf16": whose last place.
        rng: Decides which way.
    """
    bits, lowest, highest = _FORMATS[precision]
    # The power of two at or below each value: the fastest way to a unit in its last place.
    power = (np.asarray(values, np.float32).view(np.int32) & _EXPONENT).view(np.float32)
    step = np.clip(power, 2.0**lowest, 2.0**highest) * np.float32(2.0 ** (-bits - 1))
    return values + step * (rng.integers(0, 2, values.shape, np.int8) * 2 - 1)


@contextmanager
def weights_moved(model: keras.Model, precision: str, rng: np.random.Generator) -> Iterator[None]:
    """Move every floating-point weight of a ``keras.Model`` (see `moved`) and put it back."""
    before = [(v, v.numpy()) for v in model.variables if v.dtype == "float32"]
    try:
        for variable, values in before:
            variable.assign(moved(values, precision, rng))
        yield
    finally:
        for variable, values in before:
            variable.assign(values)
