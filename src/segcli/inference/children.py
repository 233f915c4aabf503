"""Processes of segcli's own that serve another one of them."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Sequence
from pathlib import Path

import segcli


def start_process(program: Sequence[str], channel: int, **environment: str) -> subprocess.Popen[bytes]:
    """Start a process that finds this very segcli and says nothing to the terminal.

    They are started anew rather than forked, because torch's threads do not survive a fork.

    Args:
        program: Its command; the number of `channel` is appended.
        channel: The file descriptor over which it talks.
        environment: Further variables.
    """
    paths = [str(Path(segcli.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    return subprocess.Popen(
        [*program, str(channel)],
        pass_fds=[channel],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), **environment},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,  # libraries complain there; errors come as messages
    )


def how_ended(code: int) -> str:
    """The exit code of such a process, in words."""
    return f"ended by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
