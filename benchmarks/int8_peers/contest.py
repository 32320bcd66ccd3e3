"""Contests: each entrant works in processes of its own, and they take turns."""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

WORKER = Path(__file__).with_name("worker.py")
BLOCK = 20  # timed calls in a block
BLOCKS = 3  # of each entrant before its process is started anew


@dataclass(frozen=True)
class Entrant:
    """What a process runs.

    Attributes:
        folder: What `worker.py prepare` wrote.
        name: What the worker knows it by.
        file: In that folder.
    """

    folder: Path
    name: str
    file: str


def result_of(*arguments: Any) -> Any:
    """Run the worker to its end and return its result; raise with its last line otherwise."""
    command = [sys.executable, str(WORKER), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    for line in done.stdout.splitlines():
        if line.startswith("RESULT "):
            return json.loads(line.removeprefix("RESULT "))
    raise RuntimeError((done.stderr.strip().splitlines() or ["it said nothing"])[-1])


class Server:
    """An entrant's long-lived process."""

    def __init__(self, entrant: Entrant, threads: int) -> None:
        what = [str(entrant.folder), entrant.name, entrant.file, str(threads)]
        command = [sys.executable, str(WORKER), "serve", *what]
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed with the process
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
        )
        self._await("READY")

    def ask(self, command: str) -> Any:
        """Send a command and return its result."""
        assert self._process.stdin is not None
        self._process.stdin.write(command + "\n")
        self._process.stdin.flush()
        return json.loads(self._await("RESULT"))

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        with suppress(OSError):  # it may have died
            self._process.stdin.close()
        self._process.wait()
        self._errors.close()

    def _await(self, word: str) -> str:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith(word):
                return line.removeprefix(word).strip()
        self._errors.seek(0)
        raise RuntimeError((self._errors.read().strip().splitlines() or ["it died"])[-1])


def time_round(
    running: Mapping[str, Entrant], threads: int, shuffled: random.Random
) -> dict[str, list[float] | str]:
    """Time each entrant in a new process; return its seconds, or why there are none."""
    servers: dict[str, Server] = {}
    taken: dict[str, list[float] | str] = {}
    try:
        for name, entrant in running.items():
            try:
                servers[name] = Server(entrant, threads)
                taken[name] = []
            except (RuntimeError, OSError) as error:
                taken[name] = str(error)
        order = list(servers)
        for _ in range(BLOCKS):
            shuffled.shuffle(order)  # or one would always come after the same, slower neighbour
            for name in order:
                found = taken[name]
                if isinstance(found, str):  # it died in an earlier block
                    continue
                try:
                    found += servers[name].ask(f"time {BLOCK}")
                except (RuntimeError, OSError) as error:
                    taken[name] = str(error)
    finally:
        for server in servers.values():
            server.close()
    return taken


def quantized(folder: Path, name: str, times: int) -> dict[str, Any]:
    """Quantize a few times, each in a new process; return the medians and every run."""
    runs = [result_of("quantize", folder, name) for _ in range(times)]
    keys = ("seconds", "peak_mib", "peak_over_start_mib")
    return runs[-1] | {key: median(run[key] for run in runs) for key in keys} | {"runs": runs}


def answer(entrant: Entrant, threads: int) -> dict[str, Any]:
    """Let an entrant answer the test images, into `NAME.answers.npy` of its folder."""
    server = Server(entrant, threads)
    try:
        server.ask("answers")
    finally:
        server.close()
    return {}


def attempt(work: Any) -> dict[str, Any]:
    """Return a result, or the one line that says why there is none."""
    try:
        return work()
    except (RuntimeError, OSError) as error:
        return {"error": str(error)}


def tell(text: str) -> None:
    """Say what is being done."""
    print(text, file=sys.stderr, flush=True)


def latency(samples: Sequence[Sequence[float]]) -> dict[str, Any]:
    """Return what a table says of latencies: seconds of each call, by round."""
    return {
        "samples_ms": [[round(1e3 * s, 4) for s in taken] for taken in samples],
        "median_ms": 1e3 * float(np.median(samples)),
        "p90_ms": 1e3 * float(np.percentile(samples, 90)),
    }


def hold(
    parser: argparse.ArgumentParser,
    run: Callable[[argparse.Namespace, Path], dict[str, Any]],
    markdown: Callable[[dict[str, Any]], str],
) -> None:
    """Parse the command line, hold the contest in a scratch folder, write and print the result.

    Args:
        parser: Has the options that are the contest's own; those of all contests are added.
        run: From the options and the folder to the result.
        markdown: From the result to its table.
    """
    parser.add_argument("--data", default="signs:20480", help="digits, signs:N or a folder")
    parser.add_argument("--data-seed", type=int, default=1, help="not the one of the training")
    parser.add_argument("--test-images", type=int, default=5000)
    parser.add_argument("--calibration-images", type=int, default=128)
    parser.add_argument(
        "--rounds", type=int, default=10, help=f"of new processes, {BLOCKS} blocks each"
    )
    parser.add_argument("--threads", type=int)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--markdown", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        document = run(arguments, Path(folder))
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(document, indent=1) + "\n")
    text = markdown(document)
    if arguments.markdown:
        arguments.markdown.write_text(text)
    print(text)
