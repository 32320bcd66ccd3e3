"""No value in any document of a bundle ends in a traceback, a hang or the machine's memory.

Values of every document are replaced by nulls, wrong types, numbers out of range, paths, and lists
too deep, drawn by a seed; what vouches for the document is written anew, so that the value is
reached. Each command then works, or ends with one error of cnnedge's own: one line that says where
and why.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from msgspec import to_builtins
from mutations import mutations

import cnnedge
from cnnedge.bundle import MANIFEST, describe_files, open_bundle
from cnnedge.demo.runtime import FILES, Runtime
from cnnedge.errors import BundleError, CnnEdgeError
from cnnedge.selftest import INDEX, TENSORS

NOTE = "engines/fp16.rtx.json"
GOLDEN = "selftest/golden-00.png"


class Outcomes:
    """What came of many runs, each of which must work or raise one of cnnedge's errors."""

    def __init__(self) -> None:
        self.refused = self.done = 0
        self.wrong: list[str] = []

    def run(self, call: Callable[[], Any], what: str) -> bool:
        """Run something; return whether it worked."""
        try:
            call()
        except CnnEdgeError as error:
            text = str(error)
            if len(text.splitlines()) != 1 or len(text) > 500 or "\ud800" in text:
                self.wrong.append(f"{what}: {text!r}")
            self.refused += 1
            return False
        except Exception as error:
            self.wrong.append(f"{what}: {type(error).__name__}: {error}")
            return False
        self.done += 1
        return True

    def check(self, refused: int, done: int) -> None:
        assert not self.wrong, "\n".join([f"{len(self.wrong)} are wrong", *self.wrong[:40]])
        assert self.refused >= refused
        assert self.done >= done


