"""Run several classifiers over a labelled split, each image decoded once, and survive a kill.

Images are decoded ahead by all cores while the classifiers work; what waits is bounded, and the
answers go to disk once they are many. So memory does not grow with the number of images.

A checkpoint is a folder: `state.json` says of which run it is and how far that came, and beside it
each classifier's answers so far lie in a file of raw float32. The state is replaced as a whole,
after the answers that it vouches for are on disk, and it holds their hashes. So a kill at any
moment leaves what can be gone on from, and what was cut or changed is found out.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np

from cnnedge.checkpoint import damaged, remove_checkpoint, require_checkpoint, require_same
from cnnedge.data.split import Split
from cnnedge.errors import BackendError, CnnEdgeError, DataError
from cnnedge.files import cache_folder, cannot_write, require_space, write_text
from cnnedge.image import ImageContract
from cnnedge.machine import this_machine, tool_versions
from cnnedge.progress import Progress, silent
from cnnedge.protocols import Runner

# Few large images at a time: every classifier's runtime keeps its largest batch's memory.
BATCH_PIXELS = 16 * 96 * 96
# A run that is over sooner is as quickly done again, and leaves nothing behind.
FIRST_SAVE_SECONDS = 10.0
SAVE_SECONDS = 5.0  # what a kill costs after that; saving takes milliseconds
BUFFER_BYTES = 128 * 2**20  # answers that stay in memory: those of 32,000 images to 1,000 classes
STATE = "state.json"


def sweep(
    split: Split,
    contract: ImageContract,
    runners: Mapping[str, Runner],
    *,
    batch_size: int | None = None,
    checkpoint: Path | None = None,
    key: Mapping[str, Any] | None = None,
    resume: bool = False,
    progress: Progress = silent,
    task: str = "verify",
) -> dict[str, np.ndarray]:
    """Return what each classifier answers to every image of a split.

    Args:
        split: Labelled images.
        contract: What each becomes.
        runners: Classifiers by name: uint8 ``[n, H, W, C]`` → float32 ``[n, classes]``. They are
            called in turn from the calling thread.
        batch_size: Images in a batch; the last one may have fewer. None: by their size.
        checkpoint: A folder for what is done so far, written from the tenth second on and removed
            in the end. Where it cannot be made, nothing is kept. One that is there already and is
            not resumed from is replaced.
        key: What decides the answers, JSON-able: which images, which classifiers, what runs them.
            The machine, the versions of its packages and what is given here go without saying.
            A resumed run must have the same.
        resume: Go on from the checkpoint, to the very answers of a run that was not stopped.
        progress: Told ``task`` and how many images are done.
        task: What it is called there.

    Returns:
        float32 ``[N, classes]`` for each runner, in the split's order; where they are many, mapped
        from a file that has no name any more.

    Raises:
        DataError: the split is empty.
        ImageError: an image cannot be decoded; the message names it.
        BackendError: a classifier refused a batch, or did not answer as many images as it got.
        ModelError: there is no checkpoint to resume from, it is damaged, or of another run.
        CnnEdgeError: the disk is full.
        KeyboardInterrupt: it was stopped; the message says what is kept, if something is.
    """
    if len(split) == 0:
        raise DataError("the test split is empty", fix="give data with more images per class")
    size = batch_size or max(1, BATCH_PIXELS // (contract.height * contract.width))
    run = {} if checkpoint is None else _run(split, contract, runners, size, key or {})
    answers = _Answers(list(runners), len(split), checkpoint, run)
    try:
        if resume:
            answers.resume()
        progress(task, answers.done, len(split))
        rest = split
        if answers.done:
            rest = split.select(np.arange(answers.done, len(split)))
        with contextlib.closing(rest.batches(contract, size)) as batches:
            for batch, _ in batches:
                answers.add([_answer(name, runner, batch) for name, runner in runners.items()])
                progress(task, answers.done, len(split))
                answers.save_if_due()
        return answers.finish()
    except KeyboardInterrupt:
        if not answers.rescue():
            raise
        raise KeyboardInterrupt(
            f"{answers.saved:,} of {len(split):,} images are done and kept, --resume goes on"
        ) from None
    except Exception:
        answers.rescue()
        raise
    finally:
        answers.close()


def checkpoint_place(task: str, bundle: Path, source: str, *others: str) -> Path | None:
    """Return where it is kept how far a run has come; None without a home.

    It is in the user's cache, so that a bundle may be read-only, and named by what the run is of,
    so that others can run beside it.

    Args:
        task: "verify" or "bench".
        bundle: The bundle's folder.
        source: The data source.
        *others: What else tells runs apart.
    """
    cache = cache_folder()
    if cache is None:
        return None
    data = str(Path(source).resolve()) if Path(source).exists() else source
    what = hashlib.sha256("\n".join((str(bundle.resolve()), data, *others)).encode())
    return cache / task / f"{bundle.resolve().name}-{what.hexdigest()[:16]}"


def _run(
    split: Split,
    contract: ImageContract,
    runners: Mapping[str, Runner],
    batch_size: int,
    key: Mapping[str, Any],
) -> dict[str, Any]:
    """Return all that decides the answers, to the last bit."""
    machine = this_machine()
    given = {
        "runners": list(runners),
        "number of images": len(split),
        "batch size": batch_size,
        "image contract": contract.to_dict(),
        "cpu": machine.cpu,
        "number of cores": machine.cores,
    }
    return {**key, **given, **tool_versions()}


def _answer(name: str, runner: Runner, batch: np.ndarray) -> np.ndarray:
    found = np.ascontiguousarray(runner(batch), np.float32)
    if found.ndim != 2 or len(found) != len(batch):
        raise BackendError(
            f"{name} gave answers of shape {list(found.shape)} to {len(batch)} images",
            fix="a classifier answers [images, classes]",
        )
    return found


@dataclass(frozen=True)
class _Stage:
    """How far the files are, and what comes after that.

    It is replaced as a whole: a signal may strike between any two statements.

    Attributes:
        written: How many images' answers are in the files.
        hashes: The SHA-256 of each file up to there.
        batches: The answers after those, float32 ``[n, classes]`` for each runner.
    """

    written: int
    hashes: tuple[Any, ...]
    batches: list[list[np.ndarray]] = field(default_factory=list)

    @property
    def done(self) -> int:
        return self.written + sum(len(rows[0]) for rows in self.batches)


class _Answers:
    """The answers so far: the last ones in memory, those before them in a file for each runner.

    Args:
        names: The runners.
        count: How many images there are.
        folder: The checkpoint; None: nothing is kept, and files without a name are used where the
            answers are many.
        run: What decides the answers.

    Attributes:
        done: How many images are answered.
        saved: How many of them the checkpoint vouches for.
    """

    def __init__(
        self, names: Sequence[str], count: int, folder: Path | None, run: Mapping[str, Any]
    ) -> None:
        self.done = self.saved = 0
        self._names = names
        self._count = count
        self._folder = folder
        self._run = run
        self._classes: list[int] = []
        self._stage = _Stage(0, tuple(hashlib.sha256() for _ in names))
        self._buffered = 0  # bytes
        self._files: list[IO[bytes]] = []
        self._open_files = contextlib.ExitStack()
        self._due = time.monotonic() + FIRST_SAVE_SECONDS

    def add(self, rows: list[np.ndarray]) -> None:
        """Take each runner's answers to one more batch."""
        classes = [row.shape[1] for row in rows]
        if self._classes and classes != self._classes:
            raise BackendError(
                f"the answers have {classes} classes, and had {self._classes} before",
                fix="give classifiers whose output has one size",
            )
        self._classes = classes
        self._stage.batches.append(rows)
        self.done += len(rows[0])
        self._buffered += sum(row.nbytes for row in rows)

    def save_if_due(self) -> None:
        """Save from time to time, and empty the memory when there is much in it."""
        full = self._buffered > BUFFER_BYTES
        if self._folder is not None and (full or time.monotonic() >= self._due):
            self._save()
        if full and self._folder is None:
            self._write()

    def rescue(self) -> bool:
        """Save what is done if the run is one that is kept, and say whether it is."""
        if self._folder is None or self._stage.done == 0:
            return False
        if self.saved or time.monotonic() >= self._due:
            with contextlib.suppress(CnnEdgeError):  # what stopped the run is what is told
                self._save()
            if not self.saved and self._folder is not None:
                _remove(self._folder)  # nothing vouches for it, and the disk may be full of it
        return self.saved > 0

    def finish(self) -> dict[str, np.ndarray]:
        """Return all of them, and remove the checkpoint."""
        if not self._files:
            columns = zip(*self._stage.batches, strict=True)
            return {n: np.concatenate(c) for n, c in zip(self._names, columns, strict=True)}
        self._write()
        found = {
            # Copied on write: of what cannot be written to, NumPy's argmax makes a whole copy.
            name: np.asarray(np.memmap(file, np.float32, "c", shape=(self._count, classes)))
            for name, file, classes in zip(self._names, self._files, self._classes, strict=True)
        }
        folder, self._folder = self._folder, None
        if folder is not None:
            _remove(folder)
        return found

    def close(self) -> None:
        """Close the files."""
        with contextlib.suppress(OSError):  # of a full disk, which was told where it was met
            self._open_files.close()

    def resume(self) -> None:
        """Take what the checkpoint holds.

        Raises:
            ModelError: there is none, it is damaged, or it is of another run.
            CnnEdgeError: there is no folder for one.
        """
        if self._folder is None:
            raise CnnEdgeError(
                "there is no folder to keep a checkpoint in", fix="set CNNEDGE_CACHE to one"
            )
        state = self._folder / STATE
        require_checkpoint(state)
        try:
            found = json.loads(state.read_text(encoding="utf-8"))
            run, done = dict(found["run"]), int(found["done"])
            classes, digests = [int(n) for n in found["classes"]], list(found["sha256"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise damaged(state, error) from error
        require_same(state, run, self._run)
        try:
            if not 0 < done <= self._count or len(classes) != len(self._names):
                raise ValueError("it says what cannot be")
            self._files = self._opened("r+b")
            hashes = tuple(
                _hash(file, done * width * 4)
                for file, width in zip(self._files, classes, strict=True)
            )
            if [known.hexdigest() for known in hashes] != digests:
                raise ValueError("the answers are not those that were written")
        except (OSError, ValueError) as error:
            raise damaged(state, error) from error
        self._classes, self._stage = classes, _Stage(done, hashes)
        self.done = self.saved = done
        self._due = time.monotonic() + SAVE_SECONDS

    def _save(self) -> None:
        """Write all, and vouch for it; where the folder cannot be made, keep nothing from now on.

        Raises:
            CnnEdgeError: the disk is full.
        """
        if not self._files:
            self._make_files()
        if self._folder is None:
            return
        self._write()
        try:
            for file in self._files:
                os.fsync(file.fileno())
        except OSError as error:
            raise self._cannot_write(error) from error
        state = {
            "run": self._run,
            "done": self._stage.written,
            "classes": self._classes,
            "sha256": [known.hexdigest() for known in self._stage.hashes],
        }
        write_text(self._folder / STATE, json.dumps(state, default=str))
        self.saved = self._stage.written
        self._due = time.monotonic() + SAVE_SECONDS

    def _make_files(self) -> None:
        assert self._folder is not None
        try:
            _remove(self._folder)
            self._folder.mkdir(parents=True, exist_ok=True)
            require_space(self._folder, 4 * sum(self._classes) * self._count, "keeping the answers")
            self._files = self._opened("w+b")
        except OSError:  # as on a device whose disk is read-only
            self._folder = None

    def _opened(self, mode: str) -> list[IO[bytes]]:
        places = range(len(self._names))
        return [self._open_files.enter_context(open(self._file(place), mode)) for place in places]

    def _write(self) -> None:
        """Move what is in memory to the files."""
        stage = self._stage
        done, hashes = stage.done, tuple(known.copy() for known in stage.hashes)
        try:
            if not self._files:
                unnamed = [tempfile.TemporaryFile() for _ in self._names]  # noqa: SIM115
                self._files = [self._open_files.enter_context(file) for file in unnamed]
            for place, file in enumerate(self._files):
                # By its place, not at the end: an attempt that was cut short is made again.
                file.seek(stage.written * self._classes[place] * 4)
                for rows in stage.batches:
                    file.write(rows[place].data)
                    hashes[place].update(rows[place].data)
                file.flush()
        except OSError as error:
            raise self._cannot_write(error) from error
        self._stage = _Stage(done, hashes)
        self._buffered = 0

    def _file(self, place: int) -> Path:
        assert self._folder is not None
        return self._folder / f"answers-{place}.f32"

    def _cannot_write(self, error: OSError) -> CnnEdgeError:
        return cannot_write(self._folder or Path(tempfile.gettempdir()), error)


def _hash(file: IO[bytes], nbytes: int) -> Any:
    """Return the SHA-256 of a file's first bytes, as one that can be gone on with."""
    known = hashlib.sha256()
    while nbytes and (block := file.read(min(nbytes, 2**20))):
        known.update(block)
        nbytes -= len(block)
    if nbytes:
        raise ValueError("the answers were cut short")
    return known


def _remove(folder: Path) -> None:
    """Remove a checkpoint: first what vouches for the answers."""
    remove_checkpoint(folder / STATE)
    with contextlib.suppress(OSError):
        for file in folder.glob("answers-*.f32"):
            file.unlink(missing_ok=True)
        folder.rmdir()
