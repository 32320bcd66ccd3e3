"""Which channels belong together: removing a unit is the same as never reading it."""

from __future__ import annotations

import keras
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from keras import layers, ops

from cnnedge.compress.budget import costs
from cnnedge.compress.channels import map_channels
from cnnedge.compress.importance import SMALLEST, TEMPERATURE, l1, taylor
from cnnedge.compress.rewrite import remove_channels
from cnnedge.inspect import inspect_model
from cnnedge.models import build
from cnnedge.models.layers import LocalResponseNormalization, SortPool2D

pytestmark = pytest.mark.tf

SHAPE = (12, 12, 3)


def images(count=3, shape=SHAPE, seed=0):
    return np.random.default_rng(seed).random((count, *shape), np.float32)


def answers(model, shape=SHAPE):
    return model(images(shape=shape), training=False).numpy()


def classifier(image, x, flatten=True):
    x = layers.Flatten()(x) if flatten else layers.GlobalAveragePooling2D()(x)
    x = layers.Dense(10, activation="relu", name="fc1")(x)
    return stirred(keras.Model(image, layers.Dense(4, activation="softmax", name="fc2")(x)))


def stirred(model, seed=0):
    """Give every weight a value of its own: fresh ones (ones, zeros) would hide a wrong slice."""
    rng = np.random.default_rng(seed)
    for variable in model.weights:
        noise = rng.normal(size=variable.shape) * 0.3
        variable.assign(np.abs(noise) + 0.2 if "variance" in variable.path else noise)
    return model


def silence(channels, kept):
    """Set to zero every weight that reads a unit which is not kept."""
    for found in channels.layers.values():
        if not found.work or found.width is None:
            continue  # depthwise: it hands its channels on
        first = min(found.work)
        weights = found.layer.get_weights()
        (axis,) = [
            axis
            for axis, labels in enumerate(found.axes[first])
            if labels is not None and np.array_equal(labels, found.taken)
        ][:1]
        gone = (found.taken >= 0) & ~kept[found.taken]
        np.moveaxis(weights[first], axis, 0)[gone] = 0
        found.layer.set_weights(weights)


def half(channels, seed=0):
    """Keep about half of the units, and at least one of each group."""
    kept = np.random.default_rng(seed).random(channels.units) < 0.5
    for group in channels.groups:
        kept[group.units[0]] = True
    return kept


def conv(x, filters, name=None, **options):
    return layers.Conv2D(filters, 3, padding="same", name=name, **options)(x)


def residual(image):
    x = conv(image, 8, "stem")
    x = layers.ReLU()(layers.BatchNormalization()(x))
    y = conv(conv(x, 6, "narrow", activation="relu"), 8, "wide")
    return classifier(image, layers.MaxPooling2D()(layers.Add()([x, y])))


def dense_block(image):
    x = conv(image, 6, "a", activation="relu")
    y = conv(x, 5, "b", activation="relu")
    x = layers.Concatenate()([x, y])
    x = layers.Add()([x, conv(x, 11, "c")])
    return classifier(image, x)


def mobile(image):
    x = conv(image, 6, "stem", activation="relu")
    x = layers.DepthwiseConv2D(3, padding="same", depth_multiplier=2)(x)
    x = layers.PReLU(shared_axes=(1, 2))(layers.BatchNormalization()(x))
    x = layers.SeparableConv2D(8, 3, depth_multiplier=2, name="separable")(x)
    return classifier(image, layers.UpSampling2D()(x), flatten=False)


def squeeze(image):
    x = conv(image, 8, "stem", activation="relu")
    s = layers.GlobalAveragePooling2D(keepdims=True)(x)
    s = layers.Flatten()(s)
    s = layers.Dense(4, activation="relu", name="squeeze")(s)
    s = layers.Dense(8, activation="sigmoid", name="excite")(s)
    x = layers.Multiply()([x, layers.Reshape((1, 1, 8))(s)])
    return classifier(image, x)


def shared(image):
    twice = layers.Conv2D(8, 3, padding="same", activation="relu", name="twice")
    return classifier(image, twice(twice(conv(image, 8, "stem"))))


def operations(image):
    x = conv(image, 6, "a")
    y = ops.relu(conv(image, 6, "b")) * 2.0
    x = ops.maximum(x, y)
    x = ops.mean(x, axis=(1, 2), keepdims=True) + x
    return classifier(image, layers.Conv2DTranspose(7, 3, name="up")(x))


def nested(image):
    inner = keras.Sequential(
        [keras.Input((12, 12, 6)), layers.Conv2D(5, 3, name="same")], name="inner"
    )
    outer = keras.Sequential([keras.Input((12, 12, 6)), inner, layers.ReLU()], name="outer")
    x = layers.Conv2D(6, 3, padding="same", name="same")(image)
    return classifier(image, outer(x))


def sorting(image):
    x = conv(image, 8, "a", activation="relu")
    return classifier(image, layers.Dropout(0.4)(SortPool2D(3)(layers.ZeroPadding2D()(x))))


