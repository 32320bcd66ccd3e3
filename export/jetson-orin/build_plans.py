#!/usr/bin/env python3
"""Build TensorRT plans of a bundle on a Jetson: bundle in, plans out.

    python3 build_plans.py BUNDLE -o plans                 # int8-trt and fp16, on the GPU
    python3 build_plans.py BUNDLE -o plans --dla 0         # fp16, on the DLA
    python3 build_plans.py BUNDLE -o plans --dry-run       # only say what would be run

JetPack 6 has Python 3.10 and TensorRT 10.3, where cnnedge itself cannot be installed; so this needs
nothing but JetPack's Python and its trtexec. From JetPack 7.2.2 on (TensorRT 11.4.1, Python 3.12)
it works as well, and `cnnedge engine BUNDLE --runtime tensorrt` does more: it holds the engine
against the graph layer by layer and puts the plan into the bundle.

Each plan comes with a note of the form that cnnedge writes (docs/manifest.md), the list of its
layers and the whole log of trtexec. Exit codes: 0 done, 1 failed (one line says what), 2 usage,
3 trtexec built another precision than the graph asks for, and that plan was not kept.
"""

import argparse
import hashlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

TRTEXEC = "/usr/src/tensorrt/bin/trtexec"  # where JetPack puts it
OLDEST = (10, 3, 0)
# The releases whose trtexec runs a strongly typed network on a DLA, and the last before that knew
# DLAs at all: https://docs.nvidia.com/deeplearning/tensorrt/11.4.1/inference-library/work-with-dla.html
DLA_TYPED, DLA_UNTYPED = (11, 4, 1), (10, 7, 99)
HEAVY = "conv|gemm|matrix|fully"  # layers that multiply by weights, in the inspector's words
NEEDED_MIB = 2048  # of free memory: builders hold weights and workspace in the same memory as all


class RefusedError(Exception):
    """Something stands in the way; its text is the one line that is shown."""


def main(arguments=None):
    """Build the plans; return the exit code."""
    options = parse(arguments)
    try:
        return run(options)
    except RefusedError as error:
        print(f"error: {error}", file=sys.stderr)
    except OSError as error:
        print(f"error: {error.filename}: {error.strerror}", file=sys.stderr)
    return 1


def parse(arguments):
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bundle", type=Path)
    parser.add_argument("-o", "--out", type=Path, default=Path("plans"), help="[plans]")
    parser.add_argument("--variant", help="of int8-trt,fp16,fp32; [int8-trt,fp16; on a DLA fp16]")
    parser.add_argument("--max-batch", type=int, default=8, help="[8; on a DLA always 1]")
    parser.add_argument("--dla", type=int, choices=(0, 1), help="run on this DLA core")
    parser.add_argument("--workspace-mib", type=int, help="scratch memory that a layer may take")
    parser.add_argument("--trtexec", default=None, help=f"[{TRTEXEC}]")
    parser.add_argument("--dry-run", action="store_true", help="print the command lines, run none")
    options = parser.parse_args(arguments)
    if options.max_batch < 1:
        parser.error("--max-batch is at least 1")
    if options.dla is not None:
        options.max_batch = 1  # a DLA knows no dynamic shapes
    if options.variant is None:
        options.variant = "fp16" if options.dla is not None else "int8-trt,fp16"
    return options


def run(options):
    """Check bundle and device, then build one plan after another."""
    manifest = read_manifest(options.bundle)
    variants = [find_variant(options, manifest, name) for name in options.variant.split(",")]
    trtexec = find_trtexec(options.trtexec)
    version = read_version(trtexec)
    check_version(version, options.dla)
    for line in look_at_device():
        print(f"note: {line}", file=sys.stderr)
    code = 0
    for variant in variants:
        words = command_line(trtexec, version, options, manifest, variant)
        if options.dry_run:
            print(" ".join(shlex.quote(word) for word in words))
        elif not build(options, manifest, variant, version, words):
            code = 3
    return code


def read_manifest(bundle):
    """Return the bundle's manifest."""
    path = bundle / "manifest.json"
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        if manifest["schema"] != 1:
            raise RefusedError("{}: schema {}, this reads 1".format(path, manifest["schema"]))
        return manifest
    except (ValueError, KeyError, TypeError) as error:
        raise RefusedError(f"{path} is no bundle's manifest") from error


