"""The training loop, top to bottom: for every epoch train, validate, save.

Under torchrun every process runs it on its share of each batch (PyTorch's DistributedDataParallel); losses
are divided by the weight of the whole batch, so that the result is that of one process. Process 0 writes.

Every random choice is a function of (seed, epoch, sample) or (seed, step), and the checkpoint holds the rest:
a run that was stopped anywhere and resumed gives the same bits as one that was not (on the CPU).
"""

from __future__ import annotations

import io
import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel

from segcli.data.loading import batches, loader, mix
from segcli.errors import SegcliError, UsageError
from segcli.files import write_atomic
from segcli.training import distributed
from segcli.training.config import TrainConfig
from segcli.training.optimization import averaged, make_optimizer, rate, set_rate
from segcli.training.tasks import Task

CHECKPOINT, BEST, LAST, LOG = "checkpoint.pt", "best.safetensors", "last.safetensors", "log.jsonl"


class NonFiniteLoss(SegcliError):
    """The loss became NaN or infinite; the last checkpoint is kept."""

    exit_code = 1


@dataclass
class State:
    """All that changes during a training; what `checkpoint.pt` holds."""

    network: nn.Module
    objective: nn.Module  # the task's, distributed over processes when there are several
    optimizer: Optimizer
    average: AveragedModel | None
    scaler: torch.amp.GradScaler  # does nothing except with fp16
    epoch: int = 0
    batch: int = 0  # batches of this epoch that are done
    loss_sum: float = 0.0  # over those batches
    best_score: float = -1.0
    best_epoch: int = -1
    history: list[dict[str, Any]] = field(default_factory=list)

    @property
    def result(self) -> nn.Module:
        """The weights that are validated and kept: averaged, if there is an average."""
        return self.network if self.average is None else self.average.module


PROGRESS = ("epoch", "batch", "loss_sum", "best_score", "best_epoch", "history")


@dataclass(frozen=True)
class Progress:
    """What a watcher is told after every batch."""

    epoch: int
    batch: int
    batches: int
    loss: float
    lr: float
    images_per_second: float


@dataclass(frozen=True)
class Watcher:
    """Who follows a training.

    Attributes:
        batch: Called after every batch.
        epoch: Called with the log record of every epoch.
        stopped: Asked after every batch; True ends the training with a checkpoint.
    """

    batch: Callable[[Progress], None]
    epoch: Callable[[dict[str, Any]], None]
    stopped: Callable[[], bool]


def new_state(task: Task, config: TrainConfig, device: torch.device) -> State:
    """A training at its beginning; the objective is moved to the device."""
    network = task.objective.network
    if config.norm_momentum:
        for module in network.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = config.norm_momentum
    task.objective.to(device)
    network.to(memory_format=torch.channels_last)
    if config.sync_norm:
        nn.SyncBatchNorm.convert_sync_batchnorm(network)  # type: ignore[no-untyped-call]
    average = averaged(network, config.ema) if config.ema else None
    scaler = torch.amp.GradScaler(device.type, enabled=config.precision == "fp16")
    optimizer = make_optimizer(network, config)
    return State(network, distributed.spread(task.objective), optimizer, average, scaler)


def train(
    task: Task, state: State, config: TrainConfig, run: Path, device: torch.device, watcher: Watcher
) -> bool:
    """Train until the end, or until `watcher.stopped()`; the run folder then holds a checkpoint.

    Returns:
        Whether the training came to its end.

    Raises:
        NonFiniteLoss: The loss is NaN or infinite; names the step and the files of the batch.
    """
    while state.epoch < config.epochs:
        started = time.monotonic()
        state.objective.train()
        if not train_epoch(task, state, config, device, watcher):
            save_state(run, state)
            return False
        record = finish_epoch(task, state, config, run, time.monotonic() - started)
        save_state(run, state)
        watcher.epoch(record)
        if config.patience and state.epoch - 1 - state.best_epoch >= config.patience:
            break
    return True


