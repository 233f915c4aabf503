"""The layouts of one's own data: a folder of images and masks, lists, or a TOML description."""

from __future__ import annotations

import tomllib
from dataclasses import replace
from pathlib import Path
from typing import Any

from segcli.data.layout import (
    LabelCoding,
    Layout,
    Part,
    coding_from_files,
    counted_coding,
    first,
    held_out,
    list_names,
    pair,
    pair_list_names,
    plain_coding,
    read_list,
    read_names,
    subfolders,
    value_table,
)
from segcli.errors import UsageError
from segcli.palettes import class_set_from_table, get_class_set

IMAGE_FOLDERS = ("images", "image", "imgs", "img", "JPEGImages")
LABEL_FOLDERS = ("masks", "mask", "labels", "label", "annotations", "gt", "SegmentationClass")
SPLIT_FOLDERS = {
    "train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val", "test": "test",
    "testing": "test", "all": "all",
}  # fmt: skip


def _find_lists(folder: Path) -> Path | None:
    """Lists: `train.txt`, `val.txt`, ... with one `image label` pair per line, relative to the folder."""
    return folder if folder.is_dir() and pair_list_names(folder) else None


def _read_lists(root: Path, split: str) -> Part:
    return read_list(root / f"{split}.txt", root)


def _lists_coding(root: Path) -> LabelCoding:
    parts = (_read_lists(root, split) for split in pair_list_names(root))
    return coding_from_files(root) or counted_coding(s.label for part in parts for s in part.samples)


def _find_list(path: Path) -> Path | None:
    """A list file: one `image label` pair per line, relative to the file."""
    return path if path.is_file() and path.suffix.lower() in (".txt", ".csv", ".tsv", ".lst") else None


def _read_list_file(path: Path, split: str) -> Part:
    return held_out(read_list(path, path.parent), split)


def _list_coding(path: Path) -> LabelCoding:
    labels = (sample.label for sample in read_list(path, path.parent).samples)
    return coding_from_files(path.parent) or counted_coding(labels)


def _find_folder(folder: Path) -> Path | None:
    """`images/` + `masks/`, `train/images/` + `train/masks/`, or `images/train/` + `masks/train/`."""
    return folder if _folder_splits(folder) else None


def _plain_folders(root: Path) -> dict[str, tuple[Path, Path]]:
    """{split: (images, labels)}; a folder without splits is the one split `all`."""
    direct = _image_and_label_folder(root)
    if direct is None:
        below = {c.name: found for c in subfolders(root) if (found := _image_and_label_folder(c))}
    else:
        images, labels = direct
        below = {c.name: (c, labels / c.name) for c in subfolders(images) if (labels / c.name).is_dir()}
    splits = {SPLIT_FOLDERS[name]: found for name, found in below.items() if name in SPLIT_FOLDERS}
    return splits or ({"all": direct} if direct else {})


def _image_and_label_folder(root: Path) -> tuple[Path, Path] | None:
    images = first(root / name for name in IMAGE_FOLDERS if (root / name).is_dir())
    labels = first(root / name for name in LABEL_FOLDERS if (root / name).is_dir())
    return (images, labels) if images and labels else None


def _folder_splits(root: Path) -> tuple[str, ...]:
    folders = _plain_folders(root) if root.is_dir() else {}
    if list(folders) == ["all"]:
        return ("all", *(list_names(root) or ("train", "val")))
    return tuple(folders)


def _read_folder(root: Path, split: str) -> Part:
    folders = _plain_folders(root)
    if "all" not in folders:
        return pair(*folders[split])
    whole = pair(*folders["all"])
    if split != "all" and (root / f"{split}.txt").is_file():
        wanted = {name.replace("\\", "/") for name in read_names(root / f"{split}.txt")}
        chosen = [s for s in whole.samples if s.name in wanted or s.image.name in wanted]
        return Part(tuple(chosen), whole.unpaired)
    return held_out(whole, split)


def _folder_coding(root: Path) -> LabelCoding:
    """The classes that a file in the folder names, or one beside the masks, as `data convert` writes it."""
    folders = _plain_folders(root).values()
    for place in (root, *(labels for _, labels in folders)):
        if (coding := coding_from_files(place)) is not None:
            return coding
    return counted_coding(sample.label for pair_of in folders for sample in pair(*pair_of).samples)


def _find_description(path: Path) -> Path | None:
    """A TOML description with class names, colours and splits (`dataset.toml`)."""
    if path.is_dir():
        path = path / "dataset.toml"
    return path if path.is_file() and path.suffix.lower() == ".toml" else None


def _description(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} is not valid TOML: {error}") from error


def _description_splits(path: Path) -> tuple[str, ...]:
    splits = _description(path).get("splits", {})
    if not isinstance(splits, dict) or not splits:
        raise UsageError(
            f'{path} names no splits; add e.g.\n[splits]\ntrain = {{images = "images", labels = "masks"}}'
        )
    return tuple(splits)


def _read_description(path: Path, split: str) -> Part:
    entry = _description(path)["splits"][split]
    if isinstance(entry, str):
        return read_list(path.parent / entry, path.parent)
    if isinstance(entry, dict) and isinstance(entry.get("list"), str):
        return read_list(path.parent / entry["list"], path.parent)
    if not isinstance(entry, dict) or not all(isinstance(entry.get(k), str) for k in ("images", "labels")):
        raise UsageError(
            f'{path}: split {split} needs images = "FOLDER" and labels = "FOLDER", or list = "FILE"'
        )
    return pair(path.parent / entry["images"], path.parent / entry["labels"])


def _description_coding(path: Path) -> LabelCoding:
    """`classes` names a class set or its file; or `names`, `colors`, `ignore` as in a class-set file."""
    content = _description(path)
    if "classes" in content:
        file = path.parent / str(content["classes"])
        coding = plain_coding(get_class_set(str(file if file.is_file() else content["classes"])))
    elif "names" in content:
        keys = content.keys() - {"splits", "ids"}
        coding = plain_coding(class_set_from_table(path, {key: content[key] for key in keys}))
    else:
        raise UsageError(f'{path} names no classes; add e.g. names = ["background", "leaf"]')
    table = {i: coding.ids[i] for i in range(256)}
    for value, class_id in content.get("ids", {}).items():
        table[_byte(path, value)] = _byte(path, class_id)
    return replace(coding, ids=value_table(table))


def _byte(path: Path, value: object) -> int:
    number = int(str(value)) if str(value).isdecimal() else -1
    if not 0 <= number <= 255:
        raise UsageError(f"{path}: ids holds {value!r}, which is no number in 0..255")
    return number


DESCRIPTION = Layout(
    "TOML description", _find_description, _description_splits, _read_description, _description_coding
)
LISTS = Layout("folder with lists", _find_lists, pair_list_names, _read_lists, _lists_coding)
LIST = Layout("list file", _find_list, lambda path: ("all", "train", "val"), _read_list_file, _list_coding)
FOLDER = Layout("images and masks", _find_folder, _folder_splits, _read_folder, _folder_coding)
