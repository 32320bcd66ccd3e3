"""The app's side: load a bundle, give it an image, read the answer.

It needs numpy, Pillow and one runtime: ONNX Runtime, TensorRT or TensorRT-RTX.

::

    import cnnedge
    classify = cnnedge.load("vgg16")
    print(classify("cat.jpg")[0].label)
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import math
import os
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cnnedge.bundle import open_bundle
from cnnedge.errors import BackendError, ImageError, SignatureError
from cnnedge.image import ImageContract, name_of, to_batch, to_tensor
from cnnedge.protocols import Runner
from cnnedge.runtime.choice import Choice, choose, runs_on
from cnnedge.runtime.opening import open_variant, read_note, usable_variants
from cnnedge.runtime.single import open_single
from cnnedge.runtimes import RUNTIMES, RunSettings

__all__ = [
    "RUNTIMES",
    "Choice",
    "Classifier",
    "Prediction",
    "RunSettings",
    "choose",
    "load",
    "open_variant",
    "read_note",
    "runs_on",
    "usable_variants",
]

log = logging.getLogger("cnnedge")


@dataclass(frozen=True, slots=True)
class Prediction:
    """One answer: a label, its index in the output, and its probability (0…1).

    Examples:
        >>> cnnedge.Prediction("cat", 281, 0.93).label
        'cat'
    """

    label: str
    index: int
    probability: float


class Classifier:
    """A loaded bundle. One may be used from many threads at once.

    Attributes:
        labels: The classes, in the order of the probabilities.
        image: The image contract.
        choice: The variant that runs, and why this one.
        provider: What really runs it: an ONNX Runtime provider, or a library with its version.

    Examples:
        >>> with cnnedge.load("digits") as classify:
        ...     best = classify("four.png", top=1)[0]
        >>> best.label, best.probability > 0.5
        ('4', True)
        >>> classify("four.png")
        Traceback (most recent call last):
        cnnedge.errors.BackendError: the classifier is closed; load the bundle again
    """

    def __init__(
        self,
        session: Runner,
        choice: Choice,
        labels: Sequence[str],
        image: ImageContract,
    ) -> None:
        self._session = session
        self.provider = str(getattr(session, "provider", "?"))
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
            BackendError: the model answers it with NaN or infinity, the runtime refuses it, or the
                classifier is closed.
        """
        # A view of the image's own pixels: stacking would copy them.
        pixels = np.ascontiguousarray(to_tensor(image, self.image))
        row = self._run(pixels[np.newaxis])[0]
        # Where one is not finite the sum is not, and it costs less than `isfinite` and `all`.
        total = sum(row.tolist()) if len(row) <= _FEW else np.add.reduce(row)
        if not math.isfinite(total):
            raise self._no_number([image], 0)
        return self._answers(row, top)

    def batch(self, images: Sequence[Any], *, top: int = 5) -> list[list[Prediction]]:
        """Classify several images in one call of the runtime.

        Raises:
            ImageError, BackendError: as from `__call__`; the message names the image.
        """
        return [self._answers(row, top) for row in self.probabilities(images)]

    def probabilities(self, images: Sequence[Any] | np.ndarray) -> np.ndarray:
        """Return float32 ``[N, classes]`` of N images, each of any kind `__call__` takes.

        An array uint8 ``[N, H, W, C]`` that has the contract's size already goes straight to the
        runtime.

        Raises:
            ImageError, BackendError: as from `__call__`; the message names the image.
        """
        size = self.image.shape
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
        answers = self._run(batch)
        finite = np.isfinite(answers)
        if not finite.all():
            raise self._no_number(images, int(np.argmin(finite.all(axis=1))))
        return answers

    def close(self) -> None:
        """Give back what the runtime holds, such as memory of a GPU; any later call is an error.

        A call that runs in another thread comes to its end. Closing twice does nothing.
        """
        session, self._session = self._session, _closed
        getattr(session, "close", lambda: None)()

    def __enter__(self) -> Classifier:
        return self

    def __exit__(self, *raised: object) -> None:
        self.close()

    def _no_number(self, images: Sequence[Any] | np.ndarray, index: int) -> BackendError:
        image = name_of(images[index])
        if len(images) > 1:
            image += f", image {index + 1} of {len(images)}"
        return BackendError(
            f"{self.variant}, run by {self.provider}, answers NaN or infinity to {image}",
            fix="load another variant, or see what `cnnedge verify` says of the bundle",
        )

    def _run(self, batch: np.ndarray) -> np.ndarray:
        answers = self._session(batch)
        expected = (len(batch), len(self.labels))
        if answers.shape != expected:
            raise BackendError(
                f"{self.variant} gives {list(answers.shape)} answers to {expected[0]} images, and "
                f"there are {expected[1]} labels",
                fix="export it again",
            )
        return answers

    def _answers(self, row: np.ndarray, top: int) -> list[Prediction]:
        return [Prediction(self.labels[i], i, row.item(i)) for i in likeliest(row, top)]

    def __repr__(self) -> str:
        return f"<Classifier {self.variant}: {len(self.labels)} classes; {self.choice.reason}>"