def find_variant(options, manifest, name):
    """Return a variant whose gate did not fail and whose file is the one the manifest names."""
    known = {variant["name"]: variant for variant in manifest["variants"]}
    if name not in known:
        raise RefusedError("no variant {}; the bundle has {}".format(name, ", ".join(known)))
    variant = known[name]
    if variant["target"] == "cpu":
        raise RefusedError(f"{name} is written for CPUs: build int8-trt, fp16 or fp32")
    if (variant.get("verdict") or {}).get("status") == "failed":
        raise RefusedError(f"{name} failed its accuracy gate: export it again")
    if options.dla is not None and name != "fp16":
        raise RefusedError("a DLA computes in half precision here: use --variant fp16")
    root = options.bundle.resolve()
    path = (root / variant["file"]).resolve()
    if root not in path.parents:
        raise RefusedError("{} points outside the bundle".format(variant["file"]))
    if not path.is_file() or digest(path) != variant["sha256"]:
        raise RefusedError(
            f"{path} is not what the manifest names: it was altered or cut short; copy the bundle "
            "again"
        )
    return variant


def find_trtexec(given):
    """Return the path of trtexec."""
    found = given or (TRTEXEC if os.path.exists(TRTEXEC) else shutil.which("trtexec"))
    if not found or not os.access(found, os.X_OK):
        raise RefusedError(
            f"{found or TRTEXEC} is not there: sudo apt install tensorrt, or give --trtexec"
        )
    return found


