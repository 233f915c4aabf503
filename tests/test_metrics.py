from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import ndimage
from sklearn.metrics import confusion_matrix as reference_matrix
from sklearn.metrics import f1_score, jaccard_score, precision_score, recall_score

from segcli.boundaries import BoundaryCounts, boundary_counts
from segcli.metrics import confusion_matrix, ratio, scores

# ---- the confusion matrix ----


def test_rows_are_the_truth_and_columns_the_prediction() -> None:
    labels = np.array([[0, 0, 1], [1, 2, 255]], np.uint8)
    predictions = np.array([[0, 1, 1], [0, 2, 2]], np.uint8)
    expected = [
        [1, 1, 0],  # class 0 was taken for 0 once and for 1 once
        [1, 1, 0],
        [0, 0, 1],  # the pixel that is 255 in the labels is not here
    ]
    assert confusion_matrix(labels, predictions, 3).tolist() == expected


def test_what_is_predicted_at_ignored_pixels_does_not_matter() -> None:
    labels = np.array([255, 255, 1], np.uint8)
    assert confusion_matrix(labels, np.array([255, 77, 1], np.uint8), 2).tolist() == [[0, 0], [0, 1]]


def test_another_ignore_value() -> None:
    labels, predictions = np.array([30, 0, 1], np.uint8), np.array([1, 0, 0], np.uint8)
    assert confusion_matrix(labels, predictions, 2, ignore=30).tolist() == [[1, 0], [1, 0]]


def test_shapes_that_differ_and_ids_out_of_range_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\(2,\), predictions are \(3,\)"):
        confusion_matrix(np.zeros(2, np.uint8), np.zeros(3, np.uint8), 2)
    with pytest.raises(ValueError, match=r"labels hold ids from 0 to 2; classes are 0\.\.1"):
        confusion_matrix(np.array([0, 2]), np.array([0, 0]), 2)
    with pytest.raises(ValueError, match="predictions hold ids from -1"):
        confusion_matrix(np.array([0, 1]), np.array([0, -1]), 2)


# ---- scores ----


def test_scores_by_hand() -> None:
    #              predicted: 0  1  2  3
    matrix = np.array(
        [[6, 2, 0, 0], [1, 3, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]],
    )  # class 2 and 3 are neither in the labels nor predicted
    result = scores(matrix)
    assert result.pixel_accuracy == pytest.approx((6 + 3) / 12)
    assert result.mean_accuracy == pytest.approx((6 / 8 + 3 / 4) / 2)
    assert result.iou[:2] == pytest.approx([6 / (6 + 2 + 1), 3 / (3 + 1 + 2)])
    assert np.isnan(result.iou[2:]).all()
    assert result.mean_iou == pytest.approx((6 / 9 + 3 / 6) / 2)
    assert result.frequency_weighted_iou == pytest.approx(8 / 12 * 6 / 9 + 4 / 12 * 3 / 6)
    assert result.dice == pytest.approx((12 / 15 + 6 / 9) / 2)
    assert result.precision[:2] == pytest.approx([6 / 7, 3 / 5])
    assert result.recall[:2] == pytest.approx([6 / 8, 3 / 4])
    assert result.pixels.tolist() == [8, 4, 0, 0]


def test_a_class_that_is_only_predicted_lowers_the_mean_iu_but_not_the_mean_accuracy() -> None:
    result = scores(np.array([[3, 1], [0, 0]]))
    assert result.iou.tolist() == [0.75, 0.0]
    assert result.mean_iou == pytest.approx(0.375)
    assert result.mean_accuracy == pytest.approx(0.75)
    assert math.isnan(result.recall[1])
    assert result.precision[1] == 0


def test_a_class_that_is_never_found_lowers_both() -> None:
    result = scores(np.array([[4, 0], [2, 0]]))
    assert result.mean_iou == pytest.approx((4 / 6 + 0) / 2)
    assert result.mean_accuracy == pytest.approx(0.5)
    assert math.isnan(result.precision[1])


def test_nothing_to_measure_gives_nan() -> None:
    result = scores(np.zeros((3, 3), np.int64))
    for value in (
        result.pixel_accuracy,
        result.mean_accuracy,
        result.mean_iou,
        result.frequency_weighted_iou,
    ):
        assert math.isnan(value)


