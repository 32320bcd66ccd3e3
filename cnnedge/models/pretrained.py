"""Start the convolutions of a VGG network from weights trained elsewhere.

Three kinds of file are read, told apart by their content: the legacy HDF5 format in which Keras
publishes its VGG-16 and VGG-19 (`layer_names` and `weight_names` attributes), Keras 3's
`.weights.h5`, and whole `.keras` files. Layers are matched by name, ``block1_conv2`` (Keras) or
``conv1_2`` (cnnedge), and nothing is assigned unless everything fits.
"""

from __future__ import annotations

import contextlib
import io
import json
import re
import sys
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py  # type: ignore[import-untyped]
import keras
import numpy as np

from cnnedge.checkpoint import DAMAGED
from cnnedge.errors import ModelError, first_line
from cnnedge.files import sha256

# Keras' published files without the dense layers, as in keras.applications.vgg16 and vgg19: the
# same cache file, address and MD5, so that a copy already fetched by Keras is used.
_ADDRESS = "https://storage.googleapis.com/tensorflow/keras-applications/{net}/{file}"
_FILE = "{net}_weights_tf_dim_ordering_tf_kernels_notop.h5"
_MD5 = {
    "vgg16": "6d6bbae143d832006294945121d1f1fc",
    "vgg19": "253f8cb515780f3b799900260a226db6",
}
# Convolutions in each block, by which a network is recognised whatever it is called.
_BLOCKS: dict[tuple[int, ...], str] = {(2, 2, 3, 3, 3): "vgg16", (2, 2, 4, 4, 4): "vgg19"}

_OUR_NAME = re.compile(r"conv(\d+)_(\d+)")
_KERAS_NAME = re.compile(r"block(\d+)_conv(\d+)")


@dataclass(frozen=True)
class InitReport:
    """Which weights a model starts from.

    Attributes:
        source: "imagenet", or the file as it was named.
        sha256: Hexadecimal digest of the file that was read.
        layers: The layers that were initialised, in the model's order.
        untouched: The layers with weights that kept those they had.
        normalization: What the weights want of the pixels, a name in
            `cnnedge.image.NORMALIZATIONS`; "caffe" for those that Keras publishes.
    """

    source: str
    sha256: str
    layers: tuple[str, ...]
    untouched: tuple[str, ...]
    normalization: str


@dataclass(frozen=True)
class _Weights:
    """The convolutions of a file, as ``(kernel, bias)`` by cnnedge's layer names."""

    convolutions: Mapping[str, tuple[np.ndarray, np.ndarray | None]]
    others: tuple[str, ...]
    normalization: str


def init_from(model: keras.Model, source: str) -> InitReport:
    """Start the convolutions of a VGG network from trained weights.

    Args:
        model: A built model of the VGG family; changed in place, or not at all.
        source: "imagenet" for what Keras publishes for VGG-16 and VGG-19 (fetched once, kept in
            Keras' cache), or the path of an `.h5`, `.weights.h5` or `.keras` file.

    Returns:
        What was initialised. The dense layers, and the weights of `SortPool2D`, stay as they are.

    Raises:
        ModelError: the model is not a VGG network; the file cannot be fetched, is damaged, or does
            not hold exactly the model's convolutions in their shapes.
    """
    targets = _convolutions(model)
    path = _fetch_imagenet(model.name, targets) if source == "imagenet" else Path(source)
    weights = _read(path)
    _check(model.name, targets, str(path), weights)
    for name, layer in targets.items():
        kernel, bias = weights.convolutions[name]
        layer.kernel.assign(kernel)
        layer.bias.assign(bias)
    weighted = [layer.name for layer in model.layers if layer.weights]
    return InitReport(
        source=source,
        sha256=sha256(path),
        layers=tuple(targets),
        untouched=tuple(name for name in weighted if name not in targets),
        normalization=weights.normalization,
    )


def _convolutions(model: keras.Model) -> dict[str, Any]:
    layers = {la.name: la for la in model.layers if isinstance(la, keras.layers.Conv2D)}
    if not layers or not all(_OUR_NAME.fullmatch(name) for name in layers):
        names = ", ".join(layers) or "none"
        raise ModelError(
            f"{model.name} is not a VGG network (its convolutions: {names})",
            fix="trained weights can start vgg16 and vgg19",
        )
    return layers


