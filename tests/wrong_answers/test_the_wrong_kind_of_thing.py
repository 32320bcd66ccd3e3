"""Every command that is given the wrong kind of thing says in one short line what it got."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from cnnedge.bundle import open_bundle
from cnnedge.cli import main
from cnnedge.errors import CnnEdgeError, first_line, one_line
from cnnedge.package.archive import write_archive

LONGEST = 300  # characters of a line


@pytest.fixture(scope="module")
def things(toy_bundle, toy_file, tmp_path_factory) -> dict[str, Path]:
    """One of each kind, by its name in the tables below."""
    from PIL import Image

    root = tmp_path_factory.mktemp("things")
    found = {"bundle": root / "bundle", "zip": root / "bundle.zip", "keras": root / "own.keras"}
    shutil.copytree(toy_bundle.root, found["bundle"])
    write_archive(open_bundle(toy_bundle.root), found["zip"])
    shutil.copy(toy_file, found["keras"])
    pixels = np.random.default_rng(0).integers(0, 256, (40, 40, 3), np.uint8)
    picture = Image.fromarray(pixels)
    for name in ("image.png", "image.keras", "image.onnx", "image.zip", "image.toml", "image.pem"):
        picture.save(root / name, "PNG")
        found[name] = root / name
    shutil.copy(toy_bundle.path("model.fp32.onnx"), root / "model.onnx")
    texts = {
        "recipe.toml": 'model = "vgg16"\n',
        "wrong.toml": "model = [1]\nx = 2\n",
        "damaged.toml": "model = \n",
        "other.json": "{}",
        "list.json": "[1]",
        "text.txt": "a\nb\n",
        "text.keras": "no model",
        "text.onnx": "no model",
        "cut.zip": "PK\x03\x04 and nothing more",
    }
    for name, text in texts.items():
        (root / name).write_text(text)
    for name in ("empty", "empty.keras", "empty.onnx", "empty.png", "empty.toml", "empty.zip"):
        (root / name).touch()
    (root / "old.h5").write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(200))
    (root / "old.keras").write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(200))
    (root / "folder").mkdir()
    (root / "folder.keras").mkdir()
    (root / "folder.onnx").mkdir()
    (root / "folder.toml").mkdir()
    (root / "folder.json").mkdir()
    (root / "saved").mkdir()
    (root / "saved" / "saved_model.pb").touch()
    found |= {path.name: path for path in root.iterdir() if path not in found.values()}
    for name in ("missing", "missing.keras", "missing.onnx", "missing.toml", "missing.json"):
        found[name] = root / name
    found["bell\x07\x1b[31m"] = root / "bell\x07\x1b[31m"
    found["long"] = root / ("long " * 40)
    return found


# What a command is given that loads a model or a bundle each time before it looks.
FEW = ("missing", "empty", "folder", "bundle", "zip", "keras", "model.onnx", "image.png", "old.h5")
FEW += ("text.txt", "bell\x07\x1b[31m", "long")
# The command; THING stands where the thing goes, and then come the kinds that it takes.
BUNDLES = {"bundle", "zip"}
COMMANDS = [
    ("inspect THING", {"keras", "model.onnx"}),
    ("train THING -o OUT.keras", set()),
    ("train alexnet_v1 --data THING -o OUT.keras", set()),
    ("train alexnet_v1 --init THING --data digits -o OUT.keras", set()),
    ("export THING -o OUT", {"keras", "recipe.toml"}),
    ("export KERAS --data THING -o OUT", set()),
    ("export KERAS --labels THING -o OUT", set()),
    ("compress THING -o OUT.keras --macs 0.5", {"keras"}),
    ("engine THING --runtime tensorrt --print-trtexec", BUNDLES),
    ("engine THING --runtime tensorrt", BUNDLES),
    ("verify THING", BUNDLES),
    ("verify BUNDLE --data THING", set()),
    ("verify BUNDLE --reference THING", {"keras"}),
    ("verify BUNDLE --signature THING", set()),
    ("bench THING", BUNDLES),
    ("bench BUNDLE --reference THING", {"keras"}),
    ("bench BUNDLE --data THING", set()),
    ("bench BUNDLE --image THING", {"image.png", "image.keras", "image.onnx", "image.zip"}),
    ("bench --compare THING THING", set()),
    ("predict THING IMAGE", {*BUNDLES, "model.onnx"}),
    ("predict BUNDLE THING", set()),
    ("package THING --zip OUT.zip", BUNDLES),
    ("package THING --onnx OUT.onnx", BUNDLES),
    ("package THING --triton OUT", BUNDLES),
    ("sign THING --key MISSING", set()),
    ("sign BUNDLE --key THING", set()),
    ("demo THING --out OUT", BUNDLES),
]


@pytest.mark.parametrize(("command", "takes"), COMMANDS, ids=[c for c, _ in COMMANDS])
def test_one_short_line_says_what_it_got(things, tmp_path, command, takes):
    wrong = []
    images = {name for name in things if name.startswith("image.")}
    if command in ("predict BUNDLE THING", "bench BUNDLE --image THING"):
        takes = images  # an image is one whatever it is called
    slow = any(word in command for word in ("KERAS", "BUNDLE", "--init", "train THING"))
    for name in FEW if slow else things:
        if name in takes:
            continue
        thing = things[name]
        known = {
            "THING": str(thing),
            "BUNDLE": str(things["bundle"]),
            "KERAS": str(things["keras"]),
            "IMAGE": str(things["image.png"]),
            "MISSING": str(things["missing"]),
        }
        words = [
            known.get(word, word.replace("OUT", str(tmp_path / "out"))) for word in command.split()
        ]
        ran = CliRunner().invoke(main, words)
        problem = _problem(ran)
        if problem is not None:
            wrong.append(f"{name}: {problem}")
    assert not wrong, "\n".join(wrong)


def _problem(ran) -> str | None:
    """Return what is wrong with how a command failed, or None."""
    if ran.exception is not None and not isinstance(ran.exception, SystemExit):
        return f"{type(ran.exception).__name__}: {str(ran.exception)[:200]}"
    if ran.exit_code not in (1, 2, 3):
        return f"exit code {ran.exit_code}: {ran.output[:200]!r}"
    lines = [line for line in ran.stderr.split("\n") if line]
    last = lines[-1] if lines else ""
    if ran.exit_code != 2 and (len(lines) != 1 or not last.startswith("error: ")):
        return f"{len(lines)} lines: {ran.stderr[:300]!r}"
    if len(last) > LONGEST:
        return f"{len(last)} characters: {last}"
    if not last.isprintable():
        return f"commands the terminal: {last!r}"
    return None


def error_of(*words: object) -> str:
    ran = CliRunner().invoke(main, [str(word) for word in words])
    assert ran.exit_code == 1, ran.output
    (line,) = ran.stderr.splitlines()
    return line


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("inspect", "bundle"), "is a bundle, and no model file; give one of its models"),
        (("inspect", "saved"), "is a TensorFlow SavedModel"),
        (("export", "old.h5"), "is an HDF5 file, Keras' old format, and no .keras file; convert"),
        (("export", "old.keras"), "it is an HDF5 file, Keras' old format"),
        (("export", "bundle"), "is a bundle, and no .keras file; it is exported already"),
        (("export", "model.onnx"), "is an ONNX model, and no .keras file"),
        (("export", "folder.keras"), "it is a folder"),
        (("predict", "keras", "image.png"), "is a Keras model, neither a bundle's folder nor"),
        (("predict", "bundle", "folder"), "is a folder, and no image file; name its files"),
    ],
    ids=lambda words: " ".join(words) if isinstance(words, tuple) else None,
)
def test_the_line_says_what_to_do(things, words, says):
    command, *names = words
    assert says in error_of(command, *(things[name] for name in names))


@pytest.mark.parametrize(
    ("option", "value", "says"),
    [
        ("--precision", "fp32,fp17", "--precision 'fp17'"),
        ("--engine", "cuda", "--engine 'cuda'"),
        ("--seed", "-1", "--seed -1"),
    ],
)
def test_an_option_is_called_an_option(things, option, value, says):
    line = error_of("export", things["keras"], option, value)
    assert line.startswith(f"error: {says}")
    assert "recipe" not in line


def test_a_recipes_own_field_is_called_so(things, tmp_path):
    (tmp_path / "r.toml").write_text('model = "vgg16"\nprecision = ["fp17"]\n')
    assert "recipe: precision[0] 'fp17': expected one of fp16, fp32" in error_of(
        "export", tmp_path / "r.toml"
    )


# --- what other libraries say ---------------------------------------------------------------------


@pytest.mark.tf
def test_the_class_that_keras_does_not_know_is_named(tmp_path):
    import keras

    class Twice(keras.layers.Layer):
        def call(self, x):
            return 2 * x

    image = keras.Input((8, 8, 3))
    x = keras.layers.Flatten()(Twice(name="doubled")(image))
    path = tmp_path / "m.keras"
    keras.Model(image, keras.layers.Dense(3, activation="softmax")(x)).save(path)
    for command in ("export", "inspect", "compress"):
        line = error_of(command, path)
        assert "does not know the class 'Twice'" in line
        assert "register_keras_serializable" in line


def test_a_whole_configuration_is_not_printed(tmp_path, things):
    """As Keras 3 answers to a file of Keras 2: its configuration, 117,000 characters in a line."""
    import zipfile

    layer = {"module": "keras.layers", "class_name": "Dense", "config": {"unknown": "x" * 100_000}}
    config = {"module": "keras", "class_name": "Sequential", "config": {"layers": [layer]}}
    path = tmp_path / "m.keras"
    with zipfile.ZipFile(things["keras"]) as source, zipfile.ZipFile(path, "w") as out:
        for entry in source.namelist():
            is_config = entry == "config.json"
            out.writestr(entry, json.dumps(config) if is_config else source.read(entry))
    line = error_of("inspect", path)
    assert len(line) <= LONGEST
    assert line.startswith("error: Keras cannot load ")
    assert f"{path.name}: " in line


def test_long_paths_are_shortened_before_what_is_said_of_them():
    """The middle was cut, and with it which classes differ, wherever the data lay deep."""
    deep = "/data/of/a/customer/" + "a_project_with_a_long_name/" * 5
    error = CnnEdgeError(
        f"{deep}photos/val has classes that {deep}photos/train lacks: c; it lacks: b",
        fix=f"see {deep}photos",
    )
    assert str(error) == (
        "…/photos/val has classes that …/photos/train lacks: c; it lacks: b; "
        "see …/a_project_with_a_long_name/photos"
    )
    short = CnnEdgeError("/data/photos/val lacks: c", fix="see /data/photos/train")
    assert str(short) == "/data/photos/val lacks: c; see /data/photos/train"


def test_a_long_text_keeps_its_beginning_its_end_and_what_to_do():
    error = CnnEdgeError("photos/a.png " + "z" * 5000 + " is no image", fix="give one\nor two")
    text = str(error)
    assert len(text) <= LONGEST - len("error: ")
    assert text.startswith("photos/a.png zzz")
    assert text.endswith("zz is no image; give one or two")
    assert len(one_line("y" * 999, 60)) <= 60
    assert len(first_line(ValueError("\n \nq" + "y" * 9999))) < 200
    assert first_line(ValueError("")) == "ValueError('')"
