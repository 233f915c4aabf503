"""FCNs on image classifiers, cut at three strides.

Each encoder is a row of data: how it is built, and how many channels its maps at strides 8, 16 and 32 have,
which are called pool3, pool4 and fc7 as in VGG16. Those of `backbones` are our own; the others are
torchvision's, cut by its feature extraction at the named nodes. Their convolutions pad by half a kernel, so
maps need no offsets: an upsampled map is only cut to the size of the finer one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from segcli.models.backbones import MobileNetV3, ResNet
from segcli.models.fcn import FCN, Alignment, Channels, Features


@dataclass(frozen=True)
class Encoder:
    """A network from images to a dict of `Features`, with random weights, and the channels of its maps."""

    build: Callable[[], nn.Module]
    channels: Channels


def _torchvision(name: str, nodes: tuple[str, str, str], *channels: int) -> Encoder:
    return Encoder(partial(cut_torchvision, name, nodes), Channels(*channels))


def _regnet(name: str, *channels: int) -> Encoder:
    nodes = ("trunk_output.block2", "trunk_output.block3", "trunk_output.block4")
    return _torchvision(name, nodes, *channels)


def cut_torchvision(name: str, nodes: tuple[str, str, str]) -> nn.Module:
    """The torchvision classifier of that name, up to its nodes at strides 8, 16 and 32."""
    from torchvision.models import get_model
    from torchvision.models.feature_extraction import create_feature_extractor

    wanted = dict(zip(nodes, Features._fields, strict=True))
    with torch.device("cpu"):  # RegNet computes its widths with tensors, which "meta" cannot
        encoder: nn.Module = create_feature_extractor(get_model(name, weights=None), wanted)
    return encoder


ENCODERS: dict[str, Encoder] = {
    "mobilenet_v3_large": Encoder(MobileNetV3, Channels(40, 112, 960)),
    "efficientnet_b0": _torchvision(
        "efficientnet_b0", ("features.3", "features.5", "features.8"), 40, 112, 1280
    ),
    "regnet_y_400mf": _regnet("regnet_y_400mf", 104, 208, 440),
    "regnet_x_800mf": _regnet("regnet_x_800mf", 128, 288, 672),
    "resnet18": Encoder(partial(ResNet, (2, 2, 2, 2)), Channels(128, 256, 512)),
    "resnet34": Encoder(partial(ResNet, (3, 4, 6, 3)), Channels(128, 256, 512)),
    "resnet50": Encoder(partial(ResNet, (3, 4, 6, 3), bottleneck=True), Channels(512, 1024, 2048)),
}


class EncoderFCN(FCN):
    """FCN-32s, FCN-16s or FCN-8s on an image classifier; `encoder.*` has torchvision's names.

    Args:
        num_classes: Number of classes.
        stride: 32, 16 or 8.
        encoder: A key of `ENCODERS`.
    """

    def __init__(self, num_classes: int, stride: int, encoder: str) -> None:
        row = ENCODERS[encoder]
        super().__init__(num_classes, row.channels, stride, Alignment())
        self.encoder = row.build()
        self.dropout = nn.Dropout2d(0.1)

    def features(self, images: Tensor) -> Features:
        maps = self.encoder(images)  # by the names of `Features`
        return Features(maps["pool3"], maps["pool4"], self.dropout(maps["fc7"]))
