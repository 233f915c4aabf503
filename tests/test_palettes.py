from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from segcli import palettes
from segcli.errors import ImageError, UsageError
from segcli.palettes import (
    CITYSCAPES_LABEL_IDS,
    CLASS_SETS,
    ClassSet,
    count_ids,
    generic_class_set,
    get_class_set,
    labels_from_colors,
    voc_colormap,
)

# ---- the colour map of VOC ----


def test_voc_colormap_by_hand() -> None:
    colors = voc_colormap()
    assert colors.shape == (256, 3)
    assert colors.dtype == np.uint8
    # Bits 0, 1, 2 of the id are the top bits of R, G, B; bits 3, 4, 5 the next ones; 6, 7, 8 those below.
    assert colors[0].tolist() == [0, 0, 0]
    assert colors[1].tolist() == [128, 0, 0]  # 0b001
    assert colors[2].tolist() == [0, 128, 0]  # 0b010
    assert colors[4].tolist() == [0, 0, 128]  # 0b100
    assert colors[8].tolist() == [64, 0, 0]  # 0b001_000
    assert colors[15].tolist() == [192, 128, 128]  # 0b001_111: R = 128 + 64
    assert colors[20].tolist() == [0, 64, 128]  # 0b010_100
    assert colors[255].tolist() == [224, 224, 192]  # 0b11_111_111: R = G = 128 + 64 + 32, B = 128 + 64


def test_voc_colormap_gives_every_id_its_own_color_up_to_65536() -> None:
    colors = voc_colormap(65536).astype(int)
    assert len(np.unique(colors @ [65536, 256, 1])) == 65536
    assert np.array_equal(colors[:256], voc_colormap())


# ---- the published sets ----


@pytest.mark.parametrize(
    ("name", "size", "different_colors", "ignore"),
    [
        ("voc", 21, 21, 255),
        ("camvid", 11, 11, 255),
        ("camvid32", 32, 32, 30),
        ("cityscapes", 19, 19, 255),
        ("ade20k", 150, 149, 255),  # road and skyscraper share a colour in the published table
    ],
)
def test_sizes_of_the_sets(name: str, size: int, different_colors: int, ignore: int) -> None:
    classes = CLASS_SETS[name]
    assert classes.name == name
    assert len(classes) == len(classes.names) == len(classes.colors) == size
    assert len(set(classes.colors)) == different_colors
    assert classes.ignore == ignore
    assert all(part == part.strip() and part for part in classes.names)


@pytest.mark.parametrize(
    ("name", "number", "class_name", "color"),
    [
        ("voc", 0, "background", (0, 0, 0)),
        ("voc", 15, "person", (192, 128, 128)),
        ("voc", 20, "tvmonitor", (0, 64, 128)),
        ("camvid", 0, "sky", (128, 128, 128)),
        ("camvid", 4, "pavement", (60, 40, 222)),
        ("camvid", 10, "bicyclist", (0, 128, 192)),
        ("camvid32", 0, "Animal", (64, 128, 64)),
        ("camvid32", 30, "Void", (0, 0, 0)),
        ("camvid32", 31, "Wall", (64, 192, 0)),
        ("cityscapes", 0, "road", (128, 64, 128)),
        ("cityscapes", 11, "person", (220, 20, 60)),
        ("cityscapes", 18, "bicycle", (119, 11, 32)),
        ("ade20k", 0, "wall", (120, 120, 120)),
        ("ade20k", 64, "coffee table", (0, 255, 112)),
        ("ade20k", 89, "television receiver", (0, 255, 194)),
        ("ade20k", 149, "flag", (92, 0, 255)),
    ],
)
def test_published_classes(name: str, number: int, class_name: str, color: tuple[int, int, int]) -> None:
    assert CLASS_SETS[name].names[number] == class_name
    assert CLASS_SETS[name].colors[number] == color


def test_ade20k_road_and_skyscraper() -> None:
    classes = CLASS_SETS["ade20k"]
    assert [n for n, c in zip(classes.names, classes.colors, strict=True) if c == (140, 140, 140)] == [
        "road",
        "skyscraper",
    ]


def test_cityscapes_label_ids() -> None:
    assert len(CITYSCAPES_LABEL_IDS) == len(CLASS_SETS["cityscapes"])
    named = dict(zip(CLASS_SETS["cityscapes"].names, CITYSCAPES_LABEL_IDS, strict=True))
    assert (named["road"], named["pole"], named["traffic light"], named["train"]) == (7, 17, 19, 31)


