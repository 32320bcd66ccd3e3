"""A verification that was stopped goes on, to the document it would have given."""

from __future__ import annotations

import io
import signal as signals
import subprocess
import sys

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image
from test_bundle import edit_manifest

from cnnedge import sweep
from cnnedge.cli import main
from cnnedge.cli.shell import progress_bar
from cnnedge.data import open_source
from cnnedge.errors import DataError, ModelError
from cnnedge.verify import verify_bundle

TESTED = 150
BATCH = 8
# The command as it is, but for small batches, saves after each of them, and a note of every image
# that is decoded; at the DEADLY one it sends itself a signal, from a thread that decodes.
COMMAND = """
import os, signal, sys
from cnnedge import sweep
from cnnedge.cli import main
from cnnedge.data.split import Split

sweep.BATCH_PIXELS = {batch} * 32 * 32
sweep.FIRST_SAVE_SECONDS = sweep.SAVE_SECONDS = 0
decode, count = Split.tensor, 0
note = os.open({note!r}, os.O_WRONLY | os.O_APPEND)

def counted(self, index, contract):
    global count
    count += 1
    if count == {deadly}:
        os.kill(os.getpid(), signal.{signal})
    os.write(note, b".")
    return decode(self, index, contract)

Split.tensor = counted
main(sys.argv[1:])
"""


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("CNNEDGE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def eager(monkeypatch):
    monkeypatch.setattr(sweep, "BATCH_PIXELS", BATCH * 32 * 32)
    monkeypatch.setattr(sweep, "FIRST_SAVE_SECONDS", 0)
    monkeypatch.setattr(sweep, "SAVE_SECONDS", 0)


@pytest.fixture(scope="module")
def photos(digits, tmp_path_factory):
    """Files of digits: a few to train on, the others to test."""
    root = tmp_path_factory.mktemp("photos")
    split = digits.test.take(TESTED + 30, seed=0)
    seen = dict.fromkeys(range(10), 0)
    for number, (pixels, target) in enumerate(zip(split.items, split.targets, strict=True)):
        part = "train" if seen[target] < 3 else "test"
        seen[target] += 1
        (root / part / str(target)).mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(root / part / str(target) / f"{number:03d}.png")
    return root


def run(arguments, note, deadly=-1, signal="SIGKILL"):
    """Run the command in a process of its own; return how it ended and how much it decoded."""
    note.write_bytes(b"")
    code = COMMAND.format(batch=BATCH, note=str(note), deadly=deadly, signal=signal)
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True,
        text=True,
        # A shell's background jobs ignore Ctrl-C, and so would what they start.
        preexec_fn=lambda: signals.signal(signals.SIGINT, signals.SIG_DFL),
    )
    return done, len(note.read_bytes())


@pytest.mark.system
def test_a_killed_run_goes_on_to_the_same_document(toy_bundle, photos, tmp_path, cache):
    arguments = ["verify", str(toy_bundle.root), "--data", str(photos), "--json"]
    whole, decoded = run(arguments, tmp_path / "count")
    assert whole.returncode == 0, whole.stderr
    assert decoded == TESTED
    assert not list(cache.rglob("*.*"))
    killed, first = run(arguments, tmp_path / "count", deadly=61)
    assert killed.returncode == -9
    again, second = run([*arguments, "--resume"], tmp_path / "count", deadly=45)
    assert again.returncode == -9
    last, third = run([*arguments, "--resume"], tmp_path / "count")
    assert last.returncode == 0, last.stderr
    assert last.stdout == whole.stdout
    assert 0 < third < TESTED - 40
    assert first + second + third < 2 * TESTED
    assert not list(cache.rglob("*.*"))


@pytest.mark.system
@pytest.mark.parametrize("signal", ["SIGTERM", "SIGINT"])
def test_who_stops_it_is_told_how_to_go_on(toy_bundle, photos, tmp_path, signal):
    arguments = ["verify", str(toy_bundle.root), "--data", str(photos), "--json"]
    done, _ = run(arguments, tmp_path / "count", deadly=80, signal=signal)
    assert done.returncode == 1
    data, line = done.stderr.splitlines()
    assert data.endswith(" classes")
    assert line.startswith("error: interrupted; ")
    assert line.endswith(f" of {TESTED} images are done and kept, --resume goes on")


