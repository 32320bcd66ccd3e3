"""What others take of this machine while something is measured, and whether that spoils it.

What is read is CPU time, from Linux' ``/proc/stat``, less that of this process and of all it
started. A load average would not do: it counts our own threads, and is of the minute before. It is
of the whole machine in a container too, where a process list is not. See
docs/decisions/busy-machine.md.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cnnedge.benchmark.environment import cpu_limit, text_of
from cnnedge.machine import this_machine

BUSY = 0.10  # of the CPUs that a call needs: what others may take before figures are doubted
LOOK_SECONDS = 0.5  # of looking before anything is measured
_BUSY_FIELDS = (0, 1, 2, 5, 6)  # of a CPU's line: user, nice, system, irq, softirq
_STOLEN_FIELD = 7


@dataclass(frozen=True)
class CpuTimes:
    """CPU seconds since boot, of the CPUs that this process may use.

    Attributes:
        at: When it was read, seconds of a monotonic clock.
        cpus: How many CPUs.
        passed: Of all of them, idle time included.
        busy: Of all processes.
        stolen: What other guests of the host took.
        own: Of this process and all that it started.
        group: Of all processes of this container, where it tells; else None.
    """

    at: float
    cpus: int
    passed: float
    busy: float
    stolen: float
    own: float
    group: float | None = None


def read_cpu_times(root: Path = Path("/")) -> CpuTimes | None:
    """Read the CPU times under ``root``; None where the system does not tell, as outside Linux."""
    try:
        me = int(os.readlink(root / "proc/self"))  # as this /proc numbers it, in a container too
        rate = os.sysconf("SC_CLK_TCK")
        lines = [line.split() for line in (text_of(root / "proc/stat") or "").splitlines()]
        ticks = {name: [int(x) for x in rest[:8]] for name, *rest in lines if name[:3] == "cpu"}
        mine = [f"cpu{number}" for number in sorted(os.sched_getaffinity(0))]
        if not all(name in ticks for name in mine):  # a container may number them anew
            mine = [name for name in ticks if name != "cpu"]
        every = [ticks[name] for name in mine]
        return CpuTimes(
            time.monotonic(),
            len(every),
            sum(map(sum, every)) / rate,
            sum(cpu[field] for cpu in every for field in _BUSY_FIELDS) / rate,
            sum(cpu[_STOLEN_FIELD] for cpu in every) / rate,
            _own_ticks(root / "proc", me) / rate,
            _group_seconds(root),
        )
    except (OSError, AttributeError, ValueError, IndexError, KeyError):
        return None


def _own_ticks(proc: Path, me: int) -> int:
    """Return what a process and its descendants took, those that have ended included."""
    children: dict[int, list[int]] = {}
    ticks: dict[int, int] = {}
    for folder in proc.iterdir():
        if not folder.name.isdigit():
            continue
        # The name, in parentheses, may hold anything; proc(5) has the fields behind it.
        fields = (text_of(folder / "stat") or "").rpartition(")")[2].split()
        if len(fields) < 15:  # it has just ended
            continue
        pid = int(folder.name)
        children.setdefault(int(fields[1]), []).append(pid)
        ticks[pid] = sum(int(x) for x in fields[11:15])  # utime stime, and of waited-for children
    total, todo = 0, [me]
    if me not in ticks:
        raise KeyError(me)
    while todo:
        pid = todo.pop()
        total += ticks[pid]
        todo += children.get(pid, [])
    return total


def _group_seconds(root: Path) -> float | None:
    """Return the CPU seconds of this container (cgroup v2), where it has a limit of its own."""
    if cpu_limit(root) is None:
        return None
    lines = (text_of(root / "sys/fs/cgroup/cpu.stat") or "").splitlines()
    used = next((line.split()[1] for line in lines if line.startswith("usage_usec ")), None)
    return None if used is None else int(used) / 1e6


class Watch:
    """Tells what others take of the CPUs that a run needs, in CPUs' worth of time.

    Attributes:
        of: How many CPUs a call of the run needs.
        before: What they took before it, or None: not known.
        during: What they took in the worst of the times that were watched, likewise.
    """

    def __init__(self, threads: int | None = None) -> None:
        """Watch for a run whose calls take so many threads; None: all CPUs."""
        cpus = this_machine().cores
        self._limit = cpu_limit()
        self.of: float = min(threads or cpus, cpus, self._limit or cpus)
        self.before: float | None = None
        self.during: float | None = None
        self._started: CpuTimes | None = None

    def look(self) -> None:
        """See what others take while nothing is measured yet, for half a second."""
        first = read_cpu_times()
        if first is not None:
            time.sleep(LOOK_SECONDS)
            self.before = taken(first, read_cpu_times(), self.of, self._limit)

    def start(self) -> None:
        """From here on something is measured."""
        self._started = read_cpu_times()

    def stop(self) -> None:
        """It is no longer; nothing happens where it was not started."""
        started, self._started = self._started, None
        found = taken(started, read_cpu_times(), self.of, self._limit)
        if found is not None:
            self.during = max(found, self.during or 0.0)

    @property
    def busy(self) -> str | None:
        """Why what is measured, or will be, decides nothing, in a clause; None: nothing is seen."""
        return doubt(self.to_dict(), ())

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Watch what is done inside."""
        self.start()
        try:
            yield
        finally:
            self.stop()

    def to_dict(self) -> dict[str, Any]:
        """Return it as JSON-able data, as docs/benchmark.md lists it."""
        figures = {"before": self.before, "during": self.during, "of": self.of}
        return {name: None if x is None else round(x, 2) for name, x in figures.items()}


def taken(
    first: CpuTimes | None, last: CpuTimes | None, of: float, limit: float | None = None
) -> float | None:
    """Return how much others took of ``of`` CPUs between two readings, in CPUs; None: not known.

    What they took of CPUs that the run leaves free is not counted. Where a container may use
    ``limit`` CPUs, others inside it take from that.
    """
    if first is None or last is None or last.at <= first.at or last.passed <= first.passed:
        return None
    seconds, own = last.at - first.at, last.own - first.own
    others = max(0.0, last.busy - first.busy - own) / seconds
    found = max(0.0, others - (last.cpus - of)) + (last.stolen - first.stolen) / seconds
    if limit is not None and first.group is not None and last.group is not None:
        inside = max(0.0, last.group - first.group - own) / seconds
        found = max(found, inside - (limit - of))
    return min(max(0.0, found), of)


def doubt(load: Mapping[str, Any] | None, stable: Sequence[bool]) -> str | None:
    """Return why a run's latencies decide nothing, in a clause; None: they do.

    Args:
        load: `Watch` as data, or None where nothing is known of others.
        stable: Whether each contestant's latency was stable.
    """
    found = load or {}
    took = found.get("during")
    took = found.get("before") if took is None else took
    of = found.get("of")
    if took is not None and of and took > BUSY * of:
        return f"the machine was busy: others took {took:.1f} of the {of:g} CPUs that a call needs"
    if len(stable) and not any(stable):
        who = f"none of {len(stable)} latencies" if len(stable) > 1 else "the latency"
        return f"{who} was {'not ' * (len(stable) == 1)}stable"
    return None


def stable_ones(rows: Sequence[Mapping[str, Any]]) -> list[bool]:
    """Return, of a result document's contestants that were timed, whether each was stable."""
    timed = (row.get("single_stream") for row in rows)
    return [bool(single.get("stable", True)) for single in timed if single]


def banner(doubted: str) -> str:
    """Return the line that stands above such figures."""
    return f"These latencies decide nothing: {doubted}. Measure again on a quiet machine."
