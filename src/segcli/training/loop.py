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
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel

from segcli.data.loading import Dismissal, batches, loader, mix
from segcli.errors import SegcliError, UsageError
from segcli.files import machine_errors, write_atomic
from segcli.images import encode_jpeg
from segcli.training import distributed
from segcli.training.config import TrainConfig
from segcli.training.optimization import averaged, make_optimizer, rate, set_rate
from segcli.training.tasks import Task
from segcli.training.validation import GoOn

CHECKPOINT, BEST, LAST, LOG = "checkpoint.pt", "best.safetensors", "last.safetensors", "log.jsonl"
SAMPLES = "samples"
SAMPLE_QUALITY = 80  # of their JPEGs
SAVING_SHARE = 0.1  # of the time, at most, goes into checkpoints
SECONDS_BETWEEN = 60.0  # between checkpoints within an epoch, at least
SMALLEST_SCALE = 2.0**-24  # of fp16 gradients; below, they overflow at any scale


class NonFinite(SegcliError):
    """The loss, a gradient or a weight became NaN or infinite; the last checkpoint is kept."""

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
    waited: int = 0  # validations since the best
    history: list[dict[str, Any]] = field(default_factory=list)

    @property
    def result(self) -> nn.Module:
        """The weights that are validated and kept: averaged, if there is an average."""
        return self.network if self.average is None else self.average.module


PROGRESS = ("epoch", "batch", "loss_sum", "best_score", "waited", "history")


@dataclass(frozen=True)
class Progress:
    """What a watcher is told after every batch."""

    epoch: int
    batch: int
    batches: int
    loss: float  # mean over the epoch so far
    lr: float
    images_per_second: float
    seconds_left: float  # of the whole training


@dataclass(frozen=True)
class Watcher:
    """Who follows a training.

    Attributes:
        batch: Called after every batch.
        validated: Called after every validated image: how many are done, of how many.
        epoch: Called with the log record of every epoch.
        saved: Called after every checkpoint at the end of an epoch; its time counts as the checkpoint's.
        stopped: Asked after every batch and validated image; True ends the training with a checkpoint.
    """

    batch: Callable[[Progress], object]
    validated: Callable[[int, int], object]
    epoch: Callable[[dict[str, Any]], object]
    saved: Callable[[], object]
    stopped: Callable[[], bool]


@dataclass
class Training:
    """One training: what it is made of, and where it stands."""

    task: Task
    state: State
    config: TrainConfig
    folder: Path
    device: torch.device
    watcher: Watcher
    ticks: deque[float] = field(default_factory=lambda: deque(maxlen=50))  # when the last batches ended
    validation_seconds: float = 0.0  # of the last one
    saved: float = field(default_factory=time.monotonic)  # when the last checkpoint was written
    saving_seconds: float = 0.0  # what that took
    dismissal: Dismissal = field(default_factory=Dismissal)  # of the processes that load samples

    def pause(self) -> float:
        """Least time between checkpoints, so that they cost little."""
        return self.saving_seconds / SAVING_SHARE

    def batch_seconds(self) -> float:
        """How long a batch took, on average over the last ones."""
        return (self.ticks[-1] - self.ticks[0]) / max(len(self.ticks) - 1, 1)

    def seconds_left(self, batches_of_epoch: int) -> float:
        """How long the rest will take, at the pace of the last batches and of the last validation."""
        epochs = self.config.epochs - self.state.epoch
        validations = 0 if self.task.validate is None else math.ceil(epochs / self.config.validate_every)
        remaining = epochs * batches_of_epoch - self.state.batch
        return remaining * self.batch_seconds() + validations * self.validation_seconds


def new_state(task: Task, config: TrainConfig, device: torch.device) -> State:
    """A training at its beginning; the objective is moved to the device.

    Raises:
        UsageError: Synchronised batch normalisation is asked for without GPUs.
    """
    network = task.objective.network
    if config.norm_momentum:
        for module in network.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = config.norm_momentum
    task.objective.to(device)
    network.to(memory_format=torch.channels_last)
    if config.sync_norm:
        if device.type != "cuda":
            raise UsageError("--sync-norm needs GPUs; leave it out on the CPU")
        nn.SyncBatchNorm.convert_sync_batchnorm(network)  # type: ignore[no-untyped-call]
    average = averaged(network, config.ema) if config.ema else None
    scaler = torch.amp.GradScaler(device.type, enabled=config.precision == "fp16")
    optimizer = make_optimizer(network, config)
    return State(network, distributed.spread(task.objective), optimizer, average, scaler)


