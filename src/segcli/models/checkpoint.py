"""A model in one file: weights and all that predict needs to know, as safetensors.

The metadata of a safetensors file is a table of strings; ours has one entry, `segcli`, a JSON document of
`ModelInfo`. Nothing is ever unpickled.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from segcli.errors import CheckpointError, UsageError
from segcli.files import sha256, write_atomic
from segcli.models.networks import get
from segcli.models.preprocessing import Preprocessing
from segcli.palettes import ClassSet

METADATA_KEY = "segcli"
FORMAT_VERSION = 1
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class ModelInfo:
    """What a model file says about its weights.

    Attributes:
        network: A key of `models.networks.NETWORKS`.
        class_set: Names, colours and ignore value of the classes it predicts.
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
    preprocessing: Preprocessing = Preprocessing()
    dataset: str = ""
    metrics: dict[str, Any] = field(default_factory=dict)
    recipe: dict[str, Any] = field(default_factory=dict)
    licence: str = ""
    dtype: str = "float32"
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Model:
    """A network with its weights, in evaluation mode, and what is known about it."""

    network: nn.Module
    info: ModelInfo
    path: Path
    sha256: str


def save_model(path: Path, network: nn.Module, info: ModelInfo) -> None:
    """Write a model file, complete or not at all.

    Floating point weights are stored as `info.dtype`; counters and the like keep their type.
    """
    dtype = DTYPES[info.dtype]
    state = {
        name: (value.to(dtype) if value.is_floating_point() else value).cpu().contiguous()
        for name, value in network.state_dict().items()
    }
    document = {"format": FORMAT_VERSION, **dataclasses.asdict(info)}
    write_atomic(path, safetensors.torch.save(state, {METADATA_KEY: json.dumps(document)}))


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
        classes = document.pop("class_set")
        classes["names"] = tuple(classes["names"])
        classes["colors"] = tuple(tuple(color) for color in classes["colors"])
        if "ignore_color" in classes:
            classes["ignore_color"] = tuple(classes["ignore_color"])
        preprocessing = document.pop("preprocessing")
        for name in ("mean", "std"):
            preprocessing[name] = tuple(preprocessing[name])
        document["notes"] = tuple(document.get("notes", ()))
        return ModelInfo(
            class_set=ClassSet(**classes), preprocessing=Preprocessing(**preprocessing), **document
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} has damaged metadata ({error!r}); get the file again") from error


def load_model(path: Path) -> Model:
    """A model file as a network in evaluation mode, float32, on the CPU.

    Raises:
        UsageError: There is no such file.
        CheckpointError: The file is damaged, or its weights do not fit the network that it names.
    """
    info = read_info(path)
    try:
        state = safetensors.torch.load_file(path)
    except (OSError, safetensors.SafetensorError) as error:
        raise CheckpointError(f"{path} is damaged ({error}); get the file again") from error
    try:
        network = get(info.network, len(info.class_set))
    except UsageError as error:
        raise CheckpointError(f"{path} does not fit this segcli: {error}") from error
    fill(network, state, str(path))
    return Model(network.eval(), info, path, sha256(path))


def fill(network: nn.Module, state: dict[str, Tensor], source: str) -> None:
    """Copy weights into a network after every name, shape and value was checked.

    Args:
        network: Changed in place.
        state: Tensors by parameter name; any floating point type.
        source: Where they come from, for the error message.
    """
    wanted = network.state_dict()
    missing = [name for name in wanted if name not in state]
    surplus = [name for name in state if name not in wanted]
    if missing or surplus:
        parts = [f"{len(names)} {what} (such as {names[0]})"
                 for names, what in ((missing, "missing"), (surplus, "unknown")) if names]  # fmt: skip
        raise CheckpointError(
            f"{source} does not fit its network: {' and '.join(parts)} of {len(wanted)} tensors"
        )
    for name, value in state.items():
        if value.shape != wanted[name].shape:
            raise CheckpointError(
                f"{source} does not fit its network: {name} has shape {tuple(value.shape)}, "
                f"not {tuple(wanted[name].shape)}"
            )
        if value.is_floating_point() and not torch.isfinite(value).all():
            raise CheckpointError(
                f"{source} holds numbers that are not finite, in {name}; get the file again"
            )
    network.load_state_dict(state)


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
