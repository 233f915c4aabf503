"""Networks: sizes, alignment, the released crop offsets, upsampling, and the VGG16 start."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from segcli.errors import CheckpointError, UsageError
from segcli.models.fcn import bilinear_kernel, upsampling
from segcli.models.networks import NETWORKS, get
from segcli.models.vgg import VGG16FCN, convolutionalize, released_alignment

THIN = (2, 3, 4, 5, 6, 7)


def thin(stride: int, classes: int = 3) -> VGG16FCN:
    torch.manual_seed(0)
    return VGG16FCN(classes, stride, widths=THIN).eval()


def test_crop_offsets_are_those_of_the_release() -> None:
    # shelhamer/fcn.berkeleyvision.org: voc-fcn32s, voc-fcn16s and voc-fcn8s train.prototxt
    assert released_alignment(32).output == 19
    assert (released_alignment(16).score_pool4, released_alignment(16).output) == (5, 27)
    at_8 = released_alignment(8)
    assert (at_8.score_pool4, at_8.score_pool3, at_8.output) == (5, 9, 31)


@pytest.mark.parametrize("stride", [32, 16, 8])
def test_released_networks_give_scores_of_the_images_size(stride: int) -> None:
    network = thin(stride)
    sizes = [(n, n) for n in range(1, 71)] + [(1, 70), (33, 97), (130, 64)]
    with torch.no_grad():
        for height, width in sizes:
            assert network(torch.zeros(1, 3, height, width)).shape == (1, 3, height, width)


def released_fcn8s(x: Tensor, p: dict[str, Tensor], scales: tuple[float, float] = (1, 1)) -> Tensor:
    """The released FCN-8s spelled out, layer by layer, with the prototxt's numbers."""

    def conv(x: Tensor, name: str, padding: int = 0) -> Tensor:
        return F.conv2d(x, p[name + ".weight"], p[name + ".bias"], padding=padding)

    pools = []
    for stage, count in enumerate((2, 2, 3, 3, 3), 1):
        for n in range(1, count + 1):
            x = F.relu(conv(x, f"conv{stage}_{n}", 100 if (stage, n) == (1, 1) else 1))
        x = F.max_pool2d(x, 2, 2, ceil_mode=True)
        pools.append(x)
    _, _, pool3, pool4, _ = pools
    x = F.relu(conv(F.relu(conv(x, "fc6")), "fc7"))
    up2 = F.conv_transpose2d(conv(x, "score_fr"), p["upscore2.weight"], stride=2)
    h, w = up2.shape[2:]
    fuse4 = up2 + conv(pool4 * scales[0], "score_pool4")[:, :, 5 : 5 + h, 5 : 5 + w]
    up4 = F.conv_transpose2d(fuse4, p["upscore_pool4.weight"], stride=2)
    h, w = up4.shape[2:]
    fuse3 = up4 + conv(pool3 * scales[1], "score_pool3")[:, :, 9 : 9 + h, 9 : 9 + w]
    return F.conv_transpose2d(fuse3, p["upscore8.weight"], stride=8)


@pytest.mark.parametrize("size", [(1, 1), (31, 47), (64, 64), (75, 100)])
@pytest.mark.parametrize("scales", [(1.0, 1.0), (0.01, 0.0001)])
def test_fcn8s_equals_the_released_network_spelled_out(
    size: tuple[int, int], scales: tuple[float, float]
) -> None:
    torch.manual_seed(1)
    network = VGG16FCN(3, 8, scales=scales, widths=THIN).eval()
    x = torch.randn(1, 3, *size) * 50
    with torch.no_grad():
        full = released_fcn8s(x, network.state_dict(), scales)
        expected = full[:, :, 31 : 31 + size[0], 31 : 31 + size[1]]
        torch.testing.assert_close(network(x), expected)


def test_released_parameter_names_and_count() -> None:
    with torch.device("meta"):
        network = get("fcn8s", 21)
    names = {name.rpartition(".")[0] for name in network.state_dict()}
    convolutions = {f"conv{s}_{n}" for s, c in enumerate((2, 2, 3, 3, 3), 1) for n in range(1, c + 1)}
    head = {"fc6", "fc7", "score_fr", "score_pool4", "score_pool3", "upscore2", "upscore_pool4", "upscore8"}
    assert names == convolutions | head
    # VGG16's 14,714,688 convolution parameters; fc6 512*49*4096 + 4096; fc7 4096^2 + 4096; score layers;
    # upsampling 21^2 * (4^2 + 4^2 + 16^2)
    scores = (4096 + 1) * 21 + (512 + 1) * 21 + (256 + 1) * 21
    expected = 14_714_688 + 512 * 49 * 4096 + 4096 + 4096**2 + 4096 + scores + 21**2 * (16 + 16 + 256)
    assert sum(p.numel() for p in network.parameters()) == expected == 134_489_759


