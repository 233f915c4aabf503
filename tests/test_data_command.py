"""`segcli data`: real folders, real archives, a server on the loopback."""

from __future__ import annotations

import base64
import hashlib
import http.server
import io
import json
import tarfile
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fault_table import Row
from PIL import Image, ImageDraw

from segcli import downloads
from segcli.cli import main
from segcli.data import sets
from segcli.data.fetch import unpack
from segcli.data.sets import KNOWN, open_data, read_label
from segcli.errors import MachineError
from segcli.palettes import CLASS_SETS, read_class_set

Values = list[list[int]]


@pytest.fixture(autouse=True)
def _nothing_of_this_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Data sets that are on the machine, and the working folder, have no part in the tests."""
    monkeypatch.delenv("SEGCLI_DATA", raising=False)
    monkeypatch.delenv("SEGCLI_OFFLINE", raising=False)
    monkeypatch.setenv("SEGCLI_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)


def run(*arguments: object) -> int:
    with pytest.raises(SystemExit) as stop:
        main(["data", *map(str, arguments)])
    return int(stop.value.code or 0)


def document(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(capsys.readouterr().out)
    return content


def photo(path: Path, color: tuple[int, int, int] = (255, 0, 51), size: tuple[int, int] = (4, 2)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, color).save(path)
    return path


def mask(path: Path, values: Values) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.array(values, np.uint8)).save(path)
    return path


def ids(path: Path) -> Values:
    with Image.open(path) as image:
        assert image.mode == "P"
        return np.array(image).tolist()  # type: ignore[no-any-return]


@pytest.fixture
def my(tmp_path: Path) -> Path:
    """Two images of 4 x 2 with masks."""
    photo(tmp_path / "my/images/a.png", (255, 0, 51))
    photo(tmp_path / "my/images/b.png", (0, 0, 51))
    mask(tmp_path / "my/masks/a.png", [[0, 0, 0, 1], [0, 0, 0, 255]])
    mask(tmp_path / "my/masks/b.png", [[0, 0, 0, 0], [0, 0, 0, 0]])
    (tmp_path / "my/classes.txt").write_text("ground\ntree\n")
    return tmp_path / "my"


# ---- list ----


def test_list_shows_what_is_known_and_where_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SEGCLI_DATA", str(tmp_path / "sets"))
    mask(tmp_path / "sets/camvid/valannot/x.png", [[0]])
    photo(tmp_path / "sets/camvid/val/x.png")
    assert run("list", "--json") == 0
    printed = capsys.readouterr()
    entries = {entry["name"]: entry for entry in json.loads(printed.out)["data"]}
    assert entries.keys() == KNOWN.keys()
    assert entries["camvid"]["folder"] == str(tmp_path / "sets/camvid")
    assert entries["camvid"]["splits"] == ["val"]
    assert entries["voc"]["folder"] is None
    assert entries["cityscapes"]["login"] is True
    assert f"Looked in: {tmp_path}/sets, data, {tmp_path}/cache/data" in printed.err


# ---- verify ----


def test_verify_of_a_clean_folder(my: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("verify", my) == 0
    assert "all 2; 2 classes; nothing wrong" in capsys.readouterr().err


def test_verify_names_every_fault_in_one_line(my: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mask(my / "masks/b.png", [[0, 7]])
    photo(my / "images/alone.png")
    assert run("verify", my, "--json") == 1
    printed = capsys.readouterr()
    content = json.loads(printed.out)
    assert content["splits"] == {"all": 2}
    assert [Path(finding["path"]).name for finding in content["findings"]] == ["b.png", "b.png", "alone.png"]
    assert [finding["serious"] for finding in content["findings"]] == [True, True, False]
    lines = printed.err.splitlines()
    assert len(lines) == 4  # three findings and the count
    assert lines[0].startswith(f"{my}/masks/b.png: is 2 x 1, but its image is shown as 4 x 2; ")
    assert "3 findings" in lines[3]


def test_verify_of_binary_masks_names_the_remedy_that_works(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    photo(tmp_path / "d/images/a.png")
    mask(tmp_path / "d/masks/a.png", [[0, 0, 255, 255], [0, 0, 255, 255]])
    assert run("verify", tmp_path / "d") == 1
    assert "segcli data convert --from binary" in capsys.readouterr().err
    (tmp_path / "d/masks").rename(tmp_path / "raw")
    assert run("convert", tmp_path / "raw", "--from", "binary", "--out", tmp_path / "d/masks") == 0
    assert run("verify", tmp_path / "d") == 0
    dataset = open_data(tmp_path / "d", "all")
    assert dataset.class_set.names == ("background", "foreground")
    assert read_label(dataset.samples[0], dataset).tolist() == [[0, 0, 1, 1], [0, 0, 1, 1]]


def test_verify_finds_an_empty_split_and_images_in_two(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mask(tmp_path / "m.png", [[0, 1, 0, 0], [0, 0, 0, 0]])
    photo(tmp_path / "a.png")
    (tmp_path / "d.toml").write_text(
        "names = ['x', 'y']\n[splits]\ntrain = 'l.txt'\nval = 'l.txt'\n"
        "test = {images = 'no', labels = 'no'}\n"
    )
    (tmp_path / "l.txt").write_text("a.png m.png\n")
    (tmp_path / "no").mkdir()
    assert run("verify", tmp_path / "d.toml") == 1
    error = capsys.readouterr().err
    assert "the split test is empty" in error
    assert "a.png: is in train and in val; remove it from one of them" in error


def test_verify_of_a_split_that_is_not_there(my: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("verify", my, "--split", "dev") == 2
    assert "no split 'dev'" in capsys.readouterr().err


# ---- stats ----


def test_stats_by_hand(my: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("stats", my, "--json") == 0
    content = document(capsys)
    assert content["images"] == 2
    ground, tree = content["per_class"]
    assert (ground["pixels"], ground["images"], tree["pixels"], tree["images"]) == (14, 2, 1, 1)
    assert ground["share"] == pytest.approx(14 / 15, abs=1e-6)
    weights = [1 / np.log(1.02 + 14 / 15), 1 / np.log(1.02 + 1 / 15)]
    assert [ground["weight"], tree["weight"]] == pytest.approx(np.array(weights) / np.mean(weights), abs=1e-4)
    assert content["ignored_pixels"] == 1
    assert content["sizes"] == [{"width": 4, "height": 2, "images": 2}]
    assert content["mean"] == [0.5, 0.0, 0.2]  # half of the pixels have red 1, all have blue 51 / 255
    assert content["std"] == [0.5, 0.0, 0.0]


def test_stats_go_on_after_a_file_that_cannot_be_read(my: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (my / "images/a.png").write_bytes(b"")
    assert run("stats", my, "--json") == 1
    content = document(capsys)
    assert content["images"] == 1
    assert [failed["name"] for failed in content["failed"]] == ["a"]


# ---- show ----


def test_show_writes_one_picture(my: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("look.png", "look.jpg"):
        assert run("show", my, "--out", tmp_path / name, "--json") == 0
        assert document(capsys)["shown"] == ["a", "b"]
        with Image.open(tmp_path / name) as picture:
            picture.load()
    assert run("show", my, "--count", 1, "--out", tmp_path / "one.png", "--json") == 0
    assert document(capsys)["shown"] == ["a"]
    assert run("show", my, "--out", tmp_path / "look.txt") == 2


def test_show_goes_on_after_a_file_that_cannot_be_read(
    my: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mask(my / "masks/a.png", [[0, 1]])
    assert run("show", my, "--out", tmp_path / "look.png", "--json") == 1
    content = document(capsys)
    assert content["shown"] == ["b"]
    assert "the label is 2 x 1, its image 4 x 2" in content["failed"][0]["problem"]


# ---- convert ----


def test_convert_prints_the_map_and_keeps_the_tree(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mask(tmp_path / "in/a/x.png", [[0, 7, 33, 29]])
    assert run("convert", tmp_path / "in", "--from", "cityscapes", "--out", tmp_path / "out") == 0
    assert ids(tmp_path / "out/a/x.png") == [[255, 0, 18, 255]]
    error = capsys.readouterr().err
    assert ["7", "0", "road"] in [line.split() for line in error.splitlines()]
    assert ["29", "255", "ignored"] in [line.split() for line in error.splitlines()]
    assert read_class_set(tmp_path / "out/classes.txt").colors == CLASS_SETS["cityscapes"].colors
    assert run("convert", tmp_path / "out", "--from", "cityscapes-train-ids", "--out", tmp_path / "back") == 0
    assert ids(tmp_path / "back/a/x.png") == [[0, 7, 33, 0]]


@pytest.mark.parametrize(
    ("kind", "before", "after"),
    [
        ("ade20k", [[0, 1, 150]], [[255, 0, 149]]),
        ("camvid", [[0, 10, 11]], [[0, 10, 255]]),
        ("binary", [[0, 255, 1]], [[0, 1, 1]]),
    ],
)
def test_convert_values(tmp_path: Path, kind: str, before: Values, after: Values) -> None:
    source = mask(tmp_path / "in/x.png", before)
    content = source.read_bytes()
    assert run("convert", tmp_path / "in", "--from", kind, "--out", tmp_path / "out") == 0
    assert ids(tmp_path / "out/x.png") == after
    assert source.read_bytes() == content


def test_convert_with_a_map_of_ones_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mask(tmp_path / "x.png", [[0, 128, 200, 5]])
    assert (
        run("convert", tmp_path / "x.png", "--map", "128=1, 200=255", "--out", tmp_path / "out", "--json")
        == 0
    )
    assert ids(tmp_path / "out/x.png") == [[0, 1, 255, 5]]
    content = document(capsys)
    assert content["map"] == [{"from": "128", "id": 1}, {"from": "200", "id": 255}]
    assert content["pixels"] == {"0": 1, "1": 1, "5": 1, "255": 1}


def test_convert_from_colours(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "in").mkdir()
    Image.fromarray(np.array([[(128, 128, 128), (0, 0, 0)]], np.uint8)).save(tmp_path / "in/x.png")
    Image.fromarray(np.array([[(128, 128, 128), (9, 9, 9)]], np.uint8)).save(tmp_path / "in/odd.png")
    options = ("--from", "colors", "--classes", "camvid32", "--out", tmp_path / "out")
    assert run("convert", tmp_path / "in", *options, "--json") == 1
    names = CLASS_SETS["camvid32"].names
    assert ids(tmp_path / "out/x.png") == [[names.index("Sky"), names.index("Void")]]
    (failed,) = document(capsys)["failed"]
    assert "(9, 9, 9) x 1" in failed["problem"]
    assert not (tmp_path / "out/odd.png").exists()


def test_convert_reports_values_that_the_map_does_not_have(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mask(tmp_path / "in/grey.png", [[0, 17, 255]])
    mask(tmp_path / "in/good.png", [[0, 255]])
    (tmp_path / "in/broken.png").write_bytes(b"")
    assert run("convert", tmp_path / "in", "--from", "binary", "--out", tmp_path / "out") == 1
    error = capsys.readouterr().err
    assert "grey.png: holds 17, which the map does not have; give --map OLD=NEW" in error
    assert "broken.png: " in error
    assert "1 masks in" in error
    assert ids(tmp_path / "out/good.png") == [[0, 1]]


def test_files_that_would_share_a_name_keep_their_own(tmp_path: Path) -> None:
    mask(tmp_path / "in/x.png", [[0]])
    mask(tmp_path / "in/x.bmp", [[255]])
    assert run("convert", tmp_path / "in", "--from", "binary", "--out", tmp_path / "out") == 0
    assert ids(tmp_path / "out/x.png.png") == [[0]]
    assert ids(tmp_path / "out/x.bmp.png") == [[1]]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--out", "out"], "nothing to convert"),
        (["--out", "out", "--from", "cityscape"], "did you mean cityscapes"),
        (["--out", "out", "--from", "colors"], "needs --classes"),
        (["--out", "out", "--map", "1=300"], "'1=300' is not OLD=NEW"),
        (["--out", "out", "--map", "1=2,1=3"], "two ids to 1"),
        (["--out", "in/masks", "--from", "binary"], "lies in the folder of the inputs"),
        (["--out", "in", "--from", "binary"], "lies in the folder of the inputs"),
    ],
)
def test_convert_refuses_wrong_options(
    tmp_path: Path, options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    mask(tmp_path / "in/x.png", [[0]])
    assert run("convert", "in", *options) == 2
    assert message in capsys.readouterr().err


def labelme(path: Path, shapes: list[dict[str, Any]], width: int = 8, height: int = 6) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"imageWidth": width, "imageHeight": height, "shapes": shapes}))
    return path


def test_convert_from_labelme(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stored = io.BytesIO()
    Image.fromarray(np.array([[1, 0], [1, 1]], np.uint8) * 255).save(stored, "PNG")
    hole = {"label": "__ignore__", "shape_type": "mask", "points": [[6, 4], [7, 5]],
            "mask": base64.b64encode(stored.getvalue()).decode()}  # fmt: skip
    box = {"label": "dog", "shape_type": "rectangle", "points": [[3, 2], [1, 0]]}
    patch = {"label": "cat", "shape_type": "polygon", "points": [[2, 1], [4, 1], [4, 3], [2, 3]]}
    labelme(tmp_path / "in/one.json", [box, patch, hole])
    labelme(tmp_path / "in/two.json", [])
    assert run("convert", tmp_path / "in", "--from", "labelme", "--out", tmp_path / "out") == 0
    expected = np.zeros((6, 8), int)
    expected[0:3, 1:4] = 2  # dog
    expected[1:4, 2:5] = 1  # cat, drawn later
    expected[4:6, 6:8] = [[255, 0], [255, 255]]
    assert ids(tmp_path / "out/one.png") == expected.tolist()
    assert ids(tmp_path / "out/two.png") == np.zeros((6, 8), int).tolist()
    assert read_class_set(tmp_path / "out/classes.txt").names == ("_background_", "cat", "dog")


def test_labelme_shapes_are_drawn_as_labelme_draws_them(tmp_path: Path) -> None:
    shapes: list[dict[str, Any]] = [
        {"label": "a", "shape_type": "circle", "points": [[30, 30], [30, 40]]},
        {"label": "a", "shape_type": "line", "points": [[5, 60], [80, 60]]},
        {"label": "a", "shape_type": "point", "points": [[70, 20]]},
    ]
    labelme(tmp_path / "in/x.json", shapes, 100, 80)
    assert run("convert", tmp_path / "in", "--from", "labelme", "--out", tmp_path / "out") == 0
    reference = Image.new("1", (100, 80))  # the drawing calls of labelme/utils/shape.py
    draw = ImageDraw.Draw(reference)
    draw.ellipse([20, 20, 40, 40], outline=1, fill=1)
    draw.line([(5, 60), (80, 60)], fill=1, width=10)
    draw.ellipse([65, 15, 75, 25], outline=1, fill=1)
    assert ids(tmp_path / "out/x.png") == np.array(reference).astype(int).tolist()


def test_labelme_files_with_faults_are_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "labels.txt").write_text("__ignore__\n_background_\ncat\n")
    labelme(tmp_path / "in/dog.json", [{"label": "dog", "points": [[0, 0], [1, 0], [1, 1]]}])
    labelme(tmp_path / "in/odd.json", [{"label": "cat", "shape_type": "blob", "points": []}])
    labelme(tmp_path / "in/huge.json", [], 10**6, 10**6)
    (tmp_path / "in/text.json").write_text("{")
    (tmp_path / "in/other.json").write_text("[]")
    labelme(tmp_path / "in/good.json", [{"label": "cat", "points": [[0, 0], [7, 0], [7, 5], [0, 5]]}])
    options = ("--from", "labelme", "--classes", tmp_path / "labels.txt", "--out", tmp_path / "out", "--json")
    assert run("convert", tmp_path / "in", *options) == 1
    problems = {Path(f["path"]).name: f["problem"] for f in document(capsys)["failed"]}
    assert problems.keys() == {"dog.json", "odd.json", "huge.json", "text.json", "other.json"}
    assert "'dog', which is not among the classes" in problems["dog.json"]
    assert ids(tmp_path / "out/good.png") == np.ones((6, 8), int).tolist()


# ---- download ----


def tar_of(files: dict[str, bytes], mode: str = "w") -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as tar:  # type: ignore[call-overload]
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def png(values: Values, mode: str = "L") -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.array(values, np.uint8)).convert(mode).save(buffer, "PNG")
    return buffer.getvalue()


VOC = "VOCdevkit/VOC2012"


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, bytes]]:
    """VOC2012 at an address on this machine: a small archive with its own checksum."""
    archive = tar_of(
        {
            f"{VOC}/ImageSets/Segmentation/train.txt": b"x\n",
            f"{VOC}/JPEGImages/x.jpg": b"a photograph",
            f"{VOC}/SegmentationClass/x.png": png([[0, 1]]),
        }
    )
    served = {"/voc/VOC.tar": archive}

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = served.get(self.path)
            self.send_response(200 if body is not None else 404)
            self.send_header("Content-Length", str(len(body or b"")))
            self.end_headers()
            self.wfile.write(body or b"")

        def log_message(self, *_: object) -> None:
            pass

    monkeypatch.setattr(downloads, "PAUSE_SECONDS", 0.0)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as httpd:
        thread = threading.Thread(target=httpd.serve_forever)
        thread.start()
        address = f"http://127.0.0.1:{httpd.server_port}/voc/VOC.tar"
        known = replace(KNOWN["voc2012"], address=address, md5=hashlib.md5(archive).hexdigest())
        monkeypatch.setitem(sets.KNOWN, "voc2012", known)
        yield served
        httpd.shutdown()
        thread.join()


def test_download_unpacks_into_the_first_place_that_is_searched(
    server: dict[str, bytes], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("download", "voc", "--json") == 0
    content = document(capsys)
    assert content == {"name": "voc", "folder": f"data/voc/{VOC}", "splits": ["train"]}
    dataset = open_data("voc", "train")
    assert read_label(dataset.samples[0], dataset).tolist() == [[0, 1]]
    left = [path.name for path in (tmp_path / "data/voc").iterdir() if not path.name.endswith(".lock")]
    assert left == ["VOCdevkit"]
    server.clear()
    assert run("download", "voc") == 0  # nothing to do
    assert "is here already" in capsys.readouterr().err


def test_an_archive_saved_by_hand_is_used_and_a_wrong_one_is_not(
    server: dict[str, bytes], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    archive = server.pop("/voc/VOC.tar")
    (tmp_path / "there").mkdir()
    (tmp_path / "there/VOC.tar").write_bytes(archive[:-1])
    assert run("download", "voc", "--root", tmp_path / "there") == 3
    lines = [line for line in capsys.readouterr().err.splitlines() if "trying again" not in line]
    assert len(lines) == 2
    assert lines[0].startswith("Error: cannot download VOC.tar: ")
    assert f"md5 {hashlib.md5(archive).hexdigest()}" in lines[1]
    assert f"save it as {tmp_path}/there/VOC.tar" in lines[1]
    (tmp_path / "there/VOC.tar").write_bytes(archive)
    assert run("download", "voc", "--root", tmp_path / "there") == 0
    assert (tmp_path / "there" / VOC / "JPEGImages/x.jpg").read_bytes() == b"a photograph"


def test_a_file_with_another_checksum_is_not_unpacked(
    server: dict[str, bytes], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server["/voc/VOC.tar"] = tar_of({f"{VOC}/evil": b""})
    assert run("download", "voc2012", "--root", tmp_path / "there") == 3
    assert "is not the right one: its md5 is" in capsys.readouterr().err
    assert [p.name for p in (tmp_path / "there").iterdir() if not p.name.endswith(".lock")] == []


def test_voc_sbd_gets_both_archives(
    server: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = "benchmark_RELEASE/dataset"
    files = {
        f"{base}/train.txt": b"",
        f"{base}/val.txt": b"",
        f"{base}/img/y.jpg": b"",
        f"{base}/cls/y.mat": b"",
    }
    archive = tar_of(files, "w:gz")
    server["/voc/benchmark.tgz"] = archive
    address = KNOWN["voc2012"].address.replace("VOC.tar", "benchmark.tgz")
    known = replace(KNOWN["voc-sbd"], address=address, md5=hashlib.md5(archive).hexdigest())
    monkeypatch.setitem(sets.KNOWN, "voc-sbd", known)
    assert run("download", "voc-sbd", "--root", tmp_path / "both") == 0
    assert (tmp_path / "both" / VOC).is_dir()
    assert (tmp_path / "both" / base / "cls/y.mat").is_file()


def test_offline_and_sets_that_no_program_can_fetch(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SEGCLI_OFFLINE", "1")
    assert run("download", "voc") == 3
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    assert "SEGCLI_OFFLINE forbids the network" in lines[0]
    assert "md5 6cd6e144f989b92b3379bac3b3de84fd" in lines[1]
    assert run("download", "cityscapes") == 3
    assert "needs a login\nGet it from https://www.cityscapes-dataset.com" in capsys.readouterr().err
    assert run("download", "camvid") == 3
    assert run("download", "vok") == 2
    assert "did you mean voc" in capsys.readouterr().err


# ---- archives that are up to no good ----


def special(name: str, kind: bytes, link: str = "") -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        good = tarfile.TarInfo("good.txt")
        good.size = 2
        tar.addfile(good, io.BytesIO(b"ok"))
        member = tarfile.TarInfo(name)
        member.type, member.linkname = kind, link
        tar.addfile(member)
    return buffer.getvalue()


BAD_ARCHIVES = {
    "parent": tar_of({"good.txt": b"ok", "../evil": b"x"}),
    "deep parent": tar_of({"a/b/../../../evil": b"x"}),
    "link out": special("evil", tarfile.SYMTYPE, "../../etc"),
    "link in": special("evil", tarfile.SYMTYPE, "good.txt"),
    "hard link": special("evil", tarfile.LNKTYPE, "../outside.txt"),
    "device": special("evil", tarfile.CHRTYPE),
    "block device": special("evil", tarfile.BLKTYPE),
    "pipe": special("evil", tarfile.FIFOTYPE),
    "bomb": tar_of({"zeros": bytes(3 << 20)}, "w:gz"),
    "many files": tar_of({str(number): b"" for number in range(30)}),
    "cut off": tar_of({"good.txt": b"ok", "more": bytes(100_000)})[:50_000],
    "cut off gzip": tar_of({"more": np.random.default_rng(0).bytes(100_000)}, "w:gz")[:50_000],
    "no archive": b"<!doctype html>",
    "empty": b"",
}


ROW = Row("20 archives that reach outside, hold devices or links, are bombs or cut off")


@pytest.mark.parametrize("name", BAD_ARCHIVES)
@ROW
def test_bad_archives_leave_nothing_behind(name: str, tmp_path: Path) -> None:
    archive, folder = tmp_path / "x.tar", tmp_path / "a/b/target"
    archive.write_bytes(BAD_ARCHIVES[name])
    (tmp_path / "outside.txt").write_text("mine")
    with pytest.raises(MachineError) as caught:
        unpack(archive, folder, max_bytes=2 << 20, max_files=20)
    assert str(archive) in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["a", "b", "outside.txt", "target", "x.tar"]
    assert (tmp_path / "outside.txt").read_text() == "mine"


@ROW
def test_an_absolute_name_stays_inside(tmp_path: Path) -> None:
    target = tmp_path / "elsewhere/evil"
    (tmp_path / "x.tar").write_bytes(tar_of({str(target): b"x"}))
    unpack(tmp_path / "x.tar", tmp_path / "in")
    assert not target.exists()
    assert list((tmp_path / "in").rglob("evil"))


def test_unpacking_joins_folders_and_replaces_files(tmp_path: Path) -> None:
    (tmp_path / "in/d").mkdir(parents=True)
    (tmp_path / "in/d/kept").write_text("kept")
    (tmp_path / "in/d/old").write_text("old")
    (tmp_path / "x.tar").write_bytes(tar_of({"d/old": b"new", "d/e/f": b"f"}, "w:bz2"))
    unpack(tmp_path / "x.tar", tmp_path / "in")
    found = {
        p.relative_to(tmp_path / "in").as_posix(): p.read_text()
        for p in (tmp_path / "in").rglob("*")
        if p.is_file()
    }
    assert found == {"d/kept": "kept", "d/old": "new", "d/e/f": "f"}
