"""A measuring process, the parent's side of it; `worker` is what runs inside.

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
from typing import Any, Protocol

from cnnedge.benchmark.contestants import Contestant
from cnnedge.errors import BackendError, ProcessEnded

PATIENCE = 600.0  # seconds that a process may be silent beyond what it was asked to take


class Link(Protocol):
    """Somebody who measures one contestant: a process, or in a test an object."""

    def ask(self, do: str, **arguments: Any) -> dict[str, Any]:
        """Have something done; see `Station` for what.

        Raises:
            BackendError: it failed; the message is one line.
            ProcessEnded: its process is gone, and nothing more can be asked of it.
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
            [sys.executable, "-m", "cnnedge.benchmark.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            start_new_session=True,
            # What this process finds, that one does: an import string may lie anywhere on the path.
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
            raise ProcessEnded(f"{self._name}: {self._last_words()}") from error
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
                    raise ProcessEnded(f"{self._name}: it did not answer for {timeout:.0f} s")
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
