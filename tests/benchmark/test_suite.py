from __future__ import annotations

import pytest

from cnnedge.benchmark.suite import QUICK, ModelEntry, Suite, make_suite, read_suite
from cnnedge.errors import CnnEdgeError


def test_a_suite_is_read_with_paths_relative_to_it(tmp_path):
    (tmp_path / "photos").mkdir()
    file = tmp_path / "edge.toml"
    file.write_text(
        'runtimes = ["cpu", "openvino"]\nseconds = 30\nbatches = [1, 8]\nloads = [0.5]\n'
        '[[model]]\nbundle = "alexnet"\nreference = "a.keras"\ndata = "photos"\n'
        '[[model]]\nbundle = "vgg"\ndata = "digits"\nimage = "cat.jpg"\n'
    )
    suite = read_suite(file, {"seconds": 5.0, "threads": None})
    assert suite.name == "edge"
    assert suite.seconds == 5.0
    assert suite.batches == (1, 8)
    assert suite.scenarios == QUICK
    assert suite.models == (
        ModelEntry(tmp_path / "alexnet", tmp_path / "a.keras", str(tmp_path / "photos")),
        ModelEntry(tmp_path / "vgg", None, "digits", tmp_path / "cat.jpg"),
    )
    assert suite.to_dict()["runtimes"] == ("cpu", "openvino")


MODEL = '[[model]]\nbundle = "a"\n'


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("seconds = \n", "is no TOML"),
        (f'colour = "red"\n{MODEL}', "suite has no colour, it has models, name, runtimes"),
        (f'seconds = "long"\n{MODEL}', "seconds 'long': expected float, got str"),
        (f"seconds = true\n{MODEL}", "seconds True: expected float, got bool"),
        (f"seconds = 0\n{MODEL}", "seconds 0: expected float >= 0.01"),
        (f"seconds = nan\n{MODEL}", "seconds nan: expected float"),
        (f"rounds = 1.5\n{MODEL}", "rounds 1.5: expected int"),
        (f"rounds = 0\n{MODEL}", "rounds 0: expected int >= 1"),
        (f"rounds = 101\n{MODEL}", "rounds 101: expected int <= 100"),
        (f"batches = [0]\n{MODEL}", "batches[0] 0: expected int >= 1"),
        (f"batches = 8\n{MODEL}", "batches 8: expected array, got int"),
        (f"loads = [1.0]\n{MODEL}", "loads[0] 1.0: expected float <= 0.99"),
        (f'scenarios = ["fast"]\n{MODEL}', "scenarios[0] 'fast': expected one of cold-start"),
        (f"scenarios = []\n{MODEL}", "scenarios []: expected array of length >= 1"),
        (f"runtimes = []\n{MODEL}", "runtimes []: expected array of length >= 1"),
        (f"threads = 0\n{MODEL}", "threads 0: expected int >= 1"),
        (f"seed = -1\n{MODEL}", "seed -1: expected int >= 0"),
        ("", "suite: it names no model"),
        ('[[model]]\nreference = "a.keras"\n', "model: Object missing required field bundle"),
        ("[[model]]\nbundle = 7\n", "model: bundle 7: expected path, got int"),
        (f'{MODEL}scenarios = ["x"]\n', "model: scenarios[0] 'x': expected one of cold-start"),
        (f'{MODEL}size = "big"\n', "model has no size, it has bundle"),
        ('model = "a"\n', "write one [[model]] table"),
    ],
)
def test_what_a_suite_may_not_say(tmp_path, text, message):
    file = tmp_path / "s.toml"
    file.write_text(text)
    with pytest.raises(CnnEdgeError) as caught:
        read_suite(file, {})
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_suite(tmp_path):
    with pytest.raises(CnnEdgeError, match="cannot read the suite"):
        read_suite(tmp_path / "none.toml", {})


def test_options_are_validated_like_a_file(tmp_path):
    models = (ModelEntry(tmp_path),)
    assert make_suite(models, {"seconds": 3, "clients": [2]}) == Suite(
        models, seconds=3, clients=(2,)
    )
    with pytest.raises(CnnEdgeError, match="max_drop 200: expected float <= 100"):
        make_suite(models, {"max_drop": 200})
