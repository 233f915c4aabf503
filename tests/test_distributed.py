"""Several processes as one training, over gloo on the CPU: real processes, as torchrun starts them."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import safetensors.torch
import tiny_network  # noqa: F401 - registers fcn8s-plain
import torch
from processes import Process, wait_until
from training_runs import REGISTER_TINY, SMALL, assert_same_result, log, make_shapes, run

# Adam divides by the size of a gradient, which turns the last bits of one near zero into whole steps.
PLAIN = [
    *SMALL,
    "--network",
    "fcn8s-plain",
    "--epochs",
    "2",
    "--optimizer",
    "sgd",
    "--lr",
    "0.05",
    "--clip",
    "1",
]


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_shapes(tmp_path_factory.mktemp("shapes"), train=8, val=3)


@pytest.fixture(scope="module")
def alone(shapes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of one process."""
    out = tmp_path_factory.mktemp("alone")
    assert run("--data", shapes, "--out", out, *PLAIN) == 0
    return out


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def start(folder: Path, *arguments: object, before: str = "", count: int = 2) -> list[Process]:
    """`segcli train` in several processes, with the environment that torchrun gives them."""
    shared = {
        "WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()), "GLOO_SOCKET_IFNAME": "lo",
    }  # fmt: skip
    return [
        Process("train", *arguments, folder=folder, before=f"{REGISTER_TINY}\n{before}",
                RANK=str(rank), LOCAL_RANK=str(rank), **shared)
        for rank in range(count)
    ]  # fmt: skip


def ended(processes: list[Process]) -> list[tuple[int, str]]:
    """Exit codes and what each process said."""
    codes = [process.wait() for process in processes]
    return [(code, process.errors) for code, process in zip(codes, processes, strict=True)]


def tensors(out: Path) -> dict[str, torch.Tensor]:
    return safetensors.torch.load_file(out / "last.safetensors")


def assert_close(one: Path, other: Path) -> None:
    """The same losses, learning rates, scores and weights, to 1e-5."""
    for a, b in zip(log(one), log(other), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-5)
        assert a["lr"] == b["lr"]
        assert a["mean_iou"] == pytest.approx(b["mean_iou"], abs=2e-3)  # a pixel or two on the edge
    ours, theirs = tensors(one), tensors(other)
    assert ours.keys() == theirs.keys()
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], atol=1e-5, rtol=0)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_two_processes_equal_one(shapes: Path, alone: Path, tmp_path: Path, accumulate: int) -> None:
    results = ended(start(tmp_path, "--data", shapes, "--out", "run", *PLAIN, "--accumulate", accumulate))
    assert results == [(0, ""), (0, "")]
    assert_close(tmp_path / "run", alone)


