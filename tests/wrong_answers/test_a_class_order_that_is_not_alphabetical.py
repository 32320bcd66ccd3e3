"""A model's outputs may be in any order: the data's classes are matched by name."""

from __future__ import annotations

import codecs
import unicodedata

import numpy as np
import pytest
from click.testing import CliRunner

from cnnedge.bundle import open_bundle
from cnnedge.cli import main
from cnnedge.data import open_source
from cnnedge.data.labels import in_order, read_labels
from cnnedge.errors import DataError

CAFE, CAFE_APART = (unicodedata.normalize(form, "café") for form in ("NFC", "NFD"))


def read(tmp_path, content, known=()):
    path = tmp_path / "labels.txt"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return read_labels(path, known)


@pytest.mark.parametrize(
    "content",
    [
        "large\nmedium\nsmall",
        "large\nmedium\nsmall\n",
        "large\r\nmedium\r\nsmall\r\n\r\n",
        "large\rmedium\rsmall\r",
        "large  \n medium\t\nsmall \n \n\n",
        codecs.BOM_UTF8 + b"large\nmedium\nsmall\n",
        codecs.BOM_UTF16_LE + "large\r\nmedium\r\nsmall".encode("utf-16-le"),
        codecs.BOM_UTF16_BE + "large\nmedium\nsmall".encode("utf-16-be"),
        "0 large\n1 medium\n2 small\n",
        codecs.BOM_UTF8 + b"0 large\r\n1 medium\r\n2 small",
        "0\tlarge\n1\tmedium\n2\tsmall\n",
    ],
)
def test_labels_are_read_as_tools_write_them(tmp_path, content):
    assert read(tmp_path, content) == ("large", "medium", "small")


@pytest.mark.parametrize(
    ("content", "labels"),
    [
        (f"{CAFE_APART}\nbar", (CAFE, "bar")),
        ("0\n1\n2", ("0", "1", "2")),
        ("0 ohm\n1 ohm\n2 ohm", ("0 ohm", "1 ohm", "2 ohm")),  # no running number: all "ohm"
        ("0 large\n2 small", ("0 large", "2 small")),
        ("1 large\n2 small", ("1 large", "2 small")),
        ("0 large\nsmall", ("0 large", "small")),
        ("7 up\n0 cola", ("7 up", "0 cola")),
        ("New York\nLos Angeles", ("New York", "Los Angeles")),
        ("a\u2028b\nc\x0bd", ("a\u2028b", "c\x0bd")),  # these end no line of a file
    ],
)
def test_a_number_is_part_of_a_label_unless_all_lines_run(tmp_path, content, labels):
    assert read(tmp_path, content) == labels


def test_folders_called_by_number_keep_it(tmp_path):
    content = "0 zero\n1 one"
    assert read(tmp_path, content) == ("zero", "one")
    assert read(tmp_path, content, ("1 one", "0 zero")) == ("0 zero", "1 one")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a\nb\na\n", r"names a twice \(lines 1 and 3\)"),
        (f"{CAFE}\n{CAFE_APART}", f"names {CAFE} twice"),
        ("a \na", "names a twice"),
        ("a\n\nb\n", "line 2 of .* is blank"),
        ("\n  \n", "holds no labels"),
        (b"caf\xe9\n", "no text in UTF-8"),
        (codecs.BOM_UTF16_LE + b"a", "no text in UTF-8"),
    ],
)
def test_what_is_no_list_of_labels_is_refused(tmp_path, content, message):
    with pytest.raises(DataError, match=message):
        read(tmp_path, content)


def test_a_missing_file_of_labels_is_one_line(tmp_path):
    with pytest.raises(DataError, match="cannot read the labels .*: No such file"):
        read_labels(tmp_path / "none.txt")


def test_targets_follow_their_names(photos):
    data = open_source(str(photos(("large", "medium", CAFE_APART))))
    assert data.labels == (CAFE, "large", "medium")
    for order in (("medium", CAFE, "large"), ("large", CAFE_APART, "medium")):
        mapped = in_order(data, order)
        assert mapped.labels == order
        for before, after in (
            (data.train, mapped.train),
            (data.calibration, mapped.calibration),
            (data.test, mapped.test),
        ):
            assert list(after.items) == list(before.items)
            for item, target in zip(after.items, after.targets, strict=True):
                folder = unicodedata.normalize("NFC", item.parent.name)
                assert folder == unicodedata.normalize("NFC", order[target])
    assert in_order(data, data.labels).test.digest() == data.test.digest()
    for others in (("large", CAFE), ("large", CAFE, "small"), ("large", CAFE, "large")):
        assert in_order(data, others) is None


