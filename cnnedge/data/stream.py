"""Batches of a split's images for the network, the same ones in the same order for a seed.

The pixels come from `cnnedge.image` as uint8 and stay uint8 until a batch is made. What is random
depends on the seed, the epoch and the image alone, so a resumed run sees what it would have seen.
"""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from cnnedge.data import Split
from cnnedge.data.split import stratified
from cnnedge.errors import CnnEdgeError
from cnnedge.image import NORMALIZATIONS, ImageContract
from cnnedge.progress import Progress, silent

if TYPE_CHECKING:
    import tensorflow as tf

Batch: TypeAlias = "tuple[tf.Tensor, tf.Tensor]"

VALIDATION_SHARE = 0.1  # of the train split
MEMORY_BUDGET = 2 * 2**30  # bytes of uint8 pixels that are kept; more are decoded every epoch

# The most that an image is varied by, either way. Small, and never mirrored: a mirrored 2 is no 2
# and a mirrored arrow points elsewhere.
ROTATION = math.radians(8)
ZOOM = 0.1
SHIFT = 0.06  # of the height and of the width
BRIGHTNESS = 0.1 * 255
CONTRAST = 0.15


class Stream:
    """The train split in batches, a stratified tenth of it held back for validation.

    Images are decoded once where they fit into memory, else every time they are needed.

    Args:
        split: The images and their classes.
        contract: What an image becomes.
        normalization: What the graph wants of its pixels, a name in `NORMALIZATIONS`.
        batch_size: Images in a batch; the last one may have fewer.
        seed: Seeds the validation part, the order and the augmentation.
        augmented: Whether to `augment` what is trained on.
        progress: Told of every batch while images are decoded.
        memory_budget: Bytes of pixels that may be kept.

    Attributes:
        train_at: Indices into the split of what is trained on.
        validation_at: Those of what is held back.

    Raises:
        DataError: a class has too few images to hold one back.
        ImageError: an image cannot be decoded.
    """

    def __init__(
        self,
        split: Split,
        contract: ImageContract,
        normalization: str,
        *,
        batch_size: int,
        seed: int,
        augmented: bool,
        progress: Progress = silent,
        memory_budget: int = MEMORY_BUDGET,
    ) -> None:
        shares = (1 - VALIDATION_SHARE, VALIDATION_SHARE)
        self.train_at, self.validation_at = stratified(split.targets, shares, seed)
        self._split = split
        self._contract = contract
        self._normalization = normalization
        self._batch_size = batch_size
        self._seed = seed
        self._augmented = augmented
        self._shape = contract.shape
        self._error: CnnEdgeError | None = None
        self._pool = ThreadPoolExecutor(min(8, os.cpu_count() or 1))
        self._pixels: np.ndarray | None = None
        if len(split) * math.prod(self._shape) <= memory_budget:
            self._pixels = np.empty((len(split), *self._shape), np.uint8)
            done = 0
            for images, _ in split.batches(contract, 64):
                self._pixels[done : done + len(images)] = images
                done += len(images)
                progress("decode", done, len(split))

    def __len__(self) -> int:
        """Return how many batches an epoch has."""
        return -(-len(self.train_at) // self._batch_size)

    def normalized(self, normalization: str) -> Stream:
        """Return the same batches, normalized otherwise; decoded pixels are shared."""
        other = copy.copy(self)
        other._normalization = normalization
        return other

    def training(self, epoch: int) -> Iterator[Batch]:
        """Yield ``(float32 [n, H, W, C], int64 [n])``, normalized, in an order of the epoch's own.

        Raises:
            ImageError: an image can no longer be decoded.
        """
        return self._batches(self._order(epoch), self._split.targets, self._vary(epoch))

    def numbered(self, epoch: int, view: int) -> Iterator[Batch]:
        """Yield a view of the images in an epoch's order, and instead of classes their indices.

        A view is one way in which each image was varied, whatever the epoch: what a network
        answers to it can be kept.
        """
        return self._batches(self._order(epoch), self._indices, self._vary(view))

    def view(self, view: int) -> Iterator[Batch]:
        """Yield that view with the indices ascending; see `numbered`."""
        return self._batches(self.train_at, self._indices, self._vary(view))

    def validation(self) -> Iterator[Batch]:
        """Yield what is held back, as it is; see `training`."""
        return self._batches(self.validation_at, self._split.targets, _as_it_is)

    @property
    def _indices(self) -> np.ndarray:
        return np.arange(len(self._split))

    def _order(self, epoch: int) -> np.ndarray:
        return np.random.default_rng((self._seed, epoch)).permutation(self.train_at)

    def _vary(self, number: int) -> Callable[[Any, Any], Any]:
        """Return what varies images, given with their indices, in one of the possible ways."""
        import tensorflow as tf

        if not self._augmented:
            return _as_it_is
        # One row for each image of the split, so that a draw belongs to the image and the number
        # and not to a place in the order.
        seed = tf.constant((self._seed, number), tf.int64)
        draws = tf.random.stateless_uniform((len(self._split), 6), seed, -1.0, 1.0)
        return lambda images, at: augment(images, tf.gather(draws, at))

    def _batches(
        self, indices: np.ndarray, values: np.ndarray, vary: Callable[[Any, Any], Any]
    ) -> Iterator[Batch]:
        import tensorflow as tf

        def load(at: Any, value: Any) -> Batch:
            images = tf.numpy_function(self._load, [at], tf.uint8)
            images = tf.ensure_shape(images, (None, *self._shape))
            images = vary(tf.cast(images, tf.float32), at)
            return _normalize(images, self._normalization), value

        data = tf.data.Dataset.from_tensor_slices((indices, values[indices]))
        # Batches are made one after the other, each by all cores, while the network works.
        try:
            yield from data.batch(self._batch_size).map(load).prefetch(2)
        except tf.errors.OpError as error:
            if self._error is None:
                raise
            raise self._error from error

    def _load(self, at: np.ndarray) -> np.ndarray:
        if self._pixels is not None:
            return self._pixels[at]
        tensors = self._pool.map(lambda i: self._split.tensor(int(i), self._contract), at)
        try:
            return np.stack(list(tensors))
        except CnnEdgeError as error:
            self._error = error  # TensorFlow would pass on no more than its text
            raise


def augment(images: tf.Tensor, draws: tf.Tensor) -> tf.Tensor:
    """Vary images a little: turn, zoom, shift, brightness and contrast, and never mirror.

    Args:
        images: float32 ``[N, H, W, C]``, 0…255.
        draws: float32 ``[N, 6]`` in -1…1: turn, zoom, shift down, shift right, brightness,
            contrast.

    Returns:
        float32 ``[N, H, W, C]``, 0…255; what was outside the image repeats its edge.
    """
    import tensorflow as tf

    turn, zoom, down, right, brightness, contrast = tf.unstack(draws, axis=1)
    height, width = images.shape[1], images.shape[2]
    centre_x, centre_y = (width - 1) / 2, (height - 1) / 2
    scale = 1 / (1 + ZOOM * zoom)
    cos, sin = scale * tf.cos(ROTATION * turn), scale * tf.sin(ROTATION * turn)
    # Where in the source each output pixel (x, y) comes from: rotate and scale about the centre.
    from_x = centre_x - cos * centre_x + sin * centre_y + SHIFT * width * right
    from_y = centre_y - sin * centre_x - cos * centre_y + SHIFT * height * down
    zero = tf.zeros_like(turn)
    moved = tf.raw_ops.ImageProjectiveTransformV3(
        images=images,
        transforms=tf.stack([cos, -sin, from_x, sin, cos, from_y, zero, zero], axis=1),
        output_shape=(height, width),
        fill_value=0.0,
        interpolation="BILINEAR",
        fill_mode="NEAREST",
    )
    mean = tf.reduce_mean(moved, axis=(1, 2, 3), keepdims=True)
    gain = 1 + CONTRAST * contrast[:, None, None, None]
    lift = BRIGHTNESS * brightness[:, None, None, None]
    return tf.clip_by_value((moved - mean) * gain + mean + lift, 0.0, 255.0)


def _as_it_is(images: Any, at: Any) -> Any:
    return images


def _normalize(images: tf.Tensor, name: str) -> tf.Tensor:
    """Do to 0…255 floats in the graph what `cnnedge.image.normalize` does to uint8."""
    spec = NORMALIZATIONS[name]
    pixels = images[..., ::-1] if spec.bgr and images.shape[-1] == 3 else images
    return pixels * np.array(spec.scale, np.float32) + np.array(spec.offset, np.float32)
