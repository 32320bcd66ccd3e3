"""What this machine can reach: the roof that results are held against.

The roofline model (Williams, Waterman & Patterson, 2009): a layer takes no less than its arithmetic
at the machine's peak rate, and no less than reading its weights at its peak bandwidth. Both are
measured, in the same run as everything else, since a data sheet's figure is of another clock.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cnnedge.graph.precision import WeightedLayer
from cnnedge.machine import this_machine

SIZE = 1024  # of the square matrices
PROBES = Path(__file__).with_name("probes")
# A small network's weights stay in the CPU's cache, so bandwidth is measured by how much is read.
WORKING_SETS = (1, 4, 16, 64, 256)  # MiB
_BYTES = {"float32": 4.0, "float16": 2.0, "bfloat16": 2.0, "int8": 1.0, "int4": 0.5}


@dataclass(frozen=True)
class Peaks:
    """Rates that this machine was seen to reach.

    Attributes:
        fp32: Additions and multiplications a second, each counted, in FP32.
        int8: Likewise of uint8 by int8.
        bandwidth: Bytes read a second, by how many MiB are read again and again.
        by: Whose product of matrices was the fastest, by data type.
    """

    fp32: float
    int8: float | None
    bandwidth: Mapping[int, float]
    by: Mapping[str, str]

    def rate(self, data_type: str) -> float:
        """Return the operations a second of a data type.

        What has no probe of its own is held against FP32's, as CPUs compute it, or int8's.
        """
        return self.int8 if data_type == "int8" and self.int8 else self.fp32

    def bytes_per_second(self, working_set: float) -> float:
        """Return the bandwidth for so many bytes that are read in every call."""
        for mib in sorted(self.bandwidth):
            if working_set <= mib * 2**20:
                return self.bandwidth[mib]
        return self.bandwidth[max(self.bandwidth)]


def measure_peaks(threads: int | None = None, seconds: float = 0.3) -> dict[str, Any]:
    """Measure this machine's peaks; in a process of its own, by `process.call`.

    Args:
        threads: How many threads to use; None: as many as there are cores.
        seconds: For how long each is tried; the fastest of its calls counts.

    Returns:
        ``fp32``, ``int8`` (operations a second), ``bandwidth`` (``[[MiB, bytes a second], …]``) and
        ``by``.
    """
    threads = threads or this_machine().cores
    operations = 2.0 * SIZE**3
    rates: dict[str, float] = {}
    by: dict[str, str] = {}
    for kind, who, work in _products(threads):
        rate = operations / _fastest(work, seconds)
        if rate > rates.get(kind, 0.0):
            rates[kind], by[kind] = rate, who
    bandwidth = [[mib, _bandwidth(mib << 20, threads, seconds)] for mib in WORKING_SETS]
    return {"fp32": rates["fp32"], "int8": rates.get("int8"), "bandwidth": bandwidth, "by": by}


def best_of(rounds: Sequence[Mapping[str, Any]]) -> Peaks:
    """Return the peaks over all rounds: a peak is what was reached once."""
    fastest = max(rounds, key=lambda found: found["fp32"])
    int8 = [found["int8"] for found in rounds if found["int8"]]
    bandwidth = {
        mib: max(dict(map(tuple, found["bandwidth"]))[mib] for found in rounds)
        for mib, _ in rounds[0]["bandwidth"]
    }
    return Peaks(fastest["fp32"], max(int8, default=None), bandwidth, fastest["by"])


@dataclass(frozen=True)
class Bound:
    """The least time that a layer takes on this machine.

    Attributes:
        layer: The layer.
        seconds: For one image.
    """

    layer: WeightedLayer
    seconds: float


def layer_bounds(layers: Sequence[WeightedLayer], peaks: Peaks, batch: int = 1) -> list[Bound]:
    """Return each layer's bound: arithmetic at the peak rate, or its weights at peak bandwidth."""
    working_set = sum(layer.weights * _BYTES.get(layer.stored, 4.0) for layer in layers)
    bandwidth = peaks.bytes_per_second(working_set)
    return [
        Bound(
            layer,
            max(
                2.0 * layer.macs * batch / peaks.rate(layer.computed),
                layer.weights * _BYTES.get(layer.stored, 4.0) / bandwidth,
            ),
        )
        for layer in layers
    ]


def _products(threads: int) -> list[tuple[str, str, Callable[[], Any]]]:
    """Return the products of matrices that are tried: the data type, by whom, and the call."""
    rng = np.random.default_rng(0)
    a = rng.random((SIZE, SIZE), np.float32)
    found: list[tuple[str, str, Callable[[], Any]]] = [
        ("fp32", "NumPy", lambda: a @ a),
    ]
    try:
        from cnnedge.backends.onnxruntime import open_session
    except ImportError:  # a device that runs plans alone
        return found
    levels = rng.integers(0, 256, (SIZE, SIZE), np.uint8)
    for kind, feed in (("fp32", a), ("int8", levels)):
        session = open_session(PROBES / f"{kind}-gemm.onnx", threads=threads)
        found.append((kind, "ONNX Runtime", lambda s=session, f=feed: s(f)))  # type: ignore[misc]
    return found


def _bandwidth(size: int, threads: int, seconds: float) -> float:
    """Return how many bytes a second are read when ``size`` of them are read again and again."""
    parts = np.array_split(np.ones(size // 4, np.float32), threads)
    # Small parts are read several times a call, or starting the threads would be what is timed.
    times = max(1, (32 << 20) // size)

    def read(part: np.ndarray) -> None:
        for _ in range(times):
            part.max()

    with ThreadPoolExecutor(threads) as pool:
        return size * times / _fastest(lambda: list(pool.map(read, parts)), seconds)


def _fastest(work: Callable[[], Any], seconds: float) -> float:
    work()
    best, start = float("inf"), time.perf_counter()
    while time.perf_counter() - start < seconds:
        before = time.perf_counter()
        work()
        best = min(best, time.perf_counter() - before)
    return best
