"""Functions of an image computed strip by strip, against the same functions computed whole."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import released
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from segcli.models import strips
from segcli.models.alexnet import AlexNetFCN
from segcli.models.encoders import ENCODERS
from segcli.models.fcn import Network
from segcli.models.networks import get
from segcli.models.prepared import prepare
from segcli.models.preprocessing import PREPROCESSINGS, normalize
from segcli.models.semseg import ResizingVGG16FCN
from segcli.models.strips import InStrips, Strips
from segcli.models.torchvision_networks import STRIDES
from segcli.models.vgg import VGG16FCN

THIN = (4, 6, 8, 10, 12, 14)
CLASSES = 5
SIZES = [(1, 1), (1, 40), (2, 1), (9, 70), (33, 31), (64, 48), (97, 65), (130, 20)]


def image(height: int, width: int, number: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(height * 1000 + width)
    return torch.randn(number, 3, height, width, generator=generator)


def in_strips(function: Callable[[Tensor], Tensor], x: Tensor, count: int) -> Tensor:
    parts = list(Strips(function, x).run(x, count))
    assert len(parts) <= count
    return torch.cat(parts, 2)


def assert_same(found: Tensor, expected: Tensor, error: float = 5e-6) -> None:
    assert found.shape == expected.shape
    assert found.dtype == expected.dtype
    assert float((found - expected).abs().max()) <= error * float(expected.abs().max())


# ---- operations, one by one ----

KERNEL = torch.randn(4, 3, 3, 3, generator=torch.Generator().manual_seed(0))
UP = torch.randn(3, 2, 4, 4, generator=torch.Generator().manual_seed(1))
FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "convolution": lambda x: F.conv2d(x, KERNEL, torch.ones(4), padding=1),
    "strided": lambda x: F.conv2d(x, KERNEL, stride=(2, 1), padding=(1, 2)),
    "dilated": lambda x: F.conv2d(x, KERNEL, padding=3, dilation=3),
    "far padding": lambda x: F.conv2d(x, KERNEL, padding=9),
    "by channel": lambda x: F.conv2d(x, KERNEL[:3, :1], padding=1, groups=3),
    "pooling, rounded up": lambda x: F.max_pool2d(x, 2, ceil_mode=True),
    "pooling, padded": lambda x: F.max_pool2d(x, 3, 2, 1),
    "pooling, overlapping": lambda x: F.max_pool2d(x - 5, 3, 2, 1, ceil_mode=True),
    "transposed": lambda x: F.conv_transpose2d(x, UP, stride=2),
    "transposed, trimmed": lambda x: F.conv_transpose2d(x, UP, stride=2, padding=1),
    "transposed, by one": lambda x: F.conv_transpose2d(x, UP, stride=1),
    "transposed, by three": lambda x: F.conv_transpose2d(x, UP, stride=3),
    "padding": lambda x: F.pad(x, (1, 2, 3, 4), value=7),
    "cropping": lambda x: F.pad(x, (0, 0, 5, 5))[..., 3:-2, :1] + 1,
    "upsampling": lambda x: F.interpolate(x, scale_factor=8, mode="bilinear", align_corners=False),
    "any size": lambda x: F.interpolate(x, (77, 50), mode="bilinear", align_corners=False),
    "aligned corners": lambda x: F.interpolate(x, (77, 50), mode="bilinear", align_corners=True),
    "nearest": lambda x: F.interpolate(x, (101, 3), mode="nearest"),
    "shrinking": lambda x: F.interpolate(x, (5, 5), mode="bilinear", align_corners=False),
    "mirrored channels": lambda x: x.flip(1) * 2.0,
    "global pooling": lambda x: x * F.adaptive_avg_pool2d(x, 1),
    "global twice": lambda x: F.relu(x * F.adaptive_avg_pool2d(x, 1)) - F.adaptive_avg_pool2d(x, 1),
    "unknown": lambda x: F.pad(x, (1, 1, 1, 1)).cumsum(2) + 1,
    "two ways": lambda x: torch.cat([F.conv2d(x, KERNEL, padding=9, dilation=9), x * 1.0], 1),
    "in place": lambda x: F.relu(x * 1.0, inplace=True).add_(x),
    "seen by two, then changed": lambda x: _seen_by_two(x * 1.0),
}


def _seen_by_two(x: Tensor) -> Tensor:
    sums = F.conv2d(x, KERNEL[:3], padding=2, dilation=2)
    return x.add_(sums) + F.relu(x, inplace=True)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_operations(name: str) -> None:
    function = FUNCTIONS[name]
    with torch.inference_mode():
        for height, width in [(1, 1), (2, 7), (3, 3), (20, 9), (53, 4)]:
            x = image(height, width, number=2)
            expected = function(x.clone())
            for count in (1, 2, 3, 7, height):
                assert_same(in_strips(function, x, count), expected, 2e-6)
            assert torch.equal(x, image(height, width, number=2))


def test_a_strip_holds_only_what_the_next_one_needs() -> None:
    function = FUNCTIONS["convolution"]
    x = image(100, 10)
    plan = Strips(lambda x: function(F.relu(x)), x)
    relu = plan.steps[1]
    held = [relu.held.shape[2] for _ in plan.run(x, 10)]
    # 11 rows for the first 10 of the output, then 10 more each, and two from before; 9 and two for the last
    assert [relu.name, *held] == ["relu", 11, 12, 12, 12, 12, 12, 12, 12, 12, 11]
    assert all(step.held.numel() == 0 for step in plan.steps)


def test_only_what_crosses_global_pooling_is_kept_whole() -> None:
    def function(x: Tensor) -> Tensor:
        wide = F.conv2d(x, KERNEL, padding=1)
        return F.conv2d(wide * F.adaptive_avg_pool2d(F.relu(wide), 1), KERNEL[:, :1].repeat(1, 4, 1, 1))

    plan = Strips(function, image(50, 20))
    assert [(step.name, step.phase, step.kept) for step in plan.steps[1:]] == [
        ("conv2d", 0, True), ("relu", 0, True), ("adaptive_avg_pool2d", 1, False), ("mul", 1, False),
        ("conv2d", 1, False),
    ]  # fmt: skip
    assert plan.kept() == 2 * 4 * 50 * 20 * 4  # two maps of four channels in float32


def test_an_error_leaves_nothing_behind() -> None:
    x = image(40, 10)
    plan = Strips(FUNCTIONS["convolution"], x)
    run = plan.run(x, 4)
    next(run)
    run.close()
    assert all(step.held.numel() == 0 for step in plan.steps)
    assert_same(torch.cat(list(plan.run(x, 4)), 2), FUNCTIONS["convolution"](x))


# ---- networks ----


def lively(network: Network) -> Network:
    """With statistics of batch normalisation under which signals reach the end."""
    generator = torch.Generator().manual_seed(0)
    for layer in network.modules():
        if isinstance(layer, nn.BatchNorm2d):
            assert layer.running_mean is not None
            assert layer.running_var is not None
            layer.running_mean.copy_(torch.randn(layer.num_features, generator=generator) * 0.1)
            layer.running_var.copy_(torch.rand(layer.num_features, generator=generator) + 0.5)
    return network.eval()


def thin(stride: int = 8) -> VGG16FCN:
    network = VGG16FCN(CLASSES, stride, widths=THIN)
    network.load_state_dict(released.vgg_weights(stride, CLASSES, 0, THIN))
    return network.eval()


def thin_resizing() -> ResizingVGG16FCN:
    network = ResizingVGG16FCN(CLASSES, 8, "bilinear", THIN)
    weights = released.vgg_weights(8, CLASSES, 0, THIN)
    network.load_state_dict({name: weights[name] for name in network.state_dict()})
    return network.eval()


def thin_alexnet() -> AlexNetFCN:
    network = AlexNetFCN(CLASSES, released.THIN_ALEXNET)
    network.load_state_dict(released.alexnet_weights(CLASSES, 0))
    return network.eval()


NETWORKS: dict[str, Callable[[], Network]] = {
    "fcn8s": thin,
    "fcn16s": lambda: thin(16),
    "fcn32s": lambda: thin(32),
    "fcn8s-semseg": thin_resizing,
    "fcn-alexnet": thin_alexnet,
    **{f"fcn8s-{name}": lambda name=name: lively(get(f"fcn8s-{name}", CLASSES)) for name in ENCODERS},  # type: ignore[misc]
    **{name: lambda name=name: lively(get(name, CLASSES)) for name in STRIDES},  # type: ignore[misc]
}
SLOW = {"fcn_resnet101", "deeplabv3_resnet101", "deeplabv3_resnet50"}  # they differ from others in depth only


@pytest.mark.parametrize("name", [name for name in NETWORKS if name not in SLOW])
def test_every_network(name: str) -> None:
    torch.manual_seed(0)
    network = NETWORKS[name]()
    sizes = SIZES if isinstance(network, VGG16FCN) else SIZES[4:5]
    with torch.inference_mode():
        for size in sizes:
            x = image(*size)
            for made in (network, prepare(network, torch.device("cpu"))):
                assert_same(in_strips(made, x, 5), made(x), 2e-5)


@pytest.mark.parametrize("name", ["fcn8s-mobilenet_v3_large", "fcn8s"])
def test_sizes_drawn_by_chance(name: str) -> None:
    torch.manual_seed(0)
    network = prepare(NETWORKS[name](), torch.device("cpu"))
    draw = random.Random(name)
    with torch.inference_mode():
        for _ in range(10):
            x = image(draw.randint(1, 150), draw.randint(1, 60))
            assert_same(in_strips(network, x, draw.randint(2, 20)), network(x), 1e-5)


def test_no_operation_of_a_network_is_unknown() -> None:
    for name, make in NETWORKS.items():
        if name not in SLOW:
            x = image(70, 50)
            with torch.inference_mode():
                plan = Strips(prepare(make(), torch.device("cpu")), x)
            whole = {step.name for step in plan.steps if step.rows is None}
            assert whole <= {"", "adaptive_avg_pool2d"}, name


def test_half_precision_and_the_bytes_of_a_picture() -> None:
    network = prepare(thin(), torch.device("cpu"), "bf16")
    pixels = torch.randint(0, 256, (1, 3, 90, 60), dtype=torch.uint8)
    for preprocessing in (PREPROCESSINGS["caffe"], PREPROCESSINGS["imagenet"]):

        def function(pixels: Tensor, preprocessing=preprocessing) -> Tensor:  # type: ignore[no-untyped-def]
            return network.score_pyramid(normalize(pixels, preprocessing))[-1]

        with torch.inference_mode():
            plan = Strips(function, pixels)
            assert {step.dtype for step in plan.steps} == {torch.uint8, torch.float32, torch.bfloat16}
            found = torch.cat(list(plan.run(pixels, 4)), 2)
            assert_same(found, function(pixels), 2e-2)


# ---- whole or in strips ----


def test_how_an_image_is_computed_follows_from_its_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(strips, "SMALL", 40 * 10)
    monkeypatch.setitem(strips.WORKING, "cpu", 50 * 10 * (3 + 4) * 4)  # input and output of 50 rows
    seen: list[int] = []

    def function(x: Tensor) -> Tensor:
        seen.append(x.shape[2])
        return FUNCTIONS["convolution"](x)

    computed = InStrips(function)
    for height, count in [(40, 1), (50, 1), (51, 2), (100, 2), (101, 3)]:
        x = image(height, 10)
        assert computed.count(x) == count
        assert_same(computed(x), FUNCTIONS["convolution"](x))
        assert len(list(computed.bands(x))) == count
    assert InStrips(function, rows=0).count(image(1000, 10)) == 1
    assert InStrips(function, rows=7).count(image(29, 10)) == 5
    seen.clear()
    computed(image(101, 10))
    assert seen == []  # its operations are remembered


def test_few_sizes_are_remembered() -> None:
    computed = InStrips(FUNCTIONS["convolution"], rows=1)
    for height in range(1, 40):
        computed(image(height, 3))
    assert len(computed._remembered) == strips.REMEMBERED
