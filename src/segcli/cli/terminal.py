"""What people see: text, tables and progress on stderr; one JSON document on stdout when asked for."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress


class Terminal:
    """Where a command talks to people (stderr) and to programs (stdout).

    Args:
        quiet: Only warnings and errors.
        json: `document` prints to stdout; without it, it prints nothing.
        answers: What the command says is its result, as with `models list`: it goes to stdout, so that
            it can be piped, unless a JSON document goes there.
    """

    def __init__(self, quiet: bool = False, json: bool = False, answers: bool = False) -> None:
        self.quiet = quiet
        self.json = json
        self.to_stdout = answers and not json

    @property
    def console(self) -> Console:
        """Where progress is shown: stderr."""
        from rich.console import Console

        return Console(stderr=True, quiet=self.quiet, highlight=False, soft_wrap=True)

    def say(self, text: str) -> None:
        """A line for people. Nothing in it is interpreted as markup."""
        if not self.quiet:
            print(printable(text), file=sys.stdout if self.to_stdout else sys.stderr)

    def warn(self, text: str) -> None:
        """A line that is shown even with --quiet."""
        print(printable(text), file=sys.stderr)

    def table(self, columns: Sequence[str], rows: Sequence[Sequence[str]], title: str | None = None) -> None:
        """A table: the first column is left-aligned text, the others are right-aligned."""
        from rich import box
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        table = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left", pad_edge=False)
        for number, column in enumerate(columns):
            table.add_column(column, justify="left" if number == 0 else "right")
        for row in rows:
            table.add_row(*(Text(printable(cell)) for cell in row))
        Console(stderr=not self.to_stdout, quiet=self.quiet, highlight=False, soft_wrap=True).print(table)

    def document(self, content: dict[str, Any]) -> None:
        """The command's result for programs: one JSON document on stdout, with --json only."""
        if self.json:
            print(json.dumps(content, indent=2, ensure_ascii=True))

    def progress(self, unit: str = "images") -> Progress:
        """A progress bar with rate and time left; add a task to it with `add_task`."""
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        return Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]} " + unit + "/s"),
            TimeRemainingColumn(compact=True),
            console=self.console,
            transient=True,
            disable=self.quiet or not sys.stderr.isatty(),
        )


def printable(text: str) -> str:
    """Text that cannot disturb a terminal: control and undecodable characters are escaped."""
    clean = text.encode("utf-8", "backslashreplace").decode("utf-8")
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in clean)
