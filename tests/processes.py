"""Real `segcli` processes that start in an instant: forked from one that has imported everything.

Every process leads its own group, as one started from a shell does, so that it can be killed as a whole.
"""

from __future__ import annotations

import functools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

SERVER = """
import json, os, sys
import torch, torchvision
import segcli.cli, segcli.device, segcli.inference.engine, segcli.inference.segmentation
torch.set_num_threads(1)  # no thread may exist before a fork

def child(job):
    os.setpgid(0, 0)
    os.chdir(job["folder"])
    for number, name in ((1, job["stdout"]), (2, job["stderr"])):
        os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.environ.update(job["environment"])
    exec(job["before"], {})
    try:
        segcli.cli.main(job["arguments"])
        code = 0
    except SystemExit as exit:
        code = exit.code or 0
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)

for line in sys.stdin:
    job = json.loads(line)
    if "wait" in job:
        _, status = os.waitpid(job["wait"], 0)
        print(os.waitstatus_to_exitcode(status), flush=True)
    elif pid := os.fork():
        try:
            os.setpgid(pid, pid)  # whoever hears of it may kill the group
        except OSError:
            pass  # it has done so itself, and maybe has ended
        print(pid, flush=True)
    else:
        child(job)
"""


@functools.cache
def _server() -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-c", SERVER],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment,
    )  # fmt: skip


def _ask(job: dict[str, Any]) -> int:
    server = _server()
    assert server.stdin is not None
    assert server.stdout is not None
    server.stdin.write(json.dumps(job) + "\n")
    server.stdin.flush()
    return int(server.stdout.readline())


class Process:
    """One running `segcli`.

    Args:
        arguments: Of the command line.
        folder: Where it runs; its output is kept in `folder`/stdout and stderr.
        before: Python that it executes first.
        environment: Added to the environment.
    """

    def __init__(self, *arguments: object, folder: Path, before: str = "", **environment: str) -> None:
        self.stdout, self.stderr = (folder / f"{name}-{time.monotonic_ns()}.log" for name in ("out", "err"))
        self.pid = _ask(
            {
                "arguments": [str(argument) for argument in arguments],
                "folder": str(folder),
                "stdout": str(self.stdout),
                "stderr": str(self.stderr),
                "before": before,
                "environment": environment,
            }
        )

    def send(self, number: signal.Signals) -> None:
        """Send a signal to the process alone."""
        os.kill(self.pid, number)

    def kill_group(self) -> None:
        """Power off: kill the process and all that it started."""
        os.killpg(self.pid, signal.SIGKILL)

    def wait(self) -> int:
        """The exit code, or minus the number of the signal that ended it."""
        return _ask({"wait": self.pid})

    @property
    def errors(self) -> str:
        return self.stderr.read_text()

    def has_ended(self) -> bool:
        """Whether the process itself has ended, before or after `wait`."""
        return self.pid not in self.members()

    def members(self) -> list[int]:
        """The processes of its group that have not ended."""
        found = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdecimal():
                try:
                    state, _, group, *_ = (entry / "stat").read_text().rpartition(")")[2].split()
                except OSError:
                    continue
                if int(group) == self.pid and state != "Z":
                    found.append(int(entry.name))
        return found

    def group_is_gone(self) -> bool:
        """Whether no process of its group is left."""
        return not self.members()


def run(*arguments: object, folder: Path, before: str = "", **environment: str) -> tuple[int, str]:
    """Run `segcli` to its end: exit code and what it said on stderr."""
    process = Process(*arguments, folder=folder, before=before, **environment)
    return process.wait(), process.errors


def wait_until(condition: Callable[[], bool], seconds: float = 120) -> None:
    """Look every few milliseconds until the condition holds."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError("it never came true")
        time.sleep(0.005)
