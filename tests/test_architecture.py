"""The import arrows point one way, and importing the package loads nothing heavy."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "cnnedge"
# Ground floor first. A module imports from the floors below its own and from its own folder, so
# that what stands on one floor, as the steps do, knows nothing of each other.
FLOORS = [
    {"version", "errors", "kind", "progress", "protocols", "formats", "chance"},
    {"documents", "machine", "partial", "pixels", "runtimes"},
    {"files", "quiet", "plan", "comparison", "measurement"},
    {"archive", "checkpoint", "image", "sections"},
    {"manifest", "metadata", "head", "models", "data"},
    {"bundle", "backends", "sweep"},
    {"recipe", "change", "selftest", "preprocessing"},
    {"graph", "signature"},
    {"runtime"},
    {"train", "compress", "export", "quantize", "engine", "verify", "benchmark", "inspect"}
    | {"package", "demo", "doctor"},
    {"source", "report"},
    {"pipeline"},
    {"cli"},
    {"__main__"},
]
FLOOR = {name: level for level, names in enumerate(FLOORS) for name in names}
HEAVY = {"tensorflow", "keras", "onnxruntime", "onnx", "onnx_ir", "PIL", "sklearn", "matplotlib"}
HEAVY |= {"tensorrt", "tensorrt_rtx", "cuda", "cupy", "openvino", "ai_edge_litert", "plotly"}
HEAVY |= {"model_signing", "cryptography"}


def modules():
    return sorted(p for p in PACKAGE.rglob("*.py") if p != PACKAGE / "__init__.py")


def part_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_parts(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("cnnedge"):
            parts = node.module.split(".")
            found |= {parts[1]} if len(parts) > 1 else {alias.name for alias in node.names}
    return found


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_down(path):
    part = part_of(path)
    assert part in FLOOR, f"say in FLOORS where {part} belongs"
    for other in imported_parts(path) - {part}:
        assert other in FLOOR, f"{part} imports {other} by the package's face, not from its home"
        assert FLOOR[other] < FLOOR[part], f"{part} imports {other}, which does not stand below it"


@pytest.mark.system
def test_importing_loads_nothing_heavy():
    code = "import sys, cnnedge, cnnedge.cli, cnnedge.runtime; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not HEAVY & set(done.stdout.split())


def test_the_nodes_of_the_image_are_named_in_one_place():
    owners = set()
    for path in modules():
        texts = {
            n.value for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Constant)
        }
        if any(isinstance(text, str) and text.startswith("image/") for text in texts):
            owners.add(str(path.relative_to(PACKAGE)))
    assert owners == {"graph/image_part.py", "demo/serve.py"}  # there they are media types


def test_every_public_name_is_found():
    import cnnedge

    for name in cnnedge.__all__:
        assert getattr(cnnedge, name) is not None
    with pytest.raises(AttributeError, match="no_such"):
        _ = cnnedge.no_such


@pytest.mark.parametrize("path", [p for p in PACKAGE.rglob("*.py") if "__all__" in p.read_text()])
def test_what_a_module_offers_is_there(path):
    name = ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts)
    exec(f"from {name.removesuffix('.__init__')} import *", {})


@pytest.fixture(scope="module")
def base_venv(tmp_path_factory):
    """A virtual environment with what `pip install cnnedge` brings, and nothing else."""
    root = tmp_path_factory.mktemp("base")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", root], check=True)
    (site,) = (root / "lib").glob("python*/site-packages")
    (site / "cnnedge").symlink_to(PACKAGE)
    todo, seen = ["click", "msgspec", "numpy", "pillow", "rich"], set()
    while todo:
        distribution = metadata.distribution(todo.pop())
        if distribution.name in seen:
            continue
        seen.add(distribution.name)
        todo += [
            re.split(r"[ ;<>=!~\[(]", requirement)[0]
            for requirement in distribution.requires or []
            if "extra ==" not in requirement and "sys_platform" not in requirement
        ]
        for top in {f.parts[0] for f in distribution.files or [] if ".." not in f.parts}:
            if not (site / top).exists() and not top.startswith("__"):
                (site / top).symlink_to(distribution.locate_file(top))
    return root / "bin" / "python"


def run_in(python, code):
    return subprocess.run([python, "-c", code], capture_output=True, text=True)


@pytest.mark.system
def test_the_base_install_imports_what_a_device_runs(base_venv):
    modules = "cli runtime engine plan bundle verify benchmark doctor image models data inspect"
    modules += " train compress package.archive package.single package.triton signature demo"
    code = "".join(f"import cnnedge.{name}\n" for name in modules.split())
    done = run_in(base_venv, code + "print(len(cnnedge.doctor.diagnose().abilities))")
    assert (done.returncode, done.stdout.strip()) == (0, "11"), done.stderr


@pytest.mark.system
@pytest.mark.parametrize(
    ("command", "extra"),
    [
        (["predict", "BUNDLE", "BUNDLE/selftest/golden-00.png"], "cpu"),
        (["verify", "BUNDLE"], "cpu"),
        (["bench", "BUNDLE"], "cpu"),
        (["package", "BUNDLE", "--onnx", "x.onnx"], "cpu"),
        (["package", "BUNDLE", "--triton", "models"], "cpu"),
        (["export", "alexnet"], "export"),
        (["train", "alexnet", "-o", "x.keras"], "export"),
        (["compress", "x.keras", "-o", "y.keras"], "export"),
        (["inspect", "alexnet"], "export"),
        (["sign", "BUNDLE", "--key", "private.pem"], "sign"),
        (["verify", "BUNDLE", "--signature", "public.pem"], "sign"),
    ],
    ids=lambda value: value if isinstance(value, str) else value[0],
)
def test_a_missing_extra_is_named(base_venv, toy_bundle, command, extra):
    arguments = [str(a).replace("BUNDLE", str(toy_bundle.root)) for a in command]
    done = subprocess.run([base_venv, "-m", "cnnedge", *arguments], capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith("error: ")
    assert line.endswith(f'pip install "cnnedge[{extra}]"')
