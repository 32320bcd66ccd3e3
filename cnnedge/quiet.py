"""Keep native libraries from writing to the terminal before they can be told not to."""

from __future__ import annotations

import importlib
import io
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout, suppress
from typing import Any

from cnnedge.errors import MissingExtraError


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
    with native_stderr_aside():
        import keras  # noqa: F401
        import tensorflow as tf

        tf.constant(0)  # the first operation looks for devices, and says so
    return tf


def require_training_packages(purpose: str) -> None:
    """Load what training needs, TensorFlow quietly.

    Args:
        purpose: What needs them, as in "training".

    Raises:
        MissingExtraError: TensorFlow, Keras or Matplotlib is not installed.
    """
    with suppress(ImportError):  # named below
        import_tensorflow()
    for package in ("tensorflow", "keras", "matplotlib"):
        try:
            importlib.import_module(package)
        except ImportError as error:
            raise MissingExtraError(package, "export", purpose=purpose) from error


class Aside:
    """What native code wrote to file descriptor 2 while it was set aside."""

    text = ""


@contextmanager
def native_stderr_aside() -> Iterator[Aside]:
    """Keep what native code writes to file descriptor 2 from the terminal; it is in the result.

    Python's own ``sys.stdout`` is set aside with it: some packages tell of failures by ``print``.
    """
    aside = Aside()
    try:
        kept = os.dup(2)
    except OSError:  # a process without a stderr has nothing to keep quiet
        yield aside
        return
    with tempfile.TemporaryFile() as file, redirect_stdout(io.StringIO()) as printed:
        try:
            sys.stderr.flush()
            os.dup2(file.fileno(), 2)
            yield aside
        finally:
            os.dup2(kept, 2)
            os.close(kept)
            file.seek(0)
            aside.text = printed.getvalue() + file.read().decode(errors="replace")
