from __future__ import annotations

import itertools

import numpy as np
import numpy.typing as npt
import pytest
from matplotlib import colormaps

from segcli import render
from segcli.palettes import CLASS_SETS, ClassSet, generic_class_set, voc_colormap
from segcli.render import (
    COMPARED_SIZE,
    MOST_ENTRIES,
    boundaries,
    colorize,
    compare,
    grid,
    heat_map,
    legend,
    overlay,
    with_legend,
)

RNG = np.random.default_rng(0)
VOC = CLASS_SETS["voc"]


def image(height: int, width: int) -> npt.NDArray[np.uint8]:
    return RNG.integers(0, 256, (height, width, 3), dtype=np.uint8)


def blocks(height: int, width: int) -> npt.NDArray[np.uint8]:
    """Background, with class 1 in the middle."""
    labels = np.zeros((height, width), np.uint8)
    labels[height // 4 : -height // 4, width // 4 : -width // 4] = 1
    return labels


# ---- colour maps ----


def test_colorize_is_the_palettes_entry_of_every_id() -> None:
    labels = np.arange(256, dtype=np.uint8).reshape(8, 32)
    palette = RNG.integers(0, 256, (256, 3), dtype=np.uint8)  # red, green and blue all differ
    assert np.array_equal(colorize(labels, palette), palette[labels])


@pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.int64])
def test_colorize_wider_ids(dtype: type) -> None:
    labels = np.array([[0, 255, 300]], dtype)
    assert np.array_equal(colorize(labels, voc_colormap(512)), voc_colormap(512)[labels])
    assert colorize(labels, voc_colormap())[0].tolist() == [[0, 0, 0], [224, 224, 192], [0, 0, 0]]


def test_colorize_takes_views() -> None:
    labels = np.arange(12, dtype=np.uint8).reshape(3, 4)
    for view in (labels.T, labels[::-1], np.rot90(labels), labels[:, ::2]):
        assert np.array_equal(colorize(view, voc_colormap()), voc_colormap()[view])


# ---- overlays ----


def test_overlay_mixes_image_and_color() -> None:
    photo = np.full((8, 8, 3), 100, np.uint8)
    labels = np.full((8, 8), 1, np.uint8)
    mixed = overlay(photo, labels, voc_colormap(), opacity=0.25, boundary=False)
    assert mixed[4, 4].tolist() == [107, 75, 75]  # 0.75 * 100 + 0.25 * (128, 0, 0)


def test_overlay_leaves_black_classes_alone() -> None:
    photo, labels = image(40, 60), blocks(40, 60)
    tinted = overlay(photo, labels, voc_colormap())
    assert np.array_equal(tinted[labels == 0], photo[labels == 0])
    assert (tinted[labels == 1] != photo[labels == 1]).any()


def test_overlay_draws_lines_in_the_color_of_the_class() -> None:
    photo, labels = image(40, 60), blocks(40, 60)
    lined, plain = (overlay(photo, labels, voc_colormap(), boundary=b) for b in (True, False))
    rim = boundaries(labels) & (labels == 1)
    assert (lined[rim] == (128, 0, 0)).all()
    assert np.array_equal(lined[~rim], plain[~rim])


@pytest.mark.parametrize("boundary", [True, False])
@pytest.mark.parametrize("lines", [1, 3])
def test_overlay_is_the_same_in_strips(monkeypatch: pytest.MonkeyPatch, boundary: bool, lines: int) -> None:
    monkeypatch.setattr(render, "line_width", lambda shape: lines)
    photo, labels = image(41, 60), blocks(41, 60)
    whole = overlay(photo, labels, voc_colormap(), boundary=boundary)
    for rows in (1, 2, 7, 40):
        monkeypatch.setattr(render, "STRIP", rows * 60)
        assert np.array_equal(overlay(photo, labels, voc_colormap(), boundary=boundary), whole)
        turned = overlay(photo[::-1], labels[::-1], voc_colormap(), boundary=boundary)
        assert np.array_equal(turned, whole[::-1])


