import re
import zipfile
from pathlib import Path

import h5py
import keras
import numpy as np
import pytest

from cnnedge.errors import ModelError
from cnnedge.files import sha256
from cnnedge.models import build
from cnnedge.models.pretrained import init_from
from cnnedge.models.vgg import vgg

pytestmark = pytest.mark.tf

# The VGG-16 layout, two or three convolutions a block, with kernels enough for a test.
CFG = [2, 2, "M", 3, 3, "M", 4, 4, 4, "M", 5, 5, 5, "M", 5, 5, 5, "M"]
NAMES = [f"conv{b}_{i}" for b, n in enumerate((2, 2, 3, 3, 3), 1) for i in range(1, n + 1)]


def toy(cfg=CFG, channels=3, **options):
    return vgg("vgg16", 32, 32, 2, channels, cfg=cfg, fc_units=4, **options)


def keras_like(cfg=CFG):
    """A model with the names that keras.applications gives, without the dense layers."""
    block, convolution = 1, 0
    stack = [keras.Input((32, 32, 3))]
    for token in cfg:
        if token == "M":
            stack.append(keras.layers.MaxPooling2D(2, name=f"block{block}_pool"))
            block, convolution = block + 1, 0
        else:
            convolution += 1
            name = f"block{block}_conv{convolution}"
            layer = keras.layers.Conv2D(token, 3, padding="same", activation="relu", name=name)
            layer.bias_initializer = keras.initializers.RandomNormal()
            stack.append(layer)
    return keras.Sequential(stack)


def write_legacy(model, path):
    """Write the format of Keras' published files: `layer_names`, `weight_names`, flat datasets."""
    with h5py.File(path, "w") as file:
        file.attrs["layer_names"] = [layer.name.encode() for layer in model.layers]
        for layer in model.layers:
            group = file.create_group(layer.name)
            names = [f"{layer.name}_{s}_1:0".encode() for s in ("W", "b")[: len(layer.weights)]]
            group.attrs["weight_names"] = names
            for name, weight in zip(names, layer.weights, strict=True):
                group[name.decode()] = weight.numpy()
    return path


@pytest.fixture(scope="module")
def published():
    return keras_like()


@pytest.fixture(scope="module")
def files(published, tmp_path_factory):
    folder = tmp_path_factory.mktemp("weights")
    published.save(folder / "whole.h5")
    published.save(folder / "whole.keras")
    published.save_weights(folder / "three.weights.h5")
    write_legacy(published, folder / "legacy.h5")
    return folder


@pytest.mark.parametrize("name", ["legacy.h5", "whole.h5", "three.weights.h5", "whole.keras"])
def test_every_format_starts_the_convolutions_and_nothing_else(name, files, published):
    model = toy(pool="sort")
    dense = model.get_layer("fc1").kernel.numpy()
    report = init_from(model, str(files / name))

    for ours, theirs in zip(NAMES, [la for la in published.layers if la.weights], strict=True):
        layer = model.get_layer(ours)
        np.testing.assert_array_equal(layer.kernel, theirs.kernel)
        np.testing.assert_array_equal(layer.bias, theirs.bias)
    np.testing.assert_array_equal(model.get_layer("fc1").kernel, dense)
    assert report.layers == tuple(NAMES)
    assert report.untouched == (*(f"pool{i}" for i in range(1, 6)), "fc1", "fc2", "fc3")
    assert report.normalization == "caffe"
    assert report.source == str(files / name)
    assert report.sha256 == sha256(files / name)


def test_the_initialised_network_computes_what_the_published_one_does(files, published):
    model = toy()
    init_from(model, str(files / "legacy.h5"))
    features = keras.Model(model.input, model.get_layer("pool5").output)
    images = np.random.default_rng(0).random((2, 32, 32, 3), np.float32)

    np.testing.assert_allclose(features(images), published(images), rtol=1e-6)


@pytest.mark.parametrize(("note", "expected"), [(None, "unit"), ('{"normalization": "tf"}', "tf")])
def test_a_file_of_our_own_carries_its_own_normalization(note, expected, tmp_path):
    path = tmp_path / "mine.keras"
    toy().save(path)
    if note:
        with zipfile.ZipFile(path, "a") as archive:
            archive.writestr("cnnedge.json", note)

    assert init_from(toy(), str(path)).normalization == expected


