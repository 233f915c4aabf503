"""Preprocessing: the arithmetic of the release, and torchvision's own transform."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
import torch
from PIL import Image

from segcli.errors import UsageError
from segcli.models.preprocessing import PREPROCESSINGS, Preprocessing, network_size, resize_labels, to_tensor


def picture(height: int, width: int, seed: int = 0) -> npt.NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def test_caffe_written_out() -> None:
    image = picture(3, 5)
    found = to_tensor(image, PREPROCESSINGS["caffe"])
    assert found.shape == (1, 3, 3, 5)
    assert found.dtype == torch.float32
    red, green, blue = (image[1, 2, channel].astype(np.float64) for channel in range(3))
    expected = [blue - 104.00698793, green - 116.66876762, red - 122.67891434]
    np.testing.assert_allclose(found[0, :, 1, 2], expected, rtol=1e-5)


def test_the_others_written_out() -> None:
    image = np.full((1, 1, 3), (10, 20, 30), np.uint8)
    for name, expected in [
        ("caffe-vgg", [30 - 103.939, 20 - 116.779, 10 - 123.68]),
        ("caffe-unit", [(30 - 104.00699) / 255, (20 - 116.66877) / 255, (10 - 122.67892) / 255]),
        ("siftflow", [30 - 114.578, 20 - 115.294, 10 - 108.353]),
        ("nyud", [30 - 116.190, 20 - 97.203, 10 - 92.318]),
        ("nyud-hha", [10 - 132.431, 20 - 94.076, 30 - 118.477]),
        ("imagenet", [(10 / 255 - 0.485) / 0.229, (20 / 255 - 0.456) / 0.224, (30 / 255 - 0.406) / 0.225]),
    ]:
        np.testing.assert_allclose(to_tensor(image, PREPROCESSINGS[name]).flatten(), expected, rtol=1e-5)


@pytest.mark.parametrize("size", [(30, 40), (1, 1), (520, 600), (700, 1001), (1300, 601)])
def test_torchvision_is_torchvisions(size: tuple[int, int]) -> None:
    from torchvision.transforms._presets import SemanticSegmentation

    image = picture(*size)
    preset = SemanticSegmentation(resize_size=520)
    expected = preset(Image.fromarray(image))
    found = to_tensor(image, PREPROCESSINGS["torchvision"])[0]
    assert found.shape == expected.shape
    step = 1 / 255 / 0.224  # one grey level
    assert (found - expected).abs().max() < 1.5 * step
    shrinks = min(size) > 520
    assert (found - expected).abs().mean() < (1e-6 if shrinks else 0.3 * step)


def test_network_size_rounds_down_as_torchvision_does() -> None:
    settings = Preprocessing(shorter_side=520)
    assert network_size(375, 500, settings) == (520, 693)  # 520 * 500 / 375 = 693.3
    assert network_size(500, 333, settings) == (780, 520)  # 520 * 500 / 333 = 780.8
    assert network_size(7, 7, settings) == (520, 520)
    assert network_size(375, 500, Preprocessing()) == (375, 500)


def test_strips_are_not_blown_up() -> None:
    settings = Preprocessing(shorter_side=100)
    assert network_size(50, 400, settings) == (100, 800)
    assert network_size(50, 500, settings) == (80, 800)  # 800 / 500 * 50
    assert network_size(5000, 1, settings) == (800, 1)
    assert network_size(1, 1, settings) == (100, 100)


def test_labels_are_never_interpolated() -> None:
    labels = np.array([[0, 255], [7, 3]], np.uint8)
    found = resize_labels(labels, Preprocessing(shorter_side=5))
    assert found.shape == (5, 5)
    assert set(np.unique(found).tolist()) <= {0, 255, 7, 3}


@pytest.mark.parametrize(
    "options",
    [{"mean": (0.0, 0.0)}, {"std": (0.0, 1.0, 1.0)}, {"order": "GBR"}, {"scale": 0}, {"shorter_side": -1},
     {"mean": (float("nan"), 0.0, 0.0)}],
)  # fmt: skip
def test_settings_that_make_no_sense(options: dict[str, object]) -> None:
    with pytest.raises(UsageError):
        Preprocessing(**options)  # type: ignore[arg-type]
