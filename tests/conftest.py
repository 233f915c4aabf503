"""Options of the test run, and what it says at its end."""

from __future__ import annotations

import os
from pathlib import Path

import fault_table
import pytest

# With OpenVINO in the process, later tests died in its libraries: these run alone.
OPENVINO = ("test_openvino.py", "test_int8.py")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--openvino", action="store_true", help="run the tests of OpenVINO, and only these")
    parser.addoption("--regenerate", action="store_true", help="write golden files anew (then look at them)")


def pytest_configure(config: pytest.Config) -> None:
    # Where Python may not keep what it compiles, every process that a test starts would compile all anew.
    if os.environ.pop("PYTHONDONTWRITEBYTECODE", None):
        assert config.cache is not None
        os.environ["PYTHONPYCACHEPREFIX"] = str(config.cache.mkdir("compiled"))


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    is_test = collection_path.match("test_*.py")
    return (is_test and (collection_path.name in OPENVINO) != config.getoption("--openvino")) or None


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if fault_table.FULL:
        terminalreporter.write_line(fault_table.table())
