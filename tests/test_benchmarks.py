"""The benchmarks' own code: peers compute what they stand for, and every job runs."""

from __future__ import annotations

import peers
import pytest
import released
import torch

from segcli.inference.benchmark import Size, synthetic_photo


def test_the_plainly_written_network_is_the_released_one() -> None:
    weights = released.vgg_weights(8, 5, 0)
    network = peers.ReleasedFCN8s(5, released.THIN).eval()
    network.load_state_dict(weights)
    image = torch.randn(1, 3, 45, 61, generator=torch.Generator().manual_seed(0)) * 60
    with torch.no_grad():
        torch.testing.assert_close(network(image), released.fcn8s(image, weights))


def test_jobs_are_timed_in_turns_and_shown_beside_the_first(capsys: pytest.CaptureFixture[str]) -> None:
    photo = synthetic_photo(Size(40, 30), 0)
    peers.compare("FCN-8s", peers.fcn8s_jobs(photo, "torch", released.THIN), rounds=1)
    lines = capsys.readouterr().out.splitlines()
    names = [
        "written plainly",
        "segcli, plain",
        "segcli, windowed",
        "segcli, torch fp32",
        "segcli, torch bf16",
    ]
    assert lines[0].startswith("FCN-8s by torch fp32: scores ")
    assert [name for name, line in zip(names, lines[-5:], strict=True) if name in line] == names
    assert " 1.00x  1.00x" in lines[-5]
