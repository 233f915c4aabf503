"""A model file with random weights that still tells many classes apart, and pictures for it."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image


@functools.cache
def small_model() -> Path:
    """An FCN-8s of 21 classes on a small encoder. Its masks are nonsense, but the same everywhere."""
    import torch

    from segcli.models.checkpoint import ModelInfo, save_model
    from segcli.models.networks import get
    from segcli.palettes import CLASS_SETS

    torch.set_num_threads(1)  # all that the tests compute is small
    torch.manual_seed(0)
    network = get("fcn8s-mobilenet_v3_large", 21)
    network.train()
    for layer in network.modules():
        if isinstance(layer, torch.nn.BatchNorm2d):
            layer.momentum = None  # the plain mean of all batches
    with torch.no_grad():
        pictures = torch.from_numpy(np.stack([picture(96, 96, seed) for seed in range(4)]))
        inputs = pictures.permute(0, 3, 1, 2) / 128 - 1
        for _ in range(2):  # gives batch normalisation statistics, so that signals reach the end
            network(inputs)
        network.eval()
        network.score_fr.bias -= network(inputs).mean((0, 2, 3))  # else one class wins everywhere
    path = Path(tempfile.mkdtemp(prefix="segcli-test-")) / "small.safetensors"
    save_model(path, network, ModelInfo("fcn8s-mobilenet_v3_large", CLASS_SETS["voc"]))
    return path


def picture(height: int, width: int, seed: int = 0) -> npt.NDArray[np.uint8]:
    """A smooth random picture, uint8 (H, W, 3)."""
    random = np.random.default_rng(seed)
    coarse = random.integers(0, 256, (max(1, height // 16) + 1, max(1, width // 16) + 1, 3), np.uint8)
    return np.array(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))


def save_picture(path: Path, height: int = 48, width: int = 64, seed: int = 0) -> Path:
    """A picture in a file, in the format that its name says."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(picture(height, width, seed)).save(path)
    return path