def _fetch_imagenet(name: str, targets: Mapping[str, Any]) -> Path:
    blocks = [int(target.removeprefix("conv").partition("_")[0]) for target in targets]
    counts = tuple(blocks.count(block) for block in range(1, max(blocks) + 1))
    net = _BLOCKS.get(counts)
    if net is None:
        raise ModelError(
            f"there are no ImageNet weights for {name}", fix="Keras publishes vgg16 and vgg19 only"
        )
    file = _FILE.format(net=net)
    try:
        # Keras prints its progress on stdout, which belongs to the caller's own output.
        with contextlib.redirect_stdout(sys.stderr):
            return Path(
                keras.utils.get_file(
                    file,
                    _ADDRESS.format(net=net, file=file),
                    cache_subdir="models",
                    file_hash=_MD5[net],
                )
            )
    except Exception as error:  # get_file raises a bare Exception for a failed fetch
        reason = first_line(error)
        raise ModelError(
            f"cannot fetch the ImageNet weights of {net} ({reason})",
            fix=f"fetch {file} where there is a network, and name that file instead of imagenet",
        ) from error


def _check(name: str, targets: Mapping[str, Any], source: str, weights: _Weights) -> None:
    found = weights.convolutions
    missing = [target for target in targets if target not in found]
    if missing:
        held = ", ".join([*found, *weights.others][:4]) or "no layers with weights"
        raise ModelError(
            f"{source} lacks {', '.join(missing)} of {name} (it holds {held}, ...)",
            fix=f"name a file of the same network as {name}",
        )
    extra = [layer for layer in found if layer not in targets]
    if extra:
        raise ModelError(
            f"{source} holds {', '.join(extra)}, which {name} lacks",
            fix=f"name a file of the same network as {name}",
        )
    for target, layer in targets.items():
        for what, array, variable in zip(
            ("kernel", "bias"), found[target], (layer.kernel, layer.bias), strict=True
        ):
            if array is None or array.shape != tuple(variable.shape):
                raise ModelError(
                    f"the {what} of {target} is {'absent' if array is None else array.shape} "
                    f"in {source} "
                    f"and {tuple(variable.shape)} in {name}",
                    fix="build the model with the kernels and channels of the file",
                )
            if not np.isfinite(array).all():
                raise ModelError(
                    f"the {what} of {target} in {source} has values that are not finite",
                    fix="use another copy of the file",
                )


def _read(path: Path) -> _Weights:
    try:
        with path.open("rb") as file:
            magic = file.read(4)
        if magic == b"PK\x03\x04":
            return _read_keras(path)
        if magic == b"\x89HDF":
            with h5py.File(path) as weights:
                return _read_hdf5(weights)
    except FileNotFoundError as error:
        raise ModelError(f"there is no weights file {path}", fix="check the path") from error
    except DAMAGED as error:
        raise ModelError(
            f"{path} is not a whole weights file ({error})", fix="copy or download it again"
        ) from error
    raise ModelError(
        f"{path} is neither HDF5 nor a .keras file", fix="name an .h5, .weights.h5 or .keras file"
    )


def _read_keras(path: Path) -> _Weights:
    with zipfile.ZipFile(path) as archive:
        with h5py.File(io.BytesIO(archive.read("model.weights.h5"))) as file:
            weights = _read_hdf5(file)
        if "cnnedge.json" in archive.namelist():  # the note that backends.keras.save_model adds
            normalization = json.loads(archive.read("cnnedge.json"))["normalization"]
            return _Weights(weights.convolutions, weights.others, normalization)
    return weights


def _read_hdf5(file: h5py.File) -> _Weights:
    convolutions: dict[str, tuple[np.ndarray, np.ndarray | None]] = {}
    others: list[str] = []
    normalization = "unit"
    for name, tensors in _layers(file):
        theirs = _KERAS_NAME.fullmatch(name)
        if theirs:
            normalization = "caffe"
        match = theirs or _OUR_NAME.fullmatch(name)
        kernel = next((t for t in tensors if t.ndim == 4), None)
        if match is None or kernel is None:
            others += [name] if tensors else []
            continue
        bias = next((t for t in tensors if t.ndim == 1), None)
        convolutions[f"conv{match[1]}_{match[2]}"] = kernel[()], None if bias is None else bias[()]
    return _Weights(convolutions, tuple(others), normalization)


def _layers(file: h5py.File) -> Iterator[tuple[str, list[h5py.Dataset]]]:
    """Yield each layer's name and its weights, not yet read, of either HDF5 format."""
    legacy = file.get("model_weights", file)
    if "layer_names" in legacy.attrs:
        for name in map(_text, legacy.attrs["layer_names"]):
            group = legacy[name]
            yield name, [group[_text(weight)] for weight in group.attrs["weight_names"]]
        return

    groups: list[h5py.Group] = []
    file.visititems(lambda key, item: groups.append(item) if key.endswith("/vars") else None)
    for group in groups:
        tensors = [item for item in group.values() if isinstance(item, h5py.Dataset)]
        if "name" in group.attrs:
            yield _text(group.attrs["name"]), tensors


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)