def train_epoch(
    task: Task, state: State, config: TrainConfig, device: torch.device, watcher: Watcher
) -> bool:
    """The rest of an epoch, from `state.batch` on. False when stopped."""
    order = batches(len(task.names), config.batch_size, config.seed, state.epoch)
    own = [distributed.share(batch) for batch in order[state.batch :]]
    warmup = round(config.warmup * len(order))
    clock = time.monotonic()
    for images, targets in loader(task.samples, own, config.workers, device.type == "cuda"):
        step = state.epoch * len(order) + state.batch
        share = rate(step, config.epochs * len(order), warmup, config.schedule)
        set_rate(state.optimizer, share)
        torch.manual_seed(mix(config.seed, step))  # dropout
        images, targets = images.to(device, non_blocking=True), targets.to(device, non_blocking=True)
        loss = train_step(task, state, config, images, targets.long())
        if not math.isfinite(loss):
            names = ", ".join(task.names[index] for index, _ in order[state.batch])
            raise NonFiniteLoss(
                f"the loss is {loss} at step {step} (epoch {state.epoch + 1}, files {names}).\n"
                "Try a lower --lr or --precision fp32; the last good checkpoint is kept."
            )
        state.batch += 1
        state.loss_sum += loss
        now = time.monotonic()
        speed = len(order[0]) / (now - clock)
        mean_loss = state.loss_sum / state.batch
        watcher.batch(Progress(state.epoch, state.batch, len(order), mean_loss, config.lr * share, speed))
        clock = now
        if distributed.any_true(watcher.stopped()):
            return False
    return True


def train_step(task: Task, state: State, config: TrainConfig, images: Tensor, targets: Tensor) -> float:
    """One optimizer step on a batch of uint8 images (N, 3, H, W); returns its loss."""
    state.optimizer.zero_grad(set_to_none=True)
    weight = distributed.total(task.objective.weight(targets)).clamp(min=1e-6)
    loss_sum = torch.zeros((), device=images.device)
    for part, target in zip(images.chunk(config.accumulate), targets.chunk(config.accumulate), strict=True):
        loss = state.objective(part, target) / weight
        loss_sum += loss.detach()
        state.scaler.scale(loss * distributed.processes()).backward()  # DDP averages, a sum is wanted
    total = distributed.total(loss_sum).item()
    if not math.isfinite(total):
        return total
    if config.clip:
        state.scaler.unscale_(state.optimizer)
        nn.utils.clip_grad_norm_(state.network.parameters(), config.clip)
    state.scaler.step(state.optimizer)
    state.scaler.update()
    if state.average is not None:
        state.average.update_parameters(state.network)
    return total


def finish_epoch(task: Task, state: State, config: TrainConfig, run: Path, seconds: float) -> dict[str, Any]:
    """Validate, keep the weights when they are the best, and write the log; returns its record."""
    record: dict[str, Any] = {
        "epoch": state.epoch + 1,
        "loss": state.loss_sum / max(state.batch, 1),
        "lr": state.optimizer.param_groups[0]["lr"],
        "seconds": round(seconds, 1),
    }
    validate = task.validate
    is_last = state.epoch + 1 == config.epochs
    if validate is not None and (is_last or (state.epoch + 1) % config.validate_every == 0):
        scores = distributed.from_first(lambda: validate(state.result.eval()))
        record |= scores
        if scores[task.score] > state.best_score:
            state.best_score, state.best_epoch = scores[task.score], state.epoch
            if distributed.is_first():
                task.save(run / BEST, state.result, record)
    state.history.append(record)
    state.epoch += 1
    state.batch, state.loss_sum = 0, 0.0
    if distributed.is_first():
        task.save(run / LAST, state.result, record)
        write_atomic(run / LOG, "".join(json.dumps(line) + "\n" for line in state.history).encode())
    return record


def save_state(run: Path, state: State) -> None:
    """Write `checkpoint.pt`: everything a resumed run needs, complete or not at all."""
    if not distributed.is_first():
        return
    content = {
        "network": state.network.state_dict(),
        "optimizer": state.optimizer.state_dict(),
        "average": None if state.average is None else state.average.state_dict(),
        "scaler": state.scaler.state_dict(),
        "progress": {name: getattr(state, name) for name in PROGRESS},
    }
    buffer = io.BytesIO()
    torch.save(content, buffer)
    write_atomic(run / CHECKPOINT, buffer.getbuffer())


def load_state(run: Path, state: State) -> None:
    """Restore what `save_state` wrote into a freshly made state.

    Raises:
        UsageError: The run folder has no checkpoint, or one of another network.
    """
    path = run / CHECKPOINT
    if not path.is_file():
        raise UsageError(f"there is nothing to resume in {run}: it has no {CHECKPOINT}")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        state.network.load_state_dict(content["network"])
        state.optimizer.load_state_dict(content["optimizer"])
        if state.average is not None:
            state.average.load_state_dict(content["average"])
        state.scaler.load_state_dict(content["scaler"])
    except Exception as error:  # torch.load and load_state_dict raise a dozen types
        raise UsageError(f"{path} cannot be resumed from: {error}") from error
    for name in PROGRESS:
        setattr(state, name, content["progress"][name])
