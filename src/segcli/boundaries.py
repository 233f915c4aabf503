"""How well label maps follow the outlines of the classes, pooled over a set.

Sources:
    boundary IoU      Cheng et al., "Boundary IoU", CVPR 2021: the IoU of those pixels of a class that are
                      within 2 % of the image's diagonal of its outline. Distances are those of a square (as
                      after erosions by 3 x 3 in bowenc0221/boundary-iou-api); the edge of the image is an
                      outline.
    boundary F-score  Csurka et al., "What is a good evaluation measure for semantic segmentation?", BMVC
                      2013: precision and recall of outline pixels within 0.75 % of the diagonal; the edge of
                      the image is no outline.

Both papers define the scores per image or per object; here the counts of all images are added up first, as
for the mean IU. Ignored pixels are no class: they count for nothing, and no outline runs along them. Where
two classes are parted by ignored pixels (as all objects in VOC), boundary IoU measures across them, and the
outlines of the F-score run through their middle.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import cv2
import numpy as np
import numpy.typing as npt

from segcli.metrics import Counts, Fractions, ratio

IOU_DISTANCE = 0.02  # of the diagonal
F_DISTANCE = 0.0075

Ids = npt.NDArray[np.uint8]
Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class BoundaryCounts:
    """Pixels per class, int64 (C,) each; counts of images add up with `+`.

    Attributes:
        labelled, predicted, both: Pixels near the class's outline in the labels, in the prediction, in both.
        label_outline, label_found: Outline pixels of the labels; those with predicted outline near them.
        outline, outline_right: Outline pixels of the prediction; those with labelled outline near them.
    """

    labelled: Counts
    predicted: Counts
    both: Counts
    label_outline: Counts
    label_found: Counts
    outline: Counts
    outline_right: Counts

    def __add__(self, other: BoundaryCounts) -> BoundaryCounts:
        return BoundaryCounts(
            *(mine + theirs for mine, theirs in zip(vars(self).values(), vars(other).values(), strict=True))
        )

    def iou(self) -> Fractions:
        """Boundary IoU, (C,); NaN for classes without pixels."""
        return ratio(self.both, self.labelled + self.predicted - self.both)

    def f_score(self) -> Fractions:
        """Boundary F-score, (C,); 0 when only one side has an outline, NaN when none has."""
        precision, recall = (
            ratio(self.outline_right, self.outline),
            ratio(self.label_found, self.label_outline),
        )
        some = np.where((self.outline > 0) | (self.label_outline > 0), 0.0, np.nan)
        total = precision + recall
        return np.divide(2 * precision * recall, total, out=some, where=total > 0)


def boundary_counts(labels: Ids, predictions: Ids, num_classes: int, ignore: int = 255) -> BoundaryCounts:
    """The counts of one image.

    Args:
        labels, predictions: uint8 (H, W) class ids. Where the labels have `ignore`, predictions may be
            anything.
    """
    void = labels == ignore
    diagonal = math.hypot(*labels.shape)
    width = max(1, round(IOU_DISTANCE * diagonal))
    near = _near_outline(labels, void, width) & ~void
    near_found = _near_outline(predictions, void, width) & ~void

    def count(chosen: Mask, ids: Ids) -> Counts:
        return np.bincount(ids[chosen], minlength=num_classes)[:num_classes].astype(np.int64)

    both = count(near & near_found & (labels == predictions), labels)
    outlines = _outline_counts(labels, predictions, void, max(1.0, F_DISTANCE * diagonal), num_classes)
    return BoundaryCounts(count(near, labels), count(near_found, predictions), both, *outlines)


def _near_outline(ids: Ids, void: Mask, width: int) -> Mask:
    """Pixels with another class, or the outside of the image, in the square of 2 * width + 1 around them."""
    high = np.where(void, 0, ids.astype(np.uint16) + 1)  # void never is the highest ...
    low = np.where(void, 65535, ids.astype(np.uint16) + 1)  # ... nor the lowest id
    square = np.ones((2 * width + 1, 2 * width + 1), np.uint8)
    highest = cv2.dilate(high.astype(np.uint16), square, borderType=cv2.BORDER_CONSTANT, borderValue=65534)
    lowest = cv2.erode(low.astype(np.uint16), square)
    differs: Mask = highest != lowest
    return differs


def _outline_counts(
    labels: Ids, predictions: Ids, void: Mask, distance: float, num_classes: int
) -> tuple[Counts, Counts, Counts, Counts]:
    """Outline pixels per class: of the labels, of those found; of the prediction, of those right."""
    if void.all():
        return tuple(np.zeros((4, num_classes), np.int64))  # type: ignore[return-value]
    counted = np.ones_like(void)
    if void.any():
        away, nearest = cv2.distanceTransformWithLabels(
            void.astype(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_5, labelType=cv2.DIST_LABEL_PIXEL
        )
        ids_by_label = np.zeros(nearest.max() + 1, np.uint8)
        ids_by_label[nearest[~void]] = labels[~void]
        labels = ids_by_label[nearest]  # every void pixel gets the class of the nearest labelled one
        predictions = np.where(
            predictions < num_classes, predictions, labels
        )  # void may be predicted as void
        counted = away <= distance
    outline, outline_found = _outline(labels) & counted, _outline(predictions) & counted
    result = np.zeros((4, num_classes), np.int64)
    for class_id in np.union1d(labels[outline], predictions[outline_found]).tolist():
        truth, found = outline & (labels == class_id), outline_found & (predictions == class_id)
        result[:, class_id] = (
            truth.sum(),
            (truth & _within(found, distance)).sum(),
            found.sum(),
            (found & _within(truth, distance)).sum(),
        )
    return tuple(result)  # type: ignore[return-value]


def _outline(ids: Ids) -> Mask:
    """Pixels with another class above, below, left or right of them."""
    result = np.zeros(ids.shape, np.bool_)
    down, right = ids[1:] != ids[:-1], ids[:, 1:] != ids[:, :-1]
    result[1:] |= down
    result[:-1] |= down
    result[:, 1:] |= right
    result[:, :-1] |= right
    return result


def _within(mask: Mask, distance: float) -> Mask:
    """Pixels at most `distance` (Euclidean, in pixels) from a pixel of the mask."""
    if not mask.any():
        return np.zeros_like(mask)
    away = cv2.distanceTransform((~mask).astype(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_PRECISE)
    near: Mask = away <= distance
    return near
