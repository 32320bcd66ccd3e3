"""Classify images with onnxruntime, numpy and Pillow alone, without cnnedge.

    python bare.py alexnet_v1/model.int8.onnx photo.jpg

Labels and the image contract are in the model file. An image becomes the very tensor that cnnedge
makes of it; copy this file beside an app and `from bare import Model`.
"""

import argparse
import json
import os
import sys
import warnings

# Before its import, or ONNX Runtime sends telemetry; who has set it himself keeps his choice.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

import numpy as np
import onnxruntime as ort
from PIL import Image, ImageOps

# Pillow reads many more, and starts another program for some of them.
FORMATS = ("JPEG", "PNG", "GIF", "BMP", "PPM", "WEBP", "TIFF")
ORIENTATION = 0x0112  # EXIF: how the camera was held
SIDEWAYS = (5, 6, 7, 8)
MOST_PIXELS = 89_478_485  # of the picture between the two passes of the resize
# A file that declares more than 89 million pixels is refused, as by cnnedge, and not decoded.
warnings.simplefilter("error", Image.DecompressionBombWarning)


class Model:
    """An ONNX file of a bundle; one may be used from many threads at once.

    Attributes:
        labels: The classes, in the order of the probabilities.
        contract: What an image must become: height, width, channels, resize.
    """

    def __init__(self, path):
        # The optimizer that is switched off makes INT8 with FP16 scales answer at random.
        self.session = ort.InferenceSession(
            path,
            providers=["CPUExecutionProvider"],
            disabled_optimizers=["WeightBiasQuantization"],
        )
        about = self.session.get_modelmeta().custom_metadata_map
        if "cnnedge.image" not in about or "cnnedge.labels" not in about:
            raise ValueError("it has no labels and no image contract: export it with cnnedge")
        self.labels = json.loads(about["cnnedge.labels"])
        self.contract = json.loads(about["cnnedge.image"])
        self.input = self.session.get_inputs()[0]
        if self.input.type != "tensor(uint8)":
            raise ValueError("it takes normalized floats: export it without --input float32")

    def __call__(self, *photos):
        """Return probabilities, float32 [N, classes], of N paths or open files."""
        batch = np.stack([tensor(photo, self.contract) for photo in photos])
        answers = self.session.run(["probabilities"], {self.input.name: batch})[0]
        if not np.isfinite(answers).all():
            raise ValueError("the model answers with NaN or infinity: take another variant of it")
        return answers


def tensor(photo, contract):
    """Return an image file as the network takes it, uint8 [H, W, C]."""
    return fit(decode(photo, contract), contract)


def decode(photo, contract):
    """Return it upright, in 8-bit RGB, first frame, transparency laid on white."""
    Image.preinit()  # or a format that is named makes it load all forty
    with Image.open(photo, formats=FORMATS) as picture:
        turned = picture.getexif().get(ORIENTATION, 1)
        if picture.format == "JPEG":
            # A large one is decoded at a half, a quarter or an eighth of its size, never below
            # twice the target. cnnedge does so too, and other pixels give other answers.
            aim = (2 * contract["width"], 2 * contract["height"])
            picture.draft("RGB", aim[::-1] if turned in SIDEWAYS else aim)
        picture.seek(0)
        picture.load()
        if turned != 1:
            picture = ImageOps.exif_transpose(picture)
        if picture.mode[0] in "IF":  # 16-bit grey, which convert("RGB") would clip
            levels = np.asarray(picture)
            if levels.dtype.kind == "f" or levels.min() < 0 or levels.max() > 65535:
                raise ValueError("it holds no pixels of 8 or 16 bits")
            picture = Image.fromarray(np.rint(levels / 257.0).astype(np.uint8))
        if picture.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in picture.info:
            layer = picture.convert("RGBA")
            picture = Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer)
        return picture.convert("RGB")


def fit(picture, contract):
    """Return a decoded image resized by the contract's way, uint8 [H, W, C]."""
    if contract["channels"] == 1:
        picture = picture.convert("L")
    size = width, height = contract["width"], contract["height"]
    if contract["resize"] == "letterbox":  # the whole image, centred on black
        scale = min(width / picture.width, height / picture.height)
        inner = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
        canvas = Image.new(picture.mode, size)
        corner = ((width - inner[0]) // 2, (height - inner[1]) // 2)
        canvas.paste(resize(picture, inner), corner)
        picture = canvas
    elif contract["resize"] == "crop":  # the largest centred part of the right shape
        wide = max(1, round(min(picture.width, picture.height * (width / height))))
        high = max(1, round(min(picture.height, picture.width / (width / height))))
        left, top = (picture.width - wide) // 2, (picture.height - high) // 2
        picture = picture.crop((left, top, left + wide, top + high))
    elif contract["resize"] != "stretch":
        raise ValueError(f"the contract says {contract['resize']!r}, which this app does not know")
    pixels = np.asarray(resize(picture, size))
    return pixels[..., None] if contract["channels"] == 1 else pixels


def resize(picture, size):
    """The width first and then the height: Pillow's own order depends on its version."""
    if size[0] * picture.height > MOST_PIXELS:
        raise ValueError(f"its {picture.height} rows are too many to be stretched")
    for step in ((size[0], picture.height), size):
        if picture.size != step:
            picture = picture.resize(step, Image.Resampling.BILINEAR)
    return picture


def main():
    """Classify the images named on the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", help="an ONNX file of a bundle, such as model.int8.onnx")
    parser.add_argument("images", nargs="+")
    parser.add_argument("--top", type=int, default=1, help="how many answers for each image")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    arguments = parser.parse_args()
    where, found = arguments.model, []
    try:
        model = Model(arguments.model)
        for where in arguments.images:
            (row,) = model(where)
            best = np.argsort(-row, kind="stable")[: arguments.top]
            answers = [(model.labels[i], int(i), float(row[i])) for i in best]
            found.append({"image": where, "answers": answers})
    except Exception as error:  # decoders and runtimes raise what they like
        reason = (str(error) or repr(error)).splitlines()[0]
        sys.exit(f"error: {where}: {reason}")
    if arguments.json:
        names = ("label", "index", "probability")
        for entry in found:
            entry["answers"] = [dict(zip(names, a, strict=True)) for a in entry["answers"]]
        print(json.dumps({"images": found}))
        return
    for entry in found:
        print(f"{entry['image']}: {', '.join(f'{a} {p:.1%}' for a, _, p in entry['answers'])}")


if __name__ == "__main__":
    main()
