"""From class maps to pictures, and from colour-coded pictures back to class maps.

The work of `segcli colorize`, see `pipeline.Work`. What a mask holds has been read by `images.read_mask`,
what a colour-coded picture holds by `images.read_color_map`.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from segcli.errors import ImageError
from segcli.images import SUFFIXES, encode_jpeg, encode_mask, encode_png, read_image
from segcli.inference.ahead import Ahead
from segcli.inference.decoders import Decoded
from segcli.palettes import CLASS_SETS, ClassSet, count_ids, generic_class_set, labels_from_colors
from segcli.render import boundaries, colorize, line_width, overlay, with_legend

Pixels = npt.NDArray[np.uint8]
Labels = npt.NDArray[np.integer[Any]]

_KNOWN_PALETTES = {classes.palette().tobytes(): classes for classes in CLASS_SETS.values()}
_LINE = (255, 255, 255)


class Colorizer:
    """Draws class maps.

    Args:
        classes: Names and colours for all maps; without them a map keeps its own palette, or gets VOC's.
        legend: Add the classes that occur below every picture.
        lines: Draw lines between the classes.
        photos: The photographs of the maps, for overlays.
    """

    held = 1

    def __init__(self, classes: ClassSet | None, legend: bool, lines: bool, photos: Photos | None) -> None:
        self.classes = classes
        self.legend = legend
        self.lines = lines
        self.photos = photos

    def compute(self, pictures: Ahead[Decoded]) -> Iterator[tuple[Decoded, None]]:
        """Nothing: all the work is in `encode`, which runs in threads."""
        for picture in pictures:
            yield picture, None

    def encode(self, picture: Decoded, result: None) -> tuple[dict[str, bytes], dict[str, float]]:
        """The colour picture, and the overlay when there are photographs."""
        labels = picture.pixels
        assert labels is not None
        classes = self.classes or classes_of(labels, picture.palette)
        palette = classes.palette()
        colors = colorize(labels, palette)
        if self.lines:
            colors[boundaries(labels, line_width(labels.shape))] = _LINE
        files = {"picture": encode_png(self._finished(colors, labels, classes))}
        if self.photos is not None:
            photo = self.photos.of(picture.item.source, labels.shape)
            mixed = overlay(photo, labels, palette, boundary=self.lines)
            files["overlay"] = encode_jpeg(self._finished(mixed, labels, classes))
        if int(labels.max()) >= len(classes):
            nameless = [n for n in count_ids(labels) if n >= len(classes) and n != classes.ignore]
            if nameless:
                listed = ", ".join(map(str, nameless[:8])) + (", ..." if len(nameless) > 8 else "")
                picture.notes += (f"drawn black: ids that are not in {classes.name}: {listed}",)
        return files, {}

    def _finished(self, picture: Pixels, labels: Labels, classes: ClassSet) -> Pixels:
        return with_legend(picture, labels, classes) if self.legend else picture


class Decolorizer:
    """Turns colour-coded label maps into masks of class ids.

    Args:
        classes: Says which colour is which class. Other colours are errors, never guessed.
    """

    held = 1

    def __init__(self, classes: ClassSet) -> None:
        self.classes = classes

    def compute(self, pictures: Ahead[Decoded]) -> Iterator[tuple[Decoded, None]]:
        """Nothing: all the work is in `encode`, which runs in threads."""
        for picture in pictures:
            yield picture, None

    def encode(self, picture: Decoded, result: None) -> tuple[dict[str, bytes], dict[str, float]]:
        """The mask. Raises ImageError for colours that are not in the set."""
        assert picture.pixels is not None
        labels = labels_from_colors(picture.pixels, self.classes)
        files = {"mask": encode_mask(labels, self.classes.palette())}
        return files, named_shares(count_ids(labels), self.classes)


class Photos:
    """Finds the photograph of a mask: the same path below its own folder, whatever its suffix.

    Args:
        folder: Where the photographs lie.
        base: The folder of the masks.
    """

    def __init__(self, folder: Path, base: str) -> None:
        self.folder = folder
        self.base = base

    def of(self, mask: str, shape: tuple[int, ...]) -> Pixels:
        """The photograph of a mask of the shape (H, W), uint8 (H, W, 3).

        Raises:
            ImageError: There is none, there are several, or it has another size.
        """
        below = Path(os.path.relpath(mask, self.base)).with_suffix("")
        folder = self.folder / below.parent
        names = _photos_in(folder).get(below.name, ())
        if not names:
            raise ImageError(f"no image for it: there is no {self.folder / below}.jpg, .png, ...")
        if len(names) > 1:
            raise ImageError(f"several images for it in {folder}: {', '.join(names)}")
        path = folder / names[0]
        try:
            pixels = read_image(path).pixels
        except ImageError as error:
            raise ImageError(f"its image {path}: {error}") from error
        if pixels.shape[:2] != shape:
            height, width = pixels.shape[:2]
            raise ImageError(
                f"it has {shape[1]} x {shape[0]} pixels, but its image {path} {width} x {height}"
            )
        return pixels


@functools.lru_cache(maxsize=32)
def _photos_in(folder: Path) -> dict[str, tuple[str, ...]]:
    """The images of a folder by their stem, and by their full name: b.jpg.png is a mask of b.jpg."""
    found: dict[str, tuple[str, ...]] = {}
    files = sorted(folder.iterdir()) if folder.is_dir() else []
    photos = [file for file in files if file.suffix.lower() in SUFFIXES]
    for photo in photos:
        found[photo.stem] = (*found.get(photo.stem, ()), photo.name)
    return found | {photo.name: (photo.name,) for photo in photos}


def classes_of(labels: Labels, palette: Pixels | None) -> ClassSet:
    """Names and colours for a map that comes without: from its own palette, or VOC's colours.

    Classes have names only where the palette is exactly that of a known set, as in masks by segcli.
    """
    if palette is not None:
        known = _KNOWN_PALETTES.get(palette.tobytes())
        return known or _nameless(palette.tobytes())
    return _generic(65535 if labels.max(initial=0) > 255 else 255)


@functools.lru_cache(maxsize=32)
def _nameless(palette: bytes) -> ClassSet:
    colors = tuple((red, green, blue) for red, green, blue in zip(*[iter(palette)] * 3, strict=True))
    names = tuple(f"class_{number}" for number in range(255))
    return ClassSet("its palette", names, colors[:255], 255, colors[255])


_generic = functools.lru_cache(maxsize=2)(generic_class_set)


def named_shares(counts: dict[int, int], classes: ClassSet) -> dict[str, float]:
    """The share of the pixels by class name; ids without a name count as "id 7"."""
    total = sum(counts.values())

    def name(number: int) -> str:
        if number < len(classes):
            return classes.names[number]
        return "ignore" if number == classes.ignore else f"id {number}"

    return {name(number): round(count / total, 6) for number, count in counts.items()}
