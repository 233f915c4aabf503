from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from segcli.data.public import CAMVID_GROUPS, SEG11VALID
from segcli.data.sets import KNOWN, DataSet, open_data, read_label, search_places, split_names
from segcli.data.verify import check, check_overlap
from segcli.errors import ImageError, MachineError, UsageError
from segcli.palettes import CLASS_SETS, voc_colormap

Values = list[list[int]]


def photo(path: Path, size: tuple[int, int] = (2, 2)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (10, 20, 30)).save(path)
    return path


def mask(path: Path, values: Values, mode: str = "L") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(np.array(values, np.uint8))
    if mode == "P":
        image = image.convert("P")
        image = Image.fromarray(np.array(values, np.uint8)).convert("L")
        image.putpalette(voc_colormap().tobytes())
    image.save(path)
    return path


def color_mask(path: Path, colors: list[list[tuple[int, int, int]]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.array(colors, np.uint8)).save(path)
    return path


def text(path: Path, content: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content, encoding="utf-8")
    return path


def ids(dataset: DataSet, number: int = 0) -> Values:
    label = read_label(dataset.samples[number], dataset)
    assert label.dtype == np.uint8
    return label.tolist()  # type: ignore[no-any-return]


def names(dataset: DataSet) -> list[str]:
    return [sample.name for sample in dataset.samples]


# ---- VOC ----


@pytest.fixture
def voc(tmp_path: Path) -> Path:
    root = tmp_path / "VOCdevkit" / "VOC2012"
    for number, values in enumerate([[[0, 1], [255, 20]], [[0, 0], [0, 2]], [[3, 3], [3, 3]]]):
        photo(root / f"JPEGImages/2007_00000{number}.jpg")
        mask(root / f"SegmentationClass/2007_00000{number}.png", values, "P")
    lists = root / "ImageSets/Segmentation"
    text(lists / "train.txt", "2007_000000\n2007_000001\n")
    text(lists / "val.txt", "2007_000002\r\n")
    text(lists / "my_list.txt", "/JPEGImages/2007_000001.jpg /SegmentationClass/2007_000002.png\n")
    return tmp_path


def test_voc_by_name_below_its_root(voc: Path) -> None:
    dataset = open_data("voc", "train", voc)
    assert names(dataset) == ["2007_000000", "2007_000001"]
    assert dataset.class_set == CLASS_SETS["voc"]
    assert ids(dataset) == [[0, 1], [255, 20]]
    assert dataset.samples[0].image == voc / "VOCdevkit/VOC2012/JPEGImages/2007_000000.jpg"
    assert open_data("voc2012", "train", voc).samples == dataset.samples


def test_every_list_of_voc_is_a_split_and_splits_are_joined(voc: Path) -> None:
    assert split_names("voc", voc) == ("my_list", "train", "val")
    photo(voc / "VOCdevkit/VOC2012/JPEGImages/2007_000033.jpg")
    assert split_names("voc", voc) == ("my_list", "train", "val", "seg11valid")
    assert len(open_data("voc", "seg11valid", voc).samples) == 736
    assert names(open_data("voc", "train+val", voc)) == ["2007_000000", "2007_000001", "2007_000002"]
    assert names(open_data("voc", "train+train", voc)) == ["2007_000000", "2007_000001"]
    pairs = open_data("voc", "my_list", voc)
    assert pairs.samples[0].image.name == "2007_000001.jpg"
    assert ids(pairs) == [[3, 3], [3, 3]]


def test_another_year_is_not_taken_for_the_one_asked_for(voc: Path) -> None:
    with pytest.raises(MachineError, match="voc2011 is not on this machine"):
        open_data("voc2011", "train", voc)
    (voc / "TrainVal").mkdir()
    (voc / "VOCdevkit").rename(voc / "TrainVal/VOCdevkit")
    (voc / "TrainVal/VOCdevkit/VOC2012").rename(voc / "TrainVal/VOCdevkit/VOC2011")
    assert len(open_data("voc2011", "train", voc).samples) == 2


def test_voc_by_path_and_with_classes_of_its_own(voc: Path) -> None:
    folder = voc / "VOCdevkit/VOC2012"
    assert open_data(folder, "val").name == "VOC2012"
    text(folder / "class_names.txt", "__ignore__\n_background_\ncat\nsofa\nlamp\n")
    dataset = open_data(folder, "val")
    assert dataset.class_set.names == ("_background_", "cat", "sofa", "lamp")
    assert ids(dataset) == [[3, 3], [3, 3]]


def test_voc_labels_in_colour_are_read_by_the_colours(voc: Path) -> None:
    folder = voc / "VOCdevkit/VOC2012"
    colors = [[(128, 0, 0), (224, 224, 192)], [(0, 0, 0), (0, 64, 128)]]
    color_mask(folder / "SegmentationClass/2007_000002.png", colors)
    assert ids(open_data("voc", "val", folder)) == [[1, 255], [0, 20]]


def test_seg11valid_is_the_list_of_736_images() -> None:
    lines = SEG11VALID.read_text().splitlines()
    assert len(lines) == len(set(lines)) == 736
    assert lines == sorted(lines)
    assert (lines[0], lines[-1]) == ("2007_000033", "2011_003271")


# ---- SBD ----


@pytest.fixture
def sbd(voc: Path) -> Path:
    from scipy.io import savemat

    folder = voc / "benchmark_RELEASE/dataset"
    for name in ("2007_000002", "2008_000001", "2008_000002"):
        photo(folder / f"img/{name}.jpg")
        (folder / "cls").mkdir(exist_ok=True)
        content = np.zeros((1, 1), [("Segmentation", "O"), ("Boundaries", "O")])
        content[0, 0] = (np.array([[0, 7], [7, 7]], np.uint8), np.zeros(1))
        savemat(folder / f"cls/{name}.mat", {"GTcls": content})
    text(folder / "train.txt", "2008_000001\n2007_000002\n")
    text(folder / "val.txt", "2008_000002\n")
    return voc


def test_sbd_trains_on_its_own_list_and_keeps_those_out_of_val(sbd: Path) -> None:
    dataset = open_data("voc-sbd", "train", sbd)
    assert names(dataset) == ["2008_000001", "2007_000002"]
    assert ids(dataset) == [[0, 7], [7, 7]]
    with pytest.raises(UsageError, match="no image with a label"):
        open_data("voc-sbd", "val", sbd)  # VOC's only val image is in SBD's train
    text(sbd / "VOCdevkit/VOC2012/ImageSets/Segmentation/val.txt", "2007_000002\n2007_000000\n")
    assert names(open_data("voc-sbd", "val", sbd)) == ["2007_000000"]


def test_train_aug_is_everything_but_vocs_val(sbd: Path) -> None:
    dataset = open_data("voc-sbd", "train_aug", sbd)
    assert names(dataset) == ["2007_000000", "2007_000001", "2008_000001", "2008_000002"]
    assert ids(dataset, 0) == [[0, 1], [255, 20]]  # VOC's own PNG
    assert ids(dataset, 3) == [[0, 7], [7, 7]]  # SBD's .mat


def test_sbd_as_pngs_in_the_voc_folder(voc: Path) -> None:
    root = voc / "VOCdevkit/VOC2012"
    mask(root / "SegmentationClassAug/2008_000009.png", [[9, 9], [9, 9]])
    photo(root / "JPEGImages/2008_000009.jpg")
    dataset = open_data("voc-sbd", "train_aug", voc)
    assert names(dataset) == ["2007_000000", "2007_000001", "2008_000009"]
    assert ids(dataset, 2) == [[9, 9], [9, 9]]


# ---- CamVid ----


def test_camvid_of_segnet_by_its_lists_with_void_ignored(tmp_path: Path) -> None:
    photo(tmp_path / "train/a.png")
    mask(tmp_path / "trainannot/a.png", [[0, 10], [11, 3]])
    text(tmp_path / "train.txt", "/SegNet/CamVid/train/a.png /SegNet/CamVid/trainannot/a.png\n")
    dataset = open_data("camvid", "train", tmp_path)
    assert ids(dataset) == [[0, 10], [255, 3]]
    assert dataset.class_set.names[10] == "bicyclist"
    assert open_data(tmp_path, "train").samples == dataset.samples


def test_camvid_of_segnet_without_lists(tmp_path: Path) -> None:
    photo(tmp_path / "CamVid/val/b.png")
    mask(tmp_path / "CamVid/valannot/b.png", [[1, 1], [1, 12]])
    mask(tmp_path / "CamVid/trainannot/b.png", [[1, 1], [1, 1]])
    dataset = open_data("camvid", "val", tmp_path)
    with pytest.raises(ImageError, match=r"holds 12, but the ids of camvid are 0\.\.10"):
        read_label(dataset.samples[0], dataset)


@pytest.fixture
def cambridge(tmp_path: Path) -> Path:
    photo(tmp_path / "701_StillsRaw_full/x.png", (3, 1))
    sky, void, truck = (128, 128, 128), (0, 0, 0), (192, 128, 192)
    color_mask(tmp_path / "LabeledApproved_full/x_L.png", [[sky, void, truck]])
    return tmp_path


def test_camvid_of_cambridge_by_colour(cambridge: Path) -> None:
    dataset = open_data("camvid32", "all", cambridge)
    assert names(dataset) == ["x"]
    sky, truck = (dataset.class_set.names.index(name) for name in ("Sky", "Truck_Bus"))
    assert ids(dataset) == [[sky, 255, truck]]
    text(cambridge / "val.txt", "x\n")
    assert names(open_data("camvid32", "val", cambridge)) == ["x"]


def test_camvids_11_classes_from_cambridges_colours(cambridge: Path) -> None:
    dataset = open_data("camvid", "all", cambridge)
    sky, car = (dataset.class_set.names.index(name) for name in ("sky", "car"))
    assert ids(dataset) == [[sky, 255, car]]
    grouped = [name for group in CAMVID_GROUPS.values() for name in group]
    assert sorted([*grouped, "Void"]) == sorted(CLASS_SETS["camvid32"].names)


def test_camvid_split_into_folders(tmp_path: Path) -> None:
    photo(tmp_path / "val/y.png", (1, 1))
    color_mask(tmp_path / "val_labels/y_L.png", [[(128, 128, 128)]])
    assert names(open_data("camvid32", "val", tmp_path)) == ["y"]


def test_a_colour_that_camvid_does_not_have_is_named(cambridge: Path) -> None:
    color_mask(cambridge / "LabeledApproved_full/x_L.png", [[(1, 2, 3)] * 3])
    dataset = open_data("camvid32", "all", cambridge)
    with pytest.raises(ImageError, match=r"\(1, 2, 3\) x 3"):
        read_label(dataset.samples[0], dataset)


# ---- Cityscapes and ADE20K ----


def test_cityscapes_label_ids_become_train_ids(tmp_path: Path) -> None:
    photo(tmp_path / "leftImg8bit/val/bonn/bonn_0_1_leftImg8bit.png", (4, 1))
    #                       unlabelled, road, bicycle, caravan
    mask(tmp_path / "gtFine/val/bonn/bonn_0_1_gtFine_labelIds.png", [[0, 7, 33, 29]])
    dataset = open_data("cityscapes", "val", tmp_path)
    assert names(dataset) == ["bonn/bonn_0_1"]
    assert ids(dataset) == [[255, 0, 18, 255]]
    mask(tmp_path / "gtFine/val/bonn/bonn_0_1_gtFine_labelIds.png", [[0, 7, 33, 34]])
    with pytest.raises(ImageError, match="holds 34"):
        read_label(dataset.samples[0], dataset)


def test_cityscapes_with_train_ids_only(tmp_path: Path) -> None:
    photo(tmp_path / "leftImg8bit/val/bonn/b_leftImg8bit.png", (3, 1))
    mask(tmp_path / "gtFine/val/bonn/b_gtFine_labelTrainIds.png", [[0, 18, 255]])
    assert ids(open_data(tmp_path, "val")) == [[0, 18, 255]]


def test_ade20k_counts_from_one_and_ignores_zero(tmp_path: Path) -> None:
    photo(tmp_path / "ADEChallengeData2016/images/validation/v.jpg", (4, 1))
    mask(tmp_path / "ADEChallengeData2016/annotations/validation/v.png", [[0, 1, 150, 255]])
    dataset = open_data("ade20k", "val", tmp_path)
    assert ids(dataset) == [[255, 0, 149, 255]]
    mask(tmp_path / "ADEChallengeData2016/annotations/validation/v.png", [[0, 1, 151, 254]])
    with pytest.raises(ImageError, match="holds 151, 254"):
        read_label(dataset.samples[0], dataset)


# ---- one's own ----


def test_images_and_masks_with_endings_and_sub_folders(tmp_path: Path) -> None:
    photo(tmp_path / "images/b/one.jpg")
    photo(tmp_path / "images/two.png")
    photo(tmp_path / "images/alone.jpg")
    photo(tmp_path / "images/.hidden.jpg")
    mask(tmp_path / "masks/b/one_mask.png", [[0, 3], [255, 0]])
    mask(tmp_path / "masks/two.png", [[0, 1], [0, 0]])
    mask(tmp_path / "masks/lonely.png", [[0, 1], [0, 0]])
    mask(tmp_path / "masks/_overlay/two.png", [[9, 9], [9, 9]])
    dataset = open_data(tmp_path, "all")
    assert names(dataset) == ["two", "b/one"]
    assert dataset.class_set.names == ("class_0", "class_1", "class_2", "class_3")
    assert sorted(path.name for path in dataset.unpaired) == ["alone.jpg", "lonely.png"]


def test_images_that_differ_only_in_the_suffix_keep_it(tmp_path: Path) -> None:
    photo(tmp_path / "images/a.jpg")
    photo(tmp_path / "images/a.png")
    mask(tmp_path / "masks/a.png", [[0, 1], [0, 0]])
    assert names(open_data(tmp_path, "all")) == ["a", "a.png"]


def test_a_folder_without_splits_holds_one_tenth_out_by_name(tmp_path: Path) -> None:
    for number in range(30):
        photo(tmp_path / f"images/{number}.jpg")
        mask(tmp_path / f"masks/{number}.png", [[0, 1], [0, 0]])
    train, val = open_data(tmp_path, "train"), open_data(tmp_path, "val")
    assert len(val.samples) == 3
    assert set(names(train)) | set(names(val)) == {str(number) for number in range(30)}
    assert not set(names(train)) & set(names(val))
    assert names(open_data(tmp_path, "val")) == names(val)
    assert len(open_data(tmp_path, "train+val").samples) == 30


def test_any_split_can_be_divided_by_name(tmp_path: Path) -> None:
    for number in range(30):
        photo(tmp_path / f"images/{number}.jpg")
        mask(tmp_path / f"masks/{number}.png", [[0, 1], [0, 0]])
    whole = set(open_data(tmp_path, "all").samples)
    held, rest = open_data(tmp_path, "all:val").samples, open_data(tmp_path, "all:train").samples
    assert (len(held), len(rest)) == (3, 27)
    assert set(held) | set(rest) == whole
    with pytest.raises(UsageError, match="no split 'all:dev'"):
        open_data(tmp_path, "all:dev")


def test_lists_of_names_beside_images_and_masks_are_the_splits(tmp_path: Path) -> None:
    for name in ("a b", "c"):
        photo(tmp_path / f"images/{name}.jpg")
        mask(tmp_path / f"masks/{name}.png", [[0, 1], [0, 0]])
    text(tmp_path / "train.txt", "a b\n")
    text(tmp_path / "val.txt", "c.jpg\n")
    text(tmp_path / "classes.txt", "ground\ntree\n")
    assert split_names(tmp_path) == ("all", "train", "val")
    assert names(open_data(tmp_path, "train")) == ["a b"]
    assert names(open_data(tmp_path, "val")) == ["c"]
    assert open_data(tmp_path, "val").class_set.names == ("ground", "tree")


@pytest.mark.parametrize(
    ("images", "masks"),
    [("train/images", "train/masks"), ("images/train", "labels/train"), ("training/img", "training/gt")],
)
def test_split_folders(tmp_path: Path, images: str, masks: str) -> None:
    photo(tmp_path / images / "a.jpg")
    mask(tmp_path / masks / "a.png", [[0, 1], [0, 0]])
    photo(tmp_path / images.replace("train", "val", 1) / "a.jpg")
    mask(tmp_path / masks.replace("train", "val", 1) / "a.png", [[0, 2], [0, 0]])
    wanted = {"training/img": ("train",)}.get(images, ("train", "val"))
    assert split_names(tmp_path) == wanted
    assert names(open_data(tmp_path, "train")) == ["a"]
    if "val" in wanted:
        assert ids(open_data(tmp_path, "val")) == [[0, 2], [0, 0]]
        assert len(open_data(tmp_path, "train").class_set) == 3  # the classes of all splits
        assert names(open_data(tmp_path, "train+val")) == ["train/a", "val/a"]


def test_a_list_file_and_a_folder_of_lists(tmp_path: Path) -> None:
    photo(tmp_path / "p/a b.jpg")
    photo(tmp_path / "p/c.jpg")
    mask(tmp_path / "m/1.png", [[0, 1], [0, 0]])
    listed = text(tmp_path / "val.txt", "# photo\tlabel\np/a b.jpg\tm/1.png\n\np/c.jpg\tm/1.png\n")
    assert names(open_data(listed, "all")) == ["p/a b", "p/c"]
    assert len(open_data(listed, "train").samples) == 1
    listed.write_text("p/c.jpg m/1.png\n")
    text(tmp_path / "train.txt", "p/c.jpg,m/1.png\n")
    assert split_names(tmp_path) == ("train", "val")
    assert names(open_data(tmp_path, "train")) == ["p/c"]


def test_a_list_with_a_wrong_line_is_refused_by_line(tmp_path: Path) -> None:
    listed = text(tmp_path / "all.txt", "a.jpg a.png\nb c.jpg b.png\n")
    with pytest.raises(UsageError, match=r"all\.txt:2 has 3 fields instead of `image label`"):
        open_data(listed, "all")


DESCRIPTION = """
name = "leaves"
names = ["background", "leaf"]
colors = [[0, 0, 0], [0, 200, 0]]
[ids]
200 = 1
9 = 255
[splits]
train = {images = "p", labels = "m"}
val = {list = "val.txt"}
test = "val.txt"
"""


def test_a_description_in_toml(tmp_path: Path) -> None:
    photo(tmp_path / "p/a.jpg")
    photo(tmp_path / "p/c.jpg")
    mask(tmp_path / "m/a.png", [[0, 200], [9, 1]])
    color_mask(tmp_path / "m/c.png", [[(0, 200, 0), (0, 0, 0)]] * 2)
    text(tmp_path / "val.txt", "p/c.jpg m/c.png\n")
    file = text(tmp_path / "dataset.toml", DESCRIPTION)
    for path in (file, tmp_path):
        dataset = open_data(path, "train")
        assert dataset.class_set.names == ("background", "leaf")
        assert ids(dataset) == [[0, 1], [255, 1]]
        assert ids(open_data(path, "val")) == [[1, 0], [1, 0]]
        assert open_data(path, "test").samples == open_data(path, "val").samples


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("names = [", "is not valid TOML"),
        ("names = ['a']", "names no splits"),
        ("[splits]\nall = 'x.txt'", "names no classes"),
        ("names = ['a']\n[splits]\nall = {images = 'p'}", "needs images"),
        ("names = ['a']\n[ids]\n300 = 1\n[splits]\nall = 'x.txt'", "'300', which is no number in 0..255"),
        ("names = ['a']\ncolours = []\n[splits]\nall = 'x.txt'", "unknown key 'colours'"),
        ("classes = 'vocc'\n[splits]\nall = 'x.txt'", "did you mean voc"),
    ],
)
def test_a_wrong_description_is_named(tmp_path: Path, content: str, message: str) -> None:
    text(tmp_path / "x.txt", "a.jpg a.png\n")
    file = text(tmp_path / "dataset.toml", content)
    with pytest.raises(UsageError, match=message):
        open_data(file, "all")


