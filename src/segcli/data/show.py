"""A look at a data set: images with their labels over them, in one picture."""

from __future__ import annotations

import cv2
import numpy as np
import numpy.typing as npt

from segcli.data.layout import Sample
from segcli.data.sets import IGNORE, DataSet, read_label
from segcli.errors import ImageError
from segcli.images import read_image
from segcli.render import grid, legend, overlay

Pixels = npt.NDArray[np.uint8]

COLUMNS = 4
PANEL = 360  # pixels of the longer side of one image


def sample_picture(dataset: DataSet, count: int) -> tuple[Pixels | None, list[str], list[tuple[str, str]]]:
    """Images evenly spaced over the set, in rows of four, and a legend of the classes in them.

    Returns:
        The picture, RGB (None when no image could be read); the names shown; (name, problem) of the others.
    """
    chosen = np.linspace(0, len(dataset.samples) - 1, min(count, len(dataset.samples))).round().astype(int)
    cells: list[tuple[str, Pixels]] = []
    failed: list[tuple[str, str]] = []
    present: set[int] = set()
    for number in chosen.tolist():
        sample = dataset.samples[number]
        try:
            picture, ids = _panel(sample, dataset)
        except ImageError as error:
            failed.append((sample.name, str(error)))
        else:
            cells.append((sample.name, picture))
            present |= ids
    if not cells:
        return None, [], failed
    rows = grid([cells[start : start + COLUMNS] for start in range(0, len(cells), COLUMNS)])
    named = sorted(present - {IGNORE})
    classes = dataset.class_set
    key = legend(
        [f"{i} {classes.names[i]}" for i in named], [classes.colors[i] for i in named], rows.shape[1]
    )
    width = max(rows.shape[1], key.shape[1])
    padded = [np.pad(p, ((0, 0), (0, width - p.shape[1]), (0, 0)), constant_values=255) for p in (rows, key)]
    return np.vstack(padded), [name for name, _ in cells], failed


def _panel(sample: Sample, dataset: DataSet) -> tuple[Pixels, set[int]]:
    """The overlay of one sample at the size in which it is shown, and the ids in its label."""
    image, label = read_image(sample.image).pixels, read_label(sample, dataset)
    if image.shape[:2] != label.shape:
        sizes = f"{label.shape[1]} x {label.shape[0]}, its image {image.shape[1]} x {image.shape[0]}"
        raise ImageError(f"the label is {sizes}")
    palette = dataset.class_set.palette()
    palette[IGNORE] = dataset.class_set.ignore_color
    scale = min(1.0, PANEL / max(label.shape))
    size = (max(1, round(label.shape[1] * scale)), max(1, round(label.shape[0] * scale)))
    small = cv2.resize(image, size, interpolation=cv2.INTER_AREA).astype(np.uint8, copy=False)
    small_label = cv2.resize(label, size, interpolation=cv2.INTER_NEAREST_EXACT).astype(np.uint8, copy=False)
    return overlay(small, small_label, palette), set(np.unique(label).tolist())
