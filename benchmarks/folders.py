"""`segcli predict` on folders: images per second beside the network's own, and peak memory.

    python benchmarks/folders.py [--rounds 3] [--images 200] [--mixed 1000] [--large 6000x4000]

Two models, FCN-8s on VGG16 with random weights and the default one. Of each, with masks and overlays:

- images/s on a folder of 500 x 375 photos, as `segcli bench` measures them, beside the network alone, with
  all threads and with one, and beside decoding and encoding alone on one core
- peak memory of `segcli predict` on a folder of mixed sizes, beside one photo of the largest of them
- peak memory of FCN-8s VGG16 on one large photo

Every measurement is a process of its own; memory is that of its largest process. --rounds 0 leaves out speed.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from peers import random_model, random_vgg16

from segcli.device import cpus
from segcli.inference.benchmark import Size, processor_name, write_photos
from segcli.models.checkpoint import save_model
from segcli.models.zoo import DEFAULT_MODEL

SIZES = [Size(500, 375), Size(375, 500), Size(640, 480), Size(333, 500), Size(1024, 768), Size(800, 600)]
SEGCLI = (sys.executable, "-m", "segcli")
MIB = 1 << 20


def vgg16(folder: Path) -> str:
    """A model file of FCN-8s on VGG16 with random weights."""
    torch.manual_seed(0)
    path = folder / "fcn8s-vgg16.safetensors"
    network = random_vgg16()
    save_model(path, network, random_model(network, "fcn8s", "caffe").info)
    return str(path)


def bench(model: str, images: int, *options: str, **environment: str) -> dict[str, Any]:
    """What `segcli bench` finds."""
    command = [*SEGCLI, "bench", "--model", model, "--images", str(images), "--runs", "5", "--json", "-q"]
    answer = subprocess.check_output([*command, *options], env={**os.environ, **environment})
    found: dict[str, Any] = json.loads(answer)
    return found


def speed(model: str, images: int, rounds: int) -> None:
    """Print medians."""
    rows = []
    for _ in range(rounds):
        found, one_thread = bench(model, images), bench(model, 0, OMP_NUM_THREADS="1")
        (size,), (alone,) = found["sizes"], one_thread["sizes"]
        stages = {name: timing["median"] for name, timing in size["stages_ms"].items()}
        files = 1e3 / (stages["decode"] + stages["encode"])
        rates = found["folder"]["images_per_second"], size["images_per_second"], alone["images_per_second"]
        rows.append((*rates, files))
    folder, network, one, files = (statistics.median(column) for column in zip(*rows, strict=True))
    print(
        f"  {images} photos: {folder:.2f} images/s in {found['precision']}\n"
        f"  decode and encode alone on one core: {files:.2f}\n"
        f"  network and labels alone: {network:.2f}, of the slower {folder / min(network, files):.0%}\n"
        f"  the same on one thread: {one:.2f}, of the slower {folder / min(one, files):.0%}"
    )


def peak(model: str, photos: Path, *options: str) -> int:
    """The most memory that `segcli predict` or one of its processes has in use, in bytes."""
    out = photos.with_name("masks")
    command = [*SEGCLI, "predict", str(photos), "-o", str(out), "--model", model, "-q", *options]
    process = os.spawnv(os.P_NOWAIT, sys.executable, command)
    _, status, usage = os.wait4(process, 0)
    shutil.rmtree(out)
    assert status == 0, f"{' '.join(command)} ended with {os.waitstatus_to_exitcode(status)}"
    return usage.ru_maxrss * 1024  # Linux: kilobytes


def memory(model: str, folder: Path, mixed: int) -> None:
    write_photos(folder / "mixed", SIZES, mixed)
    write_photos(folder / "largest", [max(SIZES, key=lambda size: size.width * size.height)], 1)
    one, many = peak(model, folder / "largest"), peak(model, folder / "mixed")
    print(
        f"  peak memory: {many / MIB:,.0f} MiB on {mixed:,} photos of {len(SIZES)} sizes, "
        f"{one / MIB:,.0f} MiB on one of the largest: {many / one:.2f}x"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--mixed", type=int, default=1000, help="0 leaves out memory")
    parser.add_argument("--large", default="6000x4000", help="width x height")
    options = parser.parse_args()
    print(f"{datetime.date.today()}, {processor_name()}, {cpus()} CPUs in use, torch {torch.__version__}")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        released = vgg16(folder)
        for model in (released, DEFAULT_MODEL):
            print(Path(model).stem, flush=True)
            if options.rounds:
                speed(model, options.images, options.rounds)
            if options.mixed:
                memory(model, folder, options.mixed)
        if options.mixed:
            width, _, height = options.large.partition("x")
            write_photos(folder / "large", [Size(int(width), int(height))], 1)
            for precision in ("fp32", "bf16"):
                most = peak(released, folder / "large", "--precision", precision)
                print(f"FCN-8s VGG16 on {options.large} pixels in {precision}: {most / MIB:,.0f} MiB")


if __name__ == "__main__":
    main()
