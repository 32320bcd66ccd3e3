"""INT8 within the flow: calibrated on a split of its own, guarded by the gate on the test split."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cnnedge.comparison import Comparison, Verdict
from cnnedge.data import Split
from cnnedge.data.split import refuse_overlap
from cnnedge.image import value_range
from cnnedge.machine import this_machine
from cnnedge.progress import Progress
from cnnedge.quantize import (
    BATCH_SIZE,
    CPU,
    CPU_REDUCED,
    TRT,
    Calibration,
    Guarded,
    NoInt8Error,
    Plan,
    QuantizedGraph,
    calibrate,
    choose_ranges,
    convergence,
    enough_images,
    hold_gate,
    make_plan,
    quantize,
)
from cnnedge.recipe import Recipe
from cnnedge.runtime.uint8 import as_taken, scaling_before
from cnnedge.sections import CalibrationRecord, ConvergencePoint
from cnnedge.source import Source

if TYPE_CHECKING:
    import onnx_ir as ir


@dataclass(frozen=True)
class Calibrated:
    """An FP32 graph and what calibration saw of it.

    Attributes:
        model: The FP32 ``onnx_ir.Model``.
        plans: What is quantized in each INT8 variant, by the variant's name.
        split: The calibration images.
        images: Gives them anew each time, in batches as the graph takes them.
        calibration: What was observed.
        method: The calibration method of the first attempt.
        refused: Of each variant that cannot be, why.
    """

    model: ir.Model
    plans: dict[str, Plan]
    split: Split
    images: Callable[[], Iterator[np.ndarray]]
    calibration: Calibration
    method: str
    refused: dict[str, str]

    def plain(self, name: str) -> QuantizedGraph:
        """Return a variant's graph as calibration alone gives it."""
        plan = self.plans[name]
        return quantize(self.model, plan, choose_ranges(self.calibration, plan, self.method))

    def describe(self, source: str) -> CalibrationRecord:
        """Return where the scales come from: images of a data source."""
        first = next(iter(self.plans.values()))
        curve = convergence(self.calibration, first, self.method)
        return CalibrationRecord(
            source=source,
            split=self.split.name,
            images=self.calibration.images,
            sha256=self.split.digest(),
            image_sha256=tuple(digest.hex() for digest in self.split.item_digests()),
            method=self.method,
            convergence=tuple(ConvergencePoint(**asdict(point)) for point in curve),
            enough_images=enough_images(curve),
        )


def calibration_split(source: Source, recipe: Recipe) -> Split:
    """Return the images that a recipe calibrates on."""
    return source.dataset.calibration.take(recipe.calibration_images, seed=recipe.seed or 0)


def calibrate_source(
    source: Source, recipe: Recipe, model: ir.Model, test: Split, scratch: Path, progress: Progress
) -> Calibrated:
    """Calibrate the INT8 variants of both families of runtimes at once.

    Raises:
        NoInt8Error: no layer can compute in int8, for any of them.
        DataError: an image of the calibration split is also one of ``test``.
    """
    has_dot_product = recipe.dot_product
    if has_dot_product is None:
        has_dot_product = this_machine().has_int8_dot_product
    cpu = CPU if has_dot_product else CPU_REDUCED
    plans, refused = {}, {}
    for name, target in {"int8": cpu, "int8-trt": TRT}.items():
        try:
            plans[name] = make_plan(model, target)
        except NoInt8Error as error:
            refused[name] = error
    if not plans:
        raise refused["int8"]
    split = calibration_split(source, recipe)
    refuse_overlap(split, test)
    scaling = scaling_before(recipe.input, source.normalization)

    def images() -> Iterator[np.ndarray]:
        for batch, _ in split.batches(source.image, BATCH_SIZE):
            yield as_taken(batch, scaling)

    calibration = calibrate(
        model,
        dict.fromkeys(tensor for plan in plans.values() for tensor in plan.tensors),
        images(),
        scratch,
        value_range=None if scaling is None else value_range(scaling),
        name_of=split.name_of,
        total=len(split),
        progress=progress,
    )
    whys = {name: error.what for name, error in refused.items()}
    return Calibrated(model, plans, split, images, calibration, recipe.calibration, whys)


def guard_variant(
    calibrated: Calibrated,
    name: str,
    plain: tuple[Comparison, Verdict],
    evaluate: Callable[[ir.Model], tuple[Comparison, Verdict]],
    scratch: Path,
    progress: Progress,
) -> Guarded:
    """Try what there is until a variant's gate holds; ``plain`` is how it did without."""
    return hold_gate(
        calibrated.model,
        calibrated.plans[name],
        calibrated.calibration,
        calibrated.images,
        evaluate,
        scratch,
        plain=plain,
        method=calibrated.method,
        progress=progress,
    )


def describe_quantization(
    graph: QuantizedGraph, method: str, found: Guarded | None
) -> dict[str, Any]:
    """Return how a variant was quantized, as the manifest has it.

    Args:
        graph: The variant's graph.
        method: The calibration method its scales come from.
        found: What the guard tried; None where it was not called.
    """
    plan = graph.plan
    return {
        "method": method,
        "weight_limit": plan.target.weight_limit,
        "kept_float": dict(plan.skipped),
        "attempts": [] if found is None else [attempt.to_dict() for attempt in found.attempts],
        "chosen": None if found is None else found.chosen,
        "method_divergence_nats": {} if found is None else dict(found.methods),
        "sensitivity": [] if found is None else [asdict(layer) for layer in found.sensitivity],
    }
