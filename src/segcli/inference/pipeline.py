"""What becomes of one input after the other, in one process: decode, compute, encode, write, note.

       decode -> compute -> encode and write -> an entry for the manifest
      processes  this thread     threads

Every arrow is a queue of fixed size. What is computed is the business of the command: `Work` says how.
`segcli predict` is `segmentation.Segmenter`. Who knows the inputs and keeps the manifest is not said here:
the same process (`engine.py`), one that drives several (`processes.py`), or one on another machine.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import threading
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

from segcli.errors import ImageError, MachineError
from segcli.inference.ahead import Ahead
from segcli.inference.decoders import Decoded, Decoders
from segcli.inference.layout import file_of
from segcli.inference.manifest import Entry, digest
from segcli.inference.shards import Shard
from segcli.inference.sources import Input, Sources
from segcli.inference.storage import Content, Storage, absolute

R = TypeVar("R")
NO_FILES: Mapping[str, bytes] = {}
WRITERS = 2  # threads that encode and write, where a network is the bottleneck
# The file's own name is at fault, not the disk: only this input fails.
OWN_FAULTS = {errno.ENAMETOOLONG, errno.EISDIR, errno.ENOTDIR, errno.EEXIST, errno.ELOOP, errno.EILSEQ}


class Note(Protocol):
    """Called for every input, from several threads."""

    def __call__(self, source: str, entry: Entry, files: Mapping[str, bytes] = ..., /) -> None:
        """Note what became of an input.

        Args:
            source: As given.
            entry: What became of it.
            files: The files that go into a tar, by kind, where the task is one `in_tars`.

        Raises:
            MachineError: Nothing can be written.
        """


class Work(Protocol[R]):
    """What a command does with the files that were read."""

    held: int  # pictures that keep it busy

    def compute(self, pictures: Ahead[Decoded]) -> Iterator[tuple[Decoded, R | ImageError]]:
        """In one thread: every picture with its result, or with the reason why there is none."""

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
    memory: int | None = None  # bytes that it may take; None sets no limit
    writers: int = WRITERS
    overwrite: bool = False
    shard: Shard | None = None  # only this part of the inputs
    in_tars: bool = False  # files go into tars, see `archives.py`: whoever notes them writes them


def work_through(
    task: Task[R],
    items: Ahead[Input],
    decoders: Decoders,
    start: Callable[[], Work[R]],
    note: Note,
    stop: threading.Event,
    patient: bool = False,
) -> None:
    """Decode, compute and write all items, and note each of them.

    Args:
        task: What is done.
        items: The inputs.
        decoders: Read them.
        start: Gives the work; called while the first items are decoded.
        note: Gets the entry of every item.
        stop: Set by anyone to end early; set here when the disk is full or the like.
        patient: Call `start` only once there is something that can be read.

    Raises:
        MachineError: Nothing can be written, ...
    """
    decoded = readable(decoders.run(items), task, note, decoders.release)
    pictures = Ahead(decoded, task.workers + 2, stop)
    try:
        if (patient and not pictures.wait()) or stop.is_set():
            return
        compute_and_write(task, start(), pictures, note, decoders.release, stop)
    finally:
        stop.set()
        pictures.thread.join(timeout=2)


def compute_and_write(
    task: Task[R],
    work: Work[R],
    pictures: Ahead[Decoded],
    note: Note,
    release: Callable[[Decoded], None],
    stop: threading.Event,
) -> None:
    """Compute and write what was read, and note each.

    Args:
        task: What is done.
        work: Computes.
        pictures: Were read.
        note: Gets the entry of every picture.
        release: Called when the pixels of a picture are no longer used.
        stop: Set here when the disk is full or the like.

    Raises:
        MachineError: Nothing can be written, ...
    """
    settings = digest(task.settings)
    errors: list[MachineError] = []
    count = max(task.writers, task.out.at_a_time)
    slots = threading.Semaphore(2 * count)

    def finish(picture: Decoded, result: R | ImageError) -> None:
        try:
            note(picture.item.source, *_finished(task, work, picture, result, settings))
        except MachineError as error:
            errors.append(error)
            stop.set()
        finally:
            release(picture)
            slots.release()

    import cv2

    cv2.setNumThreads(1)  # what encodes are threads already
    with ThreadPoolExecutor(count) as writers:
        for picture, result in work.compute(pictures):
            slots.acquire()
            writers.submit(finish, picture, result)
    if errors:
        raise errors[0]


def failed(task: Task[Any], source: str, reason: str, picture: Decoded | None = None) -> Entry:
    """The entry of an input without a result."""
    return Entry(
        source=absolute(source),
        output=None,
        status="failed",
        reason=reason,
        model=task.model,
        milliseconds=round(picture.milliseconds, 1) if picture else None,
        input=picture.content if picture else None,
    )


def readable(
    decoded: Generator[Decoded], task: Task[Any], note: Note, release: Callable[[Decoded], None]
) -> Iterator[Decoded]:
    """The pictures that could be decoded; the others are noted."""
    with contextlib.closing(decoded):
        for picture in decoded:
            if picture.pixels is None:
                note(picture.item.source, failed(task, picture.item.source, picture.problem, picture))
                release(picture)
            else:
                yield picture


def _finished(
    task: Task[R], work: Work[R], picture: Decoded, result: R | ImageError, settings: str
) -> tuple[Entry, Mapping[str, bytes]]:
    """Encode and write what was computed for one picture.

    Returns:
        What became of it, and what goes into a tar.

    Raises:
        MachineError: The disk is full, ...: no other picture could be written either.
    """
    start = time.perf_counter()
    item = picture.item
    try:
        if isinstance(result, ImageError):
            raise result
        files, shares = work.encode(picture, result)  # all of them, before the first is written
        written = {kind: _written(task, file_of(item.output, kind), data) for kind, data in files.items()}
    except ImageError as error:
        return failed(task, item.source, str(error), picture), {}
    except MemoryError:
        return failed(task, item.source, "there is not enough memory for an image of this size", picture), {}
    except MachineError as error:
        cause = error.__cause__
        if isinstance(cause, OSError) and cause.errno in OWN_FAULTS:
            return failed(task, item.source, str(error), picture), {}
        raise
    except Exception as error:  # not foreseen, but still the fault of one file, and the others go on
        return failed(task, item.source, f"internal error, please report it: {error!r}", picture), {}
    picture.milliseconds += (time.perf_counter() - start) * 1e3
    assert picture.pixels is not None
    height, width = picture.pixels.shape[:2]
    entry = Entry(
        source=absolute(item.source),
        output=file_of(item.output, next(iter(written))),
        status="done",
        width=width,
        height=height,
        model=task.model,
        milliseconds=round(picture.milliseconds, 1),
        classes=shares,
        notes=picture.notes,
        settings=settings,
        input=picture.content,
        files=written,
    )
    return entry, files if task.in_tars else {}


def _written(task: Task[Any], name: str, data: bytes) -> Content:
    """Write a file, unless it goes into a tar, and say what it is."""
    if task.in_tars:
        return Content(len(data), 0, 0, hashlib.sha256(data).hexdigest())
    return task.out.write(name, data)
