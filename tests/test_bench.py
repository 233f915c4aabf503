"""`segcli bench`: what it counts, and that its figures belong together."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from small_model import small_model
from torch import nn

from segcli.cli import main
from segcli.images import read_image
from segcli.inference.benchmark import (
    Size,
    interleaved,
    multiplications,
    synthetic_photo,
    write_photos,
)


def run(*arguments: object) -> int:
    with pytest.raises(SystemExit) as stop:
        main(["bench", "--model", str(small_model()), *map(str, arguments)])
    return int(stop.value.code or 0)


def test_multiplications_of_known_layers_written_out() -> None:
    # 10 x 12 outputs, each of 5 channels a sum over 3 channels of 3 x 3 pixels
    convolution = nn.Conv2d(3, 5, 3, padding=1)
    assert multiplications(lambda: convolution(torch.zeros(1, 3, 10, 12))) == 10 * 12 * 5 * 3 * 3 * 3
    assert multiplications(lambda: torch.zeros(2, 7) @ torch.zeros(7, 4)) == 2 * 7 * 4
    with torch.inference_mode():
        assert multiplications(lambda: convolution(torch.zeros(2, 3, 1, 1))) == 2 * 5 * 3 * 3 * 3


def test_jobs_take_turns_and_the_first_round_does_not_count() -> None:
    order: list[str] = []
    found = interleaved({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, rounds=3)
    assert order == ["a", "b"] * 4
    assert all(0 <= timing.median <= timing.p90 for timing in found.values())


def test_photographs_have_the_spectrum_of_photographs() -> None:
    photo = synthetic_photo(Size(256, 192), seed=1)
    assert photo.shape == (192, 256, 3)
    assert photo.dtype == np.uint8
    assert (photo == synthetic_photo(Size(256, 192), seed=1)).all()
    assert (photo != synthetic_photo(Size(256, 192), seed=2)).any()
    amplitude = np.abs(np.fft.rfft2(photo[..., 1].astype(float)))
    frequency = np.hypot(np.fft.fftfreq(192)[:, None], np.fft.rfftfreq(256))
    low = amplitude[(frequency > 0.02) & (frequency < 0.04)].mean()
    high = amplitude[(frequency > 0.3) & (frequency < 0.5)].mean()
    assert low > 8 * high  # one over the frequency: about 13; white noise has as much in both
    assert synthetic_photo(Size(1, 1), seed=0).shape == (1, 1, 3)


def test_folder_takes_the_sizes_in_turns(tmp_path: Path) -> None:
    paths = write_photos(tmp_path, [Size(40, 30), Size(16, 24)], 5)
    shapes = [read_image(path).pixels.shape[:2] for path in paths]
    assert shapes == [(30, 40), (24, 16)] * 2 + [(30, 40)]
    assert len({path.read_bytes() for path in paths}) == 5


def test_document(capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        run("--size", "64x48", "--size", "96x80", "--runs", 2, "--images", 5, "--json", "--precision", "fp32")
        == 0
    )
    content = json.loads(capsys.readouterr().out)
    assert content["network"] == "fcn8s-mobilenet_v3_large"
    assert (content["precision"], content["batch_size"], content["runs"]) == ("fp32", 1, 2)
    assert content["cpus"] >= 1
    assert content["matrix_gflops"]["fp32"] > 0
    small, large = content["sizes"]
    assert (small["width"], small["height"], small["network_sees"]) == (64, 48, "64x48")
    # 2.5 times the pixels; maps of odd sizes are rounded up
    assert 2 < large["multiplications"] / small["multiplications"] < 3
    for size in (small, large):
        assert list(size["stages_ms"]) == ["decode", "resize", "network", "labels", "encode"]
        for timing in (size["latency_ms"], size["stream_ms"], *size["stages_ms"].values()):
            assert 0 < timing["median"] <= timing["p90"]
            assert timing["processor"] > 0
        assert size["images_per_second"] == pytest.approx(1e3 / size["stream_ms"]["median"], rel=1e-2)
        seconds = size["stages_ms"]["network"]["median"] / 1e3
        assert size["network_gflops"] == pytest.approx(2e-9 * size["multiplications"] / seconds, abs=0.01)
        share = size["network_gflops"] / content["matrix_gflops"]["fp32"]
        assert size["share_of_matrix_rate"] == pytest.approx(share, rel=0.1, abs=1e-3)
    folder = content["folder"]
    assert folder["images"] == 4  # from the first result on
    assert folder["images_per_second"] == pytest.approx(4 / folder["seconds"], rel=0.01)
    assert folder["of_network_and_labels"] > 0
    assert content["peak_memory_bytes"]["process"] > 50 * 2**20  # PyTorch alone takes more


def test_table_fits_80_columns(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert run("--size", "1x1", "--runs", 1, "--images", 0) == 0
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 80
    assert "Peak memory" in text
    assert "folder" not in text.lower()


@pytest.mark.parametrize("size", ["500", "0x5", "axb", "500x", "-5x5", "30000x2"])
def test_wrong_size(size: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--size", size) == 2
    assert "--size" in capsys.readouterr().err


def test_one_photograph_is_no_folder(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--images", 1) == 2
    assert "from the first result to the last" in capsys.readouterr().err
