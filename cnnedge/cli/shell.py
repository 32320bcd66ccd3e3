"""What every command shares: how it helps, how it fails, how it shows that it is at work."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Any

import click

from cnnedge.errors import CnnEdgeError, GateError, printable
from cnnedge.files import refuse_special
from cnnedge.progress import Progress, silent
from cnnedge.version import __version__

_LARGEST_SIDE = 9459  # pixels; a square of more is larger than any image that is read
FAILED, GATE = 1, 3  # 2, usage, is click's own
# Tasks that advance by images; the others by batches, layers, rounds …
_PATHS = {"data", "init", "model", "source"}  # which may be the name of a built-in one, too
_GIVEN = ("/dev/fd/", "/dev/stdin", "/proc/self/fd/")  # a key may come from the shell's <(command)
_OF_IMAGES = {"open", "hash", "decode", "calibrate", "verify", "test", "answers", "accuracy"}
MOST_SKIPPED = 20  # files that are named; all are counted
SOURCE = "digits, signs, signs:N, or a folder of class sub-folders."


class Command(click.Command):
    """A command that shows its example as it was typed."""

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the example with its line breaks, which click would fold."""
        if self.epilog:
            formatter.write_paragraph()
            formatter.write("Example:\n")
            for line in self.epilog.strip().splitlines():
                formatter.write(f"  {line.strip()}\n")


class Group(click.Group):
    """A group whose commands are of that kind."""

    command_class = Command


@click.group(cls=Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="cnnedge")
def main() -> None:
    """Take a Keras image classifier to the device it will run on.

    Train or bring a model, export it to ONNX in FP32, FP16 and INT8 and to TensorRT, prove that it
    still answers like Keras, and hand over a bundle that an app embeds with three lines.
    """


def command(
    group: click.Group, name: str, example: str
) -> Callable[[Callable[..., Any]], click.Command]:
    """Register a command: its example, ``--json``, errors as one line and an exit code."""

    def register(function: Callable[..., Any]) -> click.Command:
        @wraps(function)
        def run(**options: Any) -> None:
            signal.signal(signal.SIGTERM, signal.default_int_handler)  # clean up, as for Ctrl-C
            try:
                _refuse_special(options)
                function(**options)
            except GateError as error:
                fail(error, GATE)
            except CnnEdgeError as error:
                fail(error, FAILED)
            except KeyboardInterrupt as stop:
                kept = str(stop) or "nothing was left half-written"
                fail(CnnEdgeError("interrupted", fix=kept), FAILED)
            except OSError as error:
                fail(_describe(error), FAILED)
            except RuntimeError as error:
                if "Symlink loop" not in str(error):  # pathlib's word for one
                    raise
                fail(CnnEdgeError(str(error), fix="remove the link"), FAILED)
            except MemoryError:
                fail(CnnEdgeError("out of memory", fix="use a smaller batch or image"), FAILED)

        decorated = click.option(
            "--json", "as_json", is_flag=True, help="Print one JSON document."
        )(run)
        return group.command(name, epilog=example)(decorated)

    return register


def _refuse_special(options: dict[str, Any]) -> None:
    """Refuse a pipe, a device and the like in the place of any file: reading it may not end."""
    for name, value in options.items():
        for one in value if isinstance(value, tuple) else (value,):
            is_path = isinstance(one, Path) or (name in _PATHS and isinstance(one, str))
            if is_path and not (name == "key" and str(one).startswith(_GIVEN)):
                refuse_special(one)


def own_model_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Add what a user's own `.keras` file may leave unsaid."""
    options = (
        click.option(
            "--preprocess",
            type=click.Choice(["unit", "tf", "caffe", "torch", "none"]),
            help="What your .keras wants of its pixels.",
        ),
        click.option("--labels", type=click.Path(path_type=Path), help="One label a line."),
        click.option("--output", metavar="NAME", help="Which of several outputs classifies."),
        click.option(
            "--image-size", metavar="H,W", help="Input size, where the model leaves it open."
        ),
    )
    for option in reversed(options):
        function = option(function)
    return function


