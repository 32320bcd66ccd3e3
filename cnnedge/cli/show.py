"""Results on the terminal: tables for people, one JSON document for programs."""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Mapping
from typing import Any

import click

from cnnedge.cli.shell import fitted, say, say_lines
from cnnedge.errors import printable


def print_json(document: Any) -> None:
    """Print one JSON document, with escapes for what would command a terminal."""
    text = json.dumps(document, indent=1, ensure_ascii=False)
    plain = text.replace("\n", "")
    if fitted(printable(plain), sys.stdout) != plain:
        text = json.dumps(document, indent=1)
    click.echo(text)


def print_table(
    headers: tuple[str, ...], rows: list[tuple[Any, ...]], *, left: tuple[int, ...] = (0,)
) -> None:
    """Print a table; the columns named in ``left`` are aligned to the left."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for index, header in enumerate(headers):
        table.add_column(header, justify="left" if index in left else "right")
    for row in rows:
        table.add_row(*(_cell(value) for value in row))
    console = Console()
    if not console.is_terminal:  # a pipe or a file has no width: do not fold the table there
        console = Console(width=200)
    with console.capture() as drawn:
        console.print(table)
    click.echo(fitted(drawn.get(), sys.stdout), nl=False)


def _cell(value: Any) -> str:
    from rich.markup import escape

    return "–" if value is None else escape(printable(str(value)))


def show_doubt(doubt: str | None) -> None:
    """Say above all figures, where it is so, that latencies decide nothing."""
    from cnnedge.benchmark.load import banner

    if doubt is not None:
        click.secho(fitted(printable(banner(doubt)), sys.stdout), bold=True)


def show_stack(comparison: Any, as_json: bool) -> None:
    """Show a `StackComparison`."""
    if as_json:
        return print_json(comparison.to_dict())
    return say_lines(str(comparison))


def show_inspection(inspection: Any) -> None:
    """Show an `Inspection`."""
    headers, *rows = inspection.rows()
    print_table(tuple(headers), [tuple(row) for row in rows], left=(0, 1))
    for note in inspection.notes:
        say(f"note: {note}", err=True)


def show_bundle(bundle: Any) -> None:
    """Show what was exported, as its manifest has it."""
    from cnnedge.report import doubt_of, guesses, variant_rows

    doubt = doubt_of(bundle.manifest)
    show_doubt(doubt)
    if doubt is not None:
        say("cnnedge.load goes by the order that is known for its CPU's instruction set.")
    rows = [
        (
            row.title,
            f"{row.megabytes:.1f} MB",
            None if row.top1 is None else f"{row.top1:.2f} %",
            None if row.drop is None else "{:+.2f} [{:+.2f}, {:+.2f}]".format(*row.drop),
            _difference(row.max_abs_diff, row.limit),
            None if row.median_ms is None else f"{row.median_ms:.2f} ms",
            None if row.speed_up is None else f"{row.speed_up:.1f}×",
            row.status,
        )
        for row in variant_rows(bundle.manifest)
    ]
    headers = (
        "variant",
        "size",
        "top-1",
        "drop [95 %]",
        "max |Δp| of limit",
        "latency",
        "speed",
        "verdict",
    )
    print_table(headers, rows, left=(0, 7))
    if guesses(bundle.manifest):
        say(guesses(bundle.manifest))
    machine = bundle.manifest.machine
    if machine is not None:
        say(f"{machine.cpu}, {machine.cores} cores; batch 1")
    for variant in bundle.manifest.variants:
        for line in attempt_lines(variant.quantization or {}):
            say(f"{variant.name}: {line}")
        advice = variant.recommendation
        doubted = variant.latency is not None and variant.latency.doubt is not None
        if advice is not None and not advice.recommended and not doubted:
            say(f"{variant.name}: not recommended here: {advice.reason}")
    for engine in bundle.manifest.engines:
        say(f"{engine.file}: {engine.bytes / 1e6:.1f} MB")
    say(f"bundle: {bundle.root}   report: {bundle.path('report.html')}")


def show_engines(bundle: Any, built: Any) -> None:
    """Show plans fresh from the builder, as they were read back."""
    from cnnedge.plan import experimental

    rows = []
    for engine in built:
        note, found = engine.note, engine.report
        homes = Counter(fusion.where for fusion in found.fusions)
        rows.append(
            (
                note.variant,
                ", ".join(note.compute_capabilities) or "8.6 and later",
                " + ".join(_batches(profile) for profile in note.options.profiles),
                f"{note.bytes / 1e6:.1f} MB",
                " + ".join(str(count) for count in found.counts),
                _share(found.achieved["macs"]),
                ", ".join(f"{n} in {where}" for where, n in homes.items()) or None,
                f"{note.build_seconds:.1f} s",
                "not kept" if engine.failed else "kept",
            )
        )
    headers = ("variant", "for GPUs", "batch", "size", "layers", "MACs in", "Conv + Relu")
    print_table((*headers, "built in", ""), rows, left=(0, 1, 2, 5, 6, 8))
    for engine in built:
        note = engine.note
        for line in engine.report.violations[:_MOST_LINES]:
            say(f"{note.variant}: {line}")
        left = len(engine.report.violations) - _MOST_LINES
        if left > 0:
            say(f"{note.variant}: and {left} more")
        if engine.failed:
            continue
        doubt = experimental(note.runtime, note.precision)
        if doubt is not None:
            say(f"{note.variant}: {doubt}; `load` takes any other first")
        if note.replay is None:
            say(
                f"{note.variant}: not run: no such GPU here; on the device, "
                f"`cnnedge verify {bundle} --runtime {note.runtime}`"
            )
        elif note.replay["diverged"]:
            say(f"{note.variant}: self-test diverged: {note.replay['detail']}")


_MOST_LINES = 5


def _batches(profile: Any) -> str:
    return str(profile.largest) if profile.largest == 1 else f"1…{profile.largest}"


def attempt_lines(quantization: Mapping[str, Any]) -> list[str]:
    """Return one line for each thing that was tried to make INT8 hold its gate."""
    lines = []
    for index, attempt in enumerate(quantization.get("attempts", ())):
        low, high = attempt["drop_interval_points"]
        int8 = attempt["achieved"]["macs"].get("int8", 0.0)
        kept = " (kept)" if index == quantization["chosen"] else ""
        lines.append(
            f"{attempt['detail']}: drop {attempt['drop_points']:+.2f} [{low:+.2f}, {high:+.2f}], "
            f"{int8:.1%} of MACs int8: {attempt['status']}{kept}"
        )
    return lines


def show_verification(found: Any) -> None:
    """Show a `Verification`."""
    say(f"{found.bundle}: held against {found.reference}, on {found.data}")
    rows = []
    for v in found.variants:
        c = v.comparison
        stage = None if v.selftest is None else (v.selftest.stage or "ok")
        rows.append(
            (
                v.name,
                v.provider.removesuffix("ExecutionProvider"),
                stage,
                None if c is None else f"{c.top1:.2%}",
                None if c is None else f"{c.top5:.2%}",
                None if c is None else f"{c.agreement:.2%}",
                None if c is None else _difference(c.max_abs_diff, c.limit),
                None if c is None else "{:+.2f} [{:+.2f}, {:+.2f}]".format(c.drop, *c.interval),
                _share(v.achieved.get("macs", {})),
                _share(v.achieved.get("weights", {})),
                None if v.verdict is None else v.verdict.status,
            )
        )
    headers = (
        *(
            "variant",
            "ran on",
            "self-test",
            "top-1",
            "top-5",
            "agree",
            "max |Δp| of limit",
            "drop [95 %]",
        ),
        *("MACs in", "weights in", "gate"),
    )
    print_table(headers, rows, left=(0, 1, 2, 8, 9, 10))
    for v in found.variants:
        if v.selftest is not None and v.selftest.stage is not None:
            say(f"{v.name}: {v.selftest.stage} diverged: {v.selftest.detail}")
        if v.verdict is not None and v.verdict.status != "passed":
            say(f"{v.name}: {v.verdict.status}: {v.verdict.reason}")
    compared = [v.comparison for v in found.variants if v.comparison is not None]
    if compared:
        smallest = compared[0].smallest_drop
        say(f"the smallest drop that {compared[0].n} images could show: {smallest:.2f} points")


def _difference(largest: float | None, limit: float | None) -> str | None:
    """Return by how much a probability differs, and by how much it may."""
    if largest is None:
        return None
    return f"{largest:.1e}" + ("" if limit is None else f" of {limit:.1e}")


def _share(shares: dict[str, float]) -> str:
    return ", ".join(f"{share:.2%} {name}" for name, share in shares.items())


def show_result(document: Any) -> None:
    """Show a benchmark's result document."""
    from cnnedge.report.benchmark import HEADERS, main_rows, remarks

    show_doubt(document.get("doubt"))
    for model in document["models"]:
        about = f"{model['layout']}, {model['weights']} weights"
        say(f"{model['name']}: {about}")
        print_table(HEADERS, main_rows(model))
        _show_scenarios(model)
        for line in remarks(document, model):
            say(line)


