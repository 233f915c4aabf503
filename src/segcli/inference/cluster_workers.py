"""What runs on the machines of a Ray cluster: an actor that reads, and one that computes and writes.

    portions of inputs -> Reading -> portions of pictures -> Segmenting -> what was noted

Both call the functions of the local engine (`decoders.py`, `pipeline.py`). What goes from one to the next is
a table with one column and one row, which holds a pickle. Errors that end the run are noted like entries:
so they arrive as they are, and Ray does not take them for something to be tried again.
"""

from __future__ import annotations

import functools
import itertools
import pickle
import queue
import socket
import tempfile
import threading
import time
from collections.abc import Generator, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import ray
import ray.data
from ray.data.block import BlockMetadata
from ray.data.datasource import Datasource, ReadTask

from segcli import __version__
from segcli.errors import MachineError, SegcliError
from segcli.files import sha256, write_atomic
from segcli.inference.ahead import Ahead
from segcli.inference.cluster import Places, here
from segcli.inference.decoders import Decoded, Decoders
from segcli.inference.finishing import NO_FILES
from segcli.inference.layout import RUN_FILE, RUN_FOLDER
from segcli.inference.manifest import Entry
from segcli.inference.pipeline import Task, Work, compute_and_write, readable
from segcli.inference.plan import Plan
from segcli.inference.sources import Input
from segcli.memory import memory_of

LARGEST = 64 << 20  # bytes of pictures that go from one actor to the next at once, or one picture
TELL_EVERY = 1.0  # seconds after which an actor tells what it has done so far
COLUMN = "pickle"

# The source, its entry and files for a tar, or what ends the run.
Noted = tuple[str, Entry, Mapping[str, bytes]] | SegcliError


@dataclass(frozen=True)
class Job:
    """What every worker is told."""

    task: Task[Any]
    plan: Plan
    memory: str  # of `--memory`: each machine sees what that is there
    weights: str  # SHA-256 of the model file
    run: bytes  # the run.json that must be seen in the output folder
    version: str  # of segcli


def pack(content: Any) -> pa.Table:
    """A table of one row that holds anything."""
    return pa.table({COLUMN: pa.array([pickle.dumps(content)], pa.large_binary())})


def unpack(table: pa.Table) -> Iterator[Any]:
    """What the rows of a table hold."""
    for row in table.column(COLUMN):
        yield pickle.loads(row.as_buffer())


class Source(Datasource):  # type: ignore[misc]
    """The portions of a mailbox, until there is a None."""

    def __init__(self, mailbox: Any) -> None:
        super().__init__()
        self._mailbox = mailbox

    def estimate_inmemory_data_size(self) -> None:
        return None

    def get_read_tasks(self, parallelism: int, *_: Any, **__: Any) -> list[ReadTask]:
        unknown = BlockMetadata(num_rows=None, size_bytes=None, input_files=None, exec_stats=None)
        return [ReadTask(functools.partial(_taken, self._mailbox), unknown)]


def _taken(mailbox: Any) -> Iterator[pa.Table]:
    while (portion := ray.get(mailbox.next.remote())) is not None:
        yield pack(portion)


def dataset(job: Job, places: Places, mailbox: Any, alone: bool) -> ray.data.Dataset:
    """The way from the portions of a mailbox to what is noted of them.

    Args:
        job: What is done.
        places: How many actors there are, and what they take.
        mailbox: Gives the portions, see `cluster.Mailbox`.
        alone: One portion at a time for each actor, and none is tried twice.
    """
    context = ray.data.DataContext.get_current()
    context.target_max_block_size = 1  # byte: every row is a block of its own, and goes on at once
    context.max_errored_blocks = -1  # a portion that is lost is seen by `cluster._Run`
    context.max_consecutive_actor_init_deaths = 10
    context.execution_no_progress_timeout_s = -1  # a list on stdin may take its time
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    # Ray Data's own is to restart and try again for ever: an input that takes its actor down would do that.
    retries = {"max_restarts": -1, "max_task_retries": 0 if alone else 1}
    # A block has one row; for GPUs Ray wants to be told how many it gets at a time.
    tables = {"batch_size": 1, "batch_format": "pyarrow"}
    in_flight, at_once = (1, 1) if alone else (3, 2)
    inputs = ray.data.read_datasource(
        Source(mailbox), override_num_blocks=1, num_cpus=0, label_selector=here()
    )
    pictures = inputs.map_batches(
        Reading,
        fn_constructor_args=(job, mailbox),
        compute=ray.data.ActorPoolStrategy(
            min_size=1, max_size=places.readers, max_tasks_in_flight_per_actor=1 if alone else None
        ),
        num_cpus=1,
        **tables,
        **retries,
    )
    return pictures.map_batches(
        Segmenting,
        fn_constructor_args=(job, mailbox, ray.put(job.plan.model_file.read_bytes()), places.share),
        compute=ray.data.ActorPoolStrategy(
            size=places.actors,
            max_tasks_in_flight_per_actor=in_flight,
            max_concurrent_calls_per_actor=at_once,
            enable_true_multi_threading=True,
        ),
        num_cpus=places.cpus,
        num_gpus=places.gpus,
        **tables,
        **retries,
    )


def results(data: ray.data.Dataset) -> Iterator[tuple[list[Noted], bool]]:
    """What `Segmenting` gives, as it comes."""
    for table in data.iter_batches(batch_size=None, batch_format="pyarrow"):
        yield from unpack(table)


