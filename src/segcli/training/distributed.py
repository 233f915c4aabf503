"""Several processes as one training: PyTorch's DistributedDataParallel, as torchrun starts it.

Without torchrun there is one process and every function here is the identity.

Numbers that processes tell each other go through gloo on the CPU, gradients through NCCL on GPUs. Whatever
may fail before the first step happens inside `together`, so that of an error that all have, one speaks.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._C._distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous
from torch.nn.parallel import DistributedDataParallel

from segcli.errors import MachineError, SegcliError, UsageError

T = TypeVar("T")
LONGEST_WAIT = timedelta(days=1)  # for process 0, which checks the data alone; torchrun notices who died


class FailedElsewhere(Exception):
    """Another process met the error and reports it; this one ends quietly, with `exit_code`."""

    def __init__(self, exit_code: int) -> None:
        super().__init__(f"another process failed with exit code {exit_code}")
        self.exit_code = exit_code


def start() -> None:
    """Join the processes that torchrun started, if it did.

    Raises:
        MachineError: The others cannot be reached.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or "LOCAL_RANK" not in os.environ:
        return
    backends = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    try:
        store, rank, size = next(rendezvous("env://"))
        # What processes left there before torchrun started all again is not for these ones.
        store = PrefixStore("attempt" + os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
        dist.init_process_group(backends, store=store, rank=rank, world_size=size, timeout=LONGEST_WAIT)
    except (RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise MachineError(
            f"the other processes cannot be reached: {reason}; look at the first one"
        ) from error


def signal_copies() -> int:
    """How often one Ctrl-C arrives: from the terminal, and once more from torchrun."""
    return 2 if "TORCHELASTIC_RUN_ID" in os.environ else 1


def finish() -> None:
    """Leave the other processes, at the end of a training that went well."""
    if dist.is_initialized():
        dist.destroy_process_group()


def processes() -> int:
    """How many processes train together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """The number of this process."""
    return dist.get_rank() if dist.is_initialized() else 0


def processes_here() -> int:
    """How many of them share this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if dist.is_initialized() else 1


@contextlib.contextmanager
def together() -> Iterator[None]:
    """A block that all processes go through; when it fails in any of them, all end.

    Raises:
        FailedElsewhere: In all processes but the lowest of those that failed, which raises its own error.
    """
    problem: Exception | None = None
    try:
        yield
    except Exception as error:
        problem = error
    if dist.is_initialized():
        codes: list[int | None] = [None] * dist.get_world_size()
        dist.all_gather_object(codes, _exit_code(problem))
        failed = [number for number, code in enumerate(codes) if code is not None]
        if failed and failed[0] != dist.get_rank():
            with contextlib.suppress(RuntimeError):  # torchrun ends all as soon as one is gone: let it speak
                dist.barrier()
            raise FailedElsewhere(codes[failed[0]] or 1)
    if problem is not None:
        raise problem


def tell_torchrun(error: Exception) -> None:
    """Put an error into the report with which torchrun ends, which otherwise gives only an exit code."""
    file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if file:
        Path(file).write_text(json.dumps({"message": str(error), "timestamp": int(time.time())}))


def lost_another(error: RuntimeError) -> bool:
    """Whether an error says that another process is gone: gloo and NCCL have no type for it."""
    return dist.is_initialized() and (isinstance(error, dist.DistError) or "gloo" in str(error))


def _exit_code(problem: Exception | None) -> int | None:
    """Of an error that this process has itself."""
    if problem is None or isinstance(problem, FailedElsewhere):
        return None
    return problem.exit_code if isinstance(problem, SegcliError) else 1


def own_device(device: torch.device) -> torch.device:
    """The device of this process: on GPUs each takes its own.

    Raises:
        UsageError: There are more processes than GPUs.
    """
    if not dist.is_initialized() or device.type != "cuda":
        return device
    number, there = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
    if number >= there:
        raise UsageError(f"process {number} of this machine has no GPU of its own; it has {there}")
    device = torch.device("cuda", number)
    torch.cuda.set_device(device)
    return device


def spread(objective: nn.Module) -> nn.Module:
    """The module with its gradients averaged over all processes."""
    return DistributedDataParallel(objective) if dist.is_initialized() else objective


def without_exchange(objective: nn.Module) -> contextlib.AbstractContextManager[None]:
    """A block whose gradients stay in this process, to be exchanged with the next ones."""
    if isinstance(objective, DistributedDataParallel):
        return objective.no_sync()
    return contextlib.nullcontext()


def share_buffers(network: nn.Module) -> None:
    """Give all processes the running statistics of process 0."""
    if dist.is_initialized():
        for buffer in network.buffers():
            dist.broadcast(buffer, 0)


def share(batch: Sequence[T]) -> list[T]:
    """This process's part of a batch."""
    length = len(batch) // processes()
    return list(batch[rank() * length : (rank() + 1) * length])


def total(value: Tensor) -> Tensor:
    """The sum of a value over all processes."""
    if dist.is_initialized():
        value = value.clone()
        dist.all_reduce(value)
    return value


def any_true(value: bool) -> bool:
    """Whether the value is true in any process."""
    return bool(total(torch.tensor(int(value))).item()) if dist.is_initialized() else value


def from_first(compute: Callable[[], T]) -> T:
    """What process 0 computes, in every process; its errors are raised there, `FailedElsewhere` elsewhere."""
    if not dist.is_initialized():
        return compute()
    box: list[tuple[T | None, int | None]] = [(None, None)]
    problem: Exception | None = None
    if rank() == 0:
        try:
            box = [(compute(), None)]
        except Exception as error:
            problem = error
            box = [(None, _exit_code(error))]
    dist.broadcast_object_list(box)
    if problem is not None:
        raise problem
    result, exit_code = box[0]
    if exit_code is not None:
        raise FailedElsewhere(exit_code)
    return result  # type: ignore[return-value]
