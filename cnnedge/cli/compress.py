"""The command compress, and what it prints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from cnnedge.cli.shell import (
    SOURCE,
    as_list,
    as_options,
    as_size,
    command,
    main,
    own_model_options,
    progress_bar,
    say,
    tell_data,
)
from cnnedge.cli.show import print_json, print_table, show_doubt
from cnnedge.errors import GateError

DEFAULT_MACS = 0.25


@command(
    main,
    "compress",
    "cnnedge compress alexnet.keras --macs 0.25 --max-drop 0.5 -o small.keras\n"
    "cnnedge compress alexnet.keras --latency 1ms -o fast.keras\n"
    "cnnedge compress alexnet.keras --pareto -o front.keras",
)
@click.argument("model", type=click.Path(path_type=Path))
@click.option("-o", "--out", type=click.Path(path_type=Path), help="[MODEL-compressed.keras]")
@click.option("--data", "source", help=SOURCE + " Default: what the model was trained on.")
@click.option("--macs", type=float, help="Share of the multiply-accumulates to keep. [0.25]")
@click.option("--params", type=float, help="Share of the parameters to keep.")
@click.option("--latency", help="What one image may take here in INT8, such as 5ms or 800us.")
@click.option("--pareto", is_flag=True, help="Walk budgets of MACs and write the front.")
@click.option("--points", help="The budgets of --pareto. [0.5,0.35,0.25,0.18,0.12,0.08]")
@click.option("--max-drop", type=click.FloatRange(0, 100), help="Gate, in points of top-1. [0.5]")
@click.option(
    "--importance",
    type=click.Choice(["taylor", "l1"]),
    default="taylor",
    show_default=True,
    help="Of channels: from data, or by the weights.",
)
@click.option("--data-free", is_flag=True, help="Prune by the weights alone; nothing is judged.")
@click.option("--low-rank", is_flag=True, help="Split dense layers in two of lower rank (SVD).")
@click.option(
    "--tucker", is_flag=True, help="Split convolutions in three where that is measured faster."
)
@click.option(
    "--energy",
    type=float,
    default=0.8,
    show_default=True,
    help="Share of squared singular values that a split keeps.",
)
@click.option(
    "--multiple", type=click.IntRange(1), help="Round channels to it. [measured: 8, 16 or 32]"
)
@click.option("--epochs", type=click.IntRange(1), default=12, show_default=True, help="At the end.")
@click.option(
    "--round-epochs",
    type=click.IntRange(1),
    default=3,
    show_default=True,
    help="After each round of pruning before the last.",
)
@click.option("--batch-size", type=click.IntRange(1), default=32, show_default=True)
@click.option(
    "--learning-rate",
    type=click.FloatRange(min=0, min_open=True),
    default=3e-4,
    show_default=True,
    help="Adam's.",
)
@click.option("--no-augment", is_flag=True, help="Fine-tune on the images as they are.")
@own_model_options
@click.option("--calibration-images", type=click.IntRange(1), help="For INT8, at most. [128]")
@click.option("--test-images", type=click.IntRange(1), help="In the table, at most. [all]")
@click.option("--seed", type=int, help="Of splits and order. [the model's own]")
@click.option("--resume", is_flag=True, help="Go on from the checkpoint of a stopped run.")
def compress_command(
    model: Path,
    out: Path | None,
    source: str | None,
    macs: float | None,
    params: float | None,
    latency: str | None,
    pareto: bool,
    points: str | None,
    data_free: bool,
    multiple: int | None,
    no_augment: bool,
    labels: Path | None,
    image_size: str | None,
    resume: bool,
    as_json: bool,
    **others: Any,
) -> None:
    """Make a .keras classifier smaller so that it still answers like itself.

    Whole channels are removed, those that matter least for what they cost, in rounds; after each
    the network learns again to answer like the original. The result is an ordinary .keras file
    that every other command and every runtime takes.

    Budgets can be combined, and all of them have to hold. If the network at the asked budget loses
    more than --max-drop points of top-1 on the test images, the smallest one that does not is
    written instead, and the exit code is 3.

    \b
    What is written:
      G.keras            the smaller network
      G.compress.json    what was removed of each layer, every round, and the table below
      G.pareto.png, .csv, .json, G.macs-X.keras
                         with --pareto: the front, and its networks
      G.ckpt/            while it runs: what --resume goes on from

    \b
    How long it takes: about as long as training. On two cores AlexNet at 224×224 on 4,000 images
    ten minutes, VGG-16 at 64×64 on 10,000 forty.
    """  # noqa: D301
    from cnnedge.compress import PARETO, CompressOptions
    from cnnedge.recipe import make_recipe

    ours = ("importance", "low_rank", "tucker", "energy", "epochs", "round_epochs")
    theirs = ("batch_size", "learning_rate")
    if points is not None and not pareto:
        raise click.UsageError("--points are those of a front: pass --pareto with them")
    if pareto and (macs, params, latency) != (None, None, None):
        raise click.UsageError("--pareto walks budgets of its own: leave the others out")
    if (macs, params, latency) == (None, None, None) and not pareto:
        macs = DEFAULT_MACS
    options = CompressOptions(
        macs=macs,
        params=params,
        latency=None if latency is None else _seconds(latency),
        pareto=(PARETO if points is None else _shares(points)) if pareto else (),
        augment=not no_augment,
        **{name: others.pop(name) for name in (*ours, *theirs)},
    )
    chosen = {
        "model": str(model),
        "data": source,
        "labels": None if labels is None else str(labels),
        "image_size": as_size(image_size),
        **others,
    }
    given = {key: value for key, value in chosen.items() if value is not None}
    recipe = make_recipe(options=as_options(given), **given)
    path = out or Path(f"{model.stem}-compressed.keras")

    from cnnedge.pipeline.compress import compress_model

    with progress_bar() as progress:
        report, warnings = compress_model(
            recipe,
            path,
            options,
            data_free=data_free,
            multiple=multiple,
            resume=resume,
            progress=progress,
            on_data=tell_data,
            on_epoch=lambda epoch: say(str(epoch), err=True),
            on_round=lambda candidate: say(str(candidate), err=True),
        )
    for warning in warnings:
        say(f"warning: {warning}", err=True)
    if as_json:
        print_json(report.to_dict())
    else:
        _show(report)
    result = report.result
    if not result.met and not data_free:
        asked = result.candidates[-1]
        lost = "more points than that" if asked.comparison is None else _drop(asked.comparison)
        what = "the reference itself" if not result.chosen else f"that of round {result.chosen}"
        raise GateError(
            f"the asked budget loses {lost} of top-1, and {result.options.max_drop:g} are allowed",
            fix=f"{result.path} has the smallest network that holds: {what}",
        )


def _show(report: Any) -> None:
    result = report.result
    before, after = result.reference, result.kept
    baseline = report.find("reference", "keras").latency.median
    doubt = report.environment.get("doubt")
    show_doubt(doubt)
    costs = {"reference": before, "compressed": after}
    costs |= {
        f"macs {share:g}": candidate
        for share, candidate in zip(
            sorted(result.options.pareto, reverse=True), result.candidates, strict=False
        )
    }
    rows = []
    for version in report.versions:
        found = version.comparison
        cost = costs[version.network]
        rows.append(
            (
                f"{version.network}, {_FORMS[version.form]}",
                f"{cost.params:,}",
                f"{cost.macs / 1e6:,.1f} M",
                f"{version.bytes / 1e6:.2f} MB",
                f"{1e3 * version.latency.median:.2f} ms",
                None if doubt else f"{baseline / version.latency.median:.1f}×",
                None if found is None else f"{100 * found.top1:.2f} %",
                None if found is None else _drop(found),
            )
        )
    headers = ("network", "parameters", "MACs", "size", "latency", "speed", "top-1", "drop [95 %]")
    print_table(headers, rows)
    machine = report.environment["machine"]
    judged = f"{report.test_images} test images" if report.test_images else "not judged: no data"
    say(f"{machine['cpu']}, {machine['cores']} cores; batch 1; {judged}")
    layers = ", ".join(f"{r['layer']} {r['before'] or 0}→{r['after']}" for r in result.removed())
    say(f"channels, in multiples of {result.multiple}: {layers}")
    say("written: " + "  ".join(str(path) for path in report.files))


_FORMS = {"keras": "Keras", "fp32": "ONNX FP32", "int8": "ONNX INT8"}


def _drop(comparison: Any) -> str:
    low, high = comparison.interval
    return f"{comparison.drop:+.2f} [{low:+.2f}, {high:+.2f}]"


def _seconds(text: str) -> float:
    units = {"us": 1e-6, "µs": 1e-6, "ms": 1e-3, "s": 1.0}
    unit = next((unit for unit in units if text.strip().endswith(unit)), None)
    try:
        seconds = float(text.strip().removesuffix(unit or "")) * units[unit or ""]
    except (ValueError, KeyError):
        seconds = 0.0
    if not 0 < seconds < float("inf"):
        raise click.BadParameter(f"{text!r} is no latency: give one such as 5ms or 800us")
    return seconds


def _shares(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in as_list(text) or ())
    except ValueError:
        raise click.BadParameter(f"{text!r} are no budgets: give shares such as 0.5,0.25") from None
