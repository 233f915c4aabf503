"""Label spaces: the names and colours of the classes, and how ids become colours and back.

Sources:
    VOC         colour map of the VOC development kit (VOCdevkit/VOClabelcolormap.m)
    CamVid      alexgkendall/SegNet-Tutorial, Scripts/test_segmentation_camvid.py (11 classes);
                label_colors.txt of the Cambridge-driving Labeled Video Database (32 classes)
    Cityscapes  mcordts/cityscapesScripts, cityscapesscripts/helpers/labels.py
    ADE20K      CSAILVision/sceneparsing, objectInfo150.txt and color150.mat
    PASCAL-Context, SIFT Flow, NYUDv2
                class lists in data/ of shelhamer/fcn.berkeleyvision.org, which have no colours: VOC's
"""

from __future__ import annotations

import difflib
import re
import tomllib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from segcli.errors import ImageError, UsageError

Color = tuple[int, int, int]
Labels = npt.NDArray[np.integer[Any]]  # class ids (H, W)

VOC_IGNORE_COLOR: Color = (224, 224, 192)  # what the VOC colour map gives for id 255
BLACK: Color = (0, 0, 0)


@dataclass(frozen=True)
class ClassSet:
    """A label space. Class `i` is called `names[i]` and drawn in `colors[i]` (RGB, 0..255).

    `ignore` is the id of pixels that count for nothing: 255, unless the set says otherwise.

    Raises:
        UsageError: Names and colours that do not fit together.
    """

    name: str
    names: tuple[str, ...]
    colors: tuple[Color, ...]
    ignore: int = 255
    ignore_color: Color = VOC_IGNORE_COLOR

    def __post_init__(self) -> None:
        problem = _problem(self)
        if problem:
            raise UsageError(f"class set {self.name}: {problem}")

    def __len__(self) -> int:
        return len(self.names)

    def palette(self) -> npt.NDArray[np.uint8]:
        """Lookup table id -> RGB, uint8 (256, 3), or (65536, 3) where 8-bit ids do not suffice.

        Ids that name no class are black; `ignore` has its colour.
        """
        table = np.zeros((256 if max(len(self), self.ignore + 1) <= 256 else 65536, 3), np.uint8)
        table[self.ignore] = self.ignore_color
        table[: len(self)] = self.colors
        return table


def _problem(classes: ClassSet) -> str | None:
    if not classes.names:
        return "it has no classes"
    if len(classes.names) != len(classes.colors):
        return f"{len(classes.names)} names, but {len(classes.colors)} colours"
    if len(classes.names) > 65535:
        return f"{len(classes.names)} classes; at most 65535 fit into a 16-bit mask"
    seen: set[str] = set()
    for name in classes.names:
        if name in seen:
            return f"the name {name!r} occurs twice"
        seen.add(name)
    for color in (*classes.colors, classes.ignore_color):
        if len(color) != 3 or not all(0 <= value <= 255 for value in color):
            return f"{color} is not a colour; write three numbers from 0 to 255"
    if not 0 <= classes.ignore <= 65535:
        return f"ignore is {classes.ignore}; choose an id from 0 to 65535"
    return None


def voc_colormap(n: int = 256) -> npt.NDArray[np.uint8]:
    """The colour map of PASCAL VOC, uint8 (n, 3) RGB.

    The bits of the id are spread, three at a time, into R, G and B from the top bit down:
    1 = 0b001 = (128, 0, 0), 2 = 0b010 = (0, 128, 0), 8 = 0b001_000 = (64, 0, 0).
    """
    ids = np.arange(n)
    colors = np.zeros((n, 3), np.uint8)
    for step in range(8):
        for channel in range(3):
            bit = (ids >> (3 * step + channel)) & 1
            colors[:, channel] |= (bit << (7 - step)).astype(np.uint8)
    return colors


def generic_class_set(n: int) -> ClassSet:
    """`n` classes without a meaning: class_0 ... in the colours of VOC, as is what they ignore."""
    names = tuple(f"class_{number}" for number in range(n))
    ignore = 255 if n <= 255 else 65535
    colors = _voc_colors(ignore + 1)
    return ClassSet("generic", names, colors[:n], ignore, colors[ignore])


COUNTED = 1 << 20  # ids at a time: NumPy makes some bytes of each where all neighbours differ


