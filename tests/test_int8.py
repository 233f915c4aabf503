"""8-bit integers with OpenVINO: ranges from the user's images, and runs that go on with the same network."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from small_model import save_picture, small_model
from torch import nn

from segcli.cli import main
from segcli.errors import UsageError
from segcli.inference.calibration import HELD_OUT, ranges_on
from segcli.models.checkpoint import load_model
from segcli.models.openvino_networks import EXAMPLE, Compiler, with_openvino


class Two(nn.Module):
    """Two convolutions, the second of one channel per group."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, 2, 1)
        self.second = nn.Conv2d(2, 2, 3, padding=1, groups=2)
        with torch.no_grad():
            self.first.weight.copy_(torch.tensor([2.0, -1.0]).reshape(2, 1, 1, 1))
            self.first.bias.zero_()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.second(self.first(x).relu())
        return y


def test_ranges_are_what_the_convolutions_see() -> None:
    network, seen = Two().eval(), {}
    compute = Compiler("f32", seen=seen).compiled("all", network, network, 1)
    x = torch.zeros(1, 1, *EXAMPLE)
    x[0, 0, 0, 0], x[0, 0, 5, 7] = -3, 1.5
    compute(x)
    compute(x / 2)
    # times 2 and -1, and what is below zero becomes zero: from 0 to 3 in both channels
    assert seen == {"all": [(-3, 1.5), (0, 3)]}


def test_inputs_and_weights_are_rounded_to_steps() -> None:
    network = Two().eval()
    ranges = [(-3.0, 1.5), (0.0, 3.0)]
    compute = Compiler("f32", quantized={"all": ranges}).compiled("all", network, network, 1)
    x = torch.linspace(-3, 1.5, EXAMPLE[0] * EXAMPLE[1]).reshape(1, 1, *EXAMPLE)
    with torch.no_grad():
        (found,) = compute(x)
        step = 3 / 128  # -128 to 127 steps, since there are negatives
        first = network.first((x / step).round() * step).relu()  # weights 2 and -1: 127 steps exactly
        step = 3 / 255
        rounded = (first / step).round().clamp(0, 255) * step
        limits = network.second.weight.abs().amax((1, 2, 3), keepdim=True)
        weights = (network.second.weight / (limits / 127)).round() * (limits / 127)
        expected = torch.nn.functional.conv2d(rounded, weights, network.second.bias, padding=1, groups=2)
        assert not torch.allclose(network(x), expected, atol=1e-3)
        # Values half-way between two steps may go to either.
        assert ((found - expected).abs() > 1e-4).float().mean() < 0.01
        assert (found - expected).abs().max() < 3 * 2 * step


def test_ranges_of_another_network_are_refused() -> None:
    network = load_model(small_model()).network
    ranges, _ = ranges_on(network, [torch.zeros(1, 3, 40, 40)])
    (part,) = ranges
    with pytest.raises(UsageError, match="OpenVINO cannot compute this network"):
        with_openvino(network, "int8", {part: ranges[part][1:]})


def predict(*arguments: object) -> int:
    with pytest.raises(SystemExit) as stop:
        main(["predict", "--model", str(small_model()), "--save", "mask", *map(str, arguments)])
    return int(stop.value.code or 0)


INT8 = ("--runtime", "openvino", "--precision", "int8")


def test_a_run_goes_on_with_the_network_that_it_began_with(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    photos, out = tmp_path / "photos", tmp_path / "masks"
    for number in range(2 * HELD_OUT):
        save_picture(photos / f"{number}.png", 48, 64, seed=number)
    assert predict(photos, "--out", out, *INT8) == 0
    text = capsys.readouterr().err
    kept = json.loads((out / "_run/calibration.json").read_text())
    assert (kept["images"], kept["held_out"]) == (6, 2)
    assert 0.5 < kept["agreement"] <= 1  # an untrained network, whose scores nearly tie
    assert f"calibrated on 6 images: {kept['agreement']:.2%} of the pixels of 2 other images" in text
    masks = {path.name: path.read_bytes() for path in out.glob("*.png")}
    assert len(masks) == 8

    save_picture(photos / "new.png", 48, 64, seed=99)  # would change the ranges, were it looked at
    (out / "3.png").unlink()
    assert predict(photos, "--out", out, *INT8) == 0
    assert "Calibrating" not in capsys.readouterr().err
    assert json.loads((out / "_run/calibration.json").read_text()) == kept
    assert {name: (out / name).read_bytes() for name in masks} == masks

    again = tmp_path / "again"
    (photos / "new.png").unlink()
    assert predict(photos, "--out", again, *INT8) == 0
    assert {path.name: path.read_bytes() for path in again.glob("*.png")} == masks

    kept["ranges"] = {part: [[low, 2 * high] for low, high in each] for part, each in kept["ranges"].items()}
    (out / "_run/calibration.json").write_text(json.dumps(kept))
    assert predict(photos, "--out", out, *INT8) == 2  # results of two networks are not mixed
    assert "calibration" in capsys.readouterr().err


def test_who_calibrates_and_on_what(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    photos, out = tmp_path / "photos", tmp_path / "masks"
    save_picture(photos / "a.png", 48, 64, seed=0)
    assert predict(photos, "--out", out, *INT8, "--shard", "2/2") == 2
    assert "shard 1 calibrates" in capsys.readouterr().err
    assert predict(photos, "--out", out, "--precision", "int8") == 2
    assert "--runtime openvino" in capsys.readouterr().err
    (photos / "a.png").write_bytes(b"no picture")
    assert predict(photos, "--out", out, *INT8) == 2
    assert "can be read" in capsys.readouterr().err
    assert not np.any([path.suffix == ".png" for path in out.rglob("*")])
