"""Training augmentation, with torchvision's transforms v2: images bilinear, labels nearest, always."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torchvision import tv_tensors
from torchvision.transforms import v2

IGNORE = 255  # label of padded pixels


@dataclass(frozen=True)
class Augmentation:
    """How a training sample is varied.

    Attributes:
        crop: Height and width of the training crops, in pixels.
        scale: Range of the random scale; 1 fits the whole image into the crop.
        flip: Probability of a horizontal flip.
        jitter: Strength of the colour jitter: brightness, contrast and saturation vary by up to this share,
            hue by a tenth of it.
        rotation: Largest rotation, in degrees.
        blur: Probability of a Gaussian blur.
        erase: Probability that a rectangle of the image is painted over (its labels stay).
    """

    crop: tuple[int, int] = (288, 352)
    scale: tuple[float, float] = (0.5, 2.0)
    flip: float = 0.5
    jitter: float = 0.3
    rotation: float = 0.0
    blur: float = 0.0
    erase: float = 0.0


def training_transform(augmentation: Augmentation, fill: tuple[int, int, int]) -> v2.Transform:
    """Random scale, rotation, crop, flip, colour jitter and blur of a (tv Image, tv Mask) pair.

    Args:
        augmentation: What to vary, and how much.
        fill: Colour of padding, RGB 0..255; usually the data's mean.

    Returns:
        A callable on uint8 (3, H, W) images and uint8 (H, W) masks; padded label pixels become 255. It draws
        from torch's global generator.
    """
    fills = {tv_tensors.Image: list(fill), tv_tensors.Mask: IGNORE}
    steps: list[v2.Transform] = [v2.ScaleJitter(augmentation.crop, augmentation.scale, antialias=True)]
    if augmentation.rotation:
        steps.append(
            v2.RandomRotation(augmentation.rotation, interpolation=v2.InterpolationMode.BILINEAR, fill=fills)
        )
    steps.append(v2.RandomCrop(augmentation.crop, pad_if_needed=True, fill=fills))
    if augmentation.flip:
        steps.append(v2.RandomHorizontalFlip(augmentation.flip))
    if augmentation.jitter:
        strength = augmentation.jitter
        steps.append(v2.ColorJitter(strength, strength, strength, hue=strength / 10))
    if augmentation.blur:
        steps.append(v2.RandomApply([v2.GaussianBlur(5, (0.1, 2.0))], p=augmentation.blur))
    if augmentation.erase:
        steps.append(_EraseImage(augmentation.erase, fill))
    return v2.Compose(steps)


def classifier_transform(augmentation: Augmentation) -> v2.Transform:
    """Random crop, resized to `augmentation.crop`, flip, jitter and erasing of a uint8 (3, H, W) image."""
    steps: list[v2.Transform] = [
        v2.RandomResizedCrop(augmentation.crop, augmentation.scale, antialias=True),
        v2.RandomHorizontalFlip(augmentation.flip),
    ]
    if augmentation.jitter:
        strength = augmentation.jitter
        steps.append(v2.ColorJitter(strength, strength, strength, hue=strength / 10))
    if augmentation.erase:
        steps.append(v2.RandomErasing(p=augmentation.erase, scale=(0.02, 0.25)))
    return v2.Compose(steps)


class _EraseImage(v2.RandomErasing):  # type: ignore[misc]  # torchvision is not typed
    """Random erasing that keeps the labels: the net has to fill the hole from what is around it."""

    def __init__(self, p: float, fill: tuple[int, int, int]) -> None:
        super().__init__(p=p, scale=(0.02, 0.15), value=[float(c) for c in fill])

    def transform(self, inpt: object, params: dict[str, object]) -> object:
        return inpt if isinstance(inpt, tv_tensors.Mask) else super().transform(inpt, params)


def to_pair(image: torch.Tensor, label: torch.Tensor) -> tuple[tv_tensors.Image, tv_tensors.Mask]:
    """Wrap an image, uint8 (3, H, W), and its label map, uint8 (H, W), so that v2 treats each rightly."""
    return tv_tensors.Image(image), tv_tensors.Mask(label)


def class_mix(
    image: torch.Tensor, label: torch.Tensor, other_image: torch.Tensor, other_label: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Paste half of the other sample's classes, chosen at random, over a sample of the same size.

    ClassMix (Olsson, Tranheden, Pinto & Svensson, WACV 2021, Section 3.1), between labelled samples.

    Args:
        image: uint8 (3, H, W).
        label: uint8 (H, W); 255 is never pasted.
        other_image: As image.
        other_label: As label.

    Returns:
        Image and label. Of an odd number of classes, the larger half is pasted.
    """
    classes = torch.unique(other_label)
    classes = classes[classes != IGNORE]
    chosen = classes[torch.randperm(len(classes))[: (len(classes) + 1) // 2]]
    pasted = torch.isin(other_label, chosen)
    return torch.where(pasted, other_image, image), torch.where(pasted, other_label, label)