def count_ids(labels: Labels) -> dict[int, int]:
    """How many pixels every id has, for ids that occur, in increasing order."""
    if labels.dtype.itemsize > 2:
        return dict(zip(*(part.tolist() for part in np.unique(labels, return_counts=True)), strict=True))
    flat, counts = labels.ravel(), np.zeros(2 ** (8 * labels.dtype.itemsize), np.int64)
    for start in range(0, flat.size, COUNTED):
        some = flat[start : start + COUNTED]
        # By runs of equal ids: in label maps they are far fewer than pixels.
        last = np.append(np.flatnonzero(some[1:] != some[:-1]), some.size - 1)
        lengths = np.diff(last, prepend=-1)
        counts += np.bincount(some[last], lengths, len(counts)).astype(np.int64)
    return {number: int(counts[number]) for number in np.flatnonzero(counts).tolist()}


def labels_from_colors(picture: npt.NDArray[np.uint8], classes: ClassSet) -> Labels:
    """Class ids of a colour-coded label map: the way back from colours.

    Args:
        picture: uint8 (H, W, 3) RGB in the exact colours of `classes`.

    Returns:
        Ids (H, W): uint8, or uint16 where the set needs it. `ignore_color` becomes `ignore`.

    Raises:
        ImageError: Colours that the set does not have, each with its number of pixels (nothing is guessed),
            or a colour that the set gives to several classes.
    """
    ids_of: dict[int, list[int]] = {}
    for number, color in enumerate(classes.colors):
        ids_of.setdefault(_code(color), []).append(number)
    ids_of.setdefault(_code(classes.ignore_color), [classes.ignore])
    known = np.array(sorted(ids_of), np.int32)
    first_ids = [ids_of[code][0] for code in known.tolist()]
    id_of: Labels = np.array(first_ids, np.uint8 if max(first_ids) <= 255 else np.uint16)

    wide = picture.astype(np.int32)
    codes = wide[..., 0] << 16 | wide[..., 1] << 8 | wide[..., 2]
    places = np.minimum(np.searchsorted(known, codes), len(known) - 1)
    foreign = codes[known[places] != codes]
    if foreign.size:
        raise ImageError(_foreign_colors(foreign, classes))
    for place in np.flatnonzero(np.bincount(places.ravel(), minlength=len(known))).tolist():
        owners = ids_of[int(known[place])]
        if len(owners) > 1:
            named = " and ".join(classes.names[owner] for owner in owners)
            raise ImageError(f"{_rgb(int(known[place]))} is the colour of {named} in {classes.name}")
    return id_of[places]


def _code(color: Color) -> int:
    return color[0] << 16 | color[1] << 8 | color[2]


def _rgb(code: int) -> str:
    return f"({code >> 16}, {code >> 8 & 255}, {code & 255})"


def _foreign_colors(codes: npt.NDArray[np.int32], classes: ClassSet, shown: int = 8) -> str:
    colors, counts = np.unique(codes, return_counts=True)
    order = np.argsort(-counts, kind="stable")
    listed = [f"{_rgb(int(colors[i]))} x {counts[i]:,}" for i in order[:shown]]
    if len(colors) > shown:
        listed.append(f"and {len(colors) - shown:,} more")
    plural = "colour that is" if len(colors) == 1 else "colours that are"
    return f"{len(colors):,} {plural} not in {classes.name}, with pixel counts: {', '.join(listed)}"


# ---- the sets ----


def _voc_colors(n: int) -> tuple[Color, ...]:
    return _as_colors(voc_colormap(n).tolist())


def _as_colors(rows: list[list[int]]) -> tuple[Color, ...]:
    return tuple((row[0], row[1], row[2]) for row in rows)


def _built_in(name: str, names: str, colors: str, ignore: int = 255) -> ClassSet:
    """Names separated by commas, colours as hexadecimal RGB; what is ignored is black."""
    rows = [list(bytes.fromhex(color)) for color in colors.split()]
    return ClassSet(
        name, tuple(" ".join(n.split()) for n in names.split(",")), _as_colors(rows), ignore, BLACK
    )


_VOC = ClassSet(
    "voc",
    (
        *(
            "background",
            "aeroplane",
            "bicycle",
            "bird",
            "boat",
            "bottle",
            "bus",
            "car",
            "cat",
            "chair",
            "cow",
        ),
        *("diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train"),
        "tvmonitor",
    ),
    _voc_colors(21),
)

