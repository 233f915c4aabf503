"""What an output folder looks like.

masks/a/b.png             the mask of images/a/b.jpg
masks/_overlay/a/b.jpg    and everything else, in folders that start with an underscore
masks/masks-5d41402abc4b2a76.tar    instead of all these, with many images in each, see `archives.py`
masks/_run/               manifest.jsonl, run.json, lock
masks/_run/shards-of-16/3/    the same for one shard, until the shards are merged
"""

from __future__ import annotations

import posixpath

RUN_FOLDER = "_run"
RUN_FILE = "run.json"
MANIFEST_FILE = "manifest.jsonl"
LOCK_FILE = "lock"
SHARDS_FOLDER = f"{RUN_FOLDER}/shards-of-"  # and their count

# What can be saved for an image: kind -> (folder below the output folder, suffix).
PRODUCTS: dict[str, tuple[str, str]] = {
    "mask": ("", ".png"),
    "overlay": ("_overlay", ".jpg"),
    "color": ("_color", ".png"),
    "compare": ("_compare", ".png"),
    "confidence": ("_confidence", ".png"),
    "scores": ("_scores", ".npz"),
    "geometric": ("_geometric", ".png"),  # beside the mask, where a model has a second label space
}

# What `segcli colorize` writes has the same places, with the colour picture in that of the mask.
PLACES = {**PRODUCTS, "picture": ("", ".png")}

# Top-level names that are not masks. An input folder of such a name gets one underscore more.
RESERVED = frozenset(
    {RUN_FOLDER, "_polygons", "report.html", *(folder for folder, _ in PRODUCTS.values() if folder)}
)


def file_of(output: str, kind: str) -> str:
    """Where a product lies, below the output folder: `output` is the mask's path there, such as "a/b.png"."""
    folder, suffix = PLACES[kind]
    return posixpath.join(folder, posixpath.splitext(output)[0] + suffix)


def mask_of(path: str) -> str:
    """The `output` that a product belongs to: the inverse of `file_of`, below the output folder."""
    first, _, rest = path.partition("/")
    below = rest if first in RESERVED else path
    return posixpath.splitext(below)[0] + ".png"
