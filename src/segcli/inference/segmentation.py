"""From an image to its label map: tensor, network, scores, classes.

On the CPU every image is computed alone, so its result cannot depend on its neighbours, not even in the
last bit. Small images are computed side by side, a thread each: threads that share so little work wait for
each other at every layer, and for those that decode and encode. On a GPU images of one size are computed
together; convolutions of different batch sizes may then differ in the last bits of the scores, and a pixel
at the border between two classes may fall to the other. A GPU computes on its own: it is asked for the next
batch before the results of the last one are fetched.
"""

from __future__ import annotations

import itertools
import math
import os
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import TYPE_CHECKING

import cv2
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from segcli.errors import ImageError
from segcli.inference.ahead import LOOK, Ahead
from segcli.inference.batches import Batch, Waiting
from segcli.inference.cells import labels_from_coarse, lattice_of
from segcli.inference.classification import Classes, classify
from segcli.inference.decoders import PICTURE, Decoded
from segcli.inference.products import Products, Segmentation
from segcli.inference.replay import Replayed
from segcli.inference.tta import TTA, average
from segcli.memory import gib
from segcli.models.checkpoint import Model
from segcli.models.fcn import Network
from segcli.models.prepared import prepare
from segcli.models.preprocessing import network_size, normalize, to_pixels
from segcli.models.strips import SMALL, WORKING, InStrips

if TYPE_CHECKING:
    from segcli.models.quantized import Ranges

# PyTorch's CPU library keeps compiled code for every size of image it has seen: 1024 pieces, about 400 MB on
# a folder of mixed sizes. A quarter of that is enough for one size of every layer. It is read at first use.
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "256")

