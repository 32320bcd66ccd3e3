"""A benchmark's result file → one self-contained HTML page."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from functools import cache
from typing import Any

from cnnedge.benchmark.load import banner
from cnnedge.errors import MissingExtraError
from cnnedge.report import table
from cnnedge.report.cards import cards_of
from cnnedge.report.style import NONE, Look, Row, at, looks, number, title_of


def render_page(document: Mapping[str, Any]) -> str:
    """Return a benchmark's results as one HTML page that needs no network.

    Args:
        document: The result file of ``cnnedge bench --json``; docs/benchmark.md describes it.

    Raises:
        MissingExtraError: jinja2 or plotly is not installed.
    """
    require_page_packages()
    from plotly.offline import get_plotlyjs

    models = document.get("models") or []
    style = looks(c["name"] for m in models for c in m.get("contestants") or [])
    return _template().render(
        title=at(document, "suite", "name") or "Benchmark",
        banner=banner(document["doubt"]) if document.get("doubt") else None,
        where=table.environment_line(document),
        models=[_model(m, f"m{i}", style) for i, m in enumerate(models)],
        about=table.about_run(document),
        plotly=get_plotlyjs(),
    )


def require_page_packages() -> None:
    """Find out whether the page can be made, before minutes of measuring rather than after.

    Raises:
        MissingExtraError: jinja2 or plotly is not installed.
    """
    for package in ("jinja2", "plotly"):
        try:
            importlib.import_module(package)
        except ImportError as error:
            raise MissingExtraError(package, "report", purpose="the HTML page") from error


@cache
def _template() -> Any:
    from jinja2 import Environment, PackageLoader, select_autoescape

    environment = Environment(
        loader=PackageLoader("cnnedge"),
        autoescape=select_autoescape(),
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("benchmark.html")


def _model(model: Row, prefix: str, style: Mapping[str, Look]) -> dict[str, Any]:
    """Return all that the page shows of one model."""
    contestants = model.get("contestants") or []
    if model.get("weights") == "random":  # then what was counted means nothing
        contestants = [{**c, "accuracy": None} for c in contestants]
    model = {**model, "contestants": contestants}
    pick = model.get("pick") or {}
    rows = table.rows(model, style)
    gallery = [
        {
            "title": title_of(c),
            "flipped": max(c.get("flipped") or 0, len(shown)),
            "of": at(model, "data", "images"),
            "images": shown,
            "open": c["name"] == pick.get("name"),
        }
        for c in contestants
        if (shown := table.flips(c, model))
    ]
    return {
        "id": prefix,
        "name": model.get("name") or "model",
        "lead": _lead(model),
        "random": model.get("weights") == "random",
        "budget": table.points(model.get("max_drop")),
        "pick": pick,
        "picked": next((row for row in rows if row["name"] == pick.get("name")), None),
        "doubt": model.get("doubt"),
        "baseline": next((row["title"] for row in rows if row["baseline"]), None),
        "rows": rows,
        "accurate": any(row["top1"] != NONE for row in rows),
        "notes": table.notes(model),
        "left_out": table.left_out(model),
        "gpu": table.gpu_figures(model),
        "cards": cards_of(model, prefix, style),
        "mistakes": [
            {"title": title_of(c), "rows": c["confused"], "open": c["name"] == pick.get("name")}
            for c in contestants
            if c.get("confused") and not c.get("confusion")
        ],
        "gallery": gallery,
        "about": table.about_model(model),
    }


def _lead(model: Row) -> str:
    image = model.get("image") or {}
    labels = model.get("labels")
    colours = {1: " grey", 3: " RGB"}.get(image.get("channels", 0), "")
    macs = model.get("macs")
    parts = [
        f"{len(labels):,} classes" if labels else None,
        f"{image['width']}×{image['height']}{colours}" if at(image, "width") else None,
        f"{number(macs / 1e6)} million multiplications an image" if macs else None,
        f"{model['weights']} weights" if model.get("weights") else None,
    ]
    return " · ".join(part for part in parts if part)
