"""FCNs on VGG16, exactly as released in shelhamer/fcn.berkeleyvision.org (voc-fcn{32,16,8}s/net.py).

Simonyan & Zisserman 2015, configuration D, with its two 4096-wide fully connected layers turned into
convolutions (FCN paper, section 3.1). conv1_1 pads by 100 pixels so that fc6, 7x7 and unpadded, sees enough
of any image; the crop offsets 5, 9 and 31 follow from that padding and are derived here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from fractions import Fraction
from typing import cast

import torch.nn.functional as F
from torch import Tensor, nn

from segcli.errors import CheckpointError
from segcli.models.fcn import FCN, Alignment, Channels, Features, Window, crop_offset, position

CONVOLUTIONS_PER_STAGE = (2, 2, 3, 3, 3)
WIDTHS = (64, 128, 256, 512, 512, 4096)  # stages 1 to 5, then fc6 and fc7
FIRST_PADDING = 100
CLASSIFIER_SIDE = 7  # VGG16's classifier sees 7x7 features


def convolution_names(stage: int) -> list[str]:
    """The convolutions of a stage (1 to 5)."""
    return [f"conv{stage}_{number}" for number in range(1, CONVOLUTIONS_PER_STAGE[stage - 1] + 1)]


def stage_windows(last_stage: int) -> list[Window]:
    """The windows from the image to the pooling of a stage (1 to 5)."""
    windows: list[Window] = []
    for stage in range(last_stage):
        convolutions = [Window(3, padding=1)] * CONVOLUTIONS_PER_STAGE[stage]
        if stage == 0:
            convolutions[0] = Window(3, padding=FIRST_PADDING)
        windows += [*convolutions, Window(2, stride=2)]
    return windows


def released_alignment(stride: int) -> Alignment:
    """Crop offsets of the released nets: 5 and 9 on the skips; 19, 27 or 31 on the output."""
    origin = Fraction(0)
    fc7 = [*stage_windows(5), Window(CLASSIFIER_SIDE), Window(1)]
    twice = [Window(4, stride=2)]
    upscore2 = position(origin, fc7, twice)
    score_pool4 = crop_offset(upscore2, position(origin, stage_windows(4)))
    upscore_pool4 = position(origin, fc7, twice * 2)
    score_pool3 = crop_offset(upscore_pool4, position(origin, stage_windows(3)))
    doublings = {32: 0, 16: 1, 8: 2}[stride]
    output = position(origin, fc7, [*twice * doublings, Window(2 * stride, stride=stride)])
    # A skip crop moves the map's origin, so the output lies that much further out for every doubling
    # after it; position() already counts it, because the fused map keeps the coarse map's origin.
    return Alignment(score_pool4, score_pool3, crop_offset(origin, output), trimmed=False)


class VGG16FCN(FCN):
    """FCN-32s, FCN-16s or FCN-8s on VGG16; parameters carry the names of the released Caffe layers.

    Args:
        num_classes: Number of classes.
        stride: 32, 16 or 8.
        scales: (0.01, 0.0001) gives the at-once net.
        widths: Channels of the five stages and of fc6 and fc7.
    """

    def __init__(
        self,
        num_classes: int,
        stride: int,
        scales: tuple[float, float] = (1.0, 1.0),
        widths: tuple[int, ...] = WIDTHS,
    ) -> None:
        channels = Channels(pool3=widths[2], pool4=widths[3], fc7=widths[5])
        super().__init__(
            num_classes, channels, stride, released_alignment(stride), scales, learned_output=True
        )
        before = 3
        for stage, width in enumerate(widths[:-1], start=1):
            for name in convolution_names(stage):
                padding = FIRST_PADDING if name == "conv1_1" else 1
                self.add_module(name, nn.Conv2d(before, width, 3, padding=padding))
                before = width
        self.fc6 = nn.Conv2d(before, widths[5], CLASSIFIER_SIDE)
        self.fc7 = nn.Conv2d(widths[5], widths[5], 1)
        self.dropout = nn.Dropout2d(0.5)

    def features(self, images: Tensor) -> Features:
        x = images
        pools = []
        for stage in range(1, len(CONVOLUTIONS_PER_STAGE) + 1):
            x = self.encode_stage(x, stage)
            pools.append(x)  # (N, C, (H + 198) / 2**stage, ...), rounded up
        x = self.dropout(F.relu(self.fc6(x), inplace=True))
        x = self.dropout(F.relu(self.fc7(x), inplace=True))
        return Features(pool3=pools[2], pool4=pools[3], fc7=x)

    def encode_stage(self, x: Tensor, stage: int) -> Tensor:
        """The output of a stage (1 to 5) from that of the stage before, or from the images."""
        return run_stage(x, stage, lambda x, name: cast(Tensor, self.get_submodule(name)(x)))


def run_stage(x: Tensor, stage: int, convolve: Callable[[Tensor, str], Tensor]) -> Tensor:
    """The output of a stage (1 to 5), where `convolve` does what the convolution of a name does."""
    for name in convolution_names(stage):
        x = F.relu(convolve(x, name), inplace=True)
    return F.max_pool2d(x, 2, ceil_mode=True)


def convolutionalize(network: VGG16FCN, classifier: Mapping[str, Tensor]) -> None:
    """Start a network from a VGG16 image classifier: its fully connected layers become fc6 and fc7.

    Args:
        network: Changed in place; the score layers stay as they are.
        classifier: State dict of torchvision's vgg16 (features.*, classifier.0 and classifier.3). The last
            classifier layer, which knows ImageNet's classes, is left out.

    Raises:
        CheckpointError: A parameter is missing or has another shape.
    """
    names = [name for stage in range(1, 6) for name in convolution_names(stage)]
    sources = [f"features.{index}" for index in (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28)]
    pairs = dict(zip([*names, "fc6", "fc7"], [*sources, "classifier.0", "classifier.3"], strict=True))
    own = network.state_dict()
    for target, source in pairs.items():
        for part in ("weight", "bias"):
            value = classifier.get(f"{source}.{part}")
            parameter = own[f"{target}.{part}"]
            if value is None or value.numel() != parameter.numel():
                found = "missing" if value is None else f"of shape {tuple(value.shape)}"
                raise CheckpointError(f"{source}.{part} of the VGG16 classifier is {found}; "
                                      f"{target}.{part} needs {tuple(parameter.shape)}")  # fmt: skip
            parameter.copy_(value.view(parameter.shape))  # (4096, 25088) -> (4096, 512, 7, 7)
