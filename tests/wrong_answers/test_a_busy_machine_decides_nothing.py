"""Figures from a busy machine: marked, without a headline, and nobody is picked by them.

The recorded result is of the kind that was seen: 6.2× the speed of Keras beside an interval of 0.88
to 6.88, nine of nine contestants unstable, 133 and 322 % of the roof; and FP32 at 55 ms beside
Keras at 16 ms in a bundle. Who else runs on the machine of the test plays no part: what the system
tells is made up, or is read from made-up files.
"""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner

from cnnedge.benchmark import interleaved, load
from cnnedge.benchmark.document import read_result
from cnnedge.benchmark.load import CpuTimes, Watch, doubt, taken
from cnnedge.benchmark.run import bench
from cnnedge.benchmark.statistics import instabilities
from cnnedge.benchmark.suite import ModelEntry, Suite
from cnnedge.bundle import MANIFEST, open_bundle
from cnnedge.cli import main
from cnnedge.machine import Machine
from cnnedge.measurement import Measurement
from cnnedge.report import as_csv, as_markdown, render_page
from cnnedge.runtime import choice

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
READ = load.read_cpu_times  # at import: a test sees a machine of which nothing is known
UNSTABLE = ["rounds differ by 213%", "half of the calls spread over 180% of the median"]
BUSY = {"before": 1.4, "during": 1.6, "of": 2}
WHY = "the machine was busy: others took 1.6 of the 2 CPUs that a call needs"


def run(*arguments, code=0):
    result = CliRunner().invoke(main, [str(a) for a in arguments])
    assert result.exit_code == code, (result.output, result.exception)
    return result


# --- a result of `bench` -----------------------------------------------------------------------


@pytest.fixture
def recorded(tmp_path):
    """The seen result as the version that made it wrote it: without a word of doubt."""
    document = json.loads((RESULTS / "edge-cpu-epyc-zen3-2cores.json").read_text())
    model = document["models"][0]
    ninth = json.loads(json.dumps(model["contestants"][-1]))
    model["contestants"].append(ninth | {"name": "bf16@openvino", "title": "BF16, OpenVINO"})
    for row in model["contestants"]:
        row["single_stream"].update(stable=False, notes=UNSTABLE)
    rows = {row["name"]: row for row in model["contestants"]}
    against = {"name": "keras", "ratio": 6.2, "interval": [0.88, 6.88]}
    rows["int8@cpu"]["single_stream"]["against"] = against
    rows["fp32@cpu"]["roofline"]["fraction"] = 1.33
    rows["int8@cpu"]["roofline"]["fraction"] = 3.22
    model["pick"]["why"] = (
        "the fastest within the budget: 3.28 ms, 6.20× [0.88, 6.88] as fast as keras"
    )
    document["models"] = [model]
    path = tmp_path / "busy.json"
    path.write_text(json.dumps(document))
    return path


def test_one_banner_is_on_top_and_no_factor_below(recorded, tmp_path):
    page, markdown, again = (tmp_path / f"bench.{kind}" for kind in ("html", "md", "json"))
    shown = run("bench", recorded, "--html", page, "--markdown", markdown, "-o", again).stdout
    banner = "These latencies decide nothing: none of 9 latencies was stable."
    assert shown.startswith(banner)
    assert markdown.read_text().startswith(f"> **{banner}")
    html = page.read_text()
    assert html.count(banner) == 1
    assert html.index(banner) < html.index("<article")
    for text in (shown, markdown.read_text(), html.partition("<script")[0]):
        assert "6.2" not in text.replace("16.2", "")
        assert "[0.88, 6." in text
    assert "the speed of" not in html.partition("<script")[0]
    assert "The pick on this machine" not in html
    document = json.loads(again.read_text())
    assert document["doubt"] == document["models"][0]["doubt"] == "none of 9 latencies was stable"
    assert "none of 9 latencies" in as_csv(document).splitlines()[1]