GRAPHS = (residual, dense_block, mobile, squeeze, shared, operations, nested, sorting)


@pytest.mark.parametrize("make", GRAPHS, ids=lambda make: make.__name__)
def test_removing_a_unit_is_never_reading_it(make):
    model = make(keras.Input(SHAPE))
    channels = map_channels(model, SHAPE)
    assert not channels.notes
    before = answers(model)
    for seed in range(3):
        kept = half(channels, seed)
        copy = remove_channels(model, channels, np.ones(channels.units, bool))
        known = map_channels(copy, SHAPE)
        silence(known, kept)
        small = remove_channels(copy, known, kept)
        assert small.count_params() < model.count_params()
        np.testing.assert_allclose(answers(small), answers(copy), rtol=0, atol=1e-6)
        assert np.abs(answers(copy) - before).max() > 1e-4  # or nothing was shown
    np.testing.assert_array_equal(answers(model), before)  # the reference is never touched


@pytest.mark.parametrize("make", GRAPHS, ids=lambda make: make.__name__)
def test_removing_nothing_is_the_identity(make):
    model = make(keras.Input(SHAPE))
    channels = map_channels(model, SHAPE)
    same = remove_channels(model, channels, np.ones(channels.units, bool))
    np.testing.assert_array_equal(answers(same), answers(model))
    assert same.count_params() == model.count_params()
    assert not {id(layer) for layer in same.layers} & {id(layer) for layer in model.layers}


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("alexnet_v1", {}),
        ("alexnet_v2", {}),
        ("alexnet", {"lrn": True}),
        ("vgg11", {"fc_units": 16, "pool": "sort"}),
    ],
)
def test_the_built_in_models(name, options):
    shape = (96, 96, 3)
    model = build(name, height=96, width=96, classes=7, seed=0, **options)
    channels = map_channels(model, shape)
    same = remove_channels(model, channels, np.ones(channels.units, bool))
    np.testing.assert_array_equal(answers(same, shape), answers(model, shape))
    kept = half(channels)
    silence(channels, kept)
    small = remove_channels(model, channels, kept)
    np.testing.assert_allclose(answers(small, shape), answers(model, shape), rtol=0, atol=1e-6)
    groups = {group.name for group in channels.groups}
    if name == "alexnet":  # normalisation across neighbours: they must stay
        assert len(channels.notes) == 2
        assert not {"conv1", "conv2"} & groups
    else:
        assert not channels.notes
        assert len(groups) == (10 if name == "vgg11" else 7)


@st.composite
def graphs(draw):
    """A small network of convolutions, residual adds, concatenations, pools and depthwise ones."""
    image = keras.Input(SHAPE)
    values = [layers.Conv2D(draw(st.integers(2, 6)), 3, padding="same")(image)]
    for _ in range(draw(st.integers(1, 6))):
        x = values[draw(st.integers(0, len(values) - 1))]
        kind = draw(
            st.sampled_from(["conv", "add", "concatenate", "depthwise", "norm", "multiply"])
        )
        if kind == "conv":
            made = layers.Conv2D(draw(st.integers(2, 6)), 3, padding="same", activation="relu")(x)
        elif kind == "depthwise":
            made = layers.DepthwiseConv2D(3, padding="same")(x)
        elif kind == "norm":
            made = layers.BatchNormalization()(x)
        elif kind == "concatenate":
            made = layers.Concatenate()([x, values[draw(st.integers(0, len(values) - 1))]])
        else:
            fitting = [v for v in values if v.shape == x.shape]
            other = fitting[draw(st.integers(0, len(fitting) - 1))]
            made = (layers.Add if kind == "add" else layers.Multiply)()([x, other])
        values.append(made)
    seed = draw(st.integers(0, 1000))
    return stirred(classifier(image, layers.MaxPooling2D()(values[-1]), draw(st.booleans()))), seed


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(graphs())
def test_drawn_graphs_stay_consistent(drawn):
    model, seed = drawn
    channels = map_channels(model, SHAPE)
    assert not channels.notes
    assert sorted(np.concatenate([g.units for g in channels.groups])) == list(range(channels.units))
    same = remove_channels(model, channels, np.ones(channels.units, bool))
    np.testing.assert_array_equal(answers(same), answers(model))
    kept = half(channels, seed)
    silence(channels, kept)
    small = remove_channels(model, channels, kept)
    np.testing.assert_allclose(answers(small), answers(model), rtol=0, atol=1e-6)
    macs, params = costs(channels)
    counts = [int(kept[group.units].sum()) for group in channels.groups]
    assert params.at(counts) == small.count_params()
    assert macs.at(counts) == inspect_model(small).macs


