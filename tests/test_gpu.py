"""What a GPU computes is what the processor computes. Skipped where there is none."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from processes import run
from small_model import save_picture, small_model

from segcli.images import read_label_map

DEVICE = "cuda"
SIZES = [(48, 64)] * 70 + [(64, 48)] * 5 + [(300, 400)]  # four batches of one size are recorded, and replayed

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")


@pytest.fixture(scope="module")
def on_the_cpu(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with pictures in `in`, and in `masks` what the processor makes of them."""
    folder = tmp_path_factory.mktemp("pictures")
    for number, size in enumerate(SIZES):
        save_picture(folder / f"in/{number}.png", *size, number)
    assert predict(folder, "masks", "--device", "cpu", "--precision", "fp32") == (0, "")
    return folder


def predict(folder: Path, out: str, *options: object) -> tuple[int, str]:
    return run("predict", "in", "-m", small_model(), "--out", out, "-q", *options, folder=folder)


@pytest.mark.parametrize(
    "options",
    [
        ("--device", DEVICE, "--precision", "fp32"),
        ("--device", f"{DEVICE}:all", "--precision", "fp32", "--processes", 2),
        ("--device", DEVICE, "--precision", "fp32", "--batch-size", 3, "--tile", "on"),
        ("--device", DEVICE, "--precision", "fp32", "--save", "mask,overlay,confidence,scores"),
    ],
)
def test_masks_are_those_of_the_processor(on_the_cpu: Path, options: tuple[object, ...]) -> None:
    out = "-".join(map(str, options)).replace(":", "-")
    assert predict(on_the_cpu, out, *options) == (0, "")
    wrong = total = 0
    for number, size in enumerate(SIZES):
        theirs, ours = (read_label_map(on_the_cpu / folder / f"{number}.png") for folder in ("masks", out))
        assert theirs.shape == ours.shape == size
        wrong += np.count_nonzero(theirs != ours)
        total += theirs.size
    assert wrong / total < 1e-3
