"""Networks recorded on a GPU. Here only that the recording is given up where it is impossible."""

from __future__ import annotations

import pytest
import torch

from segcli.inference.replay import AFTER, MOST, Replayed

devices = [
    "cpu",
    pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")),
]


@pytest.mark.parametrize("device", devices)
@torch.inference_mode()
def test_every_call_gives_what_the_function_gives(device: str) -> None:
    weight = torch.randn(5, 3, 3, 3, device=device)
    replayed = Replayed(lambda x: torch.nn.functional.conv2d(x, weight))
    found = []
    for size in range(5, 5 + MOST + 2):  # more shapes than are recorded
        for number in range(AFTER + 3):
            given = torch.full((2, 3, size, size), float(number), device=device)
            found.append((replayed(given), given))
    for made, given in found:  # none was overwritten by a later call
        torch.testing.assert_close(made, torch.nn.functional.conv2d(given, weight))
