"""The smallest client: classify image files on a server that speaks the KServe v2 protocol.

python client.py http://localhost:8000 alexnet_v1_int8 photo.jpg …

numpy and Pillow; the labels and how an image is to be resized are asked of the server.
https://kserve.github.io/website/docs/concepts/architecture/data-plane/v2-protocol
"""

import json
import sys
import urllib.error
import urllib.request

import numpy as np
from PIL import Image, ImageOps

TIMEOUT = 60  # seconds

# What cnnedge itself opens; Pillow knows forty more, some of which start other programs.
FORMATS = ("JPEG", "PNG", "GIF", "BMP", "PPM", "WEBP", "TIFF")


class Model:
    """A model on a server.

    Args:
        url: The server, such as http://localhost:8000.
        name: The model.
    """

    def __init__(self, url: str, name: str) -> None:
        self.url = f"{url.rstrip('/')}/v2/models/{name}"
        config = json.loads(call(f"{self.url}/config")[1])
        told = config.get("parameters", {})
        if "cnnedge.labels" not in told:
            sys.exit(f"error: {name} was not packaged by cnnedge: it tells no labels")
        self.labels = json.loads(told["cnnedge.labels"]["string_value"])
        self.image = json.loads(told["cnnedge.image"]["string_value"])
        if config["input"][0]["data_type"] != "TYPE_UINT8":
            sys.exit(f"error: {name} takes no uint8 images; export it without --input float32")

    def probabilities(self, batch: np.ndarray) -> np.ndarray:
        """Return float32 [N, classes] of images uint8 [N, H, W, C]."""
        request = {
            "inputs": [
                {
                    "name": "image",
                    "shape": batch.shape,
                    "datatype": "UINT8",
                    "parameters": {"binary_data_size": batch.nbytes},
                }
            ],
            "outputs": [{"name": "probabilities", "parameters": {"binary_data": True}}],
        }
        head = json.dumps(request).encode()
        headers = {
            "Content-Type": "application/octet-stream",
            "Inference-Header-Content-Length": str(len(head)),
        }
        headers, body = call(f"{self.url}/infer", head + batch.tobytes(), headers)
        # The numbers follow the JSON as they lie in memory, or are in it where a proxy wants JSON.
        length = int(headers.get("Inference-Header-Content-Length", len(body)))
        (answer,) = json.loads(body[:length])["outputs"]
        if "data" in answer:
            return np.array(answer["data"], np.float32).reshape(answer["shape"])
        return np.frombuffer(body[length:], "<f4").reshape(answer["shape"])

    def tensor(self, path: str) -> np.ndarray:
        """Return an image file as the model takes it, uint8 [H, W, C]."""
        with Image.open(path, formats=FORMATS) as opened:
            picture = ImageOps.exif_transpose(opened).convert("RGB")
        picture = picture if self.image["channels"] == 3 else picture.convert("L")
        return np.asarray(self.fit(picture)).reshape(
            self.image["height"], self.image["width"], self.image["channels"]
        )

    def fit(self, picture: Image.Image) -> Image.Image:
        """Resize a picture as the image contract says."""
        width, height = self.image["width"], self.image["height"]
        if self.image["resize"] == "crop":  # the largest centred part of that shape
            w = max(1, round(min(picture.width, picture.height * width / height)))
            h = max(1, round(min(picture.height, picture.width * height / width)))
            left, top = (picture.width - w) // 2, (picture.height - h) // 2
            picture = picture.crop((left, top, left + w, top + h))
        elif self.image["resize"] == "letterbox":  # the whole image, centred on black
            scale = min(width / picture.width, height / picture.height)
            w, h = max(1, round(picture.width * scale)), max(1, round(picture.height * scale))
            canvas = Image.new(picture.mode, (width, height))
            canvas.paste(resize(picture, w, h), ((width - w) // 2, (height - h) // 2))
            return canvas
        return resize(picture, width, height)


def resize(picture: Image.Image, width: int, height: int) -> Image.Image:
    """The width first and then the height: Pillow's own order depends on its version."""
    for size in ((width, picture.height), (width, height)):
        if picture.size != size:
            picture = picture.resize(size, Image.Resampling.BILINEAR)
    return picture


def call(url: str, body: bytes | None = None, headers: dict | None = None) -> tuple[dict, bytes]:
    """Return the headers and the body of an answer."""
    try:
        request = urllib.request.Request(url, body, headers or {})
        with urllib.request.urlopen(request, timeout=TIMEOUT) as answer:
            return answer.headers, answer.read()
    except urllib.error.HTTPError as error:
        text = " ".join(error.read().decode(errors="replace").split())  # a proxy's is a page
        sys.exit(f"error: {url} answers {error.code}: {text[:300]}")
    except OSError as error:
        sys.exit(f"error: {url} cannot be reached: {error}")


def main(url: str, name: str, *paths: str) -> None:
    """Print the most likely label of each image file."""
    where = url
    try:
        model = Model(url, name)
        for where in paths:
            (answers,) = model.probabilities(model.tensor(where)[None])
            if not np.isfinite(answers).all():
                sys.exit(f"error: {where}: the model answers with NaN or infinity")
            best = answers.argmax()
            print(f"{where}: {model.labels[best]} ({answers[best]:.1%})")
    except Exception as error:  # decoders raise what they like, and a server answers so
        reason = (str(error) or repr(error)).splitlines()[0]
        sys.exit(f"error: {where}: {reason}")


if __name__ == "__main__":
    if len(sys.argv) < 4:
        sys.exit(__doc__)
    main(*sys.argv[1:])
