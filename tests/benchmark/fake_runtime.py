"""A runtime whose latencies are known, by import string: ``fake_runtime:open_fake``."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import numpy as np

CLASSES = 10


class FakeClock:
    """A clock that stands still but for those who say how long they took; it can be slept on."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now

    def sleep(self, seconds):
        self.now += max(seconds, 1e-6)  # so that a loop around a sleep of nothing ends


class FakeRunner:
    """Answers by the image's mean; takes what ``seconds`` says of the number of the call."""

    provider = "Fake 1.0"

    def __init__(self, clock, seconds):
        self.clock, self.seconds, self.calls, self.batches = clock, seconds, 0, []

    def __call__(self, batch):
        self.calls += 1
        self.batches.append(len(batch))
        took = self.seconds(self.calls) if callable(self.seconds) else self.seconds
        self.clock.now += took * len(batch)
        return answers_of(batch)


def answers_of(batch):
    """Return one-hot probabilities: the class is the image's mean, in tenths of its range."""
    means = batch.reshape(len(batch), -1).mean(1)
    answers = np.full((len(batch), CLASSES), 0.01, np.float32)
    answers[np.arange(len(batch)), (means * CLASSES / 256).astype(int)] = 0.91
    return answers


def open_fake(model, *, threads, **options):
    """Open whatever; ``FAKE_RUNTIME`` in the environment says how it behaves."""
    how = json.loads(os.environ.get("FAKE_RUNTIME", "{}"))
    if how.get("prints"):
        print("native chatter on stdout", flush=True)
        os.write(1, b"and from C\n")
    if how.get("fails"):
        raise RuntimeError("no such device\nand a long story")
    if how.get("dies_opening"):
        os._exit(7)
    Path(model).stat()

    def run(batch):
        run.calls += 1
        if how.get("dies_at") == run.calls:
            os.write(2, b"Segmentation fault, it said\n")
            os._exit(11)
        if len(batch) > how.get("largest_batch", 1 << 30):
            raise ValueError(f"a batch of {len(batch)} is too large")
        time.sleep(how.get("seconds", 0.001))
        if how.get("shape"):
            return np.zeros(how["shape"], np.float32)
        return answers_of(batch)

    run.calls, run.provider = 0, f"Fake 1.0, {threads} threads"
    return run
