"""Training: losses and schedules by arithmetic, resuming to the bit, stopping, overfitting."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from segcli.cli import main
from segcli.data.loading import batches
from segcli.errors import UsageError
from segcli.models.checkpoint import read_info
from segcli.training.config import TrainConfig, read_config, resolve, to_toml
from segcli.training.losses import auxiliary_loss, dice, label_weight, segmentation_loss
from segcli.training.optimization import averaged, make_optimizer, rate


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight pictures of a bright square (1) or a dark bar (2) on noise (0): easy to learn by heart."""
    root = tmp_path_factory.mktemp("shapes")
    random = np.random.default_rng(0)
    for split, count in (("train", 8), ("val", 2)):
        for folder in ("images", "masks"):
            (root / split / folder).mkdir(parents=True)
        for number in range(count):
            image = random.integers(90, 130, (64, 64, 3), np.uint8)
            mask = np.zeros((64, 64), np.uint8)
            y, x = random.integers(4, 28, 2)
            image[y : y + 32, x : x + 32] = (230, 200, 40)
            mask[y : y + 32, x : x + 32] = 1
            image[:, 56:] = 10
            mask[:, 56:] = 2
            Image.fromarray(image).save(root / split / "images" / f"{number}.png")
            Image.fromarray(mask).save(root / split / "masks" / f"{number}.png")
    (root / "classes.txt").write_text("ground\nsquare\nbar\n")
    return root


SMALL = ["--crop", "64", "64", "--batch-size", "4", "--precision", "fp32", "--storage", "float32",
         "--warmup", "0", "--quiet", "--workers", "0"]  # fmt: skip


def run(arguments: list[str]) -> int:
    with pytest.raises(SystemExit) as stop:
        main(["train", *arguments])
    return int(stop.value.code or 0)


def log(folder: Path) -> list[dict[str, object]]:
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "seconds"} for line in lines]


# -- losses, schedules, order -------------------------------------------------------------------------


def test_cross_entropy_written_out() -> None:
    scores = torch.tensor([[[[0.0, math.log(3)]], [[0.0, 0.0]]]])  # (1, 2, 1, 2): p = 1/2, 1/2 and 3/4, 1/4
    labels = torch.tensor([[[1, 0]]])
    loss = segmentation_loss(scores, labels, "cross-entropy")
    assert loss.item() == pytest.approx(-math.log(1 / 2) - math.log(3 / 4))
    weights = torch.tensor([4.0, 1.0])
    weighted = segmentation_loss(scores, labels, "cross-entropy", weights)
    assert weighted.item() == pytest.approx(-1 * math.log(1 / 2) - 4 * math.log(3 / 4))
    assert label_weight(labels, weights).item() == 5
    assert label_weight(labels, None).item() == 2


def test_focal_loss_written_out() -> None:
    scores = torch.tensor([[[[0.0, math.log(3)]], [[0.0, 0.0]]]])
    loss = segmentation_loss(scores, torch.tensor([[[1, 0]]]), "focal")
    assert loss.item() == pytest.approx(-(0.5**2) * math.log(1 / 2) - 0.25**2 * math.log(3 / 4))


def test_dice_written_out() -> None:
    scores = torch.tensor([[[[0.0, math.log(3)]], [[0.0, 0.0]]]])
    # class 0: overlap 3/4, sizes 1/2 + 3/4 and 1; class 1: overlap 1/2, sizes 1/2 + 1/4 and 1
    expected = 1 - (2 * 0.75 / 2.25 + 2 * 0.5 / 1.75) / 2
    assert dice(scores, torch.tensor([[[1, 0]]])).item() == pytest.approx(expected)


def test_ohem_keeps_the_hardest_quarter_and_all_that_are_unsure() -> None:
    sure, wrong = 6.0, -2.0
    scores = torch.tensor([[sure] * 7 + [wrong]]).view(1, 1, 1, 8)
    scores = torch.cat([scores, torch.zeros_like(scores)], 1)  # class 0 is right everywhere
    labels = torch.zeros(1, 1, 8, dtype=torch.long)
    losses = F.softplus(-scores[0, 0, 0])  # of the right class
    kept = losses.topk(2).values[-1] <= losses  # two of eight, and ties with the second
    expected = losses[kept].mean() * 8
    torch.testing.assert_close(segmentation_loss(scores, labels, "ohem"), expected)


@pytest.mark.parametrize("kind", ["cross-entropy", "focal", "ohem", "dice", "cross-entropy+dice"])
def test_ignored_pixels_do_not_count(kind: str) -> None:
    torch.manual_seed(0)
    scores = torch.randn(2, 3, 4, 5, requires_grad=True)
    labels = torch.full((2, 4, 5), 255)
    empty = segmentation_loss(scores, labels, kind)
    empty.backward()
    assert empty.item() == 0
    assert scores.grad is None or not scores.grad.any()
    labels[0, :2] = 1
    assert math.isfinite(segmentation_loss(scores, labels, kind).item())
    changed = scores.detach().clone()
    changed[1] += torch.randn(3, 4, 5)  # ignored there
    torch.testing.assert_close(
        segmentation_loss(changed, labels, kind), segmentation_loss(scores.detach(), labels, kind)
    )


