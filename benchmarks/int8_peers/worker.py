"""One contestant in a process of its own: quantizes, answers, or is timed, as its parent says.

worker.py prepare FOLDER MODEL.keras …    what all of them are given
worker.py quantize FOLDER NAME            → RESULT {seconds, peak memory, bytes}
worker.py serve FOLDER NAME FILE THREADS  reads "answers" or "time N" from standard input
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
# OpenVINO and NNCF tell their maker of each use through this package, and do without it where it is
# not there: in this process it is not.
sys.modules["openvino_telemetry"] = None  # type: ignore[assignment]
SETTLE_SECONDS = 0.1  # another contestant's threads may still be spinning

Answer = Callable[[np.ndarray], np.ndarray]


# --- what all of them are given ----------------------------------------------------------------


def prepare(folder: Path, model: str, data: str, seed: int, tests: int, calibration: int) -> dict:
    """Write the FP32 graphs, the images, and the Keras reference's answers to the test images."""
    from cnnedge.backends.keras import ending_in_softmax
    from cnnedge.data import open_source
    from cnnedge.data.split import refuse_overlap
    from cnnedge.export import write_onnx
    from cnnedge.recipe import make_recipe
    from cnnedge.source import resolve

    source, _ = resolve(make_recipe(model=model))
    opened = open_source(data, seed=seed)
    test = opened.test.take(tests, seed=0)
    held_out = opened.calibration.take(calibration, seed=0)
    refuse_overlap(held_out, test)
    for dtype in ("uint8", "float32"):
        exported = source.to_onnx(dtype)
        write_onnx(exported.model, folder / f"fp32-{dtype}.onnx")
    ending_in_softmax(source.model, source.emits).save(folder / "model.keras")
    reference = source.reference()
    shape = source.image.shape
    answers = []
    for name, split in (("calibration", held_out), ("test", test)):
        images = np.lib.format.open_memmap(
            folder / f"{name}.npy", "w+", np.uint8, (len(split), *shape)
        )
        done = 0
        for batch, _ in split.batches(source.image, 32):
            images[done : done + len(batch)] = batch
            done += len(batch)
            if name == "test":
                answers.append(reference(batch))
    np.save(folder / "keras.answers.npy", np.concatenate(answers))
    np.save(folder / "targets.npy", test.targets)
    described = {
        "normalization": source.normalization,
        "image": list(shape),
        "classes": len(source.labels),
        "parameters": int(source.model.count_params()),
        "test_images": len(test),
        "test_sha256": test.digest(),
        "calibration_images": len(held_out),
        "calibration_sha256": held_out.digest(),
    }
    (folder / "prepared.json").write_text(json.dumps(described))
    return described


def normalized(folder: Path) -> Answer:
    """Return what makes of uint8 batches what the Keras graph takes."""
    from cnnedge.image import normalize

    name = json.loads((folder / "prepared.json").read_text())["normalization"]
    return lambda batch: normalize(batch, name)


def calibration_images(folder: Path) -> np.ndarray:
    """Return the calibration images, uint8 ``[N, H, W, C]``, read from disk as they are needed."""
    return np.load(folder / "calibration.npy", mmap_mode="r")


# --- quantizing --------------------------------------------------------------------------------


def cnnedge_int8(folder: Path, method: str = "minmax") -> Callable[[], Path]:
    """CNN Edge: as `cnnedge export` does it, streaming histograms included."""
    import onnx_ir as ir
    import onnxruntime  # noqa: F401 - imported before the clock starts, as everybody's is

    from cnnedge.export import write_onnx
    from cnnedge.machine import this_machine
    from cnnedge.quantize import CPU, CPU_REDUCED, calibrate, choose_ranges, make_plan, quantize

    def work() -> Path:
        model = ir.load(folder / "fp32-uint8.onnx")
        plan = make_plan(model, CPU if this_machine().has_int8_dot_product else CPU_REDUCED)
        images = calibration_images(folder)
        batches = (images[i : i + 1] for i in range(len(images)))
        seen = calibrate(model, plan.tensors, batches, folder)
        out = folder / f"cnnedge-{method}.onnx"
        write_onnx(quantize(model, plan, choose_ranges(seen, plan, method)).model, out)
        return out

    return work


