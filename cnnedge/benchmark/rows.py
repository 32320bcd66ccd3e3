"""What a contestant has shown → its row in the result document, field by field."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from cnnedge.benchmark.peaks import SIZE, Bound, Peaks
from cnnedge.benchmark.rounds import Collected
from cnnedge.benchmark.statistics import (
    flatten,
    instabilities,
    paired_ratio,
    percentile_bound,
    unpaired_ratio,
)
from cnnedge.measurement import Measurement


def ms(seconds: float | None) -> float | None:
    """Return milliseconds, to a tenth of a microsecond."""
    return None if seconds is None else round(1e3 * seconds, 4)


def percentiles(samples: Sequence[float] | np.ndarray) -> dict[str, Any]:
    """Return ``n`` and the percentiles that so many samples let one quote."""
    measured = Measurement("", tuple(float(s) for s in samples))
    return {
        "n": len(measured.samples),
        "p50_ms": ms(measured.median),
        "p90_ms": ms(measured.percentile(90)),
        "p99_ms": ms(measured.percentile(99)),
        "p90_bound_ms": ms(percentile_bound(measured.samples, 90)),
        "p99_bound_ms": ms(percentile_bound(measured.samples, 99)),
    }


def contestant_row(
    one: Collected, baseline: Collected | None, bounds: Sequence[Bound] | None, why: str | None
) -> dict[str, Any]:
    """Return everything of a contestant but its answers.

    Args:
        one: What it has shown.
        baseline: Whom ratios are quoted against; None: nobody.
        bounds: The least time of each of its layers; None: they are not known.
        why: Why not.
    """
    who = one.contestant
    row: dict[str, Any] = {
        "name": who.name,
        "title": who.title,
        "runtime": who.runtime,
        "variant": who.variant,
        "precision": who.precision,
        "provider": one.opened[0]["provider"] if one.opened else None,
        "peer": who.peer,
        "bytes": who.bytes,
        "notes": dict(one.notes),
        "single_stream": _single_stream(one, baseline),
        "offline": _offline(one),
        "multi_stream": _multi_stream(one),
        "server": _server(one),
        "cold_start": _cold_start(one),
        "memory": _memory(one),
        "sustained": _sustained(one),
        "duty_cycle": _duty_cycle(one),
        "waterfall": _waterfall(one),
        "layers": _layers(one, bounds),
        "roofline": _roofline(one, bounds, why),
    }
    return row


def _single_stream(one: Collected, baseline: Collected | None) -> dict[str, Any] | None:
    if not len(flatten(one.rounds)):
        return None
    settled = [bool(w.get("settled")) for w in one.warm_ups]
    notes = instabilities(one.rounds, settled)
    found: dict[str, Any] = {
        **percentiles(flatten(one.rounds)),
        "against": None,
        "stable": not notes,
        "notes": notes,
        "warm_up_s": [round(w["seconds"], 3) for w in one.warm_ups if "seconds" in w],
        "samples_ms": [[[ms(s) for s in block] for block in blocks] for blocks in one.rounds],
    }
    if baseline is not None and len(flatten(baseline.rounds)):
        ratio, low, high = paired_ratio(one.rounds, baseline.rounds)
        found["against"] = {
            "name": baseline.contestant.name,
            "ratio": round(ratio, 4),
            "interval": [round(low, 4), round(high, 4)],
        }
    if one.gpu:
        medians = Measurement("", (), gpu=tuple(one.gpu)).gpu_medians()
        found["gpu"] = {f"{name} (ms)": ms(value) for name, value in medians.items()}
    return found


def _offline(one: Collected) -> list[dict[str, Any]]:
    found = []
    for batch, rounds in sorted(one.offline.items()):
        median = float(np.median(np.concatenate(rounds)))
        found.append(
            {
                "batch": batch,
                "p50_ms": ms(median),
                "images_per_second": round(batch / median, 2),
                "samples_ms": [[ms(s) for s in samples] for samples in rounds],
            }
        )
    return found


def _multi_stream(one: Collected) -> list[dict[str, Any]]:
    found = []
    for clients, turns in sorted(one.clients.items()):
        samples = [s for turn in turns for s in turn["samples"]]
        elapsed = sum(turn["elapsed"] for turn in turns)
        rate = round(len(samples) / elapsed, 2)
        found.append({"clients": clients, "images_per_second": rate, **percentiles(samples)})
    return found


def _server(one: Collected) -> list[dict[str, Any]]:
    return [
        {
            "load": load,
            "offered_per_second": round(kept["rate"], 2),
            "images_per_second": round(len(kept["samples"]) / kept["elapsed"], 2),
            **percentiles(kept["samples"]),
        }
        for load, kept in sorted(one.server.items())
    ]


def _cold_start(one: Collected) -> dict[str, Any] | None:
    if not one.opened or "total" not in one.opened[0]:
        return None
    parts = {name: [o[name] for o in one.opened] for name in ("total", "import", "load", "first")}
    return {
        **{f"{name}_ms": ms(float(np.median(taken))) for name, taken in parts.items()},
        "samples_ms": {name: [ms(s) for s in taken] for name, taken in parts.items()},
    }


def _memory(one: Collected) -> dict[str, Any] | None:
    peaks = [m["peak_mib"] for m in one.memory if m.get("peak_mib") is not None]
    before = [m["before_mib"] for m in one.memory if m.get("before_mib") is not None]
    if not peaks:
        return None
    return {
        "peak_mib": round(float(max(peaks)), 1),
        "before_mib": round(float(np.median(before)), 1) if before else None,
    }


def _sustained(one: Collected) -> dict[str, Any] | None:
    if len(one.sustained) < 4:
        return None
    quarter = len(one.sustained) // 4
    medians = [window["p50"] for window in one.sustained]
    # Windows are what is resampled: calls within one are not independent of each other.
    first, last = [[[m] for m in medians[:quarter]]], [[[m] for m in medians[-quarter:]]]
    ratio, resampled = unpaired_ratio(last, first)
    interval = [round(100 * (float(x) - 1), 2) for x in np.percentile(resampled, [2.5, 97.5])]
    events = [w["throttled"] for w in one.sustained if w["throttled"] is not None]
    notes = [f"{sum(events)} throttling events"] if sum(events) else []
    if one.sustained[0]["temperature_c"] is None:
        notes.append("this machine tells no temperature")
    if not events:
        notes.append("this machine counts no throttling events")
    if quarter == 1:
        notes.append("too short for an interval of the drift")
    return {
        "seconds": round(one.sustained[-1]["at"], 1),
        "windows": [
            {
                "at_s": round(w["at"], 2),
                "n": w["n"],
                "p50_ms": ms(w["p50"]),
                "clock_mhz": w["clock_mhz"],
                "temperature_c": w["temperature_c"],
                "throttled": w["throttled"],
            }
            for w in one.sustained
        ],
        "drift_percent": round(100 * (ratio - 1), 2),
        "interval": interval if quarter > 1 else None,
        "notes": notes,
    }


def _duty_cycle(one: Collected) -> dict[str, Any] | None:
    if not one.idle:
        return None
    return {
        "first_ms": [ms(s) for s in one.idle],
        "first_p50_ms": ms(float(np.median(one.idle))),
        "steady_p50_ms": ms(one.median) if len(flatten(one.rounds)) else None,
    }


def _waterfall(one: Collected) -> dict[str, Any] | None:
    if not one.whole:
        return None
    return {
        "stages": [
            {"name": name, "p50_ms": ms(float(np.median(samples)))}
            for name, samples in one.stages.items()
        ],
        "whole_p50_ms": ms(float(np.median(one.whole))),
        "app_p50_ms": ms(float(np.median(one.app))) if one.app else None,
        "n": len(one.whole),
    }


def _layers(one: Collected, bounds: Sequence[Bound] | None) -> list[dict[str, Any]]:
    if not one.layers:
        return []
    by_name = {bound.layer.name: bound for bound in bounds or ()}
    rows: dict[str, dict[str, Any]] = {}
    for node, seconds in one.layers.items():
        name = layer_of(node, by_name)
        bound = by_name.get(name)
        row = rows.setdefault(
            name,
            {
                "name": name,
                "kind": bound.layer.op_type if bound else None,
                "ms": 0.0,
                "macs": bound.layer.macs if bound else None,
                "precision": bound.layer.computed if bound else None,
                "bound_ms": ms(bound.seconds) if bound else None,
                "fraction": None,
            },
        )
        row["ms"] += 1e3 * seconds
    for row in rows.values():
        row["ms"] = round(row["ms"], 4)
        if row["bound_ms"] is not None and row["ms"]:
            row["fraction"] = round(row["bound_ms"] / row["ms"], 4)
    return list(rows.values())


def layer_of(node: str, layers: Mapping[str, Any]) -> str:
    """Return the layer that a profile's node belongs to; the node itself where there is none.

    ONNX Runtime puts "fused " or, in FP16, "InsertedPrecisionFreeCast_" before a layer's name;
    "_nchwc", "/relu" or the like comes after it.
    """
    bare = node.removeprefix("InsertedPrecisionFreeCast_").removeprefix("fused ")
    for length in range(len(bare), 0, -1):
        if bare[:length] in layers and re.match(r"$|[/_ ]", bare[length:]):
            return bare[:length]
    return node


def _roofline(one: Collected, bounds: Sequence[Bound] | None, why: str | None) -> dict[str, Any]:
    if bounds is None:
        return {"bound_ms": None, "fraction": None, "why": why}
    bound = sum(b.seconds for b in bounds)
    measured = one.median if len(flatten(one.rounds)) else None
    return {
        "bound_ms": ms(bound),
        "fraction": None if measured is None else round(bound / measured, 4),
        "why": None,
    }


def peak_rows(rounds: Sequence[Mapping[str, Any]], peaks: Peaks) -> dict[str, Any]:
    """Return the machine's peaks as data."""

    def giga(kind: str) -> dict[str, Any] | None:
        samples = [found[kind] for found in rounds if found[kind]]
        if not samples:
            return None
        return {
            "giga_per_second": round(max(samples) / 1e9, 2),
            "by": peaks.by.get(kind),
            "size": SIZE,
            "samples": [round(s / 1e9, 2) for s in samples],
        }

    largest = max(peaks.bandwidth)
    return {
        "fp32": giga("fp32"),
        "int8": giga("int8"),
        "bandwidth": {
            "gigabytes_per_second": round(peaks.bandwidth[largest] / 1e9, 2),
            "by": "NumPy, reading",
            "size": largest,
            "by_working_set": [
                {"mib": mib, "gigabytes_per_second": round(rate / 1e9, 2)}
                for mib, rate in sorted(peaks.bandwidth.items())
            ],
            "samples": [
                round(dict(map(tuple, found["bandwidth"]))[largest] / 1e9, 2) for found in rounds
            ],
        },
    }
