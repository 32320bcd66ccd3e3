"""The commands that look at a bundle and run it: verify, bench, predict, doctor."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from cnnedge.cli.shell import FAILED, SOURCE, as_list, command, main, progress_bar
from cnnedge.cli.show import print_json, print_table, show_benchmark, show_verification
from cnnedge.errors import GateError

RUNTIME = click.option(
    "--runtime",
    type=click.Choice(["cpu", "cuda", "ort-tensorrt", "ort-rtx", "tensorrt", "rtx"]),
    default="cpu",
    show_default=True,
    help="What runs it; tensorrt and rtx run plans of the bundle.",
)


@command(main, "verify", "cnnedge verify alexnet --data digits")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--data", "source", help=SOURCE + " Without it: the self-test alone.")
@click.option("--reference", type=click.Path(path_type=Path), help="The .keras file to hold it to.")
@click.option("--max-drop", type=click.FloatRange(0, 100), help="Default: the bundle's own.")
@click.option("--test-images", type=click.IntRange(1), help="At most this many.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of the data's split.")
@RUNTIME
def verify_command(
    bundle: Path,
    source: str | None,
    reference: Path | None,
    max_drop: float | None,
    test_images: int | None,
    seed: int,
    runtime: str,
    as_json: bool,
) -> None:
    """Replay the self-test here; with --data measure accuracy and apply the gate.

    Exit code 3 if a variant diverges or fails its gate.
    """
    from cnnedge.data import open_source
    from cnnedge.verify import verify_bundle

    answer = None if reference is None else _keras_reference(reference, bundle)
    with progress_bar() as progress:
        dataset = None if source is None else open_source(source, seed=seed)
        found = verify_bundle(
            bundle,
            dataset,
            reference=answer,
            max_drop=max_drop,
            limit=test_images,
            runtime=runtime,
            progress=progress,
        )
    if as_json:
        print_json(found.to_dict())
    else:
        show_verification(found)
    if found.failed:
        names = ", ".join(v.name for v in found.variants if v.failed)
        raise GateError(f"verification failed for {names}", fix="see the reasons above")


@command(main, "bench", "cnnedge bench alexnet --seconds 20")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--reference", type=click.Path(path_type=Path), help="A .keras file to time beside.")
@click.option("--seconds", type=click.FloatRange(0.1), default=10.0, show_default=True)
@click.option("--threads", type=click.IntRange(1), help="Threads of one call; default: all cores.")
@click.option(
    "--runtime",
    "runtimes",
    default="cpu",
    show_default=True,
    help="One or more of cpu,cuda,ort-tensorrt,ort-rtx,tensorrt,rtx.",
)
@click.option("--batch", type=click.IntRange(1), default=1, show_default=True)
def bench_command(
    bundle: Path,
    reference: Path | None,
    seconds: float,
    threads: int | None,
    runtimes: str,
    batch: int,
    as_json: bool,
) -> None:
    """Measure the latency of each variant, interleaved in one run.

    On a GPU it also tells the time by part, under trtexec's names: GPU Compute Time between CUDA
    events, Latency with the copies in and out, Enqueue Time of the host.
    """
    from cnnedge.benchmark import bench_bundle

    answer = None if reference is None else _keras_reference(reference, bundle, as_compiled=True)
    with progress_bar() as progress:
        found = bench_bundle(
            bundle,
            reference=answer,
            threads=threads,
            runtimes=as_list(runtimes) or ("cpu",),
            batch=batch,
            seconds=seconds,
            progress=progress,
        )
    return print_json(found.to_dict()) if as_json else show_benchmark(found)


@command(main, "predict", "cnnedge predict alexnet photo.jpg --top 3")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.argument("images", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--top", type=click.IntRange(1), default=5, show_default=True)
@click.option("--variant", help="Default: the fastest that was verified.")
@RUNTIME
def predict_command(
    bundle: Path,
    images: tuple[Path, ...],
    top: int,
    variant: str | None,
    runtime: str,
    as_json: bool,
) -> None:
    """Classify image files. A broken one is reported by name, and the exit code is 1."""
    from cnnedge.errors import ImageError
    from cnnedge.runtime import load

    classifier = load(bundle, variant=variant, runtime=runtime)
    answers, broken = [], []
    for path in images:
        try:
            found = classifier(path, top=top)
        except ImageError as error:
            broken.append(path)
            click.echo(f"error: {error}", err=True)
            continue
        answers.append(
            {
                "image": str(path),
                "answers": [
                    {"label": p.label, "index": p.index, "probability": p.probability}
                    for p in found
                ],
            }
        )
        if not as_json:
            likely = ", ".join(f"{p.label} {p.probability:.1%}" for p in found)
            click.echo(f"{path}: {likely}")
    if as_json:
        print_json({"variant": classifier.variant, "images": answers})
    else:
        click.echo(f"({classifier.variant}: {classifier.choice.reason})", err=True)
    if broken:
        sys.exit(FAILED)


@command(main, "doctor", "cnnedge doctor")
def doctor_command(as_json: bool) -> None:
    """Say what this machine can build and run, and why not."""
    from cnnedge.doctor import diagnose

    diagnosis = diagnose()
    if as_json:
        return print_json(diagnosis.to_dict())
    machine = diagnosis.machine
    click.echo(f"{machine['cpu']}, {machine['cores']} cores, {machine['memory_gib']} GiB")
    click.echo(f"{machine['system']}; {', '.join(machine['isa']) or 'no noted instruction sets'}")
    click.echo(", ".join(f"{name} {version}" for name, version in diagnosis.tools.items()))
    rows = [
        ("yes" if a.ready else "no", a.name, a.detail + (f"; {a.fix}" if a.fix else ""))
        for a in diagnosis.abilities
    ]
    return print_table(("", "can it", "why"), rows, left=(0, 1, 2))


def _keras_reference(path: Path, bundle: Path, *, as_compiled: bool = False) -> Any:
    from cnnedge.backends.keras import compiled, load_model, predict
    from cnnedge.bundle import open_bundle

    normalization = open_bundle(bundle).manifest.normalization
    model, _ = load_model(path)
    if as_compiled:
        return compiled(model, normalization)
    return lambda batch: predict(model, batch, normalization)
