"""The AlexNet family (Krizhevsky, Sutskever and Hinton, 2012).

Three forms: `alexnet` has the paper's kernels on one device, `alexnet_v1` half of them (the paper's
network as split over two GPUs, one half), and `AlexNetV2` the same features under a smaller
classifier, as a subclassed model. Padding ``[1, 2]`` before the first convolution makes 224 + 3 =
227 of 224 pixels, the size that the paper's 55x55 output needs.
"""

from __future__ import annotations

from typing import Any

import keras
from keras import layers

from cnnedge.models.layers import LocalResponseNormalization, check_input


def alexnet(
    im_height: int = 224,
    im_width: int = 224,
    num_classes: int = 1000,
    channels: int = 3,
    *,
    lrn: bool = False,
) -> keras.Model:
    """Build AlexNet with 96, 256, 384, 384 and 256 kernels and fully connected layers of 2048.

    Args:
        im_height: Input height in pixels.
        im_width: Input width in pixels.
        num_classes: Length of the probability vector.
        channels: Input channels.
        lrn: Normalise after the first two convolutions, with the paper's constants.

    Returns:
        A functional model, float32 ``[N, im_height, im_width, channels]`` to ``[N, num_classes]``.

    Raises:
        ModelError: the input is too small.
    """
    features = _features((96, 256, 384, 384, 256), lrn=lrn)
    return _classifier("alexnet", features, (im_height, im_width, channels), num_classes)


def alexnet_v1(
    im_height: int = 224, im_width: int = 224, num_classes: int = 1000, channels: int = 3
) -> keras.Model:
    """Build AlexNet with 48, 128, 192, 192 and 128 kernels and fully connected layers of 2048.

    Args:
        im_height: Input height in pixels.
        im_width: Input width in pixels.
        num_classes: Length of the probability vector.
        channels: Input channels.

    Returns:
        A functional model, float32 ``[N, im_height, im_width, channels]`` to ``[N, num_classes]``.

    Raises:
        ModelError: the input is too small.
    """
    features = _features((48, 128, 192, 192, 128))
    return _classifier("alexnet_v1", features, (im_height, im_width, channels), num_classes)


def alexnet_v2(
    im_height: int = 224, im_width: int = 224, num_classes: int = 1000, channels: int = 3
) -> AlexNetV2:
    """Build `AlexNetV2` for one input size.

    Args:
        im_height: Input height in pixels.
        im_width: Input width in pixels.
        num_classes: Length of the probability vector.
        channels: Input channels.

    Raises:
        ModelError: the input is too small.
    """
    model = AlexNetV2(num_classes)
    model.build((None, im_height, im_width, channels))
    return model


@keras.saving.register_keras_serializable(package="cnnedge")
class AlexNetV2(keras.Model):
    """AlexNet v1's features under fully connected layers of 1024 and 128, as a subclassed model.

    Float32 ``[N, H, W, C]`` to float32 ``[N, num_classes]`` probabilities; H, W and C are fixed
    when the model is built, by `build` or by its first call.

    Args:
        num_classes: Length of the probability vector.
        **kwargs: What every Keras model takes.

    Attributes:
        features: The convolutions and poolings, a ``Sequential``.
        flatten: ``[N, h, w, c]`` to ``[N, h * w * c]``.
        classifier: The fully connected layers and the softmax, a ``Sequential``.
        input_shape: ``(None, H, W, C)`` once built, else None.
    """

    def __init__(self, num_classes: int = 1000, **kwargs: Any) -> None:
        super().__init__(**{"name": "alexnet_v2"} | kwargs)
        self.num_classes = num_classes
        self.input_shape: tuple[int | None, ...] | None = None
        self.features = keras.Sequential(_features((48, 128, 192, 192, 128)), name="features")
        self.flatten = layers.Flatten(name="flatten")
        self.classifier = keras.Sequential(
            [
                layers.Dropout(0.2, name="dropout1"),
                layers.Dense(1024, activation="relu", name="fc1"),
                layers.Dropout(0.2, name="dropout2"),
                layers.Dense(128, activation="relu", name="fc2"),
                layers.Dense(num_classes, name="fc3"),
                layers.Softmax(name="predictions"),
            ],
            name="classifier",
        )

    def build(self, input_shape: tuple[int | None, ...]) -> None:
        """Make the weights for images of ``(N, H, W, C)``.

        Raises:
            ModelError: H or W is too small.
        """
        check_input(self.name, self.features.layers, input_shape[1], input_shape[2])
        self.input_shape = (None, *input_shape[1:])
        self.features.build(self.input_shape)
        flat = self.flatten.compute_output_shape(self.features.output_shape)
        self.classifier.build(flat)
        self.built = True

    def call(self, inputs: Any, training: bool | None = None) -> Any:
        """Classify float32 ``[N, H, W, C]``."""
        x = self.features(inputs, training=training)
        x = self.flatten(x)
        return self.classifier(x, training=training)

    def compute_output_shape(self, input_shape: tuple[int | None, ...]) -> tuple[int | None, ...]:
        """Return ``(N, num_classes)``."""
        return input_shape[0], self.num_classes

    def get_config(self) -> dict[str, Any]:
        """Return what rebuilds the model."""
        return {"num_classes": self.num_classes, "name": self.name, "trainable": self.trainable}


def _features(kernels: tuple[int, int, int, int, int], *, lrn: bool = False) -> list[layers.Layer]:
    k1, k2, k3, k4, k5 = kernels
    return [
        layers.ZeroPadding2D(((1, 2), (1, 2)), name="pad1"),
        layers.Conv2D(k1, 11, strides=4, activation="relu", name="conv1"),
        *([LocalResponseNormalization(name="lrn1")] if lrn else []),
        layers.MaxPooling2D(3, strides=2, name="pool1"),
        layers.Conv2D(k2, 5, padding="same", activation="relu", name="conv2"),
        *([LocalResponseNormalization(name="lrn2")] if lrn else []),
        layers.MaxPooling2D(3, strides=2, name="pool2"),
        layers.Conv2D(k3, 3, padding="same", activation="relu", name="conv3"),
        layers.Conv2D(k4, 3, padding="same", activation="relu", name="conv4"),
        layers.Conv2D(k5, 3, padding="same", activation="relu", name="conv5"),
        layers.MaxPooling2D(3, strides=2, name="pool3"),
    ]


def _classifier(
    name: str, features: list[layers.Layer], image: tuple[int, int, int], num_classes: int
) -> keras.Model:
    check_input(name, features, image[0], image[1])
    inputs = keras.Input(image, name="image")
    x = inputs
    for layer in features:
        x = layer(x)
    x = layers.Flatten(name="flatten")(x)
    x = layers.Dropout(0.2, name="dropout1")(x)
    x = layers.Dense(2048, activation="relu", name="fc1")(x)
    x = layers.Dropout(0.2, name="dropout2")(x)
    x = layers.Dense(2048, activation="relu", name="fc2")(x)
    x = layers.Dense(num_classes, name="fc3")(x)
    outputs = layers.Softmax(name="predictions")(x)
    return keras.Model(inputs, outputs, name=name)
