import json
import re

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

from cnnedge.errors import CnnEdgeError, ModelError
from cnnedge.inspect import COLUMNS, compare_stack, inspect_model
from cnnedge.inspect.formulas import Span, output_size, receptive_field, same_padding
from cnnedge.inspect.table import peak
from cnnedge.models import MODELS, build

pytestmark = pytest.mark.tf

# The formulas ---------------------------------------------------------------------------------


def test_output_sizes_follow_the_formula():
    assert output_size(224, 11, 4, padding=1 + 2) == 55
    assert output_size(55, 3, 2, padding=0) == 27
    assert output_size(10, 3, 1, padding=0, dilation=3) == 4
    assert output_size(2, 3, 1, padding=0) == 0


def test_same_padding_makes_the_output_that_keras_makes():
    for size in range(1, 12):
        for kernel, stride, dilation in [(1, 1, 1), (3, 1, 2), (3, 2, 1), (2, 2, 1), (5, 3, 1)]:
            pads = same_padding(size, kernel, stride, dilation)
            assert output_size(size, kernel, stride, sum(pads), dilation) == -(-size // stride)
    assert same_padding(6, 3, 2) == (0, 1)  # the odd pixel goes after


def test_the_receptive_field_is_the_same_backwards_and_forwards():
    random = np.random.default_rng(0)
    for _ in range(50):
        windows = [(int(k), int(s)) for k, s in random.integers(1, 6, size=(6, 2))]
        span = Span()
        for kernel, stride in windows:
            span = span.through(kernel, stride)
        assert span.size == receptive_field(windows)


def test_the_receptive_field_is_where_the_gradient_reaches():
    stack = [
        layers.ZeroPadding2D(((1, 2), (2, 0))),
        layers.Conv2D(2, (5, 3), strides=2),
        layers.Conv2D(2, 3, dilation_rate=2, padding="same"),
        layers.AveragePooling2D(3, strides=2),
        layers.DepthwiseConv2D(2),
    ]
    model = keras.Sequential([keras.Input((64, 60, 1)), *stack])
    model.set_weights([np.ones_like(weight) for weight in model.get_weights()])
    image = tf.Variable(tf.zeros((1, 64, 60, 1)))
    with tf.GradientTape() as tape:
        output = model(image)[0, 4, 4, 0]
    touched = np.argwhere(tape.gradient(output, image).numpy()[0, :, :, 0])
    extent = tuple(int(n) for n in touched.max(0) - touched.min(0) + 1)

    assert inspect_model(model).layers[-1].receptive_field == extent


def test_peak_memory_frees_what_nobody_needs():
    # 0 -> 1 -> 2, and 0 -> 3; 4 adds 2 and 3: when 1 runs, 0 and 1 live; when 3 runs, 0, 2 and 3.
    assert peak([4, 8, 1, 8, 1], [(), (0,), (1,), (0,), (2, 3)]) == 4 + 1 + 8
    # A view keeps its input alive: 1 views 0, which 3 still reads through it.
    assert peak([10, 0, 5, 5], [(), (0,), (0,), (1, 2)]) == 20
    assert peak([10, 4, 5, 5], [(), (0,), (0,), (1, 2)]) == 19


# Built-in models ------------------------------------------------------------------------------


def fields(inspection):
    return {row.name: row.receptive_field[0] for row in inspection.layers if row.receptive_field}


def test_alexnet_has_the_receptive_fields_of_the_literature():
    found = fields(inspect_model("alexnet"))

    expected = {"image": 1, "pad1": 1, "conv1": 11, "pool1": 19, "conv2": 51, "pool2": 67}
    assert found == expected | {"conv3": 99, "conv4": 131, "conv5": 163, "pool3": 195}


def test_vgg16_row_by_row():
    inspection = inspect_model("vgg16")
    rows = {row.name: row for row in inspection.layers}

    assert (inspection.name, inspection.source, inspection.notes) == ("vgg16", "built-in", ())
    first = rows["conv1_1"]
    assert (first.kind, first.window, first.output) == ("Conv2D", "3x3/1", (224, 224, 64))
    assert (first.params, first.macs) == (1792, 224 * 224 * 27 * 64)
    assert first.activation_bytes == 224 * 224 * 64 * 4
    last = rows["pool5"]
    assert (last.receptive_field, last.stride, last.output) == ((212, 212), (32, 32), (7, 7, 512))
    assert (rows["flatten"].activation_bytes, rows["flatten"].receptive_field) == (0, None)
    assert (rows["fc3"].output, rows["fc3"].macs) == ((1000,), 2048 * 1000)
    # Two maps of 224x224x64 live at once: conv1_2 reads one and writes the other.
    assert inspection.peak_bytes == 2 * 224 * 224 * 64 * 4


@pytest.mark.parametrize("name", MODELS)
def test_the_totals_are_those_of_the_table(name):
    inspection = inspect_model(name)

    assert (inspection.params, inspection.macs) == (MODELS[name].params, MODELS[name].macs)
    assert inspection.notes == ()


def test_a_built_in_model_of_another_size():
    inspection = inspect_model("alexnet_v2", height=192, width=160, classes=7)
    rows = {row.name: row for row in inspection.layers}

    assert rows["image"].output == (192, 160, 3)
    assert rows["features/conv1"].output == (47, 39, 48)
    assert rows["classifier/fc3"].output == (7,)
    assert inspection.params == build("alexnet_v2", height=192, width=160, classes=7).count_params()


def test_the_table_is_text_and_the_dictionary_is_json():
    inspection = inspect_model("alexnet_v2")
    headers, *rows, total = inspection.rows()

    assert headers == COLUMNS
    assert {len(row) for row in rows} == {len(total)} == {len(COLUMNS)}
    assert rows[2][:5] == ("features/conv1", "Conv2D", "11x11/4", "55x55x48", "17,472")
    assert rows[2][-2:] == ("4", "11")
    assert rows[-1][-1] == "all"
    assert total[0] == "total"
    assert total[4:6] == ("5,925,672", "300,490,000")
    document = json.loads(json.dumps(inspection.to_dict()))
    assert document["layers"][2]["receptive_field"] == [11, 11]
    assert document["macs"] == inspection.macs


# Keras models of any form ---------------------------------------------------------------------


def last(model, **size):
    return inspect_model(model, **size).layers[-1]


def sequential(*stack, size=(16, 16, 4)):
    return keras.Sequential([keras.Input(size), *stack], name="toy")


@pytest.mark.parametrize(
    ("layer", "window", "params", "macs", "field"),
    [
        (layers.Conv2D(6, 3, groups=2), "3x3/1", 108 + 6, 14 * 14 * 108, (3, 3)),
        (layers.Conv2D(6, (1, 7)), "1x7/1", 7 * 4 * 6 + 6, 16 * 10 * 7 * 4 * 6, (1, 7)),
        (layers.Conv2D(1, 3, dilation_rate=2), "3x3/1 d2", 37, 12 * 12 * 36, (5, 5)),
        (layers.DepthwiseConv2D(3, strides=2), "3x3/2", 3 * 3 * 4 + 4, 7 * 7 * 36, (3, 3)),
        (layers.SeparableConv2D(5, 3), "3x3/1", 36 + 20 + 5, 14 * 14 * (36 + 20), (3, 3)),
        (layers.Dense(5), "", 25, 16 * 16 * 20, (1, 1)),
        (layers.BatchNormalization(), "", 16, 0, (1, 1)),
        (layers.AveragePooling2D((2, 4)), "2x4/2x4", 0, 0, (2, 4)),
        (layers.Cropping2D(((1, 2), (3, 4))), "", 0, 0, (1, 1)),
        (layers.GlobalAveragePooling2D(keepdims=True), "", 0, 0, None),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, layers.Layer) else "",
)
def test_each_kind_of_layer(layer, window, params, macs, field):
    model = sequential(layer)
    inspection = inspect_model(model)
    row = inspection.layers[-1]

    assert (row.window, row.params, row.macs, row.receptive_field) == (window, params, macs, field)
    assert row.output == model.output_shape[1:]
    assert inspection.notes == ()


def test_a_branch_counts_with_the_larger_field():
    image = keras.Input((32, 32, 4))
    short = layers.Conv2D(4, 1)(image)
    long = layers.Conv2D(4, 3, padding="same")(layers.Conv2D(4, 3, padding="same")(image))
    joined = layers.Concatenate()([layers.Add()([short, long]), image])
    model = keras.Model(image, layers.MaxPooling2D(2)(joined))

    assert last(model).receptive_field == (6, 6)
    assert last(model).stride == (2, 2)


def test_a_gate_from_global_pooling_makes_everything_depend_on_everything():
    image = keras.Input((32, 32, 4))
    gate = layers.GlobalAveragePooling2D(keepdims=True)(image)
    model = keras.Model(image, layers.Multiply()([image, layers.Conv2D(4, 1)(gate)]))

    assert last(model).receptive_field is None


def test_shared_weights_count_once_and_their_work_twice():
    image = keras.Input((8, 8, 4))
    shared = layers.Conv2D(4, 3, padding="same", name="shared")
    model = keras.Model(image, shared(shared(image)))
    inspection = inspect_model(model)

    assert [row.params for row in inspection.layers] == [0, 148, 0]
    assert [row.macs for row in inspection.layers] == [0, 64 * 144, 64 * 144]
    assert inspection.params == model.count_params()


class Residual(keras.Model):
    """A user's subclassed model, of layers and operations."""

    def __init__(self):
        super().__init__(name="residual")
        self.body = keras.Sequential(
            [layers.Conv2D(3, 3, padding="same", name="a"), layers.ReLU(name="b")], name="body"
        )
        self.head = layers.Dense(2, name="head")

    def call(self, inputs):
        x = keras.ops.add(self.body(inputs), inputs)
        return self.head(keras.ops.mean(x, axis=(1, 2)))


def test_a_subclassed_model_with_a_model_inside():
    model = Residual()
    model(np.zeros((1, 12, 10, 3), np.float32))
    rows = inspect_model(model).layers

    assert [(row.name, row.kind) for row in rows[:3]] == [
        ("image", "Input"),
        ("body/a", "Conv2D"),
        ("body/b", "ReLU"),
    ]
    assert [row.kind for row in rows[3:]] == ["Add", "Mean", "Dense"]
    assert rows[3].receptive_field == (3, 3)
    assert rows[-1].receptive_field is None
    assert sum(row.params for row in rows) == model.count_params()


def test_inspecting_leaves_the_model_usable():
    model = sequential(layers.Conv2D(2, 3, name="only"), layers.Flatten())
    inspect_model(model)
    again = keras.Model(model.inputs, model.get_layer("only").output)

    assert again.output_shape == (None, 14, 14, 2)
    assert [row.name for row in inspect_model(model).layers][1] == "only"


def test_an_open_size_is_asked_for():
    model = sequential(layers.Conv2D(2, 3), size=(None, None, 3))

    assert last(model, height=9, width=8).output == (7, 6, 2)
    with pytest.raises(ModelError, match="'toy' leaves its input size open; pass a height and"):
        inspect_model(model)


@keras.saving.register_keras_serializable(package="test")
class Odd(layers.Layer):
    """Claims a window, or shrinks the map, in ways that no formula tells."""

    def __init__(self, crop, **attributes):
        super().__init__(name="odd")
        self.crop = crop
        vars(self).update(attributes)

    def call(self, inputs):
        return inputs[:, self.crop :, self.crop :]


@pytest.mark.parametrize(
    ("layer", "note"),
    [
        (Odd(0), r"odd \(Odd\): taken to work pixel by pixel"),
        (Odd(1), r"odd \(Odd\): its receptive field cannot be followed"),
        (
            Odd(1, pool_size=(3, 3), strides=(1, 1), padding="valid"),
            r"its output is 15x15 where the formula gives 14x14",
        ),
        (layers.UpSampling2D(2), "cannot be followed"),
        (layers.ConvLSTM1D(2, 3), "multiply-accumulates are not counted"),
    ],
)
def test_what_cannot_be_followed_is_noted(layer, note):
    assert re.search(note, "\n".join(inspect_model(sequential(layer)).notes))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (Residual, "inputs of 'residual' are not known"),
        (lambda: keras.Sequential([keras.Input((7,)), layers.Dense(2)], name="flat"), "'flat'"),
        (lambda: two_inputs(), r"'two' are \[\(None, 4, 4, 3\), \(None, 4, 4, 3\)\]"),
    ],
)
def test_models_without_one_image_are_refused(make, message):
    with pytest.raises(ModelError, match=message):
        inspect_model(make())


