"""The command that gives a bundle the form that an app or a server wants."""

from __future__ import annotations

from itertools import permutations
from pathlib import Path
from typing import Any

import click

from cnnedge.cli.shell import command, main, say
from cnnedge.cli.show import print_json


@command(
    main,
    "package",
    "cnnedge package alexnet --onnx app.onnx --any-size\n"
    "cnnedge package alexnet --zip alexnet.zip --triton models",
)
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--onnx", type=click.Path(path_type=Path), help="One ONNX file of one variant.")
@click.option("--zip", "archive", type=click.Path(path_type=Path), help="The bundle in one file.")
@click.option("--triton", type=click.Path(path_type=Path), help="A Triton model repository.")
@click.option(
    "--variant",
    help="Of --onnx and --triton. Default: what `load` picks on this CPU; and all that passed.",
)
@click.option(
    "--any-size", is_flag=True, help="Of --onnx: the graph resizes, as cnnedge does, to the bit."
)
@click.option(
    "--max-batch",
    type=click.IntRange(1),
    default=8,
    show_default=True,
    help="The largest batch that Triton makes of an ONNX file's requests.",
)
@click.option("--force", is_flag=True, help="Replace what is there.")
def package_command(
    bundle: Path,
    onnx: Path | None,
    archive: Path | None,
    triton: Path | None,
    variant: str | None,
    any_size: bool,
    max_batch: int,
    force: bool,
    as_json: bool,
) -> None:
    """Write a bundle in the form that an app or a server wants.

    \b
      --onnx FILE     one variant; labels and image contract are in its metadata. `cnnedge.load`
                      opens it, and so does any app with ONNX Runtime
      --zip FILE      the whole bundle; `cnnedge.load` and every command open it as it is
      --triton DIR    a model for each variant and each TensorRT plan, and KServe's
                      inferenceservice.yaml

    Each is written whole or not at all.
    """  # noqa: D301
    outputs = {"onnx": onnx, "zip": archive, "triton": triton}
    given = [path for path in outputs.values() if path is not None]
    if not given:
        raise click.UsageError("say what to write: --onnx FILE, --zip FILE or --triton DIR")
    places = [path.resolve() for path in given]
    if any(a.is_relative_to(b) for a, b in permutations(places, 2)):
        raise click.UsageError("each of them needs a place of its own, not within another's")
    if variant is not None and onnx is None and triton is None:
        raise click.UsageError("a zip file holds the whole bundle: leave --variant out")
    if any_size and onnx is None:
        raise click.UsageError("--any-size changes what --onnx writes, which is not given")
    from cnnedge.bundle import open_bundle
    from cnnedge.package.archive import write_archive
    from cnnedge.package.place import check_places
    from cnnedge.package.single import write_single
    from cnnedge.package.triton import write_triton

    opened = open_bundle(bundle)
    check_places(opened, (onnx, archive), triton, force=force)
    written: dict[str, Any] = {}
    if onnx is not None:
        written["onnx"] = write_single(
            opened, onnx, variant=variant, any_size=any_size, force=force
        )
    if archive is not None:
        written["zip"] = write_archive(opened, archive, force=force)
    if triton is not None:
        written["triton"] = write_triton(
            opened, triton, variant=variant, max_batch=max_batch, force=force
        )
    if as_json:
        print_json({"bundle": str(bundle)} | {k: found.to_dict() for k, found in written.items()})
    else:
        _show(written)


def _show(written: dict[str, Any]) -> None:
    if one := written.get("onnx"):
        say(f"{one.file}: {one.variant}, {one.bytes / 1e6:.1f} MB ({one.reason})")
    if one := written.get("zip"):
        say(f"{one.file}: {one.files} files, {one.bytes / 1e6:.1f} MB")
    if one := written.get("triton"):
        for model in one.models:
            say(f"{one.folder}/{model.name}: {model.backend}, {model.kind}")
        for name, why in one.left_out:
            say(f"left out: {name}: {why}")
        say(f"{one.folder}/{one.service}: set its storageUri")
