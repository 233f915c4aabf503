"""From an image as displayed to what a network was trained on. It travels with the weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import cv2
import numpy as np
import numpy.typing as npt
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
    """

    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD
    order: Literal["RGB", "BGR"] = "RGB"
    scale: float = 1.0
    shorter_side: int | None = None


def network_size(height: int, width: int, preprocessing: Preprocessing) -> tuple[int, int]:
    """The size (H, W) at which the network sees an image of that size."""
    if preprocessing.shorter_side is None:
        return height, width
    factor = preprocessing.shorter_side / min(height, width)
    return max(1, round(height * factor)), max(1, round(width * factor))


def resize(image: npt.NDArray[np.uint8], preprocessing: Preprocessing) -> npt.NDArray[np.uint8]:
    """An image, uint8 (H, W, 3), at the size at which the network sees it."""
    height, width = network_size(image.shape[0], image.shape[1], preprocessing)
    if (height, width) == image.shape[:2]:
        return image
    shrinks = height < image.shape[0]
    interpolation = cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR
    return cv2.resize(image, (width, height), interpolation=interpolation).astype(np.uint8, copy=False)


def resize_labels(labels: npt.NDArray[np.uint8], preprocessing: Preprocessing) -> npt.NDArray[np.uint8]:
    """A label map, uint8 (H, W), at the size at which the network sees its image; never interpolated."""
    height, width = network_size(labels.shape[0], labels.shape[1], preprocessing)
    if (height, width) == labels.shape:
        return labels
    resized = cv2.resize(labels, (width, height), interpolation=cv2.INTER_NEAREST_EXACT)
    return resized.astype(np.uint8, copy=False)


def normalize(images: Tensor, preprocessing: Preprocessing) -> Tensor:
    """RGB images, uint8 (N, 3, H, W), as the network's input, float32 of the same shape and device."""
    if preprocessing.order == "BGR":
        images = images.flip(1)
    mean = torch.tensor(preprocessing.mean, device=images.device).view(3, 1, 1)
    std = torch.tensor(preprocessing.std, device=images.device).view(3, 1, 1)
    return (images * (preprocessing.scale / 255) - mean) / std


def to_tensor(image: npt.NDArray[np.uint8], preprocessing: Preprocessing) -> Tensor:
    """An image, uint8 (H, W, 3) RGB, as the network's input, float32 (1, 3, H', W')."""
    resized = np.ascontiguousarray(resize(image, preprocessing))
    return normalize(torch.from_numpy(resized).permute(2, 0, 1)[None], preprocessing)
