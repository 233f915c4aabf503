"""An evaluation as documents and pictures: JSON, CSV, charts, the worst images."""

from __future__ import annotations

import csv
import io
import math
import warnings
from collections.abc import Sequence
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt

from segcli.data.layout import Sample
from segcli.data.sets import IGNORE
from segcli.errors import ImageError
from segcli.evaluation import Evaluation, Ids
from segcli.images import read_image
from segcli.metrics import Counts, Fractions, mean, ratio
from segcli.palettes import ClassSet
from segcli.render import colorize, grid, overlay

Pixels = npt.NDArray[np.uint8]

_PANEL = 360  # pixels of the longer side of a picture among the worst
_LARGEST = 40  # inches of a side of the confusion matrix
_NUMBERED = 25  # classes up to which a confusion matrix has room for numbers


def document(result: Evaluation) -> dict[str, Any]:
    """The scores as JSON: fractions of 1, null where nothing was there to be measured."""
    total = result.scores
    boundary, outline = result.boundaries.iou(), result.boundaries.f_score()
    per_class = [
        {
            "name": name,
            "iou": _number(total.iou[i]),
            "precision": _number(total.precision[i]),
            "recall": _number(total.recall[i]),
            "dice": _number(total.dice_per_class[i]),
            "boundary_iou": _number(boundary[i]),
            "boundary_f_score": _number(outline[i]),
            "pixels": int(total.pixels[i]),
            "images": int(result.occurs[i]),
        }
        for i, name in enumerate(result.class_set.names)
    ]
    return {
        "pixel_accuracy": _number(total.pixel_accuracy),
        "mean_accuracy": _number(total.mean_accuracy),
        "mean_iou": _number(total.mean_iou),
        "frequency_weighted_iou": _number(total.frequency_weighted_iou),
        "dice": _number(total.dice),
        "boundary_iou": _number(mean(boundary)),
        "boundary_f_score": _number(mean(outline)),
        "per_class": per_class,
        "images": len(result.images) - len(result.failed),
        "failed": [{"name": image.name, "problem": image.problem} for image in result.failed],
    }


def _number(value: float) -> float | None:
    return None if math.isnan(value) else round(float(value), 6)


def images_csv(result: Evaluation) -> bytes:
    """One line per image: its own scores, from its own pixels alone, or why it has none."""
    header = ["name", "problem", "pixels", "pixel_accuracy", "mean_iou"]
    rows = [
        [image.name, image.problem, image.pixels]
        + [_cell(value) for value in (image.pixel_accuracy, image.mean_iou, *image.iou)]
        for image in result.images
    ]
    return _csv([header + [f"iou {name}" for name in result.class_set.names], *rows])


def matrix_csv(result: Evaluation) -> bytes:
    """The confusion matrix in pixels: a row per true class, a column per predicted one."""
    names = result.class_set.names
    rows = [[name, *row] for name, row in zip(names, result.matrix.tolist(), strict=True)]
    return _csv([["label \\ prediction", *names], *rows])


def _cell(value: float) -> str:
    return "" if math.isnan(value) else f"{value:.6f}"


def _csv(rows: Sequence[Sequence[object]]) -> bytes:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue().encode("utf-8", "backslashreplace")


def row_shares(matrix: Counts) -> Fractions:
    """The confusion matrix as shares of each true class, (C, C); NaN rows for classes without pixels."""
    return ratio(matrix, np.repeat(matrix.sum(1, keepdims=True), len(matrix), axis=1))


def worst_picture(result: Evaluation, with_images: bool) -> Pixels:
    """The worst images, worst first: image, label and prediction side by side, in rows.

    Args:
        with_images: The samples have photographs; without, only label and prediction are shown.
    """
    palette = result.class_set.palette()
    palette[IGNORE] = result.class_set.ignore_color
    rows = []
    for bad in sorted(result.worst, reverse=True):
        title = f"{bad.sample.name}  mean IU {-100 * bad.badness:.1f}"
        shown = np.where(bad.truth == IGNORE, IGNORE, bad.predicted).astype(np.uint8)
        image = _image_of(bad.sample) if with_images else None
        if image is not None:
            rows.append(panels(title, image, bad.truth, bad.predicted, palette))
        else:
            row = [(title, colorize(bad.truth, palette)), ("prediction", colorize(shown, palette))]
            rows.append([(text, _shrunk(picture)) for text, picture in row])
    return grid(rows)