_CAMVID = _built_in(
    "camvid",
    "sky, building, pole, road, pavement, tree, sign, fence, car, pedestrian, bicyclist",
    "808080 800000 c0c080 804080 3c28de 808000 c08080 404080 400080 404000 0080c0",
)

# Ids are the lines of label_colors.txt; Void is one of them, and it is what does not count.
_CAMVID32 = _built_in(
    "camvid32",
    """Animal, Archway, Bicyclist, Bridge, Building, Car, CartLuggagePram, Child, Column_Pole, Fence,
    LaneMkgsDriv, LaneMkgsNonDriv, Misc_Text, MotorcycleScooter, OtherMoving, ParkingBlock, Pedestrian,
    Road, RoadShoulder, Sidewalk, SignSymbol, Sky, SUVPickupTruck, TrafficCone, TrafficLight, Train, Tree,
    Truck_Bus, Tunnel, VegetationMisc, Void, Wall""",
    """408040 c00080 0080c0 008040 800000 400080 4000c0 c08040 c0c080 404080 8000c0 c00040 808040 c000c0
    804040 40c080 404000 804080 8080c0 0000c0 c08080 808080 4080c0 000040 004040 c04080 808000 c080c0
    400040 c0c000 000000 40c000""",
    ignore=30,
)

_CITYSCAPES = _built_in(
    "cityscapes",
    """road, sidewalk, building, wall, fence, pole, traffic light, traffic sign, vegetation, terrain, sky,
    person, rider, car, truck, bus, train, motorcycle, bicycle""",
    """804080 f423e8 464646 66669c be9999 999999 faaa1e dcdc00 6b8e23 98fb98 4682b4 dc143c ff0000 00008e
    000046 003c64 005064 0000e6 770b20""",
)

# train id -> label id, as the Cityscapes test server wants them; every other label id (0..33) is ignored
CITYSCAPES_LABEL_IDS = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)

# road and skyscraper share (140, 140, 140) in the published table
_ADE20K = _built_in(
    "ade20k",
    """wall, building, sky, floor, tree, ceiling, road, bed, windowpane, grass, cabinet, sidewalk, person,
    earth, door, table, mountain, plant, curtain, chair, car, water, painting, sofa, shelf, house, sea,
    mirror, rug, field, armchair, seat, fence, desk, rock, wardrobe, lamp, bathtub, railing, cushion,
    base, box, column, signboard, chest of drawers, counter, sand, sink, skyscraper, fireplace,
    refrigerator, grandstand, path, stairs, runway, case, pool table, pillow, screen door, stairway,
    river, bridge, bookcase, blind, coffee table, toilet, flower, book, hill, bench, countertop, stove,
    palm, kitchen island, computer, swivel chair, boat, bar, arcade machine, hovel, bus, towel, light,
    truck, tower, chandelier, awning, streetlight, booth, television receiver, airplane, dirt track,
    apparel, pole, land, bannister, escalator, ottoman, bottle, buffet, poster, stage, van, ship,
    fountain, conveyer belt, canopy, washer, plaything, swimming pool, stool, barrel, basket, waterfall,
    tent, bag, minibike, cradle, oven, ball, food, step, tank, trade name, microwave, pot, animal,
    bicycle, lake, dishwasher, screen, blanket, sculpture, hood, sconce, vase, traffic light, tray,
    ashcan, fan, pier, crt screen, plate, monitor, bulletin board, shower, radiator, glass, clock, flag""",
    """787878 b47878 06e6e6 503232 04c803 787850 8c8c8c cc05ff e6e6e6 04fa07 e005ff ebff07 96053d 787846
    08ff33 ff0652 8fff8c ccff04 ff3307 cc4603 0066c8 3de6fa ff0633 0b66ff ff0747 ff09e0 0907e6 dcdcdc
    ff095c 7009ff 08ffd6 07ffe0 ffb806 0aff47 ff290a 07ffff e0ff08 6608ff ff3d06 ffc207 ff7a08 00ff14
    ff0829 ff0599 0633ff eb0cff a09614 00a3ff 8c8c8c fa0a0f 14ff00 1fff00 ff1f00 ffe000 99ff00 0000ff
    ff4700 00ebff 00adff 1f00ff 0bc8c8 ff5200 00fff5 003dff 00ff70 00ff85 ff0000 ffa300 ff6600 c2ff00
    008fff 33ff00 0052ff 00ff29 00ffad 0a00ff adff00 00ff99 ff5c00 ff00ff ff00f5 ff0066 ffad00 ff0014
    ffb8b8 001fff 00ff3d 0047ff ff00cc 00ffc2 00ff52 000aff 0070ff 3300ff 00c2ff 007aff 00ffa3 ff9900
    00ff0a ff7000 8fff00 5200ff a3ff00 ffeb00 08b8aa 8500ff 00ff5c b800ff ff001f 00b8ff 00d6ff ff0070
    5cff00 00e0ff 70e0ff 46b8a0 a300ff 9900ff 47ff00 ff00a3 ffcc00 ff008f 00ffeb 85ff00 ff00eb f500ff
    ff007a fff500 0abed4 d6ff00 00ccff 1400ff ffff00 0099ff 0029ff 00ffcc 2900ff 29ff00 ad00ff 00f5ff
    4700ff 7a00ff 00ffb8 005cff b8ff00 0085ff ffd600 19c2c2 66ff00 5c00ff""",
)


