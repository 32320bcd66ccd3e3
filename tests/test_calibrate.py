"""Calibration: histograms that depend on the values alone, ranges by four methods, bad input."""

from __future__ import annotations

import tracemalloc
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_export import export, images

from cnnedge.data.split import Split, refuse_overlap
from cnnedge.errors import CnnEdgeError, DataError, ModelError
from cnnedge.image import NORMALIZATIONS, normalize, value_range
from cnnedge.quantize import CPU, METHODS, TRT, calibrate, choose_ranges, convergence, make_plan
from cnnedge.quantize.calibrate import Convergence, enough_images
from cnnedge.quantize.histogram import SIDE, Histogram
from cnnedge.quantize.qdq import activation_scale
from cnnedge.quantize.threshold import PERCENTILE, entropy, minmax, mse, percentile

pytestmark = pytest.mark.tf

# Batches of very different magnitude, so that histograms have to widen on their way.
values = st.builds(
    lambda seed, size, scale, shift: (
        scale * np.random.default_rng(seed).normal(loc=shift, size=size)
    ).astype(np.float32),
    st.integers(0, 2**32 - 1),
    st.integers(1, 200),
    st.sampled_from([0.0, 1e-3, 1.0, 1.7, 50.0, 1e4]),
    st.sampled_from([-3.0, 0.0, 3.0]),
)


def histogram_of(*batches):
    found = Histogram.empty()
    for batch in batches:
        batch = np.asarray(batch, np.float32)
        found = found.add(batch, float(batch.min()), float(batch.max()))
    return found


def same(one, other):
    return np.array_equal(one.counts, other.counts) and (one.width, one.low, one.high) == (
        other.width,
        other.low,
        other.high,
    )


# --- histograms --------------------------------------------------------------------------------


@given(st.lists(values, min_size=2, max_size=5), st.randoms(use_true_random=False))
@settings(deadline=None, max_examples=60)
def test_neither_order_nor_batches_matter(batches, random):
    shuffled = list(batches)
    random.shuffle(shuffled)
    assert same(histogram_of(*batches), histogram_of(*shuffled))
    assert same(histogram_of(*batches), histogram_of(np.concatenate(batches)))


@given(st.lists(values, min_size=1, max_size=4))
@settings(deadline=None, max_examples=60)
def test_every_value_is_in_its_bin(batches):
    found, everything = histogram_of(*batches), np.concatenate(batches)
    assert found.counts.sum() == everything.size
    assert (found.low, found.high) == (everything.min(), everything.max())
    if found.width:
        largest = np.abs(everything).max()
        assert SIDE / 2 * found.width <= largest <= SIDE * found.width  # never coarser than half
        lower = (np.arange(2 * SIDE) - SIDE) * found.width
        for value in everything[:20]:
            below = (everything < value).sum()
            first = np.searchsorted(lower, value, side="right") - 1
            assert found.counts[:first].sum() <= below <= found.counts[: first + 1].sum()


def test_widening_merges_neighbours():
    one, other = histogram_of([0.3, -0.7], [5.0], [-90.0]), histogram_of([0.3, -0.7, 5.0, -90.0])
    assert same(one, other)
    assert one.width > histogram_of([0.3, -0.7]).width
    assert not same(one, histogram_of([0.3, -0.7, 5.0]))


def test_memory_does_not_grow_with_what_was_seen():
    rng = np.random.default_rng(0)

    def peak(batches):
        found = Histogram.empty()
        tracemalloc.start()
        for _ in range(batches):
            batch = rng.normal(size=1000).astype(np.float32)
            found = found.add(batch, float(batch.min()), float(batch.max()))
        high = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return high

    assert peak(400) < 1.5 * peak(20)


def test_magnitudes_fold_both_sides():
    found = histogram_of([-1.0, -0.5, 0.25, 1.0])
    assert found.magnitudes.sum() == 4
    assert found.magnitudes[-1] == 2  # both ends


