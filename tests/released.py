"""The released networks, spelled out layer by layer with the numbers of their prototxts: a reference.

From shelhamer/fcn.berkeleyvision.org: voc-fcn{32,16,8}s, voc-fcn8s-atonce, voc-fcn-alexnet.
Nothing here comes from segcli.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

Weights = dict[str, Tensor]
VGG_STAGES = (2, 2, 3, 3, 3)
THIN = (4, 6, 8, 10, 12, 14)  # channels of VGG16's five stages, then fc6 and fc7
THIN_ALEXNET = (6, 8, 12, 12, 8, 10)


def he(generator: torch.Generator, outputs: int, inputs: int, side: int) -> Tensor:
    scale = (2 / (inputs * side * side)) ** 0.5
    return torch.randn(outputs, inputs, side, side, generator=generator) * scale


def vgg_weights(stride: int, classes: int, seed: int, widths: tuple[int, ...] = THIN) -> Weights:
    """He-initialised weights under the released names; the upsampling kernels are random and dense."""
    g = torch.Generator().manual_seed(seed)
    weights: Weights = {}

    def convolution(name: str, outputs: int, inputs: int, side: int) -> None:
        weights[f"{name}.weight"] = he(g, outputs, inputs, side)
        weights[f"{name}.bias"] = torch.randn(outputs, generator=g) * 0.1

    before = 3
    for stage, count in enumerate(VGG_STAGES, 1):
        for n in range(1, count + 1):
            convolution(f"conv{stage}_{n}", widths[stage - 1], before, 3)
            before = widths[stage - 1]
    convolution("fc6", widths[5], before, 7)
    convolution("fc7", widths[5], widths[5], 1)
    convolution("score_fr", classes, widths[5], 1)
    upsampling = {32: {"upscore": 64}, 16: {"upscore2": 4, "upscore16": 32},
                  8: {"upscore2": 4, "upscore_pool4": 4, "upscore8": 16}}[stride]  # fmt: skip
    if stride <= 16:
        convolution("score_pool4", classes, widths[3], 1)
    if stride <= 8:
        convolution("score_pool3", classes, widths[2], 1)
    for name, side in upsampling.items():
        weights[f"{name}.weight"] = he(g, classes, classes, side) * side
    return weights


def vgg(x: Tensor, p: Weights) -> dict[str, Tensor]:
    """The maps pool3, pool4 and fc7."""
    maps = {}
    for stage, count in enumerate(VGG_STAGES, 1):
        for n in range(1, count + 1):
            name = f"conv{stage}_{n}"
            padding = 100 if name == "conv1_1" else 1
            x = F.relu(F.conv2d(x, p[f"{name}.weight"], p[f"{name}.bias"], padding=padding))
        x = F.max_pool2d(x, 2, 2, ceil_mode=True)
        maps[f"pool{stage}"] = x
    x = F.relu(F.conv2d(x, p["fc6.weight"], p["fc6.bias"]))
    maps["fc7"] = F.relu(F.conv2d(x, p["fc7.weight"], p["fc7.bias"]))
    return maps


def score(x: Tensor, p: Weights, name: str) -> Tensor:
    return F.conv2d(x, p[f"{name}.weight"], p[f"{name}.bias"])


def crop(x: Tensor, offset: int, like: Tensor) -> Tensor:
    """Caffe's Crop layer on the last two axes."""
    height, width = like.shape[2:]
    return x[:, :, offset : offset + height, offset : offset + width]


def fcn32s(x: Tensor, p: Weights) -> Tensor:
    up = F.conv_transpose2d(score(vgg(x, p)["fc7"], p, "score_fr"), p["upscore.weight"], stride=32)
    return crop(up, 19, x)


def fcn16s(x: Tensor, p: Weights, scale4: float = 1) -> Tensor:
    maps = vgg(x, p)
    up2 = F.conv_transpose2d(score(maps["fc7"], p, "score_fr"), p["upscore2.weight"], stride=2)
    fused = up2 + crop(score(maps["pool4"] * scale4, p, "score_pool4"), 5, up2)
    return crop(F.conv_transpose2d(fused, p["upscore16.weight"], stride=16), 27, x)


def fcn8s(x: Tensor, p: Weights, scale4: float = 1, scale3: float = 1) -> Tensor:
    maps = vgg(x, p)
    up2 = F.conv_transpose2d(score(maps["fc7"], p, "score_fr"), p["upscore2.weight"], stride=2)
    fused = up2 + crop(score(maps["pool4"] * scale4, p, "score_pool4"), 5, up2)
    up4 = F.conv_transpose2d(fused, p["upscore_pool4.weight"], stride=2)
    fused = up4 + crop(score(maps["pool3"] * scale3, p, "score_pool3"), 9, up4)
    return crop(F.conv_transpose2d(fused, p["upscore8.weight"], stride=8), 31, x)


def fcn8s_atonce(x: Tensor, p: Weights) -> Tensor:
    return fcn8s(x, p, 0.01, 0.0001)


def alexnet_weights(classes: int, seed: int, widths: tuple[int, ...] = THIN_ALEXNET) -> Weights:
    g = torch.Generator().manual_seed(seed)
    w1, w2, w3, w4, w5, w6 = widths
    shapes = {"conv1": (w1, 3, 11), "conv2": (w2, w1 // 2, 5), "conv3": (w3, w2, 3),
              "conv4": (w4, w3 // 2, 3), "conv5": (w5, w4 // 2, 3), "fc6": (w6, w5, 6), "fc7": (w6, w6, 1),
              "score_fr": (classes, w6, 1)}  # fmt: skip
    weights = {f"{name}.weight": he(g, *shape) for name, shape in shapes.items()}
    weights |= {f"{name}.bias": torch.randn(shape[0], generator=g) * 0.1 for name, shape in shapes.items()}
    return weights | {"upscore.weight": he(g, classes, classes, 63) * 63}


def lrn(x: Tensor) -> Tensor:
    """Caffe's LRN across channels: local_size 5, alpha 1e-4, beta 0.75."""
    squares = F.pad(x**2, (0, 0, 0, 0, 2, 2))
    total = sum(squares[:, i : i + x.shape[1]] for i in range(5))
    return x / (1 + 1e-4 / 5 * total) ** 0.75


def fcn_alexnet(x: Tensor, p: Weights) -> Tensor:
    def conv(h: Tensor, name: str, **options: int) -> Tensor:
        return F.relu(F.conv2d(h, p[f"{name}.weight"], p[f"{name}.bias"], **options))

    def pool(h: Tensor) -> Tensor:
        return F.max_pool2d(h, 3, 2, ceil_mode=True)

    h = lrn(pool(conv(x, "conv1", stride=4, padding=100)))
    h = lrn(pool(conv(h, "conv2", padding=2, groups=2)))
    h = conv(h, "conv3", padding=1)
    h = conv(h, "conv4", padding=1, groups=2)
    h = pool(conv(h, "conv5", padding=1, groups=2))
    h = conv(conv(h, "fc6"), "fc7")
    up = F.conv_transpose2d(score(h, p, "score_fr"), p["upscore.weight"], stride=32)
    return crop(up, 18, x)
