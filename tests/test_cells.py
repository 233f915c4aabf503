"""Label maps straight from coarse scores, against the highest of the scores at full size."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import released
import torch
import torch.nn.functional as F
from torch import Tensor

from segcli.errors import ImageError
from segcli.inference import cells
from segcli.inference.cells import Labels, Lattice, labels_from_coarse, lattice_of, mixture
from segcli.inference.classification import classify
from segcli.inference.decoders import Decoded
from segcli.inference.products import Segmentation
from segcli.inference.segmentation import Segmenter
from segcli.inference.sources import Input
from segcli.models.alexnet import AlexNetFCN
from segcli.models.checkpoint import Model
from segcli.models.fcn import FCN, Alignment, Channels, Features
from segcli.models.info import ModelInfo
from segcli.models.preprocessing import Preprocessing, to_tensor
from segcli.models.semseg import ResizingVGG16FCN
from segcli.models.vgg import VGG16FCN
from segcli.palettes import CLASS_SETS

THIN = (2, 3, 4, 5, 6, 7)
CLASSES = 6
SIZES = [(1, 1), (1, 9), (7, 3), (8, 8), (15, 17), (16, 33), (40, 25), (61, 90), (128, 75)]


class Head(FCN):
    """Only the last upsampling of the networks on torchvision's encoders."""

    def __init__(self, stride: int, classes: int = CLASSES) -> None:
        super().__init__(classes, Channels(1, 1, 1), stride, Alignment())

    def features(self, images: Tensor) -> Features:
        raise NotImplementedError


def random_scores(classes: int, height: int, width: int, seed: int = 0) -> Tensor:
    return torch.randn(classes, height, width, generator=torch.Generator().manual_seed(seed))


def patchy_scores(classes: int, height: int, width: int, seed: int = 0) -> Tensor:
    """Large regions where one class is far ahead, and little noise."""
    noise = random_scores(classes, height, width, seed)
    regions = F.interpolate(random_scores(classes, 3, 3, seed + 1)[None], (height, width), mode="nearest")[0]
    return regions * 5 + noise * 0.2


def assert_highest(labels: Labels, full: Tensor, displayed: tuple[int, int]) -> None:
    """The labels are the classes of the highest scores, but for what rounding decides."""
    expected = classify(full[None], displayed).of(0).labels
    assert labels.shape == expected.shape
    assert labels.dtype == expected.dtype
    y, x = np.nonzero(labels != expected)
    if full.shape[1:] == displayed:
        ours, theirs = (full.numpy()[m[y, x], y, x] for m in (labels, expected))
        assert np.abs(ours - theirs).max(initial=0) < 1e-5
    assert len(y) <= labels.size * 1e-4


