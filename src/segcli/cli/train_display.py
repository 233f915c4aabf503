"""What one sees of a training: two live lines on a terminal, a line per epoch everywhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable
from types import TracebackType
from typing import TYPE_CHECKING, Any

from segcli.cli.terminal import Terminal

if TYPE_CHECKING:
    from rich.console import RenderableType

    from segcli.training.loop import Progress

LINE_EVERY = 60.0  # seconds between two lines about the progress of an epoch, where there is no terminal
SCORES = {"mean_iou": "mean IU", "pixel_accuracy": "pixel accuracy", "accuracy": "accuracy"}


class Display:
    """Shows a training while it is entered.

    Args:
        terminal: Where to.
        epochs: How many there will be.
        history: Log records of the epochs before.
        score: The key of the score that counts.
    """

    def __init__(
        self, terminal: Terminal, epochs: int, history: Iterable[dict[str, Any]], score: str
    ) -> None:
        self.terminal = terminal
        self.epochs = epochs
        self.score = score
        self.scored = [record for record in history if score in record]
        self.last_line = time.monotonic()
        self.live = _live(terminal) if sys.stderr.isatty() and not terminal.quiet else None

    def __enter__(self) -> Display:
        if self.live is not None:
            self.live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self.live is not None:
            self.live.stop()

    def checked(self, done: int, count: int) -> None:
        """One more file of the data was looked at."""
        self._bar("checking data", done, count, "files", "")

    def validated(self, done: int, count: int) -> None:
        """One more image was validated."""
        self._bar("validating", done, count, "images", "")

    def trained(self, progress: Progress) -> None:
        """One more batch was trained on."""
        epoch = f"epoch {progress.epoch + 1}/{self.epochs}"
        speed = f"{progress.images_per_second:.1f} images/s"
        left = duration(progress.seconds_left) + " left"
        self._bar(epoch, progress.batch, progress.batches, f"batches  {speed}", left)
        parts = [f"loss {number(progress.loss)}", f"learning rate {progress.lr:.2g}"]
        if self.scored:
            best = max(self.scored, key=lambda record: record[self.score])
            parts.append(f"{SCORES[self.score]} {100 * self.scored[-1][self.score]:.1f}")
            parts.append(f"best {100 * best[self.score]:.1f} in epoch {best['epoch']}")
        if self.live is not None:
            self.live.note = "   ".join(parts)
        elif time.monotonic() - self.last_line > LINE_EVERY:
            self.last_line = time.monotonic()
            where = f"{epoch}, batch {progress.batch}/{progress.batches}"
            self.terminal.say(f"  {where}  {parts[0]}  {speed}  {left}")

    def finished_epoch(self, record: dict[str, Any]) -> None:
        """An epoch is over."""
        if self.score in record:
            self.scored.append(record)
        parts = [f"epoch {record['epoch']:>3}/{self.epochs}", f"loss {number(record['loss'])}"]
        parts += [f"{SCORES[key]} {100 * record[key]:.1f}" for key in SCORES if key in record]
        self.terminal.say("  ".join([*parts, duration(record["seconds"])]))
        self.last_line = time.monotonic()

    def _bar(self, what: str, done: int, count: int, unit: str, right: str) -> None:
        if self.live is not None:
            self.live.show(what, done, count, unit, right)


def number(loss: float) -> str:
    """A loss; a summed one is large."""
    return f"{loss:.4f}" if loss < 1000 else f"{loss:.4g}"


def duration(seconds: float) -> str:
    """A length of time in two digits or so."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _live(terminal: Terminal) -> Any:
    """A progress bar with a line of text below."""
    from rich.progress import BarColumn, Progress, TextColumn
    from rich.text import Text

    class Live(Progress):
        note = ""

        def get_renderables(self) -> Iterable[RenderableType]:
            yield self.make_tasks_table(self.tasks)
            yield Text(self.note, no_wrap=True, overflow="ellipsis")

        def show(self, what: str, done: int, count: int, unit: str, right: str) -> None:
            self.update(line, description=what, completed=done, total=count, unit=unit, right=right)

    live = Live(
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=None),
        TextColumn("{task.completed:.0f}/{task.total:.0f} {task.fields[unit]}", markup=False),
        TextColumn("{task.fields[right]}", markup=False),
        console=terminal.console,
        transient=True,
        expand=True,
    )
    line = live.add_task("getting ready", total=1, unit="", right="")
    return live