def test_a_palette_has_256_colors_and_black_where_there_is_no_class() -> None:
    palette = CLASS_SETS["voc"].palette()
    assert palette.shape == (256, 3)
    assert np.array_equal(palette[:21], voc_colormap(21))
    assert not palette[21:255].any()
    assert palette[255].tolist() == [224, 224, 192]


def test_a_palette_grows_with_the_ids() -> None:
    large = generic_class_set(300)
    assert large.ignore == 65535
    assert large.palette().shape == (65536, 3)
    assert np.array_equal(large.palette()[:300], voc_colormap(300))
    assert generic_class_set(255).palette().shape == (256, 3)


def test_generic_classes() -> None:
    classes = generic_class_set(3)
    assert classes.names == ("class_0", "class_1", "class_2")
    assert classes.colors == ((0, 0, 0), (128, 0, 0), (0, 128, 0))


@pytest.mark.parametrize(
    ("names", "colors", "reason"),
    [
        ((), (), "no classes"),
        (("a", "b"), ((0, 0, 0),), "2 names, but 1 colours"),
        (("a", "a"), ((0, 0, 0), (1, 1, 1)), "'a' occurs twice"),
        (("a",), ((0, 0, 256),), "not a colour"),
    ],
)
def test_sets_that_do_not_fit_are_refused(
    names: tuple[str, ...], colors: tuple[tuple[int, int, int], ...], reason: str
) -> None:
    with pytest.raises(UsageError, match=reason):
        ClassSet("mine", names, colors)


# ---- from colours to ids ----


@pytest.mark.parametrize("name", ["voc", "camvid", "camvid32", "cityscapes"])
def test_colors_lead_back_to_ids(name: str) -> None:
    classes = CLASS_SETS[name]
    labels = np.arange(len(classes), dtype=np.uint8).reshape(1, -1)
    labels = np.vstack([labels, np.full_like(labels, classes.ignore)])
    back = labels_from_colors(classes.palette()[labels], classes)
    assert back.dtype == np.uint8
    assert np.array_equal(back, labels)


def test_ids_are_counted() -> None:
    labels = np.array([[0, 0, 7], [7, 255, 0]])
    for dtype in (np.uint8, np.uint16, np.int32):
        assert count_ids(labels.astype(dtype)) == {0: 3, 7: 2, 255: 1}
        assert count_ids(np.empty((0, 3), dtype)) == {}
    assert count_ids(np.array([[65535, 300]], np.uint16)) == {300: 1, 65535: 1}


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_ids_are_counted_some_at_a_time(monkeypatch: pytest.MonkeyPatch, dtype: type) -> None:
    labels = np.random.default_rng(0).integers(0, 4, (23, 31)).astype(dtype)
    expected = dict(zip(*(part.tolist() for part in np.unique(labels, return_counts=True)), strict=True))
    for some in (1, 2, 100, 713, 1000):
        monkeypatch.setattr(palettes, "COUNTED", some)
        assert count_ids(labels) == expected
        assert count_ids(labels.T) == expected


def test_unknown_colors_are_listed_with_counts() -> None:
    picture = np.zeros((2, 3, 3), np.uint8)
    picture[0, 0] = (1, 2, 3)
    picture[1, :2] = (9, 9, 9)
    with pytest.raises(ImageError) as error:
        labels_from_colors(picture, CLASS_SETS["voc"])
    assert str(error.value) == (
        "2 colours that are not in voc, with pixel counts: (9, 9, 9) x 2, (1, 2, 3) x 1"
    )


def test_many_unknown_colors_are_cut_short() -> None:
    picture = np.arange(1, 61, dtype=np.uint8).reshape(4, 5, 3)
    with pytest.raises(ImageError, match=r"20 colours .* and 12 more"):
        labels_from_colors(picture, CLASS_SETS["voc"])


def test_a_color_of_two_classes_is_not_guessed() -> None:
    classes = CLASS_SETS["ade20k"]
    wall = np.full((2, 2, 3), 120, np.uint8)
    assert labels_from_colors(wall, classes).tolist() == [[0, 0], [0, 0]]
    with pytest.raises(ImageError, match=r"\(140, 140, 140\) is the colour of road and skyscraper"):
        labels_from_colors(wall + np.uint8(20), classes)


def test_ids_above_255_come_back_in_16_bits() -> None:
    classes = generic_class_set(300)
    labels = labels_from_colors(classes.palette()[[[0, 299, 65535]]], classes)
    assert labels.dtype == np.uint16
    assert labels.tolist() == [[0, 299, 65535]]


# ---- files ----


