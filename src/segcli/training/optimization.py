"""Optimizers, learning rate schedules and weight averaging, all as functions of the step."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.swa_utils import AveragedModel

from segcli.training.config import TrainConfig

NORMS = (nn.BatchNorm2d, nn.GroupNorm, nn.LayerNorm, nn.SyncBatchNorm)
POLY_POWER = 0.9  # Chen et al. 2017 (DeepLab), section 4.1


def make_optimizer(network: nn.Module, config: TrainConfig) -> Optimizer:
    """SGD or AdamW over groups that differ in learning rate and decay.

    Each group keeps its highest learning rate as `peak`. Biases and normalisation layers are not decayed;
    upsampling layers are left out when they are fixed.
    """
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for prefix, module in network.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            if config.fixed_upsampling and isinstance(module, nn.ConvTranspose2d):
                parameter.requires_grad_(False)
                continue
            plain = name == "bias" or isinstance(module, NORMS)
            factor = config.encoder_lr if prefix.startswith("encoder.") else 1.0
            factor *= config.bias_lr if name == "bias" else 1.0
            decay = 0.0 if plain else config.weight_decay
            groups.setdefault((config.lr * factor, decay), []).append(parameter)
    settings = [{"params": group, "lr": peak, "peak": peak, "weight_decay": decay}
                for (peak, decay), group in groups.items()]  # fmt: skip
    if config.optimizer == "sgd":
        return SGD(settings, lr=config.lr, momentum=config.momentum, fused=True)
    return AdamW(settings, lr=config.lr, betas=(config.momentum, 0.999), fused=True)


def rate(step: int, steps: int, warmup: int, schedule: str) -> float:
    """The learning rate at a step (0-based) of `steps`, as a share of its highest."""
    if step < warmup:
        return (step + 1) / warmup
    share = (step - warmup) / max(steps - warmup, 1)
    if schedule == "poly":
        return float((1 - share) ** POLY_POWER)
    if schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * share))
    return 1.0


def set_rate(optimizer: Optimizer, share: float) -> None:
    """Set every group's learning rate to a share of its highest."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak"] * share


def averaged(network: nn.Module, decay: float) -> AveragedModel:
    """A copy of the network whose weights and batch statistics follow as an exponential moving average.

    The decay rises as (1 + n) / (10 + n) at first, so that the random start is forgotten soon.
    """
    return AveragedModel(network, multi_avg_fn=_averaging(decay), use_buffers=True)


def _averaging(decay: float) -> Callable[[Sequence[Tensor], Sequence[Tensor], Tensor | int], None]:
    def update(average: Sequence[Tensor], current: Sequence[Tensor], count: Tensor | int) -> None:
        share = min(decay, (1 + int(count)) / (10 + int(count)))
        with torch.no_grad():
            for mean, value in zip(average, current, strict=True):
                if mean.is_floating_point():
                    mean.lerp_(value, 1 - share)
                else:
                    mean.copy_(value)

    return update
