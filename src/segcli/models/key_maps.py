"""Where foreign checkpoints keep their weights: one key map per source, to the names of our networks.

    caffe        shelhamer/fcn.berkeleyvision.org: the .caffemodel files of the authors' release
    torchfcn     wkentaro/pytorch-fcn
    semseg       meetps/pytorch-semseg: ptsemseg/models/fcn.py
    zijundeng    zijundeng/pytorch-semantic-segmentation: models/fcn{32,16,8}s.py
    torchvision  torchvision.models.segmentation

All but torchvision's are nets on VGG16 or AlexNet, and their parameters end under the names of the released
Caffe layers (conv1_1 ... score_fr, upscore2).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from segcli.errors import CheckpointError
from segcli.models.caffe import Layer
from segcli.models.networks import AT_ONCE_SCALES
from segcli.models.torchvision_networks import STRIDES
from segcli.models.vgg import CONVOLUTIONS_PER_STAGE

VGG_CONVOLUTIONS = [
    f"conv{stage}_{n}" for stage, count in enumerate(CONVOLUTIONS_PER_STAGE, 1) for n in range(1, count + 1)
]
VGG_FEATURES = (
    0,
    2,
    5,
    7,
    10,
    12,
    14,
    17,
    19,
    21,
    24,
    26,
    28,
)  # their places in torchvision's vgg16.features
ALEXNET_CONVOLUTIONS = ["conv1", "conv2", "conv3", "conv4", "conv5"]
HEAD = ["fc6", "fc7", "score_fr", "score_pool4", "score_pool3"]
UPSAMPLING = ["upscore", "upscore2", "upscore_pool4", "upscore16", "upscore8"]
RELEASED = [*VGG_CONVOLUTIONS, *ALEXNET_CONVOLUTIONS, *HEAD, *UPSAMPLING]


@dataclass(frozen=True)
class Foreign:
    """A foreign checkpoint, understood.

    Attributes:
        source: A key of `SOURCES`.
        tensors: Weights by the names of segcli's networks.
        networks: Keys of `NETWORKS` that they may belong to; several when the file does not tell.
        preprocessing: Keys of `PREPROCESSINGS` that they may have been trained with.
        heads: Number of classes of each head: one, or two (SIFT Flow).
        leftovers: Names in the file that no network uses.
    """

    source: str
    tensors: dict[str, Tensor]
    networks: tuple[str, ...]
    preprocessing: tuple[str, ...]
    heads: tuple[int, ...]
    leftovers: tuple[str, ...] = ()


def from_caffe(path: Path, layers: list[Layer]) -> Foreign:
    """A net of the authors' release. Two heads (score_fr_sem, score_fr_geo) become one with all channels."""
    by_name = {layer.name: layer for layer in layers if layer.blobs}
    endings = ["_sem", "_geo"] if "score_fr_sem" in by_name else [""]
    tensors: dict[str, Tensor] = {}
    used = {"scale_pool4", "scale_pool3"}
    for name in RELEASED:
        shared = [by_name[name]] if name in by_name else []
        found = shared or [by_name[name + ending] for ending in endings if name + ending in by_name]
        if not found:
            continue
        used.update(layer.name for layer in found)
        weights = [torch.from_numpy(layer.blobs[0].copy()) for layer in found]
        if name in UPSAMPLING:
            if any(np.any(blob) for layer in found for blob in layer.blobs[1:]):
                raise CheckpointError(f"{path}: {found[0].name} has a bias, unlike the released nets")
            tensors[f"{name}.weight"] = block_diagonal([dense(weight) for weight in weights])
        else:
            biases = [
                torch.from_numpy(blob.reshape(-1).copy()) for layer in found for blob in layer.blobs[1:]
            ]
            tensors[f"{name}.weight"] = torch.cat(weights)
            tensors[f"{name}.bias"] = torch.cat([*biases, torch.empty(0)])
    heads = _heads(path, [by_name.get("score_fr" + ending) for ending in endings])
    lists_all_layers = any(layer.name == "pool4" for layer in layers)
    networks = _released_networks(tensors)
    if _scales_skips(path, by_name):
        networks = ("fcn8s-atonce",)
    elif lists_all_layers:
        networks = networks[:1]  # nothing in the net scales the skips
    preprocessing = {(33, 3): ("siftflow",), (40,): ("nyud", "nyud-hha")}.get(heads, ("caffe",))
    leftovers = tuple(name for name in by_name if name not in used)
    return Foreign("caffe", tensors, networks, preprocessing, heads, leftovers)


