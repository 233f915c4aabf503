"""`segcli predict --out-format webdataset`: results in tar files."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import tarfile
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest
from processes import Process, run, wait_until
from results import tree
from small_model import save_picture, small_model

from segcli.cli import main
from segcli.errors import MachineError
from segcli.inference import archives
from segcli.inference.archives import Packer, key_of, pack, unpack
from segcli.inference.layout import PRODUCTS
from segcli.inference.manifest import Entry
from segcli.inference.storage import Folder

NAMES = ["a.png", "b.jpg", "b.png", "c.d.e.png", "50%/100%.png", "v1.0/x.y/z.png", "ü/日 本.png", "%2E.png"]
FEW = "from segcli.inference import archives; archives.SAMPLES = 3"  # of this many tars are written soon

KILLED_IN_THE_MERGE = """
import os, signal
from segcli.inference.storage import Folder
Folder.remove_folder = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.fixture(autouse=True)
def inside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Commands run in an empty folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three samples are a tar."""
    monkeypatch.setattr(archives, "SAMPLES", 3)


def segcli(*arguments: object) -> int:
    with pytest.raises(SystemExit) as caught:
        main([str(argument) for argument in arguments])
    return int(caught.value.code or 0)


def words(out: str = "masks", tars: bool = True) -> list[object]:
    """A command line of `segcli predict`."""
    form = ["--out-format", "webdataset"] if tars else []
    return ["predict", "in", "-o", out, "-m", small_model(), "--workers", 0, *form]


def predict(*arguments: object, out: str = "masks", tars: bool = True) -> int:
    return segcli(*words(out, tars), "-q", *arguments)


def pictures(count: int) -> None:
    for number in range(count):
        save_picture(Path(f"in/{number % 3}/{number}.png"), 24, 32, number)


def tars(out: str = "masks") -> list[Path]:
    return sorted(Path(out).glob("*.tar"))


def members(out: str = "masks") -> dict[str, bytes]:
    """All members of all tars by name. No name occurs twice, and beside tars there is only the record."""
    assert {path.name for path in Path(out).iterdir() if not path.is_dir()} == {t.name for t in tars(out)}
    assert set(tree(out)) == {path.name for path in tars(out)}
    found: dict[str, bytes] = {}
    for path in tars(out):
        with tarfile.open(path) as tar:
            for member in tar:
                content = tar.extractfile(member)
                assert content is not None
                assert member.name not in found
                found[member.name] = content.read()
    return found


def as_members(out: str) -> dict[str, bytes]:
    """What the tars should hold, but the JSON files, made of the files of a run without tars."""
    found = {}
    for name, data in tree(out).items():
        kind = name.partition("/")[0].removeprefix("_") if name.startswith("_") else "mask"
        below = name.partition("/")[2] if name.startswith("_") else name
        found[f"{key_of(below)}.{kind}{Path(name).suffix}"] = data
    return found


def without_json(found: Mapping[str, bytes]) -> dict[str, bytes]:
    return {name: data for name, data in found.items() if not name.endswith(".json")}


def lines(out: str = "masks", record: str = "_run") -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(out, record, "manifest.jsonl").read_text().splitlines()]


def statuses(out: str = "masks") -> Counter[str]:
    return Counter(line["status"] for line in lines(out))


def times() -> dict[str, int]:
    """When the tars were written."""
    return {path.name: path.stat().st_mtime_ns for path in tars()}


# ---- what a tar holds ----


def test_keys_are_what_webdataset_makes_of_them() -> None:
    for output, key in (
        ("a/b.png", "a/b"),
        ("v1.0/b.jpg.png", "v1.0/b%2Ejpg"),
        ("a_b/.b.png", "a_b/%2Eb"),
        ("50%/%2E.png", "50%25/%252E"),
    ):
        assert key_of(output) == key
        assert unquote(key) == output.removesuffix(".png")
        assert "." not in key.rpartition("/")[2]


def test_members_are_the_files_of_a_run_without_tars(few: None) -> None:
    for seed, name in enumerate(NAMES):
        save_picture(Path("in") / name, 24, 32, seed)
    Path("in/bad.jpg").write_text("hello")
    everything = ",".join(kind for kind in PRODUCTS if kind != "geometric")
    assert predict("--save", everything, out="files", tars=False) == 1
    assert predict("--save", everything) == 1
    found = members()
    assert without_json(found) == as_members("files")
    assert len(found) == len(NAMES) * 7  # six products and what is known of them
    assert len(tars()) == 3
    for entry, noted in zip(
        sorted(lines(), key=lambda e: e["source"]),
        sorted(lines("files"), key=lambda e: e["source"]),
        strict=True,
    ):
        assert entry["output"] == noted["output"]
        if entry["status"] == "done":
            about = json.loads(found[f"{key_of(entry['output'])}.json"])
            assert about == {key: noted[key] for key in ("source", "width", "height", "classes")}
            assert {kind: (c["size"], c["sha256"]) for kind, c in entry["files"].items()} == {
                kind: (c["size"], c["sha256"]) for kind, c in noted["files"].items()
            }
            tar = Path("masks", entry["archive"]["name"])
            assert hashlib.sha256(tar.read_bytes()).hexdigest() == entry["archive"]["content"]["sha256"]


def test_tars_are_by_nobody_and_sorted() -> None:
    samples = {key: {"mask.png": key.encode(), "json": b"{}"} for key in ("b", "a/ü", "a/" + 200 * "x", "a")}
    data = pack(samples)
    assert data == pack(dict(reversed(samples.items())))
    assert unpack(data) == samples
    Path("a.tar").write_bytes(data)
    with tarfile.open("a.tar") as tar:
        keys = [key for key in ("a", "a/" + 200 * "x", "a/ü", "b") for _ in range(2)]
        assert [member.name.partition(".")[0] for member in tar] == keys
        for member in tar:
            assert (member.mtime, member.uid, member.gid, member.mode) == (0, 0, 0, 0o644)
            assert (member.uname, member.gname) == ("", "")
    assert unpack(data[: len(data) // 2]).keys() < samples.keys()
    assert unpack(b"junk") == {}


def test_names_that_are_not_utf8() -> None:
    save_picture(Path("in/a.png"), 24, 32)
    Path("in/a.png").rename(os.fsdecode(b"in/\xff.png"))
    assert predict() == 0
    assert sorted(map(os.fsencode, members())) == [b"\xff.json", b"\xff.mask.png", b"\xff.overlay.jpg"]
    assert predict() == 0
    assert statuses() == {"skipped": 1}


def test_two_inputs_with_one_key_are_reported(capsys: pytest.CaptureFixture[str]) -> None:
    save_picture(Path("in/sub/a.png"), 24, 32, 0)
    arguments = ["-o", "masks", "-m", small_model(), "--workers", 0, "--out-format", "webdataset"]
    assert segcli("predict", "in/sub", *arguments) == 0
    clean = members()
    save_picture(Path("in/a.png"), 24, 32, 1)
    capsys.readouterr()
    assert segcli("predict", "in/a.png", *arguments) == 1
    assert f"in/a.png: a.png holds the result of {Path('in/sub/a.png').absolute()}" in capsys.readouterr().err
    assert members() == clean


def test_a_tar_ends_at_so_many_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    noted: list[str] = []
    packer = Packer(
        Folder(Path("out")), lambda entries: noted.extend(e.source for e in entries), memory=32 * 250
    )
    for number in range(7):
        packer.add(Entry(f"{number}", f"{number}.png", "done"), {"mask": 100 * b"x"})
    packer.close()
    assert noted == [f"{number}" for number in range(7)]
    assert packer.unnoted == 0
    assert sorted(len(unpack(path.read_bytes())) for path in tars("out")) == [1, 3, 3]  # 250 bytes are 3


def test_a_tar_that_cannot_be_written_ends_the_run(few: None) -> None:
    Path("out").write_text("a file")
    noted: list[Entry] = []
    packer = Packer(Folder(Path("out")), noted.extend)

    def add_two_tars() -> None:
        for number in range(6):
            packer.add(Entry(f"{number}", f"{number}.png", "done"), {"mask": b"x"})

    with pytest.raises(MachineError, match="cannot write"):
        add_two_tars()
    with pytest.raises(MachineError, match="cannot write"):
        packer.close()
    assert noted == []
    assert packer.unnoted > 0


# ---- again ----


def test_again_does_nothing(few: None) -> None:
    pictures(7)
    assert predict() == 0
    before = times()
    assert len(before) == 3
    assert predict() == 0
    assert statuses() == {"skipped": 7}
    assert times() == before
    shutil.copytree("masks", "moved")  # other times of the files
    assert predict(out="moved") == 0
    assert statuses("moved") == {"skipped": 7}


@pytest.mark.parametrize("damage", ["junk", "half", "missing", "empty"])
def test_a_damaged_tar_is_made_again(few: None, damage: str) -> None:
    pictures(7)
    assert predict() == 0
    clean = members()
    tar = tars()[0]
    samples = len(unpack(tar.read_bytes()))
    data = tar.read_bytes()
    tar.unlink()
    if damage != "missing":
        tar.write_bytes({"junk": b"x" * len(data), "half": data[: len(data) // 2], "empty": b""}[damage])
    assert predict() == 0
    assert statuses() == {"done": samples, "skipped": 7 - samples}
    assert members() == clean


def test_a_changed_input_leaves_no_old_sample(few: None) -> None:
    pictures(7)
    assert predict() == 0
    clean = members()
    save_picture(Path("in/1/4.png"), 24, 32, 99)
    assert predict() == 0
    assert statuses() == {"done": 1, "skipped": 6}
    found = members()
    assert found.keys() == clean.keys()
    assert {name.partition(".")[0] for name in found if found[name] != clean[name]} == {"1/4"}
    assert predict(out="whole") == 0
    assert found == members("whole")
    before = times()
    assert predict() == 0
    assert (statuses(), times()) == ({"skipped": 7}, before)


def test_an_input_that_can_no_longer_be_read_leaves_no_sample(few: None) -> None:
    pictures(4)
    assert predict() == 0
    Path("in/1/1.png").write_text("hello")
    assert predict() == 1
    assert {name.partition(".")[0] for name in members()} == {"0/0", "2/2", "0/3"}


def test_results_of_inputs_that_are_gone_stay_unless_their_tar_is_damaged(few: None) -> None:
    pictures(7)
    assert predict() == 0
    clean = members()
    tar = next(Path("masks", line["archive"]["name"]) for line in lines() if line["output"] == "1/4.png")
    inside = list(unpack(tar.read_bytes()))
    gone = next(key for key in inside if key != "1/4")
    Path(f"in/{gone}.png").unlink()
    save_picture(Path("in/1/4.png"), 24, 32, 99)
    shutil.copytree("masks", "other")
    assert predict() == 0
    assert members().keys() == clean.keys()

    Path("other", tar.name).write_bytes(b"junk")
    assert predict(out="other") == 0
    assert members("other").keys() == {n for n in clean if not n.startswith(f"{gone}.")}
    failed = [line for line in lines("other") if line["status"] == "failed"]
    assert [line["source"] for line in failed] == [str(Path(f"in/{gone}.png").absolute())]
    assert failed[0]["reason"] == (
        f"{tar.name}, which held its results, is damaged; run the same command again"
    )


def test_overwrite_and_more_to_save(few: None) -> None:
    pictures(5)
    assert predict("--save", "mask") == 0
    masks = members()
    assert predict("--save", "mask", "--overwrite") == 0
    assert statuses() == {"done": 5}
    assert members() == masks
    assert predict() == 0
    assert statuses() == {"done": 5}
    found = members()
    assert len(found) == 15
    assert {name: found[name] for name in masks} == masks
    assert predict("--save", "overlay") == 0  # it is there
    assert statuses() == {"skipped": 5}


# ---- files or tars ----


def test_a_folder_holds_one_or_the_other(few: None, capsys: pytest.CaptureFixture[str]) -> None:
    pictures(5)
    assert predict(tars=False) == 0
    files = tree("masks")
    capsys.readouterr()
    assert predict() == 2
    assert capsys.readouterr().err.splitlines() == [
        "Error: masks holds results of other settings: out_format files, now webdataset.",
        "Choose another --out, or give --overwrite to do everything again.",
    ]
    assert predict("--overwrite") == 0
    assert len(members()) == 15
    assert predict(tars=False) == 2
    assert predict("--overwrite", tars=False) == 0
    assert tree("masks") == files
    assert predict("--out-format", "zip") == 2
    assert "--out-format 'zip' is unknown; use files or webdataset" in capsys.readouterr().err


def test_the_record_of_files_is_as_before_there_were_tars() -> None:
    """So folders that were begun by an earlier version go on."""
    pictures(1)
    assert predict(tars=False) == 0
    settings = json.loads(Path("masks/_run/run.json").read_text())["settings"]
    assert sorted(settings) == ["opacity", "precision", "runtime", "size", "tta", "weights"]
    assert "archive" not in lines()[0]


# ---- stopped in the middle ----


@pytest.mark.parametrize(
    ("number", "processes"),
    [(signal.SIGINT, 1), (signal.SIGTERM, 1), (signal.SIGKILL, 1), (signal.SIGINT, 2)],
)
def test_stopped_and_run_again(tmp_path: Path, number: signal.Signals, processes: int) -> None:
    pictures(60)
    command = [*words(), "--processes", processes]
    process = Process(*command, folder=tmp_path, before=FEW)
    record = Path("masks/_run/manifest.jsonl")
    wait_until(lambda: record.exists() and b'"done"' in record.read_bytes())
    if number == signal.SIGKILL:
        process.kill_group()
        assert process.wait() == -number
    else:
        process.send(number)
        assert process.wait() == 128 + number
    noted = len(lines())
    assert 0 < noted < 60
    if number != signal.SIGKILL:
        held = [unpack(path.read_bytes()) for path in tars()]
        assert sum(map(len, held)) == noted  # what was in flight is written, and noted
    assert run(*words(), folder=tmp_path)[0] == 0
    assert statuses() == {"skipped": noted, "done": 60 - noted}
    found = members()
    assert predict(out="whole") == 0
    assert found == members("whole")
    assert len(lines()) == 60


def test_a_full_disk(tmp_path: Path) -> None:
    pictures(7)
    full = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (9000, 9000))"  # no tar is that small
    code, errors = run(*words(), folder=tmp_path, before=f"{FEW}\n{full}")
    assert code == 3
    assert "Error: cannot write masks/masks-" in errors
    assert tree("masks") == {}
    state = json.loads(Path("masks/_run/run.json").read_text())
    assert (state["state"], state["done"]) == ("failed", 0)
    assert predict() == 0
    assert statuses() == {"done": 7}
    assert len(members()) == 21


def test_what_a_kill_leaves_between_a_tar_and_its_lines(few: None) -> None:
    pictures(6)
    assert predict() == 0
    clean = members()
    record = Path("masks/_run/manifest.jsonl")
    old = record.read_bytes().splitlines(keepends=True)
    record.write_bytes(b"".join(old[:4]) + old[4][:50])  # of the second tar one line, and a torn one
    run_file = Path("masks/_run/run.json")
    run_file.write_text(run_file.read_text().replace('"finished"', '"running"'))
    Path("masks/masks-0123456789abcdef.tar").write_bytes(b"not noted at all")
    Path("masks/masks-mine.tar").write_bytes(b"not by segcli")
    assert predict() == 0
    assert Path("masks/masks-mine.tar").read_bytes() == b"not by segcli"
    Path("masks/masks-mine.tar").unlink()
    assert statuses() == {"skipped": 4, "done": 2}
    assert members() == clean


# ---- shards and processes ----


@pytest.fixture
def whole() -> dict[str, bytes]:
    """The members that one undisturbed run makes of 60 pictures."""
    pictures(60)
    assert predict(out="whole") == 0
    return members("whole")


def test_two_processes(whole: dict[str, bytes], tmp_path: Path) -> None:
    Path("in/bad.jpg").write_text("hello")
    code, errors = run(*words(), "--processes", 2, folder=tmp_path, before=FEW)
    assert code == 1, errors
    assert "Results are in masks, in tar files." in errors
    assert members() == whole
    assert statuses() == {"done": 60, "failed": 1}


def test_shards_of_which_one_is_killed(whole: dict[str, bytes], tmp_path: Path) -> None:
    process = Process(*words(), "--shard", "2/2", folder=tmp_path, before=FEW)
    record = Path("masks/_run/shards-of-2/2/manifest.jsonl")
    wait_until(lambda: record.exists() and b'"done"' in record.read_bytes())
    process.kill_group()
    assert process.wait() == -signal.SIGKILL
    noted = len(lines(record="_run/shards-of-2/2"))
    for shard in ("1/2", "2/2"):
        assert run(*words(), "--shard", shard, folder=tmp_path, before=FEW)[0] == 0
    Path("masks/masks-0123456789abcdef.tar").write_bytes(b"not noted")
    assert segcli("runs", "merge", "masks") == 0
    assert members() == whole
    assert statuses() == {"skipped": noted, "done": 60 - noted}
    save_picture(Path("in/0/0.png"), 24, 32, 99)  # its old sample lies in the tar of a shard
    for shard in ("1/2", "2/2"):
        assert predict("--shard", shard) == 0
    code, _ = run("runs", "merge", "masks", folder=tmp_path, before=KILLED_IN_THE_MERGE)
    assert code == -signal.SIGKILL
    assert segcli("runs", "merge", "masks") == 0
    assert members().keys() == whole.keys()
    assert len(lines()) == 60
