"""Devices by name; what is not there is an error, never a silent fall back."""

from __future__ import annotations

import pytest
import torch

from segcli.device import describe, pick_device, pick_precision
from segcli.errors import UsageError


def test_auto_takes_a_gpu_when_there_is_one() -> None:
    expected = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    assert pick_device("auto").type == expected
    assert pick_device("cpu") == torch.device("cpu")


@pytest.mark.parametrize("name", ["gpu", "cpu:1", "cuda:x", "mps:0", "", "cuda:-1"])
def test_unknown_devices(name: str) -> None:
    with pytest.raises(UsageError, match="is unknown; use auto, cpu, cuda"):
        pick_device(name)


def test_a_gpu_that_is_not_there() -> None:
    missing = f"cuda:{torch.cuda.device_count()}"
    with pytest.raises(UsageError, match=f"--device {missing}.*use --device auto or --device cpu"):
        pick_device(missing)


def test_description_names_the_threads() -> None:
    assert describe(torch.device("cpu")) == f"cpu ({torch.get_num_threads()} threads)"


def test_precision() -> None:
    cpu = torch.device("cpu")
    assert pick_precision("fp32", cpu) == "fp32"
    assert pick_precision("auto", cpu) in ("fp32", "bf16")
    with pytest.raises(UsageError, match="fp16 needs a GPU"):
        pick_precision("fp16", cpu)
