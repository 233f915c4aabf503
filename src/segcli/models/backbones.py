"""Encoders that are written out here: their models load without importing torchvision, which takes seconds.

Sources:
    ResNet      He, Zhang, Ren & Sun, "Deep Residual Learning for Image Recognition", CVPR 2016, table 1.
                The 3x3 convolution of a bottleneck halves the map, as in most releases since.
    MobileNet   Howard et al., "Searching for MobileNetV3", ICCV 2019, table 1.

They end before the classifier. Layers carry torchvision's names, so the weights of its classifiers fit.
An encoder takes images, float (N, 3, H, W), and gives the maps of `fcn.Features` by name.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn


def initialize(network: nn.Module) -> None:
    """Draw weights as in He et al., "Delving Deep into Rectifiers" (2015), from the width of the output."""
    for layer in network.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)


# ---- ResNet ----


class ResNet(nn.Module):
    """Four stages of residual blocks.

    Args:
        blocks: Number of blocks in each stage.
        bottleneck: Blocks are 1x1, 3x3, 1x1 with four times as many channels at the end, not 3x3, 3x3.
    """

    def __init__(self, blocks: Sequence[int], bottleneck: bool = False) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.relu1 = nn.ReLU(inplace=True)
        before = 64
        for stage, count in enumerate(blocks):
            layers = []
            for number in range(count):
                stride = 2 if stage > 0 and number == 0 else 1
                layers.append(ResidualBlock(before, 64 << stage, stride, bottleneck))
                before = layers[-1].channels
            self.add_module(f"layer{stage + 1}", nn.Sequential(*layers))
        initialize(self)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        x = self.relu1(self.bn1(self.conv1(images)))  # stride 2
        x = self.get_submodule("layer1")(F.max_pool2d(x, 3, stride=2, padding=1))  # stride 4
        pool3 = self.get_submodule("layer2")(x)
        pool4 = self.get_submodule("layer3")(pool3)
        return {"pool3": pool3, "pool4": pool4, "fc7": self.get_submodule("layer4")(pool4)}


class ResidualBlock(nn.Module):
    """The input plus what some convolutions make of it; it goes through a 1x1 one where sizes differ."""

    def __init__(self, before: int, width: int, stride: int, bottleneck: bool) -> None:
        super().__init__()
        self.channels = 4 * width if bottleneck else width
        if bottleneck:
            layers = [(width, 1, 1), (width, 3, stride), (self.channels, 1, 1)]
        else:
            layers = [(width, 3, stride), (width, 3, 1)]
        inner = before
        for number, (channels, kernel, step) in enumerate(layers, 1):
            convolution = nn.Conv2d(inner, channels, kernel, step, kernel // 2, bias=False)
            self.add_module(f"conv{number}", convolution)
            self.add_module(f"bn{number}", nn.BatchNorm2d(channels))
            if number < len(layers):
                self.add_module(f"relu{number}", nn.ReLU(inplace=True))
            inner = channels
        self.depth = len(layers)
        self.downsample = nn.Sequential()
        if stride != 1 or before != self.channels:
            self.downsample.append(nn.Conv2d(before, self.channels, 1, stride, bias=False))
            self.downsample.append(nn.BatchNorm2d(self.channels))

    def forward(self, x: Tensor) -> Tensor:
        y = x
        for number in range(1, self.depth + 1):
            y = getattr(self, f"bn{number}")(getattr(self, f"conv{number}")(y))
            if number < self.depth:
                y = getattr(self, f"relu{number}")(y)
        return F.relu(y.add_(self.downsample(x)), inplace=True)


# ---- MobileNetV3 ----


class Row(NamedTuple):
    """A line of table 1: a block that widens its input, filters every channel, and narrows it again."""

    kernel: int
    expanded: int
    channels: int
    squeezes: bool
    activation: type[nn.Module]
    stride: int


MOBILENET_V3_LARGE = (
    Row(3, 16, 16, False, nn.ReLU, 1),
    Row(3, 64, 24, False, nn.ReLU, 2),  # stride 4
    Row(3, 72, 24, False, nn.ReLU, 1),
    Row(5, 72, 40, True, nn.ReLU, 2),  # stride 8
    Row(5, 120, 40, True, nn.ReLU, 1),
    Row(5, 120, 40, True, nn.ReLU, 1),
    Row(3, 240, 80, False, nn.Hardswish, 2),  # stride 16
    Row(3, 200, 80, False, nn.Hardswish, 1),
    Row(3, 184, 80, False, nn.Hardswish, 1),
    Row(3, 184, 80, False, nn.Hardswish, 1),
    Row(3, 480, 112, True, nn.Hardswish, 1),
    Row(3, 672, 112, True, nn.Hardswish, 1),
    Row(5, 672, 160, True, nn.Hardswish, 2),  # stride 32
    Row(5, 960, 160, True, nn.Hardswish, 1),
    Row(5, 960, 160, True, nn.Hardswish, 1),
)


class MobileNetV3(nn.Module):
    """MobileNetV3-Large. The last map of a stride is the one before the block that halves it."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(_convolution(3, 16, 3, nn.Hardswish, stride=2))
        before = 16
        for row in MOBILENET_V3_LARGE:
            self.features.append(InvertedResidual(before, row))
            before = row.channels
        self.features.append(_convolution(before, 6 * before, 1, nn.Hardswish))
        self.halving = [n for n, row in enumerate(MOBILENET_V3_LARGE, 1) if row.stride == 2]
        initialize(self)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        *_, to_stride_16, to_stride_32 = self.halving
        maps, x = {}, images
        for number, layer in enumerate(self.features):
            if number == to_stride_16:
                maps["pool3"] = x
            if number == to_stride_32:
                maps["pool4"] = x
            x = layer(x)
        return maps | {"fc7": x}


class InvertedResidual(nn.Module):
    """A block of MobileNetV3; its input is added where the sizes are equal."""

    def __init__(self, before: int, row: Row) -> None:
        super().__init__()
        kernel, expanded, channels, squeezes, activation, stride = row
        self.adds = stride == 1 and before == channels
        self.block = nn.Sequential()
        if expanded != before:
            self.block.append(_convolution(before, expanded, 1, activation))
        self.block.append(_convolution(expanded, expanded, kernel, activation, stride, groups=expanded))
        if squeezes:
            self.block.append(Squeeze(expanded))
        self.block.append(_convolution(expanded, channels, 1, None))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.block(x)
        return y + x if self.adds else y


class Squeeze(nn.Module):
    """Squeeze and excitation: every channel times a factor that follows from the means of all."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        # A quarter of the channels, in multiples of 8, but not less than nine tenths of that quarter
        squeezed = max(8, (channels // 4 + 4) // 8 * 8)
        if squeezed < 0.9 * (channels // 4):
            squeezed += 8
        self.fc1 = nn.Conv2d(channels, squeezed, 1)
        self.fc2 = nn.Conv2d(squeezed, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        means = F.adaptive_avg_pool2d(x, 1)
        return F.hardsigmoid(self.fc2(F.relu(self.fc1(means)))) * x


def _convolution(
    before: int, after: int, kernel: int, activation: type[nn.Module] | None, stride: int = 1, groups: int = 1
) -> nn.Sequential:
    """Convolution, batch normalisation and activation."""
    layers = nn.Sequential(
        nn.Conv2d(before, after, kernel, stride, kernel // 2, groups=groups, bias=False),
        nn.BatchNorm2d(after, eps=1e-3, momentum=0.01),
    )
    return layers.append(activation()) if activation else layers
