"""The examples in the docstrings of the public names, run as they stand, with those names alone."""

from __future__ import annotations

import doctest
import shutil

import pytest
from PIL import Image

import cnnedge

NAMES = [name for name in cnnedge.__all__ if name != "__version__"]


@pytest.fixture
def example_files(toy_file, toy_bundle, digits, tmp_path, monkeypatch):
    """What the examples speak of, in the folder that they run in."""
    shutil.copy(toy_file, tmp_path / "digits.keras")
    shutil.copytree(toy_bundle.root, tmp_path / "digits")
    four = digits.test.items[list(digits.test.targets).index(digits.labels.index("4"))]
    Image.fromarray(four).save(tmp_path / "four.png")
    monkeypatch.chdir(tmp_path)


@pytest.mark.usefixtures("example_files")
@pytest.mark.parametrize("name", NAMES)
def test_the_example_of_a_public_name_holds(name):
    options = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    finder = doctest.DocTestFinder(recurse=False)
    (example,) = finder.find(getattr(cnnedge, name), name, globs={"cnnedge": cnnedge})
    assert example.examples, f"{name} has no example"
    said = []
    doctest.DocTestRunner(optionflags=options).run(example, out=said.append)
    assert not said, "".join(said)
