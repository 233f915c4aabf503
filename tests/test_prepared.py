"""Networks made ready to predict: the same scores, and the network itself stays as it was."""

from __future__ import annotations

import copy

import pytest
import released
import torch
from torch import Tensor, nn

from segcli.models.alexnet import AlexNetFCN
from segcli.models.fcn import FINAL_LAYER, Network
from segcli.models.networks import get
from segcli.models.prepared import folded, prepare, sharing_copy
from segcli.models.semseg import ResizingVGG16FCN
from segcli.models.vgg import VGG16FCN

CPU = torch.device("cpu")
THIN = (4, 4, 6, 8, 8, 7)
EVERY_KIND = (
    "fcn8s-mobilenet_v3_large",
    "fcn8s-efficientnet_b0",
    "fcn8s-regnet_y_400mf",
    "fcn8s-regnet_x_800mf",
    "fcn8s-resnet18",
    "fcn_resnet50",
    "deeplabv3_mobilenet_v3_large",
    "lraspp_mobilenet_v3_large",
)


def with_statistics(name: str) -> Network:
    """A network whose batch normalisations do something, in evaluation mode."""
    torch.manual_seed(0)
    network = get(name, 3)
    for layer in network.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.momentum = None  # the mean over all batches
    network.train()
    with torch.no_grad():
        for layer in network.modules():
            if isinstance(layer, nn.BatchNorm2d):
                nn.init.uniform_(layer.weight, 0.5, 1.5)
                nn.init.normal_(layer.bias, std=0.2)
        network(torch.randn(2, 3, 64, 64))
    return network.eval()


def relative_error(found: Tensor, expected: Tensor) -> float:
    assert (found.dtype, found.shape) == (torch.float32, expected.shape)
    return float((found - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("name", EVERY_KIND)
def test_batch_normalisation_is_folded_and_the_network_untouched(name: str) -> None:
    network = with_statistics(name).double()  # so that rounding cannot hide a mistake
    before = copy.deepcopy(network.state_dict())
    fused = folded(sharing_copy(network).eval())
    assert not any(isinstance(layer, nn.BatchNorm2d) for layer in fused.modules())
    images = torch.randn(1, 3, 60, 76, dtype=torch.float64)
    with torch.inference_mode():
        expected, found = network(images), fused(images)
    assert (found - expected).abs().max() < 1e-12 * expected.abs().max()
    assert before.keys() == network.state_dict().keys()
    assert all(torch.equal(before[key], value) for key, value in network.state_dict().items())
    assert all(p.requires_grad for p in network.parameters())


def thin_vgg(stride: int) -> VGG16FCN:
    network = VGG16FCN(21, stride, widths=THIN)
    network.load_state_dict(released.vgg_weights(stride, 21, 0, THIN))
    return network


def test_weights_that_stay_the_same_are_shared() -> None:
    network = thin_vgg(8)
    addresses = {p.data_ptr() for p in network.parameters()}
    assert {p.data_ptr() for p in prepare(network, CPU).parameters()} == addresses
    assert network.training  # only the copy was put in evaluation mode
    assert not prepare(network, CPU).training


@pytest.mark.parametrize("stride", [8, 16, 32])
def test_in_half_precision_the_head_stays_float32(stride: int) -> None:
    network = thin_vgg(stride).eval()
    reduced = prepare(network, CPU, "bf16")
    for name, weight in reduced.named_parameters():
        assert weight.dtype == (torch.float32 if "score" in name else torch.bfloat16), name
    images = torch.randn(1, 3, 40, 52) * 60
    with torch.inference_mode():
        assert relative_error(reduced(images), network(images)) < 0.05  # four channels average out little
        (*_, coarse) = reduced.score_pyramid(images)
        assert coarse.dtype == torch.float32
        assert torch.equal(reduced.upsample(coarse, (40, 52)), network.upsample(coarse, (40, 52)))


@pytest.mark.parametrize("stride", [8, 16, 32])
def test_fixed_bilinear_kernels_become_interpolation(stride: int) -> None:
    torch.manual_seed(0)
    network = VGG16FCN(3, stride, widths=THIN).eval()
    fast = prepare(network, CPU)
    upsampling = FINAL_LAYER[stride]
    assert not any(upsampling in name for name, _ in fast.named_parameters())
    with torch.inference_mode():
        for size in [(1, 1), (5, 40), (61, 47)]:  # small ones reach beyond the outermost scores
            (*_, coarse) = network.score_pyramid(torch.zeros(1, 3, *size))
            coarse = torch.randn(coarse.shape)
            assert relative_error(fast.upsample(coarse, size), network.upsample(coarse, size)) < 1e-6
        network.get_parameter(f"{upsampling}.weight")[0, 1] += 0.01  # as training would
        assert torch.equal(prepare(network, CPU).upsample(coarse, size), network.upsample(coarse, size))


def test_a_network_without_upsampling_layers() -> None:
    torch.manual_seed(0)
    network = ResizingVGG16FCN(3, 8, "nearest", THIN).eval()
    images = torch.randn(1, 3, 40, 52)
    with torch.inference_mode():
        assert relative_error(prepare(network, CPU)(images), network(images)) < 1e-5


def test_alexnet_in_half_precision() -> None:
    network = AlexNetFCN(3, released.THIN_ALEXNET).eval()
    network.load_state_dict(released.alexnet_weights(3, 0))
    torch.manual_seed(0)
    images = torch.randn(1, 3, 50, 70)
    with torch.inference_mode():
        expected, found = network(images), prepare(network, CPU, "bf16")(images)
    assert 0 < relative_error(found, expected) < 2e-2
