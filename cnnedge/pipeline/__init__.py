"""The whole flow as plain calls: Keras model in, verified bundle out.

    train ──► export ──► quantize ──► verify ──► benchmark ──► bundle ──► engine ──► runtime

Each step is a function of its own module and knows no other step; this page connects them.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from cnnedge.backends.tensorrt import open_library
from cnnedge.bundle import MANIFEST, Bundle, check_place, open_bundle
from cnnedge.data import Dataset
from cnnedge.engine import build_engines
from cnnedge.files import atomic_folder
from cnnedge.pipeline.build import write_bundle
from cnnedge.plan import PlanOptions
from cnnedge.progress import Progress, silent
from cnnedge.recipe import Recipe
from cnnedge.source import resolve


def export_bundle(
    recipe: Recipe,
    out: Path | str,
    *,
    force: bool = False,
    progress: Progress = silent,
    on_data: Callable[[Dataset], None] = lambda dataset: None,
) -> tuple[Bundle, list[str]]:
    """Build the bundle that a recipe asks for.

    Args:
        recipe: What to build.
        out: The bundle's folder, which appears only once it is complete.
        force: Replace ``out`` where it is a bundle.
        progress: Told how far each step is.
        on_data: Told of the data once it is open.

    Returns:
        The bundle, and warnings a user should read, one line each.

    Raises:
        CnnEdgeError: anything that stops it; nothing is left half-written.

    Examples:
        >>> recipe = cnnedge.make_recipe(
        ...     model="digits.keras", precision=("fp16",), bench_seconds=0.1
        ... )
        >>> bundle, warnings = cnnedge.export_bundle(recipe, "fresh")
        >>> [variant.name for variant in bundle.manifest.variants]
        ['fp32', 'fp16']
    """
    out = Path(out)
    check_place(out, force=force)  # before minutes of work, not after
    for runtime in recipe.engines:
        open_library(runtime)  # likewise
    source, warnings = resolve(recipe, progress=progress)
    on_data(source.dataset)
    with atomic_folder(out, overwrite=force) as folder:
        manifest = write_bundle(source, recipe, folder, warnings, progress)
        (folder / MANIFEST).write_text(manifest.to_json(), encoding="utf-8")  # last: it completes
    for runtime in recipe.engines:
        engines = build_engines(
            out, runtime, PlanOptions(max_batch=recipe.max_batch), progress=progress
        )
        warnings += [
            f"{e.note.variant}: no plan: {e.report.violations[0]}" for e in engines if e.failed
        ]
    return open_bundle(out), warnings
