"""The JavaScript that browser and Node share, held against Pillow and onnx: run by Node."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cnnedge.image import ImageContract, fit

LIB = Path(__file__).parents[2] / "cnnedge" / "demo" / "page" / "lib"
NODE = shutil.which("node")
pytestmark = [
    pytest.mark.system,
    pytest.mark.skipif(NODE is None, reason="no Node on this machine"),
]

SHAPES = [(1, 1), (2, 3), (8, 8), (31, 57), (224, 224), (225, 223), (480, 640), (701, 333)]
SHAPES += [(300, 40), (40, 300), (264, 244), (265, 244)]  # about where the passes change places
CONTRACTS = [
    ImageContract(224, 224),
    ImageContract(32, 32),
    ImageContract(48, 64, 3, "crop"),
    ImageContract(64, 48, 3, "letterbox"),
    ImageContract(33, 65, 1, "letterbox"),
    ImageContract(40, 40, 1, "crop"),
    ImageContract(29, 31, 1),
]
FIT = """
import { readFileSync, writeFileSync } from "node:fs";
import { toTensor } from "%s/image.mjs";
for (const job of JSON.parse(readFileSync(process.argv[1]))) {
  const data = readFileSync(job.file);
  writeFileSync(job.out, toTensor({ data, ...job.picture }, job.contract));
}
"""


def node(code, *arguments):
    return subprocess.run(
        [NODE, "--input-type=module", "-e", code, "--", *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture(scope="module")
def fitted(tmp_path_factory):
    """Return every picture with every contract, as Python and as JavaScript fit it."""
    folder = tmp_path_factory.mktemp("fit")
    random = np.random.default_rng(7)
    jobs, expected = [], []
    for height, width in SHAPES:
        pixels = random.integers(0, 256, (height, width, 4), np.uint8)
        pixels[: height // 2, : width // 2, :3] = random.choice([0, 255])  # edges, where it rounds
        pixels[..., 3] = 255
        file = folder / f"{height}x{width}"
        file.write_bytes(pixels.tobytes())
        for k, contract in enumerate(CONTRACTS):
            picture = {"width": width, "height": height}
            out = folder / f"{height}x{width}.{k}"
            jobs.append(
                {
                    "file": str(file),
                    "out": str(out),
                    "picture": picture,
                    "contract": contract.to_dict(),
                }
            )
            expected.append(fit(Image.fromarray(pixels[..., :3]), contract))
    listed = folder / "jobs.json"
    listed.write_text(json.dumps(jobs))
    done = node(FIT % LIB.as_uri(), listed)
    assert done.returncode == 0, done.stderr
    return [
        (job, tensor, np.frombuffer(Path(job["out"]).read_bytes(), np.uint8))
        for job, tensor in zip(jobs, expected, strict=True)
    ]


def test_every_resize_is_pillows_to_the_bit(fitted):
    assert len(fitted) == len(SHAPES) * len(CONTRACTS)
    for job, expected, found in fitted:
        assert np.array_equal(found, expected.reshape(-1)), (job["picture"], job["contract"])


def test_one_and_three_channels_are_taken_too(tmp_path):
    random = np.random.default_rng(3)
    jobs, expected = [], []
    for channels in (1, 3):
        shape = (37, 53) if channels == 1 else (37, 53, 3)
        pixels = random.integers(0, 256, shape, np.uint8)
        (tmp_path / f"{channels}").write_bytes(pixels.tobytes())
        for contract in (ImageContract(16, 16), ImageContract(16, 16, 1)):
            out = str(tmp_path / f"{channels}.{contract.channels}")
            picture = {"width": 53, "height": 37, "channels": channels}
            jobs.append({"file": str(tmp_path / f"{channels}"), "out": out, "picture": picture})
            jobs[-1]["contract"] = contract.to_dict()
            expected.append(fit(Image.fromarray(pixels).convert("RGB"), contract))
    (tmp_path / "jobs.json").write_text(json.dumps(jobs))
    done = node(FIT % LIB.as_uri(), tmp_path / "jobs.json")
    assert done.returncode == 0, done.stderr
    for job, tensor in zip(jobs, expected, strict=True):
        assert Path(job["out"]).read_bytes() == tensor.tobytes(), job


READ = """
import { readFileSync } from "node:fs";
import { readMetadata } from "%s/metadata.mjs";
try {
  console.log(JSON.stringify(readMetadata(readFileSync(process.argv[1]))));
} catch (error) { console.log(JSON.stringify({ error: error.message })); }
"""


def read_by_node(path):
    return json.loads(node(READ % LIB.as_uri(), path).stdout)


def test_labels_and_contract_come_out_of_the_file(toy_bundle):
    for variant in toy_bundle.manifest.variants:
        found = read_by_node(toy_bundle.path(variant.file))
        assert found["labels"] == list(toy_bundle.manifest.labels)
        assert ImageContract.from_dict(found["image"]) == toy_bundle.manifest.image
        assert found["name"] == "toy"


def test_labels_of_any_script_survive(toy_bundle, tmp_path):
    import onnx

    model = onnx.load(toy_bundle.path("model.fp32.onnx"))
    labels = ["straße", "猫", "a\nb", "", '"'] * 2
    for entry in model.metadata_props:
        if entry.key == "cnnedge.labels":
            entry.value = json.dumps(labels, ensure_ascii=False)
    onnx.save(model, tmp_path / "m.onnx")
    assert read_by_node(tmp_path / "m.onnx")["labels"] == labels


@pytest.mark.parametrize(
    "contract", [{"resize": "tile"}, {"channels": 4}, {"width": 0}, {"height": "224"}]
)
def test_a_contract_of_another_kind_is_refused(toy_bundle, tmp_path, contract):
    import onnx

    model = onnx.load(toy_bundle.path("model.fp32.onnx"))
    for entry in model.metadata_props:
        if entry.key == "cnnedge.image":
            entry.value = json.dumps(json.loads(entry.value) | contract)
    onnx.save(model, tmp_path / "m.onnx")
    assert "contract cannot be read" in read_by_node(tmp_path / "m.onnx")["error"]


def test_other_files_are_refused(toy_bundle, tmp_path):
    import onnx

    whole = toy_bundle.path("model.int8.onnx").read_bytes()
    model = onnx.load(toy_bundle.path("model.fp32.onnx"))
    del model.metadata_props[:]
    files = {
        "foreign": (model.SerializeToString(), "no model that cnnedge exported"),
        "empty": (b"", "no model that cnnedge exported"),
        "cut": (whole[: len(whole) // 2], "no whole ONNX file"),
        "image": (b"\x89PNG\r\n\x1a\n" + bytes(64), "no whole ONNX file"),
    }
    for name, (content, message) in files.items():
        (tmp_path / name).write_bytes(content)
        assert message in read_by_node(tmp_path / name)["error"], name
