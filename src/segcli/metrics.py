"""Scores of label maps, from one confusion matrix over the whole set.

Definitions are those of score.py of shelhamer/fcn.berkeleyvision.org and of section 5 of Long, Shelhamer &
Darrell (CVPR 2015), with n_ij the pixels of class i predicted as j and t_i = sum_j n_ij:

    pixel accuracy         sum_i n_ii / sum_i t_i
    mean accuracy          mean over classes in the labels of n_ii / t_i
    mean IU                mean over classes in labels or predictions of n_ii / (t_i + sum_j n_ji - n_ii)
    frequency weighted IU  sum_i t_i IU_i / sum_i t_i
    Dice                   mean over classes in labels or predictions of 2 n_ii / (t_i + sum_j n_ji)

A class that is neither in the labels nor in the predictions has no IoU and counts in no mean. A class that is
predicted but never in the labels has IoU 0 and lowers the mean.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Labels = npt.NDArray[np.integer[Any]]
Counts = npt.NDArray[np.int64]
Fractions = npt.NDArray[np.float64]

MEAN_IU_DEFINITION = (
    "mean IU: intersection over union per class, pooled over all images; "
    "mean over the classes that occur in labels or predictions"
)


@dataclass(frozen=True)
class Scores:
    """Fractions of 1; NaN where nothing was there to be measured.

    Attributes:
        iou, dice_per_class: (C,), NaN for classes in neither labels nor predictions.
        precision: (C,), NaN for classes that were never predicted.
        recall: (C,), also called class accuracy; NaN for classes that are not in the labels.
        pixels: (C,), labelled pixels per class.
    """

    pixel_accuracy: float
    mean_accuracy: float
    mean_iou: float
    frequency_weighted_iou: float
    dice: float
    iou: Fractions
    dice_per_class: Fractions
    precision: Fractions
    recall: Fractions
    pixels: Counts


def confusion_matrix(labels: Labels, predictions: Labels, num_classes: int, ignore: int = 255) -> Counts:
    """Count pixels: int64 (C, C), rows are the truth, columns the prediction. Matrices of images add up.

    Args:
        labels: Class ids, 0..C-1, of any shape; pixels with `ignore` do not count.
        predictions: Class ids of the same shape. What they are at ignored pixels does not matter.

    Raises:
        ValueError: The shapes differ, or an id is no class.
    """
    if labels.shape != predictions.shape:
        raise ValueError(f"labels are {labels.shape}, predictions are {predictions.shape}")
    counted = labels != ignore
    truth, found = labels[counted].astype(np.int64), predictions[counted].astype(np.int64)
    for name, ids in (("labels", truth), ("predictions", found)):
        if ids.size and not 0 <= ids.min() <= ids.max() < num_classes:
            raise ValueError(
                f"{name} hold ids from {ids.min()} to {ids.max()}; classes are 0..{num_classes - 1}"
            )
    counts = np.bincount(num_classes * truth + found, minlength=num_classes**2)
    return counts.reshape(num_classes, num_classes).astype(np.int64, copy=False)


def scores(matrix: Counts) -> Scores:
    """All scores of a confusion matrix, int64 (C, C), rows = truth."""
    correct = np.diag(matrix).astype(np.float64)
    labelled, predicted = matrix.sum(1), matrix.sum(0)
    iou = ratio(correct, labelled + predicted - correct)
    recall = ratio(correct, labelled)
    dice = ratio(2 * correct, labelled + predicted)
    present = labelled > 0
    total = matrix.sum()
    return Scores(
        pixel_accuracy=float(ratio(correct.sum(), total)),
        mean_accuracy=mean(recall),
        mean_iou=mean(iou),
        frequency_weighted_iou=float(ratio((labelled[present] * iou[present]).sum(), total)),
        dice=mean(dice),
        iou=iou,
        dice_per_class=dice,
        precision=ratio(correct, predicted),
        recall=recall,
        pixels=labelled,
    )


def ratio(part: npt.ArrayLike, whole: npt.ArrayLike) -> Fractions:
    """part / whole in float64, NaN where whole is 0."""
    part, whole = np.asarray(part, np.float64), np.asarray(whole, np.float64)
    result: Fractions = np.divide(part, whole, out=np.full(part.shape, np.nan), where=whole > 0)
    return result


def mean(values: Fractions) -> float:
    """The mean of the values that are not NaN; NaN when there are none."""
    known = values[~np.isnan(values)]
    return float(known.mean()) if known.size else float("nan")