# --- methods -----------------------------------------------------------------------------------


def rectified(n=200_000, seed=0):
    return np.maximum(np.random.default_rng(seed).normal(size=n), 0).astype(np.float32)


def quantization_error(sample, limits, target):
    scale = activation_scale(*limits, target)
    ends = np.iinfo(scale.dtype)
    levels = np.clip(np.rint(sample / scale.scale) + scale.zero_point, ends.min, ends.max)
    return float(np.mean(((levels - scale.zero_point) * scale.scale - sample) ** 2))


def test_minmax_keeps_everything():
    assert minmax(histogram_of([-3.0, 0.0, 7.0]), False) == (-3.0, 7.0)


@pytest.mark.parametrize("symmetric", [False, True])
def test_percentile_agrees_with_numpy(symmetric):
    sample = np.random.default_rng(1).normal(size=300_000).astype(np.float32)
    found = histogram_of(sample)
    low, high = percentile(found, symmetric)
    if symmetric:
        expected = np.percentile(np.abs(sample), PERCENTILE)
        assert -low == high
    else:
        expected = np.percentile(sample, 100 - (100 - PERCENTILE) / 2)
        below = np.percentile(sample, (100 - PERCENTILE) / 2)
        assert low == pytest.approx(below, abs=2 * found.width)
    assert high == pytest.approx(expected, abs=2 * found.width)


@pytest.mark.parametrize("target", [CPU, TRT], ids=["cpu", "trt"])
@pytest.mark.parametrize("kind", ["rectified", "normal", "outlier", "shifted"])
def test_mse_is_the_least_squared_error(target, kind):
    """Against a search over the real quantizer and the real values, not over the histogram."""
    rng = np.random.default_rng(2)
    sample = {
        "rectified": rectified(),
        "normal": rng.normal(size=200_000),
        "outlier": np.append(rectified(), 100.0),
        "shifted": rng.normal(loc=-2, size=200_000),
    }[kind].astype(np.float32)
    limits = mse(histogram_of(sample), target.symmetric)
    found = quantization_error(sample, limits, target)
    low, high = float(min(sample.min(), 0)), float(max(sample.max(), 0))
    best = min(
        quantization_error(sample, (low * a, high * b), target)
        for a in np.geomspace(1, 1 / 64, 25)
        for b in ([a] if target.symmetric else np.geomspace(1, 1 / 64, 25))
    )
    assert found <= 1.05 * best


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize(
    "method", ["percentile", "entropy"]
)  # one in 200,000 is worth keeping to mse
def test_an_outlier_is_cut_off(method, symmetric):
    sample = np.append(rectified(), 400.0).astype(np.float32)
    low, high = METHODS[method](histogram_of(sample), symmetric)
    assert 2.5 < high < 100
    assert low in (0.0, pytest.approx(-high) if symmetric else 0.0)


def test_entropy_agrees_with_a_plain_transcription():
    """The same search written as the slide has it: a loop over bins, one threshold at a time."""
    sample = np.append(rectified(20_000), [9.0, 12.0]).astype(np.float32)
    found = histogram_of(sample)
    counts = found.magnitudes.astype(float)
    counts[0] = counts[1]
    used = int(np.flatnonzero(counts)[-1]) + 1
    best = (np.inf, 0)
    for end in [*range(256, used, 16), used]:
        p = list(counts[:end])
        p[-1] += sum(counts[end:])
        q = [0.0] * end
        edges = [int(e) for e in np.linspace(0, end, 257)]
        for a, b in pairwise(edges):
            occupied = [i for i in range(a, b) if counts[i] > 0]
            for i in occupied:
                q[i] = sum(counts[a:b]) / len(occupied)
        least = 1e-4 * min([x for x in q if x > 0] + [1.0])
        q = [least if x == 0 and y > 0 else x for x, y in zip(q, p, strict=True)]
        total_p, total_q = sum(p), sum(q)
        divergence = sum(
            x / total_p * np.log((x / total_p) / (y / total_q))
            for x, y in zip(p, q, strict=True)
            if x > 0
        )
        best = min(best, (divergence, end))
    assert entropy(found, False)[1] == pytest.approx(min(best[1] * found.width, found.high))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("sample", [[0.0], [0.0, 0.0], [3.0], [-2.0], [1e-30, 0.0], [5.0, 5.0]])
