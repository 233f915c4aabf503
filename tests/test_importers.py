"""Importers against the released networks spelled out, and against files that must be refused."""

from __future__ import annotations

import argparse
import io
import json
import os
import tarfile
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import released
import torch
import torch.nn.functional as F
from caffe_messages import CLASSES
from fault_table import Row
from released import THIN, THIN_ALEXNET, Weights
from torch import Tensor

from segcli.cli import main
from segcli.errors import CheckpointError, UsageError
from segcli.models.alexnet import AlexNetFCN
from segcli.models.checkpoint import load_model
from segcli.models.importers import coerce, import_model
from segcli.models.key_maps import VGG_CONVOLUTIONS, VGG_FEATURES
from segcli.models.networks import AT_ONCE_SCALES, NETWORKS
from segcli.models.semseg import ResizingVGG16FCN
from segcli.models.vgg import VGG16FCN

SIZES = [(1, 1), (31, 47), (64, 64), (97, 130)]
REFERENCES: dict[str, tuple[int, Callable[[Tensor, Weights], Tensor]]] = {
    "fcn32s": (32, released.fcn32s),
    "fcn16s": (16, released.fcn16s),
    "fcn8s": (8, released.fcn8s),
    "fcn8s-atonce": (8, released.fcn8s_atonce),
}
ARCHITECTURES = {"fcn32s": "FCN32s", "fcn16s": "FCN16s", "fcn8s": "FCN8s", "fcn8s-atonce": "FCN8sAtOnce"}


