"""The fully convolutional head, written once: score layers, upsampling, skip fusion.

Long, Shelhamer & Darrell, "Fully Convolutional Networks for Semantic Segmentation", CVPR 2015
(section 4: upsampling is backwards convolution; skips combine what with where), and the authors'
release, shelhamer/fcn.berkeleyvision.org (layer names, crop offsets, at-once scales).

An encoder gives three feature maps at strides 8, 16 and 32, called pool3, pool4 and fc7 as in VGG16.
Each is scored by a 1x1 convolution; coarse scores are upsampled by two and added to the finer ones:

    fc7   -> score_fr    ------------------------------------> FCN-32s
                          upscore2 + score_pool4 ------------> FCN-16s
                                     upscore_pool4 + score_pool3 -> FCN-8s
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from fractions import Fraction
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

FINAL_LAYER = {32: "upscore", 16: "upscore16", 8: "upscore8"}  # the released name of the last upsampling


class Features(NamedTuple):
    """Feature maps of an encoder, float (N, C, H/stride, W/stride); a net uses those up to its stride."""

    pool3: Tensor  # stride 8
    pool4: Tensor  # stride 16
    fc7: Tensor  # stride 32


class Channels(NamedTuple):
    """Number of channels of `Features`."""

    pool3: int
    pool4: int
    fc7: int


class Window(NamedTuple):
    """A layer that slides a window: convolution, pooling, or (going up) transposed convolution."""

    kernel: int
    stride: int = 1
    padding: int = 0


@dataclass(frozen=True)
class Alignment:
    """Where maps of different strides meet.

    Attributes:
        score_pool4: First row and column of score_pool4 that lies under upscore2.
        score_pool3: First row and column of score_pool3 that lies under upscore_pool4.
        output: First row and column of the full-size scores that lies on the image.
        trimmed: The transposed convolutions cut half their kernel's overhang off at every side.
    """

    score_pool4: int = 0
    score_pool3: int = 0
    output: int = 0
    trimmed: bool = True


def position(x: Fraction, down: Iterable[Window] = (), up: Iterable[Window] = ()) -> Fraction:
    """Where the point `x` of the input lies after going down some windows, then up some others.

    Positions count in pixels of the map at hand, 0 = the centre of its first pixel. This is what Caffe's
    coord_map.py does for its Crop layer.
    """
    for kernel, stride, padding in down:
        x = (x + padding - Fraction(kernel - 1, 2)) / stride
    for kernel, stride, padding in up:
        x = x * stride + Fraction(kernel - 1, 2) - padding
    return x


def crop_offset(inner: Fraction, outer: Fraction) -> int:
    """The first pixel of the outer map that falls on the inner map, both given as positions of one point."""
    offset = outer - inner
    if offset.denominator != 1:
        raise ValueError(f"the two maps are not aligned: they are {offset} pixels apart")
    return int(offset)


def bilinear_kernel(stride: int, size: int | None = None) -> Tensor:
    """The kernel that interpolates bilinearly by an even stride, float (size, size); size 2 * stride.

    Its one-dimensional profile is a triangle with ones-sum per phase: stride 2 gives 1/4, 3/4, 3/4, 1/4.
    The odd size 2 * stride - 1 interpolates too, with its peak on a pixel (FCN-AlexNet's 63 at stride 32).
    """
    size = size or 2 * stride
    profile = 1 - torch.abs(torch.arange(size) - (size - 1) / 2) / stride
    return torch.outer(profile, profile)


def upsampling(num_classes: int, stride: int, trimmed: bool, size: int | None = None) -> nn.ConvTranspose2d:
    """A dense C x C transposed convolution, initialised to bilinear interpolation of every class."""
    padding = stride // 2 if trimmed else 0
    layer = nn.ConvTranspose2d(num_classes, num_classes, size or 2 * stride, stride, padding, bias=False)
    with torch.no_grad():
        layer.weight.zero_()
        layer.weight[range(num_classes), range(num_classes)] = bilinear_kernel(stride, size)
    return layer


def is_bilinear(layer: nn.ConvTranspose2d) -> bool:
    """Whether an untrimmed layer of `upsampling` still interpolates every class bilinearly."""
    classes, size, stride = layer.in_channels, layer.kernel_size[0], layer.stride[0]
    fixed = upsampling(classes, stride, trimmed=False, size=size).weight
    return layer.padding == (0, 0) and torch.equal(layer.weight.float().cpu(), fixed)


class Bilinear(nn.Module):
    """Fixed bilinear upsampling: the transposed convolution with the bilinear kernel of size 2 * stride.

    Args:
        stride: Even.
        trimmed: Half a stride is cut off at every side. Else scores fall to zero beyond the outermost ones.
    """

    def __init__(self, stride: int, trimmed: bool = True) -> None:
        super().__init__()
        self.stride = stride
        self.trimmed = trimmed

    def forward(self, scores: Tensor) -> Tensor:
        if not self.trimmed:
            scores = F.pad(scores, (1, 1, 1, 1))
        full = F.interpolate(scores, scale_factor=self.stride, mode="bilinear", align_corners=False)
        half = self.stride // 2
        return full if self.trimmed else full[..., half:-half, half:-half]


class Network(nn.Module):
    """What every network here does: scores of C classes at its own strides, then at the image's size.

    Attributes:
        num_classes: Number of classes C.
        stride: The stride of its finest scores.
    """

    num_classes: int
    stride: int

    @abstractmethod
    def score_pyramid(self, images: Tensor) -> list[Tensor]:
        """Scores, float (N, C, H/stride, W/stride), from the coarsest to the finest."""

    @abstractmethod
    def upsample(self, scores: Tensor, size: tuple[int, int]) -> Tensor:
        """The finest scores at the image's size (H, W)."""

    def forward(self, images: Tensor) -> Tensor:
        """Images, float (N, 3, H, W), to scores before softmax, float (N, C, H, W)."""
        height, width = images.shape[-2:]
        return self.upsample(self.score_pyramid(images)[-1], (height, width))


class FCN(Network):
    """A fully convolutional network; subclasses provide the encoder by `features`.

    Args:
        num_classes: Number of classes C.
        channels: Channels of the encoder's feature maps.
        stride: 32, 16 or 8: the stride of the finest scores, hence FCN-32s, FCN-16s or FCN-8s.
        alignment: How the maps of different strides are cropped onto each other.
        scales: Factors on pool4 and pool3 before they are scored (the at-once net: 0.01 and 0.0001).
        learned_output: The last upsampling is a layer with weights, as released, not fixed bilinear.
    """

    def __init__(
        self,
        num_classes: int,
        channels: Channels,
        stride: int,
        alignment: Alignment,
        scales: tuple[float, float] = (1.0, 1.0),
        learned_output: bool = False,
    ) -> None:
        super().__init__()
        if stride not in FINAL_LAYER:
            raise ValueError(f"stride is {stride}; it must be 32, 16 or 8")
        self.num_classes = num_classes
        self.stride = stride
        self.alignment = alignment
        self.scales = scales
        self.score_fr = nn.Conv2d(channels.fc7, num_classes, 1)
        if stride <= 16:
            self.score_pool4 = nn.Conv2d(channels.pool4, num_classes, 1)
            self.upscore2 = upsampling(num_classes, 2, alignment.trimmed)
        if stride <= 8:
            self.score_pool3 = nn.Conv2d(channels.pool3, num_classes, 1)
            self.upscore_pool4 = upsampling(num_classes, 2, alignment.trimmed)
        output = upsampling(num_classes, stride, alignment.trimmed) if learned_output else Bilinear(stride)
        self.add_module(FINAL_LAYER[stride], output)

    @abstractmethod
    def features(self, images: Tensor) -> Features:
        """Encode images, float (N, 3, H, W), of any size from 1 x 1."""

    def score_pyramid(self, images: Tensor) -> list[Tensor]:
        """Scores at stride 32, then 16, then 8, as far as the network goes; the last are the finest."""
        return self.score_features(self.features(images))

    def score_features(self, features: Features) -> list[Tensor]:
        """The head: the score pyramid from the encoder's feature maps."""
        pool3, pool4, fc7 = features
        pyramid = [self.score_fr(fc7)]  # (N, C, H/32, W/32)
        if self.stride <= 16:
            score = self.score_pool4(pool4 * self.scales[0])
            pyramid.append(fuse(self.upscore2(pyramid[-1]), score, self.alignment.score_pool4))
        if self.stride <= 8:
            score = self.score_pool3(pool3 * self.scales[1])
            pyramid.append(fuse(self.upscore_pool4(pyramid[-1]), score, self.alignment.score_pool3))
        return pyramid

    def upsample(self, scores: Tensor, size: tuple[int, int]) -> Tensor:
        """The finest scores at the image's size (H, W): the last upsampling, cropped onto the image."""
        full = self.get_submodule(FINAL_LAYER[self.stride])(scores)
        top = left = self.alignment.output
        cropped: Tensor = full[..., top : top + size[0], left : left + size[1]]
        return cropped

    def preview(self, scores: Tensor, stride: int, size: tuple[int, int]) -> Tensor:
        """Scores of the pyramid at any of its strides, interpolated straight to the image's size (H, W).

        This is what the net would give without its finer skips. A coarse map starts where the finest one
        starts, but fewer transposed convolutions push it outwards by less.
        """
        offset = 0
        if not self.alignment.trimmed:
            doublings = (stride // self.stride).bit_length() - 1
            stepwise = [Window(4, stride=2)] * doublings + [Window(2 * self.stride, stride=self.stride)]
            at_once = [Window(2 * stride, stride=stride)]
            shift = position(Fraction(0), up=stepwise) - position(Fraction(0), up=at_once)
            # F.interpolate is the transposed convolution with half a stride trimmed off at every side.
            offset = int(self.alignment.output - shift) - stride // 2
        full = F.interpolate(scores, scale_factor=stride, mode="bilinear", align_corners=False)
        return full[..., offset : offset + size[0], offset : offset + size[1]]


def fuse(coarse: Tensor, fine: Tensor, offset: int) -> Tensor:
    """Add upsampled coarse scores to the fine scores that lie under them, `offset` pixels in."""
    height = min(coarse.shape[-2], fine.shape[-2] - offset)
    width = min(coarse.shape[-1], fine.shape[-1] - offset)
    return coarse[..., :height, :width] + fine[..., offset : offset + height, offset : offset + width]
