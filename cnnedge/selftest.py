"""The self-test inside a bundle: golden images, what they must become, what must be answered.

It tells apart where two machines begin to differ: in decoding the image file, in resizing it, in
a layer of the network, or in its last answers alone.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from msgspec import Meta, Struct

from cnnedge.bundle import SELFTEST, Bundle, Manifest, Variant
from cnnedge.checkpoint import DAMAGED, read_array
from cnnedge.comparison import limit_of
from cnnedge.data import Dataset, Split
from cnnedge.data.labels import difference, in_order
from cnnedge.documents import Sha256, read_as
from cnnedge.errors import BundleError, DataError, first_line
from cnnedge.image import ImageContract, decode, to_tensor
from cnnedge.protocols import Runner

GOLDEN = 8  # images
INDEX = f"{SELFTEST}/selftest.json"
TENSORS = f"{SELFTEST}/tensors.npz"
REFERENCE_ANSWERS = f"{SELFTEST}/reference.npz"
# By how much an answer may differ from the one recorded on another machine: FP32 by the order of
# its sums, FP16 by its rounding, INT8 by a few steps of its coarser one.
TOLERANCE = {"fp32": 1e-5, "fp16": 2e-3, "int8": 2e-2, "int8-weight": 2e-2, "int4-weight": 2e-2}
# By how much a layer's fingerprint may, relative to its size, before that layer is named.
LAYER_TOLERANCE = {
    "fp32": 1e-3,
    "fp16": 2e-2,
    "int8": 5e-2,
    # the runtime quantizes activations block by block, as its CPU does it best
    "int8-weight": 5e-2,
    "int4-weight": 5e-2,
}
_SAMPLES = 32  # values of a layer's result that make its fingerprint

Fingerprints = dict[str, list[float]]


class GoldenImage(Struct, frozen=True):
    """A file of the bundle, and the hash of the pixels that it decodes to."""

    file: str
    pixels_sha256: Sha256


class Selftest(Struct, frozen=True):
    """What `write_selftest` wrote into `INDEX`; null stands for NaN and infinity.

    Attributes:
        images: The golden images.
        answers: Those of "reference", and of each variant, ``[images][classes]``.
        layers: The fingerprint of each layer's result, by variant.
    """

    images: Annotated[tuple[GoldenImage, ...], Meta(min_length=1)]
    answers: dict[str, list[list[float | None]]]
    layers: dict[str, dict[str, list[float | None]]]

    def answers_of(self, name: str, bundle: Bundle) -> np.ndarray:
        """Return what one of them answered, float64 ``[images, classes]``.

        Raises:
            BundleError: nobody wrote it down.
        """
        if name not in self.answers:
            raise BundleError(
                f"the self-test of {bundle.origin} has no answers of {name}", fix="export it again"
            )
        return np.array(self.answers[name], np.float64)


@dataclass(frozen=True)
class StageReport:
    """How far a variant's self-test got.

    Attributes:
        variant: The variant's name.
        stage: Where it diverged: "decode", "resize", "layer" or "output"; None: nowhere.
        detail: One sentence.
        finite: Whether its answers are numbers, and not NaN or infinity.
    """

    variant: str
    stage: str | None
    detail: str
    finite: bool = True


def golden_images(split: Split, answers: np.ndarray) -> list[int]:
    """Choose the images of a self-test: of every class and every answer that there is room for.

    Images of one class would show no more than that a model still gives that one answer.

    Args:
        split: The test images.
        answers: The reference's answers to them, ``[N, classes]``.

    Returns:
        Up to `GOLDEN` indices, ascending, the same ones every time: at least one of each of the
        most common classes, and among those of a class one whose first answer is not there yet.
    """
    first = answers.argmax(1)
    labels, counts = np.unique(split.targets, return_counts=True)
    # Those that leave no choice go first, so that the others can make up for it.
    common = sorted(
        labels[np.argsort(-counts, kind="stable")][:GOLDEN],
        key=lambda label: len(set(first[split.targets == label])),
    )
    rng = np.random.default_rng(0)
    waiting = {t: list(rng.permutation(np.flatnonzero(split.targets == t))) for t in common}
    chosen: list[int] = []
    while len(chosen) < GOLDEN and any(waiting.values()):
        for members in filter(None, waiting.values()):
            seen = set(first[chosen])
            new = next((i for i, at in enumerate(members) if first[at] not in seen), 0)
            chosen.append(int(members.pop(new)))
            if len(chosen) == GOLDEN:
                break
    return sorted(chosen)


def write_selftest(
    root: Path,
    items: Sequence[Any],
    image: ImageContract,
    reference: Runner,
    variants: Mapping[str, Runner],
    fingerprints: Mapping[str, Callable[[np.ndarray], Fingerprints]],
    limits: Mapping[str, float],
) -> list[str]:
    """Write the self-test of a bundle under construction; return its files' names.

    Args:
        root: The bundle's folder.
        items: Image files or uint8 arrays; see `golden_images`.
        image: The image contract.
        reference: The Keras reference: uint8 batch → probabilities.
        variants: Each variant, likewise.
        fingerprints: For each variant, uint8 batch → fingerprint of each layer's result.
        limits: By how much a variant may differ from the reference, by precision.
    """
    (root / SELFTEST).mkdir()
    names = [_write_image(root, k, item) for k, item in enumerate(items)]
    tensors = np.stack([to_tensor(root / name, image) for name in names])
    np.savez_compressed(root / TENSORS, tensors=tensors)
    index = {
        "images": [
            {"file": name, "pixels_sha256": _pixels_digest(root / name, image)} for name in names
        ],
        "answers": {
            "reference": _as_json(reference(tensors)),
            **{name: _as_json(run(tensors)) for name, run in variants.items()},
        },
        "layers": {
            name: {layer: _as_json(np.array(found)) for layer, found in run(tensors[:1]).items()}
            for name, run in fingerprints.items()
        },
        "tolerance": {p: max(most, limits.get(p, 0.0)) for p, most in TOLERANCE.items()},
    }
    (root / INDEX).write_text(json.dumps(index), encoding="utf-8")
    return [*names, TENSORS, INDEX]


def run_selftest(
    bundle: Bundle,
    variants: Mapping[str, Runner],
    fingerprint: Callable[[str, np.ndarray], Fingerprints] | None = None,
) -> list[StageReport]:
    """Replay a bundle's self-test on this machine.

    Args:
        bundle: The bundle.
        variants: The variants to test, as loaded here.
        fingerprint: ``(variant, batch)`` → fingerprints of its layers here; None where the
            packages that take a graph apart are not installed, and then no layer is named.

    Raises:
        BundleError: the bundle holds no self-test.
    """
    index = read_selftest(bundle)
    tensors = golden_tensors(bundle, index)
    for name in variants:
        index.answers_of(name, bundle)
    image = bundle.manifest.image
    before = _check_images(bundle, index.images, tensors, image)
    reports = []
    for name, run in variants.items():
        if before is not None:
            reports.append(StageReport(name, *before))
            continue
        precision = bundle.manifest.variant(name).precision
        answers = run(tensors)
        if not np.isfinite(answers).all():
            detail = "it answers a golden image with NaN or infinity"
            reports.append(StageReport(name, "output", detail, finite=False))
            continue
        recorded = index.answers_of(name, bundle)
        difference = float(np.abs(answers - recorded).max())
        if difference <= tolerance(bundle.manifest.variant(name)):
            detail = f"{len(tensors)} golden images, answers within {difference:.1e}"
            reports.append(StageReport(name, None, detail))
            continue
        layer = None
        if fingerprint is not None:
            expected = index.layers.get(name, {})
            here = fingerprint(name, tensors[:1])
            layer = first_divergence(expected, here, LAYER_TOLERANCE[precision])
        if layer is not None:
            detail = f"the first layer that differs is {layer} (answers differ by {difference:.1e})"
            reports.append(StageReport(name, "layer", detail))
        else:
            reports.append(StageReport(name, "output", f"answers differ by {difference:.1e}"))
    return reports


def tolerance(variant: Variant) -> float:
    """Return by how much a variant's answers may differ from those recorded elsewhere.

    Where the model moves more than that by its own rounding, so do two machines.
    """
    own = limit_of(variant.precision, None if variant.accuracy is None else variant.accuracy.limit)
    return max(TOLERANCE[variant.precision], own or 0.0)


def read_selftest(bundle: Bundle) -> Selftest:
    """Return what a bundle's self-test says, held against its manifest.

    Raises:
        BundleError: the bundle holds none, or one that cannot be of it.
    """
    path = bundle.path(INDEX)
    try:
        found = read_as(path.read_bytes(), Selftest)
        shape = (len(found.images), len(bundle.manifest.labels))
        for name, answers in found.answers.items():
            if (len(answers), *{len(row) for row in answers}) != shape:
                raise ValueError(f"the answers of {name[:40]!r} are not {shape[0]} of {shape[1]}")
    except (OSError, ValueError) as error:
        raise _without_selftest(bundle, error) from error
    for entry in found.images:
        bundle.path(entry.file)
    return found


def golden_tensors(bundle: Bundle, index: Selftest | None = None) -> np.ndarray:
    """Return a bundle's golden images as the network takes them, uint8 ``[N, H, W, C]``.

    Raises:
        BundleError: the bundle does not hold them.
    """
    count = len((index or read_selftest(bundle)).images)
    shape = (count, *bundle.manifest.image.shape)
    path = bundle.path(TENSORS)
    try:
        return read_array(path, "tensors", shape, np.uint8)
    except DAMAGED as error:
        raise _without_selftest(bundle, error) from error


def _without_selftest(bundle: Bundle, error: Exception) -> BundleError:
    return BundleError(
        f"{bundle.origin} holds no self-test ({first_line(error)})", fix="export it again"
    )


def recorded_answers(bundle: Bundle, split: Split) -> np.ndarray | None:
    """Return the Keras reference's answers as recorded at export, float32 ``[N, classes]``.

    None where the bundle has none, or they were given to other images than these.
    """
    manifest = bundle.manifest
    if REFERENCE_ANSWERS not in manifest.files:
        return None
    if split.digest() != manifest.data.test_sha256:
        return None
    path = bundle.path(REFERENCE_ANSWERS)
    try:
        return read_array(path, "answers", (len(split), len(manifest.labels)), np.float32)
    except DAMAGED as error:
        raise BundleError(
            f"{bundle.origin / REFERENCE_ANSWERS} holds no answers ({first_line(error)})",
            fix="export the bundle again",
        ) from error


def refuse_calibration_images(manifest: Manifest, split: Split) -> None:
    """Refuse test images that a bundle's scales were taken from.

    Raises:
        DataError: there is one; the message names it.
    """
    known = set() if manifest.calibration is None else set(manifest.calibration.image_sha256)
    for index, digest in enumerate(split.item_digests() if known else ()):
        if digest.hex() in known:
            raise DataError(
                f"the test {split.name_of(index)} is one that {manifest.name} was calibrated on",
                fix="test on images that the export did not see, or with its own --seed",
            )


def in_order_of(manifest: Manifest, dataset: Dataset) -> Dataset:
    """Return a data source with its classes numbered as a bundle's are, matched by name.

    That of a bundle with random weights is returned as it is.

    Raises:
        DataError: it has other classes.
    """
    if not manifest.model.trained:
        return dataset
    found = in_order(dataset, manifest.labels)
    if found is None:
        raise DataError(
            f"the labels of {dataset.spec} are not those of {manifest.name} "
            f"({difference(dataset.labels, manifest.labels)})",
            fix="give data with the same classes",
        )
    return found


def first_divergence(
    expected: Mapping[str, Sequence[float | None]], here: Fingerprints, tolerance: float
) -> str | None:
    """Return the first layer whose fingerprint differs by more than ``tolerance``, relatively."""
    for name, values in expected.items():
        if name not in here or len(values) != len(here[name]):
            return name
        a, b = np.array(values, np.float64), np.array(here[name])
        if not np.linalg.norm(a - b) <= tolerance * max(float(np.linalg.norm(a)), 1e-6):
            return name
    return None


def _as_json(values: np.ndarray) -> Any:
    """Return numbers as nested lists, with null for NaN and infinity, which JSON does not know."""
    finite = np.isfinite(values)
    if finite.all():
        return values.tolist()
    found = values.astype(object)
    found[~finite] = None
    return found.tolist()


def fingerprint_of(array: np.ndarray) -> list[float]:
    """Return a few numbers that tell a layer's result from another: samples, mean, deviation."""
    flat = array.astype(np.float64).reshape(-1)
    picks = np.linspace(0, flat.size - 1, min(_SAMPLES, flat.size)).astype(int)
    return [float(f"{v:.7g}") for v in (*flat[picks], flat.mean(), flat.std())]


