"""Which image files are read: what Pillow reads by itself, and what its plugins add."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from importlib import import_module

# Only these are opened. Pillow knows forty more, some of which start other programs (EPS) or were
# last looked at decades ago. Those come first that Pillow knows without loading all of these.
FORMATS = ("JPEG", "PNG", "GIF", "BMP", "PPM", "WEBP", "TIFF")
_SUFFIXES = frozenset(
    {
        *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".webp", ".gif", ".bmp"),
        *(".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".pnm"),
    }
)
HEAD = 64  # bytes that tell a format
_JXL = (b"\xff\x0a", b"\0\0\0\x0cJXL \r\n\x87\n")


@dataclass(frozen=True)
class Plugin:
    """A format that Pillow reads with the help of another package.

    Attributes:
        format: What Pillow calls it.
        package: The package to install.
        modules: What to import of it, or of another package that does the same.
        suffixes: Of its files.
    """

    format: str
    package: str
    modules: tuple[str, ...]
    suffixes: frozenset[str]

    @cache  # noqa: B019 - three of them, made once
    def load(self) -> bool:
        """Let Pillow read the format, and say whether it does."""
        from PIL import features

        if self.format.lower() in features.modules and features.check(self.format.lower()):
            return True
        for module in self.modules:
            try:
                found = import_module(module)
            except ImportError:
                continue
            register = getattr(found, f"register_{self.format.lower()}_opener", None)
            if register is not None:  # the others register themselves
                register()
            return True
        return False


PLUGINS = (
    Plugin(
        "HEIF", "pillow-heif", ("pillow_heif", "pi_heif"), frozenset({".heic", ".heif", ".hif"})
    ),
    Plugin("AVIF", "pillow-avif-plugin", ("pillow_avif",), frozenset({".avif"})),
    Plugin("JXL", "pillow-jxl-plugin", ("pillow_jxl",), frozenset({".jxl"})),
)


def readable_suffixes() -> frozenset[str]:
    """Return the suffixes, in lower case, of image files that can be read here."""
    return _SUFFIXES.union(*(plugin.suffixes for plugin in PLUGINS if plugin.load()))


def missing_plugin(suffix: str) -> Plugin | None:
    """Return what would read files of a suffix, where that is not installed."""
    found = next((plugin for plugin in PLUGINS if suffix in plugin.suffixes), None)
    return None if found is None or found.load() else found


def plugin_of(head: bytes) -> Plugin | None:
    """Return what reads a file that begins with these bytes, or None."""
    heif, avif, jxl = PLUGINS
    if head.startswith(_JXL):
        return jxl
    if head[4:8] != b"ftyp":
        return None
    length = int.from_bytes(head[:4], "big")
    brands = {head[at : at + 4] for at in range(8, min(length, len(head)), 4)}
    if brands & {b"avif", b"avis"}:
        return avif
    return heif if brands & {b"heic", b"heix", b"heim", b"heis", b"hevc", b"mif1"} else None