def test_bilinear_kernel_written_out() -> None:
    profile = torch.tensor([0.25, 0.75, 0.75, 0.25])
    torch.testing.assert_close(bilinear_kernel(2), profile[:, None] * profile)
    # every output pixel is reached by kernel entries `stride` apart: they sum to one
    for stride in (2, 8, 16, 32):
        phases = bilinear_kernel(stride).view(2, stride, 2, stride).sum((0, 2))
        torch.testing.assert_close(phases, torch.ones(stride, stride))


@pytest.mark.parametrize("stride", [2, 8])
def test_upsampling_starts_as_bilinear_interpolation(stride: int) -> None:
    torch.manual_seed(0)
    x = torch.randn(1, 4, 6, 5)
    inside = (..., slice(stride, -stride), slice(stride, -stride))  # at the border it sees zeros
    up = upsampling(4, stride, trimmed=True)(x)
    expected = F.interpolate(x, scale_factor=stride, mode="bilinear", align_corners=False)
    torch.testing.assert_close(up[inside], expected[inside])


@pytest.mark.parametrize("encoder", ["mobilenet_v3_large", "resnet18", "regnet_y_400mf", "efficientnet_b0"])
def test_encoder_networks_take_any_size(encoder: str) -> None:
    torch.manual_seed(0)
    network = get(f"fcn8s-{encoder}", 5).eval()
    with torch.no_grad():
        for height, width in [(1, 1), (1, 65), (31, 33), (64, 96), (50, 47)]:
            scores = network(torch.zeros(1, 3, height, width))
            assert scores.shape == (1, 5, height, width)
            strides = [-(-height // s) for s in (32, 16, 8)]
            pyramid = network.score_pyramid(torch.zeros(1, 3, height, width))
            assert [s.shape[2] for s in pyramid] == strides


def test_previews_lie_where_the_coarser_networks_put_their_output() -> None:
    """Without their skips, FCN-8s and FCN-16s are FCN-32s but for the path of the upsampling."""
    torch.manual_seed(0)
    x = torch.randn(1, 3, 70, 45)
    coarse = thin(32)
    with torch.no_grad():
        (scores,) = coarse.score_pyramid(x)
        expected = coarse.upsample(scores, (70, 45))  # fixed at its bilinear start
        inside = (..., slice(16, -16), slice(16, -16))
        for stride in (32, 16, 8):
            found = thin(stride).preview(scores, 32, (70, 45))
            assert found.shape == expected.shape
            torch.testing.assert_close(found[inside], expected[inside])
    encoder = get("fcn8s-resnet18", 2).eval()
    with torch.no_grad():
        pyramid = encoder.score_pyramid(x)
        for stride, scores in zip((32, 16, 8), pyramid, strict=True):
            assert encoder.preview(scores, stride, (70, 45)).shape == (1, 2, 70, 45)
        torch.testing.assert_close(encoder.preview(pyramid[-1], 8, (70, 45)), encoder(x))


def test_variants_differ_by_their_skips_only() -> None:
    with torch.device("meta"):
        keys = {s: set(get(f"fcn{s}s-resnet18", 4).state_dict()) for s in (32, 16, 8)}
    skips_16 = {"score_pool4.weight", "score_pool4.bias", "upscore2.weight"}
    skips_8 = {"score_pool3.weight", "score_pool3.bias", "upscore_pool4.weight"}
    assert keys[16] - keys[32] == skips_16
    assert keys[8] - keys[16] == skips_8


def test_unknown_network_suggests_the_nearest() -> None:
    with pytest.raises(UsageError, match="did you mean 'fcn8s-resnet18'"):
        get("fcn8s-resnet17", 3)
    assert len(NETWORKS) == len(set(NETWORKS))


def test_vgg16_classifier_becomes_convolutional() -> None:
    """The convolutional net gives, at one position, what the classifier's dense layers give."""
    torch.manual_seed(0)
    network = thin(32)
    shapes = {n: p.shape for n, p in network.state_dict().items()}
    indices = (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28)
    convolutions = [n for n in shapes if n.startswith("conv")]
    names = sorted({n.rpartition(".")[0] for n in convolutions})
    classifier = {
        f"features.{i}.{part}": torch.randn(shapes[f"{name}.{part}"])
        for (i, name), part in itertools.product(zip(indices, names, strict=True), ("weight", "bias"))
    }
    dense6 = torch.nn.Linear(THIN[4] * 49, THIN[5])
    dense7 = torch.nn.Linear(THIN[5], THIN[5])
    for index, layer in ((0, dense6), (3, dense7)):
        classifier |= {f"classifier.{index}.{k}": v for k, v in layer.state_dict().items()}
    convolutionalize(network, classifier)
    torch.testing.assert_close(network.conv3_2.weight, classifier["features.12.weight"])
    pool5 = torch.randn(1, THIN[4], 7, 7)
    with torch.no_grad():
        expected = dense7(F.relu(dense6(pool5.flatten(1))))
        torch.testing.assert_close(network.fc7(F.relu(network.fc6(pool5))).flatten(1), expected)
    del classifier["classifier.3.weight"]
    with pytest.raises(CheckpointError, match=r"classifier\.3\.weight of the VGG16 classifier is missing"):
        convolutionalize(network, classifier)
