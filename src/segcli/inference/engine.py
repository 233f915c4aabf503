"""From a folder of files to a folder of results: bounded, resumable, and stopped by no single file.

    discover -> what is not done yet -> decode, compute, encode, write -> one line in the manifest
     thread                                    pipeline.py

Every arrow is a queue of fixed size, so memory does not depend on the number of files.

The result does not depend on how this runs: an input's bytes follow from the input, the model and the
options. Errors of one file become its line in the manifest; errors of the machine end the run, and the next
one goes on from there.
"""

from __future__ import annotations

import contextlib
import functools
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, TypeVar

from segcli import __version__
from segcli.errors import MachineError
from segcli.inference import archives
from segcli.inference.ahead import Ahead
from segcli.inference.decoders import Decoders
from segcli.inference.finishing import NO_FILES, failed
from segcli.inference.interrupts import Interrupts
from segcli.inference.layout import RUN_FOLDER
from segcli.inference.manifest import (
    Archive,
    Entry,
    Manifest,
    announce_shards,
    digest,
    finished_entry,
    open_manifest,
    refuse_other_settings,
    remove_others,
    write_run,
)
from segcli.inference.pipeline import Note, Task, Work, work_through
from segcli.inference.shards import Shard, inputs
from segcli.inference.sources import Input, PassedOver, Sources
from segcli.inference.storage import Content

R = TypeVar("R")
AHEAD = 64  # inputs that are known but not decoded yet
SHOWN_FAILURES = 10


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
    steady_since: float = 0  # time.monotonic() of the first result since all processes are ready, 0 before
    done_before: int = 0  # up to that one
    interrupted: int = 0  # the signal that ended the run

    @property
    def inputs(self) -> int:
        return self.done + self.skipped + self.failed


class Helpers(Protocol):
    """Other processes that compute: of this machine (`processes.py`) or of a cluster (`cluster.py`)."""

    def work_through(
        self,
        task: Task[Any],
        todo: Ahead[Input],
        note: Note,
        ready: Callable[[], None],
        stop: threading.Event,
    ) -> bool:
        """Do all of `todo`, and note it.

        Args:
            task: What is done.
            todo: The inputs.
            note: Gets the entry of every input.
            ready: Called when the first of them begins.
            stop: Set by anyone to end early.

        Returns:
            Whether all of them have lived: one that dies may leave files half written, under temporary names.

        Raises:
            UsageError: The model or the device cannot be used.
            MachineError: Nothing can be written, or they do not start.
        """

    def kill(self) -> None:
        """End all of them at once."""

    def close(self) -> None:
        """End all of them, and wait for that."""


def run(task: Task[R], progress: Progress, helpers: Helpers | None = None) -> None:
    """Do all that is not done yet, and note it.

    Args:
        task: What to do.
        progress: Is kept up to date.
        helpers: Other processes that compute; without them this one does.

    Raises:
        UsageError: The folder is in use, or holds results of other settings.
        MachineError: The disk is full, ...; what was done before is noted.
    """
    stop = threading.Event()
    decoders = Decoders(
        task.workers, task.reader, stop, remote=task.sources.may_be_remote, memory=task.memory
    )
    at_once = helpers.kill if helpers else decoders.kill
    with Interrupts(stop, at_once) as interrupts, open_manifest(task.out, task.shard) as manifest:
        if (len(manifest) or task.shard) and not task.overwrite:
            refuse_other_settings(task.out, task.settings)
        about = {**task.options, "segcli": __version__, "settings": dict(task.settings), "started": _now()}
        record = RUN_FOLDER
        if task.shard:
            record = task.shard.record
            about["shard"] = str(task.shard)
            announce_shards(task.out, about)
        write_run(task.out, {"state": "running", **about}, record)
        state = "failed"
        try:
            with _Book(task, manifest, progress) as book:
                _process(task, book, helpers, decoders, interrupts, stop)
            progress.interrupted = interrupts.number
            state = "interrupted" if progress.interrupted else "finished"
            if state == "finished":
                manifest.compact()
                if task.shard is None and (task.in_tars or manifest.names_archives):
                    archives.sweep(task.out, archives.repack(manifest.path, task.out))
        finally:
            counts = {"done": progress.done, "skipped": progress.skipped, "failed": progress.failed}
            with contextlib.suppress(MachineError):  # on a full disk the first error is the one to tell
                write_run(task.out, {"state": state, **about, "ended": _now(), **counts}, record)