def test_scores_are_pooled_over_images_not_averaged() -> None:
    first, second = np.array([[9, 1], [0, 0]]), np.array([[0, 1], [0, 1]])
    pooled = scores(first + second)
    assert pooled.iou == pytest.approx([9 / 11, 1 / 3])
    assert pooled.mean_iou != pytest.approx((scores(first).mean_iou + scores(second).mean_iou) / 2)


@pytest.mark.parametrize("seed", range(5))
def test_scores_against_scikit_learn(seed: int) -> None:
    random = np.random.default_rng(seed)
    classes = int(random.integers(2, 12))
    labels = random.integers(0, classes, 5000).astype(np.uint8)
    predictions = np.where(random.random(5000) < 0.6, labels, random.integers(0, classes, 5000)).astype(
        np.uint8
    )
    labels[random.random(5000) < 0.1] = 255
    if seed == 0:
        labels[labels == 1] = predictions[predictions == 1] = 0  # one class is nowhere
    known = labels != 255
    truth, found = labels[known], predictions[known]
    matrix = confusion_matrix(labels, predictions, classes)
    result = scores(matrix)

    everything = list(range(classes))
    assert (matrix == reference_matrix(truth, found, labels=everything)).all()
    there = [c for c in everything if (truth == c).any() or (found == c).any()]
    options = {"labels": there, "average": None, "zero_division": 0}
    assert result.iou[there] == pytest.approx(jaccard_score(truth, found, **options))
    assert result.precision[there] == pytest.approx(precision_score(truth, found, **options))
    assert result.recall[there] == pytest.approx(recall_score(truth, found, **options))
    assert result.dice_per_class[there] == pytest.approx(f1_score(truth, found, **options))
    assert result.mean_iou == pytest.approx(jaccard_score(truth, found, labels=there, average="macro"))
    weighted = jaccard_score(truth, found, labels=there, average="weighted")
    assert result.frequency_weighted_iou == pytest.approx(weighted)


def test_ratio_of_nothing_is_nan() -> None:
    values = ratio([1, 0], [2, 0])
    assert values[0] == 0.5
    assert math.isnan(values[1])


# ---- boundaries ----


def blobs(random: np.random.Generator, shape: tuple[int, int], classes: int) -> np.ndarray:
    """A random label map with smooth regions."""
    fields = [ndimage.gaussian_filter(random.standard_normal(shape), 6) for _ in range(classes)]
    return np.argmax(fields, axis=0).astype(np.uint8)


def reference_band(mask: np.ndarray, width: int) -> np.ndarray:
    """mask_to_boundary of bowenc0221/boundary-iou-api: the mask without its erosion, background outside."""
    square = np.ones((3, 3), bool)
    return mask & ~ndimage.binary_erosion(mask, square, iterations=width, border_value=0)


@pytest.mark.parametrize("seed", range(4))
def test_boundary_iou_against_erosion_class_by_class(seed: int) -> None:
    random = np.random.default_rng(seed)
    labels, predictions = blobs(random, (90, 120), 4), blobs(random, (90, 120), 4)
    width = round(0.02 * 150)  # the diagonal of 90 x 120 is 150
    expected = []
    for c in range(4):
        truth, found = reference_band(labels == c, width), reference_band(predictions == c, width)
        expected.append((truth & found).sum() / (truth | found).sum())
    assert boundary_counts(labels, predictions, 4).iou() == pytest.approx(expected)


@pytest.mark.parametrize("seed", range(4))
def test_boundary_f_score_against_distances_class_by_class(seed: int) -> None:
    random = np.random.default_rng(seed)
    labels, predictions = blobs(random, (180, 240), 3), blobs(random, (180, 240), 3)
    distance = 0.0075 * 300
    cross = ndimage.generate_binary_structure(2, 1)
    expected = []
    for c in range(3):
        truth, found = (
            (m == c) & ~ndimage.binary_erosion(m == c, cross, border_value=1) for m in (labels, predictions)
        )
        precision = (ndimage.distance_transform_edt(~truth)[found] <= distance).mean()
        recall = (ndimage.distance_transform_edt(~found)[truth] <= distance).mean()
        expected.append(2 * precision * recall / (precision + recall))
    assert boundary_counts(labels, predictions, 3).f_score() == pytest.approx(expected)


