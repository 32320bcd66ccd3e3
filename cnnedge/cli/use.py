"""The commands that look at a bundle and run it: verify, bench, predict, doctor."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import click

from cnnedge.cli.shell import (
    FAILED,
    SOURCE,
    as_list,
    as_numbers,
    command,
    main,
    progress_bar,
    say,
    tell_data,
)
from cnnedge.cli.show import (
    print_json,
    print_table,
    show_changes,
    show_result,
    show_verification,
)
from cnnedge.cli.sign import require_signature, show_signature
from cnnedge.errors import GateError
from cnnedge.files import require_writable, write_text
from cnnedge.runtimes import LITERT, RUNTIMES

_BENCHED = [
    row.name for row in sorted((*RUNTIMES.values(), LITERT), key=lambda row: row.device == "gpu")
]
RUNTIME = click.option(
    "--runtime",
    type=click.Choice(list(RUNTIMES)),
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
@click.option("--resume", is_flag=True, help="Go on from where the same run was stopped.")
@click.option(
    "--signature",
    "public_key",
    metavar="PUBLIC.pem",
    type=click.Path(path_type=Path),
    help="First check that the holder of this key signed it.",
)
@RUNTIME
def verify_command(
    bundle: Path,
    source: str | None,
    reference: Path | None,
    max_drop: float | None,
    test_images: int | None,
    seed: int,
    resume: bool,
    public_key: Path | None,
    runtime: str,
    as_json: bool,
) -> None:
    """Replay the self-test here; with --data measure accuracy and apply the gate.

    Exit code 3 if a variant diverges or fails its gate, or if the bundle is not what the holder of
    the key given with --signature signed: then nothing of it is run. From its tenth second on, a
    run keeps what is done so far in the user's cache ($CNNEDGE_CACHE), and --resume goes on there.
    """
    from cnnedge.data import open_source
    from cnnedge.files import sha256
    from cnnedge.verify import verify_bundle

    if resume and source is None:
        raise click.UsageError("--resume goes on with the run over --data, which is not given")
    signature = None if public_key is None else require_signature(bundle, public_key)
    if signature is not None and not as_json:
        show_signature("signed", signature)
    answer = None if reference is None else _keras_reference(reference, bundle)
    with progress_bar() as progress:
        dataset = None
        if source is not None:
            dataset = open_source(source, seed=seed, progress=progress)
            tell_data(dataset)
        found = verify_bundle(
            bundle,
            dataset,
            reference=answer,
            max_drop=max_drop,
            limit=test_images,
            runtime=runtime,
            resume=resume,
            reference_id="" if reference is None else sha256(reference),
            progress=progress,
        )
    if as_json:
        signed = {} if signature is None else {"signature": signature.to_dict()}
        print_json(found.to_dict() | signed)
    else:
        show_verification(found)
    if found.failed:
        names = ", ".join(v.name for v in found.variants if v.failed)
        raise GateError(f"verification failed for {names}", fix="see the reasons above")


@command(main, "bench", "cnnedge bench alexnet --data digits --html bench.html")
@click.argument("target", required=False, type=click.Path(path_type=Path))
@click.option("--reference", type=click.Path(path_type=Path), help="The .keras file: the baseline.")
@click.option("--data", help=SOURCE + " Accuracy beside each latency.")
@click.option(
    "--runtime",
    "runtimes",
    metavar="LIST",
    help=f"Of {','.join(_BENCHED)}, or package:function. "
    "Default: cpu, and every peer that is installed.",
)
@click.option("--scenarios", metavar="LIST", help="Of those listed above, or all.")
@click.option(
    "--seconds", type=click.FloatRange(0.01), help="Of single-stream, all contestants. Default: 10."
)
@click.option("--rounds", type=click.IntRange(1, 100), help="Lives of each process. Default: 3.")
@click.option(
    "--batch", type=click.IntRange(1), help="Images in a call of single-stream. Default: 1."
)
@click.option("--batches", metavar="LIST", help="Of offline. Default: 1,4,16.")
@click.option("--threads", type=click.IntRange(1), help="Threads of one call; default: all cores.")
@click.option("--test-images", type=click.IntRange(1), help="At most this many.")
@click.option(
    "--max-drop",
    type=click.FloatRange(0, 100),
    help="The pick's accuracy budget; default: the bundle's.",
)
@click.option("--image", type=click.Path(path_type=Path), help="The waterfall's image file.")
@click.option(
    "--seed", type=click.IntRange(0), help="Of the data's split and the order. Default: 0."
)
@click.option("--resume", is_flag=True, help="Go on from answers that a killed run has kept.")
@click.option("--html", type=click.Path(path_type=Path), help="Write a page that needs no network.")
@click.option("--csv", type=click.Path(path_type=Path), help="Write every figure, a row each.")
@click.option("--markdown", type=click.Path(path_type=Path), help="Write the main table.")
@click.option("-o", "--out", type=click.Path(path_type=Path), help="Write the JSON document.")
@click.option(
    "--compare",
    nargs=2,
    type=click.Path(path_type=Path),
    metavar="OLD NEW",
    help="Compare two JSON documents; exit code 3 on a regression.",
)
@click.option("--tolerance", type=click.FloatRange(0, 10), help="Of --compare. Default: 0.03.")
def bench_command(
    target: Path | None,
    compare: tuple[Path, Path] | None,
    tolerance: float | None,
    html: Path | None,
    csv: Path | None,
    markdown: Path | None,
    out: Path | None,
    resume: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Measure a bundle, or a suite of them, and say which to run here.

    TARGET is a bundle, a suite (.toml), or a result (.json) to be shown or written anew. Scenarios:
    single-stream, offline, multi-stream, cold-start, waterfall and layers, which is what is
    measured by default; server, duty-cycle and sustained, which take minutes. docs/benchmark.md
    says how each is measured.
    """
    if compare is not None:
        _compare(*compare, tolerance, as_json)
        return
    if target is None:
        raise click.UsageError("name a BUNDLE, a SUITE.toml or a RESULT.json, or use --compare")
    from cnnedge.benchmark.document import read_result
    from cnnedge.report import as_csv, as_markdown, render_page, require_page_packages

    outputs = [path for path in (html, csv, markdown, out) if path is not None]
    if html is not None:
        require_page_packages()  # before minutes of measuring, not after
    for path in outputs:
        require_writable(path)
    if target.suffix == ".json":
        document = read_result(target)
    else:
        document = _measure(target, resume, options)
    if out is not None:
        write_text(out, json.dumps(document) + "\n")
    if csv is not None:
        write_text(csv, as_csv(document))
    if markdown is not None:
        write_text(markdown, as_markdown(document))
    if html is not None:
        write_text(html, render_page(document))
    if as_json:
        click.echo(json.dumps(document))  # on one line: a line for each sample helps nobody
    else:
        show_result(document)
    for path in outputs:
        say(f"written: {path}", err=True)


