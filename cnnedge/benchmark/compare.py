"""Two results of the same suite: what regressed, beyond noise.

Two runs are of two times, and machines differ from one hour to the next more than calls do. So the
arithmetic peak that each run measured of its machine stands beside the latencies: a contestant has
regressed only where it slowed down by more than the machine did.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from cnnedge.benchmark.accuracy import unpack
from cnnedge.benchmark.statistics import block_medians, unpaired_ratio
from cnnedge.comparison import paired_interval

TOLERANCE = 0.03  # of a latency: less is nobody's regression
FEWEST_ROUNDS = 2  # that tell how much one process differs from the next
SIZE_TOLERANCE = 0.01
MEMORY_TOLERANCE = 0.10


@dataclass(frozen=True)
class Change:
    """What became of one figure of one contestant.

    Attributes:
        model: The model's name; likewise the contestant's.
        contestant: Its name.
        figure: "p50", "offline, batch 2 to 16", "top-1", "size", "memory" or "measured".
        before: The old figure.
        after: The new one.
        unit: Of both.
        ratio: New over old, where that says something.
        interval: Its 95 % interval.
        verdict: "regressed", "improved", "same", "within noise" or "not comparable".
        why: One clause.
    """

    model: str
    contestant: str
    figure: str
    before: float | None
    after: float | None
    unit: str
    ratio: float | None
    interval: tuple[float, float] | None
    verdict: str
    why: str = ""


@dataclass(frozen=True)
class Changes:
    """Two results, compared.

    Attributes:
        rows: The changes.
        machine: How much faster the new run's machine was by its FP32 peak, and its interval.
        notes: What makes the comparison doubtful.
        doubts: Whose latencies decide nothing, and why.
    """

    rows: tuple[Change, ...]
    machine: tuple[float, float, float] | None
    notes: tuple[str, ...]
    doubts: tuple[str, ...] = ()

    @property
    def regressed(self) -> list[Change]:
        """The regressions."""
        return [row for row in self.rows if row.verdict == "regressed"]

    def to_dict(self) -> dict[str, Any]:
        """Return it as JSON-able data."""
        return {
            "machine": self.machine,
            "notes": list(self.notes),
            "doubts": list(self.doubts),
            "regressed": bool(self.regressed),
            "changes": [asdict(row) for row in self.rows],
        }


def compare_results(
    old: Mapping[str, Any], new: Mapping[str, Any], *, tolerance: float = TOLERANCE
) -> Changes:
    """Compare two result documents.

    Args:
        old: What was measured before.
        new: What was measured since.
        tolerance: By which share a latency may grow.
    """
    machine, resampled = _machine(old, new)
    rows: list[Change] = []
    doubts: list[str] = []
    before = {model["name"]: model for model in old["models"]}
    for model in new["models"]:
        if model["name"] not in before:
            continue
        found = _model(before[model["name"]], model, resampled, tolerance)
        doubted = [
            f"{model['name']}, the {which} result: {one['doubt']}"
            for which, one in (("old", before[model["name"]]), ("new", model))
            if one.get("doubt")
        ]
        rows += [_undecided(row, doubted[0]) for row in found] if doubted else found
        doubts += doubted
    gone = sorted(set(before) - {model["name"] for model in new["models"]})
    return Changes(tuple(rows), machine, tuple(_notes(old, new, gone)), tuple(doubts))


def _undecided(row: Change, doubted: str) -> Change:
    """Take back a verdict on a time; other figures do not mind a busy machine."""
    timed = row.figure == "p50" or row.figure.startswith("offline")
    return replace(row, verdict="not comparable", why=doubted) if timed else row


def _model(
    old: Mapping[str, Any], new: Mapping[str, Any], machine: np.ndarray | None, tolerance: float
) -> list[Change]:
    rows: list[Change] = []
    after = {one["name"]: one for one in new["contestants"]}
    reasons = {left["name"]: left["why"] for left in new.get("left_out", ())}
    for one in old["contestants"]:
        name = one["name"]
        if one["single_stream"] is None:
            continue
        now = after.get(name)
        if now is None or now["single_stream"] is None:
            why = reasons.get(name) or (now or {}).get("error") or "it was not asked for"
            verdict = "regressed" if name in reasons or now is not None else "not comparable"
            rows.append(
                Change(new["name"], name, "measured", None, None, "", None, None, verdict, why)
            )
            continue
        rows.append(
            _latency(
                new["name"], name, one["single_stream"], now["single_stream"], machine, tolerance
            )
        )
        for row in (
            _throughput(new["name"], one, now, machine, tolerance),
            _accuracy(old, new, one, now),
        ):
            rows += [] if row is None else [row]
        rows += _sizes(new["name"], one, now)
    return rows


def _latency(
    model: str,
    name: str,
    old: Mapping[str, Any],
    new: Mapping[str, Any],
    machine: np.ndarray | None,
    tolerance: float,
) -> Change:
    ratio, resampled = unpaired_ratio(new["samples_ms"], old["samples_ms"])
    interval = _interval(resampled)
    rounds = min(len(block_medians(one["samples_ms"])) for one in (old, new))
    verdict, why = _verdict(ratio, resampled, machine, tolerance, rounds)
    return Change(
        model, name, "p50", old["p50_ms"], new["p50_ms"], "ms", ratio, interval, verdict, why
    )


def _throughput(
    model: str,
    old: Mapping[str, Any],
    new: Mapping[str, Any],
    machine: np.ndarray | None,
    tolerance: float,
) -> Change | None:
    """Compare all batch sizes as one figure: many of few rounds each would often err by chance."""
    points = [{p["batch"]: p for p in one.get("offline") or ()} for one in (old, new)]
    # Single-stream tells of batch 1, and better.
    batches = sorted(set(points[0]) & set(points[1]) - {1})
    if not batches:
        return None
    before, after = (_per_image(found, batches) for found in points)
    ratio, resampled = unpaired_ratio(_as_rounds(after), _as_rounds(before))
    verdict, why = _verdict(ratio, resampled, machine, tolerance, min(len(before), len(after)))
    return Change(
        model,
        old["name"],
        f"offline, batch {batches[0]} to {batches[-1]}",
        float(np.median(before)),
        float(np.median(after)),
        "ms an image",
        ratio,
        _interval(resampled),
        verdict,
        why,
    )


def _per_image(points: Mapping[int, Mapping[str, Any]], batches: Sequence[int]) -> list[float]:
    """Return each round's milliseconds an image, the geometric mean over batch sizes."""
    rounds = min(len(points[batch]["samples_ms"]) for batch in batches)
    return [
        float(np.exp(np.mean([np.log(np.median(points[b]["samples_ms"][r]) / b) for b in batches])))
        for r in range(rounds)
    ]