def two_inputs():
    images = [keras.Input((4, 4, 3)) for _ in range(2)]
    return keras.Model(images, layers.Add()(images), name="two")


def test_a_size_that_the_model_does_not_take_is_refused():
    with pytest.raises(ModelError, match="'toy' cannot be traced on an input of 9x9x4"):
        inspect_model(sequential(layers.Flatten(), layers.Dense(2)), height=9, width=9)
    with pytest.raises(ModelError, match="too small"):
        inspect_model("vgg16", height=16)


def test_names_and_options_that_make_no_sense_are_refused():
    with pytest.raises(ModelError, match="did you mean vgg19 or vgg16"):
        inspect_model("vgg61")
    with pytest.raises(ModelError, match="toy has its own number of classes"):
        inspect_model(sequential(layers.Flatten()), classes=3)


def test_a_keras_file(tmp_path):
    model = build("vgg11", height=32, width=32, classes=3, fc_units=8, pool="sort")
    path = tmp_path / "small.keras"
    model.save(path)
    inspection = inspect_model(path)

    assert (inspection.name, inspection.source) == ("vgg11", str(path))
    assert inspection.params == model.count_params()
    assert fields(inspection)["pool5"] == 150
    with pytest.raises(ModelError, match=r"absent.keras"):
        inspect_model(tmp_path / "absent.keras")
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ModelError, match=r"small.keras"):
        inspect_model(str(path))


