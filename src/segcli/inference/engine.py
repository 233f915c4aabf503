"""From a folder of files to a folder of results: bounded, resumable, and stopped by no single file.

    discover -> what is not done yet -> decode -> compute -> encode and write -> one line in the manifest
     thread                            processes  main thread       threads

Every arrow is a queue of fixed size, so memory does not depend on the number of files. What is computed is
the business of the command: `Work` says how. `segcli predict` is `segmentation.Segmenter`.

The result does not depend on how this runs: an input's bytes follow from the input, the model and the
options. Errors of one file become its line in the manifest; errors of the machine end the run, and the next
one goes on from there.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any, Generic, Protocol, TypeVar

from segcli import __version__
from segcli.errors import ImageError, MachineError
from segcli.inference.ahead import Ahead
from segcli.inference.decoders import Decoded, Decoders
from segcli.inference.interrupts import Interrupts
from segcli.inference.layout import file_of
from segcli.inference.manifest import (
    Entry,
    Manifest,
    digest,
    finished_entry,
    open_manifest,
    refuse_other_settings,
    remove_others,
    write_run,
)
from segcli.inference.sources import Input, PassedOver, Sources, discover
from segcli.inference.storage import Content, Storage

R = TypeVar("R")
AHEAD = 64  # inputs that are known but not decoded yet
WRITERS = 2  # threads that encode and write, where a network is the bottleneck
SHOWN_FAILURES = 10
# The file's own name is at fault, not the disk: only this input fails.
OWN_FAULTS = {errno.ENAMETOOLONG, errno.EISDIR, errno.ENOTDIR, errno.EEXIST, errno.ELOOP, errno.EILSEQ}


class Work(Protocol[R]):
    """What a command does with the files that were read."""

    def compute(self, pictures: Iterator[Decoded]) -> Iterator[tuple[Decoded, R | ImageError]]:
        """In the main thread: every picture with its result, or with the reason why there is none."""

    def encode(self, picture: Decoded, result: R) -> tuple[dict[str, bytes], dict[str, float]]:
        """In a thread: files by kind of product, and the shares of the classes."""


@dataclass(frozen=True)
class Task(Generic[R]):
    """One run over a folder."""

    sources: Sources
    out: Storage
    kinds: Sequence[str]  # keys of layout.PRODUCTS
    model: str  # its name, for the manifest
    settings: Mapping[str, Any]  # all that the bytes of a result depend on, besides the input
    options: Mapping[str, Any]  # for run.json
    start: Callable[[], Work[R]]  # called only when there is something to do
    reader: str = "image"
    workers: int = 1
    writers: int = WRITERS
    overwrite: bool = False


@dataclass
class Progress:
    """Where a run stands. Filled while it runs; read by anyone."""

    total: int | None = None  # inputs, once they are counted
    done: int = 0
    skipped: int = 0
    failed: int = 0
    pixels: Counter[str] = field(default_factory=Counter)  # by class, of all inputs done or skipped
    failures: list[tuple[str, str]] = field(default_factory=list)  # the first few: source, reason
    passed_over: PassedOver = field(default_factory=PassedOver)
    computing_since: float = 0  # time.monotonic() when the network was ready, 0 before
    interrupted: int = 0  # the signal that ended the run

    @property
    def inputs(self) -> int:
        return self.done + self.skipped + self.failed


def run(task: Task[R], progress: Progress) -> None:
    """Do all that is not done yet, and note it.

    Args:
        task: What to do.
        progress: Is kept up to date.

    Raises:
        UsageError: The folder is in use, or holds results of other settings.
        MachineError: The disk is full, ...; what was done before is noted.
    """
    stop = threading.Event()
    decoders = Decoders(task.workers, task.reader, stop)
    with Interrupts(stop, decoders.kill) as interrupts, open_manifest(task.out) as manifest:
        if len(manifest) and not task.overwrite:
            refuse_other_settings(task.out, task.settings)
        about = {**task.options, "segcli": __version__, "settings": dict(task.settings), "started": _now()}
        write_run(task.out, {"state": "running", **about})
        state = "failed"
        try:
            _process(task, _Book(task, manifest, progress), decoders, interrupts, stop)
            progress.interrupted = interrupts.number
            state = "interrupted" if progress.interrupted else "finished"
            if state == "finished":
                manifest.compact()
        finally:
            counts = {"done": progress.done, "skipped": progress.skipped, "failed": progress.failed}
            with contextlib.suppress(MachineError):  # on a full disk the first error is the one to tell
                write_run(task.out, {"state": state, **about, "ended": _now(), **counts})


def count(sources: Sources, progress: Progress, stop: threading.Event) -> None:
    """Count the inputs for the progress bar, in a thread beside the run."""
    total = 0
    for _ in discover(sources, PassedOver()):
        total += 1
        if stop.is_set():
            return
    progress.total = total


def _process(
    task: Task[R], book: _Book, decoders: Decoders, interrupts: Interrupts, stop: threading.Event
) -> None:
    todo = Ahead(_not_done(task, book), AHEAD, stop)
    threads = [todo.thread]
    try:
        if not todo.wait():
            return  # the model is not even loaded
        decoded = Ahead(decoders.run(todo), task.workers + 2, stop)
        threads.append(decoded.thread)
        pictures = _readable(decoded, decoders, book)
        if len(book.manifest):  # what an earlier run left is often only what cannot be read
            first = next(pictures, None)
            if first is None:
                return
            pictures = itertools.chain([first], pictures)
        if stop.is_set():
            return
        with interrupts.getting_ready():
            work = task.start()  # while the first pictures are decoded
        book.progress.computing_since = time.monotonic()
        slots = threading.Semaphore(2 * task.writers)
        with ThreadPoolExecutor(task.writers) as writers:
            for picture, result in work.compute(pictures):
                slots.acquire()
                writers.submit(_finish, work, picture, result, book, decoders, slots, stop)
    finally:
        stop.set()
        for thread in threads:
            thread.join(timeout=2)  # one that waits for paths on stdin is left behind
    if book.error is not None:
        raise book.error


def _not_done(task: Task[R], book: _Book) -> Iterator[Input]:
    """The inputs that this run has to compute; the others are noted."""
    settings = digest(task.settings)
    for item in discover(task.sources, book.progress.passed_over):
        if item.problem:
            book.failed(item.source, item.problem)
        elif not book.manifest.claim(item):
            book.failed(item.source, f"another input has the same output, {item.output}")
        else:
            before = book.manifest.find(item.output)
            try:
                entry = finished_entry(before, item, settings, task.kinds, task.out)
            except FileExistsError as error:
                if not task.overwrite:
                    other = f"{item.output} holds the result of {error}"
                    book.failed(item.source, f"{other}; choose another --out, or give --overwrite")
                    continue
                entry = None
            if entry is not None and not task.overwrite:
                book.skipped(entry)
                continue
            if before is not None and entry is None:
                remove_others(before, item, task.kinds, task.out)
            yield item


def _readable(decoded: Iterator[Decoded], decoders: Decoders, book: _Book) -> Iterator[Decoded]:
    """The pictures that could be decoded; the others are noted."""
    for picture in decoded:
        if picture.pixels is None:
            book.failed(picture.item.source, picture.problem, picture)
            decoders.release(picture)
        else:
            yield picture


def _finish(
    work: Work[R],
    picture: Decoded,
    result: R | ImageError,
    book: _Book,
    decoders: Decoders,
    slots: threading.Semaphore,
    stop: threading.Event,
) -> None:
    """Encode and write what was computed for one picture, then note it."""
    start = time.perf_counter()
    source = picture.item.source
    try:
        if isinstance(result, ImageError):
            raise result
        files, shares = work.encode(picture, result)  # all of them, before the first is written
        written = {kind: book.write(picture.item.output, kind, data) for kind, data in files.items()}
        picture.milliseconds += (time.perf_counter() - start) * 1e3
        book.done(picture, written, shares)
    except ImageError as error:
        book.failed(source, str(error), picture)
    except MemoryError:
        book.failed(source, "there is not enough memory for an image of this size", picture)
    except MachineError as error:
        cause = error.__cause__
        if isinstance(cause, OSError) and cause.errno in OWN_FAULTS:
            book.failed(source, str(error), picture)
        else:
            book.error = error
            stop.set()
    except Exception as error:  # not foreseen, but still the fault of one file, and the others go on
        book.failed(source, f"internal error, please report it: {error!r}", picture)
    finally:
        decoders.release(picture)
        slots.release()


class _Book:
    """Writes results and keeps the record: manifest and progress, from several threads."""

    def __init__(self, task: Task[Any], manifest: Manifest, progress: Progress) -> None:
        self.manifest = manifest
        self.progress = progress
        self.error: MachineError | None = None
        self._out = task.out
        self._model = task.model
        self._settings = digest(task.settings)
        self._lock = threading.Lock()

    def write(self, output: str, kind: str, data: bytes) -> Content:
        return self._out.write(file_of(output, kind), data)

    def done(self, picture: Decoded, files: Mapping[str, Content], shares: Mapping[str, float]) -> None:
        assert picture.pixels is not None
        height, width = picture.pixels.shape[:2]
        entry = Entry(
            source=os.path.abspath(picture.item.source),
            output=file_of(picture.item.output, next(iter(files))),
            status="done",
            width=width,
            height=height,
            model=self._model,
            milliseconds=round(picture.milliseconds, 1),
            classes=shares,
            notes=picture.notes,
            settings=self._settings,
            input=picture.content,
            files=files,
        )
        self.manifest.append(entry)
        with self._lock:
            self.progress.done += 1
            self._count_pixels(entry)

    def skipped(self, entry: Entry) -> None:
        self.manifest.append(replace(entry, status="skipped", reason="done before"))
        with self._lock:
            self.progress.skipped += 1
            self._count_pixels(entry)

    def failed(self, source: str, reason: str, picture: Decoded | None = None) -> None:
        entry = Entry(
            source=os.path.abspath(source),
            output=None,
            status="failed",
            reason=reason,
            model=self._model,
            milliseconds=round(picture.milliseconds, 1) if picture else None,
            input=picture.content if picture else None,
        )
        self.manifest.append(entry)
        with self._lock:
            self.progress.failed += 1
            if len(self.progress.failures) < SHOWN_FAILURES:
                self.progress.failures.append((source, reason))

    def _count_pixels(self, entry: Entry) -> None:
        for name, share in entry.classes.items():
            self.progress.pixels[name] += round(share * (entry.width or 0) * (entry.height or 0))


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")
