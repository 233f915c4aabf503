"""Ctrl-C and SIGTERM: the first finishes what is in flight, the second ends at once.

Python calls signal handlers in the main thread between two of its own instructions, so a handler has to wait
for a network that computes for half a minute in one call. A thread hears of signals at once instead
(`signal.set_wakeup_fd`), and the main thread waits for it where it comes to run its handler.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)
END = b"\0"  # the number of no signal
HEARD = 1.0  # seconds at most until a thread has heard of a signal


class Interrupts:
    """Sets `stop` on the first signal, while it is entered.

    Args:
        stop: What the run looks at.
        at_once: Called before a second signal ends the process.
        copies: How often one Ctrl-C arrives: torchrun passes on what the terminal has sent already.
        announce: Say on stderr that it will stop.
        first: Called after `stop` was set, in a thread.
    """

    def __init__(
        self,
        stop: threading.Event,
        at_once: Callable[[], None],
        copies: int = 1,
        announce: bool = True,
        first: Callable[[], None] = lambda: None,
    ) -> None:
        self.number = 0  # of the first signal; 0 when there was none
        self._received = 0
        self._stop = stop
        self._at_once = at_once
        self._first = first
        self._copies = copies
        self._announce = announce
        self._getting_ready = False
        self._leave = contextlib.ExitStack()

    def __enter__(self) -> Interrupts:
        if threading.current_thread() is threading.main_thread():
            reader, writer = os.pipe()
            os.set_blocking(writer, False)
            thread = threading.Thread(target=self._listen, args=(reader,), daemon=True)
            thread.start()
            before = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
            self._leave.callback(os.close, reader)
            self._leave.callback(os.close, writer)
            self._leave.callback(thread.join)
            self._leave.callback(os.write, writer, END)
            self._leave.callback(signal.set_wakeup_fd, before)
            for number in SIGNALS:
                self._leave.callback(signal.signal, number, signal.signal(number, self._wait))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._leave.close()

    @contextlib.contextmanager
    def getting_ready(self) -> Iterator[None]:
        """In this block the first signal ends the process at once: its work leaves nothing half done."""
        self._getting_ready = True
        try:
            yield
        finally:
            self._getting_ready = False

    def _wait(self, *_: Any) -> None:
        """In the main thread: go on once the thread has heard, so that what comes next sees `stop`."""
        self._stop.wait(HEARD)

    def _listen(self, reader: int) -> None:
        while (byte := os.read(reader, 1)) != END:
            if byte[0] in SIGNALS:
                self._handle(byte[0])

    def _handle(self, number: int) -> None:
        self._received += 1
        if self._getting_ready or self._received > self._copies:
            self._at_once()
            self._say(
                "Stopped while getting ready. The same command goes on from here." * self._getting_ready
            )
            os._exit(128 + (self.number or number))
        if self.number:
            return
        self.number = number
        self._stop.set()
        self._say("Stopping after what is being computed now. Ctrl-C again stops at once.")
        self._first()

    def _say(self, text: str) -> None:
        """Write a line past all buffers, in place of a progress bar, and give the cursor back."""
        if sys.stderr.isatty():
            os.write(2, b"\r\x1b[2K\x1b[?25h")
        if text and self._announce:
            os.write(2, text.encode() + b"\n")
