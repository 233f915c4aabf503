"""From an image to its label map: tensor, network, scores, classes.

On the CPU every image is computed alone, so its result cannot depend on its neighbours, not even in the
last bit. Small images in light networks are computed side by side, a thread each: threads that share so
little work wait for each other at every layer, and for those that decode and encode. On a GPU images of one
size are computed together; convolutions of different batch sizes may then differ in the last bits of the
scores, and a pixel at the border between two classes may fall to the other.
"""

from __future__ import annotations

import math
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from segcli.errors import ImageError
from segcli.inference.ahead import LOOK, Ahead
from segcli.inference.cells import labels_from_coarse, lattice_of
from segcli.inference.decoders import PICTURE, Decoded
from segcli.inference.products import encode_products
from segcli.inference.tta import TTA, average
from segcli.memory import gib
from segcli.models.checkpoint import Model
from segcli.models.fcn import Network
from segcli.models.prepared import prepare
from segcli.models.preprocessing import network_size, normalize, to_pixels
from segcli.models.strips import SMALL, WORKING, InStrips, Strips
from segcli.palettes import count_ids

if TYPE_CHECKING:
    from segcli.models.quantized import Ranges

# PyTorch's CPU library keeps compiled code for every size of image it has seen: 1024 pieces, about 400 MB on
# a folder of mixed sizes. A quarter of that is enough for one size of every layer. It is read at first use.
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "256")

LIGHT = 16_000_000  # weights of a network that one thread computes small images with
GPU_BATCH = 16  # images at a time where nothing else was asked for; halved when memory runs out
TILE = {"auto": None, "on": 16, "off": 0}  # rows of an image at a time, see `InStrips`
STRIP_SHARE = 8  # of the memory that a run may take, the part for one strip
RUNTIME = 640 << 20  # bytes of the process before it has a model: Python, PyTorch, OpenCV
VARIANTS = 4  # maps of scores of the full size that averaging them takes
BAND = 1 << 24  # scores of the full size at a time, whatever the size of the image


@dataclass(frozen=True)
class Segmentation:
    """What was found in one image, at the size at which it is displayed."""

    labels: npt.NDArray[np.integer[Any]]  # (H, W) class ids, uint8, or uint16 above 256 classes
    confidence: npt.NDArray[np.uint8] | None = None  # (H, W) probability of the class, 255 = certain
    probabilities: npt.NDArray[np.float16] | None = None  # (C, H, W), sum 1 over C
    second: npt.NDArray[np.integer[Any]] | None = None  # (H, W) ids of the model's second label space


