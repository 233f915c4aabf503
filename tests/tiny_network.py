"""Networks that train in a moment: fcn8s-tiny with batch normalisation and dropout, fcn8s-plain without."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from segcli.models.fcn import FCN, Alignment, Channels, Features
from segcli.models.networks import NETWORKS

WIDTH = 8


class Tiny(FCN):
    """Three strided convolutions. With `plain` nothing depends on the batch, nor on chance."""

    def __init__(self, num_classes: int, plain: bool) -> None:
        super().__init__(num_classes, Channels(WIDTH, WIDTH, WIDTH), 8, Alignment())
        sizes = ((3, 8), (WIDTH, 2), (WIDTH, 2))
        self.convolutions = nn.ModuleList(nn.Conv2d(c, WIDTH, s + 1, s, padding=s // 2) for c, s in sizes)
        self.norms = nn.ModuleList(nn.Identity() if plain else nn.BatchNorm2d(WIDTH) for _ in sizes)
        self.dropout = nn.Dropout2d(0 if plain else 0.1)

    def features(self, images: Tensor) -> Features:
        maps = []
        x = images
        for convolution, norm in zip(self.convolutions, self.norms, strict=True):
            x = F.relu(norm(convolution(x)))
            maps.append(x)
        return Features(maps[0], maps[1], self.dropout(maps[2]))


class Heavy(Tiny):
    """With so much ballast that a checkpoint takes a while to be written."""

    def __init__(self, num_classes: int) -> None:
        super().__init__(num_classes, plain=False)
        self.register_buffer("ballast", torch.zeros(4_000_000))


class Exploding(Tiny):
    """From its `at`-th step on, the loss is not finite, or only its gradient."""

    def __init__(self, num_classes: int, at: int, what: str) -> None:
        super().__init__(num_classes, plain=True)
        self.at, self.what, self.steps = at, what, 0

    def score_pyramid(self, images: Tensor) -> list[Tensor]:
        pyramid = super().score_pyramid(images)
        if not self.training:
            return pyramid
        self.steps += 1
        if self.steps >= self.at:
            if self.what == "loss":
                pyramid[-1] = pyramid[-1] * float("inf")
            if self.what == "gradient":
                pyramid[-1] = pyramid[-1] + torch.sqrt(pyramid[-1] * 0)  # 0, with the slope inf * 0
        return pyramid

    def score_features(self, features: Features) -> list[Tensor]:
        pyramid = super().score_features(features)
        if self.training or self.what != "validation":
            return pyramid
        return [scores * float("nan") for scores in pyramid]


NETWORKS["fcn8s-tiny"] = partial(Tiny, plain=False)
NETWORKS["fcn8s-heavy"] = Heavy
NETWORKS["fcn8s-plain"] = partial(Tiny, plain=True)
