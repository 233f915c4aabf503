"""Label files of others into masks whose values are class ids. The map that is applied is plain data.

Sources: cityscapesScripts (helpers/labels.py) for label ids and train ids; SceneParse150 for ADE20K's zero;
wkentaro/labelme (utils/shape.py) for the drawing of shapes.
"""

from __future__ import annotations

import base64
import binascii
import io
import json
import os
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

from segcli.data.layout import image_files
from segcli.data.public import CITYSCAPES_TRAIN_IDS
from segcli.errors import ImageError, UsageError
from segcli.files import write_atomic
from segcli.images import MAX_PIXELS, encode_mask, read_color_map, read_label_map
from segcli.palettes import CLASS_SETS, ClassSet, generic_class_set, labels_from_colors

Ids = npt.NDArray[np.uint8]

IGNORE = 255
_BINARY = ClassSet("binary", ("background", "foreground"), ((0, 0, 0), (128, 0, 0)))


@dataclass(frozen=True)
class Conversion:
    """How files become ids.

    Attributes:
        about: For people.
        classes: The label space of the result; None when nobody named it.
        table: value in the file -> id.
        keeps: Values that the table does not have stay; otherwise they are an error.
        colors: The files are pictures in the colours of `classes`.
        shapes: The files are labelme's JSON; `table` is not used.
    """

    about: str
    classes: ClassSet | None = None
    table: dict[int, int] = field(default_factory=dict)
    keeps: bool = False
    colors: bool = False
    shapes: bool = False


CITYSCAPES_LABELS = {value: CITYSCAPES_TRAIN_IDS.get(value, IGNORE) for value in range(34)}
CONVERSIONS: dict[str, Conversion] = {
    "binary": Conversion("masks of 0 and 255: 255 becomes class 1", _BINARY, {0: 0, 1: 1, 255: 1}),
    "cityscapes": Conversion(
        "Cityscapes label ids become train ids", CLASS_SETS["cityscapes"], CITYSCAPES_LABELS
    ),
    "cityscapes-train-ids": Conversion(
        "train ids become the label ids that the test server wants",
        None,
        {train: value for value, train in CITYSCAPES_TRAIN_IDS.items()} | {IGNORE: 0},
    ),
    "ade20k": Conversion(
        "ADE20K: 0 is ignored, 1..150 become 0..149",
        CLASS_SETS["ade20k"],
        {0: IGNORE} | {value: value - 1 for value in range(1, 151)},
    ),
    "camvid": Conversion(
        "SegNet's CamVid: 11 is ignored",
        CLASS_SETS["camvid"],
        {value: value for value in range(11)} | {11: IGNORE, 255: IGNORE},
    ),
    "colors": Conversion("pictures in the colours of --classes", colors=True),
    "labelme": Conversion("labelme's JSON files", shapes=True),
    "ids": Conversion("ids stay, but for those in --map", keeps=True),
}


@dataclass
class Converted:
    """What was done: files written, pixels per id, and what could not be read."""

    written: int = 0
    pixels: npt.NDArray[np.int64] = field(default_factory=lambda: np.zeros(256, np.int64))
    failed: list[tuple[Path, str]] = field(default_factory=list)


def parse_map(text: str) -> dict[int, int]:
    """`255=1,128=2` as {255: 1, 128: 2}.

    Raises:
        UsageError: It is written otherwise, or a number is not in 0..255.
    """
    table: dict[int, int] = {}
    for part in text.split(","):
        old, _, new = (piece.strip() for piece in part.partition("="))
        if not (old.isdecimal() and new.isdecimal() and int(old) <= 255 and int(new) <= 255):
            raise UsageError(f"--map {part.strip()!r} is not OLD=NEW with numbers from 0 to 255")
        if table.setdefault(int(old), int(new)) != int(new):
            raise UsageError(f"--map gives two ids to {old}")
    return table


def source_files(source: Path, conversion: Conversion) -> list[tuple[Path, str]]:
    """The files to convert, and where the mask of each goes below the output folder.

    Raises:
        UsageError: There are none.
    """
    if source.is_file():
        return [(source, f"{source.stem}.png")]
    if not source.is_dir():
        raise UsageError(f"{source} does not exist")
    if conversion.shapes:
        paths = sorted(path for path in source.rglob("*.json") if path.is_file())
    else:
        paths = list(image_files(source, extra=(".npy",)))
    if not paths:
        raise UsageError(f"{source} has no {'.json files' if conversion.shapes else 'label maps'}")
    names = [path.relative_to(source).with_suffix(".png").as_posix() for path in paths]
    shared = {name for name, count in Counter(names).items() if count > 1}
    return [
        (path, f"{path.relative_to(source).as_posix()}.png" if name in shared else name)
        for path, name in zip(paths, names, strict=True)
    ]


def convert_all(
    files: Sequence[tuple[Path, str]],
    conversion: Conversion,
    out: Path,
    done: Callable[[], object] = lambda: None,
) -> Converted:
    """Convert files and write the masks, and `classes.txt` where the classes have names.

    Raises:
        MachineError: The output folder cannot be written to.
    """
    palette = (conversion.classes or generic_class_set(255)).palette()

    def convert(file: tuple[Path, str]) -> npt.NDArray[np.int64] | ImageError:
        path, name = file
        try:
            ids = read_ids(path, conversion)
        except ImageError as error:
            return error
        write_atomic(out / name, encode_mask(ids, palette))
        return np.bincount(ids.ravel(), minlength=256).astype(np.int64)

    result = Converted()
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for (path, _), counts in zip(files, pool.map(convert, files), strict=True):
            if isinstance(counts, ImageError):
                result.failed.append((path, str(counts)))
            else:
                result.written += 1
                result.pixels += counts
            done()
    if conversion.classes is not None and result.written:
        write_atomic(out / "classes.txt", class_lines(conversion.classes).encode())
    return result


