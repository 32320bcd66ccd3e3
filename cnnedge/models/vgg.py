"""The VGG family (Simonyan and Zisserman, "Very Deep Convolutional Networks", 2014, table 1)."""

from __future__ import annotations

from collections.abc import Sequence

import keras
from keras import initializers, layers

from cnnedge.errors import ModelError
from cnnedge.models.layers import SortPool2D, check_input

Token = int | str
"""A number is a 3x3 convolution of so many kernels, "M" max pooling, "S" `SortPool2D`."""

CONFIGS: dict[str, tuple[Token, ...]] = {
    "vgg11": (64, "M", 128, "M", 256, 256, "M", 512, 512, "M", 512, 512, "M"),
    "vgg13": (64, 64, "M", 128, 128, "M", 256, 256, "M", 512, 512, "M", 512, 512, "M"),
    "vgg16": (
        *(64, 64, "M", 128, 128, "M"),
        *(256, 256, 256, "M", 512, 512, 512, "M", 512, 512, 512, "M"),
    ),
    "vgg19": (
        *(64, 64, "M", 128, 128, "M"),
        *(256, 256, 256, 256, "M", 512, 512, 512, 512, "M", 512, 512, 512, 512, "M"),
    ),
}


def vgg(
    name: str = "vgg16",
    im_height: int = 224,
    im_width: int = 224,
    num_classes: int = 1000,
    channels: int = 3,
    *,
    fc_units: int = 2048,
    pool: str = "max",
    pool_range: int | None = None,
    cfg: Sequence[Token] | None = None,
) -> keras.Model:
    """Build a VGG network.

    Args:
        name: A name in `CONFIGS`; merely the model's name where ``cfg`` is given.
        im_height: Input height in pixels.
        im_width: Input width in pixels.
        num_classes: Length of the probability vector.
        channels: Input channels.
        fc_units: Width of the two hidden dense layers; the paper has 4096.
        pool: "max" as the configuration says, or "sort" to turn every "M" of it into "S".
        pool_range: What every `SortPool2D` is given, 1 to 4; 4 where it is None.
        cfg: A configuration of one's own, see `make_feature`.

    Returns:
        A functional model, float32 ``[N, im_height, im_width, channels]`` to ``[N, num_classes]``.

    Raises:
        ModelError: the input is too small, or an option is none of those above.
    """
    if pool not in ("max", "sort"):
        raise ModelError(f"pool of {name} is {pool!r}", fix='pass "max" or "sort"')
    if not isinstance(fc_units, int) or fc_units < 1:
        raise ModelError(f"fc_units of {name} is {fc_units!r}", fix="pass an integer like 2048")
    tokens = CONFIGS[name] if cfg is None else tuple(cfg)
    if pool == "sort":
        tokens = tuple("S" if token == "M" else token for token in tokens)
    if pool_range is not None and "S" not in tokens:
        raise ModelError(
            f"pool_range of {name} has no effect on max pooling", fix='pass pool="sort" with it'
        )
    features = make_feature(tokens, pool_range=4 if pool_range is None else pool_range)
    check_input(name, features, im_height, im_width)

    inputs = keras.Input((im_height, im_width, channels), name="image")
    x = inputs
    for layer in features:
        x = layer(x)
    x = layers.Flatten(name="flatten")(x)
    x = layers.Dropout(0.5, name="dropout1")(x)
    x = _dense(fc_units, "fc1", activation="relu")(x)
    x = layers.Dropout(0.5, name="dropout2")(x)
    x = _dense(fc_units, "fc2", activation="relu")(x)
    x = _dense(num_classes, "fc3")(x)
    outputs = layers.Softmax(name="predictions")(x)
    return keras.Model(inputs, outputs, name=name)


def make_feature(cfg: Sequence[Token], *, pool_range: int = 4) -> list[layers.Layer]:
    """Make the layers of a configuration: ``conv1_1``, ``pool1``, ``conv2_1`` and so on.

    Args:
        cfg: Tokens in order. A number is a 3x3 'same' convolution of so many kernels with ReLU;
            "M" is 2x2 max pooling and "S" `SortPool2D`, and each ends a block.
        pool_range: What every `SortPool2D` is given.

    Raises:
        ModelError: a token is none of these, or ``pool_range`` is not 1 to 4.
    """
    features: list[layers.Layer] = []
    block, convolution = 1, 0
    for token in cfg:
        if token == "M":
            features.append(layers.MaxPooling2D(2, strides=2, name=f"pool{block}"))
        elif token == "S":
            features.append(SortPool2D(pool_range, name=f"pool{block}"))
        elif isinstance(token, int) and not isinstance(token, bool) and token > 0:
            convolution += 1
            features.append(_convolution(token, f"conv{block}_{convolution}"))
            continue
        else:
            raise ModelError(
                f"{token!r} is no token of a VGG configuration",
                fix='use a number of kernels, "M" (max pooling) or "S" (sort pooling)',
            )
        block, convolution = block + 1, 0
    return features


def _convolution(kernels: int, name: str) -> layers.Conv2D:
    he_fan_out = initializers.VarianceScaling(2.0, mode="fan_out", distribution="truncated_normal")
    return layers.Conv2D(
        kernels, 3, padding="same", activation="relu", kernel_initializer=he_fan_out, name=name
    )


def _dense(units: int, name: str, activation: str | None = None) -> layers.Dense:
    fan_out = initializers.VarianceScaling(1 / 3, mode="fan_out", distribution="uniform")
    return layers.Dense(units, activation=activation, kernel_initializer=fan_out, name=name)
