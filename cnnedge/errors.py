"""What cnnedge raises. Every message says what was wrong, where, and what to do about it.

The library raises; the command line turns an error into one line and an exit code.
"""

from __future__ import annotations

import re
import unicodedata

MOST = 290  # characters of a message: with `error: ` before it a line stays below 300
_MOST_FIX = 180
_MOST_REASON = 160
_LONG_PATH = re.compile(r"(?<![\w.])(?:/[^\s/;:,'\"()]+){3,}")
# What reverses the order of the text after it, on a terminal.
_REORDERS = frozenset("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
# What reading JSON from elsewhere may raise, and taking what is not of its expected form apart.
MALFORMED = (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError)


class CnnEdgeError(Exception):
    """Base of every error that cnnedge raises on purpose.

    Args:
        what: What was wrong, naming the thing (a file, a layer, an option).
        fix: What the user can do about it.

    Examples:
        >>> try:
        ...     cnnedge.load("nowhere")
        ... except cnnedge.CnnEdgeError as error:
        ...     print(error.what)
        ...     print(error.fix)
        nowhere does not exist
        make one with `cnnedge export MODEL -o DIR`
    """

    def __init__(self, what: str, *, fix: str | None = None) -> None:
        if fix is not None and len(what) + len(fix) > MOST:
            fix = _LONG_PATH.sub(_its_end, fix)
        self.fix = None if fix is None else one_line(fix, _MOST_FIX)
        left = MOST - (0 if self.fix is None else len(self.fix) + 2)
        self.what = one_line(what, left)
        super().__init__(self.what if self.fix is None else f"{self.what}; {self.fix}")


class MissingExtraError(CnnEdgeError):
    """A command needs packages that an extra of cnnedge brings."""

    def __init__(self, package: str, extra: str, *, purpose: str) -> None:
        self.extra = extra
        super().__init__(
            f"{purpose} needs the package {package!r}, which is not installed",
            fix=f'run: pip install "cnnedge[{extra}]"',
        )


class ImageError(CnnEdgeError):
    """An image could not be decoded, or is not what the model takes."""


class DataError(CnnEdgeError):
    """A data source is missing, empty, or not laid out as expected."""


class ModelError(CnnEdgeError):
    """A model could not be built, loaded, or converted."""


class BundleError(CnnEdgeError):
    """A bundle is incomplete, altered, or unsafe."""


class SignatureError(BundleError):
    """A bundle is not the one that the holder of a key signed."""


class BackendError(CnnEdgeError):
    """A runtime refused a model, or did something other than what was asked."""


class ProcessEnded(BackendError):  # noqa: N818 - it says what happened
    """The process that ran a model is gone: it ended, or was ended since it did not answer."""


class GateError(CnnEdgeError):
    """A result was obtained, and it does not meet what was asked of it (exit code 3)."""


def first_line(error: BaseException) -> str:
    """Return what an error of another library says: its first line, shortened, or its name."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    return one_line(lines[0] if lines else repr(error), _MOST_REASON)


def one_line(text: str, most: int) -> str:
    """Return a text in one line of at most ``most`` characters.

    Where it is longer, its long paths lose their beginnings first: their ends tell them apart. What
    is still too long is cut in its middle: its beginning names the thing, and its end says what is
    wrong.
    """
    line = printable(" ".join(text.split()))
    if len(line) > most:
        line = _LONG_PATH.sub(_its_end, line)
    if len(line) <= most:
        return line
    end = most // 3
    return f"{line[: most - end - 3]} … {line[-end:]}"


def _its_end(path: re.Match[str]) -> str:
    end = "/".join(path[0].rsplit("/", 2)[1:])
    return f"…/{end}" if len(end) + 2 < len(path[0]) else path[0]


def printable(text: str) -> str:
    """Return a text as a terminal may be given it, with escapes for what would command it.

    Those are control characters, line breaks, what reorders text, and halves of a surrogate pair,
    as names of files have where they are no UTF-8.
    """
    if text.isascii() and text.isprintable():
        return text
    return "".join(_escaped(c) if _commands(c) else c for c in text)


def _commands(character: str) -> bool:
    return unicodedata.category(character) in {"Cc", "Cs", "Zl", "Zp"} or character in _REORDERS


def _escaped(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")
