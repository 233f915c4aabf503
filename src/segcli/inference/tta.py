"""Test-time augmentation: the mean of what a network says of variants of an image.

Source: Chen et al., "Rethinking Atrous Convolution for Semantic Image Segmentation" (2017), section 4:
probabilities at several scales, and of the mirrored image, are averaged.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from segcli.errors import UsageError

if TYPE_CHECKING:
    from torch import Tensor

LEAST = 1e-30  # of a probability, so that its logarithm can still be interpolated


@dataclass(frozen=True)
class Variants:
    """Scales at which an image is seen; at each of them also mirrored, where `mirrored`."""

    scales: tuple[float, ...] = (1.0,)
    mirrored: bool = False


TTA: dict[str, Variants] = {
    "none": Variants(),
    "flip": Variants(mirrored=True),
    "scales": Variants((0.75, 1.0, 1.25), mirrored=True),
}


def variants_of(name: str) -> Variants:
    """The variants of that name, a key of `TTA`. Needs no torch, so that a wrong name is found at once.

    Raises:
        UsageError: The name is unknown.
    """
    if name not in TTA:
        raise UsageError(f"--tta {name!r} is unknown; use {', '.join(TTA)}")
    return TTA[name]


def average(
    network: Callable[[Tensor], Tensor], images: Tensor, variants: Variants, heads: Sequence[int] = ()
) -> Tensor:
    """Scores (N, C, h, w) of images (N, 3, H, W): the logarithm of the mean probabilities of all variants.

    With one variant they are the network's own scores. `heads` are the numbers of classes of a network with
    several heads, which add up to C.
    """
    import torch
    import torch.nn.functional as F

    if variants == TTA["none"]:
        return network(images)
    size = images.shape[-2:]
    total = torch.zeros(())
    for scale in variants.scales:
        scaled = images
        if scale != 1:
            smaller = (max(1, round(size[0] * scale)), max(1, round(size[1] * scale)))
            scaled = F.interpolate(images, smaller, mode="bilinear", align_corners=False, antialias=scale < 1)
        for mirrored in (False, True)[: 1 + variants.mirrored]:
            scores = network(scaled.flip(-1) if mirrored else scaled).float()
            scores = scores.flip(-1) if mirrored else scores
            if scores.shape[-2:] != size:
                scores = F.interpolate(scores, size, mode="bilinear", align_corners=False)
            sizes = list(heads) or [scores.shape[1]]
            total = total.to(scores.device) + torch.cat(
                [part.softmax(1) for part in torch.split(scores, sizes, 1)], 1
            )
    shares = [part / part.sum(1, keepdim=True) for part in torch.split(total, sizes, 1)]
    return torch.cat(shares, 1).clamp_min(LEAST).log()