def _measure(target: Path, resume: bool, options: dict[str, Any]) -> Any:
    from cnnedge.benchmark.contestants import installed_runtimes
    from cnnedge.benchmark.run import bench
    from cnnedge.benchmark.suite import QUICK, SCENARIOS, ModelEntry, make_suite, read_suite

    entry = {name: options.pop(name) for name in ("reference", "data", "image")}
    chosen = {name: value for name, value in options.items() if value is not None}
    for name in ("runtimes", "scenarios"):
        if name in chosen:
            chosen[name] = as_list(chosen[name])
    if chosen.get("scenarios") in (("all",), ("quick",)):
        chosen["scenarios"] = SCENARIOS if chosen["scenarios"] == ("all",) else QUICK
    if "batches" in chosen:
        chosen["batches"] = as_numbers("--batches", chosen["batches"])
    if target.suffix == ".toml":
        given = [f"--{name}" for name, value in entry.items() if value is not None]
        if given:
            raise click.UsageError(f"a suite names its own: leave {', '.join(given)} out")
        suite = read_suite(target, chosen)
    else:
        chosen.setdefault("runtimes", installed_runtimes())
        suite = make_suite((ModelEntry(target, **entry),), chosen)
    with progress_bar() as progress:
        return bench(suite, resume=resume, progress=progress, on_data=tell_data, warn=_warn)


def _warn(line: str) -> None:
    say(f"warning: {line}", err=True)


def _compare(old: Path, new: Path, tolerance: float | None, as_json: bool) -> None:
    from cnnedge.benchmark.compare import compare_results
    from cnnedge.benchmark.document import read_result

    given = {} if tolerance is None else {"tolerance": tolerance}
    found = compare_results(read_result(old), read_result(new), **given)
    if as_json:
        print_json(found.to_dict())
    else:
        show_changes(found.to_dict())
    if found.regressed:
        names = ", ".join(f"{c.contestant} ({c.figure})" for c in found.regressed)
        raise GateError(f"regressed since {old}: {names}", fix="see the rows above")


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
    """Classify image files. One without an answer is reported by name, and the exit code is 1."""
    from cnnedge.errors import BackendError, ImageError
    from cnnedge.runtime import load

    classifier = load(bundle, variant=variant, runtime=runtime)
    answers, broken = [], []
    for path in images:
        try:
            found = classifier(path, top=top)
        except (ImageError, BackendError) as error:
            broken.append(path)
            say(f"error: {error}", err=True)
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
            say(f"{path}: {likely}")
    if as_json:
        print_json({"variant": classifier.variant, "images": answers})
    elif answers:
        say(f"({classifier.variant}: {classifier.choice.reason})", err=True)
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
    say(f"{machine['cpu']}, {machine['cores']} cores, {machine['memory_gib']} GiB")
    say(f"{machine['system']}; {', '.join(machine['isa']) or 'no noted instruction sets'}")
    say(", ".join(f"{name} {version}" for name, version in diagnosis.tools.items()))
    rows = [
        ("yes" if a.ready else "no", a.name, a.detail + (f"; {a.fix}" if a.fix else ""))
        for a in diagnosis.abilities
    ]
    return print_table(("", "can it", "why"), rows, left=(0, 1, 2))


def _keras_reference(path: Path, bundle: Path) -> Any:
    """Return a `.keras` file as Keras runs it; what it gives is asked anew, the manifest aside."""
    from cnnedge.backends.keras import KerasReference, load_model, read_emits
    from cnnedge.backends.keras_outputs import find_output
    from cnnedge.backends.keras_precision import computes_in, roundoff
    from cnnedge.bundle import open_bundle
    from cnnedge.selftest import golden_tensors

    opened = open_bundle(bundle)
    normalization = opened.manifest.normalization
    model, _ = load_model(path)
    output = find_output(model, opened.manifest.model.output, path.name)
    golden = golden_tensors(opened)
    rounding = roundoff(computes_in(path))
    emits = read_emits(
        model, golden, normalization, output=output, name=path.name, rounding=rounding
    )
    return KerasReference(model, normalization, emits, output)
