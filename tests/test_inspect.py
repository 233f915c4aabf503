"""`segcli inspect`: the picture, and what can go wrong."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from segcli.cli import main
from segcli.inspection import scores_by_stride
from segcli.models.checkpoint import ModelInfo, save_model
from segcli.models.networks import get
from segcli.palettes import generic_class_set


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("model") / "small.safetensors"
    save_model(path, get("fcn8s-regnet_y_400mf", 4), ModelInfo("fcn8s-regnet_y_400mf", generic_class_set(4)))
    return path


def run(*arguments: object) -> int:
    with pytest.raises(SystemExit) as stop:
        main(["inspect", *map(str, arguments)])
    return int(stop.value.code or 0)


def test_picture_has_nine_panels_and_a_legend(tmp_path: Path, model: Path) -> None:
    photo = tmp_path / "photo.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 60, 3), np.uint8)).save(photo)
    out = tmp_path / "sheet.png"
    assert run(photo, "--model", model, "--out", out, "--quiet") == 0
    with Image.open(out) as sheet:
        assert sheet.mode == "RGB"
        assert sheet.width > 3 * 360  # three panels of 360 x 240 in each of three rows
        assert sheet.height > 3 * 240


@pytest.mark.parametrize("size", [(1, 1), (1, 300), (300, 1)])
def test_any_size(tmp_path: Path, model: Path, size: tuple[int, int]) -> None:
    photo = tmp_path / "photo.png"
    Image.new("L", size, 90).save(photo)
    assert run(photo, "--model", model, "--out", tmp_path / "s.png", "--quiet") == 0


def test_finest_stride_is_what_predict_gives() -> None:
    torch.manual_seed(0)
    network = get("fcn8s-regnet_y_400mf", 3).eval()
    image = torch.randn(1, 3, 50, 70)
    with torch.inference_mode():
        found = scores_by_stride(network, image, (50, 70))
        assert list(found) == [32, 16, 8]
        torch.testing.assert_close(found[8], network(image))


def test_wrong_usage(tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    photo = tmp_path / "photo.png"
    Image.new("RGB", (9, 9)).save(photo)
    before = photo.read_bytes()
    assert run(tmp_path / "none.png", "--model", model) == 2
    assert run(photo, "--model", model, "--out", photo) == 2
    assert run(photo, "--model", model, "--out", tmp_path / "sheet.jpg") == 2
    assert run(photo, "--model", tmp_path / "none.safetensors") == 2
    (tmp_path / "text.png").write_text("no image")
    assert run(tmp_path / "text.png", "--model", model, "--out", tmp_path / "s.png") == 1
    assert capsys.readouterr().err.count("Error: ") == 5
    assert photo.read_bytes() == before
