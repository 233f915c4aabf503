"""Training: losses and schedules by arithmetic, resuming to the bit, stopping, overfitting."""

from __future__ import annotations

import json
import math
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_network  # noqa: F401 - registers fcn8s-tiny
import torch
import torch.nn.functional as F
from PIL import Image
from processes import Process, wait_until
from training_runs import REGISTER_TINY, SMALL, TINY, assert_same_result, log, make_shapes, run

from segcli.cli import main
from segcli.data.loading import batches
from segcli.errors import UsageError
from segcli.models.info import read_info
from segcli.models.networks import NETWORKS
from segcli.training.config import RECIPES, TrainConfig, read_config, resolve, to_toml
from segcli.training.loop import State, new_state, train_step
from segcli.training.losses import auxiliary_loss, dice, label_weight, segmentation_loss
from segcli.training.optimization import averaged, make_optimizer, rate
from segcli.training.tasks import SegmentationObjective, Task


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_shapes(tmp_path_factory.mktemp("shapes"))


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """The networks are so small that more threads only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


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


def test_defaults_are_valid() -> None:
    assert resolve({}) == TrainConfig()
    for recipe in RECIPES.values():
        assert resolve(recipe).loss == "cross-entropy"


def test_missing_data_exits_with_2_or_3(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"
    assert run("--data", tmp_path / "no", "--out", out) == 2
    assert str(tmp_path / "no") in capsys.readouterr().err
    assert run("--out", out) == 2
    assert "--data is missing" in capsys.readouterr().err
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert run("--data", "voc", "--out", out) == 3
    missing, where = capsys.readouterr().err.splitlines()
    assert "data set voc is not on this machine; looked in data/voc, " in missing
    assert "https://" in where
    assert "VOCtrainval_11-May-2012.tar (md5 6cd6e144f989b92b3379bac3b3de84fd)" in where
    assert not out.exists()


# -- one step -----------------------------------------------------------------------------------------


FP32 = {"precision": "fp32"}


def plain_state(config: TrainConfig) -> tuple[Task, State]:
    """A network for two classes at the beginning of its training."""
    from segcli.models.preprocessing import Preprocessing

    torch.manual_seed(0)
    network = NETWORKS["fcn8s-plain"](2)
    objective = SegmentationObjective(network, Preprocessing(), config.precision, config, None)
    task = Task(objective, None, [], [], None, "", lambda *a: None, lambda done: [])  # type: ignore[arg-type]
    return task, new_state(task, config, torch.device("cpu"))


def batch(count: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    """Images, and labels with different numbers of ignored pixels."""
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (count, 3, 32, 32), dtype=torch.uint8, generator=generator)
    labels = torch.randint(0, 2, (count, 32, 32), generator=generator)
    for number in range(count):
        labels[number, : 8 * number] = 255
    return images, labels


def test_accumulated_steps_equal_whole_ones() -> None:
    results = []
    for accumulate in (1, 2, 4):
        config = resolve({"accumulate": accumulate, "batch_size": 4, "optimizer": "sgd", "lr": 0.1, **FP32})
        task, state = plain_state(config)
        losses = [train_step(task, state, config, *batch()) for _ in range(3)]
        results.append((losses, [p.detach().clone() for p in state.network.parameters()]))
    for losses, weights in results[1:]:
        assert losses == pytest.approx(results[0][0], abs=1e-5)
        for one, other in zip(weights, results[0][1], strict=True):
            torch.testing.assert_close(one, other, atol=1e-5, rtol=0)


def test_clipping_limits_the_gradient_and_reports_the_loss() -> None:
    config = resolve(
        {"optimizer": "sgd", "momentum": 0.0, "lr": 1.0, "weight_decay": 0.0, "clip": 1e-3} | FP32
    )
    task, state = plain_state(config)
    before = torch.cat([p.detach().flatten().clone() for p in state.network.parameters()])
    assert train_step(task, state, config, *batch()) > 0
    after = torch.cat([p.detach().flatten() for p in state.network.parameters()])
    assert torch.linalg.vector_norm(after - before).item() == pytest.approx(1e-3, rel=1e-3)


def test_summed_loss_is_the_mean_times_the_labelled_pixels() -> None:
    images, labels = batch()
    losses = []
    for summed in (False, True):
        config = resolve({"summed_loss": summed, "auxiliary": 0.0, **FP32})
        task, state = plain_state(config)
        losses.append(train_step(task, state, config, images, labels))
    assert losses[1] == pytest.approx(losses[0] * (labels != 255).sum().item(), rel=1e-5)


def test_a_step_whose_fp16_gradient_overflows_is_left_out() -> None:
    config = resolve({"precision": "fp16", "lr": 0.01, "optimizer": "sgd"})
    task, state = plain_state(config)
    state.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)
    before = [p.detach().clone() for p in state.network.parameters()]
    assert math.isfinite(train_step(task, state, config, *batch()))
    assert state.scaler.get_scale() == 2.0**39
    assert all(torch.equal(a, b) for a, b in zip(before, state.network.parameters(), strict=True))
    scales = []
    while not scales or state.scaler.get_scale() < scales[-1]:  # halved until it fits, then a step is made
        scales.append(state.scaler.get_scale())
        train_step(task, state, config, *batch())
    assert not all(torch.equal(a, b) for a, b in zip(before, state.network.parameters(), strict=True))


def test_a_gradient_that_is_not_finite_in_fp16_at_any_scale_stops() -> None:
    config = resolve({"precision": "fp16"})
    task, state = plain_state(config)
    state.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**-23)
    state.network.score_fr.weight.register_hook(lambda gradient: gradient * math.inf)
    train_step(task, state, config, *batch())
    with pytest.raises(FloatingPointError, match="not finite in fp16"):
        train_step(task, state, config, *batch())


def test_bf16_is_close_to_fp32_and_keeps_float32_weights() -> None:
    losses = []
    for precision in ("fp32", "bf16"):
        config = resolve({"precision": precision, "lr": 1e-3})
        task, state = plain_state(config)
        losses.append([train_step(task, state, config, *batch()) for _ in range(3)])
        assert all(p.dtype == torch.float32 for p in state.network.parameters())
    assert losses[1] == pytest.approx(losses[0], rel=0.02)
    assert losses[1] != losses[0]


def test_synchronised_norm_needs_gpus() -> None:
    with pytest.raises(UsageError, match="needs GPUs"):
        plain_state(resolve({"sync_norm": True}))


# -- whole trainings ----------------------------------------------------------------------------------


def test_overfits_eight_images_and_predict_takes_the_result(shapes: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    options = ["--encoder", "resnet18", "--epochs", "14", "--scale", "1", "1", "--jitter", "0", "--flip", "0",
               "--val-split", "train", "--lr", "2e-3", "--validate-every", "20",
               "--norm-momentum", "0.5"]  # fmt: skip
    assert run("--data", shapes, "--out", out, *SMALL, *options) == 0
    info = read_info(out / "best.safetensors")
    assert info.class_set.names == ("ground", "square", "bar")
    (scores,) = info.metrics.values()
    assert scores["pixel_accuracy"] > 0.95
    assert scores["images"] == 8
    assert (out / "curves.png").stat().st_size > 1000
    with Image.open(out / "samples" / "epoch_014.jpg") as picture:
        assert picture.width > 3 * 64  # image, label, prediction
        assert picture.height > 6 * 64  # six images
    with pytest.raises(SystemExit) as stop:
        main(["predict", str(shapes / "val/images"), "--out", str(tmp_path / "masks"),
              "--model", str(out / "best.safetensors"), "--quiet", "--workers", "0"])  # fmt: skip
    assert not stop.value.code
    found = np.array(Image.open(tmp_path / "masks" / "0.png"))
    assert np.mean(found == np.array(Image.open(shapes / "val/masks/0.png"))) > 0.8


@pytest.fixture(scope="module")
def undisturbed(shapes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("undisturbed")
    assert run("--data", shapes, "--out", out, *TINY) == 0
    return out


@pytest.mark.parametrize("step", [1, 2, 3])
def test_stopped_and_resumed_equals_undisturbed(
    shapes: Path, undisturbed: Path, tmp_path: Path, step: int
) -> None:
    """Stopped by SIGTERM after a step inside an epoch (1, 3) or at the end of one (2)."""
    seen = stop_at(step, signal.SIGTERM, "--data", shapes, "--out", tmp_path, *TINY)
    assert seen == step
    assert run("--data", shapes, "--out", tmp_path, *TINY) == 0
    assert_same_result(tmp_path, undisturbed)


def stop_at(step: int, number: signal.Signals, *arguments: object) -> int:
    """Train until a signal comes in a step; returns how many steps there were."""
    from segcli.training import loop

    original, seen = loop.train_step, 0

    def counting(*a: Any) -> float:
        nonlocal seen
        seen += 1
        if seen == step:
            os.kill(os.getpid(), number)
        return original(*a)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "train_step", counting)
        assert run(*arguments) == 128 + number
    return seen


def test_stopped_while_validating_and_resumed_equals_undisturbed(
    shapes: Path, undisturbed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from segcli.cli import train_display

    def stop(*_: object) -> None:
        os.kill(os.getpid(), signal.SIGINT)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_display.Display, "validated", stop)
        assert run("--data", shapes, "--out", tmp_path, *TINY) == 130
    assert "Stopped in epoch 1 after batch 2. The same command goes on" in capsys.readouterr().err
    assert not (tmp_path / "log.jsonl").exists()
    assert run("--data", shapes, "--out", tmp_path, *TINY) == 0
    assert_same_result(tmp_path, undisturbed)


def test_a_finished_training_is_not_trained_again(shapes: Path, tmp_path: Path) -> None:
    options = ["--data", shapes, "--out", tmp_path, *TINY, "--epochs", "1"]
    assert run(*options) == 0
    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*.safetensors")}
    assert run(*options) == 0
    assert {path: path.stat().st_mtime_ns for path in tmp_path.glob("*.safetensors")} == before


def test_patience_counts_validations_and_holds_when_run_again(
    shapes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--data", shapes, "--out", tmp_path, *SMALL, "--network", "fcn8s-plain", "--epochs", "50",
               "--lr", "1e-12", "--patience", "2", "--validate-every", "2"]  # fmt: skip
    for _ in range(2):
        assert run(*[word for word in options if word != "--quiet"]) == 0
        assert [line["epoch"] for line in log(tmp_path)] == [1, 2, 3, 4, 5, 6]
        assert [line["epoch"] for line in log(tmp_path) if "mean_iou" in line] == [2, 4, 6]
        said = capsys.readouterr().err
        assert "s (stopped early, no better score in 2 validations); the best is epoch 2." in said


def test_other_options_in_the_same_folder_are_refused(
    shapes: Path, undisturbed: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (undisturbed / "last.safetensors").read_bytes()
    assert run("--data", shapes, "--out", undisturbed, *TINY, "--lr", "0.5") == 2
    assert "lr was 0.001, is 0.5" in capsys.readouterr().err
    assert (undisturbed / "last.safetensors").read_bytes() == before
    automatic = [word if word != "fp32" else "auto" for word in TINY]
    assert run("--data", shapes, "--out", undisturbed, *automatic, "--epochs", "2") in (0, 2)  # 2: it is bf16


def test_without_validation_the_last_epoch_is_the_result(
    shapes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    loud = [word for word in TINY if word != "--quiet"]
    assert run("--data", shapes, "--out", tmp_path, *loud, "--val-split", "") == 0
    assert f"--model {tmp_path / 'last.safetensors'}" in capsys.readouterr().err
    assert not (tmp_path / "best.safetensors").exists()
    assert not (tmp_path / "samples").exists()
    assert read_info(tmp_path / "last.safetensors").metrics == {}


def test_two_trainings_do_not_share_a_folder(
    shapes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--data", shapes, "--out", tmp_path / "run", *TINY, "--epochs", "100000"]
    other = Process("train", *arguments, folder=tmp_path, before=REGISTER_TINY)
    wait_until(lambda: (tmp_path / "run/checkpoint.pt").exists())
    assert run(*arguments) == 2
    assert f"{tmp_path / 'run'} is in use by process {other.pid} on " in capsys.readouterr().err
    other.kill_group()
    assert other.wait() == -signal.SIGKILL


def test_overwrite_starts_anew(shapes: Path, tmp_path: Path) -> None:
    assert run("--data", shapes, "--out", tmp_path, *TINY, "--epochs", "1") == 0
    assert run("--data", shapes, "--out", tmp_path, *TINY, "--lr", "0.5", "--overwrite", "--dry-run") == 0
    assert len(log(tmp_path)) == 1
    assert run("--data", shapes, "--out", tmp_path, *TINY, "--lr", "0.5", "--overwrite") == 0
    assert len(log(tmp_path)) == 2


def test_workers_do_not_change_the_result(shapes: Path, undisturbed: Path, tmp_path: Path) -> None:
    assert run("--data", shapes, "--out", tmp_path, *TINY, "--workers", "2") == 0
    assert_same_result(tmp_path, undisturbed)


def test_dry_run_writes_nothing_and_estimates(
    shapes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    assert run("--data", shapes, "--out", out, *TINY, "--dry-run", "--json") == 0
    document = json.loads(capsys.readouterr().out)
    assert document["loss"] > 0
    assert document["peak_gib"] > 0
    assert document["hours"] > 0
    assert not out.exists()


def test_what_one_sees(shapes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    loud = [word for word in TINY if word != "--quiet"]
    assert run("--data", shapes, "--out", tmp_path, *loud, "--json", "--class-weights", "auto") == 0
    captured = capsys.readouterr()
    lines = captured.err.splitlines()
    assert lines[0].startswith("fcn8s-tiny, 0.0 M parameters, starts from random weights (seed 3).")
    assert lines[1].endswith(": 3 classes; 8 images of train, 2 images of val.")
    assert lines[2].startswith("Class weights: ")
    assert lines[3] == "On cpu (1 threads), in fp32."
    assert lines[4].startswith("epoch   1/2  loss ")
    assert "mean IU" in lines[4]
    assert max(map(len, lines[3:6])) < 80
    assert f"--model {tmp_path / 'best.safetensors'}" in captured.err
    document = json.loads(captured.out)
    assert document["epochs"] == 2
    assert set(document["best"]["per_class"]) == {"ground", "square", "bar"}
