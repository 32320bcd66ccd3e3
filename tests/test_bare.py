"""The Python targets: bare.py without cnnedge, the camera app on a stand-in for the camera."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import warnings
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import cnnedge
from cnnedge.image import RESIZES, ImageContract, to_tensor
from cnnedge.selftest import TOLERANCE

pytestmark = pytest.mark.system

TARGETS = Path(__file__).parents[1] / "export"
BARE = TARGETS / "x86-cpu" / "bare.py"
APP = TARGETS / "x86-cpu" / "app.py"
CAMERA = TARGETS / "raspberry-pi" / "camera.py"


@pytest.fixture(scope="session")
def bare_python(tmp_path_factory):
    """An interpreter that has onnxruntime, numpy and Pillow, and nothing else."""
    root = tmp_path_factory.mktemp("bare")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", root], check=True)
    (site,) = (root / "lib").glob("python*/site-packages")
    for name in ("onnxruntime", "numpy", "pillow"):
        distribution = metadata.distribution(name)
        for top in {f.parts[0] for f in distribution.files or [] if ".." not in f.parts}:
            (site / top).symlink_to(distribution.locate_file(top))
    return root / "bin" / "python"


def run_bare(python, *words):
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    return subprocess.run(
        [python, BARE, *words], capture_output=True, text=True, env=environment, cwd="/"
    )


def test_there_is_no_cnnedge_there(bare_python):
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    for name in ("cnnedge", "onnx", "tensorflow"):
        done = subprocess.run(
            [bare_python, "-c", f"import {name}"], capture_output=True, env=environment, cwd="/"
        )
        assert b"ModuleNotFoundError" in done.stderr


@pytest.mark.parametrize("variant", ["fp32", "fp16", "int8", "int8-trt"])
def test_it_answers_as_the_reference_does(bare_python, toy_bundle, variant):
    index = json.loads(toy_bundle.path("selftest/selftest.json").read_text())
    photos = [toy_bundle.path(entry["file"]) for entry in index["images"]]
    assert len(photos) == 8
    model = toy_bundle.path(toy_bundle.manifest.variant(variant).file)
    done = run_bare(bare_python, model, *photos, "--json", "--top", "10")
    assert done.returncode == 0, done.stderr
    found = np.zeros((len(photos), 10))
    for row, entry in zip(found, json.loads(done.stdout)["images"], strict=True):
        for answer in entry["answers"]:
            row[answer["index"]] = answer["probability"]
            assert toy_bundle.manifest.labels[answer["index"]] == answer["label"]
    np.testing.assert_allclose(found.sum(axis=1), 1, atol=1e-3)
    tolerance = TOLERANCE[toy_bundle.manifest.variant(variant).precision]
    assert np.abs(found - np.array(index["answers"][variant])).max() <= tolerance
    if variant == "fp32":  # the self-test's tolerance to Keras itself
        assert np.abs(found - np.array(index["answers"]["reference"])).max() <= TOLERANCE["fp32"]


def test_its_lines_are_for_people(bare_python, toy_bundle):
    photo = toy_bundle.path("selftest/golden-00.png")
    best = cnnedge.load(toy_bundle.root, variant="fp32")(photo)[0]
    done = run_bare(bare_python, toy_bundle.path("model.fp32.onnx"), photo)
    assert done.stdout == f"{photo}: {best.label} {best.probability:.1%}\n"


@pytest.fixture(scope="module")
def bare():
    spec = importlib.util.spec_from_file_location("bare", BARE)
    module = importlib.util.module_from_spec(spec)
    with warnings.catch_warnings():
        spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """One file of each kind that is read in a way of its own."""
    from sklearn.datasets import load_sample_image

    folder = tmp_path_factory.mktemp("photos")
    china = Image.fromarray(load_sample_image("china.jpg"))
    small = china.resize((75, 50))
    made = {"large.jpg": {}, "cmyk.jpg": {}, "grey.jpg": {}}
    china.save(folder / "large.jpg", quality=90)
    china.convert("CMYK").save(folder / "cmyk.jpg")
    china.convert("L").save(folder / "grey.jpg")
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        made[f"turned{orientation}.jpg"] = {}
        china.save(folder / f"turned{orientation}.jpg", exif=exif)
    exif[0x0112] = 6
    small.save(folder / "turned.png", exif=exif)
    layer = small.convert("RGBA")
    layer.putalpha(small.convert("L"))
    layer.save(folder / "alpha.png")
    small.quantize(16).save(folder / "clear.png", transparency=3)
    small.save(folder / "clear-rgb.png", transparency=small.getpixel((9, 9)))
    small.convert("L").convert("LA").save(folder / "grey-alpha.png")
    deep = (np.asarray(small.convert("L")).astype(np.uint16) * 251).astype(np.uint16)
    Image.fromarray(deep).save(folder / "deep.png")
    small.convert("1").save(folder / "bits.png")
    small.save(folder / "moving.gif", save_all=True, append_images=[small.rotate(90)])
    small.crop((0, 0, 1, 50)).save(folder / "thin.png")
    small.save(folder / "small.webp")
    return sorted(folder.iterdir())


@pytest.mark.parametrize("resize", RESIZES)
@pytest.mark.parametrize("channels", [1, 3])
def test_it_makes_the_pixels_that_cnnedge_makes(bare, photos, resize, channels):
    assert len(photos) == 21
    for height, width in ((32, 32), (20, 61), (224, 160)):
        contract = ImageContract(height, width, channels, resize)
        for photo in photos:
            ours, theirs = bare.tensor(photo, contract.to_dict()), to_tensor(photo, contract)
            assert ours.dtype == np.uint8
            np.testing.assert_array_equal(ours, theirs, err_msg=f"{photo.name} {contract}")


def test_what_cnnedge_refuses_it_refuses(bare, tmp_path):
    Image.fromarray(np.full((9, 9), 0.5, np.float32)).save(tmp_path / "float.tiff")
    contract = ImageContract(8, 8)
    with pytest.raises(cnnedge.CnnEdgeError):
        to_tensor(tmp_path / "float.tiff", contract)
    with pytest.raises(ValueError, match="8 or 16 bits"):
        bare.tensor(tmp_path / "float.tiff", contract.to_dict())
    with pytest.raises(ValueError, match="'zoom'"):
        bare.fit(Image.new("RGB", (9, 9)), contract.to_dict() | {"resize": "zoom"})
    with pytest.raises(ValueError, match="400000 rows are too many"):
        bare.fit(Image.new("RGB", (1, 400_000)), ImageContract(224, 224).to_dict())


def test_its_refusals_are_one_line(bare_python, toy_bundle, tmp_path):
    import onnx

    def refused(*words):
        done = run_bare(bare_python, *words)
        assert (done.returncode, done.stdout) == (1, "")
        assert done.stderr.startswith(f"error: {words[-1] if len(words) > 2 else words[0]}: ")
        assert len(done.stderr.strip().splitlines()) == 1
        return done.stderr

    photo, model = toy_bundle.path("selftest/golden-00.png"), toy_bundle.path("model.fp32.onnx")
    assert "no_such.png" in refused(model, photo, tmp_path / "no_such.png")
    (tmp_path / "text.png").write_text("no image")
    assert "cannot identify" in refused(model, photo, tmp_path / "text.png")
    refused(tmp_path / "none.onnx", photo)
    proto = onnx.load(model)
    proto.graph.input[0].type.tensor_type.elem_type = onnx.TensorProto.FLOAT
    onnx.save(proto, tmp_path / "float.onnx")
    assert "--input float32" in refused(tmp_path / "float.onnx", photo)
    del proto.metadata_props[:]
    onnx.save(proto, tmp_path / "plain.onnx")
    assert "export it with cnnedge" in refused(tmp_path / "plain.onnx", photo)
    assert run_bare(bare_python, model).returncode == 2


def test_the_app_of_three_lines(toy_bundle, tmp_path):
    def app(*words):
        environment = os.environ | {"PYTHONPATH": str(Path(cnnedge.__file__).parents[1])}
        command = [sys.executable, APP, *map(str, words)]
        return subprocess.run(command, capture_output=True, text=True, env=environment)

    photo = toy_bundle.path("selftest/golden-00.png")
    best = cnnedge.load(toy_bundle.root)(photo)[0]
    done = app(toy_bundle.root, photo)
    assert done.stdout == f"{photo}: {best.label} ({best.probability:.1%})\n", done.stderr
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no image")
    none = tmp_path / "none"
    for words, what in (((toy_bundle.root, broken), broken), ((none, photo), none)):
        done = app(*words)
        (line,) = done.stderr.splitlines()
        assert (done.returncode, done.stdout) == (1, "")
        assert line.startswith(f"error: {what} ")
    assert "python app.py BUNDLE IMAGE" in app().stderr


# As picamera2 hands out frames: the format's name reads a pixel from its last byte to its first.
PICAMERA2 = """
import json, os
import numpy as np
class Picamera2:
    def __init__(self):
        if os.environ["FRAME"] == "none":
            raise IndexError("list index out of range")
        self.running = False
    def create_video_configuration(self, main):
        return main
    def configure(self, main):
        self.format = main["format"]
        assert self.format in ("RGB888", "BGR888")
    def start(self):
        self.running = True
    def stop(self):
        self.running = False
        print("stopped")
    def capture_array(self, stream):
        assert self.running and stream == "main"
        frame = np.load(os.environ["FRAME"])
        return frame if self.format == "BGR888" else frame[..., ::-1]