@pytest.fixture(autouse=True)
def thin_networks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same networks with few channels: the real ones have half a gigabyte of weights."""
    rows: dict[str, Callable[[int], Any]] = {
        "fcn32s": partial(VGG16FCN, stride=32, widths=THIN),
        "fcn16s": partial(VGG16FCN, stride=16, widths=THIN),
        "fcn8s": partial(VGG16FCN, stride=8, widths=THIN),
        "fcn8s-atonce": partial(VGG16FCN, stride=8, scales=AT_ONCE_SCALES, widths=THIN),
        "fcn16s-atonce": partial(VGG16FCN, stride=16, scales=AT_ONCE_SCALES, widths=THIN),
        "fcn-alexnet": partial(AlexNetFCN, widths=THIN_ALEXNET),
    }
    for stride in (32, 16, 8):
        for ending, mode in (("", "bilinear"), ("-nearest", "nearest")):
            rows[f"fcn{stride}s-semseg{ending}"] = partial(
                ResizingVGG16FCN, stride=stride, mode=mode, widths=THIN
            )
    for name, builder in rows.items():
        monkeypatch.setitem(NETWORKS, name, builder)


def image(size: tuple[int, int], seed: int = 0) -> Tensor:
    return torch.randn(1, 3, *size, generator=torch.Generator().manual_seed(seed)) * 60


def assert_same_scores(path: Path, reference: Callable[[Tensor], Tensor], sizes: Any = SIZES) -> None:
    network = load_model(path).network
    for seed, size in enumerate(sizes):
        x = image(size, seed)
        with torch.no_grad():
            found, expected = network(x), reference(x)
        assert found.shape == expected.shape == (1, expected.shape[1], *size)
        assert (found - expected).abs().max() <= 1e-4 * expected.abs().max()


def assert_same_weights(path: Path, weights: Weights) -> None:
    state = load_model(path).network.state_dict()
    assert set(state) == set(weights)
    for name, value in weights.items():
        assert torch.equal(state[name], value)


# ---- pytorch-fcn ----


@pytest.mark.parametrize("name", REFERENCES)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_torchfcn_gives_the_scores_of_the_released_network(tmp_path: Path, name: str, seed: int) -> None:
    stride, reference = REFERENCES[name]
    weights = released.vgg_weights(stride, 21, seed)
    torch.save(weights, tmp_path / "in.pth")
    imported = import_model(tmp_path / "in.pth", tmp_path / "out.safetensors", arch=name)
    assert imported.info.class_set.name == "voc"
    assert imported.info.preprocessing.order == "BGR"
    assert imported.info.preprocessing.shorter_side is None
    assert imported.foreign.leftovers == ()
    assert_same_weights(tmp_path / "out.safetensors", weights)
    sizes = [*SIZES, (700, 500)] if seed == 0 else SIZES[:2]
    assert_same_scores(tmp_path / "out.safetensors", lambda x: reference(x, weights), sizes)


@pytest.mark.parametrize("name", REFERENCES)
def test_torchfcn_training_checkpoint_tells_its_network(tmp_path: Path, name: str) -> None:
    stride, _ = REFERENCES[name]
    weights = released.vgg_weights(stride, 5, 3)
    checkpoint = {
        "epoch": 7,
        "iteration": 12345,
        "arch": ARCHITECTURES[name],
        "optim_state_dict": {
            "state": {0: {"momentum_buffer": torch.zeros(2)}},
            "param_groups": [{"lr": 1e-10}],
        },
        "model_state_dict": {f"module.{key}": value for key, value in weights.items()},
        "best_mean_iu": np.float64(0.655),
    }
    torch.save(checkpoint, tmp_path / "checkpoint.pth.tar")
    imported = import_model(tmp_path / "checkpoint.pth.tar", tmp_path / "out.safetensors")
    assert imported.info.network == name
    assert imported.info.class_set.names == ("class_0", "class_1", "class_2", "class_3", "class_4")
    assert_same_weights(tmp_path / "out.safetensors", weights)


def test_fcn8s_and_at_once_are_not_guessed(tmp_path: Path) -> None:
    torch.save(released.vgg_weights(8, 21, 0), tmp_path / "in.pth")
    with pytest.raises(
        UsageError, match="does not tell its network; add --arch fcn8s or --arch fcn8s-atonce"
    ):
        import_model(tmp_path / "in.pth", tmp_path / "out.safetensors")
    assert not (tmp_path / "out.safetensors").exists()


def test_half_precision_becomes_single(tmp_path: Path) -> None:
    weights = {key: value.half() for key, value in released.vgg_weights(32, 21, 0).items()}
    torch.save(weights, tmp_path / "in.pth")
    import_model(tmp_path / "in.pth", tmp_path / "out.safetensors")
    assert_same_weights(tmp_path / "out.safetensors", {key: value.float() for key, value in weights.items()})


# ---- pytorch-semseg ----


def semseg_names(weights: Weights) -> Weights:
    theirs = {"fc6": "classifier.0", "fc7": "classifier.3", "score_fr": "classifier.6",
              "upscore_pool4": "upscore4"}  # fmt: skip
    for name in VGG_CONVOLUTIONS:
        stage, n = int(name[4]), int(name[6])
        theirs[name] = f"conv_block{stage}.{2 * (n - 1)}"
    split = {key: key.rpartition(".") for key in weights}
    return {f"{theirs.get(split[key][0], split[key][0])}.{split[key][2]}": v for key, v in weights.items()}


def test_semseg_with_upsampling_layers_is_the_released_network(tmp_path: Path) -> None:
    weights = released.vgg_weights(8, 21, 4)
    state = {f"module.{key}": value for key, value in semseg_names(weights).items()}
    torch.save({"epoch": 3, "model_state": state, "best_iou": 0.4}, tmp_path / "in.pkl")
    imported = import_model(tmp_path / "in.pkl", tmp_path / "out.safetensors", preprocessing="caffe")
    assert (imported.foreign.source, imported.info.network) == ("semseg", "fcn8s")
    assert_same_scores(tmp_path / "out.safetensors", lambda x: released.fcn8s(x, weights))


def test_semseg_must_be_told_its_preprocessing(tmp_path: Path) -> None:
    torch.save(semseg_names(released.vgg_weights(8, 21, 4)), tmp_path / "in.pkl")
    with pytest.raises(UsageError, match=r"add --preprocessing caffe-unit or .*caffe or .*imagenet"):
        import_model(tmp_path / "in.pkl", tmp_path / "out.safetensors")


@pytest.mark.parametrize("mode", ["bilinear", "nearest"])
@pytest.mark.parametrize("stride", [32, 16, 8])
def test_semseg_without_upsampling_layers_resizes(tmp_path: Path, stride: int, mode: str) -> None:
    weights = {k: v for k, v in released.vgg_weights(stride, 4, 5).items() if not k.startswith("upscore")}
    torch.save({"model_state": semseg_names(weights)}, tmp_path / "in.pkl")
    arch = f"fcn{stride}s-semseg" + ("-nearest" if mode == "nearest" else "")
    with pytest.raises(UsageError, match=f"--arch fcn{stride}s-semseg or --arch fcn{stride}s-semseg-nearest"):
        import_model(tmp_path / "in.pkl", tmp_path / "out.safetensors", preprocessing="imagenet")
    import_model(tmp_path / "in.pkl", tmp_path / "out.safetensors", arch=arch, preprocessing="imagenet")

    def resize(x: Tensor, size: Any) -> Tensor:
        return F.interpolate(x, tuple(size), mode=mode, align_corners=True if mode == "bilinear" else None)

    def reference(x: Tensor) -> Tensor:
        maps = released.vgg(x, weights)
        scores = released.score(maps["fc7"], weights, "score_fr")
        for name in ("pool4", "pool3")[: {32: 0, 16: 1, 8: 2}[stride]]:
            finer = released.score(maps[name], weights, f"score_{name}")
            scores = resize(scores, finer.shape[2:]) + finer
        return resize(scores, x.shape[2:])

    assert_same_scores(tmp_path / "out.safetensors", reference)


# ---- zijundeng ----


@pytest.mark.parametrize("stride", [32, 16, 8])
def test_zijundeng_scales_its_skips(tmp_path: Path, stride: int) -> None:
    weights = released.vgg_weights(stride, 21, 6)
    starts = {32: {"features5": 0}, 16: {"features4": 0, "features5": 24},
              8: {"features3": 0, "features4": 17, "features5": 24}}[stride]  # fmt: skip
    theirs = {"fc6": "score_fr.0", "fc7": "score_fr.3", "score_fr": "score_fr.6"}
    for name, place in zip(VGG_CONVOLUTIONS, VGG_FEATURES, strict=True):
        part = [part for part, start in starts.items() if start <= place][-1]
        theirs[name] = f"{part}.{place - starts[part]}"
    state = {}
    for key, value in weights.items():
        name, _, kind = key.rpartition(".")
        state[f"{theirs.get(name, name)}.{kind}"] = value
    torch.save(state, tmp_path / "in.pth")
    imported = import_model(tmp_path / "in.pth", tmp_path / "out.safetensors")
    assert imported.foreign.source == "zijundeng"
    assert imported.info.preprocessing.mean == (103.939, 116.779, 123.68)
    reference = {32: released.fcn32s, 16: partial(released.fcn16s, scale4=0.01), 8: released.fcn8s_atonce}
    assert_same_scores(tmp_path / "out.safetensors", lambda x: reference[stride](x, weights))


# ---- Caffe ----


def fill(message: Any, value: Tensor, legacy: bool = False) -> None:
    """One BlobProto; legacy: four dimensions, with ones in front."""
    if legacy:
        shape = [1] * (4 - value.ndim) + list(value.shape)
        message.num, message.channels, message.height, message.width = shape
    else:
        message.shape.dim.extend(value.shape)
    message.data.extend(value.flatten().tolist())


def caffemodel(path: Path, weights: Weights, version: int = 2, extra: tuple[str, ...] = ("pool4",)) -> Path:
    """A caffemodel as Caffe writes it: every layer of the net, most of them without weights.

    Version 1 is that of 2014: `layers`, blobs of four dimensions, fc6 and fc7 fully connected.
    """
    net = CLASSES["NetParameter"](name="an FCN")
    layers = net.layers if version == 1 else net.layer
    names = list(dict.fromkeys(key.rpartition(".")[0] for key in weights))
    for name in extra:
        layers.add(name=name)
    for name in names:
        layer = layers.add(name=name)
        for part in ("weight", "bias"):
            value = weights.get(f"{name}.{part}")
            if value is not None:
                if version == 1 and name in ("fc6", "fc7") and part == "weight":
                    value = value.flatten(1)
                fill(layer.blobs.add(), value, legacy=version == 1)
    path.write_bytes(net.SerializeToString())
    return path


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("name", ["fcn32s", "fcn16s", "fcn8s"])
def test_caffemodel_gives_the_scores_of_the_released_network(tmp_path: Path, name: str, version: int) -> None:
    stride, reference = REFERENCES[name]
    weights = released.vgg_weights(stride, 21, 7)
    path = caffemodel(tmp_path / "in.caffemodel", weights, version)
    imported = import_model(path, tmp_path / "out.safetensors")
    assert imported.info.network == name
    assert_same_weights(tmp_path / "out.safetensors", weights)
    assert_same_scores(tmp_path / "out.safetensors", lambda x: reference(x, weights))


def test_caffe_at_once_is_known_by_its_scale_layers(tmp_path: Path) -> None:
    weights = released.vgg_weights(8, 21, 8)
    scales = {"scale_pool4.weight": torch.full((THIN[3],), 0.01),
              "scale_pool3.weight": torch.full((THIN[2],), 0.0001)}  # fmt: skip
    path = caffemodel(tmp_path / "in.caffemodel", weights | scales)
    imported = import_model(path, tmp_path / "out.safetensors")
    assert imported.info.network == "fcn8s-atonce"
    assert imported.foreign.leftovers == ()
    assert_same_scores(tmp_path / "out.safetensors", lambda x: released.fcn8s_atonce(x, weights))
    scales["scale_pool4.weight"] *= 2
    caffemodel(path, weights | scales)
    with pytest.raises(CheckpointError, match="not as the at-once net does"):
        import_model(path, tmp_path / "other.safetensors")


def test_caffe_without_its_list_of_layers_is_not_guessed(tmp_path: Path) -> None:
    path = caffemodel(tmp_path / "in.caffemodel", released.vgg_weights(8, 21, 8), extra=())
    with pytest.raises(UsageError, match="--arch fcn8s or --arch fcn8s-atonce"):
        import_model(path, tmp_path / "out.safetensors")


def test_caffe_upsampling_per_channel_becomes_dense(tmp_path: Path) -> None:
    weights = released.vgg_weights(32, 3, 9)
    kernel = weights["upscore.weight"]
    diagonal = torch.stack([kernel[i, i] for i in range(3)])[:, None]  # (3, 1, 64, 64), group: 3 in Caffe
    path = caffemodel(tmp_path / "in.caffemodel", weights | {"upscore.weight": diagonal})
    import_model(path, tmp_path / "out.safetensors")

    def reference(x: Tensor) -> Tensor:
        scores = released.score(released.vgg(x, weights)["fc7"], weights, "score_fr")
        return released.crop(F.conv_transpose2d(scores, diagonal, stride=32, groups=3), 19, x)

    assert_same_scores(tmp_path / "out.safetensors", reference)


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("seed", [0, 1])
def test_caffe_alexnet(tmp_path: Path, version: int, seed: int) -> None:
    weights = released.alexnet_weights(21, seed)
    path = caffemodel(tmp_path / "in.caffemodel", weights, version, extra=("pool5", "norm1"))
    imported = import_model(path, tmp_path / "out.safetensors")
    assert imported.info.network == "fcn-alexnet"
    assert_same_weights(tmp_path / "out.safetensors", weights)
    assert_same_scores(
        tmp_path / "out.safetensors", lambda x: released.fcn_alexnet(x, weights), [*SIZES, (203, 150)]
    )


@pytest.mark.parametrize("stride", [32, 16, 8])
def test_caffe_siftflow_has_two_heads(tmp_path: Path, stride: int) -> None:
    reference = {32: released.fcn32s, 16: released.fcn16s, 8: released.fcn8s}[stride]
    semantic = released.vgg_weights(stride, 33, 10)
    geometric = semantic | {
        key: value
        for key, value in released.vgg_weights(stride, 3, 11).items()
        if key.startswith(("score", "upscore"))
    }
    joint: Weights = {}
    for weights, ending in ((semantic, "_sem"), (geometric, "_geo")):
        for key, value in weights.items():
            name, _, part = key.rpartition(".")
            joint[f"{name}{ending}.{part}" if name.startswith(("score", "upscore")) else key] = value
    path = caffemodel(tmp_path / "in.caffemodel", joint)
    imported = import_model(path, tmp_path / "out.safetensors")
    assert imported.info.class_set.name == "siftflow"
    assert imported.info.second_class_set is not None
    assert imported.info.second_class_set.names == ("sky", "horizontal", "vertical")
    assert imported.info.preprocessing.mean == (114.578, 115.294, 108.353)
    assert_same_scores(
        tmp_path / "out.safetensors",
        lambda x: torch.cat([reference(x, semantic), reference(x, geometric)], 1),
    )


def test_caffe_nyud_must_be_told_colour_or_hha(tmp_path: Path) -> None:
    path = caffemodel(tmp_path / "in.caffemodel", released.vgg_weights(32, 40, 12))
    with pytest.raises(UsageError, match="--preprocessing nyud or --preprocessing nyud-hha"):
        import_model(path, tmp_path / "out.safetensors")
    imported = import_model(path, tmp_path / "out.safetensors", preprocessing="nyud-hha")
    assert imported.info.class_set.names[19] == "floor mat"
    assert imported.info.preprocessing.order == "RGB"


def test_caffe_pascal_context(tmp_path: Path) -> None:
    path = caffemodel(tmp_path / "in.caffemodel", released.vgg_weights(16, 60, 13))
    imported = import_model(path, tmp_path / "out.safetensors")
    assert imported.info.class_set.names[:2] == ("background", "aeroplane")


def test_leftovers_are_listed(tmp_path: Path) -> None:
    weights = released.vgg_weights(16, 21, 14)
    path = caffemodel(tmp_path / "in.caffemodel", weights | {"fc8.weight": torch.zeros(2, 2)})
    assert import_model(path, tmp_path / "out.safetensors").foreign.leftovers == ("fc8",)
    torch.save(weights | {"fc8.bias": torch.zeros(2)}, tmp_path / "in.pth")
    imported = import_model(tmp_path / "in.pth", tmp_path / "out.safetensors")
    assert imported.foreign.leftovers == ("fc8.bias",)


def test_caffe_upsampling_with_a_bias_is_refused(tmp_path: Path) -> None:
    weights = released.vgg_weights(32, 21, 14)
    path = caffemodel(tmp_path / "in.caffemodel", weights | {"upscore.bias": torch.ones(21)})
    with pytest.raises(CheckpointError, match="upscore has a bias"):
        import_model(path, tmp_path / "out.safetensors")


def test_coerce_keeps_the_order_of_the_numbers() -> None:
    connected = torch.arange(24.0).reshape(2, 12)
    convolution = coerce(connected, (2, 3, 2, 2))
    assert convolution[1, 2, 0, 1] == 12 + 2 * 4 + 1  # row 1, then channel, row and column
    assert coerce(connected.reshape(1, 1, 2, 12), (2, 3, 2, 2)).shape == (2, 3, 2, 2)
    assert coerce(torch.zeros(1, 1, 1, 5), (5,)).shape == (5,)
    assert coerce(connected.T, (2, 3, 2, 2)).shape == (12, 2)  # not the same order: left as it is


# ---- torchvision ----


@pytest.mark.parametrize(
    "name", ["fcn_resnet50", "lraspp_mobilenet_v3_large", "deeplabv3_mobilenet_v3_large"]
)
def test_torchvision_as_it_is(tmp_path: Path, name: str) -> None:
    from torchvision.models import get_model

    torch.manual_seed(0)
    auxiliary = {} if name.startswith("lraspp") else {"aux_loss": True}
    theirs = get_model(name, weights=None, weights_backbone=None, num_classes=21, **auxiliary).eval()
    torch.save(theirs.state_dict(), tmp_path / "in.pth")
    imported = import_model(tmp_path / "in.pth", tmp_path / "out.safetensors")
    assert imported.info.network == name
    assert all(key.startswith("aux_classifier.") for key in imported.foreign.leftovers)
    assert bool(imported.foreign.leftovers) == bool(auxiliary)
    assert imported.info.preprocessing.shorter_side == 520
    network = load_model(tmp_path / "out.safetensors").network
    x = image((65, 49))
    with torch.no_grad():
        assert torch.equal(network(x), theirs(x)["out"])


def test_torchvision_classifier_is_refused(tmp_path: Path) -> None:
    from torchvision.models import resnet18

    torch.save(resnet18().state_dict(), tmp_path / "in.pth")
    with pytest.raises(CheckpointError, match=r"no known source \(it has conv1\.weight"):
        import_model(tmp_path / "in.pth", tmp_path / "out.safetensors")


# ---- what must be refused, by the command ----


class Malicious:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.target),)


EXECUTED = "18 checkpoints that are programs: pickles of every kind, TorchScript, .pt2, old archives"
DAMAGED = "19 model files that are empty, cut off, web pages, of other shapes, not finite"


def refused(path: Path, capfd: pytest.CaptureFixture[str], *options: str) -> str:
    """The message of `segcli models import`, which must end with 2, one line, and no output file."""
    out = path.parent / "out.safetensors"
    with pytest.raises(SystemExit) as exit_:
        main(["models", "import", str(path), "--out", str(out), *options])
    assert exit_.value.code == 2
    assert not out.exists()
    message = capfd.readouterr().err.strip()
    assert message.startswith("Error: ")
    assert message.count("\n") <= 1
    assert path.name in message
    return message


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("place", ["top", "value", "key", "state", "list", "tuple", "set"])
@Row(EXECUTED)
def test_nothing_is_executed(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], zipped: bool, place: str
) -> None:
    trap = Malicious(tmp_path / "executed")
    weights: Any = released.vgg_weights(32, 21, 0)
    content = {"top": trap, "value": weights | {"x": trap}, "key": weights | {trap: 0},
               "state": {"model_state_dict": weights, "arch": trap}, "list": weights | {"x": [trap]},
               "tuple": weights | {"x": (1, trap)}, "set": weights | {"x": {trap}}}[place]  # fmt: skip
    torch.save(content, tmp_path / "in.pth", _use_new_zipfile_serialization=zipped)
    assert "would have to be executed" in refused(tmp_path / "in.pth", capfd)
    assert not (tmp_path / "executed").exists()


@pytest.mark.faults
def test_whole_modules_and_namespaces_are_refused(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    torch.save(torch.nn.Conv2d(3, 3, 1), tmp_path / "module.pth")
    with Row(EXECUTED):
        assert "torch.nn.modules.conv.Conv2d would have to be executed" in refused(
            tmp_path / "module.pth", capfd
        )
    state = {"model": released.vgg_weights(32, 21, 0), "args": argparse.Namespace(lr=1)}
    torch.save(state, tmp_path / "trainer.pth")
    with Row(EXECUTED):
        assert "argparse.Namespace" in refused(tmp_path / "trainer.pth", capfd)


@pytest.mark.faults
def test_programs_and_old_archives_are_refused(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    script = tmp_path / "script.pt"
    with zipfile.ZipFile(script, "w") as archive:
        for name in ("a/data.pkl", "a/code/__torch__.py", "a/constants.pkl"):
            archive.writestr(name, b"\x80\x02N.")
    with Row(EXECUTED):
        assert "TorchScript" in refused(script, capfd)
    exported = tmp_path / "program.pt2"
    with zipfile.ZipFile(exported, "w") as archive:
        archive.writestr("program/archive_format", "pt2")
    with Row(EXECUTED):
        assert ".pt2" in refused(exported, capfd)
    with tarfile.open(tmp_path / "old.pth", "w") as archive:
        member = tarfile.TarInfo("pickle")
        member.size = 3
        archive.addfile(member, io.BytesIO(b"abc"))
    with Row(EXECUTED):
        assert "tar archive" in refused(tmp_path / "old.pth", capfd)
    bomb = tmp_path / "bomb.pth"
    with zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/data.pkl", b"\x80\x02N.")
        archive.writestr("a/data/0", bytes(10**6))
    with Row(EXECUTED):
        assert "compressed" in refused(bomb, capfd)


@pytest.mark.faults
def test_damaged_and_foreign_files_are_refused(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    weights = released.vgg_weights(32, 21, 0)
    torch.save(weights, tmp_path / "whole.pth")
    whole = (tmp_path / "whole.pth").read_bytes()
    for name, content, cause in [
        ("empty.pth", b"", "is empty"),
        ("page.pth", b"\n<!DOCTYPE html><html><body>Sign in</body></html>", "web page"),
        ("cut.pth", whole[: len(whole) // 2], "cut off or damaged"),
        ("pickle.pth", b"\x80\x02}q", "damaged"),
        ("text.pth", b"hello there, I am no checkpoint\n" * 9, "no PyTorch checkpoint"),
        ("cut.safetensors", b"\x40" + bytes(7) + b'{"a":', "damaged"),
        ("cut.caffemodel", b"\xa2\x06\xff\x7f", "cannot be read as a caffemodel"),
        ("page.caffemodel", b"<html>404</html>", "caffemodel"),
    ]:
        (tmp_path / name).write_bytes(content)
        with Row(DAMAGED):
            assert cause in refused(tmp_path / name, capfd)
    with Row(DAMAGED):
        refused(tmp_path / "missing.pth", capfd)
    torch.save([1, 2], tmp_path / "list.pth")
    with Row(DAMAGED):
        assert "holds no weights" in refused(tmp_path / "list.pth", capfd)
    torch.save(weights | {"epoch": 3}, tmp_path / "mixed.pth")
    with Row(DAMAGED):
        assert "such as epoch" in refused(tmp_path / "mixed.pth", capfd)
    torch.save(weights | {"fc6.bias": torch.full((THIN[5],), torch.nan)}, tmp_path / "nan.pth")
    with Row(DAMAGED):
        assert "not finite, in fc6.bias" in refused(tmp_path / "nan.pth", capfd)
    torch.save(weights | {"fc6.bias": torch.zeros(3)}, tmp_path / "shape.pth")
    with Row(DAMAGED):
        assert "fc6.bias has shape (3,), not (14,)" in refused(tmp_path / "shape.pth", capfd)
    del weights["conv3_2.weight"]
    torch.save(weights, tmp_path / "missing-key.pth")
    with Row(DAMAGED):
        assert "1 missing (such as conv3_2.weight)" in refused(tmp_path / "missing-key.pth", capfd)


def test_wrong_options_name_the_nearest(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "in.pth"
    torch.save(released.vgg_weights(8, 21, 0), path)
    out = ["--out", str(tmp_path / "out.safetensors")]
    for options, message in [
        (["--arch", "fcn8"], "did you mean 'fcn8s'?"),
        (["--arch", "fcn16s"], "does not fit its network"),
        (["--arch", "fcn8s", "--classes", "camvid"], "21 classes, but the class set camvid has 11"),
        (["--arch", "fcn8s", "--preprocessing", "cafe"], "did you mean 'caffe'?"),
        (["--arch", "fcn8s", "--source", "caffee"], "use auto, caffe"),
        (["--arch", "fcn8s", "--out", str(tmp_path / "out.pth")], "--out must end in .safetensors"),
    ]:
        with pytest.raises(SystemExit) as exit_:
            main(["models", "import", str(path), *out, *options])
        assert exit_.value.code == 2
        assert message in capfd.readouterr().err


def test_import_command_reports_what_it_did(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    weights = released.vgg_weights(8, 21, 0) | {"fc8.bias": torch.zeros(2)}
    torch.save(weights, tmp_path / "in.pth")
    out = tmp_path / "new" / "out.safetensors"
    with pytest.raises(SystemExit) as exit_:
        main(
            [
                "models",
                "import",
                str(tmp_path / "in.pth"),
                "--arch",
                "fcn8s-atonce",
                "--out",
                str(out),
                "--json",
            ]
        )
    assert exit_.value.code in (0, None)
    output = capfd.readouterr()
    report = json.loads(output.out)
    assert report["network"] == "fcn8s-atonce"
    assert report["source"] == "torchfcn"
    assert report["classes"] == "voc"
    assert report["leftovers"] == ["fc8.bias"]
    assert "fc8.bias" in output.err
    assert load_model(out).info.network == "fcn8s-atonce"
    with pytest.raises(SystemExit) as exit_:
        main(["models", "import", str(out), "--out", str(tmp_path / "again.safetensors")])
    assert exit_.value.code == 2
    assert "is a model of segcli already" in capfd.readouterr().err
    with pytest.raises(SystemExit) as exit_:
        main(["models", "import", str(out), "--out", str(out)])
    assert exit_.value.code == 2
    assert "is the file to import" in capfd.readouterr().err
