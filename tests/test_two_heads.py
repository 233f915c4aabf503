"""Models with a second label space (SIFT Flow: semantic and geometric): predict writes both masks."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from small_model import picture

from segcli.cli import main
from segcli.inference.tta import TTA, average
from segcli.models.checkpoint import load_model, save_model
from segcli.models.info import ModelInfo
from segcli.models.networks import get
from segcli.models.preprocessing import to_tensor
from segcli.palettes import CLASS_SETS

NETWORK = "fcn8s-mobilenet_v3_large"


@pytest.fixture(scope="module")
def model_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    network = get(NETWORK, 36)
    with torch.no_grad():
        network.score_fr.weight.normal_(0, 3)
        network.score_pool3.weight.normal_(0, 3)
    path = tmp_path_factory.mktemp("model") / "two.safetensors"
    geometric = CLASS_SETS["siftflow-geometric"]
    save_model(path, network, ModelInfo(NETWORK, CLASS_SETS["siftflow"], second_class_set=geometric))
    return path


def predict(*arguments: str) -> int:
    with pytest.raises(SystemExit) as exit_:
        main(["predict", *arguments, "--device", "cpu", "--precision", "fp32", "--workers", "0"])
    return exit_.value.code if isinstance(exit_.value.code, int) else 0


@pytest.mark.parametrize("save", ["mask", "mask,confidence"])
def test_predict_writes_both_masks(model_file: Path, tmp_path: Path, save: str) -> None:
    """With confidence all scores are computed at full size; without it, only what labels need."""
    image = picture(70, 90)
    (tmp_path / "photos" / "deep").mkdir(parents=True)
    Image.fromarray(image).save(tmp_path / "photos" / "deep" / "a.png")
    out = tmp_path / "masks"
    arguments = [str(tmp_path / "photos"), "--out", str(out), "--model", str(model_file), "--save", save]
    assert predict(*arguments) == 0

    model = load_model(model_file)
    with torch.no_grad():
        scores = model.network(to_tensor(image, model.info.preprocessing))[0]
    semantic = np.asarray(Image.open(out / "deep" / "a.png"))
    geometric = Image.open(out / "_geometric" / "deep" / "a.png")
    assert geometric.mode == "P"
    assert (semantic == scores[:33].argmax(0).numpy()).mean() > 0.999
    assert (np.asarray(geometric) == scores[33:].argmax(0).numpy()).mean() > 0.999
    assert len(np.unique(np.asarray(geometric))) > 1
    assert geometric.getpalette()[3:6] == list(CLASS_SETS["siftflow-geometric"].colors[1])

    stamp = (out / "_geometric" / "deep" / "a.png").stat().st_mtime_ns
    assert predict(*arguments) == 0
    assert (out / "_geometric" / "deep" / "a.png").stat().st_mtime_ns == stamp
    (out / "_geometric" / "deep" / "a.png").unlink()
    assert predict(*arguments) == 0
    assert (out / "_geometric" / "deep" / "a.png").is_file()
    lines = (out / "_run" / "manifest.jsonl").read_text().splitlines()
    assert sum(json.loads(lines[-1])["classes"].values()) == pytest.approx(1, abs=1e-4)


def test_no_second_mask_without_the_first(model_file: Path, tmp_path: Path) -> None:
    Image.fromarray(picture(40, 40)).save(tmp_path / "a.png")
    out = tmp_path / "masks"
    assert (
        predict(str(tmp_path / "a.png"), "--out", str(out), "--model", str(model_file), "--save", "color")
        == 0
    )
    assert (out / "_color" / "a.png").is_file()
    assert not (out / "_geometric").exists()


def test_geometric_is_not_for_the_user_to_choose(
    model_file: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    Image.fromarray(picture(40, 40)).save(tmp_path / "a.png")
    code = predict(str(tmp_path / "a.png"), "--out", str(tmp_path / "masks"), "--save", "geometric")
    assert code == 2
    assert "geometric': choose from mask, overlay" in capfd.readouterr().err


def test_every_head_has_its_own_softmax() -> None:
    images = torch.randn(1, 5, 4, 6)
    found = average(lambda x: x, images, TTA["flip"], [3, 2]).exp()
    for part, begin, end in ((found[:, :3], 0, 3), (found[:, 3:], 3, 5)):
        torch.testing.assert_close(part.sum(1), torch.ones(1, 4, 6))
        mirrored = images.flip(-1)[:, begin:end].softmax(1).flip(-1)
        torch.testing.assert_close(part, (images[:, begin:end].softmax(1) + mirrored) / 2)


def test_inspect_shows_the_first_head(model_file: Path, tmp_path: Path) -> None:
    Image.fromarray(picture(64, 80)).save(tmp_path / "a.png")
    out = tmp_path / "sheet.png"
    with pytest.raises(SystemExit) as exit_:
        main(
            [
                "inspect",
                str(tmp_path / "a.png"),
                "--out",
                str(out),
                "--model",
                str(model_file),
                "--device",
                "cpu",
            ]
        )
    assert exit_.value.code in (0, None)
    assert out.is_file()