def is_finished(state: State, config: TrainConfig) -> bool:
    """Whether all epochs are done, or the score has not improved for too long."""
    return state.epoch >= config.epochs or bool(config.patience and state.waited >= config.patience)


def train(training: Training) -> bool:
    """Train until the end, or until `watcher.stopped()`; the run folder then holds a checkpoint.

    Returns:
        Whether the training came to its end.

    Raises:
        NonFinite: The loss is NaN or infinite; names the step and the files of the batch.
        ImageError: An image cannot be read.
        MachineError: The disk is full, a process that loads images died, ...
    """
    state, config = training.state, training.config
    while not is_finished(state, config):
        started = time.monotonic()
        state.objective.train()
        record = finish_epoch(training, started) if train_epoch(training) else None
        if record is None:
            save(training)
            return False
        if is_finished(state, config) or time.monotonic() - training.saved >= training.pause():
            save(training, record)
        training.watcher.epoch(record)
    return True


def train_epoch(training: Training) -> bool:
    """The rest of an epoch, from `state.batch` on. False when stopped."""
    task, state, config, device = training.task, training.state, training.config, training.device
    order = batches(len(task.names), config.batch_size, config.seed, state.epoch)
    own = [distributed.share(batch) for batch in order[state.batch :]]
    warmup = round(config.warmup * len(order))
    training.ticks.clear()
    training.ticks.append(time.monotonic())
    pin = device.type == "cuda"
    for images, targets in loader(task.samples, own, config.workers, pin, training.dismissal):
        step = state.epoch * len(order) + state.batch
        share = rate(step, config.epochs * len(order), warmup, config.schedule)
        set_rate(state.optimizer, share)
        torch.manual_seed(mix(config.seed, step) + distributed.rank())  # dropout
        images, targets = images.to(device, non_blocking=True), targets.to(device, non_blocking=True)
        try:
            loss = train_step(task, state, config, images, targets.long())
        except FloatingPointError as error:
            names = ", ".join(task.names[index] for index, _ in order[state.batch])
            raise NonFinite(
                f"{error} at step {step + 1} (epoch {state.epoch + 1}, batch {state.batch + 1}; "
                f"files {names}).\n"
                "Try a lower --lr, --clip 1 or --precision fp32; the last good checkpoint is kept."
            ) from error
        state.batch += 1
        state.loss_sum += loss
        training.ticks.append(time.monotonic())
        training.watcher.batch(
            Progress(
                state.epoch,
                state.batch,
                len(order),
                state.loss_sum / state.batch,
                config.lr * share,
                len(order[0]) / max(training.batch_seconds(), 1e-9),
                training.seconds_left(len(order)),
            )
        )
        if distributed.any_true(training.watcher.stopped()):
            return False
        if time.monotonic() - training.saved >= max(SECONDS_BETWEEN, training.pause()):
            save(training)
    return True


def train_step(task: Task, state: State, config: TrainConfig, images: Tensor, targets: Tensor) -> float:
    """One optimizer step on a batch of uint8 images (N, 3, H, W); returns its loss.

    Raises:
        FloatingPointError: The loss or its gradient is not finite; the weights are left as they were.
    """
    state.optimizer.zero_grad(set_to_none=True)
    if config.summed_loss:
        weight = torch.ones((), device=images.device)
    else:
        weight = distributed.total(task.objective.weight(targets)).clamp(min=1e-6)
    loss_sum = torch.zeros((), device=images.device)
    parts = list(zip(images.chunk(config.accumulate), targets.chunk(config.accumulate), strict=True))
    for part, target in parts[:-1]:
        with distributed.without_exchange(state.objective):
            loss_sum += backward(state, part, target, weight)
    loss_sum += backward(state, *parts[-1], weight)
    loss = distributed.total(loss_sum).item()
    if not math.isfinite(loss):
        raise FloatingPointError(f"the loss is {loss}")
    state.scaler.unscale_(state.optimizer)
    parameters = [p for p in state.network.parameters() if p.grad is not None]
    norm = get_total_norm([p.grad for p in parameters if p.grad is not None])
    if not state.scaler.is_enabled() and not torch.isfinite(norm):
        raise FloatingPointError(f"the gradient is {norm.item()}")
    if config.clip:
        clip_grads_with_norm_(parameters, config.clip, norm)
    state.scaler.step(state.optimizer)  # leaves a step out whose fp16 gradients overflowed
    state.scaler.update()
    if state.scaler.is_enabled() and state.scaler.get_scale() < SMALLEST_SCALE:
        raise FloatingPointError("the gradient is not finite in fp16, at any scale,")
    if state.average is not None:
        state.average.update_parameters(state.network)
    return loss