def class_lines(classes: ClassSet) -> str:
    """A class set as the text file that `palettes.read_class_set` reads: `r g b name`."""
    rows = zip(classes.colors, classes.names, strict=True)
    return "".join(f"{r} {g} {b} {name}\n" for (r, g, b), name in rows)


def read_ids(path: Path, conversion: Conversion) -> Ids:
    """The ids of one file: uint8 (H, W).

    Raises:
        ImageError: It cannot be read, or holds what the conversion does not know.
    """
    if conversion.shapes:
        assert conversion.classes is not None
        return draw_shapes(_read_json(path), conversion.classes)
    if conversion.colors:
        assert conversion.classes is not None
        return labels_from_colors(read_color_map(path), conversion.classes).astype(np.uint8)
    values = read_label_map(path)
    if values.max(initial=0) > 255:
        raise ImageError(f"holds values up to {values.max()}; at most 255 are understood")
    occurring = np.flatnonzero(np.bincount(values.ravel().astype(np.int64), minlength=256)).tolist()
    unknown = [] if conversion.keeps else [value for value in occurring if value not in conversion.table]
    if unknown:
        listed = ", ".join(map(str, unknown[:8]))
        raise ImageError(f"holds {listed}, which the map does not have; give --map OLD=NEW for them")
    table = np.arange(256, dtype=np.uint8)
    for old, new in conversion.table.items():
        table[old] = new
    ids = table[values]
    if conversion.classes is not None and ids.max(where=ids != IGNORE, initial=0) >= len(conversion.classes):
        last = len(conversion.classes) - 1
        raise ImageError(f"has the id {ids[ids != IGNORE].max()}, but the classes are 0..{last}")
    return ids


# ---- labelme ----


def labelme_classes(paths: Sequence[Path]) -> ClassSet:
    """The classes of labelme files that nobody listed: `_background_`, then all labels by name."""
    labels: set[str] = set()
    for path in paths:
        try:
            shapes = _read_json(path).get("shapes")
        except ImageError:
            continue  # reported when it is converted
        labels |= {str(shape.get("label")) for shape in shapes or () if isinstance(shape, dict)}
    names = ["_background_", *sorted(labels - {"__ignore__", "_background_"})]
    if len(names) > 255:
        raise UsageError(f"the files have {len(names)} labels; a mask has at most 255 classes")
    return ClassSet("labelme", tuple(names), generic_class_set(len(names)).colors)


def draw_shapes(document: dict[str, Any], classes: ClassSet) -> Ids:
    """The label map of a labelme document, uint8 (H, W); later shapes lie over earlier ones.

    Raises:
        ImageError: The document is incomplete, or has a label that is no class.
    """
    width, height = document.get("imageWidth"), document.get("imageHeight")
    if not (isinstance(width, int) and isinstance(height, int) and width > 0 and height > 0):
        raise ImageError("has no imageWidth and imageHeight")
    if width * height > MAX_PIXELS:
        raise ImageError(f"{width} x {height} pixels are more than the limit of {MAX_PIXELS:,}")
    canvas = Image.new("L", (width, height), 0)
    for shape in document.get("shapes") or ():
        try:
            label = shape["label"]
            if label != "__ignore__" and label not in classes.names:
                raise ImageError(f"has the label {label!r}, which is not among the classes")
            value = IGNORE if label == "__ignore__" else classes.names.index(label)
            _draw(canvas, shape, value)
        except (KeyError, TypeError, ValueError, IndexError, binascii.Error, OSError) as error:
            raise ImageError(f"has a shape that cannot be drawn: {error!r}") from error
    return np.array(canvas)


def _draw(canvas: Image.Image, shape: dict[str, Any], value: int) -> None:
    """One shape, as labelme's shape_to_mask draws it."""
    points = [(float(x), float(y)) for x, y in shape["points"]]
    kind = shape.get("shape_type") or "polygon"
    draw = ImageDraw.Draw(canvas)
    if kind == "polygon":
        draw.polygon(points, fill=value, outline=value)
    elif kind == "rectangle":
        (x0, y0), (x1, y1) = points
        draw.rectangle((min(x0, x1), min(y0, y1), max(x0, x1), max(y0, y1)), fill=value, outline=value)
    elif kind == "circle":
        (x, y), (edge_x, edge_y) = points
        radius = ((x - edge_x) ** 2 + (y - edge_y) ** 2) ** 0.5
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=value, outline=value)
    elif kind in ("line", "linestrip"):
        draw.line(points, fill=value, width=10)
    elif kind in ("point", "points"):
        for x, y in points:
            draw.ellipse((x - 5, y - 5, x + 5, y + 5), fill=value, outline=value)
    elif kind == "mask":
        with Image.open(io.BytesIO(base64.b64decode(shape["mask"])), formats=("PNG",)) as stored:
            if stored.width * stored.height > MAX_PIXELS:
                raise ValueError("the mask is too large")
            part = stored.convert("1")
        left, top = (round(coordinate) for coordinate in points[0])
        canvas.paste(value, (left, top, left + part.width, top + part.height), part)
    else:
        raise ValueError(f"unknown shape_type {kind!r}")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ImageError(f"is not JSON: {error}") from error
    if not isinstance(document, dict) or not isinstance(document.get("shapes"), list):
        raise ImageError("is not a labelme file: it has no shapes")
    return document
