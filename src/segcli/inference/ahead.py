"""An iterator that runs ahead in a thread of its own, a bounded number of items."""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Generator, Iterator
from typing import Generic, TypeVar

T = TypeVar("T")
LOOK = 0.1  # seconds; how often a waiting thread looks whether it is still wanted


class Ahead(Generic[T], Iterator[T]):
    """Pull from `items` in the background, at most `size` items ahead.

    An error of `items` is raised where the items are used. When `stop` is set both sides end, and what is
    in between is dropped.
    """

    def __init__(self, items: Iterator[T], size: int, stop: threading.Event) -> None:
        # Twice Python's simple queue: the other one takes a good part of the time of a small image.
        self._queue: queue.SimpleQueue[T] = queue.SimpleQueue()
        self._room: queue.SimpleQueue[None] = queue.SimpleQueue()  # for how many items there is room
        # Room is made for several at once: for every single one the two threads would wake each other.
        self._lot = max(1, size // 2)
        self._taken = 0  # items for which no room was made yet
        self._make_room(size)
        self._stop = stop
        self._ended = threading.Event()
        self._error: BaseException | None = None
        self._held: T | None = None
        self.thread = threading.Thread(target=self._run, args=(items,), daemon=True)
        self.thread.start()

    def _run(self, items: Iterator[T]) -> None:
        try:
            for item in items:
                while not self._stop.is_set():
                    with contextlib.suppress(queue.Empty):
                        self._room.get(timeout=LOOK)
                        break
                if self._stop.is_set():
                    return
                self._queue.put(item)
        except BaseException as error:  # handed to the thread that uses the items
            self._error = error
        finally:
            if isinstance(items, Generator):
                items.close()
            self._ended.set()

    def wait(self) -> bool:
        """Wait until there is an item; False when there is none at all. Nothing is taken away."""
        self._held = next(self, None)
        return self._held is not None

    def __next__(self) -> T:
        while True:
            if (item := self.poll(LOOK)) is not None:
                return item

    def poll(self, seconds: float) -> T | None:
        """The next item, or None when there is none within that time. Raises StopIteration at the end."""
        if self._stop.is_set():
            raise StopIteration
        if self._held is not None:
            item, self._held = self._held, None
            return item
        ended = self._ended.is_set()  # asked before the queue, so that no last item is missed
        try:
            item = self._queue.get(timeout=seconds) if seconds and not ended else self._queue.get_nowait()
        except queue.Empty:
            if not ended:
                return None
            if self._error is not None:
                raise self._error from None
            raise StopIteration from None
        self._taken += 1
        if self._taken == self._lot:
            self._taken = 0
            self._make_room(self._lot)
        return item

    def _make_room(self, count: int) -> None:
        for _ in range(count):
            self._room.put(None)