def _in_voc_colors(name: str, names: str, first: int = 1) -> ClassSet:
    """Names separated by commas; class 0 has the VOC colour of `first`: black only where it is background."""
    listed = tuple(" ".join(n.split()) for n in names.split(","))
    return ClassSet(name, listed, _voc_colors(first + len(listed))[first:])


_CONTEXT_NAMES = """aeroplane, bicycle, bird, boat, bottle, bus, car, cat, chair, cow, diningtable, dog,
    horse, motorbike, person, pottedplant, sheep, sofa, train, tvmonitor, bag, bed, bench, book, building,
    cabinet, ceiling, clothes, computer, cup, door, fence, floor, flower, food, grass, ground, keyboard,
    light, mountain, mouse, curtain, platform, sign, plate, road, rock, shelves, sidewalk, sky, snow,
    bedcloth, track, tree, truck, wall, water, window, wood"""
_CONTEXT = _in_voc_colors("pascal-context", "background, " + _CONTEXT_NAMES, first=0)
_CONTEXT59 = _in_voc_colors("pascal-context-59", _CONTEXT_NAMES)

_SIFTFLOW = _in_voc_colors(
    "siftflow",
    """awning, balcony, bird, boat, bridge, building, bus, car, cow, crosswalk, desert, door, fence, field,
    grass, moon, mountain, person, plant, pole, river, road, rock, sand, sea, sidewalk, sign, sky, staircase,
    streetlight, sun, tree, window""",
)
_SIFTFLOW_GEOMETRIC = _in_voc_colors("siftflow-geometric", "sky, horizontal, vertical")

_NYUD = _in_voc_colors(  # "refridgerator" is the data set's spelling
    "nyud",
    """wall, floor, cabinet, bed, chair, sofa, table, door, window, bookshelf, picture, counter, blinds, desk,
    shelves, curtain, dresser, pillow, mirror, floor mat, clothes, ceiling, books, refridgerator, television,
    paper, towel, shower curtain, box, whiteboard, person, night stand, toilet, sink, lamp, bathtub, bag,
    otherstructure, otherfurniture, otherprop""",
)

CLASS_SETS: dict[str, ClassSet] = {
    classes.name: classes
    for classes in (
        *(_VOC, _CAMVID, _CAMVID32, _CITYSCAPES, _ADE20K),
        *(_CONTEXT, _CONTEXT59, _SIFTFLOW, _SIFTFLOW_GEOMETRIC, _NYUD),
    )
}


# ---- sets in files ----


def get_class_set(name_or_file: str) -> ClassSet:
    """A built-in set by its name, or a set from a file (`read_class_set`).

    Raises:
        UsageError: Neither a known name nor a readable class-set file; the nearest name is suggested.
    """
    if name_or_file in CLASS_SETS:
        return CLASS_SETS[name_or_file]
    path = Path(name_or_file)
    if path.is_file():
        return read_class_set(path)
    if path.suffix or len(path.parts) > 1:
        raise UsageError(f"no such class-set file: {name_or_file}")
    near = difflib.get_close_matches(name_or_file.lower(), CLASS_SETS, n=1)
    hint = f"did you mean {near[0]}? " if near else ""
    raise UsageError(
        f"unknown class set {name_or_file!r}; {hint}Known: {', '.join(CLASS_SETS)}; "
        "or give a file with names and colours."
    )


