"""A bundle → its report page."""

from __future__ import annotations

import math
from typing import Any

from cnnedge.benchmark.interleaved import Benchmark
from cnnedge.benchmark.load import banner
from cnnedge.bundle import Manifest, Variant
from cnnedge.result import limit_of


def variant_rows(manifest: Manifest) -> list[dict[str, Any]]:
    """Return one row per variant, the Keras reference first, as both table and page show them."""
    reference = manifest.reference
    keras_ms = (reference.get("latency") or {}).get("median_ms")
    trained = manifest.model.get("weights") != "random"
    rows = [
        {
            "name": "keras",
            "title": "Keras reference",
            "megabytes": reference.get("bytes", 0) / 1e6,
            "top1": 100 * reference["top1"] if trained else None,
            "drop": None,
            "max_abs_diff": None,
            "limit": None,
            "median_ms": keras_ms,
            "speed_up": None if doubt_of(manifest) else 1.0,
            "status": "reference",
            "reason": "",
            "int8_macs": None,
            "is_speed": True,
            "recommended": None,
            "advice": "",
        }
    ]
    rows += [_variant_row(variant, keras_ms, trained) for variant in manifest.variants]
    if guesses(manifest):  # how many times faster it guesses is no figure to show
        rows = [row | {"speed_up": None} for row in rows]
    return rows


def guesses(manifest: Manifest) -> str | None:
    """Return the line that says so where the model itself is no better than guessing."""
    found = manifest.reference.get("guessing")
    return f"The model itself is no better than guessing: {found}." if found else None


def _variant_row(variant: Variant, keras_ms: float | None, trained: bool) -> dict[str, Any]:
    accuracy, verdict = variant.accuracy or {}, variant.verdict or {}
    latency = variant.latency or {}
    median, doubted = latency.get("median_ms"), bool(latency.get("doubt"))
    # The TensorRT graph runs on the CPU for its answers; its speed there is emulation.
    is_speed = variant.target != "trt"
    speed = variant.recommendation or {}
    return {
        "name": variant.name,
        "title": _TITLES.get(variant.name, variant.name),
        "megabytes": variant.bytes / 1e6,
        "top1": 100 * accuracy["top1"] if accuracy and trained else None,
        "drop": (accuracy["drop_points"], *accuracy["drop_interval_points"])
        if accuracy and trained
        else None,
        "max_abs_diff": accuracy.get("max_abs_diff"),
        "limit": limit_of(variant.precision, accuracy.get("limit"), accuracy.get("rounds_as"))
        if accuracy
        else None,
        "median_ms": median if is_speed else None,
        "speed_up": keras_ms / median if keras_ms and median and is_speed and not doubted else None,
        "status": verdict.get("status", "not verified"),
        "reason": verdict.get("reason", ""),
        "int8_macs": variant.achieved.get("macs", {}).get("int8"),
        "is_speed": is_speed,
        "recommended": None if doubted else speed.get("recommended"),
        "advice": speed.get("reason", ""),
    }


def doubt_of(manifest: Manifest) -> str | None:
    """Return why a bundle's latencies decide nothing, as the export found; None: they do."""
    latencies = [manifest.reference.get("latency"), *(v.latency for v in manifest.variants)]
    return next((str(one["doubt"]) for one in latencies if one and one.get("doubt")), None)


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
    curve = manifest.calibration.get("convergence", ())
    last = math.log2(max((point["images"] for point in curve), default=1)) or 1.0
    return [
        {
            "x": 100 * math.log2(point["images"]) / last,
            "largest": 40 - 200 * min(point["largest_change"], 0.2),
            "median": 40 - 200 * min(point["median_change"], 0.2),
            **point,
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
    slowest = max((row["median_ms"] or 0.0 for row in rows), default=0.0)
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
