"""What a process of `segcli predict` does for every photo around a GPU, with a network that answers at once.

    python benchmarks/feeding.py [--images 2000] [--finishers 0 8]

No GPU is needed: batches of 16 are prepared in threads and fetched later, as of one. For every number of
processes that encode and write it prints images/s, and the processor time of the process itself, which is
what counts where there are enough cores. How much of it keeps other threads from running Python is told by

    py-spy record --gil --nonblocking --rate 250 --duration 5 --pid PID
"""

from __future__ import annotations

import argparse
import datetime
import os
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from segcli.images import SUFFIXES
from segcli.inference.batches import Batch
from segcli.inference.benchmark import Size, processor_name, write_photos
from segcli.inference.classification import Classes
from segcli.inference.decoders import Decoded
from segcli.inference.engine import Progress, run
from segcli.inference.pipeline import Task
from segcli.inference.segmentation import GPU_BATCH, PREPARING, WAITING, Segmenter
from segcli.inference.sources import parse
from segcli.inference.storage import open_storage
from segcli.models.checkpoint import load_model
from segcli.models.zoo import bundled_models

KINDS = ("mask", "overlay")


class Instant(Segmenter):
    """Computes in batches, as on a GPU, but gives the same discs at once for every picture."""

    def __init__(self) -> None:
        super().__init__(load_model(bundled_models()["fcn8s-voc"]), torch.device("cpu"), KINDS)
        self.side_by_side, self.batch_size, self.at_once = 0, GPU_BATCH, 2
        self.held = (self.at_once + WAITING) * self.batch_size
        self.preparing = ThreadPoolExecutor(PREPARING, initializer=torch.set_num_threads, initargs=(1,))
        y, x = torch.meshgrid(torch.arange(375), torch.arange(500), indexing="ij")
        self.labels = ((x - 250) ** 2 + (y - 190) ** 2 < 120**2).to(torch.uint8) * 15

    def begin(self, pictures: Sequence[Decoded]) -> Batch:
        for picture in pictures:
            expected, picture.prepared = picture.prepared, None
            if expected:
                expected.result()
        count = len(pictures)
        found = [Classes(torch.ones(count, dtype=torch.bool), self.labels.expand(count, -1, -1).clone())]
        return Batch(pictures, [(found, number) for number in range(count)], None, time.perf_counter())


def feed(folder: Path, finishers: int, workers: int) -> None:
    """Print what a run took."""
    with tempfile.TemporaryDirectory(dir=folder.parent) as out:
        progress = Progress()
        task = Task(
            sources=parse([str(folder)], None, out, SUFFIXES),
            out=open_storage(out),
            kinds=KINDS,
            model="instant",
            settings={},
            options={},
            start=Instant,
            workers=workers,
            finishers=finishers,
        )
        before = os.times()
        run(task, progress)
        seconds = time.monotonic() - progress.steady_since
        after = os.times()
    own = (after.user + after.system - before.user - before.system) / progress.done * 1e3
    rate = (progress.done - progress.done_before) / seconds
    print(f"  --finishers {finishers}: {rate:.0f} images/s, {own:.2f} ms of the process itself", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--finishers", type=int, nargs="+", default=[0, 8])
    options = parser.parse_args()
    torch.set_num_threads(1)
    cpus = os.cpu_count() or 1
    print(f"{datetime.date.today()}, {cpus} CPUs, {processor_name()}; {options.images} photos of 500 x 375")
    with tempfile.TemporaryDirectory() as name:
        write_photos(Path(name, "photos"), [Size(500, 375)], options.images)
        for finishers in options.finishers:
            feed(Path(name, "photos"), finishers, max(2, cpus // 2))


if __name__ == "__main__":
    main()