def test_degenerate_tensors_have_a_range_too(method, sample):
    for target in (CPU, TRT):
        low, high = METHODS[method](histogram_of(sample), target.symmetric)
        assert np.isfinite([low, high]).all()
        scale = activation_scale(low, high, target)
        assert scale.scale > 0
        assert np.isfinite(scale.scale)


# --- over a graph ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def graph(toy_model):
    return export(toy_model, 32, 32).model


@pytest.fixture(scope="module")
def batch(digits, digit_contract):
    return next(iter(digits.calibration.batches(digit_contract, 40)))[0]


def one_by_one(batch):
    return (batch[i : i + 1] for i in range(len(batch)))


def test_what_is_observed_is_what_the_activations_are(graph, batch, tmp_path):
    import onnxruntime as ort

    from cnnedge.graph.write import serialize

    names = make_plan(graph, CPU).tensors
    found = calibrate(graph, names, one_by_one(batch), tmp_path, samples=None)
    exposed = graph.clone()
    results = {v.name: v for node in exposed.graph for v in node.outputs}
    exposed.graph.outputs.extend(results[name] for name in names)
    session = ort.InferenceSession(serialize(exposed))
    for name, array in zip(names, session.run(names, {"image": batch}), strict=True):
        histogram = found.histograms[name]
        assert histogram.counts.sum() == array.size
        assert histogram.low == pytest.approx(array.min(), rel=1e-5, abs=1e-6)
        assert histogram.high == pytest.approx(array.max(), rel=1e-5)
        axes = tuple(i for i in range(array.ndim) if i != 1)
        np.testing.assert_allclose(
            found.peaks[name], np.abs(array).max(axis=axes), rtol=1e-5, atol=1e-6
        )
    assert found.images == len(batch)


def test_it_is_deterministic(graph, batch, tmp_path):
    names = make_plan(graph, TRT).tensors
    one, other = (calibrate(graph, names, one_by_one(batch), tmp_path) for _ in range(2))
    assert all(same(one.histograms[n], other.histograms[n]) for n in names)


def test_a_sample_gives_the_scales_of_all_the_values(graph, batch, tmp_path):
    plan = make_plan(graph, CPU)
    for samples in (500, None):
        found = calibrate(graph, plan.tensors, one_by_one(batch), tmp_path, samples=samples)
        assert found.images == len(batch)
        limits = {m: choose_ranges(found, plan, m).limits for m in ("minmax", "mse")}
        if samples:
            sampled = limits
    assert sampled["minmax"] == limits["minmax"]  # extremes are never sampled
    for name, (_, high) in limits["mse"].items():
        assert sampled["mse"][name][1] == pytest.approx(high, rel=0.15)


def test_the_image_keeps_its_whole_range(graph, batch, tmp_path):
    plan = make_plan(graph, TRT)
    found = calibrate(graph, plan.tensors, one_by_one(batch), tmp_path)
    white = found.histograms["image/scale"].high
    for method in METHODS:
        assert choose_ranges(found, plan, method).limits["image/scale"][1] == white


def test_the_convergence_curve(graph, batch, tmp_path):
    plan = make_plan(graph, CPU)
    found = calibrate(graph, plan.tensors, one_by_one(batch), tmp_path)
    curve = convergence(found, plan, "minmax")
    assert [point.images for point in curve] == [1, 2, 4, 8, 16, 32, 40]
    largest = [point.largest_change for point in curve]
    assert largest[0] > 0
    assert largest[-1] == 0
    assert largest == sorted(largest, reverse=True)  # min-max ranges only grow


