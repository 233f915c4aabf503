"""`segcli colorize` beside imgviz with Pillow, written as the README of imgviz shows.

    OMP_NUM_THREADS=1 python benchmarks/colorize.py [--masks 1000] [--rounds 3]

Makes masks of 500 x 375 pixels in a temporary folder, lets both turn them into RGB pictures, each time in a
fresh process and in turns, after one round to warm up, and prints the medians of wall and processor time.
`segcli colorize` also hashes inputs and outputs, flushes every file to the disk and keeps a record. Needs
imgviz.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import os
import platform
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import cv2
import numpy as np

from segcli.images import encode_mask
from segcli.palettes import CLASS_SETS

PEER = """
import sys
from pathlib import Path
import imgviz, numpy as np
from PIL import Image
out = Path(sys.argv[2])
out.mkdir()
for path in Path(sys.argv[1]).glob("*.png"):
    label = np.asarray(Image.open(path))
    Image.fromarray(imgviz.label2rgb(label)).save(out / path.name)
"""
HEIGHT, WIDTH = 375, 500


def make_masks(folder: Path, count: int) -> None:
    """Masks of the 21 VOC classes: large regions with wavering borders."""
    palette = CLASS_SETS["voc"].palette()
    classes = CLASS_SETS["voc"].names
    for number in range(count):
        random = np.random.default_rng(number)
        scores = np.zeros((len(classes), HEIGHT, WIDTH), np.float32)
        for size, strength in (((8, 6), 1.0), ((32, 24), 0.15)):
            for layer in scores:
                coarse = random.normal(size=size[::-1]).astype(np.float32)
                layer += strength * cv2.resize(coarse, (WIDTH, HEIGHT), interpolation=cv2.INTER_CUBIC)
        (folder / f"{number:05}.png").write_bytes(encode_mask(scores.argmax(0).astype(np.uint8), palette))


@contextlib.contextmanager
def compiled_python() -> Iterator[None]:
    """Let Python keep what it compiles, as it does on a user's machine, in a folder of this run."""
    with tempfile.TemporaryDirectory() as folder:
        os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
        os.environ["PYTHONPYCACHEPREFIX"] = folder
        yield


def timed(command: list[str]) -> tuple[float, float]:
    """Seconds of wall and of processor time, its children's included."""
    start, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    wall, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    return wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def take_turns(
    commands: Mapping[str, list[str]], rounds: int, out: Path
) -> dict[str, list[tuple[float, float]]]:
    """What `timed` finds of every command in every round; what they leave in `out` is removed each time."""
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in commands}
    for number in range(rounds + 1):
        for name, command in commands.items():
            found = timed(command)
            if number:  # the first round compiles
                times[name].append(found)
            shutil.rmtree(out, ignore_errors=True)  # not every command leaves something
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--masks", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    cores = len(os.sched_getaffinity(0))
    print(f"{datetime.date.today()}, {platform.machine()}, {cores} CPUs in use, {options.masks} masks")
    with compiled_python(), tempfile.TemporaryDirectory() as name:
        masks, out = Path(name, "masks"), Path(name, "out")
        masks.mkdir()
        make_masks(masks, options.masks)
        commands = {
            "imgviz and Pillow": [sys.executable, "-c", PEER, str(masks), str(out)],
            "segcli colorize": [sys.executable, "-m", "segcli", "colorize", str(masks), "-o", str(out), "-q"],
        }
        times = take_turns(commands, options.rounds, out)
    first: list[float] = []
    for name, each in times.items():
        medians = [statistics.median(column) for column in zip(*each, strict=True)]
        first = first or medians
        ratios = ", ".join(f"{a / b:.2f}x" for a, b in zip(first, medians, strict=True))
        print(f"{name:20} {medians[0]:7.1f} s wall {medians[1]:7.1f} s processor   {ratios}")


if __name__ == "__main__":
    main()