# Stacks ---------------------------------------------------------------------------------------


def test_three_kernels_of_three_against_one_of_seven():
    found = compare_stack("3x3,3x3,3x3")

    assert found.receptive_field == (7, 7)
    assert (found.stack_weights, found.single_weights) == (27, 49)
    assert found.ratio == pytest.approx(27 / 49)
    assert found.nonlinearities == 3
    assert "27C² weights" in str(found)
    assert "49C² weights" in str(found)


def test_a_stack_with_channels_and_oblong_kernels():
    found = compare_stack("1x7, 7x1", channels=64)

    assert found.receptive_field == (7, 7)
    assert (found.stack_weights, found.single_weights) == (14 * 64**2, 49 * 64**2)
    assert json.loads(json.dumps(found.to_dict()))["kernels"] == [[1, 7], [7, 1]]
    assert compare_stack("5").kernels == ((5, 5),)


@pytest.mark.parametrize("spec", ["", "3x3,", "3x3x3", "0x3", "-3", "axb", "3;3", "99999", "9999"])
def test_a_stack_that_is_none_is_answered_with_an_example(spec):
    with pytest.raises(CnnEdgeError, match="is no kernel; write kernels like 3x3,3x3,3x3"):
        compare_stack(spec)


def test_a_stack_without_channels_is_refused():
    with pytest.raises(CnnEdgeError, match="0 channels"):
        compare_stack("3x3", channels=0)
