"""Inputs below URLs are copied to this machine while earlier ones are computed.

Decoders read files of this machine only: what comes out of a network is a file like any other to them, and
they hold neither connections nor credentials. A copy goes as soon as it has been decoded.
"""

from __future__ import annotations

import contextlib
import fcntl
import shutil
import threading
import uuid
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import TracebackType

from segcli.downloads import cache_folder
from segcli.errors import ImageError
from segcli.files import machine_errors
from segcli.inference.ahead import LOOK, Ahead
from segcli.inference.sources import Input
from segcli.inference.storage import is_url

AT_A_TIME = 16  # requests under way: one takes 20 to 100 ms, whatever the size
ROOM = 1 << 30  # bytes of copies on this machine at a time, or one file


class Fetcher:
    """Copies inputs, several at a time and never more than `ROOM` bytes of them.

    Args:
        stop: Set by anyone to end early.
    """

    def __init__(self, stop: threading.Event) -> None:
        self._stop = stop
        self._pool = ThreadPoolExecutor(AT_A_TIME)
        self._used = 0
        self._fewer = threading.Condition()
        self._folder = Path()

    def __enter__(self) -> Fetcher:
        copies = cache_folder() / "copies"
        self._folder = copies / uuid.uuid4().hex
        with machine_errors(self._folder, "write to"):
            self._folder.mkdir(parents=True)
            self._lock = (self._folder / "lock").open("w")
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            for other in copies.iterdir():  # those of processes that were killed
                with contextlib.suppress(OSError), (other / "lock").open("a") as lock:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    shutil.rmtree(other, ignore_errors=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._pool.shutdown(cancel_futures=True)
        shutil.rmtree(self._folder, ignore_errors=True)
        self._lock.close()

    def fetched(self, items: Ahead[Input]) -> Iterator[Input]:
        """The items in their order, with their copies; those that cannot be had get a problem."""
        waiting: deque[Future[Input]] = deque()
        more = True
        while (more or waiting) and not self._stop.is_set():
            if waiting and (waiting[0].done() or len(waiting) == AT_A_TIME or not more):
                yield waiting.popleft().result()
                continue
            try:
                found = items.poll(LOOK / 10 if waiting else LOOK)
            except StopIteration:
                more = False
                continue
            if found is None:
                continue
            if not is_url(found.source):
                yield found
                continue
            while not self._take(found):
                if waiting:
                    yield waiting.popleft().result()
                elif self._stop.is_set():
                    return
                else:
                    with self._fewer:
                        self._fewer.wait(LOOK)
            waiting.append(self._pool.submit(self._fetch, found))

    def drop(self, item: Input) -> None:
        """The copy of an item is no longer needed."""
        if item.copy:
            with contextlib.suppress(OSError):
                Path(item.copy).unlink()
            self._give_back(item)

    def _fetch(self, item: Input) -> Input:
        from segcli.inference import remote

        assert item.listed is not None  # by sources.discover
        copy = self._folder / (uuid.uuid4().hex + Path(item.source).suffix[:16])
        try:
            remote.fetch(item.source, copy, item.listed.size)
        except ImageError as error:
            copy.unlink(missing_ok=True)
            self._give_back(item)
            return replace(item, problem=str(error))
        return replace(item, copy=str(copy))

    def _take(self, item: Input) -> bool:
        assert item.listed is not None
        with self._fewer:
            if self._used and self._used + item.listed.size > ROOM:
                return False
            self._used += item.listed.size
            return True

    def _give_back(self, item: Input) -> None:
        assert item.listed is not None
        with self._fewer:
            self._used -= item.listed.size
            self._fewer.notify_all()
