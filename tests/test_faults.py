"""The faults that a run over a folder survives, row by row; docs/reliability.md has the measured figures.

`make test-faults` (SEGCLI_FAULTS=full) makes the full number of tries of every row; otherwise a few.
All inputs are made here, with fixed seeds; processes, signals, kills and full disks are real.
"""

from __future__ import annotations

import csv
import functools
import io
import itertools
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from corpus import ORIENTATION, bombs, broken_files, good_files, good_masks
from fault_table import FULL, Row, tries
from PIL import Image
from processes import Process, run, wait_until
from results import complete_files, tree
from small_model import picture, save_picture, small_model

from segcli.errors import ImageError
from segcli.images import read_image

pytestmark = pytest.mark.faults


def model() -> list[object]:
    return ["--model", small_model()]


def predict(folder: Path, *arguments: object, source: object = "in", **more: str) -> tuple[int, str]:
    """Run `segcli predict in --out masks` in a folder: exit code and stderr."""
    words = [source, *model(), *arguments]
    if "--workers" not in words:
        words += ["--workers", 0]
    if "--out" not in words:
        words += ["--out", "masks"]
    return run("predict", *words, folder=folder, **more)


def manifest(out: Path) -> dict[str, dict[str, Any]]:
    """The record by absolute source; every input has exactly one line, and no more."""
    lines = [json.loads(line) for line in (out / "_run/manifest.jsonl").read_text().splitlines()]
    by_source = {line["source"]: line for line in lines}
    assert len(by_source) == len(lines)
    return by_source


def assert_complete(out: Path, inputs: int) -> dict[str, dict[str, Any]]:
    """What holds after every run that ended: all inputs accounted for, all results whole."""
    lines = manifest(out)
    assert len(lines) == inputs
    made = set()
    for line in lines.values():
        assert line["status"] in ("done", "skipped", "failed")
        if line["status"] == "failed":
            assert line["output"] is None
            assert line["reason"]
            assert "\n" not in line["reason"]
            continue
        with Image.open(out / line["output"]) as mask:
            mask.load()
            assert (mask.mode, mask.size) == ("P", (line["width"], line["height"]))
        made.add(line["output"])
        with Image.open((out / "_overlay" / line["output"]).with_suffix(".jpg")) as overlay:
            overlay.load()
            assert overlay.size == (line["width"], line["height"])
    assert {name for name in tree(out) if not name.startswith("_overlay/")} == made
    assert not list(out.rglob(".segcli-*"))
    return lines


def outcome(source: str) -> tuple[str, str | None, int | None, int | None]:
    """What the manifest has to say about a file: status, reason, width, height."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # pytest would make errors of Pillow's remarks
        try:
            height, width = read_image(Path(source)).pixels.shape[:2]
        except ImageError as error:
            return "failed", str(error), None, None
    return "done", None, width, height


def assert_clean(errors: str) -> None:
    """Nobody but segcli has spoken."""
    assert "Traceback" not in errors
    assert "Warning" not in errors
    assert "\x1b" not in errors


@pytest.fixture(scope="module")
def twelve(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with twelve pictures in `in`, and in `masks` what an undisturbed run makes of them."""
    folder = tmp_path_factory.mktemp("twelve")
    for number in range(12):
        save_picture(folder / f"in/{'sub/' * (number % 2)}{number:02}.png", 32, 48, number)
    code, errors = predict(folder)
    assert code == 0, errors
    assert_complete(folder / "masks", 12)
    return folder


def copy_of(folder: Path, tmp_path: Path) -> Path:
    shutil.copytree(folder / "in", tmp_path / "in")
    return tmp_path


# ---- 1, 2: what is in the files ----