def write(tmp_path: Path, name: str, text: str) -> str:
    (tmp_path / name).write_text(text)
    return str(tmp_path / name)


def test_toml(tmp_path: Path) -> None:
    text = 'name = "fields"\nnames = ["soil", "crop"]\ncolors = [[1, 2, 3], [4, 5, 6]]\nignore = 9\n'
    assert get_class_set(write(tmp_path, "a.toml", text + "ignore_color = [7, 8, 9]")) == ClassSet(
        "fields", ("soil", "crop"), ((1, 2, 3), (4, 5, 6)), 9, (7, 8, 9)
    )


def test_toml_with_names_alone_takes_vocs_colors(tmp_path: Path) -> None:
    classes = get_class_set(write(tmp_path, "mine.toml", 'names = ["a", "b"]'))
    assert classes == ClassSet("mine", ("a", "b"), ((0, 0, 0), (128, 0, 0)))


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("names = [", "not valid TOML"),
        ('name = "x"', "names is missing"),
        ('names = ["a"]\ncolours = [[1, 2, 3]]', "unknown key 'colours'"),
        ('names = ["a"]\ncolors = [[1, 2]]', r"colors must be a list of \[r, g, b\]"),
        ('names = ["a"]\ncolors = [[1, 2, 300]]', "not a colour"),
        ('names = ["a", "b"]\ncolors = [[1, 2, 3]]', "2 names, but 1 colours"),
        ('names = ["a"]\nignore = "x"', "ignore must be a whole number"),
        ('names = ["a"]\nignore = -1', "ignore is -1"),
    ],
)
def test_toml_that_is_wrong(tmp_path: Path, text: str, reason: str) -> None:
    with pytest.raises(UsageError, match=reason) as error:
        get_class_set(write(tmp_path, "a.toml", text))
    assert "a.toml" in str(error.value)


@pytest.mark.parametrize(
    "text",
    [
        "64 128 64\tAnimal\n192 0 128\t\ttraffic light\n",  # Cambridge's label_colors.txt
        "# a comment\nAnimal 64 128 64\ntraffic light 192 0 128  # and another\n\n",
        "name,r,g,b\nAnimal,64,128,64\ntraffic light, 192, 0, 128\n",  # class_dict.csv
        "# label:color_rgb:parts:actions\nAnimal:64,128,64::\ntraffic light:192,0,128::\n",  # CVAT
    ],
)
def test_text_files(tmp_path: Path, text: str) -> None:
    classes = get_class_set(write(tmp_path, "mine.txt", text))
    assert classes == ClassSet("mine", ("Animal", "traffic light"), ((64, 128, 64), (192, 0, 128)))


def test_names_alone_and_ignore_of_labelme(tmp_path: Path) -> None:
    classes = get_class_set(write(tmp_path, "labels.txt", "__ignore__\n_background_\ncat\n"))
    assert classes.names == ("_background_", "cat")
    assert classes.colors == ((0, 0, 0), (128, 0, 0))
    colored = get_class_set(write(tmp_path, "b.txt", "1 1 1 __ignore__\n2 2 2 cat\n"))
    assert (colored.names, colored.ignore_color) == (("cat",), (1, 1, 1))


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "no classes"),
        ("1 2 3\n", "line 1: no class"),
        ("a 1 2 3\nb\n", "line 2: 'b'; give all classes a colour, or none"),
        ("a\nb 1 2 3\n", "line 2"),
        ("a 1 2 3\na 4 5 6\n", "'a' occurs twice"),
        ("a 1 2 256\n", "not a colour"),
    ],
)
def test_text_files_that_are_wrong(tmp_path: Path, text: str, reason: str) -> None:
    with pytest.raises(UsageError, match=reason) as error:
        get_class_set(write(tmp_path, "a.txt", text))
    assert "a.txt" in str(error.value)


def test_a_file_that_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xff\xfe\x80")
    with pytest.raises(UsageError, match="not text"):
        get_class_set(str(tmp_path / "a.txt"))


def test_unknown_names_get_a_suggestion(tmp_path: Path) -> None:
    assert get_class_set("camvid") is CLASS_SETS["camvid"]
    with pytest.raises(UsageError, match="did you mean cityscapes"):
        get_class_set("cityscape")
    with pytest.raises(UsageError, match="Known: voc, camvid, camvid32, cityscapes, ade20k"):
        get_class_set("qqq")
    with pytest.raises(UsageError, match=r"no such class-set file: .*none\.toml"):
        get_class_set(str(tmp_path / "none.toml"))