def _show_scenarios(model: Any) -> None:
    """Show what was measured besides single-stream, a small table each."""
    rows = model["contestants"]
    on_gpu = [(row["title"], (row["single_stream"] or {}).get("gpu")) for row in rows]
    if any(times for _, times in on_gpu):
        names: tuple[str, ...] = next(tuple(times) for _, times in on_gpu if times)
        found = [
            (title, *(f"{times.get(n, 0):.3f}" for n in names)) for title, times in on_gpu if times
        ]
        print_table(("on the GPU, medians", *names), found)
    _show_points(rows, "offline", "batch", "offline, images/s at batch", _rate)
    _show_points(rows, "multi_stream", "clients", "multi-stream: clients", _p50_and_rate)
    _show_points(rows, "server", "load", "server, p50 (p90) at load", _p50_p90)
    falls = [(row["title"], row["waterfall"]) for row in rows if row["waterfall"]]
    if falls:
        file = falls[0][1]["file"]
        stages = [stage["name"] for stage in falls[0][1]["stages"]]
        table = [
            (
                title,
                *(f"{stage['p50_ms']:.3f}" for stage in fall["stages"]),
                f"{fall['whole_p50_ms']:.3f}",
                None if fall["app_p50_ms"] is None else f"{fall['app_p50_ms']:.3f}",
            )
            for title, fall in falls
        ]
        what = f"ms, from a {file['width']}×{file['height']} {file['format']} to a label"
        print_table((what, *stages, "whole", "cnnedge.load"), table)
    _show_endurance(rows)