def ort_static(folder: Path) -> Callable[[], Path]:
    """ONNX Runtime's `quantize_static` with its defaults, on the graph that takes float32."""
    from onnxruntime.quantization import CalibrationDataReader, quantize_static

    prepare_batch = normalized(folder)

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.images = iter(calibration_images(folder))

        def get_next(self) -> dict | None:
            image = next(self.images, None)
            return None if image is None else {"image": prepare_batch(image[None])}

    def work() -> Path:
        out = folder / "ort-static.onnx"
        quantize_static(str(folder / "fp32-float32.onnx"), str(out), Reader())
        return out

    return work


def nncf(folder: Path) -> Callable[[], Path]:
    """NNCF's post-training quantization of the OpenVINO model with its defaults."""
    import nncf as library
    import openvino

    prepare_batch = normalized(folder)

    def work() -> Path:
        model = openvino.Core().read_model(folder / "fp32-float32.onnx")
        images = calibration_images(folder)
        data = library.Dataset(images, lambda image: prepare_batch(image[None]))
        quantized = library.quantize(model, data, subset_size=len(images))
        out = folder / "nncf.xml"
        openvino.save_model(quantized, out)
        return out

    return work


def litert(folder: Path, integer: bool = True) -> Callable[[], Path]:
    """The LiteRT converter: full-integer with uint8 input where ``integer``, else float32."""
    import keras
    import tensorflow as tf

    prepare_batch = normalized(folder)

    def work() -> Path:
        model = keras.models.load_model(folder / "model.keras")
        converter = tf.lite.TFLiteConverter.from_keras_model(model)
        if integer:
            converter.optimizations = [tf.lite.Optimize.DEFAULT]
            converter.representative_dataset = lambda: (
                [prepare_batch(image[None])] for image in calibration_images(folder)
            )
            converter.target_spec.supported_ops = [tf.lite.OpsSet.TFLITE_BUILTINS_INT8]
            converter.inference_input_type = tf.uint8
        out = folder / ("litert.tflite" if integer else "litert-fp32.tflite")
        out.write_bytes(converter.convert())
        return out

    return work


def as_it_is(path: Path) -> Callable[[], Path]:
    """A contestant that runs a file which is there already."""
    return lambda: path


def quantizer(folder: Path, name: str) -> Callable[[], Path]:
    """Return what makes a contestant's file; its libraries are imported by now."""
    makers: dict[str, Callable[[], Callable[[], Path]]] = {
        "ort-fp32": lambda: as_it_is(folder / "fp32-uint8.onnx"),
        "openvino-fp32": lambda: as_it_is(folder / "fp32-float32.onnx"),
        "litert-fp32": lambda: litert(folder, integer=False),
        "ort-static": lambda: ort_static(folder),
        "nncf": lambda: nncf(folder),
        "litert": lambda: litert(folder),
    }
    if name.startswith("cnnedge"):  # cnnedge-METHOD, cnnedge-METHOD-openvino: the same file
        return cnnedge_int8(folder, name.split("-")[1])
    return makers[name]()


