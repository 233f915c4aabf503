"""What this machine does with a model: latency, images per second, memory, and where the time goes.

All is measured on the functions that `segcli predict` runs, a `Segmenter` and the engine, on synthetic
photographs. Jobs that are compared take turns, so that a busy machine slows all of them alike, and medians
are reported.
"""

from __future__ import annotations

import functools
import platform
import statistics
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.flop_counter import FlopCounterMode

from segcli.errors import ImageError, MachineError
from segcli.files import write_atomic
from segcli.images import SUFFIXES, encode_jpeg, read_image
from segcli.inference.ahead import Ahead
from segcli.inference.crew import Crew
from segcli.inference.decoders import Decoded
from segcli.inference.engine import Progress, run
from segcli.inference.pipeline import Task
from segcli.inference.plan import Plan
from segcli.inference.processes import Processes
from segcli.inference.segmentation import Segmenter
from segcli.inference.sources import Input, parse
from segcli.inference.storage import open_storage
from segcli.models import packed
from segcli.models.fcn import Network
from segcli.models.preprocessing import network_size, to_tensor

SIDE = {"cpu": 2048, "cuda": 8192, "mps": 4096}  # of the square matrices whose product is timed
STAGES = ("decode", "resize", "network", "labels", "encode")
STREAM = 0.5  # seconds that a stream of images is to take, roughly
DISTINCT = 8  # photographs per size; more files are copies, for making one takes longer than reading it


@dataclass(frozen=True)
class Timing:
    """Milliseconds of a job that ran several times: median and 90th percentile of the wall time, and the
    median of the processor time of all threads, which a busy machine disturbs less."""

    median: float
    p90: float
    processor: float


class Size(NamedTuple):
    """Pixels of an image."""

    width: int
    height: int

    def __str__(self) -> str:
        return f"{self.width}x{self.height}"


@dataclass(frozen=True)
class Speed:
    """How fast images of one size are.

    Attributes:
        size: As displayed.
        seen: At which the network sees it.
        whole: From pixels in memory to label maps, per batch, with nothing else to do: the latency.
        stream: The same per image, where many wait.
        stages: Per image, by `STAGES`.
        multiplications: Of the network, per image.
    """

    size: Size
    seen: Size
    whole: Timing
    stream: Timing
    stages: Mapping[str, Timing]
    multiplications: int

    @property
    def images_per_second(self) -> float:
        """From pixels in memory to label maps, where many wait."""
        return 1e3 / self.stream.median

    @property
    def operations_per_second(self) -> float:
        """Of the network: every multiplication comes with an addition."""
        return 2 * self.multiplications * 1e3 / self.stages["network"].median


@dataclass(frozen=True)
class FolderSpeed:
    """How fast `segcli predict` goes through a folder, from the first result to the last.

    Of several processes results count from the first one that comes once all of them are ready.
    """

    images: int  # after the first
    processes: int
    seconds: float
    interrupted: int  # the signal that ended it, 0 for none

    @property
    def images_per_second(self) -> float:
        return self.images / self.seconds


def interleaved(
    jobs: Mapping[str, Callable[[], object]], rounds: int, device: torch.device | None = None
) -> dict[str, Timing]:
    """Time jobs in turns, after one round to warm up.

    Args:
        jobs: What to time, by name.
        rounds: How often each of them runs.
        device: Is waited for, where it computes on its own.
    """
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in jobs}
    for number in range(rounds + 1):
        for name, job in jobs.items():
            start, used = time.perf_counter(), time.process_time()
            job()
            synchronize(device)
            if number:
                spent = time.perf_counter() - start, time.process_time() - used
                times[name].append((spent[0] * 1e3, spent[1] * 1e3))
    return {name: _timing(found) for name, found in times.items()}


def _per_image(timing: Timing, images: int) -> Timing:
    return Timing(timing.median / images, timing.p90 / images, timing.processor / images)


def _timing(found: Sequence[tuple[float, float]]) -> Timing:
    wall, processor = (sorted(column) for column in zip(*found, strict=True))
    ninth = wall[min(len(wall) - 1, int(0.9 * len(wall)))]
    return Timing(statistics.median(wall), ninth, statistics.median(processor))