def test_how_many_images_were_enough():
    def curve(*changes):
        return [Convergence(2**i, 0.0, change) for i, change in enumerate(changes)]

    assert enough_images(curve(0.5, 0.2, 0.04, 0.01, 0.0)) == 4
    assert enough_images(curve(0.5, 0.04, 0.2, 0.01, 0.0)) == 8  # not before the last that is off
    assert enough_images(curve(0.01, 0.0)) == 1
    assert enough_images(curve(0.5, 0.2, 0.0)) == 4


# --- what goes wrong ---------------------------------------------------------------------------


def test_images_of_another_kind_are_refused(graph, tmp_path):
    for wrong in (images(31, 32), images(32, 32).astype(np.float32)):
        with pytest.raises(DataError, match=r"calibration image 0 is .*and the graph takes"):
            calibrate(graph, ["conv1"], [wrong], tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("value", "message"),
    [(np.nan, "NaN or infinite"), (np.inf, "NaN or infinite"), (255.0, "outside the 0 to 1")],
)
def test_a_bad_image_is_named(toy_model, tmp_path, value, message):
    graph = export(toy_model, 32, 32, input_dtype="float32").model
    batch = normalize(images(32, 32, n=4), "unit")
    batch[2, 5, 5, 1] = value
    with pytest.raises(DataError, match=rf"calibration photo 6\.png .*{message}"):
        calibrate(
            graph,
            ["conv1"],
            [normalize(images(32, 32, n=4), "unit"), batch],
            tmp_path,
            value_range=value_range("unit"),
            name_of="photo {}.png".format,
        )


@pytest.mark.parametrize("name", NORMALIZATIONS)
def test_the_value_range_is_what_normalization_gives(name):
    low, high = value_range(name)
    found = normalize(np.random.default_rng(0).integers(0, 256, (9, 9, 9, 3), np.uint8), name)
    assert low <= found.min()
    assert found.max() <= high
    assert high - low < 1.3 * (found.max() - found.min())


def test_no_images_is_refused(graph, tmp_path):
    with pytest.raises(DataError, match="no images"):
        calibrate(graph, ["conv1"], [], tmp_path)


def test_a_full_disk_is_one_line(graph, tmp_path, monkeypatch):
    import errno

    import onnx_ir as ir

    def full(*arguments, **options):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(ir, "save", full)
    with pytest.raises(CnnEdgeError, match="cannot write .*No space left on device"):
        calibrate(graph, ["conv1"], [images(32, 32)], tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_an_activation_that_is_not_finite_is_named(toy_model, tmp_path):
    import keras

    broken = keras.models.clone_model(toy_model)
    broken.set_weights(toy_model.get_weights())
    broken.get_layer("conv2").bias.assign(np.full(24, np.nan, np.float32))
    graph = export(broken, 32, 32).model
    with pytest.raises(ModelError, match=r"conv2.*not finite"):
        calibrate(graph, make_plan(graph, CPU).tensors, [images(32, 32)], tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_an_image_in_both_splits_is_refused(tmp_path):
    from PIL import Image

    paths = []
    for index in range(4):
        path = tmp_path / f"{index}.png"
        Image.fromarray(np.full((4, 4, 3), index, np.uint8)).save(path)
        paths.append(path)
    again = tmp_path / "copy.png"
    again.write_bytes(paths[1].read_bytes())
    held, test = Split("calibration", paths[:2], np.zeros(2)), Split("test", paths[2:], np.zeros(2))
    refuse_overlap(held, test)
    with pytest.raises(DataError, match=r"calibration .*1\.png is also the test .*copy\.png"):
        refuse_overlap(held, Split("test", [paths[2], again], np.zeros(2)))
