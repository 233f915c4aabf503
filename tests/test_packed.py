"""Convolutions with packed weights: the numbers that the plain ones give."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from released import THIN_ALEXNET
from test_prepared import CPU, EVERY_KIND, relative_error, with_statistics
from torch import nn

from segcli.inference.benchmark import multiplications
from segcli.models.alexnet import AlexNetFCN
from segcli.models.backbones import ResNet
from segcli.models.fcn import Network
from segcli.models.packed import REMEMBERED, PackedConv2d, can_pack, pack
from segcli.models.prepared import folded, prepare, sharing_copy
from segcli.models.strips import InStrips

pytestmark = pytest.mark.skipif(not can_pack(torch.float32), reason="this PyTorch has no oneDNN")


def network_of(name: str) -> Network:
    return AlexNetFCN(3, THIN_ALEXNET).eval() if name == "fcn-alexnet" else with_statistics(name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", [*EVERY_KIND, "fcn-alexnet"])
def test_scores_are_those_of_plain_convolutions(name: str, dtype: torch.dtype) -> None:
    if not can_pack(dtype):
        pytest.skip("oneDNN does not compute in bfloat16 on this processor")
    plain = folded(sharing_copy(network_of(name)).eval()).to(dtype, memory_format=torch.channels_last)
    packed = sharing_copy(plain).eval()
    pack(packed)
    for size in [(60, 76), (76, 60), (60, 76)]:
        images = torch.randn(1, 3, *size, dtype=dtype).contiguous(memory_format=torch.channels_last)
        with torch.inference_mode():
            expected, found = (
                plain.score_pyramid(images)[-1].float(),
                packed.score_pyramid(images)[-1].float(),
            )
        if dtype == torch.bfloat16:
            assert torch.equal(found, expected)
        else:  # PyTorch computes what is little work without oneDNN, and random networks spread errors
            assert relative_error(found, expected) < 1e-4


def test_all_but_the_head_is_packed_and_the_network_untouched() -> None:
    network = with_statistics("fcn8s-resnet18")
    before = [type(layer) for layer in network.modules()]
    layers = dict(prepare(network, CPU).named_modules())
    plain = [name for name, layer in layers.items() if isinstance(layer, nn.Conv2d)]
    assert plain == ["network.score_fr", "network.score_pool4", "network.score_pool3"]
    # 1 at the start, 2 in each of 8 blocks, 3 on the way past the first block of a stage
    assert sum(isinstance(layer, PackedConv2d) for layer in layers.values()) == 1 + 16 + 3
    assert [type(layer) for layer in network.modules()] == before


def test_a_relu_goes_with_the_convolution_before_it() -> None:
    layers = nn.Sequential(nn.Conv2d(1, 1, 1), nn.Identity(), nn.ReLU(), nn.Conv2d(1, 1, 1), nn.Hardswish())
    nn.init.constant_(layers[0].weight, -2)
    nn.init.constant_(layers[0].bias, 1)
    pack(layers)
    assert [type(layer) for layer in layers[1:3]] == [nn.Identity, nn.Identity]
    assert layers[0](torch.tensor([[[[-1.0, 0, 1]]]])).tolist() == [[[[3, 1, 0]]]]  # 1 - 2x, not below 0
    assert layers[3].then == "none"
    assert isinstance(layers[4], nn.Hardswish)


def test_a_relu_that_is_used_twice_stays() -> None:
    from torchvision.models.resnet import BasicBlock

    block = BasicBlock(4, 4).eval()
    x = torch.randn(1, 4, 6, 6)
    with torch.inference_mode():
        expected = block(x)
        pack(block)
        torch.testing.assert_close(block(x), expected)
    assert isinstance(block.relu, nn.ReLU)


def test_kernels_strides_paddings_and_groups() -> None:
    torch.manual_seed(0)
    for window in [
        {"kernel_size": 3, "padding": 1},
        {"kernel_size": 7, "stride": 2, "padding": 3, "bias": False},
        {"kernel_size": (1, 3), "padding": (0, 2)},
        {"kernel_size": 3, "dilation": 4, "padding": 4},
        {"kernel_size": 5, "groups": 8, "padding": 2},
        {"kernel_size": 3, "groups": 2, "stride": (2, 1)},
    ]:
        layer = nn.Conv2d(8, 8, **window)
        x = torch.randn(1, 8, 19, 23)
        with torch.inference_mode():
            torch.testing.assert_close(PackedConv2d(layer)(x), layer(x), rtol=1e-5, atol=1e-5)


def test_in_strips() -> None:
    encoder = ResNet((1, 1, 1, 1)).eval()
    layers = nn.Sequential(encoder.conv1, nn.Identity(), encoder.relu1, encoder.get_submodule("layer1"))
    pack(layers)
    image = torch.randn(1, 3, 90, 70)
    with torch.inference_mode():
        found, expected = InStrips(layers, rows=16)(image), layers(image)
        assert relative_error(found, expected) < 2e-6
        assert InStrips(layers, rows=16).count(image) == 6


def test_of_many_sizes_few_are_remembered_and_fewer_kept() -> None:
    layer = nn.Conv2d(64, 64, 3, padding=1).eval()
    packed = PackedConv2d(layer)
    with torch.inference_mode():
        for width in range(1, REMEMBERED + 20):
            x = torch.full((1, 64, 2, width), 0.5)
            torch.testing.assert_close(packed(x), layer(x), rtol=1e-5, atol=1e-5)
    assert len(packed._seen) <= REMEMBERED
    assert len(packed._ways) <= 8


def test_multiplications_are_counted() -> None:
    layers = nn.Sequential(nn.Conv2d(4, 6, 3, padding=1), nn.ReLU())
    pack(layers)
    with torch.inference_mode():
        count = multiplications(lambda: layers(torch.zeros(1, 4, 5, 7)))
    assert count == 4 * 6 * 3 * 3 * 5 * 7


def test_padding_counts_as_zero_also_after_a_relu() -> None:
    layers = nn.Sequential(nn.Conv2d(1, 1, 3, padding=1, bias=False), nn.ReLU())
    nn.init.ones_(layers[0].weight)
    pack(layers)
    with torch.inference_mode():
        found = layers(torch.ones(1, 1, 3, 3))
    assert found.tolist() == [[[[4, 6, 4], [6, 9, 6], [4, 6, 4]]]]
    assert torch.equal(found, F.conv2d(torch.ones(1, 1, 3, 3), torch.ones(1, 1, 3, 3), padding=1))


def test_asking_whether_it_can_be_done_draws_no_random_numbers() -> None:
    before = torch.random.get_rng_state()
    can_pack.cache_clear()
    can_pack(torch.float32)
    assert torch.equal(torch.random.get_rng_state(), before)
