"""What is in a data set: pixels and images per class, sizes, mean colour."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import cv2
import numpy as np
import numpy.typing as npt

from segcli.data.layout import Sample
from segcli.data.sets import IGNORE, DataSet, read_label
from segcli.errors import ImageError
from segcli.images import read_image

Counts = npt.NDArray[np.int64]
Numbers = npt.NDArray[np.float64]


@dataclass
class Statistics:
    """Sums over the images of a data set.

    Attributes:
        pixels: Labelled pixels per class, (C,).
        images: Images per class in which it occurs, (C,).
        ignored: Pixels with the ignore value.
        sizes: Images per size (width, height).
        total, squares: Sums of the colours and of their squares, RGB, (3,), white = 1.
        failed: (name, problem) of images that could not be read, which count in nothing.
    """

    pixels: Counts
    images: Counts
    ignored: int = 0
    sizes: Counter[tuple[int, int]] = field(default_factory=Counter)
    total: Numbers = field(default_factory=lambda: np.zeros(3))
    squares: Numbers = field(default_factory=lambda: np.zeros(3))
    failed: list[tuple[str, str]] = field(default_factory=list)

    @property
    def mean(self) -> Numbers:
        """Mean of all pixels, RGB, white = 1."""
        return self.total / max(1, self._all_pixels)

    @property
    def std(self) -> Numbers:
        """Standard deviation of all pixels, RGB, white = 1."""
        deviation: Numbers = np.sqrt(np.maximum(self.squares / max(1, self._all_pixels) - self.mean**2, 0))
        return deviation

    @property
    def _all_pixels(self) -> int:
        return sum(width * height * count for (width, height), count in self.sizes.items())


def statistics(dataset: DataSet, done: Callable[[], object] = lambda: None) -> Statistics:
    """Read every image and label once, in as many threads as there are cores."""
    classes = len(dataset.class_set)
    result = Statistics(np.zeros(classes, np.int64), np.zeros(classes, np.int64))
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for sample, one in zip(
            dataset.samples, pool.map(lambda sample: _measure(sample, dataset), dataset.samples), strict=True
        ):
            if isinstance(one, ImageError):
                result.failed.append((sample.name, str(one)))
            else:
                counts, size, mean, std = one
                result.pixels += counts[:classes]
                result.images += counts[:classes] > 0
                result.ignored += int(counts[IGNORE])
                result.sizes[size] += 1
                result.total += mean * size[0] * size[1]
                result.squares += (std**2 + mean**2) * size[0] * size[1]
            done()
    return result


def _measure(
    sample: Sample, dataset: DataSet
) -> tuple[Counts, tuple[int, int], Numbers, Numbers] | ImageError:
    try:
        label, image = read_label(sample, dataset), read_image(sample.image).pixels
    except ImageError as error:
        return error
    counts = np.bincount(label.ravel(), minlength=256).astype(np.int64)
    mean, std = cv2.meanStdDev(image)
    return counts, (image.shape[1], image.shape[0]), mean.ravel() / 255, std.ravel() / 255


def class_weights(pixels: Counts) -> Numbers:
    """One factor per class, mean 1: 1 / ln(1.02 + share of the pixels) (ENet, Paszke et al. 2016)."""
    weights = 1 / np.log(1.02 + pixels / max(1, int(pixels.sum())))
    result: Numbers = weights / weights.mean()
    return result