@pytest.mark.parametrize(
    ("isa", "name", "why"),
    [
        (["avx2", "fma"], "fp32@cpu", "no int8 dot product"),
        (["avx2", "avx512_vnni"], "int8@cpu", "int8 dot product (avx512_vnni)"),
        (["asimd", "asimddp", "asimdhp"], "int8@cpu", "int8 dot product (asimddp)"),
        (["asimd", "asimdhp"], "fp32@cpu", "no int8 dot product"),
    ],
)
def test_the_pick_is_by_arithmetic_and_says_so(recorded, isa, name, why):
    document = json.loads(recorded.read_text())
    document["environment"]["machine"]["isa"] = isa
    recorded.write_text(json.dumps(document))
    pick = read_result(recorded)["models"][0]["pick"]
    assert (pick["name"], pick["by"]) == (name, "arithmetic")
    assert "which is the fastest is not known: none of 9 latencies was stable" in pick["why"]
    assert why in pick["why"]
    assert "million multiplications" in pick["why"]
    assert "ms" not in pick["why"].split()
    assert {other["why"] for other in pick["runners_up"]} == {"its latency decides nothing here"}
    assert "pick, by arithmetic alone: " in run("bench", recorded).stdout


def test_who_is_outside_the_budget_is_not_picked_by_arithmetic_either(recorded):
    document = json.loads(recorded.read_text())
    document["environment"]["machine"]["isa"] = ["avx512_vnni"]
    row = next(r for r in document["models"][0]["contestants"] if r["name"] == "int8@cpu")
    row["accuracy"].update(drop_points=9.0)
    recorded.write_text(json.dumps(document))
    assert read_result(recorded)["models"][0]["pick"]["name"] == "fp32@cpu"


def test_no_share_of_a_roof_is_above_it(recorded):
    document = read_result(recorded)
    assert "133%" not in as_markdown(document)
    for row in document["models"][0]["contestants"]:
        assert row["roofline"]["fraction"] is None
        assert "ran faster than the roof" in row["roofline"]["why"]
        assert all(layer["bound_ms"] is None for layer in row["layers"])
    assert "no share of the roofline: somebody ran faster" in render_page(document)


def test_a_layer_above_its_roof_loses_its_own_share_alone():
    name = "edge-cpu-epyc-zen3-2cores"
    before = json.loads((RESULTS / f"{name}.json").read_text())["models"][0]["contestants"]
    after = read_result(RESULTS / f"{name}.json")["models"][0]["contestants"]
    pairs = [
        (old, new)
        for one, other in zip(before, after, strict=True)
        for old, new in zip(one["layers"], other["layers"], strict=True)
    ]
    above = [(old, new) for old, new in pairs if (old["fraction"] or 0) > 1]
    assert above
    assert all(new["fraction"] is new["bound_ms"] is None for _, new in above)
    assert all(new == old for old, new in pairs if (old, new) not in above)


def test_what_was_recorded_on_a_quiet_machine_keeps_its_pick():
    for path in sorted(RESULTS.glob("*.json")):
        old = json.loads(path.read_text())
        if not isinstance(old, dict) or old.get("kind") != "cnnedge-benchmark":
            continue
        document = read_result(path)
        for before, after in zip(old["models"], document["models"], strict=True):
            stable = [row["single_stream"]["stable"] for row in before["contestants"]]
            assert (after["doubt"] is None) == any(stable)
            if any(stable):
                assert after["pick"] == before["pick"]
        render_page(document)


def test_a_factor_that_may_be_chance_is_no_headline_on_a_quiet_machine_either(recorded):
    document = json.loads(recorded.read_text())
    for row in document["models"][0]["contestants"]:
        row["single_stream"]["stable"] = True
    document["models"][0]["pick"]["why"] = ""
    html = render_page(document)
    assert "the speed of" not in html.partition("<script")[0]


