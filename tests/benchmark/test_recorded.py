"""What the repository shows of recorded results is what they say."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def readme():
    spec = importlib.util.spec_from_file_location("benchmark_readme", FOLDER / "readme.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_readme_is_generated_from_the_results(readme):
    text = readme.README.read_text(encoding="utf-8")
    found = text.partition(readme.BEGIN)[2].partition(readme.END)[0]
    assert found == f"\n{readme.section()}\n"
    assert "| **" in found  # there is a pick


def test_every_result_has_its_environment_and_its_plots(readme):
    documents = dict(readme.results())
    assert documents
    for name, document in documents.items():
        environment = document["environment"]
        assert environment["machine"]["cpu"]
        assert environment["tools"]["onnxruntime"]
        assert document["peaks"]["fp32"]["samples"]
        for model in document["models"]:
            assert (readme.PLOTS / f"{name}-{model['name']}.svg").is_file()
            assert any(row["single_stream"]["samples_ms"] for row in model["contestants"])


def test_a_plot_is_drawn(readme, tmp_path, monkeypatch):
    monkeypatch.setattr(readme, "PLOTS", tmp_path)
    name, document = next(iter(readme.results()))
    drawn = readme.draw(name, document["models"][0]).read_text()
    for row in document["models"][0]["contestants"]:
        assert row["title"] in drawn
