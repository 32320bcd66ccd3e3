"""A campaign: odd heads, shared, nested and recurrent parts, odd dtypes and pixels.

Each model is a file as a user would have it. What its bundle answers is held against the model as
Keras itself loads and runs it here, on pixels that are scaled here; nothing of cnnedge's export or
verification is used. Where a model is refused, the refusal is one line that says what to do.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass

import keras
import numpy as np
import pytest
from click.testing import CliRunner
from keras import layers, ops

from cnnedge.cli import main

pytestmark = pytest.mark.tf

SIZE, CLASSES = 32, 3
UNIT = ("--preprocess", "unit")


@dataclass(frozen=True)
class Case:
    """A model and what a user says of it.

    Attributes:
        build: Makes it.
        emits: What its rows are: "probabilities", "logits", or None: it is to be refused.
        options: What `cnnedge export` is told beyond the file and the data.
        scale: What the model wants of a pixel 0…255.
        refused: A part of the line that refuses it.
        output: Which of its outputs is the answer.
    """

    build: Callable[[], keras.Model]
    emits: str | None = "probabilities"
    options: tuple[str, ...] = UNIT
    scale: Callable[[np.ndarray], np.ndarray] = lambda x: x / 255.0
    refused: str = ""
    output: str | None = None


def image():
    return keras.Input((SIZE, SIZE, 3))


def body(x, filters=16):
    x = layers.Conv2D(filters, 3, strides=2, activation="relu")(x)
    return layers.Conv2D(filters, 3, strides=2, activation="relu")(x)


def head(x, activation="softmax", units=CLASSES, **options):
    """Dense layers whose answers are spread, as a trained network's are."""
    spread = keras.initializers.RandomNormal(stddev=3.0, seed=5)
    x = layers.GlobalAveragePooling2D()(x) if len(x.shape) == 4 else x
    return layers.Dense(units, activation=activation, kernel_initializer=spread, **options)(x)


def of(answer):
    """Return a builder of the model that ends in what ``answer`` makes of a picture."""

    def build():
        x = image()
        return keras.Model(x, answer(x))

    return build


def backbone(name):
    x = image()
    return keras.Model(x, body(x), name=name)


def maps(x, activation=None):
    """A convolution with a map for each class, spread."""
    spread = keras.initializers.RandomNormal(stddev=1.0, seed=7)
    return layers.Conv2D(CLASSES, 1, activation=activation, kernel_initializer=spread)(x)


def twice(layer, x):
    return layer(layer(x))


def mixed(policy):
    def build():
        before = keras.config.dtype_policy()
        keras.config.set_dtype_policy(policy)
        try:
            x = image()
            return keras.Model(x, head(body(x)))
        finally:
            keras.config.set_dtype_policy(before)

    return build


def normalized(model_of=lambda x: head(body(x))):
    x = image()
    normalization = layers.Normalization(axis=-1, mean=[120.0, 117.0, 104.0], variance=[4900.0] * 3)
    return keras.Model(x, model_of(normalization(x)))


def both_ways():
    """An ensemble of a network on the picture and on its mirror image."""
    x = image()
    inner = image()
    network = keras.Model(inner, head(body(inner)), name="network")
    return keras.Model(x, layers.Average()([network(x), network(ops.flip(x, axis=2))]))


def gated():
    x = image()
    y = body(x)
    return keras.Model(x, head(y * layers.Conv2D(1, 1, activation="sigmoid")(y)))


def rows(x):
    """A picture as a sequence of its rows."""
    return layers.Reshape((SIZE, SIZE * 3))(x)


@keras.saving.register_keras_serializable("campaign")
class Subclassed(keras.Model):
    def __init__(self, **options):
        super().__init__(**options)
        self.conv = layers.Conv2D(8, 3, activation="relu")
        self.pool = layers.GlobalAveragePooling2D()
        self.dense = layers.Dense(CLASSES, activation="softmax")

    def call(self, x):
        return self.dense(self.pool(self.conv(x)))


def subclassed():
    model = Subclassed()
    model(np.zeros((1, SIZE, SIZE, 3), np.float32))
    return model


def two_inputs():
    a, b = image(), image()
    return keras.Model([a, b], head(layers.Add()([body(a), body(b)])))


