"""Which output of a Keras model classifies: named by the user where there are several."""

from __future__ import annotations

from typing import Any

import keras

from cnnedge.errors import ModelError

_MOST_NAMED = 120  # characters of a message that names take


def find_output(model: keras.Model, asked: str | None, name: str) -> int:
    """Return which of a model's outputs, in Keras' own order, classifies.

    An output is called by its key in a dictionary, by the layer that makes it where the model
    returns a list, else by its place.

    Args:
        model: Any Keras model.
        asked: An output's name; None: the only one.
        name: What messages call the model.

    Raises:
        ModelError: there are several and none was asked for, or none is called so; the message
            lists them.
    """
    names = output_names(model)
    if asked is None and len(names) == 1:
        return 0
    if asked in names:
        return names.index(asked)
    listed = ", ".join(names)
    if len(listed) > _MOST_NAMED:
        listed = listed[:_MOST_NAMED].rsplit(", ", 1)[0] + f", … ({len(names)} in all)"
    what = f"has {len(names)} outputs" if asked is None else f"has no output {asked!r}"
    raise ModelError(f"{name} {what}: {listed}", fix="name the one that classifies: --output NAME")


def output_names(model: keras.Model) -> list[str]:
    """Return what a model's outputs are called, in Keras' own order."""
    paths = [path for path, _ in keras.tree.flatten_with_path(_returned(model))]
    makers = getattr(model, "output_names", None) or []
    in_a_list = all(len(path) == 1 and isinstance(path[0], int) for path in paths)
    if len(set(makers)) == len(paths) and (in_a_list or paths == [()]):
        return [str(maker) for maker in makers]
    return [".".join(map(str, path)) or "output" for path in paths]


def only_output(model: keras.Model, position: int) -> keras.Model:
    """Return a model that gives one output alone, a tensor; the model itself where that is so.

    Layers and weights are shared.
    """
    if not _is_traced(model):
        image = keras.Input(_input_shape(model)[1:])
        return keras.Model(image, keras.tree.flatten(model(image))[position], name=model.name)
    if len(model.outputs) == 1 and not keras.tree.is_nested(_returned(model)):
        return model
    inputs = model.inputs[0] if len(model.inputs) == 1 else model.inputs
    return keras.Model(inputs, model.outputs[position], name=model.name)


def _returned(model: keras.Model) -> Any:
    if _is_traced(model):
        if isinstance(model, keras.Sequential):  # has no `output` where it was loaded from a file
            return model.outputs[0] if len(model.outputs) == 1 else model.outputs
        return model.output
    return model.compute_output_spec(keras.KerasTensor(_input_shape(model)))


def _is_traced(model: keras.Model) -> bool:
    return bool(getattr(model, "inputs", None)) and bool(getattr(model, "outputs", None))


def _input_shape(model: keras.Model) -> tuple[int | None, ...]:
    """Return the shape that a model of the user's own class was built for.

    Raises:
        ModelError: it was never built.
    """
    shape = (model.get_build_config() or {}).get("input_shape") if model.built else None
    if not shape or not all(size is None or isinstance(size, int) for size in shape):
        raise ModelError(
            f"{model.name!r} does not say what it takes",
            fix="call it on one image before it is saved, so that it is built",
        )
    return (None, *shape[1:])
