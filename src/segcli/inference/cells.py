"""Label maps straight from coarse scores, without scores of the full size.

Where a network's last upsampling is fixed bilinear interpolation, every pixel's scores are a mixture, with
weights that are not negative, of the few coarse scores around it. Where all of these have their highest score
in the same class, so has every mixture of them. So a whole cell between agreeing coarse scores is that class,
and only the pixels of the other cells, along the borders between classes, are interpolated.

A network may see an image at another size than the one displayed; then its scores are resized bilinearly. A
mixture of mixtures is a mixture, so that takes no second step: it only makes the cells wider.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from segcli.models.fcn import FCN, FINAL_LAYER, Bilinear, Network, Window, is_bilinear, position

CORNERS = 1 << 22  # coarse scores that are looked at at a time, whatever the size of the image
BLOCK = 1 << 16  # pixels that are interpolated at a time
Labels = npt.NDArray[np.integer[Any]]


@dataclass(frozen=True)
class Lattice:
    """Where a network's coarse scores lie among the pixels that it sees, the same along both axes.

    Attributes:
        stride: Pixels from one score to the next.
        origin: The pixel under the first score, 0 = the centre of the first pixel.
        extended: Beyond the outermost scores the scores stay as they are, as in interpolation; else they fall
            to zero, as in a transposed convolution.
    """

    stride: int
    origin: Fraction
    extended: bool


def lattice_of(network: Network) -> Lattice | None:
    """How a network's last upsampling interpolates; None if it does something else or was learned."""
    if not isinstance(network, FCN):
        return None
    stride = network.stride
    layer = getattr(network, FINAL_LAYER[stride], None)
    if isinstance(layer, Bilinear):
        window = Window(2 * stride, stride, padding=stride // 2)
    elif isinstance(layer, nn.ConvTranspose2d) and is_bilinear(layer):
        window = Window(layer.kernel_size[0], stride)
    else:
        return None
    origin = position(Fraction(0), up=[window]) - network.alignment.output
    return Lattice(stride, origin, extended=isinstance(layer, Bilinear))


class Mixture(NamedTuple):
    """Of which coarse scores the pixels along one axis are mixed. Pixels mixed of the same ones are a cell.

    Attributes:
        scores: The two or three scores of every cell, int64 (taps, cells); one may be there twice.
        start: The first pixel of every cell, int64 (cells,).
        size: The pixels of every cell, int64 (cells,).
        cell: The cell of every pixel, int64 (n,).
        weights: Of the cell's scores in every pixel, float32 (n, taps), at least 0.
    """

    scores: Tensor
    start: Tensor
    size: Tensor
    cell: Tensor
    weights: Tensor


@functools.lru_cache(maxsize=128)  # a folder has few sizes; one of 6000 pixels takes 200 kB
def mixture(lattice: Lattice, count: int, seen: int, displayed: int) -> Mixture:
    """One axis: from `count` scores over the pixels that the network saw to those that are displayed."""
    place = ((np.arange(displayed) + 0.5) * (seen / displayed) - 0.5).clip(0, seen - 1)
    upper = np.floor(place)
    lower = np.minimum(upper + 1, seen - 1)
    scores, shares = [], []
    for pixel, share in ((upper, 1 - (place - upper)), (lower, place - upper)):
        point = (pixel - float(lattice.origin)) / lattice.stride
        before = np.floor(point)
        for score, part in ((before, 1 - (point - before)), (before + 1, point - before)):
            there = lattice.extended | ((score >= 0) & (score < count))
            scores.append(score.clip(0, count - 1).astype(np.int64))
            shares.append(share * part * there)
    used = np.array(shares) > 0  # (4, n)
    first = np.where(used, scores, count).min(0)
    last = np.where(used, scores, -1).max(0)
    changes = (np.diff(first, prepend=-1) != 0) | (np.diff(last, prepend=-1) != 0)
    start = np.flatnonzero(changes)
    taps = int((last - first).max()) + 1
    weights = np.zeros((displayed, taps), np.float32)
    for score, share in zip(scores, shares, strict=True):
        pixels = np.flatnonzero(share > 0)
        weights[pixels, (score - first)[pixels]] += share[pixels]
    cells = np.stack([np.minimum(first + tap, last)[start] for tap in range(taps)])
    size = np.diff(start, append=displayed)
    parts = (cells, start, size, np.cumsum(changes) - 1, weights)
    return Mixture(*(torch.from_numpy(part) for part in parts))


def labels_from_coarse(
    scores: Tensor, lattice: Lattice, seen: tuple[int, int], displayed: tuple[int, int]
) -> Labels:
    """The class of every pixel of an image.

    It is the class whose interpolated score is the highest, of equal ones the first. Where two differ by
    nothing but rounding it may be either.

    Args:
        scores: The network's finest scores, finite, float (C, h, w), on any device.
        lattice: Where they lie, see `lattice_of`.
        seen: (h', w') of the image as the network saw it.
        displayed: (H, W) of the image.

    Returns:
        (H, W) class ids, uint8, or uint16 above 256 classes.
    """
    scores = scores.float().permute(1, 2, 0).contiguous()  # (h, w, C)
    classes = scores.shape[2]
    y, x = (
        Mixture(*(part.to(scores.device) for part in mixture(lattice, *axis)))
        for axis in zip(scores.shape[:2], seen, displayed, strict=True)
    )
    winners = scores.argmax(2).to(torch.uint8 if classes <= 256 else torch.int32)
    around = winners[y.scores[:, None, :, None], x.scores[None, :, None, :]]  # (taps, taps, down, across)
    labels = around[0, 0].index_select(1, x.cell).index_select(0, y.cell)
    row, column = (around != around[0, 0]).any(0).any(0).nonzero(as_tuple=True)  # (mixed cells,) each
    at_a_time = max(1, CORNERS // (len(y.scores) * len(x.scores) * classes))
    for start in range(0, len(row), at_a_time):
        some = slice(start, start + at_a_time)
        _interpolate(labels, scores, y, x, row[some], column[some])
    return labels.cpu().numpy().astype(np.uint8 if classes <= 256 else np.uint16, copy=False)


def _interpolate(labels: Tensor, scores: Tensor, y: Mixture, x: Mixture, row: Tensor, column: Tensor) -> None:
    """Decide the pixels of the mixed cells (row[i], column[i]), int64 (M,), in `labels`."""
    places = y.scores[:, None, row] * scores.shape[1] + x.scores[None, :, column]  # (taps, taps, M)
    corners = scores.flatten(0, 1).index_select(0, places.flatten()).view(*places.shape, -1)
    contenders, count = _contenders(corners)
    # Cells of like size and number of contenders are computed together, each as large as the largest of them;
    # few cells whatever their size.
    shapes = torch.stack([y.size[row], x.size[column], count])
    down, across, number = (shapes - 1).float().frexp().exponent.long()  # bits that they take, at most 31
    few = len(row) * int(y.size.max()) * int(x.size.max()) <= BLOCK
    kinds = number if few else (down * 32 + across) * 32 + number
    for kind in torch.unique(kinds):
        alike = (kinds == kind).nonzero()[:, 0]
        height, width, most = shapes[:, alike].amax(1).tolist()
        for part in torch.split(alike, max(1, BLOCK // (height * width))):
            rows, weights_down = _pixels(y, row[part], height)
            columns, weights_across = _pixels(x, column[part], width)
            found = _highest(corners[:, :, part], contenders[part, :most], weights_down, weights_across)
            labels[rows[:, :, None], columns[:, None, :]] = found.to(labels.dtype)


def _contenders(corners: Tensor) -> tuple[Tensor, Tensor]:
    """The classes that can win in a cell, and how many they are.

    A class whose highest corner is below another's lowest wins nowhere between them.

    Args:
        corners: Scores around every cell, (taps, taps, M, C).

    Returns:
        Class ids, int64 (M, most), in ascending order, filled up with the first; and int64 (M,).
    """
    bar = corners.amin((0, 1)).amax(1, keepdim=True)
    cell, winner = (corners.amax((0, 1)) >= bar).nonzero(as_tuple=True)  # by cell, then by class
    count = torch.bincount(cell, minlength=corners.shape[2])
    before = count.cumsum(0) - count
    contenders = winner[before][:, None].repeat(1, int(count.max()))
    contenders[cell, torch.arange(len(cell), device=cell.device) - before[cell]] = winner
    return contenders, count


def _pixels(axis: Mixture, cells: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """The first `size` pixels of some cells, (M, size), and their weights, (M, size, taps).

    A cell that has fewer has its last one several times.
    """
    steps = torch.arange(size, device=cells.device)
    pixels = axis.start[cells][:, None] + torch.minimum(steps, axis.size[cells][:, None] - 1)
    return pixels, axis.weights[pixels]


def _highest(corners: Tensor, contenders: Tensor, weights_down: Tensor, weights_across: Tensor) -> Tensor:
    """The contender with the highest score in every pixel of some cells, the first of equal ones.

    Args:
        corners: (taps, taps, M, C).
        contenders: Class ids, int64 (M, k).
        weights_down: (M, height, taps).
        weights_across: (M, width, taps).

    Returns:
        Class ids, int64 (M, height, width).
    """
    corners = corners.gather(3, contenders.expand(*corners.shape[:2], -1, -1)).permute(3, 2, 0, 1)
    weights_across = weights_across.transpose(1, 2)  # (M, taps, width)
    best, winner = None, contenders[:, 0, None, None]
    for corner, contender in zip(corners, contenders.unbind(1), strict=True):  # (M, taps, taps) and (M,)
        values = weights_down @ corner @ weights_across  # (M, height, width)
        if best is None:
            best = values
        else:
            winner = torch.where(values > best, contender[:, None, None], winner)
            best = torch.maximum(best, values)
    return winner
