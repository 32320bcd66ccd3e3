"""A run that was killed in a signed bundle: it is still signed, and can be signed again."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from click.testing import CliRunner
from test_bundle import edit_manifest

import cnnedge
from cnnedge.bundle import open_bundle
from cnnedge.change import put_engine
from cnnedge.cli import main
from cnnedge.errors import BundleError, SignatureError
from cnnedge.files import sha256
from cnnedge.plan import PlanNote, PlanOptions

pytest.importorskip("model_signing", reason="the extra `sign` is not installed: model-signing")

from cnnedge.signature import check_signature, sign_bundle

pytestmark = pytest.mark.system

TOKEN = ".cnnedge.0123456789abcdef.partial"


@pytest.fixture(scope="module")
def keys(tmp_path_factory):
    folder = tmp_path_factory.mktemp("keys")
    private, public = folder / "private.pem", folder / "public.pem"
    for words in (
        ["ecparam", "-name", "prime256v1", "-genkey", "-noout", "-out", private],
        ["ec", "-in", private, "-pubout", "-out", public],
    ):
        subprocess.run(["openssl", *words], check=True, capture_output=True)
    return private, public


@pytest.fixture
def signed(bundle_copy, keys):
    sign_bundle(bundle_copy, keys[0])
    return bundle_copy


def names_of(root):
    return sorted(path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file())


def run(*words):
    return CliRunner().invoke(main, [str(word) for word in words])


# Does it to a copy of its own again and again, each time killed one step later, until it gets
# through; a step is a call that writes a file or puts one in its place.
KILL_AT_EACH_STEP = """
import os, shutil, signal, sys
from pathlib import Path
from test_a_killed_sign_or_engine_breaks_the_signature import STEPS, put
from cnnedge.signature import sign_bundle
source, folder, what, argument = sys.argv[1:]
def deadly(name, stop, made=[0]):
    original = getattr(os, name)
    def call(*arguments, **options):
        made[0] += 1
        if made[0] == stop:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*arguments, **options)
    setattr(os, name, call)