class Commands:
    """Every command that opens a bundle; each graph is read once, or it would take minutes."""

    def __init__(self, root: Path, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        from cnnedge.backends import onnxruntime as backend

        self.root, self.place = root, place
        opened: dict[Any, Any] = {}
        really = {"open_session": backend.open_session, "read_facts": backend.read_facts}

        def once(name: str) -> Callable[..., Any]:
            def call(path: Any, **options: Any) -> Any:
                key = name, hashlib.sha256(Path(path).read_bytes()).hexdigest()
                if key not in opened:
                    opened[key] = really[name](path, **options)
                return opened[key]

            return call

        for name in really:
            monkeypatch.setattr(backend, name, once(name))
        monkeypatch.setattr("cnnedge.files.os.fsync", lambda file: None)
        monkeypatch.setattr("cnnedge.verify._fingerprint", lambda bundle, name, tensors: {})
        monkeypatch.setattr("cnnedge.verify._achieved", lambda bundle, variant: variant.achieved)
        dist = place / "dist"
        dist.mkdir()
        for name in FILES:
            (dist / name).write_bytes(b"x")
        self.runtime = Runtime(dist, known=False)
        self.found = Outcomes()

    def some(self, what: str, turn: int) -> None:
        """Open the bundle, and where that is done go on with one of the commands, in turn."""
        if self.found.run(self.open, f"open: {what}"):
            names = ("predict", "verify", "zip", "onnx", "triton", "demo", "engine")
            name = names[turn % len(names)]
            self.found.run(getattr(self, name), f"{name}: {what}")

    def open(self) -> None:
        json.loads(open_bundle(self.root).manifest.to_json())

    def predict(self) -> None:
        classify = cnnedge.load(self.root)
        assert classify(self.root / GOLDEN)[0].label in classify.labels

    def verify(self) -> None:
        from cnnedge.verify import verify_bundle

        json.dumps(verify_bundle(self.root).to_dict())

    def zip(self) -> None:
        from cnnedge.package.archive import write_archive

        write_archive(open_bundle(self.root), self.place / "b.zip", force=True)

    def onnx(self) -> None:
        from cnnedge.package.single import write_single

        write_single(open_bundle(self.root), self.place / "b.onnx", force=True)

    def triton(self) -> None:
        from cnnedge.package.triton import write_triton

        write_triton(open_bundle(self.root), self.place / "triton", force=True)

    def demo(self) -> None:
        from cnnedge.demo import lay_site

        lay_site(open_bundle(self.root), self.place / "site", self.runtime, overwrite=True)

    def engine(self) -> None:
        from cnnedge.engine import trtexec_lines
        from cnnedge.runtime import read_note
        from cnnedge.runtime.choice import choose

        bundle = open_bundle(self.root)
        choose(bundle, runtime="rtx")
        trtexec_lines(self.root, "rtx")
        for engine in bundle.manifest.engines:
            note = read_note(bundle, engine)
            json.loads(note.to_json())
            assert note.options.profiles


@pytest.fixture
def commands(recorded, tmp_path, monkeypatch) -> Commands:
    logging.getLogger("cnnedge").setLevel(logging.ERROR)
    return Commands(recorded, tmp_path, monkeypatch)


def vouch(root: Path, name: str, text: str) -> None:
    """Write a document, and have the manifest vouch for it."""
    (root / name).write_text(text)
    fields = json.loads((root / MANIFEST).read_text())
    entry = to_builtins(describe_files(root, [name])[name])
    if name in fields["files"]:
        fields["files"][name] = entry
    for engine in fields["engines"]:
        if engine["note"] == name:
            engine["note_sha256"] = entry["sha256"]
    (root / MANIFEST).write_text(json.dumps(fields))


@pytest.mark.system
def test_nothing_in_the_manifest_is_believed(commands):
    original = json.loads((commands.root / MANIFEST).read_text())
    for turn, (what, text) in enumerate(mutations(original, 800)):
        (commands.root / MANIFEST).write_text(text)
        commands.some(what, turn)
    commands.found.check(refused=300, done=200)  # what no command reads may be anything


@pytest.mark.system
@pytest.mark.parametrize("document", [INDEX, NOTE])
def test_nothing_in_the_documents_that_it_vouches_for_is_believed(commands, document):
    original = json.loads((commands.root / document).read_text())
    for layers in original.get("layers", {}).values():
        for name in list(layers)[1:]:
            del layers[name]  # the others are alike
    for what, text in mutations(original, 300):
        vouch(commands.root, document, text)
        name = "engine" if document == NOTE else "demo" if "reference" in what else "verify"
        commands.found.run(getattr(commands, name), f"{name}: {what}")
    commands.found.check(refused=100, done=50)


@pytest.mark.system
def test_nothing_in_a_result_is_believed(recorded_result, tmp_path):
    """Of `bench`: what it compares, shows, and writes as CSV, Markdown and a page."""
    from click.testing import CliRunner

    from cnnedge.benchmark.compare import compare_results
    from cnnedge.benchmark.document import read_result
    from cnnedge.cli import main
    from cnnedge.cli.show import show_changes, show_result
    from cnnedge.report import as_csv, as_markdown
    from cnnedge.report.cards import cards_of
    from cnnedge.report.style import looks

    document = shortened(json.loads(recorded_result))
    place, whole, found = tmp_path / "new.json", tmp_path / "old.json", Outcomes()
    whole.write_text(json.dumps(document))
    old = read_result(whole)

    def use(turn: int) -> None:
        new = read_result(place)
        if turn % 3 == 0:
            show_changes(compare_results(old, new).to_dict())
            compare_results(new, old)
        elif turn % 3 == 1:
            as_csv(new), as_markdown(new), show_result(new)
        else:
            style = looks(c["name"] for m in new["models"] for c in m["contestants"])
            for model in new["models"]:
                cards_of(model, "m", style)

    with contextlib.redirect_stdout(io.StringIO()):
        for turn, (what, text) in enumerate(mutations(document, 600)):
            place.write_text(text)
            found.run(lambda turn=turn: use(turn), what)
    found.check(refused=200, done=50)
    done = CliRunner().invoke(main, ["bench", "--compare", str(whole), str(whole)])
    assert done.exit_code == 0, done.output


def shortened(document: dict) -> dict:
    """Leave of every long list the first few entries: what is drawn of them is the same."""
    for model in document["models"]:
        model["contestants"] = model["contestants"][:2]
        for one in model["contestants"]:
            single = one["single_stream"]
            single["samples_ms"] = [[b[:3] for b in r[:2]] for r in single["samples_ms"]]
            one["layers"] = one["layers"][:2]
            one["sustained"]["windows"] = one["sustained"]["windows"][:4]
            one["flips"] = [
                {
                    "image": 0,
                    "reference": "blue sky",
                    "answer": "red brick",
                    "reference_probability": 0.5,
                    "probability": 0.6,
                }
            ]
            one["confused"] = [{"truth": "blue sky", "answer": "red brick", "count": 1}]
    return document


RECIPE = """
model = "alexnet"
precision = ["fp32"]
max_drop = 0.5
image_size = [32, 32]
classes = 3
seed = 0
bench_seconds = 0.1
labels = "labels.txt"
"""
SUITE = """
name = "x"
seconds = 0.1
rounds = 1
batches = [1]
loads = [0.5]
threads = 1
scenarios = ["offline"]
[[model]]
bundle = "b"
data = "digits"
scenarios = ["offline"]
"""
VALUES = ('""', '"x"', r'"a\u0000b"', "-1", "0", "0.5", "inf", "nan", "true", "[]", "[[[1]]]", "{}")
VALUES += ("1979-05-27", "9" * 30, "9" * 5000, '"' + "x" * 5000 + '"', "[" * 300 + "]" * 300)
VALUES += ("[1000000, 1000000]", "{x = [{y = 1}]}")


@pytest.mark.parametrize("document", ["recipe", "suite"])
def test_nothing_in_a_recipe_or_a_suite_is_believed(tmp_path, document):
    from cnnedge.benchmark.suite import read_suite
    from cnnedge.recipe import read_recipe

    text = RECIPE if document == "recipe" else SUITE
    lines, found = text.splitlines(), Outcomes()
    path = tmp_path / "x.toml"
    for number, line in enumerate(lines):
        key = line.partition(" = ")[0]
        for value in VALUES if " = " in line else ():
            path.write_text("\n".join([*lines[:number], f"{key} = {value}", *lines[number + 1 :]]))
            read = read_recipe if document == "recipe" else lambda path: read_suite(path, {})
            found.run(lambda read=read: read(path), f"{key} = {value[:40]}")
    found.check(refused=100, done=10)


@pytest.mark.parametrize("text", ["a = " + "[" * 20_000, "a = " + "{a = " * 20_000])
def test_toml_nested_too_deep_is_one_line(tmp_path, text):
    from cnnedge.recipe import read_recipe

    (tmp_path / "x.toml").write_text(text)
    with pytest.raises(CnnEdgeError) as raised:
        read_recipe(tmp_path / "x.toml")
    assert len(str(raised.value)) < 500


DEEP = [
    "[" * 100_000,
    "[" * 100_000 + "]" * 100_000,
    '{"a":' * 100_000,
    '{"a":' * 500 + "1" + "}" * 500,
]


@pytest.mark.parametrize("text", DEEP)
def test_json_nested_too_deep_is_one_line(commands, text):
    """Where Python's parser bears a depth, what comes after it may not."""
    from cnnedge.benchmark.document import read_result

    root = commands.root
    (root / "r.json").write_text(text)
    with pytest.raises(CnnEdgeError):
        read_result(root / "r.json")
    vouch(root, INDEX, text)
    with pytest.raises(BundleError, match="nested too deep"):
        commands.demo()
    vouch(root, NOTE, text)
    with pytest.raises(BundleError, match="nested too deep"):
        commands.engine()
    fields = json.loads((root / MANIFEST).read_text())
    fields["calibration"]["more"] = "HERE"
    for changed in (text, json.dumps(fields).replace('"HERE"', text)):
        (root / MANIFEST).write_text(changed)
        with pytest.raises(BundleError, match="cannot be read"):
            commands.open()


def change(commands: Commands, edit: Callable[[dict], Any]) -> None:
    fields = json.loads((commands.root / MANIFEST).read_text())
    edit(fields)
    (commands.root / MANIFEST).write_text(json.dumps(fields))


@pytest.mark.parametrize("labels", [["a"], ["a", "b", "c", "d"]])
def test_a_label_for_each_output(commands, labels):
    change(commands, lambda fields: fields.update(labels=labels))
    for command in (commands.predict, commands.verify, commands.onnx, commands.triton):
        with pytest.raises(CnnEdgeError, match=r"label|answers"):
            command()


@pytest.mark.parametrize("size", [(10**6, 10**6), (9000, 9000), (17, 16)])
def test_the_image_is_the_graphs(commands, size):
    """The first was asked for as 4 TB."""
    change(commands, lambda fields: fields["image"].update(height=size[0], width=size[1]))
    for command in (commands.predict, commands.verify, commands.onnx, commands.triton):
        with pytest.raises(CnnEdgeError, match="image"):
            command()


def test_golden_tensors_of_terabytes_are_not_allocated(commands):
    """An array's own header says how much is allocated for it."""
    import zipfile

    header = b"{'descr': '|u1', 'fortran_order': False, 'shape': (1000000, 1000000, 4), }"
    header += b" " * (117 - len(header)) + b"\n"
    with zipfile.ZipFile(commands.root / TENSORS, "w") as archive:
        archive.writestr(
            "tensors.npy", b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header
        )
    change(
        commands,
        lambda fields: fields["files"].update(
            to_builtins(describe_files(commands.root, [TENSORS]))
        ),
    )
    with pytest.raises(BundleError, match="tensors are uint8"):
        commands.verify()


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (
            lambda f: f["variants"][0].update(bytes="x"),
            r"\$\.variants\[0\]\.bytes: expected int, got str",
        ),
        (lambda f: f["variants"][0].pop("name"), r"\$\.variants\[0\].*name"),
        (lambda f: f.update(normalization="imagenet"), "normalization 'imagenet' is none of unit"),
        (lambda f: f["variants"][1].update(precision="fp8"), "expected one of fp16, .*got 'fp8'"),
        (lambda f: f["variants"][1].update(name="fp32"), "two variants are called 'fp32'"),
        (lambda f: f["variants"][1].update(file="labels.txt"), "two files are called 'labels.txt'"),
        (lambda f: f["variants"][1].update(name="../x"), r"\$\.variants\[1\]\.name"),
        (lambda f: f["variants"][1].update(sha256="../../x"), r"\$\.variants\[1\]\.sha256"),
        (
            lambda f: f["variants"][1]["verdict"].update(status="fine"),
            "expected one of failed, .*got 'fine'",
        ),
        (lambda f: f["image"].update(channels=2), "no image has the shape"),
        (lambda f: f.update(max_drop=float("nan")), r"\$\.max_drop"),
        (lambda f: f.update(input="int8"), r"\$\.input"),
        (lambda f: f.update(schema=True), "schema True"),
    ],
)
def test_the_message_says_where(commands, edit, message):
    change(commands, edit)
    with pytest.raises(BundleError, match=message):
        commands.open()


