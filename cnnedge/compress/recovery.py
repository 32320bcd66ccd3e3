"""Fine-tuning by distillation: the smaller network learns to answer like the reference."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from cnnedge.compress.importance import TEMPERATURE, as_logits
from cnnedge.data.stream import Batch, Stream
from cnnedge.progress import Progress

if TYPE_CHECKING:
    import keras

# Of the loss: the reference's soft answers against the labels.
SOFT_SHARE = 0.9
WARM_UP = 50  # steps in which the learning rate climbs
VIEWS = 8  # in which each image is varied; the reference answers each of them once


@dataclass(frozen=True)
class RecoveryEpoch:
    """One pass over the training images.

    Attributes:
        round: Which round of pruning it follows, from 1.
        epoch: Within that round, from 1.
        epochs: How many that round has.
        loss: Mean of the training images, see `Student`.
        validation_top1: Share of the validation images answered right after it, 0…1.
        seconds: What it took, validation included.
    """

    round: int
    epoch: int
    epochs: int
    loss: float
    validation_top1: float
    seconds: float

    def __str__(self) -> str:
        return (
            f"round {self.round}, epoch {self.epoch}/{self.epochs}: loss {self.loss:.3f}, "
            f"validation {self.validation_top1 * 100:.1f} %, {self.seconds:.0f} s"
        )


class Teacher:
    """The reference's answers to the training images, each view of them asked for once.

    Args:
        model: The reference.
        stream: The images.
        emits: "probabilities" or "logits".
        images: How many the split has, those held back included.
        progress: Told while it answers.
    """

    def __init__(
        self, model: keras.Model, stream: Stream, emits: str, images: int, progress: Progress
    ) -> None:
        self._answer = _Answers(model, emits)
        self._stream = stream
        self._images = images
        self._progress = progress
        self._known: dict[int, np.ndarray] = {}

    def logits(self, view: int) -> np.ndarray:
        """Return float32 ``[images, classes]``; the rows of those held back mean nothing."""
        if view not in self._known:
            classes = self._answer.classes
            found = np.zeros((self._images, classes), np.float32)
            for done, (images, at) in enumerate(self._stream.view(view), 1):
                found[at.numpy()] = self._answer(images).numpy()
                self._progress(f"reference, view {view + 1}", done, len(self._stream))
            self._known[view] = found
        return self._known[view]


class _Answers:
    """A network as a traced function to logits, in inference mode."""

    def __init__(self, model: keras.Model, emits: str) -> None:
        import tensorflow as tf

        self.classes = int(model.compute_output_shape((1, *model.input_shape[1:]))[-1])
        self._call = tf.function(
            lambda images: as_logits(model(images, training=False), emits),
            autograph=False,
            reduce_retracing=True,
        )

    def __call__(self, images: Any) -> Any:
        return self._call(images)


class Student:
    """The smaller network and its optimizer during one round.

    The loss is ``SOFT_SHARE * T^2 * KL(reference || network)`` of the answers at temperature T plus
    ``1 - SOFT_SHARE`` of the cross-entropy to the labels: Hinton, Vinyals and Dean, "Distilling the
    Knowledge in a Neural Network" (2015), section 2. Adam, its rate climbing for `WARM_UP` steps
    and falling on a cosine to 0 at the end of the round.

    Args:
        model: The network, whose weights move.
        emits: "probabilities" or "logits".
        learning_rate: Adam's, at its highest.
        steps: How many the round has.
    """

    def __init__(self, model: keras.Model, emits: str, *, learning_rate: float, steps: int) -> None:
        import keras

        self.model = model
        self._rate = learning_rate
        self._steps = steps
        self._optimizer = keras.optimizers.Adam(learning_rate)
        self._optimizer.build(model.trainable_variables)
        self._step = self._compile(emits)
        self._answer = _Answers(model, emits)

    def variables(self) -> list[np.ndarray]:
        """Return a copy of the weights and of the state of the dropout's random generators."""
        return [np.array(variable) for variable in self.model.variables]

    def optimizer_variables(self) -> list[np.ndarray]:
        """Return a copy of the optimizer's state, its step count included."""
        return [np.array(variable) for variable in self._optimizer.variables]

    def restore(self, variables: Sequence[np.ndarray], optimizer: Sequence[np.ndarray]) -> None:
        """Put back what `variables` and `optimizer_variables` returned."""
        for variable, value in zip(self.model.variables, variables, strict=True):
            variable.assign(value)
        for variable, value in zip(self._optimizer.variables, optimizer, strict=True):
            variable.assign(value)

    def learn(
        self, batches: Iterator[Batch], logits: np.ndarray, targets: np.ndarray, taken: int
    ) -> Iterator[float]:
        """Take a step on each batch of ``(images, indices)``; yield its loss times its images.

        Args:
            batches: What to learn from.
            logits: The reference's answers by index.
            targets: The classes by index.
            taken: Steps of this round that went before.
        """
        import tensorflow as tf

        for step, (images, at) in enumerate(batches, taken):
            where = at.numpy()
            self._optimizer.learning_rate = self._rate_at(step)
            loss = self._step(images, tf.constant(logits[where]), tf.constant(targets[where]))
            yield float(loss) * len(where)

    def answers(self, images: Any) -> np.ndarray:
        """Return logits, float32 ``[n, classes]``."""
        return self._answer(images).numpy()

    def _rate_at(self, step: int) -> float:
        climbing = min(1.0, (step + 1) / WARM_UP)
        return self._rate * climbing * 0.5 * (1 + math.cos(math.pi * step / self._steps))

    def _compile(self, emits: str) -> Any:
        import keras
        import tensorflow as tf

        model, optimizer = self.model, self._optimizer
        signature = (
            tf.TensorSpec((None, *model.input_shape[1:]), tf.float32),
            tf.TensorSpec((None, int(model.output_shape[-1])), tf.float32),
            tf.TensorSpec((None,), tf.int64),
        )

        @tf.function(input_signature=signature, autograph=False)
        def step(images: Any, reference: Any, targets: Any) -> Any:
            with tf.GradientTape() as tape:
                logits = as_logits(model(images, training=True), emits)
                wanted = tf.nn.log_softmax(reference / TEMPERATURE)
                found = tf.nn.log_softmax(logits / TEMPERATURE)
                divergence = tf.reduce_sum(tf.exp(wanted) * (wanted - found), axis=-1)
                hard = keras.losses.sparse_categorical_crossentropy(
                    targets, logits, from_logits=True
                )
                losses = SOFT_SHARE * TEMPERATURE**2 * divergence + (1 - SOFT_SHARE) * hard
                loss = tf.reduce_mean(losses)
            gradients = tape.gradient(loss, model.trainable_variables)
            optimizer.apply(gradients, model.trainable_variables)
            return loss

        return step