def _show_points(rows: Any, scenario: str, at: str, header: str, cell: Any) -> None:
    """Show a scenario that was measured at several points, a column each."""
    points = sorted({point[at] for row in rows for point in row[scenario]})
    table = [
        (row["title"], *(found.get(point) for point in points))
        for row in rows
        if (found := {point[at]: cell(point) for point in row[scenario]})
    ]
    if points:
        print_table((header, *(f"{p:.0%}" if at == "load" else str(p) for p in points)), table)


def _rate(point: Any) -> str:
    return f"{point['images_per_second']:,.0f}"


def _p50_and_rate(point: Any) -> str:
    return f"{point['p50_ms']:.2f} ms, {_rate(point)}/s"


_ENDS = ("first_p50_ms", "steady_p50_ms")


def _show_endurance(rows: Any) -> None:
    idle = [(row["title"], row["duty_cycle"]) for row in rows if row["duty_cycle"]]
    if idle:
        pause = idle[0][1]["idle_s"]
        table = [
            (title, *(None if d[p] is None else f"{d[p]:.2f} ms" for p in _ENDS))
            for title, d in idle
        ]
        print_table((f"after {pause:g} s of idling", "first call", "steady"), table)
    endured = [(row["title"], row["sustained"]) for row in rows if row["sustained"]]
    if endured:
        found = [
            (
                title,
                f"{s['seconds']:.0f} s",
                f"{s['drift_percent']:+.1f} %"
                + ("" if s["interval"] is None else " [{:+.1f}, {:+.1f}]".format(*s["interval"])),
                "; ".join(s["notes"]) or None,
            )
            for title, s in endured
        ]
        print_table(("sustained", "for", "drift [95 %]", ""), found, left=(0, 3))


def _p50_p90(point: Any) -> str:
    p90 = "" if point["p90_ms"] is None else f" ({point['p90_ms']:.2f})"
    return f"{point['p50_ms']:.2f}{p90} ms"


def show_changes(changes: Any) -> None:
    """Show two results, compared."""
    from cnnedge.report.benchmark import CHANGE_HEADERS, change_rows

    for doubt in changes["doubts"]:
        line = printable(f"{doubt}; nothing is decided by its latencies")
        click.secho(fitted(line, sys.stdout), bold=True)
    quiet = {"same", "within noise"}
    rows = [
        row
        for row, change in zip(change_rows(changes), changes["changes"], strict=True)
        if change["figure"] == "p50" or change["verdict"] not in quiet
    ]
    print_table(CHANGE_HEADERS, rows, left=(0, 1, 2, 6))
    left = len(changes["changes"]) - len(rows)
    if left:
        say(f"{left} more figures are the same or within noise (--json has them all)")
    if changes["machine"]:
        ratio, low, high = changes["machine"]
        say(f"the machine's FP32 peak: {ratio:.3f}× [{low:.3f}, {high:.3f}] of before")
    for note in changes["notes"]:
        say(f"note: {note}")
