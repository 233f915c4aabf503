"""A network made ready to predict: the same scores in less time, or nearly the same in half precision.

Seven things are done, on a copy that shares what weights stay as they are:

- Batch normalisation after a convolution is folded into its weights; at inference both are linear.
- VGG16 networks are computed only where the image can reach, see `windowed`.
- In float32 on processors most of their convolutions take a quarter of the multiplications, see `winograd`.
- A last upsampling that was fixed to bilinear interpolation is computed as that, and multiplies by no zeros.
- Weights become bfloat16 or float16 where that was asked for. The head of an FCN, which scores, upsamples and
  adds, stays in float32: it is little work, and scores of different strides nearly cancel at borders.
- Maps and weights lie channels last, as the convolutions of processors and GPUs want them.
- On processors weights are brought into the order in which they are used beforehand, see `packed`.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from segcli.models.fcn import FCN, FINAL_LAYER, Bilinear, Features, Network, is_bilinear
from segcli.models.packed import can_pack, pack
from segcli.models.windowed import WindowedVGG16, windowed

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def prepare(network: Network, device: torch.device, precision: str = "fp32") -> Network:
    """The network for inference on a device: float32 images to float32 scores.

    Args:
        network: In evaluation mode or not; it is not changed, and its weights must not change while the
            result is in use.
        device: Where to compute.
        precision: fp32, bf16 or fp16, see `device.pick_precision`.
    """
    return PreparedNetwork(network, device, DTYPES[precision])


class PreparedNetwork(Network):
    """See `prepare`."""

    def __init__(self, network: Network, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__()
        self.num_classes = network.num_classes
        self.stride = network.stride
        self.dtype = dtype
        by_tiles = device.type == "cpu" and dtype == torch.float32
        self.network = windowed(interpolating(folded(sharing_copy(network).to(device).eval())), by_tiles)
        _to_dtype(self.network, dtype)
        # Apple's GPUs have no such layout. VGG16's half a gigabyte is not copied only to lie otherwise.
        self.format = torch.contiguous_format if device.type == "mps" else torch.channels_last
        if dtype != torch.float32 or not isinstance(self.network, WindowedVGG16):
            self.network.to(memory_format=self.format)
        if device.type == "cpu" and not isinstance(self.network, WindowedVGG16) and can_pack(dtype):
            pack(self.network)
        self.eval()

    def score_pyramid(self, images: Tensor) -> list[Tensor]:
        images = images.to(self.dtype, memory_format=self.format)
        if isinstance(self.network, FCN | WindowedVGG16):
            maps = self.network.features(images)
            return self.network.score_features(Features(*(part.float() for part in maps)))
        return [scores.float() for scores in self.network.score_pyramid(images)]

    def upsample(self, scores: Tensor, size: tuple[int, int]) -> Tensor:
        return self.network.upsample(scores, size)


def sharing_copy(network: Network) -> Network:
    """A copy with modules of its own around the same numbers in memory."""
    same: dict[int, Tensor] = {id(buffer): buffer for buffer in network.buffers()}
    same |= {id(p): nn.Parameter(p.detach(), requires_grad=False) for p in network.parameters()}
    return copy.deepcopy(network, same)  # what is in the second argument counts as copied


def folded(network: Network) -> Network:
    """Fold every batch normalisation that directly follows a convolution into it, in place.

    In all encoders here a normalisation is registered right after the convolution that it is applied to.
    """
    for module in list(network.modules()):
        previous, before = "", None
        for name, layer in list(module.named_children()):
            if isinstance(layer, nn.BatchNorm2d) and isinstance(before, nn.Conv2d):
                setattr(module, previous, fuse_conv_bn_eval(before, layer))
                setattr(module, name, nn.Identity())
            previous, before = name, layer
    return network


def interpolating(network: Network) -> Network:
    """Let a last upsampling that is a layer of bilinear kernels be computed as interpolation, in place."""
    if isinstance(network, FCN):
        name = FINAL_LAYER[network.stride]
        layer = getattr(network, name, None)
        if isinstance(layer, nn.ConvTranspose2d) and is_bilinear(layer) and layer.kernel_size[0] % 2 == 0:
            setattr(network, name, Bilinear(network.stride, trimmed=False))
    return network


def _to_dtype(network: Network, dtype: torch.dtype) -> None:
    """Cast all weights but those of the head, in place."""
    head = {
        name: parameter.detach()
        for name, parameter in network.named_parameters()
        if any(part.startswith(("score_", "upscore")) for part in name.split("."))
    }
    network.to(dtype)
    for name, values in head.items():
        network.get_parameter(name).data = values
