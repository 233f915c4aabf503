"""Compare label maps with the truth, image by image, and pool what was counted."""

from __future__ import annotations

import heapq
import math
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from segcli.boundaries import BoundaryCounts, boundary_counts
from segcli.data.layout import LABEL_ENDINGS, Sample, image_files, plain_coding
from segcli.data.sets import IGNORE, DataSet, read_label
from segcli.errors import ImageError, UsageError
from segcli.inference.ahead import Ahead
from segcli.inference.decoders import Decoded, Decoders
from segcli.inference.sources import Input
from segcli.metrics import Counts, Scores, confusion_matrix, scores
from segcli.palettes import ClassSet

if TYPE_CHECKING:
    from segcli.inference.segmentation import Segmenter

Ids = npt.NDArray[np.uint8]

WORST_SHOWN = 12


@dataclass(frozen=True)
class ImageScore:
    """One image: what it scores alone, or why it could not be scored."""

    name: str
    problem: str = ""
    pixels: int = 0
    pixel_accuracy: float = math.nan
    mean_iou: float = math.nan
    iou: tuple[float, ...] = ()


@dataclass(frozen=True, order=True)
class Bad:
    """One of the worst images, with what is needed to draw it. Sorts from the best to the worst."""

    badness: float
    number: int
    sample: Sample = field(compare=False)
    truth: Ids = field(compare=False)
    predicted: Ids = field(compare=False)


@dataclass
class Evaluation:
    """The counts of a whole set, and each image's own scores.

    Attributes:
        matrix: Pixels, int64 (C, C), rows = truth.
        boundaries: Pixels along outlines, see `boundaries`.
        occurs: Images per class in which the labels have it, int64 (C,).
        images: In the order of the samples, failed ones included.
        worst: The images with the lowest mean IU of their own, a heap.
    """

    class_set: ClassSet
    matrix: Counts
    boundaries: BoundaryCounts
    occurs: Counts
    images: list[ImageScore] = field(default_factory=list)
    worst: list[Bad] = field(default_factory=list)

    @property
    def failed(self) -> list[ImageScore]:
        return [image for image in self.images if image.problem]

    @property
    def scores(self) -> Scores:
        return scores(self.matrix)


@dataclass(frozen=True)
class _Outcome:
    score: ImageScore
    matrix: Counts | None = None
    boundaries: BoundaryCounts | None = None
    truth: Ids | None = None
    predicted: Ids | None = None


Prediction = tuple[int, Ids | ImageError]  # number of the sample; its label map, or why there is none


def evaluate(
    dataset: DataSet,
    predictions: Iterable[Prediction],
    done: Callable[[ImageScore], object] = lambda score: None,
    outlines: bool = True,
) -> Evaluation:
    """Score the predictions for the samples of a data set.

    Args:
        dataset: Its labels are the truth.
        predictions: One per sample, in any order; uint8 (H, W) class ids at the size of the label. An
            ImageError is that sample's problem, and the others go on.
        done: Called after every sample.
        outlines: Count along outlines as well, which takes most of the time; else `boundaries` stay zero.
    """
    classes = len(dataset.class_set)
    zeros = np.zeros(classes, np.int64)
    result = Evaluation(
        dataset.class_set, np.zeros((classes, classes), np.int64), BoundaryCounts(*[zeros] * 7), zeros
    )
    scored: dict[int, ImageScore] = {}
    workers = os.cpu_count() or 1
    waiting: deque[tuple[int, Future[_Outcome]]] = deque()

    def collect() -> None:
        number, future = waiting.popleft()
        outcome = future.result()
        scored[number] = outcome.score
        _add(result, number, dataset.samples[number], outcome)
        done(outcome.score)

    with ThreadPoolExecutor(workers) as pool:
        for number, predicted in predictions:
            sample = dataset.samples[number]
            waiting.append((number, pool.submit(_score, sample, dataset, predicted, outlines)))
            if len(waiting) > 2 * workers:
                collect()
        while waiting:
            collect()
    result.images = [scored[number] for number in sorted(scored)]
    return result


