"""Which variant of a bundle runs here, and why."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from cnnedge.bundle import Bundle, Variant
from cnnedge.errors import BundleError
from cnnedge.machine import this_machine
from cnnedge.plan import experimental
from cnnedge.runtimes import RUNTIMES


@dataclass(frozen=True)
class Choice:
    """Which variant was chosen, and why."""

    variant: Variant
    reason: str


def choose(
    bundle: Bundle,
    name: str | None = None,
    *,
    runtime: str = "cpu",
    usable: Collection[str] | None = None,
) -> Choice:
    """Pick the variant to run, and say why.

    On a CPU, of the verified variants: where the bundle was measured on this very CPU model, the
    fastest that its speed gate recommends; else, and where its latencies are marked as doubtful,
    by the order that is known for this CPU's instruction set: INT8 first if it has an int8 dot
    product, else FP32; FP16 last. On a GPU, the verified one that is the fastest
    there as a rule.

    Args:
        bundle: The bundle.
        name: The variant to run, whatever was verified.
        runtime: What will run it; see `RUNTIMES`.
        usable: The variants that can be run, where that is not all; for instance those that have a
            plan for this GPU.

    Raises:
        BundleError: there is no such variant, or none was verified.
    """
    if name is not None:
        variant = bundle.manifest.variant(name)
        doubt = experimental(runtime.removeprefix("ort-"), variant.precision)
        return Choice(variant, f"asked for by name{f'; {doubt}' if doubt else ''}")
    if RUNTIMES[runtime].device == "gpu":
        return _choose_on_gpu(bundle, runtime, usable)
    return _choose_on_cpu(bundle, runtime)


def runs_on(variant: Variant, runtime: str) -> bool:
    """Whether a variant's graph is written for a runtime."""
    return RUNTIMES[runtime].runs(variant.name, variant.target)


def _choose_on_gpu(bundle: Bundle, runtime: str, usable: Collection[str] | None) -> Choice:
    order = RUNTIMES[runtime].variants
    fit = [
        variant
        for name in order
        for variant in bundle.manifest.variants
        if variant.name == name and variant.verified and (usable is None or name in usable)
    ]
    if not fit:
        raise BundleError(
            f"no verified variant of {bundle.origin} runs on {runtime}",
            fix=f"export one of {', '.join(order)}, or name a --variant",
        )
    doubt = experimental(runtime.removeprefix("ort-"), fit[0].precision)
    if doubt is not None:
        return Choice(fit[0], f"all that was verified and runs on {runtime}; {doubt}")
    return Choice(fit[0], f"the first of {', '.join(order)} that was verified")


def _choose_on_cpu(bundle: Bundle, runtime: str) -> Choice:
    manifest = bundle.manifest
    fit = [v for v in manifest.variants if runs_on(v, runtime) and v.verified]
    if not fit:
        raise BundleError(
            f"no variant of {bundle.origin} was verified", fix="run `cnnedge verify` on it first"
        )
    machine = this_machine()
    doubts = [v.latency.doubt for v in fit if v.latency and v.latency.doubt]
    timed = [v for v in fit if v.latency is not None and v.recommended]
    measured_on = None if manifest.machine is None else manifest.machine.cpu
    measured_here = runtime == "cpu" and measured_on == machine.cpu
    if measured_here and timed and not doubts:
        best = min(timed, key=lambda v: v.latency.median_ms if v.latency else 0.0)
        return Choice(best, f"the fastest as measured on this CPU model ({machine.cpu})")
    order = machine.fastest_first
    best = min(fit, key=lambda v: order.index(v.precision) if v.precision in order else len(order))
    reason = machine.why_first
    if best.precision != order[0]:
        reason = f"the first verified one in the order of this CPU; no {order[0]} was verified"
    if measured_here and doubts:
        reason += f"; the latencies of the export decide nothing: {doubts[0]}"
    return Choice(best, reason)