@contextmanager
def progress_bar() -> Iterator[Progress]:
    """Show a bar with its rate and the time left on a terminal's stderr; elsewhere stay quiet."""
    if not sys.stderr.isatty():
        yield silent
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bars

    columns = (
        *(TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()),
        *(TextColumn("{task.fields[rate]}"), TimeRemainingColumn()),
    )
    with Bars(*columns, console=Console(stderr=True), transient=True) as bars:
        tasks: dict[str, Any] = {}

        def show(task: str, done: int, total: int) -> None:
            if task not in tasks:  # what a stopped run had done counts for no speed
                tasks[task] = bars.add_task(task, total=total or None, completed=done, rate="")
            number = tasks[task]
            bars.update(number, completed=done, total=total or None)
            speed = bars.tasks[number].finished_speed or bars.tasks[number].speed
            bars.update(number, rate=_rate(task, speed))

        yield show


def _rate(task: str, speed: float | None) -> str:
    """Return a speed as one reads it: images/s, or steps of what the task is made of."""
    if not speed:
        return ""
    return f"{speed:,.{0 if speed >= 10 else 1}f} {'images' if task in _OF_IMAGES else 'steps'}/s"


def _describe(error: OSError) -> CnnEdgeError:
    where = f" {error.filename}" if error.filename else ""
    return CnnEdgeError(f"{error.strerror or error}{where}", fix="check the path, space and rights")


def say(text: object, *, err: bool = False) -> None:
    """Print one line, whatever its labels and names hold and the terminal can show."""
    click.echo(fitted(printable(str(text)), sys.stderr if err else sys.stdout), err=err)


def say_lines(lines: str) -> None:
    """Print a text of several lines."""
    for line in lines.split("\n"):
        say(line)


# What cnnedge itself writes beyond ASCII, for a terminal that has nothing else.
_PLAIN = str.maketrans("×–—…≤≥·→±µΔ▲▼’‘“”─━│", "x--~<>.>+ud^v''\"\"--|")


def fitted(text: str, stream: Any) -> str:
    """Return a text in what a stream can encode: plainer signs, and escapes for the rest."""
    encoding = getattr(stream, "encoding", None) or "utf-8"
    try:
        text.encode(encoding)
        return text
    except (UnicodeEncodeError, LookupError):
        return text.translate(_PLAIN).encode("ascii", "backslashreplace").decode("ascii")


def fail(error: Exception, code: int) -> None:
    """Print one line, ``error: what; what to do``, and exit."""
    say(f"error: {' '.join(str(error).split())}", err=True)
    sys.exit(code)


def as_list(text: str | None) -> tuple[str, ...] | None:
    """Split a comma-separated option."""
    return None if text is None else tuple(part.strip() for part in text.split(",") if part.strip())


def as_options(fields: Iterable[str]) -> dict[str, str]:
    """Return what an option is called on the command line, by its recipe's field."""
    other = {"engines": "--engine", "guard": "--no-guard", "model": "MODEL"}
    return {field: other.get(field, f"--{field.replace('_', '-')}") for field in fields}


def as_numbers(option: str, text: str) -> tuple[int, ...]:
    """Parse whole numbers, "1,2,4"."""
    try:
        return tuple(int(part) for part in as_list(text) or ())
    except ValueError:
        raise click.BadParameter(f"{option} {text!r}: give whole numbers such as 1,4,16") from None


def as_size(text: str | None) -> tuple[int, int] | None:
    """Parse an image size: "192,160", "192x160" or "192" for a square."""
    if text is None:
        return None
    try:
        numbers = [int(part) for part in text.replace("x", ",").split(",")]
    except ValueError:
        numbers = []
    if len(numbers) not in (1, 2) or not all(1 <= n <= _LARGEST_SIDE for n in numbers):
        raise click.BadParameter(f"{text!r} is no size: give HEIGHT,WIDTH such as 192,160")
    return numbers[0], numbers[-1]


def tell_data(dataset: Any) -> None:
    """Say how many images a folder gave, and which files were left out, and why."""
    if dataset.told:
        say(dataset.told, err=True)
    for line in dataset.skipped[:MOST_SKIPPED]:
        say(f"skipped: {line}", err=True)
    if len(dataset.skipped) > MOST_SKIPPED:
        say(f"skipped: {len(dataset.skipped) - MOST_SKIPPED} more", err=True)