def test_1_every_good_file_is_segmented(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for name, data in good_files().items():
        (tmp_path / "in" / name).write_bytes(data)
    code, errors = predict(tmp_path)
    assert code == 0, errors
    assert_clean(errors)
    lines = assert_complete(tmp_path / "masks", len(good_files()))
    for source, line in lines.items():
        with Row("1 odd files: every format and mode"):
            height, width = read_image(Path(source)).pixels.shape[:2]
            assert (line["width"], line["height"]) == (width, height)


def test_1_broken_files_are_reported_or_segmented(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    count = tries(1000, 60)
    for name, data in broken_files(count):
        (tmp_path / "in" / name).write_bytes(data)
    code, errors = predict(tmp_path, "--workers", 2)
    assert code == 1
    assert_clean(errors)
    lines = assert_complete(tmp_path / "masks", count)
    for source, line in lines.items():
        with Row("1 broken files: every format, damaged at random"):
            assert (line["status"], line["reason"], line["width"], line["height"]) == outcome(source)


def test_2_bombs_are_reported(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    good = save_picture(tmp_path / "in/good.jpg")
    for name, data in bombs().items():
        (tmp_path / "in" / name).write_bytes(data)
    code, errors = predict(tmp_path, "--workers", 1)
    assert code == 1
    assert_clean(errors)
    for source, line in assert_complete(tmp_path / "masks", len(bombs()) + 1).items():
        with Row("2 decompression bombs"):
            assert line["status"] == ("done" if Path(source).name == good.name else "failed")


# Says how much memory the process took, in KiB, when it ends.
WATCH = """
import os, resource
leave = os._exit
def tell(code):
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, flush=True)
    leave(code)
os._exit = tell
"""


@pytest.mark.parametrize(
    ("megapixels", "size"), [(100, "500"), (170, "500"), (170, "own")] if FULL else [(12, "500"), (4, "own")]
)
def test_2_honest_large_images_fit_into_memory(tmp_path: Path, megapixels: int, size: str) -> None:
    height = round((megapixels * 1e6 * 3 / 4) ** 0.5)
    width = round(megapixels * 1e6 / height)
    (tmp_path / "in").mkdir()
    small = Image.fromarray(picture(300, 400))
    small.resize((width, height), Image.Resampling.BILINEAR).save(tmp_path / "in/large.jpg")
    del small
    budget = 1.5 + 16 * megapixels / 1000 if size == "500" else 8.0  # GiB
    options = ["--workers", 1, "--memory", f"{budget}G", *(["--size", size] if size != "own" else [])]
    with Row("2 honest images of 100 and 170 megapixels, at --size 500 and at their own"):
        process = Process("predict", "in", *model(), *options, folder=tmp_path, before=WATCH)
        assert process.wait() == 0, process.errors
        lines = assert_complete(tmp_path / "masks", 1)
        assert [(line["width"], line["height"]) for line in lines.values()] == [(width, height)]
        gib = int(process.stdout.read_text()) / 2**20
        assert gib < budget, f"{gib:.1f} GiB"


# ---- 3, 4, 5: what becomes of neighbours and twins ----


def test_3_a_bad_file_does_not_touch_its_neighbours(twelve: Path, tmp_path: Path) -> None:
    clean = tree(twelve / "masks")
    broken = list(broken_files(200, seed=3))
    count = tries(100, 1)
    # one run holds several groups of twelve, each with a bad file at its first, middle or last place
    for place in (0, 6, 12):
        folder = tmp_path / str(place)
        for number in range(count):
            copy = folder / f"in/{number}"
            shutil.copytree(twelve / "in", copy)
            name, data = broken[number]
            before = {0: "!", 6: "05x", 12: "zz"}[place]
            (copy / f"{before}{name}").write_bytes(data)
        predict(folder, "--workers", 2)
        made = tree(folder / "masks")
        for number in range(count):
            with Row("3 a bad file at the first, middle and last place"):
                for name, data in clean.items():
                    top, slash, rest = name.rpartition("_overlay/")
                    assert made[f"{top}{slash}{number}/{rest}"] == data


def test_4_masks_are_turned_as_images_are_displayed(tmp_path: Path) -> None:
    shown = picture(40, 56, 7)
    turns = {  # from what is displayed to what is stored
        1: lambda a: a,
        2: lambda a: a[:, ::-1],
        3: lambda a: a[::-1, ::-1],
        4: lambda a: a[::-1],
        5: lambda a: a.swapaxes(0, 1),
        6: lambda a: np.rot90(a),
        7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
        8: lambda a: np.rot90(a, -1),
    }
    (tmp_path / "in").mkdir()
    for orientation, turn in turns.items():
        exif = Image.Exif()
        exif[ORIENTATION] = orientation
        stored = Image.fromarray(np.ascontiguousarray(turn(shown)))
        stored.save(tmp_path / f"in/{orientation}.png", exif=exif)
    assert predict(tmp_path)[0] == 0
    upright = (tmp_path / "masks/1.png").read_bytes()
    for orientation in turns:
        with Row("4 eight EXIF orientations"):
            assert (tmp_path / f"masks/{orientation}.png").read_bytes() == upright


def test_5_twins_in_other_modes_get_the_same_mask(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    count = tries(13, 1)
    for number in range(count):
        image = Image.fromarray(picture(64, 96, number)).quantize(256).convert("RGB")
        grey = image.convert("L")
        alpha = image.copy()
        alpha.putalpha(255)
        deep = Image.fromarray(np.asarray(grey).astype(np.uint16) * 257)
        for name, twin in {
            "rgb.png": image,
            "palette.png": image.quantize(256),
            "alpha.png": alpha,
            "cmyk.tif": image.convert("CMYK"),
            "grey.png": grey,
            "deep.png": deep,
        }.items():
            twin.save(tmp_path / f"in/{number}_{name}")
    assert predict(tmp_path)[0] == 0

    def mask(name: str) -> np.ndarray:
        with Image.open(tmp_path / "masks" / name) as image:
            return np.asarray(image)

    for number in range(count):
        for twin, original in (("palette", "rgb"), ("alpha", "rgb"), ("cmyk", "rgb"), ("deep", "grey")):
            with Row("5 16-bit, CMYK, palette and alpha twins"):
                same = mask(f"{number}_{twin}.png") == mask(f"{number}_{original}.png")
                assert same.mean() >= 0.98


# ---- 6: decoders that die ----

# Python runs this in every worker before anything else: files meet their fate by name.
FATES = """
import os, signal, sys
if any("decode_worker" in word for word in sys.orig_argv):
    from segcli import images
    real = images.read_image
    def read_image(path, *rest):
        name = os.path.basename(path)
        if "SEGV" in name:
            os.kill(os.getpid(), signal.SIGSEGV)
        if "KILL" in name:
            os.kill(os.getpid(), signal.SIGKILL)
        if "MEMORY" in name:
            bytearray(1 << 40)
        return real(path, *rest)
    images.read_image = read_image
"""


def test_6_a_decoder_that_dies_costs_its_file_only(twelve: Path, tmp_path: Path) -> None:
    copy_of(twelve, tmp_path)
    (tmp_path / "site").mkdir()
    (tmp_path / "site/sitecustomize.py").write_text(FATES)
    count = tries(21, 3)
    for number, fate in zip(range(count), itertools.cycle(["SEGV", "KILL", "MEMORY"])):
        save_picture(tmp_path / f"in/{number:02}{fate}.png")
    code, errors = predict(tmp_path, "--workers", 2, PYTHONPATH=str(tmp_path / "site"))
    assert code == 1
    assert_clean(errors)
    lines = assert_complete(tmp_path / "masks", 12 + count)
    reasons = {
        "SEGV": "its decoder crashed (SIGSEGV)",
        "KILL": "its decoder was killed (SIGKILL), most likely because memory ran out",
        "MEMORY": "decoding it needs more memory than there is",
    }
    for source, line in lines.items():
        fate = Path(source).stem[2:]
        if fate:
            with Row("6 a decoder crashes, is killed, or runs out of memory"):
                assert line["reason"] == reasons[fate]
    assert tree(tmp_path / "masks") == tree(twelve / "masks")


# ---- 7, 8, 9: going on ----


def wait_for_files(process: Process, out: Path, count: int) -> None:
    """Until so many files are there, or the process has ended."""
    wait_until(lambda: len(list(out.rglob("*.*"))) >= count or process.has_ended())


def test_7_killed_at_any_moment_and_run_again(twelve: Path, tmp_path: Path) -> None:
    clean = tree(twelve / "masks")
    copy_of(twelve, tmp_path)
    dice = random.Random(7)
    out = tmp_path / "masks"
    kills = tries(100, 5)
    for number in range(kills):
        with Row("7 kill -9 of the whole group at a random moment"):
            process = Process("predict", "in", *model(), "--workers", dice.choice((0, 1, 2)), folder=tmp_path)
            until = dice.random()
            if until < 0.3:  # at any time at all
                time.sleep(dice.random() * 2)
            else:  # just when the next files appear
                enough = len(list(out.rglob("*.*"))) + dice.randrange(1, 8)
                wait_for_files(process, out, enough)
            process.kill_group()
            process.wait()
            wait_until(process.group_is_gone)
            partial = complete_files(out)
            assert partial.items() <= clean.items()
        if partial == clean or number == kills - 1:
            code, errors = predict(tmp_path)
            assert code == 0, errors
            assert_complete(out, 12)
            assert tree(out) == clean
            shutil.rmtree(out)


def test_8_nothing_is_mixed_silently(twelve: Path, tmp_path: Path) -> None:
    copy_of(twelve, tmp_path)
    out = tmp_path / "masks"
    shutil.copytree(twelve / "masks", out)  # times differ, contents do not
    for line in manifest(out).values():  # and the inputs have moved
        assert line["source"].startswith(str(twelve))
    code, errors = predict(tmp_path)
    with Row("8 resume after a move: nothing is done again"):
        assert (code, "0 done, 12 done before" in errors) == (0, True)
    other = tmp_path / "other.safetensors"
    data = bytearray(small_model().read_bytes())
    data[-4000:] = bytes(4000)
    other.write_bytes(data)
    with Row("8 resume with other weights, options, inputs"):
        code, errors = predict(tmp_path, "--model", other)
        assert (code, errors.count("\n")) == (2, 2)
        assert "weights" in errors
    with Row("8 resume with other weights, options, inputs"):
        code, errors = predict(tmp_path, "--opacity", 0.3)
        assert (code, "opacity 0.5, now 0.3" in errors) == (2, True)
    with Row("8 resume with other weights, options, inputs"):
        code, errors = predict(tmp_path, "--size", 40)
        assert (code, "size unset, now 40" in errors) == (2, True)
    assert tree(out) == tree(twelve / "masks")
    changed = tmp_path / "in/04.png"
    times = changed.stat()
    with Row("8 resume with other weights, options, inputs"):
        save_picture(changed, 32, 48, 99)
        code, errors = predict(tmp_path)
        assert (code, "1 done, 11 done before" in errors) == (0, True)
        assert tree(out)["04.png"] != tree(twelve / "masks")["04.png"]
    with Row("8 resume with other weights, options, inputs"):
        shutil.copy(twelve / "in/04.png", changed)
        os.utime(changed, ns=(times.st_atime_ns, times.st_mtime_ns))  # dated back
        code, errors = predict(tmp_path)
        assert (code, "1 done, 11 done before" in errors) == (0, True)
        assert tree(out) == tree(twelve / "masks")
    with Row("8 resume with other weights, options, inputs"):
        code, errors = predict(tmp_path, "--model", other, "--overwrite")
        assert (code, "12 done" in errors) == (0, True)


def test_9_junk_under_a_final_name_is_replaced(twelve: Path, tmp_path: Path) -> None:
    copy_of(twelve, tmp_path)
    out = tmp_path / "masks"
    assert predict(tmp_path)[0] == 0
    clean = tree(out)
    names = sorted(clean)
    dice = random.Random(9)
    junk = [lambda data: b"", lambda data: b"junk", lambda data: data[: len(data) // 2],
            lambda data: bytes(len(data)), lambda data: data + b"x"]  # fmt: skip
    for spoil in itertools.islice(itertools.cycle(junk), tries(20, 2)):
        with Row("9 junk, empty or half files under the final name"):
            for name in dice.sample(names, 3):
                (out / name).write_bytes(spoil(clean[name]))
            code, errors = predict(tmp_path)
            assert code == 0, errors
            assert tree(out) == clean
    with Row("9 junk, empty or half files under the final name"):
        shutil.rmtree(out)
        for name in names:  # there before the first run
            (out / name).parent.mkdir(parents=True, exist_ok=True)
            (out / name).write_bytes(b"\x89PNG")
        assert predict(tmp_path)[0] == 0
        assert tree(out) == clean


# ---- 10: signals ----


SIGNALS = list(itertools.product(("INT", "TERM", "INT INT"), (0, 1, 4)))


# In a process of segcli: a signal that arrives while the model is loaded, in code that lets no exception out.
SIGNAL_WHILE_LOADING = """
import os, time
from segcli.inference import segmentation
def init(self, *arguments, **options):
    os.kill(os.getpid(), {number})
    while True:
        try:
            time.sleep(1)
        except BaseException:
            pass
segmentation.Segmenter.__init__ = init
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_10_signal_while_the_model_is_loaded(twelve: Path, tmp_path: Path, number: signal.Signals) -> None:
    with Row("10 a signal while the model is loaded"):
        copy_of(twelve, tmp_path)
        code, errors = predict(
            tmp_path, "--workers", 2, before=SIGNAL_WHILE_LOADING.format(number=int(number))
        )
        assert code == 128 + number
        assert errors.splitlines()[-1] == "Stopped while getting ready. The same command goes on from here."
        code, errors = predict(tmp_path)
        assert code == 0, errors
        assert tree(tmp_path / "masks") == tree(twelve / "masks")


# In a process of segcli: Ctrl-C when everything is done, and is about to be told.
SIGNAL_AT_THE_END = """
import os, signal
from segcli.cli import runs
signal.signal(signal.SIGINT, signal.default_int_handler)  # shells have background jobs ignore it
def report(*arguments):
    os.kill(os.getpid(), signal.SIGINT)
runs.report = report
"""


def test_10_signal_when_all_is_done(twelve: Path, tmp_path: Path) -> None:
    with Row("10 a signal when all is done"):
        copy_of(twelve, tmp_path)
        code, errors = predict(tmp_path, before=SIGNAL_AT_THE_END)
        assert code == 130
        assert errors.splitlines()[-1] == "Interrupted. The same command goes on from here."
        assert tree(tmp_path / "masks") == tree(twelve / "masks")


@pytest.mark.parametrize(("numbers", "workers"), SIGNALS if FULL else SIGNALS[::4])
def test_10_signals(twelve: Path, tmp_path: Path, numbers: str, workers: int) -> None:
    copy_of(twelve, tmp_path)
    out = tmp_path / "masks"
    dice = random.Random(f"{numbers}{workers}")
    for number in range(tries(7, 1)):
        with Row("10 SIGINT, SIGTERM, SIGINT twice, with 0, 1 and 4 workers"):
            shutil.rmtree(out, ignore_errors=True)
            process = Process("predict", "in", *model(), "--workers", workers, folder=tmp_path)
            wait_until((out / "_run/run.json").exists)  # from then on segcli has the say
            if number % 2 == 0:
                enough = dice.randrange(1, 12)
                wait_for_files(process, out, enough)
            else:
                time.sleep(dice.random())
            said = process.errors.count("\n")
            start = time.monotonic()
            for name in numbers.split():
                process.send(signal.Signals[f"SIG{name}"])
            code = process.wait()
            assert time.monotonic() - start < (5 if FULL else 60)
            wait_until(process.group_is_gone, 5)
            assert_clean(process.errors)
            if "images in" in process.errors:  # it was faster
                assert code == 0
                continue
            # A shell shows both as 143; minus 15 is a process that was about to report.
            assert code in ((143, -15) if numbers == "TERM" else (130,))
            assert process.errors.count("\n") - said <= 3
            if numbers != "INT INT" and code > 0:
                assert "The same command goes on from here." in process.errors
                assert not list(out.rglob(".segcli-*"))
            good = complete_files(out)
            assert good.items() <= tree(twelve / "masks").items()
            code, errors = predict(tmp_path)
            assert code == 0, errors
            assert_complete(out, 12)
            assert tree(out) == tree(twelve / "masks")


# ---- 11: disks ----


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """An empty disk of its own, which can be made small or read-only."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if os.geteuid() or subprocess.run(["mount", "-t", "tmpfs", "none", folder], check=False).returncode:
        pytest.skip("needs to mount a disk")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def remount(disk: Path, options: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{options}", disk], check=True)


def assert_a_full_disk_is_survived(
    row: str,
    disk: Path,
    room: int,
    clean: dict[str, bytes],
    write: Callable[[Path], tuple[int, str]],
    left: Callable[[Path], dict[str, bytes]] = tree,
) -> None:
    """Let the disk become full at ten points, then make room.

    Args:
        row: Of the table.
        disk: See `disk`.
        room: Bytes that there are at least.
        clean: What is written where there is room for all.
        write: Runs the command for an output folder; gives exit code and stderr.
        left: The files of that folder that have to be good while the disk is full.
    """
    needed = sum(map(len, clean.values()))
    count = tries(10, 1)
    for number in range(count):
        with Row(row):
            out = disk / f"out{number}"
            remount(disk, f"size={room + needed * number // (2 * count)}")
            code, errors = write(out)
            assert code == 3, errors
            assert "No space left on device" in errors
            assert_clean(errors)
            assert left(out).items() <= clean.items()
            remount(disk, "size=64m")
            assert write(out)[0] == 0
            assert tree(out) == clean
            shutil.rmtree(out)


def test_11_a_full_disk(twelve: Path, tmp_path: Path, disk: Path) -> None:
    copy_of(twelve, tmp_path)
    clean = tree(twelve / "masks")
    needed = sum(map(len, clean.values())) + 16 * 1024
    count = tries(10, 2)
    for number in range(count):
        with Row("11 a full disk"):
            out = disk / f"masks{number}"
            remount(disk, "size=64m")
            other = disk / "other"
            other.write_bytes(b"x" * 1000)
            remount(disk, f"size={12 * 1024 + needed * number // (2 * count)}")
            code, errors = predict(tmp_path, "--out", out)
            assert code == 3, errors
            assert errors.splitlines()[-1].startswith("Error: cannot write")
            assert str(out) in errors
            assert "No space left on device" in errors
            assert_clean(errors)
            good = complete_files(out)
            assert good.items() <= clean.items()
            remount(disk, "size=64m")
            code, errors = predict(tmp_path, "--out", out)
            assert code == 0, errors
            assert_complete(out, 12)
            assert tree(out) == clean
            shutil.rmtree(out)


def test_11_disks_and_folders_that_cannot_be_written_to(twelve: Path, tmp_path: Path, disk: Path) -> None:
    copy_of(twelve, tmp_path)
    (disk / "file").write_text("mine")
    (disk / "link").symlink_to("nowhere/at/all")
    shutil.copytree(twelve / "masks", disk / "masks")
    remount(disk, "ro")
    for name, reason in (
        ("new", "Read-only file system"),
        ("masks", "Read-only file system"),
        ("file", "it is a file"),
        ("file/deeper", "Not a directory"),
    ):
        with Row("11 read-only, missing, a file in place of the folder"):
            code, errors = predict(tmp_path, "--out", disk / name)
            assert (code, len(errors.splitlines())) == (3, 1)
            assert str(disk / name) in errors
            assert reason in errors
    assert (disk / "file").read_text() == "mine"
    assert tree(disk / "masks") == tree(twelve / "masks")


# ---- 12, 13, 14: names ----


def colliding_names(folder: Path, dice: random.Random, mode: str) -> dict[str, int]:
    """Eight pictures or fewer whose names differ in case, suffix or folder only: path -> which picture."""
    sources = {}
    for seed in range(8):
        stem = dice.choice(["a", "A", "b", "a.png", "_overlay", "é", "e\u0301"])
        suffix = dice.choice([".png", ".PNG", ".bmp", ".png.bmp"])
        path = folder / dice.choice(["", "x", "X", "_overlay", "a.png"]) / (stem + suffix)
        if not path.exists() and not path.parent.is_file():
            path.parent.mkdir(parents=True, exist_ok=True)
            data = io.BytesIO()
            Image.fromarray(picture(16, 24, seed)).convert(mode).save(data, "PNG")
            path.write_bytes(data.getvalue())
            sources[str(path)] = seed
    return sources


def assert_own_outputs(out: Path, sources: dict[str, int]) -> None:
    """Every input has an output of its own, and twins by content have equal ones."""
    lines = manifest(out)
    assert lines.keys() == sources.keys()
    assert len({line["output"] for line in lines.values()}) == len(sources)
    outputs: dict[int, bytes] = {}
    for source, seed in sources.items():
        data = (out / lines[source]["output"]).read_bytes()
        assert outputs.setdefault(seed, data) == data


def test_12_no_two_inputs_share_an_output(tmp_path: Path) -> None:
    dice = random.Random(12)
    for number in range(tries(50, 3)):
        with Row("12 names that collide: b.jpg and b.png, A.jpg and a.jpg, in sub-folders"):
            folder = tmp_path / str(number)
            sources = colliding_names(folder / "in", dice, "RGB")
            code, errors = predict(folder, "--workers", 0)
            assert code == 0, errors
            assert_complete(folder / "masks", len(sources))
            assert_own_outputs(folder / "masks", sources)


HARD_NAMES = [
    b"new\nline", b"-dash", b"--out", b"[red]bold[/red]", b"*", b"?", b"a b  c", b"\xff\xfe", b"\xe4\xf6",
    "é".encode(), "e\u0301".encode(), "日本語".encode(), "🙂".encode(), b"tab\there", b"\x1b[31m", b"~",
    b"%s%d", b"$HOME", b"`x`", b"'", b'"', b"\\", b"#", b"x" * 251, "é".encode() * 125, b"a.b.c.d",
    b"con", b"trailing.", b"trailing ", b" leading", b"\x07", b"{}", b"<>", b"|", b"&", b";", b"(",
    b"\xf0\x9f\x99", b"\xc3", b"\xed\xa0\x80", b"null", b"..x", b"x..", b"=", b"@", b"!", b"^", b"_", b"__",
    b"_run", b"cr\rlf",
]  # fmt: skip


def test_13_names_of_all_kinds(tmp_path: Path) -> None:
    data = io.BytesIO()
    Image.fromarray(picture(16, 24)).save(data, "PNG")
    names = HARD_NAMES if FULL else HARD_NAMES[:26]
    for name in names:
        path = tmp_path / "in" / os.fsdecode(name[:251] + b".png")
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(data.getvalue())
    bad = tmp_path / "in" / os.fsdecode(b"bad\n\xff\x1b[2J.png")
    bad.write_bytes(b"")
    visible = [name for name in names if not name.startswith(b".")]  # dot files are hidden, and counted
    code, errors = predict(tmp_path, "--workers", 0, "--json")
    assert code == 1
    assert_clean(errors)
    assert errors.splitlines()[-1] == "  in/bad\\n\\udcff\\x1b[2J.png: the file is empty"
    lines = assert_complete(tmp_path / "masks", len(visible) + 1)
    for name in visible:
        with Row("13 names with Unicode, newlines, invalid bytes, 255 bytes"):
            source = tmp_path / "in" / os.fsdecode(name[:251] + b".png")
            assert lines[str(source)]["status"] == "done"
    listing = b"\0".join(os.fsencode(source) for source in lines)
    (tmp_path / "list").write_bytes(listing)
    code, errors = run(
        "predict", "--list", "list", "--out", "listed", *model(), "--workers", 0, folder=tmp_path
    )
    assert code == 1
    assert len(manifest(tmp_path / "listed")) == len(lines)


def test_14_links_pipes_devices_and_folders_inside(tmp_path: Path) -> None:
    source = tmp_path / "in"
    save_picture(source / "a.png")
    save_picture(source / "sub/b.png")
    (source / "loop").symlink_to(".")
    (source / "sub/up").symlink_to("..")
    (source / "self").symlink_to("self")
    (source / "dangling.jpg").symlink_to("nowhere.jpg")
    (source / "alias.jpg").symlink_to("a.png")
    os.mkfifo(source / "pipe.jpg")
    server = socket.socket(socket.AF_UNIX)
    server.bind(str(source / "socket.jpg"))
    failed = {"dangling.jpg", "pipe.jpg", "socket.jpg"}
    if not os.geteuid():
        os.mknod(source / "zero.jpg", 0o666 | 0o020000, os.makedev(1, 5))
        failed.add("zero.jpg")
    else:
        save_picture(source / "locked.jpg").chmod(0)
        failed.add("locked.jpg")
    for out in ("masks", "in/masks", "in/sub/masks", "in/sub/deep/masks", "in/a.masks"):
        for _ in range(2):  # the second time its own outputs are there
            with Row("14 links, pipes, devices, the output inside the input"):
                code, errors = predict(tmp_path, "--out", out)
                assert code == 1
                assert_clean(errors)
                lines = assert_complete(tmp_path / out, 3 + len(failed))
                assert {Path(s).name for s, line in lines.items() if line["status"] == "failed"} == failed
    server.close()


# ---- 15: many files ----

MANY = """
import resource, sys, threading, time
from pathlib import Path
import numpy as np
from segcli.images import SUFFIXES, encode_mask
from segcli.inference import engine
from segcli.inference.sources import parse
from segcli.inference.storage import Folder
from segcli.palettes import CLASS_SETS

class Thresholds:
    def compute(self, pictures):
        for picture in pictures:
            yield picture, (picture.pixels[..., 0] > 128).astype(np.uint8)
    def encode(self, picture, labels):
        return {"mask": encode_mask(labels, CLASS_SETS["voc"].palette())}, {"background": 1.0}

out = Path(sys.argv[1] + "/masks")
task = engine.Task(parse([sys.argv[1] + "/in"], None, str(out), SUFFIXES), Folder(out), ["mask"], "none",
                   {}, {}, Thresholds, workers=int(sys.argv[2]))
progress = engine.Progress()
memory = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
marks = {}
def watch():
    while progress.inputs < 1: time.sleep(0.02)
    marks["first"] = time.monotonic() - start
    while progress.inputs < 200: time.sleep(0.02)
    marks["memory"] = memory()
start = time.monotonic()
threading.Thread(target=watch, daemon=True).start()
threading.Thread(target=engine.count, args=(task.sources, progress, threading.Event()), daemon=True).start()
engine.run(task, progress)
growth = memory() - marks.get("memory", memory())
print(progress.done, progress.skipped, progress.failed, progress.total,
      round(marks["first"], 2), round(time.monotonic() - start, 1), round(growth))
"""


def test_15_a_hundred_thousand_files(tmp_path: Path) -> None:
    count = tries(100_000, 300)
    originals = [save_picture(tmp_path / f"original{seed}.png", 16, 16, seed) for seed in range(4)]
    for number in range(count):
        folder = tmp_path / f"in/{number // 20_000}"
        folder.mkdir(parents=True, exist_ok=True)
        os.link(originals[number % 4], folder / f"{number:06}.png")

    def result(*words: object) -> list[float]:
        command = [sys.executable, "-c", MANY, str(tmp_path), *map(str, words)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        return [float(word) for word in done.stdout.split()]

    with Row("15 100,000 files: all done, first mask in 30 s, memory flat"):
        done, skipped, failed, total, first, seconds, growth = result(2)
        assert (done, skipped, failed, total) == (count, 0, 0, count)
        assert first < 30
        assert growth < 200
        print(f"\n{count} files: first after {first} s, all after {seconds} s, {growth} MB more memory")
    with Row("15 100,000 files: a run with nothing to do under 60 s"):
        done, skipped, failed, total, first, seconds, growth = result(2)
        assert (done, skipped, failed) == (0, count, 0)
        assert seconds < 60
        assert growth < 200
        print(f"nothing to do: {seconds} s, {growth} MB more memory")
    assert len(manifest(tmp_path / "masks")) == count


# ---- 16, 17: others at work ----


def has_mask(out: Path) -> bool:
    return any(out.glob("[0-9]*.png"))


def test_16_inputs_that_change_during_the_run(tmp_path: Path) -> None:
    dice = random.Random(16)
    contents = {}
    for seed in range(2):
        data = io.BytesIO()
        Image.fromarray(picture(32, 48, seed)).save(data, "PNG")
        contents[seed] = data.getvalue()
    for number in range(tries(30, 2)):
        with Row("16 inputs deleted, replaced or growing during the run"):
            folder = tmp_path / str(number)
            (folder / "in").mkdir(parents=True)
            paths = [folder / f"in/{n:02}.png" for n in range(24)]
            for path in paths:
                path.write_bytes(contents[0])
            process = Process("predict", "in", *model(), "--workers", 1, folder=folder)
            # Once there is a mask the folder has been listed, so what is deleted now was an input.
            wait_until(functools.partial(has_mask, folder / "masks"))
            victims = dice.sample(paths, 12)
            for victim in victims:
                fate = dice.choice(["delete", "replace", "grow", "shrink"])
                if fate == "delete":
                    victim.unlink()
                elif fate == "replace":
                    new = victim.with_suffix(".new")
                    new.write_bytes(contents[1])
                    new.replace(victim)
                elif fate == "grow":
                    with victim.open("ab") as file:
                        file.write(b"more")
                else:
                    os.truncate(victim, 300)
                time.sleep(dice.random() / 20)
            code = process.wait()
            assert code in (0, 1), process.errors
            assert_clean(process.errors)
            lines = assert_complete(folder / "masks", 24)
            masks = {(folder / "masks" / line["output"]).read_bytes()
                     for line in lines.values() if line["output"]}  # fmt: skip
            assert len(masks) <= 2  # of the one picture or of the other, never of a mixture
            for path in set(paths) - set(victims):
                assert lines[str(path)]["status"] == "done"


def test_17_two_runs_on_one_folder(twelve: Path, tmp_path: Path) -> None:
    for number in range(tries(20, 2)):
        with Row("17 two runs on one output folder"):
            folder = tmp_path / str(number)
            copy_of(twelve, folder)
            both = [Process("predict", "in", *model(), "--workers", 1, folder=folder) for _ in range(2)]
            codes = sorted(process.wait() for process in both)
            assert codes in ([0, 2], [0, 0])  # refused, or one after the other
            if codes == [0, 2]:
                (refused,) = (p.errors for p in both if "is in use by process" in p.errors)
                assert len(refused.splitlines()) == 1
            assert_complete(folder / "masks", 12)
            assert tree(folder / "masks") == tree(twelve / "masks")


# ---- 22, 23: the same bytes, always ----

# In a process of segcli: a GPU that is too small for more than so many images at a time.
SMALL_MEMORY = """
import torch
from segcli.inference import segmentation
most = {most}
start = segmentation.Segmenter.__init__
def init(self, *arguments, **options):
    start(self, *arguments, **options)
    self.batch_size = 8
    pyramid = self.network.score_pyramid
    def limited(images):
        if len(images) > most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return pyramid(images)
    self.network.score_pyramid = limited
segmentation.Segmenter.__init__ = init
"""


@pytest.mark.parametrize("most", [0, 1, 2, 4, 7] if FULL else [0, 2])
def test_22_out_of_memory_above_a_batch_size(twelve: Path, tmp_path: Path, most: int) -> None:
    with Row("22 out of memory above a batch size"):
        copy_of(twelve, tmp_path)
        code, errors = predict(tmp_path, before=SMALL_MEMORY.format(most=most))
        assert_clean(errors)
        if most:
            assert code == 0, errors
            assert tree(tmp_path / "masks") == tree(twelve / "masks")
        else:
            assert code == 1
            assert errors.count("there is not enough memory to compute 48 x 32 pixels") == 10


def combinations() -> Sequence[tuple[int, int, str, str]]:
    every = list(itertools.product((1, 2, 8), (0, 1, 4), ("sorted", "shuffled"), ("on", "off")))
    return every if FULL else every[1::11]


@pytest.mark.parametrize(("batch", "workers", "order", "tile"), combinations())
def test_23_batches_workers_order_and_strips(
    twelve: Path, tmp_path: Path, batch: int, workers: int, order: str, tile: str
) -> None:
    with Row("23 batch size x workers x order x tile"):
        copy_of(twelve, tmp_path)
        files = [str(path.relative_to(tmp_path)) for path in sorted((tmp_path / "in").rglob("*.png"))]
        if order == "shuffled":
            random.Random(f"{batch}{workers}").shuffle(files)
        options = ["--out", "masks", "--batch-size", batch, "--workers", workers, "--tile", tile]
        code, errors = run("predict", *files, *model(), *options, folder=tmp_path)
        assert code == 0, errors
        assert tree(tmp_path / "masks") == tree(twelve / "masks")


# ---- 28: the same for colorize and evaluate ----


def colorize(folder: Path, *arguments: object) -> tuple[int, str]:
    return run("colorize", "in", *arguments, folder=folder)


def test_28_colorize_reports_broken_masks(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    count = tries(1000, 40)
    for name, data in broken_files(count, 28, good_masks):
        (tmp_path / "in" / name).write_bytes(data)
    code, errors = colorize(tmp_path, "--out", "out", "--workers", 2)
    assert code == 1
    assert_clean(errors)
    lines = manifest(tmp_path / "out")
    assert len(lines) == count
    for line in lines.values():
        with Row("28 colorize: broken masks"):
            assert line["status"] == "done" or line["reason"]
            if line["status"] == "done":
                with Image.open(tmp_path / "out" / line["output"]) as image:
                    image.load()
                    assert (image.mode, image.size) == ("RGB", (line["width"], line["height"]))
    assert any(line["status"] == "done" for line in lines.values())


def test_28_colorize_on_a_full_disk(twelve: Path, tmp_path: Path, disk: Path) -> None:
    shutil.copytree(twelve / "masks", tmp_path / "in", ignore=shutil.ignore_patterns("_*"))
    assert colorize(tmp_path, "--out", "out")[0] == 0
    clean = tree(tmp_path / "out")
    assert_a_full_disk_is_survived(
        "28 colorize: a full disk", disk, 12 * 1024, clean,
        lambda out: colorize(tmp_path, "--out", out), complete_files,
    )  # fmt: skip


def test_28_colorize_killed_and_run_again(twelve: Path, tmp_path: Path) -> None:
    shutil.copytree(twelve / "masks", tmp_path / "in", ignore=shutil.ignore_patterns("_*"))
    assert colorize(tmp_path, "--out", "whole")[0] == 0
    clean = tree(tmp_path / "whole")
    out = tmp_path / "out"
    dice = random.Random(28)
    for _ in range(tries(100, 3)):
        with Row("28 colorize: kill -9 at a random moment"):
            process = Process("colorize", "in", "--out", "out", "--workers", 1, folder=tmp_path)
            wait_for_files(process, out, len(list(out.rglob("*.*"))) + dice.randrange(1, 6))
            process.kill_group()
            process.wait()
            wait_until(process.group_is_gone)
            partial = complete_files(out)
            assert partial.items() <= clean.items()
        if partial == clean:
            shutil.rmtree(out)
    assert colorize(tmp_path, "--out", "out")[0] == 0
    assert tree(out) == clean
    assert not list(out.rglob(".segcli-*"))


def test_28_colorize_keeps_names_that_collide_apart(tmp_path: Path) -> None:
    dice = random.Random(2812)
    for number in range(tries(50, 2)):
        with Row("28 colorize: names that collide"):
            folder = tmp_path / str(number)
            sources = colliding_names(folder / "in", dice, "L")
            code, errors = colorize(folder, "--out", "out", "--workers", 0)
            assert code == 0, errors
            assert_own_outputs(folder / "out", sources)


def evaluate(folder: Path, *arguments: object, out: Path | str = "out") -> tuple[int, str]:
    """Score the masks in `in` against the labels in `truth`."""
    options = ["--classes", "voc", "--out", out]
    return run("evaluate", "--pred", "in", "--labels", "truth", *options, *arguments, folder=folder)


def scores(folder: Path) -> dict[str, Any]:
    document: dict[str, Any] = json.loads((folder / "out/scores.json").read_text())
    return document


@pytest.fixture
def labelled(twelve: Path, tmp_path: Path) -> Path:
    """A folder with twelve masks in `in`, their labels in `truth`, and in `whole` what they score."""
    for name in ("in", "truth"):
        shutil.copytree(twelve / "masks", tmp_path / name, ignore=shutil.ignore_patterns("_*"))
    code, errors = evaluate(tmp_path, out="whole")
    assert code == 0, errors
    return tmp_path


@pytest.mark.parametrize("broken", ["in", "truth"])
def test_28_evaluate_reports_broken_masks(tmp_path: Path, broken: str) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "truth").mkdir()
    count = tries(500, 20)
    good = good_masks()["palette.png"]
    for name, data in broken_files(count, 281, good_masks):
        for folder in ("in", "truth"):
            content = data if folder == broken else good
            path = tmp_path / folder / name
            (path if folder == broken else path.with_suffix(".png")).write_bytes(content)
    code, errors = evaluate(tmp_path, "--workers", 2)
    assert code == 1
    assert_clean(errors)
    found = scores(tmp_path)
    assert found["images"] > 0
    problems = {failure["name"]: failure["problem"] for failure in found["failed"]}
    with (tmp_path / "out/images.csv").open() as file:
        for line in csv.DictReader(file):
            with Row("28 evaluate: broken masks and labels"):
                assert bool(line["pixel_accuracy"]) != (line["name"] in problems)
                assert "\n" not in problems.get(line["name"], "")
                count -= 1
    assert count == 0


def test_28_evaluate_killed_and_run_again(labelled: Path) -> None:
    clean = tree(labelled / "whole")
    out = labelled / "out"
    dice = random.Random(287)
    for _ in range(tries(100, 3)):
        with Row("28 evaluate: kill -9 at a random moment"):
            process = Process(
                "evaluate", "--pred", "in", "--labels", "truth", "--classes", "voc", "--out", "out",
                folder=labelled,
            )  # fmt: skip
            wait_for_files(process, out, dice.randrange(1, 7))
            process.kill_group()
            process.wait()
            wait_until(process.group_is_gone)
            partial = complete_files(out)
            assert partial.items() <= clean.items()
        if dice.random() < 0.5:
            shutil.rmtree(out, ignore_errors=True)
    out.mkdir(exist_ok=True)
    (out / ".segcli-half").write_text("what a killed run left half written")
    assert evaluate(labelled)[0] == 0
    assert tree(out) == clean


def test_28_evaluate_on_a_full_disk_and_where_it_cannot_write(labelled: Path, disk: Path) -> None:
    clean = tree(labelled / "whole")
    assert_a_full_disk_is_survived(
        "28 evaluate: a full disk", disk, 8 * 1024, clean, lambda out: evaluate(labelled, out=out)
    )
    (disk / "file").write_text("mine")
    remount(disk, "ro")
    for name in ("new", "file", "file/deeper", "."):
        with Row("28 evaluate: read-only, missing, a file in place of the folder"):
            code, errors = evaluate(labelled, out=disk / name)
            assert (code, len(errors.splitlines())) == (3, 1)
            assert str(disk) in errors


def test_28_evaluate_never_scores_against_another_label(tmp_path: Path) -> None:
    dice = random.Random(2812)
    for number in range(tries(50, 2)):
        with Row("28 evaluate: names that collide"):
            folder = tmp_path / str(number)
            sources = colliding_names(folder / "in", dice, "L")
            for source in sources:  # every mask scores fully against its own label, and no other
                Image.open(source).point(lambda value: value // 13).save(source, "PNG")
            shutil.copytree(folder / "in", folder / "truth")
            code, errors = evaluate(folder, "--workers", 0)
            found = scores(folder) if (folder / "out/scores.json").exists() else {"images": 0, "failed": []}
            assert found["images"] == 0 or found["pixel_accuracy"] == 1
            assert all("more than one mask" in failure["problem"] for failure in found["failed"])
            assert code == (1 if found["failed"] else 0), errors
