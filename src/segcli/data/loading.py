"""Samples for training: decoded, varied, batched; every random choice follows from a seed per sample.

The order of samples and what happens to each depend on (seed, epoch, index) alone, so neither the number of
workers nor an interruption changes them.
"""

from __future__ import annotations

import hashlib
import signal
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate
from torchvision.transforms import v2

from segcli.data.folders import ClassFolders
from segcli.data.sets import DataSet, read_label
from segcli.data.transforms import to_pair
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
    """Pairs of image, uint8 (3, H, W), and labels, uint8 (H, W), by `Key`, or why there is none."""

    def __init__(self, dataset: DataSet, transform: v2.Transform, preprocessing: Preprocessing) -> None:
        self.dataset = dataset
        self.transform = transform
        self.preprocessing = preprocessing

    def __getitem__(self, key: Key) -> Item:
        index, seed = key
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
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
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


def loader(
    samples: Dataset[Item], order: Sequence[list[Key]], workers: int, pin: bool
) -> Iterator[tuple[Tensor, Tensor]]:
    """The given batches, in that order.

    Args:
        samples: Gives the samples by `Key`.
        order: Which samples make up each batch.
        workers: Processes that load them, a few batches ahead; 0 loads in this process.
        pin: Put batches where a GPU fetches them fast.

    Raises:
        ImageError: A file cannot be read; the message names it.
        MachineError: A process that loads images died.
    """
    loading = DataLoader(
        samples,
        batch_sampler=_Order(order),
        num_workers=workers,
        pin_memory=pin,
        collate_fn=_collate,
        worker_init_fn=_quiet_worker,
    )
    try:
        for batch in loading:
            if isinstance(batch, ImageError):
                raise batch
            yield batch
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise MachineError(
            f"a process that loads images died: {str(error).splitlines()[0]}\n"
            "Most likely memory ran out, or /dev/shm is too small; try fewer --workers, or --workers 0."
        ) from error


def _collate(items: list[Item]) -> Any:
    """A batch of samples, or the first error among them."""
    errors = (item for item in items if isinstance(item, ImageError))
    return next(errors, None) or default_collate(items)


def _quiet_worker(_: int) -> None:
    """Stopping is the main process's business, which still saves its state: it ends the workers."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    torch.set_num_threads(1)
