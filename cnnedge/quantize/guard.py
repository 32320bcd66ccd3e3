"""When INT8 fails its gate: what is tried, in order of what it costs the receiver.

1. Other calibration methods: the same graph with other scales.
2. Cross-layer equalisation, then bias correction: the same graph with other weights.
3. The fewest, most sensitive layers kept in higher precision: a slower graph.

Whether the gate holds is judged on the test images, and that is all they decide: whether to stop.
Which method, which weights and which layers is decided on the calibration images, by how far the
probabilities move from the FP32 graph's (KL divergence), so the test images are not fitted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cnnedge.comparison import LEAST_ACHIEVED, Comparison, Verdict
from cnnedge.graph.precision import achieved_precision
from cnnedge.graph.write import serialize
from cnnedge.progress import Progress, silent
from cnnedge.quantize.build import QuantizedGraph, quantize
from cnnedge.quantize.calibrate import Calibration, Ranges, calibrate, choose_ranges
from cnnedge.quantize.equalize import equalize
from cnnedge.quantize.noise import LayerNoise, correct_bias, layer_noise
from cnnedge.quantize.plan import Plan, make_plan
from cnnedge.quantize.threshold import METHODS

if TYPE_CHECKING:
    import onnx_ir as ir

PLAIN = "minmax"
# Images that the layers' noise and effect are measured on: each costs a run per layer.
_NOISE_IMAGES = 32
_TINY = 1e-9  # below it, a probability's logarithm says nothing

Images = Callable[[], Iterable[np.ndarray]]
Evaluate = Callable[["ir.Model"], tuple[Comparison, Verdict]]


@dataclass(frozen=True)
class Attempt:
    """One way of quantizing a graph, and what came of it.

    Attributes:
        step: "plain", "calibration", "equalize", "bias" or "mixed".
        detail: What was done, in words.
        divergence: Mean KL divergence from the FP32 graph's probabilities on the calibration
            images, nats.
        comparison: Its answers on the test images against the Keras reference's.
        verdict: Whether the gate holds.
        gained: By how many points of top-1 the drop is smaller than the attempt before.
        achieved: Share of MACs and of weights per data type.
    """

    step: str
    detail: str
    divergence: float
    comparison: Comparison
    verdict: Verdict
    gained: float
    achieved: Mapping[str, Mapping[str, float]]

    def to_dict(self) -> dict[str, Any]:
        """Return it as JSON-able data."""
        low, high = self.comparison.interval
        return {
            "step": self.step,
            "detail": self.detail,
            "divergence_nats": self.divergence,
            "drop_points": self.comparison.drop,
            "drop_interval_points": [low, high],
            "gained_points": self.gained,
            "status": self.verdict.status,
            "achieved": {kind: dict(shares) for kind, shares in self.achieved.items()},
        }


@dataclass(frozen=True)
class LayerSensitivity:
    """What quantizing one layer alone does.

    Attributes:
        layer: Its name.
        sqnr_db: Of its own result; see `LayerNoise`.
        divergence: Of the network's probabilities, nats; see `Attempt`.
    """

    layer: str
    sqnr_db: float
    divergence: float


@dataclass(frozen=True)
class Guarded:
    """The quantized graph that the guard settled on.

    Attributes:
        graph: The graph; the best there was, if no attempt held the gate.
        method: The calibration method that its scales come from.
        attempts: Everything that was tried, in order; the first is the plain one.
        chosen: Which of the attempts the graph is.
        methods: The divergence of the plain graph with each calibration method's scales, nats;
            empty where the gate held at once.
        sensitivity: Of each layer, the most sensitive first; empty unless it came to that.
    """

    graph: QuantizedGraph
    method: str
    attempts: tuple[Attempt, ...]
    chosen: int
    methods: Mapping[str, float]
    sensitivity: tuple[LayerSensitivity, ...] = ()

    @property
    def holds(self) -> bool:
        """Whether the gate holds."""
        return not self.attempts[self.chosen].verdict.failed


@dataclass(frozen=True)
class _State:
    """What a candidate is made from."""

    model: ir.Model  # the FP32 graph, as equalised and corrected so far
    calibration: Calibration
    method: str
    plan: Plan

    def keeping(self, layers: Iterable[str]) -> _State:
        """Return it with some layers left in float, for which a plan of its own is needed."""
        kept = frozenset(layers)
        return replace(self, plan=make_plan(self.model, self.plan.target, keep_float=kept))


def hold_gate(
    model: ir.Model,
    plan: Plan,
    calibration: Calibration,
    images: Images,
    evaluate: Evaluate,
    folder: Path,
    *,
    plain: tuple[Comparison, Verdict] | None = None,
    method: str = PLAIN,
    progress: Progress = silent,
) -> Guarded:
    """Quantize a graph, and if its gate fails go on until it holds or nothing is left to try.

    Args:
        model: The FP32 ``onnx_ir.Model``.
        plan: What `make_plan` decided for it.
        calibration: What was observed of it.
        images: Gives the calibration images anew each time, in batches as the graph takes them.
        evaluate: Runs a quantized ``onnx_ir.Model`` over the test images and judges it.
        folder: Where instrumented graphs are kept for a moment.
        plain: What ``evaluate`` gave for the first attempt, where that is known already.
        method: The calibration method of the first attempt.
        progress: Told how many attempts were made.
    """
    guard = _Guard(model, plan, images, evaluate, folder, progress)
    state = _State(model, calibration, method, plan)
    if guard.try_it("plain", f"{method} calibration", state, plain):
        return guard.result()
    candidates = [state] + [replace(state, method=other) for other in METHODS if other != method]
    guard.methods = {candidate.method: guard.divergence_of(candidate) for candidate in candidates}
    state = min(candidates, key=guard.divergence_of)
    if state.method != method and guard.try_it(
        "calibration", f"{state.method} calibration, the best of {len(METHODS)}", state
    ):
        return guard.result()

    equalized = equalize(state.model, state.calibration.peaks)
    if equalized.modified:
        tensors = list(state.calibration.histograms)
        observed = calibrate(equalized.model, tensors, images(), folder)
        balanced = [_State(equalized.model, observed, other, plan) for other in METHODS]
        best = min(balanced, key=guard.divergence_of)
        pairs = f"{len(equalized.factors)} layers equalised, {best.method} calibration"
        if guard.try_it("equalize", pairs, best):
            return guard.result()
        state = min([state, best], key=guard.divergence_of)

    noise = guard.noise(state)
    corrected = replace(state, model=correct_bias(state.model, noise).model)
    if guard.try_it("bias", f"biases of {len(noise)} layers corrected", corrected):
        return guard.result()
    state = min([state, corrected], key=guard.divergence_of)

    guard.keep_the_fewest(state, noise)
    return guard.result()


class _Guard:
    """Makes attempts and remembers them."""

    def __init__(
        self,
        model: ir.Model,
        plan: Plan,
        images: Images,
        evaluate: Evaluate,
        folder: Path,
        progress: Progress,
    ) -> None:
        self._plan, self._images, self._evaluate = plan, images, evaluate
        self._folder, self._progress = folder, progress
        self._expected = np.log(np.maximum(_answers(model, images()), _TINY))
        self.methods: dict[str, float] = {}
        self._attempts: list[Attempt] = []
        self._graphs: list[tuple[QuantizedGraph, str]] = []
        self._sensitivity: list[LayerSensitivity] = []
        self._divergences: dict[int, tuple[_State, float]] = {}

    def build(self, state: _State) -> QuantizedGraph:
        return quantize(state.model, state.plan, self._ranges(state))

    def _ranges(self, state: _State) -> Ranges:
        return choose_ranges(state.calibration, self._plan, state.method)

    def divergence_of(self, state: _State) -> float:
        """Return the candidate's mean KL divergence on the calibration images, nats."""
        if id(state) not in self._divergences:  # kept with its state, so that no id comes back
            found = self._divergence(self.build(state).model)
            self._divergences[id(state)] = (state, found)
        return self._divergences[id(state)][1]

    def _divergence(self, model: ir.Model, count: int | None = None) -> float:
        answers = _answers(model, islice(self._images(), count))
        expected = self._expected[: len(answers)]
        moved = expected - np.log(np.maximum(answers, _TINY))
        return float((np.exp(expected) * moved).sum(axis=1).mean())

    def try_it(
        self,
        step: str,
        detail: str,
        state: _State,
        known: tuple[Comparison, Verdict] | None = None,
    ) -> bool:
        """Evaluate a candidate and remember it; return whether the gate holds."""
        graph = self.build(state)
        comparison, verdict = known or self._evaluate(graph.model)
        before = self._attempts[-1].comparison.drop if self._attempts else comparison.drop
        self._attempts.append(
            Attempt(
                step,
                detail,
                self.divergence_of(state),
                comparison,
                verdict,
                before - comparison.drop,
                achieved_precision(graph.model),
            )
        )
        self._graphs.append((graph, state.method))
        self._progress("guard", len(self._attempts), 0)
        return not verdict.failed

    def noise(self, state: _State) -> dict[str, LayerNoise]:
        plan = self.build(state).plan  # what could be quantized
        batches = islice(self._images(), _NOISE_IMAGES)
        return layer_noise(state.model, plan, self._ranges(state), batches, self._folder)

    def keep_the_fewest(self, state: _State, noise: Mapping[str, LayerNoise]) -> None:
        """Find the fewest layers to keep in higher precision, the most sensitive first."""
        layers = self.build(state).plan.compute
        for number, layer in enumerate(layers, 1):
            alone = state.keeping(set(layers) - {layer})
            moved = self._divergence(self.build(alone).model, _NOISE_IMAGES)
            self._sensitivity.append(LayerSensitivity(layer, noise[layer].sqnr_db, moved))
            self._progress("sensitivity", number, len(layers))
        self._sensitivity.sort(key=lambda found: -found.divergence)
        order = [found.layer for found in self._sensitivity]
        precision = "FP16" if self._plan.target.float16 else "FP32"

        def holds(count: int) -> bool:
            kept = order[:count]
            detail = f"{', '.join(kept)} kept in {precision}"
            return self.try_it("mixed", detail, state.keeping(kept))

        # More layers in higher precision come nearer to FP32, so the fewest is found by halving.
        fewest, enough = 1, self._most(state, order)
        if enough == 0 or not holds(enough):
            return
        while fewest < enough:
            middle = (fewest + enough) // 2
            if holds(middle):
                enough = middle
            else:
                fewest = middle + 1

    def _most(self, state: _State, order: list[str]) -> int:
        """Return how many layers can be kept while the graph still deserves to be called int8."""
        most = 0
        for count in range(1, len(order)):
            shares = achieved_precision(self.build(state.keeping(order[:count])).model)["macs"]
            if shares.get("int8", 0.0) < LEAST_ACHIEVED:
                break
            most = count
        return most

    def result(self) -> Guarded:
        """Return the attempt to keep: of those that hold the gate the one with the most INT8."""

        def rank(index: int) -> tuple[bool, float]:
            attempt = self._attempts[index]
            if attempt.verdict.failed:
                return False, -attempt.comparison.drop
            return True, attempt.achieved["macs"].get("int8", 0.0)

        best = max(range(len(self._attempts)), key=rank)
        graph, method = self._graphs[best]
        attempts, layers = tuple(self._attempts), tuple(self._sensitivity)
        return Guarded(graph, method, attempts, best, self.methods, layers)


def _answers(model: ir.Model, batches: Iterable[np.ndarray]) -> np.ndarray:
    from cnnedge.backends.onnxruntime import open_session

    session = open_session(serialize(model))
    found = np.concatenate([session(batch) for batch in batches]).astype(np.float64)
    return np.where(np.isfinite(found), found, 0.0)  # as far from right as an answer can be
