"""Write docs/schemas/: the JSON Schema of every document, made of the types that read it.

python docs/schemas.py
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from msgspec.json import schema

from cnnedge.benchmark.schema import Result
from cnnedge.benchmark.suite import Suite
from cnnedge.manifest import Manifest
from cnnedge.plan import PlanNote
from cnnedge.recipe import Recipe
from cnnedge.selftest import Selftest

FOLDER = Path(__file__).parent / "schemas"
TYPES = {
    "manifest": Manifest,
    "selftest": Selftest,
    "plan-note": PlanNote,
    "result": Result,
    "recipe": Recipe,
    "suite": Suite,
}


def schemas() -> dict[str, str]:
    """Return the text of each schema, by its file's name."""
    return {
        f"{name}.json": json.dumps(_briefly(schema(kind, schema_hook=_path)), indent=1) + "\n"
        for name, kind in TYPES.items()
    }


def _path(kind: type) -> dict[str, str]:
    if kind is not Path:
        raise NotImplementedError(kind)
    return {"type": "string"}


def _briefly(node: Any) -> Any:
    """Keep the first line of each docstring, and write patterns as JSON Schema has them."""
    if isinstance(node, list):
        return [_briefly(item) for item in node]
    if not isinstance(node, dict):
        return node
    told = {key: _briefly(value) for key, value in node.items()}
    if isinstance(told.get("description"), str):
        told["description"] = told["description"].split("\n")[0]
    if isinstance(told.get("pattern"), str):
        told["pattern"] = told["pattern"].replace(r"\A", "^").replace(r"\Z", "$")
    return told


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for file, text in schemas().items():
        (FOLDER / file).write_text(text, encoding="utf-8")
