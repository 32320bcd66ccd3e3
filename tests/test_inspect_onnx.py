import logging

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

from cnnedge.errors import ModelError
from cnnedge.inspect import inspect_model
from cnnedge.models.layers import SortPool2D

pytestmark = pytest.mark.tf


def sequential(*stack, size):
    return keras.Sequential([keras.Input(size), *stack], name="toy")


def last(model):
    return inspect_model(model).layers[-1]


def convert(model, size, path):
    """Write a Keras model as an ONNX file, by the plain converter."""
    import onnx
    import tf2onnx

    logging.getLogger("tf2onnx").setLevel(logging.ERROR)
    signature = [tf.TensorSpec((None, *size), tf.float32, name="image")]
    function = tf.function(model, autograph=False, input_signature=signature)
    proto, _ = tf2onnx.convert.from_function(function, signature, opset=18)
    onnx.save(proto, path)
    return path


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """A Keras model with biases that are not zero, and its ONNX file."""
    model = sequential(
        layers.Conv2D(32, 3, strides=2, padding="same", activation="relu", name="c1"),
        layers.MaxPooling2D(3, strides=2, name="p1"),
        layers.DepthwiseConv2D(3, padding="same", activation="relu", name="c2"),
        layers.Conv2D(40, 3, dilation_rate=2, padding="same", activation="relu", name="c3"),
        layers.Flatten(name="flat"),
        layers.Dense(32, activation="relu", name="f1"),
        layers.Dense(3, name="f2"),
        layers.Softmax(name="s"),
        size=(33, 29, 3),
    )
    random = np.random.default_rng(0)
    model.set_weights([random.normal(size=w.shape).astype("f") for w in model.get_weights()])
    return model, convert(model, (33, 29, 3), tmp_path_factory.mktemp("onnx") / "toy.onnx")


def summary(inspection):
    """What a Keras model and its ONNX file must agree on, layer by layer."""
    kept = [row for row in inspection.layers if row.name != "image"]
    return [
        (row.window, row.output, row.params, row.macs, row.stride, row.receptive_field)
        for row in kept
    ]


def test_an_onnx_file_reads_like_the_model_it_came_from(pair):
    of_keras, of_onnx = (inspect_model(model) for model in pair)

    assert summary(of_onnx) == summary(of_keras)
    assert of_onnx.params == pair[0].count_params()
    assert of_onnx.activation_bytes == of_keras.activation_bytes
    assert of_onnx.peak_bytes == of_keras.peak_bytes
    assert of_onnx.notes == ()
    kinds = [row.kind for row in of_onnx.layers]
    assert kinds[:3] == ["Input", "Conv+Relu", "MaxPool"]
    assert kinds[-3:] == ["MatMul+Relu", "MatMul", "Softmax"]


def test_a_quantized_file_reads_like_the_float_one(pair, tmp_path):
    from onnxruntime.quantization import CalibrationDataReader, quantize_static

    class Images(CalibrationDataReader):
        images = iter(np.random.default_rng(0).random((2, 1, 33, 29, 3), np.float32))

        def get_next(self):
            image = next(self.images, None)
            return None if image is None else {"image": image}

    path = tmp_path / "int8.onnx"
    quantize_static(pair[1], path, Images(), per_channel=True)
    quantized = inspect_model(path)

    assert summary(quantized) == summary(inspect_model(pair[1]))


def test_sort_pooling_has_the_same_field_in_onnx(tmp_path):
    model = sequential(layers.Conv2D(4, 3), SortPool2D(), layers.Conv2D(4, 3), size=(15, 15, 3))
    of_onnx, of_keras = last(convert(model, (15, 15, 3), tmp_path / "sort.onnx")), last(model)

    assert of_onnx.receptive_field == of_keras.receptive_field == (8, 8)
    assert of_onnx.stride == of_keras.stride == (2, 2)


HEADER = '<ir_version: 9, opset_import: ["": 18, "com.microsoft": 1]>'


def onnx_file(path, text, **weights):
    """Write a graph in ONNX's text form, with float weights of the given shapes."""
    import onnx

    model = onnx.parser.parse_model(HEADER + text)
    for name, shape in weights.items():
        array = np.ones(shape, np.float32)
        model.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    onnx.save(model, path)
    return path


def test_bytes_in_the_camera_s_layout_and_an_open_size(tmp_path):
    path = onnx_file(
        tmp_path / "bytes.onnx",
        """g (uint8[N, H, W, 3] image) => (float[N, C] y) {
            f = Cast<to = 1>(image)
            t = Transpose<perm = [0, 3, 1, 2]>(f)
            c = Conv<kernel_shape = [3, 5], strides = [2, 2], auto_pad = "SAME_UPPER">(t, w, b)
            r = Relu(c)
            g = GlobalAveragePool(r)
            h = Flatten(g)
            y = Gemm<transB = 1>(h, v, d)
        }""",
        w=(8, 3, 3, 5),
        b=(8,),
        v=(4, 8),
        d=(4,),
    )
    rows = inspect_model(path, height=20, width=11).layers

    assert [row.kind for row in rows] == [
        "Input",
        "Conv+Relu",
        "GlobalAveragePool",
        "Flatten",
        "Gemm",
    ]
    assert [row.output for row in rows] == [(20, 11, 3), (10, 6, 8), (1, 1, 8), (8,), (4,)]
    assert rows[1].receptive_field == (3, 5)
    assert rows[2].receptive_field is None
    assert [row.params for row in rows] == [0, 8 * 45 + 8, 0, 0, 36]
    assert [row.macs for row in rows] == [0, 60 * 8 * 45, 0, 0, 32]
    with pytest.raises(ModelError, match=r"bytes.onnx leaves its input size open"):
        inspect_model(path, height=20)


