"""A run → the result document that docs/benchmark.md lists; `rows` has the contestants' part."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from cnnedge.benchmark.accuracy import Answers, describe, examples
from cnnedge.benchmark.contestants import Contestant
from cnnedge.benchmark.load import doubt, stable_ones
from cnnedge.benchmark.peaks import Peaks, layer_bounds
from cnnedge.benchmark.pick import pick
from cnnedge.benchmark.rounds import Collected
from cnnedge.benchmark.rows import contestant_row
from cnnedge.benchmark.schema import Result
from cnnedge.benchmark.suite import ModelEntry, Suite
from cnnedge.bundle import Bundle, Manifest
from cnnedge.chance import guessing
from cnnedge.documents import hold, parse_json
from cnnedge.errors import BundleError, CnnEdgeError
from cnnedge.machine import Machine

SCHEMA = 1
KIND = "cnnedge-benchmark"


def read_result(path: Path | str) -> dict[str, Any]:
    """Read a result document.

    Raises:
        CnnEdgeError: it is missing, no such document, or of another schema.
    """
    try:
        found = parse_json(Path(path).read_bytes())
    except OSError as error:
        raise CnnEdgeError(f"cannot read {path}: {error.strerror}", fix="check the path") from error
    except ValueError as error:
        raise CnnEdgeError(
            f"{path} is no whole JSON document", fix="measure again: cnnedge bench … --json"
        ) from error
    if not isinstance(found, dict) or found.get("kind") != KIND:
        raise CnnEdgeError(f"{path} is no result of `cnnedge bench --json`", fix="give such a file")
    if found.get("schema") != SCHEMA:
        raise CnnEdgeError(
            f"{path} has schema {str(found.get('schema'))[:40]}, this cnnedge reads {SCHEMA}",
            fix="measure again, or use the cnnedge that wrote it",
        )
    try:
        hold(found, Result)
    except ValueError as error:
        raise CnnEdgeError(
            f"{path} is no whole result of `cnnedge bench` ({error})", fix="measure again"
        ) from error
    for model in found["models"]:
        if "doubt" not in model:  # written before busy machines were noticed
            _doubt_anew(found, model)
    found.setdefault("doubt", whole_doubt(found["models"]))
    return found


def _doubt_anew(document: Mapping[str, Any], model: dict[str, Any]) -> None:
    """Judge an older document's model as one that is measured now."""
    rows = model["contestants"]
    leave_roof_out(rows)
    others = (document["environment"].get("conditions") or {}).get("others")
    model["doubt"] = doubt(others, stable_ones(rows))
    if model["doubt"] is None:
        return
    told = dict(document["environment"]["machine"])
    isa = tuple(told.get("isa") or ())
    machine = Machine(told["cpu"], told.get("cores") or 1, isa, 0.0, told.get("system") or "")
    known = re.search(r'cnnedge\.load\("([^"]+)"', model["pick"].get("how") or "")
    model["pick"] = pick(
        rows,
        bundle=known[1] if known else model["name"],
        max_drop=model["max_drop"],
        judged=model["weights"] != "random",
        doubt=model["doubt"],
        machine=machine,
        macs=model.get("macs"),
    )


def whole_doubt(models: Sequence[Mapping[str, Any]]) -> str | None:
    """Return why latencies of a document decide nothing, of those models where it is so."""
    doubted = {model["name"]: model["doubt"] for model in models if model["doubt"]}
    if len(set(doubted.values())) == 1 and len(doubted) == len(models):
        return next(iter(doubted.values()))
    return "; ".join(f"{name}: {why}" for name, why in doubted.items()) or None


def leave_roof_out(rows: Sequence[dict[str, Any]]) -> None:
    """Take back the roof where somebody ran faster than it: then it is none.

    Of a whole network that is faster, everybody's shares are of a roof that is too low; of a single
    layer, which may need fewer multiplications than are counted (Winograd), its own is.
    """
    roofs = [row["roofline"] for row in rows if row.get("roofline")]
    refuted = any((roof.get("fraction") or 0.0) > 1.0 for roof in roofs)
    for roof in roofs:
        if refuted and roof.get("bound_ms") is not None:
            roof.update(bound_ms=None, fraction=None, why=ABOVE_THE_ROOF)
    for layer in (layer for row in rows for layer in row.get("layers") or ()):
        if refuted or (layer.get("fraction") or 0.0) > 1.0:
            layer.update(bound_ms=None, fraction=None)


ABOVE_THE_ROOF = (
    "somebody ran faster than the roof that was measured, so it was measured too low, as on a busy "
    "machine, or for kernels that need fewer multiplications than are counted"
)


class Measured:
    """One bundle with what was measured of it."""

    def __init__(self, bundle: Bundle, entry: ModelEntry) -> None:
        self.bundle, self.entry = bundle, entry
        self.collected: list[Collected] = []
        self.left_out: list[tuple[str, str]] = []
        self.answers: Answers | None = None
        self.file: Path = bundle.root
        self.others: dict[str, Any] | None = None


