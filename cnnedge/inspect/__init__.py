"""What a network is made of: sizes, parameters, multiply-accumulates, memory, receptive fields."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from cnnedge.errors import ModelError
from cnnedge.inspect.stack import StackComparison, compare_stack
from cnnedge.inspect.table import COLUMNS, Inspection, LayerRow
from cnnedge.kind import kind_of

if TYPE_CHECKING:
    import keras

__all__ = ["COLUMNS", "Inspection", "LayerRow", "StackComparison", "compare_stack", "inspect_model"]


def inspect_model(
    target: str | Path | keras.Model,
    *,
    height: int | None = None,
    width: int | None = None,
    classes: int | None = None,
) -> Inspection:
    """Go through a network layer by layer.

    Args:
        target: The name of a built-in model, the path of a `.keras` or `.onnx` file, or a
            ``keras.Model``.
        height: Input height in pixels, where it is to differ from the model's own or the model
            leaves it open.
        width: Input width in pixels; likewise.
        classes: Number of classes, of a built-in model only.

    Returns:
        One row for each layer, for a batch of one image.

    Raises:
        MissingExtraError: the packages that read such a model are not installed.
        ModelError: there is no such model, it cannot be read, or it does not take that size.

    Examples:
        >>> network = cnnedge.inspect_model("digits/model.fp32.onnx")
        >>> network.layers[-1].name, network.params, network.macs
        ('softmax', 35986, 1794528)
    """
    if isinstance(target, str | Path) and Path(target).suffix == ".onnx":
        _refuse_classes(target, classes)
        from cnnedge.inspect.onnx_graph import read_onnx

        return read_onnx(Path(target), height, width)

    from cnnedge.inspect.keras_graph import read_keras

    if not isinstance(target, str | Path):
        _refuse_classes(target.name, classes)
        return read_keras(target, target.name, height, width)
    if Path(target).suffix == ".keras":
        _refuse_classes(target, classes)
        from cnnedge.backends.keras import load_model

        return read_keras(load_model(target)[0], str(target), height, width)

    from cnnedge.models import MODELS, build, model_info

    found = kind_of(target)
    if str(target) not in MODELS and found != "not there":
        raise ModelError(
            f"{target} is {found}, and no model file",
            fix=f"give one of its models, such as {target}/model.fp32.onnx"
            if found == "a bundle"
            else "give a .keras or .onnx file, or the name of a built-in model",
        )
    info = model_info(str(target))
    classes = info.classes if classes is None else classes
    model = build(info.name, height=height, width=width, classes=classes)
    return read_keras(model, "built-in", height, width)


def _refuse_classes(target: str | Path, classes: int | None) -> None:
    if classes is not None:
        raise ModelError(
            f"{target} has its own number of classes",
            fix="leave the number of classes out; built-in models take one",
        )