def test_a_grey_image_changes_its_layout_by_a_reshape(tmp_path):
    path = onnx_file(
        tmp_path / "grey.onnx",
        """g (float[N, 9, 8, 1] image) => (float[N, 4, H, W] y)
        <int64[4] order = {-1, 1, 9, 8}> {
            t = Reshape(image, order)
            y = Conv(t, w)
        }""",
        w=(4, 1, 3, 3),
    )
    rows = inspect_model(path).layers

    assert [row.output for row in rows] == [(9, 8, 1), (7, 6, 4)]
    assert rows[1].receptive_field == (3, 3)


def test_padding_and_slicing_move_the_field(tmp_path):
    path = onnx_file(
        tmp_path / "moves.onnx",
        """g (float[1, 3, 8, 8] image) => (float[1, 3, H, W] y)
        <int64[8] pads = {0, 0, 1, 1, 0, 0, 1, 1}, int64[1] one = {1}, int64[1] end = {99},
         int64[1] axis = {2}, int64[1] two = {2}, int64[1] zero = {0}> {
            p = Pad(image, pads)
            a = Slice(p, zero, end, axis, two)
            b = Slice(p, one, end, axis, two)
            y = Max(a, b)
        }""",
    )
    rows = inspect_model(path).layers

    assert [row.output for row in rows[1:]] == [(10, 10, 3), (5, 10, 3), (5, 10, 3), (5, 10, 3)]
    assert [row.receptive_field for row in rows[1:]] == [(1, 1), (1, 1), (1, 1), (2, 1)]
    assert rows[-1].stride == (2, 1)


def test_weights_of_four_bits_count_unpacked(tmp_path):
    path = onnx_file(
        tmp_path / "int4.onnx",
        """g (float[1, 3, 4, 4] image) => (float[1, C] y) {
            f = Flatten(image)
            m = com.microsoft.MatMulNBits<K = 48, N = 5, bits = 4, block_size = 16>(f, q, scale)
            y = Relu(m)
        }""",
        q=(5, 3, 8),
        scale=(15,),
    )
    row = last(path)

    assert (row.kind, row.output, row.params, row.macs) == ("MatMul+Relu", (5,), 240, 240)


def test_weights_beside_the_file_are_not_needed(pair, tmp_path):
    import onnx

    path, beside = tmp_path / "beside.onnx", {"save_as_external_data": True, "location": "w"}
    onnx.save(onnx.load(pair[1]), path, **beside)
    (tmp_path / "w").unlink()
    assert summary(inspect_model(path)) == summary(inspect_model(pair[1]))

    # Small constants, such as the shape of a Reshape, are read from there where they are needed.
    onnx.save(onnx.load(pair[1]), path, **beside, size_threshold=0)
    assert summary(inspect_model(path)) == summary(inspect_model(pair[1]))


def test_onnx_files_that_cannot_be_read_are_refused(pair, tmp_path):
    damaged = tmp_path / "damaged.onnx"
    with pytest.raises(ModelError, match=r"no model file .*damaged.onnx"):
        inspect_model(damaged)
    for content in (b"", b"no model", pair[1].read_bytes()[:500]):
        damaged.write_bytes(content)
        with pytest.raises(ModelError, match=r"damaged.onnx is not"):
            inspect_model(damaged)
    with pytest.raises(ModelError, match="has its own number of classes"):
        inspect_model(pair[1], classes=3)
    with pytest.raises(ModelError, match=r"toy.onnx.*pass a"):
        inspect_model(pair[1], height=2, width=2)
    flat = "g (float[1, 3] x) => (float[1, 3] y) { y = Relu(x) }"
    no_image = onnx_file(tmp_path / "no.onnx", flat)
    with pytest.raises(ModelError, match=r"has the inputs x; .* one image input"):
        inspect_model(no_image)


def test_a_shifted_branch_widens_the_field(tmp_path):
    path = onnx_file(
        tmp_path / "shift.onnx",
        """g (float[1, 3, 8, 8] image) => (float[1, 3, H, W] y)
        <int64[8] pads = {0, 0, 1, 0, 0, 0, 0, 0}, int64[1] axis = {2}, int64[1] end = {8},
         int64[1] zero = {0}> {
            p = Pad(image, pads)
            above = Slice(p, zero, end, axis)
            y = Max(above, image)
        }""",
    )

    assert last(path).receptive_field == (2, 1)


def test_weights_used_twice_count_once(tmp_path):
    path = onnx_file(
        tmp_path / "shared.onnx",
        """g (float[1, 3, 8, 8] image) => (float[1, 3, H, W] y) {
            a = Conv(image, w)
            y = Conv(a, w)
        }""",
        w=(3, 3, 3, 3),
    )
    rows = inspect_model(path).layers

    assert [row.params for row in rows] == [0, 81, 0]
    assert [row.macs for row in rows] == [0, 36 * 81, 16 * 81]