def test_a_comparison_says_so_and_decides_nothing(recorded, tmp_path):
    document = read_result(recorded)
    for row in document["models"][0]["contestants"]:
        row["single_stream"]["stable"] = True
    document["models"][0]["doubt"] = document["doubt"] = None
    quiet = tmp_path / "quiet.json"
    quiet.write_text(json.dumps(document))
    slower = json.loads(recorded.read_text())
    row = next(r for r in slower["models"][0]["contestants"] if r["name"] == "int8@cpu")
    samples = [[[5 * s for s in block] for block in r] for r in row["single_stream"]["samples_ms"]]
    row["single_stream"]["samples_ms"] = samples
    recorded.write_text(json.dumps(slower))
    for order in ((quiet, recorded), (recorded, quiet)):
        found = run("bench", "--compare", *order)
        which = "old" if order[0] is recorded else "new"
        assert found.stdout.startswith(
            f"alexnet_v1, the {which} result: none of 9 latencies was stable; nothing is decided"
        )
        changes = json.loads(run("bench", "--compare", *order, "--json").stdout)["changes"]
        timed = [c for c in changes if c["figure"] == "p50" or c["figure"].startswith("offline")]
        assert {c["verdict"] for c in timed} == {"not comparable"}
        assert {c["verdict"] for c in changes if c["figure"] in ("top-1", "size")} == {"same"}
    # Without the doubt, that slowdown is a regression; and a larger file still is one.
    for one in slower["models"][0]["contestants"]:
        one["single_stream"]["stable"] = True
    recorded.write_text(json.dumps(slower))
    run("bench", "--compare", quiet, recorded, code=3)
    for one in slower["models"][0]["contestants"]:
        one["single_stream"]["stable"] = False
    row["bytes"] *= 2
    recorded.write_text(json.dumps(slower))
    found = run("bench", "--compare", quiet, recorded, code=3)
    assert "int8@cpu (size)" in found.stderr
    assert "p50" not in found.stderr


# --- a run of `bench` --------------------------------------------------------------------------


class Others:
    """CPU times of a machine of two CPUs, of which others take so much each second."""

    def __init__(self, *takes, stolen=0.0):
        self.takes, self.now, self.busy, self.stolen, self.step = list(takes), 0.0, 0.0, 0.0, stolen

    def __call__(self):
        take = self.takes.pop(0) if len(self.takes) > 1 else self.takes[0]
        self.now, self.busy, self.stolen = self.now + 1, self.busy + take, self.stolen + self.step
        own = 0.3 * self.now
        return CpuTimes(self.now, 2, 2 * self.now, self.busy + own, self.stolen, own)


@pytest.fixture
def others(monkeypatch):
    """A function: from now on others take so many CPUs between one reading and the next."""
    monkeypatch.setattr(load, "LOOK_SECONDS", 0.0)
    monkeypatch.setattr(load, "this_machine", lambda: Machine("two", 2, ("avx2",), 4.0, "Linux"))
    monkeypatch.setattr(load, "cpu_limit", lambda root=None: None)

    def take(*each, stolen=0.0):
        monkeypatch.setattr(load, "read_cpu_times", Others(*each, stolen=stolen))

    return take


class Link:
    """A contestant in this process, of one latency."""

    opened = {"provider": "Fake"}  # noqa: RUF012

    def ask(self, do, **arguments):
        told = {"warm_up": {"seconds": 1.0, "settled": True}, "memory": {}}
        return told.get(do, {"samples": [0.001] * 8, "gpu": []})

    def close(self):
        pass


def measure(bundle, rounds=2):
    warnings = []
    suite = Suite((ModelEntry(bundle.root),), scenarios=("single-stream",), rounds=rounds)
    return bench(suite, start=lambda contestant: Link(), warn=warnings.append), warnings


def test_a_run_on_a_busy_machine_is_marked_and_warned_of_before(toy_bundle, others):
    others(1.6)
    document, warnings = measure(toy_bundle)
    assert document["environment"]["conditions"]["others"] == {
        "before": 1.6,
        "during": 1.6,
        "of": 2,
    }
    assert document["doubt"] == WHY
    assert document["models"][0]["pick"]["by"] == "arithmetic"
    assert len(warnings) == 1
    assert WHY in warnings[0]


def test_a_run_on_a_quiet_machine_is_not(toy_bundle, others):
    others(0.05)
    document, warnings = measure(toy_bundle)
    assert document["doubt"] is None
    assert document["models"][0]["pick"]["by"] == "latency"
    assert warnings == []