@pytest.fixture(scope="module")
def by_colour(tmp_path_factory):
    """Photos red, green and blue, and a model of outputs (red, green, blue) that is always right.

    The folders in alphabetical order are blue, green, red.
    """
    import keras
    from keras import layers
    from PIL import Image

    root = tmp_path_factory.mktemp("colours")
    rng = np.random.default_rng(0)
    for place, name in enumerate(("red", "green", "blue")):
        (root / "photos" / name).mkdir(parents=True)
        for number in range(10):
            pixels = rng.integers(0, 60, (16, 16, 3))
            pixels[..., place] += 150
            Image.fromarray(pixels.astype(np.uint8)).save(root / "photos" / name / f"{number}.png")
    model = keras.Sequential(
        [
            keras.Input((16, 16, 3)),
            layers.Conv2D(4, 3, strides=2, activation="relu", name="seen"),
            layers.GlobalAveragePooling2D(),
            layers.Dense(3, activation="softmax", name="said"),
        ]
    )
    kernel = np.zeros((3, 3, 3, 4), np.float32)
    kernel[1, 1, range(3), range(3)] = 1
    model.get_layer("seen").set_weights([kernel, np.zeros(4, np.float32)])
    model.get_layer("said").set_weights(
        [np.eye(4, 3, dtype=np.float32) * 8, np.zeros(3, np.float32)]
    )
    model.save(root / "colours.keras")
    (root / "order.txt").write_text("0 red\r\n1 green\r\n2 blue\r\n")
    return root


@pytest.mark.tf
def test_a_model_with_its_own_order_is_exported_verified_and_measured(by_colour, tmp_path):
    photos, bundle = str(by_colour / "photos"), tmp_path / "colours"
    given = ["--labels", str(by_colour / "order.txt"), "--data", photos, "--preprocess", "unit"]
    arguments = [str(by_colour / "colours.keras"), *given, "--precision", "fp32", "-o", str(bundle)]
    done = CliRunner().invoke(main, ["export", *arguments])
    assert done.exit_code == 0, done.stderr
    manifest = open_bundle(bundle).manifest
    assert manifest.labels == ("red", "green", "blue")
    assert (bundle / "labels.txt").read_text().split() == ["red", "green", "blue"]
    assert manifest.reference.top1 == 1.0
    assert manifest.variants[0].accuracy.top1 == 1.0
    done = CliRunner().invoke(main, ["verify", str(bundle), "--data", photos, "--json"])
    assert done.exit_code == 0, done.stderr
    assert '"top1": 1.0' in done.stdout
    assert "as recorded at export" in done.stdout  # the same images and classes as there
    red = str(by_colour / "photos" / "red" / "0.png")
    done = CliRunner().invoke(main, ["predict", str(bundle), red, "--top", "1"])
    assert f"{red}: red" in done.stdout


@pytest.mark.tf
def test_labels_of_other_classes_are_refused_and_the_difference_is_named(by_colour, tmp_path):
    order = tmp_path / "order.txt"
    order.write_text("red\ngreen\nviolet\n")
    given = ["--labels", str(order), "--data", str(by_colour / "photos"), "--preprocess", "unit"]
    model = str(by_colour / "colours.keras")
    done = CliRunner().invoke(main, ["export", model, *given, "-o", str(tmp_path / "x")])
    assert done.exit_code == 1
    assert "only in the data: blue; only in the model: violet" in done.stderr


def test_a_file_that_knows_its_order_is_not_overruled(toy_file, tmp_path):
    """Relabelled so, every answer would bear a wrong name, and every gate would pass."""
    order = tmp_path / "order.txt"
    order.write_text("\n".join("9876543210"))
    given = ["--labels", str(order), "-o", str(tmp_path / "x")]
    done = CliRunner().invoke(main, ["export", str(toy_file), *given])
    assert done.exit_code == 1
    assert "in another order" in done.stderr
