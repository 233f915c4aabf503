"""Several processes that compute, and one that knows the inputs and keeps the record.

                       -> station ->
    discover -> todo   -> station ->   manifest, progress
                       -> station ->

`share_out` hands out inputs one by one to whoever holds the fewest, so that a slow device gets less, and
never more than keeps a station busy. A station that dies is replaced, and what it held is done again, alone:
so an input that takes a station down is found, and costs itself only.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection, Pipe, wait
from pathlib import Path
from typing import Any, Protocol

import segcli
from segcli.errors import MachineError
from segcli.inference.ahead import LOOK, Ahead
from segcli.inference.pipeline import Note, Task, Work, failed
from segcli.inference.sources import Input
from segcli.inference.station import Message
from segcli.inference.storage import absolute

PROGRAM = (sys.executable, "-P", "-m", "segcli.inference.station")
TRIES = 3  # that an input gets alone, after it was held by a station that died


class Crew(Protocol):
    """Stations, by number."""

    def start(self) -> int:
        """Start them all, and say how many there are."""

    def tell(self, member: int, command: str, *arguments: Any) -> None:
        """Call a method of `station.Station`. A station that has died does not mind."""

    def hear(self, seconds: float) -> Iterator[tuple[int, Message]]:
        """What stations tell within that time; ("lost", how) from one that has died, once."""

    def replace(self, member: int) -> None:
        """Start a station in place of one that has died."""

    def kill(self) -> None:
        """End all of them at once."""

    def close(self) -> None:
        """End all of them, and wait for that."""


@dataclass
class _Member:
    most: int = 0  # inputs that keep it busy; 0 while it is getting ready
    held: dict[str, Input] = field(default_factory=dict)  # by absolute source
    ended: bool = False


def share_out(
    task: Task[Any],
    todo: Ahead[Input],
    crew: Crew,
    note: Note,
    ready: Callable[[], None],
    stop: threading.Event,
) -> bool:
    """Let a crew do all of `todo`, and note it.

    Args:
        task: What is done.
        todo: The inputs.
        crew: The stations, not started yet.
        note: Gets the entry of every input.
        ready: Called when the first station begins.
        stop: Set by anyone to end early.

    Returns:
        Whether all stations have lived: one that dies may leave files half written, under temporary names.

    Raises:
        UsageError: A station cannot use the model or the device.
        MachineError: Nothing can be written, or stations do not start.
    """
    members = [_Member() for _ in range(crew.start())]
    suspects: deque[Input] = deque()  # held by a station when it died
    tries: Counter[str] = Counter()
    more = True
    told = False
    all_lived = True
    failed_starts = 0
    while True:
        if stop.is_set() and not told:
            told = True
            for number, member in enumerate(members):
                crew.tell(number, "stop")
                member.ended |= not member.most  # one that is still getting ready holds nothing
        while not told and (free := _freest(members, tries)) is not None:
            item = None
            if suspects and not members[free].held:
                item = suspects.popleft()
            elif more:
                try:
                    item = todo.poll(0)
                except StopIteration:
                    more = False
            if item is None:
                break
            source = absolute(item.source)
            members[free].held[source] = item
            crew.tell(free, "give", [replace(item, source=source)])
        holding = any(member.held for member in members)
        if all(member.ended for member in members) or not (told or more or suspects or holding):
            return all_lived

        for number, (kind, *content) in crew.hear(LOOK):
            member = members[number]
            all_lived &= kind != "lost"
            if kind == "ready":
                member.most, failed_starts = content[0], 0
                ready()
            elif kind == "note":
                source, *entry_and_files = content
                note(member.held.pop(source).source, *entry_and_files)
                tries.pop(source, None)
            elif kind == "ended":
                if content[0] is not None:
                    raise content[0]
                member.ended, member.held = True, {}
            elif told:
                member.ended, member.held = True, {}
            else:
                failed_starts += not member.most
                if failed_starts > 2 * len(members):
                    raise MachineError(f"the processes that compute do not start ({content[0]})")
                for source, item in member.held.items():
                    tries[source] += 1
                    if tries[source] > TRIES and len(member.held) == 1:
                        del tries[source]
                        note(
                            item.source,
                            failed(task, item.source, f"computing it takes the process down ({content[0]})"),
                        )
                    else:
                        suspects.append(item)
                members[number] = _Member()
                crew.replace(number)


def _freest(members: Sequence[_Member], suspects: Mapping[str, int]) -> int | None:
    """The member with room that holds the fewest inputs; one with a suspect has no room for others."""
    free = [
        number
        for number, member in enumerate(members)
        if len(member.held) < member.most and not member.ended and not member.held.keys() & suspects.keys()
    ]
    return min(free, key=lambda n: len(members[n].held), default=None)


class Processes:
    """Stations on this machine, see `Crew` and `engine.Helpers`.

    Args:
        task: What is done.
        starts: What gives the work, for every station. It is sent to it.
        announce: Called before they are started.
        program: The command that starts a station; the number of its connection is appended.
    """

    def __init__(
        self,
        task: Task[Any],
        starts: Sequence[Callable[[], Work[Any]]],
        announce: Callable[[], None] = lambda: None,
        program: Sequence[str] = PROGRAM,
    ) -> None:
        # A closure of the command line cannot be sent, and every station has its own start.
        self._task = replace(task, start=starts[0])
        self._starts = starts
        self._announce = announce
        self._program = program
        self._processes: list[subprocess.Popen[bytes]] = []
        self._connections: list[Connection[Any, Any]] = []

    def work_through(
        self,
        task: Task[Any],
        todo: Ahead[Input],
        note: Note,
        ready: Callable[[], None],
        stop: threading.Event,
    ) -> bool:
        return share_out(task, todo, self, note, ready, stop)

    def start(self) -> int:
        self._announce()
        for start in self._starts:
            process, connection = self._begin(start)
            self._processes.append(process)
            self._connections.append(connection)
        return len(self._starts)

    def replace(self, member: int) -> None:
        self._processes[member], self._connections[member] = self._begin(self._starts[member])

    def _begin(self, start: Callable[[], Work[Any]]) -> tuple[subprocess.Popen[bytes], Connection[Any, Any]]:
        ours, theirs = Pipe()
        paths = [str(Path(segcli.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
        with theirs:
            process = subprocess.Popen(
                [*self._program, str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,  # its errors come as messages
            )
        with contextlib.suppress(OSError):  # it has died; `hear` finds out
            ours.send((self._task, start))
        return process, ours

    def tell(self, member: int, command: str, *arguments: Any) -> None:
        with contextlib.suppress(OSError):
            self._connections[member].send((command, *arguments))

    def hear(self, seconds: float) -> Iterator[tuple[int, Message]]:
        for connection in wait([one for one in self._connections if not one.closed], seconds):
            assert isinstance(connection, Connection)
            member = self._connections.index(connection)
            try:
                yield member, connection.recv()
            except (EOFError, OSError):
                connection.close()
                yield member, ("lost", _how(self._processes[member].wait()))

    def kill(self) -> None:
        for process in self._processes:
            process.kill()

    def close(self) -> None:
        """End all of them, and wait for that."""
        self.kill()
        for process, connection in zip(self._processes, self._connections, strict=True):
            process.wait()
            connection.close()


def _how(code: int) -> str:
    return f"ended by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