def test_what_a_newer_cnnedge_adds_is_no_hindrance(commands, recorded):
    before = cnnedge.load(recorded, variant="fp32")(recorded / GOLDEN)

    def add(fields: Any) -> None:
        if isinstance(fields, dict):
            for value in list(fields.values()):
                add(value)
            if "sha256" in fields or "schema" in fields or "top1" in fields:
                fields["of the future"] = {"x": [1]}
        elif isinstance(fields, list):
            for value in fields:
                add(value)

    change(commands, add)
    assert cnnedge.load(recorded, variant="fp32")(recorded / GOLDEN) == before
    commands.verify()


def test_a_recorded_bundle_answers_as_then(recorded):
    index = json.loads((recorded / INDEX).read_text())
    for name in ("fp32", "fp16", "int8"):
        classify = cnnedge.load(recorded, variant=name)
        found = classify.probabilities([recorded / entry["file"] for entry in index["images"]])
        np.testing.assert_allclose(found, index["answers"][name], atol=2e-5)


def test_the_note_of_another_plan_is_refused(commands):
    text = (commands.root / NOTE).read_text().replace('"variant": "fp16"', '"variant": "fp32"')
    vouch(commands.root, NOTE, text)
    with pytest.raises(BundleError, match="note of another plan"):
        commands.engine()


@pytest.mark.tf
@pytest.mark.parametrize("value", [None, 1, [], {"height": 10**6, "width": 10**6}, "x"])
@pytest.mark.parametrize("field", ["labels", "image", "normalization", "model"])
def test_the_note_of_a_keras_file_is_not_believed(field, value):
    from cnnedge.backends.keras import ModelNote
    from cnnedge.image import ImageContract

    note = ModelNote("m", ("a", "b"), ImageContract(16, 16), "unit")
    fields = json.loads(note.to_json())
    assert ModelNote.from_json(json.dumps(fields)) == note
    if (field, value) != ("model", "x"):
        with pytest.raises(ValueError, match=field if field != "image" else r"image|height"):
            ModelNote.from_json(json.dumps(fields | {field: value}))