# ---- where sets are looked for ----


def test_the_search_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, voc: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("SEGCLI_DATA", raising=False)
    assert search_places("voc", Path("x")) == [Path("x")]
    assert search_places("voc")[0] == Path("data/voc")
    monkeypatch.setenv("SEGCLI_DATA", str(tmp_path / "sets"))
    assert search_places("voc")[:2] == [tmp_path / "sets/voc", Path("data/voc")]

    with pytest.raises(MachineError) as caught:
        open_data("voc", "train")
    lines = str(caught.value).splitlines()
    assert len(lines) == 2
    assert f"looked in {tmp_path}/sets/voc, data/voc, " in lines[0]
    assert "segcli data download voc" in lines[1]
    assert "VOCtrainval_11-May-2012.tar (md5 6cd6e144f989b92b3379bac3b3de84fd)" in lines[1]

    (tmp_path / "data").mkdir()
    (tmp_path / "data/voc").symlink_to(voc / "VOCdevkit")
    assert open_data("voc", "train").root == Path("data/voc/VOC2012")


def test_a_set_behind_a_login_names_its_address(tmp_path: Path) -> None:
    with pytest.raises(MachineError, match=r"cityscapes-dataset\.com/downloads/, where a login is needed"):
        open_data("cityscapes", "train", tmp_path)


