"""What cnnedge raises. Every message says what was wrong, where, and what to do about it.

The library raises; the command line turns an error into one line and an exit code.
"""

from __future__ import annotations

# What reading JSON from elsewhere may raise, and taking what is not of its expected form apart.
MALFORMED = (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError)


class CnnEdgeError(Exception):
    """Base of every error that cnnedge raises on purpose.

    Args:
        what: What was wrong, naming the thing (a file, a layer, an option).
        fix: What the user can do about it.
    """

    def __init__(self, what: str, *, fix: str | None = None) -> None:
        self.what = what
        self.fix = fix
        super().__init__(what if fix is None else f"{what}; {fix}")


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


class GateError(CnnEdgeError):
    """A result was obtained, and it does not meet what was asked of it (exit code 3)."""


def first_line(error: BaseException) -> str:
    """Return the first line of an error's text, or its name where it has none."""
    return (str(error).strip().splitlines() or [repr(error)])[0]
