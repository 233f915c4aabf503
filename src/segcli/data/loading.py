"""Samples for training: decoded, varied, batched; every random choice follows from a seed per sample.

The order of samples and what happens to each depend on (seed, epoch, index) alone, so neither the number of
workers nor an interruption changes them.
"""

from __future__ import annotations

import contextlib
import hashlib
import multiprocessing
import os
import signal
import threading
import warnings
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate
from torchvision.transforms import v2

from segcli.data.folders import ClassFolders
from segcli.data.sets import DataSet, read_label
from segcli.data.transforms import class_mix, to_pair
from segcli.errors import ImageError, MachineError
from segcli.images import read_image
from segcli.models.preprocessing import Preprocessing, resize, resize_labels

Key = tuple[int, int]  # index of a sample, seed of its augmentation
Item = (
    tuple[Tensor, Tensor] | ImageError
)  # errors are handed on: raised in a worker they drag a traceback along


def mix(*numbers: int) -> int:
    """A seed, 0..2**63-1, that differs whenever any of the numbers does."""
    digest = hashlib.blake2b(repr(numbers).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def batches(length: int, batch_size: int, seed: int, epoch: int) -> list[list[Key]]:
    """The batches of an epoch: every sample once in random order; a last, smaller batch is left out.

    A data set smaller than one batch gives one batch of all its samples.
    """
    order = torch.randperm(length, generator=torch.Generator().manual_seed(mix(seed, epoch))).tolist()
    size = min(batch_size, length)
    keys = [(index, mix(seed, epoch, index)) for index in order]
    return [keys[start : start + size] for start in range(0, length - size + 1, size)]


class SegmentationSamples(Dataset[Item]):
    """Pairs of image, uint8 (3, H, W), and labels, uint8 (H, W), by `Key`, or why there is none.

    Args:
        dataset: Where they come from.
        transform: Varies a pair; all results have one size.
        preprocessing: Says at which size the network sees images.
        paste: Probability that classes of another sample are pasted over one, as `class_mix` does.
    """

    def __init__(
        self, dataset: DataSet, transform: v2.Transform, preprocessing: Preprocessing, paste: float = 0.0
    ) -> None:
        self.dataset = dataset
        self.transform = transform
        self.preprocessing = preprocessing
        self.paste = paste

    def __getitem__(self, key: Key) -> Item:
        index, seed = key
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            varied = self._varied(index)
            if isinstance(varied, ImageError) or not self.paste or torch.rand(()) >= self.paste:
                return varied
            other = self._varied(int(torch.randint(len(self.dataset.samples), ())))
            return other if isinstance(other, ImageError) else class_mix(*varied, *other)

    def _varied(self, index: int) -> Item:
        """A sample after the transform, which draws from torch's global generator."""
        sample = self.dataset.samples[index]
        path = sample.image
        try:
            image = resize(read_image(path).pixels, self.preprocessing)
            path = sample.label
            label = resize_labels(read_label(sample, self.dataset), self.preprocessing)
        except ImageError as error:
            return ImageError(f"{path}: {error}")
        if label.shape != image.shape[:2]:
            return ImageError(f"{path} is of another size than {sample.image}")
        pair = to_pair(torch.from_numpy(image).permute(2, 0, 1), torch.from_numpy(label))
        varied_image, varied_label = self.transform(*pair)
        return varied_image.as_subclass(Tensor), varied_label.as_subclass(Tensor)


class ClassificationSamples(Dataset[Item]):
    """Pairs of image, uint8 (3, H, W), and class number, int64 scalar, by `Key`, or why there is none."""

    def __init__(self, folders: ClassFolders, transform: v2.Transform) -> None:
        self.folders = folders
        self.transform = transform

    def __getitem__(self, key: Key) -> Item:
        index, seed = key
        path, number = self.folders.images[index]
        try:
            image = torch.from_numpy(read_image(path).pixels).permute(2, 0, 1)
        except ImageError as error:
            return ImageError(f"{path}: {error}")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return self.transform(image), torch.tensor(number)


class _Order:
    """A batch sampler: a fixed list of batches."""

    def __init__(self, order: Sequence[list[Key]]) -> None:
        self.order = order

    def __iter__(self) -> Iterator[list[Key]]:
        return iter(self.order)

    def __len__(self) -> int:
        return len(self.order)


class Dismissal:
    """Sends the processes that load samples home, from any thread and at any time.

    They leave when it is given, and when this process is gone. Signals would not do: a process that a signal
    ends looks to PyTorch like one that crashed.
    """

    def __init__(self) -> None:
        self.given = False
        self._reader, self._writer = multiprocessing.Pipe(duplex=False)

    def give(self) -> None:
        self.given = True
        self._writer.send_bytes(b"go")

    def obey(self) -> None:
        """In a process that loads: leave when it is given."""
        self._writer.close()
        threading.Thread(target=self._wait, daemon=True).start()

    def _wait(self) -> None:
        self._reader.poll(None)  # nobody reads it, so it is there for all
        os._exit(0)


def loader(
    samples: Dataset[Item],
    order: Sequence[list[Key]],
    workers: int,
    pin: bool,
    dismissal: Dismissal | None = None,
) -> Iterator[tuple[Tensor, Tensor]]:
    """The given batches, in that order.

    Args:
        samples: Gives the samples by `Key`.
        order: Which samples make up each batch.
        workers: Processes that load them, a few batches ahead; 0 loads in this process.
        pin: Put batches where a GPU fetches them fast.
        dismissal: Ends the workers early; what is still asked for is loaded in this process.

    Raises:
        ImageError: A file cannot be read; the message names it.
        MachineError: A process that loads images died.
    """
    dismissal = dismissal or Dismissal()
    done, loaded = 0, None
    try:
        with _signals_held_back(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PyTorch's remark on more workers than cores
            loaded = iter(
                DataLoader(
                    samples,
                    batch_sampler=_Order(order),
                    num_workers=workers,
                    pin_memory=pin,
                    collate_fn=_collate,
                    worker_init_fn=partial(_start_worker, dismissal),
                )
            )
        for batch in loaded:
            yield _whole(batch)
            done += 1
    except (RuntimeError, OSError, EOFError) as error:
        if not dismissal.given:
            if "DataLoader worker" not in str(error):
                raise
            raise MachineError(
                f"a process that loads images died: {str(error).splitlines()[0]}\n"
                "Most likely memory ran out, or /dev/shm is too small; try fewer --workers, or --workers 0."
            ) from error
    finally:
        loaded = None  # ends the workers, also where an error holds on to this frame
    for keys in order[done:]:
        yield _whole(_collate([samples[key] for key in keys]))


@contextlib.contextmanager
def _signals_held_back() -> Iterator[None]:
    """Processes that are started in this block never get the signals that stop a run.

    Stopping is the business of this process, which still saves its state.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM))
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _whole(batch: tuple[Tensor, Tensor] | ImageError) -> tuple[Tensor, Tensor]:
    if isinstance(batch, ImageError):
        raise batch
    return batch


def _collate(items: list[Item]) -> Any:
    """A batch of samples, or the first error among them."""
    errors = (item for item in items if isinstance(item, ImageError))
    return next(errors, None) or default_collate(items)


def _start_worker(dismissal: Dismissal, _: int) -> None:
    dismissal.obey()
    torch.set_num_threads(1)
