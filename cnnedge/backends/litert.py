"""LiteRT with XNNPACK: what its own converter makes of the Keras model."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np

from cnnedge.errors import BackendError, ModelError
from cnnedge.files import atomic_path
from cnnedge.image import normalize


class LiteRtSession:
    """A model that LiteRT has loaded. An interpreter serves one call at a time.

    Attributes:
        provider: The library with its version.
        serial: That it serves one call at a time.
    """

    serial = True

    def __init__(self, interpreter: Any, provider: str, normalization: str) -> None:
        self.provider = provider
        self._interpreter, self._normalization = interpreter, normalization
        self._lock = threading.Lock()
        interpreter.allocate_tensors()
        (self._taken,) = interpreter.get_input_details()
        (self._given,) = interpreter.get_output_details()
        self._batch = int(self._taken["shape"][0])
        self._levels = _levels(self._taken, normalization)

    def __call__(self, batch: np.ndarray) -> np.ndarray:
        """Return probabilities, float32 ``[N, classes]``, of uint8 images ``[N, H, W, C]``.

        Raises:
            BackendError: the runtime refused the batch.
        """
        with self._lock:
            try:
                self._hold(len(batch))
                self._interpreter.set_tensor(self._taken["index"], self._prepared(batch))
                self._interpreter.invoke()
                found = self._interpreter.get_tensor(self._given["index"])
            except (ValueError, RuntimeError) as error:
                raise BackendError(f"LiteRT cannot run this batch: {error}") from error
        scale, zero = self._given["quantization"]
        return (found.astype(np.float32) - zero) * np.float32(scale) if scale else found

    def _hold(self, count: int) -> None:
        """Let the input hold so many images."""
        if count != self._batch:
            shape = [count, *self._taken["shape"][1:]]
            self._interpreter.resize_tensor_input(self._taken["index"], shape)
            self._interpreter.allocate_tensors()
            self._batch = count

    def _prepared(self, batch: np.ndarray) -> np.ndarray:
        """Return images as the graph takes them; part of every call, as it is in an app."""
        if self._taken["dtype"] == np.float32:
            return normalize(batch, self._normalization)
        if self._levels is not None:
            return self._levels[batch]
        return batch


def _levels(taken: dict[str, Any], normalization: str) -> np.ndarray | None:
    """Return the quantized level of each of a pixel's 256, or None where it is the pixel itself.

    Raises:
        BackendError: the colours are scaled each in another way, which one table cannot say.
    """
    if taken["dtype"] == np.float32:
        return None
    ramp = normalize(np.arange(256, dtype=np.uint8)[:, None].repeat(3, 1), normalization)
    if not (ramp == ramp[:, :1]).all():
        raise BackendError(f"an integer input cannot be normalized by {normalization!r}")
    scale, zero = taken["quantization"]
    levels = np.clip(np.rint(ramp[:, 0] / scale + zero), 0, 255).astype(np.uint8)
    return None if (levels == np.arange(256)).all() else levels


def open_litert(
    model: Path | str, *, threads: int | None = None, normalization: str = "unit"
) -> LiteRtSession:
    """Load a `.tflite` file.

    Args:
        model: The file.
        threads: How many threads one call may use; None lets the runtime decide.
        normalization: What the Keras model wanted of its pixels.

    Raises:
        BackendError: the runtime cannot load the model.
    """
    import importlib.metadata

    from ai_edge_litert.interpreter import Interpreter

    version = importlib.metadata.version("ai-edge-litert")
    try:
        interpreter = Interpreter(os.fspath(model), num_threads=threads)
        return LiteRtSession(interpreter, f"LiteRT {version} with XNNPACK", normalization)
    except (ValueError, RuntimeError) as error:
        raise BackendError(f"LiteRT {version} cannot load {model}: {error}") from error


def convert_litert(
    model: str,
    out: str,
    precision: Literal["fp32", "int8"],
    normalization: str,
    emits: str | None = None,
    output: str | None = None,
    images: str | None = None,
) -> None:
    """Convert a `.keras` file with LiteRT's own converter and its defaults.

    Behind a model of logits it gets a softmax, as the exported graphs have: all contestants answer
    with probabilities.

    Args:
        model: The `.keras` file.
        out: The `.tflite` file to write, whole or not at all.
        precision: "fp32", or "int8": full-integer with a uint8 input.
        normalization: What the Keras model wants of its pixels.
        emits: "probabilities" or "logits".
        output: Which of several outputs, by name.
        images: Calibration images as an `.npy` file, uint8 ``[N, H, W, C]``; for int8.

    Raises:
        ModelError: the converter refuses the model.
    """
    from cnnedge.backends.keras import ending_in_softmax
    from cnnedge.backends.keras_network import open_network
    from cnnedge.quiet import import_tensorflow, native_stderr_aside

    tf = import_tensorflow()
    whole = ending_in_softmax(open_network(Path(model), output).model, emits)
    converter = tf.lite.TFLiteConverter.from_keras_model(whole)
    if precision == "int8":
        assert images is not None
        pictures = np.load(images, mmap_mode="r")

        def representative() -> Iterator[list[np.ndarray]]:
            for picture in pictures:
                yield [normalize(picture[None], normalization)]

        converter.optimizations = [tf.lite.Optimize.DEFAULT]
        converter.representative_dataset = representative
        converter.target_spec.supported_ops = [tf.lite.OpsSet.TFLITE_BUILTINS_INT8]
        converter.inference_input_type = tf.uint8
    try:
        with native_stderr_aside():
            content = converter.convert()
    except Exception as error:  # the converter raises whatever MLIR says
        raise ModelError(
            f"the LiteRT converter refuses {model}: {str(error).strip().splitlines()[-1]}"
        ) from error
    with atomic_path(Path(out)) as temporary:
        temporary.write_bytes(content)
