"""FCN-AlexNet exactly as released in shelhamer/fcn.berkeleyvision.org (voc-fcn-alexnet/net.py).

Krizhevsky et al. 2012 in the variant that Caffe calls CaffeNet: pooling comes before local response
normalisation, conv2, conv4 and conv5 are in two groups. Its fully connected layers became convolutions; one
stream, stride 32, upsampled by a 63 x 63 kernel. The crop offset 18 follows from conv1's padding of 100.
"""

from __future__ import annotations

from fractions import Fraction

import torch.nn.functional as F
from torch import Tensor, nn

from segcli.models.fcn import FCN, Alignment, Channels, Features, Window, crop_offset, position, upsampling

WIDTHS = (96, 256, 384, 384, 256, 4096)  # conv1 to conv5, then fc6 and fc7
STRIDE = 32
OUTPUT_KERNEL = 63
FIRST_PADDING = 100
POOLING = Window(3, stride=2)
CONVOLUTIONS = (
    Window(11, stride=4, padding=FIRST_PADDING),
    Window(5, padding=2),
    Window(3, padding=1),
    Window(3, padding=1),
    Window(3, padding=1),
)
GROUPS = (1, 2, 1, 2, 2)
CLASSIFIER_SIDE = 6  # AlexNet's classifier sees 6x6 features


def released_alignment() -> Alignment:
    """The crop of the output: 18 pixels."""
    conv1, conv2, *conv3_to_5 = CONVOLUTIONS
    fc7 = [conv1, POOLING, conv2, POOLING, *conv3_to_5, POOLING, Window(CLASSIFIER_SIDE), Window(1)]
    origin = Fraction(0)
    output = position(origin, fc7, [Window(OUTPUT_KERNEL, stride=STRIDE)])
    return Alignment(output=crop_offset(origin, output), trimmed=False)


class AlexNetFCN(FCN):
    """FCN-AlexNet; parameters carry the names of the released Caffe layers.

    Args:
        num_classes: Number of classes.
        widths: Channels of conv1 to conv5 (even, because of the groups), and of fc6 and fc7.
    """

    def __init__(self, num_classes: int, widths: tuple[int, ...] = WIDTHS) -> None:
        channels = Channels(pool3=widths[0], pool4=widths[1], fc7=widths[5])
        super().__init__(num_classes, channels, STRIDE, released_alignment(), learned_output=True)
        self.upscore = upsampling(num_classes, STRIDE, trimmed=False, size=OUTPUT_KERNEL)
        before = (3, *widths)
        self.conv1, self.conv2, self.conv3, self.conv4, self.conv5 = [
            nn.Conv2d(before[i], widths[i], *window, groups=groups)
            for i, (window, groups) in enumerate(zip(CONVOLUTIONS, GROUPS, strict=True))
        ]
        self.fc6 = nn.Conv2d(widths[4], widths[5], CLASSIFIER_SIDE)
        self.fc7 = nn.Conv2d(widths[5], widths[5], 1)
        self.dropout = nn.Dropout2d(0.5)

    def features(self, images: Tensor) -> Features:
        pool1 = _pool(F.relu(self.conv1(images)))  # stride 8
        pool2 = _pool(F.relu(self.conv2(_normalize(pool1))))  # stride 16
        x = F.relu(self.conv3(_normalize(pool2)))
        x = F.relu(self.conv4(x))
        pool5 = _pool(F.relu(self.conv5(x)))  # stride 32
        x = self.dropout(F.relu(self.fc6(pool5)))
        x = self.dropout(F.relu(self.fc7(x)))
        return Features(pool3=pool1, pool4=pool2, fc7=x)


def _pool(x: Tensor) -> Tensor:
    return F.max_pool2d(x, POOLING.kernel, POOLING.stride, ceil_mode=True)


def _normalize(x: Tensor) -> Tensor:
    """Local response normalisation over five channels, Caffe's LRN layer; on processors only in float32."""
    return F.local_response_norm(x.float(), size=5, alpha=1e-4, beta=0.75, k=1.0).to(x.dtype)
