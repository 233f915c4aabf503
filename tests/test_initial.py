"""What a training starts from: whole models, encoders of every kind, and class weights."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import safetensors.torch
import tiny_network  # noqa: F401 - registers fcn8s-tiny
import torch
from caffe_messages import CLASSES
from PIL import Image
from training_runs import SMALL, log, make_shapes, run

from segcli.data.sets import open_data
from segcli.errors import CheckpointError, MachineError, UsageError
from segcli.models.checkpoint import load_model, save_model
from segcli.models.info import ModelInfo
from segcli.models.networks import NETWORKS, get
from segcli.models.preprocessing import PREPROCESSINGS
from segcli.models.vgg import VGG16FCN
from segcli.palettes import ClassSet, generic_class_set
from segcli.training.config import resolve
from segcli.training.initial import scoring_layers, start_encoder, starting_network
from segcli.training.setup import class_weights

THIN = (4, 4, 4, 4, 4, 6)
ENCODER = "regnet_y_400mf"
THREE = ClassSet("three", ("ground", "square", "bar"), ((0, 0, 0), (9, 9, 9), (20, 20, 20)))


@pytest.fixture(autouse=True)
def thin_networks(monkeypatch: pytest.MonkeyPatch) -> None:
    for stride in (8, 16, 32):
        monkeypatch.setitem(NETWORKS, f"fcn{stride}s-thin", partial(VGG16FCN, stride=stride, widths=THIN))


def saved_model(path: Path, network: str, classes: ClassSet, **about: object) -> Path:
    torch.manual_seed(7)
    save_model(path, get(network, len(classes)), ModelInfo(network, classes, **about))  # type: ignore[arg-type]
    return path


# -- whole models -------------------------------------------------------------------------------------


def test_a_model_of_the_same_classes_is_taken_whole(tmp_path: Path) -> None:
    file = saved_model(tmp_path / "m.safetensors", "fcn8s-tiny", THREE)
    start = starting_network(resolve({"model": str(file)}), THREE)
    assert start.name == "fcn8s-tiny"
    assert start.about == f"starts from {file}"
    for name, value in load_model(file).network.state_dict().items():
        assert torch.equal(start.network.state_dict()[name], value)


@pytest.mark.parametrize("classes", [generic_class_set(5), generic_class_set(3)])
def test_other_classes_get_new_score_layers_and_it_is_said(tmp_path: Path, classes: ClassSet) -> None:
    """Three other classes are other classes, though their weights would fit."""
    file = saved_model(tmp_path / "m.safetensors", "fcn8s-tiny", THREE)
    start = starting_network(resolve({"model": str(file)}), classes)
    assert start.network.num_classes == len(classes)
    assert f"the classes change from the 3 of three to {len(classes)} of" in start.about
    assert "so score_fr, score_pool3, score_pool4, upscore2, upscore_pool4 start anew" in start.about
    before, after = load_model(file).network.state_dict(), start.network.state_dict()
    scoring = scoring_layers("fcn8s-tiny")
    assert {name.partition(".")[0] for name in scoring} == {
        "score_fr", "score_pool4", "score_pool3", "upscore2", "upscore_pool4"
    }  # fmt: skip
    for name in (name for name in after if not name.startswith("upscore")):  # those are bilinear at first
        same = before[name].shape == after[name].shape and torch.equal(before[name], after[name])
        assert same == (name not in scoring), name


def test_a_finer_network_goes_on_from_a_coarser_one(tmp_path: Path) -> None:
    """FCN-32s, then FCN-16s, as the paper trains them."""
    file = saved_model(
        tmp_path / "m.safetensors", "fcn32s-thin", THREE, preprocessing=PREPROCESSINGS["caffe"]
    )
    start = starting_network(resolve({"model": str(file), "network": "fcn16s-thin"}), THREE)
    assert start.name == "fcn16s-thin"
    assert start.preprocessing == PREPROCESSINGS["caffe"]
    assert "score_pool4, upscore16, upscore2 start anew" in start.about
    before = load_model(file).network.state_dict()
    assert torch.equal(start.network.state_dict()["score_fr.weight"], before["score_fr.weight"])


def test_a_model_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    file = saved_model(tmp_path / "m.safetensors", "fcn32s-thin", THREE)
    with pytest.raises(CheckpointError, match="is a fcn32s-thin; none of its weights fit"):
        starting_network(resolve({"model": str(file), "network": f"fcn8s-{ENCODER}"}), generic_class_set(2))
    with pytest.raises(UsageError, match="brings its encoder"):
        starting_network(resolve({"model": str(file), "encoder_weights": "imagenet"}), THREE)


# -- encoders -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of a small classifier."""
    root = tmp_path_factory.mktemp("classes")
    for name, color in (("red", (200, 0, 0)), ("blue", (0, 0, 200))):
        for split in ("train", "val"):
            folder = root / "data" / split / name
            folder.mkdir(parents=True)
            for number in range(4):
                Image.new("RGB", (40, 32), (color[0], 40 * number, color[2])).save(folder / f"{number}.png")
    options = ["--task", "classify", "--encoder", ENCODER, "--data", root / "data", "--epochs", "1"]
    assert run(*options, "--out", root / "run", *SMALL[SMALL.index("--batch-size") :], "--crop", 32, 32) == 0
    return root / "run"


