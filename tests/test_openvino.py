"""Networks computed by OpenVINO, against the same networks in PyTorch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import openvino
import pytest
import released
import torch
from PIL import Image
from small_model import save_picture, small_model

from segcli.cli import main
from segcli.device import pick_runtime
from segcli.errors import UsageError
from segcli.models.networks import get
from segcli.models.openvino_networks import REMEMBERED, with_openvino
from segcli.models.vgg import VGG16FCN
from segcli.models.windowed import PATCHES

CLASSES = 5


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    assert found.shape == expected.shape
    assert found.dtype == torch.float32
    return float((found - expected).abs().max() / expected.abs().max())


def vgg() -> VGG16FCN:
    network = VGG16FCN(CLASSES, 8, widths=released.THIN)
    network.load_state_dict(released.vgg_weights(8, CLASSES, 0))
    return network.eval()


def image(height: int, width: int) -> torch.Tensor:
    return torch.randn(1, 3, height, width, generator=torch.Generator().manual_seed(height * width)) * 60


@pytest.mark.parametrize("patches", [1, PATCHES])  # a row of fc6 at a time, and all of them
def test_windowed_vgg16_of_any_size_against_the_released_network(
    patches: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("segcli.models.windowed.PATCHES", patches)
    weights = released.vgg_weights(8, CLASSES, 0)
    fast = with_openvino(vgg(), "fp32")
    with torch.inference_mode():
        for size in [(1, 1), (5, 3), (48, 64), (97, 61), (64, 48), (128, 130), (5, 3)]:
            x = image(*size)
            assert relative_error(fast(x), released.fcn8s(x, weights)) < 1e-5


def test_a_folder_of_mixed_sizes_needs_no_further_compilation(monkeypatch: pytest.MonkeyPatch) -> None:
    compile_model, parts = openvino.Core.compile_model, []

    def counted(core: Any, model: Any, device: str, options: dict[str, Any]) -> Any:
        parts.append(options)
        return compile_model(core, model, device, options)

    monkeypatch.setattr(openvino.Core, "compile_model", counted)
    fast = with_openvino(vgg(), "fp32")
    assert len(parts) == 13  # two windows, the products of nine convolutions by tiles, fc6 and fc7
    with torch.inference_mode():
        for height in range(20, 50, 7):
            for width in range(20, 50, 7):
                fast(image(height, width))
    assert len(parts) == 13
    for options in parts:  # what it prepares for a layer and a shape is bounded, too
        assert options["CPU_RUNTIME_CACHE_CAPACITY"] == REMEMBERED


@pytest.mark.parametrize("name", ["fcn8s", "fcn32s-resnet18", "lraspp_mobilenet_v3_large"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_scores_stay_when_the_next_image_is_computed(name: str, precision: str) -> None:
    torch.manual_seed(0)
    network = vgg() if name == "fcn8s" else get(name, CLASSES).eval()
    fast = with_openvino(network, precision)
    with torch.inference_mode():
        first = fast.score_pyramid(image(64, 48))
        kept = [scores.clone() for scores in first]
        second = fast.score_pyramid(image(64, 48).flip(3))
    for scores, before, other in zip(first, kept, second, strict=True):
        assert torch.equal(scores, before)
        assert not torch.equal(scores, other)


@pytest.mark.parametrize("name", ["fcn16s-resnet18", "fcn-alexnet", "lraspp_mobilenet_v3_large"])
def test_other_networks(name: str, capfd: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    network = get(name, CLASSES).eval()
    fast = with_openvino(network, "fp32")
    with torch.inference_mode():
        for size in [(65, 97), (128, 96)]:
            x = image(*size) / 60
            assert relative_error(fast(x), network(x)) < 1e-5
    assert capfd.readouterr().err == ""  # PyTorch's export has much to say of FCN-AlexNet


def test_precisions() -> None:
    network, x = vgg(), image(60, 80)
    with torch.inference_mode():
        error = relative_error(with_openvino(network, "bf16")(x), network(x))
    assert error < 5e-2  # the products of bfloat16 have 8 bits
    with pytest.raises(UsageError, match="fp32, bf16 or int8"):
        with_openvino(network, "fp16")


def predict(*arguments: object) -> int:
    with pytest.raises(SystemExit) as stop:
        main(
            ["predict", "--model", str(small_model()), "--precision", "fp32", "--quiet", *map(str, arguments)]
        )
    return int(stop.value.code or 0)


def test_masks_agree_and_the_run_says_who_computed_them(tmp_path: Path) -> None:
    for number, size in enumerate([(48, 64), (97, 61), (30, 100)]):
        save_picture(tmp_path / f"photos/{number}.png", *size, seed=number)
    masks = {}
    for runtime in ("torch", "openvino"):
        out = tmp_path / runtime
        assert predict(tmp_path / "photos", "--out", out, "--save", "mask", "--runtime", runtime) == 0
        masks[runtime] = np.concatenate(
            [np.array(Image.open(path)).ravel() for path in sorted(out.glob("*.png"))]
        )
        assert json.loads((out / "_run/run.json").read_text())["settings"]["runtime"] == runtime
    assert len(np.unique(masks["torch"])) > 3
    assert (masks["torch"] != masks["openvino"]).mean() < 1e-3
    # Another library may decide a pixel between two classes differently, so results are not mixed.
    assert predict(tmp_path / "photos", "--out", tmp_path / "torch", "--runtime", "openvino") == 2


def test_bench_counts_the_same_multiplications(capsys: pytest.CaptureFixture[str]) -> None:
    found = {}
    for runtime in ("torch", "openvino"):
        arguments = [
            "bench",
            "--model",
            str(small_model()),
            "--size",
            "64x48",
            "--runs",
            "1",
            "--images",
            "0",
        ]
        with pytest.raises(SystemExit) as stop:
            main([*arguments, "--precision", "fp32", "--runtime", runtime, "--json", "--quiet"])
        assert not stop.value.code
        found[runtime] = json.loads(capsys.readouterr().out)
    assert found["openvino"]["runtime"] == "openvino"
    assert found["openvino"]["sizes"][0]["multiplications"] == found["torch"]["sizes"][0]["multiplications"]


def test_wrong_usage(monkeypatch: pytest.MonkeyPatch) -> None:
    assert pick_runtime("openvino", "auto") == torch.device("cpu")
    with pytest.raises(UsageError, match="--runtime 'tensorrt' is unknown"):
        pick_runtime("tensorrt", "auto")
    with pytest.raises(UsageError, match="leave out --device cuda:0"):
        pick_runtime("openvino", "cuda:0")
    monkeypatch.setattr("segcli.device.find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"pip install 'segcli\[openvino\]'"):
        pick_runtime("openvino", "cpu")
