"""How a data set lies on disk: the types of a layout, and the pieces that layouts share."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from segcli.errors import ImageError, UsageError
from segcli.images import SUFFIXES, read_label_map
from segcli.palettes import ClassSet, generic_class_set, get_class_set

IDENTITY = bytes(range(256))
CLASS_FILES = (
    "classes.txt", "class_names.txt", "labels.txt", "label_colors.txt", "class_dict.csv", "labelmap.txt",
)  # fmt: skip
LABEL_ENDINGS = re.compile(r"[_-](masks?|labels?|gt|L|seg|segmentation|annotation|labelIds)$")
HOLD_OUT = 10  # of a folder without splits, one image in ten is kept for validation


@dataclass(frozen=True)
class Sample:
    """One image and its label file. `name` is unique within a data set, with `/` between folders."""

    image: Path
    label: Path
    name: str


@dataclass(frozen=True)
class LabelCoding:
    """How the values of a label file become class ids.

    Attributes:
        class_set: The label space the ids belong to.
        ids: 256 bytes: `ids[value in the file]` is the class id, or 255 = ignore.
        colors: For RGB label files: the set whose colours they use. Its ids then go through `ids` as well.
    """

    class_set: ClassSet
    ids: bytes = IDENTITY
    colors: ClassSet | None = None


@dataclass(frozen=True)
class Part:
    """The samples of one split, and the files of its folders that have no partner."""

    samples: tuple[Sample, ...]
    unpaired: tuple[Path, ...] = ()


@dataclass(frozen=True)
class Layout:
    """One convention. All functions take the folder (or file) that `find` returned.

    Attributes:
        name: For people and for `data list`.
        find: The folder the layout's paths start at, at or below a given one; None when it is another layout.
        splits: The names of the splits that are there.
        read: The samples of one of those splits.
        coding: Which classes there are, and how label files are read.
    """

    name: str
    find: Callable[[Path], Path | None]
    splits: Callable[[Path], tuple[str, ...]]
    read: Callable[[Path, str], Part]
    coding: Callable[[Path], LabelCoding]


def value_table(mapping: dict[int, int], rest: int | None = None) -> bytes:
    """256 bytes from {value in the file: class id}; other values keep their value, or become `rest`."""
    table = bytearray(IDENTITY if rest is None else [rest] * 256)
    for value, class_id in mapping.items():
        table[value] = class_id
    return bytes(table)


def pair(images: Path, labels: Path) -> Part:
    """Match images with label files of the same relative name, with endings such as `_mask` removed.

    Raises:
        UsageError: One of the folders does not exist.
    """
    for folder in (images, labels):
        if not folder.is_dir():
            raise UsageError(f"{folder} is not a folder")
    by_name: dict[str, Path] = {}
    spare = []
    for path in image_files(labels, extra=(".npy", ".mat")):
        name = _stem(path, labels)
        kept = by_name.setdefault(name, path)
        if kept is not path:
            spare.append(path)
    endings = {LABEL_ENDINGS.sub("", name): path for name, path in by_name.items()}
    samples, unpaired, used, names = [], spare, set(), set()
    for image in image_files(images):
        name = _stem(image, images)
        label = by_name.get(name) or endings.get(name)
        if label is None:
            unpaired.append(image)
            continue
        if name in names:  # a.jpg beside a.png
            name = image.relative_to(images).as_posix()
        names.add(name)
        used.add(label)
        samples.append(Sample(image, label, name))
    unpaired += [path for path in by_name.values() if path not in used]
    return Part(tuple(samples), tuple(sorted(unpaired)))


def image_files(folder: Path, extra: tuple[str, ...] = ()) -> Iterator[Path]:
    """Image files below a folder, sorted; hidden folders and segcli's own (`_overlay`, ...) are left out."""
    for where, folders, files in os.walk(folder):
        folders[:] = sorted(f for f in folders if not f.startswith((".", "_")))
        for file in sorted(files):
            suffix = os.path.splitext(file)[1].lower()  # noqa: PTH122 - a Path per file is slow here
            if not file.startswith(".") and (suffix in SUFFIXES or suffix in extra):
                yield Path(where, file)


def _stem(path: Path, folder: Path) -> str:
    return path.relative_to(folder).with_suffix("").as_posix()