def _image_of(sample: Sample) -> Pixels | None:
    """The photograph, or None when it was taken away meanwhile."""
    try:
        return read_image(sample.image).pixels
    except ImageError:
        return None


def panels(
    title: str, image: Pixels, truth: Ids, predicted: Ids, palette: Pixels
) -> list[tuple[str, Pixels]]:
    """A row for `render.grid`: image, label and prediction side by side, in a size to compare them.

    Args:
        title: Stands above the image.
        image: uint8 (H, W, 3).
        truth, predicted: Class ids, uint8 (H, W).
        palette: uint8 (256, 3).
    """
    row = [
        (title, image),
        ("label", overlay(image, truth, palette, 0.7)),
        ("prediction", overlay(image, predicted, palette, 0.7)),
    ]
    return [(text, _shrunk(picture)) for text, picture in row]


def _shrunk(picture: Pixels) -> Pixels:
    scale = _PANEL / max(picture.shape[:2])
    if scale >= 1:
        return picture
    size = (max(1, round(picture.shape[1] * scale)), max(1, round(picture.shape[0] * scale)))
    return cv2.resize(picture, size, interpolation=cv2.INTER_AREA).astype(np.uint8, copy=False)


# ---- charts, with matplotlib ----


def confusion_chart(matrix: Counts, classes: ClassSet) -> bytes:
    """The confusion matrix as a PNG: every row shows what became of the pixels of a class.

    Raises:
        ImportError: matplotlib is not installed.
    """
    from matplotlib.figure import Figure

    shares = row_shares(matrix)
    side = min(3 + 0.32 * len(classes), _LARGEST)
    figure = Figure(figsize=(side + 1, side), layout="constrained")
    axes = figure.add_subplot()
    shown = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    axes.set_xticks(range(len(classes)), _plain(classes), rotation=90)
    axes.set_yticks(range(len(classes)), _plain(classes))
    axes.set_xlabel("prediction")
    axes.set_ylabel("label")
    if len(classes) <= _NUMBERED:
        for row, column in np.argwhere(shares >= 0.005):
            share = shares[row, column]
            color = "white" if share > 0.6 else "black"
            axes.text(column, row, f"{100 * share:.0f}", ha="center", va="center", fontsize=7, color=color)
    figure.colorbar(shown, ax=axes, shrink=0.7, label="share of the label's pixels")
    return _png(figure)


def class_chart(iou: Fractions, classes: ClassSet) -> bytes:
    """The IoU of the classes as bars in their colours, best first, as a PNG.

    Raises:
        ImportError: matplotlib is not installed.
    """
    from matplotlib.figure import Figure

    order = [i for i in np.argsort(-np.nan_to_num(iou, nan=-1)) if not math.isnan(iou[i])]
    figure = Figure(figsize=(7, 1.2 + 0.27 * len(order)), layout="constrained")
    axes = figure.add_subplot()
    colors = [tuple(channel / 255 for channel in classes.colors[i]) for i in order]
    names = _plain(classes)
    bars = axes.barh(range(len(order)), 100 * iou[order], color=colors, edgecolor="grey")
    axes.set_yticks(range(len(order)), [names[i] for i in order])
    axes.bar_label(bars, fmt="%.1f", padding=3, fontsize=8)
    axes.axvline(100 * mean(iou), color="black", linewidth=0.8, linestyle=":")
    axes.set_title(f"IoU per class in %, mean {100 * mean(iou):.1f}", fontsize=10)
    axes.set_xlim(0, 107)
    axes.invert_yaxis()
    return _png(figure)


def _plain(classes: ClassSet) -> list[str]:
    """The names of the classes for matplotlib, which would take what stands between $ for a formula."""
    return [name.replace("$", r"\$") for name in classes.names]


def _png(figure: Any) -> bytes:
    buffer = io.BytesIO()
    with warnings.catch_warnings():  # of letters that the font lacks
        warnings.simplefilter("ignore", UserWarning)
        figure.savefig(buffer, format="png", dpi=110, metadata={"Software": None})
    return buffer.getvalue()
