"""What a long run needs to go on after a kill: arrays and facts in one file, whole or absent."""

from __future__ import annotations

import json
import struct
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np

from cnnedge.errors import ModelError
from cnnedge.files import atomic_path
from cnnedge.partial import sweep

Arrays = Mapping[str, Sequence[np.ndarray]]

# What NumPy's and zipfile's readers raise of a file that was cut or changed. RuntimeError is
# zipfile's for a flipped bit that says "encrypted", or names another compression or version.
DAMAGED = (
    *(OSError, EOFError, KeyError, TypeError, ValueError, RuntimeError),
    *(zipfile.BadZipFile, zlib.error, struct.error, MemoryError),
)


def write_checkpoint(
    path: Path, run: Mapping[str, Any], facts: Mapping[str, Any], arrays: Arrays
) -> None:
    """Write it to an `.npz` file, in the place of the last one.

    Args:
        path: The file, ending in `.npz`.
        run: All that decides what comes of the run; a resumed one must have the same.
        facts: How far it is, JSON-able.
        arrays: Lists of arrays, by name.

    Raises:
        CnnEdgeError: the folder cannot be written, or the disk is full.
    """
    counts = {name: len(group) for name, group in arrays.items()}
    about = json.dumps({"run": run, "facts": facts, "counts": counts}, default=str)
    flat: dict[str, Any] = {"about": np.array(about)}
    for name, group in arrays.items():
        flat |= {f"{name}/{i}": array for i, array in enumerate(group)}
    with atomic_path(path) as temporary:
        np.savez(temporary, **flat)


def read_checkpoint(
    path: Path, run: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, list[np.ndarray]]]:
    """Return the facts and the arrays that `write_checkpoint` wrote of the same run.

    Raises:
        ModelError: there is no such file, it is damaged, or it is of another run than ``run``; the
            message names what differs.
    """
    with _opened(path) as file:
        about = json.loads(str(file["about"]))
        arrays = {
            name: [file[f"{name}/{i}"] for i in range(count)]
            for name, count in about["counts"].items()
        }
        found, facts = dict(about["run"]), dict(about["facts"])
    require_same(path, found, run)
    return facts, arrays


def run_of(path: Path) -> dict[str, Any]:
    """Return what decides what comes of the run that a checkpoint is of.

    Raises:
        ModelError: there is no such file, or it is damaged.
    """
    with _opened(path) as file:
        return dict(json.loads(str(file["about"]))["run"])


def read_array(path: Path, name: str, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """Return an array of an `.npz` file that has to be of a shape and a type.

    Nothing is allocated before its header says that it is.

    Raises:
        One of `DAMAGED`: it is not.
    """
    with zipfile.ZipFile(path) as archive, archive.open(f"{name}.npy") as file:
        version = np.lib.format.read_magic(file)
        read = {(1, 0): np.lib.format.read_array_header_1_0}.get(
            version, np.lib.format.read_array_header_2_0
        )
        found, _, kind = read(file)
    if found != shape or kind != np.dtype(dtype):
        raise ValueError(f"{name} are {kind} {found}, and not {np.dtype(dtype)} {shape}")
    with np.load(path, allow_pickle=False) as stored:
        return stored[name]


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    require_checkpoint(path)
    try:
        with np.load(path, allow_pickle=False) as file:
            yield file
    except DAMAGED as error:
        raise damaged(path, error) from error


def require_checkpoint(path: Path) -> None:
    """Refuse to resume from nothing.

    Raises:
        ModelError: there is no such file.
    """
    if not path.is_file():
        raise ModelError(
            f"there is no checkpoint {path} to resume from",
            fix="start without --resume; a run that finished has removed its own",
        )


def damaged(path: Path, error: Exception) -> ModelError:
    """Return what is raised of a checkpoint that was cut or changed."""
    return ModelError(
        f"the checkpoint {path} is damaged ({error})", fix="start again without --resume"
    )


def remove_checkpoint(path: Path) -> None:
    """Remove a checkpoint, what a kill left of the next one, and the folder if it is empty then."""
    with suppress(OSError):
        sweep(path)
        path.unlink(missing_ok=True)
        path.parent.rmdir()


def require_same(path: Path, found: Mapping[str, Any], run: Mapping[str, Any]) -> None:
    """Refuse a checkpoint of another run.

    Args:
        path: The checkpoint.
        found: What decided what came of the run that it is of.
        run: The same of the run that would go on from it.

    Raises:
        ModelError: they differ; the message names in what.
    """
    found, asked = dict(found), json.loads(json.dumps(run, default=str))
    differing = [name for name in found | asked if found.get(name) != asked.get(name)]
    if len(differing) <= _TOLD:
        differing = [_differing(name, found.get(name), asked.get(name)) for name in differing]
    if differing:
        raise ModelError(
            f"the checkpoint {path} is of another run, with another {', another '.join(differing)}",
            fix="resume with the same data and options, or start again without --resume",
        )


_TOLD = 2  # that fit into a line with what they were


def _differing(name: str, there: Any, now: Any) -> str:
    if isinstance(there, list | dict) or isinstance(now, list | dict):
        return name  # a list does not fit into a line
    return f"{name} ({_short(there)} there, {_short(now)} now)"


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 24 else f"{text[:12]}…"
