"""The commands that make something: models, inspect, train, export, engine."""

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
    say_lines,
    tell_data,
)
from cnnedge.cli.show import (
    print_json,
    print_table,
    show_bundle,
    show_engines,
    show_inspection,
    show_stack,
)
from cnnedge.errors import GateError
from cnnedge.runtimes import PLAN_RUNTIMES


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
    height, width = as_size(image_size) or (None, None)
    inspection = inspect.inspect_model(str(model), height=height, width=width, classes=classes)
    return print_json(inspection.to_dict()) if as_json else show_inspection(inspection)


@command(main, "train", "cnnedge train alexnet_v1 --data digits -o alexnet.keras --epochs 6")
@click.argument("model")
@click.option("--data", "source", default="digits", show_default=True, help=SOURCE)
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

    Where nothing was learned in the first epochs, it starts again once with He's initialisation and
    pixels in -1…1, and says so. A model that is no better than guessing in the end is written all
    the same, and the exit code is 3.
    """
    from cnnedge.data import open_source
    from cnnedge.train import TrainOptions, train_model

    options = TrainOptions(
        epochs=epochs,
        batch_size=batch_size,
        image_size=as_size(image_size),
        seed=seed,
        init=init,
        learning_rate=learning_rate,
        augment=not no_augment,
        model_options={} if fc_units is None else {"fc_units": fc_units},
    )
    with progress_bar() as progress:
        dataset = open_source(source, seed=seed, progress=progress)
        tell_data(dataset)
        result = train_model(
            model,
            dataset,
            out,
            options,
            resume=resume,
            progress=progress,
            on_epoch=_tell_epoch,
            on_retry=_warn,
        )
    if as_json:
        print_json(result.to_dict())
    else:
        say(
            f"{out}: top-1 {result.top1:.2%}, top-5 {result.top5:.2%} on {result.test_images} test "
            f"images; best epoch {result.best_epoch} of {result.epochs_run}, {result.seconds:.0f} s"
        )
    for line in result.warnings:
        _warn(line)
    if result.at_chance:
        raise GateError(
            f"{out} was written, and it guesses: top-1 {result.top1:.1%} on {result.test_images} "
            "test images",
            fix="do not ship it; train on more images, or with another --learning-rate",
        )


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
@click.option("--data", "source", help=SOURCE + " Default: what the model was trained on.")
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
@own_model_options
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
@click.option("--engine", "engines", help="Build plans too, of tensorrt,rtx; see cnnedge engine.")
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
    engines: str | None,
    force: bool,
    as_json: bool,
    **others: Any,
) -> None:
    """Export a model to a bundle of verified ONNX variants.

    MODEL is a built-in model (see `cnnedge models`; ./MODEL.keras holds its trained weights), your
    own .keras classifier, a recipe .toml, or a bundle's manifest.json, to build it again.

    \b
    What is written, into one folder:
      model.fp32.onnx      the reference graph, answers within 1e-5 of Keras
      model.fp16.onnx      half the size, for GPUs and NPUs
      model.int8.onnx      a quarter of the size, for CPUs
      model.int8-trt.onnx  the same for TensorRT
      model.int8-weight.onnx, model.int4-weight.onnx
                           where asked for: dense layers' weights in 8 or 4 bits
      engines/*.plan       with --engine: TensorRT plans, each with its note
      labels.txt, manifest.json, selftest/, report.html

    \b
    How long it takes: AlexNet about a minute, VGG-16 at 224×224 two to four minutes on two cores;
    nearly all of it is verifying and measuring, converting takes seconds.

    A gate decides whether a variant is good enough: its top-1 may drop by at most --max-drop
    points against Keras on the same test images, FP32 and FP16 must also keep their probabilities
    (1e-5, 2e-3, or as far as the model's own rounding moves them). An INT8 variant that fails is
    worked on: other calibration methods, cross-layer equalisation, bias correction, and last its
    most sensitive layers in higher precision; the report lists what was tried. If a gate fails in
    the end, the bundle is written, says so, and the exit code is 3.
    """  # noqa: D301 - click's mark for "leave these lines as they are" is the character itself
    from cnnedge.bundle import MANIFEST
    from cnnedge.recipe import make_recipe, read_recipe

    of_bundle = Path(model).name == MANIFEST
    is_recipe = of_bundle or model.endswith(".toml")
    base = read_recipe(model).to_dict() if is_recipe else {"model": model}
    options = {
        "data": source,
        "precision": as_list(precision),
        "input": input_dtype,
        "labels": None if labels is None else str(labels),
        "image_size": as_size(image_size),
        "guard": False if no_guard else None,
        "engines": as_list(engines),
        **others,
    }
    chosen = {key: value for key, value in options.items() if value is not None}
    recipe = make_recipe(options=as_options(chosen), **(base | chosen))
    folder = out or Path(Path(model).absolute().parent.name if of_bundle else Path(model).stem)

    from cnnedge.pipeline import export_bundle

    with progress_bar() as progress:
        bundle, warnings = export_bundle(
            recipe, folder, force=force, progress=progress, on_data=tell_data
        )
    for warning in warnings:
        _warn(warning)
    if as_json:
        print_json(bundle.manifest.to_dict())
    else:
        show_bundle(bundle)
    failed = [v for v in bundle.manifest.variants if not v.verified]
    if failed:
        reasons = "; ".join(f"{v.name}: {v.verdict.reason}" for v in failed if v.verdict)
        raise GateError(
            f"a gate failed: {reasons}", fix="that variant will not be loaded by itself"
        )


@command(
    main,
    "engine",
    "cnnedge engine vgg16 --runtime rtx\n"
    "cnnedge engine vgg16 --runtime tensorrt --max-batch 1 --print-trtexec",
)
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option(
    "--runtime",
    required=True,
    type=click.Choice(PLAN_RUNTIMES),
    help="TensorRT, for the GPU of this machine; or TensorRT-RTX, for RTX GPUs from anywhere.",
)
@click.option(
    "--variant", "variants", help="Of fp32,fp16,int8-trt. [tensorrt: int8-trt,fp16; rtx: fp16]"
)
@click.option("--max-batch", type=click.IntRange(1), default=8, show_default=True)
@click.option("--sm", help="Compute capabilities such as 8.9,12.0. [rtx: 8.6 and later]")
@click.option("--workspace", help="Scratch memory that a layer may take, such as 512M. [no limit]")
@click.option("--tf32", is_flag=True, help="Let FP32 layers round to TF32: faster, less exact.")
@click.option("--version-compatible", is_flag=True, help="For later TensorRT releases too.")
@click.option("--hardware-compatible", is_flag=True, help="For any GPU from Ampere on.")
@click.option("--strip-weights", is_flag=True, help="Leave the weights to the bundle's ONNX.")
@click.option("--refit", is_flag=True, help="Let weights be replaced without building anew.")
@click.option("--dla", type=click.IntRange(0, 1), help="Run on this accelerator of a Jetson.")
@click.option("--optimization-level", type=click.IntRange(0, 5), help="How long to search. [3]")
@click.option("--print-trtexec", is_flag=True, help="Build nothing: print trtexec's command line.")
def engine_command(
    bundle: Path,
    runtime: str,
    variants: str | None,
    sm: str | None,
    workspace: str | None,
    dla: int | None,
    print_trtexec: bool,
    as_json: bool,
    **others: Any,
) -> None:
    """Build TensorRT plans of a bundle's variants, into the bundle.

    A plan holds batch 1 and, beside it, 1 to --max-batch. Its precision is that of the ONNX graph;
    what was built is read back from the engine, and a plan that is not what was asked is not kept
    (exit code 3).

    \b
    What is written:
      engines/VARIANT.RUNTIME.plan   the raw plan, as trtexec loads it
      engines/VARIANT.RUNTIME.json   what it was built from, with and for, and its layers

    TensorRT builds on the GPU it builds for; TensorRT-RTX needs none. Costs of the options:
    docs/tensorrt.md.
    """  # noqa: D301
    from cnnedge.bundle import SIGNATURE
    from cnnedge.engine import build_engines, failure_of, trtexec_lines
    from cnnedge.plan import PlanOptions, parse_bytes, parse_compute_capability

    options = PlanOptions(
        compute_capabilities=tuple(parse_compute_capability(t) for t in as_list(sm) or ()),
        workspace_bytes=None if workspace is None else parse_bytes(workspace),
        dla_core=dla,
        **others,
    )
    names = as_list(variants)
    if print_trtexec:
        lines = trtexec_lines(bundle, runtime, options, variants=names)
        return print_json(lines) if as_json else say_lines("\n".join(lines))
    with progress_bar() as progress:
        built = build_engines(bundle, runtime, options, variants=names, progress=progress)
    if any(not engine.failed for engine in built) and (bundle / SIGNATURE).exists():
        outdated = "its signature holds no longer, sign it again: cnnedge sign"
        say(f"{bundle} was changed: {outdated} {bundle} --key PRIVATE.pem --force", err=True)
    if as_json:
        print_json([engine.to_dict() for engine in built])
    else:
        show_engines(bundle, built)
    failure = failure_of(built)
    if failure is not None:
        raise failure
    return None


def _tell_epoch(report: Any) -> None:
    say(str(report), err=True)


def _warn(line: str) -> None:
    say(f"warning: {line}", err=True)
