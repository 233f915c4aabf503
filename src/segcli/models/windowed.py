"""The VGG16 networks computed only where the image can reach: the same scores in less than half the time.

The released nets pad the image by 100 pixels on every side. Over that border the maps of stages 1 to 4 hold
what an empty canvas would give: a constant per channel, but for a narrow ring along the canvas's edge, where
convolutions see their zero padding. So only the window that the image can reach is computed:

- Maps are kept as differences u from their constant c. Then u = 0 outside the window, and ordinary zero
  padding continues the window by that constant. With a = bias + sum(W) c the next constant is relu(a), and

      relu(W * (u + c) + bias) - relu(a) = max(W * u + min(a, 0), -relu(a)).

- Max pooling commutes with the difference. Windows are widened to whole pooling windows.
- The window never meets the ring before stage 5. Stage 5, fc6 and fc7 see the whole canvas: the window laid
  on what an empty canvas gives. That comes from a small empty canvas, stretched along its constant middle.

More is done as processors like it: maps lie channels last, for which PyTorch pools seven times as fast on a
CPU, fc6 and fc7 are matrix products, for their 478 MB of weights take long to rearrange for a convolution of
so few pixels, and stages 3 to 5 are convolved by tiles, see `winograd`. See docs/performance.md.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from segcli.models.fcn import Features, Network
from segcli.models.strips import Rows, Shape, operation, sliding
from segcli.models.vgg import FIRST_PADDING, VGG16FCN, convolution_names, run_stage, stage_windows
from segcli.models.winograd import Product, convolve_by_tiles, transformed

STAGES = (1, 2, 3, 4)  # in stage 5 the image reaches the ring along the canvas's edge
BY_TILES = (3, 4, 5)  # stages of so many channels that Winograd's tiles cost less than they save
BY_MATRIX = ("fc6", "fc7")
SEEN_WHOLE = (3, 4)  # stages whose maps are scored or go on to stage 5
PATCHES = 1 << 24  # numbers that fc6 sees at a time, however large the image


class Span(NamedTuple):
    """The pixels start to stop - 1 along one axis of a map."""

    start: int
    stop: int


class Axis(NamedTuple):
    """One axis of the map that a stage puts out.

    Attributes:
        widened: Zeros to add before and after the window at the stage's input, so that it ends up as whole
            pooling windows.
        window: What is computed: all that the image can reach.
        constant: Where an empty canvas gives its constant.
        length: Pixels of the whole map.
    """

    widened: tuple[int, int]
    window: Span
    constant: Span
    length: int

    @property
    def outside(self) -> tuple[int, int]:
        """Pixels before and after the window."""
        return self.window.start, self.length - self.window.stop


def trace(length: int, stages: int = len(STAGES)) -> list[Axis]:
    """One axis through the first stages, for an image of `length` pixels.

    Of an empty canvas the length may be negative, as far as the padding makes up for it.
    """
    window = Span(0, length)
    constant = Span(-FIRST_PADDING, length + FIRST_PADDING)  # padding continues an empty image
    axes = []
    for stage in range(1, stages + 1):
        *convolutions, pooling = stage_windows(stage)[len(stage_windows(stage - 1)) :]
        for kernel, _, padding in convolutions:
            # The output o sees the inputs o - padding to o + beyond.
            beyond = kernel - 1 - padding
            window = Span(window.start - beyond, window.stop + padding)
            constant = Span(constant.start + padding, constant.stop - beyond)
            length += padding - beyond
        step = pooling.stride
        before, after = window.start % step, -window.stop % step
        window = Span((window.start - before) // step, (window.stop + after) // step)
        constant = Span(-(-constant.start // step), constant.stop // step)
        length = -(-length // step)
        axes.append(Axis((before, after), window, constant, length))
    return axes


def smallest_alike(length: int) -> int:
    """The length of the smallest image, maybe negative, whose empty canvas has the same edges.

    Canvases whose lengths differ by a multiple of all pooling strides differ by constant pixels only.
    """
    period = math.prod(window.stride for window in stage_windows(len(STAGES)))
    while all(axis.constant.start < axis.constant.stop for axis in trace(length - period)):
        length -= period
    return length


def stretched(small: Axis, large: Axis, device: torch.device) -> Tensor:
    """The pixels of a small empty canvas's map that make up the large one's: its middle is repeated.

    Returns:
        int64 (length,) on the device. Nothing is brought there, which would make a GPU wait.
    """
    place, repeated = torch.arange(large.length, device=device), large.length - small.length
    return torch.maximum(place.clamp(max=small.constant.start), place - repeated)


def _canvas_rows(
    shape: Shape, small: Tensor, rows: Tensor, columns: Tensor, outside: tuple[int, int, int, int]
) -> Rows:
    left, right, top, _ = outside

    def compute(parts: list[Tensor], above: int, below: int, start: int, stop: int) -> Tensor:
        return on_canvas(parts[0], small, rows[start:stop], columns, (left, right, above, below))

    canvas = (*shape[:2], len(rows), len(columns))
    return Rows(canvas, lambda start, stop: (start - top, stop - top), compute)


@operation(_canvas_rows)
def on_canvas(
    u: Tensor, small: Tensor, rows: Tensor, columns: Tensor, outside: tuple[int, int, int, int]
) -> Tensor:
    """A map of the whole canvas, (N, C, H, W), from the window of differences `u`.

    Args:
        u: (N, C, h, w).
        small: The map of a small empty canvas, (h', w', C).
        rows, columns: Its pixels that make up the large empty canvas, int64 (H,) and (W,).
        outside: Pixels of the large canvas to the left and right of the window, above and below it.
    """
    empty = small[rows[:, None], columns].permute(2, 0, 1)
    return empty.to(u.dtype) + F.pad(u, outside)


def _lie_last(weight: Tensor) -> bool:
    return weight.is_contiguous(memory_format=torch.channels_last)


def as_matrix(weight: Tensor) -> Tensor:
    """A convolution's kernels as they lie in memory: fc6's as (4096, 7 * 7 * 512) or (4096, 512 * 7 * 7)."""
    return (weight.permute(0, 2, 3, 1) if _lie_last(weight) else weight).flatten(1)


def _matrix_rows(shape: Shape, weight: Tensor, linear: Product) -> Rows:
    side = weight.shape[-1]
    made = (shape[0], len(weight), *(length - side + 1 for length in shape[2:]))
    return sliding(made, (side, 1, 0), 0, lambda part: convolve_by_matrix(part, weight, linear))


@operation(_matrix_rows)
def convolve_by_matrix(x: Tensor, weight: Tensor, linear: Product) -> Tensor:
    """`F.conv2d(x, weight, bias)` for a square kernel, where `linear` takes all that the kernel covers at a
    pixel times `as_matrix(weight)`, and adds the bias."""
    side, numbers = weight.shape[-1], weight[0].numel()
    patches = x.permute(0, 2, 3, 1).unfold(1, side, 1).unfold(2, side, 1)  # (N, h, w, C, side, side)
    if _lie_last(weight):
        patches = patches.permute(0, 1, 2, 4, 5, 3)
    size, height, width = patches.shape[:3]
    rows = max(1, PATCHES // (size * width * numbers))
    outputs = x.new_empty((size, height, width, len(weight)))
    for top in range(0, height, rows):
        covered = patches[:, top : top + rows].reshape(size, -1, numbers)
        outputs[:, top : top + rows] = linear(covered).view(size, -1, width, len(weight))
    return outputs.permute(0, 3, 1, 2)


def _halved_rows(shape: Shape) -> Rows:
    made = (*shape[:2], shape[2] // 2, shape[3] // 2)
    return sliding(made, (2, 2, 0), 0, halved)


@operation(_halved_rows)
def halved(x: Tensor) -> Tensor:
    """`F.max_pool2d(x, 2)` for even sides. That also notes where every maximum was, in more bytes than it."""
    x = torch.maximum(x[:, :, ::2], x[:, :, 1::2])
    return torch.maximum(x[..., ::2], x[..., 1::2])


def windowed(network: Network, by_tiles: bool = False) -> Network:
    """The network for inference: a `WindowedVGG16` around the VGG16 ones, any other as it is."""
    return WindowedVGG16(network, by_tiles) if isinstance(network, VGG16FCN) else network


class WindowedVGG16(Network):
    """A VGG16 network with the weights it has now, computed where the image can reach.

    Args:
        network: A `VGG16FCN`, or one derived from it. It is shared, not copied, and put in evaluation mode;
            make this anew when its weights have changed.
        by_tiles: Compute the convolutions of the stages in `BY_TILES` by Winograd's tiles, with a quarter of
            their multiplications and four times their weights in memory, 231 MB more at full width.
    """

    def __init__(self, network: VGG16FCN, by_tiles: bool = False) -> None:
        super().__init__()
        self.num_classes = network.num_classes
        self.stride = network.stride
        self.network = network
        self.eval()
        # Small empty canvases, 0.4 MB each at full width: at most one for every size modulo 16.
        self._remembered: dict[tuple[object, ...], dict[int, Tensor]] = {}
        self._remembering = threading.Lock()  # several images may be computed at a time
        first = self._convolution("conv1_1")
        constant = first.weight.new_zeros(first.in_channels)
        for stage in STAGES:
            for name in convolution_names(stage):
                weight, bias = self._convolution(name).weight, self._bias(name)
                answer = (weight.sum((2, 3)) @ constant + bias).detach()
                constant = answer.relu()
                self.register_buffer(f"{name}_bias", answer.clamp(max=0), persistent=False)
                self.register_buffer(f"{name}_floor", -constant[:, None, None], persistent=False)
        self.by_tiles = tuple(name for stage in BY_TILES for name in convolution_names(stage) if by_tiles)
        for name in self.by_tiles:
            values = transformed(self._convolution(name).weight)
            self.register_buffer(f"{name}_tiles", values, persistent=False)

    def score_pyramid(self, images: Tensor) -> list[Tensor]:
        return self.score_features(self.features(images))

    def score_features(self, features: Features) -> list[Tensor]:
        """The head: the score pyramid from the encoder's feature maps."""
        return self.network.score_features(features)

    def upsample(self, scores: Tensor, size: tuple[int, int]) -> Tensor:
        return self.network.upsample(scores, size)

    def features(self, images: Tensor) -> Features:
        """What the network's own `features` gives, up to rounding."""
        height, width = images.shape[-2:]
        empty = self._empty_canvas(height, width)
        maps = {}
        # Differences from the constant, (N, C, window's height, window's width)
        u = images.contiguous(memory_format=torch.channels_last)
        for stage, y, x in zip(STAGES, trace(height), trace(width), strict=True):
            if any(x.widened + y.widened):
                u = F.pad(u, x.widened + y.widened)
            u = self.compute_window(u, stage)
            if stage in SEEN_WHOLE:
                maps[stage] = on_canvas(u, *empty[stage], x.outside + y.outside)
        return Features(pool3=maps[3], pool4=maps[4], fc7=self.compute_whole(maps[4]))

    def compute_window(self, u: Tensor, stage: int) -> Tensor:
        """What a stage (1 to 4) makes of its widened window; both are differences."""
        return self.pooled_window(u, stage, halved)

    def pooled_window(self, u: Tensor, stage: int, pool: Callable[[Tensor], Tensor]) -> Tensor:
        """The same by any way of pooling.

        Its last ReLU comes after pooling, where it has a quarter of the numbers to do: the maximum of some
        numbers that are raised to a floor is their maximum, raised to it.
        """
        *names, last = convolution_names(stage)
        for name in names:
            u = self._rectified(self._grown(u, name), name)
        return self._rectified(pool(self._grown(u, last)), last)

    def _grown(self, u: Tensor, name: str) -> Tensor:
        """What a convolution makes of differences. The window grows by all outputs that see a pixel of it."""
        padding = self._convolution(name).weight.shape[-1] - 1
        return self._convolved(u, name, self.get_buffer(f"{name}_bias"), padding)

    def _convolved(self, x: Tensor, name: str, bias: Tensor, padding: int) -> Tensor:
        if name in self.by_tiles:
            return convolve_by_tiles(x, self.product(name), bias, padding)
        return F.conv2d(x, self._convolution(name).weight, bias, padding=padding)

    def _rectified(self, u: Tensor, name: str) -> Tensor:
        """The ReLU after a convolution, of differences, in place."""
        return u.clamp_(min=self.get_buffer(f"{name}_floor").to(u.dtype))

    def compute_whole(self, pool4: Tensor) -> Tensor:
        """fc7 of the whole canvas from pool4: stage 5, fc6 and fc7."""

        def convolve(x: Tensor, name: str) -> Tensor:
            return self._convolved(x, name, self._bias(name), 1)

        x = run_stage(pool4, 5, convolve)
        for name in BY_MATRIX:
            x = convolve_by_matrix(x, self._convolution(name).weight, self.product(name)).relu_()
        return x

    def product(self, name: str) -> Product:
        """What a layer in `BY_MATRIX` does, or what multiplies by the kernels of a convolution by tiles."""
        if name in self.by_tiles:
            return partial(torch.matmul, other=self.kernels(name).mT)
        return partial(F.linear, weight=as_matrix(self._convolution(name).weight), bias=self._bias(name))

    def kernels(self, name: str) -> Tensor:
        """Those of a convolution by tiles, see `winograd.transformed`."""
        return self.get_buffer(f"{name}_tiles")

    def _convolution(self, name: str) -> nn.Conv2d:
        layer = self.network.get_submodule(name)
        assert isinstance(layer, nn.Conv2d)
        return layer

    def _bias(self, name: str) -> Tensor:
        bias = self._convolution(name).bias
        assert bias is not None
        return bias

    def _empty_canvas(self, height: int, width: int) -> dict[int, tuple[Tensor, Tensor, Tensor]]:
        """The maps of the stages in `SEEN_WHOLE` for an empty image: what `on_canvas` makes them of."""
        small_height, small_width = smallest_alike(height), smallest_alike(width)
        constant = -self.get_buffer("conv1_1_floor")  # (C, 1, 1)
        key = (small_height, small_width, constant.dtype, constant.device)
        with self._remembering:
            if key not in self._remembered:
                self._remembered[key] = self._small_empty_canvas(constant, small_height, small_width)
            smalls = self._remembered[key]
        maps = {}
        for stage, small in smalls.items():
            rows = stretched(trace(small_height)[stage - 1], trace(height)[stage - 1], small.device)
            columns = stretched(trace(small_width)[stage - 1], trace(width)[stage - 1], small.device)
            maps[stage] = small, rows, columns
        return maps

    def _small_empty_canvas(self, constant: Tensor, height: int, width: int) -> dict[int, Tensor]:
        """The same with the channels last, (h, w, C); sizes may be negative. `constant` is conv1_1's."""
        # It is kept for other calls, so this one's precision and autograd mode must not stick to it.
        plain = torch.autocast(constant.device.type, enabled=False)
        with torch.inference_mode(False), torch.no_grad(), plain:
            first = stage_windows(1)[0]
            grown = 2 * first.padding - (first.kernel - 1)
            x = constant.expand(1, -1, height + grown, width + grown)  # after conv1_1
            maps = {}
            for stage in STAGES:
                for name in convolution_names(stage):
                    if name != "conv1_1":
                        x = self._convolution(name)(x).relu_()
                x = F.max_pool2d(x, 2, ceil_mode=True)
                if stage in SEEN_WHOLE:
                    maps[stage] = x[0].permute(1, 2, 0).contiguous()
        return maps
