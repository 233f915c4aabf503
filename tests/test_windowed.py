"""The VGG16 networks computed only where the image can reach, against the plain path."""

from __future__ import annotations

import random

import pytest
import released
import torch
from torch import Tensor

from segcli.models import windowed
from segcli.models.networks import AT_ONCE_SCALES
from segcli.models.semseg import ResizingVGG16FCN
from segcli.models.vgg import VGG16FCN
from segcli.models.windowed import STAGES, WindowedVGG16, smallest_alike, stretched, trace

THIN = (2, 3, 4, 5, 6, 7)
CLASSES = 3
PERIOD = 16  # of the four pooling layers
SIZES = [(1, 1), (1, 2), (2, 1), (3, 5), (15, 16), (17, 18), (31, 33), (32, 32), (48, 1), (63, 100),
         (64, 65), (97, 61), (101, 103), (128, 130), (130, 170)]  # fmt: skip


def thin(stride: int, scales: tuple[float, float] = (1.0, 1.0), seed: int = 0) -> VGG16FCN:
    network = VGG16FCN(CLASSES, stride, scales, THIN)
    network.load_state_dict(released.vgg_weights(stride, CLASSES, seed, THIN))
    return network.eval()


def image(height: int, width: int, number: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(height * 1000 + width)
    return torch.randn(number, 3, height, width, generator=generator) * 60


def relative_error(found: Tensor, expected: Tensor) -> float:
    assert found.shape == expected.shape
    return float((found - expected).abs().max() / expected.abs().max())


def test_windows_written_out_for_375_pixels() -> None:
    one, two, three, four = trace(375)
    # conv1_1 pads by 100 and takes 3: 375 + 198 = 573 pixels, of which 98..474 see a pixel of the image.
    # conv1_2 sees one more on each side: 97..475; whole pairs: 96..475, one zero before; pool1 48..237 of 287
    assert (one.widened, one.window, one.length) == ((1, 0), (48, 238), 287)
    # 46..239 after two convolutions: whole pairs; pool2 23..119 of 144
    assert (two.widened, two.window, two.length) == ((0, 0), (23, 120), 144)
    # 20..122 after three; 20..123; pool3 10..61 of 72
    assert (three.widened, three.window, three.length) == ((0, 1), (10, 62), 72)
    # 7..64 after three; 6..65; pool4 3..32 of 36
    assert (four.widened, four.window, four.length) == ((1, 1), (3, 33), 36)
    # The ring: 1 pixel after conv1_2, so 1 of pool1; 3 before pool2, so 2; 5, so 3; 6, so 3 here
    assert [axis.constant for axis in trace(375)] == [(1, 286), (2, 142), (3, 69), (3, 33)]
    assert four.outside == (3, 3)


@pytest.mark.parametrize("length", range(1, 2 * PERIOD + 1))
def test_windows_keep_clear_of_the_canvas_edge_before_stage_5(length: int) -> None:
    *_, last = trace(length, stages=5)
    for axis in trace(length):
        assert axis.constant.start <= axis.window.start < axis.window.stop <= axis.constant.stop
        assert axis.window.stop <= axis.length
    assert last.window.start < last.constant.start or last.window.stop > last.constant.stop
    alike = smallest_alike(length)
    assert (length - alike) % PERIOD == 0
    assert all(axis.constant.start < axis.constant.stop for axis in trace(alike))


@pytest.mark.parametrize("height", [1, 8, 29, 50])
def test_the_plain_network_is_constant_where_the_windows_say(height: int) -> None:
    network, width = thin(8), 37
    with torch.no_grad():
        x, empty = image(height, width), torch.zeros(1, 3, height, width)
        for stage, y_axis, x_axis in zip(STAGES, trace(height), trace(width), strict=True):
            x, empty = network.encode_stage(x, stage), network.encode_stage(empty, stage)
            rows, columns = slice(*y_axis.window), slice(*x_axis.window)
            outside = x - empty
            assert outside[..., rows, columns].abs().max() > 1e-3
            outside[..., rows, columns] = 0
            assert outside.abs().max() < 1e-4
            middle = empty[..., slice(*y_axis.constant), slice(*x_axis.constant)]
            assert (middle - middle[..., :1, :1]).abs().max() < 1e-5


def test_a_small_empty_canvas_stretches_to_a_large_one() -> None:
    large, small = trace(50)[2], trace(50 - 2 * PERIOD)[2]
    assert (large.length, small.length) == (31, 27)  # two periods are 32 pixels, 4 at stride 8
    middle = small.constant.start
    assert stretched(small, large, torch.device("cpu")).tolist() == [0, 1, 2, 3, 3, 3, 3, *range(3, 27)]
    assert middle == 3


@pytest.mark.parametrize("stride", [8, 16, 32])
def test_scores_are_those_of_the_plain_network(stride: int) -> None:
    plain = thin(stride)
    fast = WindowedVGG16(plain)
    with torch.no_grad():
        for height, width in SIZES:
            x = image(height, width)
            for found, expected in zip(fast.score_pyramid(x), plain.score_pyramid(x), strict=True):
                assert relative_error(found, expected) < 1e-5, (height, width)
            assert relative_error(fast(x), plain(x)) < 1e-5, (height, width)


@pytest.mark.parametrize("stride", [8, 16, 32])
def test_scores_by_tiles(stride: int) -> None:
    plain = thin(stride)
    fast, exact = WindowedVGG16(plain, by_tiles=True), thin(stride).double()
    exactly_fast = WindowedVGG16(exact, by_tiles=True)
    with torch.no_grad():
        for height, width in SIZES:
            x = image(height, width)
            expected = exact(x.double())
            limit = 1e-5 if height * width > 15 else 5e-5  # one place, where three scores nearly cancel
            assert relative_error(fast(x), expected) < limit, (height, width)
            assert relative_error(exactly_fast(x.double()), expected) < 1e-13, (height, width)


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_scores_at_sizes_drawn_by_chance(seed: int) -> None:
    plain = thin(8, seed=seed)
    fast = WindowedVGG16(plain)
    draw = random.Random(seed)
    with torch.no_grad():
        for _ in range(12):
            x = image(draw.randint(1, 90), draw.randint(1, 90))
            assert relative_error(fast(x), plain(x)) < 1e-5, x.shape


def test_every_far_edge() -> None:
    """Sixteen lengths in a row: every way in which pooling rounds up at the far end."""
    plain = thin(8)
    fast = WindowedVGG16(plain)
    with torch.no_grad():
        for length in range(20, 20 + PERIOD):
            x = image(length, 55 - length)
            assert relative_error(fast(x), plain(x)) < 1e-5, length


def test_features_are_those_of_the_plain_network() -> None:
    plain = thin(8)
    with torch.no_grad():
        x = image(70, 45)
        for found, expected in zip(WindowedVGG16(plain).features(x), plain.features(x), strict=True):
            assert relative_error(found, expected) < 1e-5


def test_half_precision_is_rounded_after_the_bias() -> None:
    plain = thin(8).bfloat16()
    with torch.no_grad():
        plain.fc7.weight.zero_()[0, :3] = 1
        plain.fc7.bias[0] = 1  # type: ignore[index]
        values = torch.tensor([[[128, 128, 1.5, 0, 0, 0, 0]]], dtype=torch.bfloat16)
        # Above 256 there are even numbers only. The sum is 258.5: 258. Without the bias it is 257.5, so 258,
        # and 1 more lies in the middle between 258 and 260: 260.
        assert WindowedVGG16(plain).product("fc7")(values)[0, 0, 0] == 258


@pytest.mark.parametrize("rows", [1, 2])
def test_fc6_in_strips(monkeypatch: pytest.MonkeyPatch, rows: int) -> None:
    # pool5 of 90 x 45 pixels is 9 x 8, so fc6 gives 3 x 2 answers; each sees 7 * 7 * 6 numbers
    monkeypatch.setattr(windowed, "PATCHES", rows * 2 * 2 * 7 * 7 * THIN[4])
    plain = thin(8)
    with torch.no_grad():
        x = image(90, 45, number=2)
        assert plain.features(x).fc7.shape == (2, THIN[5], 3, 2)
        assert relative_error(WindowedVGG16(plain)(x), plain(x)) < 1e-5


def test_the_at_once_net() -> None:
    plain = thin(8, AT_ONCE_SCALES)
    with torch.no_grad():
        x = image(53, 80)
        assert relative_error(WindowedVGG16(plain)(x), plain(x)) < 1e-5
        assert relative_error(plain(x), thin(8)(x)) > 1e-2  # the scales matter


def test_it_is_the_released_network() -> None:
    weights = released.vgg_weights(8, CLASSES, 0, THIN)
    with torch.no_grad():
        x = image(41, 66)
        assert relative_error(WindowedVGG16(thin(8))(x), released.fcn8s(x, weights)) < 1e-5


@pytest.mark.parametrize("mode", ["bilinear", "nearest"])
def test_networks_that_resize_instead_of_cropping(mode: str) -> None:
    plain = ResizingVGG16FCN(CLASSES, 8, "nearest" if mode == "nearest" else "bilinear", THIN)
    weights = released.vgg_weights(8, CLASSES, 0, THIN)
    plain.load_state_dict({name: weights[name] for name in plain.state_dict()})
    plain.eval()
    with torch.no_grad():
        x = image(47, 90)
        assert relative_error(WindowedVGG16(plain)(x), plain(x)) < 1e-5


def test_a_batch_and_another_memory_layout() -> None:
    plain = thin(8)
    fast = WindowedVGG16(plain)
    with torch.no_grad():
        x = image(40, 31, number=3)
        expected = plain(x)
        assert relative_error(fast(x), expected) < 1e-5
        fast.to(memory_format=torch.channels_last)
        assert relative_error(fast(x.contiguous(memory_format=torch.channels_last)), expected) < 1e-5


def test_double_precision_agrees_far_better() -> None:
    """What is left in float32 is rounding."""
    plain = thin(8).double()
    with torch.no_grad():
        x = image(60, 44).double()
        assert relative_error(WindowedVGG16(plain)(x), plain(x)) < 1e-14


def test_what_is_remembered_does_not_depend_on_who_asked_first() -> None:
    plain = thin(8)
    fast = WindowedVGG16(plain)
    x = image(60, 44)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        rough = fast(x)
    with torch.no_grad():
        expected = plain(x)
        assert 1e-5 < relative_error(rough.float(), expected) < 0.1
        assert relative_error(fast(x), expected) < 1e-5
    fast.double()
    with torch.no_grad():
        assert relative_error(fast(x.double()), plain(x.double())) < 1e-7  # its constants were float32
    fast.float()
    fast(x).sum().backward()  # nothing made in inference mode is part of it
    gradient = plain.conv1_1.weight.grad
    assert gradient is not None
    assert gradient.abs().max() > 0


def test_memory_stays_bounded_over_many_sizes() -> None:
    fast = WindowedVGG16(thin(32))
    with torch.no_grad():
        for height in range(1, 2 * PERIOD + 4):
            fast(image(height, 9))
    assert len(fast._remembered) == PERIOD  # sizes that are whole periods apart have the same canvas


def test_weights_are_shared_and_nothing_is_added_to_the_model_file() -> None:
    plain = thin(8)
    fast = WindowedVGG16(plain)
    assert set(fast.state_dict()) == {f"network.{name}" for name in plain.state_dict()}
    assert fast.state_dict().keys() == WindowedVGG16(plain, by_tiles=True).state_dict().keys()
    assert fast.network.fc6.weight is plain.fc6.weight
    assert (fast.num_classes, fast.stride, fast.training) == (CLASSES, 8, False)
