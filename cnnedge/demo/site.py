"""The site: page, models, golden images and ONNX Runtime's files in one folder, for any server.

::

    index.html *.mjs style.css   the page
    site.json                    what the page offers: its models and samples
    models/ samples/             from the bundle
    ort/                         ONNX Runtime, with its licence
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cnnedge.bundle import Bundle, Variant
from cnnedge.demo.runtime import FILES, PACKAGE, Runtime
from cnnedge.errors import BundleError, CnnEdgeError
from cnnedge.files import atomic_folder
from cnnedge.runtime.choice import runs_on
from cnnedge.selftest import read_selftest
from cnnedge.version import __version__

PAGE = Path(__file__).parent / "page"
SITE = "site.json"
_LICENCE = f"LICENSE.{PACKAGE}.txt"
_IMAGES = {".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp"}  # that every browser reads
_TITLES = {"fp32": "FP32", "fp16": "FP16", "int8": "INT8"}
# The first of these is what the page opens with: it is the smallest, and fast without a GPU.
_ORDER = ("int8", "int4-weight", "int8-weight", "fp16", "fp32")


def page_variants(bundle: Bundle, name: str | None = None) -> list[Variant]:
    """Return the variants that the page offers, the one it opens with first.

    Args:
        bundle: The bundle.
        name: One variant, whatever was verified; None: every verified one that runs on a CPU.

    Raises:
        BundleError: there is none, it is not for CPUs, or the bundle takes no raw images.
    """
    manifest = bundle.manifest
    if manifest.input != "uint8":
        raise BundleError(
            f"the graphs of {bundle.origin} take {manifest.input}, and the page gives uint8 images",
            fix='export it with `input = "uint8"`',
        )
    if name is not None:
        variant = manifest.variant(name)
        if not runs_on(variant, "cpu"):
            raise BundleError(
                f"{name} of {bundle.origin} is written for TensorRT, and browsers have none",
                fix="choose one of: " + ", ".join(v.name for v in _for_cpus(bundle)),
            )
        return [variant]
    fit = [v for v in _for_cpus(bundle) if v.verified]
    if not fit:
        raise BundleError(
            f"no variant of {bundle.origin} was verified",
            fix="run `cnnedge verify` on it first, or name a --variant",
        )
    return sorted(fit, key=lambda v: _ORDER.index(v.name) if v.name in _ORDER else len(_ORDER))


def _for_cpus(bundle: Bundle) -> list[Variant]:
    return [v for v in bundle.manifest.variants if runs_on(v, "cpu")]


def check_site_place(out: Path, *, overwrite: bool) -> None:
    """Find out before anything is fetched whether the site can be laid there.

    Raises:
        CnnEdgeError: something is there and is not to be replaced, or is no site of ours.
    """
    if not out.exists():
        return
    if not overwrite:
        raise CnnEdgeError(f"{out} exists already", fix="choose another folder or pass --force")
    if not _is_site(out) and not (out.is_dir() and not any(out.iterdir())):
        raise CnnEdgeError(
            f"{out} is not a site of `cnnedge demo`, and is not replaced",
            fix="choose another folder",
        )


def _is_site(folder: Path) -> bool:
    try:
        return "cnnedge" in json.loads((folder / SITE).read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError):
        return False


def lay_site(
    bundle: Bundle,
    out: Path,
    runtime: Runtime,
    *,
    variant: str | None = None,
    overwrite: bool = False,
    place: Callable[[Path, Path], Any] = shutil.copyfile,
) -> Path:
    """Lay the site of a bundle into a folder, whole or not at all; return the folder.

    Args:
        bundle: The bundle.
        out: The folder to be made.
        runtime: ONNX Runtime's files.
        variant: The only one the page offers; None: see `page_variants`.
        overwrite: Replace a site that is there.
        place: Puts a file of the bundle or of the runtime into the site; `os.symlink` for one
            that is served at once and thrown away.

    Raises:
        BundleError: the bundle has no variant for the page.
        CnnEdgeError: ``out`` exists, or cannot be written.
    """
    check_site_place(out, overwrite=overwrite)
    variants = page_variants(bundle, variant)
    samples = _samples(bundle)
    _refuse_same_names(bundle, [v.file for v in variants])
    _refuse_same_names(bundle, [name for name, _ in samples])
    described = {
        "name": bundle.manifest.name,
        "cnnedge": __version__,
        "image": bundle.manifest.image.to_dict(),
        "labels": len(bundle.manifest.labels),
        "variants": [_describe(v) for v in variants],
        "samples": [{**sample, "file": f"samples/{Path(name).name}"} for name, sample in samples],
    }
    with atomic_folder(out, overwrite=overwrite) as folder:
        shutil.copytree(PAGE, folder, dirs_exist_ok=True)
        for name in ("models", "samples", "ort"):
            (folder / name).mkdir()
        (folder / _LICENCE).rename(folder / "ort" / "LICENSE.txt")
        for name in FILES:
            place((runtime.folder / name).resolve(), folder / "ort" / name)
        for v in variants:
            place(bundle.path(v.file).resolve(), folder / "models" / Path(v.file).name)
        for name, _ in samples:
            place(bundle.path(name).resolve(), folder / "samples" / Path(name).name)
        text = json.dumps(described, ensure_ascii=False, indent=1) + "\n"
        (folder / SITE).write_text(text, encoding="utf-8")
    return out


def _refuse_same_names(bundle: Bundle, files: list[str]) -> None:
    """Refuse files that would take each other's place where they lie side by side."""
    seen: dict[str, str] = {}
    for file in files:
        other = seen.setdefault(Path(file).name.casefold(), file)
        if other != file:
            raise BundleError(
                f"{bundle.origin} has {other} and {file}, which the page has one name for",
                fix="export it again",
            )


def _describe(variant: Variant) -> dict[str, Any]:
    return {
        "name": variant.name,
        "title": _TITLES.get(variant.name, variant.name),
        "precision": variant.precision,
        "file": f"models/{Path(variant.file).name}",
        "bytes": variant.bytes,
    }


def _samples(bundle: Bundle) -> list[tuple[str, dict[str, Any]]]:
    """Return the golden images that a browser reads, with the answer of the Keras reference."""
    index = read_selftest(bundle)
    index.answers_of("reference", bundle)
    found = []
    for entry, answers in zip(index.images, index.answers["reference"], strict=True):
        known = [-1.0 if one is None else one for one in answers]
        best = max(range(len(known)), key=known.__getitem__)
        reference = {
            "label": bundle.manifest.labels[best],
            "index": best,
            "probability": answers[best],
        }
        if Path(entry.file).suffix.lower() in _IMAGES:
            found.append((entry.file, {"reference": reference}))
    return found
