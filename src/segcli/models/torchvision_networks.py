"""torchvision's segmentation networks as they are (torchvision.models.segmentation), behind our interface.

Parameters keep torchvision's names (backbone.*, classifier.*). The auxiliary classifier serves only training
and is left out.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from segcli.models.fcn import Network

STRIDES = {  # torchvision's builders, and the stride of their scores (their backbones are dilated)
    "fcn_resnet50": 8,
    "fcn_resnet101": 8,
    "deeplabv3_resnet50": 8,
    "deeplabv3_resnet101": 8,
    "deeplabv3_mobilenet_v3_large": 16,
    "lraspp_mobilenet_v3_large": 8,
}


class TorchvisionNetwork(Network):
    """A network of torchvision, from random weights.

    Args:
        num_classes: Number of classes.
        builder: A key of `STRIDES`: the name of torchvision's builder.
    """

    def __init__(self, num_classes: int, builder: str) -> None:
        from torchvision.models import get_model

        super().__init__()
        self.num_classes = num_classes
        self.stride = STRIDES[builder]
        self.sees_two_maps = builder.startswith("lraspp")
        model = get_model(builder, weights=None, weights_backbone=None, num_classes=num_classes)
        self.backbone = model.backbone
        self.classifier = model.classifier

    def score_pyramid(self, images: Tensor) -> list[Tensor]:
        features = self.backbone(images)
        return [self.classifier(features if self.sees_two_maps else features["out"])]

    def upsample(self, scores: Tensor, size: tuple[int, int]) -> Tensor:
        return F.interpolate(scores, size, mode="bilinear", align_corners=False)
