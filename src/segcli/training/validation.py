"""The score of a network on the validation split, computed as `segcli evaluate` does.

Several processes each take a share of the images; what they count is added up, so the result is that of one.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from segcli.data.folders import ClassFolders
from segcli.data.sets import IGNORE, DataSet, read_label
from segcli.errors import ImageError, UsageError
from segcli.evaluation import Prediction, evaluate, predictions_of_model
from segcli.images import read_image
from segcli.inference.ahead import Ahead
from segcli.inference.segmentation import Segmenter
from segcli.metrics import scores
from segcli.models.checkpoint import Model
from segcli.models.fcn import Network
from segcli.models.info import ModelInfo
from segcli.models.preprocessing import Preprocessing, to_tensor
from segcli.render import grid
from segcli.scorecard import panels
from segcli.training import distributed

Pixels = npt.NDArray[np.uint8]
GoOn = Callable[[int, int], bool]  # told how many images are done, of how many; False: stop here

SHOWN = 6  # images in the picture of an epoch


@dataclass(frozen=True)
class Validation:
    """What a validation found.

    Attributes:
        scores: For the log; fractions of 1.
        picture: A few images with their labels and predictions, uint8 (H, W, 3).
    """

    scores: dict[str, Any]
    picture: Pixels | None = None


class _Stopped(Exception):
    """The watcher wants the validation to end."""


def validate_segmentation(
    network: nn.Module, info: ModelInfo, dataset: DataSet, device: torch.device, go_on: GoOn
) -> Validation | None:
    """Scores pooled over a data set; None when it was stopped.

    Args:
        network: In evaluation mode, on the device.

    Raises:
        ImageError: An image cannot be read, or the network's scores of it are not finite.
        UsageError: The labels have not a single pixel that counts.
    """
    own = replace(dataset, samples=dataset.samples[distributed.rank() :: distributed.processes()])
    chosen = {round(place) for place in np.linspace(0, len(own.samples) - 1, SHOWN)}
    shown: dict[int, Pixels] = {}
    done = 0

    def keep(predictions: Iterable[Prediction]) -> Iterator[Prediction]:
        for number, found in predictions:
            if number in chosen and not isinstance(found, ImageError):
                shown[number] = found
            yield number, found

    def count(_: object) -> None:
        nonlocal done
        done += 1
        if not go_on(done, len(own.samples)):
            raise _Stopped

    stop, stopped = threading.Event(), False
    segmenter = Segmenter(Model(cast(Network, network), info, Path(), ""), device, ())
    try:
        result = evaluate(own, keep(predictions_of_model(own, segmenter, stop)), count, outlines=False)
    except _Stopped:
        stopped = True
    finally:
        stop.set()
    if distributed.any_true(stopped):
        return None
    for image in result.failed:
        raise ImageError(f"{image.name} cannot be validated: {image.problem}")
    matrix = distributed.total(torch.from_numpy(result.matrix)).numpy()
    if not matrix.sum():
        raise UsageError(f"split {dataset.split} of {dataset.name} has no labelled pixel to validate on")
    picture = _picture(own, shown) if distributed.rank() == 0 else None
    return Validation(_document(scores(matrix), dataset.class_set.names), picture)


def _document(found: Any, names: Iterable[str]) -> dict[str, Any]:
    ious = zip(names, found.iou, strict=True)
    return {
        "mean_iou": round(float(found.mean_iou), 5),
        "pixel_accuracy": round(float(found.pixel_accuracy), 5),
        "per_class": {name: round(float(iou), 4) for name, iou in ious if np.isfinite(iou)},
    }


def _picture(dataset: DataSet, predictions: dict[int, Pixels]) -> Pixels | None:
    palette = dataset.class_set.palette()
    palette[IGNORE] = dataset.class_set.ignore_color
    rows = []
    for number in sorted(predictions):
        sample = dataset.samples[number]
        image, label = read_image(sample.image).pixels, read_label(sample, dataset)
        rows.append(panels(sample.name, image, label, predictions[number], palette))
    return grid(rows) if rows else None


def validate_classifier(
    network: nn.Module, folders: ClassFolders, height: int, device: torch.device, go_on: GoOn
) -> Validation | None:
    """Share of images whose highest score is their class; None when it was stopped.

    Every image is seen whole, its shorter side resized to `height`.
    """
    preprocessing = Preprocessing(shorter_side=height)
    own = folders.images[distributed.rank() :: distributed.processes()]
    stop, stopped, right = threading.Event(), False, 0
    pictures = Ahead((_readable(path) for path, _ in own), 8, stop)
    try:
        for done, (pixels, (_, number)) in enumerate(zip(pictures, own, strict=True), start=1):
            with torch.inference_mode():
                found = network(to_tensor(pixels, preprocessing).to(device))
            right += int(found.argmax(1).item() == number)
            if not go_on(done, len(own)):
                stopped = True
                break
    finally:
        stop.set()
    if distributed.any_true(stopped):
        return None
    all_right = int(distributed.total(torch.tensor(right)).item())
    return Validation({"accuracy": round(all_right / len(folders.images), 5)})


def _readable(path: Path) -> Pixels:
    try:
        return read_image(path).pixels
    except ImageError as error:
        raise ImageError(f"{path}: {error}") from error