def synchronize(device: torch.device | None) -> None:
    """Wait until a GPU has done what it was told."""
    if device is not None and device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device is not None and device.type == "mps":
        torch.mps.synchronize()


def matrix_rates(device: torch.device, rounds: int) -> dict[str, float]:
    """Operations in a second of products of square matrices, by precision."""
    jobs, side = {}, SIDE[device.type]
    for name, dtype in {"fp32": torch.float32, "bf16": torch.bfloat16}.items():
        a, b = torch.randn(2, side, side, device=device).to(dtype)
        jobs[name] = lambda a=a, b=b: a @ b
    timings = interleaved(jobs, rounds, device)
    return {name: 2 * side**3 / (timing.median / 1e3) for name, timing in timings.items()}


def multiplications(work: Callable[[], object]) -> int:
    """How many multiplications PyTorch's matrix products and convolutions take in `work`."""
    with FlopCounterMode(display=False, custom_mapping=packed.multiplications()) as counter:
        work()
    return int(counter.get_total_flops()) // 2  # it counts the additions, too


def synthetic_photo(size: Size, seed: int) -> npt.NDArray[np.uint8]:
    """A picture with the spectrum of photographs, uint8 (H, W, 3).

    Amplitudes fall with one over the spatial frequency (Field 1987, "Relations between the statistics of
    natural images and the response properties of cortical cells"); colours vary less than brightness.
    """
    random = np.random.default_rng(seed)
    frequency = np.hypot(np.fft.fftfreq(size.height)[:, None], np.fft.rfftfreq(size.width))
    frequency[0, 0] = np.inf  # no constant part
    noise = random.standard_normal((3, size.height, size.width))
    pink = np.fft.irfft2(np.fft.rfft2(noise) / frequency, s=(size.height, size.width))
    pink /= pink.std(axis=(1, 2), keepdims=True) + 1e-9
    brightness, red, blue = pink
    channels = [brightness + 0.3 * red, brightness, brightness + 0.3 * blue]
    return (118 + 55 * np.stack(channels, axis=-1)).clip(0, 255).astype(np.uint8)


def write_photos(folder: Path, sizes: Sequence[Size], count: int) -> list[Path]:
    """A folder of JPEG photographs, the sizes in turns."""
    content: dict[tuple[Size, int], bytes] = {}
    paths = []
    for number in range(count):
        size = sizes[number % len(sizes)]
        seed = number // len(sizes) % DISTINCT
        if (size, seed) not in content:
            content[size, seed] = encode_jpeg(synthetic_photo(size, seed))
        paths.append(folder / f"{number:05}.jpg")
        write_atomic(paths[-1], content[size, seed])
    return paths


def speeds(
    segmenter: Segmenter, counted: Network, sizes: Sequence[Size], rounds: int, folder: Path
) -> list[Speed]:
    """Time every stage of every size in one interleaved run.

    Args:
        segmenter: What is timed.
        counted: Its network, or one that takes the same multiplications in PyTorch.
        sizes: Of the photographs.
        rounds: How often everything is timed.
        folder: Where photographs are put.
    """
    import cv2

    cv2.setNumThreads(1)  # as in a run, where what resizes and encodes are threads already
    jobs: dict[str, Callable[[], object]] = {}
    counts, waiting = {}, {}
    for path, size in zip(write_photos(folder, sizes, len(sizes)), sizes, strict=True):
        pixels = read_image(path).pixels
        picture = Decoded(Input(str(path), path.name), pixels)
        of_this_size = _jobs(segmenter, picture, path)
        waiting[size] = _waiting(segmenter, of_this_size["whole"])
        of_this_size["stream"] = functools.partial(_stream, segmenter, picture, waiting[size])
        jobs |= {f"{size} {name}": job for name, job in of_this_size.items()}
        device = next(counted.parameters()).device
        images = to_tensor(pixels, segmenter.preprocessing).to(device)
        with torch.no_grad():
            counted.score_pyramid(images)  # what is computed once per size does not count
            counts[size] = multiplications(functools.partial(counted.score_pyramid, images))
    timings = interleaved(jobs, rounds, segmenter.device)
    found = []
    for size in sizes:
        height, width = network_size(size.height, size.width, segmenter.preprocessing)
        stages = {name: timings[f"{size} {name}"] for name in STAGES}
        for name in ("network", "labels"):
            stages[name] = _per_image(stages[name], segmenter.batch_size)
        stream = _per_image(timings[f"{size} stream"], waiting[size])
        seen = Size(width, height)
        found.append(Speed(size, seen, timings[f"{size} whole"], stream, stages, counts[size]))
    return found


