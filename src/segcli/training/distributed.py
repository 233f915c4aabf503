"""Several processes as one training: PyTorch's DistributedDataParallel, as torchrun starts it.

Without torchrun there is one process and every function here is the identity.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from segcli.errors import UsageError

Item = TypeVar("Item")


def start(device: torch.device, batch_size: int) -> torch.device:
    """Join the processes that torchrun started, if it did; returns this process's device.

    Raises:
        UsageError: The batch cannot be shared out evenly.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        return device
    if batch_size % size:
        raise UsageError(f"batch_size {batch_size} cannot be shared out evenly among {size} processes")
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return device


def finish() -> None:
    """Leave the other processes."""
    if dist.is_initialized():
        dist.destroy_process_group()


def processes() -> int:
    """How many processes train together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_first() -> bool:
    """Whether this process is the one that writes and reports."""
    return not dist.is_initialized() or dist.get_rank() == 0


def spread(objective: nn.Module) -> nn.Module:
    """The module with its gradients averaged over all processes."""
    return DistributedDataParallel(objective) if dist.is_initialized() else objective


def share(batch: Sequence[Item]) -> list[Item]:
    """This process's part of a batch."""
    if not dist.is_initialized():
        return list(batch)
    length = len(batch) // dist.get_world_size()
    return list(batch[dist.get_rank() * length : (dist.get_rank() + 1) * length])


def total(value: Tensor) -> Tensor:
    """The sum of a value over all processes."""
    if dist.is_initialized():
        value = value.clone()
        dist.all_reduce(value)
    return value


def any_true(value: bool) -> bool:
    """Whether the value is true in any process."""
    return bool(total(torch.tensor(int(value))).item()) if dist.is_initialized() else value


def from_first(compute: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What process 0 computes, in every process."""
    if not dist.is_initialized():
        return compute()
    box = [compute() if is_first() else None]
    dist.broadcast_object_list(box)
    return box[0] or {}
