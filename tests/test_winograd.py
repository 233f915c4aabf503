"""Convolutions by Winograd's tiles, against the sums that they stand for."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from segcli.models import winograd
from segcli.models.strips import InStrips
from segcli.models.winograd import KERNEL, STEP, TILE, convolve_by_tiles, transformed, transforms

SIZES = [(1, 1), (2, 3), (4, 4), (5, 8), (6, 6), (7, 9), (13, 30), (31, 2)]


def drawn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def by_tiles(x: Tensor, weight: Tensor, bias: Tensor, padding: int) -> Tensor:
    return convolve_by_tiles(x, partial(torch.matmul, other=transformed(weight).mT), bias, padding)


def test_one_axis_written_out() -> None:
    tile, kernel, output = transforms()
    numbers = torch.tensor([1.0, 2, 0, -1, 3, 5], dtype=torch.float64)
    weights = torch.tensor([2.0, -1, 4], dtype=torch.float64)
    # 2 * 1 - 1 * 2 + 4 * 0 = 0, then 2 * 2 - 0 - 4 = 0, 0 + 1 + 12 = 13 and -2 - 3 + 20 = 15
    found = output @ ((kernel @ weights) * (tile @ numbers))
    torch.testing.assert_close(found, torch.tensor([0.0, 0, 13, 15], dtype=torch.float64))
    # At 1 the kernel's polynomial is 2 - 1 + 4 = 5, and the others' differences are 1, 2, 1 / 2 and 3: 5 / 3
    assert float(kernel[1] @ weights) == pytest.approx(5 / 3)
    # x (x + 1) (x - 1 / 2) (x + 2) = x^4 + 5 / 2 x^3 + 1 / 2 x^2 - x
    assert tile[1].tolist() == [0, -1, 0.5, 2.5, 1, 0]


def test_what_meets_the_data_is_exact_in_few_bits() -> None:
    for part in (transforms()[0], transforms()[2]):
        assert torch.equal(part.bfloat16().double(), part)


@pytest.mark.parametrize("padding", [0, 1, 2])
@pytest.mark.parametrize("number", [1, 3])
def test_it_is_the_convolution(padding: int, number: int) -> None:
    weight, bias = drawn(7, 5, 3, 3, seed=1), drawn(7, seed=2)
    for height, width in SIZES:
        if min(height, width) + 2 * padding >= KERNEL:
            x = drawn(number, 5, height, width)
            expected = F.conv2d(x, weight, bias, padding=padding)
            for given in (x, x.contiguous(memory_format=torch.channels_last)):
                torch.testing.assert_close(
                    by_tiles(given, weight, bias, padding), expected, rtol=0, atol=1e-12
                )


@pytest.mark.parametrize("numbers", [1, TILE * TILE * 5 * 9 * 2])
def test_some_rows_of_tiles_at_a_time(monkeypatch: pytest.MonkeyPatch, numbers: int) -> None:
    # 45 x 33 pixels padded by 1 are 12 x 9 tiles: one row of them at a time, and two of five channels each
    x, weight, bias = drawn(1, 5, 45, 33), drawn(7, 5, 3, 3, seed=1), drawn(7, seed=2)
    expected = by_tiles(x, weight, bias, 1)
    monkeypatch.setattr(winograd, "NUMBERS", numbers)
    torch.testing.assert_close(by_tiles(x, weight, bias, 1), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("rows", [1, 3, 10])
@pytest.mark.parametrize("padding", [0, 1, 2])
def test_an_image_in_strips(rows: int, padding: int) -> None:
    x, weight, bias = drawn(1, 5, 30, 21), drawn(7, 5, 3, 3, seed=1), drawn(7, seed=2)
    strips = InStrips(lambda image: by_tiles(image, weight, bias, padding), rows)
    assert strips.count(x) == -(-30 // rows)
    expected = F.conv2d(x, weight, bias, padding=padding)
    torch.testing.assert_close(strips(x), expected, rtol=0, atol=1e-12)


def test_float32_errs_little() -> None:
    x, weight = drawn(1, 512, 24, 24).relu(), drawn(64, 512, 3, 3, seed=1) * (2 / 9 / 512) ** 0.5
    bias = drawn(64, seed=2)
    expected = F.conv2d(x, weight, bias, padding=1)
    found = by_tiles(x.float(), weight.float(), bias.float(), 1)
    assert found.dtype == torch.float32
    assert (found - expected).abs().max() / expected.abs().max() < 5e-6  # with 0, 1, -1, 2, -2: 7e-6


def test_a_quarter_of_the_multiplications() -> None:
    x, weight, bias = drawn(1, 32, 8 * STEP + 2, 8 * STEP + 2), drawn(64, 32, 3, 3), drawn(64)
    product = partial(torch.matmul, other=transformed(weight).mT)
    with FlopCounterMode(display=False) as counter:
        convolve_by_tiles(x, product, bias, 0)
    sums = 2 * (3 * 3) * (8 * STEP) ** 2 * 32 * 64
    # and 36 sums of 36 numbers to get to a tile's values, 16 of 36 to get from them to its outputs
    around = 2 * 36 * (8 * 8) * (36 * 32 + 16 * 64)
    assert counter.get_total_flops() == sums // 4 + around