def test_unknown_names_splits_and_folders(tmp_path: Path, voc: Path) -> None:
    with pytest.raises(UsageError, match="did you mean camvid"):
        open_data("camvit", "train")
    with pytest.raises(UsageError, match="no split 'valid'; it has my_list, train, val"):
        open_data("voc", "valid", voc)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match="looks like no data set"):
        open_data(tmp_path / "empty", "train")
    with pytest.raises(UsageError, match="--root belongs to a known data set"):
        open_data(tmp_path / "empty", "train", tmp_path)
    (tmp_path / "empty/images").mkdir()
    (tmp_path / "empty/masks").mkdir()
    with pytest.raises(UsageError, match=r"split train of .* has no image with a label"):
        open_data(tmp_path / "empty", "train")


def test_the_archives_are_those_that_torchvision_knows() -> None:
    from torchvision.datasets.sbd import SBDataset
    from torchvision.datasets.voc import DATASET_YEAR_DICT

    for year in range(2007, 2013):
        known = KNOWN[f"voc{year}"]
        assert (known.address, known.md5) == (
            DATASET_YEAR_DICT[str(year)]["url"],
            DATASET_YEAR_DICT[str(year)]["md5"],
        )
    assert (KNOWN["voc-sbd"].address, KNOWN["voc-sbd"].md5) == (SBDataset.url, SBDataset.md5)