def test_overlay_does_not_change_its_inputs() -> None:
    photo, labels = image(10, 10), blocks(10, 10)
    before = photo.copy(), labels.copy()
    overlay(photo, labels, voc_colormap())
    assert np.array_equal(photo, before[0])
    assert np.array_equal(labels, before[1])


def test_boundaries_lie_on_both_sides_of_an_edge() -> None:
    labels = np.array([[0, 0, 1, 1], [0, 0, 1, 1], [0, 0, 0, 0]])
    assert boundaries(labels).astype(int).tolist() == [[0, 1, 1, 0], [0, 1, 1, 1], [0, 0, 1, 1]]


@pytest.mark.parametrize("width", [1, 2, 3])
def test_boundaries_have_the_width_asked_for(width: int) -> None:
    labels = np.zeros((20, 20), np.uint16)
    labels[:, 10:] = 300
    columns = np.flatnonzero(boundaries(labels, width)[5])
    assert columns.tolist() == list(range(10 - width, 10 + width))
    assert boundaries(labels, width).dtype == np.bool_


def test_no_boundaries_in_one_class_or_one_pixel() -> None:
    assert not boundaries(np.ones((5, 5), np.uint8), 2).any()
    assert boundaries(np.ones((1, 1), np.uint8)).tolist() == [[False]]


