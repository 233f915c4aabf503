"""Foreign checkpoints as segcli's models: read safely, renamed, every name and shape checked, saved.

What a file does not tell, the caller must: FCN-8s and its at-once version have the same keys and shapes.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from segcli.errors import CheckpointError, UsageError
from segcli.models.caffe import read_caffemodel
from segcli.models.checkpoint import check, save_model
from segcli.models.info import METADATA_KEY, ModelInfo
from segcli.models.key_maps import SOURCES, Foreign, from_caffe
from segcli.models.networks import NETWORKS, get_empty
from segcli.models.pickles import load_pickle
from segcli.models.preprocessing import PREPROCESSINGS
from segcli.palettes import ClassSet, generic_class_set, get_class_set

TORCHFCN_ARCHITECTURES = {
    "FCN32s": "fcn32s",
    "FCN16s": "fcn16s",
    "FCN8s": "fcn8s",
    "FCN8sAtOnce": "fcn8s-atonce",
}
WRAPPERS = ("model_state_dict", "model_state", "state_dict", "model")  # under which weights are saved
USUAL_CLASS_SETS: dict[tuple[int, ...], tuple[str, ...]] = {  # by the number of classes of each head
    (11,): ("camvid",),
    (19,): ("cityscapes",),
    (21,): ("voc",),
    (33, 3): ("siftflow", "siftflow-geometric"),
    (40,): ("nyud",),
    (59,): ("pascal-context-59",),
    (60,): ("pascal-context",),
    (150,): ("ade20k",),
}


@dataclass(frozen=True)
class Imported:
    """What `import_model` understood and wrote."""

    foreign: Foreign
    info: ModelInfo


def import_model(
    path: Path,
    out: Path,
    source: str = "auto",
    arch: str | None = None,
    classes: str | None = None,
    preprocessing: str | None = None,
    **about: Any,
) -> Imported:
    """Turn a foreign checkpoint into a model file.

    Args:
        path: The foreign file.
        out: The model file to write.
        source: A key of `SOURCES`, or auto.
        arch: A key of `NETWORKS`; needed where the file does not tell.
        classes: A class set by name or file; None takes the usual one for that number of classes.
        preprocessing: A key of `PREPROCESSINGS`; needed where the file does not tell.
        **about: Further fields of `ModelInfo`: dataset, metrics, licence, notes.

    Raises:
        CheckpointError: The file is damaged, of another architecture, or not safe to load.
        UsageError: An option is missing or wrong.
    """
    foreign = read_foreign(path, source)
    name = _choose(path, "network", "--arch", arch, foreign.networks, NETWORKS)
    prepared = _choose(
        path, "preprocessing", "--preprocessing", preprocessing, foreign.preprocessing, PREPROCESSINGS
    )
    class_set, *others = _class_sets(path, classes, foreign.heads)
    info = ModelInfo(
        network=name,
        class_set=class_set,
        second_class_set=others[0] if others else None,
        preprocessing=PREPROCESSINGS[prepared],
        recipe={"imported_from": path.name, "source": foreign.source},
        **about,
    )
    network = get_empty(name, info.channels)
    wanted = network.state_dict()
    state = {key: coerce(value, wanted.get(key, value).shape) for key, value in foreign.tensors.items()}
    check(network, state, f"{path}, imported as {name},")
    network.load_state_dict(state, assign=True)
    save_model(out, network, info)
    return Imported(foreign, info)


def read_foreign(path: Path, source: str = "auto") -> Foreign:
    """Read a foreign checkpoint and give its weights our names.

    Raises:
        CheckpointError: It is damaged, not safe to load, or of no known source.
    """
    if not path.is_file():
        raise UsageError(f"there is no file {path}")
    if source not in ("auto", "caffe", *SOURCES):
        raise UsageError(f"--source is {source!r}; use auto, caffe, {', '.join(SOURCES)}")
    if source == "caffe" or (source == "auto" and path.suffix == ".caffemodel"):
        return from_caffe(path, read_caffemodel(path))
    state, arch = load_state(path)
    if source == "auto":
        begins = {name: mark for name, (mark, _) in SOURCES.items()}
        source = next((name for name in begins if any(key.startswith(begins[name]) for key in state)), source)
    if source == "auto":
        raise CheckpointError(
            f"{path} is of no known source (it has {', '.join(list(state)[:3])}, ...); "
            f"segcli imports FCNs of caffe, {', '.join(SOURCES)}"
        )
    foreign = SOURCES[source][1](path, state)
    return replace(foreign, networks=(arch,)) if arch in foreign.networks else foreign


def load_state(path: Path) -> tuple[dict[str, Tensor], str | None]:
    """The weights in a PyTorch or safetensors file, and the network that the file says they are of."""
    if _is_safetensors(path):
        return _load_safetensors(path), None
    content = load_pickle(path)
    arch = content.get("arch") if isinstance(content, Mapping) else None
    for key in WRAPPERS:
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    if not isinstance(content, Mapping) or not content:
        raise CheckpointError(f"{path} holds no weights, but a {type(content).__name__}; save a state_dict()")
    odd = [str(key) for key, value in content.items() if not _is_weight(key, value)]
    if odd:
        raise CheckpointError(f"{path} holds more than weights (such as {odd[0]}); save a state_dict() alone")
    state = {
        key.removeprefix("module."): value.float() if value.is_floating_point() else value
        for key, value in content.items()
    }
    return state, TORCHFCN_ARCHITECTURES.get(arch) if isinstance(arch, str) else None


def _is_weight(key: Any, value: Any) -> bool:
    return isinstance(key, str) and isinstance(value, Tensor) and value.layout == torch.strided


def _is_safetensors(path: Path) -> bool:
    """It begins with the length of its header, which is JSON."""
    with path.open("rb") as file:
        return file.read(9)[8:] == b"{"


def _load_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
        state = safetensors.torch.load_file(path)
    except (OSError, safetensors.SafetensorError) as error:
        raise CheckpointError(f"{path} is damaged ({error}); get the file again") from error
    if METADATA_KEY in metadata:
        raise UsageError(f"{path} is a model of segcli already; use it as --model {path}")
    return {key: value.float() if value.is_floating_point() else value for key, value in state.items()}


def coerce(value: Tensor, shape: Sequence[int]) -> Tensor:
    """Give a weight the shape of its layer where the numbers are the same ones, as Caffe's nets do.

    A fully connected weight (O, I) and the convolution (O, I/h/w, h, w) hold the same numbers in the same
    order; old files put ones in front of a shape. What does not correspond so is returned as it is.
    """
    have, want = _without_ones(value.shape), _without_ones(shape)
    connected = _without_ones((shape[0], math.prod(shape[1:]))) if shape else []
    return value.reshape(tuple(shape)) if have in (want, connected) else value


def _without_ones(shape: Iterable[int]) -> list[int]:
    return [n for n in shape if n != 1]


def _choose(
    path: Path, what: str, option: str, given: str | None, possible: Sequence[str], known: Iterable[str]
) -> str:
    if given is not None:
        if given in known:
            return given
        near = difflib.get_close_matches(given, known, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}"
        raise UsageError(f"{option} {given!r} is unknown; {hint}")
    if len(possible) == 1:
        return possible[0]
    choices = " or ".join(f"{option} {name}" for name in possible)
    raise UsageError(f"{path} does not tell its {what}; add {choices}")


def _class_sets(path: Path, classes: str | None, heads: tuple[int, ...]) -> list[ClassSet]:
    usual = USUAL_CLASS_SETS.get(heads)
    sets = [get_class_set(name) for name in usual] if usual else [generic_class_set(n) for n in heads]
    if classes is not None:
        sets[0] = get_class_set(classes)
    if len(sets[0]) != heads[0]:
        raise UsageError(
            f"{path} has {heads[0]} classes, but the class set {sets[0].name} has {len(sets[0])}; "
            "choose another --classes"
        )
    return sets