def test_auxiliary_loss_counts_a_coarse_pixel_for_what_it_covers() -> None:
    labels = torch.zeros(1, 4, 4, dtype=torch.long)
    labels[:, :, 2:] = 1
    scores = torch.zeros(1, 2, 2, 2)  # both classes at 1/2
    assert auxiliary_loss(scores, labels, None).item() == pytest.approx(16 * math.log(2))


def test_learning_rates_written_out() -> None:
    assert [rate(s, 10, 2, "constant") for s in (0, 1, 2, 9)] == [0.5, 1, 1, 1]
    assert rate(6, 10, 2, "poly") == pytest.approx(0.5**0.9)
    assert rate(6, 10, 2, "cosine") == pytest.approx(0.5)
    assert rate(2, 10, 2, "poly") == rate(2, 10, 2, "cosine") == 1


def test_every_sample_comes_once_and_the_order_follows_from_seed_and_epoch() -> None:
    order = batches(10, 3, seed=1, epoch=0)
    indices = [index for batch in order for index, _ in batch]
    assert len(order) == 3
    assert len(set(indices)) == 9
    assert order == batches(10, 3, seed=1, epoch=0)
    assert order != batches(10, 3, seed=1, epoch=1)
    assert order != batches(10, 3, seed=2, epoch=0)
    assert len(batches(2, 8, 0, 0)[0]) == 2


def test_reference_recipe_gives_biases_twice_the_rate_and_no_decay() -> None:
    from segcli.models.vgg import VGG16FCN

    network = VGG16FCN(2, 8, widths=(2, 2, 2, 2, 2, 2))
    config = resolve(
        {"lr": 1e-3, "weight_decay": 5e-4, "bias_lr": 2.0, "fixed_upsampling": True, "optimizer": "sgd"}
    )
    groups = {id(p): g for g in make_optimizer(network, config).param_groups for p in g["params"]}
    assert groups[id(network.fc6.weight)]["peak"] == 1e-3
    assert groups[id(network.fc6.weight)]["weight_decay"] == 5e-4
    assert groups[id(network.fc6.bias)]["peak"] == 2e-3
    assert groups[id(network.fc6.bias)]["weight_decay"] == 0
    assert id(network.upscore2.weight) not in groups


def test_averaged_weights_written_out() -> None:
    network = torch.nn.Linear(1, 1, bias=False)
    average = averaged(network, 0.9)
    values = (1.0, 2.0, 4.0)
    for value in values:
        network.weight.data.fill_(value)
        average.update_parameters(network)
    # the first is copied; then decays (1 + 1) / (10 + 1) and (1 + 2) / (10 + 2)
    second = 2 / 11 * 1 + 9 / 11 * 2
    assert average.module.weight.item() == pytest.approx(3 / 12 * second + 9 / 12 * 4)


# -- options ------------------------------------------------------------------------------------------


def test_config_round_trip_and_errors(tmp_path: Path) -> None:
    config = resolve({"crop": [10, 20], "lr": 1, "notes": ["one"]})
    (tmp_path / "c.toml").write_text(to_toml(config))
    assert resolve(read_config(tmp_path / "c.toml")) == config
    assert config.crop == (10, 20)
    for wrong, reason in [
        ({"lrr": 1}, "did you mean 'lr'"),
        ({"epochs": 1.5}, "whole number"),
        ({"crop": [1]}, "needs 2 values"),
        ({"loss": "mse"}, "choose one of cross-entropy"),
        ({"batch_size": 3, "accumulate": 2}, "equal parts"),
        ({"epochs": 0}, "above 0"),
    ]:
        with pytest.raises(UsageError, match=reason):
            resolve(wrong)


def test_missing_data_exits_with_2_or_3(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["--data", str(tmp_path / "no"), "--out", str(tmp_path / "run")]) == 2
    assert str(tmp_path / "no") in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


# -- whole trainings ----------------------------------------------------------------------------------


