"""Pictures of label maps: colour maps, overlays, outlines, legends and comparisons. Arrays in, arrays out.

All pictures are uint8 (H, W, 3) RGB; label maps are integers (H, W); a palette is uint8 (256, 3) or longer.
Text is drawn with the font inside Pillow, in sizes that follow the picture and stay legible.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

from segcli.palettes import ClassSet, count_ids

Pixels = npt.NDArray[np.uint8]
Labels = npt.NDArray[np.integer[Any]]

SMALLEST_TEXT = 12  # pixels; smaller letters of Pillow's font run together
COMPARED_SIZE = 2000  # pixels of the longer side of a panel in `compare`; more is not seen on a screen
STRIP = 1 << 17  # pixels that are tinted at a time: all that they pass through stays in the caches
MOST_ENTRIES = 255  # of a legend; a map with more ids, of instances say, is not read by its legend

_PAPER = 255
_INK = (30, 30, 30)
_RULE = (160, 160, 160)


def colorize(labels: Labels, palette: Pixels) -> Pixels:
    """The colour map (H, W, 3) of a label map. Ids beyond the palette are black."""
    if labels.dtype == np.uint8 and len(palette) == 256:
        # OpenCV's fastest table lookup; it copies the three bytes of an entry in their order
        colors = cv2.applyColorMap(np.ascontiguousarray(labels), np.ascontiguousarray(palette[:, None]))
        return colors.astype(np.uint8, copy=False)
    largest = int(labels.max(initial=0))
    if largest >= len(palette):
        palette = np.vstack([palette, np.zeros((1, 3), np.uint8)])
        labels = np.minimum(labels, len(palette) - 1)
    return np.take(palette, labels, axis=0)


def overlay(
    image: Pixels, labels: Labels, palette: Pixels, opacity: float = 0.5, boundary: bool = True
) -> Pixels:
    """The image (H, W, 3) tinted with the colours of its classes.

    Classes whose colour is black (VOC's background) leave the image as it is.
    With `boundary`, lines in the full colour mark where one class meets another.
    """
    tinted = np.empty(image.shape, np.uint8)
    height, width = labels.shape
    reach = line_width(labels.shape) if boundary else 0
    rows = max(1, STRIP // max(1, width))
    for top in range(0, height, rows):
        bottom, first = min(top + rows, height), max(0, top - reach)
        colors = colorize(labels[top:bottom], palette)
        plain = cv2.inRange(colors, (0, 0, 0), (0, 0, 0))  # 255 where there is no colour
        part = tinted[top:bottom]
        cv2.addWeighted(image[top:bottom], 1 - opacity, colors, opacity, 0, part)
        if boundary:
            edges = boundaries(labels[first : bottom + reach], reach)[top - first :][: bottom - top]
            cv2.copyTo(colors, edges.view(np.uint8), part)
        cv2.copyTo(image[top:bottom], plain, part)
    return tinted


def boundaries(labels: Labels, width: int = 1) -> npt.NDArray[np.bool_]:
    """True (H, W) for pixels that are at most `width` pixels away from another class."""
    edges = np.zeros(labels.shape, np.bool_)
    across, down = labels[:, 1:] != labels[:, :-1], labels[1:] != labels[:-1]
    edges[:, 1:] |= across
    edges[:, :-1] |= across
    edges[1:] |= down
    edges[:-1] |= down
    if width == 1:
        return edges
    square = np.ones((2 * width - 1, 2 * width - 1), np.uint8)
    thick: npt.NDArray[np.bool_] = cv2.dilate(edges.view(np.uint8), square) > 0
    return thick


def line_width(shape: tuple[int, ...]) -> int:
    """One pixel on either side for small pictures, in proportion for large ones: 4 for 24 megapixels."""
    return max(1, round(math.sqrt(shape[0] * shape[1]) / 1200))


def heat_map(values: npt.NDArray[np.floating[Any]]) -> Pixels:
    """Values (H, W) from 0 to 1 in the colours of "inferno": black, purple, orange, light yellow."""
    grey = (np.clip(np.nan_to_num(values), 0, 1) * 255 + 0.5).astype(np.uint8)
    colors = cv2.applyColorMap(grey, cv2.COLORMAP_INFERNO)  # BGR
    return np.ascontiguousarray(colors[..., ::-1], np.uint8)


# ---- text and arrangement ----


def legend(names: Sequence[str], colors: Sequence[tuple[int, int, int]], width: int) -> Pixels:
    """Colour patches with names, in as many columns as fit.

    Args:
        names: One text per entry, in the order to be shown.
        colors: RGB per entry.
        width: Width in pixels of the picture that the legend belongs to.

    Returns:
        A picture that is at least `width` wide: wider only where the longest name would not fit.
    """
    font, line = _font(width)
    patch, gap = round(line * 0.7), round(line * 0.5)
    longest = max((_text_width(font, name) for name in names), default=0)
    cell = gap + patch + gap + longest + gap
    columns = max(1, min(width // cell, len(names)))
    rows = -(-len(names) // columns)
    page = Image.new("RGB", (max(width, cell), gap + rows * line + gap), (_PAPER,) * 3)
    draw = ImageDraw.Draw(page)
    for number, (name, color) in enumerate(zip(names, colors, strict=True)):
        column, row = divmod(number, rows)  # read downwards, like a list
        left, middle = column * cell + gap, gap + row * line + line // 2
        box = (left, middle - patch // 2, left + patch, middle - patch // 2 + patch)
        draw.rectangle(box, fill=tuple(color), outline=_RULE)
        draw.text((left + patch + gap, middle), name, fill=_INK, font=font, anchor="lm")
    return np.array(page)


def with_legend(picture: Pixels, labels: Labels, classes: ClassSet) -> Pixels:
    """A picture of a label map, with id, name and colour of the classes that occur in it below."""
    present = list(count_ids(labels))
    palette = classes.palette()
    names = [_entry(classes, number) for number in present[:MOST_ENTRIES]]
    colors = [_color(palette, number) for number in present[:MOST_ENTRIES]]
    if len(present) > MOST_ENTRIES:
        names.append(f"and {len(present) - MOST_ENTRIES:,} more")
        colors.append((_PAPER, _PAPER, _PAPER))
    return _joined([picture, legend(names, colors, picture.shape[1])], gap=0, axis=0)


def _entry(classes: ClassSet, number: int) -> str:
    name = "ignore" if number == classes.ignore else "?"
    if number < len(classes):
        name = classes.names[number]
    return name if name == f"class_{number}" else f"{number} {name}"


def _color(palette: Pixels, number: int) -> tuple[int, int, int]:
    red, green, blue = palette[number].tolist() if number < len(palette) else (0, 0, 0)
    return red, green, blue


def compare(image: Pixels, labels: Labels, classes: ClassSet) -> Pixels:
    """Image, mask and overlay side by side (one below the other for wide images), with the legend below.

    Large images are shrunk, so that no side of a panel is longer than `COMPARED_SIZE`.
    """
    height, width = labels.shape
    scale = COMPARED_SIZE / max(height, width)
    if scale < 1:
        size = (max(1, round(width * scale)), max(1, round(height * scale)))
        image = cv2.resize(image, size, interpolation=cv2.INTER_AREA).astype(np.uint8, copy=False)
        columns = np.minimum((np.arange(size[0]) + 0.5) / size[0] * width, width - 1).astype(int)
        rows = np.minimum((np.arange(size[1]) + 0.5) / size[1] * height, height - 1).astype(int)
        labels = labels[np.ix_(rows, columns)]  # the nearest id: ids are never mixed
    palette = classes.palette()
    panels = [image, colorize(labels, palette), overlay(image, labels, palette)]
    wide = labels.shape[1] > 2 * labels.shape[0]
    picture = _joined(panels, gap=max(2, max(labels.shape) // 100), axis=0 if wide else 1)
    return with_legend(picture, labels, classes)


def grid(rows: Sequence[Sequence[tuple[str, Pixels]]]) -> Pixels:
    """Pictures with a title above each, in rows, on white; the pictures need not be of one size."""
    width = max(sum(picture.shape[1] for _, picture in row) for row in rows)
    gap = max(4, width // 120)
    lines = []
    for row in rows:
        cells = [_joined([_title(title, width), picture], gap=0, axis=0) for title, picture in row]
        lines.append(_joined(cells, gap, axis=1))
    return np.pad(_joined(lines, gap, axis=0), ((0, gap), (gap, gap), (0, 0)), constant_values=_PAPER)


def _title(text: str, width: int) -> Pixels:
    """A line of text in the size that suits a picture of this width."""
    text = "".join(
        letter if letter.isprintable() else "?" for letter in text
    )  # names of files may be anything
    font, line = _font(width)
    page = Image.new("RGB", (max(1, _text_width(font, text)), line), (_PAPER,) * 3)
    ImageDraw.Draw(page).text((0, line // 2), text, fill=_INK, font=font, anchor="lm")
    return np.array(page)


def _joined(pictures: Sequence[Pixels], gap: int, axis: int) -> Pixels:
    """Pictures below (axis 0) or beside each other (axis 1) on white, aligned at the top left."""
    sides = [picture.shape for picture in pictures]
    length = sum(side[axis] for side in sides) + gap * (len(pictures) - 1)
    breadth = max(side[1 - axis] for side in sides)
    page = np.full((length, breadth, 3) if axis == 0 else (breadth, length, 3), _PAPER, np.uint8)
    start = 0
    for picture in pictures:
        top, left = (start, 0) if axis == 0 else (0, start)
        page[top : top + picture.shape[0], left : left + picture.shape[1]] = picture
        start += picture.shape[axis] + gap
    return page


@functools.lru_cache(maxsize=32)
def _font(width: int) -> tuple[ImageFont.FreeTypeFont | ImageFont.ImageFont, int]:
    """The font for a picture of this width, and the height of its lines in pixels."""
    size = max(SMALLEST_TEXT, width // 60)
    return ImageFont.load_default(size), round(size * 1.5)


def _text_width(font: ImageFont.FreeTypeFont | ImageFont.ImageFont, text: str) -> int:
    return math.ceil(font.getlength(text))
