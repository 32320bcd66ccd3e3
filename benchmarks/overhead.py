"""What `cnnedge.load` costs an app beyond a bare `session.run`: time, memory, threads.

    python benchmarks/overhead.py                 # a small network, made for it (needs Keras)
    python benchmarks/overhead.py small alexnet_v1 --json out.json     # that, and a bundle

* **overhead**: `classify(array)` beside `session.run` of the very same session on the same array,
  call by call in turn, in several processes one after the other. Goal: under 50 µs. Beside them,
  the least that an app must do itself after a bare run: find its five labels and probabilities.
* **memory**: resident memory over 100,000 calls with an array, and a tenth of that with a file,
  sampled every hundredth, after a warm-up. Goal: steady.
* **threads**: 8 threads on one classifier, beside 1, in blocks in turn. Every answer is held
  against the one that a single thread got. Goal: no less throughput than 1.

Intervals resample processes first, then blocks within them.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import cnnedge
from cnnedge.benchmark.environment import conditions, environment, now_utc, read_sensors
from cnnedge.benchmark.statistics import paired_ratio
from cnnedge.files import require_writable, write_text

SMALL = Path("small")
OVERHEAD_GOAL = 50e-6  # seconds
THREADS = 8
SETTLE = 0.5  # seconds that are not counted, before anything is
BLOCK = 100  # calls of each
CONTESTANTS = ("ours", "bare", "by_hand")
SAMPLES = 100  # of memory
RESAMPLES = 2000


def measure_overhead(bundle: Path, seconds: float) -> dict[str, Any]:
    """Return seconds of each of `CONTESTANTS`, [block][call], taken in turn."""
    classify = cnnedge.load(bundle)
    image = images_of(classify, 1)[0]
    session = classify._session.session  # the same one, or their thread pools would fight
    labels = classify.labels
    feed = {session.get_inputs()[0].name: image[np.newaxis]}

    def ours() -> None:
        classify(image)

    def bare() -> None:
        session.run(["probabilities"], feed)

    def by_hand() -> list[tuple[str, float]]:
        row = session.run(["probabilities"], feed)[0][0]
        return [(labels[k], row.item(k)) for k in (-row).argsort()[:5].tolist()]

    blocks: dict[str, list[list[float]]] = {name: [] for name in CONTESTANTS}
    for block in measured_blocks(seconds, lambda: in_turn(ours, bare, by_hand)):
        for name, taken in zip(CONTESTANTS, block, strict=True):
            blocks[name].append(taken)
    return blocks | {"variant": classify.variant, "classes": len(labels)}


def in_turn(*calls: Callable[[], Any]) -> list[list[float]]:
    """Time a block of calls, each of them the first, the second … by turns."""
    clock, taken = time.perf_counter, [[] for _ in calls]
    for number in range(BLOCK):
        for place in range(len(calls)):
            which = (number + place) % len(calls)
            start = clock()
            calls[which]()
            taken[which].append(clock() - start)
    return taken


def measured_blocks(seconds: float, block: Callable[[], Any]) -> Iterator[Any]:
    """Yield blocks for a while, after some that are not counted."""
    start = time.perf_counter()
    while time.perf_counter() - start < SETTLE:
        block()
    start = time.perf_counter()
    while True:
        yield block()
        if time.perf_counter() - start > seconds:
            return


def measure_memory(bundle: Path, calls: int) -> dict[str, Any]:
    """Return resident bytes after every hundredth of the calls, by what was classified."""
    classify = cnnedge.load(bundle)
    image, path = images_of(classify, 1)[0], golden(bundle)[0]
    found: dict[str, Any] = {}
    for kind, source, count in (("array", image, calls), ("file", path, calls // 10)):
        for _ in range(max(count // 50, 100)):  # buffers and caches fill once
            classify(source)
        series = [resident_bytes()]
        for _ in range(SAMPLES):
            for _ in range(count // SAMPLES):
                classify(source)
            series.append(resident_bytes())
        done = count // SAMPLES * SAMPLES
        slope = float(np.polyfit(np.linspace(0, done, len(series)), series, 1)[0])
        found[kind] = {
            "calls": done,
            "resident_bytes": series,
            "growth_bytes": series[-1] - series[0],
            "slope_bytes_per_call": slope,
        }
    return found


def resident_bytes() -> int:
    """Return this process's resident memory (Linux alone)."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def measure_threads(bundle: Path, seconds: float) -> dict[str, Any]:
    """Return seconds per call of 1 and of 8 threads, block by block, and how many answers differed.

    An answer is right if it is the very one, bit for bit, that one thread alone had got.
    """
    classify = cnnedge.load(bundle)
    images = images_of(classify, 4 * THREADS)
    expected = [classify(image) for image in images]
    wrong = 0

    def work(deadline: float, first: int) -> tuple[int, int]:
        done = differ = 0
        while time.perf_counter() < deadline:
            number = (first + done) % len(images)
            differ += classify(images[number]) != expected[number]
            done += 1
        return done, differ

    per_call: dict[str, list[list[float]]] = {"1": [], str(THREADS): []}
    with ThreadPoolExecutor(THREADS) as pool:

        def block(threads: int) -> float:
            nonlocal wrong
            start = time.perf_counter()
            firsts = [k * len(images) // THREADS for k in range(threads)]
            parts = list(pool.map(work, [start + SETTLE] * threads, firsts))
            wrong += sum(differ for _, differ in parts)
            return (time.perf_counter() - start) / sum(done for done, _ in parts)

        block(THREADS)  # threads are started, caches filled
        end = time.perf_counter() + seconds
        while time.perf_counter() < end:
            for threads in (1, THREADS):
                per_call[str(threads)].append([block(threads)])
    return {"seconds_per_call": per_call, "wrong": wrong}


def images_of(classify: cnnedge.Classifier, count: int) -> list[np.ndarray]:
    """Return images as the network takes them: seeded noise, each of another brightness."""
    size = classify.image.shape
    rng = np.random.default_rng(0)
    return [rng.integers(0, 56 + 200 * k // count, size, np.uint8) for k in range(1, count + 1)]


def golden(bundle: Path) -> list[Path]:
    """Return a bundle's golden images."""
    return sorted((bundle / "selftest").glob("golden-*"))


def overhead_of(processes: list[dict[str, Any]], of: str = "ours") -> tuple[float, float, float]:
    """Return the seconds that a call takes beyond the bare one, and their 95 % interval.

    A block's overhead is the difference of its medians; what is resampled is processes, then
    blocks within them.
    """
    blocks = [
        np.median(process[of], axis=1) - np.median(process["bare"], axis=1) for process in processes
    ]
    rng = np.random.default_rng(0)
    drawn = []
    for _ in range(RESAMPLES):
        chosen = rng.integers(0, len(blocks), len(blocks))
        drawn.append(
            np.median(np.concatenate([rng.choice(blocks[k], len(blocks[k])) for k in chosen]))
        )
    low, high = np.percentile(drawn, [2.5, 97.5])
    return float(np.median(np.concatenate(blocks))), float(low), float(high)


def measure(name: str, bundle: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure one bundle, every part in processes of its own."""
    each = arguments.seconds / arguments.processes
    overhead, threads = [], []
    for number in range(arguments.processes):
        tell(f"{name}: process {number + 1} of {arguments.processes}")
        overhead.append(in_process("overhead", bundle, each))
        threads.append(in_process("threads", bundle, 2 * each))
    tell(f"{name}: {arguments.calls} calls")
    memory = in_process("memory", bundle, arguments.calls)
    extra, low, high = overhead_of(overhead)
    by_hand, least, most = overhead_of(overhead, "by_hand")
    one, eight = ([p["seconds_per_call"][k] for p in threads] for k in ("1", str(THREADS)))
    ratio, slowest, fastest = paired_ratio(eight, one)
    return {
        "name": name,
        "variant": overhead[0]["variant"],
        "classes": overhead[0]["classes"],
        "overhead": {
            "seconds": extra,
            "interval": [low, high],
            "by_hand_seconds": by_hand,
            "by_hand_interval": [least, most],
            "bare_seconds": float(np.median(np.concatenate([p["bare"] for p in overhead]))),
            # the blocks' medians; single calls would make a file of megabytes
            "blocks": [
                {k: np.median(p[k], axis=1).tolist() for k in CONTESTANTS} for p in overhead
            ],
        },
        "memory": memory,
        "threads": {
            "threads": THREADS,
            "wrong": sum(p["wrong"] for p in threads),
            "throughput_ratio": ratio,
            "interval": [slowest, fastest],
            "seconds_per_call": {"1": one, str(THREADS): eight},
        },
    }


def in_process(part: str, bundle: Path, amount: float) -> dict[str, Any]:
    """Run a part in a new process of this program."""
    command = [sys.executable, __file__, "--child", part, str(amount), str(bundle)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"error: {part} of {bundle} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def make_small(folder: Path) -> Path:
    """Export a small network with random weights and 1000 classes: next to no time but overhead."""
    import keras
    from keras import layers

    from cnnedge.backends.keras import ModelNote, save_model
    from cnnedge.image import ImageContract
    from cnnedge.pipeline import export_bundle
    from cnnedge.recipe import make_recipe

    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [
            keras.Input((32, 32, 3)),
            layers.Conv2D(8, 3, strides=2, activation="relu", name="conv1"),
            layers.MaxPooling2D(2, name="pool1"),
            layers.Flatten(name="flatten"),
            layers.Dense(1000, activation="softmax", name="fc1"),
        ],
        name="small",
    )
    labels = tuple(f"class {k}" for k in range(1000))
    path = folder / "small.keras"
    note = ModelNote("small", labels, ImageContract(32, 32), "unit", weights="random")
    save_model(model, path, note)
    recipe = make_recipe(model=str(path), precision=("fp32",), test_images=8, bench_seconds=0.2)
    return export_bundle(recipe, folder / "small")[0].root


def table(results: list[dict[str, Any]]) -> str:
    """Return the results as one reads them."""
    lines = []
    for result in results:
        over, threads = result["overhead"], result["threads"]
        low, high = (1e6 * v for v in over["interval"])
        met = "met" if over["interval"][1] < OVERHEAD_GOAL else "NOT MET"
        hand = [1e6 * v for v in (over["by_hand_seconds"], *over["by_hand_interval"])]
        lines += [
            f"{result['name']} ({result['variant']}, {result['classes']} classes)",
            f"  overhead  {1e6 * over['seconds']:.1f} µs [{low:.1f}, {high:.1f}] beyond "
            f"{1e6 * over['bare_seconds']:.0f} µs of session.run; under 50 µs: {met}",
            f"  by hand   {hand[0]:.1f} µs [{hand[1]:.1f}, {hand[2]:.1f}]: the top five alone",
        ]
        for kind, memory in result["memory"].items():
            lines.append(
                f"  memory    {memory['growth_bytes'] / 1024:+.0f} KiB over {memory['calls']:,} "
                f"calls with {kind}; {memory['slope_bytes_per_call']:+.2f} bytes a call"
            )
        low, high = threads["interval"]
        lines.append(
            f"  threads   {THREADS} get {threads['throughput_ratio']:.2f} [{low:.2f}, {high:.2f}] "
            f"times the throughput of 1; {threads['wrong']} answers differed"
        )
    return "\n".join(lines)


def tell(text: str) -> None:
    """Say what is being done."""
    print(text, file=sys.stderr, flush=True)


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("bundles", nargs="*", type=Path, default=[SMALL], metavar="BUNDLE")
    parser.add_argument("--processes", type=int, default=6)
    parser.add_argument("--seconds", type=float, default=24.0, help="of the overhead, in all")
    parser.add_argument("--calls", type=int, default=100_000, help="of the memory test")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--child", nargs=2, metavar=("PART", "AMOUNT"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        part, amount = arguments.child[0], float(arguments.child[1])
        (bundle,) = arguments.bundles
        parts = {"overhead": measure_overhead, "threads": measure_threads}
        run = parts.get(part)
        done = measure_memory(bundle, int(amount)) if run is None else run(bundle, amount)
        print(json.dumps(done))
        return
    if min(arguments.processes, arguments.calls // 1000) < 1 or arguments.seconds <= 0:
        parser.error("at least 1 process, 1000 calls, and some seconds")
    # What is wrong is said before minutes of measuring.
    for bundle in arguments.bundles:
        if bundle != SMALL:
            cnnedge.open_bundle(bundle)
            if not golden(bundle):
                parser.error(f"{bundle} is no folder with golden images in selftest/")
    if arguments.json:
        require_writable(arguments.json)
    before = read_sensors()
    with tempfile.TemporaryDirectory() as folder:
        results = [
            measure(
                bundle.resolve().name,
                make_small(Path(folder)) if bundle == SMALL else bundle,
                arguments,
            )
            for bundle in arguments.bundles
        ]
    timed = "classify(array) beside session.run of the same session on the same array"
    document = {
        "created": now_utc(),
        "environment": environment(None) | {"timed": timed},
        "conditions": conditions(before, read_sensors()),
        "goal": {"overhead_seconds": OVERHEAD_GOAL},
        "results": results,
    }
    if arguments.json:
        write_text(arguments.json, json.dumps(document) + "\n")
    print(
        f"{document['environment']['machine']['cpu']}, "
        f"{document['environment']['machine']['cores']} cores"
    )
    print(table(results))


if __name__ == "__main__":
    try:
        main()
    except cnnedge.CnnEdgeError as error:
        sys.exit(f"error: {error}")