def test_overfits_eight_images_and_predict_takes_the_result(shapes: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    options = ["--encoder", "regnet_y_400mf", "--epochs", "40", "--scale", "1", "1", "--jitter", "0",
               "--flip", "0", "--val-split", "train", "--lr", "4e-3",
               "--validate-every", "40", "--ema", "0.5"]  # fmt: skip
    assert run(["--data", str(shapes), "--out", str(out), *SMALL, *options]) == 0
    info = read_info(out / "best.safetensors")
    assert info.class_set.names == ("ground", "square", "bar")
    (scores,) = info.metrics.values()
    assert scores["pixel_accuracy"] > 0.95
    assert scores["images"] == 8
    assert (out / "curves.png").stat().st_size > 1000


TWO_EPOCHS = ["--encoder", "mobilenet_v3_large", "--epochs", "2", "--ema", "0.9", "--seed", "3"]


@pytest.fixture(scope="module")
def undisturbed(shapes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("undisturbed")
    assert run(["--data", str(shapes), "--out", str(out), *SMALL, *TWO_EPOCHS]) == 0
    return out


def assert_same_result(one: Path, other: Path) -> None:
    assert log(one) == log(other)
    for name in ("best.safetensors", "last.safetensors"):
        assert (one / name).read_bytes() == (other / name).read_bytes()
    states = [torch.load(run / "checkpoint.pt", weights_only=True) for run in (one, other)]
    for state in states:
        for record in state["progress"]["history"]:
            del record["seconds"]
    assert_equal(*states)


def assert_equal(one: object, other: object) -> None:
    if isinstance(one, dict) and isinstance(other, dict):
        assert one.keys() == other.keys()
        for key in one:
            assert_equal(one[key], other[key])
    elif isinstance(one, list) and isinstance(other, list):
        for a, b in zip(one, other, strict=True):
            assert_equal(a, b)
    elif isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        assert torch.equal(one, other)
    else:
        assert one == other


@pytest.mark.parametrize("step", [1, 2, 3])
def test_stopped_and_resumed_equals_undisturbed(
    shapes: Path, undisturbed: Path, tmp_path: Path, step: int
) -> None:
    """Stopped by SIGTERM after a step inside an epoch (1, 3) or at the end of one (2)."""
    out = tmp_path / "run"
    arguments = ["--data", str(shapes), "--out", str(out), *SMALL, *TWO_EPOCHS]
    seen = 0

    from segcli.training import loop

    original = loop.train_step

    def counting(*a: object) -> float:
        nonlocal seen
        seen += 1
        if seen == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(*a)  # type: ignore[arg-type]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "train_step", counting)
        assert run(arguments) == 143
    assert seen == step
    assert run(arguments) == 0
    assert_same_result(out, undisturbed)


def test_killed_and_resumed_equals_undisturbed(shapes: Path, undisturbed: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    arguments = ["--data", str(shapes), "--out", str(out), *SMALL, *TWO_EPOCHS]
    process = subprocess.Popen([sys.executable, "-m", "segcli", "train", *arguments], start_new_session=True)
    deadline = time.monotonic() + 120
    while not (out / "checkpoint.pt").exists() and process.poll() is None and time.monotonic() < deadline:
        os.sched_yield()
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert run(arguments) == 0
    assert_same_result(out, undisturbed)


def test_other_options_in_the_same_folder_are_refused(
    shapes: Path, undisturbed: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--data", str(shapes), "--out", str(undisturbed), *SMALL, *TWO_EPOCHS]
    before = (undisturbed / "last.safetensors").read_bytes()
    assert run([*arguments, "--lr", "0.5"]) == 2
    assert "lr was 0.001, is 0.5" in capsys.readouterr().err
    assert (undisturbed / "last.safetensors").read_bytes() == before


def test_workers_do_not_change_the_result(shapes: Path, undisturbed: Path, tmp_path: Path) -> None:
    options = [*SMALL[:-1], "2"]
    assert run(["--data", str(shapes), "--out", str(tmp_path), *options, *TWO_EPOCHS]) == 0
    assert (tmp_path / "last.safetensors").read_bytes() != b""
    assert log(tmp_path) == log(undisturbed)


def test_non_finite_loss_stops_and_names_step_and_files(
    shapes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--lr", "1e30", "--optimizer", "sgd", "--epochs", "3"]
    assert run(["--data", str(shapes), "--out", str(tmp_path), *SMALL, *options]) == 1
    error = capsys.readouterr().err
    assert "the loss is nan at step" in error or "the loss is inf at step" in error
    assert "files" in error


def test_accumulated_batches_give_the_gradient_of_the_whole_batch(shapes: Path) -> None:
    """Two halves with unequal numbers of labelled pixels, against one pass over both."""
    torch.manual_seed(0)
    scores = torch.randn(2, 3, 4, 4, requires_grad=True)
    labels = torch.randint(0, 3, (2, 4, 4))
    labels[0, :3] = 255
    weight = label_weight(labels, None)
    whole = segmentation_loss(scores, labels, "cross-entropy") / weight
    expected = F.cross_entropy(scores, labels, ignore_index=255)
    torch.testing.assert_close(whole, expected)
    parts = [segmentation_loss(s, t, "cross-entropy") / weight
             for s, t in zip(scores.chunk(2), labels.chunk(2), strict=True)]  # fmt: skip
    torch.testing.assert_close(sum(parts), expected)


def test_defaults_are_valid() -> None:
    assert resolve({}) == TrainConfig()
