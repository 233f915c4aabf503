"""Rows 24 to 27 of the fault table: trainings that are stopped, killed, that explode, or have bad data.

`make test-faults` (SEGCLI_FAULTS=full) makes the full number of tries; otherwise a few. Signals and kills are
real, and so are the processes that get them.
"""

from __future__ import annotations

import random
import signal
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import tiny_network
import torch
from fault_table import FULL, Row, tries
from PIL import Image
from processes import Process, wait_until
from training_runs import REGISTER_TINY, SMALL, TINY, assert_same_result, make_shapes, run

from segcli.models.networks import NETWORKS

pytestmark = pytest.mark.faults


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    if FULL:
        print(f"\n{sum(CUT_OFF)} of {len(CUT_OFF)} kills in row 25 came while a file was being written")


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_shapes(tmp_path_factory.mktemp("shapes"))


# -- 24: stopped at step k, then resumed --------------------------------------------------------------

EPOCHS = 3
STOP_AT = """
import os, signal
from segcli.training import loop
original, seen = loop.train_step, 0
def counting(*arguments):
    global seen
    seen += 1
    if seen == {step}:
        os.kill(os.getpid(), {number})
    return original(*arguments)
loop.train_step = counting
"""
STOP_IN_VALIDATION = """
import os
from segcli.cli import train_display
def stop(*_):
    os.kill(os.getpid(), {number})
train_display.Display.validated = stop
"""
STOPS = [
    *((STOP_AT, step, number) for step in range(1, 7) for number in ("SIGTERM", "SIGKILL", "SIGINT")),
    (STOP_IN_VALIDATION, 0, "SIGTERM"),
    (STOP_IN_VALIDATION, 0, "SIGKILL"),
]  # 20: of six steps in three epochs, the even ones end an epoch


def stops() -> Sequence[tuple[str, int, str]]:
    return STOPS if FULL else [STOPS[4], STOPS[11], STOPS[15]]


