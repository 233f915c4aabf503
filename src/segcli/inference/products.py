"""The files that are saved for an image, as bytes. The same input gives the same bytes, always."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from segcli.errors import ImageError
from segcli.images import encode_jpeg, encode_mask, encode_png
from segcli.inference.decoders import Decoded
from segcli.palettes import ClassSet, count_ids
from segcli.render import colorize, compare, overlay

Pixels = npt.NDArray[np.uint8]
OVERLAY_QUALITY = 90


@dataclass(frozen=True)
class Segmentation:
    """What was found in one image, at the size at which it is displayed."""

    labels: npt.NDArray[np.integer[Any]]  # (H, W) class ids, uint8, or uint16 above 256 classes
    confidence: npt.NDArray[np.uint8] | None = None  # (H, W) probability of the class, 255 = certain
    probabilities: npt.NDArray[np.float16] | None = None  # (C, H, W), sum 1 over C
    second: npt.NDArray[np.integer[Any]] | None = None  # (H, W) ids of the model's second label space


@dataclass(frozen=True)
class Products:
    """What is saved for a picture; see `encode_products`."""

    classes: ClassSet
    kinds: Sequence[str]
    opacity: float
    second: ClassSet | None = None

    def __call__(self, picture: Decoded, result: Segmentation) -> tuple[dict[str, bytes], dict[str, float]]:
        """The files of a picture by kind, and the share of every class that occurs in it."""
        assert picture.pixels is not None, "what could not be decoded is not segmented"
        files = encode_products(picture.pixels, result, self.classes, self.kinds, self.opacity, self.second)
        total = result.labels.size
        counts = count_ids(result.labels)
        return files, {self.classes.names[id_]: round(count / total, 6) for id_, count in counts.items()}


def encode_products(
    image: Pixels,
    result: Segmentation,
    classes: ClassSet,
    kinds: Sequence[str],
    opacity: float,
    second: ClassSet | None = None,
) -> dict[str, bytes]:
    """The content of the files of `kinds`, see `layout.PRODUCTS`.

    Args:
        image: As displayed, uint8 (H, W, 3).
        result: Its segmentation, of the same size.
        opacity: Of the colours in the overlay, 0 to 1.
        second: The second label space, where there is one.

    Raises:
        ImageError: A file format cannot hold an image of this size.
    """
    palette = classes.palette()
    encoders: dict[str, Callable[[], bytes]] = {
        "mask": lambda: encode_mask(result.labels, palette),
        "overlay": lambda: encode_jpeg(overlay(image, result.labels, palette, opacity), OVERLAY_QUALITY),
        "color": lambda: encode_png(colorize(result.labels, palette)),
        "compare": lambda: encode_png(compare(image, result.labels, classes)),
        "confidence": lambda: encode_png(_computed(result.confidence)),
        "scores": lambda: encode_npz(probabilities=_computed(result.probabilities)),
        "geometric": lambda: encode_mask(_computed(result.second), (second or classes).palette()),
    }
    files = {}
    for kind in kinds:
        try:
            files[kind] = encoders[kind]()
        except ImageError as error:
            raise ImageError(f"no {kind} can be saved: {error}") from error
    return files


def encode_npz(**arrays: npt.NDArray[Any]) -> bytes:
    """Arrays as `numpy.savez_compressed` writes them, but fast and without the time of day."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, array in arrays.items():
            member = io.BytesIO()
            np.lib.format.write_array(member, array, allow_pickle=False)
            info = zipfile.ZipInfo(f"{name}.npy")  # dated 1980
            info.external_attr = 0o644 << 16
            archive.writestr(info, member.getbuffer(), zipfile.ZIP_DEFLATED, compresslevel=1)
    return file.getvalue()


def _computed(array: npt.NDArray[Any] | None) -> npt.NDArray[Any]:
    assert array is not None, "it is computed when it is to be saved"
    return array
