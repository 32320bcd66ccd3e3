"""How much each unit matters: by what removing it does to the loss, or by its weights alone."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from cnnedge.compress.channels import ChannelMap

TEMPERATURE = 4.0  # of the loss: a network that is sure of its training images has no gradients
SMALLEST = 1e-30  # a probability whose logarithm is still a float32


def taylor(
    channels: ChannelMap, batches: Iterable[tuple[Any, Any]], *, emits: str = "probabilities"
) -> np.ndarray:
    """Estimate how the loss would change without each unit, to the first order.

    Setting a unit to zero wherever it is read changes the loss of an image by about the sum of
    ``x * dL/dx`` over these places; the mean over images of its square is the importance (Molchanov
    et al., "Importance Estimation for Neural Network Pruning", 2019, equations 7 and 8; with
    activations in the place of weights, which is the same where one layer reads them).

    Args:
        channels: The network's channels.
        batches: Of ``(float32 [n, H, W, C], int64 [n])``, normalized, with their classes.
        emits: "probabilities" or "logits", the network's output.

    Returns:
        float64 ``[units]``, 0 or more.
    """
    import tensorflow as tf

    graph = channels.graph
    readers = [
        (call, channels.layers[id(call.operation)])
        for call in graph.calls
        if channels.layers[id(call.operation)].work
        # A depthwise convolution hands channels on, to where they are read.
        and channels.layers[id(call.operation)].width is not None
    ]
    sums = np.zeros(channels.units)
    images_seen = 0

    @tf.function(autograph=False, reduce_retracing=True)
    def contributions(images: Any, targets: Any) -> list[Any]:
        read: list[Any] = []
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            values: dict[int, Any] = {id(graph.inputs[0]): images}
            tape.watch(images)
            for call in graph.calls:
                if any(call is reader for reader, _ in readers):
                    # A tensor of its own, so that it is this reader's share of the gradient alone.
                    own = tf.identity(values[id(call.inputs[0])])
                    read.append(own)
                    shared = values[id(call.inputs[0])]
                    values[id(call.inputs[0])] = own
                    call.replay(call.operation, values)
                    values[id(call.inputs[0])] = shared
                else:
                    call.replay(call.operation, values)
            found = values[id(graph.outputs[0])]
            losses = softened_losses(found, targets, emits)
        gradients = tape.gradient(losses, read)
        return [
            tf.reduce_sum(x * g, axis=list(range(1, len(x.shape) - 1)))
            for x, g in zip(read, gradients, strict=True)
        ]

    for images, targets in batches:
        per_image = np.zeros((channels.units, len(images)))
        for (_, found), values in zip(readers, contributions(images, targets), strict=True):
            labels = found.taken
            assert labels is not None
            free = labels >= 0
            np.add.at(per_image, labels[free], values.numpy().T[free].astype(np.float64))
        sums += np.square(per_image).sum(axis=1)
        images_seen += len(images)
    return sums / max(images_seen, 1)


def softened_losses(found: Any, targets: Any, emits: str) -> Any:
    """Return each image's cross-entropy at `TEMPERATURE`, float32 ``[n]``."""
    import keras

    logits = as_logits(found, emits) / TEMPERATURE
    return keras.losses.sparse_categorical_crossentropy(targets, logits, from_logits=True)


def as_logits(found: Any, emits: str) -> Any:
    """Return answers as logits: the logarithms of probabilities are."""
    import tensorflow as tf

    if emits == "logits":
        return found
    return tf.math.log(tf.maximum(found, SMALLEST))


def l1(channels: ChannelMap) -> np.ndarray:
    """Estimate each unit's importance with no data: the sum of its filters' absolute weights.

    Li et al., "Pruning Filters for Efficient ConvNets" (2017), section 3.1; divided by the mean of
    the units that the same layers make, since layers differ in scale.

    Returns:
        float64 ``[units]``, 0 or more.
    """
    sums = np.zeros(channels.units)
    for found in channels.layers.values():
        if found.width is None or not found.work:
            continue
        last = max(found.work)  # a separable convolution's second kernel makes its channels
        kernel = np.abs(np.array(found.layer.weights[last], np.float64))
        axis = kernel.ndim - (2 if type(found.layer).__name__ == "Conv2DTranspose" else 1)
        norms = kernel.sum(axis=tuple(i for i in range(kernel.ndim) if i != axis))
        free = found.width >= 0
        np.add.at(sums, found.width[free], norms[free])
    for group in channels.groups:
        mean = sums[group.units].mean()
        if mean > 0:
            sums[group.units] /= mean
    return sums