def test_boundary_iou_by_hand() -> None:
    labels = np.zeros((30, 40), np.uint8)  # diagonal 50, so the band is 1 pixel wide
    labels[:, 20:] = 1
    predictions = np.zeros((30, 40), np.uint8)
    predictions[:, 22:] = 1
    # band of class 0 in the labels: the frame of 30 x 20, in the prediction that of 30 x 22;
    # common: 22 at the left, 2 x 19 above and below the rest of the label's frame that is not its right edge
    frame_label, frame_found = 30 * 20 - 28 * 18, 30 * 22 - 28 * 20
    common = 30 + 2 * 19  # left column, top and bottom rows; the right columns are 2 apart
    counts = boundary_counts(labels, predictions, 2)
    assert counts.labelled[0] == frame_label
    assert counts.predicted[0] == frame_found
    assert counts.both[0] == common
    assert counts.iou()[0] == pytest.approx(common / (frame_label + frame_found - common))


def test_a_perfect_prediction_scores_one_with_and_without_ignored_pixels() -> None:
    labels = blobs(np.random.default_rng(0), (60, 80), 3)
    labels[20:25] = 255
    predictions = np.where(labels == 255, 2, labels).astype(np.uint8)
    counts = boundary_counts(labels, predictions, 3)
    assert counts.iou() == pytest.approx([1, 1, 1])
    clean = labels.copy()
    clean[20:25] = 0
    assert boundary_counts(clean, clean, 3).f_score() == pytest.approx([1, 1, 1])


def test_ignored_pixels_make_no_outline_but_do_not_hide_one() -> None:
    labels = np.zeros((300, 400), np.uint8)  # diagonal 500: band 10, tolerance 3.75
    labels[100:103, :] = 255  # a stripe inside one class
    alone = boundary_counts(labels, np.zeros_like(labels), 2)
    assert alone.label_outline.tolist() == [0, 0]
    assert alone.labelled[0] == 300 * 400 - 280 * 380 - 3 * 20  # the edge of the image alone

    labels[103:, :] = 1  # now the stripe parts two classes, as in VOC
    predictions = np.zeros_like(labels)
    predictions[102:, :] = 1
    counts = boundary_counts(labels, predictions, 2)
    assert (counts.label_outline > 0).all()
    assert counts.f_score() == pytest.approx([1, 1])
    # class 0 has rows 0..99; from row 93 on, class 1 (row 103) is at most 10 away, across the stripe
    assert counts.labelled[0] == 100 * 400 - (93 - 10) * 380


def test_an_image_without_labels_counts_nothing() -> None:
    counts = boundary_counts(np.full((8, 8), 255, np.uint8), np.zeros((8, 8), np.uint8), 2)
    assert np.isnan(counts.iou()).all()
    assert np.isnan(counts.f_score()).all()


def test_void_may_be_predicted_as_void() -> None:
    labels = np.zeros((300, 400), np.uint8)
    labels[:, 200:] = 1
    labels[:, 199:202] = 255
    counts = boundary_counts(labels, labels.copy(), 2)
    assert counts.iou() == pytest.approx([1, 1])
    assert counts.f_score() == pytest.approx([1, 1])


def test_one_sided_outlines_score_zero() -> None:
    labels = np.zeros((60, 80), np.uint8)
    labels[20:40, 20:40] = 1
    counts = boundary_counts(labels, np.zeros_like(labels), 3)
    assert counts.f_score()[:2].tolist() == [0, 0]
    assert math.isnan(counts.f_score()[2])


def test_boundary_counts_add_up() -> None:
    random = np.random.default_rng(1)
    images = [(blobs(random, (60, 80), 3), blobs(random, (60, 80), 3)) for _ in range(2)]
    first, second = (boundary_counts(*pair, 3) for pair in images)
    total = first + second
    assert isinstance(total, BoundaryCounts)
    assert total.both.tolist() == (first.both + second.both).tolist()
    assert total.iou() == pytest.approx(ratio(total.both, total.labelled + total.predicted - total.both))
