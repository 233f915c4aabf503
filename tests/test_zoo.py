"""Models by name: lookup, published files through a loopback server, the cache, offline."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
import released
import torch
from loopback import Server, give, serving
from released import THIN

from segcli import downloads
from segcli.errors import CheckpointError, MachineError, UsageError
from segcli.models import zoo
from segcli.models.checkpoint import load_model, save_model
from segcli.models.info import ModelInfo
from segcli.models.networks import NETWORKS, get, get_empty
from segcli.models.preprocessing import PREPROCESSINGS
from segcli.models.published import PUBLISHED, Published
from segcli.models.vgg import VGG16FCN
from segcli.models.zoo import (
    cached_model,
    fetch,
    find_model,
    list_models,
    open_model,
    published_file,
    verify_model,
)
from segcli.palettes import CLASS_SETS

NAME = "fcn32s-vgg16-voc-pth"


class Ears:
    """Remembers what a watch hears."""

    def __init__(self) -> None:
        self.said: list[str] = []
        self.done = 0

    def say(self, text: str) -> None:
        self.said.append(text)

    def progress(self, done: int, total: int | None) -> None:
        self.done = done


@pytest.fixture
def server() -> Iterator[Server]:
    with serving() as server:
        yield server


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SEGCLI_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.delenv("SEGCLI_OFFLINE", raising=False)
    monkeypatch.setattr(downloads, "PAUSE_SECONDS", 0.0)


@pytest.fixture
def weights(tmp_path: Path) -> bytes:
    """A published file: a thin FCN-32s as pytorch-fcn saves it."""
    torch.save(released.vgg_weights(32, 21, 0), tmp_path / "published.pth")
    return (tmp_path / "published.pth").read_bytes()


@pytest.fixture
def publish(monkeypatch: pytest.MonkeyPatch, server: Server, weights: bytes) -> Callable[..., Published]:
    """Let the record NAME stand for the thin file on the loopback server."""
    monkeypatch.setitem(NETWORKS, "fcn32s", partial(VGG16FCN, stride=32, widths=THIN))

    def with_checksum(checksum: str | None) -> Published:
        record = dataclasses.replace(PUBLISHED[NAME], addresses=(server.address,), checksum=checksum)
        monkeypatch.setitem(PUBLISHED, NAME, record)
        server.script = [give(weights)]
        return record

    return with_checksum


def test_first_use_downloads_imports_and_remembers(
    publish: Callable[..., Published], server: Server, weights: bytes
) -> None:
    md5 = "md5:" + hashlib.md5(weights).hexdigest()
    record = publish(md5)
    ears = Ears()
    model = open_model(NAME, watch=ears)
    assert model.path == cached_model(record)
    assert ears.said[0].startswith(
        f"{NAME} is not on this machine yet: downloading {record.file}, about 519 MiB"
    )
    assert ears.done == len(weights)
    assert model.info.network == "fcn32s"
    assert model.info.class_set.name == "voc"
    assert model.info.preprocessing == PREPROCESSINGS["caffe"]
    assert model.info.licence == record.licence
    assert model.info.metrics == {
        "VOC seg11valid, 736 images": {"mean_iou": 0.6363, "published_by": "wkentaro/pytorch-fcn"}
    }
    for name, value in released.vgg_weights(32, 21, 0).items():
        assert torch.equal(model.network.state_dict()[name], value)
    known = json.loads(cached_model(record).with_suffix(".json").read_text())
    assert known["address"] == server.address
    assert known["bytes"] == len(weights)
    assert known["sha256"] == hashlib.sha256(weights).hexdigest()
    assert known["published_checksum"] == md5
    assert not published_file(record).exists()
    assert open_model(NAME).path == model.path
    assert len(server.requests) == 1
    assert "as downloaded on" in verify_model(NAME)


def test_without_a_published_checksum_the_first_download_is_trusted(
    publish: Callable[..., Published], server: Server, weights: bytes, tmp_path: Path
) -> None:
    record = publish(None)
    ears = Ears()
    fetch(record, watch=ears)
    assert "its publisher states no checksum; the one of this download will be remembered" in ears.said
    cached_model(record).unlink()
    torch.save(released.vgg_weights(32, 21, 1), tmp_path / "other.pth")
    server.script = [give((tmp_path / "other.pth").read_bytes())]
    with pytest.raises(MachineError, match="its sha256 is"):
        fetch(record)
    assert not cached_model(record).exists()
    server.script = [give(weights)]
    fetch(record)
    assert cached_model(record).exists()


def test_a_file_put_there_by_hand_is_taken_and_stays(
    publish: Callable[..., Published], server: Server, weights: bytes
) -> None:
    record = publish("md5:" + hashlib.md5(weights).hexdigest())
    file = published_file(record)
    file.parent.mkdir(parents=True)
    file.write_bytes(weights[:-1])
    with pytest.raises(CheckpointError, match=f"{record.file} is not the published file: its md5 is"):
        fetch(record, offline=True)
    file.write_bytes(weights)
    ears = Ears()
    fetch(record, offline=True, watch=ears)
    assert ears.said == [f"{NAME}: taking {file}"]
    assert file.read_bytes() == weights
    assert server.requests == []
    assert json.loads(cached_model(record).with_suffix(".json").read_text())["address"] == "put there by hand"


@pytest.mark.parametrize("by_environment", [True, False])
def test_offline_says_where_the_file_is_and_where_it_goes(
    monkeypatch: pytest.MonkeyPatch, by_environment: bool
) -> None:
    if by_environment:
        monkeypatch.setenv("SEGCLI_OFFLINE", "1")
    record = PUBLISHED["fcn8s-vgg16-voc"]
    with pytest.raises(MachineError) as caught:
        find_model("fcn8s-vgg16-voc", offline=not by_environment)
    reason, advice = str(caught.value).split("\n")
    assert "is not on this machine, and the network is switched off" in reason
    assert "http://dl.caffe.berkeleyvision.org/fcn8s-heavy-pascal.caffemodel" in advice
    assert str(published_file(record)) in advice
    assert caught.value.exit_code == 3


def test_what_cannot_be_imported_is_not_kept(publish: Callable[..., Published], server: Server) -> None:
    record = publish(None)
    server.script = [give(b"\x80\x02 this is not what it should be")]
    with pytest.raises(CheckpointError):
        fetch(record)
    assert not published_file(record).exists()
    assert not cached_model(record).exists()


def test_a_changed_model_in_the_cache_is_found(publish: Callable[..., Published]) -> None:
    record = publish(None)
    fetch(record)
    path = cached_model(record)
    model = load_model(path)
    with torch.no_grad():
        next(model.network.parameters()).add_(1)
    save_model(path, model.network, model.info)
    with pytest.raises(CheckpointError, match="has changed since it was downloaded"):
        verify_model(NAME)
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(CheckpointError):
        verify_model(NAME)


def test_bundled_names_paths_and_suggestions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = tmp_path / "weights"
    info = ModelInfo(
        "fcn32s-resnet18", CLASS_SETS["camvid"], metrics={"camvid/val": {"mean_iou": 0.5, "images": 101}}
    )
    save_model(weights / "fcn8s-camvid.safetensors", get("fcn32s-resnet18", 11), info)
    (weights / "encoder-resnet18.safetensors").write_bytes(b"")
    monkeypatch.setattr(zoo, "IN_WHEEL", weights)
    path = weights / "fcn8s-camvid.safetensors"
    assert find_model("fcn8s-camvid") == path
    assert find_model(str(path)) == path
    entry = list_models()[0]
    assert (entry.name, entry.classes, entry.place) == ("fcn8s-camvid", (11,), "bundled")
    assert (entry.mean_iou, entry.scored_on, entry.measured) == (50.0, "camvid/val, 101 images", True)
    assert "tensors fit fcn32s-resnet18" in verify_model("fcn8s-camvid")
    for wrong, message in [
        ("fcn8s-camvit", "did you mean 'fcn8s-camvid'?"),
        ("fcn-resnet50", "did you mean 'fcn-resnet50-voc'?"),
        ("runs/best.safetensors", "there is no model file runs/best.safetensors"),
        (str(tmp_path), "is a folder"),
    ]:
        with pytest.raises(UsageError) as caught:
            find_model(wrong)
        assert message in str(caught.value)


@pytest.mark.parametrize("record", PUBLISHED.values(), ids=lambda record: record.name)
def test_records_are_complete(record: Published) -> None:
    assert PUBLISHED[record.name] is record
    assert record.preprocessing in PREPROCESSINGS
    classes = sum(len(CLASS_SETS[name]) for name in record.classes)
    network = get_empty(record.network, classes)
    parameters = sum(value.numel() for value in network.state_dict().values())
    assert record.mebibytes == pytest.approx(4 * parameters / 2**20, rel=0.1)
    assert all(address.startswith(("http://", "https://")) for address in record.addresses)
    assert (record.mean_iou is None) == (record.scored_on == "")
    algorithm, _, digits = (record.checksum or "").partition(":")
    assert (algorithm, len(digits)) in [("", 0), ("md5", 32), ("sha256", 8)]
    assert record.licence
    assert record.trained_on
    assert len(record.name) <= 26, "the list has 80 columns"


def test_torchvision_records_are_torchvisions() -> None:
    from torchvision.models import get_model_weights

    records = [record for record in PUBLISHED.values() if record.source == "torchvision"]
    assert len(records) == 6
    for record in records:
        (weights,) = get_model_weights(record.network)
        assert record.addresses == (weights.url,)
        assert record.mebibytes == pytest.approx(weights.meta["_file_size"], abs=0.06)
        assert record.mean_iou == weights.meta["_metrics"]["COCO-val2017-VOC-labels"]["miou"]
        prefix = weights.url.rpartition("-")[2].removesuffix(".pth")
        assert record.checksum == f"sha256:{prefix}"
        names = [name.replace("__background__", "background") for name in weights.meta["categories"]]
        assert tuple(names) == CLASS_SETS["voc"].names
        preset = weights.transforms()
        ours = PREPROCESSINGS[record.preprocessing]
        assert (list(ours.mean), list(ours.std)) == (preset.mean, preset.std)
        assert [ours.shorter_side] == preset.resize_size


def test_published_scores() -> None:
    """The README of the release, and that of pytorch-fcn (seg11valid)."""
    scores = {name: record.mean_iou for name, record in PUBLISHED.items() if "seg11valid" in record.scored_on}
    assert scores == {
        "fcn32s-vgg16-voc": 63.6,
        "fcn16s-vgg16-voc": 65.0,
        "fcn8s-vgg16-voc": 65.5,
        "fcn8s-atonce-vgg16-voc": 65.4,
        "fcn-alexnet-voc": 48.0,
        "fcn32s-vgg16-voc-pth": 63.63,
        "fcn16s-vgg16-voc-pth": 65.01,
        "fcn8s-vgg16-voc-pth": 65.51,
        "fcn8s-atonce-vgg16-voc-pth": 65.40,
    }


def test_the_documentation_lists_every_record() -> None:
    text = (Path(__file__).parents[1] / "docs" / "models.md").read_text("utf-8")
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in text.splitlines()
        if line.startswith("| `") and line.count("|") == 8
    ]
    expected = []
    for record in PUBLISHED.values():
        classes = " + ".join(str(len(CLASS_SETS[name])) for name in record.classes)
        score = ["-", "none published"]
        if record.mean_iou is not None:
            score = [f"{record.mean_iou}", record.scored_on]
        names = [f"`{record.name}`", f"`{record.network}`"]
        expected.append([*names, classes, f"{record.mebibytes:.0f}", *score, record.said_by])
    assert rows == expected
