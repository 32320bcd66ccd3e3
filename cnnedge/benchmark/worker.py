"""What runs inside a measuring process: it loads one contestant and does what each line asks.

What it imports before the contestant's own runtime is kept small, since it counts as the cold
start; see `process` for the other side.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from cnnedge.errors import BackendError, first_line

if TYPE_CHECKING:
    from collections.abc import Callable


def resolve(name: str) -> Callable[..., Any]:
    """Return what an import string ``package.module:function`` names.

    Raises:
        ImportError or AttributeError: there is no such thing.
    """
    module, _, attribute = name.partition(":")
    return getattr(importlib.import_module(module), attribute)


def peak_mib() -> float | None:
    """Return the most memory this process has held, in MiB; None where it cannot be read.

    ``ru_maxrss`` would begin with what the parent held when it started this process.
    """
    with suppress(OSError), open("/proc/self/status", encoding="utf-8") as file:
        for line in file:
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) / 1024
    return None


class Worker:
    """What the process does with each line."""

    def __init__(self) -> None:
        self.station: Any = None
        self.contestant: dict[str, Any] = {}
        self.threads: int | None = None
        self.before: float | None = None

    def open(
        self, contestant: dict[str, Any], shape: list[int], threads: int | None, started: float
    ) -> dict[str, Any]:
        """Load a contestant and answer once; seconds by part, from the start of the process on."""
        for module in contestant["imports"]:
            importlib.import_module(module)
        import numpy as np  # not before the runtime, which brings it

        from cnnedge.benchmark.station import Station

        opener = resolve(contestant["opener"])
        imported, self.before = time.monotonic(), peak_mib()
        options = dict(contestant["options"])
        runner = opener(contestant["model"], threads=threads, **options)
        loaded = time.monotonic()
        answers = np.asarray(runner(np.zeros((1, *shape), np.uint8)))
        first = time.monotonic()
        if answers.ndim != 2 or len(answers) != 1:
            raise BackendError(f"it answered an array of shape {answers.shape} to one image")
        self.station = Station(runner, tuple(shape))  # type: ignore[arg-type]
        self.station.require_numbers()
        self.contestant, self.threads = contestant, threads
        return {
            "provider": self.station.provider,
            "import": imported - started,
            "load": loaded - imported,
            "first": first - loaded,
            "total": first - started,
        }

    def call(self, function: str, arguments: list[Any]) -> Any:
        """Call a function by import string."""
        return resolve(function)(*arguments)

    def profile(self, calls: int, shape: list[int]) -> dict[str, float]:
        """Return the mean seconds of each node, from a session that is opened for it."""
        import numpy as np

        profiler = resolve(self.contestant["profiler"])
        image = np.random.default_rng(0).integers(0, 256, (1, *shape), np.uint8)
        return profiler(
            self.contestant["model"],
            image,
            calls,
            threads=self.threads,
            **self.contestant["options"],
        )

    def app(self, bundle: str, file: str, seconds: float) -> dict[str, Any]:
        """Time the app's own call, ``cnnedge.load(…)(file)``."""
        from cnnedge.runtime import load

        options = self.contestant["options"]
        classify = load(
            bundle,
            variant=options["variant"],
            runtime=options["runtime"],
            threads=self.threads,
        )
        samples: list[float] = []
        classify(file)
        start = time.perf_counter()
        while len(samples) < 8 or time.perf_counter() - start < seconds:
            before = time.perf_counter()
            classify(file)
            samples.append(time.perf_counter() - before)
        return {"samples": samples}

    def memory(self) -> dict[str, Any]:
        """Return the most memory it has held, and what it held before the model."""
        return {"peak_mib": peak_mib(), "before_mib": self.before}

    def do(self, request: dict[str, Any]) -> Any:
        """Do what a line asks."""
        name = request.pop("do")
        own = getattr(self, name, None)
        return own(**request) if own else getattr(self.station, name)(**request)


def main() -> None:
    """Answer lines until standard input ends."""
    # What native code prints must not come between: it goes to the other's error file.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    worker = Worker()
    for line in sys.stdin:
        try:
            answer: dict[str, Any] = {"result": worker.do(json.loads(line))}
        except Exception as error:  # whatever a runtime raises is told in a line
            text = first_line(error)
            answer = {"error": text if str(error) else type(error).__name__}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