def count(sources: Sources, progress: Progress, stop: threading.Event, shard: Shard | None = None) -> None:
    """Count the inputs for the progress bar, in a thread beside the run."""
    total = 0
    for _ in inputs(sources, PassedOver(), shard):
        total += 1
        if stop.is_set():
            return
    progress.total = total


def _process(
    task: Task[R],
    book: _Book,
    helpers: Helpers | None,
    decoders: Decoders,
    interrupts: Interrupts,
    stop: threading.Event,
) -> None:
    todo = Ahead(_not_done(task, book), AHEAD, stop)

    def ready() -> None:  # once for every process
        book.progress.computing_since = book.progress.computing_since or time.monotonic()
        book.progress.steady_since = 0

    def start() -> Work[R]:
        with interrupts.getting_ready():
            work = task.start()
        ready()
        return work

    try:
        if not todo.wait():
            return  # the model is not even loaded
        if helpers:
            all_lived = helpers.work_through(task, todo, book.note, ready, stop)
        else:
            # What an earlier run left is often only what cannot be read.
            patient = len(book.manifest) > 0
            all_lived = work_through(task, todo, decoders, start, book.note, stop, patient)
        if not all_lived and task.shard is None:
            task.out.remove_leftovers()  # of a shard they go when it is merged
    finally:
        stop.set()
        if helpers:
            helpers.close()
        todo.thread.join(timeout=2)  # one that waits for paths on stdin is left behind


def _not_done(task: Task[R], book: _Book) -> Iterator[Input]:
    """The inputs that this run has to compute; the others are noted."""
    settings = digest(task.settings)

    @functools.cache
    def archive_now(archive: Archive) -> Content | None:
        return task.out.content_now(archive.name, archive.content)

    for item in inputs(task.sources, book.progress.passed_over, task.shard):
        if item.problem:
            book.failed(item.source, item.problem)
        elif not book.manifest.claim(item):
            book.failed(item.source, f"another input has the same output, {item.output}")
        else:
            before = book.manifest.find(item.output)
            try:
                entry = finished_entry(before, item, settings, task.kinds, task.out, archive_now)
            except FileExistsError as error:
                if not task.overwrite:
                    other = f"{item.output} holds the result of {error}"
                    reason = f"{other}; choose another --out, or give --overwrite"
                    book.failed(item.source, reason)
                    continue
                entry = None
            if entry is not None and not task.overwrite:
                book.note(item.source, replace(entry, status="skipped", reason="done before"))
                continue
            if before is not None and entry is None:
                remove_others(before, item, () if task.in_tars else task.kinds, task.out)
            yield item


class _Book:
    """Keeps the record: manifest and progress, from several threads. Also writes what goes into tars."""

    def __init__(self, task: Task[Any], manifest: Manifest, progress: Progress) -> None:
        self._task = task
        self.manifest = manifest
        self.progress = progress
        self._lock = threading.Lock()
        self._packer = archives.Packer(task.out, self._note_all, task.memory)

    def __enter__(self) -> _Book:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            with contextlib.suppress(MachineError) if kind else contextlib.nullcontext():
                self._packer.close()
        finally:
            self.progress.done -= self._packer.unnoted

    def _note_all(self, entries: Sequence[Entry]) -> None:
        self.manifest.append(*entries)

    def failed(self, source: str, reason: str) -> None:
        self.note(source, failed(self._task.model, source, reason))

    def note(self, source: str, entry: Entry, files: Mapping[str, bytes] = NO_FILES, /) -> None:
        if files:
            self._packer.add(entry, files)
        else:
            self.manifest.append(entry)
        progress = self.progress
        with self._lock:
            if entry.status == "failed":
                progress.failed += 1
                if len(progress.failures) < SHOWN_FAILURES:
                    progress.failures.append((source, entry.reason or ""))
            else:
                progress.done += entry.status == "done"
                if not progress.steady_since:
                    progress.steady_since, progress.done_before = time.monotonic(), progress.done
                progress.skipped += entry.status == "skipped"
                for name, share in entry.classes.items():
                    progress.pixels[name] += round(share * (entry.width or 0) * (entry.height or 0))


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")
