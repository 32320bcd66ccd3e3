"""One loaded model and everything that is asked of it: the measuring itself.

It lives in a process of its own (`process`), which loads nothing else. Times are seconds; a clock
and a sleep may be put in their place, as the tests do.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from cnnedge.errors import BackendError
from cnnedge.image import ImageContract, decode, fit
from cnnedge.measurement import GpuTimes
from cnnedge.protocols import Runner

WARM_UP = 0.5  # seconds at least
MOST_WARM_UP = 3.0  # seconds; what has not settled by then is measured, and said to be unstable
WINDOWS, SETTLED = 3, 0.05  # so many windows' medians within this share of each other
WINDOW_SECONDS = 0.15
# Before each block, for so long: the others' threads were seen to spin for 40 to 100 ms after a
# call, and caches hold their weights. See docs/decisions/interleaved-blocks.md.
SETTLE_SECONDS = 0.1
FEWEST_CALLS = 6  # of a block, however long: three rounds of four blocks are enough for a p90


class Station:
    """Measures one runner.

    Args:
        runner: The loaded model.
        shape: Height, width and channels of its images.
        seed: Of the image that is timed, whose content does not matter to a CNN's speed.
        clock: Seconds, monotonic.
        sleep: Waits for so many seconds.
    """

    def __init__(
        self,
        runner: Runner,
        shape: tuple[int, int, int],
        *,
        seed: int = 0,
        clock: Callable[[], float] = time.perf_counter,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._runner, self._shape, self._seed = runner, shape, seed
        self._clock, self._sleep = clock, sleep
        self._images: dict[int, np.ndarray] = {}

    @property
    def provider(self) -> str:
        """What really runs it."""
        return str(getattr(self._runner, "provider", "?"))

    def require_numbers(self) -> None:
        """Refuse to time what answers NaN or infinity to the image that is timed.

        Raises:
            BackendError: it does.
        """
        if not np.isfinite(np.asarray(self._runner(self._image(1)))).all():
            raise BackendError("it answers NaN or infinity to an image of noise")

    def warm_up(self, batch: int = 1, least: float = WARM_UP) -> dict[str, Any]:
        """Call it until the medians of a few windows agree; return for how long, and whether."""
        image, start = self._image(batch), self._clock()
        medians: list[float] = []
        while True:
            medians.append(float(np.median(self._window(image, WINDOW_SECONDS))))
            spent, last = self._clock() - start, medians[-WINDOWS:]
            settled = len(last) == WINDOWS and max(last) <= (1 + SETTLED) * min(last)
            if (settled and spent >= least) or spent >= MOST_WARM_UP:
                return {"seconds": spent, "settled": settled}

    def block(self, seconds: float, batch: int = 1, calls: int = FEWEST_CALLS) -> dict[str, Any]:
        """Settle, then time calls for so many seconds, and at least so many calls."""
        image = self._image(batch)
        self._window(image, SETTLE_SECONDS)
        timed = getattr(self._runner, "timed", None)
        run = timed or self._runner
        samples: list[float] = []
        parts: list[GpuTimes] = []
        start = self._clock()
        while len(samples) < calls or self._clock() - start < seconds:
            before = self._clock()
            found = run(image)
            samples.append(self._clock() - before)
            if isinstance(found, GpuTimes):
                parts.append(found)
        return {"samples": samples, "gpu": [asdict(part) for part in parts]}

    def clients(self, count: int, seconds: float) -> dict[str, Any]:
        """Let several clients call at once, each again as soon as it has its answer.

        Raises:
            BackendError: the runner serves one call at a time. A queue before it would be measured.
        """
        if count > 1 and getattr(self._runner, "serial", False):
            raise BackendError("it serves one call at a time")
        image = self._image(1)
        self._window(image, SETTLE_SECONDS)
        start = self._clock()

        def client(_: int) -> list[float]:
            taken: list[float] = []
            while self._clock() - start < seconds or len(taken) < 2:
                before = self._clock()
                self._runner(image)
                taken.append(self._clock() - before)
            return taken

        with ThreadPoolExecutor(count) as pool:
            samples = [sample for taken in pool.map(client, range(count)) for sample in taken]
        return {"samples": samples, "elapsed": self._clock() - start}

    def server(self, rate: float, seconds: float, seed: int = 0) -> dict[str, Any]:
        """Answer images that arrive at random, one at a time and in their order.

        Arrivals are a Poisson process, as in MLPerf's server scenario. A latency counts from the
        arrival that was drawn, not from when the call began: whoever waits has waited.

        Args:
            rate: Arrivals a second.
            seconds: For how long images arrive.
            seed: Of the arrivals.
        """
        image = self._image(1)
        self._window(image, SETTLE_SECONDS)
        gaps = np.random.default_rng(seed).exponential(1 / rate, max(2, int(rate * seconds)))
        begin = self._clock()
        samples = []
        for arrival in begin + np.cumsum(gaps):
            self._wait_until(float(arrival))
            self._runner(image)
            samples.append(self._clock() - float(arrival))
        return {"samples": samples, "elapsed": self._clock() - begin}

    def after_idling(self, idle: float, times: int) -> dict[str, Any]:
        """Time the first call after a pause, several times."""
        image, samples = self._image(1), []
        self._runner(image)
        for _ in range(times):
            self._sleep(idle)
            before = self._clock()
            self._runner(image)
            samples.append(self._clock() - before)
        return {"samples": samples}

    def waterfall(
        self, file: str, contract: Mapping[str, Any], labels: list[str], seconds: float
    ) -> dict[str, Any]:
        """Take an image file to a label, every stage timed; samples by stage, and of the whole."""
        size = ImageContract.from_dict(contract)
        stages: dict[str, list[float]] = {name: [] for name in STAGES}
        whole: list[float] = []
        for _ in range(2):
            self._once(Path(file), size, labels)
        start = self._clock()
        while len(whole) < FEWEST_CALLS or self._clock() - start < seconds:
            taken = self._once(Path(file), size, labels)
            whole.append(sum(taken))
            for name, spent in zip(STAGES, taken, strict=True):
                stages[name].append(spent)
        return {"stages": stages, "whole": whole}

    def answers(self, images: str, out: str, batch: int) -> dict[str, Any]:
        """Answer images from an `.npy` file into another, float32 ``[N, classes]``."""
        pictures = np.load(images, mmap_mode="r")
        found = [
            np.asarray(self._runner(np.ascontiguousarray(pictures[i : i + batch])))
            for i in range(0, len(pictures), batch)
        ]
        np.save(out, np.concatenate(found).astype(np.float32, copy=False))
        return {"answered": len(pictures)}

    def _once(self, file: Path, size: ImageContract, labels: list[str]) -> tuple[float, ...]:
        marks = [self._clock()]
        picture = decode(file, size)
        marks.append(self._clock())
        batch = np.ascontiguousarray(fit(picture, size))[None]
        marks.append(self._clock())
        answers, copy_in, compute, copy_out = self._staged(batch)
        marks.append(self._clock())
        row = answers[0]
        best = np.argsort(-row, kind="stable")[:5]
        [(labels[i], float(row[i])) for i in best]
        marks.append(self._clock())
        decoding, resizing, _, post = np.diff(marks)
        return float(decoding), float(resizing), copy_in, compute, copy_out, float(post)

    def _staged(self, batch: np.ndarray) -> tuple[np.ndarray, float, float, float]:
        """Return the answers, and the seconds of copying in, computing and copying out.

        Where a runtime does not tell them apart, all of it is computing.
        """
        if hasattr(self._runner, "staged"):
            found = self._runner.staged(batch)
            return found.answers, found.copy_in, found.compute, found.copy_out
        before = self._clock()
        answers = self._runner(batch)
        spent = self._clock() - before
        if hasattr(self._runner, "timed"):  # a GPU's own events tell; the rest is the host's
            parts = self._runner.timed(batch)
            copies = parts.copy_in + parts.copy_out
            return answers, parts.copy_in, max(spent - copies, 0.0), parts.copy_out
        return answers, 0.0, spent, 0.0

    def _image(self, batch: int) -> np.ndarray:
        if batch not in self._images:
            rng = np.random.default_rng(self._seed)
            self._images = {batch: rng.integers(0, 256, (batch, *self._shape), np.uint8)}
        return self._images[batch]

    def _window(self, image: np.ndarray, seconds: float) -> list[float]:
        samples: list[float] = []
        start = self._clock()
        while not samples or self._clock() - start < seconds:
            before = self._clock()
            self._runner(image)
            samples.append(self._clock() - before)
        return samples

    def _wait_until(self, moment: float) -> None:
        """Sleep until shortly before, then look at the clock: a sleep may last too long."""
        left = moment - self._clock()
        if left > WAKE_UP:
            self._sleep(left - WAKE_UP)
        while self._clock() < moment:
            self._sleep(0.0)


STAGES = ("decode", "resize", "copy in", "compute", "copy out", "post")
WAKE_UP = 0.001  # seconds
