"""A download as people see it: what is fetched, and a bar of bytes."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from segcli.cli.terminal import Terminal
from segcli.models.zoo import find_model

if TYPE_CHECKING:
    from rich.progress import Progress


def get_model(name_or_path: str, terminal: Terminal, offline: bool = False) -> Path:
    """The file of a model; a published one is downloaded on first use, after saying how much it is."""
    with Downloading(terminal) as watch:
        return find_model(name_or_path, offline, watch)


class Downloading:
    """A `downloads.Watch` on the terminal. The bar comes with the first bytes, so it costs nothing before."""

    def __init__(self, terminal: Terminal) -> None:
        self.terminal = terminal
        self.bar: Progress | None = None

    def __enter__(self) -> Downloading:
        return self

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:
            self.bar.stop()

    def say(self, text: str) -> None:
        self.terminal.say(text)

    def progress(self, done: int, total: int | None) -> None:
        if self.bar is None:
            self.bar = _bar(self.terminal)
            self.bar.start()
        (task,) = self.bar.task_ids
        self.bar.update(task, completed=done, total=total)


def _bar(terminal: Terminal) -> Progress:
    from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

    bar = Progress(
        BarColumn(),
        DownloadColumn(binary_units=True),
        TransferSpeedColumn(),
        TimeRemainingColumn(compact=True),
        console=terminal.console,
        transient=True,
        disable=terminal.quiet or not sys.stderr.isatty(),
    )
    bar.add_task("")
    return bar
