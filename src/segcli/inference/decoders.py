"""Decoding in processes of their own, so that a file can take down its decoder but not the run.

Messages between this process and a worker (`decode_worker.py`), over a socket, a JSON header each:

    worker -> {"ready": true}
    <- {"path", "reader", "seconds"}              one job at a time
    worker -> {"ask": pixels}                     only for large images: waits until there is room in memory
    <- {"seconds", "refusal"}                     more time; or why it is not to be read
    worker -> {"problem", "notes", "content", ...} and the pixels

Why like this (measured, see docs/reliability.md): workers stay alive, because starting one costs as much as
decoding 300 photographs; and pixels come through a socket, which is no slower than shared memory and leaves
nothing to clean up.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from segcli.errors import ImageError, MachineError
from segcli.inference.ahead import Ahead
from segcli.inference.children import start_process
from segcli.inference.decode_worker import decode, seconds_for
from segcli.inference.fetching import Fetcher
from segcli.inference.messages import Array, limit_waits, receive, send
from segcli.inference.sources import Input
from segcli.inference.storage import Content
from segcli.memory import gib

PROGRAM = (sys.executable, "-P", "-m", "segcli.inference.decode_worker")
STALLED = 60  # seconds in the middle of a message: a worker that was stopped from outside
TICK = 0.5  # seconds; how often limits and the wish to stop are looked at
ROOM = 64_000_000  # pixels of large images that may be held at a time at most, or one image
ROOM_SHARE = 4  # of the memory that a run may take, the part for images that wait
PICTURE = 16  # bytes per pixel of an image while it is read, and while its results are encoded


@dataclass
class Decoded:
    """An input with its pixels, or with the problem that it has."""

    item: Input
    pixels: Array | None = None  # uint8 (H, W, 3) for images, integers (H, W) for masks
    problem: str = ""
    notes: tuple[str, ...] = ()
    content: Content | None = None
    milliseconds: float = 0
    room: int = 0  # pixels to give back by `Decoders.release`
    palette: Array | None = None  # of a mask that has one, uint8 (256, 3)
    prepared: Future[Any] | None = None  # what a network is given of it, where that is made beforehand


@dataclass
class _Worker:
    process: subprocess.Popen[bytes]
    connection: socket.socket
    ready: bool = False
    item: Input | None = None  # what it is reading
    asks: int = 0  # pixels that it waits for
    room: int = 0  # pixels that it was given
    spent: float = 0  # seconds on this item, the time of a suspended machine or terminal not counted
    limit: float = 0


class Decoders:
    """A fixed number of worker processes. With `count` 0 files are read in this process, unprotected.

    Args:
        count: Number of processes.
        reader: What the files are, a key of `decode_worker.READERS`.
        stop: Set by anyone to end `run` early.
        program: The command that starts a worker; the number of its socket is appended.
        remote: Whether there may be files below URLs, which have to be fetched first.
        memory: Bytes that the run may take; None sets no limit.
    """

    def __init__(
        self,
        count: int,
        reader: str,
        stop: threading.Event,
        program: Sequence[str] = PROGRAM,
        remote: bool = False,
        memory: int | None = None,
    ) -> None:
        self._count = count
        self._reader = reader
        self._stop = stop
        self._program = program
        self._remote = remote
        self._workers: list[_Worker] = []
        self._selector = selectors.DefaultSelector()
        self._failed_starts = 0
        self._room_lock = threading.Lock()
        self._room_used = 0
        self._memory = memory
        self._room = ROOM if memory is None else min(ROOM, memory // (ROOM_SHARE * PICTURE))

    def run(self, items: Ahead[Input]) -> Generator[Decoded]:
        """Read every item, several at a time, and yield each when it is done."""
        try:
            yield from self._run_fetching(items) if self._remote else self._run(items)
        finally:
            self.kill()
            for worker in self._workers:
                worker.connection.close()
                worker.process.wait()
            self._selector.close()

    def release(self, decoded: Decoded) -> None:
        """Make room in memory: the pixels are no longer used."""
        with self._room_lock:
            self._room_used -= decoded.room
            decoded.room = 0

    def kill(self) -> None:
        """End all workers at once."""
        for worker in list(self._workers):
            worker.process.kill()

    def _run_fetching(self, items: Ahead[Input]) -> Iterator[Decoded]:
        with Fetcher(self._stop) as fetcher:
            for decoded in self._run(Ahead(fetcher.fetched(items), 1, self._stop)):
                fetcher.drop(decoded.item)
                yield decoded

    def _run(self, items: Ahead[Input]) -> Iterator[Decoded]:
        return self._run_here(items) if self._count == 0 else self._run_in_workers(items)

    def _run_here(self, items: Ahead[Input]) -> Iterator[Decoded]:
        room = 0

        def ask(pixels: int) -> None:
            nonlocal room
            if refusal := self._refusal(pixels):
                raise ImageError(refusal)
            while not self._take(pixels):
                if self._stop.wait(TICK / 10):
                    return
            room = pixels

        for item in items:
            if item.problem:
                yield Decoded(item, problem=item.problem)
                continue
            header, pixels = decode(item.path, self._reader, ask)
            yield _decoded(item, header, pixels, room)
            room = 0

    def _run_in_workers(self, items: Ahead[Input]) -> Iterator[Decoded]:
        more = True
        waiting: deque[Input] = deque()
        last = time.monotonic()
        while not self._stop.is_set():
            while more and len(waiting) < self._count:
                try:
                    item = items.poll(0)
                except StopIteration:
                    more = False
                    break
                if item is None:
                    break
                if item.problem:
                    yield Decoded(item, problem=item.problem)
                else:
                    waiting.append(item)
            free = [worker for worker in self._workers if worker.item is None]
            for worker in free:
                if worker.ready and waiting:
                    self._assign(worker, waiting.popleft())
            starting = sum(not worker.ready for worker in free)
            for _ in range(min(len(waiting) - starting, self._count - len(self._workers))):
                self._start()
            busy = any(worker.item is not None for worker in self._workers)
            if not (more or waiting or busy):
                return

            hurry = (more and len(waiting) < self._count) or any(worker.asks for worker in self._workers)
            for key, _ in self._selector.select(TICK / 50 if hurry else TICK):
                yield from self._listen(key.data)
            now = time.monotonic()
            yield from self._watch(min(now - last, 2 * TICK))
            last = now

    def _assign(self, worker: _Worker, item: Input) -> None:
        try:
            worker.limit = seconds_for(os.stat(item.path).st_size)
        except OSError:
            worker.limit = seconds_for(0)
        worker.item, worker.spent = item, 0
        self._tell(worker, {"path": item.path, "reader": self._reader, "seconds": worker.limit})

    def _listen(self, worker: _Worker) -> Iterator[Decoded]:
        """Take one message of a worker, or its end."""
        try:
            header, pixels = receive(worker.connection)
        except BlockingIOError:
            yield from self._bury(worker, "its decoder stopped in the middle of an answer")
            return
        except (EOFError, OSError):
            yield from self._bury(worker, "")
            return
        if "ready" in header:
            worker.ready, self._failed_starts = True, 0
        elif "ask" in header:
            worker.asks = header["ask"]
        elif worker.item is not None:
            decoded = _decoded(worker.item, header, pixels, worker.room)
            worker.item, worker.room = None, 0
            yield decoded

    def _watch(self, seconds: float) -> Iterator[Decoded]:
        """Let waiting workers go on where there is room, and end those that take too long."""
        for worker in list(self._workers):
            if worker.asks and (refusal := self._refusal(worker.asks)):
                worker.asks = 0
                self._tell(worker, {"seconds": worker.limit, "refusal": refusal})
            elif worker.asks and self._take(worker.asks):
                worker.room, worker.asks = worker.asks, 0
                worker.limit += seconds_for(0, worker.room)
                self._tell(worker, {"seconds": worker.limit})
            elif worker.item is not None and not worker.asks:
                worker.spent += seconds
                if worker.spent > worker.limit:
                    yield from self._bury(worker, f"reading it took longer than {worker.limit:.0f} s")

    def _refusal(self, pixels: int) -> str:
        """Why an image of so many pixels is not read at all, if it is not."""
        need = pixels * PICTURE
        if self._memory is None or need <= self._memory:
            return ""
        return (
            f"reading its {pixels / 1e6:.0f} megapixels needs about {gib(need)}; "
            f"--memory is {gib(self._memory)}"
        )

    def _take(self, pixels: int) -> bool:
        with self._room_lock:
            if self._room_used and self._room_used + pixels > self._room:
                return False
            self._room_used += pixels
            return True

    def _tell(self, worker: _Worker, message: dict[str, Any]) -> None:
        with contextlib.suppress(OSError):  # it has died; `_listen` finds out
            send(worker.connection, message)

    def _bury(self, worker: _Worker, reason: str) -> Iterator[Decoded]:
        """Remove a worker that died, or that has to go, and report what it was reading."""
        worker.process.kill()
        code = worker.process.wait()
        self._selector.unregister(worker.connection)
        worker.connection.close()
        self._workers.remove(worker)
        if not worker.ready:
            self._failed_starts += 1
            if self._failed_starts >= 3:
                raise MachineError(
                    f"the processes that read images do not start ({_how(code)}); "
                    f"`{' '.join(self._program)} 0` shows why, and --workers 0 does without them"
                )
        if worker.item is not None:
            yield Decoded(worker.item, problem=reason or _how(code), room=worker.room)

    def _start(self) -> None:
        ours, theirs = socket.socketpair()
        limit_waits(ours, STALLED)
        one = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        with theirs:
            process = start_process(self._program, theirs.fileno(), **one)
        worker = _Worker(process, ours)
        self._workers.append(worker)
        self._selector.register(ours, selectors.EVENT_READ, worker)


def _decoded(item: Input, header: dict[str, Any], pixels: Array | None, room: int) -> Decoded:
    content = header["content"]
    palette = header["palette"] and np.frombuffer(bytes.fromhex(header["palette"]), np.uint8).reshape(-1, 3)
    return Decoded(
        item,
        pixels,
        header["problem"],
        tuple(header["notes"]),
        _state(item, Content(**content)) if content else None,
        header["milliseconds"],
        room,
        palette,
    )


def _state(item: Input, found: Content) -> Content:
    """What the manifest notes of an input: of one below a URL what the store said, and what the copy held."""
    return found if item.listed is None else replace(item.listed, sha256=found.sha256)


def _how(code: int) -> str:
    """How a process ended, in words."""
    if code == -signal.SIGPROF:
        return "reading it took too long"
    if code == -signal.SIGKILL:
        return "its decoder was killed (SIGKILL), most likely because memory ran out"
    if code < 0:
        return f"its decoder crashed ({signal.Signals(-code).name})"
    return f"its decoder ended with exit code {code}"
