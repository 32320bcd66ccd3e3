"""What the figures of the benchmark page show, in a sentence each; empty where nothing stands out.

Like the figures, each takes only contestants that have what it speaks of.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from cnnedge.report.style import Row, flat, listed, ms, number, percent, title_of


def front(best: Sequence[Row], others: int, floor: float | None) -> str:
    """Say who is on the front of accuracy, or size, and latency.

    Args:
        best: Points of the front, the fastest first.
        others: How many contestants are not on it.
        floor: The least top-1 within the budget, in percent, or None.
    """
    names = [str(p["title"]) for p in best]
    known = floor is not None and best[0]["top1"] is not None
    outside = [str(p["title"]) for p in best if known and p["top1"] < floor]
    budget = f"; {listed(outside)} lost more than the budget allows" if outside else ""
    if len(names) == 1:
        better = "more accurate" if best[0]["top1"] is not None else "smaller"
        return f"{names[0]} leads: no other is faster or {better}{budget}." if others else ""
    return f"On the front: {listed(names)}{budget}."


def latency(contestants: Sequence[Row]) -> str:
    """Say who is the steadiest and who the least."""
    tails = [
        (c["single_stream"]["p99_ms"] / c["single_stream"]["p50_ms"], title_of(c))
        for c in contestants
        if c["single_stream"].get("p99_ms") and c["single_stream"].get("p50_ms")
    ]
    if not tails:
        return "Too few calls for a p99: it is quoted from 662 on."
    (low, steady), (high, wild) = min(tails), max(tails)
    if len(tails) == 1:
        return f"The p99 of {steady} is {low:.2f} times its p50."
    return (
        f"The steadiest is {steady}, whose p99 is {low:.2f} times its p50; "
        f"the least steady {wild}, {high:.2f} times."
    )


def throughput(contestants: Sequence[Row]) -> str:
    """Say who gets the most through, in batches of what size, and what the batch gains."""
    c, run = _best(contestants, "offline", lambda r: r["images_per_second"])
    text = f"Most: {title_of(c)}, {number(run['images_per_second'])} images/s"
    text += f" in batches of {run['batch']}"
    single = next((r for r in c["offline"] if r["batch"] == 1), None)
    if single and run["batch"] > 1:
        gain = run["images_per_second"] / single["images_per_second"]
        text += f", {gain:.2f} times what it does one by one"
    return text + "."


def multi_stream(contestants: Sequence[Row]) -> str:
    """Say who gets the most through, with how many clients, and what it costs in latency."""
    c, run = _best(contestants, "multi_stream", lambda r: r["images_per_second"])
    clients = run["clients"]
    text = f"Most: {title_of(c)}, {number(run['images_per_second'])} images/s with {clients} "
    text += "clients" if clients != 1 else "client"
    alone = next((r for r in c["multi_stream"] if r["clients"] == 1), None)
    if alone and clients > 1:
        text += f"; its median goes from {ms(alone['p50_ms'])} to {ms(run['p50_ms'])} for it"
    return text + "."


def server(contestants: Sequence[Row]) -> str:
    """Say what the highest load costs the one that bears it best."""
    tail = next((p for p in ("p99_ms", "p90_ms", "p50_ms") if _all_have(contestants, p)), None)
    if tail is None:
        return ""
    top = max(run["load"] for c in contestants for run in c["server"])
    ends = [(run[tail], c) for c in contestants for run in c["server"] if run["load"] == top]
    worst, c = min(ends, key=lambda pair: pair[0])
    calm = min(c["server"], key=lambda r: r["load"])
    text = f"Shortest {tail[:3]} at {percent(top)} load: {title_of(c)}, {ms(worst)}"
    if calm["load"] < top:
        ratio = worst / calm[tail]
        text += f", {number(ratio, 2)} times that at {percent(calm['load'])}"
    return text + "."


def waterfall(contestants: Sequence[Row]) -> str:
    """Say how much of the fastest's way from file to label the network itself takes."""
    c = min(contestants, key=lambda c: c["waterfall"].get("whole_p50_ms") or _whole(c))
    whole, found = _whole(c), c["waterfall"]
    compute = sum(s["p50_ms"] or 0 for s in found["stages"] if s["name"] == "compute")
    text = f"{title_of(c)} is the fastest: {ms(found.get('whole_p50_ms') or whole)}"
    if compute and whole:
        text += f", of which the network takes {percent(compute / whole)}"
        before = max(found["stages"], key=lambda s: s["p50_ms"] or 0)
        if before["name"] != "compute":
            text += f" and {before['name']} {percent(before['p50_ms'] / whole)}"
    return text + "."


