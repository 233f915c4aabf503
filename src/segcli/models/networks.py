"""Every network by name: a plain dict from names to builders."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from functools import partial

from segcli.errors import UsageError
from segcli.models.encoders import ENCODERS, EncoderFCN
from segcli.models.fcn import FCN, FINAL_LAYER
from segcli.models.vgg import VGG16FCN

AT_ONCE_SCALES = (0.01, 0.0001)  # on pool4 and pool3; voc-fcn8s-atonce/net.py

NETWORKS: dict[str, Callable[[int], FCN]] = {
    "fcn32s": partial(VGG16FCN, stride=32),
    "fcn16s": partial(VGG16FCN, stride=16),
    "fcn8s": partial(VGG16FCN, stride=8),
    "fcn8s-atonce": partial(VGG16FCN, stride=8, scales=AT_ONCE_SCALES),
    **{
        f"fcn{stride}s-{encoder}": partial(EncoderFCN, stride=stride, encoder=encoder)
        for encoder in ENCODERS
        for stride in FINAL_LAYER
    },
}


def get(name: str, num_classes: int) -> FCN:
    """A network with random weights, in training mode.

    Raises:
        UsageError: No network has that name.
    """
    if name not in NETWORKS:
        near = difflib.get_close_matches(name, NETWORKS, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(NETWORKS)}"
        raise UsageError(f"no network is called {name!r}; {hint}")
    return NETWORKS[name](num_classes)
