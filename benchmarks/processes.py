"""`segcli predict` by one process and by several, on GPUs or a processor, beside the network alone.

    python benchmarks/processes.py [--images 2000] [--processes 1 2 4 8] [--models vgg16 fcn8s-voc]
                                   [--device cuda:all]

Of each model, with masks and overlays of 500 x 375 photos, it prints

- network and labels alone, as `segcli bench` measures them, and the share of the rate of large products
- for every number of processes images/s by the times of the masks, from the first to the last and of the
  middle eight tenths; their shares of the network's; and the seconds of the whole command

Every measurement is a process of its own and prints its line at once: a machine may be there for minutes.
"""

from __future__ import annotations

import argparse
import datetime
import subprocess
import tempfile
import time
from pathlib import Path

import torch
from folders import SEGCLI, bench, vgg16

from segcli.device import cpus, describe, pick_device, pick_devices
from segcli.inference.benchmark import Size, processor_name, write_photos


def alone(model: str, device: str) -> float:
    """Images/s of network and labels."""
    (size,) = bench(model, 0, "--device", device)["sizes"]
    rate, share = size["images_per_second"], size["share_of_matrix_rate"]
    print(f"  network and labels alone: {rate:.0f} images/s, {share:.0%} of the rate of large products")
    return float(rate)


def rates(masks: Path) -> tuple[float, float]:
    """Images/s from the first mask to the last, and without the first and the last tenth."""
    times = sorted(path.stat().st_mtime for path in masks.glob("*.png"))
    tenth = len(times) // 10
    middle = times[tenth : len(times) - tenth]
    return tuple((len(part) - 1) / (part[-1] - part[0]) for part in (times, middle))  # type: ignore[return-value]


def by_processes(model: str, device: str, photos: Path, count: int, network: float) -> None:
    """Print what a number of processes do."""
    with tempfile.TemporaryDirectory(dir=photos.parent) as out:
        command = [*SEGCLI, "predict", str(photos), "-o", out, "--model", model, "--device", device, "-q"]
        begun = time.perf_counter()
        subprocess.run([*command, "--processes", str(count)], check=True)
        seconds = time.perf_counter() - begun
        whole, middle = rates(Path(out))
    print(
        f"  --processes {count}: {whole:.0f} images/s ({whole / network:.0%}), "
        f"in the middle {middle:.0f} ({middle / network:.0%}); {seconds:.1f} s in all",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--models", nargs="+", default=["vgg16", "fcn8s-voc"])
    parser.add_argument("--device", default="cuda:all")
    options = parser.parse_args()
    first = pick_devices(options.device)[0]
    where = f"{describe(pick_device(first))}, {cpus()} CPUs in use of {processor_name()}"
    print(f"{datetime.date.today()}, {where}, torch {torch.__version__}; {options.images} photos")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_photos(folder / "photos", [Size(500, 375)], options.images)
        for model in options.models:
            print(model, flush=True)
            file = vgg16(folder) if model == "vgg16" else model
            network = alone(file, first)
            for count in options.processes:
                by_processes(file, options.device, folder / "photos", count, network)


if __name__ == "__main__":
    main()
