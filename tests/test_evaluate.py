"""Scores of masks and models, from the command line: real folders, real exit codes."""

from __future__ import annotations

import csv
import io
import json
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from small_model import save_picture, small_model

from segcli.cli import main
from segcli.data.sets import open_data
from segcli.errors import UsageError
from segcli.evaluation import evaluate, matching_classes, predictions_in_folder
from segcli.inference.tta import TTA, average
from segcli.palettes import CLASS_SETS, ClassSet

Values = list[list[int]]


def mask(path: Path, values: Values) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.array(values, np.uint8)).save(path)
    return path


def run(*arguments: object) -> int:
    with pytest.raises(SystemExit) as stop:
        main(["evaluate", *map(str, arguments)])
    return int(stop.value.code or 0)


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    """Two images of 2 x 4: pooled confusion [[6, 1, 0], [1, 3, 0], [2, 0, 2]], one pixel ignored."""
    truth, found = tmp_path / "truth", tmp_path / "found"
    mask(truth / "a.png", [[0, 0, 0, 0], [1, 1, 1, 255]])
    mask(found / "a.png", [[0, 0, 0, 1], [1, 1, 0, 0]])
    mask(truth / "s/b.png", [[0, 0, 0, 1], [2, 2, 2, 2]])
    mask(found / "s/b.png", [[0, 0, 0, 1], [2, 2, 0, 0]])
    return truth, found


