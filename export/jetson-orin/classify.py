#!/usr/bin/env python3
"""The smallest app for JetPack 6: JetPack's own TensorRT, numpy, Pillow and cuda-python.

    pip3 install "cuda-python>=12.6,<13" pillow "numpy<2"
    python3 classify.py BUNDLE plans/int8-trt.tensorrt photo.jpg

From JetPack 7.2.2 on use cnnedge itself: cnnedge.load(BUNDLE, runtime="tensorrt").
"""

import hashlib
import json
import sys
from pathlib import Path

import numpy as np
import tensorrt as trt
from cuda.bindings import runtime as cuda
from PIL import Image

# What cnnedge itself opens; Pillow knows forty more, some of which start other programs.
FORMATS = ("JPEG", "PNG", "GIF", "BMP", "PPM", "WEBP", "TIFF")


def call(function, *arguments):
    """Call CUDA; return what it gives, or stop with its error."""
    error, *given = function(*arguments)
    if error != cuda.cudaError_t.cudaSuccess:
        raise SystemExit(f"error: {function.__name__}: {error.name}")
    return given[0] if given else None


class Plan:
    """A plan for batch 1, with its memory on the GPU."""

    def __init__(self, stem):
        content = Path(stem + ".plan").read_bytes()
        note = json.loads(Path(stem + ".json").read_text(encoding="utf-8"))
        # A plan is machine code: nothing is loaded but what was built.
        if hashlib.sha256(content).hexdigest() != note["sha256"]:
            raise SystemExit(f"error: {stem}.plan was altered or cut short: build it again")
        if ".".join(trt.__version__.split(".")[:3]) != note["library"]:
            raise SystemExit(
                "error: {}.plan was built by TensorRT {}, and {} is installed: build it "
                "again".format(stem, note["library"], trt.__version__)
            )
        self.runtime = trt.Runtime(trt.Logger(trt.Logger.ERROR))
        self.engine = self.runtime.deserialize_cuda_engine(content)
        if self.engine is None:
            raise SystemExit(f"error: {stem}.plan does not fit this device: build it")
        self.context = self.engine.create_execution_context()
        self.stream = call(cuda.cudaStreamCreate)
        size = tuple(self.engine.get_tensor_shape("image"))[1:]
        self.context.set_input_shape("image", (1, *size))
        self.answers = np.empty(
            (1, self.engine.get_tensor_shape("probabilities")[-1]), dtype=np.float32
        )
        self.input = call(cuda.cudaMalloc, int(np.prod(size)))
        self.output = call(cuda.cudaMalloc, self.answers.nbytes)
        self.context.set_tensor_address("image", self.input)
        self.context.set_tensor_address("probabilities", self.output)

    def __call__(self, image):
        """Return probabilities, float32 [classes], of an image, uint8 [H, W, 3]."""
        kind = cuda.cudaMemcpyKind
        image = np.ascontiguousarray(image)
        call(
            cuda.cudaMemcpyAsync,
            self.input,
            image.ctypes.data,
            image.nbytes,
            kind.cudaMemcpyHostToDevice,
            self.stream,
        )
        if not self.context.execute_async_v3(self.stream):
            raise SystemExit("error: TensorRT cannot run the plan")
        call(
            cuda.cudaMemcpyAsync,
            self.answers.ctypes.data,
            self.output,
            self.answers.nbytes,
            kind.cudaMemcpyDeviceToHost,
            self.stream,
        )
        call(cuda.cudaStreamSynchronize, self.stream)
        return self.answers[0].copy()


def main(bundle, stem, *photos):
    """Classify the photos."""
    manifest = json.loads((Path(bundle) / "manifest.json").read_text(encoding="utf-8"))
    contract = manifest["image"]
    if contract["resize"] != "stretch":
        raise SystemExit("error: this app stretches images; the bundle asks otherwise")
    size = (contract["width"], contract["height"])
    classify = Plan(stem)
    for photo in photos:
        image = Image.open(photo, formats=FORMATS).convert("RGB")
        image = image.resize(size, Image.Resampling.BILINEAR)
        answers = classify(np.asarray(image))
        if not np.isfinite(answers).all():
            raise SystemExit(
                f"error: {photo}: the plan answers with NaN or infinity: build it anew"
            )
        best = int(answers.argmax())
        print("{}: {} ({:.1%})".format(photo, manifest["labels"][best], answers[best]))


if __name__ == "__main__":
    if len(sys.argv) < 4:
        raise SystemExit(__doc__)
    main(*sys.argv[1:])