def _closed(batch: np.ndarray) -> np.ndarray:
    raise BackendError("the classifier is closed", fix="load the bundle again")


def likeliest(row: np.ndarray, top: int) -> list[int]:
    """Return the indices of the ``top`` largest values, all finite; of equals the first is first.

    A large network leaves nothing of this in the processor's caches, and then each NumPy function
    costs tens of microseconds, however little it does. So a dozen classes are sorted as a list; of
    a thousand, which are not sorted for the sake of five, the largest is taken again and again.
    """
    count = len(row)
    if count <= _FEW:
        return sorted(range(count), key=row.tolist().__getitem__, reverse=True)[:top]
    if 0 < top <= _FEW:
        left, found = row.copy(), []
        for _ in range(top):
            best = int(left.argmax())
            found.append(best)
            left[best] = _TAKEN
        return found
    return np.argsort(-row, kind="stable")[:top].tolist()


_FEW = 32  # classes, or answers: from some dozens on, sorting once is quicker
_TAKEN = -np.inf


def load(
    bundle: str | os.PathLike[str],
    *,
    variant: str | None = None,
    runtime: str = "cpu",
    threads: int | None = None,
    rebuild: bool = False,
    cache: str | os.PathLike[str] | None = None,
    graphs: bool = True,
    public_key: str | os.PathLike[str] | None = None,
) -> Classifier:
    """Load a bundle and return its classifier.

    Args:
        bundle: The bundle: its folder, or the zip file or single ONNX file that `cnnedge package`
            wrote of it.
        variant: Which variant to run; None picks the fastest that was verified (see `choose`).
        runtime: What runs it, a name in `cnnedge.runtimes.RUNTIMES`: "cpu", "openvino", "cuda" …;
            "tensorrt" and "rtx" run a plan that `cnnedge engine` put into the bundle.
        threads: How many threads of the CPU one call may use; None lets the runtime decide.
        rebuild: Build a plan in memory where the bundle has none that fits this machine.
        cache: A folder that nobody else can write, where a GPU runtime keeps what it compiles.
        graphs: Whether calls on a GPU replay a CUDA graph.
        public_key: The maker's public key, a PEM file. Given, a bundle that he did not sign is
            refused before anything of it is run; see docs/signing.md.

    Raises:
        BundleError: the bundle is incomplete or was altered, or has no such variant or plan; as
            SignatureError: it is not what the holder of that key signed.
        ModelError: a single ONNX file carries no labels and image contract of cnnedge.
        MissingExtraError: the runtime is not installed.
        BackendError: the runtime cannot load the model, or would not run it where asked.

    Examples:
        >>> classify = cnnedge.load("digits", variant="fp32")
        >>> classify("four.png")[0].label
        '4'
        >>> classify.probabilities(["four.png", "four.png"]).shape
        (2, 10)
    """
    settings = RunSettings(
        runtime, threads, rebuild, None if cache is None else Path(cache), graphs
    )
    # Half of a cold start is importing the runtime, the other half hashing the bundle's files;
    # hashing releases the interpreter's lock, so they go side by side.
    importing = threading.Thread(target=_import_ahead, args=(settings,), daemon=True)
    importing.start()
    path = Path(bundle)
    if path.suffix == ".onnx" and path.is_file():
        if public_key is not None:
            raise SignatureError(
                f"{path} is one ONNX file, which carries no signature",
                fix="load the signed bundle, or its zip file",
            )
        importing.join()
        single = open_single(path, variant, settings)
        return Classifier(single.session, single.choice, single.about.labels, single.about.image)
    if public_key is None:
        opened = open_bundle(path)
    else:
        from cnnedge.signature import open_signed

        opened = open_signed(path, Path(public_key))
    importing.join()
    usable = usable_variants(opened, settings) if variant is None else None
    choice = choose(opened, variant, runtime=runtime, usable=usable)
    log.info("%s: running %s: %s", opened.origin, choice.variant.name, choice.reason)
    session = open_variant(opened, choice.variant, settings)
    return Classifier(session, choice, opened.manifest.labels, opened.manifest.image)


def _import_ahead(settings: RunSettings) -> None:
    """Import what `open_variant` and the first image need; they report what is missing."""
    with contextlib.suppress(Exception):
        importlib.import_module("PIL.Image")
        importlib.import_module(settings.row.module)
