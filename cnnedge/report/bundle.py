"""A bundle → its report page."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

from msgspec.structs import asdict

from cnnedge.benchmark.interleaved import Benchmark
from cnnedge.benchmark.load import banner
from cnnedge.bundle import Manifest, Variant
from cnnedge.comparison import limit_of


@dataclass(frozen=True, kw_only=True)
class VariantRow:
    """What both table and page show of a variant, or of the Keras reference; None: not known.

    Attributes:
        name: The variant's, or "keras".
        title: What readers call it.
        megabytes: The file's size, or that of the reference's float32 weights.
        top1: Percent of the test images.
        drop: Points of top-1 that it loses to Keras, and the 95 % interval.
        max_abs_diff: The largest difference of a probability.
        limit: What that is judged by.
        median_ms: Its median latency.
        speed_up: How many times faster than Keras; None where latencies decide nothing.
        status: Its verdict.
        reason: Why.
        int8_macs: The share of MACs in int8.
        is_speed: Whether its latency here is that of what it is written for.
        recommended: Whether the speed gate passed.
        advice: Why, or why not.
    """

    name: str
    title: str
    megabytes: float
    top1: float | None = None
    drop: tuple[float, float, float] | None = None
    max_abs_diff: float | None = None
    limit: float | None = None
    median_ms: float | None = None
    speed_up: float | None = None
    status: str = "not verified"
    reason: str = ""
    int8_macs: float | None = None
    is_speed: bool = True
    recommended: bool | None = None
    advice: str = ""


def variant_rows(manifest: Manifest) -> list[VariantRow]:
    """Return one row per variant, the Keras reference first."""
    reference, trained = manifest.reference, manifest.model.trained
    keras_ms = None if reference.latency is None else reference.latency.median_ms
    rows = [
        VariantRow(
            name="keras",
            title="Keras reference",
            megabytes=reference.bytes / 1e6,
            top1=100 * reference.top1 if trained and reference.top1 is not None else None,
            median_ms=keras_ms,
            speed_up=None if doubt_of(manifest) else 1.0,
            status="reference",
        )
    ]
    rows += [_variant_row(variant, keras_ms, trained) for variant in manifest.variants]
    if guesses(manifest):  # how many times faster it guesses is no figure to show
        rows = [replace(row, speed_up=None) for row in rows]
    return rows


def guesses(manifest: Manifest) -> str | None:
    """Return the line that says so where the model itself is no better than guessing."""
    share = manifest.reference.guessing
    return f"The model itself is no better than guessing: {share}." if share else None


def _variant_row(variant: Variant, keras_ms: float | None, trained: bool) -> VariantRow:
    row = VariantRow(
        name=variant.name,
        title=_TITLES.get(variant.name, variant.name),
        megabytes=variant.bytes / 1e6,
        int8_macs=variant.achieved.get("macs", {}).get("int8"),
        # The TensorRT graph runs on the CPU for its answers; its speed there is emulation.
        is_speed=variant.target != "trt",
    )
    if variant.verdict is not None:
        row = replace(row, status=variant.verdict.status, reason=variant.verdict.reason)
    if (accuracy := variant.accuracy) is not None:
        limit = limit_of(variant.precision, accuracy.limit, accuracy.rounds_as)
        row = replace(row, max_abs_diff=accuracy.max_abs_diff, limit=limit)
        if trained:
            drop = (accuracy.drop, *accuracy.interval)
            row = replace(row, top1=100 * accuracy.top1, drop=drop)
    doubted = variant.latency is not None and variant.latency.doubt is not None
    if variant.latency is not None and row.is_speed:
        median = variant.latency.median_ms
        speed_up = keras_ms / median if keras_ms and not doubted else None
        row = replace(row, median_ms=median, speed_up=speed_up)
    if (advice := variant.recommendation) is not None:
        recommended = None if doubted else advice.recommended
        row = replace(row, recommended=recommended, advice=advice.reason)
    return row


def doubt_of(manifest: Manifest) -> str | None:
    """Return why a bundle's latencies decide nothing, as the export found; None: they do."""
    latencies = [manifest.reference.latency, *(v.latency for v in manifest.variants)]
    return next((one.doubt for one in latencies if one is not None and one.doubt), None)


def attempts(manifest: Manifest) -> list[dict[str, Any]]:
    """Return what was tried for each variant that failed its gate at first, for the page."""
    found = []
    for variant in manifest.variants:
        record = variant.quantization or {}
        if record.get("attempts"):
            found.append({"title": _TITLES.get(variant.name, variant.name), **record})
    return found


def convergence_points(manifest: Manifest) -> list[dict[str, float]]:
    """Return the scale-convergence curve in the coordinates of a 100 × 40 picture.

    Across: images, logarithmic. Upward: the largest change of any scale, 0…20 % and beyond.
    """
    curve = () if manifest.calibration is None else manifest.calibration.convergence
    last = math.log2(max((point.images for point in curve), default=1)) or 1.0
    return [
        {
            "x": 100 * math.log2(point.images) / last,
            "largest": 40 - 200 * min(point.largest_change, 0.2),
            "median": 40 - 200 * min(point.median_change, 0.2),
            **asdict(point),
        }
        for point in curve
    ]


def render_report(manifest: Manifest, bench: Benchmark) -> str:
    """Return the bundle's report as one self-contained HTML page."""
    from jinja2 import Environment, PackageLoader, select_autoescape

    environment = Environment(
        loader=PackageLoader("cnnedge"), autoescape=select_autoescape(), trim_blocks=True
    )
    rows = variant_rows(manifest)
    doubted = doubt_of(manifest)
    slowest = max((row.median_ms or 0.0 for row in rows), default=0.0)
    return environment.get_template("report.html").render(
        m=manifest,
        banner=None if doubted is None else banner(doubted),
        rows=rows,
        guesses=guesses(manifest),
        bench=bench.to_dict(),
        slowest=slowest or 1.0,
        attempts=attempts(manifest),
        curve=convergence_points(manifest),
    )


_TITLES = {
    "fp32": "FP32",
    "fp16": "FP16",
    "int8": "INT8 for CPUs",
    "int8-trt": "INT8 for TensorRT",
    "int8-weight": "INT8 weights",
    "int4-weight": "INT4 weights",
}