for step in range(1, 100):
    root = Path(shutil.copytree(source, Path(folder, f"at-{step}")))
    child = os.fork()
    if child == 0:
        for name in STEPS:
            deadly(name, step)
        if what == "sign":
            sign_bundle(root, argument, overwrite=True)
        else:
            put(root, argument, b"plan")
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    if status == 0:
        break
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, status
"""
STEPS = ("mkdir", "fsync", "replace", "rmdir")


def put(root, variant, plan):
    """Do what `cnnedge engine` does with a plan that is built."""
    bundle = open_bundle(root)
    model = bundle.manifest.variant(variant)
    note = PlanNote(
        variant=variant,
        precision=model.precision,
        runtime="rtx",
        library="1.7.1",
        file=f"engines/{variant}.rtx.plan",
        sha256=hashlib.sha256(plan).hexdigest(),
        bytes=len(plan),
        onnx_sha256=model.sha256,
        calibration_sha256=None,
        compute_capabilities=(),
        gpu=None,
        options=PlanOptions(),
    )
    return put_engine(bundle, note, plan)


def environment():
    return os.environ | {"PYTHONPATH": os.pathsep.join([*sys.path, str(Path(__file__).parent)])}


def killed_at_each_step(signed, folder, what, argument):
    """Return the copies of a bundle that the kills left, and last the one that came through."""
    folder.mkdir()
    words = [signed, folder, what, argument]
    done = subprocess.run(
        [sys.executable, "-c", KILL_AT_EACH_STEP, *map(str, words)],
        capture_output=True,
        text=True,
        env=environment(),
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    copies = [folder / f"at-{step + 1}" for step in range(len(os.listdir(folder)))]
    assert len(copies) > 8, "there are that many steps, and more"
    return copies


def test_sign_killed_at_any_step_leaves_the_earlier_signature(signed, keys, tmp_path):
    before = names_of(signed)
    for root in killed_at_each_step(signed, tmp_path / "killed", "sign", keys[0]):
        check_signature(root, keys[1])
        sign_bundle(root, keys[0], overwrite=True)
        assert names_of(root) == before
        assert not list(root.rglob("*.partial*"))
        check_signature(root, keys[1])


def test_engine_killed_at_any_step_leaves_a_bundle_that_can_be_signed(signed, keys, tmp_path):
    whole = {"engines/fp16.rtx.plan", "engines/fp16.rtx.json"}
    before, found = set(names_of(signed)), []
    for root in killed_at_each_step(signed, tmp_path / "killed", "engine", "fp16"):
        if not open_bundle(root).manifest.engines:
            check_signature(root, keys[1])
        sign_bundle(root, keys[0], overwrite=True)
        check_signature(root, keys[1])
        found.append(set(names_of(root)))
        assert found[-1] in (before, before | whole)
        assert not list(root.rglob("*.partial*"))
    assert found[0] == before
    assert found[-1] == before | whole


def test_a_plan_that_is_built_anew_survives_a_kill_or_is_forgotten(signed, keys, tmp_path):
    put(signed, "fp16", b"the old plan")
    put(signed, "fp32", b"another plan")
    seen = set()
    for root in killed_at_each_step(signed, tmp_path / "killed", "engine", "fp16"):
        engines = open_bundle(root).manifest.engines
        plans = {engine.variant: (root / engine.file).read_bytes() for engine in engines}
        assert plans["fp32"] == b"another plan"
        seen.add(plans.get("fp16"))
        sign_bundle(root, keys[0], overwrite=True)
    assert seen == {b"the old plan", None, b"plan"}


@pytest.mark.parametrize(
    "name",
    [
        ".bundle.99999999.partial.sig",
        ".manifest.99999999.partial.json",
        "engines/.x.99999999.partial.plan",
    ],
)
def test_what_an_older_release_left_is_passed_over_and_swept(signed, keys, name):
    (signed / name).parent.mkdir(exist_ok=True)
    (signed / name).write_text("half of it")
    check_signature(signed, keys[1])
    assert run("sign", signed, "--key", keys[0], "--force").exit_code == 0
    assert name not in names_of(signed)
    check_signature(signed, keys[1])


@pytest.mark.parametrize(
    "name",
    [
        f"{TOKEN}/new/model.onnx",
        f"engines/{TOKEN}/x.plan",
        ".model.99999999.partial.onnx",
        "engines/.x.1.partial/x.plan",
    ],
)
def test_nothing_that_is_read_can_hide_behind_such_a_name(signed, keys, name):
    place = signed / name
    place.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(open_bundle(signed).path("model.fp32.onnx"), place)

    def name_it(fields):
        for variant in fields["variants"]:
            if variant["name"] == "fp32":
                variant["file"] = name

    edit_manifest(signed, name_it)
    for loaded in (lambda: open_bundle(signed), lambda: cnnedge.load(signed)):
        with pytest.raises(BundleError, match="a part of an unfinished run"):
            loaded()
    # Not even its maker can sign such a bundle.
    with pytest.raises(BundleError):
        sign_bundle(signed, keys[0], overwrite=True)


@pytest.mark.parametrize(
    "name",
    [
        ".cnnedge.partial/x",
        ".cnnedge.0123456789ABCDEF.partial/x",
        ".cnnedge.0123456789abcdef.partial.d/x",
        "cnnedge.0123456789abcdef.partial",
        "x.99.partial",
    ],
)
def test_a_name_that_only_resembles_one_is_an_added_file(signed, keys, name):
    (signed / name).parent.mkdir(parents=True, exist_ok=True)
    (signed / name).write_text("x")
    with pytest.raises(SignatureError, match="added: "):
        check_signature(signed, keys[1])


def test_a_link_of_such_a_name_is_refused(signed, keys, tmp_path):
    (signed / TOKEN).symlink_to(tmp_path)
    with pytest.raises(SignatureError, match="is a link"):
        check_signature(signed, keys[1])


def test_a_journal_that_was_planted_removes_nothing_but_strangers_among_the_plans(
    signed, keys, tmp_path
):
    put(signed, "fp16", b"a plan")
    (tmp_path / "mine.txt").write_text("mine")
    planted = signed / TOKEN
    planted.mkdir()
    (signed / "notes.txt").write_text("a stranger, but no plan")
    names = ["manifest.json", "model.fp32.onnx", "engines/fp16.rtx.plan", "notes.txt"]
    names += ["../mine.txt", str(tmp_path / "mine.txt"), "engines/../labels.txt", "\0", "é" * 300]
    (planted / "names").write_text("\n".join(names))
    before = names_of(signed)
    with pytest.raises(BundleError, match=r"does not name: notes\.txt"):
        sign_bundle(signed, keys[0], overwrite=True)
    assert set(names_of(signed)) == set(before)
    assert (tmp_path / "mine.txt").read_text() == "mine"


TWO = """
import sys
from pathlib import Path
from test_a_killed_sign_or_engine_breaks_the_signature import put
print("ready", flush=True)
sys.stdin.readline()
for _ in range(10):
    put(Path(sys.argv[1]), sys.argv[2], sys.argv[2].encode() * 1000)
