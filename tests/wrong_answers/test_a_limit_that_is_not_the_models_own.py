"""FP32 and FP16 are held to what rounding explains in this very model, and to no more.

The network tells colours apart that differ by six levels, so its last layer is large: it moves by
7e-3 where halves are rounded, and not one answer changes.
"""

from __future__ import annotations

import json

import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from test_bundle import edit_manifest, rehash

from cnnedge.backends.keras import load_model
from cnnedge.backends.keras_rounding import moved, weights_moved
from cnnedge.bundle import open_bundle
from cnnedge.cli import main
from cnnedge.comparison import CEILING, PARITY, limit_of
from cnnedge.errors import BundleError
from cnnedge.pipeline import build, export_bundle
from cnnedge.recipe import make_recipe
from cnnedge.report.bundle import variant_rows
from cnnedge.selftest import TOLERANCE, tolerance
from cnnedge.verify import verify_bundle

pytestmark = pytest.mark.tf

SIZE, COUNT = 32, 60
COLOURS = np.array([[120, 110, 100], [126, 110, 100], [120, 116, 100]])


def pixels(seed: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    classes = np.arange(3 * COUNT) % 3
    noise = rng.integers(-40, 41, (3 * COUNT, SIZE, SIZE, 3))
    return (COLOURS[classes][:, None, None, :] + noise).astype(np.uint8), classes


@pytest.fixture(scope="module")
def alike(tmp_path_factory):
    """Three folders of colours that are nearly alike."""
    from PIL import Image

    root = tmp_path_factory.mktemp("alike") / "photos"
    for number, (image, target) in enumerate(zip(*pixels(0), strict=True)):
        (root / "abc"[target]).mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(root / "abc"[target] / f"{number:03}.png")
    return root


@pytest.fixture(scope="module")
def sharp(tmp_path_factory):
    """A network whose last layer was fitted by least squares."""
    import keras
    from keras import layers

    keras.utils.set_random_seed(2)
    image = x = keras.Input((SIZE, SIZE, 3))
    for channels in (16, 24, 32):
        layer = layers.Conv2D(channels, 3, strides=2, activation="relu")
        layer.kernel_initializer = keras.initializers.HeNormal(channels)
        layer.bias_initializer = keras.initializers.RandomUniform(0.01, 0.05, channels)
        x = layer(x)
    x = layers.GlobalAveragePooling2D()(x)
    features = keras.Model(image, x)
    model = keras.Model(image, layers.Dense(3, activation="softmax", name="head")(x))
    images, classes = pixels(0)
    found = features.predict(images / np.float32(255), verbose=0).astype(np.float64)
    mean, wanted = found.mean(0), np.eye(3)[classes] - 1 / 3
    square = (found - mean).T @ (found - mean) + 1e-6 * len(found) * np.eye(found.shape[1])
    kernel = 10 * np.linalg.solve(square, (found - mean).T @ wanted)
    model.get_layer("head").set_weights([kernel, -mean @ kernel])
    path = tmp_path_factory.mktemp("sharp") / "sharp.keras"
    model.save(path)
    return path


def recipe_of(sharp, alike):
    return make_recipe(
        model=str(sharp),
        data=str(alike),
        preprocess="unit",
        precision=("fp32", "fp16"),
        max_drop=100,
        bench_seconds=0.05,
    )


@pytest.fixture(scope="module")
def exported(sharp, alike, tmp_path_factory):
    out = tmp_path_factory.mktemp("limits") / "sharp"
    return export_bundle(recipe_of(sharp, alike), out)[0]


def statuses(found) -> dict[str, str]:
    return {v.name: v.verdict.status for v in found.variants}


def test_an_ordinary_network_passes_in_half_precision(exported, alike):
    fp32, fp16 = exported.manifest.variants
    assert fp16.accuracy.max_abs_diff > 2 * PARITY["fp16"]  # the fixed figure would refuse it
    for variant in (fp32, fp16):
        accuracy = variant.accuracy
        assert variant.verified, variant.verdict
        assert accuracy.max_abs_diff <= accuracy.limit <= CEILING * PARITY[variant.precision]
        assert tolerance(variant) == max(TOLERANCE[variant.precision], accuracy.limit)
    written = json.loads(exported.path("selftest/selftest.json").read_text())["tolerance"]
    assert written["fp16"] == fp16.accuracy.limit
    assert written["int8"] == TOLERANCE["int8"]
    found = verify_bundle(exported.root, open_source(alike))
    assert [v.comparison.limit for v in found.variants] == [v.accuracy.limit for v in (fp32, fp16)]
    assert not found.failed


def open_source(folder):
    from cnnedge.data import open_source

    return open_source(str(folder))


def test_both_figures_are_shown(exported, alike):
    fp16 = exported.manifest.variant("fp16")
    both = "{max_abs_diff:.1e} of {limit:.1e}".format(**fp16.accuracy.to_dict())
    ran = CliRunner().invoke(main, ["verify", str(exported.root), "--data", str(alike)])
    assert (ran.exit_code, both in ran.stdout) == (0, True)
    assert both in exported.path("report.html").read_text()
    assert variant_rows(exported.manifest)[2].limit == fp16.accuracy.limit


def test_a_bundle_without_a_limit_is_held_to_the_fixed_figure(exported, alike, tmp_path):
    import shutil

    old = shutil.copytree(exported.root, tmp_path / "old")
    for absurd in ("much", True, -1.0):
        edit_manifest(
            old, lambda f, a=absurd: [v["accuracy"].update(limit=a) for v in f["variants"]]
        )
        with pytest.raises(BundleError, match=r"\$\.variants\[0\]\.accuracy\.limit: expected"):
            verify_bundle(old, open_source(alike))
    for none in (None, float("nan")):
        edit_manifest(old, lambda f, a=none: [v["accuracy"].update(limit=a) for v in f["variants"]])
        found = verify_bundle(old, open_source(alike))
        assert statuses(found)["fp16"] == "failed"
        assert "fp16 may differ by 2.0e-03" in found.variants[1].verdict.reason
    edit_manifest(old, lambda f: [v["accuracy"].pop("limit") for v in f["variants"]])
    assert statuses(verify_bundle(old, open_source(alike)))["fp16"] == "failed"
    assert limit_of("fp16", 1e9) == CEILING * PARITY["fp16"]
    assert limit_of("int8", 1.0) is None


# --- real faults are still refused ---------------------------------------------------------------


def first_convolution(model):
    """Return its kernel and its bias."""
    node = next(n for n in model.graph.node if n.op_type == "Conv")
    known = {i.name: i for i in model.graph.initializer}
    return known[node.input[1]], known[node.input[2]]


def change(initializer, what) -> None:
    array = onnx.numpy_helper.to_array(initializer)
    changed = what(array.copy()).astype(array.dtype)
    initializer.CopyFrom(onnx.numpy_helper.from_array(changed, initializer.name))


def a_dropped_bias(model):
    change(first_convolution(model)[1], np.zeros_like)


def a_kernel_read_sideways(model):
    change(first_convolution(model)[0], lambda w: w.swapaxes(2, 3))


def channels_reversed(model):
    change(first_convolution(model)[0], lambda w: w[:, ::-1])


def a_wrong_mean(model):
    """As if each pixel were brighter by a level of 255."""
    kernel, bias = first_convolution(model)
    sums = onnx.numpy_helper.to_array(kernel).astype(np.float64).sum(axis=(1, 2, 3))
    change(bias, lambda b: b + sums / 255)


FAULTS = (a_dropped_bias, a_kernel_read_sideways, channels_reversed, a_wrong_mean)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_no_rounding(exported, alike, tmp_path, fault):
    import shutil

    broken = shutil.copytree(exported.root, tmp_path / "broken")
    for name in ("fp32", "fp16"):
        path = broken / f"model.{name}.onnx"
        model = onnx.load(path)
        fault(model)
        onnx.save(model, path)
        rehash(broken, path.name)
    found = verify_bundle(broken, open_source(alike))
    assert statuses(found) == {"fp32": "failed", "fp16": "failed"}


def test_a_fault_of_the_export_is_refused_at_the_export(sharp, alike, tmp_path, monkeypatch):
    """The limit owes nothing to the graph, so a wrong one does not widen it."""
    write = build.write_onnx

    def written(model, path):
        write(model, path)
        broken = onnx.load(path)
        channels_reversed(broken)
        onnx.save(broken, path)

    monkeypatch.setattr(build, "write_onnx", written)
    bundle, _ = export_bundle(recipe_of(sharp, alike), tmp_path / "out")
    assert [v.verified for v in bundle.manifest.variants] == [False, False]


# --- how it is measured ------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_values_move_by_half_a_unit_in_the_last_place(precision):
    kind = {"fp32": np.float32, "fp16": np.float16}[precision]
    magnitudes = 10.0 ** np.random.default_rng(0).uniform(-7, 4.8, 1000)
    values = np.r_[magnitudes, -magnitudes, 0.0, 1.0, 60000.0].astype(kind).astype(np.float32)
    found = moved(values.reshape(1, -1), precision, np.random.default_rng(1))[0]
    unit = np.spacing(np.abs(values).astype(kind)).astype(np.float64)
    step = found.astype(np.float64) - values
    if precision == "fp16":
        np.testing.assert_allclose(np.abs(step), unit / 2, rtol=1e-3)
    else:
        assert set(np.round(np.abs(step[values > 1e-6]) / unit[values > 1e-6], 3)) <= {
            0.0,
            0.5,
            1.0,
        }
    assert 0.4 < (step > 0).sum() / max(1, (step != 0).sum()) < 0.6


def test_the_weights_are_put_back(sharp):
    model = load_model(sharp)[0]
    before = [w.copy() for w in model.get_weights()]
    with weights_moved(model, "fp16", np.random.default_rng(0)):
        assert all((w != b).all() for w, b in zip(model.get_weights(), before, strict=True))
    with (
        pytest.raises(ZeroDivisionError),
        weights_moved(model, "fp16", np.random.default_rng(0)),
    ):
        raise ZeroDivisionError
    for now, then in zip(model.get_weights(), before, strict=True):
        np.testing.assert_array_equal(now, then)


def test_the_bundle_opens_as_before(exported):
    assert open_bundle(exported.root).manifest.schema == 1
