"""What the machine tells of itself, and the roof it sets."""

from __future__ import annotations

import pytest
from probe_graphs import FOLDER, PROBES, SIZE

from cnnedge.benchmark import peaks as peaks_module
from cnnedge.benchmark.environment import conditions, read_sensors
from cnnedge.benchmark.peaks import Peaks, best_of, layer_bounds, measure_peaks
from cnnedge.benchmark.rows import layer_of
from cnnedge.graph.precision import WeightedLayer
from cnnedge.machine import _cpu_info


def machine(root, *, clock="2400000", ticks="0", steal=0):
    cpus = root / "sys/devices/system/cpu"
    for cpu in ("cpu0", "cpu1"):
        for name, text in {
            "cpufreq/scaling_cur_freq": clock,
            "cpufreq/scaling_governor": "powersave",
            "thermal_throttle/core_throttle_count": "3",
        }.items():
            (cpus / cpu / name).parent.mkdir(parents=True, exist_ok=True)
            (cpus / cpu / name).write_text(text + "\n")
    zone = root / "sys/class/thermal/thermal_zone0"
    zone.mkdir(parents=True, exist_ok=True)
    (zone / "temp").write_text("61500\n")
    (root / "proc").mkdir(exist_ok=True)
    (root / "proc/stat").write_text(f"cpu  {ticks} 0 0 0 0 0 0 {steal} 0 0\ncpu0 1 2 3\n")
    (root / "proc/cpuinfo").write_text("flags\t: fpu hypervisor avx2\n")
    (root / "sys/class/dmi/id").mkdir(parents=True, exist_ok=True)
    (root / "sys/class/dmi/id/sys_vendor").write_text("Host Inc.\n")
    (root / "sys/fs/cgroup").mkdir(parents=True, exist_ok=True)
    (root / "sys/fs/cgroup/cpu.max").write_text("150000 100000\n")


def test_sensors_are_read(tmp_path):
    machine(tmp_path)
    found = read_sensors(tmp_path)
    assert found.clock_mhz == 2400
    assert found.temperature_c == 61.5
    assert found.throttled == 6


def test_conditions(tmp_path):
    machine(tmp_path, ticks="1000", steal=10)
    before = read_sensors(tmp_path)
    machine(tmp_path, ticks="1900", steal=110, clock="2000000")
    found = conditions(before, read_sensors(tmp_path), tmp_path)
    assert found["steal"] == pytest.approx(0.1)
    assert found["governor"] == "powersave"
    assert found["clock_mhz"] == 2200
    assert found["virtual"] == "Host Inc."
    assert found["cpu_limit"] == 1.5


def test_a_machine_that_tells_nothing_is_none(tmp_path):
    found = read_sensors(tmp_path)
    assert (found.clock_mhz, found.temperature_c, found.throttled, found.stolen) == (None,) * 4
    told = conditions(found, found, tmp_path)
    assert {told[k] for k in ("governor", "clock_mhz", "virtual", "cpu_limit", "steal")} == {None}


def test_sensors_that_say_nonsense_are_left_out(tmp_path):
    machine(tmp_path, clock="<unknown>")
    assert read_sensors(tmp_path).clock_mhz is None


@pytest.mark.parametrize(
    ("implementer", "part", "name"),
    [
        ("0x41", "0xd0b", "Arm Cortex-A76"),
        ("0x41", "0xd08", "Arm Cortex-A72"),
        ("0x41", "0xfff", "Arm, implementer 0x41, part 0xfff"),
        ("0x61", "0xd0b", "Arm, implementer 0x61, part 0xd0b"),
    ],
)
def test_an_arm_cpu_is_named_by_its_part(tmp_path, implementer, part, name):
    """Two Arm CPUs of one name would share what `load` knows of their speed."""
    core = f"""processor\t: 0
BogoMIPS\t: 108.00
Features\t: fp asimd evtstrm aes pmull sha1 sha2 crc32 atomics fphp asimdhp asimdrdm asimddp
CPU implementer\t: {implementer}
CPU architecture: 8
CPU variant\t: 0x4
CPU part\t: {part}
CPU revision\t: 1
"""
    (tmp_path / "cpuinfo").write_text(
        f"{core}\n{core}\nModel\t\t: Raspberry Pi 5 Model B Rev 1.0\n"
    )
    found, flags = _cpu_info(tmp_path / "cpuinfo")
    assert found == name
    assert {"asimddp", "asimdhp"} <= flags
    (tmp_path / "x86").write_text("processor\t: 0\nmodel name\t: A CPU: fast\nflags\t\t: avx fma\n")
    assert _cpu_info(tmp_path / "x86") == ("A CPU: fast", {"avx", "fma"})