"""


BUSY = (
    "class Picamera2:\n    def __init__(self):\n        raise RuntimeError('Failed to acquire')\n"
)


@pytest.fixture
def run_camera(tmp_path):
    def run(*words, frame="none", picamera2=PICAMERA2):
        (tmp_path / "picamera2.py").write_text(picamera2)
        root = str(Path(cnnedge.__file__).parents[1])
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join([str(tmp_path), root]),
            "FRAME": str(frame),
        }
        command = [sys.executable, CAMERA, *map(str, words)]
        return subprocess.run(command, capture_output=True, text=True, env=environment)

    return run


def test_the_camera_app_sees_red_as_red(run_camera, toy_bundle, tmp_path):
    frame = np.zeros((480, 640, 3), np.uint8)
    frame[100:380, 200:440] = (255, 160, 20)
    classify = cnnedge.load(toy_bundle.root)
    best, mistaken = classify(frame)[0], classify(frame[..., ::-1])[0]
    line, wrong = (f"{p.label} {p.probability:.1%}" for p in (best, mistaken))
    assert line != wrong, "the frame must tell red from blue"
    np.save(tmp_path / "frame.npy", frame)
    done = run_camera(toy_bundle.root, 3, frame=tmp_path / "frame.npy")
    assert done.returncode == 0, done.stderr
    *answers, last = done.stdout.splitlines()
    assert len(answers) == 3
    assert all(answer.startswith(line) for answer in answers)
    assert last == "stopped"
    assert done.stderr.startswith(classify.variant)


def test_the_camera_apps_refusals_are_one_line(run_camera, toy_bundle, tmp_path):
    for done, says in (
        (run_camera(toy_bundle.root), "no camera was found"),
        (run_camera(toy_bundle.root, picamera2="raise ImportError('gone')"), "picamera2 cannot"),
        (run_camera(toy_bundle.root, picamera2=BUSY), "cannot be used: Failed to acquire"),
        (run_camera(tmp_path / "none"), "does not exist"),
    ):
        assert done.returncode == 1
        assert done.stderr.splitlines()[-1].startswith("error: ")
        assert says in done.stderr
        assert "Traceback" not in done.stderr
    assert run_camera().returncode == 2
    assert run_camera(toy_bundle.root, "x").returncode == 2
