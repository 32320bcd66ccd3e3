"""Keep libraries from what they do unasked while they load, before they can be told not to.

Some write to the terminal, some to the user's home, and one talks to its maker.
"""

from __future__ import annotations

import importlib
import io
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout, suppress
from pathlib import Path
from typing import Any

from cnnedge.errors import MissingExtraError
from cnnedge.partial import Partial


def import_onnxruntime() -> Any:
    """Return the module ``onnxruntime``, told to send nothing and to note nothing down.

    Its wheels write an identifier of the machine into the user's cache and look for their maker's
    server as soon as they are loaded; ``disable_telemetry_events`` comes too late for that. Who has
    set the variable himself has decided otherwise.

    Raises:
        ImportError: it is not installed, or cannot be loaded.
    """
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    import onnxruntime

    return onnxruntime


def import_openvino() -> Any:
    """Return the module ``openvino`` without its telemetry, which tells its maker of each import.

    It does without that package where it is not installed, so for the length of the import it is
    not. An app that has loaded it before has decided otherwise.

    Raises:
        ImportError: it is not installed, or cannot be loaded.
    """
    reporter = "openvino_telemetry"
    without = reporter not in sys.modules
    if without:
        sys.modules[reporter] = None  # type: ignore[assignment]
    try:
        import openvino
    finally:
        if without:
            del sys.modules[reporter]
    return openvino


def import_matplotlib() -> Any:
    """Return the module ``matplotlib``, which would keep a list of fonts in the user's home.

    Raises:
        ImportError: it is not installed.
    """
    with _elsewhere("MPLCONFIGDIR", ".cache/matplotlib"):
        import matplotlib
        import matplotlib.font_manager
    return matplotlib


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
        import_keras()
        import tensorflow as tf

        tf.constant(0)  # the first operation looks for devices, and says so
    return tf


def import_keras() -> Any:
    """Return the module ``keras``, which would write its settings into the user's home.

    Raises:
        ImportError: it is not installed, or cannot be loaded.
    """
    with suppress(ImportError):  # Keras loads it, where it is there
        import_matplotlib()
    with _elsewhere("KERAS_HOME", ".keras") as moved:
        import keras
    if moved:  # where weights that the user asks for are kept
        from keras.src.backend import config

        config._KERAS_DIR = str(_home() / ".keras")
    return keras


@contextmanager
def _elsewhere(variable: str, place: str) -> Iterator[bool]:
    """Have what a library writes while it loads go to a folder that is removed again.

    Nothing is moved where the user has set the variable, or where the library has been before: what
    is in its place then are his settings.

    Args:
        variable: The environment variable that names the library's folder.
        place: Where that folder is otherwise, in the user's home.
    """
    if variable in os.environ or (_home() / place).exists():
        yield False
        return
    try:
        partial = Partial(Path(tempfile.gettempdir()))
    except OSError:  # there is no place for it
        yield False
        return
    with partial:
        os.environ[variable] = str(partial.new)
        try:
            yield True
        finally:
            del os.environ[variable]


def _home() -> Path:
    home = Path(os.path.expanduser("~"))
    return home if os.access(home, os.W_OK) else Path(tempfile.gettempdir())


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
