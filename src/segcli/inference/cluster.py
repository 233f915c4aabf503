"""`--engine ray`: the inputs go through Ray Data, on one machine or on many.

    todo -> portions -> Mailbox -> source -> Reading ... -> Segmenting ... -> manifest, progress
    (this process)       actor      task     actors          actors           (this process)

Ray Data does the distributing: it places the actors, holds back those that are ahead, moves pictures to where
there is room, and tries a portion again whose actor has died. This process alone knows the inputs and keeps
the manifest, as with the other engines; actors write the results and send back what is to be noted.

Ray Data gives up a portion that has failed twice, and does not say which. So what was given and never came
back is known here, and is given again, one input at a time: an input that takes its actor down is found, and
costs itself only.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import math
import os
import signal
import socket
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from segcli import __version__
from segcli.errors import MachineError, SegcliError, UsageError
from segcli.inference.ahead import LOOK, Ahead
from segcli.inference.finishing import failed
from segcli.inference.interrupts import SIGNALS
from segcli.inference.layout import RUN_FILE, RUN_FOLDER
from segcli.inference.pipeline import Note, Task
from segcli.inference.plan import Plan
from segcli.inference.sources import Input
from segcli.inference.storage import absolute, open_storage

if TYPE_CHECKING:
    from segcli.inference.cluster_workers import Job, Noted

PORTION = 32  # inputs that go through the cluster together
WAIT = 1.0  # seconds after which a portion goes that is not full
PATIENCE = 10  # seconds for the head of a cluster to answer
STARTS = 3  # tries to start a Ray here: it gives itself 30 s, which a busy machine may take
TRIES = 2  # that an input gets alone, after its portion was lost
SILENCE = 1800  # seconds without news after which what is under way counts as lost
SILENCE_AFTER_LOSS = 20  # the same once a machine has been lost: what it held may wait for it for ever
LOST_AFTER = 60  # seconds without news after which another portion may go in place of the oldest
CPUS = 4  # of an actor without a GPU, where the machines have more than that

# Nothing is sent anywhere, nothing is printed beside segcli's lines, and workers of a Ray that is started
# here run as this process does (Ray's own are nice 15).
ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_BACKEND_LOG_LEVEL": "fatal",
    "RAY_worker_niceness": "0",
}
WARNINGS = (
    "`ray_remote_args` is deprecated",  # how often an actor's work is tried again has no other name yet
    "The minimum number of concurrent actors",  # fewer portions than actors
)


@dataclass(frozen=True)
class Wishes:
    """What the command line says; None leaves it to the cluster."""

    address: str | None = None  # auto, or HOST:PORT; None starts a Ray on this machine
    actors: int | None = None
    gpus_per_actor: float | None = None
    cpus_per_actor: int | None = None
    readers: int | None = None


@dataclass(frozen=True)
class Places:
    """How the actors are laid out on a cluster."""

    machines: int
    actors: int
    gpus: float  # of each
    cpus: int  # of each
    readers: int  # at most
    share: dict[str, int]  # of every machine, by Ray's name of it: how many actors it can hold

    def __str__(self) -> str:
        actors = f"{self.actors} actor" + "s" * (self.actors != 1)
        machines = f"{self.machines} machine" + "s" * (self.machines != 1)
        each = f"{self.gpus:g} GPU" if self.gpus else f"{self.cpus} CPU"
        return f"{actors} of {each} on {machines} by Ray"


class RayCluster:
    """Actors on a Ray cluster, see `engine.Helpers`.

    Args:
        wishes: What the command line says.
        device: auto, cpu or cuda.
    """

    def __init__(self, wishes: Wishes, device: str) -> None:
        if find_spec("ray") is None or find_spec("pyarrow") is None:
            raise UsageError("--engine ray needs Ray; run: pip install 'segcli[ray]'")
        if device not in ("auto", "cpu", "cuda"):
            raise UsageError(
                f"--device {device}: with --engine ray it is auto, cpu or cuda; Ray shares out GPUs"
            )
        if (wishes.address or "").startswith("ray://"):
            raise UsageError(
                f"--ray-address {wishes.address}: Ray Client cannot do this; run segcli on a machine of the "
                "cluster with --ray-address auto (ray job submit does that)"
            )
        self._wishes = wishes
        self._device = device
        self._places: Places | None = None
        self._plan: Plan | None = None
        self._memory = "auto"
        self._announce: Callable[[], None] = lambda: None

    def prepare(self, plan: Plan, memory: str, announce: Callable[[], None]) -> None:
        """Say what is computed.

        Args:
            plan: Its device is decided here.
            memory: What the run may take of every machine.
            announce: Called before the work begins.
        """
        self._plan, self._memory, self._announce = plan, memory, announce

    @property
    def places(self) -> Places:
        """Where the actors are. Connects to the cluster, or starts one, when first asked.

        Raises:
            UsageError: There is no room for an actor.
            MachineError: The cluster cannot be reached or started.
        """
        if self._places is None:
            self._connect()
            self._places = lay_out(_machines(), self._wishes, self._device)
        return self._places

    def precision(self, name: str, runtime: str) -> str:
        """The precision that the machines compute in, see `device.pick_precision`: for auto one is asked."""
        if name != "auto":
            return name  # workers check it against their devices
        import ray

        places = self.places
        ask = ray.remote(num_cpus=places.cpus, num_gpus=places.gpus, max_retries=3)(_precision)
        try:
            answer: str | SegcliError = ray.get(ask.remote(name, runtime, "cuda" if places.gpus else "cpu"))
        except ray.exceptions.RayError as error:
            raise _failure(error) from error
        if isinstance(answer, SegcliError):
            raise answer
        return answer

    def work_through(
        self,
        task: Task[Any],
        todo: Ahead[Input],
        note: Note,
        ready: Callable[[], None],
        stop: threading.Event,
    ) -> bool:
        assert self._plan is not None, "it was prepared"
        _ = self.places  # before it is announced
        self._announce()
        plan = replace(self._plan, device="cuda" if self.places.gpus else "cpu")
        run = _Run(_job(task, plan, self._memory), note, ready, stop)
        portions = _portions(todo, self.places.actors, stop)
        while not run.give(portions, self.places):
            self._lay_out_again()
        all_lived = not run.held and not run.restarted
        for _ in range(TRIES):
            if run.held and not stop.is_set():
                self._lay_out_again()
                run.give(([item] for item in list(run.held.values())), self.places, alone=True)
        if not stop.is_set():
            for item in run.held.values():
                note(item.source, failed(task.model, item.source, "computing it takes its process down"))
        return all_lived and not run.held

    def _lay_out_again(self) -> None:
        """Make do with the machines that there are now."""
        try:
            now = lay_out(_machines(), replace(self._wishes, actors=None), self._device)
        except UsageError as error:
            raise MachineError(f"too many machines of the Ray cluster were lost: {error}") from error
        self._places = replace(now, actors=min(now.actors, self.places.actors))

    def kill(self) -> None:
        pass  # Ray ends the actors of a process that has gone

    def close(self) -> None:
        if self._places is not None:
            import ray

            ray.shutdown()

    def _connect(self) -> None:
        for name, value in ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        address = self._wishes.address or os.environ.get("RAY_ADDRESS") or "local"
        if address not in ("local", "auto"):
            _knock(address)
        import ray
        import ray.data

        # As many processors by name as actors were asked for, and one for what reads.
        wanted = 1 + (self._wishes.actors or 1) * (self._wishes.cpus_per_actor or 1)
        processors = max(wanted, _processors())
        local = {"num_cpus": processors, "include_dashboard": False} if address == "local" else {}
        handlers = {number: signal.getsignal(number) for number in SIGNALS}
        try:
            with _silence():
                for tries_left in reversed(range(STARTS)):
                    try:
                        ray.init(address, log_to_driver=False, logging_level=logging.CRITICAL, **local)
                        break
                    except Exception as error:
                        if address != "local" or not tries_left:
                            raise MachineError(_why_not_connected(address, error)) from error
                        ray.shutdown()
        finally:
            if threading.current_thread() is threading.main_thread():
                for number, handler in handlers.items():
                    signal.signal(number, handler)
        for text in WARNINGS:
            warnings.filterwarnings("ignore", text, module="ray|segcli")
        for printer in logging.getLogger("ray.data").handlers:
            if isinstance(printer, logging.StreamHandler):  # the other one writes to Ray's own folder
                printer.setLevel(logging.CRITICAL)


def lay_out(machines: dict[str, dict[str, float]], wishes: Wishes, device: str) -> Places:
    """Decide where actors go.

    Args:
        machines: What every machine has, by its name: {"CPU": 8, "GPU": 1}.
        wishes: What the command line says.
        device: auto, cpu or cuda.

    Raises:
        UsageError: No machine has room for an actor, or nothing is left for those that read.
    """
    processors = [int(each.get("CPU", 0)) for each in machines.values()]
    have_gpus = any(each.get("GPU") for each in machines.values())
    gpus = wishes.gpus_per_actor
    if gpus is None:
        gpus = 1.0 if device == "cuda" or (device == "auto" and have_gpus) else 0.0
    if device == "cuda" and not gpus:
        raise UsageError("--device cuda needs --gpus-per-actor above 0")
    if device == "cpu" and gpus:
        raise UsageError("--device cpu and --gpus-per-actor contradict each other; leave out one of them")
    on_each = math.ceil((wishes.actors or 1) / max(1, len(machines)))
    fair = (max(processors, default=0) - 1) // on_each
    cpus = wishes.cpus_per_actor or (1 if gpus else max(1, min(CPUS, fair)))

    def room(machine: dict[str, float]) -> int:
        by_cpus = int(machine.get("CPU", 0) // cpus)
        return min(by_cpus, int(machine.get("GPU", 0) / gpus)) if gpus else by_cpus

    share = {name: room(machine) for name, machine in machines.items()}
    total, kept = sum(processors), 1 + sum(processors) // 32  # some for what reads
    most = min(sum(share.values()), (total - kept) // cpus)
    if most < 1 and (wishes.actors is None or not any(share.values())):
        raise UsageError(
            f"an actor takes {cpus} CPU and {gpus:g} GPU, and one more CPU reads; the cluster has no room "
            f"for that ({len(machines)} machines with {total} CPU in all)"
        )
    actors = wishes.actors or most
    readers = wishes.readers or max(1, total - actors * cpus)
    share = {name: max(1, min(count, actors)) for name, count in share.items()}
    return Places(len(machines), actors, gpus, cpus, readers, share)


class Mailbox:
    """The actor between this process and the cluster: portions go in, and the wish to stop."""

    def __init__(self) -> None:
        self._portions: asyncio.Queue[list[Input] | None] = asyncio.Queue()
        self._stopped = asyncio.Event()

    async def put(self, portion: list[Input] | None) -> None:
        """Add a portion, or None after the last."""
        await self._portions.put(portion)

    async def next(self) -> list[Input] | None:
        """Wait for a portion."""
        return await self._portions.get()

    async def stop(self) -> None:
        """Let all actors finish what they compute just now, and drop the rest."""
        self._stopped.set()

    async def stopped(self) -> None:
        """Wait until the run is to stop."""
        await self._stopped.wait()


class _Run:
    """What was given to the cluster, and what came back."""

    def __init__(self, job: Job, note: Note, ready: Callable[[], None], stop: threading.Event) -> None:
        self._job = job
        self._note = note
        self._ready = ready
        self._stop = stop
        self.held: dict[str, Input] = {}  # by absolute source: given, and not noted yet
        self.restarted = False  # whether an actor has died
        self._began = False  # whether anything has come back
        self._room = threading.Condition()
        self._given = 0  # portions
        self._heard = time.monotonic()  # when something came back last
        self._open: dict[int, set[str]] = {}  # the sources of a portion that are not noted yet
        self._portion_of: dict[str, int] = {}  # by source

    def give(self, portions: Iterator[list[Input]], places: Places, alone: bool = False) -> bool:
        """Let the cluster do portions; afterwards `held` tells which inputs were lost.

        Args:
            portions: The inputs.
            places: How many actors there are, and what they take.
            alone: One portion at a time for each actor, and none is tried twice.

        Returns:
            Whether all portions were given; else the cluster has lost a machine, or does nothing any more.

        Raises:
            SegcliError: What a worker has met that ends the run.
            MachineError: Ray has failed.
        """
        import ray

        from segcli.inference.cluster_workers import dataset, results

        if (first := next(portions, None)) is None:
            return True
        remaining = itertools.chain([first], portions)
        mailbox = ray.remote(num_cpus=0, max_concurrency=100_000, label_selector=here())(Mailbox).remote()
        ended, all_given = threading.Event(), threading.Event()
        most = sys.maxsize if alone else 4 * (places.actors + places.readers)

        def feed() -> None:
            with contextlib.suppress(ray.exceptions.RayError):
                if self._feed(remaining, mailbox, most, ended):
                    all_given.set()
                ray.get(mailbox.put.remote(None))

        feeder = threading.Thread(target=feed, daemon=True)
        feeder.start()
        rows = Ahead(results(dataset(self._job, places, mailbox, alone)), 1, ended)
        machines = _machines().keys()
        came = told = False
        self._heard = time.monotonic()
        silence = 0.0
        try:
            while not (self._stop.is_set() and not self._began):
                if self._stop.is_set() and not told:
                    told = True
                    mailbox.stop.remote()
                if (row := rows.poll(LOOK)) is not None:
                    self._take(*row)
                    came = True
                if row is not None or not self._open:
                    self._heard = time.monotonic()
                silence = time.monotonic() - self._heard
                if silence > SILENCE or (silence > SILENCE_AFTER_LOSS and machines - _machines().keys()):
                    break
        except StopIteration:
            pass
        except ray.exceptions.RayError as error:
            raise _failure(error) from error
        finally:
            ended.set()
            rows.thread.join(timeout=10)
            feeder.join(timeout=2)  # one that waits for paths on stdin is left behind
            self._open.clear()
            self._portion_of.clear()
            ray.kill(mailbox)
        if all_given.is_set() or self._stop.is_set():
            return True
        if not came:
            raise MachineError(f"nothing came of the Ray cluster in {silence:.0f} s; `ray status` tells more")
        feeder.join()
        return False

    def _feed(self, portions: Iterable[list[Input]], mailbox: Any, most: int, ended: threading.Event) -> bool:
        """Put portions into the mailbox, but never more than `most` that have not come back.

        Nobody tells that a portion is lost. One that many others have overtaken, or the oldest when nothing
        has come for a minute, no longer counts.

        Returns:
            Whether it has put all of them there.
        """
        import ray

        for portion in portions:
            named = {absolute(item.source): item for item in portion}
            since = time.monotonic()
            with self._room:
                self.held.update(named)
                while len(self._open) >= most and not (self._stop.is_set() or ended.is_set()):
                    oldest = next(iter(self._open))
                    overtaken = self._given - oldest > 2 * most
                    if overtaken or time.monotonic() - max(since, self._heard) > LOST_AFTER:
                        del self._open[oldest]
                    else:
                        self._room.wait(LOOK)
                if self._stop.is_set() or ended.is_set():
                    return False
                self._given += 1
                self._open[self._given] = set(named)
                self._portion_of.update(dict.fromkeys(named, self._given))
            inputs = [replace(item, source=source) for source, item in named.items()]
            ray.get(mailbox.put.remote(inputs))
        return True

    def _take(self, notes: list[Noted], restarted: bool) -> None:
        self.restarted |= restarted
        if not self._began:
            self._began = True
            self._ready()
        for noted in notes:
            if isinstance(noted, SegcliError):
                raise noted
            source, entry, files = noted
            with self._room:
                item = self.held.pop(source, None)
                number = self._portion_of.pop(source, 0)
                if left := self._open.get(number):
                    left.discard(source)
                    if not left:
                        del self._open[number]
                        self._room.notify()
            if item is not None:  # a portion that was tried again may come twice
                self._note(item.source, entry, files)


def _portions(todo: Ahead[Input], actors: int, stop: threading.Event) -> Iterator[list[Input]]:
    """The inputs in portions: small ones first, so that all actors begin at once."""
    portion: list[Input] = []
    given = 0
    since = time.monotonic()
    while True:
        try:
            item = todo.poll(LOOK)
        except StopIteration:
            break
        if item is not None:
            since = since if portion else time.monotonic()
            portion.append(item)
        full = len(portion) >= min(PORTION, 4 << (given // (2 * actors)))
        if full or (portion and time.monotonic() - since > WAIT):
            yield portion
            portion, given = [], given + 1
    if portion and not stop.is_set():
        yield portion


def _job(task: Task[Any], plan: Plan, memory: str) -> Job:
    from segcli.inference.cluster_workers import Job

    record = task.shard.record if task.shard else RUN_FOLDER
    plan = replace(plan, model_file=plan.model_file.absolute())
    return Job(
        # Workers have another current folder, and a closure of the command line cannot be sent.
        task=replace(task, out=open_storage(absolute(str(task.out)), record), start=plan.start),
        plan=plan,
        memory=memory,
        weights=task.settings["weights"],
        run=task.out.read(f"{record}/{RUN_FILE}") or b"",
        version=__version__,
    )


def _precision(name: str, runtime: str, device: str) -> str | SegcliError:
    """On a machine of the cluster: the precision, or why there is none."""
    from segcli.device import pick_precision, pick_runtime

    try:
        return pick_precision(name, pick_runtime(runtime, device))
    except SegcliError as error:
        return error


def _knock(address: str) -> None:
    """Raise MachineError when nobody listens at HOST:PORT. Ray would try for minutes."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=PATIENCE).close()
    except (OSError, ValueError, OverflowError) as error:
        raise MachineError(_why_not_connected(address, error)) from error


def _why_not_connected(address: str, error: Exception) -> str:
    reason = str(error).strip().partition("\n")[0]
    what = "cannot start Ray" if address == "local" else f"cannot reach the Ray cluster at {address}"
    return f"{what}: {reason}"


def _failure(error: Exception) -> MachineError:
    """What Ray says, in one line."""
    text = str(error).strip()
    if "No module named" in text:
        return MachineError(
            "a machine of the cluster has no segcli: install segcli[ray], the same version, on all of them"
        )
    return MachineError(f"Ray has failed ({type(error).__name__}): {text.partition(chr(10))[0]}")


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Keep what libraries write to stderr past Python from it."""
    kept = os.dup(2)
    try:
        with Path(os.devnull).open("w") as nothing:
            os.dup2(nothing.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def here() -> dict[str, str]:
    """What Ray calls this machine: what runs here lives as long as the run does."""
    import ray

    return {"ray.io/node-id": ray.get_runtime_context().get_node_id()}


def _machines() -> dict[str, dict[str, float]]:
    """What the machines of the cluster have, by Ray's names for them."""
    import ray

    return {node["NodeID"]: node["Resources"] for node in ray.nodes() if node["Alive"]}


def _processors() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
