"""What becomes of a picture once it is computed: its files, and its entry for the manifest.

    encode -> write -> entry

It is done in threads, or in processes (`finish_worker.py`): where hundreds of pictures a second are computed,
Python's part of this alone would keep the one process busy that asks the GPU.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import itertools
import queue
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from segcli.errors import ImageError, MachineError
from segcli.inference.children import how_ended, start_process
from segcli.inference.decoders import Decoded
from segcli.inference.layout import file_of
from segcli.inference.manifest import Entry
from segcli.inference.messages import receive, receive_object, send_object
from segcli.inference.storage import Content, Storage, absolute

PROGRAM = (sys.executable, "-P", "-m", "segcli.inference.finish_worker")
SOON = 8  # pictures until it pays to start processes
NO_FILES: Mapping[str, bytes] = {}
# The file's own name is at fault, not the disk: only this input fails.
OWN_FAULTS = {errno.ENAMETOOLONG, errno.EISDIR, errno.ENOTDIR, errno.EEXIST, errno.ELOOP, errno.EILSEQ}

Finished = tuple[Entry, Mapping[str, bytes]]  # what became of a picture, and what goes into a tar
Encode = Callable[[Decoded, Any], tuple[dict[str, bytes], dict[str, float]]]


def failed(model: str, source: str, reason: str, picture: Decoded | None = None) -> Entry:
    """The entry of an input without a result."""
    return Entry(
        source=absolute(source),
        output=None,
        status="failed",
        reason=reason,
        model=model,
        milliseconds=round(picture.milliseconds, 1) if picture else None,
        input=picture.content if picture else None,
    )


@dataclass(frozen=True)
class Finishing:
    """How the pictures of a run are finished; any process can be told.

    Attributes:
        encode: Files by kind of product, and the shares of the classes; see `pipeline.Work`.
        model: Its name, for the manifest.
        settings: The digest of the run's settings.
        in_tars: Files go into tars: they are not written here.
    """

    encode: Encode
    out: Storage
    model: str
    settings: str
    in_tars: bool

    def finished(self, picture: Decoded, result: Any) -> Finished:
        """Encode and write what was computed for one picture.

        Args:
            picture: The picture.
            result: What was computed, or an ImageError that says why there is nothing.

        Returns:
            What became of it, and what goes into a tar.

        Raises:
            MachineError: The disk is full, ...: no other picture could be written either.
        """
        begun = time.perf_counter()
        item = picture.item
        try:
            if isinstance(result, ImageError):
                raise result
            files, shares = self.encode(picture, result)  # all of them, before the first is written
            written = {kind: self._written(file_of(item.output, kind), data) for kind, data in files.items()}
        except ImageError as error:
            return self._failed(picture, str(error))
        except MemoryError:
            return self._failed(picture, "there is not enough memory for an image of this size")
        except MachineError as error:
            cause = error.__cause__
            if isinstance(cause, OSError) and cause.errno in OWN_FAULTS:
                return self._failed(picture, str(error))
            raise
        except Exception as error:  # not foreseen, but still the fault of one file, and the others go on
            return self._failed(picture, f"internal error, please report it: {error!r}")
        picture.milliseconds += (time.perf_counter() - begun) * 1e3
        assert picture.pixels is not None
        height, width = picture.pixels.shape[:2]
        entry = Entry(
            source=absolute(item.source),
            output=file_of(item.output, next(iter(written))),
            status="done",
            width=width,
            height=height,
            model=self.model,
            milliseconds=round(picture.milliseconds, 1),
            classes=shares,
            notes=picture.notes,
            settings=self.settings,
            input=picture.content,
            files=written,
        )
        return entry, files if self.in_tars else NO_FILES

    def _failed(self, picture: Decoded, reason: str) -> Finished:
        return failed(self.model, picture.item.source, reason, picture), NO_FILES

    def _written(self, name: str, data: bytes) -> Content:
        """Write a file, unless it goes into a tar, and say what it is."""
        if self.in_tars:
            return Content(len(data), 0, 0, hashlib.sha256(data).hexdigest())
        return self.out.write(name, data)


@dataclass(frozen=True)
class _Worker:
    process: subprocess.Popen[bytes]
    connection: socket.socket


class Finishers:
    """Processes that finish pictures, as far as they are there and idle; the others are finished here.

    So a few pictures do not wait for a process to start, and a slow disk has as many to write at a time as
    there are threads that ask.

    Args:
        finishing: What they do. It is sent to them.
        count: Number of processes.
        soon: They are started with this picture.
        program: The command that starts one; the number of its socket is appended.
    """

    def __init__(
        self, finishing: Finishing, count: int, soon: int = SOON, program: Sequence[str] = PROGRAM
    ) -> None:
        self._finishing = finishing
        self._count = count
        self._soon = soon
        self._program = program
        self._asked = itertools.count(1)
        self._idle: queue.SimpleQueue[_Worker] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._workers: list[_Worker] = []
        self._threads: list[threading.Thread] = []
        self._closed = False
        self.all_lived = True  # one that died may have left a file half written, under a temporary name

    def finished(self, picture: Decoded, result: Any) -> Finished:
        """See `Finishing.finished`. A process that a picture takes down costs that picture.

        Raises:
            MachineError: The disk is full, ...
        """
        if next(self._asked) == self._soon:
            for _ in range(self._count):
                self._start()
        if isinstance(result, ImageError):
            return self._finishing.finished(picture, result)
        try:
            worker = self._idle.get_nowait()
        except queue.Empty:
            return self._finishing.finished(picture, result)
        try:
            send_object(worker.connection, (picture, result))
            answer = receive_object(worker.connection)
        except (EOFError, OSError):
            self.all_lived = False
            self._start()
            how = how_ended(worker.process.wait())
            reason = f"saving its results takes the process down ({how})"
            return failed(self._finishing.model, picture.item.source, reason, picture), NO_FILES
        self._idle.put(worker)
        if isinstance(answer, MachineError):
            raise answer
        finished: Finished = answer
        return finished

    def _start(self) -> None:
        """Start a process, which is idle once it is there. If it never is, pictures are finished here."""
        with self._lock:
            if self._closed:
                return
            connection, theirs = socket.socketpair()
            with theirs:
                try:
                    worker = _Worker(start_process(self._program, theirs.fileno()), connection)
                except OSError:
                    connection.close()
                    return
            self._workers.append(worker)
            self._threads.append(threading.Thread(target=self._greet, args=(worker,), daemon=True))
            self._threads[-1].start()

    def _greet(self, worker: _Worker) -> None:
        with contextlib.suppress(EOFError, OSError):
            receive(worker.connection)
            send_object(worker.connection, self._finishing)
            self._idle.put(worker)

    def close(self) -> None:
        """End all of them, which have nothing to do any more."""
        with self._lock:
            self._closed = True
        for worker in self._workers:
            worker.process.kill()
        for thread in self._threads:
            thread.join()
        for worker in self._workers:
            worker.process.wait()
            worker.connection.close()