def test_one_busy_round_of_two_is_enough(toy_bundle, others):
    """Readings: two before, then one at each start and end of a round's measuring."""
    others(0.0, 0.0, 0.0, 0.0, 0.0, 1.0)
    document, warnings = measure(toy_bundle)
    found = document["environment"]["conditions"]["others"]
    assert (found["before"], found["during"]) == (0.0, 1.0)
    assert "others took 1.0 of the 2 CPUs" in document["doubt"]
    assert warnings == []


def test_other_guests_of_the_host_count_too(toy_bundle, others):
    others(0.0, stolen=0.5)
    assert "others took 0.5 of the 2 CPUs" in measure(toy_bundle)[0]["doubt"]


# --- what the system tells ---------------------------------------------------------------------


def system(root, *, busy, own=0, child=0, idle=0, steal=0, cpus=None, limit=None, group=0):
    """Write the files of a system; CPU times in ticks."""
    proc = root / "proc"
    for pid, parent, ticks, ended in ((1, 0, busy, 0), (7, 1, own, 5), (8, 7, child, 0)):
        (proc / str(pid)).mkdir(parents=True, exist_ok=True)
        text = f"{pid} (a ) b) S {parent} 1 1 0 -1 0 0 0 0 0 {ticks} 0 {ended} 0 20 0 1 0 0"
        (proc / str(pid) / "stat").write_text(text)
    if not (proc / "self").is_symlink():
        (proc / "self").symlink_to("7")
    cpus = sorted(os.sched_getaffinity(0)) if cpus is None else cpus
    first = f"cpu{cpus[0]} {busy + own + child} 0 0 {idle} 0 0 0 {steal} 0 0"
    rest = [f"cpu{n} 0 0 0 {idle} 0 0 0 0 0 0" for n in cpus[1:]]
    # A CPU that this process may not use, on which others are as busy as they like.
    beyond = f"cpu{max(cpus) + 1} {100 * busy} 0 0 0 0 0 0 0 0 0"
    (proc / "stat").write_text("\n".join(["cpu 1 2 3 4", first, *rest, beyond, "intr 5"]) + "\n")
    group_folder = root / "sys/fs/cgroup"
    group_folder.mkdir(parents=True, exist_ok=True)
    (group_folder / "cpu.max").write_text(
        "max 100000\n" if limit is None else f"{limit}00000 100000\n"
    )
    (group_folder / "cpu.stat").write_text(f"usage_usec {group * 10_000}\nuser_usec 0\n")


def later(reading, seconds=1.0):
    return replace(reading, at=reading.at + seconds)


def between(tmp_path, of, limit=None, **after):
    """Return what others took in a second between two states of a system."""
    ticks = os.sysconf("SC_CLK_TCK")
    system(tmp_path, busy=0)
    first = READ(tmp_path)
    system(tmp_path, **{key: int(value * ticks) for key, value in after.items()})
    last = replace(READ(tmp_path), at=first.at + 1.0)
    return taken(first, last, of, limit)


def test_our_own_processes_are_left_out_and_so_are_other_cpus(tmp_path):
    cpus = len(os.sched_getaffinity(0))
    assert between(tmp_path, cpus, busy=0.5, own=0.9, child=0.4, idle=1) == pytest.approx(0.5)
    assert between(tmp_path, cpus, busy=0, own=0.9, child=0.4, idle=1) == pytest.approx(0)
    assert between(tmp_path, cpus, busy=0, own=0.5, steal=0.2, idle=1) == pytest.approx(0.2)


def test_cpus_that_a_call_does_not_need_may_be_taken():
    first = CpuTimes(0.0, 64, 0.0, 0.0, 0.0, 0.0)
    last = CpuTimes(1.0, 64, 64.0, 32.0, 0.0, 2.0)
    assert taken(first, last, of=2) == 0
    assert taken(first, last, of=40) == pytest.approx(6)
    assert taken(first, last, of=64) == pytest.approx(30)