def _score(sample: Sample, dataset: DataSet, predicted: Ids | ImageError, outlines: bool) -> _Outcome:
    classes = len(dataset.class_set)
    try:
        if isinstance(predicted, ImageError):
            raise predicted
        truth = read_label(sample, dataset)
        if truth.shape != predicted.shape:
            sizes = f"{predicted.shape[1]} x {predicted.shape[0]}, but its label is"
            raise ImageError(f"the prediction is {sizes} {truth.shape[1]} x {truth.shape[0]}")
        foreign = np.unique(predicted[(predicted >= classes) & (truth != IGNORE)])
        if foreign.size:
            listed = ", ".join(map(str, foreign[:8].tolist()))
            raise ImageError(f"the prediction holds {listed}, but the classes are 0..{classes - 1}")
    except ImageError as error:
        return _Outcome(ImageScore(sample.name, str(error)))
    matrix = confusion_matrix(truth, predicted, classes)
    own = scores(matrix)
    score = ImageScore(
        sample.name, "", int(matrix.sum()), own.pixel_accuracy, own.mean_iou, tuple(own.iou.tolist())
    )
    boundaries = boundary_counts(truth, predicted, classes) if outlines else None
    return _Outcome(score, matrix, boundaries, truth, predicted)


def _add(result: Evaluation, number: int, sample: Sample, outcome: _Outcome) -> None:
    if outcome.matrix is None:
        return
    result.matrix = result.matrix + outcome.matrix
    if outcome.boundaries is not None:
        result.boundaries = result.boundaries + outcome.boundaries
    result.occurs = result.occurs + (outcome.matrix.sum(1) > 0)
    if outcome.truth is not None and outcome.predicted is not None and outcome.score.pixels:
        bad = Bad(-outcome.score.mean_iou, number, sample, outcome.truth, outcome.predicted)
        heapq.heappush(result.worst, bad)
        if len(result.worst) > WORST_SHOWN:
            heapq.heappop(result.worst)


# ---- where predictions come from ----


def predictions_of_model(
    dataset: DataSet, segmenter: Segmenter, stop: threading.Event, workers: int = 0
) -> Iterator[Prediction]:
    """What a model says of the images, computed as `segcli predict` does.

    Args:
        segmenter: With the model; its class ids become those of the data set, see `matching_classes`.
        stop: Set it to end the thread and the processes that read images ahead.
        workers: Processes that read images; with 0 this one reads them.
    """
    table = matching_classes(segmenter.classes, dataset.class_set)
    unreadable: deque[Prediction] = deque()

    def readable() -> Iterator[Decoded]:
        images = ((number, sample.image) for number, sample in enumerate(dataset.samples))
        for picture in _decoded(images, "image", stop, workers):
            if picture.pixels is None:
                unreadable.append((int(picture.item.output), ImageError(picture.problem)))
            else:
                yield picture

    for picture, found in segmenter.compute(Ahead(readable(), 1, stop)):
        yield int(picture.item.output), found if isinstance(found, ImageError) else table[found.labels]
    yield from unreadable


def _decoded(
    files: Iterator[tuple[int, Path]], reader: str, stop: threading.Event, workers: int
) -> Iterator[Decoded]:
    """Numbered files, read as `segcli predict` reads them: one that kills its decoder costs only itself."""
    items = (Input(str(path), str(number)) for number, path in files)
    decoders = Decoders(workers, reader, stop)
    for decoded in Ahead(decoders.run(Ahead(items, 4, stop)), workers + 2, stop):
        yield decoded
        decoders.release(decoded)