def test_two_processes_equal_one_with_class_weights_and_a_summed_loss(shapes: Path, tmp_path: Path) -> None:
    options = ["--data", shapes, *PLAIN, "--class-weights", "auto", "--summed-loss", "--lr", "1e-6"]
    assert run(*options, "--out", tmp_path / "alone") == 0
    assert ended(start(tmp_path, *options, "--out", "run")) == [(0, ""), (0, "")]
    one, other = log(tmp_path / "run"), log(tmp_path / "alone")
    assert [r["loss"] for r in one] == pytest.approx([r["loss"] for r in other], rel=1e-5)
    for a, b in zip(tensors(tmp_path / "run").values(), tensors(tmp_path / "alone").values(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=0)


def test_two_processes_resume_and_a_classifier_is_validated_by_both(tmp_path: Path) -> None:
    from PIL import Image

    for number in range(12):
        for name, color in (("red", (200, number, 0)), ("blue", (0, number, 200))):
            for split, count in (("train", 8), ("val", 3)):
                folder = tmp_path / "data" / split / name
                folder.mkdir(parents=True, exist_ok=True)
                if number < count:
                    Image.new("RGB", (40, 32), color).save(folder / f"{number}.png")
    options = ["--task", "classify", "--encoder", "regnet_y_400mf", "--data", "data", "--out", "run",
               "--crop", "32", "32", "--batch-size", "8", "--workers", "0", "--precision", "fp32",
               "--device", "cpu", "--scale", "0.5", "1", "--epochs", "2"]  # fmt: skip
    first, second = ended(start(tmp_path, *options))
    assert first[0] == second[0] == 0, first[1] + second[1]
    assert second[1] == ""
    assert "2 classes; 16 images of train, 6 images of val" in first[1]
    assert "On 2 processes, cpu" in first[1]
    assert all(0 <= record["accuracy"] <= 1 for record in log(tmp_path / "run"))


def test_stopped_and_resumed_equals_undisturbed(shapes: Path, tmp_path: Path) -> None:
    """One signal to each process, at different moments; then the same command again."""
    options = ["--data", shapes, *PLAIN, "--epochs", "3", "--network", "fcn8s-tiny"]
    assert [code for code, _ in ended(start(tmp_path, *options, "--out", "whole"))] == [0, 0]
    stop = """
import os, signal
from segcli.training import loop
original, seen = loop.train_step, 0
def counting(*arguments):
    global seen
    seen += 1
    if seen == 3 + int(os.environ["RANK"]):
        os.kill(os.getpid(), signal.SIGTERM)
    return original(*arguments)
loop.train_step = counting
"""
    results = ended(start(tmp_path, *options, "--out", "run", before=stop))
    assert results[0][0] == 143
    assert results[0][1].count("\n") == 2  # that it stops, and where it stopped
    assert results[1][1] == ""
    assert ended(start(tmp_path, *options, "--out", "run")) == [(0, ""), (0, "")]
    assert_same_result(tmp_path / "run", tmp_path / "whole")


def test_of_an_error_that_all_have_one_speaks(tmp_path: Path, shapes: Path) -> None:
    (code, said), (other_code, other) = ended(start(tmp_path, "--data", "nowhere", *PLAIN))
    assert (code, other_code) == (2, 2)
    assert said.count("Error: ") == 1
    assert "nowhere" in said
    assert other == ""
    (code, said), (other_code, other) = ended(start(tmp_path, "--data", shapes, *PLAIN, "--batch-size", 5))
    assert (code, other_code) == (2, 2)
    assert "batch_size 5 cannot be split into 2 processes" in said
    assert other == ""


def test_an_error_of_one_process_ends_all_with_its_message(tmp_path: Path) -> None:
    """Image 0 is damaged after the check: only the process that draws it knows."""
    data = make_shapes(tmp_path / "data")
    (data / "train/images/0.png").write_bytes(b"no picture")
    results = ended(start(tmp_path, "--data", data, "--out", "run", *PLAIN, "--skip-check"))
    codes, texts = zip(*results, strict=True)
    assert 0 not in codes
    said = "".join(texts)
    assert said.count("Error: ") == 1
    assert "images/0.png" in said
    assert "Traceback" not in said


def test_a_loss_that_is_not_finite_is_said_once(tmp_path: Path, shapes: Path) -> None:
    options = ["--data", shapes, "--out", "run", *PLAIN, "--lr", "1e30", "--clip", "0"]
    (code, said), (other_code, other) = ended(start(tmp_path, *options))
    assert (code, other_code) == (1, 1)
    assert "is nan at step" in said or "is inf at step" in said
    assert other == ""


def test_a_killed_process_ends_the_other(tmp_path: Path, shapes: Path) -> None:
    options = ["--data", shapes, "--out", "run", *PLAIN, "--epochs", "100000"]
    first, second = start(tmp_path, *options)
    wait_until(lambda: (tmp_path / "run/checkpoint.pt").exists())
    second.kill_group()
    assert second.wait() == -signal.SIGKILL
    assert first.wait() == 1
    assert first.errors.splitlines() == [
        "Another process of this training has ended. The same command goes on from the last checkpoint."
    ]


def torchrun(folder: Path, *options: object, code: str = "") -> subprocess.Popen[str]:
    """The documented command itself, on a network that a file registers."""
    program = folder / "program.py"
    program.write_text(f"{REGISTER_TINY}\n{code}\nfrom segcli.cli import main\nmain()\n")
    words = [Path(sys.executable).with_name("torchrun")]
    words += [program if word == "PROGRAM" else word for word in options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    return subprocess.Popen(
        list(map(str, words)), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment,
    )  # fmt: skip


def test_torchrun_end_to_end(tmp_path: Path, shapes: Path, alone: Path) -> None:
    training = ["train", "--data", shapes, "--out", tmp_path / "run", *PLAIN, "--json"]
    with torchrun(tmp_path, "--standalone", "--nproc-per-node", 2, "PROGRAM", *training) as process:
        out, errors = process.communicate()
    assert process.returncode == 0, errors
    assert json.loads(out)["epochs"] == 2  # one document, not two
    assert_close(tmp_path / "run", alone)


# Process 1 stops for ever in the first step of the second epoch, unless it was started again.
HANG = """
import os, pathlib, time
from segcli.training import loop
original, seen = loop.train_step, 0
def counting(*arguments):
    global seen
    seen += 1
    if os.environ["RANK"] == "0":
        with open("steps", "a") as file:
            file.write(os.environ["TORCHELASTIC_RESTART_COUNT"])
    if seen == 3 and os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        pathlib.Path("pid.new").write_text(str(os.getpid()))
        pathlib.Path("pid.new").rename("pid")
        time.sleep(1e6)
    return original(*arguments)
loop.train_step = counting
"""


def test_a_process_that_is_killed_and_a_torchrun_that_starts_all_again(
    tmp_path: Path, shapes: Path, alone: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    options = ["--standalone", "--nproc-per-node", 2, "--max-restarts", 1]
    training = ["train", "--data", shapes, "--out", tmp_path / "run", *PLAIN]
    with torchrun(tmp_path, *options, "PROGRAM", *training, code=HANG) as process:
        wait_until((tmp_path / "pid").exists)
        os.kill(int((tmp_path / "pid").read_text()), signal.SIGKILL)
        errors = process.communicate()[1]
    assert process.returncode == 0, errors
    assert "exitcode: -9" in errors  # torchrun says who
    assert (tmp_path / "steps").read_text() == "000" + "11"  # the first epoch is not done again
    assert_close(tmp_path / "run", alone)
