"""`segcli predict --processes N`: the same results and the same record as one process."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
from processes import Process, run, wait_until
from results import tree
from small_model import save_picture, small_model

from segcli.device import pick_devices
from segcli.errors import UsageError


def predict(folder: Path, *arguments: object, **more: str) -> tuple[int, str]:
    return run("predict", "in", "-m", small_model(), "--workers", 0, *arguments, folder=folder, **more)


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "_run/manifest.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def eight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with eight pictures and a bad file in `in`, and in `masks` what one process makes of them."""
    folder = tmp_path_factory.mktemp("eight")
    for number in range(8):
        save_picture(folder / f"in/{number}.png", 24, 32, number)
    (folder / "in/bad.jpg").write_text("hello")
    assert predict(folder)[0] == 1
    return folder


def test_two_processes_make_what_one_makes(eight: Path, tmp_path: Path) -> None:
    shutil.copytree(eight / "in", tmp_path / "in")
    code, errors = predict(tmp_path, "--processes", 2)
    assert code == 1, errors
    assert "on cpu (2 processes) in" in errors
    assert "9 images in" in errors
    assert "  in/bad.jpg: not an image (it starts with 'hello')" in errors
    assert tree(tmp_path / "masks") == tree(eight / "masks")
    assert len(lines(tmp_path / "masks")) == 9
    code, errors = predict(tmp_path, "--processes", 2)
    assert "0 done, 8 done before, 1 failed" in errors
    assert code == 1


# Python runs this in every process before anything else: stations compute in batches, as on a GPU.
BATCHES = """
import sys
if any("inference.station" in word for word in sys.orig_argv):
    from segcli.inference.segmentation import Segmenter
    real = Segmenter.__init__
    def init(self, *arguments):
        real(self, *arguments)
        self.batch_size, self.at_once, self.side_by_side, self.held = 3, 2, 0, 18
    Segmenter.__init__ = init
"""


def test_pictures_that_fill_no_batch_are_computed_in_the_end(eight: Path, tmp_path: Path) -> None:
    shutil.copytree(eight / "in", tmp_path / "in")
    (tmp_path / "site").mkdir()
    (tmp_path / "site/sitecustomize.py").write_text(BATCHES)
    code, errors = predict(tmp_path, "--processes", 2, PYTHONPATH=str(tmp_path / "site"))
    assert code == 1, errors
    assert "8 done, 1 failed" in errors
    assert tree(tmp_path / "masks") == tree(eight / "masks")


# The same: stations meet their fate by the picture.
FATE = """
import os, signal, sys
if any("inference.station" in word for word in sys.orig_argv):
    from segcli.images import read_image as real
    import segcli.images
    def read_image(path, *rest):
        if path.name == "KILL.png":
            open("masks/.segcli-half", "w").close()  # as if it were writing another one just now
            os.kill(os.getpid(), signal.SIGKILL)
        return real(path, *rest)
    segcli.images.read_image = read_image
"""


def test_an_input_that_takes_its_process_down_costs_itself_only(eight: Path, tmp_path: Path) -> None:
    shutil.copytree(eight / "in", tmp_path / "in")
    save_picture(tmp_path / "in/KILL.png")
    (tmp_path / "site").mkdir()
    (tmp_path / "site/sitecustomize.py").write_text(FATE)
    code, errors = predict(tmp_path, "--processes", 2, PYTHONPATH=str(tmp_path / "site"))
    assert code == 1
    assert "  in/KILL.png: computing it takes the process down (ended by SIGKILL)" in errors
    assert tree(tmp_path / "masks") == tree(eight / "masks")
    assert len(lines(tmp_path / "masks")) == 10


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_stopped_and_run_again(eight: Path, tmp_path: Path, number: signal.Signals) -> None:
    for copy in range(8):
        shutil.copytree(eight / "in", tmp_path / f"in/{copy}")
    command = ["predict", "in", "-m", small_model(), "--workers", 0, "--processes", 2]
    process = Process(*command, folder=tmp_path)
    record = tmp_path / "masks/_run/manifest.jsonl"
    wait_until(lambda: record.exists() and record.read_bytes().count(b'"done"') > 0)
    if number == signal.SIGINT:
        os.killpg(process.pid, number)  # as a terminal does
        assert process.wait() == 130
        assert "The same command goes on from here." in process.errors
    else:
        process.send(number)  # to the parent alone: its children see that it has gone
        assert process.wait() == -number
    wait_until(process.group_is_gone)
    assert record.read_bytes().count(b'"done"') < 64
    assert predict(tmp_path)[0] == 1
    clean = tree(eight / "masks")
    for name, data in tree(tmp_path / "masks").items():
        folder, _, file = name.rpartition("/")
        assert data == clean[f"{'_overlay/' * folder.startswith('_overlay')}{file}"]
    assert len(lines(tmp_path / "masks")) == 72


def test_a_model_that_cannot_be_used_is_told_once(eight: Path, tmp_path: Path) -> None:
    shutil.copytree(eight / "in", tmp_path / "in")
    damaged = bytearray(small_model().read_bytes())
    (tmp_path / "bad.safetensors").write_bytes(damaged[: len(damaged) // 2])
    code, errors = run(
        "predict", "in", "-m", "bad.safetensors", "--workers", 0, "--processes", 2, folder=tmp_path
    )
    assert code == 2
    assert "bad.safetensors" in errors
    assert "Traceback" not in errors


def test_devices_by_name() -> None:
    assert pick_devices("cpu") == ["cpu"]
    with pytest.raises(UsageError, match="cuda"):
        pick_devices("tpu:all")


def test_small_images_do_not_depend_on_the_number_of_threads(tmp_path: Path) -> None:
    # At this size oneDNN splits sums among threads: computed by several, the scores do differ.
    for number in range(2):
        save_picture(tmp_path / f"in/{number}.png", 240, 320, number)
    for threads in (1, 2):
        out = tmp_path / f"masks-{threads}"
        code, errors = run(
            *("predict", "in", "-o", out, "--save", "mask,scores", "--precision", "fp32"),
            folder=tmp_path,
            before=f"import torch; torch.set_num_threads({threads})",
        )
        assert code == 0, errors
        assert f"cpu ({threads} threads)" in errors
    assert tree(tmp_path / "masks-1") == tree(tmp_path / "masks-2")
