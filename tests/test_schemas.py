"""The schemas in docs/schemas/ are those of the types, and what cnnedge writes obeys them."""

from __future__ import annotations

import gzip
import json
import runpy
from pathlib import Path

import jsonschema
import pytest

from cnnedge.bundle import MANIFEST
from cnnedge.selftest import INDEX

DOCS = Path(__file__).parents[1] / "docs"
RECORDED = Path(__file__).parent / "wrong_answers" / "recorded"


@pytest.fixture(scope="module")
def schemas():
    return runpy.run_path(str(DOCS / "schemas.py"))["schemas"]()


def test_they_are_up_to_date(schemas):
    written = {path.name: path.read_text() for path in (DOCS / "schemas").iterdir()}
    assert written == schemas, "run: python docs/schemas.py"


def test_what_an_export_writes_obeys_them(schemas, toy_bundle):
    for name, file in (("manifest.json", MANIFEST), ("selftest.json", INDEX)):
        jsonschema.validate(
            json.loads(toy_bundle.path(file).read_bytes()), json.loads(schemas[name])
        )
    recipe = json.loads(toy_bundle.path(MANIFEST).read_bytes())["recipe"]
    jsonschema.validate(recipe, json.loads(schemas["recipe.json"]))


def test_what_bench_once_wrote_obeys_them(schemas):
    document = json.loads(gzip.decompress((RECORDED / "result.json.gz").read_bytes()))
    jsonschema.validate(document, json.loads(schemas["result.json"]))


def test_what_does_not_is_told(schemas, toy_bundle):
    document = json.loads(toy_bundle.path(MANIFEST).read_bytes())
    document["variants"][0]["bytes"] = "many"
    with pytest.raises(jsonschema.ValidationError, match="'many' is not of type 'integer'"):
        jsonschema.validate(document, json.loads(schemas["manifest.json"]))
