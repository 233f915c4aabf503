"""Collect real photographs that installed packages ship under free licences into a folder.

    python examples/demo_photos.py demo/photos

From scikit-image: an astronaut, a cat, a cameraman; from scikit-learn: a temple in China; from matplotlib:
Grace Hopper. Nothing is downloaded.
"""

from __future__ import annotations

import shutil
import sys
from importlib.resources import files
from pathlib import Path

PHOTOS = {
    "astronaut.png": ("skimage", "data/astronaut.png"),
    "cat.png": ("skimage", "data/chelsea.png"),
    "cameraman.png": ("skimage", "data/camera.png"),
    "temple.jpg": ("sklearn", "datasets/images/china.jpg"),
    "hopper.jpg": ("matplotlib", "mpl-data/sample_data/grace_hopper.jpg"),
}


def main() -> None:
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    for name, (package, path) in PHOTOS.items():
        with (files(package) / path).open("rb") as source, (folder / name).open("wb") as target:
            shutil.copyfileobj(source, target)
    print(f"{len(PHOTOS)} photographs are in {folder}")


if __name__ == "__main__":
    main()
