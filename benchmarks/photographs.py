"""What `segcli predict` does around the network, piece by piece, with photographs.

    python benchmarks/photographs.py [--size 3000 4000] [--rounds 7] [--photos FOLDER] [--model fcn8s-voc]

Prints medians on one thread: of a synthetic photo, upright and on its side, and a label map of six classes.
Of the photographs in a folder it prints what their label maps take: synthetic photos have no such borders.
"""

from __future__ import annotations

import argparse
import datetime
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import cv2
import numpy as np
import torch
from border import show
from PIL import Image

from segcli.images import SUFFIXES, encode_jpeg, encode_mask, read_image
from segcli.inference.benchmark import Size, interleaved, processor_name, synthetic_photo
from segcli.inference.decoders import Decoded
from segcli.inference.segmentation import Segmenter
from segcli.inference.sources import Input
from segcli.models.checkpoint import load_model
from segcli.models.zoo import bundled_models
from segcli.palettes import CLASS_SETS, Labels, count_ids
from segcli.render import overlay

PHOTOS = 40  # of a folder
ON_ITS_SIDE = 6  # EXIF


def six_classes(height: int, width: int) -> Labels:
    """A background and five discs along the diagonal."""
    labels = np.zeros((height, width), np.uint8)
    y, x = np.mgrid[:height, :width]
    for number in range(1, 6):
        place = (y / height - number / 6.2) ** 2 + (x / width - number / 6.2) ** 2
        labels[place < 0.02] = number
    return labels


def pieces(height: int, width: int, folder: Path, rounds: int) -> None:
    pixels = synthetic_photo(Size(width, height), 0)
    upright, turned = folder / "upright.jpg", folder / "turned.jpg"
    upright.write_bytes(encode_jpeg(pixels))
    exif = Image.Exif()
    exif[0x0112] = ON_ITS_SIDE
    with Image.open(upright) as image:
        image.save(turned, exif=exif, quality="keep")
    labels, palette = six_classes(height, width), CLASS_SETS["voc"].palette()
    tinted = overlay(pixels, labels, palette)

    def decoded() -> None:
        with Image.open(upright) as image:
            image.load()

    jobs: dict[str, Callable[[], object]] = {
        "decoded by Pillow, no array": decoded,
        "read": partial(read_image, upright),
        "read, on its side": partial(read_image, turned),
        "overlay": partial(overlay, pixels, labels, palette),
        "overlay as JPEG": partial(encode_jpeg, tinted),
        "pixels of every class": partial(count_ids, labels),
        "mask": partial(encode_mask, labels, palette),
    }
    show(f"{width} x {height}", interleaved(jobs, rounds))
    print(f"  mask of {len(encode_mask(labels, palette)):,} bytes")


def borders(photos: Path, model: str) -> None:
    segmenter = Segmenter(
        load_model(bundled_models()[model]), torch.device("cpu"), ["mask"], precision="bf16"
    )
    found = sorted(path for path in photos.iterdir() if path.suffix.lower() in SUFFIXES)
    times = []
    for path in found[:: max(1, len(found) // PHOTOS)][:PHOTOS]:
        picture = Decoded(Input(str(path), path.name), read_image(path).pixels)
        scores = segmenter.scores([picture])
        for _ in range(3):
            begun = time.perf_counter()
            segmenter.classified([picture], scores).results()
            times.append((time.perf_counter() - begun) * 1e3)
    print(f"\nlabel maps of {len(times) // 3} photographs with {model}: {statistics.median(times):.1f} ms")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--size", nargs=2, type=int, default=(3000, 4000), metavar=("HEIGHT", "WIDTH"))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--photos", type=Path)
    parser.add_argument("--model", default="fcn8s-voc")
    options = parser.parse_args()
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    print(f"{datetime.date.today()}, {processor_name()}, one thread, torch {torch.__version__}")
    with tempfile.TemporaryDirectory() as name:
        height, width = options.size
        pieces(height, width, Path(name), options.rounds)
    if options.photos:
        borders(options.photos, options.model)


if __name__ == "__main__":
    main()
