"""Models as files: weights and all that predict needs to know, as safetensors. Nothing is ever unpickled."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from segcli.errors import CheckpointError, UsageError
from segcli.files import sha256, write_atomic
from segcli.models.fcn import Network
from segcli.models.info import FORMAT_VERSION, METADATA_KEY, ModelInfo, read_info
from segcli.models.networks import get_empty

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


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
        network = get_empty(info.network, info.channels)
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
