"""`segcli predict` on real folders, with real exit codes."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image
from processes import wait_until
from results import tree
from small_model import picture, save_picture, small_model

from segcli.cli import main
from segcli.files import sha256
from segcli.images import read_image
from segcli.palettes import CLASS_SETS


@pytest.fixture(autouse=True)
def inside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Commands run in an empty folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def predict(*arguments: object) -> int:
    """The exit code of `segcli predict ... --model (the small model) --workers 0`."""
    words = [str(word) for word in arguments]
    if "--model" not in words and "-m" not in words:
        words += ["--model", str(small_model())]
    if "--workers" not in words:
        words += ["--workers", "0"]
    with pytest.raises(SystemExit) as caught:
        main(["predict", *words])
    return int(caught.value.code or 0)


def lines(out: str = "masks") -> dict[str, dict[str, Any]]:
    """The manifest by the names of the inputs; every input has one line."""
    found = [json.loads(line) for line in Path(out, "_run/manifest.jsonl").read_text().splitlines()]
    by_name = {Path(line["source"]).name: line for line in found}
    assert len(by_name) == len(found)
    return by_name


def pixels_of(path: str) -> npt.NDArray[np.uint8]:
    with Image.open(path) as image:
        return np.asarray(image)


def test_a_folder_becomes_masks_and_overlays(capsys: pytest.CaptureFixture[str]) -> None:
    save_picture(Path("in/a.jpg"), 48, 64, 1)
    save_picture(Path("in/deep/er/b.png"), 30, 50, 2)
    before = {path: (sha256(path), path.stat().st_mtime_ns) for path in Path("in").rglob("*.*")}
    assert predict("in", "--out", "masks") == 0
    assert list(tree("masks")) == ["_overlay/a.jpg", "_overlay/deep/er/b.jpg", "a.png", "deep/er/b.png"]
    for name, size in (("a", (64, 48)), ("deep/er/b", (50, 30))):
        with Image.open(f"masks/{name}.png") as mask:
            assert (mask.mode, mask.size, mask.format) == ("P", size, "PNG")
            values = np.asarray(mask)
            palette = np.array(mask.getpalette("RGB"), np.uint8).reshape(-1, 3)
        assert values.max() < 21
        assert len(np.unique(values)) > 1
        np.testing.assert_array_equal(palette, CLASS_SETS["voc"].palette()[: len(palette)])
        with Image.open(f"masks/_overlay/{name}.jpg") as overlay:
            assert (overlay.mode, overlay.size, overlay.format) == ("RGB", size, "JPEG")
    assert {path: (sha256(path), path.stat().st_mtime_ns) for path in before} == before
    said = capsys.readouterr()
    assert said.out == ""
    assert "Segmenting 2 images with small (21 classes) on cpu" in said.err
    assert "2 images in" in said.err
    assert "2 done. Results are in masks, overlays in masks/_overlay." in said.err


def test_the_manifest_says_what_became_of_every_file() -> None:
    save_picture(Path("in/a.jpg"), 48, 64)
    Path("in/b.jpg").write_text("hello")
    Path("in/c.txt").write_text("not looked at")
    assert predict("in") == 1
    manifest = lines()
    assert manifest.keys() == {"a.jpg", "b.jpg"}
    a, b = manifest["a.jpg"], manifest["b.jpg"]
    values = pixels_of("masks/a.png")
    names = CLASS_SETS["voc"].names
    assert a["classes"] == {
        names[i]: pytest.approx(np.mean(values == i), abs=1e-6) for i in np.unique(values)
    }
    assert a["milliseconds"] > 0
    assert {key: a[key] for key in ("source", "output", "status", "reason", "width", "height", "model")} == {
        "source": str(Path("in/a.jpg").absolute()),
        "output": "a.png",
        "status": "done",
        "reason": None,
        "width": 64,
        "height": 48,
        "model": "small",
    }
    assert (b["output"], b["status"]) == (None, "failed")
    assert b["reason"] == "not an image (it starts with 'hello')"
    run = json.loads(Path("masks/_run/run.json").read_text())
    assert run["segcli"]
    assert run["settings"]["weights"] == sha256(small_model())
    assert (run["state"], run["done"], run["skipped"], run["failed"]) == ("finished", 1, 0, 1)
    assert run["save"] == ["mask", "overlay"]


def test_everything_that_can_be_saved() -> None:
    path = save_picture(Path("in/a.jpg"), 48, 64, 5)
    kinds = "scores,confidence,compare,color,overlay,mask"
    assert predict("in", "--save", kinds) == 0
    assert list(tree("masks")) == [
        "_color/a.png", "_compare/a.png", "_confidence/a.png", "_overlay/a.jpg", "_scores/a.npz", "a.png",
    ]  # fmt: skip
    labels = pixels_of("masks/a.png")
    color = pixels_of("masks/_color/a.png")
    np.testing.assert_array_equal(color, CLASS_SETS["voc"].palette()[labels])
    with np.load("masks/_scores/a.npz") as scores:
        probabilities = scores["probabilities"]
    assert (probabilities.dtype, probabilities.shape) == (np.float16, (21, 48, 64))
    np.testing.assert_allclose(probabilities.astype(float).sum(0), 1, atol=2e-3)
    with Image.open("masks/_confidence/a.png") as image:
        assert image.mode == "L"
        confidence = np.asarray(image)
    np.testing.assert_allclose(confidence / 255, probabilities.max(0).astype(float), atol=3e-3)
    best = np.take_along_axis(probabilities, labels[None].astype(int), 0)[0]
    assert (best >= probabilities.max(0) - 1e-3).all()
    compare = pixels_of("masks/_compare/a.png")
    assert compare.shape[1] >= 3 * 64
    np.testing.assert_array_equal(compare[:48, :64], read_image(path).pixels)


def test_one_kind_alone_and_another_one_later() -> None:
    save_picture(Path("in/a.jpg"))
    assert predict("in", "--save", "color") == 0
    assert list(tree("masks")) == ["_color/a.png"]
    assert lines()["a.jpg"]["output"] == "_color/a.png"
    assert predict("in", "--save", "color") == 0
    assert lines()["a.jpg"]["status"] == "skipped"
    assert predict("in", "--save", "mask,color") == 0
    assert lines()["a.jpg"]["status"] == "done"
    assert list(tree("masks")) == ["_color/a.png", "a.png"]


def test_grey_and_colour_images_of_any_size() -> None:
    sizes = {}
    for mode, suffix in (("RGB", "jpg"), ("L", "jpg"), ("P", "png"), ("1", "png"), ("RGBA", "webp")):
        for height, width in ((1, 1), (1, 70), (90, 3), (33, 47)):
            name = f"{mode}{suffix}{height}x{width}"
            Path("in").mkdir(exist_ok=True)
            Image.fromarray(picture(height, width)).convert(mode).save(f"in/{name}.{suffix}")
            sizes[name] = (width, height)
    assert predict("in", "--save", "mask,overlay,color,compare,confidence,scores") == 0
    for name, size in sizes.items():
        with Image.open(f"masks/{name}.png") as mask:
            assert (mask.mode, mask.size) == ("P", size)


def test_a_large_image() -> None:
    save_picture(Path("in/large.jpg"), 4000, 6000)
    assert predict("in", "--size", "64", "--save", "mask") == 0
    with Image.open("masks/large.png") as mask:
        assert (mask.mode, mask.size) == ("P", (6000, 4000))


def mixed_folder() -> None:
    """Two bad files, four odd ones, and a good one."""
    for name in ("good.jpg", "cut.jpg", "turned.jpg", "cmyk.jpg", "deep.png", "moving.gif"):
        save_picture(Path("in", name), 48, 64, 3)
    image = Image.fromarray(picture(48, 64, 3))
    image.convert("CMYK").save("in/cmyk.jpg")
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn to the right when shown
    image.save("in/turned.jpg", exif=exif)
    grey = np.asarray(image.convert("L"))
    Image.fromarray(grey.astype(np.uint16) * 257).save("in/deep.png")
    frames = [image.rotate(angle) for angle in (0, 90, 180)]
    frames[0].save("in/moving.gif", save_all=True, append_images=frames[1:])
    Path("in/cut.jpg").write_bytes(Path("in/cut.jpg").read_bytes()[:900])
    Path("in/text.jpg").write_text("I am not a photograph")


def test_a_folder_of_odd_and_broken_files(capsys: pytest.CaptureFixture[str]) -> None:
    mixed_folder()
    assert predict("in") == 1
    manifest = lines()
    assert {name for name, line in manifest.items() if line["status"] == "failed"} == {"cut.jpg", "text.jpg"}
    assert (manifest["turned.jpg"]["width"], manifest["turned.jpg"]["height"]) == (48, 64)
    for name, size in (("turned", (48, 64)), ("cmyk", (64, 48))):
        with Image.open(f"masks/{name}.png") as mask:
            assert mask.size == size
    assert "first of 3 frames" in manifest["moving.gif"]["notes"]
    assert any("16-bit" in note for note in manifest["deep.png"]["notes"])
    said = capsys.readouterr().err
    assert "7 images in" in said
    assert "5 done, 2 failed" in said
    listed = [line for line in said.splitlines() if line.startswith("  in/")]
    assert len(listed) == 2
    assert listed[1] == "  in/text.jpg: not an image (it starts with 'I am not a photograph')"
    assert "Traceback" not in said


def test_a_second_run_has_nothing_to_do(capsys: pytest.CaptureFixture[str]) -> None:
    mixed_folder()
    predict("in")
    before = {
        path: path.stat().st_mtime_ns for path in Path("masks").rglob("*.*") if "_run" not in path.parts
    }
    capsys.readouterr()
    assert predict("in") == 1
    assert {path: path.stat().st_mtime_ns for path in before} == before
    said = capsys.readouterr().err
    assert "Segmenting" not in said  # the model was not loaded
    assert "0 done, 5 done before, 2 failed" in said
    statuses = [line["status"] for line in lines().values()]
    assert sorted(statuses) == ["failed"] * 2 + ["skipped"] * 5
    assert lines()["good.jpg"]["classes"]  # nothing that was known is lost


def test_a_run_with_nothing_to_do_never_imports_torch() -> None:
    save_picture(Path("in/a.jpg"))
    predict("in")
    code = (
        "import sys\nfrom segcli.cli import main\n"
        "try: main(sys.argv[1:])\n"
        "except SystemExit as exit: print(exit.code or 0, 'torch' in sys.modules)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, "predict", "in", "-m", str(small_model())],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert result.stdout.split() == ["0", "False"], result.stderr


def test_json_is_one_document_on_stdout(capsys: pytest.CaptureFixture[str]) -> None:
    save_picture(Path("in/a.jpg"))
    Path("in/b.jpg").write_bytes(b"")
    assert predict("in", "--json") == 1
    said = capsys.readouterr()
    document = json.loads(said.out)
    assert (document["inputs"], document["done"], document["skipped"], document["failed"]) == (2, 1, 0, 1)
    assert document["failures"] == [{"source": "in/b.jpg", "reason": "the file is empty"}]
    assert sum(document["classes"].values()) == pytest.approx(1, abs=1e-5)
    assert "Segmenting" in said.err


def test_quiet_prints_only_what_failed(capsys: pytest.CaptureFixture[str]) -> None:
    save_picture(Path("in/a.jpg"))
    assert predict("in", "--quiet") == 0
    assert capsys.readouterr() == ("", "")
    Path("in/b.jpg").write_bytes(b"")
    assert predict("in", "--quiet") == 1
    assert capsys.readouterr() == ("", "  in/b.jpg: the file is empty\n")


def test_long_lists_of_failures_are_cut(capsys: pytest.CaptureFixture[str]) -> None:
    Path("in").mkdir()
    for number in range(15):
        Path(f"in/{number:02}.jpg").write_bytes(b"")
    assert predict("in") == 1
    said = capsys.readouterr().err.splitlines()
    assert sum(line.startswith("  in/") for line in said) == 10
    assert said[-1] == "  and 5 more, see masks/_run/manifest.jsonl"


def test_files_globs_lists_and_stdin(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("in/a.jpg", "in/b.jpg", "in/sub/c.jpg"):
        save_picture(Path(name))
    predict("in", "--out", "whole")
    assert predict("in/a.jpg", "in/b.jpg", "--out", "files") == 0
    assert tree("files").keys() == {"a.png", "b.png", "_overlay/a.jpg", "_overlay/b.jpg"}
    assert tree("files").items() <= tree("whole").items()
    assert predict("in/**/*.jpg", "--out", "glob") == 0
    assert tree("glob") == tree("whole")
    Path("list.txt").write_text("in/a.jpg\nin/sub/c.jpg\nmissing.jpg\n")
    assert predict("--list", "list.txt", "--out", "list") == 1
    assert tree("list").keys() == {"in/a.png", "in/sub/c.png", "_overlay/in/a.jpg", "_overlay/in/sub/c.jpg"}
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"in/a.jpg\0in/sub/c.jpg\0")))
    assert predict("-", "--out", "piped") == 0
    assert tree("piped") == tree("list")


def test_it_can_be_stopped_while_it_waits_for_paths() -> None:
    save_picture(Path("in/a.jpg"))
    command = [sys.executable, "-m", "segcli", "predict", "-", "-m", str(small_model()), "--workers", "0"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdin is not None
        assert process.stderr is not None
        process.stdin.write(b"gone.jpg\n")  # and no end
        process.stdin.flush()
        wait_until(lambda: Path("masks/_run/manifest.jsonl").exists() and bool(lines()))
        process.send_signal(signal.SIGINT)
        process.wait(60)
        said = process.stderr.read().decode()
    assert process.returncode == 130, said
    assert said.splitlines()[-1] == "Stopped: 0 images are done. The same command goes on from here."
    assert "Traceback" not in said
    assert "Fatal" not in said


def test_the_same_bytes_whatever_the_batch_size_workers_and_order() -> None:
    for number in range(6):
        save_picture(Path(f"in/{number}.png"), 40 + 8 * (number % 2), 60, number)
    predict("in", "--out", "first")
    first = tree("first")
    names = [f"in/{number}.png" for number in (3, 0, 5, 1, 4, 2)]
    assert predict(*names, "--out", "second", "--workers", "3", "--batch-size", "8") == 0
    assert tree("second") == first


def test_changed_settings_are_refused_and_overwritten_on_demand(capsys: pytest.CaptureFixture[str]) -> None:
    save_picture(Path("in/a.jpg"), 60, 90)
    predict("in")
    before = tree("masks")
    capsys.readouterr()
    assert predict("in", "--size", "32") == 2
    said = capsys.readouterr().err
    assert said.startswith("Error: masks holds results of other settings: size unset, now 32.\n")
    assert len(said.splitlines()) == 2
    assert tree("masks") == before
    assert predict("in", "--size", "32", "--overwrite") == 0
    assert tree("masks") != before
    assert predict("in", "--overwrite") == 0
    assert tree("masks") == before
    assert lines()["a.jpg"]["status"] == "done"


def test_outdated_products_do_not_stay_beside_new_ones() -> None:
    save_picture(Path("in/a.jpg"), seed=1)
    predict("in", "--save", "mask,color")
    save_picture(Path("in/a.jpg"), seed=2)
    assert predict("in") == 0
    assert list(tree("masks")) == ["_overlay/a.jpg", "a.png"]


def test_two_sources_never_share_an_output(capsys: pytest.CaptureFixture[str]) -> None:
    save_picture(Path("one/a.jpg"), seed=1)
    save_picture(Path("two/a.jpg"), seed=2)
    predict("one")
    before = tree("masks")
    assert predict("two") == 1
    assert "a.png holds the result of" in capsys.readouterr().err
    assert tree("masks") == before
    assert predict("two", "--overwrite") == 0
    assert tree("masks") != before


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["gone"], 2, "no such file or folder: gone"),
        (["in/b.jpg"], 2, "no such file or folder: in/b.jpg; did you mean in/a.jpg?"),
        (["empty"], 2, "there are no images in empty; found 1 file of other types (1 .txt)."),
        (["in", "--out", "in"], 2, "is the folder of the input in; inputs are never written over"),
        (["in", "--model", "fcn8s-camvit"], 2, "no model is called 'fcn8s-camvit'"),
        (["in", "--model", "gone.safetensors"], 2, "there is no model file gone.safetensors"),
        (["in", "--model", "in/a.jpg"], 2, "in/a.jpg is not a model file"),
        (["in", "--save", "mask,hologram"], 2, "--save 'mask,hologram': choose from mask, overlay,"),
        (["in", "--batch-size", "0"], 2, "--batch-size '0': give auto or a number from 1"),
        (["in", "--device", "cuda"], 2, "--device cuda: PyTorch sees no GPU on this machine"),
        (["in", "--device", "gpu"], 2, "--device 'gpu' is unknown"),
        (["in", "--out", "file"], 3, "cannot write to file: it is a file; choose a folder for --out"),
        (["in", "--out", "file/deeper"], 3, "cannot write to file/deeper: Not a directory"),
        ([], 2, "give either SOURCE"),
        (["in", "--list", "file"], 2, "give either SOURCE"),
        (["--list", "gone"], 2, "--list gone: no such file"),
        (["--list", "file"], 2, "the list of files is empty"),
    ],
)
def test_wrong_usage_is_told_in_one_or_two_lines(
    arguments: list[str], code: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    save_picture(Path("in/a.jpg"))
    Path("empty").mkdir()
    Path("empty/notes.txt").touch()
    Path("file").touch()
    if "cuda" in arguments:
        import torch

        if torch.cuda.is_available():
            pytest.skip("there is a GPU")
    assert predict(*arguments) == code
    said = capsys.readouterr().err
    assert message in said
    assert len(said.splitlines()) <= 2
    assert not list(Path().glob("**/*.png"))


def test_wrong_usage_is_found_before_torch_is_loaded() -> None:
    save_picture(Path("in/a.jpg"))
    Path("file").touch()
    code = (
        "import sys\nfrom segcli.cli import main\n"
        "for words in (['gone'], ['in', '-o', 'in'], ['in', '-m', 'nobody'], ['in', '--save', 'x'],\n"
        "              ['in', '-o', 'file', '-m', sys.argv[1]]):\n"
        "    try: main(['predict', *words])\n"
        "    except SystemExit as exit: print(exit.code, 'torch' in sys.modules)\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, str(small_model())], capture_output=True, text=True, check=True
    )
    assert result.stdout.splitlines() == [*["2 False"] * 4, "3 False"], result.stderr


def test_names_that_are_hard_to_print(capfd: pytest.CaptureFixture[str]) -> None:
    names = [b"new\nline.jpg", b"-dash.jpg", b"\xff\xfe.jpg", b"[red]b[red].jpg", "é\u0301ü.jpg".encode()]
    source = save_picture(Path("good.jpg"))
    Path("in").mkdir()
    for name in names:
        shutil.copy(source, Path("in", os.fsdecode(name)))
    Path("in/bad\n\x1b[31m.jpg").write_bytes(b"")
    assert predict("in") == 1
    made = {os.fsencode(path.name) for path in Path("masks").glob("*.png")}
    assert made == {name.removesuffix(b".jpg") + b".png" for name in names}
    said = capfd.readouterr().err
    assert "  in/bad\\n\\x1b[31m.jpg: the file is empty" in said.splitlines()
    assert "\x1b" not in said
    assert {os.fsencode(name) for name in lines()} >= set(names)


def test_help_shows_the_options_and_examples(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["predict", "--help"])
    assert caught.value.code in (0, None)
    said = capsys.readouterr().out
    for word in ("--out", "--list", "--save", "--overwrite", "segcli predict photos/ --out masks/"):
        assert word in said


def test_averaging_over_mirrored_images_makes_the_result_mirror() -> None:
    save_picture(Path("in/left.png"), 40, 56, 3)
    with Image.open("in/left.png") as image:
        image.transpose(Image.Transpose.FLIP_LEFT_RIGHT).save("in/right.png")
    assert predict("in", "--out", "plain", "--quiet") == 0
    assert predict("in", "--out", "masks", "--tta", "flip", "--quiet") == 0
    mirrored = pixels_of("masks/right.png")[:, ::-1]
    assert (pixels_of("masks/left.png") == mirrored).mean() > 0.99
    assert (pixels_of("plain/left.png") == pixels_of("plain/right.png")[:, ::-1]).mean() < 1
    assert predict("in", "--out", "masks", "--quiet") == 2  # without it the results would be others
    assert predict("in", "--out", "new", "--tta", "turn", "--quiet") == 2
    assert not Path("new").exists()
