"""What becomes of one input after the other, in one process: decode, compute, encode, write, note.

       decode -> compute -> encode and write -> an entry for the manifest
      processes  this thread   threads or processes

Every arrow is a queue of fixed size. What is computed is the business of the command: `Work` says how.
`segcli predict` is `segmentation.Segmenter`. Who knows the inputs and keeps the manifest is not said here:
the same process (`engine.py`), one that drives several (`processes.py`), or one on another machine.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

from segcli.errors import ImageError
from segcli.inference.ahead import Ahead
from segcli.inference.decoders import Decoded, Decoders
from segcli.inference.finishing import Finishers, Finishing, failed
from segcli.inference.manifest import Entry, digest
from segcli.inference.shards import Shard
from segcli.inference.sources import Input, Sources
from segcli.inference.storage import Storage

R = TypeVar("R")
WRITERS = 2  # threads that encode and write, where a network is the bottleneck


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
        """In a thread: files by kind of product, and the shares of the classes.

        Where a task has `finishers`, it is sent to other processes.
        """


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
    finishers: int = 0  # processes that encode and write as well
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
) -> bool:
    """Decode, compute and write all items, and note each of them.

    Args:
        task: What is done.
        items: The inputs.
        decoders: Read them.
        start: Gives the work; called while the first items are decoded.
        note: Gets the entry of every item.
        stop: Set by anyone to end early; set here when the disk is full or the like.
        patient: Call `start` only once there is something that can be read.

    Returns:
        See `compute_and_write`.

    Raises:
        MachineError: Nothing can be written, ...
    """
    decoded = readable(decoders.run(items), task, note, decoders.release)
    pictures = Ahead(decoded, task.workers + 2, stop)
    try:
        if (patient and not pictures.wait()) or stop.is_set():
            return True
        return compute_and_write(task, start(), pictures, note, decoders.release, stop)
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
) -> bool:
    """Compute and write what was read, and note each.

    Args:
        task: What is done.
        work: Computes.
        pictures: Were read.
        note: Gets the entry of every picture.
        release: Called when the pixels of a picture are no longer used.
        stop: Set here when the disk is full or the like.

    Returns:
        Whether all processes have lived: one that dies may leave files half written, under temporary names.

    Raises:
        MachineError: Nothing can be written, ...
    """
    finishing = Finishing(work.encode, task.out, task.model, digest(task.settings), task.in_tars)
    errors: list[Exception] = []
    count = max(task.writers, task.finishers, task.out.at_a_time)
    slots = threading.Semaphore(2 * count)

    def finish(picture: Decoded, result: R | ImageError) -> None:
        try:
            note(picture.item.source, *finishers.finished(picture, result))
        except Exception as error:  # a full disk, most likely; raised below, and no picture is lost unsaid
            errors.append(error)
            stop.set()
        finally:
            release(picture)
            slots.release()

    import cv2

    cv2.setNumThreads(1)  # what encodes are threads already
    with (
        contextlib.closing(Finishers(finishing, task.finishers)) as finishers,
        ThreadPoolExecutor(count) as pool,
    ):
        for picture, result in work.compute(pictures):
            slots.acquire()
            pool.submit(finish, picture, result)
    if errors:
        raise errors[0]
    return finishers.all_lived


def readable(
    decoded: Generator[Decoded], task: Task[Any], note: Note, release: Callable[[Decoded], None]
) -> Iterator[Decoded]:
    """The pictures that could be decoded; the others are noted."""
    with contextlib.closing(decoded):
        for picture in decoded:
            if picture.pixels is None:
                note(picture.item.source, failed(task.model, picture.item.source, picture.problem, picture))
                release(picture)
            else:
                yield picture