def test_a_pretrained_encoder_starts_a_segmentation_network(
    pretrained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (record,) = log(pretrained)
    assert set(record) == {"epoch", "loss", "lr", "accuracy"}
    file = pretrained / "best.safetensors"
    network = get(f"fcn8s-{ENCODER}", 3)
    assert start_encoder(network, f"fcn8s-{ENCODER}", str(file)) == "imagenet"
    classifier = safetensors.torch.load_file(file)
    encoder = network.get_submodule("encoder").state_dict()
    assert encoder
    for name, value in encoder.items():
        assert torch.equal(value, classifier[name]), name
    shapes = make_shapes(tmp_path / "shapes")
    options = [word for word in SMALL if word != "--quiet"]
    code = run("--data", shapes, "--encoder", ENCODER, "--encoder-weights", file, "--epochs", 1, *options,
               "--out", tmp_path / "run", "--dry-run")  # fmt: skip
    assert code == 0
    assert f"its encoder starts from {file}." in capsys.readouterr().err


def test_an_encoder_file_of_another_network_is_named(pretrained: Path) -> None:
    with pytest.raises(CheckpointError) as error:
        start_encoder(get("fcn8s-resnet18", 3), "fcn8s-resnet18", str(pretrained / "best.safetensors"))
    assert "does not fit the encoder resnet18" in str(error.value)
    assert f"it says: torchvision {ENCODER}, 2 classes, 1 epochs" in str(error.value)


def test_the_encoder_of_a_model_file_and_a_state_dict_without_counters(tmp_path: Path) -> None:
    name = f"fcn8s-{ENCODER}"
    source = get(name, 2)
    save_model(tmp_path / "m.safetensors", source, ModelInfo(name, generic_class_set(2)))
    old = {key.removeprefix("encoder."): value for key, value in source.state_dict().items()
           if key.startswith("encoder.") and not key.endswith("num_batches_tracked")}  # fmt: skip
    torch.save(old, tmp_path / "old.pth")
    for file in ("m.safetensors", "old.pth"):
        network = get(name, 3)
        start_encoder(network, name, str(tmp_path / file))
        for key, value in source.state_dict().items():
            if key.startswith("encoder."):
                assert torch.equal(network.state_dict()[key], value), (file, key)


def vgg_classifier() -> dict[str, torch.Tensor]:
    """A state dict of torchvision's vgg16, but thin."""
    torch.manual_seed(3)
    state, before = {}, 3
    widths = [w for w, n in zip(THIN[:5], (2, 2, 3, 3, 3), strict=True) for _ in range(n)]
    for index, width in zip((0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28), widths, strict=True):
        state[f"features.{index}.weight"] = torch.randn(width, before, 3, 3)
        state[f"features.{index}.bias"] = torch.randn(width)
        before = width
    for index, (rows, columns) in {0: (6, 4 * 49), 3: (6, 6), 6: (10, 6)}.items():
        state[f"classifier.{index}.weight"] = torch.randn(rows, columns)
        state[f"classifier.{index}.bias"] = torch.randn(rows)
    return state


def test_vgg16_starts_from_a_classifier_of_torchvision_or_caffe(tmp_path: Path) -> None:
    state = vgg_classifier()
    torch.save(state, tmp_path / "vgg16.pth")
    names = {"features.0": "conv1_1", "features.28": "conv5_3", "classifier.0": "fc6", "classifier.3": "fc7"}
    network = get("fcn8s-thin", 3)
    assert start_encoder(network, "fcn8s-thin", str(tmp_path / "vgg16.pth")) == "imagenet"
    for theirs, ours in names.items():
        for part in ("weight", "bias"):
            mine = network.state_dict()[f"{ours}.{part}"]
            assert torch.equal(mine.flatten(), state[f"{theirs}.{part}"].flatten())
    before = network.state_dict()
    net = CLASSES["NetParameter"]()
    for name in sorted({key.partition(".")[0] for key in before}):
        if not name.startswith(("score", "upscore")):
            layer = net.layer.add(name=name)
            for part in ("weight", "bias"):
                value = before[f"{name}.{part}"]
                layer.blobs.add(data=value.flatten().tolist(), shape={"dim": list(value.shape)})
    path = tmp_path / "vgg16.caffemodel"
    path.write_bytes(net.SerializeToString())
    other = get("fcn8s-thin", 3)
    assert start_encoder(other, "fcn8s-thin", str(path)) == "caffe"
    assert torch.equal(other.state_dict()["fc6.weight"], before["fc6.weight"])
    config = resolve({"network": "fcn8s-thin", "encoder_weights": str(path)})
    assert starting_network(config, THREE).preprocessing == PREPROCESSINGS["caffe"]


def test_encoder_files_that_cannot_be_used(tmp_path: Path) -> None:
    network = get("fcn8s-thin", 3)
    (tmp_path / "junk.safetensors").write_bytes(b"<html>not found</html>")
    torch.save({"features.0.weight": torch.zeros(4, 3, 3, 3)}, tmp_path / "part.pth")
    for file, kind, reason in [
        ("none.pth", UsageError, "neither a file nor imagenet"),
        ("junk.safetensors", CheckpointError, "it is a web page"),
        ("part.pth", CheckpointError, "part.pth does not fit vgg16: features.0.bias"),
    ]:
        with pytest.raises(kind, match=reason):
            start_encoder(network, "fcn8s-thin", str(tmp_path / file))
    with torch.device("meta"):
        alexnet = get("fcn-alexnet", 2)
    with pytest.raises(UsageError, match="does not go with fcn-alexnet"):
        start_encoder(alexnet, "fcn-alexnet", "imagenet")


@pytest.mark.parametrize(
    ("encoder", "file"), [("resnet18", "resnet18-f37072fd.pth"), ("vgg16", "vgg16-397923af.pth")]
)
def test_imagenet_without_a_network(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    encoder: str,
    file: str,
) -> None:
    monkeypatch.setenv("SEGCLI_OFFLINE", "1")
    monkeypatch.setenv("SEGCLI_CACHE", str(tmp_path / "cache"))
    network = get("fcn8s-thin" if encoder == "vgg16" else f"fcn8s-{encoder}", 2)
    with pytest.raises(MachineError) as error:
        start_encoder(network, f"fcn8s-{encoder}", "imagenet")
    what, where = str(error.value).splitlines()
    assert file in what
    assert f"https://download.pytorch.org/models/{file} and save it as {tmp_path / 'cache'}" in where
    assert "or give --encoder-weights FILE" in where


# -- class weights ------------------------------------------------------------------------------------


def test_class_weights_from_a_file_or_the_data(tmp_path: Path) -> None:
    dataset = open_data(make_shapes(tmp_path / "shapes"), "train")
    file = tmp_path / "weights.toml"
    file.write_text("bar = 3\nground = 0.5\nsquare = 1\n")
    weights = class_weights(str(file), dataset)
    assert weights is not None
    assert weights.tolist() == [0.5, 1.0, 3.0]
    assert class_weights("none", dataset) is None
    automatic = class_weights("auto", dataset)
    assert automatic is not None
    assert automatic.mean().item() == pytest.approx(1)
    assert automatic[2] > automatic[1] > automatic[0]  # the bar is the rarest
    for content, reason in [
        ("bar = 1", "no weight for ground, square"),
        ("bar = inf\nground = 1\nsquare = 1", "must be a number above 0"),
        ("bar = 0\nground = 1\nsquare = 1", "must be a number above 0"),
        ("sqare = 1", "did you mean 'square'"),
        ("bar", "not valid TOML"),
    ]:
        file.write_text(content)
        with pytest.raises(UsageError, match=reason):
            class_weights(str(file), dataset)
    with pytest.raises(UsageError, match="give none, auto or a TOML file"):
        class_weights(str(tmp_path / "none.toml"), dataset)
