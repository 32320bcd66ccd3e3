"""What to measure: a suite, from the command line or a TOML file, validated before any work."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from reprlib import repr
from typing import Any

from cnnedge.errors import CnnEdgeError
from cnnedge.files import read_toml

SCENARIOS = (
    *("single-stream", "offline", "multi-stream", "server", "cold-start"),
    *("waterfall", "layers", "duty-cycle", "sustained"),
)
# What takes seconds; the others take minutes, or idle for as long, and are asked for by name.
QUICK = ("single-stream", "offline", "multi-stream", "cold-start", "waterfall", "layers")
_MOST = 1_000_000


@dataclass(frozen=True)
class ModelEntry:
    """One bundle to measure.

    Attributes:
        bundle: Its folder.
        reference: The `.keras` file it was made from: the baseline, and what LiteRT converts.
        data: A labelled data source, for accuracy; None: as recorded at export.
        image: An image file for the waterfall; None: one of the data's, or a photograph that
            scikit-learn brings, or the largest golden image of the bundle.
        scenarios: Those of this model alone; None: the suite's.
    """

    bundle: Path
    reference: Path | None = None
    data: str | None = None
    image: Path | None = None
    scenarios: tuple[str, ...] | None = None


@dataclass(frozen=True)
class Suite:
    """What to measure, and for how long.

    Attributes:
        models: The bundles.
        name: What the suite is called.
        runtimes: Names in `contestants.RUNTIMES`, or the import string of an opener.
        scenarios: Names in `SCENARIOS`.
        seconds: About how long single-stream is measured, all contestants of a model together.
        rounds: Lives of each process.
        batch: Images in a call of single-stream.
        batches: Batch sizes of `offline`.
        clients: Numbers of clients of `multi-stream`.
        loads: Shares of one client's throughput of `server`.
        sustained_seconds: How long each contestant runs on end.
        idle_seconds: The pause of `duty-cycle`.
        threads: Threads of a call; None lets the runtimes use every core.
        test_images: At most so many images of the data's test split; None: all.
        max_drop: The accuracy budget of the pick, in points; None: the bundle's own.
        seed: Of the data's split, the order of contestants, arrivals and resampling.
    """

    models: tuple[ModelEntry, ...]
    name: str = "bench"
    runtimes: tuple[str, ...] = ("cpu",)
    scenarios: tuple[str, ...] = QUICK
    seconds: float = 10.0
    rounds: int = 3
    batch: int = 1
    batches: tuple[int, ...] = (1, 4, 16)
    clients: tuple[int, ...] = (1, 2, 4)
    loads: tuple[float, ...] = (0.3, 0.5, 0.7, 0.9)
    sustained_seconds: float = 120.0
    idle_seconds: float = 2.0
    threads: int | None = None
    test_images: int | None = None
    max_drop: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        named = set(self.scenarios).union(*(entry.scenarios or () for entry in self.models))
        unknown = sorted(named - set(SCENARIOS))
        if unknown:
            raise _wrong("scenarios", unknown[0], f"choose of {', '.join(SCENARIOS)}")
        for name, low, high in (
            ("seconds", 0.01, 1e5),
            ("rounds", 1, 100),
            ("batch", 1, _MOST),
            ("sustained_seconds", 0.1, 1e5),
            ("idle_seconds", 0.0, 1e4),
            ("seed", 0, 2**32 - 1),
        ):
            _in_range(name, getattr(self, name), low, high)
        for name in ("threads", "test_images"):
            if getattr(self, name) is not None:
                _in_range(name, getattr(self, name), 1, _MOST)
        if self.max_drop is not None:
            _in_range("max_drop", self.max_drop, 0, 100)
        for name in ("batches", "clients"):
            for value in getattr(self, name):
                _in_range(name, value, 1, 4096)
        for load in self.loads:
            _in_range("loads", load, 0.01, 0.99)
        if not self.models or not self.runtimes or not self.scenarios:
            raise _wrong("suite", self.name, "name a model, a runtime and a scenario at least")

    def to_dict(self) -> dict[str, Any]:
        """Return it as JSON-able data, the models aside."""
        found = asdict(self)
        del found["models"]
        return found


def read_suite(path: Path | str, changes: Mapping[str, Any]) -> Suite:
    """Read a suite from a TOML file; paths in it are relative to that file.

    Args:
        path: The file.
        changes: Fields to use instead of the file's; None: none.

    Raises:
        CnnEdgeError: the file is missing, is no TOML, or holds a wrong value.
    """
    path = Path(path)
    found = read_toml(path, "suite", see="docs/benchmark.md")
    entries = found.pop("model", [])
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise _wrong("model", entries, "write one [[model]] table for each bundle")
    models = tuple(_entry(entry, path.parent) for entry in entries)
    found.setdefault("name", path.stem)
    return make_suite(models, {**found, **{k: v for k, v in changes.items() if v is not None}})


def make_suite(models: tuple[ModelEntry, ...], options: Mapping[str, Any]) -> Suite:
    """Return a validated suite.

    Raises:
        CnnEdgeError: a field is unknown or has a value it may not have; the message names it.
    """
    types = {f.name: str(f.type) for f in fields(Suite) if f.name != "models"}
    chosen: dict[str, Any] = {}
    for name, value in options.items():
        if name not in types:
            raise _wrong(name, value, f"a suite has {', '.join(types)} and [[model]]")
        chosen[name] = _typed(name, value, types[name])
    return Suite(models, **chosen)


def _entry(entry: Mapping[str, Any], folder: Path) -> ModelEntry:
    types = {f.name: "str" for f in fields(ModelEntry)} | {"scenarios": "tuple[str, ...]"}
    given: dict[str, Any] = {}
    for name, value in entry.items():
        if name not in types:
            raise _wrong(f"model.{name}", value, f"a [[model]] has {', '.join(types)}")
        given[name] = _typed(f"model.{name}", value, types[name])
    if "bundle" not in given:
        raise _wrong("model", dict(entry), 'a [[model]] needs bundle = "FOLDER"')
    for name in ("bundle", "reference", "image"):
        if name in given:
            given[name] = folder / given[name]
    if "data" in given and os.path.exists(folder / given["data"]):
        given["data"] = str(folder / given["data"])
    return ModelEntry(**given)


def _typed(name: str, value: Any, kind: str) -> Any:
    """Return a value as its field's annotation has it, which TOML's own types nearly are."""
    if kind.startswith("tuple"):
        element = kind[len("tuple[") :].split(",")[0]
        if not isinstance(value, list | tuple):
            raise _wrong(name, value, "give a list")
        return tuple(_typed(name, item, element) for item in value)
    wanted: dict[str, tuple[type, ...]] = {"str": (str,), "int": (int,), "float": (int, float)}
    types = wanted[kind.split(" ")[0]]
    if isinstance(value, bool) or not isinstance(value, types):
        raise _wrong(name, value, f"give {'text' if kind == 'str' else 'a number'}")
    return value


def _in_range(name: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:
        raise _wrong(name, value, f"give {low:g} to {high:g}")


def _wrong(name: str, value: Any, fix: str) -> CnnEdgeError:
    return CnnEdgeError(f"suite: {name[:80]} = {repr(value)} cannot be", fix=fix)
