"""The weights that a training starts from: random ones, an encoder's, or those of a whole model."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from segcli.downloads import SILENT, Watch, by_hand, cache_folder, download, is_offline, mismatch, only_one
from segcli.errors import CheckpointError, MachineError, UsageError
from segcli.models.caffe import read_caffemodel
from segcli.models.checkpoint import Model, fill
from segcli.models.encoders import ENCODERS, EncoderFCN
from segcli.models.fcn import Network
from segcli.models.importers import coerce, load_state
from segcli.models.info import describe_content
from segcli.models.networks import get
from segcli.models.preprocessing import PREPROCESSINGS, Preprocessing
from segcli.models.vgg import VGG16FCN, convolutionalize
from segcli.models.zoo import open_model
from segcli.palettes import ClassSet
from segcli.training import distributed
from segcli.training.config import TrainConfig

HEAD = ("score", "upscore")  # how the names of layers begin that are no part of the encoder


@dataclass(frozen=True)
class Start:
    """A network as its training begins.

    Attributes:
        name: A key of `models.networks.NETWORKS`.
        network: With its first weights, on the CPU.
        preprocessing: How its images become numbers.
        about: What it starts from, in one line.
    """

    name: str
    network: Network
    preprocessing: Preprocessing
    about: str


def starting_network(config: TrainConfig, classes: ClassSet, watch: Watch = SILENT) -> Start:
    """A new network, with the encoder or the model that the configuration starts from.

    Args:
        config: Says which network, and what it starts from.
        classes: What it will tell apart.
        watch: Hears of downloads.

    Raises:
        UsageError: There is no such network, encoder or model, or the options contradict each other.
        CheckpointError: A file of weights is damaged, or of another architecture.
        MachineError: Weights must be downloaded, and cannot be.
    """
    if config.model and config.encoder_weights != "none":
        raise UsageError("--model brings its encoder; leave --encoder-weights out")
    preprocessing = PREPROCESSINGS["imagenet"]
    if config.model:
        model = open_model(config.model, watch=watch)
        name = config.network or model.info.network
        network = get(name, len(classes))
        about = take_over(network, name, model, config.model, classes)
        preprocessing = model.info.preprocessing
    else:
        encoder = "" if config.encoder == "vgg16" else f"-{config.encoder}"
        name = config.network or f"fcn{config.stride}s{encoder}"
        network = get(name, len(classes))
        about = f"starts from random weights (seed {config.seed})"
        if config.encoder_weights != "none":
            preprocessing = PREPROCESSINGS[start_encoder(network, name, config.encoder_weights, watch)]
            about = f"its encoder starts from {config.encoder_weights}"
    if config.preprocessing != "auto":
        preprocessing = PREPROCESSINGS[config.preprocessing]
    if config.shorter_side:
        preprocessing = dataclasses.replace(preprocessing, shorter_side=config.shorter_side)
    return Start(name, network, preprocessing, about)


def take_over(network: Network, name: str, model: Model, source: str, classes: ClassSet) -> str:
    """Give a new network the weights of a model; layers that score classes only if these are the same.

    The two may differ, as FCN-32s and FCN-16s do: layers of the same name and shape are taken.

    Args:
        network: Changed in place.
        name: Its key in `NETWORKS`.
        model: Where the weights come from.
        source: What the user calls it.
        classes: Those of the new network.

    Returns:
        What was done, in one line.

    Raises:
        CheckpointError: Nothing fits.
    """
    before = model.info.class_set
    same = before.names == classes.names and model.info.second_class_set is None
    scoring = scoring_layers(name)
    wanted, given = network.state_dict(), model.network.state_dict()
    kept = {
        key: value
        for key, value in given.items()
        if key in wanted and value.shape == wanted[key].shape and (same or key not in scoring)
    }
    if not kept:
        raise CheckpointError(
            f"--model {source} is a {model.info.network}; none of its weights fit --network {name}"
        )
    fill(network, wanted | kept, source)
    anew = {key.rpartition(".")[0] for key in wanted if key not in kept}
    if not anew:
        return f"starts from {source}"
    named = ", ".join(sorted(anew)[:6]) + (", ..." if len(anew) > 6 else "")
    if same:
        return f"starts from {source}; {named} start anew, since {source} has none that fit"
    what = f"{len(before)} of {before.name} to {len(classes)} of {classes.name}"
    return f"starts from {source}; the classes change from the {what}, so {named} start anew"


def scoring_layers(name: str) -> set[str]:
    """The parameters of a network whose shape follows from the number of classes."""
    with torch.device("meta"):
        one, other = get(name, 2).state_dict(), get(name, 3).state_dict()
    return {key for key, value in one.items() if value.shape != other[key].shape}


def start_encoder(network: Network, name: str, source: str, watch: Watch = SILENT) -> str:
    """Give the encoder of a network its first weights.

    Args:
        network: Changed in place.
        name: Its key in `NETWORKS`.
        source: `imagenet` for torchvision's; or a file: a classifier that `segcli train --task classify`
            made, a model of segcli, a state dict of torchvision's classifier, a caffemodel of VGG16.
        watch: Hears of downloads.

    Returns:
        The key of `PREPROCESSINGS` that these weights were trained with.

    Raises:
        UsageError: The network takes no encoder weights, or there is no such file.
        CheckpointError: The file does not hold this encoder.
        MachineError: The weights must be downloaded, and cannot be.
    """
    encoder = "vgg16" if isinstance(network, VGG16FCN) else name.partition("-")[2]
    if not isinstance(network, VGG16FCN | EncoderFCN):
        raise UsageError(f"--encoder-weights does not go with {name}; start from a --model instead")
    if distributed.rank() != 0:  # DistributedDataParallel gives all processes what the first one has
        return "caffe" if source.endswith(".caffemodel") else "imagenet"
    path = imagenet_file(encoder, watch) if source == "imagenet" else Path(source)
    state = read_weights(path)
    if isinstance(network, VGG16FCN) and "features.0.weight" in state:
        try:
            convolutionalize(network, state)
        except CheckpointError as error:
            raise CheckpointError(f"{path} does not fit vgg16: {error}") from error
    else:
        copy_encoder(network, encoder, state, path)
    return "caffe" if path.suffix == ".caffemodel" else "imagenet"


def copy_encoder(network: Network, encoder: str, state: dict[str, Tensor], path: Path) -> None:
    """Copy what belongs to the encoder, after every name and shape was checked."""
    wanted = network.state_dict()
    prefix = "" if any(key.startswith("encoder.") for key in state) or encoder == "vgg16" else "encoder."
    given = {prefix + key: value for key, value in state.items()}
    own, missing = {}, []
    for key, value in wanted.items():
        if key.startswith(HEAD):
            continue
        if key in given:
            own[key] = coerce(given[key], value.shape)
        elif not key.endswith("num_batches_tracked"):  # which files from before 2018 lack
            missing.append(key)
    if missing:
        count = len(missing) + len(own)
        raise CheckpointError(
            f"{path} does not fit the encoder {encoder}: it lacks {len(missing)} of {count} weights, "
            f"such as {missing[0].removeprefix('encoder.')}; {says(path)}"
        )
    fill(network, wanted | own, str(path))


def says(path: Path) -> str:
    """What a file says that it is, for an error message."""
    if path.suffix == ".safetensors":
        with safetensors.safe_open(path, framework="numpy") as file:
            about = (file.metadata() or {}).get("encoder")
        if about:
            return f"it says: {about}"
    return "is it of another network?"


def read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors in a safetensors, PyTorch or Caffe file, by name.

    Raises:
        UsageError: There is no such file.
        CheckpointError: It is damaged, or not safe to load.
    """
    if not path.is_file():
        raise UsageError(f"--encoder-weights {path} is neither a file nor imagenet")
    if path.suffix == ".caffemodel":
        parts = ("weight", "bias")
        return {
            f"{layer.name}.{part}": torch.from_numpy(blob.copy())
            for layer in read_caffemodel(path)
            for part, blob in zip(parts, layer.blobs, strict=False)
        }
    if path.suffix != ".safetensors":
        return load_state(path)[0]
    try:
        return safetensors.torch.load_file(path)
    except (OSError, safetensors.SafetensorError) as error:
        reason = describe_content(path) or error
        raise CheckpointError(f"{path} cannot be read ({reason}); get the file again") from error


