"""Convolutions on processors with weights that lie as the library wants them, once and for all.

PyTorch's library for processors, oneDNN, computes with weights in blocks that suit the processor, and brings
them there at every call. For one image of a small network that takes up to a fifth of the time; here it is
done once. A ReLU after a convolution is computed with it, before its numbers go to memory. The numbers are
the same, in every bit where PyTorch would have asked oneDNN.

The functions are those by which `torch.compile` reaches oneDNN, and have no public names. Where they are
missing networks stay as they are.
"""

from __future__ import annotations

import functools
from typing import Any, cast

import torch
from torch import Tensor, nn

from segcli.models.backbones import ResidualBlock, ResNet
from segcli.models.strips import Rows, Shape, convolution_rows, operation

# Modules that apply their layers one after the other, as they are registered, and each of them once. (Those
# of torchvision's residual blocks share one ReLU.)
IN_ORDER = (nn.Sequential, ResNet, ResidualBlock)
REMEMBERED = 256  # sizes of maps


@functools.cache
def can_pack(dtype: torch.dtype) -> bool:
    """Whether PyTorch has these functions, for numbers of that type on this processor."""
    try:
        # A layer without numbers, which would draw none, takes an import of more than a second.
        with torch.random.fork_rng(devices=[]):
            layer = nn.Conv2d(1, 1, 1, dtype=dtype)
        PackedConv2d(layer)(torch.zeros(1, 1, 1, 1, dtype=dtype))
    except (AttributeError, RuntimeError, TypeError):
        return False
    return True


def pack(network: nn.Module) -> None:
    """Let the convolutions of a network be computed with packed weights, in place; not those called score_*.

    Args:
        network: On the CPU, for inference, its weights of a type for which this can be done, see `can_pack`.
    """
    for parent in list(network.modules()):
        last: PackedConv2d | None = None  # if nothing came after it but what was folded into it
        for name, layer in list(parent.named_children()):
            if isinstance(layer, nn.Conv2d) and not name.startswith("score_"):
                last = PackedConv2d(layer)
                setattr(parent, name, last)
            elif isinstance(layer, nn.ReLU) and last and isinstance(parent, IN_ORDER):
                last.then = "relu"
                setattr(parent, name, nn.Identity())
            if not isinstance(layer, nn.Conv2d | nn.Identity):
                last = None


def multiplications() -> dict[Any, Any]:
    """How `torch.utils.flop_counter` counts what is computed here."""
    from torch.utils.flop_counter import conv_flop_count

    def counted(x: Any, weight: Any, *_: Any, out_shape: Any, **__: Any) -> int:
        return conv_flop_count(x, weight, out_shape)

    return {torch.ops.mkldnn._convolution_pointwise: counted} if can_pack(torch.float32) else {}


def _rows(shape: Shape, layer: PackedConv2d) -> Rows:
    window = layer.kernel_size, layer.stride, layer.padding, layer.dilation
    beside = 0, layer.padding[1]
    return convolution_rows(shape, layer.out_channels, *window, lambda part: layer.computed(part, beside))


@operation(_rows)
def convolve_packed(x: Tensor, layer: PackedConv2d) -> Tensor:
    """What the layer makes of a map, (N, C, H, W)."""
    return layer.computed(x, layer.padding)


class PackedConv2d(nn.Module):
    """A convolution with packed weights, and maybe a ReLU after it.

    How the library wants them depends on the size of the map, too, but there are only a few ways: they are
    kept beside the weights themselves.

    Args:
        layer: The convolution.
    """

    def __init__(self, layer: nn.Conv2d) -> None:
        super().__init__()
        self.out_channels = layer.out_channels
        self.kernel_size = cast(tuple[int, int], layer.kernel_size)
        self.stride = cast(tuple[int, int], layer.stride)
        self.padding = cast(tuple[int, int], layer.padding)
        self.dilation = cast(tuple[int, int], layer.dilation)
        self.groups = layer.groups
        self.weight = layer.weight.detach().to_mkldnn()
        self.bias = None if layer.bias is None else layer.bias.detach()
        self.then = "none"  # or "relu"
        self._ways: dict[bytes, Tensor] = {}  # packed weights, by the library's description of how they lie
        self._seen: dict[tuple[int, ...], Tensor] = {}  # the same by size and padding of a map

    def forward(self, x: Tensor) -> Tensor:
        return convolve_packed(x, self)

    def computed(self, x: Tensor, padding: tuple[int, int]) -> Tensor:
        """The same with another padding."""
        window = padding, self.stride, self.dilation, self.groups
        key = *x.shape, *padding
        weight = self._seen.get(key)
        if weight is None:
            if len(self._seen) == REMEMBERED:
                self._seen.clear()
            reorder: Any = torch._C._nn.mkldnn_reorder_conv2d_weight  # the stub lacks the map's size
            packed = reorder(self.weight, *window, x.shape)
            way = torch.ops.mkldnn._get_mkldnn_serialized_md(packed).numpy().tobytes()
            weight = self._seen[key] = self._ways.setdefault(way, packed)
        made = torch.ops.mkldnn._convolution_pointwise(x, weight, self.bias, *window, self.then, [], "")
        return cast(Tensor, made)
