"""What to measure: a suite, from the command line or a TOML file, validated before any work."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from reprlib import repr
from typing import Annotated, Any, Literal, get_args

from msgspec import Meta

from cnnedge.documents import Points, hold_options
from cnnedge.errors import CnnEdgeError, one_line
from cnnedge.files import read_toml

Scenario = Literal[
    "single-stream",
    "offline",
    "multi-stream",
    "server",
    "cold-start",
    "waterfall",
    "layers",
    "duty-cycle",
    "sustained",
]
SCENARIOS: tuple[Scenario, ...] = get_args(Scenario)
# What takes seconds; the others take minutes, or idle for as long, and are asked for by name.
QUICK: tuple[Scenario, ...] = (
    *("single-stream", "offline", "multi-stream"),
    *("cold-start", "waterfall", "layers"),
)
_SEE = "docs/benchmark.md"
_Number = Annotated[int, Meta(ge=1, le=1_000_000)]
_Few = Annotated[int, Meta(ge=1, le=4096)]
_Load = Annotated[float, Meta(ge=0.01, le=0.99)]
_Some = Meta(min_length=1)


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
    scenarios: tuple[Scenario, ...] | None = None


@dataclass(frozen=True)
class Suite:
    """What to measure, and for how long.

    Attributes:
        models: The bundles.
        name: What the suite is called.
        runtimes: Names in `runtimes.measured_runtimes`, or the import string of an opener.
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

    models: Annotated[tuple[ModelEntry, ...], _Some]
    name: str = "bench"
    runtimes: Annotated[tuple[str, ...], _Some] = ("cpu",)
    scenarios: Annotated[tuple[Scenario, ...], _Some] = QUICK
    seconds: Annotated[float, Meta(ge=0.01, le=1e5)] = 10.0
    rounds: Annotated[int, Meta(ge=1, le=100)] = 3
    batch: _Number = 1
    batches: tuple[_Few, ...] = (1, 4, 16)
    clients: tuple[_Few, ...] = (1, 2, 4)
    loads: tuple[_Load, ...] = (0.3, 0.5, 0.7, 0.9)
    sustained_seconds: Annotated[float, Meta(ge=0.1, le=1e5)] = 120.0
    idle_seconds: Annotated[float, Meta(ge=0, le=1e4)] = 2.0
    threads: _Number | None = None
    test_images: _Number | None = None
    max_drop: Points | None = None
    seed: Annotated[int, Meta(ge=0, lt=2**32)] = 0

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
    found = read_toml(path, "suite", see=_SEE)
    entries = found.pop("model", [])
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise CnnEdgeError(
            f"suite: model {one_line(repr(entries), 60)} is no list of tables",
            fix="write one [[model]] table for each bundle",
        )
    models = tuple(_entry(entry, path.parent) for entry in entries)
    found.setdefault("name", path.stem)
    return make_suite(models, {**found, **{k: v for k, v in changes.items() if v is not None}})


def make_suite(models: tuple[ModelEntry, ...], options: Mapping[str, Any]) -> Suite:
    """Return a validated suite.

    Raises:
        CnnEdgeError: a field is unknown or has a value it may not have; the message names it.
    """
    if not models:
        raise CnnEdgeError("suite: it names no model", fix="write a [[model]] table")
    return hold_options({**options, "models": models}, Suite, "suite", fix=f"see {_SEE}")


def _entry(given: Mapping[str, Any], folder: Path) -> ModelEntry:
    """Return what a table says, its paths relative to the file's folder."""
    entry = hold_options(given, ModelEntry, "suite: model", fix=f"see {_SEE}")
    places = {
        name: folder / path
        for name in ("bundle", "reference", "image")
        if (path := getattr(entry, name)) is not None
    }
    if entry.data is not None and os.path.exists(folder / entry.data):
        return replace(entry, **places, data=str(folder / entry.data))
    return replace(entry, **places)