def test_others_inside_a_container_take_of_its_limit():
    first = CpuTimes(0.0, 64, 0.0, 0.0, 0.0, 0.0, group=0.0)
    last = CpuTimes(1.0, 64, 64.0, 3.0, 0.0, 1.0, group=2.0)
    assert taken(first, last, of=2, limit=2.0) == pytest.approx(1)
    assert taken(first, replace(last, group=1.0), of=2, limit=2.0) == pytest.approx(0)


def test_a_limit_is_read_with_what_the_container_took(tmp_path):
    system(tmp_path, busy=10, limit=2, group=300)
    assert READ(tmp_path).group == 3.0
    system(tmp_path, busy=10)
    assert READ(tmp_path).group is None


def test_cpus_that_a_container_numbers_anew_are_all_counted(tmp_path):
    system(tmp_path, busy=100, idle=50, cpus=[4000, 4001])
    assert READ(tmp_path).cpus == 3


@pytest.mark.parametrize("broken", ["missing", "still", "nonsense", "no affinity"])
def test_what_is_not_told_is_unknown_and_not_quiet(tmp_path, monkeypatch, broken):
    if broken != "missing":
        system(tmp_path, busy=0)
    if broken == "nonsense":
        (tmp_path / "proc/stat").write_text("cpu a b c\ncpu0 x\n")
    if broken == "no affinity":  # as outside Linux
        monkeypatch.delattr(os, "sched_getaffinity")
    first = READ(tmp_path)
    assert (first is None) == (broken != "still")
    assert taken(first, None if first is None else later(first), 2) is None
    monkeypatch.setattr(load, "read_cpu_times", lambda: READ(tmp_path))
    monkeypatch.setattr(load, "LOOK_SECONDS", 0.0)
    watch = Watch()
    watch.look()
    with watch.watching():
        pass
    assert (watch.before, watch.during, watch.busy) == (None, None, None)


def test_this_very_machine_can_be_read():
    first = READ()
    sum(range(10**6))
    last = READ()
    if first is not None:
        assert last.own >= first.own
        assert last.busy >= first.busy
        assert 0 <= (taken(first, last, 1) or 0) <= 1


@pytest.mark.parametrize(
    ("found", "stable", "why"),
    [
        (None, [True, False], None),
        (None, [], None),
        (None, [False] * 9, "none of 9 latencies was stable"),
        (None, [False], "the latency was not stable"),
        ({"before": 0.0, "during": 0.2, "of": 2}, [True], None),
        ({"before": 0.0, "during": 0.21, "of": 2}, [True], "the machine was busy"),
        ({"before": 1.9, "during": 0.0, "of": 2}, [True], None),  # it was gone when it mattered
        ({"before": 1.9, "during": None, "of": 2}, [True], "the machine was busy"),
        ({"before": None, "during": None, "of": 2}, [True], None),
    ],
)
def test_when_figures_are_doubted(found, stable, why):
    told = doubt(found, stable)
    assert told is None if why is None else told.startswith(why)