class TestWhatStays:
    def test_the_classes_and_the_image(self):
        model = residual(keras.Input(SHAPE))
        channels = map_channels(model, SHAPE)
        small = remove_channels(model, channels, half(channels))
        assert small.input_shape == model.input_shape
        assert small.output_shape == model.output_shape

    def test_groups_are_what_the_same_layers_make(self):
        channels = map_channels(residual(keras.Input(SHAPE)), SHAPE)
        found = {group.name: len(group) for group in channels.groups}
        assert found == {"stem+wide": 8, "narrow": 6, "fc1": 10}
        channels = map_channels(dense_block(keras.Input(SHAPE)), SHAPE)
        found = {group.name: len(group) for group in channels.groups}
        assert found == {"a+c": 6, "b+c": 5, "fc1": 10}

    @pytest.mark.parametrize(
        ("layer", "named"),
        [
            (lambda: layers.Conv2D(8, 3, groups=2, name="grouped"), "grouped (Conv2D)"),
            (lambda: LocalResponseNormalization(name="lrn"), "lrn (LocalResponseNormalization)"),
            (lambda: layers.LayerNormalization(name="norm"), "norm (LayerNormalization)"),
            (lambda: layers.Activation("softmax", name="mix"), "mix (Activation)"),
            (lambda: layers.Permute((3, 1, 2), name="turn"), "turn (Permute)"),
        ],
        ids=["grouped", "lrn", "layernorm", "softmax", "permute"],
    )
    def test_what_mixes_channels_says_so(self, layer, named):
        image = keras.Input(SHAPE)
        model = classifier(image, layer()(conv(image, 8, "stem")))
        channels = map_channels(model, SHAPE)
        assert channels.notes == (f"{named}: the channels it reads and makes stay",)
        assert {group.name for group in channels.groups} == {"fc1"}
        kept = half(channels)
        silence(channels, kept)
        np.testing.assert_allclose(
            answers(remove_channels(model, channels, kept)), answers(model), rtol=0, atol=1e-6
        )

    def test_a_model_that_leaves_its_size_open_still_does(self):
        image = keras.Input((None, None, 3))
        model = classifier(image, conv(image, 8, "stem"), flatten=False)
        channels = map_channels(model, SHAPE)
        small = remove_channels(model, channels, half(channels))
        assert small.input_shape == (None, None, None, 3)
        assert answers(small, (20, 16, 3)).shape == (3, 4)

    def test_dropout_shrinks_with_what_it_reads(self):
        image = keras.Input(SHAPE)
        model = classifier(image, layers.Dropout(0.5, name="drop")(conv(image, 8, "stem")))
        channels = map_channels(model, SHAPE)
        kept = np.ones(channels.units, bool)
        kept[channels.groups[0].units[:6]] = False
        small = remove_channels(model, channels, kept)
        assert small.get_layer("drop").rate == pytest.approx(0.5 * 2 / 8)


class TestImportance:
    def test_taylor_is_the_gradient_of_taking_a_unit_away(self):
        """Against the change of the loss when a unit's readers are turned down a little."""
        model = dense_block(keras.Input(SHAPE))
        channels = map_channels(model, SHAPE)
        batch, targets = images(1), np.array([2])
        found = taylor(channels, [(keras.ops.convert_to_tensor(batch), targets)])

        def loss(network):
            logits = np.log(np.maximum(network(batch).numpy(), SMALLEST)).astype(np.float64)
            logits /= TEMPERATURE
            return -(logits[0] - np.log(np.exp(logits[0]).sum()))[targets[0]]

        step = 0.02
        for group in channels.groups:
            for unit in group.units[:2]:
                slopes = []
                for sign in (-1, 1):
                    copy = remove_channels(model, channels, np.ones(channels.units, bool))
                    for layer in map_channels(copy, SHAPE).layers.values():
                        if layer.work:
                            weights = layer.layer.get_weights()
                            read = np.moveaxis(weights[0], -2, 0)
                            read[layer.taken == unit] *= 1 + sign * step
                            layer.layer.set_weights(weights)
                    slopes.append(loss(copy))
                slope = (slopes[1] - slopes[0]) / (2 * step)
                assert found[unit] == pytest.approx(slope**2, rel=0.05, abs=1e-7)

    def test_a_unit_that_nobody_reads_is_worth_nothing(self):
        model = residual(keras.Input(SHAPE))
        channels = map_channels(model, SHAPE)
        kept = half(channels)
        silence(channels, kept)
        found = taylor(channels, [(keras.ops.convert_to_tensor(images()), np.array([0, 1, 2]))])
        assert not found[~kept].any()
        convolved = np.concatenate([g.units for g in channels.groups if g.name != "fc1"])
        assert found[convolved][kept[convolved]].all()

    def test_l1_ranks_by_the_weights_within_a_group(self):
        image = keras.Input(SHAPE)
        model = classifier(image, conv(image, 4, "stem"))
        kernel = model.get_layer("stem").kernel
        kernel.assign(np.ones(kernel.shape) * [3.0, 1.0, 0.0, 4.0])
        channels = map_channels(model, SHAPE)
        units = channels.groups[0].units
        assert l1(channels)[units] == pytest.approx([1.5, 0.5, 0, 2])
        assert l1(channels)[channels.groups[1].units].mean() == pytest.approx(1)