def run_epoch(
    student: Student,
    teacher: Teacher,
    stream: Stream,
    targets: np.ndarray,
    *,
    round: int,
    epoch: int,
    epochs: int,
    progress: Progress,
) -> RecoveryEpoch:
    """Learn from every training image once, then measure on the validation images.

    Args:
        student: The network.
        teacher: The reference's answers.
        stream: The images.
        targets: The classes of all of the split.
        round: From 1.
        epoch: Within the round, from 1.
        epochs: How many the round has.
        progress: Told of every batch.
    """
    started = time.perf_counter()
    view = (epoch - 1) % VIEWS
    taken = (epoch - 1) * len(stream)
    logits = teacher.logits(view)
    # Its own order in each round, and the same one after a resumption.
    batches = stream.numbered(1000 * round + epoch, view)
    total = 0.0
    for done, loss in enumerate(student.learn(batches, logits, targets, taken), 1):
        total += loss
        progress(f"round {round}", taken + done, epochs * len(stream))
    right = [
        student.answers(images).argmax(axis=1) == classes.numpy()
        for images, classes in stream.validation()
    ]
    return RecoveryEpoch(
        round=round,
        epoch=epoch,
        epochs=epochs,
        loss=total / len(stream.train_at),
        validation_top1=float(np.concatenate(right).mean()),
        seconds=time.perf_counter() - started,
    )