def _waiting(segmenter: Segmenter, whole: Callable[[], object]) -> int:
    """How many images a stream is timed with, so many that its beginning and end hardly count."""
    whole()
    start = time.perf_counter()
    whole()
    rounds = round(STREAM / (time.perf_counter() - start))
    at_a_time = segmenter.at_once * max(segmenter.batch_size, segmenter.side_by_side)
    return at_a_time * max(4, min(32, rounds))


def _stream(segmenter: Segmenter, picture: Decoded, count: int) -> None:
    """Compute a picture many times."""
    many = (replace(picture) for _ in range(count))
    for _ in segmenter.compute(Ahead(many, segmenter.batch_size, threading.Event())):
        pass


def _jobs(segmenter: Segmenter, picture: Decoded, path: Path) -> dict[str, Callable[[], object]]:
    """The stages of one batch of a picture, and what takes its pixels to label maps."""
    batch = [replace(picture) for _ in range(segmenter.batch_size)]
    pixels = [segmenter.prepared(each) for each in batch]
    scores = segmenter.scores(batch)
    result, *_ = segmenter.classified(batch, scores).results()
    if isinstance(result, ImageError):
        raise MachineError(f"{picture.item.source}: {result}")

    def whole() -> None:
        for each in batch:
            segmenter.expect(each)
        segmenter.begin(batch).results()

    return {
        "decode": lambda: read_image(path),
        "resize": lambda: segmenter.prepared(picture),
        "network": lambda: segmenter.computed(pixels),
        "labels": lambda: segmenter.classified(batch, scores).results(),
        "encode": lambda: segmenter.encode(picture, result),
        "whole": whole,
    }


def folder_speed(
    segmenter: Segmenter,
    plan: Plan,
    crew: Crew,
    sizes: Sequence[Size],
    images: int,
    folder: Path,
) -> FolderSpeed:
    """Run the engine of `segcli predict` over photographs.

    Args:
        segmenter: Computes, where one process does.
        plan: What it was made by: of several processes each makes its own.
        crew: Which processes do it.
        sizes: Of the photographs, in turns.
        images: How many there are.
        folder: Where photographs and results are put.
    """
    photos = folder / "photos"
    write_photos(photos, sizes, images)
    out = str(folder / "masks")
    progress = Progress()
    task = Task(
        sources=parse([str(photos)], None, out, SUFFIXES),
        out=open_storage(out),
        kinds=segmenter.kinds,
        model="bench",
        settings={},
        options={},
        start=lambda: segmenter,
        workers=crew.readers,
        finishers=crew.finishers,
    )
    processes = len(crew.devices)
    starts = [replace(plan, processes=processes).start] * processes
    run(task, progress, Processes(task, starts) if processes > 1 else None)
    seconds = time.monotonic() - progress.steady_since
    if progress.failed and not progress.interrupted:
        raise MachineError(f"{progress.failed} of {images} photographs failed: {progress.failures[0][1]}")
    return FolderSpeed(progress.done - progress.done_before, processes, seconds, progress.interrupted)


def peak_memory(device: torch.device) -> dict[str, int]:
    """Bytes at most in use until now: of this process, and on its GPU."""
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    found = {"process": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit}
    if device.type == "cuda":
        found["cuda"] = torch.cuda.max_memory_allocated(device)
    return found


def processor_name() -> str:
    """What the processor calls itself."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