def read_class_set(path: Path) -> ClassSet:
    """A class set from a TOML file, or from a text file with one class per line.

    TOML: `names`, and optionally `name`, `colors` (VOC's otherwise), `ignore` and `ignore_color`.
    Text: `r g b name` (label_colors.txt), `name r g b`, `name,r,g,b` (class_dict.csv),
    `name:r,g,b::` (labelmap.txt of CVAT), or names alone (labels.txt of labelme).
    Lines with # are comments; `__ignore__` takes no id, and its colour becomes `ignore_color`.

    Raises:
        UsageError: The file cannot be understood; the message says where.
    """
    try:
        text = path.read_text("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = "it is not text" if isinstance(error, UnicodeDecodeError) else error.strerror
        raise UsageError(f"cannot read the class set {path}: {reason}") from error
    return _from_toml(path, text) if path.suffix.lower() == ".toml" else _from_lines(path, text)


def _from_toml(path: Path, text: str) -> ClassSet:
    try:
        content = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"{path} is not valid TOML: {error}") from error
    return class_set_from_table(path, content)


def class_set_from_table(path: Path, content: dict[str, Any]) -> ClassSet:
    """A class set from the table that a TOML file holds; `path` is for messages and the default name."""
    for key, value in content.items():
        if key not in _TOML_KEYS:
            raise UsageError(f"{path}: unknown key {key!r}; known are {', '.join(_TOML_KEYS)}")
        fits, wanted = _TOML_KEYS[key]
        if not fits(value):
            raise UsageError(f"{path}: {key} must be {wanted}")
    if "names" not in content:
        raise UsageError(f'{path}: names is missing; write names = ["road", "sky"]')
    names = content["names"]
    return _class_set(
        path,
        content.get("name", path.stem),
        names,
        content.get("colors", voc_colormap(len(names)).tolist()),
        content.get("ignore", 255),
        content.get("ignore_color", list(VOC_IGNORE_COLOR)),
    )


def _is_color(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 3 and all(type(part) is int for part in value)


_TOML_KEYS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "name": (lambda value: isinstance(value, str), "a text"),
    "names": (
        lambda value: isinstance(value, list) and all(isinstance(n, str) for n in value),
        "a list of texts",
    ),
    "colors": (lambda value: isinstance(value, list) and all(map(_is_color, value)), "a list of [r, g, b]"),
    "ignore": (lambda value: type(value) is int, "a whole number"),
    "ignore_color": (_is_color, "[r, g, b]"),
}

_RGB = r"(?P<r>\d+)[\s,;]+(?P<g>\d+)[\s,;]+(?P<b>\d+)"
_CLASS_LINES = (
    re.compile(rf"{_RGB}[\s,;:]+(?P<name>\S.*)"),
    re.compile(rf"(?P<name>\S.*?)[\s,;:]+{_RGB}(:.*)?"),
    re.compile(r"(?P<name>\D.*)"),
)


def _from_lines(path: Path, text: str) -> ClassSet:
    names: list[str] = []
    colors: list[list[int]] = []
    ignore_color = list(VOC_IGNORE_COLOR)
    for number, line in enumerate(text.splitlines(), 1):
        line = line.split("#")[0].strip()
        if not line or re.fullmatch(r"name[\s,;]+r[\s,;]+g[\s,;]+b", line, re.IGNORECASE):
            continue
        match = next(filter(None, (form.fullmatch(line) for form in _CLASS_LINES)), None)
        if match is None or match["name"].isdecimal():
            raise UsageError(f"{path}, line {number}: no class in {line!r}; write 'r g b name'")
        parts = match.groupdict()
        color = [int(parts[channel]) for channel in "rgb"] if "r" in parts else None
        if parts["name"] == "__ignore__":
            ignore_color = color or ignore_color
            continue
        if names and (color is None) != (not colors):
            raise UsageError(f"{path}, line {number}: {line!r}; give all classes a colour, or none")
        names.append(parts["name"])
        if color:
            colors.append(color)
    return _class_set(path, path.stem, names, colors or voc_colormap(len(names)).tolist(), 255, ignore_color)


def _class_set(
    path: Path, name: str, names: list[str], colors: list[list[int]], ignore: int, ignore_color: list[int]
) -> ClassSet:
    try:
        return ClassSet(name, tuple(names), _as_colors(colors), ignore, _as_colors([ignore_color])[0])
    except UsageError as error:
        raise UsageError(f"{path}: {error}") from error
