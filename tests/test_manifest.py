"""The record of an output folder: what survives a kill, what is refused, what is done again."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from segcli.errors import MachineError, UsageError
from segcli.files import sha256
from segcli.inference.layout import PRODUCTS, file_of, mask_of
from segcli.inference.manifest import (
    Entry,
    digest,
    finished_entry,
    open_manifest,
    read_run,
    refuse_other_settings,
    remove_others,
    write_run,
)
from segcli.inference.sources import Input
from segcli.inference.storage import Content, Folder, content_now, describe, open_storage

SETTINGS = digest({"weights": "abc"})


def content(path: Path) -> Content:
    return describe(path, path.read_bytes())


@pytest.fixture
def done(tmp_path: Path) -> tuple[Input, Entry, Path]:
    """An input, the entry about its finished result, and the output folder."""
    source, out = tmp_path / "a.jpg", tmp_path / "masks"
    source.write_bytes(b"photograph")
    files = {}
    for kind in ("mask", "overlay"):
        path = out / file_of("a.png", kind)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(kind.encode())
        files[kind] = content(path)
    entry = Entry(str(source), "a.png", "done", settings=SETTINGS, input=content(source), files=files)
    return Input(str(source), "a.png"), entry, out


def decide(done: tuple[Input, Entry, Path], **changes: object) -> Entry | None:
    item, entry, out = done
    values = {
        "entry": entry,
        "item": item,
        "settings": SETTINGS,
        "kinds": ["mask", "overlay"],
        "out": Folder(out),
        "archive_now": lambda archive: None,
    }
    return finished_entry(**(values | changes))  # type: ignore[arg-type]


def test_places_of_products() -> None:
    assert file_of("a/b.png", "mask") == "a/b.png"
    assert file_of("a/b.jpg.png", "overlay") == "_overlay/a/b.jpg.jpg"
    assert file_of("b.png", "scores") == "_scores/b.npz"
    for kind in PRODUCTS:
        assert mask_of(file_of("a/b.c.png", kind)) == "a/b.c.png"


def test_a_line_survives_a_round_trip(done: tuple[Input, Entry, Path]) -> None:
    entry = dataclasses.replace(
        done[1], classes={"sky": 0.25}, notes=("first of 12 frames",), source="/x/\udcff\n[red].jpg"
    )
    line = entry.line()
    assert line.isascii()
    assert line.count(b"\n") == 1
    parsed = Entry.parse(line)
    assert parsed is not None
    assert dataclasses.replace(parsed, notes=tuple(parsed.notes)) == entry
    assert Entry.parse(line[:-20]) is None
    assert Entry.parse(b"[1]\n") is None
    assert Entry.parse(b'{"surprise": 1}\n') is None


def test_results_are_found_again_and_a_torn_line_is_cut_off(tmp_path: Path) -> None:
    with open_manifest(Folder(tmp_path)) as manifest:
        for name in ("a", "b", "c"):
            manifest.append(Entry(f"/in/{name}.jpg", f"{name}.png", "done"))
        manifest.append(Entry("/in/d.jpg", None, "failed", "the file is empty"))
        path = manifest.path
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"source": "/in/e.jpg", "outp')
    with open_manifest(Folder(tmp_path)) as manifest:
        assert len(manifest) == 3
        assert manifest.find("b.png") == Entry("/in/b.jpg", "b.png", "done", notes=[])
        assert manifest.find("d.png") is None
        manifest.append(Entry("/in/e.jpg", "e.png", "done"))
    assert path.read_bytes() == whole + Entry("/in/e.jpg", "e.png", "done").line()
    path.write_bytes(whole.replace(b"/in/b.jpg", b'/in/"b.jpg'))  # damaged in the middle
    with open_manifest(Folder(tmp_path)) as manifest:
        assert len(manifest) == 2
        assert manifest.find("b.png") is None


def test_every_input_has_one_line_in_the_end(tmp_path: Path) -> None:
    with open_manifest(Folder(tmp_path)) as manifest:
        manifest.append(Entry("/in/a.jpg", None, "failed", "no such file"))
        manifest.append(Entry("/in/b.jpg", "b.png", "done"))
        manifest.append(Entry("/in/a.jpg", "a.png", "done"))
        manifest.append(Entry("/in/b.jpg", "b.png", "skipped", "done before"))
        manifest.append(Entry("/moved/c.jpg", "c.png", "done"))
        manifest.append(Entry("/in/c.jpg", "c.png", "skipped", "done before"))
        manifest.compact()
        lines = [json.loads(line) for line in manifest.path.read_text().splitlines()]
    assert [(line["source"], line["status"]) for line in lines] == [
        ("/in/a.jpg", "done"),
        ("/in/b.jpg", "skipped"),
        ("/in/c.jpg", "skipped"),
    ]


def test_an_output_can_be_claimed_once(tmp_path: Path) -> None:
    with open_manifest(Folder(tmp_path)) as manifest:
        assert manifest.claim(Input("a.jpg", "a.png"))
        assert not manifest.claim(Input("A.jpg", "a.png"))
        assert manifest.claim(Input("A.jpg", "A.png"))
    (tmp_path / "_run/LOCK").write_text("")  # as a file system that ignores case would show it
    with open_manifest(Folder(tmp_path)) as manifest:
        assert manifest.claim(Input("a.jpg", "a.png"))
        assert not manifest.claim(Input("A.jpg", "A.png"))


def test_a_result_stands_while_nothing_has_changed(done: tuple[Input, Entry, Path]) -> None:
    assert decide(done) == done[1]
    assert decide(done, entry=None) is None
    assert decide(done, settings=digest({"weights": "xyz"})) is None
    assert decide(done, kinds=["mask", "color"]) is None
    assert decide(done, kinds=["mask"]) == done[1]


def test_a_changed_input_is_done_again(done: tuple[Input, Entry, Path]) -> None:
    source = Path(done[0].source)
    times = (source.stat().st_atime_ns, source.stat().st_mtime_ns)
    source.write_bytes(b"PHOTOGRAPH")  # of the same size, and dated back
    os.utime(source, ns=times)
    assert decide(done) is None
    source.write_bytes(b"photographs")
    assert decide(done) is None
    source.unlink()
    assert decide(done) is None


def test_a_touched_or_moved_input_is_not(done: tuple[Input, Entry, Path], tmp_path: Path) -> None:
    item, entry, _ = done
    os.utime(item.source, ns=(1, 1))
    renewed = decide(done)
    assert renewed is not None
    assert renewed.input is not None
    assert (renewed.input.mtime_ns, renewed.input.sha256) == (1, sha256(Path(item.source)))
    moved = tmp_path / "moved.jpg"
    Path(item.source).rename(moved)
    renewed = decide(done, item=Input(str(moved), "a.png"))
    assert renewed is not None
    assert renewed.source == str(moved)
    assert renewed.files == entry.files


def test_another_file_never_takes_the_place_of_a_result(
    done: tuple[Input, Entry, Path], tmp_path: Path
) -> None:
    other = tmp_path / "other.jpg"
    other.write_bytes(b"another photograph")
    with pytest.raises(FileExistsError, match=r"a\.jpg"):
        decide(done, item=Input(str(other), "a.png"))
    Path(done[0].source).unlink()  # the first one is gone: its place is free
    assert decide(done, item=Input(str(other), "a.png")) is None


@pytest.mark.parametrize("junk", [b"", b"mas", b"junk", b"something longer"])
def test_junk_in_place_of_a_result_is_found(junk: bytes, done: tuple[Input, Entry, Path]) -> None:
    mask = done[2] / "a.png"
    mask.write_bytes(junk)
    assert decide(done) is None
    mask.unlink()
    assert decide(done) is None
    mask.mkdir()
    assert decide(done) is None
    mask.rmdir()
    mask.write_bytes(b"mask")  # the right content, whatever its date
    assert decide(done) is not None


def test_content_is_hashed_only_when_it_has_to_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"abc")
    noted = content(path)
    monkeypatch.setattr("segcli.inference.storage.sha256", lambda path: pytest.fail("hashed"))
    assert content_now(str(path), noted) is noted
    assert content_now(str(path), dataclasses.replace(noted, size=4)) is None
    assert content_now(str(path), None) is None
    assert content_now(str(tmp_path / "gone"), noted) is None


def test_outdated_products_that_are_not_made_again_go(done: tuple[Input, Entry, Path]) -> None:
    item, entry, out = done
    remove_others(entry, item, ["mask"], Folder(out))
    assert [path.name for path in out.rglob("*") if path.is_file()] == ["a.png"]


def test_other_settings_are_refused_by_name(tmp_path: Path) -> None:
    refuse_other_settings(Folder(tmp_path), {"size": None})  # a new folder
    write_run(Folder(tmp_path), {"settings": {"weights": "f" * 64, "size": None}})
    assert read_run(Folder(tmp_path))["settings"]["size"] is None
    refuse_other_settings(Folder(tmp_path), {"weights": "f" * 64, "size": None})
    with pytest.raises(UsageError) as caught:
        refuse_other_settings(Folder(tmp_path), {"weights": "e" * 64, "size": 500})
    assert str(caught.value).splitlines() == [
        f"{tmp_path} holds results of other settings: size unset, now 500; "
        "weights ffffffffffff..., now eeeeeeeeeeee....",
        "Choose another --out, or give --overwrite to do everything again.",
    ]
    (tmp_path / "_run/run.json").write_text('{"settings"')
    assert read_run(Folder(tmp_path)) == {}


def test_leftovers_of_a_killed_run_go_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub/.segcli-k3j2").write_bytes(b"half")
    (tmp_path / "sub/kept.png").write_bytes(b"x")
    with open_manifest(Folder(tmp_path)):
        assert [path.name for path in (tmp_path / "sub").iterdir()] == ["kept.png"]
        write_run(Folder(tmp_path), {"state": "finished"})
    with open_manifest(Folder(tmp_path)):
        assert sorted(path.name for path in (tmp_path / "_run").iterdir()) == [
            "lock",
            "manifest.jsonl",
            "run.json",
        ]


def test_a_second_process_is_refused_and_a_dead_one_is_not_waited_for(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from segcli.inference.manifest import open_manifest\n"
        "from segcli.inference.storage import Folder\n"
        "with open_manifest(Folder(Path(sys.argv[1]))): print('open', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"open\n"
        message = f"is in use by process {holder.pid} on .* since 20"
        with pytest.raises(UsageError, match=message), open_manifest(Folder(tmp_path)):
            pytest.fail("opened twice")
        holder.kill()
        holder.wait()
        with open_manifest(Folder(tmp_path)) as manifest:  # its lock went with it
            manifest.append(Entry("/in/a.jpg", "a.png", "done"))


def test_an_impossible_folder_is_named(tmp_path: Path) -> None:
    file = tmp_path / "masks"
    file.write_text("")
    with pytest.raises(MachineError, match=r"masks: it is a file; choose a folder for --out"):
        open_storage(str(file))
    with (
        pytest.raises(MachineError, match=r"cannot write to .*/deeper: Not a"),
        open_manifest(Folder(file / "deeper")),
    ):
        pass