def imagenet_file(encoder: str, watch: Watch) -> Path:
    """torchvision's classifier for ImageNet, from the cache, or downloaded into it.

    Raises:
        UsageError: torchvision has no such encoder.
        MachineError: It must be downloaded, and cannot be.
    """
    from torchvision.models import get_model_weights

    require_encoder(encoder, [*ENCODERS, "vgg16"])
    address: str = get_model_weights(encoder).DEFAULT.url
    target = cache_folder() / "downloads" / address.rpartition("/")[2]
    checksum = f"sha256:{target.stem.rpartition('-')[2]}"  # torchvision's names end in its first digits
    with only_one(target, watch):
        if target.is_file() and mismatch(target, checksum) is None:
            return target
        if is_offline():
            raise MachineError(
                f"{target.name} is not here, and SEGCLI_OFFLINE forbids the network\n"
                f"{by_hand((address,), target)}, or give --encoder-weights FILE"
            )
        watch.say(f"downloading {target.name}, torchvision's {encoder} for ImageNet")
        download((address,), target, checksum, watch)
    return target


def require_encoder(encoder: str, known: Sequence[str]) -> None:
    """Refuse an encoder that is none of the known ones."""
    if encoder not in known:
        raise UsageError(f"encoder {encoder!r} is unknown; choose one of {', '.join(known)}")
