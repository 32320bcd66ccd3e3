"""The network and its optimizer: an epoch of training, and their state in and out."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cnnedge.data.stream import Batch, Stream
from cnnedge.image import ImageContract
from cnnedge.models import build, model_info
from cnnedge.progress import Progress
from cnnedge.train.history import EpochReport

if TYPE_CHECKING:
    from cnnedge.backends.keras import ModelNote

MIXED = "mixed_float16"


def precision() -> str:
    """Return Keras' name of what is computed in: mixed where TensorFlow lists a GPU."""
    import tensorflow as tf

    return MIXED if tf.config.list_physical_devices("GPU") else "float32"


class Learner:
    """A network with freshly drawn weights, and an optimizer that has not moved yet.

    Its weights are float32, whatever it computes in.

    Args:
        name: A name in `cnnedge.models.MODELS`.
        classes: Length of the probability vector.
        image_size: ``(height, width)`` in pixels; the model's own where it is None.
        seed: Seeds the weights and the dropout.
        learning_rate: Adam's.
        options: What `cnnedge.models.build` takes besides.

    Raises:
        ModelError: as `cnnedge.models.build`.
    """

    def __init__(
        self,
        name: str,
        classes: int,
        image_size: tuple[int, int] | None,
        *,
        seed: int,
        learning_rate: float,
        options: dict[str, Any],
    ) -> None:
        import keras

        height, width = image_size or (None, None)
        self._rebuild = partial(
            build, name, height=height, width=width, classes=classes, seed=seed, **options
        )
        self._name = name
        self._precision = precision()
        policy = keras.config.dtype_policy()
        keras.config.set_dtype_policy(self._precision)
        try:
            self.model = self._rebuild()
        finally:
            keras.config.set_dtype_policy(policy)
        self._optimizer = keras.optimizers.Adam(learning_rate)
        if self._precision == MIXED:
            self._optimizer = keras.optimizers.LossScaleOptimizer(self._optimizer)
            for layer in self.model._flatten_layers():
                if isinstance(layer, keras.layers.Softmax):
                    layer.dtype_policy = "float32"  # small probabilities are 0 in float16
        self._optimizer.build(self.model.trainable_variables)
        self.contract = ImageContract(*self.model.input_shape[1:])
        self._train_step, self._measure = self._compile()

    @property
    def parameters(self) -> int:
        """How many weights the network has."""
        return int(self.model.count_params())

    @property
    def nbytes(self) -> int:
        """What the weights take on disk."""
        return 4 * self.parameters

    def init_from(self, source: str | None) -> str:
        """Start the convolutions from trained weights, and return what these want of the pixels.

        Raises:
            ModelError: as `cnnedge.models.pretrained.init_from`.
        """
        if source is None:
            return model_info(self._name).normalization
        from cnnedge.models.pretrained import init_from

        return init_from(self.model, source).normalization

    def run_epoch(self, epoch: int, epochs: int, stream: Stream, progress: Progress) -> EpochReport:
        """Train on every batch once, then measure on the validation images."""
        before, total = (epoch - 1) * len(stream), epochs * len(stream)
        started = time.perf_counter()
        loss, accuracy = _mean(
            self._train_step,
            stream.training(epoch),
            lambda done: progress("train", before + done, total),
        )
        val_loss, val_accuracy = _mean(self._measure, stream.validation(), lambda done: None)
        seconds = time.perf_counter() - started
        return EpochReport(epoch, epochs, loss, accuracy, val_loss, val_accuracy, seconds)

    def variables(self) -> list[np.ndarray]:
        """Return a copy of the weights and of the state of the dropout's random generators."""
        return [np.array(variable) for variable in self.model.variables]

    def optimizer_variables(self) -> list[np.ndarray]:
        """Return a copy of the optimizer's state, its step count included."""
        return [np.array(variable) for variable in self._optimizer.variables]

    def restore(
        self, variables: Sequence[np.ndarray], optimizer: Sequence[np.ndarray] | None = None
    ) -> None:
        """Put back what `variables` and `optimizer_variables` returned."""
        for variable, value in zip(self.model.variables, variables, strict=True):
            variable.assign(value)
        if optimizer is not None:
            for variable, value in zip(self._optimizer.variables, optimizer, strict=True):
                variable.assign(value)

    def save(self, path: Path, note: ModelNote, metrics: dict[str, Any]) -> None:
        """Write a model that computes in float32, whatever this one does."""
        from cnnedge.backends.keras import save_model

        save_model(self.in_float32(), path, replace(note, metrics=metrics))

    def in_float32(self) -> Any:
        """Return the model, or one with its weights where it computes in mixed precision."""
        if self._precision != MIXED:
            return self.model
        model = self._rebuild()
        model.set_weights(self.model.get_weights())
        return model

    def _compile(self) -> tuple[Callable[..., Any], Callable[..., Any]]:
        """Return two functions of a batch; each returns its size, summed loss and right answers."""
        import keras
        import tensorflow as tf

        model, optimizer = self.model, self._optimizer
        signature = (
            tf.TensorSpec((None, *model.input_shape[1:]), tf.float32),
            tf.TensorSpec((None,), tf.int64),
        )

        def sums(probabilities: Any, targets: Any, losses: Any) -> Any:
            right = tf.equal(tf.argmax(probabilities, axis=1), targets)
            sizes = tf.ones_like(losses)
            return tf.reduce_sum(tf.stack([sizes, losses, tf.cast(right, tf.float32)]), axis=1)

        @tf.function(input_signature=signature, autograph=False)
        def train_step(images: Any, targets: Any) -> Any:
            with tf.GradientTape() as tape:
                probabilities = tf.cast(model(images, training=True), tf.float32)
                losses = keras.losses.sparse_categorical_crossentropy(targets, probabilities)
                scaled = optimizer.scale_loss(tf.reduce_mean(losses))
            gradients = tape.gradient(scaled, model.trainable_variables)
            optimizer.apply(gradients, model.trainable_variables)
            return sums(probabilities, targets, losses)

        @tf.function(input_signature=signature, autograph=False)
        def measure(images: Any, targets: Any) -> Any:
            probabilities = tf.cast(model(images, training=False), tf.float32)
            losses = keras.losses.sparse_categorical_crossentropy(targets, probabilities)
            return sums(probabilities, targets, losses)

        return train_step, measure


def _mean(
    step: Callable[..., Any], batches: Iterator[Batch], on_batch: Callable[[int], None]
) -> tuple[float, float]:
    """Return the mean loss and accuracy of a step over batches."""
    totals = np.zeros(3)
    for done, (images, targets) in enumerate(batches, 1):
        totals += step(images, targets).numpy()
        on_batch(done)
    size, loss, right = totals.tolist()
    return loss / size, right / size
