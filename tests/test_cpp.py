"""The C++ apps: the resize bit by bit everywhere there is a compiler, the apps where they build.

classify_ort is built and run where ONNX Runtime's headers are: in a usual place, or in the folder
that $ONNXRUNTIME_INCLUDE names; the library is the one of the Python package. classify_trt is
compiled against a stand-in for TensorRT and CUDA, which checks what it does, not that NVIDIA's
headers agree.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import cnnedge
from cnnedge.image import ImageContract, decode, fit, to_tensor

pytestmark = pytest.mark.system

CPP = Path(__file__).parents[1] / "export" / "cpp"
PROBES = Path(__file__).parent / "cpp"
FLAGS = ["-std=c++17", "-O0", "-ffp-contract=off"]
FLAGS += ["-Wall", "-Wextra", "-Wpedantic", "-Wshadow", "-Werror"]
FLAGS += ["-fsanitize=undefined,address", "-fno-sanitize-recover=all"]


def stb_folder() -> Path | None:
    places = (os.environ.get("STB_INCLUDE"), "/usr/include/stb", "/usr/include")
    return next((Path(p) for p in places if p and (Path(p) / "stb_image.h").is_file()), None)


def onnxruntime_headers() -> Path | None:
    places = [os.environ.get("ONNXRUNTIME_INCLUDE")]
    for root in ("/usr/include", "/usr/local/include"):
        places += [f"{root}{end}" for end in ("", "/onnxruntime")]
        places += [f"{root}/onnxruntime/core/session"]
    wanted = "onnxruntime_cxx_api.h"
    return next((Path(p) for p in places if p and (Path(p) / wanted).is_file()), None)


def compile_cpp(source, out, *flags):
    compiler = next((c for c in ("g++", "clang++", "c++") if shutil.which(c)), None)
    if compiler is None:
        pytest.skip("no C++ compiler: g++, clang++ or c++")
    stb = stb_folder()
    if stb is not None:
        flags += ("-DCNNEDGE_STB", "-isystem", str(stb))
    command = [compiler, *FLAGS, f"-I{CPP}", *flags, str(source), "-o", str(out)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return out


def needs_stb():
    if stb_folder() is None:
        pytest.skip("no stb_image.h (Debian: libstb-dev, or name its folder in $STB_INCLUDE)")


@pytest.fixture(scope="module")
def probe(tmp_path_factory):
    """A program that calls the headers one by one."""
    tool = compile_cpp(PROBES / "probe.cpp", tmp_path_factory.mktemp("probe") / "probe")

    def run(*words):
        return subprocess.run([tool, *map(str, words)], capture_output=True, text=True)

    return run


def ours(probe, tmp_path, *words):
    """Return what the probe made of an image."""
    out = tmp_path / "out.raw"
    done = probe(*words, out)
    assert done.returncode == 0, done.stderr
    return np.frombuffer(out.read_bytes(), np.uint8).reshape([int(n) for n in done.stdout.split()])


def refused(done, *words):
    assert done.returncode == 1
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith("error: ")
    for word in words:
        assert word in line
    assert not done.stdout


@functools.cache
def photo(name):
    from sklearn.datasets import load_sample_image

    return load_sample_image(name)


SIZES = [(1, 1), (7, 3), (3, 500), (500, 3), (224, 224), (333, 250), (31, 32), (33, 31), (448, 225)]


@pytest.mark.parametrize("channels", [3, 1])
@pytest.mark.parametrize("resize", ["stretch", "crop", "letterbox"])
@pytest.mark.parametrize("target", [(224, 224), (32, 32), (60, 100), (1, 1)], ids=str)
def test_the_resize_is_pillows_bit_by_bit(probe, tmp_path, target, resize, channels):
    rng = np.random.default_rng(0)
    contract = ImageContract(*target, channels, resize)
    pictures = [rng.integers(0, 256, (h, w, 3), np.uint8) for w, h in SIZES]
    upright = np.ascontiguousarray(photo("china.jpg").transpose(1, 0, 2))
    pictures += [photo("china.jpg"), upright]
    for pixels in pictures:
        height, width = pixels.shape[:2]
        (tmp_path / "in.raw").write_bytes(pixels.tobytes())
        found = ours(
            probe,
            tmp_path,
            *("fit", tmp_path / "in.raw", width, height, *target, channels, resize),
        )
        expected = fit(Image.fromarray(pixels), contract)
        np.testing.assert_array_equal(found, expected, err_msg=f"{width}×{height}")


def test_an_unknown_resize_is_refused(probe, tmp_path):
    (tmp_path / "in.raw").write_bytes(bytes(12))
    refused(probe("fit", tmp_path / "in.raw", 2, 2, 4, 4, 3, "squash", tmp_path / "out"), "squash")


def test_a_thread_of_pixels_is_not_stretched(probe, tmp_path):
    (tmp_path / "in.raw").write_bytes(bytes(3 * 400_000))
    words = ["fit", tmp_path / "in.raw", 1, 400_000, 224, 224, 3]
    refused(probe(*words, "stretch", tmp_path / "out"), "400000 rows")
    for resize in ("crop", "letterbox"):
        assert ours(probe, tmp_path, *words, resize).shape == (224, 224, 3)


def test_a_ppm_is_read_as_it_is(probe, tmp_path):
    pixels = photo("flower.jpg")[:50, :70]
    Image.fromarray(pixels).save(tmp_path / "a.ppm")
    np.testing.assert_array_equal(ours(probe, tmp_path, "read", tmp_path / "a.ppm"), pixels)
    (tmp_path / "b.ppm").write_bytes(b"P6 # made by hand\n2 # wide\n1\n255\n" + bytes(range(6)))
    assert ours(probe, tmp_path, "read", tmp_path / "b.ppm").ravel().tolist() == list(range(6))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"P6 2 2 255 123", "cut short"),
        (b"P6 2 2 255", "cut short"),
        (b"P6 2 2 65535 " + bytes(24), "8 bits"),
        (b"P6 100000 100000 255 ", "declares 100000x100000"),
        (b"P6 0 2 255 ", "declares 0x2"),
        (b"P6 99999999999999999999 2 255 ", "8 bits"),
        (b"no image", "in.ppm"),
        (b"", "in.ppm"),
    ],
    ids=range(8),
)
def test_a_broken_image_is_named(probe, tmp_path, content, message):
    (tmp_path / "in.ppm").write_bytes(content)
    refused(probe("read", tmp_path / "in.ppm", tmp_path / "out"), message)


def test_what_is_no_file_is_named(probe, tmp_path):
    refused(probe("read", tmp_path / "nowhere.ppm", tmp_path / "out"), "nowhere.ppm")
    refused(probe("read", tmp_path, tmp_path / "out"), str(tmp_path))
    with (tmp_path / "huge.png").open("wb") as file:
        file.truncate(2**31 + 100)  # takes no room on the disk
    refused(probe("read", tmp_path / "huge.png", tmp_path / "out"), "huge.png has 2147483748 bytes")


def test_a_format_whose_damage_stb_image_does_not_see_is_refused(probe, tmp_path):
    for ending in ("bmp", "gif", "tga", "pgm"):
        path = tmp_path / f"a.{ending}"
        Image.fromarray(photo("china.jpg")[:64, :64, 0]).save(path)
        path.write_bytes(path.read_bytes()[:-1000])
        refused(probe("read", path, tmp_path / "out"), path.name)


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "LA", "P"])
def test_a_png_is_read_as_cnnedge_reads_it(probe, tmp_path, mode):
    needs_stb()
    picture = Image.fromarray(photo("china.jpg")[100:160, 200:290])
    if mode in ("RGBA", "LA"):
        picture.putalpha(
            Image.fromarray(np.arange(60 * 90, dtype=np.uint16).astype(np.uint8).reshape(60, 90))
        )
    picture.convert(mode).save(tmp_path / "a.png")
    expected = np.asarray(decode(tmp_path / "a.png"))
    np.testing.assert_array_equal(ours(probe, tmp_path, "read", tmp_path / "a.png"), expected)


@pytest.mark.parametrize(("mode", "colour"), [("RGB", (9, 9, 9)), ("L", 9), ("P", 0)])
def test_a_transparent_colour_is_what_it_is_to_cnnedge(probe, tmp_path, mode, colour):
    needs_stb()
    picture = Image.new("RGB", (40, 30), (9, 9, 9))
    picture.paste((200, 200, 200), (10, 10, 20, 20))
    picture.convert(mode).save(tmp_path / "a.png", transparency=colour)
    expected = np.asarray(decode(tmp_path / "a.png"))
    np.testing.assert_array_equal(ours(probe, tmp_path, "read", tmp_path / "a.png"), expected)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("endian", ["<", ">"])
@pytest.mark.parametrize("ending", ["jpg", "png"])
def test_a_photo_held_sideways_stands_upright(probe, tmp_path, orientation, endian, ending):
    needs_stb()
    exif = Image.Exif()
    exif.endian = endian
    exif[0x0112] = orientation
    corners = np.zeros((48, 80, 3), np.uint8)
    corners[:24, :40], corners[:24, 40:], corners[24:, :40] = (250, 0, 0), (0, 250, 0), (0, 0, 250)
    path = tmp_path / f"a.{ending}"
    Image.fromarray(corners).save(path, quality=95, exif=exif)
    expected = np.asarray(decode(path)).astype(int)
    found = ours(probe, tmp_path, "read", path).astype(int)
    assert found.shape == expected.shape
    # Decoders may round differently; a corner in another place would be 40 off on average.
    assert np.abs(found - expected).mean() < 1


@pytest.mark.parametrize("ending", ["jpg", "png"])
def test_a_damaged_file_is_no_crash(probe, tmp_path, ending):
    needs_stb()
    path = tmp_path / f"a.{ending}"
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(photo("china.jpg")[:64, :64]).save(path, exif=exif)
    content = path.read_bytes()
    rng = np.random.default_rng(0)
    for k in range(60):  # the sanitizers stop at the first byte read out of bounds, also with 1
        broken = bytearray(content[: rng.integers(3, len(content) - 12)])
        if k % 2:
            broken = bytearray(content)
            broken[rng.integers(2, 60)] = rng.integers(256)
        path.write_bytes(broken)
        done = probe("read", path, tmp_path / "out")
        if k % 2 == 0 or done.returncode != 0:
            refused(done, path.name)


@pytest.mark.parametrize("progressive", [False, True])
def test_an_impossible_huffman_table_does_not_reach_stb_image(probe, tmp_path, progressive):
    needs_stb()
    path = tmp_path / "a.jpg"
    Image.fromarray(photo("china.jpg")[:64, :64]).save(path, progressive=progressive)
    broken = bytearray(path.read_bytes())
    table = broken.rindex(b"\xff\xc4")  # of a progressive one: between the scans
    broken[table + 5 : table + 21] = bytes([17] * 16)
    path.write_bytes(broken)
    refused(probe("read", path, tmp_path / "out"), "a.jpg has an impossible Huffman table")


def test_json_is_read_as_python_reads_it(probe, tmp_path, toy_bundle):
    texts = [(toy_bundle.root / "manifest.json").read_text(encoding="utf-8")]
    values = [
        "schön",
        "日本",
        "😀",
        'a "quoted" \\ /\b\f\n\r\t',
        "\x01",
        "",
        [],
        {},
        [[1, -2.5e-3]],
    ]
    texts += [
        json.dumps(values),
        json.dumps(values, ensure_ascii=False),
        ' {"a" : null , "b":true}\n',
    ]
    for text in texts:
        (tmp_path / "a.json").write_text(text, encoding="utf-8")
        done = probe("json", tmp_path / "a.json")
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout) == json.loads(text)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[1,]",
        "[1 2]",
        "{1:2}",
        '{"a"}',
        '"a',
        '"\\x"',
        '"\\u12g4"',
        '"\\ud800"',
        "tru",
        "1 1",
        *('"\t"', "--1", "[" * 1000, '{"a":1,}', '"\\', "'a'"),
    ],
)
def test_what_is_no_json_is_refused(probe, tmp_path, text):
    (tmp_path / "a.json").write_text(text)
    refused(probe("json", tmp_path / "a.json"), "no JSON at byte")


@pytest.mark.parametrize("length", [0, 1, 55, 56, 63, 64, 65, 1000])
def test_sha256(probe, tmp_path, length):
    content = bytes(i % 251 for i in range(length))
    (tmp_path / "a").write_bytes(content)
    assert probe("sha256", tmp_path / "a").stdout == hashlib.sha256(content).hexdigest()


# ---- classify_trt, on a stand-in -----------------------------------------------------------------


@pytest.fixture(scope="module")
def trt(tmp_path_factory):
    """classify_trt, compiled against a stand-in for TensorRT and CUDA."""
    out = tmp_path_factory.mktemp("trt") / "classify_trt"
    tool = compile_cpp(CPP / "classify_trt.cpp", out, "-isystem", str(PROBES / "stand_in"))

    def run(*words, seen="", fails=""):
        environment = {"PATH": os.environ["PATH"], "STAND_IN_SEEN": str(seen)}
        return subprocess.run(
            [tool, *map(str, words)],
            capture_output=True,
            text=True,
            env=environment | {"STAND_IN_FAILS": fails},
        )

    return run


def write_plan(stem, content, **options):
    stem.with_suffix(".plan").write_bytes(content)
    note = {"sha256": hashlib.sha256(content).hexdigest(), "options": options}
    stem.with_suffix(".json").write_text(json.dumps(note))
    return stem.with_suffix(".plan")


@pytest.fixture
def plan(tmp_path, toy_bundle):
    image = toy_bundle.manifest.image
    text = f"{image.height} {image.width} {image.channels} {len(toy_bundle.manifest.labels)} uint8"
    return write_plan(tmp_path / "p", text.encode(), strip_weights=False, version_compatible=False)


@pytest.fixture
def ppm(tmp_path):
    Image.fromarray(photo("flower.jpg")).save(tmp_path / "photo.ppm")
    return tmp_path / "photo.ppm"


def test_the_plan_sees_the_image_and_its_answers_are_printed(trt, toy_bundle, plan, ppm, tmp_path):
    done = trt(toy_bundle.root, plan, ppm, seen=tmp_path / "seen")
    assert (done.returncode, done.stderr) == (0, "")  # on stderr: what was not freed
    expected = to_tensor(ppm, toy_bundle.manifest.image)
    assert (tmp_path / "seen").read_bytes() == expected.tobytes()
    labels = toy_bundle.manifest.labels
    rest = 1 - sum(i / 100 for i in range(9))
    expected = [(rest, labels[9]), *((i / 100, labels[i]) for i in (8, 7, 6, 5))]
    assert done.stdout == "".join(f"{p:.6f}  {label}\n" for p, label in expected)


def test_plans_that_are_not_run(trt, toy_bundle, plan, ppm, tmp_path):
    bundle, good = toy_bundle.root, plan.read_bytes()
    assert trt(bundle, plan).returncode == 2
    refused(trt(bundle, tmp_path / "p.engine", ppm), "does not end in .plan")
    refused(trt(tmp_path / "nowhere", plan, ppm), "nowhere/manifest.json")
    refused(trt(bundle, tmp_path / "q.plan", ppm), "q.json")
    refused(trt(bundle, plan, tmp_path / "nowhere.ppm"), "nowhere.ppm")
    plan.write_bytes(good + b" ")
    refused(trt(bundle, plan, ppm), "was altered or cut short")
    stripped = write_plan(tmp_path / "s", good, strip_weights=True)
    refused(trt(bundle, stripped, ppm), "holds no weights")
    other = write_plan(tmp_path / "o", good.replace(b"10 uint8", b"11 uint8"))
    refused(trt(bundle, other, ppm), "was not built from")
    floats = write_plan(tmp_path / "f", good.replace(b"uint8", b"float"))
    refused(trt(bundle, floats, ppm), "takes no uint8 image")
    broken = write_plan(tmp_path / "b", b"xx")
    refused(trt(bundle, broken, ppm), "does not fit", "Serialization assertion failed")
    (tmp_path / "b.json").write_text("{")
    refused(trt(bundle, broken, ppm), "b.json: no JSON at byte")


def test_a_gpu_that_fails_is_said_and_nothing_is_left_on_it(trt, toy_bundle, plan, ppm):
    refused(trt(toy_bundle.root, plan, ppm, fails="cudaMalloc"), "cudaMalloc: out of memory")
    refused(trt(toy_bundle.root, plan, ppm, fails="enqueueV3"), "TensorRT cannot run")


def test_answers_that_are_no_numbers_are_not_sorted(trt, toy_bundle, plan, ppm, tmp_path):
    refused(trt(toy_bundle.root, plan, ppm, seen=tmp_path / "seen", fails="NaN"), "NaN")


def test_of_a_name_given_twice_the_last_counts(trt, toy_bundle, plan, ppm, tmp_path):
    note = tmp_path / "p.json"
    note.write_text(note.read_text().replace("{", '{"sha256": "0",', 1))
    assert trt(toy_bundle.root, plan, ppm, seen=tmp_path / "seen").returncode == 0


def test_only_a_version_compatible_plan_may_bring_code_along(trt, toy_bundle, plan, ppm, tmp_path):
    lean = plan.read_bytes() + b" lean"
    trusted = write_plan(tmp_path / "t", lean, version_compatible=True)
    assert trt(toy_bundle.root, trusted, ppm, seen=tmp_path / "seen").returncode == 0
    refused(trt(toy_bundle.root, write_plan(tmp_path / "u", lean), ppm), "does not fit")


# ---- CMake and classify_ort ----------------------------------------------------------------------


def cmake(folder, *options):
    if shutil.which("cmake") is None:
        pytest.skip("no cmake")
    words = ["cmake", "-S", str(CPP), "-B", str(folder), *options]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_cmake_says_what_it_does_not_find(tmp_path):
    nowhere = [f"-DCMAKE_FIND_ROOT_PATH={tmp_path}"]
    nowhere += [f"-DCMAKE_FIND_ROOT_PATH_MODE_{kind}=ONLY" for kind in ("INCLUDE", "LIBRARY")]
    said = cmake(tmp_path / "build", *nowhere)
    for missing in ("stb_image.h", "classify_ort is not built", "classify_trt is not built"):
        assert missing in said


@pytest.fixture(scope="module")
def ort(tmp_path_factory):
    """classify_ort, built by CMake against the library of the Python package."""
    headers = onnxruntime_headers()
    if headers is None:
        pytest.skip(
            "no onnxruntime_cxx_api.h: unpack a release of ONNX Runtime and name its folder "
            "include in $ONNXRUNTIME_INCLUDE"
        )
    import onnxruntime

    root = tmp_path_factory.mktemp("ort")
    found = sorted((Path(onnxruntime.__file__).parent / "capi").glob("libonnxruntime.so.*"))
    if not found:
        pytest.skip("the installed onnxruntime has no libonnxruntime.so beside it")
    for name in ("libonnxruntime.so", "libonnxruntime.so.1"):
        (root / name).symlink_to(found[0])
    options = [f"-DONNXRUNTIME_INCLUDE={headers}", "-DCMAKE_CXX_FLAGS=-Werror"]
    options += ["-DCMAKE_BUILD_TYPE=Debug"]  # compiles faster
    options += [f"-DONNXRUNTIME_LIBRARY={root}/libonnxruntime.so"]
    if stb_folder() is not None:
        options.append(f"-DSTB_INCLUDE={stb_folder()}")
    cmake(root / "build", *options)
    built = subprocess.run(
        ["cmake", "--build", str(root / "build"), "--target", "classify_ort"],
        capture_output=True,
        text=True,
    )
    assert built.returncode == 0, built.stdout + built.stderr

    def run(*words):
        command = [root / "build" / "classify_ort", *map(str, words)]
        return subprocess.run(command, capture_output=True, text=True)

    run.library = root / "libonnxruntime.so"
    return run


def answers(done):
    assert done.returncode == 0, done.stderr
    rows = [line.split("  ", 1) for line in done.stdout.splitlines()]
    return [(label, float(probability)) for probability, label in rows]


@pytest.mark.parametrize("variant", ["fp32", "fp16", "int8"])
def test_onnxruntime_answers_as_cnnedge_does(ort, toy_bundle, tmp_path, variant):
    classify = cnnedge.load(toy_bundle.root, variant=variant)
    model = toy_bundle.path(f"model.{variant}.onnx")
    golden = sorted(toy_bundle.path("selftest").glob("golden-*"))
    assert golden
    pictures = [decode(path) for path in golden] + [Image.fromarray(photo("china.jpg"))]
    for picture in pictures:
        picture.save(tmp_path / "a.ppm")
        expected = classify(tmp_path / "a.ppm")
        found = answers(ort(model, tmp_path / "a.ppm"))
        assert [label for label, _ in found] == [p.label for p in expected]
        for (_, ours_), theirs in zip(found, expected, strict=True):
            assert ours_ == pytest.approx(theirs.probability, abs=2e-6)


def test_it_reads_the_golden_files_themselves(ort, toy_bundle):
    needs_stb()
    classify = cnnedge.load(toy_bundle.root, variant="fp32")
    for path in sorted(toy_bundle.path("selftest").glob("golden-*")):
        (label, probability), *_ = answers(ort(toy_bundle.path("model.fp32.onnx"), path))
        expected = classify(path)[0]
        # A JPEG decoder may round otherwise than Pillow's; a PNG has one reading.
        near = 2e-6 if path.suffix == ".png" else 0.02
        assert (label, probability) == (
            expected.label,
            pytest.approx(expected.probability, abs=near),
        )


def test_what_onnxruntime_cannot_run_is_one_line(ort, toy_bundle, tmp_path, ppm):
    import onnx

    model = toy_bundle.path("model.fp32.onnx")
    assert ort(model).returncode == 2
    refused(ort(tmp_path / "nowhere.onnx", ppm), "nowhere.onnx")
    refused(ort(model, tmp_path / "nowhere.ppm"), "nowhere.ppm")
    (tmp_path / "broken.onnx").write_bytes(model.read_bytes()[:5000])
    refused(ort(tmp_path / "broken.onnx", ppm))
    plain = onnx.load(model)
    del plain.metadata_props[:]
    onnx.save(plain, tmp_path / "plain.onnx")
    refused(ort(tmp_path / "plain.onnx", ppm), "cnnedge.image")


def dummy(path, like, kind, answers):
    """Write a model with the metadata of another that answers the same to everything."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    types = {
        "tensor": helper.make_tensor_value_info,
        "list": helper.make_tensor_sequence_value_info,
    }
    answer = TensorProto.FLOAT16 if answers.dtype == np.float16 else TensorProto.FLOAT
    graph = helper.make_graph(
        [
            helper.make_node(
                "Constant", [], ["probabilities"], value=numpy_helper.from_array(answers)
            )
        ],
        "dummy",
        [types[kind]("image", TensorProto.UINT8, [1, None, None, None])],
        [helper.make_tensor_value_info("probabilities", answer, answers.shape)],
    )
    model = helper.make_model(graph, ir_version=8, opset_imports=[helper.make_opsetid("", 17)])
    model.metadata_props.extend(onnx.load(like).metadata_props)
    onnx.save(model, path)
    return path


