"""The command line: parse, call the library once, print. The only place that knows exit codes.

0 done · 1 failed, one line ``error: what; what to do`` · 2 usage · 3 a gate failed.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import click

from cnnedge import __version__
from cnnedge.cli.shell import FAILED, Group, command, progress_bar
from cnnedge.cli.show import (
    print_json,
    print_table,
    show_benchmark,
    show_bundle,
    show_inspection,
    show_stack,
    show_verification,
)
from cnnedge.errors import GateError

_SOURCE = "digits, signs, signs:N, or a folder of class sub-folders."


@click.group(cls=Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="cnnedge")
def main() -> None:
    """Take a Keras image classifier to the device it will run on.

    Train or bring a model, export it to ONNX in FP32, FP16 and INT8, prove that it still answers
    like Keras, and hand over a bundle that an app embeds with three lines.
    """


@command(main, "models", "cnnedge models")
def models_command(as_json: bool) -> None:
    """List the built-in models: parameters, MACs, input."""
    from cnnedge.models import MODELS

    if as_json:
        from dataclasses import asdict

        return print_json([asdict(info) for info in MODELS.values()])
    rows = [
        (
            i.name,
            f"{i.params:,}",
            f"{i.macs / 1e6:,.0f} M",
            "×".join(map(str, i.input_size)),
            i.summary,
        )
        for i in MODELS.values()
    ]
    return print_table(("model", "parameters", "MACs", "input", ""), rows, left=(0, 4))


@command(main, "inspect", "cnnedge inspect vgg16\ncnnedge inspect --stack 3x3,3x3,3x3")
@click.argument("model", required=False)
@click.option("--image-size", type=str, metavar="H,W", help="Input size, where it is open.")
@click.option("--classes", type=click.IntRange(2), help="Classes of a built-in model.")
@click.option("--stack", help="Compare stacked kernels with the single one that sees as far.")
@click.option("--channels", type=click.IntRange(1), help="Channels C, for --stack.")
def inspect_command(
    model: str | None,
    image_size: str | None,
    classes: int | None,
    stack: str | None,
    channels: int | None,
    as_json: bool,
) -> None:
    """Show each layer: output, parameters, MACs, stride, receptive field.

    MODEL is a built-in model, a .keras file or an .onnx file.
    """
    from cnnedge import inspect

    if (model is None) == (stack is None):
        raise click.UsageError("give a MODEL, or --stack with kernels such as 3x3,3x3,3x3")
    if stack is not None:
        return show_stack(inspect.compare_stack(stack, channels), as_json)
    height, width = _size(image_size) or (None, None)
    inspection = inspect.inspect_model(str(model), height=height, width=width, classes=classes)
    return print_json(inspection.to_dict()) if as_json else show_inspection(inspection)


@command(main, "train", "cnnedge train alexnet_v1 --data digits -o alexnet.keras --epochs 6")
@click.argument("model")
@click.option("--data", "source", default="digits", show_default=True, help=_SOURCE)
@click.option("-o", "--out", required=True, type=click.Path(path_type=Path), help="F.keras")
@click.option("--epochs", type=click.IntRange(1), default=20, show_default=True)
@click.option("--batch-size", type=click.IntRange(1), default=32, show_default=True)
@click.option("--image-size", metavar="H,W", help="Input size; default: the model's own.")
@click.option("--learning-rate", type=click.FloatRange(min=0, min_open=True), help="Adam's.")
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--init", help="imagenet, or a .h5/.keras file: start VGG convolutions from it.")
@click.option("--fc-units", type=click.IntRange(1), help="Width of VGG's dense layers.")
@click.option("--no-augment", is_flag=True, help="Train on the images as they are.")
@click.option("--resume", is_flag=True, help="Go on from the checkpoint of a stopped run.")
def train_command(
    model: str,
    source: str,
    out: Path,
    epochs: int,
    batch_size: int,
    image_size: str | None,
    learning_rate: float | None,
    seed: int,
    init: str | None,
    fc_units: int | None,
    no_augment: bool,
    resume: bool,
    as_json: bool,
) -> None:
    """Train a built-in model on labelled images.

    Writes F.keras, F.history.json and F.history.png. A checkpoint after every epoch lets --resume
    go on after a kill, to the same result.
    """
    from cnnedge.data import open_source
    from cnnedge.train import TrainOptions, train

    options = TrainOptions(
        epochs=epochs,
        batch_size=batch_size,
        image_size=_size(image_size),
        seed=seed,
        init=init,
        learning_rate=learning_rate,
        augment=not no_augment,
        model_options={} if fc_units is None else {"fc_units": fc_units},
    )
    with progress_bar() as progress:
        dataset = open_source(source, seed=seed)
        _tell_skipped(dataset)
        result = train(
            model, dataset, out, options, resume=resume, progress=progress, on_epoch=_tell_epoch
        )
    if as_json:
        return print_json(result.to_dict())
    click.echo(
        f"{out}: top-1 {result.top1:.2%}, top-5 {result.top5:.2%} on {result.test_images} test "
        f"images; best epoch {result.best_epoch} of {result.epochs_run}, {result.seconds:.0f} s"
    )
    return None


@command(
    main,
    "export",
    "cnnedge export vgg16\ncnnedge export alexnet.keras -o alexnet --max-drop 0.5\n"
    "cnnedge export mine.keras --data photos --preprocess unit -o mine",
)
@click.argument("model")
@click.option(
    "-o", "--out", type=click.Path(path_type=Path), help="Bundle folder; default: ./MODEL"
)
@click.option("--data", "source", help=_SOURCE + " Default: what the model was trained on.")
@click.option(
    "--precision", help="Of fp32,fp16,int8,int8-weight,int4-weight; default: the first three."
)
@click.option("--max-drop", type=click.FloatRange(0, 100), help="Gate, in points of top-1. [0.5]")
@click.option(
    "--input",
    "input_dtype",
    type=click.Choice(["uint8", "float32"]),
    help="Of the ONNX graphs: the raw image [uint8], or what Keras takes.",
)
@click.option(
    "--preprocess",
    type=click.Choice(["unit", "tf", "caffe", "torch", "none"]),
    help="What your .keras wants of its pixels.",
)
@click.option("--labels", type=click.Path(path_type=Path), help="One label a line.")
@click.option("--image-size", metavar="H,W", help="Input size, where the model leaves it open.")
@click.option("--classes", type=click.IntRange(2), help="Of a built-in model without weights.")
@click.option("--calibration-images", type=click.IntRange(1), help="At most this many. [128]")
@click.option(
    "--calibration",
    type=click.Choice(["minmax", "percentile", "entropy", "mse"]),
    help="How INT8 scales are chosen at first. [minmax]",
)
@click.option(
    "--dot-product/--no-dot-product",
    default=None,
    help="Whether the CPU that will run INT8 has VNNI or Arm's dot product. [as this machine]",
)
@click.option(
    "--no-guard", is_flag=True, help="Leave an INT8 variant that fails its gate as it is."
)
@click.option("--test-images", type=click.IntRange(1), help="At most this many. [all]")
@click.option("--seed", type=int, help="Of weights, splits and subsets. [0]")
@click.option("--force", is_flag=True, help="Replace the bundle if it exists.")
def export_command(
    model: str,
    out: Path | None,
    source: str | None,
    precision: str | None,
    input_dtype: str | None,
    labels: Path | None,
    image_size: str | None,
    no_guard: bool,
    force: bool,
    as_json: bool,
    **others: Any,
) -> None:
    """Export a model to a bundle of verified ONNX variants.

    MODEL is a built-in model (see `cnnedge models`; ./MODEL.keras holds its trained weights), your
    own .keras classifier, or a recipe .toml.

    \b
    What is written, into one folder:
      model.fp32.onnx      the reference graph, answers within 1e-5 of Keras
      model.fp16.onnx      half the size, for GPUs and NPUs
      model.int8.onnx      a quarter of the size, for CPUs
      model.int8-trt.onnx  the same for TensorRT
      model.int8-weight.onnx, model.int4-weight.onnx
                           where asked for: dense layers' weights in 8 or 4 bits
      labels.txt, manifest.json, selftest/, report.html

    \b
    How long it takes: AlexNet about a minute, VGG-16 at 224×224 two to four minutes on two cores;
    nearly all of it is verifying and measuring, converting takes seconds.

    A gate decides whether a variant is good enough: its top-1 may drop by at most --max-drop
    points against Keras on the same test images, FP32 and FP16 must also keep their probabilities
    (1e-5, 2e-3). An INT8 variant that fails is worked on: other calibration methods, cross-layer
    equalisation, bias correction, and last its most sensitive layers in higher precision; the
    report lists what was tried. If a gate fails in the end, the bundle is written, says so, and
    the exit code is 3.
    """  # noqa: D301 - click's mark for "leave these lines as they are" is the character itself
    from cnnedge.recipe import make_recipe, read_recipe

    if model.endswith(".toml"):
        recipe = read_recipe(model)
        given = {"model": recipe.model}
    else:
        recipe, given = None, {"model": model}
    options = {
        "data": source,
        "precision": _list(precision),
        "input": input_dtype,
        "labels": None if labels is None else str(labels),
        "image_size": _size(image_size),
        "guard": False if no_guard else None,
        **others,
    }
    chosen = {key: value for key, value in options.items() if value is not None}
    base = {} if recipe is None else recipe.model_dump(exclude_unset=True)
    recipe = make_recipe(**(base | given | chosen))
    folder = out or Path(Path(model).stem)

    from cnnedge.pipeline import export_bundle

    with progress_bar() as progress:
        bundle, warnings = export_bundle(recipe, folder, force=force, progress=progress)
    for warning in warnings:
        click.echo(f"warning: {warning}", err=True)
    if as_json:
        print_json(json.loads(bundle.manifest.to_json()))
    else:
        show_bundle(bundle)
    failed = [v for v in bundle.manifest.variants if not v.verified]
    if failed:
        reasons = "; ".join(f"{v.name}: {(v.verdict or {}).get('reason')}" for v in failed)
        raise GateError(
            f"a gate failed: {reasons}", fix="that variant will not be loaded by itself"
        )


@command(main, "verify", "cnnedge verify alexnet --data digits")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--data", "source", help=_SOURCE + " Without it: the self-test alone.")
@click.option("--reference", type=click.Path(path_type=Path), help="The .keras file to hold it to.")
@click.option("--max-drop", type=click.FloatRange(0, 100), help="Default: the bundle's own.")
@click.option("--test-images", type=click.IntRange(1), help="At most this many.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of the data's split.")
def verify_command(
    bundle: Path,
    source: str | None,
    reference: Path | None,
    max_drop: float | None,
    test_images: int | None,
    seed: int,
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
def bench_command(
    bundle: Path, reference: Path | None, seconds: float, threads: int | None, as_json: bool
) -> None:
    """Measure the latency of each variant, interleaved in one run."""
    from cnnedge.benchmark import bench_bundle

    answer = None if reference is None else _keras_reference(reference, bundle, as_compiled=True)
    with progress_bar() as progress:
        found = bench_bundle(
            bundle, reference=answer, threads=threads, seconds=seconds, progress=progress
        )
    return print_json(found.to_dict()) if as_json else show_benchmark(found)


@command(main, "predict", "cnnedge predict alexnet photo.jpg --top 3")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.argument("images", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--top", type=click.IntRange(1), default=5, show_default=True)
@click.option("--variant", help="Default: the fastest that was verified.")
def predict_command(
    bundle: Path, images: tuple[Path, ...], top: int, variant: str | None, as_json: bool
) -> None:
    """Classify image files. A broken one is reported by name, and the exit code is 1."""
    from cnnedge.errors import ImageError
    from cnnedge.runtime import load

    classifier = load(bundle, variant=variant)
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


def _tell_skipped(dataset: Any) -> None:
    for line in dataset.skipped:
        click.echo(f"skipped: {line}", err=True)


def _tell_epoch(report: Any) -> None:
    click.echo(str(report), err=True)


def _size(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    try:
        numbers = [int(part) for part in text.replace("x", ",").split(",")]
    except ValueError:
        numbers = []
    if len(numbers) not in (1, 2) or any(n < 1 for n in numbers):
        raise click.BadParameter(f"{text!r} is no size: give HEIGHT,WIDTH such as 192,160")
    return numbers[0], numbers[-1]


def _list(text: str | None) -> tuple[str, ...] | None:
    return None if text is None else tuple(part.strip() for part in text.split(",") if part.strip())