RAW = {"options": (), "scale": lambda x: x}
REFUSE = {"emits": None}
MODELS = {
    # heads
    "softmax_flattened": Case(
        of(
            lambda x: layers.Flatten()(
                maps(layers.GlobalAveragePooling2D(keepdims=True)(body(x)), "softmax")
            )
        )
    ),
    "softmax_reshaped": Case(of(lambda x: layers.Reshape((CLASSES,))(head(body(x))))),
    "softmax_of_each_pixel_averaged": Case(
        of(lambda x: layers.GlobalAveragePooling2D()(maps(body(x), "softmax")))
    ),
    "softmax_of_a_softmax": Case(of(lambda x: head(head(body(x))))),
    "dense_behind_a_softmax": Case(of(lambda x: head(head(body(x)), None)), "logits"),
    "weighted_softmaxes": Case(of(lambda x: 0.3 * head(body(x)) + 0.7 * head(body(x, 8)))),
    "averaged_softmaxes": Case(of(lambda x: layers.Average()([head(body(x)), head(body(x, 8))]))),
    "softmax_divided_by_its_sum": Case(
        of(lambda x: (lambda p: p / ops.sum(p, axis=-1, keepdims=True))(head(body(x), "softplus")))
    ),
    "temperature": Case(of(lambda x: head(body(x), None) / 2.5), "logits"),
    "temperature_inside": Case(of(lambda x: layers.Softmax()(head(body(x), None) * 4.0))),
    "cosine": Case(
        of(
            lambda x: head(
                layers.UnitNormalization()(layers.GlobalAveragePooling2D()(body(x))),
                None,
                use_bias=False,
            )
        ),
        "logits",
    ),
    "average_of_maps": Case(of(lambda x: layers.GlobalAveragePooling2D()(maps(body(x)))), "logits"),
    "log_softmax": Case(of(lambda x: head(body(x), "log_softmax")), "logits"),
    "relu_logits": Case(of(lambda x: head(body(x), "relu")), "logits"),
    "tanh_logits": Case(of(lambda x: head(body(x), "tanh")), "logits"),
    "sigmoids": Case(of(lambda x: head(body(x), "sigmoid")), **REFUSE, refused="sigmoid"),
    "shifted_sigmoids": Case(
        of(lambda x: layers.Rescaling(0.99, 0.001)(head(body(x), "sigmoid"))),
        **REFUSE,
        refused="sigmoid",
    ),
    "hard_sigmoids": Case(of(lambda x: head(body(x), "hard_sigmoid")), **REFUSE, refused="sigmoid"),
    "one_output": Case(of(lambda x: head(body(x), None, 1)), **REFUSE),
    "dict_of_one": Case(of(lambda x: {"p": head(body(x))}), output="p"),
    "dict_of_two": Case(
        of(lambda x: {"p": head(body(x)), "feature": layers.Flatten()(body(x, 8))}),
        **REFUSE,
        refused="--output",
    ),
    "dict_of_two_named": Case(
        of(lambda x: {"p": head(body(x)), "feature": layers.Flatten()(body(x, 8))}),
        options=(*UNIT, "--output", "p"),
        output="p",
    ),
    "a_map_for_an_answer": Case(of(lambda x: maps(body(x), "softmax")), **REFUSE),
    "two_inputs": Case(two_inputs, **REFUSE),
    # shared, nested and unlucky names
    "backbone_called_image": Case(of(lambda x: head(backbone("image")(x)))),
    "backbone_called_probabilities": Case(of(lambda x: head(backbone("probabilities")(x)))),
    "shared_convolution": Case(
        of(lambda x: head(twice(layers.Conv2D(16, 3, padding="same", activation="relu"), body(x))))
    ),
    "shared_dense": Case(
        of(
            lambda x: head(
                twice(layers.Dense(16, activation="relu"), layers.GlobalAveragePooling2D()(body(x)))
            )
        )
    ),
    "a_network_on_the_mirror_image_too": Case(both_ways),
    "time_distributed": Case(
        of(
            lambda x: head(
                layers.GlobalAveragePooling1D()(
                    layers.TimeDistributed(layers.Dense(8, activation="relu"))(rows(x))
                )
            )
        )
    ),
    # recurrent
    "lstm_of_rows": Case(of(lambda x: head(layers.LSTM(8)(rows(x))))),
    "gru_both_ways": Case(of(lambda x: head(layers.Bidirectional(layers.GRU(6))(rows(x))))),
    # operations
    "divided_by_its_maximum": Case(of(lambda x: head(body(x / (ops.max(x) + 1e-3))))),
    "cropped_to_its_aspect": Case(
        of(lambda x: head(body(layers.Resizing(24, 20, crop_to_aspect_ratio=True)(x))))
    ),
    "dense_of_each_pixel": Case(of(lambda x: head(layers.Dense(8, activation="relu")(body(x))))),
    "a_gate_of_one_channel": Case(gated),
    "odd_activations": Case(
        of(
            lambda x: head(
                layers.Activation("mish")(
                    layers.PReLU(shared_axes=[1, 2])(
                        layers.Activation("hard_swish")(
                            layers.Conv2D(8, 3)(
                                layers.Activation("selu")(layers.Conv2D(8, 3, strides=2)(x))
                            )
                        )
                    )
                )
            )
        )
    ),
    "softshrink": Case(of(lambda x: head(layers.Activation("soft_shrink")(body(x) * 3.0)))),
    "odd_convolutions": Case(
        of(
            lambda x: head(
                layers.Conv2DTranspose(8, 3, strides=2, activation="relu")(
                    layers.SeparableConv2D(12, 3, activation="relu")(
                        layers.DepthwiseConv2D(3, depth_multiplier=2, strides=2, activation="relu")(
                            x
                        )
                    )
                )
            )
        )
    ),
    "channels_first_inside": Case(
        of(lambda x: head(layers.Flatten()(layers.Permute((3, 1, 2))(body(x)))))
    ),
    # dtypes
    "mixed_float16": Case(mixed("mixed_float16")),
    "mixed_bfloat16": Case(mixed("mixed_bfloat16")),
    "float16": Case(mixed("float16")),
    "float64": Case(mixed("float64")),
    # pixels
    "scales_by_255": Case(of(lambda x: head(body(layers.Rescaling(1 / 255)(x)))), **RAW),
    "scales_to_one_either_way": Case(
        of(lambda x: head(body(layers.Rescaling(1 / 127.5, -1)(x)))), **RAW
    ),
    "scales_behind_augmentation": Case(
        of(
            lambda x: head(
                body(layers.Rescaling(1 / 255)(layers.RandomRotation(0.1)(layers.RandomFlip()(x))))
            )
        ),
        **RAW,
    ),
    "normalizes_raw_pixels": Case(normalized, **RAW),
    "rescaled_unit_pixels": Case(
        of(lambda x: head(body(layers.Rescaling(2.0, -1.0)(x)))),
        options=(),
        **REFUSE,
        refused="--preprocess",
    ),
    "scales_behind_a_convolution": Case(
        of(lambda x: head(layers.Rescaling(0.1)(body(x)))),
        options=(),
        **REFUSE,
        refused="--preprocess",
    ),
    "subclassed": Case(subclassed),
}