@pytest.mark.parametrize("stride", [8, 16, 32])
@pytest.mark.parametrize("make", [random_scores, patchy_scores])
def test_fixed_interpolation(stride: int, make: Callable[..., Tensor]) -> None:
    network = Head(stride)
    lattice = lattice_of(network)
    assert lattice == Lattice(stride, Fraction(stride - 1, 2), extended=True)
    for seed, size in enumerate(SIZES):
        coarse = make(CLASSES, -(-size[0] // stride), -(-size[1] // stride), seed)
        full = network.upsample(coarse[None], size)[0]
        assert_highest(labels_from_coarse(coarse, lattice, size, size), full, size)


@pytest.mark.parametrize("stride", [8, 16, 32])
def test_released_networks(stride: int) -> None:
    network = VGG16FCN(CLASSES, stride, widths=THIN).eval()  # upsampling starts at its released values
    lattice = lattice_of(network)
    # The peak of the 2 * stride kernel, less the crop: 7.5 - 31, 15.5 - 27, 31.5 - 19
    origin = {8: Fraction(-47, 2), 16: Fraction(-23, 2), 32: Fraction(25, 2)}[stride]
    assert lattice == Lattice(stride, origin, extended=False)
    with torch.no_grad():
        for seed, size in enumerate(SIZES):
            shape = network.score_pyramid(torch.zeros(1, 3, *size))[-1].shape[2:]
            for make in (random_scores, patchy_scores):
                coarse = make(CLASSES, *shape, seed)
                full = network.upsample(coarse[None], size)[0]
                assert_highest(labels_from_coarse(coarse, lattice, size, size), full, size)


def test_fcn_alexnet() -> None:
    network = AlexNetFCN(CLASSES, (2, 4, 6, 6, 4, 3)).eval()
    lattice = lattice_of(network)
    assert lattice == Lattice(32, Fraction(31 - 18), extended=False)
    with torch.no_grad():
        for seed, size in enumerate(SIZES):
            shape = network.score_pyramid(torch.zeros(1, 3, *size))[-1].shape[2:]
            coarse = random_scores(CLASSES, *shape, seed)
            full = network.upsample(coarse[None], size)[0]
            assert_highest(labels_from_coarse(coarse, lattice, size, size), full, size)


@pytest.mark.parametrize("displayed", [(37, 90), (74, 180), (100, 77), (300, 301), (20, 31), (37, 91)])
@pytest.mark.parametrize("stride", [8, 32])
def test_images_displayed_at_another_size_than_the_network_saw(
    displayed: tuple[int, int], stride: int
) -> None:
    seen = (37, 90)
    for network in (Head(stride), VGG16FCN(CLASSES, stride, widths=THIN).eval()):
        lattice = lattice_of(network)
        assert lattice is not None
        with torch.no_grad():
            shape = (-(-seen[0] // stride), -(-seen[1] // stride))
            if isinstance(network, VGG16FCN):
                shape = network.score_pyramid(torch.zeros(1, 3, *seen))[-1].shape[2:]
            for make in (random_scores, patchy_scores):
                coarse = make(CLASSES, *shape)
                full = network.upsample(coarse[None], seen)[0]
                assert_highest(labels_from_coarse(coarse, lattice, seen, displayed), full, displayed)


def test_equal_scores_go_to_the_first_class() -> None:
    """Whole numbers, so that interpolation by powers of two is exact and many scores are equal."""
    coarse = torch.randint(0, 3, (CLASSES, 9, 12), generator=torch.Generator().manual_seed(0)).float()
    full = F.interpolate(coarse[None], scale_factor=8, mode="bilinear", align_corners=False)[0]
    top = full.topk(2, dim=0).values
    assert (top[0] == top[1]).float().mean() > 0.05
    lattice = lattice_of(Head(8))
    assert lattice is not None
    labels = labels_from_coarse(coarse, lattice, (72, 96), (72, 96))
    assert (labels == full.argmax(0).numpy()).all()
    assert not labels_from_coarse(torch.ones(CLASSES, 9, 12), lattice, (72, 96), (72, 96)).any()


def test_a_class_may_win_between_scores_that_it_wins_nowhere() -> None:
    #                        class 0  class 1  class 2, at two places
    coarse = torch.tensor([[[1.0, 0.0]], [[0.0, 1.0]], [[0.9, 0.9]]])
    lattice = Lattice(8, Fraction(7, 2), extended=True)
    labels = labels_from_coarse(coarse, lattice, (8, 16), (8, 16))
    # Between pixels 3.5 and 11.5 class 0 falls from 1 to 0: below 0.9 after 0.8 pixels.
    assert labels[0].tolist() == [0] * 5 + [2] * 6 + [1] * 5


def test_pixels_as_mixtures_written_out() -> None:
    lattice = Lattice(8, Fraction(7, 2), extended=True)
    axis = mixture(lattice, 2, 16, 16)
    # Scores lie at pixels 3.5 and 11.5. Pixels 0..3 are score 0 alone, 4..11 a mixture, 12..15 score 1 alone.
    assert axis.cell.tolist() == [0] * 4 + [1] * 8 + [2] * 4
    assert (axis.start.tolist(), axis.size.tolist()) == ([0, 4, 12], [4, 8, 4])
    assert axis.scores.T.tolist() == [[0, 0], [0, 1], [1, 1]]
    assert axis.weights[4].tolist() == [15 / 16, 1 / 16]
    assert axis.weights[11].tolist() == [1 / 16, 15 / 16]
    # Displayed at twice the size: pixels 7 and 8 lie at 3.25 and 3.75, between the network's pixels 3 and 4.
    double = mixture(lattice, 2, 16, 32)
    assert double.weights[8].tolist() == pytest.approx([0.25 + 0.75 * 15 / 16, 0.75 / 16])
    # A transposed convolution falls to zero beyond the outermost scores.
    falling = mixture(Lattice(8, Fraction(7, 2), extended=False), 2, 16, 16)
    assert falling.weights[0].tolist() == pytest.approx([1 - 3.5 / 8, 0])
    for stretched in (mixture(lattice, 5, 37, 200), mixture(lattice, 1, 3, 50), mixture(lattice, 9, 70, 20)):
        assert (stretched.weights.sum(1) - 1).abs().max() < 1e-6
        assert (stretched.weights >= 0).all()


@pytest.mark.parametrize("at_a_time", [1, 500])
def test_a_few_cells_at_a_time(monkeypatch: pytest.MonkeyPatch, at_a_time: int) -> None:
    lattice = Lattice(8, Fraction(7, 2), extended=True)
    coarse = random_scores(CLASSES, 7, 9)
    expected = labels_from_coarse(coarse, lattice, (56, 72), (100, 90))
    monkeypatch.setattr(cells, "CORNERS", at_a_time)
    monkeypatch.setattr(cells, "BLOCK", at_a_time)
    assert (labels_from_coarse(coarse, lattice, (56, 72), (100, 90)) == expected).all()


def test_more_than_256_classes() -> None:
    lattice = Lattice(8, Fraction(7, 2), extended=True)
    coarse = random_scores(300, 5, 6)
    labels = labels_from_coarse(coarse, lattice, (40, 48), (40, 48))
    full = F.interpolate(coarse[None], scale_factor=8, mode="bilinear", align_corners=False)[0]
    assert labels.max() > 255
    assert_highest(labels, full, (40, 48))


@pytest.mark.parametrize("shorter_side", [None, 24])
@pytest.mark.parametrize("stride", [8, 32])
def test_predict_gives_the_labels_of_the_plain_network(stride: int, shorter_side: int | None) -> None:
    network = VGG16FCN(21, stride, widths=THIN)
    network.load_state_dict(
        {
            name: network.state_dict()[name] if name.startswith("upscore") else value
            for name, value in released.vgg_weights(stride, 21, 0, THIN).items()
        }
    )
    network.eval()
    preprocessing = Preprocessing(mean=(0.5, 0.5, 0.5), std=(0.01, 0.01, 0.01), shorter_side=shorter_side)
    model = Model(network, ModelInfo("test", CLASS_SETS["voc"], preprocessing), Path("test"), "")
    pixels = np.random.default_rng(0).integers(0, 256, (47, 60, 3), dtype=np.uint8)
    with torch.no_grad():
        scores = network(to_tensor(pixels, preprocessing))[0]
    expected = classify(scores[None], (47, 60)).of(0).labels
    assert len(np.unique(expected)) > 1
    for kinds in (["mask"], ["mask", "confidence"]):
        segmenter = Segmenter(model, torch.device("cpu"), kinds)
        assert (segmenter.lattice is not None) == (kinds == ["mask"])
        (result,) = segmenter.begin([Decoded(Input("a", "a"), pixels)]).results()
        assert isinstance(result, Segmentation)
        assert (result.labels != expected).mean() < 1e-3


def test_scores_that_are_not_finite_are_refused() -> None:
    network = VGG16FCN(21, 8, widths=THIN).eval()
    with torch.no_grad():
        network.score_fr.bias[3] = float("nan")
    preprocessing = Preprocessing(mean=(0.5, 0.5, 0.5), std=(1, 1, 1))
    model = Model(network, ModelInfo("test", CLASS_SETS["voc"], preprocessing), Path("test"), "")
    segmenter = Segmenter(model, torch.device("cpu"), ["mask"])
    (result,) = segmenter.begin([Decoded(Input("a", "a"), np.zeros((9, 9, 3), np.uint8))]).results()
    assert isinstance(result, ImageError)
    assert "not finite" in str(result)


def test_other_upsampling_is_left_alone() -> None:
    learned = VGG16FCN(CLASSES, 8, widths=THIN)
    with torch.no_grad():
        layer = learned.get_submodule("upscore8")
        assert isinstance(layer, torch.nn.ConvTranspose2d)
        layer.weight[1, 2, 3, 4] += 1e-3
    assert lattice_of(learned) is None
    assert lattice_of(ResizingVGG16FCN(CLASSES, 8, "bilinear", THIN)) is None
