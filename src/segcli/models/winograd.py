"""Convolutions of 3 x 3 with a quarter of the multiplications: Winograd's minimal filtering.

Lavin & Gray 2016, "Fast Algorithms for Convolutional Neural Networks", F(4 x 4, 3 x 3): a tile of 6 x 6
pixels gives 4 x 4 outputs by 36 multiplications for every pair of channels, where sums over kernels take 144.
Tile, kernel and product are seen as polynomials, given by their values at points: their product needs one
multiplication for each point. In two dimensions,

    output = A^T [(G kernel G^T) * (B^T tile B)] A

where * multiplies number by number; summed over channels it is 36 products of matrices. The points follow
Barabasz et al. 2020, "Error Analysis and Improving the Accuracy of Winograd Convolution for Deep Neural
Networks": in float32 they err two thirds as much as 0, 1, -1, 2, -2.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from segcli.models.strips import Rows, Shape, operation, sliding

KERNEL = 3
STEP = 4  # outputs of a tile along each axis
TILE = STEP + KERNEL - 1
POINTS = (0.0, 1.0, -1.0, 0.5, -2.0)  # and infinity
NUMBERS = 3 << 19  # that tiles hold at a time, 6 MB in float32: what stays in the caches of a processor

Product = Callable[[Tensor], Tensor]  # (..., pixels, K) to (..., pixels, O)


@functools.cache
def transforms() -> tuple[Tensor, Tensor, Tensor]:
    """B^T (6, 6), G (6, 3) and A^T (4, 6) in float64. B and A hold their numbers exactly in any type.

    The values of a kernel and of the outputs at the points, of which the tile's follow: with Lagrange's
    polynomials, whose denominators go to the kernel.
    """
    points = np.array(POINTS)
    others = [np.delete(points, place) for place in range(len(points))]
    tile = np.zeros((TILE, TILE))
    for row, roots in zip(tile, [*others, points], strict=True):
        row[: len(roots) + 1] = np.poly(roots)[::-1]
    denominators = np.array([np.prod(point - roots) for point, roots in zip(points, others, strict=True)])
    kernel = np.vander(points, KERNEL, increasing=True) / denominators[:, None]
    output = np.vander(points, STEP, increasing=True)
    kernel, output = (np.vstack([part, np.eye(TILE)[-1, -part.shape[1] :]]) for part in (kernel, output))
    return torch.from_numpy(tile), torch.from_numpy(kernel), torch.from_numpy(output.T.copy())


def transformed(weight: Tensor) -> Tensor:
    """The kernels of a convolution, (O, C, 3, 3), at all points: (TILE * TILE, O, C)."""
    kernel = transforms()[1].to(weight.device)
    values = torch.einsum("ai,bj,ocij->aboc", kernel, kernel, weight.detach().double())
    return values.flatten(0, 1).to(weight.dtype).contiguous()


def _rows(shape: Shape, product: Product, bias: Tensor, padding: int) -> Rows:
    grown = 2 * padding - (KERNEL - 1)
    made = (shape[0], len(bias), shape[2] + grown, shape[3] + grown)
    return sliding(made, (KERNEL, 1, padding), 0, lambda part: _convolved(part, product, bias, (padding, 0)))


@operation(_rows)
def convolve_by_tiles(x: Tensor, product: Product, bias: Tensor, padding: int) -> Tensor:
    """`F.conv2d(x, weight, bias, padding=padding)`, where `product` multiplies by `transformed(weight)`."""
    return _convolved(x, product, bias, (padding, padding))


def _convolved(x: Tensor, product: Product, bias: Tensor, padding: tuple[int, int]) -> Tensor:
    """The same for a padding to the left and right, and one above and below."""
    tile, _, output = (part.to(x) for part in transforms())
    in_both_axes = [torch.kron(part, part) for part in (tile, output)]  # (36, 36), (16, 36)
    across, down = padding
    height, width = x.shape[2] + 2 * down - (KERNEL - 1), x.shape[3] + 2 * across - (KERNEL - 1)
    x = F.pad(x, (across, across + -width % STEP, down, down + -height % STEP)).permute(0, 2, 3, 1)
    tiles = x.unfold(1, TILE, STEP).unfold(2, TILE, STEP)  # (N, rows, columns, C, TILE, TILE)
    size, rows, columns, channels = tiles.shape[:4]
    outputs = x.new_empty((size, rows, STEP, columns, STEP, len(bias)))
    at_a_time = max(1, NUMBERS // (TILE * TILE * size * columns * channels))
    for top in range(0, rows, at_a_time):
        some = tiles[:, top : top + at_a_time].permute(4, 5, 0, 1, 2, 3).reshape(TILE * TILE, -1)
        values = product((in_both_axes[0] @ some).view(TILE * TILE, -1, channels))
        made = (in_both_axes[1] @ values.flatten(1)).view(STEP, STEP, size, -1, columns, len(bias)).add_(bias)
        outputs[:, top : top + at_a_time] = made.permute(2, 3, 0, 4, 1, 5)
    whole = outputs.view(size, rows * STEP, columns * STEP, len(bias))
    return whole[:, :height, :width].permute(0, 3, 1, 2)
