"""What may be asked for, and that a bundle is built again by what it keeps of that."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from cnnedge.bundle import MANIFEST, open_bundle
from cnnedge.cli import main
from cnnedge.errors import CnnEdgeError
from cnnedge.image import NORMALIZATIONS
from cnnedge.recipe import Recipe, make_recipe, read_recipe


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "recipe: Object missing required field model"),
        ({"colour": "red"}, "recipe has no colour, it has model, data, precision"),
        ({"precision": ["fp32", "fp17"]}, "recipe: precision[1] 'fp17': expected one of fp16"),
        ({"max_drop": "a lot"}, "recipe: max_drop 'a lot': expected float, got str"),
        ({"max_drop": float("nan")}, "recipe: max_drop nan: expected float >= 0.0"),
        ({"guard": 1}, "recipe: guard 1: expected bool, got int"),
        ({"image_size": [32]}, "recipe: image_size [32]: expected array of length 2"),
        ({"image_size": [32, 0]}, "recipe: image_size[1] 0: expected int >= 1"),
        ({"preprocess": "imagenet"}, "recipe: preprocess 'imagenet': expected one of caffe"),
        ({"seed": -1}, "recipe: seed -1: expected int >= 0"),
    ],
)
def test_what_may_not_be_asked_for(fields, message):
    asked = {"model": "m.keras", **fields} if fields else {}
    with pytest.raises(CnnEdgeError) as caught:
        make_recipe(**asked)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


def test_an_option_is_called_as_the_user_wrote_it():
    with pytest.raises(CnnEdgeError, match="^--max-drop 200: expected float <= 100"):
        make_recipe(options={"max_drop": "--max-drop"}, model="m", max_drop=200)


@pytest.mark.parametrize("name", NORMALIZATIONS)
def test_every_normalization_may_be_asked_for(name):
    assert make_recipe(model="m", preprocess=name).preprocess == name


def test_one_that_was_made_by_hand_is_held_to_its_type():
    from cnnedge.source import resolve

    with pytest.raises(CnnEdgeError, match="recipe: max_drop 200: expected float <= 100"):
        resolve(Recipe(model="alexnet", max_drop=200))


def test_what_is_kept_of_a_recipe_makes_it_again():
    recipe = make_recipe(model="m", precision=("fp32", "int8"), image_size=(32, 48), guard=False)
    assert make_recipe(**json.loads(json.dumps(recipe.to_dict()))) == recipe
    assert recipe == Recipe(model="m", precision=("fp32", "int8"), image_size=(32, 48), guard=False)


@pytest.mark.tf
def test_a_bundle_is_built_again_by_its_manifest(toy_bundle, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    again = CliRunner().invoke(main, ["export", str(toy_bundle.path(MANIFEST)), "-o", "again"])
    assert again.exit_code == 0, again.output
    ours, theirs = open_bundle("again").manifest, toy_bundle.manifest
    assert ours.recipe == theirs.recipe
    assert {v.file: v.sha256 for v in ours.variants} == {v.file: v.sha256 for v in theirs.variants}


def test_paths_of_a_recipe_are_looked_for_beside_its_manifest(toy_bundle, tmp_path):
    manifest = json.loads(toy_bundle.path(MANIFEST).read_bytes())
    manifest["recipe"]["model"] = "mine.keras"
    (tmp_path / "mine.keras").touch()
    (tmp_path / MANIFEST).write_text(json.dumps(manifest))
    assert read_recipe(tmp_path / MANIFEST).model == str(tmp_path / "mine.keras")


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        (None, "names no recipe: an earlier cnnedge wrote it"),
        ({"model": "m", "colour": "red"}, "recipe has no colour"),
        ({"model": 7}, "recipe: model 7: expected str, got int"),
    ],
)
def test_a_manifest_that_builds_nothing(toy_bundle, tmp_path, recipe, message):
    manifest = json.loads(toy_bundle.path(MANIFEST).read_bytes()) | {"recipe": recipe}
    (tmp_path / MANIFEST).write_text(json.dumps(manifest))
    result = CliRunner().invoke(main, ["export", str(tmp_path / MANIFEST)])
    assert result.exit_code == 1
    assert message in result.output
    assert len(result.output.splitlines()) == 1


@pytest.mark.tf
def test_another_json_file_is_no_recipe(tmp_path):
    path = Path(tmp_path / "x.json")
    path.write_text("{}")
    result = CliRunner().invoke(main, ["export", str(path)])
    assert (result.exit_code, len(result.output.splitlines())) == (1, 1)
    assert "is a JSON file, and no .keras file" in result.output