class StopError(Exception):
    """What a test stops a run with."""


def stop(*arguments, **options):
    def progress(task, done, total):
        if task == "verify" and done >= 3 * BATCH:
            raise StopError

    with pytest.raises(StopError):
        verify_bundle(*arguments, progress=progress, **options)


@pytest.mark.usefixtures("eager")
def test_another_bundle_reference_or_limit_is_refused(bundle_copy, digits):
    stop(bundle_copy, digits)
    with pytest.raises(ModelError, match=r"another test images.*another number of images"):
        verify_bundle(bundle_copy, digits, limit=40, resume=True)
    given = {"reference": lambda x: np.eye(10, dtype=np.float32)[[0] * len(x)]}
    with pytest.raises(ModelError, match=r"another reference \(recorded there, one now\)"):
        verify_bundle(bundle_copy, digits, **given, reference_id="one", resume=True)
    with pytest.raises(DataError, match="a reference that has an id"):
        verify_bundle(bundle_copy, digits, **given, resume=True)
    edit_manifest(bundle_copy, lambda fields: fields.update(max_drop=1.5))
    with pytest.raises(ModelError, match=r"another bundle \(.* there, .* now\)"):
        verify_bundle(bundle_copy, digits, resume=True)


@pytest.mark.usefixtures("eager")
def test_a_reference_that_cannot_be_told_from_others_is_not_kept(toy_bundle, digits, cache):
    given = {"reference": lambda x: np.eye(10, dtype=np.float32)[[0] * len(x)]}
    stop(toy_bundle.root, digits, **given)
    assert not cache.exists()
    stop(toy_bundle.root, digits, **given, reference_id="one")
    assert list(cache.rglob("state.json"))


@pytest.mark.usefixtures("eager")
def test_runs_over_other_data_do_not_disturb_each_other(toy_bundle, digits):
    others = open_source("signs:128")  # other labels: refused, and nothing is lost by that
    stop(toy_bundle.root, digits)
    with pytest.raises(DataError):
        verify_bundle(toy_bundle.root, others)
    whole = verify_bundle(toy_bundle.root, digits, resume=True)
    assert whole == verify_bundle(toy_bundle.root, digits)


def test_a_short_run_leaves_nothing_behind(toy_bundle, digits, cache):
    verify_bundle(toy_bundle.root, digits, limit=40)
    assert not cache.exists()
    with pytest.raises(ModelError, match="there is no checkpoint .* to resume from"):
        verify_bundle(toy_bundle.root, digits, resume=True)


def test_there_must_be_data_to_resume_on(toy_bundle):
    with pytest.raises(DataError, match="only a verification over data is resumed"):
        verify_bundle(toy_bundle.root, resume=True)
    told = CliRunner().invoke(main, ["verify", str(toy_bundle.root), "--resume"])
    assert told.exit_code == 2
    assert "over --data, which is not given" in told.output


def test_the_fp32_variant_that_is_the_reference_runs_once(toy_bundle, monkeypatch):
    from cnnedge import verify

    ran = []
    open_variant = verify.open_variant

    def opened(bundle, variant, *settings):
        ran.append(variant.name)
        return open_variant(bundle, variant, *settings)

    monkeypatch.setattr(verify, "open_variant", opened)
    found = verify_bundle(toy_bundle.root, open_source("digits", seed=7), limit=20)
    assert found.reference.startswith("the FP32 variant")
    assert ran.count("fp32") == 1
    assert found.variants[0].comparison.agreement == 1.0


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_terminal_shows_the_rate_and_the_time_left(monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    with progress_bar() as progress:
        for done in range(40_000, 40_100, 10):
            progress("verify", done, 50_000)
        progress("train", 3, 4)
    shown = sys.stderr.getvalue()
    assert "images/s" in shown
    assert "40090/50000" in shown


def test_what_is_no_terminal_stays_quiet(capsys):
    with progress_bar() as progress:
        progress("verify", 1, 2)
    assert capsys.readouterr() == ("", "")