"""


def test_two_runs_that_add_plans_at_once_lose_none(bundle_copy):
    runs = [
        subprocess.Popen(
            [sys.executable, "-c", TWO, bundle_copy, variant],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment(),
        )
        for variant in ("fp16", "fp32")
    ]
    for one in runs:
        assert one.stdout.readline() == "ready\n"
    for one in runs:
        one.stdin.write("go\n")
        one.stdin.flush()
    for one in runs:
        one.communicate(timeout=120)
        assert one.returncode == 0
    bundle = open_bundle(bundle_copy)
    assert {e.variant for e in bundle.manifest.engines} == {"fp16", "fp32"}
    for engine in bundle.manifest.engines:
        note = json.loads(bundle.path(engine.note).read_text())
        assert note["sha256"] == engine.sha256 == sha256(bundle.path(engine.file))
        assert note["variant"] == engine.variant
    assert not list(bundle_copy.rglob("*.partial*"))


def test_a_plan_of_what_has_become_another_bundle_is_refused(bundle_copy):
    opened = open_bundle(bundle_copy)
    note = put(bundle_copy, "fp16", b"a plan").manifest.engines[0]
    edit_manifest(bundle_copy, lambda fields: fields["variants"].pop())
    made = PlanNote.from_json((bundle_copy / note.note).read_text(), "note")
    with pytest.raises(BundleError, match="has become another bundle"):
        put_engine(opened, made, b"another plan")
    assert (bundle_copy / note.file).read_bytes() == b"a plan"


def test_the_real_engine_twice_at_once_and_killed(signed, keys):
    pytest.importorskip("tensorrt_rtx", reason="the extra `rtx` is not installed")
    pytest.importorskip("onnx_ir")
    command = [sys.executable, "-m", "cnnedge", "engine", signed, "--runtime", "rtx", "--variant"]
    for seconds in (0.5, 1.5, 2.5):
        begun = subprocess.Popen([*command, "fp32"], stdout=subprocess.DEVNULL)
        time.sleep(seconds)
        begun.kill()
        begun.wait(timeout=60)
        if not open_bundle(signed).manifest.engines:
            check_signature(signed, keys[1])
    runs = [subprocess.Popen([*command, variant]) for variant in ("fp16", "fp32")]
    assert [one.wait(timeout=300) for one in runs] == [0, 0]
    engines = open_bundle(signed).manifest.engines
    assert {engine.variant for engine in engines} == {"fp16", "fp32"}
    assert run("sign", signed, "--key", keys[0], "--force").exit_code == 0
    check_signature(signed, keys[1])
