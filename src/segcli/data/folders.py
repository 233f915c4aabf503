"""Folder-per-class data sets, for training an encoder as an image classifier."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from segcli.errors import UsageError
from segcli.images import SUFFIXES

SPLITS = ("train", "val", "test")


@dataclass(frozen=True)
class ClassFolders:
    """Images with a class each.

    Attributes:
        names: Class names; a class's number is its place.
        images: Files and their class numbers.
    """

    names: tuple[str, ...]
    images: tuple[tuple[Path, int], ...]


def open_folders(root: Path, split: str) -> ClassFolders:
    """Every folder below `root` that directly holds images is a class, named by its path.

    A part of the path called train, val or test is not part of the name; it says which split the images
    belong to. Images without such a part belong to train. So one root may hold several data sets.

    Raises:
        UsageError: The folder is missing, or the split has no images.
    """
    if not root.is_dir():
        raise UsageError(f"there is no folder {root}; a classification data set has one folder per class")
    found: list[tuple[Path, str, str]] = []
    for path in sorted(root.rglob("*")):
        if path.suffix.lower() in SUFFIXES and path.is_file():
            parts = path.relative_to(root).parent.parts
            splits = [part for part in parts if part in SPLITS]
            name = "/".join(part for part in parts if part not in SPLITS)
            found.append((path, name, splits[0] if splits else "train"))
    names = tuple(sorted({name for _, name, _ in found if name}))
    numbers = {name: number for number, name in enumerate(names)}
    images = tuple((path, numbers[name]) for path, name, part in found if part == split and name)
    if not images:
        raise UsageError(f"{root} holds no images for the split {split!r}; a folder per class is expected")
    return ClassFolders(names, images)
