"""Losses on scores and labels that leave ignored pixels out.

Every loss is a sum over labelled pixels. The loop divides it by `label_weight` of the whole batch, so that
parts of a batch (accumulated, or spread over processes) add up to what the batch gives at once.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORE = 255
FOCAL_GAMMA = 2.0  # Lin et al. 2017, section 3.2
OHEM_SHARE = 0.25  # at least this share of the labelled pixels counts
OHEM_THRESHOLD = 0.7  # and all whose class is predicted with less than this probability


def label_weight(labels: Tensor, weights: Tensor | None) -> Tensor:
    """What a sum of losses is divided by: the labelled pixels, each with its class weight; a scalar.

    Args:
        labels: Class ids, int64 (N, H, W), 255 = ignore.
        weights: One factor per class, float (C,), or None for ones.
    """
    valid = labels[labels != IGNORE]
    return valid.new_tensor(valid.numel(), dtype=torch.float32) if weights is None else weights[valid].sum()


def segmentation_loss(
    scores: Tensor, labels: Tensor, kind: str, weights: Tensor | None = None, smoothing: float = 0.0
) -> Tensor:
    """The loss, summed over the labelled pixels.

    Args:
        scores: Before softmax, float (N, C, H, W).
        labels: Class ids, int64 (N, H, W), 255 = ignore.
        kind: `cross-entropy`, `focal`, `ohem`, `dice` or `cross-entropy+dice`.
        weights: One factor per class, float (C,).
        smoothing: Share of probability spread over all classes.

    Returns:
        A scalar; 0 when every pixel is ignored.
    """
    parts = [
        dice(scores, labels) * label_weight(labels, weights)
        if part == "dice"
        else _pixelwise(scores, labels, part, weights, smoothing)
        for part in kind.split("+")
    ]
    return torch.stack(parts).sum()


def _pixelwise(scores: Tensor, labels: Tensor, kind: str, weights: Tensor | None, smoothing: float) -> Tensor:
    losses = F.cross_entropy(
        scores, labels, weight=weights, ignore_index=IGNORE, reduction="none", label_smoothing=smoothing
    )  # (N, H, W), 0 where ignored
    if kind == "cross-entropy":
        return losses.sum()
    valid = labels != IGNORE
    losses = losses[valid]
    confidence = torch.exp(-F.cross_entropy(scores, labels, ignore_index=IGNORE, reduction="none")[valid])
    if kind == "focal":
        return (losses * (1 - confidence) ** FOCAL_GAMMA).sum()
    if not losses.numel():
        return losses.sum()
    hardest = losses.detach().topk(max(1, int(OHEM_SHARE * losses.numel()))).values[-1]
    kept = losses[(losses >= hardest) | (confidence < OHEM_THRESHOLD)]
    return kept.mean() * label_weight(labels, weights)


def dice(scores: Tensor, labels: Tensor) -> Tensor:
    """One minus the mean soft Dice over the classes that occur in the labels (Milletari et al. 2016)."""
    valid = (labels != IGNORE).unsqueeze(1)
    probabilities = scores.softmax(1) * valid
    truth = F.one_hot(labels.masked_fill(labels == IGNORE, 0), scores.shape[1]).movedim(-1, 1) * valid
    overlap = (probabilities * truth).sum((0, 2, 3))
    size = probabilities.sum((0, 2, 3)) + truth.sum((0, 2, 3))
    present = truth.sum((0, 2, 3)) > 0
    if not present.any():
        return scores.sum() * 0
    return 1 - (2 * overlap[present] / size[present]).mean()


def auxiliary_loss(scores: Tensor, labels: Tensor, weights: Tensor | None) -> Tensor:
    """Cross-entropy of coarser scores against the labels sampled at their stride, summed over pixels.

    Each coarse pixel stands for as many pixels as it covers, so that the sum is comparable to a full one.

    Args:
        scores: float (N, C, h, w).
        labels: int64 (N, H, W), 255 = ignore.
    """
    small = F.interpolate(labels[:, None].float(), scores.shape[-2:], mode="nearest-exact")[:, 0].long()
    return _pixelwise(scores, small, "cross-entropy", weights, 0.0) * (labels.numel() / small.numel())