def test_this_machine_can_be_read():
    sensors = read_sensors()
    conditions(sensors, sensors)


# --- the roof ----------------------------------------------------------------------------------

PEAKS = Peaks(100e9, 400e9, {1: 50e9, 64: 10e9}, {"fp32": "x", "int8": "y"})


def layer(name="conv", macs=0, weights=0, stored="float32", computed="float32"):
    return WeightedLayer(name, "Conv", weights, macs, stored, computed, f"{name}/weight")


def test_a_layer_is_bound_by_its_arithmetic_or_by_its_weights():
    conv = layer(macs=50_000_000)  # two operations a MAC: a millisecond
    dense = layer("fc", macs=10_000_000, weights=10_000_000)  # 40 MB at 10 GB/s: four
    bounds = layer_bounds([conv, dense], PEAKS)
    assert [b.seconds for b in bounds] == pytest.approx([0.001, 0.004])
    batch = layer_bounds([conv, dense], PEAKS, batch=32)
    assert [b.seconds for b in batch] == pytest.approx([0.032, 0.0064])


def test_int8_has_a_roof_of_its_own_and_small_weights_stay_in_the_cache():
    small = layer(macs=1, weights=500_000, stored="int8", computed="int8")
    (bound,) = layer_bounds([small], PEAKS)
    assert bound.seconds == pytest.approx(500_000 / 50e9)
    big = layer(macs=200_000_000, weights=1, stored="int8", computed="int8")
    (bound,) = layer_bounds([big], PEAKS)
    assert bound.seconds == pytest.approx(0.001)
    assert Peaks(100e9, None, {1: 1.0}, {}).rate("int8") == 100e9


def test_peaks_are_what_was_reached_once():
    rounds = [
        {"fp32": 90e9, "int8": None, "bandwidth": [[1, 40e9]], "by": {"fp32": "slow"}},
        {"fp32": 100e9, "int8": 300e9, "bandwidth": [[1, 30e9]], "by": {"fp32": "fast"}},
    ]
    found = best_of(rounds)
    assert (found.fp32, found.int8, found.bandwidth) == (100e9, 300e9, {1: 40e9})
    assert found.by["fp32"] == "fast"


def test_this_machine_has_peaks(monkeypatch):
    monkeypatch.setattr(peaks_module, "WORKING_SETS", (1, 4))
    found = measure_peaks(seconds=0.02)
    assert found["fp32"] > 1e8
    assert found["int8"] > 1e8
    assert [mib for mib, _ in found["bandwidth"]] == [1, 4]
    assert all(rate > 1e7 for _, rate in found["bandwidth"])


def test_the_probes_are_what_they_are_said_to_be():
    import onnx

    assert peaks_module.SIZE == SIZE
    for name, model in PROBES.items():
        assert onnx.load(FOLDER / name) == model
        onnx.checker.check_model(model)


@pytest.mark.parametrize(
    ("node", "layer_name"),
    [
        ("conv1", "conv1"),
        ("conv1/relu_nchwc", "conv1"),
        ("conv1_1_nchwc", "conv1_1"),
        ("fused fc1", "fc1"),
        ("InsertedPrecisionFreeCast_conv1/relu_nchwc", "conv1"),
        ("fc1/WithoutBiases/DequantizationMultiply", "fc1"),
        ("conv10/relu", "conv10/relu"),
        ("image/nchw_abcd_acdb_conv1/WithoutBiases", "image/nchw_abcd_acdb_conv1/WithoutBiases"),
        ("pool1_nchwc", "pool1_nchwc"),
    ],
)
def test_a_profiles_nodes_are_told_to_their_layers(node, layer_name):
    assert layer_of(node, {"conv1": 0, "conv1_1": 0, "fc1": 0}) == layer_name


@pytest.mark.system
def test_the_probes_travel_with_the_package():
    """A wheel has them, and so has a clone: they are neither ignored nor left out."""
    import subprocess
    import tomllib
    from pathlib import Path

    root = Path(__file__).parents[2]
    settings = tomllib.loads((root / "pyproject.toml").read_text())
    assert "benchmark/probes/*.onnx" in settings["tool"]["setuptools"]["package-data"]["cnnedge"]
    if (root / ".git").exists():
        listed = ["git", "ls-files", "--error-unmatch", *sorted(str(FOLDER / n) for n in PROBES)]
        assert subprocess.run(listed, cwd=root, capture_output=True).returncode == 0