def read_version(trtexec):
    """Return TensorRT's version, which trtexec's first line tells: [TensorRT v100300]."""
    done = subprocess.run(
        [trtexec, "--help"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    found = re.search(r"\[TensorRT v(\d+)\]", done.stdout)
    if not found:
        raise RefusedError(f"{trtexec} does not tell TensorRT's version")
    number = int(found.group(1))
    if number < 100000:  # up to 9: 8601 is 8.6.1
        return number // 1000, number // 100 % 10, number % 100
    return number // 10000, number // 100 % 100, number % 100


def check_version(version, dla):
    """Refuse releases that this was not written for."""
    text = ".".join(str(part) for part in version)
    if version < OLDEST:
        raise RefusedError(f"TensorRT {text} is too old: JetPack 6 brings 10.3")
    if dla is not None and DLA_UNTYPED < version < DLA_TYPED:
        raise RefusedError(f"TensorRT {text} knows no DLA: 10.3 to 10.7 and 11.4.1 on do")


def partial_name(name):
    """Return what a plan is called until it is whole: two builds at once have two."""
    return f".{name}.{os.getpid()}.partial"


def command_line(trtexec, version, options, manifest, variant):
    """Return what builds one plan and times it."""
    image = manifest["image"]
    size = "{height}x{width}x{channels}".format(**image)
    name = plan_name(options, variant)
    words = [
        trtexec,
        "--onnx={}".format(options.bundle / variant["file"]),
        f"--saveEngine={options.out / partial_name(name)}",
        "--exportLayerInfo={}".format(options.out / (name + ".layers.json")),
        "--profilingVerbosity=detailed",
        "--noTF32",
    ]
    if options.dla is None:
        # Precision lives in the graph. TensorRT 11 knows nothing else, 10 has to be told.
        words += ["--stronglyTyped"] if version[0] < 11 else []
    else:
        words += [f"--useDLACore={options.dla}", "--allowGPUFallback"]
        # Up to 10.7 a DLA takes no strongly typed network; the precision is permitted instead.
        words += ["--fp16"] if version[0] < 11 else []
    batches = [(1, 1, 1)]
    if options.max_batch > 1:
        batches.append((1, max(1, options.max_batch // 2), options.max_batch))
    for index, profile in enumerate(batches):
        if len(batches) > 1:
            words.append(f"--profile={index}")
        for what, batch in zip(("min", "opt", "max"), profile, strict=True):
            words.append(f"--{what}Shapes=image:{batch}x{size}")
    if options.workspace_mib:
        words.append(f"--memPoolSize=workspace:{options.workspace_mib}M")
    # So that both generations time the same: 10 leaves CUDA graphs off, 11 has them on.
    return [*words, "--useCudaGraph", "--useSpinWait"]


def build(options, manifest, variant, version, words):
    """Run trtexec; keep the plan with its note. Return whether it is what was asked for."""
    out, name = options.out, plan_name(options, variant)
    out.mkdir(parents=True, exist_ok=True)
    partial, plan = out / partial_name(name), out / (name + ".plan")
    log = out / (name + ".log")
    print(f"{name}: building, which takes some minutes; {log}")
    listed = out / (name + ".layers.json")
    if listed.exists():
        listed.unlink()  # of an earlier build: it would be taken for this one's
    started = time.monotonic()
    try:
        with log.open("w", encoding="utf-8") as stream:
            done = subprocess.run(words, stdout=stream, stderr=subprocess.STDOUT, check=False)
        said = log.read_text(encoding="utf-8", errors="replace")
        if done.returncode != 0 or not partial.exists():
            raise RefusedError(f"{name}: {why_it_failed(said)}; see {log}")
        layers = read_layers(listed)
        if not heavy_types(layers):
            unread = "what its convolutions and products compute in could not be read back"
            print(f"warning: {name}: {unread}, so it is not checked", file=sys.stderr)
        note = write_note(options, manifest, variant, version, words, partial, layers)
        note["compute_capabilities"] = compute_capability(said)
        note["build_seconds"] = round(time.monotonic() - started, 3)
        wrong = unasked(variant, layers) or off_dla(options, said)
        if wrong:
            print(f"error: {name}: {wrong}; the plan was not kept", file=sys.stderr)
            return False
        # The note goes first: a plan without one is loaded by nobody.
        draft = out / (partial_name(name) + ".json")
        draft.write_text(json.dumps(note, indent=1) + "\n", encoding="utf-8")
        os.replace(str(draft), str(out / (name + ".json")))
        os.replace(str(partial), str(plan))
    finally:
        for left in (partial, out / (partial_name(name) + ".json")):
            if left.exists():
                left.unlink()
    shares = ", ".join(f"{k} {v:.0%}" for k, v in note["found"]["layer_types"].items())
    print("{}: {:.1f} MB; layers: {}".format(plan, note["bytes"] / 1e6, shares))
    for line in figures(said):
        print(f"  {line}")
    return True


def why_it_failed(said):
    """Return the line of trtexec's log that tells the cause."""
    errors = re.findall(r"\[E\] (?:Error\[\d+\]: |\[TRT\] )?(.+)", said)
    return errors[0].strip() if errors else "trtexec failed"


def read_layers(path):
    """Return the layers of the first profile as (name, kind, types of its inputs)."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        layers = [layer for layer in document["Layers"] if isinstance(layer, dict)]
    except (ValueError, KeyError, TypeError, OSError):
        return []
    found = []
    for layer in layers:
        name = layer.get("Name", "")
        if re.search(r"\[profile [1-9]\d*\]", name):
            continue
        # TensorRT 11 says "Datatype", 10 "Format/Datatype".
        told = [t.get("Datatype") or t.get("Format/Datatype", "") for t in layer.get("Inputs", [])]
        found.append((name, layer.get("LayerType", ""), [data_type(t) for t in told]))
    return found


def data_type(text):
    """Return the type in the inspector's words: "Half", "Row major linear FP16 format" ..."""
    for ours, theirs in (("int8", "Int8"), ("float16", "FP16|Half"), ("float32", "FP32|Float")):
        if re.search(rf"\b({theirs})\b", text):
            return ours
    return "other"


def heavy_types(layers):
    """Return what each convolution and product reads, of those that tell."""
    return [
        types[0]
        for _, kind, types in layers
        if types and types[0] != "other" and re.search(HEAVY, kind, re.IGNORECASE)
    ]


def unasked(variant, layers):
    """Return what was built otherwise than the graph asks for; None: nothing that shows.

    Of INT8 graphs the share of MACs in INT8 is known: where that is all, every layer has to be.
    """
    heavy = heavy_types(layers)
    asked = {"int8": "int8", "fp16": "float16", "fp32": "float32"}[variant["precision"]]
    other = [kind for kind in heavy if kind != asked]
    partly = variant.get("achieved", {}).get("macs", {}).get(asked, 0.0) < 0.9999
    if other and not (partly and asked in heavy):
        return (
            f"{asked} was asked for, and {len(other)} of {len(heavy)} convolutions and products "
            f"read {other[0]}"
        )
    return None


def off_dla(options, said):
    """Return that nothing runs on the DLA, where it was asked for; None: something does.

    TensorRT falls back to the GPU without an error; its log lists where each layer went.
    """
    if options.dla is None:
        return None
    on_dla, on_gpu = (len(re.findall(rf"\[{where}\]", said)) for where in ("DlaLayer", "GpuLayer"))
    if on_gpu and not on_dla:
        return f"the DLA was asked for, and all {on_gpu} layers run on the GPU"
    if on_dla:
        print(f"{on_dla} pieces run on the DLA, {on_gpu} layers on the GPU")
    else:
        print("the log does not say what runs on the DLA: see the list of layers", file=sys.stderr)
    return None


def compute_capability(said):
    """Return the GPU's compute capability, which trtexec logs, as a list; empty: it does not."""
    return re.findall(r"\[I\] Compute Capability: (\d+\.\d+)", said)[:1]


def write_note(options, manifest, variant, version, words, plan, layers):
    """Return the plan's note, as `cnnedge engine` writes it."""
    types = [kinds[0] for _, _, kinds in layers if kinds]
    shares = {kind: types.count(kind) / len(types) for kind in sorted(set(types))}
    name = plan_name(options, variant)
    batch = options.max_batch
    profiles = [{"smallest": 1, "typical": 1, "largest": 1}]
    if batch > 1:
        profiles.append({"smallest": 1, "typical": max(1, batch // 2), "largest": batch})
    calibration = manifest.get("calibration") or {}
    workspace = options.workspace_mib
    return {
        "schema": 1,
        "variant": variant["name"],
        "precision": variant["precision"],
        "runtime": "tensorrt",
        "library": ".".join(str(part) for part in version),
        "file": f"engines/{name}.plan",
        "sha256": digest(plan),
        "bytes": plan.stat().st_size,
        "onnx_sha256": variant["sha256"],
        "calibration_sha256": (
            calibration.get("sha256") if variant["precision"] == "int8" else None
        ),
        "compute_capabilities": [],
        "gpu": None,
        "options": {
            "max_batch": batch,
            "compute_capabilities": [],
            "workspace_bytes": workspace * 2**20 if workspace else None,
            "tf32": False,
            "version_compatible": False,
            "hardware_compatible": False,
            "strip_weights": False,
            "refit": False,
            "dla_core": options.dla,
            "optimization_level": None,
        },
        "profiles": profiles,
        "timing_cache": None,
        "found": {
            "source": "trtexec --exportLayerInfo",
            "layer_types": shares,
            "layers": [{"name": n, "kind": k, "inputs": t} for n, k, t in layers],
        },
        "replay": None,
        "build_seconds": 0.0,
        "trtexec": " ".join(shlex.quote(word) for word in words),
        "tools": {"jetpack": first_line("/etc/nv_tegra_release") or "unknown"},
    }


def figures(said):
    """Return trtexec's own summary: median latencies, under its names."""
    names = ("GPU Compute Time", "Latency", "Enqueue Time")
    found = []
    for name in names:
        match = re.search(rf"\[I\] {name}:.*?median = ([\d.]+) ms", said)
        if match:
            found.append(f"{name}: median {match.group(1)} ms, batch 1")
    return found


def look_at_device():
    """Yield what makes figures of this device hard to compare, or a build fail."""
    release = first_line("/etc/nv_tegra_release")
    if release is None:
        yield "this is no Jetson: the plan will fit this machine's GPU only"
    mode = output_of(["nvpmodel", "-q"])
    if mode is not None:
        match = re.search(r"NV Power Mode: *(\S+)", mode)
        name = match.group(1) if match else "unknown"
        if not name.startswith("MAXN"):
            yield f"power mode is {name}: `sudo nvpmodel -m 0` for the highest clocks"
    for pattern in ("/sys/class/devfreq/*gpu*", "/sys/class/devfreq/*.ga10b"):
        for folder in Path("/").glob(pattern.lstrip("/")):
            low, high = (first_line(str(folder / (end + "_freq"))) for end in ("min", "max"))
            if low and high and low != high:
                yield "the GPU's clock varies: `sudo jetson_clocks` holds it for measuring"
    free = re.search(r"MemAvailable: *(\d+) kB", read_text("/proc/meminfo") or "")
    if free and int(free.group(1)) < NEEDED_MIB * 1024:
        yield (
            f"{int(free.group(1)) // 1024} MiB of memory are free: close the desktop, or pass "
            "--workspace-mib 256"
        )


def plan_name(options, variant):
    """Return the name that all of a plan's files start with."""
    where = "" if options.dla is None else f"-dla{options.dla}"
    return "{}.tensorrt{}".format(variant["name"], where)


def digest(path):
    """Return a file's SHA-256."""
    total = hashlib.sha256()
    with path.open("rb") as stream:
        for block in iter(lambda: stream.read(1 << 20), b""):
            total.update(block)
    return total.hexdigest()


def read_text(path):
    """Return a file's text, or None."""
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None


def first_line(path):
    """Return a file's first line, or None."""
    text = read_text(path)
    return text.strip().splitlines()[0] if text and text.strip() else None


def output_of(words):
    """Return what a command prints, or None where it is not to be had."""
    try:
        return subprocess.run(
            words,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            check=False,
        ).stdout
    except OSError:
        return None


if __name__ == "__main__":
    sys.exit(main())
