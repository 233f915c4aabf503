"""What the tests of training share: a small data set, short options, and how two runs are compared."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from segcli.cli import main

TESTS = Path(__file__).parent
# For `processes.Process`: the tiny networks, and an installation without the extra segcli[train], which takes
# seconds to import.
REGISTER_TINY = f"""
import sys
sys.path.append({str(TESTS)!r})
import tiny_network
sys.modules["torch.utils.tensorboard"] = sys.modules["matplotlib.figure"] = None
"""
SMALL = [
    "--crop", "64", "64", "--batch-size", "4", "--precision", "fp32", "--storage", "float32", "--warmup", "0",
    "--quiet", "--workers", "0", "--device", "cpu",
]  # fmt: skip
TINY = [*SMALL, "--network", "fcn8s-tiny", "--epochs", "2", "--ema", "0.9", "--seed", "3"]


def make_shapes(root: Path, train: int = 8, val: int = 2) -> Path:
    """Pictures of a bright square (1) and a dark bar (2) on noise (0): easy to learn by heart."""
    random = np.random.default_rng(0)
    for split, count in (("train", train), ("val", val)):
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


def run(*arguments: object) -> int:
    """`segcli train` in this process: its exit code."""
    with pytest.raises(SystemExit) as stop:
        main(["train", *map(str, arguments)])
    return int(stop.value.code or 0)


def log(folder: Path) -> list[dict[str, Any]]:
    """The log without what is different every time."""
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "seconds"} for line in lines]


def assert_same_result(one: Path, other: Path) -> None:
    """Two run folders with the same log, the same model files and the same state, bit for bit."""
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
