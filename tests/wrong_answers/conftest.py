"""Small models and photos that the tests of wrong answers share."""

from __future__ import annotations

import gzip
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

SIZE = 32
RECORDED = Path(__file__).parent / "recorded"


def write_photos(folder: Path, classes: int | tuple[str, ...], count: int = 10) -> Path:
    """Write class folders of small PNGs; each class has a colour of its own, and noise."""
    from PIL import Image

    rng = np.random.default_rng(0)
    names = classes if isinstance(classes, tuple) else tuple("abcdefgh"[:classes])
    for index, name in enumerate(names):
        (folder / name).mkdir(parents=True, exist_ok=True)
        colour = np.array([(37 * index + 40) % 256, (91 * index + 90) % 256, (53 * index) % 256])
        for number in range(count):
            noise = rng.integers(-30, 31, (SIZE, SIZE, 3))
            pixels = np.clip(colour + noise, 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{number:02}.png")
    return folder


@pytest.fixture
def photos(tmp_path) -> Callable[..., Path]:
    """Return what writes class folders below this test's own folder."""

    def write(classes: int | tuple[str, ...] = 3, count: int = 10, name: str = "photos") -> Path:
        return write_photos(tmp_path / name, classes, count)

    return write


@pytest.fixture
def recorded(tmp_path) -> Path:
    """Return a bundle as cnnedge 0.1.0 wrote it before documents were read by type.

    Three colours, 16x16, all four precisions; its plan is a stand-in, the note beside it is not.
    """
    with zipfile.ZipFile(RECORDED / "bundle.zip") as archive:
        archive.extractall(tmp_path / "recorded")
    return tmp_path / "recorded"


@pytest.fixture(scope="session")
def recorded_result() -> str:
    """Return what `cnnedge bench --json` of that time wrote of it, every scenario in it."""
    return gzip.decompress((RECORDED / "result.json.gz").read_bytes()).decode()


@pytest.fixture(scope="session")
def three(tmp_path_factory) -> Path:
    """Three class folders, ``a``, ``b`` and ``c``, of ten small PNGs each."""
    return write_photos(tmp_path_factory.mktemp("photos") / "three", 3)
