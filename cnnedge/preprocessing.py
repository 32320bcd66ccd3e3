"""What a model wants of its pixels: as its own numbers say, or as asked; and whether that fits."""

from __future__ import annotations

from typing import Any

import numpy as np

from cnnedge.chance import against_chance, better
from cnnedge.data import Split
from cnnedge.errors import ModelError
from cnnedge.head import softmax
from cnnedge.image import ImageContract, normalizations_of

CHOICES = "unit (x/255), tf (x/127.5-1), caffe, torch or none (0…255)"
MOST_IMAGES = 256  # that preprocessings are compared on
FEW_IMAGES = 32  # where only the spread of the answers is
FEWEST_WRONG = 7  # answers, so that another preprocessing can be told to be better
MUTE = 0.05  # of what answers tell images apart by under another: they hardly depend on the image


def wanted(model: Any, image: ImageContract, name: str) -> str:
    """Return what a model that says nothing of its pixels wants of them, read from its numbers.

    Args:
        model: A ``keras.Model``.
        image: The image contract.
        name: What a message calls it.

    Raises:
        ModelError: they do not tell.
    """
    from cnnedge.backends.keras_pixels import read_pixels

    reading = read_pixels(model, image)
    if reading is not None and reading.takes_raw:
        return "none"
    found = "and a wrong guess would be silent"
    if reading is not None and reading.by:
        found = f"{_named(reading.by)} makes {reading.reach['none']} of 0…255"
        if reading.fitting:
            found += f", as if for {' or '.join(reading.fitting)}"
    raise ModelError(
        f"{name} does not say how it wants its pixels: {found}", fix=f"pass --preprocess {CHOICES}"
    )


def check_preprocessing(
    model: Any, image: ImageContract, asked: str, test: Split, *, labelled: bool
) -> list[str]:
    """Hold what was asked for against the model's own numbers, and against its answers.

    Args:
        model: A ``keras.Model``.
        image: The image contract.
        asked: The normalization.
        test: Images, of which some are looked at.
        labelled: Whether they are the model's own, with classes that it knows.

    Returns:
        What a user should read, at most one line.

    Raises:
        ModelError: the model's numbers want another one, and its answers show it.
    """
    from cnnedge.backends.keras import predict
    from cnnedge.backends.keras_pixels import read_pixels

    reading = read_pixels(model, image)
    fitting = () if reading is None else reading.fitting
    doubtful = bool(fitting) and asked not in fitting
    if not labelled and not doubtful:
        return []
    some = test.take(MOST_IMAGES if labelled else FEW_IMAGES, seed=0)
    images = np.concatenate([batch for batch, _ in some.batches(image, 32)])
    answers = {asked: predict(model, images, asked)}
    first = answers[asked].argmax(1)
    at_chance = labelled and against_chance(first, some.targets).at_chance
    if doubtful or at_chance or (first != some.targets).sum() >= FEWEST_WRONG:
        others = [name for name in normalizations_of(image.channels) if name != asked]
        answers |= {name: predict(model, images, name) for name in others}
    right = {name: given.argmax(1) == some.targets for name, given in answers.items()}
    best = max(right, key=lambda name: right[name].sum())

    def surpassed(by: str) -> bool:
        if not labelled:
            return False
        knows = not against_chance(answers[by].argmax(1), some.targets).at_chance
        return better(right[by], right[asked]) or (at_chance and knows)

    shares = f"{right[asked].mean():.1%} of {len(some)} test images are answered right"
    shares += f", with {best} {right[best].mean():.1%}"
    if not doubtful or reading is None:
        if not surpassed(best):
            return []
        return [f"--preprocess {asked}: {shares}; is that what it was trained on?"]
    fit = best if best in fitting else fitting[0]
    what = (
        f"--preprocess {asked} of a model that scales by itself ({_named(reading.by)}): its first "
        f"weights get {reading.reach[asked]}, with {fit} {reading.reach[fit]}"
    )
    fix = f"pass --preprocess {fit}"
    if surpassed(fit):
        raise ModelError(f"{what}; {shares}", fix=fix)
    trusted = labelled and better(right[asked], right[fit])
    if not trusted and _told(answers[asked]) < MUTE * _told(answers[fit]):
        raise ModelError(f"{what}; the answers hardly depend on the image", fix=fix)
    return [f"{what}; {shares}" if labelled else what]


def _named(layers: tuple[str, ...]) -> str:
    return " and ".join(layers[:2]) + (" …" if len(layers) > 2 else "")


def _told(answers: np.ndarray) -> float:
    """Return what answers ``[N, classes]`` tell images apart by, in nats.

    That is the entropy of their mean, less their mean entropy.
    """
    given = answers.astype(np.float64)
    if given.min() < 0 or np.abs(given.sum(1) - 1).max() > 1e-3:
        given = softmax(given)
    return _entropy(given.mean(0)) - float(np.mean([_entropy(row) for row in given]))


def _entropy(shares: np.ndarray) -> float:
    there = shares[shares > 0]
    return float(-(there * np.log(there)).sum())