def cold_start(contestants: Sequence[Row]) -> str:
    """Say who answers first from nothing, and what takes the most of it."""
    c = min(contestants, key=lambda c: c["cold_start"]["total_ms"])
    found = c["cold_start"]
    parts = {"importing": "import_ms", "loading": "load_ms", "the first answer": "first_ms"}
    known = {what: found[key] for what, key in parts.items() if found.get(key)}
    text = f"{title_of(c)} answers first, after {ms(found['total_ms'])}"
    if known:
        what = max(known, key=lambda part: known[part])
        text += f"; {what} takes {percent(known[what] / found['total_ms'])} of it"
    return text + "."


def sustained(contestants: Sequence[Row]) -> str:
    """Say who got slower beyond noise, and whether the machine told of throttling."""
    drifted, events = [], 0
    for c in contestants:
        run = c["sustained"]
        low, _ = run.get("interval") or (None, None)
        drift = run.get("drift_percent")
        if drift is not None and low is not None and low > 0:
            drifted.append(f"{title_of(c)} by {drift:.1f} % [{low:.1f}, {run['interval'][1]:.1f}]")
        events += sum(w.get("throttled") or 0 for w in run["windows"])
    text = f"Slower at the end than at the start: {listed(drifted)}." if drifted else ""
    if not drifted and all(c["sustained"].get("interval") for c in contestants):
        text = "Nobody got slower beyond noise from the first quarter to the last."
    return text + (f" The machine counted {events:,} throttling events." if events else "")


def duty_cycle(contestants: Sequence[Row]) -> str:
    """Say whom a pause costs the most."""
    c = max(contestants, key=_after_pause)
    if _after_pause(c) < 1.1:
        return "Nobody's first answer is more than 10 % slower than its steady one."
    return f"The pause costs {title_of(c)} the most: {number(_after_pause(c), 2)} times its median."


def layers(contestant: Row) -> str:
    """Say where the time goes and which of the large layers is the furthest from its bound."""
    found = [x for x in contestant["layers"] if x.get("ms")]
    total = sum(x["ms"] for x in found)
    top = sorted(found, key=lambda x: -x["ms"])[:3]
    if len(found) <= 3 or not total:
        return ""
    share = percent(sum(x["ms"] for x in top) / total)
    text = f"{listed([str(x.get('name')) for x in top])} take {share} of {ms(total)} in layers."
    slack = [(x["ms"] - x["bound_ms"], x) for x in found if x.get("bound_ms")]
    if slack:
        lost, x = max(slack, key=lambda pair: pair[0])
        text += f" Most could be won in {x['name']}: at best {ms(lost)}."
    return text


def confusion(contestant: Row) -> str:
    """Say how many answers are wrong and what is mistaken the most."""
    counts = contestant.get("confusion") or []
    total = sum(map(sum, counts))
    right = sum(row[i] for i, row in enumerate(counts))
    text = f"{total - right:,} of {total:,} answers are wrong" if total else ""
    common = next(iter(contestant.get("confused") or []), None)
    if common and total > right:
        text += f"; the commonest mistake is “{common['answer']}” for “{common['truth']}”, "
        text += f"{common.get('count') or 0:,}×"
    return text + "." if text else ""


def _after_pause(contestant: Row) -> float:
    cycle = contestant["duty_cycle"]
    return cycle["first_p50_ms"] / cycle["steady_p50_ms"]


def _all_have(contestants: Sequence[Row], key: str) -> bool:
    return all(run.get(key) for c in contestants for run in c["server"])


def _whole(contestant: Row) -> float:
    return sum(flat([s.get("p50_ms") for s in contestant["waterfall"]["stages"]]))


def _best(
    contestants: Sequence[Row], scenario: str, score: Callable[[Any], float]
) -> tuple[Row, Any]:
    return max(
        ((c, run) for c in contestants for run in c[scenario]), key=lambda pair: score(pair[1])
    )