def held_out(whole: Part, split: str) -> Part:
    """train and val of a folder without splits: the tenth with the lowest hash of the name is val."""
    if split not in ("train", "val") or len(whole.samples) < 2:
        return whole
    order = sorted(
        whole.samples, key=lambda s: hashlib.sha256(s.name.encode(errors="surrogateescape")).digest()
    )
    held = set(order[: max(1, len(order) // HOLD_OUT)])
    return Part(tuple(s for s in whole.samples if (s in held) == (split == "val")), whole.unpaired)


def read_list(path: Path, root: Path) -> Part:
    return Part(tuple(listed_sample(root, where, fields) for where, fields in read_lines(path)))


def listed_sample(root: Path, where: str, fields: list[str]) -> Sample:
    if len(fields) != 2:
        raise UsageError(
            f"{where} has {len(fields)} fields instead of `image label`; separate names with spaces by a tab"
        )
    image, label = (_listed_path(root, name) for name in fields)
    inside = image.is_relative_to(root)
    return Sample(
        image, label, (image.relative_to(root) if inside else Path(image.name)).with_suffix("").as_posix()
    )


def _listed_path(root: Path, name: str) -> Path:
    """A path of a list: relative to the root, absolute, or absolute on the machine of the list's author."""
    path = Path(name)
    if not path.is_absolute():
        return root / path
    below = root / name.lstrip("/")
    if below.exists():
        return below  # /JPEGImages/2007_000032.jpg
    return (
        path if path.exists() else root.joinpath(*path.parts[-2:])
    )  # /SegNet/CamVid/train/0001TP_006690.png


def read_lines(path: Path) -> list[tuple[str, list[str]]]:
    """[("file:line", fields)] of the non-empty lines; fields are separated by a tab, comma, or spaces."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"cannot read the list {path}: {error}") from error
    rows = []
    for number, line in enumerate(text.splitlines(), start=1):
        if line.strip() and not line.startswith("#"):
            separator = next((s for s in ("\t", ",") if s in line), None)
            rows.append((f"{path}:{number}", [part.strip() for part in line.strip().split(separator)]))
    return rows


def read_names(path: Path) -> list[str]:
    """The names that a list has, one per line."""
    return [" ".join(fields) for _, fields in read_lines(path)]


def list_names(folder: Path) -> tuple[str, ...]:
    """The names of the lists in a folder; files of class names are no lists."""
    return tuple(sorted(p.stem for p in folder.glob("*.txt") if p.name not in CLASS_FILES and _is_text(p)))


def pair_list_names(folder: Path) -> tuple[str, ...]:
    """The names of the lists whose lines are `image label` pairs."""

    def is_pair(path: Path) -> bool:
        with path.open(encoding="utf-8-sig", errors="replace") as file:
            fields = re.split(r"[\t, ]+", file.readline().strip())
        return len(fields) == 2 and all(Path(f).suffix.lower() in SUFFIXES | {".npy"} for f in fields)

    return tuple(name for name in list_names(folder) if is_pair(folder / f"{name}.txt"))


def _is_text(path: Path) -> bool:
    return path.is_file() and "readme" not in path.name.lower()


def coding_from_files(root: Path) -> LabelCoding | None:
    """The classes that a file in the folder names, with their colours where RGB labels need them."""
    file = first(root / name for name in CLASS_FILES if (root / name).is_file())
    if file is None:
        return None
    return plain_coding(get_class_set(str(file)))


def plain_coding(class_set: ClassSet) -> LabelCoding:
    """Ids as they are, the set's own ignore value as 255, RGB labels by the set's colours."""
    if len(class_set) > 255:
        raise UsageError(
            f"class set {class_set.name} has {len(class_set)} classes; data sets have at most 255"
        )
    return LabelCoding(
        class_set, value_table({class_set.ignore: 255} if class_set.ignore < 256 else {}), class_set
    )


def counted_coding(labels: Iterable[Path]) -> LabelCoding:
    """Classes for labels that nobody named: as many as the highest id says."""

    def highest(path: Path) -> int:
        try:
            ids = read_label_map(path)
        except (ImageError, OSError):
            return 0  # `data verify` reports it
        return int(np.max(ids, where=ids != 255, initial=0))

    with ThreadPoolExecutor() as pool:
        count = max(pool.map(highest, labels), default=0) + 1
    return LabelCoding(generic_class_set(min(count, 255)))


def subfolders(folder: Path) -> list[Path]:
    return sorted(c for c in folder.iterdir() if c.is_dir() and not c.name.startswith((".", "_")))


def first(candidates: Iterable[Path]) -> Path | None:
    return next(iter(candidates), None)
