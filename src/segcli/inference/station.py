"""A process that computes for another one: it gets inputs and gives back entries for the manifest.

    python -m segcli.inference.station FD      one of those of `--processes`, see `processes.py`

It runs the pipeline of `pipeline.py` in a thread, as the engine does in its main thread.
"""

from __future__ import annotations

import os
import queue
import signal
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.connection import Connection
from typing import Any

from segcli.errors import MachineError, SegcliError
from segcli.inference.ahead import Ahead
from segcli.inference.decoders import Decoders
from segcli.inference.finishing import NO_FILES
from segcli.inference.manifest import Entry
from segcli.inference.pipeline import Task, Work, work_through
from segcli.inference.sources import Input

# ("ready", how many inputs keep it busy) | ("note", source, Entry, files for a tar)
# | ("ended", None or what went wrong)
Message = tuple[Any, ...]


class Station:
    """The pipeline in a thread of its own.

    Args:
        task: What is done.
        start: Gives the work.
        tell: Gets messages, from several threads.
    """

    def __init__(
        self, task: Task[Any], start: Callable[[], Work[Any]], tell: Callable[[Message], None]
    ) -> None:
        self._task = task
        self._prepare = start
        self._tell = tell
        self._inputs: queue.SimpleQueue[Input | None] = queue.SimpleQueue()
        self._stop = threading.Event()
        threading.Thread(target=self._run, daemon=True).start()

    def give(self, items: Sequence[Input]) -> None:
        """More inputs."""
        for item in items:
            self._inputs.put(item)

    def finish(self) -> None:
        """There are no more inputs."""
        self._inputs.put(None)

    def stop(self) -> None:
        """Finish what is being computed, and drop the others."""
        self._stop.set()
        self.finish()

    def _run(self) -> None:
        task, stop = self._task, self._stop
        error: SegcliError | None = None
        decoders = Decoders(
            task.workers, task.reader, stop, remote=task.sources.may_be_remote, memory=task.memory
        )
        try:
            work_through(
                task, Ahead(iter(self._inputs.get, None), 1, stop), decoders, self._start, self._note, stop
            )
        except SegcliError as raised:
            error = raised
        except BaseException as raised:  # told where it is seen
            error = MachineError(f"a process that computes has failed: {raised!r}")
        self._tell(("ended", error))

    def _start(self) -> Work[Any]:
        work = self._prepare()
        self._tell(("ready", work.held + self._task.workers + 2))
        return work

    def _note(self, source: str, entry: Entry, files: Mapping[str, bytes] = NO_FILES, /) -> None:
        self._tell(("note", source, entry, files))


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent decides
    connection = Connection(int(sys.argv[1]))
    lock = threading.Lock()

    def tell(message: Message) -> None:
        with lock:
            try:
                connection.send(message)
            except OSError:  # nobody is there any more
                os._exit(1)

    try:
        task, start = connection.recv()
        station = Station(task, start, tell)
        while True:
            command, *arguments = connection.recv()
            getattr(station, command)(*arguments)
    except EOFError:
        os._exit(0)  # what is being written is complete under its final name, or not there


if __name__ == "__main__":
    main()
