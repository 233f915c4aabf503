"""What a process of `segcli predict` does for every photo around a GPU, with a network that only takes time.

    python benchmarks/feeding.py [--images 2000] [--finishers 0 8] [--network RATE] [--readers N]

No GPU is needed: batches of 16 are prepared in threads and fetched later, as of one. The network answers at
once, or RATE images a second, batch after batch. For every number of processes that encode and write it
prints images/s, and the processor time of the process itself, which is what counts where there are enough
cores. How much of it keeps other threads from running Python is told by

    py-spy record --gil --nonblocking --rate 250 --duration 5 --pid PID
"""

from __future__ import annotations

import argparse
import datetime
import math
import os
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
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


class Later:
    """What a `torch.cuda.Event` says of a batch, where it is done at a known time."""

    def __init__(self, at: float) -> None:
        self.at = at

    def query(self) -> bool:
        return time.perf_counter() >= self.at

    def synchronize(self) -> None:
        time.sleep(max(0, self.at - time.perf_counter()))


class Discs(Segmenter):
    """Computes in batches, as on a GPU, but gives the same disc for every picture.

    Args:
        rate: Images a second; infinite for a network that answers at once.
    """

    def __init__(self, rate: float) -> None:
        super().__init__(load_model(bundled_models()["fcn8s-voc"]), torch.device("cpu"), KINDS)
        self.side_by_side, self.batch_size, self.at_once = 0, GPU_BATCH, 2
        self.held = (self.at_once + WAITING) * self.batch_size
        self.preparing = ThreadPoolExecutor(PREPARING, initializer=torch.set_num_threads, initargs=(1,))
        y, x = torch.meshgrid(torch.arange(375), torch.arange(500), indexing="ij")
        self.rate, self.busy_until = rate, 0.0
        self.labels = ((x - 250) ** 2 + (y - 190) ** 2 < 120**2).to(torch.uint8) * 15

    def begin(self, pictures: Sequence[Decoded]) -> Batch:
        for picture in pictures:
            expected, picture.prepared = picture.prepared, None
            if expected:
                expected.result()
        count = len(pictures)
        found = [Classes(torch.ones(count, dtype=torch.bool), self.labels.expand(count, -1, -1).clone())]
        now = time.perf_counter()
        self.busy_until = max(now, self.busy_until) + count / self.rate
        return Batch(pictures, [(found, number) for number in range(count)], Later(self.busy_until), now)


def feed(folder: Path, finishers: int, readers: int, rate: float) -> None:
    """Print what a run took."""
    with tempfile.TemporaryDirectory(dir=folder.parent) as out:
        progress = Progress()
        task = Task(
            sources=parse([str(folder)], None, out, SUFFIXES),
            out=open_storage(out),
            kinds=KINDS,
            model="discs",
            settings={},
            options={},
            start=partial(Discs, rate),
            workers=readers,
            finishers=finishers,
        )
        before = os.times()
        run(task, progress)
        seconds = time.monotonic() - progress.steady_since
        after = os.times()
    own = (after.user + after.system - before.user - before.system) / progress.done * 1e3
    fed = (progress.done - progress.done_before) / seconds
    share = "" if math.isinf(rate) else f" ({fed / rate:.0%} of the network)"
    print(
        f"  --finishers {finishers}: {fed:.0f} images/s{share}, {own:.2f} ms of the process itself",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--finishers", type=int, nargs="+", default=[0, 8])
    parser.add_argument("--network", type=float, default=math.inf, help="images a second")
    parser.add_argument("--readers", type=int, default=max(2, (os.cpu_count() or 1) // 2))
    options = parser.parse_args()
    torch.set_num_threads(1)
    machine = f"{os.cpu_count()} CPUs, {processor_name()}"
    print(f"{datetime.date.today()}, {machine}; {options.images} photos of 500 x 375")
    with tempfile.TemporaryDirectory() as name:
        write_photos(Path(name, "photos"), [Size(500, 375)], options.images)
        for finishers in options.finishers:
            feed(Path(name, "photos"), finishers, options.readers, options.network)


if __name__ == "__main__":
    main()
