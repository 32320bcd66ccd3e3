"""Layers that Keras lacks, and the smallest input that a stack of layers accepts."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import keras
import tensorflow as tf
from keras import ops

from cnnedge.errors import ModelError

# How much of the result the largest activation makes at the start: near max pooling, so that
# convolutions trained with max pooling stay useful, yet far enough from it for a gradient to flow.
_FIRST_SHARE = 0.9


@keras.saving.register_keras_serializable(package="cnnedge")
class LocalResponseNormalization(keras.layers.Layer):
    r"""Normalisation across neighbouring channels, ``[N, H, W, C]`` to the same.

    ``y[c] = x[c] / (k + alpha * sum(x[c-r .. c+r]^2))^beta`` with ``r = size // 2``: Krizhevsky,
    Sutskever and Hinton, "ImageNet Classification with Deep Convolutional Neural Networks" (2012),
    section 3.3, whose constants are the defaults.

    Args:
        size: The number of channels summed over, odd (the paper's n).
        k: The constant added to the sum.
        alpha: The factor of the sum. As in the paper it is not divided by ``size``; ONNX's `LRN`
            and PyTorch do divide theirs.
        beta: The exponent.
        **kwargs: What every Keras layer takes.

    Raises:
        ModelError: ``size`` is not a positive odd integer.
    """

    def __init__(
        self,
        size: int = 5,
        k: float = 2.0,
        alpha: float = 1e-4,
        beta: float = 0.75,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if size < 1 or size % 2 == 0:
            raise ModelError(f"the size of {self.name} is {size}", fix="pass an odd number like 5")
        self.size = size
        self.k = k
        self.alpha = alpha
        self.beta = beta

    def call(self, inputs: Any) -> Any:
        """Normalise float ``[N, H, W, C]``."""
        # TensorFlow's operation rather than elementary ones: it is what exports to ONNX as `LRN`.
        return tf.nn.local_response_normalization(
            inputs, depth_radius=self.size // 2, bias=self.k, alpha=self.alpha, beta=self.beta
        )

    def compute_output_shape(self, input_shape: tuple[int | None, ...]) -> tuple[int | None, ...]:
        """Return the input's shape."""
        return input_shape

    def get_config(self) -> dict[str, Any]:
        """Return what rebuilds the layer."""
        own = {"size": self.size, "k": self.k, "alpha": self.alpha, "beta": self.beta}
        return super().get_config() | own


@keras.saving.register_keras_serializable(package="cnnedge")
class SortPool2D(keras.layers.Layer):
    """2x2 pooling, stride 2, that weighs the largest activations of each window by learned weights.

    The four activations are sorted in descending order and the first ``pool_range`` of them summed
    with weights that are positive and sum to one (the softmax of the layer's variable), shared by
    all channels: Sahil Singla, "A new kind of pooling layer for faster and sharper convergence"
    (2018); compare Deliège et al., "Ordinal Pooling" (2019). ``pool_range=1`` is max pooling, to
    the bit, and has no weights. An odd last row or column is left out, as 'valid' max pooling does.

    ``[N, H, W, C]`` to ``[N, H // 2, W // 2, C]``.

    Args:
        pool_range: How many of the four activations take part, 1 to 4.
        **kwargs: What every Keras layer takes.

    Raises:
        ModelError: ``pool_range`` is not 1, 2, 3 or 4.
    """

    # What Keras' own pooling layers carry, so that one code path reads them all.
    pool_size = (2, 2)
    strides = (2, 2)
    padding = "valid"

    def __init__(self, pool_range: int = 4, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if pool_range not in (1, 2, 3, 4):
            raise ModelError(
                f"the pool_range of {self.name} is {pool_range!r}", fix="pass 1, 2, 3 or 4"
            )
        self.pool_range = pool_range

    def build(self, input_shape: tuple[int | None, ...]) -> None:
        """Make the ``pool_range`` logits of the weights."""
        if self.pool_range > 1:
            self.logits = self.add_weight(
                name="logits", shape=(self.pool_range,), initializer=_mostly_the_first
            )
        self.built = True

    def call(self, inputs: Any) -> Any:
        """Pool float ``[N, H, W, C]``."""
        # Strides and a stop of -1 rather than sizes: no Shape operation when H and W are open.
        a, b = inputs[:, 0:-1:2, 0:-1:2], inputs[:, 0:-1:2, 1::2]
        c, d = inputs[:, 1::2, 0:-1:2], inputs[:, 1::2, 1::2]
        if self.pool_range == 1:
            return ops.maximum(ops.maximum(a, b), ops.maximum(c, d))
        ranked = _sorted_four(a, b, c, d)
        weights = ops.softmax(self.logits)
        pooled = ranked[0] * weights[0]
        for rank in range(1, self.pool_range):
            pooled += ranked[rank] * weights[rank]
        return pooled

    def compute_output_shape(self, input_shape: tuple[int | None, ...]) -> tuple[int | None, ...]:
        """Return ``(N, H // 2, W // 2, C)``."""
        n, h, w, c = input_shape
        return n, None if h is None else h // 2, None if w is None else w // 2, c

    def get_config(self) -> dict[str, Any]:
        """Return what rebuilds the layer."""
        return super().get_config() | {"pool_range": self.pool_range}


def _sorted_four(a: Any, b: Any, c: Any, d: Any) -> tuple[Any, Any, Any, Any]:
    """Sort four tensors elementwise, descending.

    Five compare-exchanges, the fewest that sort four (Knuth, TAOCP 3, section 5.3.4). Maximum and
    minimum have gradients and run on every runtime, which a Sort or TopK does not.
    """
    a, b = ops.maximum(a, b), ops.minimum(a, b)
    c, d = ops.maximum(c, d), ops.minimum(c, d)
    a, c = ops.maximum(a, c), ops.minimum(a, c)
    b, d = ops.maximum(b, d), ops.minimum(b, d)
    b, c = ops.maximum(b, c), ops.minimum(b, c)
    return a, b, c, d


def _mostly_the_first(shape: tuple[int, ...], dtype: Any = None) -> Any:
    """Return logits whose softmax gives `_FIRST_SHARE` to the first and the rest to the others."""
    others = shape[0] - 1
    first = math.log(others * _FIRST_SHARE / (1 - _FIRST_SHARE))
    return ops.convert_to_tensor([first] + [0.0] * others, dtype=dtype)


def smallest_input(layers: Iterable[keras.layers.Layer]) -> tuple[int, int]:
    """Return the smallest ``(height, width)`` in pixels for which no layer's output is empty.

    Walks the stack backwards from an output of 1x1: ``N = (W - F + 2P) / S + 1`` rounded down
    gives ``W >= (N - 1) * S + F - 2P``.

    Args:
        layers: Layers applied one after the other; those that keep the size may be among them.
    """
    stack = list(layers)
    sizes = []
    for axis in (0, 1):
        size = 1
        for layer in reversed(stack):
            if isinstance(layer, keras.layers.ZeroPadding2D):
                size = max(1, size - sum(layer.padding[axis]))
                continue
            kernel = getattr(layer, "kernel_size", None) or getattr(layer, "pool_size", None)
            if kernel is None:
                continue
            dilation = getattr(layer, "dilation_rate", (1, 1))[axis]
            window = 1 if layer.padding == "same" else (kernel[axis] - 1) * dilation + 1
            size = (size - 1) * layer.strides[axis] + window
        sizes.append(size)
    return sizes[0], sizes[1]


def check_input(
    name: str, layers: Iterable[keras.layers.Layer], height: int | None, width: int | None
) -> None:
    """Refuse an input from which nothing would be left; a size of None is not checked.

    Raises:
        ModelError: the input is too small; the message names the smallest size that works.
    """
    smallest = smallest_input(layers)
    sizes = (height, width)
    if any(size is not None and size < least for size, least in zip(sizes, smallest, strict=True)):
        raise ModelError(
            f"an input of {height}x{width} is too small for {name}",
            fix=f"the smallest that works is {smallest[0]}x{smallest[1]} (height x width)",
        )
