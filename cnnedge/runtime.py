"""The app's side: load a bundle, give it an image, read the answer. numpy, Pillow, ONNX Runtime.

::

    import cnnedge
    classify = cnnedge.load("vgg16")
    print(classify("cat.jpg")[0].label)
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cnnedge.bundle import Bundle, Variant, open_bundle
from cnnedge.errors import BackendError, BundleError, ImageError, MissingExtraError
from cnnedge.image import ImageContract, normalize, to_batch
from cnnedge.machine import this_machine

log = logging.getLogger("cnnedge")


@dataclass(frozen=True)
class Prediction:
    """One answer: a label, its index in the output, and its probability (0…1)."""

    label: str
    index: int
    probability: float


@dataclass(frozen=True)
class Choice:
    """Which variant was chosen, and why."""

    variant: Variant
    reason: str


class Classifier:
    """A loaded bundle. One may be used from many threads at once.

    Attributes:
        labels: The classes, in the order of the probabilities.
        image: The image contract.
        choice: The variant that runs, and why this one.
    """

    def __init__(
        self,
        session: Callable[[np.ndarray], np.ndarray],
        choice: Choice,
        labels: Sequence[str],
        image: ImageContract,
        normalization: str | None = None,
    ) -> None:
        self._session = session
        self._normalization = normalization  # set where the graph takes float32
        self.choice = choice
        self.labels = tuple(labels)
        self.image = image

    @property
    def variant(self) -> str:
        """The name of the variant that runs."""
        return self.choice.variant.name

    def __call__(self, image: Any, *, top: int = 5) -> list[Prediction]:
        """Classify one image: a path, bytes, an open file, an array or a Pillow image.

        Args:
            image: The image; an array is uint8 ``[H, W, 3]`` RGB or ``[H, W]`` grey.
            top: How many answers to return, the likeliest first.

        Raises:
            ImageError: the image cannot be decoded; the message names it.
        """
        return self._answers(self.probabilities([image])[0], top)

    def batch(self, images: Sequence[Any], *, top: int = 5) -> list[list[Prediction]]:
        """Classify several images in one call of the runtime.

        Raises:
            ImageError: an image cannot be decoded; the message names it.
        """
        return [self._answers(row, top) for row in self.probabilities(images)]

    def probabilities(self, images: Sequence[Any] | np.ndarray) -> np.ndarray:
        """Return float32 ``[N, classes]`` of N images, each of any kind `__call__` takes.

        An array uint8 ``[N, H, W, C]`` that has the contract's size already goes straight to the
        runtime.
        """
        size = (self.image.height, self.image.width, self.image.channels)
        if not len(images):
            raise ImageError("no image was given", fix="give one image or more")
        if (
            isinstance(images, np.ndarray)
            and images.dtype == np.uint8
            and images.ndim == 4
            and images.shape[1:] == size
        ):
            batch = images
        else:
            batch = to_batch(images, self.image)
        if self._normalization is not None:
            batch = normalize(batch, self._normalization)
        return self._session(batch)

    def _answers(self, row: np.ndarray, top: int) -> list[Prediction]:
        best = np.argsort(-row, kind="stable")[:top]
        return [Prediction(self.labels[i], int(i), float(row[i])) for i in best]

    def __repr__(self) -> str:
        return f"<Classifier {self.variant}: {len(self.labels)} classes; {self.choice.reason}>"


def load(
    bundle: str | os.PathLike[str],
    *,
    variant: str | None = None,
    threads: int | None = None,
) -> Classifier:
    """Load a bundle and return its classifier.

    Args:
        bundle: The bundle's folder.
        variant: Which variant to run; None picks the fastest that was verified (see `choose`).
        threads: How many threads one call may use; None lets the runtime decide.

    Raises:
        BundleError: the bundle is incomplete or was altered, or has no such variant.
        MissingExtraError: ONNX Runtime is not installed.
        BackendError: the runtime cannot load the model.
    """
    # Half of a cold start is importing the runtime, the other half hashing the bundle's files;
    # hashing releases the interpreter's lock, so they go side by side.
    importing = threading.Thread(target=_import_ahead, daemon=True)
    importing.start()
    opened = open_bundle(Path(bundle))
    importing.join()
    choice = choose(opened, variant)
    log.info("%s: running %s: %s", opened.root, choice.variant.name, choice.reason)
    session = open_variant(opened, choice.variant, threads=threads)
    manifest = opened.manifest
    takes_float = manifest.input == "float32"
    return Classifier(
        session,
        choice,
        manifest.labels,
        manifest.image,
        manifest.normalization if takes_float else None,
    )


def _import_ahead() -> None:
    """Import what `open_variant` and the first image need; they report what is missing."""
    with contextlib.suppress(Exception):
        importlib.import_module("PIL.Image")
        importlib.import_module("cnnedge.backends.onnxruntime")


def choose(bundle: Bundle, name: str | None = None) -> Choice:
    """Pick the variant to run on this machine's CPU, and say why.

    Of the verified variants: where the bundle was measured on this very CPU model, the fastest that
    its speed gate recommends; else INT8 if this CPU has an int8 dot product, else FP32.

    Raises:
        BundleError: there is no such variant, or none was verified.
    """
    manifest = bundle.manifest
    if name is not None:
        return Choice(manifest.variant(name), "asked for by name")
    fit = [v for v in manifest.variants if v.target != "trt" and v.verified]
    if not fit:
        raise BundleError(
            f"no variant of {bundle.root} was verified", fix="run `cnnedge verify` on it first"
        )
    machine = this_machine()
    timed = [v for v in fit if v.latency is not None and v.recommended]
    if timed and manifest.machine.get("cpu") == machine.cpu:
        best = min(timed, key=lambda v: v.latency["median_ms"] if v.latency else 0.0)
        return Choice(best, f"the fastest as measured on this CPU model ({machine.cpu})")
    preferred, reason = (
        ("int8", "this CPU has an int8 dot product")
        if machine.has_int8_dot_product
        else ("fp32", "this CPU has no int8 dot product, so INT8 need not be faster")
    )
    for variant in fit:
        if variant.precision == preferred:
            return Choice(variant, reason)
    return Choice(fit[0], f"the first verified one; there is no verified {preferred}")


def open_variant(
    bundle: Bundle, variant: Variant, *, threads: int | None = None
) -> Callable[[np.ndarray], np.ndarray]:
    """Load one variant of a bundle into ONNX Runtime; see `load` for what it raises."""
    try:
        from cnnedge.backends import onnxruntime as backend
    except ImportError as error:
        if error.name != "onnxruntime":
            raise BackendError(
                f"ONNX Runtime is installed and cannot be loaded: {error}",
                fix="run `cnnedge doctor`",
            ) from error
        raise MissingExtraError("onnxruntime", "cpu", purpose="running a bundle") from error
    return backend.open_session(bundle.path(variant.file), threads=threads)
