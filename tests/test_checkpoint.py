"""Model files: what is saved comes back bit by bit, and what is damaged is refused with its cause."""

from __future__ import annotations

import dataclasses
import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from fault_table import Row

from segcli.cli import main
from segcli.errors import CheckpointError, UsageError
from segcli.models.checkpoint import fill, load_model, save_model
from segcli.models.info import METADATA_KEY, ModelInfo, read_info
from segcli.models.networks import NETWORKS, get, get_empty
from segcli.models.preprocessing import PREPROCESSINGS
from segcli.palettes import CLASS_SETS, generic_class_set

INFO = ModelInfo(
    network="fcn16s-mobilenet_v3_large",
    class_set=CLASS_SETS["siftflow"],
    second_class_set=CLASS_SETS["siftflow-geometric"],
    preprocessing=PREPROCESSINGS["siftflow"],
    dataset="SIFT Flow",
    metrics={"siftflow/test": {"mean_iou": 0.395, "images": 200}},
    recipe={"epochs": 3, "optimizer": "sgd"},
    licence="MIT",
    notes=("first", "second"),
)


@pytest.fixture(scope="module")
def model_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("model") / "a.safetensors"
    save_model(path, get(INFO.network, INFO.channels), INFO)
    return path


def test_what_is_saved_comes_back(tmp_path: Path) -> None:
    torch.manual_seed(1)
    network = get(INFO.network, INFO.channels)
    save_model(tmp_path / "a.safetensors", network, INFO)
    model = load_model(tmp_path / "a.safetensors")
    assert model.info == INFO == read_info(tmp_path / "a.safetensors")
    assert not model.network.training
    expected = network.state_dict()
    found = model.network.state_dict()
    assert list(found) == list(expected)
    for name, value in expected.items():
        assert torch.equal(found[name], value)
        assert found[name].dtype == value.dtype
    assert all(parameter.requires_grad for parameter in model.network.parameters())
    with torch.no_grad():
        x = torch.randn(1, 3, 40, 33)
        assert model.network(x).shape == (1, 36, 40, 33)
        assert torch.equal(model.network(x), network.eval()(x))


def test_half_precision_on_disk_is_single_in_memory(tmp_path: Path) -> None:
    network = get(INFO.network, INFO.channels)
    info = dataclasses.replace(INFO, dtype="float16")
    save_model(tmp_path / "a.safetensors", network, info)
    found = load_model(tmp_path / "a.safetensors").network.state_dict()
    for name, value in network.state_dict().items():
        expected = value.half().float() if value.is_floating_point() else value
        assert torch.equal(found[name], expected)


