"""The lesson of the FCN paper on one's own picture: what every stride sees, and where each class is found.

Long, Shelhamer & Darrell 2015, figure 4: predictions at stride 32 are coarse, and skips refine them.
"""

from __future__ import annotations

import cv2
import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from segcli.models.checkpoint import Model
from segcli.models.fcn import FCN, Network
from segcli.models.preprocessing import to_tensor
from segcli.render import colorize, grid, heat_map, overlay, with_legend

Pixels = npt.NDArray[np.uint8]
Picture = tuple[str, Pixels]  # title and pixels, as `render.grid` takes them

PANEL = 360  # longer side of a panel, in pixels
PER_ROW = 3


def inspect_image(model: Model, image: Pixels, device: torch.device, top: int = 3) -> Pixels:
    """One picture: the input, predictions at stride 32, 16 and 8, heat maps of the top classes, a legend.

    Args:
        model: With a network on any device; it is moved to `device`.
        image: uint8 (H, W, 3) RGB.
        top: Number of classes whose heat maps are shown: those with the highest mean probability.

    Returns:
        uint8 (H', W', 3) RGB.
    """
    network, classes = model.network.to(device), model.info.class_set
    size = panel_size(image)
    small: Pixels = cv2.resize(image, size[::-1], interpolation=cv2.INTER_AREA).astype(np.uint8, copy=False)
    with torch.inference_mode():
        by_stride = scores_by_stride(network, to_tensor(image, model.info.preprocessing).to(device), size)
    by_stride = {stride: scores[:, : len(classes)] for stride, scores in by_stride.items()}  # the first head
    probabilities = by_stride[min(by_stride)].softmax(1)[0].cpu().numpy()  # (C, h, w)
    labels = probabilities.argmax(0).astype(np.uint8)
    palette = classes.palette()

    answer = overlay(small, labels, palette)
    certainty = probabilities.max(0)
    title = f"certainty: {certainty.mean():.0%} on average"
    pictures: list[Picture] = [("image", small), ("prediction", answer), (title, heat_map(certainty))]
    pictures += [
        (stride_title(stride, by_stride), colorize(scores[0].argmax(0).byte().cpu().numpy(), palette))
        for stride, scores in by_stride.items()
    ]
    ranking = np.argsort(-probabilities.mean((1, 2)), kind="stable")[:top]
    pictures += [
        (f"{classes.names[c]}: {probabilities[c].mean():.0%} of all", heat_map(probabilities[c]))
        for c in ranking
    ]
    rows = [pictures[i : i + PER_ROW] for i in range(0, len(pictures), PER_ROW)]
    return with_legend(grid(rows), labels, classes)


def scores_by_stride(network: Network, tensor: Tensor, size: tuple[int, int]) -> dict[int, Tensor]:
    """Scores at a panel's size, float (1, C, h, w), by stride from coarse to fine.

    Networks without skips have one stride.
    """
    pyramid = network.score_pyramid(tensor)
    seen = (tensor.shape[2], tensor.shape[3])
    if isinstance(network, FCN):
        strides = [network.stride << steps for steps in range(len(pyramid) - 1, -1, -1)]
        full = {s: network.preview(scores, s, seen) for s, scores in zip(strides, pyramid, strict=True)}
    else:
        full = {network.stride: network.upsample(pyramid[-1], seen)}
    return {s: F.interpolate(x, size, mode="bilinear", align_corners=False) for s, x in full.items()}


def stride_title(stride: int, strides: dict[int, Tensor]) -> str:
    """What a prediction is made of."""
    skips = {32: "", 16: " + pool4", 8: " + pool4 + pool3"}.get(stride, "")
    return f"stride {stride}{skips if len(strides) > 1 else ''}"


def panel_size(image: Pixels) -> tuple[int, int]:
    """Height and width of a panel."""
    height, width = image.shape[:2]
    factor = PANEL / max(height, width)
    return max(1, round(height * factor)), max(1, round(width * factor))