def test_lines_grow_with_the_picture() -> None:
    small, large = blocks(48, 64), blocks(1800, 2400)
    for labels, expected in ((small, 1), (large, 2)):  # sqrt(1800 * 2400) / 1200 = 1.7
        photo = np.full((*labels.shape, 3), 255, np.uint8)
        row = overlay(photo, labels, voc_colormap())[labels.shape[0] // 2]
        solid = np.flatnonzero((row == (128, 0, 0)).all(axis=1))
        assert len(solid) == 2 * expected


# ---- heat maps ----


def test_heat_map_is_inferno_in_rgb() -> None:
    values = np.linspace(0, 1, 256, dtype=np.float32).reshape(16, 16)
    expected = colormaps["inferno"](values)[..., :3] * 255
    assert np.abs(heat_map(values) - expected).max() < 4


def test_heat_map_of_values_out_of_range() -> None:
    colors = heat_map(np.array([[-1.0, np.nan, 0.0, 1.0, 7.0]]))
    assert colors[0, 0].tolist() == colors[0, 1].tolist() == colors[0, 2].tolist()
    assert colors[0, 4].tolist() == colors[0, 3].tolist()


# ---- legends ----


def patches(picture: npt.NDArray[np.uint8], color: tuple[int, int, int]) -> int:
    return int((picture == color).all(axis=2).sum())


@pytest.mark.parametrize("width", [1, 64, 500, 6000])
def test_a_legend_shows_every_color_large_enough(width: int) -> None:
    picture = legend(VOC.names, VOC.colors, width)
    assert picture.shape[1] == width or (width < 150 and picture.shape[1] < 150)
    for color in VOC.colors[1:]:
        assert patches(picture, color) >= 6 * 6


def test_legend_text_is_never_small_and_grows() -> None:
    def height_of_letters(width: int) -> int:
        picture = legend(["H"], [(255, 0, 0)], width)
        red = np.flatnonzero((picture == (255, 0, 0)).all(axis=2).any(axis=0)).max()
        ink = (picture[:, red + 3 :] < 128).all(axis=2)
        rows = np.flatnonzero(ink.any(axis=1))
        return int(rows[-1] - rows[0] + 1)

    heights = [height_of_letters(width) for width in (10, 500, 1500, 6000)]
    assert heights[0] == heights[1] >= 7  # a capital letter of 12 pixel text
    assert heights[1] < heights[2] < heights[3]


def test_legend_entries_stay_inside_and_apart() -> None:
    names = [f"a rather long name {number}" for number in range(40)]
    colors = [(number * 6, 255 - number, 77) for number in range(40)]
    picture = legend(names, colors, 700)
    assert picture.shape[1] == 700
    assert (picture[:, -1] == 255).all()
    assert (picture[:2] == 255).all()
    assert (picture[-2:] == 255).all()
    assert all(patches(picture, color) >= 36 for color in colors)


def test_legend_needs_a_color_for_every_name() -> None:
    with pytest.raises(ValueError, match="zip"):
        legend(["a", "b"], [(1, 2, 3)], 100)


def test_with_legend_lists_what_occurs_and_keeps_the_picture() -> None:
    labels = np.array([[0, 1], [15, 255]], np.uint8).repeat(30, 0).repeat(50, 1)
    picture = colorize(labels, VOC.palette())
    shown = with_legend(picture, labels, VOC)
    assert np.array_equal(shown[:60, :100], picture)
    below = shown[60:]
    for number in (1, 15, 255):
        assert patches(below, tuple(VOC.palette()[number].tolist())) >= 36
    assert patches(below, VOC.colors[2]) == 0


def test_with_legend_of_ids_without_a_class() -> None:
    classes = ClassSet("one", ("thing",), ((9, 9, 200),))
    labels = np.array([[0, 7, 300]], np.int32)
    assert patches(with_legend(colorize(labels, classes.palette()), labels, classes), (9, 9, 200)) >= 36


def test_with_legend_of_very_many_ids_ends() -> None:
    labels = np.arange(3000, dtype=np.uint16).reshape(50, 60)
    classes = generic_class_set(3000)
    shown = with_legend(colorize(labels, classes.palette()), labels, classes)
    assert shown.shape[0] < 50 + 20 * (MOST_ENTRIES + 3)


# ---- comparisons ----


def test_compare_shows_image_mask_and_overlay_side_by_side() -> None:
    photo, labels = image(60, 80), blocks(60, 80)
    picture = compare(photo, labels, VOC)
    assert np.array_equal(picture[:60, :80], photo)
    assert np.array_equal(picture[:60, 82:162], colorize(labels, VOC.palette()))
    assert np.array_equal(picture[:60, 164:244], overlay(photo, labels, VOC.palette()))


def test_compare_stacks_wide_pictures() -> None:
    photo, labels = image(20, 200), blocks(20, 200)
    picture = compare(photo, labels, VOC)
    assert np.array_equal(picture[:20, :200], photo)
    assert np.array_equal(picture[22:42, :200], colorize(labels, VOC.palette()))


def test_compare_shrinks_large_pictures_without_mixing_ids() -> None:
    labels = RNG.choice(np.array([1, 3], np.uint8), (30, 3 * COMPARED_SIZE))
    picture = compare(image(30, 3 * COMPARED_SIZE), labels, VOC)
    panel = picture[30:40, :COMPARED_SIZE]  # image 0..9, gap of 20, mask 30..39
    assert {tuple(color) for color in panel.reshape(-1, 3).tolist()} == {VOC.colors[1], VOC.colors[3]}
    assert np.array_equal(panel, colorize(labels[1::3, 1::3], VOC.palette()))  # the middle of three


@pytest.mark.parametrize(("height", "width"), list(itertools.product((1, 2, 50), (1, 3, 300))))
def test_every_size_can_be_drawn(height: int, width: int) -> None:
    photo, labels = image(height, width), np.zeros((height, width), np.uint8)
    assert overlay(photo, labels, VOC.palette()).shape == (height, width, 3)
    picture = compare(photo, labels, VOC)
    assert picture.dtype == np.uint8
    assert picture.shape[0] >= height
    assert picture.shape[1] >= width


def test_grid_has_a_title_above_every_picture() -> None:
    first, second, third = image(40, 60), image(30, 50), image(20, 60)
    picture = grid([[("first", first), ("second", second)], [("", third)]])
    for part in (first, second, third):
        rows, columns = part.shape[:2]
        places = [
            (y, x)
            for y in range(picture.shape[0] - rows + 1)
            for x in range(picture.shape[1] - columns + 1)
            if (picture[y, x] == part[0, 0]).all()
            and np.array_equal(picture[y : y + rows, x : x + columns], part)
        ]
        assert len(places) == 1
        y, x = places[0]
        if part is not third:
            assert (picture[y - 14 : y, x : x + 10] < 128).any()  # letters
    assert (picture[-1] == 255).all()
