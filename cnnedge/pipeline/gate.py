"""Decides on the test images whether a variant is good enough, and whether the model itself is."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from cnnedge.benchmark.interleaved import Benchmark
from cnnedge.chance import guessing
from cnnedge.comparison import Comparison, Verdict, judge
from cnnedge.data import Split
from cnnedge.graph.precision import achieved_precision
from cnnedge.measurement import Recommendation
from cnnedge.protocols import Runner
from cnnedge.recipe import Recipe
from cnnedge.source import Source
from cnnedge.verify import compare_variants

if TYPE_CHECKING:
    import onnx_ir as ir


@dataclass(frozen=True)
class Gate:
    """What variants are held against.

    Attributes:
        source: The model and its data.
        recipe: What is asked for.
        test: The images.
        expected: The reference's answers to them, float32 ``[N, classes]``.
    """

    source: Source
    recipe: Recipe
    test: Split
    expected: np.ndarray

    @property
    def trained(self) -> bool:
        """Whether the images are the model's own, and its weights learned from such."""
        return self.source.weights != "random" and self.source.may_calibrate

    @property
    def guessing(self) -> str | None:
        """How well the reference does, where that is no better than by guessing."""
        return guessing(self.expected, self.test.targets) if self.trained else None

    @property
    def warnings(self) -> list[str]:
        """What a user should read of the reference, one line each."""
        if self.guessing is None:
            return []
        return [
            f"{self.source.name} itself is no better than guessing: {self.guessing}; so nothing "
            "here is worth shipping: see --preprocess, the order of --labels, and its training"
        ]

    def compare(self, answer: Runner) -> Comparison:
        """Hold a variant's answers against the reference's, which are known by now."""
        run = {"variant": answer}
        found, _ = compare_variants(run, None, self.test, self.source.image, expected=self.expected)
        return found["variant"]

    def judge(self, precision: str, model: ir.Model, comparison: Comparison) -> Verdict:
        """Apply the gates to a variant of a precision, an ``onnx_ir.Model``."""
        return judge(
            comparison,
            precision=precision,
            max_drop=self.recipe.max_drop,
            trained=self.trained,
            achieved=achieved_precision(model),
            guessing=self.guessing,
        )

    def recommend(self, bench: Benchmark, name: str, precision: str) -> Recommendation:
        """Apply the speed gate; how fast a model guesses recommends nothing."""
        found = bench.recommend(name, precision)
        if self.guessing is None or found.against is None:
            return found
        why = "the model itself is no better than guessing"
        return replace(found, recommended=False, reason=why)