def dense(weight: Tensor) -> Tensor:
    """An upsampling kernel (C, C, k, k); per-channel ones (C, 1, k, k) are put on the diagonal."""
    classes = weight.shape[0]
    if weight.ndim != 4 or weight.shape[1] != 1 or classes == 1:
        return weight
    kernel = weight.new_zeros(classes, classes, *weight.shape[2:])
    kernel[range(classes), range(classes)] = weight[:, 0]
    return kernel


def block_diagonal(kernels: list[Tensor]) -> Tensor:
    """Upsampling kernels (C_i, C_i, k, k) of several heads as one (C, C, k, k) that keeps them apart."""
    if len(kernels) == 1:
        return kernels[0]
    joint = kernels[0].new_zeros(*(sum(kernel.shape[axis] for kernel in kernels) for axis in (0, 1)),
                                 *kernels[0].shape[2:])  # fmt: skip
    start = 0
    for kernel in kernels:
        end = start + kernel.shape[0]
        joint[start:end, start:end] = kernel
        start = end
    return joint


def _heads(path: Path, score_layers: list[Layer | None]) -> tuple[int, ...]:
    """The number of classes of each head, from the biases of its score layer."""
    sizes = tuple(layer.blobs[1].size for layer in score_layers if layer and len(layer.blobs) > 1)
    if len(sizes) != len(score_layers):
        raise CheckpointError(
            f"{path} is no FCN of the authors' release: it has no layer score_fr with a bias"
        )
    return sizes


def _scales_skips(path: Path, by_name: Mapping[str, Layer]) -> bool:
    """Whether the net has the scale layers of the at-once version."""
    layers = [by_name[name] for name in ("scale_pool4", "scale_pool3") if name in by_name]
    if not layers:
        return False
    same = [np.allclose(layer.blobs[0], scale, 1e-4)
            for layer, scale in zip(layers, AT_ONCE_SCALES, strict=False)]  # fmt: skip
    if len(layers) < 2 or not all(same):
        raise CheckpointError(f"{path} scales its skips, but not as the at-once net does: {AT_ONCE_SCALES}")
    return True


def _released_networks(tensors: Mapping[str, Tensor]) -> tuple[str, ...]:
    """The networks whose parameters have these names."""
    if "conv1.weight" in tensors:
        return ("fcn-alexnet",)
    if "score_pool3.weight" in tensors:
        return ("fcn8s", "fcn8s-atonce")
    return ("fcn16s",) if "score_pool4.weight" in tensors else ("fcn32s",)


def from_torchfcn(path: Path, state: dict[str, Tensor]) -> Foreign:
    """pytorch-fcn uses the released names as they are."""
    tensors, leftovers = _rename(state, {name: name for name in RELEASED})
    return _on_vgg(path, "torchfcn", tensors, leftovers, _released_networks(tensors), ("caffe",))


def from_semseg(path: Path, state: dict[str, Tensor]) -> Foreign:
    """pytorch-semseg; without upsampling layers it is another net (`models/semseg.py`)."""
    places = [(stage, 2 * n) for stage, count in enumerate(CONVOLUTIONS_PER_STAGE, 1) for n in range(count)]
    theirs = {
        **{name: f"conv_block{stage}.{place}"
           for name, (stage, place) in zip(VGG_CONVOLUTIONS, places, strict=True)},
        "fc6": "classifier.0", "fc7": "classifier.3", "score_fr": "classifier.6",
        "score_pool4": "score_pool4", "score_pool3": "score_pool3",
        "upscore2": "upscore2", "upscore_pool4": "upscore4", "upscore8": "upscore8",
    }  # fmt: skip
    tensors, leftovers = _rename(state, theirs)
    networks: tuple[str, ...] = _released_networks(tensors)[:1]
    if "upscore2.weight" not in tensors:
        networks = (f"{networks[0]}-semseg", f"{networks[0]}-semseg-nearest")
    trained_with = ("caffe-unit", "caffe", "imagenet")  # its loaders differ, and have changed
    return _on_vgg(path, "semseg", tensors, leftovers, networks, trained_with)


