"""The FCNs of meetps/pytorch-semseg (ptsemseg/models/fcn.py) in the form that has no upsampling layers.

They are VGG16 with the released padding of 100 pixels, but nothing is cropped: scores of the padded image are
resized to the next finer map, and in the end to the image. That is not what the authors released, yet weights
trained so give their own results only so. Early versions resize bilinearly with aligned corners; later ones
call `F.upsample` without a mode, which takes the nearest score. (Its fcn8s with upsampling layers is the
released net, `VGG16FCN`.)
"""

from __future__ import annotations

from typing import Literal

import torch.nn.functional as F
from torch import Tensor

from segcli.models.fcn import FINAL_LAYER, Features
from segcli.models.vgg import VGG16FCN, WIDTHS

Mode = Literal["bilinear", "nearest"]


class ResizingVGG16FCN(VGG16FCN):
    """FCN-32s, FCN-16s or FCN-8s on VGG16 that resizes where the released nets upsample and crop.

    Args:
        num_classes: Number of classes.
        stride: 32, 16 or 8.
        mode: How scores are resized.
        widths: As for `VGG16FCN`.
    """

    def __init__(self, num_classes: int, stride: int, mode: Mode, widths: tuple[int, ...] = WIDTHS) -> None:
        super().__init__(num_classes, stride, widths=widths)
        self.mode = mode
        for name in ("upscore2", "upscore_pool4", FINAL_LAYER[stride]):
            if hasattr(self, name):
                delattr(self, name)

    def score_features(self, features: Features) -> list[Tensor]:
        pool3, pool4, fc7 = features
        pyramid = [self.score_fr(fc7)]
        if self.stride <= 16:
            score = self.score_pool4(pool4)
            pyramid.append(self._resize(pyramid[-1], score) + score)
        if self.stride <= 8:
            score = self.score_pool3(pool3)
            pyramid.append(self._resize(pyramid[-1], score) + score)
        return pyramid

    def upsample(self, scores: Tensor, size: tuple[int, int]) -> Tensor:
        aligned = True if self.mode == "bilinear" else None
        return F.interpolate(scores, size, mode=self.mode, align_corners=aligned)

    def preview(self, scores: Tensor, stride: int, size: tuple[int, int]) -> Tensor:
        return self.upsample(scores, size)

    def _resize(self, coarse: Tensor, fine: Tensor) -> Tensor:
        return self.upsample(coarse, (fine.shape[-2], fine.shape[-1]))
