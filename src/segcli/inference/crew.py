"""The processes of this machine that do a run: how many compute, and how many read and write beside them."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from segcli.device import cpus

if TYPE_CHECKING:
    from segcli.inference.shards import Shard
    from segcli.inference.sources import Sources

MANY = 5000  # images for which it pays to start several processes
PROCESS = 6 << 30  # bytes of memory that one of several processes may need
CORES_AT_A_GPU = 4  # that a process keeps busy with decoding and encoding
CORES_THAT_COMPUTE = 2  # that a process without a GPU keeps busy


@dataclass(frozen=True)
class Crew:
    """Who does a run.

    Attributes:
        devices: For every process that computes the name of its device.
        readers: Processes that read files, beside each of them.
        finishers: Processes that encode and write, beside each of them.
    """

    devices: Sequence[str]
    readers: int
    finishers: int


def crew_of(
    devices: Sequence[str],
    gpu: int,
    memory: int,
    images: Callable[[], int],
    processes: int | None,
    workers: int | None,
) -> Crew:
    """Who does a run on some devices.

    Args:
        devices: Their names.
        gpu: The bytes of memory of a GPU, 0 without one.
        memory: Bytes of this machine, where its processor computes; 0 where one process is to do that.
        images: Counts the inputs, or as many as are `MANY`.
        processes: How many compute on each device, None for what suits the machine.
        workers: How many read beside each of them, None for what suits the machine.
    """
    names = list(devices) * (processes or default_processes(gpu, memory, len(devices), images))
    readers = default_workers(gpu > 0, len(names)) if workers is None else workers
    return Crew(names, readers, readers if gpu else 0)  # a processor has no cores to spare for finishers


def default_workers(gpu: bool = False, processes: int = 1) -> int:
    """Half of the cores, which have to encode, too: at most 8, or 2 to 16 where a GPU is to be fed.

    Several processes share them.
    """
    least, most = (2, 16) if gpu else (1, 8)
    return max(1, max(least, min(most, cpus() // 2)) // processes)


def default_processes(gpu: int, memory: int, devices: int, images: Callable[[], int]) -> int:
    """How many processes compute on each of some devices: one, but for many images one for every few cores.

    One process runs one line of Python at a time. But every one takes seconds to start, and memory.
    See `crew_of` for what is given.
    """
    cores = CORES_AT_A_GPU if gpu else CORES_THAT_COMPUTE
    most = min(8, cpus() // (cores * devices), (gpu or memory) // PROCESS)
    return most if most > 1 and images() >= MANY else 1


def by_processor(device: str, runtime: str) -> bool:
    """Whether PyTorch will compute on the processor where it finds no CUDA, and not on Apple's GPU."""
    return runtime == "torch" and (device == "cpu" or (device == "auto" and sys.platform != "darwin"))


def count_up_to_many(sources: Sources, shard: Shard | None) -> int:
    """The number of inputs, at most `MANY`; 0 of those that a store or stdin would have to tell."""
    from segcli.inference.shards import inputs
    from segcli.inference.sources import PassedOver
    from segcli.inference.storage import is_url

    (kind, path), *_ = sources.entries
    if kind == "list":
        content = b"" if path == "-" else Path(path).read_bytes()
        lines = content.count(b"\n") + content.count(b"\0")
        return min(MANY, lines // shard.count if shard else lines)
    if any(is_url(path) for _, path in sources.entries):
        return 0
    return sum(1 for _ in itertools.islice(inputs(sources, PassedOver(), shard), MANY))