# What rounding a probability's last bits may move it by; wider for low precisions' own rounding.
FP32 = 1e-5
OWN_ROUNDING = {"mixed_float16": 1e-2, "float16": 1e-2, "mixed_bfloat16": 6e-2}


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_its_answers_are_the_models_own(name, three, tmp_path):
    case = MODELS[name]
    keras.utils.set_random_seed(11)
    file, bundle = tmp_path / "model.keras", tmp_path / "bundle"
    case.build().save(file)
    words = ["export", file, "-o", bundle, "--data", three, "--image-size", f"{SIZE},{SIZE}"]
    done = CliRunner().invoke(main, [*map(str, words), *case.options])
    if case.emits is None:
        assert done.exit_code == 1, done.output
        lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
        assert len(lines) == 1
        assert len(lines[0]) <= 300
        assert case.refused in lines[0]
        assert not bundle.exists()
        return
    assert done.exit_code in (0, 3), done.output + repr(done.exception)
    manifest = json.loads((bundle / "manifest.json").read_text())
    assert manifest["model"]["emits"] == case.emits
    files = sorted(three.rglob("*.png"))
    expected = own_answers(case, file, files)
    limit = OWN_ROUNDING.get(name, FP32)
    for variant in manifest["variants"]:
        if variant["target"] == "trt":
            continue
        found = answers_of(bundle / variant["file"], files)
        assert np.isfinite(found).all()
        difference = np.abs(found - expected).max()
        allowed = {"fp32": limit, "fp16": max(limit, 2e-2), "int8": 0.35}[variant["precision"]]
        assert difference <= allowed, (variant["name"], difference)
        if variant["precision"] != "int8":
            assert variant["verdict"]["status"] != "failed", variant["verdict"]


def pixels(files):
    from PIL import Image

    return np.stack([np.asarray(Image.open(file).convert("RGB")) for file in files])


def own_answers(case, file, files):
    """Return the answers of the model as Keras loads and runs it."""
    model = keras.saving.load_model(file, compile=False)
    rows = model(case.scale(pixels(files).astype(np.float32)), training=False)
    rows = rows[case.output] if case.output is not None else rows
    rows = np.asarray(ops.convert_to_numpy(ops.cast(rows, "float32")), np.float64)
    if case.emits == "logits":
        rows = np.exp(rows - rows.max(axis=1, keepdims=True))
        rows /= rows.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(rows.sum(axis=1), 1.0, atol=1e-2)
    return rows


def answers_of(onnx, files):
    """Return the answers of an exported file, as an app without cnnedge would have them."""
    import onnxruntime as ort

    session = ort.InferenceSession(str(onnx), providers=["CPUExecutionProvider"])
    return session.run(["probabilities"], {"image": pixels(files)})[0]