PREPARING = 4  # threads that resize pictures for a GPU
WAITING = 4  # batches of pictures that may wait for others of their size
GPU_BATCH = 16  # images at a time where nothing else was asked for; halved when memory runs out
TILE = {"auto": None, "on": 16, "off": 0}  # rows of an image at a time, see `InStrips`
STRIP_SHARE = 8  # of the memory that a run may take, the part for one strip
RUNTIME = 640 << 20  # bytes of the process before it has a model: Python, PyTorch, OpenCV
VARIANTS = 4  # maps of scores of the full size that averaging them takes
PATIENCE = 0.25  # seconds without a picture after which a batch goes that is not full
TICK = 0.001  # seconds; how often a GPU that computes is asked whether it is done, while no picture comes


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
        second = model.info.second_class_set
        self.heads = [len(classes) for classes in (self.classes, second) if classes is not None]
        ends = itertools.accumulate(self.heads)
        self.used = [slice(end - count, end) for count, end in zip(self.heads, ends, strict=True)]
        if "geometric" not in kinds:
            del self.used[1:]  # what the second head says is not saved
        self.preprocessing = model.info.preprocessing
        if shorter_side is not None:
            self.preprocessing = replace(self.preprocessing, shorter_side=shorter_side)
        self.batch_size = 1 if device.type == "cpu" else batch_size or GPU_BATCH
        self.weights: int = sum(each.nbytes for each in model.network.state_dict().values())
        self.memory = memory
        self.threads = torch.get_num_threads()
        self.side_by_side = 0  # small images at a time, a thread each; 0 where that does not help
        if device.type == "cpu" and runtime == "torch":
            self.side_by_side = self._affordable(self.threads, working or WORKING["cpu"])
        self.at_once = 1  # batches that the device is asked for at a time
        self.replayed: Replayed | None = None
        self.preparing: ThreadPoolExecutor | None = None  # makes of pictures what a GPU is given
        self.copies: torch.cuda.Stream | None = None  # brings it there while the GPU computes
        if device.type == "cuda":
            self.at_once = 2
            self.replayed = Replayed(self.finest_scores)
            self.preparing = ThreadPoolExecutor(
                PREPARING, "prepare", initializer=torch.set_num_threads, initargs=(1,)
            )
            self.copies = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self.held = 2 * self.side_by_side + 1
        if self.batch_size > 1:
            self.held = (self.at_once + WAITING) * self.batch_size
        self.kinds = kinds
        self.encode = Products(self.classes, kinds, opacity, second)

    def compute(self, pictures: Ahead[Decoded]) -> Iterator[tuple[Decoded, Segmentation | ImageError]]:
        """Every picture with its segmentation, or with the reason why there is none."""
        return self._compute_side_by_side(pictures) if self.side_by_side else self._compute_batches(pictures)

    def _compute_side_by_side(
        self, pictures: Ahead[Decoded]
    ) -> Iterator[tuple[Decoded, Segmentation | ImageError]]:
        """Small images in threads of their own; each of the others by all threads, after those before it."""
        torch.set_num_threads(self.threads)
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
                        picture = pictures.poll(LOOK)
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
            lanes.shutdown(cancel_futures=True)
            torch.set_num_threads(self.threads)

    def _compute_one(self, picture: Decoded) -> Segmentation | ImageError:
        batch = self.begin([picture])
        (result,) = batch.results()
        picture.milliseconds += (time.perf_counter() - batch.begun) * 1e3
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
        self, pictures: Ahead[Decoded]
    ) -> Iterator[tuple[Decoded, Segmentation | ImageError]]:
        """Images of one size together."""
        waiting = Waiting()
        computing: deque[Batch] = deque()
        more, last, finished = True, time.perf_counter(), 0.0
        while more or waiting or computing:
            crowded = len(waiting) >= WAITING * self.batch_size
            if more and not crowded:
                try:
                    picture = pictures.poll(TICK if computing else LOOK)
                except StopIteration:
                    more = False
                else:
                    if picture is not None:
                        self.expect(picture)
                        waiting.add(picture, self._seen(picture))
                        last = time.perf_counter()
            idle = not computing and time.perf_counter() - last > PATIENCE
            if len(computing) < self.at_once:
                together = waiting.take(self.batch_size, any_size=idle or crowded or not more)
                if together:
                    computing.append(self.begin(together))
            # With nothing else to do the oldest is waited for.
            busy = len(computing) == self.at_once
            wait = (busy and (crowded or not more)) or not (more or waiting)
            while computing and (computing[0].is_done() or wait):
                batch = computing.popleft()
                results = batch.results()
                # It could not begin before the one before it was finished.
                begun, finished = max(batch.begun, finished), time.perf_counter()
                for picture, result in zip(batch.pictures, results, strict=True):
                    picture.milliseconds += (finished - begun) * 1e3 / len(results)
                    yield picture, result
                wait = False

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

    def begin(self, pictures: Sequence[Decoded]) -> Batch:
        """Ask the device for the segmentations of pictures that the network sees at one size."""
        begun = time.perf_counter()
        refusals = [self._refusal(*_pixels(picture).shape[:2]) for picture in pictures]
        fitting = [picture for picture, refusal in zip(pictures, refusals, strict=True) if not refusal]
        scores = iter(self.scores(fitting) if fitting else [])
        return self.classified(pictures, [refusal or next(scores) for refusal in refusals], begun)

    def _refusal(self, height: int, width: int) -> ImageError | None:
        small = height * width <= SMALL  # what the process itself takes is no reason to refuse an image
        if small or self.memory is None or (need := self.needed(height, width)) <= self.memory:
            return None
        return ImageError(
            f"{width} x {height} pixels need about {gib(need)} of memory, and --memory is "
            f"{gib(self.memory)}; try --size 500"
        )

    def scores(self, pictures: Sequence[Decoded]) -> list[Tensor | ImageError]:
        """Scores (C, h, w) of pictures that the network sees at one size; fewer at a time if memory runs out.

        They are the network's finest, at its own stride; of several variants, the mean at the size it sees.
        """
        try:
            pixels = []
            for picture in pictures:
                expected, picture.prepared = picture.prepared, None  # it is made anew if this fails
                pixels.append(expected.result() if expected else self.prepared(picture))
            return list(self.computed(pixels))
        except (RuntimeError, MemoryError, cv2.error) as error:
            problem = first_line(error)
            short_of_memory = is_out_of_memory(error)
        # Out of the except block the memory of the failed attempt is free.
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        if len(pictures) == 1:
            height, width = self._seen(pictures[0])
            if short_of_memory:
                reason = f"there is not enough memory to compute {width} x {height} pixels; try --size 500"
            else:
                reason = f"the network cannot compute {width} x {height} pixels: {problem}"
            return [ImageError(reason)]
        half = len(pictures) // 2
        if short_of_memory:
            self.batch_size = max(1, min(self.batch_size, half))
        return self.scores(pictures[:half]) + self.scores(pictures[half:])

    def expect(self, picture: Decoded) -> None:
        """Let a picture that a GPU will compute be prepared in another thread."""
        if self.preparing:
            picture.prepared = self.preparing.submit(self.prepared, picture)

    def prepared(self, picture: Decoded) -> Tensor:
        """A picture as the network sees it, uint8 (1, 3, h, w), where a GPU can fetch it on its own."""
        pixels = to_pixels(_pixels(picture), self.preprocessing)
        return pixels.pin_memory() if self.copies else pixels

    @torch.inference_mode()
    def computed(self, pixels: Sequence[Tensor]) -> Tensor:
        """The `scores` (N, C, h, w) of pictures that are `prepared`."""
        images = self._uploaded(pixels)
        if self.variants:
            normal = normalize(images, self.preprocessing)
            return average(self.all_scores, normal, self.variants, self.heads)
        if self.replayed and self.finest_scores.count(images) == 1:
            return self.replayed(images)
        return self.finest_scores(images)

    def _uploaded(self, pixels: Sequence[Tensor]) -> Tensor:
        """Pictures that are `prepared` on the device, uint8 (N, 3, h, w).

        Those for a GPU go there in a stream of their own. What this thread asks of the GPU from now on waits
        for them, what it has asked for goes on.
        """
        if self.copies is None:
            return torch.cat(list(pixels)).to(self.device)
        with torch.cuda.stream(self.copies):
            found = torch.cat([each.to(self.device, non_blocking=True) for each in pixels])
        computing = torch.cuda.current_stream(self.device)
        computing.wait_stream(self.copies)
        found.record_stream(computing)
        return found

    def classified(
        self, pictures: Sequence[Decoded], scores: Sequence[Tensor | ImageError], begun: float = 0
    ) -> Batch:
        """Ask the device for the classes of pictures from their `scores`."""
        found: list[tuple[Sequence[Classes], int] | ImageError | None] = [
            each if isinstance(each, ImageError) else None for each in scores
        ]
        groups: dict[tuple[int, ...], list[int]] = {}  # by the size at which they are displayed
        for number, picture in enumerate(pictures):
            if found[number] is None:
                groups.setdefault(_pixels(picture).shape[:2], []).append(number)
        todo = list(groups.values())
        while todo:
            group = todo.pop()
            height, width = _pixels(pictures[group[0]]).shape[:2]
            seen = self._seen(pictures[group[0]])
            some = [each for number in group if isinstance(each := scores[number], Tensor)]
            try:
                with torch.inference_mode():
                    scores_of_all = torch.stack(some) if len(some) > 1 else some[0][None]
                    heads = self._heads(scores_of_all, seen, (height, width))
            except (RuntimeError, MemoryError) as error:
                if len(group) > 1:
                    todo += [[number] for number in group]
                elif is_out_of_memory(error):
                    reason = f"there is not enough memory for results of {width} x {height} pixels"
                    found[group[0]] = ImageError(reason)
                else:
                    reason = f"its scores cannot be turned into classes: {first_line(error)}"
                    found[group[0]] = ImageError(reason)
            else:
                for place, number in enumerate(group):
                    found[number] = heads, place
        done = None
        if self.device.type == "cuda":
            done = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
            done.record(torch.cuda.current_stream(self.device))
        return Batch(pictures, [each for each in found if each is not None], done, begun)

    def _heads(self, scores: Tensor, seen: tuple[int, int], size: tuple[int, int]) -> list[Classes]:
        """What the heads say whose results are saved, from the scores (N, C, h, w) of all of them."""
        return [self._classes(scores, head, seen, size) for head in self.used]

    def _classes(self, scores: Tensor, head: slice, seen: tuple[int, int], size: tuple[int, int]) -> Classes:
        if self.lattice:
            scores = scores[:, head]
            finite = torch.isfinite(scores).flatten(1).all(1)
            maps = [
                labels_from_coarse(each, self.lattice, seen, size) if fine else np.zeros(size, np.uint8)
                for each, fine in zip(scores, finite.tolist(), strict=True)
            ]
            return Classes(finite, torch.from_numpy(np.stack(maps)))

        def upsample(scores: Tensor) -> Tensor:
            return (scores if self.variants else self.network.upsample(scores, seen))[:, head]

        return classify(scores, size, "confidence" in self.kinds, "scores" in self.kinds, upsample)


def _pixels(picture: Decoded) -> npt.NDArray[np.uint8]:
    assert picture.pixels is not None, "the engine hands on what could be decoded"
    return picture.pixels


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