def from_zijundeng(path: Path, state: dict[str, Tensor]) -> Foreign:
    """zijundeng's nets scale their skips always. VGG16's features are cut into numbered parts."""
    starts = {"features3": 0, "features4": 17, "features5": 24}
    parts = [part for part in starts if f"{part}.0.weight" in state]
    starts |= dict.fromkeys(parts[:1], 0)
    theirs = {"fc6": "score_fr.0", "fc7": "score_fr.3", "score_fr": "score_fr.6"}
    theirs |= {name: name for name in (*HEAD[3:], *UPSAMPLING)}
    for name, place in zip(VGG_CONVOLUTIONS, VGG_FEATURES, strict=True):
        part = next((part for part in reversed(parts) if starts[part] <= place), "features5")
        theirs[name] = f"{part}.{place - starts[part]}"
    tensors, leftovers = _rename(state, theirs)
    network = _released_networks(tensors)[0]
    networks = (network if network == "fcn32s" else f"{network}-atonce",)
    return _on_vgg(path, "zijundeng", tensors, leftovers, networks, ("caffe-vgg",))


def from_torchvision(path: Path, state: dict[str, Tensor]) -> Foreign:
    """torchvision's own names; the auxiliary classifier serves only training."""
    heads = {
        "lraspp": "classifier.low_classifier.bias",
        "deeplabv3": "classifier.0.convs.0.0.weight",
        "fcn": "classifier.4.bias",
    }
    backbones = {
        "resnet101": "backbone.layer3.22.conv1.weight",
        "resnet50": "backbone.layer3.5.conv3.weight",
        "mobilenet_v3_large": "backbone.16.0.weight",
    }
    head = next((name for name, key in heads.items() if key in state), "")
    backbone = next((name for name, key in backbones.items() if key in state), "")
    network = f"{head}_{backbone}"
    if network not in STRIDES:
        raise CheckpointError(
            f"{path} is none of torchvision's networks that segcli knows: {', '.join(STRIDES)}"
        )
    scores = heads["lraspp" if head == "lraspp" else "fcn"]
    if scores not in state:
        raise CheckpointError(f"{path} has no {scores}; get the file again")
    tensors = {key: value for key, value in state.items() if key.startswith(("backbone.", "classifier."))}
    leftovers = tuple(key for key in state if key not in tensors)
    number = state[scores].numel()
    return Foreign("torchvision", tensors, (network,), ("torchvision",), (number,), leftovers)


def _rename(
    state: Mapping[str, Tensor], theirs: Mapping[str, str]
) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """Weights under our layers' names, given the names of theirs; and the keys that are no one's."""
    keys = {
        f"{other}.{part}": f"{name}.{part}" for name, other in theirs.items() for part in ("weight", "bias")
    }
    tensors = {keys[key]: value for key, value in state.items() if key in keys}
    return tensors, tuple(key for key in state if key not in keys)


def _on_vgg(
    path: Path,
    source: str,
    tensors: dict[str, Tensor],
    leftovers: tuple[str, ...],
    networks: tuple[str, ...],
    preprocessing: tuple[str, ...],
) -> Foreign:
    if "score_fr.bias" not in tensors:
        raise CheckpointError(f"{path} is no FCN of {source}: the bias of its layer score_fr is missing")
    heads = (tensors["score_fr.bias"].numel(),)
    return Foreign(source, tensors, networks, preprocessing, heads, leftovers)


SOURCES: dict[str, tuple[str, Callable[[Path, dict[str, Tensor]], Foreign]]] = {  # how a key of theirs begins
    "torchfcn": ("fc6.", from_torchfcn),
    "semseg": ("conv_block1.", from_semseg),
    "zijundeng": ("score_fr.0.", from_zijundeng),
    "torchvision": ("backbone.", from_torchvision),
}
