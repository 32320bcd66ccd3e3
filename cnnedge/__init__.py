"""cnnedge: take a Keras image classifier to the device it will run on, and prove it still answers.

Importing this package loads neither TensorFlow nor ONNX Runtime nor Pillow; each name below is
fetched from its module when it is first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from cnnedge.version import __version__

_HOME = {
    "Classifier": "cnnedge.runtime",
    "CnnEdgeError": "cnnedge.errors",
    "CompressOptions": "cnnedge.compress.options",
    "ImageContract": "cnnedge.image",
    "Prediction": "cnnedge.runtime",
    "Recipe": "cnnedge.recipe",
    "TrainOptions": "cnnedge.train",
    "compress_model": "cnnedge.pipeline.compress",
    "export_bundle": "cnnedge.pipeline",
    "inspect_model": "cnnedge.inspect",
    "load": "cnnedge.runtime",
    "make_recipe": "cnnedge.recipe",
    "open_bundle": "cnnedge.bundle",
    "open_source": "cnnedge.data",
    "train_model": "cnnedge.train",
    "verify_bundle": "cnnedge.verify",
}
__all__ = ["__version__", *sorted(_HOME)]

if TYPE_CHECKING:
    from cnnedge.bundle import open_bundle as open_bundle
    from cnnedge.compress.options import CompressOptions as CompressOptions
    from cnnedge.data import open_source as open_source
    from cnnedge.errors import CnnEdgeError as CnnEdgeError
    from cnnedge.image import ImageContract as ImageContract
    from cnnedge.inspect import inspect_model as inspect_model
    from cnnedge.pipeline import export_bundle as export_bundle
    from cnnedge.pipeline.compress import compress_model as compress_model
    from cnnedge.recipe import Recipe as Recipe
    from cnnedge.recipe import make_recipe as make_recipe
    from cnnedge.runtime import Classifier as Classifier
    from cnnedge.runtime import Prediction as Prediction
    from cnnedge.runtime import load as load
    from cnnedge.train import TrainOptions as TrainOptions
    from cnnedge.train import train_model as train_model
    from cnnedge.verify import verify_bundle as verify_bundle


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'cnnedge' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return __all__
