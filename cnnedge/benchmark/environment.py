"""What a figure is quoted with: the machine, its condition while it was measured, and versions."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cnnedge.machine import Machine, this_machine, tool_versions


def describe_gpu() -> tuple[dict[str, Any] | None, str]:
    """Return this machine's GPU as data; or None, and why there is none."""
    from cnnedge.backends.gpu import find_gpu

    facts, why = find_gpu()
    return (None if facts is None else facts.to_dict()), why


def lacking(precision: str, machine: Machine) -> str | None:
    """Return what a CPU lacks for a precision to be fast on it, in words; None: nothing."""
    if precision == "int8" and not machine.has_int8_dot_product:
        return "this CPU has no int8 dot product such as VNNI"
    if precision == "fp16" and not machine.has_fp16_arithmetic:
        return "this CPU has no FP16 arithmetic: it is emulated in FP32"
    return None


def environment(threads: int | None) -> dict[str, Any]:
    """Return what every figure is quoted with: machine, versions, threads, what is timed."""
    return {
        "machine": this_machine().to_dict(),
        "threads": threads or this_machine().cores,
        "timed": "the runtime call: uint8 tensor in, probabilities out",
        "tools": tool_versions(),
    }


@dataclass(frozen=True)
class Sensors:
    """What the machine tells of itself while it works; each None where it does not.

    Attributes:
        clock_mhz: Mean of the cores' clocks.
        temperature_c: The hottest thermal zone.
        throttled: Thermal throttling events since boot, of all cores.
        stolen: CPU seconds that other guests of the host took from this one, since boot.
        busy: CPU seconds of all cores since boot, idle ones included.
    """

    clock_mhz: float | None
    temperature_c: float | None
    throttled: int | None
    stolen: float | None
    busy: float | None


def read_sensors(root: Path = Path("/")) -> Sensors:
    """Read the machine's sensors, from Linux' ``/sys`` and ``/proc`` under ``root``."""
    cpus = root / "sys/devices/system/cpu"
    clocks = [v / 1e3 for v in _numbers(cpus.glob("cpu[0-9]*/cpufreq/scaling_cur_freq"))]
    zones = [v / 1e3 for v in _numbers((root / "sys/class/thermal").glob("thermal_zone*/temp"))]
    events = list(_numbers(cpus.glob("cpu[0-9]*/thermal_throttle/core_throttle_count")))
    stolen, busy = _cpu_seconds(root)
    return Sensors(
        sum(clocks) / len(clocks) if clocks else _cpuinfo_clock(root),
        max(zones, default=None),
        int(sum(events)) if events else None,
        stolen,
        busy,
    )


def conditions(before: Sensors, after: Sensors, root: Path = Path("/")) -> dict[str, Any]:
    """Return under which conditions a run was measured, as docs/benchmark.md lists them."""
    cpus = root / "sys/devices/system/cpu"
    governors = {text_of(path) for path in cpus.glob("cpu[0-9]*/cpufreq/scaling_governor")}
    clocks = [s.clock_mhz for s in (before, after) if s.clock_mhz is not None]
    steal = None
    if None not in (before.stolen, after.stolen, before.busy, after.busy):
        passed = after.busy - before.busy  # type: ignore[operator]
        steal = (after.stolen - before.stolen) / passed if passed > 0 else 0.0  # type: ignore[operator]
    return {
        "governor": ", ".join(sorted(g for g in governors if g)) or None,
        "clock_mhz": round(sum(clocks) / len(clocks)) if clocks else None,
        "virtual": _hypervisor(root),
        "cpu_limit": cpu_limit(root),
        "load": _load(),
        "steal": None if steal is None else round(steal, 4),
    }


def now_utc() -> str:
    """Return the time, UTC, ISO 8601 to the second."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def text_of(path: Path) -> str | None:
    """Return what a file of the system says; None where it does not."""
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return None


def _numbers(paths: Any) -> list[float]:
    found = []
    for path in paths:
        text = text_of(path)
        try:
            found.append(float(text or ""))
        except ValueError:  # a sensor that is there and says nothing
            continue
    return found


def _cpuinfo_clock(root: Path) -> float | None:
    lines = (text_of(root / "proc/cpuinfo") or "").splitlines()
    clocks = [float(line.split(":")[1]) for line in lines if line.startswith("cpu MHz")]
    return sum(clocks) / len(clocks) if clocks else None


def _cpu_seconds(root: Path) -> tuple[float | None, float | None]:
    """Return stolen and all CPU seconds; see proc(5), /proc/stat."""
    fields = (text_of(root / "proc/stat") or "").split("\n", 1)[0].split()
    if len(fields) < 9 or fields[0] != "cpu":
        return None, None
    ticks = [int(field) for field in fields[1:9]]
    rate = os.sysconf("SC_CLK_TCK")
    return ticks[7] / rate, sum(ticks) / rate


def _hypervisor(root: Path) -> str | None:
    """Return who hosts this machine, where it is a guest."""
    vendor = text_of(root / "sys/class/dmi/id/sys_vendor")
    flags = next(
        (
            line
            for line in (text_of(root / "proc/cpuinfo") or "").splitlines()
            if line.startswith("flags")
        ),
        "",
    )
    if "hypervisor" not in flags.split():
        return None
    return vendor or "a hypervisor"


def cpu_limit(root: Path = Path("/")) -> float | None:
    """Return how many cores a container may use (cgroup v2); None: no limit that can be read."""
    quota, _, period = (text_of(root / "sys/fs/cgroup/cpu.max") or "").partition(" ")
    return int(quota) / int(period) if quota.isdigit() and period.isdigit() else None


def _load() -> float | None:
    try:
        return round(os.getloadavg()[0], 2)
    except OSError:
        return None
