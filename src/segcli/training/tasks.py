"""What is trained: a segmentation network, or an encoder as an image classifier."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset

from segcli.data.loading import Item
from segcli.data.verify import Finding
from segcli.models.fcn import Network
from segcli.models.preprocessing import Preprocessing, normalize
from segcli.training.config import MACHINE_OPTIONS, TrainConfig
from segcli.training.losses import auxiliary_loss, label_weight, segmentation_loss
from segcli.training.validation import GoOn, Validation


class Objective(nn.Module):
    """A network with its loss: what the loop differentiates.

    `forward(images, targets)` gives the loss summed over what `weight(targets)` counts. Images are uint8
    (N, 3, H, W) on any device.
    """

    def __init__(self, network: nn.Module, preprocessing: Preprocessing, precision: str) -> None:
        super().__init__()
        self.network = network
        self.preprocessing = preprocessing
        self.precision = precision

    def weight(self, targets: Tensor) -> Tensor:
        raise NotImplementedError

    def encode(self, images: Tensor) -> Tensor:
        """Normalised images, channels last."""
        return normalize(images, self.preprocessing).contiguous(memory_format=torch.channels_last)


class SegmentationObjective(Objective):
    """Targets are label maps, int64 (N, H, W), 255 = ignore."""

    def __init__(
        self,
        network: Network,
        preprocessing: Preprocessing,
        precision: str,
        config: TrainConfig,
        class_weights: Tensor | None,
    ) -> None:
        super().__init__(network, preprocessing, precision)
        self.network: Network = network
        self.config = config
        self.register_buffer("class_weights", class_weights, persistent=False)
        self.class_weights: Tensor | None

    def weight(self, targets: Tensor) -> Tensor:
        return label_weight(targets, self.class_weights)

    def forward(self, images: Tensor, targets: Tensor) -> Tensor:
        with autocast(images.device, self.precision):
            pyramid = self.network.score_pyramid(self.encode(images))
        *coarser, finest = (scores.float() for scores in pyramid)
        scores = self.network.upsample(finest.contiguous(), (targets.shape[1], targets.shape[2]))
        config = self.config
        loss = segmentation_loss(scores, targets, config.loss, self.class_weights, config.label_smoothing)
        if config.auxiliary:
            for coarse in coarser:
                loss = loss + config.auxiliary * auxiliary_loss(coarse, targets, self.class_weights)
        return loss


class ClassificationObjective(Objective):
    """Targets are class numbers, int64 (N,)."""

    def __init__(
        self, network: nn.Module, preprocessing: Preprocessing, precision: str, smoothing: float
    ) -> None:
        super().__init__(network, preprocessing, precision)
        self.smoothing = smoothing

    def weight(self, targets: Tensor) -> Tensor:
        return targets.new_tensor(len(targets), dtype=torch.float32)

    def forward(self, images: Tensor, targets: Tensor) -> Tensor:
        with autocast(images.device, self.precision):
            scores = self.network(self.encode(images))
        return F.cross_entropy(scores.float(), targets, label_smoothing=self.smoothing, reduction="sum")


@dataclass(frozen=True)
class Task:
    """One thing to train, as the loop sees it.

    Attributes:
        objective: The network with its loss.
        samples: Gives (image, target) tensors by `data.loading.Key`.
        about: What is trained and from what it starts, lines for people.
        names: The samples' names, for messages.
        validate: Scores a network in evaluation mode on the validation split; None when there is none.
        score: The key of the validation's scores that decides which weights are the best.
        save: Writes a network with its scores as a model file.
        check: Looks at every file that is needed; told after each how many are done, of how many.
    """

    objective: Objective
    samples: Dataset[Item]
    about: Sequence[str]
    names: Sequence[str]
    validate: Callable[[nn.Module, GoOn], Validation | None] | None
    score: str
    save: Callable[[Path, nn.Module, dict[str, Any]], None]
    check: Callable[[Callable[[int, int], object]], list[Finding]]


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """Mixed precision for the block: convolutions in bf16 or fp16, the rest in float32."""
    dtype = torch.float16 if precision == "fp16" else torch.bfloat16
    return torch.autocast(device.type, dtype, enabled=precision != "fp32")


def plain(config: TrainConfig) -> dict[str, Any]:
    """The options that differ from their defaults, and the seed: the recipe in a model file."""
    defaults = TrainConfig()
    values = {k: v for k, v in dataclasses.asdict(config).items() if k not in MACHINE_OPTIONS}
    return {k: v for k, v in values.items() if v != getattr(defaults, k) or k in ("data", "seed", "epochs")}
