"""FCN-8s on VGG16 at one size: the plain network, and the same computed only where the image can reach.

    OMP_NUM_THREADS=1 python benchmarks/border.py [--size 375 500] [--rounds 5]

Prints multiplications, what they would take at this machine's measured matrix rate, what single convolutions
took as sums and by Winograd's tiles, what both networks took (interleaved, medians; on a busy machine believe
the processor time), also in bf16, how far their scores lie apart, what the bundled models take for an image
of that size, and what the label map took from scores of the full size and from cells of the coarse ones.
Weights are random, but for the bundled models.
"""

from __future__ import annotations

import argparse
import datetime
import os
import platform
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from segcli.inference.benchmark import Timing, interleaved
from segcli.inference.cells import Labels, labels_from_coarse, lattice_of
from segcli.inference.classification import classify
from segcli.models import winograd
from segcli.models.checkpoint import load_model
from segcli.models.prepared import prepare
from segcli.models.preprocessing import to_tensor
from segcli.models.vgg import CONVOLUTIONS_PER_STAGE, FIRST_PADDING, VGG16FCN, WIDTHS
from segcli.models.windowed import STAGES, WindowedVGG16, trace
from segcli.models.winograd import Product, transformed
from segcli.models.zoo import bundled_models

CLASSES = 21
KERNEL = 3
LAYERS = (  # channels before and after, height and width
    (128, 256, 124, 156),
    (256, 256, 126, 158),
    (256, 512, 66, 82),
    (512, 512, 66, 82),
    (512, 512, 38, 46),
    (128, 128, 246, 306),
)
CLASSIFIER_SIDE = 7


