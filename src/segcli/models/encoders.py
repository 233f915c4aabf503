"""FCNs on torchvision's image classifiers, cut by torchvision's feature extraction.

Each encoder is a row of data: which nodes give the maps at strides 8, 16 and 32 (called pool3, pool4 and
fc7, as in VGG16), and how many channels they have. Their convolutions pad by half a kernel, so maps need no
offsets: an upsampled map is only cut to the size of the finer one.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from segcli.models.fcn import FCN, Alignment, Channels, Features


@dataclass(frozen=True)
class Encoder:
    """The torchvision classifier of that name: nodes and channels at strides 8, 16 and 32."""

    nodes: tuple[str, str, str]
    channels: Channels


def _resnet(width: int) -> Encoder:
    return Encoder(("layer2", "layer3", "layer4"), Channels(width, 2 * width, 4 * width))


def _regnet(*channels: int) -> Encoder:
    nodes = ("trunk_output.block2", "trunk_output.block3", "trunk_output.block4")
    return Encoder(nodes, Channels(*channels))


ENCODERS: dict[str, Encoder] = {
    "mobilenet_v3_large": Encoder(("features.6", "features.12", "features.16"), Channels(40, 112, 960)),
    "efficientnet_b0": Encoder(("features.3", "features.5", "features.8"), Channels(40, 112, 1280)),
    "regnet_y_400mf": _regnet(104, 208, 440),
    "regnet_x_800mf": _regnet(128, 288, 672),
    "resnet18": _resnet(128),
    "resnet34": _resnet(128),
    "resnet50": _resnet(512),
}


class EncoderFCN(FCN):
    """FCN-32s, FCN-16s or FCN-8s on a torchvision encoder; `encoder.*` keeps torchvision's names.

    Args:
        num_classes: Number of classes.
        stride: 32, 16 or 8.
        encoder: A key of `ENCODERS`.
    """

    def __init__(self, num_classes: int, stride: int, encoder: str) -> None:
        from torchvision.models import get_model
        from torchvision.models.feature_extraction import create_feature_extractor

        row = ENCODERS[encoder]
        super().__init__(num_classes, row.channels, stride, Alignment())
        nodes = dict(zip(row.nodes, Features._fields, strict=True))
        with torch.device("cpu"):  # RegNet computes its widths with tensors, which "meta" cannot
            self.encoder = create_feature_extractor(get_model(encoder, weights=None), nodes)
        self.dropout = nn.Dropout2d(0.1)

    def features(self, images: Tensor) -> Features:
        maps = self.encoder(images)
        return Features(maps["pool3"], maps["pool4"], self.dropout(maps["fc7"]))
