"""From an image as displayed to what a network was trained on. It travels with the weights.

Functions import torch, OpenCV and Pillow when they run: what a model file says must be readable without them.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
import numpy.typing as npt

from segcli.errors import UsageError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Preprocessing:
    """How pixels become numbers.

    Attributes:
        mean, std: Subtracted and divided by, per channel in `order`, in units of `scale`.
        order: Channel order of the network.
        scale: The value of white: 1.0 (torchvision) or 255.0 (Caffe).
        shorter_side: Images are resized so that their shorter side has this many pixels; None keeps them.
        shrinking: How pixels are averaged when an image shrinks: over the area that each covers, or, as
            torchvision does, weighted by a triangle twice as wide.
    """

    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD
    order: Literal["RGB", "BGR"] = "RGB"
    scale: float = 1.0
    shorter_side: int | None = None
    shrinking: Literal["area", "triangle"] = "area"

    def __post_init__(self) -> None:
        numbers = (*self.mean, *self.std, self.scale)
        if len(self.mean) != 3 or len(self.std) != 3 or not all(map(math.isfinite, numbers)):
            raise UsageError("preprocessing needs three means and three deviations, all finite")
        if self.order not in ("RGB", "BGR") or min(*self.std, self.scale, self.shorter_side or 1) <= 0:
            raise UsageError("preprocessing needs the order RGB or BGR, and sizes and deviations above zero")


# How published weights want their images. Sources: voc_layers.py, siftflow_layers.py and nyud_layers.py of
# shelhamer/fcn.berkeleyvision.org; utils of zijundeng/pytorch-semantic-segmentation; the loaders of
# meetps/pytorch-semseg; torchvision's SemanticSegmentation preset.
PREPROCESSINGS: dict[str, Preprocessing] = {
    "caffe": Preprocessing((104.00698793, 116.66876762, 122.67891434), (1, 1, 1), "BGR", 255),
    "caffe-vgg": Preprocessing((103.939, 116.779, 123.68), (1, 1, 1), "BGR", 255),
    "caffe-unit": Preprocessing((104.00699, 116.66877, 122.67892), (255, 255, 255), "BGR", 255),
    "siftflow": Preprocessing((114.578, 115.294, 108.353), (1, 1, 1), "BGR", 255),
    "nyud": Preprocessing((116.190, 97.203, 92.318), (1, 1, 1), "BGR", 255),
    "nyud-hha": Preprocessing((132.431, 94.076, 118.477), (1, 1, 1), "RGB", 255),  # not turned to BGR
    "imagenet": Preprocessing(),
    "torchvision": Preprocessing(shorter_side=520, shrinking="triangle"),
}


LONGEST = 8  # times the shorter side that a preprocessing asks for


def network_size(height: int, width: int, preprocessing: Preprocessing) -> tuple[int, int]:
    """The size (H, W) at which the network sees an image of that size.

    The shorter side is as asked for, unless the longer one would then be more than `LONGEST` times that:
    a strip of 1 x 5000 pixels is not blown up to 520 x 2,600,000.
    """
    if preprocessing.shorter_side is None:
        return height, width
    long, short = max(height, width), min(height, width)
    shorter = preprocessing.shorter_side
    longer = shorter * long // short  # rounded down, as torchvision does
    if longer > LONGEST * shorter:
        longer = LONGEST * shorter
        shorter = max(1, longer * short // long)
    return (shorter, longer) if height <= width else (longer, shorter)


def resize(image: npt.NDArray[np.uint8], preprocessing: Preprocessing) -> npt.NDArray[np.uint8]:
    """An image, uint8 (H, W, 3), at the size at which the network sees it."""
    import cv2
    from PIL import Image

    height, width = network_size(image.shape[0], image.shape[1], preprocessing)
    if (height, width) == image.shape[:2]:
        return image
    shrinks = height < image.shape[0]
    if shrinks and preprocessing.shrinking == "triangle":
        return np.array(Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR))
    interpolation = cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR
    return cv2.resize(image, (width, height), interpolation=interpolation).astype(np.uint8, copy=False)


def resize_labels(labels: npt.NDArray[np.uint8], preprocessing: Preprocessing) -> npt.NDArray[np.uint8]:
    """A label map, uint8 (H, W), at the size at which the network sees its image; never interpolated."""
    import cv2

    height, width = network_size(labels.shape[0], labels.shape[1], preprocessing)
    if (height, width) == labels.shape:
        return labels
    resized = cv2.resize(labels, (width, height), interpolation=cv2.INTER_NEAREST_EXACT)
    return resized.astype(np.uint8, copy=False)


def normalize(images: Tensor, preprocessing: Preprocessing) -> Tensor:
    """RGB images, uint8 (N, 3, H, W), as the network's input, float32 of the same shape and device."""
    if preprocessing.order == "BGR":
        images = images.flip(1)
    mean, std = _constants(preprocessing, images.device)
    return (images * (preprocessing.scale / 255) - mean) / std


@functools.cache  # never let go: what is recorded on a GPU goes on reading them
def _constants(preprocessing: Preprocessing, device: torch.device) -> tuple[Tensor, Tensor]:
    """Mean and deviation on a device, float32 (3, 1, 1). Bringing them to a GPU makes it wait."""
    import torch

    with torch.inference_mode(False):  # they are kept for training as well
        mean, std = (torch.tensor(each, device=device) for each in (preprocessing.mean, preprocessing.std))
        return mean.view(3, 1, 1), std.view(3, 1, 1)


def to_pixels(image: npt.NDArray[np.uint8], preprocessing: Preprocessing) -> Tensor:
    """An image, uint8 (H, W, 3) RGB, as the network sees it before `normalize`, uint8 (1, 3, H', W')."""
    import torch

    return torch.from_numpy(np.ascontiguousarray(resize(image, preprocessing))).permute(2, 0, 1)[None]


def to_tensor(image: npt.NDArray[np.uint8], preprocessing: Preprocessing) -> Tensor:
    """An image, uint8 (H, W, 3) RGB, as the network's input, float32 (1, 3, H', W')."""
    return normalize(to_pixels(image, preprocessing), preprocessing)