def multiplications(height: int, width: int) -> dict[str, tuple[float, float]]:
    """Millions of multiplications by layer group: (plain, windowed). The head's few are left out."""
    plain = [n + 2 * FIRST_PADDING - KERNEL + 1 for n in (height, width)]  # after conv1_1
    axes = [trace(height), trace(width)]
    window = [height, width]
    counts: dict[str, tuple[float, float]] = {}
    before = 3
    for stage, convolutions in enumerate(CONVOLUTIONS_PER_STAGE, 1):
        whole = reached = 0
        if stage in STAGES:
            window = [n + sum(axis[stage - 1].widened) for n, axis in zip(window, axes, strict=True)]
        for _ in range(convolutions):
            weights = before * WIDTHS[stage - 1] * KERNEL**2
            window = [n + KERNEL - 1 for n in window] if stage in STAGES else plain
            whole += plain[0] * plain[1] * weights
            reached += window[0] * window[1] * weights
            before = WIDTHS[stage - 1]
        counts[f"stage {stage}"] = (whole / 1e6, reached / 1e6)
        plain = [-(-n // 2) for n in plain]
        window = [n // 2 for n in window]
    positions = (plain[0] - CLASSIFIER_SIDE + 1) * (plain[1] - CLASSIFIER_SIDE + 1)
    connected = positions * (WIDTHS[4] * CLASSIFIER_SIDE**2 + WIDTHS[5]) * WIDTHS[5] / 1e6
    counts["fc6, fc7"] = (connected, connected)
    return counts


def matrix_rate(rounds: int) -> float:
    """Floating point operations in a second of processor time, in a product of two 2048 x 2048 matrices."""
    a, b = torch.randn(2, 2048, 2048)
    timing = interleaved({"product": lambda: a @ b}, rounds)["product"]
    return 2 * 2048**3 / (timing.processor / 1e3)


def convolutions(rounds: int) -> None:
    """Sums beside tiles, all of them at once and some at a time, for layers of VGG16 at 500 x 375 pixels."""
    for before, after, *size in LAYERS:
        x = torch.randn(1, before, *size).relu().to(memory_format=torch.channels_last)
        weight, bias = (
            torch.randn(after, before, KERNEL, KERNEL) * (2 / 9 / before) ** 0.5,
            torch.randn(after),
        )
        product = partial(torch.matmul, other=transformed(weight).mT)
        some = winograd.NUMBERS

        def by_tiles(numbers: int, given: tuple[Tensor, Product, Tensor] = (x, product, bias)) -> None:
            winograd.NUMBERS = numbers
            winograd.convolve_by_tiles(*given, 0)

        jobs: dict[str, Callable[[], object]] = {
            "sums": partial(F.conv2d, x, weight, bias),
            "tiles, all at once": partial(by_tiles, 1 << 62),
            "tiles, some at a time": partial(by_tiles, some),
        }
        show(f"{before} to {after} channels, {size[0] - 2} x {size[1] - 2}", interleaved(jobs, rounds))


def show(title: str, found: dict[str, Timing]) -> None:
    print(f"\n{title}: median ms, wall and processor time")
    first = next(iter(found.values()))
    for name, timing in found.items():
        ratios = f"{first.median / timing.median:5.2f}x {first.processor / timing.processor:5.2f}x"
        print(f"  {name:34} {timing.median:9.1f} {timing.processor:9.1f}   {ratios}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--size", nargs=2, type=int, default=(375, 500), metavar=("HEIGHT", "WIDTH"))
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    height, width = options.size
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    print(f"{datetime.date.today()}, {platform.machine()}, {os.cpu_count()} CPUs, {threads} threads in use, "
          f"torch {torch.__version__}, {width} x {height} pixels")  # fmt: skip

    rate = matrix_rate(options.rounds) / threads  # processor time counts every thread
    counts = multiplications(height, width)
    print(f"\nmatrix rate {rate / 1e9:.0f} GFLOP/s and thread; 10^9 multiplications, plain and windowed")
    for name, (plain, reached) in counts.items():
        print(f"  {name:34} {plain / 1e3:9.1f} {reached / 1e3:9.1f}")
    totals = [sum(column) / 1e3 for column in zip(*counts.values(), strict=True)]
    at_rate = [2e9 * total / rate * 1e3 for total in totals]
    print(f"  {'all':34} {totals[0]:9.1f} {totals[1]:9.1f}   {totals[0] / totals[1]:.2f}x")
    print(f"  {'ms of one thread at the matrix rate':34} {at_rate[0]:9.0f} {at_rate[1]:9.0f}")

    with torch.inference_mode():
        convolutions(options.rounds)

    network = VGG16FCN(CLASSES, 8).eval()
    for layer in network.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight)
            nn.init.normal_(layer.bias, std=0.1)  # type: ignore[arg-type]
    cpu = torch.device("cpu")
    fast, reduced = prepare(network, cpu), prepare(network, cpu, "bf16")
    images = torch.randn(1, 3, height, width) * 60
    with torch.inference_mode():
        jobs: dict[str, Callable[[], object]] = {
            "plain": partial(network, images),
            "windowed, by sums": partial(WindowedVGG16(network), images),
            "windowed": partial(fast, images),
            "windowed, bf16": partial(reduced, images),
        }
        show("scores of the full size", interleaved(jobs, options.rounds))
        expected = network(images)
        for name, other in (("windowed", fast), ("bf16", reduced)):
            error = (expected - other(images)).abs().max()
            share = error / expected.abs().max()
            print(f"  {name} apart by at most {error:.1e}, {share:.1e} of the largest score")

        for name, file in bundled_models().items():
            model = load_model(file)
            pixels = torch.randint(0, 256, (height, width, 3), dtype=torch.uint8).numpy()
            seen = to_tensor(pixels, model.info.preprocessing)
            networks = {how: prepare(model.network, cpu, how) for how in ("fp32", "bf16")}
            trained = {"as trained": model.network} | networks
            jobs = {how: partial(each.score_pyramid, seen) for how, each in trained.items()}
            show(f"{name}, which sees {seen.shape[3]} x {seen.shape[2]}", interleaved(jobs, options.rounds))

        # Label maps: large regions with wavering borders, since random weights give hardly any.
        shape = fast.score_pyramid(images)[-1].shape[-2:]
        regions = F.interpolate(torch.randn(1, CLASSES, 4, 5), shape, mode="bilinear")[0]
        coarse = regions * 3 + torch.randn(CLASSES, *shape) * 0.05
        lattice = lattice_of(network)
        assert lattice is not None
        winners = coarse.argmax(0)
        quads = torch.stack([winners[:-1, :-1], winners[1:, :-1], winners[:-1, 1:], winners[1:, 1:]])
        print(f"\n{(quads != quads[0]).any(0).float().mean():.0%} of the cells lie between classes")
        for displayed in ((height, width), (3000, 4000)):

            def by_scores(size: tuple[int, int] = displayed) -> Labels:
                return classify(network.upsample(coarse[None], (height, width)), size).of(0).labels

            by_cells = partial(labels_from_coarse, coarse, lattice, (height, width), displayed)
            jobs = {"scores of the full size": by_scores, "cells": by_cells}
            show(f"label map of {displayed[1]} x {displayed[0]}", interleaved(jobs, options.rounds))
            differ = (by_cells() != by_scores()).mean()
            print(f"  {differ:.1e} of the pixels differ")


if __name__ == "__main__":
    main()
