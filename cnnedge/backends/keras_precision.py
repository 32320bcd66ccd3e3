"""Models that compute in anything but float32: told by their files, and loaded in float32.

The exported graphs start from float32. A layer cannot change its policy once it is built, since
its variables have their type by then, so the file's configuration is changed before it is loaded.
"""

from __future__ import annotations

import json
import shutil
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import keras

from cnnedge.errors import ModelError, first_line
from cnnedge.head import SINGLE

# Half the distance from 1 to the next number.
_ROUNDOFF = {"float32": SINGLE, "float16": 2.0**-11, "bfloat16": 2.0**-8}
_OTHER = frozenset(
    {"float16", "bfloat16", "float64", "mixed_float16", "mixed_bfloat16", "mixed_float64"}
)
_CONFIG = "config.json"  # within a `.keras` file


def computes_in(path: Path) -> tuple[str, ...]:
    """Return the types and policies other than float32 that a `.keras` file names, sorted."""
    return _other_types(path)[1]


def roundoff(policies: tuple[str, ...]) -> float:
    """Return the unit roundoff of the coarsest type that a model computes in."""
    return _ROUNDOFF[coarsest(policies) or "float32"]


def coarsest(policies: tuple[str, ...]) -> str | None:
    """Return "bfloat16" or "float16", the coarsest type that a model computes in, or None."""
    found = {policy.removeprefix("mixed_") for policy in policies}
    return next((name for name in ("bfloat16", "float16") if name in found), None)


def load_in_float32(path: Path) -> keras.Model:
    """Load a `.keras` file with every layer's policy set to float32.

    Raises:
        ModelError: that cannot be done to it.
    """
    config, policies = _other_types(path)
    listed = ", ".join(policies)
    with tempfile.TemporaryDirectory() as folder:
        changed = Path(folder) / "float32.keras"
        _replace_config(path, changed, config)
        try:
            model = keras.saving.load_model(changed, compile=False)
        except Exception as error:  # Keras raises whatever its readers raise
            raise ModelError(
                f"{path} computes in {listed}, and Keras cannot load it in float32: "
                f"{first_line(error)[:120]}",
                fix="save it with every layer's dtype set to float32",
            ) from error
    for layer in model._flatten_layers(include_self=False):
        if {layer.compute_dtype, layer.variable_dtype} & _OTHER:
            raise ModelError(
                f"the layer {layer.name!r} of {path} computes in {layer.dtype_policy.name}, which "
                "its own code sets",
                fix="let it take the dtype it is given, or save the model in float32",
            )
    return model


def _other_types(path: Path) -> tuple[Any, tuple[str, ...]]:
    """Return a file's configuration in float32, and what it names besides."""
    found: set[str] = set()
    with zipfile.ZipFile(path) as archive:
        config = json.loads(archive.read(_CONFIG))
    training = config.pop("compile_config", None)  # nothing of it is loaded
    return _in_float32(config, found) | {"compile_config": training}, tuple(sorted(found))


def _in_float32(node: Any, found: set[str]) -> Any:
    """Return a part of a configuration with float32 in the place of every other float type.

    A policy is written by its name, or as an object that holds it; an input and a cast have the
    type alone.
    """
    if isinstance(node, list):
        return [_in_float32(item, found) for item in node]
    if not isinstance(node, dict):
        return node
    is_policy = str(node.get("class_name", "")).endswith("DTypePolicy")
    if is_policy and isinstance(node.get("config"), dict):
        config = {key: _named(value, found) for key, value in node["config"].items()}
        return node | {"config": config}
    return {
        key: _named(value, found)
        if key == "dtype" and isinstance(value, str)
        else _in_float32(value, found)
        for key, value in node.items()
    }


def _named(name: Any, found: set[str]) -> Any:
    if not isinstance(name, str) or name not in _OTHER:
        return name
    found.add(name)
    return "float32"


def _replace_config(source: Path, target: Path, config: Any) -> None:
    """Copy a `.keras` file with another configuration."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        for name in old.namelist():
            if name == _CONFIG:
                new.writestr(name, json.dumps(config))
                continue
            with old.open(name) as read, new.open(name, "w", force_zip64=True) as written:
                shutil.copyfileobj(read, written)