def model_document(found: Measured, suite: Suite, peaks: Peaks | None) -> dict[str, Any]:
    """Return what docs/benchmark.md lists of a model."""
    manifest = found.bundle.manifest
    judged = manifest.model.trained
    graphs = _graphs(found.bundle)
    baseline = next((one for one in found.collected if one.error is None), None)
    rows = []
    for one in found.collected:
        layers, why = graphs(one.contestant)
        bounds = None if peaks is None or layers is None else layer_bounds(layers, peaks)
        if peaks is None:
            why = "the machine's peaks were not measured"
        elif one.contestant.on_gpu:
            bounds, why = None, "the peaks are the CPU's: a GPU's roof is not measured"
        row = contestant_row(one, baseline, bounds, why)
        row["error"] = one.error
        row |= _answers_row(found, one.contestant, manifest, judged)
        rows.append(row)
    for row in rows:
        if row["waterfall"] is not None:
            row["waterfall"]["file"] = _describe_file(found.file)
        if row["duty_cycle"] is not None:
            row["duty_cycle"]["idle_s"] = suite.idle_seconds
    leave_roof_out(rows)
    doubted = doubt(found.others, stable_ones(rows))
    guesses = _guesses(found, manifest) if judged else None
    max_drop = manifest.max_drop if suite.max_drop is None else suite.max_drop
    layers, _ = graphs(found.collected[0].contestant)
    macs = None if layers is None else sum(layer.macs for layer in layers)
    height, width, channels = manifest.image.shape
    data = None
    if found.answers is not None:
        data = {
            "source": found.answers.source,
            "images": len(found.answers.split),
            "sha256": found.answers.split.digest(),
            "reference": found.answers.reference,
        }
    return {
        "name": manifest.name,
        "weights": manifest.model.weights,
        "labels": list(manifest.labels),
        "image": manifest.image.to_dict(),
        "layout": f"{manifest.input} NHWC [N, {height}, {width}, {channels}]",
        "macs": macs,
        "max_drop": max_drop,
        "guessing": guesses,
        "data": data,
        "baseline": None if baseline is None else baseline.contestant.name,
        "contestants": rows,
        "left_out": [{"name": name, "why": why} for name, why in found.left_out],
        "examples": None
        if found.answers is None
        else examples(found.answers, rows, manifest.labels, manifest.image),
        "doubt": doubted,
        "pick": pick(
            rows,
            bundle=os.path.normpath(found.entry.bundle),
            max_drop=max_drop,
            judged=judged,
            doubt=doubted,
            macs=macs,
            guessing=guesses,
        ),
    }


def _guesses(found: Measured, manifest: Manifest) -> str | None:
    """Return how well the reference does, where that is no better than by guessing."""
    if found.answers is not None:
        return guessing(found.answers.expected, found.answers.split.targets)
    return manifest.reference.guessing


def _answers_row(
    found: Measured, who: Contestant, manifest: Manifest, judged: bool
) -> dict[str, Any]:
    """Return a contestant's accuracy: measured here, or as the export recorded it."""
    nothing: dict[str, Any] = {
        "accuracy": None,
        "right": None,
        "confusion": None,
        "confused": [],
        "flips": [],
    }
    if found.answers is not None and who.name in found.answers.found:
        note = f"measured here, against {found.answers.reference}"
        if not judged:
            note += "; the weights are random, so it means nothing"
        described = describe(found.answers, who.name, manifest.labels)
        return {**described, "accuracy_note": note}
    if who.runtime == "cpu" and judged:
        recorded = manifest.variant(who.variant).accuracy
        if recorded is not None:
            note = "as recorded at export, on ONNX Runtime"
            return {**nothing, "accuracy": recorded.to_dict(), "accuracy_note": note}
    if who.runtime == "keras" and judged and manifest.reference.top1 is not None:
        return {**nothing, "accuracy_note": "the reference itself"}
    return {**nothing, "accuracy_note": None}


def _graphs(bundle: Bundle) -> Callable[[Contestant], tuple[Any, str | None]]:
    """Return what tells a contestant's layers, or why they are not known."""
    try:
        import onnx_ir as ir

        from cnnedge.graph.precision import weighted_layers
    except ImportError:
        return lambda who: (None, 'layers are read with pip install "cnnedge[export]"')
    known: dict[str, Any] = {}

    def layers(who: Contestant) -> tuple[Any, str | None]:
        name = who.layers_of
        if name is None:
            return None, "its layers are not known"
        if name not in known:
            try:
                variant = bundle.manifest.variant(name)
            except BundleError as error:
                return None, str(error)
            known[name] = weighted_layers(ir.load(bundle.path(variant.file)))
        return known[name], None

    return layers


def _describe_file(path: Path) -> dict[str, Any]:
    from PIL import Image

    with Image.open(path) as picture:
        return {
            "name": path.name,
            "format": picture.format,
            "width": picture.width,
            "height": picture.height,
            "bytes": path.stat().st_size,
        }
