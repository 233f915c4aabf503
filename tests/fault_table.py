"""The table of faults: how many tries of each row were made, and how many were survived.

`make test-faults` (SEGCLI_FAULTS=full) makes the full number of tries, and prints the table at the end.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from typing import Any

import pytest

FULL = os.environ.get("SEGCLI_FAULTS") == "full"
FIGURES: dict[str, list[bool]] = {}  # row and fault -> one value per try: whether it was survived


def tries(full: int, sample: int) -> int:
    return full if FULL else sample


class Row(contextlib.ContextDecorator):
    """One try of a row, as a block or as a whole test; one that raises was not survived.

    Args:
        name: The number of the row, and the fault.
    """

    def __init__(self, name: str) -> None:
        self.results = FIGURES.setdefault(name, [])

    def __call__(self, test: Callable[..., Any]) -> Callable[..., Any]:
        return pytest.mark.faults(super().__call__(test))

    def __enter__(self) -> None:
        self.results.append(False)

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        self.results[-1] = kind is None


def table() -> str:
    """What was tried so far, by row."""
    lines = ["| row | fault | tries | survived |", "|---|---|---|---|"]
    for name, results in sorted(FIGURES.items(), key=lambda item: int(item[0].split()[0])):
        if results:
            number, _, fault = name.partition(" ")
            lines.append(f"| {number} | {fault} | {len(results)} | {sum(results)} |")
    return "\n".join(lines)
