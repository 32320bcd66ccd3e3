"""Results → a page. Pure: data in, text out."""

from __future__ import annotations

from typing import Any

from cnnedge.benchmark import Benchmark
from cnnedge.bundle import Manifest, Variant


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
            "median_ms": keras_ms,
            "speed_up": 1.0,
            "status": "reference",
            "reason": "",
            "int8_macs": None,
            "is_speed": True,
        }
    ]
    rows += [_variant_row(variant, keras_ms, trained) for variant in manifest.variants]
    return rows


def _variant_row(variant: Variant, keras_ms: float | None, trained: bool) -> dict[str, Any]:
    accuracy, verdict = variant.accuracy or {}, variant.verdict or {}
    median = (variant.latency or {}).get("median_ms")
    # FP16 and the TensorRT graph run on the CPU for their answers; their speed there is emulation.
    is_speed = variant.precision != "fp16" and variant.target != "trt"
    return {
        "name": variant.name,
        "title": _TITLES.get(variant.name, variant.name),
        "megabytes": variant.bytes / 1e6,
        "top1": 100 * accuracy["top1"] if accuracy and trained else None,
        "drop": (accuracy["drop_points"], *accuracy["drop_interval_points"])
        if accuracy and trained
        else None,
        "max_abs_diff": accuracy.get("max_abs_diff"),
        "median_ms": median if is_speed else None,
        "speed_up": keras_ms / median if keras_ms and median and is_speed else None,
        "status": verdict.get("status", "not verified"),
        "reason": verdict.get("reason", ""),
        "int8_macs": variant.achieved.get("macs", {}).get("int8"),
        "is_speed": is_speed,
    }


def render_report(manifest: Manifest, bench: Benchmark) -> str:
    """Return the bundle's report as one self-contained HTML page."""
    from jinja2 import Environment, PackageLoader, select_autoescape

    environment = Environment(
        loader=PackageLoader("cnnedge"), autoescape=select_autoescape(), trim_blocks=True
    )
    rows = variant_rows(manifest)
    slowest = max((row["median_ms"] or 0.0 for row in rows), default=0.0)
    return environment.get_template("report.html").render(
        m=manifest, rows=rows, bench=bench.to_dict(), slowest=slowest or 1.0
    )


_TITLES = {
    "fp32": "FP32",
    "fp16": "FP16",
    "int8": "INT8 for CPUs",
    "int8-trt": "INT8 for TensorRT",
}