# --- a bundle ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def busy_export(toy_file, tmp_path_factory):
    """A bundle exported while others took most of the machine, and what the command said."""
    folder = tmp_path_factory.mktemp("busy") / "toy"
    recipe = folder.parent / "recipe.toml"
    recipe.write_text(
        f"model = '{toy_file}'\ntest_images = 40\nbench_seconds = 0.01\nmax_drop = 50.0\n"
        'precision = ["fp32", "int8"]\n'
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(load, "LOOK_SECONDS", 0.0)
        patch.setattr(load, "this_machine", lambda: Machine("two", 2, (), 4.0, "Linux"))
        patch.setattr(load, "read_cpu_times", Others(1.6))
        return folder, run("export", recipe, "-o", folder).stdout


def test_an_export_on_a_busy_machine_is_marked(busy_export):
    folder, shown = busy_export
    assert shown.startswith(f"These latencies decide nothing: {WHY}.")
    assert "×" not in shown
    assert "not recommended" not in shown.replace("not recommended here: written for", "")
    manifest = open_bundle(folder).manifest
    latencies = [manifest.reference.latency, *(v.latency for v in manifest.variants)]
    assert {one.doubt for one in latencies if one} == {WHY}
    int8 = manifest.variant("int8").recommendation
    assert int8.recommended is False
    assert int8.reason == f"not known: {WHY}"
    page = (folder / "report.html").read_text()
    assert page.index("These latencies decide nothing") < page.index("<table")
    assert "×" not in page.partition("Latency of one image")[2].partition("</div>")[0]
    assert "not recommended here" not in page


@pytest.mark.parametrize(
    ("isa", "expected"),
    [
        (("avx2", "avx512f", "avx512_vnni"), "int8"),
        (("avx2", "avx_vnni"), "int8"),
        (("avx2", "fma"), "fp32"),
        (("asimd", "asimddp"), "int8"),
        (("asimd", "asimdhp"), "fp32"),  # FP16 arithmetic, and FP16 is last all the same
        ((), "fp32"),
    ],
)
@pytest.mark.parametrize("kind", ["marked", "unmarked", "another CPU"])
def test_load_goes_by_the_instruction_set_where_latencies_are_marked(
    bundle_copy, monkeypatch, isa, expected, kind
):
    """FP32 at 55 ms beside Keras at 16; by those figures FP16 would be the one to load."""
    fields = json.loads((bundle_copy / MANIFEST).read_text())
    mark = {} if kind == "unmarked" else {"doubt": WHY}
    fields["reference"]["latency"] = {"median_ms": 16.0} | mark
    for variant in fields["variants"]:
        figure = {"fp32": 55.0, "fp16": 20.0, "int8": 60.0}.get(variant["name"])
        variant["latency"] = None if figure is None else {"median_ms": figure} | mark
        variant["recommendation"] = {
            "recommended": variant["name"] in ("fp16", "fp32"),
            "reason": "made up",
        }
    (bundle_copy / MANIFEST).write_text(json.dumps(fields))
    cpu = "another" if kind == "another CPU" else fields["machine"]["cpu"]
    monkeypatch.setattr(choice, "this_machine", lambda: Machine(cpu, 2, isa, 8.0, "Linux"))
    found = choice.choose(open_bundle(bundle_copy))
    if kind == "unmarked":  # an older bundle's figures are believed as ever
        assert found.variant.name == "fp16"
        assert "as measured on this CPU model" in found.reason
        return
    assert found.variant.name == expected
    assert "int8 dot product" in found.reason
    assert (WHY in found.reason) == (kind == "marked")


def test_fp16_is_the_last_of_those_that_are_verified(bundle_copy, monkeypatch):
    fields = json.loads((bundle_copy / MANIFEST).read_text())
    for variant in fields["variants"]:
        if variant["name"] == "fp32":
            variant["verdict"] = {"status": "failed", "reason": "made to"}
    (bundle_copy / MANIFEST).write_text(json.dumps(fields))
    machine = Machine("another", 2, ("asimd", "asimdhp"), 8.0, "Linux")
    monkeypatch.setattr(choice, "this_machine", lambda: machine)
    assert choice.choose(open_bundle(bundle_copy)).variant.name == "int8"


@pytest.mark.parametrize("steady", [False, True])
def test_in_process_latencies_of_which_none_is_stable_decide_nothing(monkeypatch, steady):
    """FP32 at 55 ms beside Keras at 16 ms, nobody else to be seen: the spread tells."""
    monkeypatch.setattr(interleaved, "instabilities", instabilities)

    def measured(name, ms):
        blocks = [(ms * (1 if steady else (1, 0.3, 2, 0.5, 3)[i % 5]),) * 20 for i in range(10)]
        return Measurement(name, tuple(s / 1e3 for b in blocks for s in b), block=20)

    found = [measured("keras", 16.0), measured("fp32", 55.0), measured("int8", 5.0)]
    monkeypatch.setattr(interleaved, "measure_interleaved", lambda *a, **k: found)
    _, told = interleaved.measure_watched({})
    assert told["doubt"] == (None if steady else "none of 3 latencies was stable")
    bench = interleaved.Benchmark(tuple(found), "keras", told)
    assert bench.recommend("int8", "int8").recommended == steady
    assert bench.recommend("fp32", "fp32").recommended
