"""What a path is, in words: a command that was given the wrong kind of thing says which it got."""

from __future__ import annotations

import zipfile
from pathlib import Path

_HEADS = {
    b"\x89HDF\r\n\x1a\n": "an HDF5 file, Keras' old format",
    b"\x89PNG": "an image",
    b"\xff\xd8\xff": "an image",
    b"GIF8": "an image",
    b"BM": "an image",
    b"II*\0": "an image",
    b"MM\0*": "an image",
    b"RIFF": "an image",
}
_ENDINGS = {
    ".onnx": "an ONNX model",
    ".tflite": "a LiteRT model",
    ".toml": "a TOML file",
    ".json": "a JSON file",
    ".pt": "a PyTorch file",
    ".pth": "a PyTorch file",
    ".plan": "a TensorRT plan",
}
HDF5 = _HEADS[b"\x89HDF\r\n\x1a\n"]


def kind_of(path: Path | str) -> str:
    """Return what lies at a path: "a bundle", "an image", "an empty file" … or "not there"."""
    path = Path(path)
    try:
        if path.is_dir():
            return _kind_of_folder(path)
        if not path.exists():
            return "not there"
        if not path.is_file():
            return "no regular file"
        return _kind_of_file(path)
    except (OSError, ValueError) as error:  # a name with a null, or one that is too long
        return f"unreadable ({getattr(error, 'strerror', None) or error})"


def _kind_of_folder(path: Path) -> str:
    if (path / "manifest.json").is_file():
        return "a bundle"
    if (path / "saved_model.pb").is_file():
        return "a TensorFlow SavedModel"
    return "a folder"


def _kind_of_file(path: Path) -> str:
    with open(path, "rb") as file:
        head = file.read(8)
    if not head:
        return "an empty file"
    found = next((what for magic, what in _HEADS.items() if head.startswith(magic)), None)
    if found is not None:
        return found
    if head.startswith(b"PK"):
        return _kind_of_zip(path)
    return _ENDINGS.get(path.suffix.lower(), "some other file")


def _kind_of_zip(path: Path) -> str:
    try:
        with zipfile.ZipFile(path) as archive:
            names = set(archive.namelist())
    except (zipfile.BadZipFile, OSError, RuntimeError, NotImplementedError, ValueError):
        return "a damaged zip archive"
    if "config.json" in names and "metadata.json" in names:
        return "a Keras model"
    if any(name.rpartition("/")[2] == "manifest.json" for name in names):
        return "a bundle's zip archive"
    return "a zip archive"