def scores_of(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    document: dict[str, Any] = json.loads(capsys.readouterr().out)
    return document


# ---- masks against labels ----


def test_scores_by_hand(folders: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    truth, found = folders
    assert run("--pred", found, "--labels", truth, "--classes", 4, "--json") == 0
    document = scores_of(capsys)
    assert document["images"] == 2
    assert document["failed"] == []
    assert document["pixel_accuracy"] == pytest.approx(11 / 15, abs=1e-6)
    assert document["mean_accuracy"] == pytest.approx((6 / 7 + 3 / 4 + 2 / 4) / 3, abs=1e-6)
    ious = [6 / 10, 3 / 5, 2 / 4]
    assert document["mean_iou"] == pytest.approx(sum(ious) / 3, abs=1e-6)
    weighted = (7 * ious[0] + 4 * ious[1] + 4 * ious[2]) / 15
    assert document["frequency_weighted_iou"] == pytest.approx(weighted, abs=1e-6)
    assert document["dice"] == pytest.approx((12 / 16 + 6 / 8 + 4 / 6) / 3, abs=1e-6)
    assert 0 <= document["boundary_iou"] <= 1
    classes = document["per_class"]
    assert [entry["name"] for entry in classes] == ["class_0", "class_1", "class_2", "class_3"]
    assert [entry["iou"] for entry in classes] == pytest.approx([*ious, None])
    assert [entry["precision"] for entry in classes] == pytest.approx([6 / 9, 3 / 4, 1, None], abs=1e-6)
    assert [entry["recall"] for entry in classes] == pytest.approx([6 / 7, 3 / 4, 1 / 2, None], abs=1e-6)
    assert [entry["pixels"] for entry in classes] == [7, 4, 4, 0]
    assert [entry["images"] for entry in classes] == [2, 2, 1, 0]


def test_what_people_see_says_what_mean_iu_is(
    folders: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    truth, found = folders
    assert run("--pred", found, "--labels", truth, "--classes", 3) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    assert "mean over the classes that occur in labels or predictions" in printed.out
    assert "56.7" in printed.out  # the mean IU
    assert run("--pred", found, "--labels", truth, "--classes", 3, "--quiet") == 0
    assert capsys.readouterr() == ("", "")


def test_files_in_out(folders: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    truth, found = folders
    out = tmp_path / "new" / "scores"
    assert run("--pred", found, "--labels", truth, "--classes", 3, "--out", out, "--json") == 0
    assert sorted(path.name for path in out.iterdir()) == [
        *("classes.png", "confusion.csv", "confusion.png", "images.csv", "scores.json", "worst.jpg")
    ]
    printed = scores_of(capsys)
    assert json.loads((out / "scores.json").read_text()) == {k: v for k, v in printed.items() if k != "out"}
    rows = list(csv.DictReader(io.StringIO((out / "images.csv").read_text())))
    assert [row["name"] for row in rows] == ["a", "s/b"]
    assert float(rows[0]["pixel_accuracy"]) == pytest.approx(5 / 7, abs=1e-6)
    assert float(rows[0]["mean_iou"]) == pytest.approx((3 / 5 + 2 / 4) / 2, abs=1e-6)  # of this image alone
    assert rows[0]["iou class_2"] == ""
    matrix = [row[1:] for row in csv.reader(io.StringIO((out / "confusion.csv").read_text()))]
    assert matrix[1:] == [["6", "1", "0"], ["1", "3", "0"], ["2", "0", "2"]]
    for name in ("classes.png", "confusion.png", "worst.jpg"):
        with Image.open(out / name) as picture:
            picture.load()
            assert min(picture.size) > 20


def test_without_matplotlib_the_rest_is_written(
    folders: tuple[Path, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    truth, found = folders
    assert run("--pred", found, "--labels", truth, "--classes", 3, "--out", tmp_path / "o", "--quiet") == 0
    assert not (tmp_path / "o/confusion.png").exists()
    assert (tmp_path / "o/worst.jpg").exists()
    assert "pip install 'segcli[train]'" in capsys.readouterr().err


def test_files_that_cannot_be_scored_are_reported_and_the_others_count(
    folders: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    truth, found = folders
    good = [[0, 0], [1, 1]]
    mask(truth / "missing.png", good)
    mask(truth / "size.png", good)
    mask(found / "size.png", [[0, 0, 0], [1, 1, 1]])
    mask(truth / "range.png", good)
    mask(found / "range.png", [[0, 0], [1, 9]])
    mask(truth / "cut.png", good)
    (found / "cut.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    mask(truth / "label.png", [[0, 0], [1, 77]])
    mask(found / "label.png", good)
    mask(truth / "lossy.png", good)
    Image.new("L", (2, 2)).save(found / "lossy.jpg")
    out = tmp_path / "out"
    assert run("--pred", found, "--labels", truth, "--classes", 3, "--json", "--out", out) == 1
    printed = capsys.readouterr()
    document = json.loads(printed.out)
    assert document["images"] == 2
    assert document["pixel_accuracy"] == pytest.approx(11 / 15, abs=1e-6)
    problems = {entry["name"]: entry["problem"] for entry in document["failed"]}
    assert problems.keys() == {"missing", "size", "range", "cut", "label", "lossy"}
    assert "has no mask" in problems["missing"]
    assert "3 x 2, but its label is 2 x 2" in problems["size"]
    assert "holds 9, but the classes are 0..2" in problems["range"]
    assert "holds 77" in problems["label"]
    assert "JPEG" in problems["lossy"]
    assert printed.err.count("not scored: ") == 6
    assert "Traceback" not in printed.err
    assert len((out / "images.csv").read_text().splitlines()) == 1 + 8


def test_void_in_masks_is_wrong_only_where_the_label_counts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mask(tmp_path / "t/a.png", [[0, 255]])
    mask(tmp_path / "p/a.png", [[0, 255]])
    assert run("--pred", tmp_path / "p", "--labels", tmp_path / "t", "--classes", 2, "--json") == 0
    assert scores_of(capsys)["pixel_accuracy"] == 1
    mask(tmp_path / "p/a.png", [[255, 255]])
    options = ("--pred", tmp_path / "p", "--labels", tmp_path / "t", "--classes", 2, "--json")
    assert run(*options, "--out", tmp_path / "out") == 1
    document = scores_of(capsys)
    assert (document["mean_iou"], document["images"]) == (None, 0)
    assert not (tmp_path / "out/worst.jpg").exists()


def test_odd_names_of_files_and_classes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = ["ü", "[red]", "two\nlines", "-x", os.fsdecode(b"\xff"), "a b", "x" * 250]
    for name in names:
        mask(tmp_path / f"t/{name}.png", [[0, 1]])
        mask(tmp_path / f"p/{name}.png", [[0, 0]])
    os.mkfifo(tmp_path / "t/fifo.png")
    (tmp_path / "classes.txt").write_text("$a_{$\nклас\n日本\n")
    options = ("--pred", tmp_path / "p", "--labels", tmp_path / "t", "--classes", tmp_path / "classes.txt")
    assert run(*options, "--out", tmp_path / "out", "--json") == 1  # the pipe
    printed = capsys.readouterr()
    document = json.loads(printed.out)
    assert document["images"] == len(names)
    assert [entry["name"] for entry in document["failed"]] == ["fifo"]
    assert len(list((tmp_path / "out").iterdir())) == 6


def test_another_value_to_ignore(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mask(tmp_path / "t/a.png", [[0, 1, 11]])
    mask(tmp_path / "p/a.png", [[0, 1, 3]])
    options = ("--pred", tmp_path / "p", "--labels", tmp_path / "t", "--classes", "camvid", "--json")
    assert run(*options) == 1
    capsys.readouterr()
    assert run(*options, "--ignore", 11) == 0
    assert scores_of(capsys)["pixel_accuracy"] == 1


def test_names_with_endings_and_suffixes_meet(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mask(tmp_path / "t/a_mask.png", [[0, 1]])
    mask(tmp_path / "p/a.png", [[0, 1]])
    mask(tmp_path / "t/deep/b.png", [[0, 1]])
    mask(tmp_path / "p/b.png", [[0, 1]])  # its own folder is not repeated
    mask(tmp_path / "p/_overlay/a.png", [[1, 1]])
    assert run("--pred", tmp_path / "p", "--labels", tmp_path / "t", "--classes", 2, "--json") == 0
    assert scores_of(capsys)["images"] == 2


def test_masks_against_a_data_set_use_its_label_coding(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_picture(tmp_path / "val/x.png", 1, 3)
    mask(tmp_path / "valannot/x.png", [[0, 3, 11]])
    mask(tmp_path / "p/x.png", [[0, 3, 3]])
    assert run("--pred", tmp_path / "p", "--data", tmp_path, "--json", "--out", tmp_path / "o") == 0
    assert scores_of(capsys)["pixel_accuracy"] == 1


def test_the_order_of_predictions_does_not_matter(folders: tuple[Path, Path]) -> None:
    truth, found = folders
    images = truth.parent / "images"
    save_picture(images / "a.png", 2, 4)
    save_picture(images / "s/b.png", 2, 4)
    truth.rename(truth.parent / "masks")
    dataset = open_data(truth.parent, "all")
    predictions = list(predictions_in_folder(dataset, found, threading.Event()))
    forwards, backwards = evaluate(dataset, predictions), evaluate(dataset, reversed(predictions))
    assert repr(forwards.images) == repr(backwards.images)  # nan is not equal to itself
    assert (forwards.matrix == backwards.matrix).all()
    assert [bad.sample.name for bad in sorted(forwards.worst)] == [
        b.sample.name for b in sorted(backwards.worst)
    ]


def test_a_sample_with_two_masks_is_reported(
    folders: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    truth, found = folders
    np.save(found / "a.npy", np.zeros((2, 4), np.uint8))
    assert run("--pred", found, "--labels", truth, "--classes", 3, "--json") == 1
    (failure,) = scores_of(capsys)["failed"]
    assert failure["name"] == "a"
    assert failure["problem"].endswith("has more than one mask for it: a.npy, a.png")


# ---- options ----


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give --data NAME"),
        (["--data", "x"], "give --model NAME"),
        (["--data", "x", "--model", "m", "--pred", "p"], "give --model NAME"),
        (["--labels", "t", "--model", "m"], "--labels needs --pred"),
        (["--labels", "t", "--pred", "p"], "--labels needs --classes"),
        (["--data", "x", "--pred", "p", "--classes", "3"], "--classes belongs to --labels"),
        (["--labels", "nowhere", "--pred", "p", "--classes", "3"], "--labels nowhere is not a folder"),
        (["--labels", "t", "--pred", "p", "--classes", "vocc"], "did you mean voc"),
        (["--data", "camvit", "--pred", "p"], "did you mean camvid"),
    ],
)
def test_wrong_options_exit_2(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("Error: ")
    assert message in error
    assert len(error.splitlines()) <= 2


def test_a_folder_of_unrelated_masks_is_refused(
    folders: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mask(tmp_path / "other/z.png", [[0]])
    assert run("--pred", tmp_path / "other", "--labels", folders[0], "--classes", 3) == 2
    assert "has no mask for any of truth, such as a.png" in capsys.readouterr().err


def test_an_output_that_cannot_be_is_found_first(
    folders: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    truth, found = folders
    assert run("--pred", found, "--labels", truth, "--classes", 3, "--out", tmp_path / "file") == 3
    assert str(tmp_path / "file") in capsys.readouterr().err
    assert (tmp_path / "file").read_text() == ""


def test_a_data_set_that_is_not_there_exits_3_in_two_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SEGCLI_DATA", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert run("--data", "voc", "--model", "fcn8s-voc") == 3
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    assert "md5 6cd6e144f989b92b3379bac3b3de84fd" in lines[1]


def test_a_closed_pipe_and_help() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "segcli", "evaluate", "--help"], capture_output=True, text=True
    )
    assert done.returncode == 0
    assert "Examples:" in done.stdout


# ---- models ----


@pytest.fixture(scope="module")
def predicted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three photographs of two sizes with labels from the model's own masks, shifted by one pixel."""
    root = tmp_path_factory.mktemp("predicted")
    for number, (height, width) in enumerate([(48, 64), (40, 56), (48, 64)]):
        save_picture(root / f"images/{number}.png", height, width, seed=number)
    with pytest.raises(SystemExit) as stop:
        main(["predict", str(root / "images"), "--out", str(root / "predicted"), "--save", "mask",
              "--model", str(small_model()), "--workers", "0", "--quiet"])  # fmt: skip
    assert not stop.value.code
    for number in range(3):
        with Image.open(root / f"predicted/{number}.png") as found:
            label = np.roll(np.array(found), 1, axis=1)
        label[:2] = 255
        mask(root / f"masks/{number}.png", label.tolist())
    (root / "classes.txt").write_text("\n".join(CLASS_SETS["voc"].names))
    return root


@pytest.fixture
def photos(predicted: Path, tmp_path: Path) -> Path:
    """A copy of them that a test may change."""
    return Path(shutil.copytree(predicted, tmp_path / "photos"))


def test_a_model_scores_as_the_masks_that_predict_writes(
    photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = ("--data", photos, "--split", "all", "--json")
    assert run(*data, "--model", small_model(), "--device", "cpu", "--out", photos / "out") == 0
    printed = capsys.readouterr()
    of_model = json.loads(printed.out)
    assert "cpu" in printed.err  # the device is named
    assert run(*data, "--pred", photos / "predicted") == 0
    of_masks = scores_of(capsys)
    assert of_model["images"] == 3
    assert 0.3 < of_model["pixel_accuracy"] < 1
    for key in ("pixel_accuracy", "mean_iou", "boundary_iou", "per_class"):
        assert of_model[key] == of_masks[key]
    assert (photos / "out/worst.jpg").exists()


def test_size_and_variants_change_the_scores(photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ("--data", photos, "--split", "all", "--model", small_model(), "--json")
    found = []
    for extra in ((), ("--tta", "flip"), ("--tta", "scales"), ("--size", 40)):
        assert run(*options, *extra) == 0
        found.append(scores_of(capsys)["pixel_accuracy"])
    assert len(set(found)) == 4
    assert run(*options, "--tta", "rotate") == 2
    assert "--tta 'rotate' is unknown; use none, flip, scales" in capsys.readouterr().err


def test_variants_average_probabilities() -> None:
    def network(images: torch.Tensor) -> torch.Tensor:
        return torch.cat([images[:, :1], images[:, 1:2].cumsum(-1)], 1)  # the sum runs from left to right

    images = torch.rand(2, 3, 4, 6, generator=torch.Generator().manual_seed(0))
    mirrored = network(images.flip(-1)).flip(-1)
    expected = (network(images).softmax(1) + mirrored.softmax(1)) / 2
    assert torch.allclose(average(network, images, TTA["flip"]).exp(), expected, atol=1e-6)
    assert torch.equal(average(network, images, TTA["none"]), network(images))
    three = average(lambda x: x, images, TTA["scales"])
    assert three.shape == images.shape
    assert torch.allclose(three.exp().sum(1), torch.ones(2, 4, 6), atol=1e-5)
    certain = average(lambda x: x * 1e6, images, TTA["flip"])
    assert torch.isfinite(certain).all()


def test_a_photograph_that_cannot_be_read_is_one_failure(
    photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (photos / "images/1.png").write_bytes(b"no picture")
    mask(photos / "masks/2.png", [[0, 1]])
    assert run("--data", photos, "--split", "all", "--model", small_model(), "--json") == 1
    document = scores_of(capsys)
    assert document["images"] == 1
    assert [entry["name"] for entry in document["failed"]] == ["1", "2"]


def test_a_model_of_other_classes_is_refused(photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (photos / "classes.txt").write_text("\n".join((*CLASS_SETS["cityscapes"].names, "x", "y")))
    assert run("--data", photos, "--split", "all", "--model", small_model()) == 2
    assert (
        "predicts the 21 classes of voc, such as background, which classes does not"
        in capsys.readouterr().err
    )


def test_classes_in_another_order_are_matched_by_name() -> None:
    ours = ClassSet("ours", ("background", "dining table", "cat"), ((0, 0, 0),) * 3)
    theirs = ClassSet("theirs", ("__background__", "cat", "Dining_Table"), ((0, 0, 0),) * 3)
    table = matching_classes(theirs, ours)
    assert table[:3].tolist() == [0, 2, 1]
    assert table[255] == 255
    with pytest.raises(UsageError, match="such as dog, which ours does not have"):
        matching_classes(ClassSet("other", ("background", "cat", "dog"), ((0, 0, 0),) * 3), ours)
