"""Options of the test run, and what it says at its end."""

from __future__ import annotations

import fault_table
import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--regenerate", action="store_true", help="write golden files anew (then look at them)")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if fault_table.FULL:
        terminalreporter.write_line(fault_table.table())