def _as_rounds(values: Sequence[float]) -> list[list[list[float]]]:
    """Return one value a round as samples."""
    return [[[value]] for value in values]


def _verdict(
    ratio: float, resampled: np.ndarray, machine: np.ndarray | None, tolerance: float, rounds: int
) -> tuple[str, str]:
    """Judge a latency's growth, with and without what the machine itself did."""
    low, high = _interval(resampled)
    if low > 1 + tolerance:
        if rounds < FEWEST_ROUNDS:
            return "not comparable", "one round cannot tell a slower model from an unlucky process"
        if machine is None:
            return "regressed", ""
        # `machine` is how many times faster the new run's machine was: at the old one's rate the
        # new latency would be so many times longer.
        adjusted_low, adjusted_high = _interval(resampled * machine)
        if adjusted_low > 1 + tolerance:
            return "regressed", ""
        return (
            "within noise",
            f"the machine was slower too: {adjusted_low:.2f} to {adjusted_high:.2f} at its rate",
        )
    if high < 1 - tolerance:
        return "improved", ""
    if low >= 1 - tolerance and high <= 1 + tolerance:
        return "same", ""
    return "within noise", ""


def _accuracy(
    old: Mapping[str, Any], new: Mapping[str, Any], one: Mapping[str, Any], now: Mapping[str, Any]
) -> Change | None:
    """Compare top-1 on the same images, paired."""
    data, later = old.get("data"), new.get("data")
    if not data or not later or not one.get("right") or not now.get("right"):
        return None
    args = (new["name"], one["name"], "top-1")
    before, after = one["accuracy"]["top1"], now["accuracy"]["top1"]
    if data["sha256"] != later["sha256"] or data["images"] != later["images"]:
        return Change(*args, before, after, "", None, None, "not comparable", "other images")
    right, right_now = (unpack(row["right"], data["images"]) for row in (one, now))
    lost, won = int((right & ~right_now).sum()), int((~right & right_now).sum())
    low, high = paired_interval(lost, won, data["images"])
    verdict = "regressed" if low > 0 else "improved" if high < 0 else "within noise"
    verdict = "same" if lost == won == 0 else verdict
    why = f"{lost} lost, {won} won of {data['images']}: drop [{low:+.2f}, {high:+.2f}] points"
    return Change(*args, before, after, "", None, None, verdict, why)


def _sizes(model: str, old: Mapping[str, Any], new: Mapping[str, Any]) -> list[Change]:
    megabytes = [one["bytes"] / 1e6 for one in (old, new)]
    memory = [(one.get("memory") or {}).get("peak_mib") for one in (old, new)]
    return [
        Change(
            *(model, old["name"], figure, before, after, unit, after / before, None),
            "regressed"
            if after > (1 + tolerance) * before
            else "improved"
            if after < (1 - tolerance) * before
            else "same",
        )
        for figure, unit, tolerance, (before, after) in (
            ("size", "MB", SIZE_TOLERANCE, megabytes),
            ("memory", "MiB", MEMORY_TOLERANCE, memory),
        )
        if before and after
    ]


def _machine(
    old: Mapping[str, Any], new: Mapping[str, Any]
) -> tuple[tuple[float, float, float] | None, np.ndarray | None]:
    """Return how many times faster the new run's machine was, by its FP32 peak, and resamples."""
    try:
        before, after = (doc["peaks"]["fp32"]["samples"] for doc in (old, new))
    except (KeyError, TypeError):
        return None, None
    if not before or not after:
        return None, None
    rates = [[[[rate] for rate in samples]] for samples in (after, before)]
    ratio, resampled = unpaired_ratio(*rates, seed=1)
    low, high = _interval(resampled)
    return (ratio, low, high), resampled


def _interval(resampled: np.ndarray) -> tuple[float, float]:
    low, high = np.percentile(resampled, [2.5, 97.5])
    return float(low), float(high)


def _notes(old: Mapping[str, Any], new: Mapping[str, Any], gone: Sequence[str]) -> list[str]:
    notes = [f"the model {name} is not in the new result" for name in gone]
    machines = [doc["environment"]["machine"]["cpu"] for doc in (old, new)]
    if machines[0] != machines[1]:
        notes.append(f"other machines: {machines[0]} and {machines[1]}")
    threads = [doc["environment"]["threads"] for doc in (old, new)]
    if threads[0] != threads[1]:
        notes.append(f"other numbers of threads: {threads[0]} and {threads[1]}")
    tools = [doc["environment"].get("tools", {}) for doc in (old, new)]
    notes += [
        f"{name} {tools[0][name]} → {tools[1][name]}"
        for name in sorted(set(tools[0]) & set(tools[1]))
        if tools[0][name] != tools[1][name]
    ]
    return notes