class Reading:
    """Reads portions of inputs, in a decoder process of its own.

    Args:
        job: What is done.
        mailbox: Tells when to stop, see `cluster.Mailbox`.
    """

    def __init__(self, job: Job, mailbox: Any) -> None:
        task, stop = job.task, stop_of(mailbox)
        self._inputs: queue.SimpleQueue[Input | None] = queue.SimpleQueue()
        self._decoders = Decoders(
            min(1, task.workers),
            task.reader,
            stop,
            remote=task.sources.may_be_remote,
            memory=memory_of(job.memory),
        )
        self._decoded = self._decoders.run(Ahead(iter(self._inputs.get, None), 1, stop))

    def __call__(self, table: pa.Table) -> Iterator[pa.Table]:
        """Portions of inputs (lists of `Input`) become portions of pictures (lists of pickled `Decoded`)."""
        portion = [item for items in unpack(table) for item in items]
        for item in portion:
            self._inputs.put(item)
        pictures: list[bytes] = []
        try:
            for picture in itertools.islice(self._decoded, len(portion)):
                pictures.append(pickle.dumps(picture))
                self._decoders.release(picture)
                if sum(map(len, pictures)) > LARGEST:
                    yield pack(pictures)
                    pictures = []
        except SegcliError as error:
            yield pack(error)
        if pictures:
            yield pack(pictures)


class Segmenting:
    """Computes portions of pictures, and writes what comes of them. Several threads may call it.

    Args:
        job: What is done.
        mailbox: Tells when to stop, see `cluster.Mailbox`.
        model: The model file, as an object of Ray.
        share: Actors of this kind that one machine can hold, by its number of processors and GPUs.
    """

    def __init__(self, job: Job, mailbox: Any, model: Any, share: dict[str, int]) -> None:
        self._task = job.task
        self._stop = stop_of(mailbox)
        self._error: SegcliError | None = None
        try:
            self._work = InTurn(_start(job, model, share))
        except SegcliError as error:
            self._error = error
        except Exception as error:
            self._error = MachineError(f"a worker on {socket.gethostname()} does not start: {error!r}")

    def __call__(self, table: pa.Table) -> Iterator[pa.Table]:
        """Portions of pictures (lists of pickled `Decoded`) become ([Noted, ...], was it restarted?)."""
        notes: queue.SimpleQueue[Noted | None] = queue.SimpleQueue()
        threading.Thread(target=self._compute, args=(table, notes), daemon=True).start()
        restarted = ray.get_runtime_context().was_current_actor_reconstructed
        done: list[Noted] = []
        told = time.monotonic()
        while (note := notes.get()) is not None:
            done.append(note)
            if time.monotonic() - told > TELL_EVERY:
                yield pack((done, restarted))
                done, told = [], time.monotonic()
        yield pack((done, restarted))

    def _compute(self, table: pa.Table, notes: queue.SimpleQueue[Noted | None]) -> None:
        def note(source: str, entry: Entry, files: Mapping[str, bytes] = NO_FILES, /) -> None:
            notes.put((source, entry, files))

        try:
            if self._error is not None:
                raise self._error
            readables = readable(self._pictures(table), self._task, note, _released)
            pictures = Ahead(readables, 1, self._stop)
            compute_and_write(self._task, self._work, pictures, note, _released, self._stop)
        except SegcliError as error:
            notes.put(error)
        except Exception as error:  # told where it is seen
            notes.put(MachineError(f"a worker on {socket.gethostname()} has failed: {error!r}"))
        finally:
            notes.put(None)

    def _pictures(self, table: pa.Table) -> Generator[Decoded]:
        for pictures in unpack(table):
            if isinstance(pictures, SegcliError):
                raise pictures
            for picture in pictures:
                if self._stop.is_set():
                    return
                yield pickle.loads(picture)


class InTurn:
    """Work that several threads do: while the files of one are written, the next computes."""

    def __init__(self, work: Work[Any]) -> None:
        self._work = work
        self._turn = threading.Lock()
        self.held = work.held
        self.encode = work.encode

    def compute(self, pictures: Ahead[Decoded]) -> Iterator[tuple[Decoded, Any]]:
        with self._turn:
            yield from self._work.compute(pictures)


def stop_of(mailbox: Any) -> threading.Event:
    """An event that is set when the run is to stop, or when whoever started it has gone."""
    stop = threading.Event()

    def wait() -> None:
        try:
            ray.get(mailbox.stopped.remote())
        finally:
            stop.set()

    threading.Thread(target=wait, daemon=True).start()
    return stop


def _start(job: Job, model: Any, share: dict[str, int]) -> Work[Any]:
    """The work of this machine, once it is clear that it sees what the others see.

    Raises:
        UsageError: The model or the device cannot be used.
        MachineError: Another version of segcli is installed here, or the output folder is another one.
    """
    from segcli.device import pick_precision, pick_runtime  # imports torch, which `Reading` does without

    host = socket.gethostname()
    if job.version != __version__:
        raise MachineError(f"{host} has segcli {__version__}, and the run was started by {job.version}")
    task = job.task
    record = task.shard.record if task.shard else RUN_FOLDER
    if task.out.read(f"{record}/{RUN_FILE}") != job.run:
        raise MachineError(
            f"{host} does not see the output folder {task.out}: on a cluster give a folder that all machines "
            "share, or a URL"
        )
    device = pick_runtime(job.plan.runtime, job.plan.device)
    pick_precision(job.plan.precision, device, job.plan.runtime)
    file = job.plan.model_file
    if not file.is_file() or sha256(file) != job.weights:
        file = Path(tempfile.gettempdir(), f"segcli-{job.weights}", file.name)
        write_atomic(file, ray.get(model))
    memory = memory_of(job.memory) // share.get(ray.get_runtime_context().get_node_id(), max(share.values()))
    return replace(job.plan, model_file=file, memory=memory).start()


def _released(picture: Decoded) -> None:
    """Nothing: what a portion holds is bounded, and goes with it."""