def _check_images(
    bundle: Bundle, entries: Sequence[GoldenImage], tensors: np.ndarray, image: ImageContract
) -> tuple[str, str] | None:
    """Return the stage before the network that diverged, and how, or None."""
    for entry, expected in zip(entries, tensors, strict=True):
        path = bundle.path(entry.file)
        if _pixels_digest(path, image) != entry.pixels_sha256:
            return "decode", f"{entry.file} decodes to other pixels than where it was recorded"
        difference = np.abs(to_tensor(path, image).astype(int) - expected.astype(int)).max()
        if difference:
            return "resize", f"{entry.file} resizes to pixels up to {difference} levels off"
    return None


def _write_image(root: Path, k: int, item: Any) -> str:
    """Store a golden image: a file as it is, an array as PNG and every other one as JPEG."""
    from PIL import Image

    if isinstance(item, str | Path):
        name = f"{SELFTEST}/golden-{k:02d}{Path(item).suffix.lower()}"
        (root / name).write_bytes(Path(item).read_bytes())
        return name
    suffix = "png" if k % 2 == 0 else "jpg"
    name = f"{SELFTEST}/golden-{k:02d}.{suffix}"
    Image.fromarray(np.asarray(item)).save(root / name, quality=95)
    return name


def _pixels_digest(path: Path, image: ImageContract) -> str:
    pixels = decode(path, image)
    digest = hashlib.sha256(f"{pixels.size}".encode())
    for top in range(0, pixels.height, 256):  # a copy of all of them may be large
        rows = (0, top, pixels.width, min(top + 256, pixels.height))
        digest.update(pixels.crop(rows).tobytes())
    return digest.hexdigest()