def test_imagenet_is_the_file_that_keras_publishes(files, monkeypatch):
    asked = {}

    def get_file(name, origin, **options):
        asked.update(options, name=name, origin=origin)
        print("Downloading")
        return str(files / "legacy.h5")

    monkeypatch.setattr(keras.utils, "get_file", get_file)
    report = init_from(toy(), "imagenet")

    from keras.src.applications import vgg16

    assert asked["origin"] == vgg16.WEIGHTS_PATH_NO_TOP
    assert asked["name"] == Path(vgg16.WEIGHTS_PATH_NO_TOP).name
    source = Path(vgg16.__file__).read_text()
    assert f'file_hash="{asked["file_hash"]}"' in source
    assert (report.source, report.normalization) == ("imagenet", "caffe")


def test_fetching_leaves_the_standard_output_alone(files, monkeypatch, capsys):
    monkeypatch.setattr(
        keras.utils, "get_file", lambda *a, **k: print("Downloading") or str(files / "legacy.h5")
    )
    init_from(toy(), "imagenet")

    assert capsys.readouterr().out == ""


def test_without_a_network_the_error_says_what_to_do(monkeypatch):
    def get_file(*args, **options):
        raise Exception("URL fetch failure on https://x: None -- [Errno -2] unknown\nmore")

    monkeypatch.setattr(keras.utils, "get_file", get_file)
    with pytest.raises(ModelError) as error:
        init_from(toy(), "imagenet")

    assert re.search(
        r"cannot fetch .* of vgg16 \(URL fetch.*; fetch vgg16_.*_notop.h5", str(error.value)
    )
    assert "\n" not in str(error.value)


def test_imagenet_weights_exist_for_two_networks_only():
    with pytest.raises(ModelError, match=r"no ImageNet weights for vgg11; .* vgg16 and vgg19"):
        init_from(build("vgg11", height=32, width=32, fc_units=8), "imagenet")


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (
            lambda: build("alexnet_v1", height=64, width=64),
            "alexnet_v1 is not a VGG .*conv1, conv2",
        ),
        (lambda: toy(channels=1), r"kernel of conv1_1 is \(3, 3, 3, 2\) in .* and \(3, 3, 1, 2\)"),
        (lambda: toy([*CFG[:-2], 6, "M"]), r"kernel of conv5_3 is \(3, 3, 5, 5\)"),
        (lambda: toy([*CFG[:-1], 5, "M"]), "legacy.h5 lacks conv5_4 of vgg16"),
        (lambda: toy([*CFG[:-2], "M"]), "legacy.h5 holds conv5_3, which vgg16 lacks"),
    ],
)
def test_a_model_that_the_file_does_not_fit_is_left_as_it_was(model, message, files):
    model = model()
    before = model.get_weights()
    with pytest.raises(ModelError, match=message):
        init_from(model, str(files / "legacy.h5"))

    assert all(np.array_equal(a, b) for a, b in zip(before, model.get_weights(), strict=True))


def damaged(kind, files, folder):
    path = folder / "damaged.h5"
    if kind == "absent":
        return path
    if kind == "text":
        path.write_text("not weights")
    elif kind == "empty":
        path.touch()
    elif kind.startswith("half of "):
        whole = (files / kind.removeprefix("half of ")).read_bytes()
        path.write_bytes(whole[: len(whole) // 2])
    else:
        write_legacy(keras_like(), path)
        with h5py.File(path, "a") as file:
            if kind == "no bias":
                file["block2_conv1"].attrs["weight_names"] = [b"block2_conv1_W_1:0"]
            elif kind == "nan":
                file["block2_conv1/block2_conv1_b_1:0"][1] = np.nan
            elif kind == "no dataset":
                del file["block2_conv1/block2_conv1_b_1:0"]
            elif kind == "other network":
                file.attrs["layer_names"] = [b"block5_conv1", b"block5_pool"]
    return path


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("absent", "there is no weights file"),
        ("text", "neither HDF5 nor a .keras file"),
        ("empty", "neither HDF5 nor a .keras file"),
        ("half of legacy.h5", "not a whole weights file"),
        ("half of three.weights.h5", "not a whole weights file"),
        ("half of whole.keras", "not a whole weights file"),
        ("no bias", "bias of conv2_1 is absent"),
        ("nan", "has values that are not finite"),
        ("no dataset", "not a whole weights file"),
        ("other network", "lacks conv1_1, .* holds conv5_1"),
    ],
)
def test_a_damaged_file_is_refused_by_name(kind, message, files, tmp_path):
    with pytest.raises(ModelError, match=f"damaged.h5.*{message}|{message}.*damaged.h5"):
        init_from(toy(), str(damaged(kind, files, tmp_path)))