class Segmenter:
    """The work of `segcli predict`, see `engine.Work`.

    Args:
        model: The network with its preprocessing and classes.
        device: Where to compute.
        kinds: What is to be saved, keys of `layout.PRODUCTS`.
        batch_size: Images at a time; None lets the device decide. On the CPU it is always 1.
        shorter_side: Overrides the size at which the network sees images.
        opacity: Of the colours in overlays, 0 to 1.
        tta: Variants of an image whose probabilities are averaged, a key of `tta.TTA`.
        precision: fp32, bf16, fp16 or int8, see `device.pick_precision`.
        runtime: torch or openvino, see `device.pick_runtime`.
        tile: Whether images are computed in strips: on, off, or auto, which goes by their size.
        memory: Bytes that this process may take, see `needed`; None sets no limit.
        ranges: For int8, what the convolutions see, see `calibration`.
    """

    def __init__(
        self,
        model: Model,
        device: torch.device,
        kinds: Sequence[str],
        batch_size: int | None = None,
        shorter_side: int | None = None,
        opacity: float = 0.5,
        tta: str = "none",
        precision: str = "fp32",
        runtime: str = "torch",
        tile: str = "auto",
        memory: int | None = None,
        ranges: Mapping[str, Ranges] | None = None,
    ) -> None:
        if runtime == "openvino":
            from segcli.models.openvino_networks import with_openvino

            self.network = with_openvino(model.network, precision, ranges)
        else:
            self.network = prepare(model.network, device, precision)
        working = None
        if memory is not None and device.type == "cpu":
            working = min(WORKING["cpu"], memory // STRIP_SHARE)

        def finest_scores(network: Network, rows: int | None) -> InStrips:
            def function(pixels: Tensor) -> Tensor:
                return network.score_pyramid(normalize(pixels, self.preprocessing))[-1]

            return InStrips(function, rows, working)

        rows = 0 if runtime == "openvino" else TILE[tile]
        self.finest_scores = finest_scores(self.network, rows)
        # OpenVINO's operations cannot be traced, but they are those of the network that it was made of.
        self.estimated = finest_scores(model.network, 0) if runtime == "openvino" else self.finest_scores
        self.all_scores = InStrips(self.network, rows, working)  # of the full size
        self.variants = None if tta == "none" else TTA[tta]
        only_labels = tta == "none" and not {"confidence", "scores"} & set(kinds)
        # On a GPU the full size costs little, and looking for borders makes it wait for the CPU.
        self.lattice = lattice_of(model.network) if only_labels and device.type == "cpu" else None
        self.device = device
        self.classes = model.info.class_set
        self.second = model.info.second_class_set
        self.heads = [len(classes) for classes in (self.classes, self.second) if classes is not None]
        self.preprocessing = model.info.preprocessing
        if shorter_side is not None:
            self.preprocessing = replace(self.preprocessing, shorter_side=shorter_side)
        self.batch_size = 1 if device.type == "cpu" else batch_size or GPU_BATCH
        self.weights: int = sum(each.nbytes for each in model.network.state_dict().values())
        self.memory = memory
        self.threads = torch.get_num_threads()
        self.side_by_side = 0  # small images at a time, a thread each; 0 where that does not help
        count = sum(each.numel() for each in model.network.parameters())
        if device.type == "cpu" and runtime == "torch" and count <= LIGHT:
            self.side_by_side = self._affordable(self.threads, working or WORKING["cpu"])
        # A batch is computed when it is full, or when so many wait that one of several sizes has to go.
        self.held = 5 * self.batch_size if self.batch_size > 1 else 2 * self.side_by_side + 1
        # A GPU computes on its own. Meanwhile the next batch is read, and copied in a stream of its own.
        self.ahead = device.type == "cuda"
        self.copies = torch.cuda.Stream(device) if self.ahead else None  # type: ignore[no-untyped-call]
        self.kinds = kinds
        self.opacity = opacity

    def compute(self, pictures: Iterator[Decoded]) -> Iterator[tuple[Decoded, Segmentation | ImageError]]:
        """Every picture with its segmentation, or with the reason why there is none."""
        return self._compute_side_by_side(pictures) if self.side_by_side else self._compute_batches(pictures)

    def _compute_side_by_side(
        self, pictures: Iterator[Decoded]
    ) -> Iterator[tuple[Decoded, Segmentation | ImageError]]:
        """Small images in threads of their own; each of the others by all threads, after those before it."""
        torch.set_num_threads(self.threads)
        ended = threading.Event()
        upcoming = Ahead(pictures, 1, ended)
        running: deque[tuple[Decoded, Future[Segmentation | ImageError]]] = deque()
        lanes = ThreadPoolExecutor(
            self.side_by_side, "network", initializer=torch.set_num_threads, initargs=(1,)
        )
        most = 2 * self.side_by_side
        try:
            more = True
            while more or running:
                picture = None
                if more and len(running) <= most:
                    try:
                        picture = upcoming.poll(LOOK)
                    except StopIteration:
                        more = False
                alone = picture is not None and not self._is_small(picture)
                if picture is not None and not alone:
                    running.append((picture, lanes.submit(self._compute_one, picture)))
                # What holds room in memory goes on first: the next picture may be waiting for that room.
                all_of_them = not more or alone or (picture is not None and picture.room > 0)
                while running and (all_of_them or len(running) > most or running[0][1].done()):
                    done, future = running.popleft()
                    yield done, future.result()
                if picture is not None and alone:
                    yield picture, self._compute_one(picture)
        finally:
            ended.set()
            lanes.shutdown(cancel_futures=True)
            torch.set_num_threads(self.threads)

    def _compute_one(self, picture: Decoded) -> Segmentation | ImageError:
        start = time.perf_counter()
        with torch.inference_mode():
            (scores,) = self._affordable_scores([_pixels(picture)], None)
            result = self.result(picture, scores)
        picture.milliseconds += (time.perf_counter() - start) * 1e3
        return result

    def _is_small(self, picture: Decoded) -> bool:
        """Whether one thread computes it. That depends on nothing but the size at which it is seen."""
        largest = max(self.variants.scales) if self.variants else 1
        return math.prod(self._seen(picture)) * largest**2 <= SMALL

    def _affordable(self, count: int, each: int) -> int:
        """How many of `count` things of `each` bytes fit in memory, beside the network; one at least."""
        if self.memory is None:
            return count
        return max(1, min(count, (self.memory - RUNTIME - 2 * self.weights) // each))

    def _compute_batches(
        self, pictures: Iterator[Decoded]
    ) -> Iterator[tuple[Decoded, Segmentation | ImageError]]:
        """Images of one size together."""
        batches = self._batches(pictures)
        batch, uploaded = next(batches, None), None
        while batch is not None:
            start = time.perf_counter()
            waited = 0.0
            # What holds room in memory goes on first: the next picture may be waiting for that room.
            ahead = self.ahead and not any(picture.room for picture in batch)
            with torch.inference_mode():
                scores = self._affordable_scores([_pixels(picture) for picture in batch], uploaded)
                following, uploaded = None, None
                if ahead:
                    begun = time.perf_counter()
                    following = next(batches, None)
                    uploaded = self._uploaded_ahead(following) if following else None
                    waited = time.perf_counter() - begun
                results = [self.result(picture, found) for picture, found in zip(batch, scores, strict=True)]
            milliseconds = (time.perf_counter() - start - waited) * 1e3 / len(batch)
            for picture, result in zip(batch, results, strict=True):
                picture.milliseconds += milliseconds
                yield picture, result
            batch = following if ahead else next(batches, None)

    def encode(self, picture: Decoded, result: Segmentation) -> tuple[dict[str, bytes], dict[str, float]]:
        """The files of a picture by kind, and the share of every class that occurs in it."""
        files = encode_products(_pixels(picture), result, self.classes, self.kinds, self.opacity, self.second)
        total = result.labels.size
        counts = count_ids(result.labels)
        return files, {self.classes.names[id_]: round(count / total, 6) for id_, count in counts.items()}

    def _batches(self, pictures: Iterator[Decoded]) -> Iterator[list[Decoded]]:
        """Pictures that the network sees at one size, together; large ones alone."""
        waiting: dict[tuple[int, int], list[Decoded]] = {}
        for picture in pictures:
            if picture.room:  # it occupies much memory, so it does not wait for others
                yield [picture]
                continue
            size = self._seen(picture)
            group = waiting.setdefault(size, [])
            group.append(picture)
            if len(group) >= self.batch_size:
                yield waiting.pop(size)
            elif sum(map(len, waiting.values())) >= 4 * self.batch_size:
                yield waiting.pop(max(waiting, key=lambda size: len(waiting[size])))
        yield from waiting.values()

    def _seen(self, picture: Decoded) -> tuple[int, int]:
        """The size (H, W) at which the network sees a picture."""
        height, width = _pixels(picture).shape[:2]
        return network_size(height, width, self.preprocessing)

    def needed(self, height: int, width: int) -> int:
        """The bytes of memory that an image of that size takes, with all that computes it; an estimate."""
        classes = sum(self.heads)
        need = RUNTIME + 2 * self.weights + PICTURE * height * width
        if "scores" in self.kinds:
            need += 2 * 2 * classes * height * width  # float16, and as a file
        if self.device.type != "cpu":
            return need
        seen = network_size(height, width, self.preprocessing)
        if self.variants:
            need += VARIANTS * 4 * classes * math.prod(seen)
            largest = max(self.variants.scales)
            seen = round(seen[0] * largest), round(seen[1] * largest)
        return need + self.estimated.memory(torch.zeros((), dtype=torch.uint8).expand(1, 3, *seen))

    def _affordable_scores(
        self, images: Sequence[npt.NDArray[np.uint8]], uploaded: Tensor | None
    ) -> list[Tensor | ImageError]:
        """The `scores` of images for which there is memory enough."""
        refusals = [self._refusal(*image.shape[:2]) for image in images]
        fitting = [image for image, refusal in zip(images, refusals, strict=True) if not refusal]
        if len(fitting) < len(images):
            uploaded = None
        found = iter(self.scores(fitting, uploaded) if fitting else [])
        return [refusal or next(found) for refusal in refusals]

    def _refusal(self, height: int, width: int) -> ImageError | None:
        small = height * width <= SMALL  # what the process itself takes is no reason to refuse an image
        if small or self.memory is None or (need := self.needed(height, width)) <= self.memory:
            return None
        return ImageError(
            f"{width} x {height} pixels need about {gib(need)} of memory, and --memory is "
            f"{gib(self.memory)}; try --size 500"
        )

    def scores(
        self, images: Sequence[npt.NDArray[np.uint8]], uploaded: Tensor | None = None
    ) -> list[Tensor | ImageError]:
        """Scores (C, h, w) of images that the network sees at one size; fewer at a time when memory runs out.

        They are the network's finest, at its own stride; of several variants, the mean at the size it sees.

        Args:
            images: uint8 (H, W, 3).
            uploaded: What `_uploaded` makes of them, where that was done before.
        """
        try:
            return self._computed(self._uploaded(images) if uploaded is None else uploaded)
        except (RuntimeError, MemoryError, cv2.error) as error:
            problem = first_line(error)
            short_of_memory = is_out_of_memory(error)
        # Out of the except block the memory of the failed attempt is free.
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        if len(images) == 1:
            height, width = network_size(images[0].shape[0], images[0].shape[1], self.preprocessing)
            if short_of_memory:
                reason = f"there is not enough memory to compute {width} x {height} pixels; try --size 500"
            else:
                reason = f"the network cannot compute {width} x {height} pixels: {problem}"
            return [ImageError(reason)]
        half = len(images) // 2
        if short_of_memory:
            self.batch_size = max(1, min(self.batch_size, half))
        return self.scores(images[:half]) + self.scores(images[half:])

    def _uploaded(self, images: Sequence[npt.NDArray[np.uint8]]) -> Tensor:
        """Images as the network sees them, uint8 (N, 3, h, w), on the device.

        Those for a GPU go through pinned memory in a stream of their own. What this thread asks of the GPU
        from now on waits for them, what it has asked for goes on.
        """
        pixels = torch.cat([to_pixels(image, self.preprocessing) for image in images])
        if self.copies is None:
            return pixels.to(self.device)
        with torch.cuda.stream(self.copies):
            found = pixels.pin_memory().to(self.device, non_blocking=True)
        computing = torch.cuda.current_stream(self.device)
        computing.wait_stream(self.copies)
        found.record_stream(computing)
        return found

    def _uploaded_ahead(self, batch: Sequence[Decoded]) -> Tensor | None:
        """The same of a batch that is computed later; None when it fails, and fails again in its turn."""
        try:
            return self._uploaded([_pixels(picture) for picture in batch])
        except (RuntimeError, MemoryError, cv2.error):
            return None

    def _computed(self, pixels: Tensor) -> list[Tensor | ImageError]:
        if self.variants is None:
            return list(self.finest_scores(pixels))
        return list(
            average(self.all_scores, normalize(pixels, self.preprocessing), self.variants, self.heads)
        )

    def result(self, picture: Decoded, scores: Tensor | ImageError) -> Segmentation | ImageError:
        """The segmentation of a picture from its `scores`."""
        if isinstance(scores, ImageError):
            return scores
        height, width = _pixels(picture).shape[:2]
        seen = self._seen(picture)
        try:
            first, *others = np.cumsum([0, *self.heads]).tolist()
            result = self._classified(scores, slice(first, others[0]), seen, (height, width))
            if "geometric" not in self.kinds:
                return result
            second = self._classified(scores, slice(*others), seen, (height, width))
            return replace(result, second=second.labels)
        except ImageError as error:
            return error
        except (RuntimeError, MemoryError) as error:
            if is_out_of_memory(error):
                return ImageError(f"there is not enough memory for results of {width} x {height} pixels")
            return ImageError(f"its scores cannot be turned into classes: {first_line(error)}")

    def _classified(
        self, scores: Tensor, head: slice, seen: tuple[int, int], size: tuple[int, int]
    ) -> Segmentation:
        """What one head says, from the scores of all."""
        if self.lattice:
            check_finite(scores[head])
            return Segmentation(labels_from_coarse(scores[head], self.lattice, seen, size))

        def upsample(scores: Tensor) -> Tensor:
            return (scores if self.variants else self.network.upsample(scores, seen))[:, head]

        return classify(scores, size, "confidence" in self.kinds, "scores" in self.kinds, upsample)


def _pixels(picture: Decoded) -> npt.NDArray[np.uint8]:
    assert picture.pixels is not None, "the engine hands on what could be decoded"
    return picture.pixels


def classify(
    scores: Tensor,
    size: tuple[int, int],
    confidence: bool = False,
    probabilities: bool = False,
    upsample: Callable[[Tensor], Tensor] = torch.Tensor.float,
) -> Segmentation:
    """The classes of an image from its scores.

    Args:
        scores: Before softmax, float (C, h, w), on any device.
        size: (H, W) of the image. Scores of another size are resized to it bilinearly before the classes are
            decided, so that borders are smooth; a band of rows at a time.
        confidence, probabilities: Also compute these.
        upsample: What is done to the scores, (1, C, h, w), before that.

    Raises:
        ImageError: A score is not a finite number.
    """

    def full_size(scores: Tensor) -> Tensor:
        scores = upsample(scores.float())
        if tuple(scores.shape[2:]) == size:
            return scores
        return F.interpolate(scores, size, mode="bilinear", align_corners=False)

    scores = scores[None]
    bands = Strips(full_size, scores)
    labels = certainty = shares = None
    top = 0
    for values in bands.run(scores, bands.count(4 * BAND)):
        values = values[0]  # (C, rows, W)
        if labels is None:
            count = len(values)
            labels = np.empty(size, np.uint8 if count <= 256 else np.uint16)
            certainty = np.empty(size, np.uint8) if confidence else None
            shares = np.empty((count, *size), np.float16) if probabilities else None
        band = slice(top, top + values.shape[1])
        top = band.stop
        best, winner = values.max(0)
        check_finite(best)
        labels[band] = winner.to(torch.uint8 if count <= 256 else torch.int32).cpu().numpy()
        if certainty is not None or shares is not None:
            soft = values.softmax(0)
            if certainty is not None:
                certainty[band] = (soft.amax(0) * 255).round().cpu().numpy()
            if shares is not None:
                shares[:, band] = soft.half().cpu().numpy()
    assert labels is not None
    return Segmentation(labels, certainty, shares)


def check_finite(scores: Tensor) -> None:
    """Raise ImageError where a score is not a finite number."""
    if not torch.isfinite(scores).all():
        raise ImageError("the network gave scores that are not finite numbers; the model is damaged")


def first_line(error: BaseException) -> str:
    """An error in one line: PyTorch's go on with advice to its developers."""
    return (str(error) or type(error).__name__).splitlines()[0]


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a computation failed for want of memory: on a GPU, or in PyTorch's CPU allocator."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return any(
        words in str(error).lower() for words in ("out of memory", "allocate memory", "insufficient memory")
    )
