"""The models that ship in weights/: their cards, and masks that may not change unnoticed.

`pytest tests/test_bundled.py --regenerate` writes the golden masks anew; look at them before committing.
"""

from __future__ import annotations

import shutil
from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from segcli.cli import main
from segcli.images import read_image
from segcli.models.checkpoint import load_model, read_info
from segcli.models.prepared import prepare
from segcli.models.preprocessing import to_tensor
from segcli.models.zoo import DEFAULT_MODEL, bundled_models

GOLDEN = Path(__file__).parent / "golden"
PHOTOS = {"cat": ("skimage", "data/chelsea.png"), "temple": ("sklearn", "datasets/images/china.jpg")}
AGREEMENT = 0.999  # processors differ in the last bits of a sum, and a pixel on a border may follow


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    for name, (package, path) in PHOTOS.items():
        with (
            (files(package) / path).open("rb") as source,
            (folder / f"{name}{Path(path).suffix}").open("wb") as to,
        ):
            shutil.copyfileobj(source, to)
    return folder


@pytest.mark.parametrize("name", bundled_models())
def test_card_says_what_a_user_must_know(name: str) -> None:
    info = read_info(bundled_models()[name])
    assert info.licence
    assert info.recipe["seed"] is not None
    assert info.dataset
    (scores,) = info.metrics.values()
    assert scores["images"] > 50
    assert scores["mean_iou"] < scores["pixel_accuracy"] < 1
    per_class = scores["per_class"].values()
    assert np.mean(list(per_class)) == pytest.approx(scores["mean_iou"], abs=1e-3)
    assert sum(iou > 0.3 for iou in per_class) >= 3
    assert info.notes or min(per_class) > 0.25  # what cannot be trusted is said
    assert (bundled_models()[name].with_suffix(".md")).is_file()


@pytest.mark.parametrize("name", bundled_models())
def test_masks_are_the_golden_ones(
    name: str, photos: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    options = ["--out", str(tmp_path), "--model", name, "--precision", "fp32", "--save", "mask", "--quiet"]
    with pytest.raises(SystemExit) as stop:
        main(["predict", str(photos), *options])
    assert stop.value.code in (0, None)
    for photo in PHOTOS:
        golden = GOLDEN / name / f"{photo}.png"
        if request.config.getoption("--regenerate"):
            golden.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(tmp_path / f"{photo}.png", golden)
        with Image.open(tmp_path / f"{photo}.png") as mask, Image.open(golden) as expected:
            assert (mask.mode, mask.size) == ("P", expected.size)
            assert mask.getpalette() == expected.getpalette()
            assert (np.array(mask) == np.array(expected)).mean() >= AGREEMENT


def test_bf16_hardly_changes_scores_and_labels(photos: Path) -> None:
    model = load_model(bundled_models()[DEFAULT_MODEL])
    exact, reduced = (prepare(model.network, torch.device("cpu"), how) for how in ("fp32", "bf16"))
    for photo in photos.iterdir():
        images = to_tensor(read_image(photo).pixels, model.info.preprocessing)
        with torch.inference_mode():
            expected, found = exact(images), reduced(images)
        assert (found - expected).abs().max() < 2e-2 * expected.abs().max()
        assert (found.argmax(1) != expected.argmax(1)).float().mean() < 3e-3


def test_default_model_is_bundled() -> None:
    assert DEFAULT_MODEL in bundled_models()
