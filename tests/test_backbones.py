"""Our own encoders against torchvision's, which the same weights must fit and give the same maps."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from segcli.models.encoders import ENCODERS, cut_torchvision

NODES = {
    "mobilenet_v3_large": ("features.6", "features.12", "features.16"),
    "resnet18": ("layer2", "layer3", "layer4"),
    "resnet34": ("layer2", "layer3", "layer4"),
    "resnet50": ("layer2", "layer3", "layer4"),
}


@pytest.mark.parametrize("name", NODES)
def test_maps_and_running_means_are_torchvisions_to_the_bit(name: str) -> None:
    torch.manual_seed(0)
    theirs, ours = cut_torchvision(name, NODES[name]), ENCODERS[name].build()
    for layer in theirs.modules():
        if isinstance(layer, nn.BatchNorm2d):
            nn.init.uniform_(layer.weight, 0.5, 1.5)
            nn.init.normal_(layer.bias, std=0.2)
    ours.load_state_dict(copy.deepcopy(theirs.state_dict()), strict=True)
    images = torch.randn(2, 3, 50, 67)
    with torch.no_grad():
        for mode in (True, False):  # training first, so that the running means are no longer zero
            expected, found = theirs.train(mode)(images), ours.train(mode)(images)
            assert found.keys() == expected.keys()
            assert all(torch.equal(found[key], expected[key]) for key in expected)
    expected_state, state = theirs.state_dict(), ours.state_dict()
    assert list(state) == list(expected_state)
    assert all(torch.equal(state[key], expected_state[key]) for key in state)


@pytest.mark.parametrize("name", NODES)
def test_weights_are_drawn_as_torchvision_draws_them(name: str) -> None:
    torch.manual_seed(1)
    expected = dict(cut_torchvision(name, NODES[name]).named_parameters())
    for key, value in ENCODERS[name].build().named_parameters():
        if value.numel() > 5000 or value.ndim == 1:
            assert value.std().item() == pytest.approx(expected[key].std().item(), rel=0.1), key