def status_kib(field: str) -> int:
    """Return a field of /proc/self/status, in KiB (Linux alone)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1])
    raise RuntimeError(f"no {field} in /proc/self/status")


def quantize_once(folder: Path, name: str) -> dict[str, Any]:
    """Quantize in this process; its libraries are loaded before the clock starts."""
    work = quantizer(folder, name)
    before = status_kib("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
    start = time.perf_counter()
    out = work()
    seconds = time.perf_counter() - start
    peak = status_kib("VmHWM")
    parts = [out, out.with_suffix(".bin")] if out.suffix == ".xml" else [out]
    return {
        "file": out.name,
        "seconds": seconds,
        "peak_mib": peak / 1024,
        "peak_over_start_mib": (peak - before) / 1024,
        "bytes": sum(part.stat().st_size for part in parts),
    }


# --- running -----------------------------------------------------------------------------------


def runtime(folder: Path, name: str, file: str, threads: int) -> tuple[Answer, Answer, int]:
    """Return what is done to a uint8 batch beforehand, the timed call, and its largest batch."""
    prepare_batch = normalized(folder)
    same: Answer = lambda batch: batch  # noqa: E731
    if name == "keras":
        import tensorflow as tf

        tf.config.threading.set_intra_op_parallelism_threads(threads)
        from cnnedge.backends.keras import compiled, load_model

        model, _ = load_model(folder / "model.keras")
        normalization = json.loads((folder / "prepared.json").read_text())["normalization"]
        return same, compiled(model, normalization), 1
    path = folder / file
    if path.suffix == ".tflite":
        return _litert_runtime(path, threads, prepare_batch)
    if path.suffix == ".xml" or "openvino" in name:
        import openvino

        config = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY"}
        if "fp32" in name:
            config["INFERENCE_PRECISION_HINT"] = "f32"
        request = openvino.Core().compile_model(str(path), "CPU", config).create_infer_request()
        ready = prepare_batch if name in {"nncf", "openvino-fp32"} else same
        return ready, lambda batch: request.infer([batch])[0], 16
    if name == "ort-static":  # as its user runs it: nothing of cnnedge's settings
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = threads, 3
        session = onnxruntime.InferenceSession(str(path), options)
        return prepare_batch, lambda batch: session.run(None, {"image": batch})[0], 16
    from cnnedge.backends.onnxruntime import open_session

    return same, open_session(path, threads=threads), 16


def _litert_runtime(path: Path, threads: int, prepare_batch: Answer) -> tuple[Answer, Answer, int]:
    from ai_edge_litert.interpreter import Interpreter

    interpreter = Interpreter(str(path), num_threads=threads)  # XNNPACK is its default
    interpreter.allocate_tensors()
    (taken,), (given,) = interpreter.get_input_details(), interpreter.get_output_details()
    scale, zero = given["quantization"]

    def call(batch: np.ndarray) -> np.ndarray:
        interpreter.set_tensor(taken["index"], batch)
        interpreter.invoke()
        found = interpreter.get_tensor(given["index"])
        return (found.astype(np.float32) - zero) * scale if scale else found

    if taken["dtype"] == np.float32:
        return prepare_batch, call, 1
    step, offset = taken["quantization"]

    def quantized(batch: np.ndarray) -> np.ndarray:  # as the converter wants its uint8 image
        return np.clip(np.rint(prepare_batch(batch) / step + offset), 0, 255).astype(np.uint8)

    return quantized, call, 1


def serve(folder: Path, name: str, file: str, threads: int) -> None:
    """Answer the parent's commands, one line each, until it closes standard input."""
    ready, call, most = runtime(folder, name, file, threads)
    images = np.load(folder / "test.npy", mmap_mode="r")
    one = ready(np.ascontiguousarray(images[:1]))
    call(one)
    print("READY", flush=True)
    for line in sys.stdin:
        command, *arguments = line.split()
        if command == "answers":
            found = [
                np.array(call(ready(np.ascontiguousarray(images[i : i + most]))))
                for i in range(0, len(images), most)
            ]
            np.save(folder / f"{name}.answers.npy", np.concatenate(found))
            print("RESULT {}", flush=True)
        elif command == "time":
            start, samples = time.perf_counter(), []
            while time.perf_counter() - start < SETTLE_SECONDS:
                call(one)
            for _ in range(int(arguments[0])):
                before = time.perf_counter()
                call(one)
                samples.append(time.perf_counter() - before)
            print("RESULT", json.dumps(samples), flush=True)


def main() -> None:
    """Do what the first argument says."""
    what, folder, *rest = sys.argv[1:]
    if what == "prepare":
        model, data, seed, tests, calibration = rest
        found = prepare(Path(folder), model, data, int(seed), int(tests), int(calibration))
        print("RESULT", json.dumps(found))
    elif what == "quantize":
        print("RESULT", json.dumps(quantize_once(Path(folder), rest[0])))
    else:
        serve(Path(folder), rest[0], rest[1], int(rest[2]))


if __name__ == "__main__":
    main()