@pytest.fixture(scope="module")
def undisturbed(shapes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    process = train(folder, shapes)
    assert process.wait() == 0, process.errors
    return folder / "run"


def train(folder: Path, data: Path, *more: object, before: str = "") -> Process:
    arguments = ["--data", data, "--out", "run", *TINY, "--epochs", EPOCHS, *more]
    return Process("train", *arguments, folder=folder, before=REGISTER_TINY + before)


@pytest.mark.parametrize(("code", "step", "name"), stops())
def test_24_stopped_and_resumed(
    shapes: Path, undisturbed: Path, tmp_path: Path, code: str, step: int, name: str
) -> None:
    with Row("24 training stopped and resumed"):
        number = signal.Signals[name]
        process = train(tmp_path, shapes, before=code.format(step=step, number=int(number)))
        assert process.wait() == (-number if number == signal.SIGKILL else 128 + number)
        again = train(tmp_path, shapes)
        assert again.wait() == 0, again.errors
        assert_same_result(tmp_path / "run", undisturbed)
        assert not list((tmp_path / "run").glob(".segcli-*")) or number == signal.SIGKILL


# -- 25: killed while a checkpoint is written ---------------------------------------------------------

SAVE_ALWAYS = """
from segcli.training import loop
loop.SECONDS_BETWEEN, loop.SAVING_SHARE = 0, 1e9
original = loop.save_state
def noting(run, state):
    original(run, state)
    with open("saved", "a") as file:
        file.write(f"{state.epoch} {state.batch}\\n")
loop.save_state = noting
"""


def wait_for(seconds: float) -> None:
    """Without sleeping, which is coarser."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        pass


CUT_OFF: list[bool] = []  # whether a kill came while a file was being written


@pytest.mark.parametrize("number", range(tries(100, 4)))
def test_25_killed_while_saving(shapes: Path, tmp_path: Path, number: int) -> None:
    """The checkpoint is always whole, and not older than the last one that was finished."""
    with Row("25 kill -9 while a checkpoint is written"):
        options = ["--network", "fcn8s-heavy", "--epochs", 100_000]
        process = train(tmp_path, shapes, *options, before=SAVE_ALWAYS)
        saved = tmp_path / "saved"
        wait_until(lambda: saved.exists() and saved.stat().st_size > 0)
        chance = random.Random(number)
        wait_for(chance.uniform(0, 0.3))
        wait_until(lambda: any((tmp_path / "run").glob(".segcli-*")))
        wait_for(chance.uniform(0, 0.01))
        process.kill_group()
        assert process.wait() == -signal.SIGKILL
        epoch, batch = map(int, saved.read_text().splitlines()[-1].split())
        found = torch.load(tmp_path / "run/checkpoint.pt", weights_only=True)["progress"]
        assert (epoch, batch) <= (found["epoch"], found["batch"]) <= (epoch + 1, batch + 1)
        for name in ("last.safetensors", "best.safetensors"):
            if (tmp_path / "run" / name).exists():
                safetensors.torch.load_file(tmp_path / "run" / name)
        CUT_OFF.append(bool(list((tmp_path / "run").glob(".segcli-*"))))
        if number == 0:  # a later run goes on from it, and removes what the killed one left
            again = train(tmp_path, shapes, *options, before=STOP_AT.format(step=1, number=15))
            assert again.wait() == 143, again.errors
            assert not list((tmp_path / "run").glob(".segcli-*"))


# -- 26: NaN and infinity -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("at", "what", "said"),
    [
        (1, "loss", "the loss is nan at step 1 (epoch 1, batch 1; files "),
        (3, "loss", "the loss is nan at step 3 (epoch 2, batch 1; files "),
        (2, "gradient", "the gradient is nan at step 2 (epoch 1, batch 2; files "),
        (5, "gradient", "the gradient is nan at step 5 (epoch 3, batch 1; files "),
        (1, "validation", "cannot be validated: the network gave scores that are not finite"),
        (0, "rate", "at step "),
    ],
)
def test_26_not_finite(
    shapes: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    at: int,
    what: str,
    said: str,
) -> None:
    with Row("26 NaN or Inf in loss, gradient, weights or scores"):
        network = partial(tiny_network.Exploding, at=at or 1000, what=what)
        monkeypatch.setitem(NETWORKS, "fcn8s-exploding", network)
        options = [*SMALL, "--network", "fcn8s-exploding", "--epochs", "5"]
        if what == "rate":
            options += ["--lr", "1e30", "--optimizer", "sgd"]
        assert run("--data", shapes, "--out", tmp_path, *options) == 1
        error = capsys.readouterr().err
        assert said in error
        assert error.count("\n") <= 2
        for name in ("best.safetensors", "last.safetensors"):
            if (tmp_path / name).exists():
                tensors = safetensors.torch.load_file(tmp_path / name)
                assert all(torch.isfinite(value).all() for value in tensors.values())
        if at > 2:  # the epochs before were good, and at least the first of them was saved
            content = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
            assert content["progress"]["epoch"] >= 1
            assert all(torch.isfinite(value).all() for value in content["network"].values())


# -- 27: bad data -------------------------------------------------------------------------------------


def damage(root: Path, fault: str) -> str:
    """Do something to a good data set; returns the file that must be named."""
    image, mask = root / "train/images/3.png", root / "train/masks/3.png"
    pixels = np.array(Image.open(mask))
    if fault == "image cut off":
        image.write_bytes(image.read_bytes()[:3000])
        return image.name
    if fault == "image is text":
        image.write_text("no picture")
        return image.name
    if fault == "image empty":
        image.write_bytes(b"")
        return image.name
    if fault == "validation image cut off":
        image = root / "val/images/1.png"
        image.write_bytes(image.read_bytes()[:3000])
        return "val/images/1.png"
    if fault == "mask of another size":
        Image.fromarray(pixels[:, :60]).save(mask)
    if fault == "mask turned":
        Image.open(image).resize((64, 48)).save(image)
        Image.fromarray(pixels[:, :48]).save(mask)
    if fault == "class out of range":
        Image.fromarray(np.where(pixels == 2, 7, pixels).astype(np.uint8)).save(mask)
    if fault == "mask lossy":
        mask.unlink()
        mask = mask.with_suffix(".jpg")
        Image.fromarray(pixels).save(mask)
    if fault == "mask in colour":
        Image.fromarray(np.dstack([pixels * 60, pixels, pixels])).save(mask)
    if fault == "mask cut off":
        mask.write_bytes(mask.read_bytes()[:60])
    if fault == "mask empty":
        mask.write_bytes(b"")
    if fault == "split empty":
        for path in (root / "val").rglob("*.png"):
            path.unlink()
        return "split val of"
    return f"masks/{mask.name}"


@pytest.mark.parametrize(
    "fault",
    [
        "image cut off", "image is text", "image empty", "validation image cut off", "mask of another size",
        "mask turned", "class out of range", "mask lossy", "mask in colour", "mask cut off", "mask empty",
        "split empty",
    ],
)  # fmt: skip
def test_27_bad_data_is_found_before_the_first_step(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], fault: str
) -> None:
    with Row("27 bad training data"):
        data = make_shapes(tmp_path / "data")
        named = damage(data, fault)
        assert run("--data", data, "--out", tmp_path / "run", *TINY) == 2
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == (1 if fault == "split empty" else 2), lines
        assert named in lines[0]
        assert lines[-1].startswith("Error: ")
        assert {path.name for path in (tmp_path / "run").glob("*")} <= {"lock"}


def test_27_every_bad_file_has_its_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with Row("27 bad training data"):
        data = make_shapes(tmp_path / "data")
        for number in range(6):
            (data / f"train/images/{number}.png").write_bytes(b"no picture")
        assert run("--data", data, "--out", tmp_path / "run", *TINY) == 2
        *lines, last = capsys.readouterr().err.splitlines()
        assert [f"images/{number}.png" in line for number, line in enumerate(lines)] == [True] * 6
        assert last == "Error: nothing was trained: these files of the data cannot be used as they are"


def test_27_a_class_folder_with_a_damaged_image(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with Row("27 bad training data"):
        for split in ("train", "val"):
            for name in ("a", "b"):
                folder = tmp_path / "data" / split / name
                folder.mkdir(parents=True)
                Image.new("RGB", (32, 32)).save(folder / "0.png")
        (tmp_path / "data/val/b/0.png").write_bytes(b"no picture")
        options = ["--task", "classify", "--encoder", "resnet18", *SMALL, "--crop", 32, 32]
        assert run("--data", tmp_path / "data", "--out", tmp_path / "run", *options) == 2
        assert "val/b/0.png" in capsys.readouterr().err.splitlines()[0]
