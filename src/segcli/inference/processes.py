"""Several processes that compute, and one that knows the inputs and keeps the record.

                       -> station ->
    discover -> todo   -> station ->   manifest, progress
                       -> station ->

Inputs are handed out one by one to whoever holds the fewest, so that a slow device gets less, and never more
than keeps a station busy. A station that dies is replaced, and what it held is done again, alone:
so an input that takes a station down is found, and costs itself only.
"""

from __future__ import annotations

import contextlib
import subprocess
import sys
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection, Pipe, wait
from typing import Any

from segcli.errors import MachineError
from segcli.inference.ahead import LOOK, Ahead
from segcli.inference.children import how_ended, start_process
from segcli.inference.finishing import failed
from segcli.inference.pipeline import Note, Task, Work
from segcli.inference.sources import Input
from segcli.inference.station import Message
from segcli.inference.storage import absolute

PROGRAM = (sys.executable, "-P", "-m", "segcli.inference.station")
TRIES = 3  # that an input gets alone, after it was held by a station that died


@dataclass(eq=False)
class _Member:
    """A station, and what it was given."""

    start: Callable[[], Work[Any]]
    process: subprocess.Popen[bytes]
    connection: Connection[Any, Any]
    most: int = 0  # inputs that keep it busy; 0 while it is getting ready
    held: dict[str, Input] = field(default_factory=dict)  # by absolute source
    finishing: bool = False  # was told that it gets no more
    ended: bool = False

    def tell(self, command: str, *arguments: Any) -> None:
        """Call a method of `station.Station`. A station that has died does not mind."""
        with contextlib.suppress(OSError):
            self.connection.send((command, *arguments))


class Processes:
    """Stations on this machine, see `engine.Helpers`. They do one run.

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
        self._members: list[_Member] = []
        self._suspects: deque[Input] = deque()  # held by a station when it died
        self._tries: Counter[str] = Counter()  # of suspects, by absolute source
        self._failed_starts = 0
        self._all_lived = True

    def work_through(
        self,
        task: Task[Any],
        todo: Ahead[Input],
        note: Note,
        ready: Callable[[], None],
        stop: threading.Event,
    ) -> bool:
        self._announce()
        for start in self._starts:
            self._members.append(self._begin(start))
        more, told = True, False
        while True:
            if stop.is_set() and not told:
                told = True
                for member in self._members:
                    member.tell("stop")
                    member.ended |= not member.most  # one that is still getting ready holds nothing
            if not told:
                more = self._hand_out(todo, more)
                if not (more or self._suspects):
                    self._finish()
            left = more or self._suspects or any(member.held for member in self._members)
            if all(member.ended for member in self._members) or not (told or left):
                return self._all_lived
            for member, (kind, *content) in self._hear(LOOK):
                if kind == "ready":
                    member.most, self._failed_starts = content[0], 0
                    ready()
                elif kind == "note":
                    source, *entry_and_files = content
                    note(member.held.pop(source).source, *entry_and_files)
                    self._tries.pop(source, None)
                elif kind == "lost" and not told:
                    self._replace(member, content[0], note)
                elif kind == "ended" and content[0] is not None:
                    raise content[0]
                else:
                    member.ended, member.held = True, {}

    def _hand_out(self, todo: Ahead[Input], more: bool) -> bool:
        """Give inputs to whoever has room, suspects alone; False when there are no more but suspects."""
        while (member := self._freest()) is not None:
            item = None
            if self._suspects and not member.held:
                item = self._suspects.popleft()
            elif more:
                try:
                    item = todo.poll(0)
                except StopIteration:
                    more = False
            if item is None:
                break
            source = absolute(item.source)
            member.held[source] = item
            member.tell("give", [replace(item, source=source)])
        return more

    def _finish(self) -> None:
        """Tell the stations that nothing comes any more: they need not wait for what would fill a batch."""
        for member in self._members:
            if not member.finishing:
                member.finishing = True
                member.tell("finish")

    def _freest(self) -> _Member | None:
        """The station with room that holds the fewest inputs; one with a suspect has no room for others."""
        free = [
            member
            for member in self._members
            if len(member.held) < member.most
            and not (member.ended or member.finishing)
            and not member.held.keys() & self._tries.keys()
        ]
        return min(free, key=lambda member: len(member.held), default=None)

    def _replace(self, member: _Member, how: str, note: Note) -> None:
        """Start a station in place of one that has died, and suspect what it held.

        Raises:
            MachineError: They die before they are ready.
        """
        self._failed_starts += not member.most
        if self._failed_starts > 2 * len(self._members):
            raise MachineError(f"the processes that compute do not start ({how})")
        for source, item in member.held.items():
            self._tries[source] += 1
            if self._tries[source] > TRIES and len(member.held) == 1:
                del self._tries[source]
                reason = f"computing it takes the process down ({how})"
                note(item.source, failed(self._task.model, item.source, reason))
            else:
                self._suspects.append(item)
        self._members[self._members.index(member)] = self._begin(member.start)

    def _begin(self, start: Callable[[], Work[Any]]) -> _Member:
        ours, theirs = Pipe()
        with theirs:
            process = start_process(self._program, theirs.fileno())
        with contextlib.suppress(OSError):  # it has died; `_hear` finds out
            ours.send((self._task, start))
        return _Member(start, process, ours)

    def _hear(self, seconds: float) -> Iterator[tuple[_Member, Message]]:
        """What stations tell within that time; ("lost", how) from one that has died, once."""
        members = {member.connection: member for member in self._members if not member.connection.closed}
        for connection in wait(list(members), seconds):
            assert isinstance(connection, Connection)
            member = members[connection]
            try:
                yield member, connection.recv()
            except (EOFError, OSError):
                connection.close()
                self._all_lived = False
                yield member, ("lost", how_ended(member.process.wait()))

    def kill(self) -> None:
        """End all of them at once."""
        for member in self._members:
            member.process.kill()

    def close(self) -> None:
        """End all of them, and wait for that."""
        self.kill()
        for member in self._members:
            member.process.wait()
            member.connection.close()
