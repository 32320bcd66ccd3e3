"""The Node app of export/node: installed by npm as its README says, and run."""

from __future__ import annotations

import http.client
import json
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from browsing import OFFLINE, golden
from PIL import Image

from cnnedge.selftest import TOLERANCE

pytestmark = pytest.mark.system

SOURCE = Path(__file__).parents[2] / "export" / "node"


@pytest.fixture(scope="module")
def app(tmp_path_factory):
    """A copy of the folder, as a user makes it, with its packages."""
    for tool in ("node", "npm"):
        if shutil.which(tool) is None:
            pytest.skip(f"no {tool} on this machine")
    folder = tmp_path_factory.mktemp("node") / "app"
    skip = shutil.ignore_patterns("node_modules")
    shutil.copytree(SOURCE, folder, symlinks=False, ignore=skip)
    command = ["npm", "install", "--no-audit", "--no-fund", "--prefer-offline"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode and (found := OFFLINE.search(done.stderr)):
        pytest.skip(f"npm could not reach its packages ({found.group()})")
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture
def classify(app):
    def run(*arguments):
        command = ["node", app / "classify.mjs", *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    return run


@pytest.mark.parametrize("variant", ["fp32", "int8"])
def test_golden_images_are_answered_as_by_the_reference(classify, toy_bundle, variant):
    files, expected = golden(toy_bundle, variant)
    _, reference = golden(toy_bundle, "reference")
    images = [toy_bundle.path(name) for name in files]
    model = toy_bundle.path(f"model.{variant}.onnx")
    done = classify(model, *images, "--json", "--top", "10")
    assert (done.returncode, done.stderr) == (0, "")
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert [Path(line["image"]) for line in lines] == images
    for line, probabilities, exact in zip(lines, expected, reference, strict=True):
        found = np.zeros(10)
        for answer in line["answers"]:
            found[answer["index"]] = answer["probability"]
            assert answer["label"] == toy_bundle.manifest.labels[answer["index"]]
        assert np.abs(found - probabilities).max() <= TOLERANCE[variant]
        assert line["answers"][0]["index"] == exact.argmax()


def test_people_read_a_line_for_each_image(classify, toy_bundle):
    image = toy_bundle.path("selftest/golden-00.png")
    done = classify(toy_bundle.path("model.int8.onnx"), image, "--top", "2")
    assert re.fullmatch(re.escape(str(image)) + r": \d [\d.]+%, \d [\d.]+%\n", done.stdout)


def test_a_broken_image_is_named_and_the_others_answered(classify, toy_bundle, tmp_path):
    broken, whole = tmp_path / "broken.jpg", toy_bundle.path("selftest/golden-01.jpg")
    broken.write_bytes(whole.read_bytes()[:300])
    (tmp_path / "no.png").write_text("no image")
    model = toy_bundle.path("model.int8.onnx")
    done = classify(model, broken, tmp_path / "no.png", tmp_path / "gone.png", whole)
    assert done.returncode == 1
    lines = done.stderr.splitlines()
    assert len(lines) == 3
    assert lines[0].startswith(f"error: {broken}: this is no image that can be read")
    assert lines[1].startswith(f"error: {tmp_path / 'no.png'}: this is no image")
    assert lines[2] == f"error: there is no image {tmp_path / 'gone.png'}"
    assert done.stdout.startswith(f"{whole}: ")


def test_a_broken_image_is_named_whatever_its_name(app, classify, toy_bundle, tmp_path):
    (tmp_path / "image").write_text("none")  # a word of the message
    command = ["node", app / "classify.mjs", toy_bundle.path("model.int8.onnx"), "image"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("error: image: this is no image that can be read")


def test_models_that_cannot_be_used_are_one_line(classify, toy_bundle, tmp_path):
    import onnx

    image = toy_bundle.path("selftest/golden-00.png")
    foreign = onnx.load(toy_bundle.path("model.fp32.onnx"))
    del foreign.metadata_props[:]
    onnx.save(foreign, tmp_path / "foreign.onnx")
    floats = onnx.load(toy_bundle.path("model.fp32.onnx"))
    floats.graph.input[0].type.tensor_type.elem_type = onnx.TensorProto.FLOAT
    for node in floats.graph.node:
        if node.op_type == "Cast" and node.input[0] == "image":
            node.op_type = "Identity"
            del node.attribute[:]
    onnx.save(floats, tmp_path / "floats.onnx")
    whole = toy_bundle.path("model.fp32.onnx").read_bytes()
    (tmp_path / "cut.onnx").write_bytes(whole[: len(whole) // 2])
    for name, message in {
        "foreign.onnx": "no model that cnnedge exported",
        "floats.onnx": 'its input is float32 "image", not uint8',
        "cut.onnx": "no whole ONNX file",
        "gone.onnx": "there is no model",
    }.items():
        done = classify(tmp_path / name, image)
        assert (done.returncode, done.stdout) == (1, ""), name
        (line,) = done.stderr.splitlines()
        assert line.startswith("error: "), line
        assert message in line


def test_wrong_usage_is_code_2(classify, toy_bundle):
    for arguments in ([], ["model.onnx"], ["m", "i", "--top", "0"], ["m", "i", "--nonsense"]):
        done = classify(*arguments)
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr.startswith("usage: ")


def test_a_port_that_cannot_be_is_wrong_usage(app, toy_bundle):
    for port in ("65536", "-1", "http"):
        command = ["node", app / "server.mjs", toy_bundle.path("model.int8.onnx"), port]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        assert (done.returncode, done.stdout) == (2, ""), port
        assert done.stderr == "usage: node server.mjs MODEL.onnx [PORT]\n"


def test_the_whole_picture_is_what_python_sees(classify, toy_bundle, tmp_path):
    """Turned by EXIF, with transparency, grey, 16 bits deep: as cnnedge itself answers."""
    import cnnedge

    random = np.random.default_rng(5)
    grey = Image.open(toy_bundle.path("selftest/golden-00.png")).convert("L").resize((90, 60))
    turned = Image.Exif()
    turned[0x0112] = 6
    grey.convert("RGB").save(tmp_path / "turned.jpg", exif=turned, quality=92)
    grey.save(tmp_path / "grey.png")
    layer = np.dstack([np.asarray(grey.convert("RGB")), random.choice([0, 255], (60, 90))])
    Image.fromarray(layer.astype(np.uint8)).save(tmp_path / "see-through.png")
    black = grey.point(lambda level: 0 if level < 128 else level).convert("RGB")
    black.save(tmp_path / "clear.png", transparency=(0, 0, 0))
    Image.fromarray(np.asarray(grey).astype(np.uint16) * 257).save(tmp_path / "deep.png")
    images = sorted(tmp_path.iterdir())
    python = cnnedge.load(toy_bundle.root, variant="fp32")
    done = classify(toy_bundle.path("model.fp32.onnx"), *images, "--json")
    assert done.returncode == 0, done.stderr
    for line in map(json.loads, done.stdout.splitlines()):
        for answer, expected in zip(line["answers"], python(line["image"], top=5), strict=True):
            assert answer["index"] == expected.index, line["image"]
            assert abs(answer["probability"] - expected.probability) < 1e-4, line["image"]


@pytest.fixture(scope="module")
def server(app, toy_bundle):
    process = subprocess.Popen(
        ["node", app / "server.mjs", toy_bundle.path("model.fp32.onnx"), "0"],
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        yield int(re.search(r":(\d+)/", process.stdout.readline()).group(1))
    finally:
        process.terminate()
        process.wait()
        process.stdout.close()


def ask(port, method="POST", body=None, headers=None, chunked=False):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    connection.request(method, "/", body, headers or {}, encode_chunked=chunked)
    response = connection.getresponse()
    document = json.loads(response.read())
    connection.close()
    return response.status, document


def test_the_server_answers_a_posted_image(server, toy_bundle):
    files, expected = golden(toy_bundle, "fp32")
    for name, probabilities in zip(files, expected, strict=True):
        status, document = ask(server, body=toy_bundle.path(name).read_bytes())
        assert status == 200
        best = document["answers"][0]
        assert best["index"] == probabilities.argmax()
        assert abs(best["probability"] - probabilities.max()) <= TOLERANCE["fp32"]


def test_the_server_refuses_and_goes_on(server, toy_bundle):
    assert ask(server, body=b"no image")[0] == 400
    assert ask(server, body=b"")[0] == 400
    drawing = b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"><rect/></svg>'
    assert ask(server, body=drawing)[0] == 400
    assert ask(server, "GET")[0] == 405
    large = {"Content-Length": str(21 << 20)}
    assert ask(server, headers=large)[0] == 413
    image = toy_bundle.path("selftest/golden-00.png").read_bytes()
    assert ask(server, body=image)[0] == 200


def test_the_server_stops_reading_what_has_no_declared_end(server, toy_bundle):
    connection = http.client.HTTPConnection("127.0.0.1", server, timeout=30)
    connection.putrequest("POST", "/")
    connection.putheader("Transfer-Encoding", "chunked")
    connection.endheaders()
    sent = 0
    try:
        for _ in range(4096):  # a GiB, were it read
            connection.send(b"40000\r\n" + bytes(1 << 18) + b"\r\n")
            sent += 1 << 18
    except OSError:
        pass
    assert sent < 200 << 20  # beyond the limit: what the sockets' buffers hold
    connection.close()
    assert ask(server, body=toy_bundle.path("selftest/golden-00.png").read_bytes())[0] == 200
