"""The built-in classifiers: a table of plain data, and one function that builds any of them.

Importing this package loads neither Keras nor TensorFlow; `build` does.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from cnnedge.errors import MissingExtraError, ModelError
from cnnedge.quiet import import_tensorflow

if TYPE_CHECKING:
    import keras

__all__ = ["MODELS", "ModelInfo", "build", "model_info"]


@dataclass(frozen=True)
class ModelInfo:
    """What is known of a built-in model without building it.

    Attributes:
        name: The name that `build` and the command line take.
        summary: One line on what tells it apart.
        input_size: ``(height, width)`` in pixels that `params` and `macs` are given for.
        classes: The number of classes that they are given for.
        params: Trainable parameters.
        macs: Multiply-accumulates of the convolutions and the dense layers for one image; biases,
            activations and pooling are not counted.
        normalization: What the graph wants of its pixels, a name in `cnnedge.image.NORMALIZATIONS`.
    """

    name: str
    summary: str
    input_size: tuple[int, int]
    classes: int
    params: int
    macs: int
    normalization: str = "unit"


_ROWS = (
    # name, summary, params, MACs: at 224x224, 1000 classes, default options.
    ("alexnet", "AlexNet, 96-256-384-384-256 kernels, FC 2048", 28_868_968, 1_101_750_816),
    ("alexnet_v1", "AlexNet, half the kernels, FC 2048", 16_630_440, 311_191_824),
    ("alexnet_v2", "AlexNet v1's features, FC 1024-128, subclassed", 5_925_672, 300_490_000),
    ("vgg11", "VGG-A, 8 convolutions, FC 2048", 66_848_104, 7_543_078_912),
    ("vgg13", "VGG-B, 10 convolutions, FC 2048", 67_032_616, 11_242_455_040),
    ("vgg16", "VGG-D, 13 convolutions, FC 2048", 72_342_312, 15_404_253_184),
    ("vgg19", "VGG-E, 16 convolutions, FC 2048", 77_652_008, 19_566_051_328),
)

MODELS: dict[str, ModelInfo] = {
    name: ModelInfo(name, summary, (224, 224), 1000, params, macs)
    for name, summary, params, macs in _ROWS
}


def model_info(name: str) -> ModelInfo:
    """Return the row of the table for ``name``.

    Raises:
        ModelError: there is no such model; the message suggests the close ones.
    """
    try:
        return MODELS[name]
    except KeyError:
        close = difflib.get_close_matches(name.lower().replace("-", ""), MODELS, n=3)
        raise ModelError(
            f"there is no built-in model {name!r}",
            fix=f"did you mean {' or '.join(close)}?" if close else f"use {', '.join(MODELS)}",
        ) from None


def build(
    name: str,
    *,
    height: int | None = None,
    width: int | None = None,
    channels: int = 3,
    classes: int = 1000,
    seed: int = 0,
    **options: Any,
) -> keras.Model:
    """Build a model with freshly drawn weights; the same seed draws the same ones.

    Args:
        name: A name in `MODELS`.
        height: Input height in pixels; the table's where it is None.
        width: Input width in pixels; likewise.
        channels: 3 for RGB, 1 for grey.
        classes: Length of the probability vector.
        seed: Seeds the global generators of Python, NumPy and TensorFlow, which the initializers
            draw from.
        **options: The keyword-only arguments of the builder: ``lrn`` for `alexnet`; ``fc_units``,
            ``pool``, ``pool_range`` and ``cfg`` for the VGG family.

    Returns:
        A built ``keras.Model``: float32 ``[N, height, width, channels]`` to float32
        ``[N, classes]`` probabilities.

    Raises:
        MissingExtraError: TensorFlow or Keras is not installed.
        ModelError: an unknown name or option, a size that is not a positive integer, or an input
            too small for the network (the message names the smallest that works).
    """
    info = model_info(name)
    height = info.input_size[0] if height is None else height
    width = info.input_size[1] if width is None else width
    for what, value in (
        ("height", height),
        ("width", width),
        ("channels", channels),
        ("classes", classes),
    ):
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ModelError(f"{what} of {name} is {value!r}", fix="pass an integer of 1 or more")
    try:
        import_tensorflow()
        import keras

        builder = _builder(name)
    except ImportError as error:
        package = error.name or "tensorflow"
        raise MissingExtraError(package, "export", purpose=f"building {name}") from error
    known = [
        p.name for p in inspect.signature(builder).parameters.values() if p.kind is p.KEYWORD_ONLY
    ]
    unknown = sorted(set(options) - set(known))
    if unknown:
        raise ModelError(
            f"{name} has no option {', '.join(unknown)}",
            fix=f"its options are {', '.join(known)}" if known else "it has no options",
        )
    keras.utils.set_random_seed(seed)
    return builder(height, width, classes, channels, **options)


def _builder(name: str) -> Callable[..., keras.Model]:
    """Return ``f(im_height, im_width, num_classes, channels, *, options)`` of a built-in model."""
    from cnnedge.models import alexnet, vgg

    if name in vgg.CONFIGS:
        return partial(vgg.vgg, name)
    return {
        "alexnet": alexnet.alexnet,
        "alexnet_v1": alexnet.alexnet_v1,
        "alexnet_v2": alexnet.alexnet_v2,
    }[name]
