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
from segcli.models.fcn import Network
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


@dataclass(frozen=True)
class Model:
    """A network with its weights, in evaluation mode, and what is known about it."""

    network: Network
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
        with torch.device("meta"):  # no memory and no time for random weights
            network = get(info.network, info.channels)
    except UsageError as error:
        raise CheckpointError(f"{path} does not fit this segcli: {error}") from error
    check(network, state, str(path))
    state = {name: _owned(value) for name, value in state.items()}
    network.load_state_dict(state, assign=True)
    return Model(network.eval(), info, path, sha256(path))


def _owned(value: Tensor) -> Tensor:
    """A copy in memory, floating point as float32: the file may change while the model is in use."""
    return value.to(torch.float32, copy=True) if value.is_floating_point() else value.clone()


def fill(network: nn.Module, state: dict[str, Tensor], source: str) -> None:
    """Copy weights into a network after every name, shape and value was checked.

    Args:
        network: Changed in place.
        state: Tensors by parameter name; any floating point type.
        source: Where they come from, for the error message.
    """
    check(network, state, source)
    network.load_state_dict(state)


def check(network: nn.Module, state: dict[str, Tensor], source: str) -> None:
    """Make sure that weights fit a network: every name, shape and kind, and all numbers finite.

    Raises:
        CheckpointError: They do not; `source` says in the message where they come from.
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
        if value.is_floating_point() != wanted[name].is_floating_point():
            raise CheckpointError(
                f"{source} does not fit its network: {name} is {value.dtype}, not {wanted[name].dtype}"
            )
        if value.is_floating_point() and not torch.isfinite(value).all():
            raise CheckpointError(
                f"{source} holds numbers that are not finite, in {name}; get the file again"
            )


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
