"""Ctrl-C and SIGTERM: the first finishes what is in flight, the second ends at once."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType, TracebackType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupts:
    """Sets `stop` on the first signal, while it is entered.

    Args:
        stop: What the run looks at.
        at_once: Called before a second signal ends the process.
        copies: How often one Ctrl-C arrives: torchrun passes on what the terminal has sent already.
        announce: Say on stderr that it will stop.
    """

    def __init__(
        self, stop: threading.Event, at_once: Callable[[], None], copies: int = 1, announce: bool = True
    ) -> None:
        self.number = 0  # of the first signal; 0 when there was none
        self._received = 0
        self._stop = stop
        self._at_once = at_once
        self._copies = copies
        self._announce = announce
        self._process = os.getpid()
        self._getting_ready = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Interrupts:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._handle) for number in SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @contextlib.contextmanager
    def getting_ready(self) -> Iterator[None]:
        """In this block the first signal ends the process at once: the work in it leaves nothing half done.

        An exception would not do: libraries in C swallow it, or turn it into another one.
        """
        self._getting_ready = True
        try:
            yield
        finally:
            self._getting_ready = False

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:  # a child that was forked just now and has no handler of its own yet
            return
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

    def _say(self, text: str) -> None:
        """Write a line past all buffers, in place of a progress bar, and give the cursor back."""
        if sys.stderr.isatty():
            os.write(2, b"\r\x1b[2K\x1b[?25h")
        if text and self._announce:
            os.write(2, text.encode() + b"\n")
