"""Every folder and file that is no image of a class is counted and told, or is an error."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image, features

from cnnedge.cli import main
from cnnedge.data import open_source
from cnnedge.errors import DataError, ImageError
from cnnedge.formats import PLUGINS, Plugin
from cnnedge.image import ImageContract, decode, to_tensor


def told(root):
    return open_source(str(root)).told


def test_a_whole_folder_is_counted(photos):
    assert told(photos()) == "30 images, 3 classes"


def test_what_is_left_out_is_counted_in_one_line(photos):
    root = photos()
    (root / "d").mkdir()
    for name in ("one.HEIC", "two.heic", "three.heic"):
        (root / "a" / name).write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic")
    (root / "a" / "notes.txt").write_text("no photo")
    (root / "a" / "README").write_text("no photo")
    (root / "b" / "cut.png").write_bytes((root / "b" / "00.png").read_bytes()[:100])
    shutil.copy(root / "c" / "00.png", root / "c" / "again.png")
    shutil.copy(root / "c" / "00.png", root / "sheet.png")
    shutil.copy(root / "c" / "00.png", root / "c" / ".hidden.png")
    (root / "c" / ".ipynb_checkpoints").mkdir()
    assert told(root) == (
        "30 images, 3 classes; left out: 1 empty folder (d), 3 .heic (pip install pillow-heif), "
        "1 .txt, 1 broken image, 1 file without a suffix, 1 hidden file, 1 hidden folder, "
        "1 image outside the class folders, 1 repeated image"
    )


def test_what_a_system_leaves_behind_is_not_told(photos):
    root = photos()
    for name in (".DS_Store", "a/Thumbs.db", "a/desktop.ini", "a/._00.png", "b/.DS_Store"):
        (root / name).write_bytes(b"x")
    (root / "__MACOSX").mkdir()
    shutil.copytree(root / "a", root / "__MACOSX" / "a")
    assert told(root) == "30 images, 3 classes"


def test_folders_without_an_image_are_named(photos):
    root = photos()
    for name in ("d", "e", "a/old"):
        (root / name).mkdir()
    (root / "f").mkdir()
    (root / "f" / "clip.mp4").write_bytes(b"x")
    (root / "b" / "elsewhere").symlink_to(root / "a")
    assert told(root) == (
        "30 images, 3 classes; left out: 3 empty folders (a/old, d, e), "
        "1 folder without an image (f), 1 .mp4, 1 linked folder"
    )


def test_splits_are_counted_together(photos):
    for number, split in enumerate(("train", "test", "val")):
        photos(2, count=4 + number, name=f"photos/{split}")
        for label in "ab":
            for file in (photos_of(split, label, photos)).iterdir():
                pixels = np.asarray(Image.open(file)).copy()
                pixels[0, 0] = number
                Image.fromarray(pixels).save(file)
    root = photos_of("train", "a", photos).parents[1]
    shutil.copy(root / "train" / "a" / "00.png", root / "test" / "a" / "leak.png")
    shutil.copytree(root / "val" / "a", root / "samples")
    assert told(root) == (
        "18 images, 2 classes; left out: 2 folders beside the splits (samples, val), "
        "1 test image among those trained on"
    )


def photos_of(split, label, photos):
    return photos(0, name="photos") / split / label


@pytest.mark.parametrize("suffix", ["jfif", "jpe", "JFIF"])
def test_a_jpeg_by_another_suffix_is_an_image(photos, suffix):
    root = photos(2)
    Image.open(root / "a" / "00.png").save(root / "a" / f"x.{suffix}", "JPEG")
    assert told(root) == "21 images, 2 classes"


# --- what may not be read is an error ----------------------------------------------------------

AS_NOBODY = """
import os, sys
from cnnedge.data import open_source
from cnnedge.errors import DataError
open_source(sys.argv[1])  # what is imported late may lie where nobody else may look
if os.getuid() == 0:
    os.setgroups([]); os.setgid(65534); os.setuid(65534)
try:
    print("opened", open_source(sys.argv[2]).told)
except DataError as error:
    print("error:", error)
"""


@pytest.fixture
def public(photos):
    """Photos in a folder that another user may enter."""
    place = Path(tempfile.mkdtemp())
    place.chmod(0o755)
    yield shutil.copytree(photos(), place / "photos")
    for path in [place, *place.rglob("*")]:
        path.chmod(0o755)
    shutil.rmtree(place)


def as_nobody(root, whole):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "HOME": "/"}
    command = [sys.executable, "-c", AS_NOBODY, str(whole), str(root)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    return done.stdout.strip()


@pytest.mark.system
def test_another_user_may_read_what_is_open_to_all(public, three):
    assert as_nobody(public, three) == "opened 30 images, 3 classes"


@pytest.mark.system
@pytest.mark.parametrize("name", ["b", "b/00.png", ".", "..", "b/more", "empty"])
@pytest.mark.parametrize("mode", [0, 0o311])
def test_what_may_not_be_read_is_an_error_that_names_it(public, three, name, mode):
    if name == ".." and mode:
        pytest.skip("a folder above need not be listed")
    closed = public / name
    if not closed.exists():
        closed.mkdir()
    closed.chmod(mode)
    place = public if name == ".." else closed.resolve()
    assert as_nobody(public, three) == (
        f"error: cannot read {place} (Permission denied); check its permissions"
    )


def test_a_folder_that_cannot_be_listed_is_an_error_for_root_too(photos, monkeypatch):
    root, scandir = photos(), os.scandir

    def refuse(path):
        if Path(path).name == "b":
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(DataError, match=r"cannot read .*/b \(Permission denied\)"):
        open_source(str(root))


# --- formats that Pillow reads with a plugin ---------------------------------------------------

HEIC = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic"
STAND_IN = """
import io
from PIL import Image, ImageFile

