"""Every network by name: a plain dict from names to builders."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from functools import partial
from typing import Any

from torch.overrides import TorchFunctionMode

from segcli.errors import UsageError
from segcli.models.alexnet import AlexNetFCN
from segcli.models.encoders import ENCODERS, EncoderFCN
from segcli.models.fcn import FINAL_LAYER, Network
from segcli.models.semseg import ResizingVGG16FCN
from segcli.models.torchvision_networks import STRIDES, TorchvisionNetwork
from segcli.models.vgg import VGG16FCN

AT_ONCE_SCALES = (0.01, 0.0001)  # on pool4 and pool3; voc-fcn8s-atonce/net.py

NETWORKS: dict[str, Callable[[int], Network]] = {
    "fcn32s": partial(VGG16FCN, stride=32),
    "fcn16s": partial(VGG16FCN, stride=16),
    "fcn8s": partial(VGG16FCN, stride=8),
    "fcn8s-atonce": partial(VGG16FCN, stride=8, scales=AT_ONCE_SCALES),
    "fcn16s-atonce": partial(VGG16FCN, stride=16, scales=AT_ONCE_SCALES),  # zijundeng's FCN16
    "fcn-alexnet": AlexNetFCN,
    **{
        f"fcn{stride}s-semseg": partial(ResizingVGG16FCN, stride=stride, mode="bilinear")
        for stride in FINAL_LAYER
    },
    **{
        f"fcn{stride}s-semseg-nearest": partial(ResizingVGG16FCN, stride=stride, mode="nearest")
        for stride in FINAL_LAYER
    },
    **{builder: partial(TorchvisionNetwork, builder=builder) for builder in STRIDES},
    **{
        f"fcn{stride}s-{encoder}": partial(EncoderFCN, stride=stride, encoder=encoder)
        for encoder in ENCODERS
        for stride in FINAL_LAYER
    },
}


def get(name: str, num_classes: int) -> Network:
    """A network with random weights, in training mode.

    Raises:
        UsageError: No network has that name.
    """
    if name not in NETWORKS:
        near = difflib.get_close_matches(name, NETWORKS, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(NETWORKS)}"
        raise UsageError(f"no network is called {name!r}; {hint}")
    return NETWORKS[name](num_classes)


class _SkipInitialization(TorchFunctionMode):
    """Leaves out drawing random weights, which takes longer than reading half a gigabyte of real ones."""

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        options = kwargs or {}
        draws = getattr(function, "__name__", "") in ("uniform_", "normal_")
        if draws or getattr(function, "__module__", "") == "torch.nn.init":
            return args[0] if args else options["tensor"]
        return function(*args, **options)


def get_empty(name: str, num_classes: int) -> Network:
    """A network whose weights are whatever was in memory: to be filled at once, every one of them.

    Raises:
        UsageError: No network has that name.
    """
    with _SkipInitialization():
        return get(name, num_classes)
