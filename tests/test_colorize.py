"""Class maps to pictures and back, from the command line: real folders, real exit codes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image
from processes import Process, wait_until

from segcli.cli import main
from segcli.images import encode_mask
from segcli.palettes import CLASS_SETS, voc_colormap
from segcli.render import colorize, overlay

pytestmark = pytest.mark.filterwarnings(r"ignore:::PIL\..*")
VOC = CLASS_SETS["voc"]
IDS = np.array([[0, 0, 1, 1], [0, 15, 15, 255], [20, 20, 15, 255]], np.uint8)


def run(*arguments: object) -> int:
    with pytest.raises(SystemExit) as stop:
        main(["colorize", "--workers", "0", *map(str, arguments)])
    return int(stop.value.code or 0)


def write(path: Path, content: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def grey(path: Path, ids: npt.NDArray[Any] = IDS) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(ids).save(path)
    return path


def palette_mask(path: Path, palette: npt.NDArray[np.uint8], ids: npt.NDArray[np.uint8] = IDS) -> Path:
    return write(path, encode_mask(ids, palette))


def pixels(path: Path) -> npt.NDArray[np.uint8]:
    with Image.open(path) as image:
        return np.asarray(image)


def files(folder: Path) -> list[str]:
    """The results, without the record in _run."""
    found = (path for path in folder.rglob("*") if path.is_file())
    return sorted(str(path.relative_to(folder)) for path in found if path.parts[len(folder.parts)] != "_run")


def manifest(out: Path) -> dict[str, dict[str, Any]]:
    lines = (out / "_run" / "manifest.jsonl").read_text().splitlines()
    return {Path(entry["source"]).name: entry for entry in map(json.loads, lines)}


# ---- to colours ----


def test_grey_maps_get_vocs_colors_and_keep_the_tree(tmp_path: Path) -> None:
    grey(tmp_path / "m/a/b.png")
    np.save(tmp_path / "m/c.npy", IDS.astype(np.int64))
    grey(tmp_path / "m/deep.tif", IDS.astype(np.uint16) * 100)
    assert run(tmp_path / "m", "--out", tmp_path / "c") == 0
    assert files(tmp_path / "c") == ["a/b.png", "c.png", "deep.png"]
    expected = voc_colormap()[IDS]
    assert expected[1, 1].tolist() == [192, 128, 128]  # id 15
    assert np.array_equal(pixels(tmp_path / "c/a/b.png"), expected)
    assert np.array_equal(pixels(tmp_path / "c/c.png"), expected)
    assert np.array_equal(pixels(tmp_path / "c/deep.png"), voc_colormap(65536)[IDS.astype(int) * 100])


def test_a_palette_mask_keeps_its_colors_unless_told_otherwise(tmp_path: Path) -> None:
    own = np.random.default_rng(0).integers(0, 256, (256, 3), dtype=np.uint8)
    palette_mask(tmp_path / "m/a.png", own)
    assert run(tmp_path / "m", "--out", tmp_path / "own") == 0
    assert np.array_equal(pixels(tmp_path / "own/a.png"), own[IDS])
    assert run(tmp_path / "m", "--out", tmp_path / "voc", "--palette", "voc") == 0
    assert np.array_equal(pixels(tmp_path / "voc/a.png"), VOC.palette()[IDS])


def test_palettes_from_files(tmp_path: Path) -> None:
    grey(tmp_path / "m/a.png", np.array([[0, 1]], np.uint8))
    (tmp_path / "p.toml").write_text('names = ["soil", "crop"]\ncolors = [[1, 2, 3], [4, 5, 6]]')
    (tmp_path / "p.txt").write_text("9 8 7 soil\n6 5 4 crop\n")
    for name, expected in (("p.toml", [[1, 2, 3], [4, 5, 6]]), ("p.txt", [[9, 8, 7], [6, 5, 4]])):
        out = tmp_path / f"out-{name}"
        assert run(tmp_path / "m", "--out", out, "--palette", tmp_path / name) == 0
        assert pixels(out / "a.png")[0].tolist() == expected


def test_ids_without_a_class_are_black_and_noted(tmp_path: Path) -> None:
    grey(tmp_path / "m/a.png", np.array([[0, 11, 30, 255]], np.uint8))
    assert run(tmp_path / "m", "--out", tmp_path / "c", "--palette", "camvid") == 0
    assert pixels(tmp_path / "c/a.png")[0].tolist() == [[128, 128, 128], [0, 0, 0], [0, 0, 0], [0, 0, 0]]
    assert manifest(tmp_path / "c")["a.png"]["notes"] == ["drawn black: ids that are not in camvid: 11, 30"]


def test_one_file_and_globs(tmp_path: Path) -> None:
    grey(tmp_path / "m/a.png")
    grey(tmp_path / "m/b.png")
    assert run(tmp_path / "m/a.png", "--out", tmp_path / "one") == 0
    assert files(tmp_path / "one") == ["a.png"]
    assert run(tmp_path / "m/*.png", "--out", tmp_path / "two") == 0
    assert files(tmp_path / "two") == ["a.png", "b.png"]


def test_masks_that_would_share_a_name_keep_their_own(tmp_path: Path) -> None:
    grey(tmp_path / "m/a.png", np.zeros((2, 2), np.uint8))
    np.save(tmp_path / "m/a.npy", np.ones((2, 2), np.uint8))
    grey(tmp_path / "m/s/a.png", np.full((2, 2), 2, np.uint8))
    grey(tmp_path / "m/A.png", np.full((2, 2), 3, np.uint8))
    assert run(tmp_path / "m", "--out", tmp_path / "c") == 0
    assert files(tmp_path / "c") == ["A.png.png", "a.npy.png", "a.png.png", "s/a.png"]
    colors = [pixels(tmp_path / "c" / name)[0, 0].tolist() for name in files(tmp_path / "c")]
    assert colors == [[128, 128, 0], [128, 0, 0], [0, 0, 0], [0, 128, 0]]


def test_legend_is_added_below(tmp_path: Path) -> None:
    ids = IDS.repeat(40, 0).repeat(60, 1)
    palette_mask(tmp_path / "m/a.png", VOC.palette(), ids)
    assert run(tmp_path / "m", "--out", tmp_path / "c", "--legend") == 0
    picture = pixels(tmp_path / "c/a.png")
    assert picture.shape[1] == 240
    assert picture.shape[0] > 120 + 20
    assert np.array_equal(picture[:120], VOC.palette()[ids])
    for number in (1, 15, 20, 255):
        assert (picture[120:] == VOC.palette()[number]).all(axis=2).sum() > 36


def test_boundaries_are_white(tmp_path: Path) -> None:
    ids = np.array([[1, 1, 1, 2, 2, 2]], np.uint8)
    grey(tmp_path / "m/a.png", ids)
    assert run(tmp_path / "m", "--out", tmp_path / "c", "--boundaries") == 0
    white, red, green = [255] * 3, [128, 0, 0], [0, 128, 0]
    assert pixels(tmp_path / "c/a.png")[0].tolist() == [red, red, white, white, green, green]


# ---- overlays ----


def photo(path: Path, height: int = 60, width: int = 80) -> npt.NDArray[np.uint8]:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = np.random.default_rng(1).integers(0, 256, (height // 10, width // 10, 3), dtype=np.uint8)
    image = image.repeat(10, 0).repeat(10, 1)
    Image.fromarray(image).save(path)
    return image


def test_overlays_on_the_photographs(tmp_path: Path) -> None:
    ids = IDS.repeat(20, 0).repeat(20, 1)
    grey(tmp_path / "m/s/a.png", ids)
    grey(tmp_path / "m/b.jpg.png", ids)  # as predict names it where there is a b.png, too
    first = photo(tmp_path / "p/s/a.png")
    second = photo(tmp_path / "p/b.jpg")
    photo(tmp_path / "p/b.png", 10, 10)
    for options, lines in (((), False), (("--boundaries",), True)):
        out = tmp_path / f"c{lines}"
        assert run(tmp_path / "m", "--out", out, "--images", tmp_path / "p", *options) == 0
        assert files(out) == ["_overlay/b.jpg.jpg", "_overlay/s/a.jpg", "b.jpg.png", "s/a.png"]
        for name, image in (("s/a.jpg", first), ("b.jpg.jpg", second)):
            expected = overlay(image, ids, voc_colormap(), boundary=lines).astype(int)
            tolerance = 3 if name == "s/a.jpg" else 12  # b.jpg is a JPEG itself
            assert np.abs(pixels(out / "_overlay" / name) - expected).mean() < tolerance


def test_masks_whose_photograph_does_not_fit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("fits", "missing", "twice", "small", "broken"):
        grey(tmp_path / f"m/{name}.png", np.ones((60, 80), np.uint8))
    photo(tmp_path / "p/fits.png")
    photo(tmp_path / "p/twice.png")
    photo(tmp_path / "p/twice.jpg")
    photo(tmp_path / "p/small.png", 50, 80)
    write(tmp_path / "p/broken.jpg", b"not a picture")
    assert run(tmp_path / "m", "--out", tmp_path / "c", "--images", tmp_path / "p") == 1
    assert files(tmp_path / "c") == ["_overlay/fits.jpg", "fits.png"]
    reasons = {name: entry["reason"] for name, entry in manifest(tmp_path / "c").items()}
    assert reasons["missing.png"].startswith("no image for it")
    assert reasons["twice.png"].endswith("twice.jpg, twice.png")
    assert reasons["small.png"] == f"it has 80 x 60 pixels, but its image {tmp_path}/p/small.png 80 x 50"
    assert "broken.jpg: not an image (it starts with 'not a picture')" in reasons["broken.png"]
    assert "5 masks" in capsys.readouterr().err


# ---- to ids ----


def test_colors_become_ids_again(tmp_path: Path) -> None:
    palette_mask(tmp_path / "m/a.png", VOC.palette())
    assert run(tmp_path / "m", "--out", tmp_path / "c") == 0
    assert run(tmp_path / "c", "--out", tmp_path / "back", "--to-ids", "--palette", "voc") == 0
    assert files(tmp_path / "back") == ["a.png"]
    assert (tmp_path / "back/a.png").read_bytes() == (tmp_path / "m/a.png").read_bytes()


def test_unknown_colors_are_listed_and_the_others_done(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    colors = CLASS_SETS["camvid"].palette()[np.array([[0, 3, 255]])]
    grey(tmp_path / "m/good.png", colors)
    wrong = colors.copy()
    wrong[0, 1] += 1
    grey(tmp_path / "m/wrong.png", wrong)
    Image.fromarray(colors).save(tmp_path / "m/lossy.jpg")
    assert run(tmp_path / "m", "--out", tmp_path / "ids", "--to-ids", "--palette", "camvid") == 1
    assert files(tmp_path / "ids") == ["good.png"]
    with Image.open(tmp_path / "ids/good.png") as image:
        assert image.mode == "P"
        assert np.asarray(image).tolist() == [[0, 3, 255]]
    errors = capsys.readouterr().err
    assert "wrong.png: 1 colour that is not in camvid, with pixel counts: (129, 65, 129) x 1" in errors
    assert "lossy.jpg: JPEG changes the values of pixels" in errors


# ---- faults ----


def test_bad_files_are_reported_in_one_line_each(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = grey(tmp_path / "m/good.png").read_bytes()
    write(tmp_path / "m/cut.png", good[:-30])
    write(tmp_path / "m/empty.png", b"")
    write(tmp_path / "m/text.png", b"hello")
    photo(tmp_path / "m/photo.png")
    photo(tmp_path / "m/photo.jpg")
    np.save(tmp_path / "m/cube.npy", np.zeros((2, 2, 2)))
    before = {path: path.read_bytes() for path in (tmp_path / "m").iterdir()}
    assert run(tmp_path / "m", "--out", tmp_path / "c") == 1
    assert files(tmp_path / "c") == ["good.png"]
    lines = capsys.readouterr().err.splitlines()
    reported = [
        line.split(": ")[0].split("/")[-1] for line in lines if line.startswith("  ") and ": " in line
    ]
    assert sorted(reported) == ["cube.npy", "cut.png", "empty.png", "photo.jpg", "photo.png", "text.png"]
    assert not any("Traceback" in line for line in lines)
    assert {path: path.read_bytes() for path in (tmp_path / "m").iterdir()} == before
    statuses = sorted(entry["status"] for entry in manifest(tmp_path / "c").values())
    assert statuses == ["done"] + ["failed"] * 6


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("nowhere", "--out", "c"), "no such file or folder: nowhere"),
        (("m", "--out", "m"), "inputs are never written over"),
        (("void", "--out", "c"), "there are no masks in void"),
        (("m", "--out", "c", "--palette", "cityscape"), "did you mean cityscapes"),
        (("m", "--out", "c", "--palette", "none.toml"), "no such class-set file: none.toml"),
        (("m", "--out", "c", "--images", "none"), "--images none: there is no such folder"),
        (("m", "--out", "c", "--to-ids"), "--to-ids needs --palette"),
        (("m", "--out", "c", "--to-ids", "--palette", "voc", "--legend"), "--legend draws pictures"),
    ],
)
def test_wrong_usage_names_the_fix(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: tuple[str, ...],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    grey(tmp_path / "m/a.png")
    (tmp_path / "void").mkdir()
    assert run(*arguments) == 2
    errors = capsys.readouterr().err.strip().splitlines()
    assert message in errors[0]
    assert len(errors) <= 2
    assert not (tmp_path / "c").exists()


def test_an_output_that_is_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    grey(tmp_path / "m/a.png")
    write(tmp_path / "c", b"precious")
    assert run(tmp_path / "m", "--out", tmp_path / "c") == 3
    assert (tmp_path / "c").read_bytes() == b"precious"
    assert "it is a file" in capsys.readouterr().err


# ---- again ----


def test_the_same_command_again_does_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    grey(tmp_path / "m/a.png")
    grey(tmp_path / "m/b.png")
    assert run(tmp_path / "m", "--out", tmp_path / "c", "--json") == 0
    assert json.loads(capsys.readouterr().out)["done"] == 2
    grey(tmp_path / "m/b.png", IDS[::-1])
    assert run(tmp_path / "m", "--out", tmp_path / "c", "--json") == 0
    again = json.loads(capsys.readouterr().out)
    assert (again["done"], again["skipped"], again["failed"]) == (1, 1, 0)
    assert np.array_equal(pixels(tmp_path / "c/b.png"), voc_colormap()[IDS[::-1]])


def test_other_settings_in_the_same_folder_are_refused(tmp_path: Path) -> None:
    grey(tmp_path / "m/a.png")
    assert run(tmp_path / "m", "--out", tmp_path / "c", "--palette", "voc") == 0
    assert run(tmp_path / "m", "--out", tmp_path / "c", "--palette", "camvid") == 2
    assert np.array_equal(pixels(tmp_path / "c/a.png"), colorize(IDS, VOC.palette()))
    assert run(tmp_path / "m", "--out", tmp_path / "c", "--palette", "camvid", "--overwrite") == 0
    assert np.array_equal(pixels(tmp_path / "c/a.png"), colorize(IDS, CLASS_SETS["camvid"].palette()))


def test_a_palette_file_that_changed_is_another_setting(tmp_path: Path) -> None:
    grey(tmp_path / "m/a.png", np.zeros((2, 2), np.uint8))
    names = tmp_path / "p.txt"
    names.write_text("1 2 3 soil")
    assert run(tmp_path / "m", "--out", tmp_path / "c", "--palette", names) == 0
    names.write_text("3 2 1 soil")
    assert run(tmp_path / "m", "--out", tmp_path / "c", "--palette", names) == 2


def test_killed_at_any_moment_and_run_again(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for number in range(60):
        grey(tmp_path / f"m/{number % 3}/{number}.png", rng.integers(0, 21, (40, 50), dtype=np.uint8))
    assert run(tmp_path / "m", "--out", tmp_path / "whole", "--legend") == 0
    whole = {name: (tmp_path / "whole" / name).read_bytes() for name in files(tmp_path / "whole")}
    out = tmp_path / "c"
    for wanted in (1, 20, 45):
        process = Process("colorize", tmp_path / "m", "--out", out, "--legend", folder=tmp_path)
        wait_until(lambda wanted=wanted: out.exists() and len(files(out)) >= wanted)  # type: ignore[misc]
        process.kill_group()
        process.wait()
        found = [name for name in files(out) if not Path(name).name.startswith(".segcli-")]
        assert all((out / name).read_bytes() == whole[name] for name in found)
    assert run(tmp_path / "m", "--out", out, "--legend") == 0
    assert {name: (out / name).read_bytes() for name in files(out)} == whole


# ---- talking ----


def test_json_is_one_document_on_stdout(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    grey(tmp_path / "m/a.png")
    write(tmp_path / "m/b.png", b"")
    assert run(tmp_path / "m", "--out", tmp_path / "c", "--json") == 1
    document = json.loads(capsys.readouterr().out)
    assert (document["inputs"], document["done"], document["failed"]) == (2, 1, 1)
    assert document["failures"] == [{"source": str(tmp_path / "m/b.png"), "reason": "the file is empty"}]


def test_quiet_says_nothing_when_all_is_well(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    grey(tmp_path / "m/a.png")
    assert run(tmp_path / "m", "--out", tmp_path / "c", "--quiet") == 0
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", "")


def test_help_fits_80_columns_and_shows_examples(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert run("--help") == 0
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 80
    assert "segcli colorize masks/ --out colors/" in text