def backward(state: State, images: Tensor, targets: Tensor, weight: Tensor) -> Tensor:
    """Add the gradient of a part of the batch; returns its part of the loss."""
    loss: Tensor = state.objective(images, targets) / weight
    loss_to_spread = loss * distributed.processes()  # DDP averages, a sum is wanted
    state.scaler.scale(loss_to_spread).backward()  # type: ignore[no-untyped-call]
    return loss.detach()


def finish_epoch(training: Training, started: float) -> dict[str, Any] | None:
    """Validate, keep the weights when they are the best, and write the log.

    Returns:
        The record of the epoch in the log; None when the validation was stopped.
    """
    task, state, config, folder = training.task, training.state, training.config, training.folder
    record: dict[str, Any] = {
        "epoch": state.epoch + 1,
        "loss": state.loss_sum / max(state.batch, 1),
        "lr": state.optimizer.param_groups[0]["lr"],
        "seconds": round(time.monotonic() - started, 1),
    }
    require_finite(state)
    is_last = state.epoch + 1 == config.epochs
    if task.validate is not None and (is_last or (state.epoch + 1) % config.validate_every == 0):
        began = time.monotonic()
        distributed.share_buffers(state.result)
        validation = task.validate(state.result.eval(), go_on(training.watcher))
        if validation is None:
            return None
        training.validation_seconds = time.monotonic() - began
        record |= validation.scores
        state.waited += 1
        if record[task.score] > state.best_score:
            state.best_score, state.waited = record[task.score], 0
            if distributed.rank() == 0:
                task.save(folder / BEST, state.result, record)
        if validation.picture is not None:
            picture = folder / SAMPLES / f"epoch_{state.epoch + 1:03}.jpg"
            write_atomic(picture, encode_jpeg(validation.picture, SAMPLE_QUALITY))
    state.history.append(record)
    state.epoch += 1
    state.batch, state.loss_sum = 0, 0.0
    if distributed.rank() == 0:
        write_atomic(folder / LOG, "".join(json.dumps(line) + "\n" for line in state.history).encode())
    return record


def require_finite(state: State) -> None:
    """Make sure that what is about to be kept can be used.

    Raises:
        NonFinite: A weight is NaN or infinite.
    """
    for name, value in state.result.state_dict().items():
        if value.is_floating_point() and not torch.isfinite(value).all():
            raise NonFinite(
                f"{name} is no longer finite after epoch {state.epoch + 1}.\n"
                "Try a lower --lr, --clip 1 or --precision fp32; the last good checkpoint is kept."
            )


def go_on(watcher: Watcher) -> GoOn:
    """What a validation asks after every image."""

    def ask(done: int, count: int) -> bool:
        watcher.validated(done, count)
        return not watcher.stopped()

    return ask


def save(training: Training, record: dict[str, Any] | None = None) -> None:
    """Write `checkpoint.pt`, and `last.safetensors` at the end of an epoch, whose log record is given."""
    began = time.monotonic()
    if distributed.rank() == 0:
        save_state(training.folder, training.state)
        if record is not None:
            training.task.save(training.folder / LAST, training.state.result, record)
            training.watcher.saved()
    training.saved = time.monotonic()
    training.saving_seconds = training.saved - began


def save_state(run: Path, state: State) -> None:
    """Write `checkpoint.pt`: everything a resumed run needs, complete or not at all."""
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


def load_state(run: Path, state: State) -> bool:
    """Restore what `save_state` wrote into a freshly made state; False when there is nothing.

    Process 0 reads the file for all, which may be on other machines.

    Raises:
        UsageError: The checkpoint is damaged, or of another network.
    """
    path = run / CHECKPOINT

    def read() -> bytes | None:
        with machine_errors(path, "read"):
            return path.read_bytes() if path.is_file() else None

    data = distributed.from_first(read)
    if data is None:
        return False
    try:
        content = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
        state.network.load_state_dict(content["network"])
        state.optimizer.load_state_dict(content["optimizer"])
        if state.average is not None:
            state.average.load_state_dict(content["average"])
        state.scaler.load_state_dict(content["scaler"])
        for name in PROGRESS:
            setattr(state, name, content["progress"][name])
    except Exception as error:  # torch.load and load_state_dict raise a dozen types
        reason = str(error).splitlines()[0]
        raise UsageError(
            f"{path} cannot be resumed from: {reason}\nStart anew in another --out, or with --overwrite."
        ) from error
    return True