def test_a_model_of_other_types_is_refused_not_misread(ort, toy_bundle, tmp_path, ppm):
    like, path = toy_bundle.path("model.fp32.onnx"), tmp_path / "m.onnx"
    classes = len(toy_bundle.manifest.labels)
    floats = np.full((1, classes), 0.1, np.float32)
    assert ort(dummy(path, like, "tensor", floats), ppm).returncode == 0
    refused(ort(dummy(path, like, "tensor", floats.astype(np.float16)), ppm), "one float for each")
    refused(ort(dummy(path, like, "tensor", floats[:, 1:]), ppm), "one float for each")
    for value in (np.nan, np.inf, -np.inf):
        refused(ort(dummy(path, like, "tensor", floats * value), ppm), "NaN or infinity")
    refused(ort(dummy(path, like, "list", floats), ppm), "takes no uint8 image")


def test_a_library_older_than_the_headers_is_said(ort, toy_bundle, tmp_path, ppm):
    for header in onnxruntime_headers().glob("onnxruntime_*.h"):
        shutil.copy(header, tmp_path)
    c_api = tmp_path / "onnxruntime_c_api.h"
    text, found = re.subn(r"(?m)^(#define ORT_API_VERSION) \d+", r"\1 9999", c_api.read_text())
    assert found == 1
    c_api.write_text(text)
    flags = ["-fno-sanitize=all", "-isystem", str(tmp_path), f"-Wl,-rpath,{ort.library.parent}"]
    flags += ["-x", "c++", str(CPP / "classify_ort.cpp"), "-x", "none"]
    tool = compile_cpp(ort.library, tmp_path / "app", *flags)
    words = [tool, toy_bundle.path("model.fp32.onnx"), ppm]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 1  # the library says a line of its own
    assert "error: this app was built for a later ONNX Runtime" in done.stderr