def test_the_model_does_not_depend_on_its_file(model_file: Path, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(model_file.read_bytes())
    model = load_model(path)
    before = {name: value.clone() for name, value in model.network.state_dict().items()}
    path.write_bytes(bytes(path.stat().st_size))
    for name, value in model.network.state_dict().items():
        assert torch.equal(value, before[name])


def changed(model_file: Path, path: Path, **document: Any) -> Path:
    """The model file with other metadata."""
    state = safetensors.torch.load_file(model_file)
    metadata: dict[str, Any] = {"format": 1, **dataclasses.asdict(INFO), **document}
    safetensors.torch.save_file(state, path, {METADATA_KEY: json.dumps(metadata)})
    return path


@pytest.mark.parametrize(
    ("document", "cause"),
    [
        ({"format": 99}, "newer segcli"),
        ({"network": "fcn16s-mobilenet_v9"}, "no network is called"),
        ({"network": "fcn8s-mobilenet_v3_large"}, "missing (such as score_pool3.weight)"),
        ({"network": "fcn16s-resnet18"}, "does not fit its network"),
        (
            {"class_set": dataclasses.asdict(CLASS_SETS["camvid"])},
            "score_fr.bias has shape (36,), not (14,)",
        ),
        ({"class_set": {"name": "x", "names": ["a"], "colors": []}}, "damaged metadata"),
        ({"class_set": None}, "damaged metadata"),
        ({"preprocessing": {"mean": [0, 0], "std": [1, 1, 1]}}, "damaged metadata"),
        ({"preprocessing": {"mean": [0, 0, 0], "std": [0, 1, 1]}}, "damaged metadata"),
        ({"what": "is this"}, "damaged metadata"),
    ],
)
def test_metadata_that_does_not_fit(
    model_file: Path, tmp_path: Path, document: dict[str, Any], cause: str
) -> None:
    path = changed(model_file, tmp_path / "a.safetensors", **document)
    with pytest.raises(CheckpointError) as caught:
        load_model(path)
    assert cause in str(caught.value)
    assert str(path) in str(caught.value)


@pytest.mark.faults
def test_files_that_are_no_models(model_file: Path, tmp_path: Path) -> None:
    whole = model_file.read_bytes()
    (length,) = struct.unpack("<Q", whole[:8])
    for content, cause in [
        (b"", "it is empty"),
        (b"<!DOCTYPE html><title>Sign in</title>", "it is a web page"),
        (b"\x80\x02}q\x00.", "it is a pickle"),
        (b"PK\x03\x04....", "zip archive"),
        (whole[: 8 + length // 2], "is not a model file"),
        (whole[:-100], ""),
        (struct.pack("<Q", 2**60) + whole[8:], "is not a model file"),
        (struct.pack("<Q", 2) + b"{}", "without segcli's metadata"),
    ]:
        path = tmp_path / "a.safetensors"
        path.write_bytes(content)
        with Row("19 model files that are empty, cut off, web pages, of other shapes, not finite"):
            with pytest.raises(CheckpointError) as caught:
                load_model(path)
            assert cause in str(caught.value)
            assert str(path) in str(caught.value)
            assert "\n" not in str(caught.value)
    with pytest.raises(UsageError, match="there is no model file"):
        load_model(tmp_path / "missing.safetensors")
    with pytest.raises(CheckpointError):
        load_model(tmp_path)


def test_damaged_bytes_are_refused_or_load(model_file: Path, tmp_path: Path) -> None:
    """Whatever bits flip in the header, the answer is a model or our error."""
    whole = bytearray(model_file.read_bytes())
    (length,) = struct.unpack("<Q", whole[:8])
    random = np.random.default_rng(0)
    path = tmp_path / "a.safetensors"
    refused = 0
    for _ in range(40):
        damaged = bytearray(whole)
        for place in random.integers(0, 8 + length, 4):
            damaged[place] ^= 1 << random.integers(0, 8)
        path.write_bytes(damaged)
        try:
            load_model(path)
        except CheckpointError:
            refused += 1
    assert refused > 20


def test_numbers_that_are_not_finite(model_file: Path, tmp_path: Path) -> None:
    state = safetensors.torch.load_file(model_file)
    state["score_fr.bias"][3] = torch.inf
    metadata = json.dumps({"format": 1, **dataclasses.asdict(INFO)})
    safetensors.torch.save_file(state, tmp_path / "a.safetensors", {METADATA_KEY: metadata})
    with pytest.raises(CheckpointError, match=r"not finite, in score_fr\.bias"):
        load_model(tmp_path / "a.safetensors")


def test_fill_checks_before_it_copies() -> None:
    network = get("fcn32s-mobilenet_v3_large", 2)
    before = network.score_fr.weight.detach().clone()
    state = {name: torch.ones_like(value) for name, value in network.state_dict().items()}
    state["score_fr.bias"] = torch.ones(2, dtype=torch.int64)
    with pytest.raises(CheckpointError, match=r"score_fr\.bias is torch\.int64, not torch\.float32"):
        fill(network, state, "a test")
    assert torch.equal(network.score_fr.weight, before)


def test_predict_with_a_damaged_model_exits_with_2(
    model_file: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.png").write_bytes(b"")
    path = tmp_path / "cut.safetensors"
    path.write_bytes(model_file.read_bytes()[:-100])
    with pytest.raises(SystemExit) as exit_:
        main(["predict", str(tmp_path / "photos"), "--out", str(tmp_path / "out"), "--model", str(path)])
    assert exit_.value.code == 2
    message = capfd.readouterr().err.strip().splitlines()[-1]
    assert message.startswith("Error: ")
    assert "cut.safetensors" in message


def test_channels_count_both_heads() -> None:
    assert INFO.channels == 36
    assert ModelInfo("fcn8s", generic_class_set(7)).channels == 7


def test_empty_networks_draw_nothing_and_fit() -> None:
    """Every kind of network, among them RegNet, whose builder computes with tensors."""
    names = [name for name in NETWORKS if not name.startswith(("fcn16s-", "fcn8s-"))]
    assert "fcn32s-regnet_y_400mf" in names
    state = torch.get_rng_state()
    empty = {name: get_empty(name, 3).state_dict() for name in names}
    assert torch.equal(torch.get_rng_state(), state)
    for name in ("fcn32s-regnet_y_400mf", "fcn32s-efficientnet_b0", "lraspp_mobilenet_v3_large"):
        full = get(name, 3).state_dict()
        assert {key: value.shape for key, value in full.items()} == {
            key: value.shape for key, value in empty[name].items()
        }
