"""What a model file says about itself: its classes, its preprocessing, its scores.

A model is one safetensors file. Its metadata has one entry, `segcli`: a JSON document of `ModelInfo`.
Reading it leaves the weights on the disk and needs no torch.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors

from segcli.errors import CheckpointError, UsageError
from segcli.models.preprocessing import Preprocessing
from segcli.palettes import ClassSet

METADATA_KEY = "segcli"
FORMAT_VERSION = 1


@dataclass(frozen=True)
class ModelInfo:
    """What a model file says about its weights.

    Attributes:
        network: A key of `models.networks.NETWORKS`.
        class_set: Names, colours and ignore value of the classes it predicts.
        second_class_set: A second label space that it predicts as well, or None: SIFT Flow's geometric
            classes. Its scores are the channels after those of `class_set`: of scores (N, C, H, W), the first
            len(class_set) channels are one label map's and the rest the other's, each with its own softmax.
        preprocessing: How an image becomes its input.
        dataset: What it was trained on, in words.
        metrics: Measured scores, such as {"camvid/val": {"mean_iou": 0.61, ...}}; fractions of 1.
        recipe: The options of the training that made it.
        licence: Under which terms the weights may be used.
        dtype: How the weights are stored; they are computed in float32.
        notes: Lines a user should read, such as classes with too little data to be trusted.
    """

    network: str
    class_set: ClassSet
    preprocessing: Preprocessing = field(default_factory=Preprocessing)
    second_class_set: ClassSet | None = None
    dataset: str = ""
    metrics: dict[str, Any] = field(default_factory=dict)
    recipe: dict[str, Any] = field(default_factory=dict)
    licence: str = ""
    dtype: str = "float32"
    notes: tuple[str, ...] = ()

    @property
    def channels(self) -> int:
        """Number of channels of the network's scores."""
        return len(self.class_set) + len(self.second_class_set or ())


def read_info(path: Path) -> ModelInfo:
    """The metadata of a model file; the weights stay on the disk.

    Raises:
        CheckpointError: The file is not a segcli model.
    """
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
    except FileNotFoundError:
        raise UsageError(f"there is no model file {path}") from None
    except (OSError, safetensors.SafetensorError) as error:
        raise CheckpointError(
            f"{path} is not a model file ({describe_content(path) or error}); "
            "segcli reads its own .safetensors files"
        ) from error
    if METADATA_KEY not in metadata:
        raise CheckpointError(
            f"{path} is a safetensors file without segcli's metadata; make one with `segcli models import`"
        )
    return parse_info(metadata[METADATA_KEY], path)


def parse_info(text: str, path: Path) -> ModelInfo:
    """A `ModelInfo` from its JSON document; `path` is for the error message."""
    try:
        document = json.loads(text)
        if document.pop("format") > FORMAT_VERSION:
            raise CheckpointError(
                f"{path} was written by a newer segcli; update with `pip install -U segcli`"
            )
        classes = _class_set(document.pop("class_set"))
        second = document.pop("second_class_set", None)
        preprocessing = document.pop("preprocessing")
        for name in ("mean", "std"):
            preprocessing[name] = tuple(preprocessing[name])
        document["notes"] = tuple(document.get("notes", ()))
        return ModelInfo(
            class_set=classes,
            second_class_set=None if second is None else _class_set(second),
            preprocessing=Preprocessing(**preprocessing),
            **document,
        )
    except CheckpointError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, UsageError) as error:
        raise CheckpointError(f"{path} has damaged metadata ({error!r}); get the file again") from error


def _class_set(document: dict[str, Any]) -> ClassSet:
    document["names"] = tuple(document["names"])
    document["colors"] = tuple(tuple(color) for color in document["colors"])
    if "ignore_color" in document:
        document["ignore_color"] = tuple(document["ignore_color"])
    return ClassSet(**document)


def describe_content(path: Path) -> str:
    """What a file that is no safetensors file looks like, for an error message; empty when unclear."""
    size = path.stat().st_size if path.is_file() else -1
    if size < 0:
        return "it is a folder" if path.is_dir() else ""
    if size == 0:
        return "it is empty"
    with path.open("rb") as file:
        head = file.read(512).lstrip().lower()
    if head.startswith((b"<!doctype", b"<html")):
        return "it is a web page"
    if head.startswith(b"pk\x03\x04"):
        return "it is a zip archive, as torch.save writes; convert it with `segcli models import`"
    if head.startswith(b"\x80"):
        return "it is a pickle; convert it with `segcli models import`"
    return ""
