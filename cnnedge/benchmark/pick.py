"""Which contestant to run on this machine, under the accuracy budget, and why."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from cnnedge.benchmark.contestants import is_on_gpu
from cnnedge.benchmark.statistics import paired_ratio
from cnnedge.machine import Machine, this_machine
from cnnedge.runtimes import ORT, RUNTIMES


def pick(
    rows: Sequence[Mapping[str, Any]],
    *,
    bundle: str,
    max_drop: float,
    judged: bool,
    doubt: str | None = None,
    machine: Machine | None = None,
    macs: int | None = None,
    guessing: str | None = None,
) -> dict[str, Any]:
    """Return the pick among a model's contestants, as docs/benchmark.md lists it.

    The fastest of those within the budget. Of those that are as fast within noise, one that
    `cnnedge.load` runs by default is taken before another tool's, then the smaller drop, then the
    smaller file: an hour of measuring is no reason for one more dependency. Where latencies decide
    nothing, the pick is by what is known of this kind of CPU, and says so.

    Args:
        rows: The contestants' rows.
        bundle: What the bundle is called.
        max_drop: The budget, in points of top-1.
        judged: Whether accuracy means anything: not with random weights.
        doubt: Why latencies decide nothing, or None.
        machine: What they were measured on; None: this one.
        macs: Multiplications for one image, or None.
        guessing: How well the model does, where that is no better than by guessing: nobody is
            picked then.
    """
    timed = [row for row in rows if row.get("single_stream")]
    reasons = {
        row["name"]: no_numbers(row) or (outside(row, max_drop) if judged else None)
        for row in timed
    }
    fit = [row for row in timed if reasons[row["name"]] is None]
    if guessing or not fit:
        why = "nobody was measured within the accuracy budget"
        if guessing:
            why = f"the model itself is no better than guessing: {guessing}"
        return {
            "name": None,
            "title": None,
            "by": None,
            "why": why,
            "how": None,
            "runners_up": []
            if guessing
            else [_runner_up(row, reasons[row["name"]] or "") for row in timed],
        }
    if doubt is None:
        fastest = min(fit, key=lambda row: row["single_stream"]["p50_ms"])
        ratios = {row["name"]: _ratio(fastest, row) for row in fit}
        tied = [row for row in fit if row is fastest or ratios[row["name"]][1] <= 1.0]
        chosen = min(tied, key=_preference)
        why = _why(chosen, fastest, tied) + _lost(chosen, max_drop, judged) + _noted(chosen, tied)
        rest = sorted(timed, key=lambda row: row["single_stream"]["p50_ms"])
    else:
        machine, rest = machine or this_machine(), timed
        chosen = min(fit, key=lambda row: _by_arithmetic(row, machine))
        why = f"which is the fastest is not known: {doubt}; by arithmetic it is this one: "
        why += _arithmetic(chosen, machine, macs) + _lost(chosen, max_drop, judged)
    others = [row for row in rest if row is not chosen]
    beaten = _slower if doubt is None else _undecided
    return {
        "name": chosen["name"],
        "title": chosen["title"],
        "by": "latency" if doubt is None else "arithmetic",
        "why": why,
        "how": how(chosen, bundle),
        "runners_up": [
            _runner_up(row, reasons[row["name"]] or beaten(chosen, row)) for row in others
        ],
    }


def no_numbers(row: Mapping[str, Any]) -> str | None:
    """Return that a contestant answers NaN or infinity; None: it does not."""
    accuracy = row.get("accuracy") or {}
    count = accuracy.get("not_finite")
    return f"{count} of {accuracy['n']} answers are NaN or infinity" if count else None


def outside(row: Mapping[str, Any], max_drop: float) -> str | None:
    """Return why a contestant is outside the accuracy budget; None: it is within."""
    accuracy = row.get("accuracy")
    if accuracy is None:
        return "its accuracy was not measured here: pass --data"
    if accuracy["drop_points"] > max_drop:
        low, high = accuracy["drop_interval_points"]
        return (
            f"top-1 drops {accuracy['drop_points']:+.2f} points [{low:+.2f}, {high:+.2f}], more "
            f"than the {max_drop:g} allowed"
        )
    return None


def how(row: Mapping[str, Any], bundle: str) -> str:
    """Return how an app runs a contestant."""
    runtime, variant = row["runtime"], row["variant"]
    if runtime == "keras":
        return "keras.saving.load_model(…), as a tf.function"
    if runtime == "litert":
        return 'pip install "cnnedge[litert]"; cnnedge.backends.litert.convert_litert, open_litert'
    if ":" in runtime:
        return f"{runtime} on {bundle}/model.{variant}.onnx"
    if row["precision"] == "bf16":
        return f'OpenVINO on {bundle}/model.{variant}.onnx, INFERENCE_PRECISION_HINT "bf16"'
    call = f'cnnedge.load("{bundle}", variant="{variant}"'
    call += ")" if runtime == "cpu" else f', runtime="{runtime}")'
    with_ort = RUNTIMES[runtime].package == ORT  # which whoever loads bundles has
    return call if with_ort else f'pip install "cnnedge[{RUNTIMES[runtime].extra}]"; {call}'


def _preference(row: Mapping[str, Any]) -> tuple[Any, ...]:
    drop = (row.get("accuracy") or {}).get("drop_points", 0.0)
    return row["peer"] or row["runtime"] == "keras", drop, row["bytes"]


def _ratio(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> tuple[float, float, float]:
    """Return how many times faster ours is, and the interval."""
    return paired_ratio(ours["single_stream"]["samples_ms"], theirs["single_stream"]["samples_ms"])


def _why(
    chosen: Mapping[str, Any], fastest: Mapping[str, Any], tied: Sequence[Mapping[str, Any]]
) -> str:
    found = f"{chosen['single_stream']['p50_ms']:.2f} ms"
    against = chosen["single_stream"].get("against")
    if against and against["name"] != chosen["name"]:
        low, high = against["interval"]
        if low <= 1.0 <= high:  # a factor that may be chance is none
            found += f", [{low:.2f}, {high:.2f}] times as fast as {against['name']}"
        else:
            found += f", {against['ratio']:.2f}× [{low:.2f}, {high:.2f}] as fast as "
            found += against["name"]
    return f"the fastest within the budget: {found}" if chosen is fastest else found


def _lost(chosen: Mapping[str, Any], max_drop: float, judged: bool) -> str:
    """Return what it loses in accuracy, as a clause behind another."""
    accuracy = chosen.get("accuracy")
    if not judged:
        return "; its accuracy was not judged, since the weights are random"
    if not accuracy:
        return ""
    low, high = accuracy["drop_interval_points"]
    found = (
        f"; top-1 drops {accuracy['drop_points']:+.2f} points [{low:+.2f}, {high:+.2f}] "
        f"of {max_drop:g} allowed"
    )
    return found + (f", unproven on {accuracy['n']} images" if high > max_drop else "")


def _noted(chosen: Mapping[str, Any], tied: Sequence[Mapping[str, Any]]) -> str:
    equals = [row["title"] for row in tied if row is not chosen]
    found = f"; {', '.join(equals)} may be as fast" if equals else ""
    if not chosen["single_stream"]["stable"]:
        found += f"; unstable: {'; '.join(chosen['single_stream']['notes'])}"
    return found


def _by_arithmetic(row: Mapping[str, Any], machine: Machine) -> tuple[Any, ...]:
    """Return where a contestant stands in the order that is known without measuring."""
    on_gpu = is_on_gpu(row["runtime"])
    what = row["variant"] if on_gpu else row["precision"]
    order = RUNTIMES[row["runtime"]].variants if on_gpu else machine.fastest_first
    place = order.index(what) if what in order else len(order)
    peer, drop, size = _preference(row)
    return peer, not on_gpu, place, drop, size


def _arithmetic(row: Mapping[str, Any], machine: Machine, macs: int | None) -> str:
    count = "" if macs is None else f"{macs:,}" if macs < 1e6 else f"{macs / 1e6:,.0f} million"
    work = f"{count} multiplications" if count else "its work"
    found = f"{work} in {str(row['precision']).upper()}"
    return found + (" on a GPU" if is_on_gpu(row["runtime"]) else f"; {machine.why_first}")


def _undecided(chosen: Mapping[str, Any], row: Mapping[str, Any]) -> str:
    return "its latency decides nothing here"


def _slower(chosen: Mapping[str, Any], row: Mapping[str, Any]) -> str:
    ratio, low, high = _ratio(chosen, row)
    if low <= 1.0:
        return f"may be as fast: takes {ratio:.2f}× [{low:.2f}, {high:.2f}] the time"
    return f"takes {ratio:.2f}× [{low:.2f}, {high:.2f}] the time"


def _runner_up(row: Mapping[str, Any], why: str) -> dict[str, Any]:
    return {"name": row["name"], "title": row["title"], "why": why}