class File(ImageFile.ImageFile):
    format = "{format}"
    def _open(self):
        content = self.fp.read()[{skip}:]
        picture = Image.open(io.BytesIO(content), formats=["PNG"]).convert("RGB")
        self._size, self._mode = picture.size, "RGB"
        self.fp = io.BytesIO(picture.tobytes())
        self.tile = [("raw", (0, 0, *picture.size), 0, ("RGB", 0, 1))]

def register():
    Image.register_open("{format}", File, lambda head: head[:{skip}] == {head!r}[:16])
"""
HEADS = {"heic": HEIC, "jxl": b"\0\0\0\x0cJXL \r\n\x87\n"}


@pytest.fixture
def plugin(tmp_path, monkeypatch):
    """Install what stands in for a plugin, and reads a PNG behind that format's first bytes."""

    def install(suffix):
        head = HEADS[suffix]
        format, module = {"heic": ("HEIF", "pillow_heif"), "jxl": ("JXL", "pillow_jxl")}[suffix]
        text = STAND_IN.format(format=format, head=head, skip=min(len(head), 16))
        text += "register_heif_opener = register" if suffix == "heic" else "register()"
        text = text.replace(f"[{min(len(head), 16)}:]", f"[{len(head)}:]")
        (tmp_path / "site").mkdir(exist_ok=True)
        (tmp_path / "site" / f"{module}.py").write_text(text)
        monkeypatch.syspath_prepend(tmp_path / "site")
        Plugin.load.cache_clear()
        return head

    yield install
    for name in ("pillow_heif", "pillow_jxl"):
        sys.modules.pop(name, None)
    for name in ("HEIF", "JXL"):
        Image.OPEN.pop(name, None)
        if name in Image.ID:
            Image.ID.remove(name)
    Plugin.load.cache_clear()


@pytest.mark.parametrize("suffix", HEADS)
def test_files_of_a_plugin_are_images_where_it_is_installed(photos, plugin, suffix):
    root = photos()
    head = HEADS[suffix]
    (root / "d").mkdir()
    for number, file in enumerate(sorted((root / "a").iterdir())[:5]):
        (root / "d" / f"{number}.{suffix}").write_bytes(head + file.read_bytes())
        file.unlink()
    package = {"heic": "pillow-heif", "jxl": "pillow-jxl-plugin"}[suffix]
    if not any(p.load() for p in PLUGINS if p.package == package):
        assert told(root) == (
            "25 images, 3 classes; left out: 1 folder without an image (d), "
            f"5 .{suffix} (pip install {package})"
        )
        with pytest.raises(ImageError, match=f"which needs the package {package}; run: pip inst"):
            decode(root / "d" / f"0.{suffix}")
    plugin(suffix)
    assert told(root) == "30 images, 4 classes"
    pixels = (root / "d" / f"0.{suffix}").read_bytes()
    expected = to_tensor(pixels[len(head) :], ImageContract(8, 8))
    np.testing.assert_array_equal(to_tensor(pixels, ImageContract(8, 8)), expected)


@pytest.mark.skipif(not features.check("avif"), reason="this Pillow reads no AVIF")
def test_avif_is_read_by_pillow_itself(photos):
    root = photos()
    (root / "d").mkdir()
    for file in (root / "a").iterdir():
        Image.open(file).save(root / "d" / f"{file.stem}.avif")
    assert told(root) == "40 images, 4 classes"


def test_heic_is_read_by_the_real_plugin(tmp_path):
    heif = pytest.importorskip("pillow_heif")
    heif.register_heif_opener()
    Image.new("RGB", (64, 64), "red").save(tmp_path / "a.heic")
    assert to_tensor(tmp_path / "a.heic", ImageContract(4, 4))[..., 0].min() > 200


# --- every command that opens a folder says so -------------------------------------------------


@pytest.mark.tf
def test_every_command_tells_it(photos, tmp_path):
    import keras
    from keras import layers

    root = photos()
    (root / "d").mkdir()
    line = "30 images, 3 classes; left out: 1 empty folder (d)"
    model = keras.Sequential(
        [
            keras.Input((32, 32, 3)),
            layers.Conv2D(8, 3, strides=2, activation="relu"),
            layers.GlobalAveragePooling2D(),
            layers.Dense(3, activation="softmax"),
        ]
    )
    file, bundle = tmp_path / "m.keras", tmp_path / "m"
    model.save(file)
    data = ["--data", str(root)]
    for command in (  # the first and the last have nothing to go on with, and say it later
        ["train", "vgg16", "--init", "nowhere.h5", "-o", str(tmp_path / "t.keras")],
        ["export", str(file), "--preprocess", "unit", "--precision", "fp32", "-o", str(bundle)],
        ["verify", str(bundle)],
        ["bench", str(bundle), "--runtime", "no_such:runtime"],
    ):
        done = CliRunner().invoke(main, [*command, *data])
        assert line in done.stderr.splitlines(), (command, done.stderr)