# ---- labels that are none ----


def test_lossy_colour_and_too_large_labels_are_refused(tmp_path: Path) -> None:
    photo(tmp_path / "images/a.png")
    Image.new("L", (2, 2)).save((tmp_path / "masks").mkdir() or tmp_path / "masks/a.jpg")
    dataset = open_data(tmp_path, "all")
    with pytest.raises(ImageError, match="JPEG"):
        read_label(dataset.samples[0], dataset)
    (tmp_path / "masks/a.jpg").unlink()
    color_mask(tmp_path / "masks/a.png", [[(1, 2, 3)] * 2] * 2)
    dataset = open_data(tmp_path, "all")
    with pytest.raises(ImageError, match="colour picture"):
        read_label(dataset.samples[0], dataset)
    Image.fromarray(np.array([[0, 300]], np.uint16)).save(tmp_path / "masks/a.png")
    with pytest.raises(ImageError, match="values from 0 to 300"):
        read_label(dataset.samples[0], dataset)


# ---- check ----


def test_a_clean_set_has_no_findings(voc: Path) -> None:
    seen = []
    assert check(open_data("voc", "train", voc), lambda: seen.append(1)) == []
    assert len(seen) == 2


def test_every_kind_of_fault_is_found_with_its_file_and_fix(tmp_path: Path) -> None:
    good = [[0, 1], [2, 0]]
    for name in "abcdefg":
        photo(tmp_path / f"images/{name}.jpg")
        mask(tmp_path / f"masks/{name}.png", good)
    text(tmp_path / "classes.txt", "ground\ntree\nsky\n")
    whole = photo(tmp_path / "images/a.jpg", (64, 64)).read_bytes()
    (tmp_path / "images/a.jpg").write_bytes(whole[: len(whole) // 2])  # cut off
    mask(tmp_path / "masks/b.png", [[0, 1, 2], [0, 1, 2]])  # another size
    mask(tmp_path / "masks/c.png", [[0, 3], [77, 255]])  # no such classes
    Image.new("L", (2, 2)).save(tmp_path / "masks/d.jpg")  # lossy
    (tmp_path / "masks/d.png").unlink()
    color_mask(tmp_path / "masks/e.png", [[(1, 2, 3)] * 2] * 2)
    (tmp_path / "images/f.jpg").unlink()
    (tmp_path / "masks/g.png").write_bytes(b"")
    dataset = open_data(tmp_path, "all")

    found = {finding.path.relative_to(tmp_path).as_posix(): finding for finding in check(dataset)}
    assert found.keys() == {
        *("images/a.jpg", "masks/b.png", "masks/c.png", "masks/d.jpg", "masks/e.png", "masks/f.png"),
        "masks/g.png",
    }
    assert "3 x 2, but its image is shown as 2 x 2" in found["masks/b.png"].problem
    assert "holds 3, 77, but the ids of classes are 0..2" in found["masks/c.png"].problem
    assert "segcli data convert --map" in found["masks/c.png"].fix
    assert "empty" in found["masks/g.png"].problem
    assert [path for path, finding in found.items() if not finding.serious] == ["masks/f.png"]
    for finding in found.values():
        assert "\n" not in str(finding)


def test_a_missing_file_of_a_list(tmp_path: Path) -> None:
    mask(tmp_path / "m.png", [[0, 1], [0, 0]])
    (finding,) = check(open_data(text(tmp_path / "l.txt", "no.jpg m.png\n"), "all"))
    assert finding.path == tmp_path / "no.jpg"
    assert finding.problem == "does not exist"


def test_a_photo_on_its_side_is_named(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (4, 2)).save(tmp_path / "images/a.jpg", exif=exif)
    mask(tmp_path / "masks/a.png", [[0, 1, 1, 0], [0, 0, 0, 0]])
    (finding,) = check(open_data(tmp_path, "all"))
    assert "EXIF orientation" in finding.fix


def test_binary_masks_are_named_as_such(tmp_path: Path) -> None:
    photo(tmp_path / "images/a.jpg")
    mask(tmp_path / "masks/a.png", [[0, 255], [255, 0]])
    (finding,) = check(open_data(tmp_path, "all"))
    assert finding.path == tmp_path / "masks"
    assert "only 0 and 255, and 255 counts as ignore" in finding.problem
    assert "--from binary" in finding.fix


def test_shades_of_grey_are_named_with_the_map_to_use(tmp_path: Path) -> None:
    photo(tmp_path / "images/a.jpg")
    mask(tmp_path / "masks/a.png", [[0, 128], [200, 0]])
    (finding,) = check(open_data(tmp_path, "all"))
    assert finding.fix.endswith("--map 0=0,128=1,200=2")


def test_only_ignored_pixels(tmp_path: Path) -> None:
    photo(tmp_path / "train/a.png")
    mask(tmp_path / "trainannot/a.png", [[11, 11], [11, 11]])
    (finding,) = check(open_data("camvid", "train", tmp_path))
    assert "only 11, which is ignored" in finding.problem


def test_images_in_two_splits_are_found(voc: Path) -> None:
    text(voc / "VOCdevkit/VOC2012/ImageSets/Segmentation/val.txt", "2007_000002\n2007_000001\n")
    parts = {split: open_data("voc", split, voc) for split in ("train", "val")}
    (finding,) = check_overlap(parts)
    assert finding.path.name == "2007_000001.jpg"
    assert finding.problem == "is in train and in val"
