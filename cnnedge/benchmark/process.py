"""A measuring process: the parent's side of it, and what runs inside.

They speak JSON, a line each way: ``{"do": "block", "seconds": 1.0}`` → ``{"result": …}`` or
``{"error": "one line"}``. The process ends when its standard input does, so a parent that is
killed leaves none behind.
"""

from __future__ import annotations

import json
import os
import selectors
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

from cnnedge.benchmark.contestants import Contestant
from cnnedge.errors import BackendError, first_line

PATIENCE = 600.0  # seconds that a process may be silent beyond what it was asked to take


class Link(Protocol):
    """Somebody who measures one contestant: a process, or in a test an object."""

    def ask(self, do: str, **arguments: Any) -> dict[str, Any]:
        """Have something done; see `Station` for what.

        Raises:
            BackendError: it failed; the message is one line.
        """

    def close(self) -> None:
        """Let it end."""


class Process:
    """A process that holds one contestant, or none yet.

    Attributes:
        opened: What opening told: `provider`, and seconds by part.
    """

    opened: Mapping[str, Any]

    def __init__(self, name: str) -> None:
        self._name = name
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the process
        self._started = time.monotonic()
        # Of a session of its own: Ctrl-C is for the parent, which closes it.
        self._process = subprocess.Popen(
            [sys.executable, "-m", "cnnedge.benchmark.process"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            start_new_session=True,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        )
        self._left = b""

    @classmethod
    def hold(cls, contestant: Contestant, shape: tuple[int, int, int], threads: int | None) -> Any:
        """Start a process and open a contestant in it.

        Raises:
            BackendError: it cannot be opened.
        """
        process = cls(contestant.name)
        try:
            process.opened = process.ask(
                "open",
                contestant=asdict(contestant),
                shape=shape,
                threads=threads,
                started=process._started,
            )
        except BaseException:
            process.close()
            raise
        return process

    def ask(self, do: str, **arguments: Any) -> dict[str, Any]:
        """Have something done; see `Link`."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps({"do": do, **arguments}).encode() + b"\n")
            self._process.stdin.flush()
            answer = json.loads(self._line(PATIENCE + float(arguments.get("seconds", 0.0))))
        except (BrokenPipeError, EOFError) as error:
            raise BackendError(f"{self._name}: {self._last_words()}") from error
        if "error" in answer:
            raise BackendError(f"{self._name}: {answer['error']}")
        return answer["result"]

    def close(self) -> None:
        """End the process, by its own end of input or else by force."""
        with suppress(OSError):  # it may have died
            self._process.stdin.close()  # type: ignore[union-attr]
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()  # type: ignore[union-attr]
        self._errors.close()

    def _line(self, timeout: float) -> bytes:
        assert self._process.stdout is not None
        deadline = time.monotonic() + timeout
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stdout, selectors.EVENT_READ)
            while b"\n" not in self._left:
                if not selector.select(max(0.0, deadline - time.monotonic())):
                    self._process.kill()
                    raise BackendError(f"{self._name}: it did not answer for {timeout:.0f} s")
                found = os.read(self._process.stdout.fileno(), 1 << 16)
                if not found:
                    raise EOFError
                self._left += found
        line, _, self._left = self._left.partition(b"\n")
        return line

    def _last_words(self) -> str:
        code = self._process.wait()
        self._errors.seek(0)
        said = self._errors.read().decode(errors="replace").strip().splitlines()
        ended = f"killed by signal {-code}" if code < 0 else f"ended with code {code}"
        return f"its process was {ended}" + (f": {said[-1].strip()}" if said else "")


def call(function: str, *arguments: Any, name: str = "work") -> Any:
    """Call a function by import string in a process of its own, with JSON-able arguments.

    Raises:
        BackendError: it raised; the message is one line.
    """
    process = Process(name)
    try:
        return process.ask("call", function=function, arguments=list(arguments))
    finally:
        process.close()


def peak_mib() -> float | None:
    """Return the most memory this process has held, in MiB; None where it cannot be read.

    ``ru_maxrss`` would begin with what the parent held when it started this process.
    """
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) / 1024
    return None


class _Inside:
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
        import importlib

        import numpy as np

        from cnnedge.benchmark.station import Station, resolve

        for module in contestant["imports"]:
            importlib.import_module(module)
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
        from cnnedge.benchmark.station import resolve

        return resolve(function)(*arguments)

    def profile(self, calls: int, shape: list[int]) -> dict[str, float]:
        """Return the mean seconds of each node, from a session that is opened for it."""
        import numpy as np

        from cnnedge.benchmark.station import resolve

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
    inside = _Inside()
    for line in sys.stdin:
        try:
            answer: dict[str, Any] = {"result": inside.do(json.loads(line))}
        except Exception as error:  # whatever a runtime raises is told in a line
            text = first_line(error)
            answer = {"error": text if str(error) else type(error).__name__}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