def matching_classes(found: ClassSet, wanted: ClassSet) -> Ids:
    """The ids of one class set as those of another, by name: uint8 (256,).

    Raises:
        UsageError: The two do not have the same names (in any order).
    """

    def plain(names: Sequence[str]) -> list[str]:
        return [name.lower().strip("_ ").replace("_", " ") for name in names]

    ours, theirs = plain(wanted.names), plain(found.names)
    if sorted(ours) != sorted(theirs):
        strange = [name for name, key in zip(found.names, theirs, strict=True) if key not in ours]
        example = f", such as {strange[0]}, which {wanted.name} does not have" if strange else ""
        raise UsageError(
            f"the model predicts the {len(found)} classes of {found.name}{example}; "
            f"the data has the {len(wanted)} of {wanted.name}"
        )
    table = np.arange(256, dtype=np.uint8)
    table[: len(theirs)] = [ours.index(name) for name in theirs]
    return table


def labels_as_data(folder: Path, class_set: ClassSet, ignore: int | None) -> DataSet:
    """A folder of labels as a data set without photographs; `ignore` is one more value that does not count.

    Raises:
        UsageError: The folder does not exist or holds no labels.
    """
    if not folder.is_dir():
        raise UsageError(f"--labels {folder} is not a folder")
    files = list(image_files(folder, extra=(".npy",)))
    if not files:
        raise UsageError(f"--labels {folder} holds no label maps")
    coding = plain_coding(class_set)
    ids = bytearray(coding.ids)
    if ignore is not None:
        ids[ignore] = IGNORE
    samples = tuple(Sample(path, path, _plain_name(path, folder)) for path in files)
    return DataSet(folder.name, class_set, folder, "all", samples, bytes(ids), coding.colors)


def _plain_name(path: Path, folder: Path) -> str:
    """A mask's name below its folder, without suffix and without endings such as `_mask`."""
    return LABEL_ENDINGS.sub("", path.relative_to(folder).with_suffix("").as_posix())


def predictions_in_folder(
    dataset: DataSet, folder: Path, stop: threading.Event, workers: int = 0
) -> Iterator[Prediction]:
    """Masks made by anything, found by the sample's name, or by the last part of it.

    Args:
        stop, workers: As for `predictions_of_model`.

    Raises:
        UsageError: The folder does not exist, or holds no mask of the data set.
    """
    if not folder.is_dir():
        raise UsageError(f"--pred {folder} is not a folder")
    by_name: dict[str, list[Path]] = {}
    by_last_part: dict[str, list[Path]] = {}
    for path in image_files(folder, extra=(".npy",)):
        name = _plain_name(path, folder)
        by_name.setdefault(name, []).append(path)
        by_last_part.setdefault(name.rpartition("/")[2], []).append(path)

    def find(sample: Sample) -> list[Path]:
        for name in (sample.name, sample.name + sample.image.suffix):  # b.jpg.png may belong to b.jpg
            if name in by_name:
                return by_name[name]
        same = by_last_part.get(sample.name.rpartition("/")[2], [])
        return same if len(same) == 1 else []

    masks = [find(sample) for sample in dataset.samples]
    if not any(masks):
        example = dataset.samples[0].name
        raise UsageError(f"--pred {folder} has no mask for any of {dataset.name}, such as {example}.png")
    return _read_masks(folder, masks, stop, workers)


def _read_masks(
    folder: Path, masks: Sequence[Sequence[Path]], stop: threading.Event, workers: int
) -> Iterator[Prediction]:
    """The masks of the samples, which have one each if all is well."""
    for number, found in enumerate(masks):
        if not found:
            yield number, ImageError(f"{folder} has no mask for it")
        if len(found) > 1:
            listed = ", ".join(path.relative_to(folder).as_posix() for path in found)
            yield number, ImageError(f"{folder} has more than one mask for it: {listed}")
    files = ((number, found[0]) for number, found in enumerate(masks) if len(found) == 1)
    for mask in _decoded(files, "mask", stop, workers):
        number = int(mask.item.output)
        if mask.pixels is None:
            yield number, ImageError(f"{mask.item.source}: {mask.problem}")
        elif mask.pixels.max(initial=0) > 255:
            yield number, ImageError(f"{mask.item.source} holds ids up to {mask.pixels.max()}")
        else:
            yield number, mask.pixels.astype(np.uint8)
