"""Import TensorFlow without the lines it prints before it can be told not to."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


def import_tensorflow() -> Any:
    """Return the module ``tensorflow``, Keras loaded with it.

    Its native libraries write to file descriptor 2 while they load, whatever
    ``TF_CPP_MIN_LOG_LEVEL`` says. What they have to say of a failure comes as an exception.

    Raises:
        ImportError: TensorFlow or Keras is not installed, or cannot be loaded.
    """
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    if "keras" in sys.modules and "tensorflow" in sys.modules:
        return sys.modules["tensorflow"]
    with _native_stderr_aside():
        import keras  # noqa: F401
        import tensorflow as tf

        tf.constant(0)  # the first operation looks for devices, and says so
    return tf


@contextmanager
def _native_stderr_aside() -> Iterator[None]:
    try:
        kept = os.dup(2)
    except OSError:  # a process without a stderr has nothing to keep quiet
        yield
        return
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)
