"""URLs in place of folders: against a real S3 server on the loopback interface, and in memory."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
from fsspec.implementations.local import LocalFileSystem
from object_store import Store, driver, objects, put, put_tree, serving
from processes import Process, run, wait_until
from small_model import save_picture, small_model

from segcli.cli import main
from segcli.errors import MachineError, UsageError
from segcli.images import SUFFIXES
from segcli.inference import archives, fetching, remote
from segcli.inference.ahead import Ahead
from segcli.inference.archives import key_of, unpack
from segcli.inference.sources import Input, PassedOver, discover, parse
from segcli.inference.storage import Content, Folder, Storage, canonical, is_url, open_storage

NAMES = ["a.jpg", "b/c d.jpg", "b/e#f?g%20h+i.jpg", "b/[j]*.jpg", "ü/日本.jpg", "ü/same.jpg", "ü/same.png"]


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Small pictures with names that are hard on URLs."""
    folder = tmp_path_factory.mktemp("photos") / "in"
    for seed, name in enumerate(NAMES):
        save_picture(folder / name, 40, 56, seed)
    return folder


@pytest.fixture(scope="module")
def masks(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What a run on this machine makes of them."""
    out = tmp_path_factory.mktemp("masks") / "masks"
    assert predict(photos, "--out", out) == 0
    found = files(out)
    assert len(found) == 2 * len(NAMES)
    return found


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    """A new bucket; the command line runs in an empty folder with a cache of its own."""
    monkeypatch.setenv("SEGCLI_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    with serving(monkeypatch) as store:
        yield store


def predict(*arguments: object) -> int:
    """The exit code of `segcli predict ... --model (the small model) --workers 0`."""
    words = [str(word) for word in (*arguments, "--model", small_model(), "--workers", 0)]
    with pytest.raises(SystemExit) as caught:
        main(["predict", *words])
    return int(caught.value.code or 0)


def files(out: Path) -> dict[str, bytes]:
    """All files below a folder but those of the record."""
    found = {path.relative_to(out).as_posix(): path for path in out.rglob("*") if path.is_file()}
    return {name: path.read_bytes() for name, path in found.items() if not name.startswith("_run/")}


def results(name: str) -> dict[str, bytes]:
    """All objects below a folder of the bucket but those of the record."""
    return {key: data for key, data in objects(name).items() if not key.startswith("_run/")}


def lines(name: str) -> dict[str, dict[str, Any]]:
    """The manifest in the bucket by the names of the inputs; every input has one line."""
    text = driver().cat_file(f"bucket/{name}/_run/manifest.jsonl").decode()
    found = [json.loads(line) for line in text.splitlines()]
    by_name = {line["source"].rpartition("/")[2]: line for line in found}
    assert len(by_name) == len(found)
    return by_name


def statuses(name: str) -> dict[str, int]:
    counts: dict[str, int] = {}
    for line in lines(name).values():
        counts[line["status"]] = counts.get(line["status"], 0) + 1
    return counts


def holding_back(store: Store, name: str) -> threading.Event:
    """Let the writing of some objects wait for the event that is returned."""
    gate = threading.Event()

    def refuse(method: str, path: str) -> tuple[str, str] | None:
        if method == "PUT" and name in path:
            gate.wait(60)
        return None

    store.refuse = refuse
    return gate


# ---- the same tree, wherever it lies ----


def test_from_bucket_to_bucket_on_ray(
    store: Store, photos: Path, masks: dict[str, bytes], tmp_path: Path
) -> None:
    put_tree(photos, "in")
    command = (
        "predict",
        "s3://bucket/in/",
        "--out",
        "s3://bucket/masks",
        "-m",
        small_model(),
        "--workers",
        0,
    )
    on_ray = ("--engine", "ray", "--num-actors", 2, "--cpus-per-actor", 1)
    code, errors = run(*command, *on_ray, folder=tmp_path, **store.environment)
    assert code == 0, errors
    assert results("masks") == masks
    assert statuses("masks") == {"done": len(NAMES)}
    # The other engine finds nothing to do.
    assert predict("s3://bucket/in/", "--out", "s3://bucket/masks") == 0
    assert statuses("masks") == {"skipped": len(NAMES)}


def test_from_bucket_to_bucket_as_on_a_disk(store: Store, photos: Path, masks: dict[str, bytes]) -> None:
    put_tree(photos, "in")
    assert predict("s3://bucket/in/", "--out", "s3://bucket/deep/masks") == 0
    assert results("deep/masks") == masks
    assert sorted(name for name in objects("deep/masks") if name.startswith("_run")) == [
        "_run/manifest.jsonl",
        "_run/run.json",
    ]
    line = lines("deep/masks")["e#f?g%20h+i.jpg"]
    assert line["source"] == "s3://bucket/in/b/e#f?g%20h+i.jpg"
    assert (line["status"], line["output"]) == ("done", "b/e#f?g%20h+i.png")
    etag = driver().info("bucket/deep/masks/b/e#f?g%20h+i.png")["ETag"].strip('"')
    assert line["files"]["mask"]["etag"] == etag
    state = json.loads(objects("deep/masks")["_run/run.json"])
    assert (state["state"], state["done"], state["failed"]) == ("finished", len(NAMES), 0)
    assert list((Path.cwd() / "cache/copies").iterdir()) == []


def test_from_bucket_to_disk_and_back(store: Store, photos: Path, masks: dict[str, bytes]) -> None:
    put_tree(photos, "in")
    assert predict("s3://bucket/in", "--out", "masks") == 0
    assert files(Path("masks")) == masks
    assert predict(photos, "--out", "s3://bucket/masks") == 0
    assert results("masks") == masks


def test_tars_in_a_bucket(
    store: Store, photos: Path, masks: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(archives, "SAMPLES", 3)
    put_tree(photos, "in")
    arguments = ["s3://bucket/in", "--out", "s3://bucket/out", "--out-format", "webdataset"]

    def held() -> dict[str, bytes]:
        assert all(name.endswith(".tar") for name in results("out"))
        samples = [sample for data in results("out").values() for sample in unpack(data).items()]
        assert len({key for key, _ in samples}) == len(samples)
        return {f"{key}.{field}": data for key, sample in samples for field, data in sample.items()}

    assert predict(*arguments) == 0
    assert len(results("out")) == 3
    expected = {
        f"{key_of(name.removeprefix('_overlay/'))}.{'overlay.jpg' if name[0] == '_' else 'mask.png'}": data
        for name, data in masks.items()
    }
    found = held()
    assert {name: data for name, data in found.items() if not name.endswith(".json")} == expected
    store.requests.clear()
    assert predict(*arguments) == 0
    assert statuses("out") == {"skipped": len(NAMES)}
    assert not [path for method, path in store.requests if method == "GET" and path.endswith(".tar")]
    put("in/a.jpg", (photos / "ü/same.jpg").read_bytes())  # changed
    put("out/masks-0123456789abcdef.tar", b"left by a run that was killed")
    assert predict(*arguments) == 0
    assert statuses("out") == {"skipped": len(NAMES) - 1, "done": 1}
    assert held().keys() == found.keys()
    assert held()["a.mask.png"] == masks["ü/same.jpg.png"]
    driver().rm_file(f"bucket/out/{next(iter(results('out')))}")
    assert predict(*arguments) == 0
    assert held().keys() == found.keys()


def test_with_decoders_in_processes(store: Store, photos: Path, masks: dict[str, bytes]) -> None:
    put_tree(photos, "in")
    arguments = ["predict", "s3://bucket/in", "--out", "s3://bucket/out", "--workers", 2]
    code, errors = run(*arguments, "--model", small_model(), folder=Path.cwd(), **os.environ)
    assert code == 0, errors
    assert results("out") == masks


def test_globs_single_objects_and_lists(store: Store, photos: Path, masks: dict[str, bytes]) -> None:
    put_tree(photos, "in")
    assert predict("s3://bucket/in/b/*.jpg", "--out", "glob", "--save", "mask") == 0
    assert files(Path("glob")).keys() == {"c d.png", "e#f?g%20h+i.png", "[j]*.png"}
    assert (
        predict("s3://bucket/in/b/[j]*.jpg", "s3a://bucket/in/a.jpg", "--out", "one", "--save", "mask") == 0
    )
    assert files(Path("one")) == {name: masks[name] for name in ("a.png", "b/[j]*.png")}
    Path("list").write_text(f"s3://bucket/in/ü/same.png\ns3://bucket/in/none.jpg\n{photos}/a.jpg\n")
    assert predict("--list", "list", "--out", "listed", "--save", "mask") == 1
    below = photos.as_posix().lstrip("/")
    assert files(Path("listed")) == {
        "bucket/in/ü/same.png.png": masks["ü/same.png.png"],
        f"{below}/a.png": masks["a.png"],
    }
    found = [json.loads(line) for line in Path("listed/_run/manifest.jsonl").read_text().splitlines()]
    assert [line["reason"] for line in found if line["status"] == "failed"] == ["no such object"]


def test_listings_of_many_pages(
    store: Store, photos: Path, masks: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    put_tree(photos, "in")
    monkeypatch.setenv("MOTO_S3_DEFAULT_MAX_KEYS", "2")
    found = discover(parse(["s3://bucket/in"], None, "s3://bucket/out", SUFFIXES), PassedOver())
    assert sorted(item.source for item in found) == sorted(f"s3://bucket/in/{name}" for name in NAMES)
    assert sum(method == "GET" for method, _ in store.requests) > 5


def test_colorize_takes_urls(store: Store, masks: dict[str, bytes]) -> None:
    put("masks/a.png", masks["a.png"])
    with pytest.raises(SystemExit) as caught:
        main(["colorize", "s3://bucket/masks", "--out", "s3://bucket/colors", "--workers", "0"])
    assert not caught.value.code
    assert results("colors").keys() == {"a.png"}


def test_in_memory(
    photos: Path, masks: dict[str, bytes], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("SEGCLI_CACHE", str(tmp_path))
    memory = fsspec.filesystem("memory")
    for name in NAMES:
        memory.pipe_file(f"memory://in/{name}", (photos / name).read_bytes())
    assert predict("memory://in", "--out", "memory://masks") == 0
    found = {path.removeprefix("/masks/"): memory.cat_file(path) for path in memory.find("/masks")}
    assert {name: data for name, data in found.items() if not name.startswith("_run/")} == masks
    assert predict("memory://in", "--out", "memory://masks") == 0
    assert json.loads(memory.cat_file("/masks/_run/run.json"))["skipped"] == len(NAMES)


def test_file_urls_are_folders_of_this_machine(tmp_path: Path) -> None:
    assert canonical(f"file://{tmp_path}") == str(tmp_path)
    assert isinstance(open_storage(f"file://{tmp_path}"), Folder)
    assert (canonical("S3A://b/X"), canonical("gcs://b/x")) == ("s3://b/X", "gs://b/x")
    assert [is_url(text) for text in ("s3://b", "a/b://c", "C:/x", "photos")] == [True, False, False, False]


# ---- again ----


def test_again_does_what_changed(store: Store, photos: Path, masks: dict[str, bytes]) -> None:
    put_tree(photos, "in")
    arguments = ["s3://bucket/in", "--out", "s3://bucket/out"]
    assert predict(*arguments) == 0
    store.requests.clear()
    assert predict(*arguments) == 0
    assert statuses("out") == {"skipped": len(NAMES)}
    got = {path for method, path in store.requests if method == "GET" and path.endswith((".jpg", ".png"))}
    assert got == set()  # neither inputs nor outputs were read
    written = {path for method, path in store.requests if method == "PUT"}
    assert all(path.startswith("/bucket/out/_run/") for path in written)

    put("in/a.jpg", (photos / "ü/same.jpg").read_bytes())  # changed
    put("in/b/c d.jpg", (photos / "b/c d.jpg").read_bytes())  # only uploaded again
    put("out/b/e#f?g%20h+i.png", b"x" * len(masks["b/e#f?g%20h+i.png"]))  # junk
    driver().rm_file("bucket/out/_overlay/ü/日本.jpg")
    assert predict(*arguments) == 0
    assert {name for name, line in lines("out").items() if line["status"] == "done"} == {
        "a.jpg",
        "e#f?g%20h+i.jpg",
        "日本.jpg",
    }
    assert results("out") == masks | {
        "a.png": masks["ü/same.jpg.png"],
        "_overlay/a.jpg": masks["_overlay/ü/same.jpg.jpg"],
    }


def test_other_settings_are_refused(store: Store, photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    put_tree(photos, "in")
    assert predict("s3://bucket/in/a.jpg", "--out", "s3://bucket/out") == 0
    capsys.readouterr()
    assert predict("s3://bucket/in/a.jpg", "--out", "s3://bucket/out", "--size", 32) == 2
    assert "s3://bucket/out holds results of other settings: size unset, now 32" in capsys.readouterr().err


def test_killed_and_run_again(store: Store, photos: Path, masks: dict[str, bytes], tmp_path: Path) -> None:
    put_tree(photos, "in")
    arguments = ["predict", "s3://bucket/in", "--out", "s3://bucket/out", "--model", small_model()]
    often = "import segcli.inference.remote as remote; remote.UPLOAD_EVERY = 0.01"
    gate = holding_back(store, "日本")  # what comes after three or more others
    process = Process(*arguments, "--workers", 1, folder=tmp_path, before=often, **os.environ)

    def noted() -> int:
        parts = [data for name, data in objects("out").items() if name.startswith("_run/parts/")]
        return b"".join(parts).count(b"\n")

    wait_until(lambda: noted() >= 3)
    process.kill_group()
    process.wait()
    gate.set()
    before = noted()
    partial = results("out")
    assert partial == {name: masks[name] for name in partial}
    assert "_run/manifest.jsonl" not in objects("out")
    assert predict("s3://bucket/in", "--out", "s3://bucket/out") == 0
    assert results("out") == masks
    assert statuses("out") == {"skipped": before, "done": len(NAMES) - before}
    assert not [name for name in objects("out") if name.startswith(("_run/parts", "_run/lock"))]
    assert list((tmp_path / "cache/copies").iterdir()) == []


def test_stopped_and_run_again(store: Store, photos: Path, masks: dict[str, bytes], tmp_path: Path) -> None:
    put_tree(photos, "in")
    arguments = ["predict", "s3://bucket/in", "--out", "s3://bucket/out", "--model", small_model()]
    gate = holding_back(store, "日本")
    process = Process(*arguments, "--workers", 1, folder=tmp_path, **os.environ)
    wait_until(lambda: len(results("out")) >= 2)
    process.send(signal.SIGTERM)
    wait_until(lambda: "Stopping" in process.errors)
    gate.set()
    assert process.wait() == 143
    assert [name for name in objects("out") if name.startswith("_run/parts/")]  # the lines are safe at once
    assert predict("s3://bucket/in", "--out", "s3://bucket/out") == 0
    assert results("out") == masks
    assert statuses("out")["skipped"] >= 1


# ---- one run at a time ----


def test_a_second_run_is_refused(store: Store, photos: Path, tmp_path: Path) -> None:
    put_tree(photos, "in")
    arguments = ["predict", "s3://bucket/in", "--out", "s3://bucket/out", "--model", small_model()]
    with open_storage("s3://bucket/out").opened():
        code, errors = run(*arguments, folder=tmp_path, **os.environ)
        assert code == 2
        assert f"s3://bucket/out is in use by process {os.getpid()} on " in errors
        elsewhere = {**os.environ, "SEGCLI_CACHE": str(tmp_path / "elsewhere")}  # as on another machine
        code, errors = run(*arguments, folder=tmp_path, **elsewhere)
        assert code == 2
        assert f"s3://bucket/out is in use by process {os.getpid()} on " in errors
        assert "choose another --out" in errors


def test_the_lock_of_a_dead_run_expires(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    held = {"holder": "process 1 on far", "machine": "far", "run": "1", "renewed": 1e9}
    put("out/_run/lock", json.dumps(held).encode())
    with open_storage("s3://bucket/out").opened():
        now = json.loads(objects("out")["_run/lock"])
        assert now["holder"].startswith(f"process {os.getpid()} on ")
    assert "_run/lock" not in objects("out")


def test_of_two_runs_that_took_the_lock_one_stops(
    store: Store, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(remote, "UPLOAD_EVERY", 0.01)
    monkeypatch.setattr(remote, "LOCK_EXPIRES", 0)  # whoever comes takes over
    runs = [open_storage("s3://bucket/out") for _ in range(2)]

    def refused(folder: Storage) -> bool:
        try:
            folder.write("a.png", b"x")
        except MachineError as error:
            return "another run has taken over s3://bucket/out" in str(error)
        return False

    with contextlib.ExitStack() as all_of_them:
        ends = [all_of_them.enter_context(contextlib.ExitStack()) for _ in runs]
        for number, (folder, end) in enumerate(zip(runs, ends, strict=True)):
            monkeypatch.setenv("SEGCLI_CACHE", str(tmp_path / str(number)))  # as on different machines
            end.enter_context(folder.opened())
        # The first, unless its renewal was under way and came after the second.
        wait_until(lambda: any(refused(folder) for folder in runs))
        assert sorted(map(refused, runs)) == [False, True]
        ends[refused(runs[1])].close()
        assert "_run/lock" in objects("out")  # it is not its own any more
    assert "_run/lock" not in objects("out")


# ---- shards ----


def test_shards_of_a_bucket(store: Store, photos: Path, masks: dict[str, bytes], tmp_path: Path) -> None:
    put_tree(photos, "in")
    command = ["predict", "s3://bucket/in", "--out", "s3://bucket/out", "--model", small_model()]
    often = "import segcli.inference.remote as remote; remote.UPLOAD_EVERY = 0.01"
    gate = holding_back(store, "same.jpg.png")  # the second of the two that are in shard 2/2
    shard = [*command, "--workers", 0, "--shard", "2/2"]
    process = Process(*shard, folder=tmp_path, before=often, **os.environ)

    def noted() -> int:
        parts = [data for name, data in objects("out").items() if "/shards-of-2/2/parts/" in name]
        return b"".join(parts).count(b"\n")

    wait_until(lambda: noted() == 1)
    elsewhere = {**os.environ, "SEGCLI_CACHE": str(tmp_path / "elsewhere")}  # as on another machine
    for words in (shard, ["runs", "merge", "s3://bucket/out", "--force"]):
        code, errors = run(*words, folder=tmp_path, **elsewhere)
        assert (code, "is in use by process" in errors) == (2, True), errors
    process.kill_group()
    process.wait()
    gate.set()
    assert predict("s3://bucket/in", "--out", "s3://bucket/out", "--shard", "2/2") == 0
    code, errors = run("runs", "merge", "s3://bucket/out", folder=tmp_path, **os.environ)
    assert (code, errors.splitlines()[0]) == (1, "shard 1/2 is missing: it was never started")
    assert predict("s3://bucket/in", "--out", "s3://bucket/out", "--shard", "1/2") == 0
    assert run("runs", "merge", "s3://bucket/out", folder=tmp_path, **os.environ)[0] == 0
    assert results("out") == masks
    assert statuses("out") == {"skipped": 1, "done": len(NAMES) - 1}
    assert sorted(name for name in objects("out") if name.startswith("_run")) == [
        "_run/manifest.jsonl",
        "_run/run.json",
    ]


def test_what_a_killed_shard_of_a_bucket_had_uploaded_is_merged(
    store: Store, photos: Path, tmp_path: Path
) -> None:
    put_tree(photos, "in")
    assert predict("s3://bucket/in", "--out", "s3://bucket/out", "--shard", "1/2") == 0
    record = "out/_run/shards-of-2/1"
    lines_of = objects("out")["_run/shards-of-2/1/manifest.jsonl"].splitlines(keepends=True)
    driver().rm_file(f"bucket/{record}/manifest.jsonl")  # a kill leaves parts alone
    for number, line in enumerate(lines_of):
        put(f"{record}/parts/20261124T000000-abcdef-{number:06d}.jsonl", line)
    code, _ = run("runs", "merge", "s3://bucket/out", "--force", folder=tmp_path, **os.environ)
    assert code == 1  # the other shard is missing
    assert statuses("out") == {"done": len(lines_of)}
    assert len(lines_of) == 5


# ---- what goes wrong ----


def test_one_object_that_cannot_be_had_fails_alone(
    store: Store, photos: Path, masks: dict[str, bytes]
) -> None:
    put_tree(photos, "in")
    put("in/b/broken.jpg", b"hello")

    def refuse(method: str, path: str) -> tuple[str, str] | None:
        if method == "GET" and path == "/bucket/in/a.jpg":
            return "403 Forbidden", "AccessDenied"
        if method == "GET" and path == "/bucket/in/b/c d.jpg":
            return "404 Not Found", "NoSuchKey"
        return None

    store.refuse = refuse
    assert predict("s3://bucket/in", "--out", "s3://bucket/out") == 1
    gone = ("a.png", "b/c d.png", "_overlay/a.jpg", "_overlay/b/c d.jpg")
    assert results("out") == {name: data for name, data in masks.items() if name not in gone}
    found = lines("out")
    assert found["a.jpg"]["reason"] == "cannot be read: access denied (AccessDenied as the test wants)"
    assert found["c d.jpg"]["reason"].startswith("cannot be read: ")
    assert found["broken.jpg"]["reason"] == "not an image (it starts with 'hello')"


def test_errors_that_pass_are_tried_again(store: Store, photos: Path, masks: dict[str, bytes]) -> None:
    put_tree(photos, "in")
    seen: set[tuple[str, str]] = set()

    def refuse(method: str, path: str) -> tuple[str, str] | None:
        if (method, path) in seen or method not in ("GET", "PUT"):
            return None
        seen.add((method, path))  # every request once
        return "503 Slow Down", "SlowDown"

    store.refuse = refuse
    assert predict("s3://bucket/in", "--out", "s3://bucket/out") == 0
    assert results("out") == masks


@pytest.mark.parametrize(
    ("method", "code", "says"),
    [
        ("PUT", "AccessDenied", "cannot write s3://bucket/out/"),
        ("GET", "ExpiredToken", "cannot look at s3://bucket/in"),
    ],
)
def test_a_store_that_refuses_everything_ends_the_run(
    method: str, code: str, says: str, store: Store, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    put_tree(photos, "in")
    folder = "/bucket/out/" if method == "PUT" else "/bucket"

    def refuse(asked: str, path: str) -> tuple[str, str] | None:
        refused = asked == method and path.startswith(folder) and "_run" not in path
        return ("403 Forbidden", code) if refused else None

    store.refuse = refuse
    capsys.readouterr()
    assert predict("s3://bucket/in", "--out", "s3://bucket/out") == 3
    said = capsys.readouterr().err.splitlines()
    assert said[-1].startswith(f"Error: {says}")
    assert code in said[-1]


def test_what_is_not_there_is_said_in_one_line(store: Store, photos: Path, tmp_path: Path) -> None:
    put_tree(photos, "in")
    closed = {**os.environ, "AWS_ENDPOINT_URL": "http://127.0.0.1:9"}
    nobody = {**os.environ, "AWS_ACCESS_KEY_ID": "", "AWS_SECRET_ACCESS_KEY": "", "HOME": str(tmp_path)}
    for source, out, environment, code, reason in [
        ("s3://nobucket/in", "masks", os.environ, 2, "s3://nobucket/in: The specified bucket does not exist"),
        ("s3://bucket/none", "masks", os.environ, 2, "there is no object, and none in a folder, named s3://"),
        (photos, "s3://nobucket/masks", os.environ, 2, "nobucket/masks: The specified bucket does not exist"),
        (
            "s3://bucket/in",
            "masks",
            nobody,
            3,
            "cannot look at s3://bucket/in: there are no credentials; set",
        ),
        ("s3://bucket/in", "masks", closed, 3, "cannot look at s3://bucket/in: Could not connect to the end"),
        ("nope://bucket/in", "masks", os.environ, 2, "nope:// is no kind of address that fsspec knows"),
        ("s3://bucket/in", "s3://bucket/in", os.environ, 2, "is the folder of the input"),
        ("s3://bucket/in/b", "s3://bucket/in", os.environ, 2, "contains the input"),
        ("s3://bucket", "s3://bucket/in", os.environ, 2, "holds images that segcli did not write"),
    ]:
        arguments = ["predict", source, "--out", out, "--model", small_model()]
        got, errors = run(*arguments, folder=tmp_path, **environment)
        assert (got, len(errors.splitlines()) <= 2, reason in errors) == (code, True, True), errors


def test_names_that_have_no_place_in_a_tree(store: Store, photos: Path) -> None:
    put_tree(photos, "in")
    picture = (photos / "a.jpg").read_bytes()
    for name in ("in/x//y.jpg", "in/../z.jpg", f"in/{'d' * 300}/y.jpg", f"in/{'n' * 300}.jpg"):
        put(name, picture)
    assert predict("s3://bucket/in", "--out", "inner/masks", "--save", "mask") == 1
    assert {path.name for path in Path("inner").iterdir()} == {"masks"}
    found = [json.loads(line) for line in Path("inner/masks/_run/manifest.jsonl").read_text().splitlines()]
    reasons = {line["source"]: line["reason"] for line in found if line["status"] == "failed"}
    assert reasons.keys() == {"s3://bucket/in/x/", f"s3://bucket/in/{'d' * 300}/y.jpg"}
    assert len([line for line in found if line["status"] == "done"]) == len(NAMES) + 1
    Path("list").write_text("s3://bucket/in/../z.jpg\n")
    assert predict("--list", "list", "--out", "inner/listed", "--save", "mask") == 1
    assert files(Path("inner/listed")) == {}


def test_a_name_that_is_not_utf8_cannot_be_uploaded(store: Store, photos: Path) -> None:
    folder = Path("odd")
    folder.mkdir()
    (folder / os.fsdecode(b"\xff.jpg")).write_bytes((photos / "a.jpg").read_bytes())
    (folder / "b.jpg").write_bytes((photos / "a.jpg").read_bytes())
    assert predict(folder, "--out", "s3://bucket/out", "--save", "mask") == 1
    assert results("out").keys() == {"b.png"}
    (failed,) = (line for line in lines("out").values() if line["status"] == "failed")
    assert "names of objects are UTF-8" in failed["reason"]


def test_without_the_packages_it_is_said_what_to_install(photos: Path, tmp_path: Path) -> None:
    for source, out in (("s3://bucket/in", "masks"), (photos, "s3://bucket/masks")):
        code, errors = run(
            "predict", source, "--out", out, folder=tmp_path, before="import sys; sys.modules['s3fs'] = None"
        )
        assert code == 2
        assert len(errors.splitlines()) == 1
        assert "pip install 'segcli[cloud]'" in errors


def test_nothing_of_it_is_imported_for_files_of_this_machine(photos: Path, tmp_path: Path) -> None:
    code = (
        "import sys; from segcli.cli import main\n"
        "try: main(sys.argv[1:])\n"
        "except SystemExit as exit: assert not exit.code\n"
        "print({'fsspec', 's3fs', 'aiobotocore', 'gcsfs', 'segcli.inference.remote'} & sys.modules.keys())"
    )
    arguments = ["predict", photos / "a.jpg", "--out", tmp_path / "out", "--model", small_model()]
    words = [sys.executable, "-c", code, *map(str, arguments), "--workers", "0"]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


# ---- the parts ----


class Disk(LocalFileSystem):
    """A file system whose uploads are not atomic; it can break off in the middle."""

    protocol = "disk"
    broken = False

    @classmethod
    def _strip_protocol(cls, path: Any) -> str:
        return str(path).removeprefix("disk://").rstrip("/")

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **_: Any) -> None:
        Path(path).write_bytes(value[: len(value) // 2] if self.broken else value)
        if self.broken:
            raise OSError(28, "No space left on device")


def test_elsewhere_a_file_is_uploaded_and_then_moved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SEGCLI_CACHE", str(tmp_path / "cache"))
    fsspec.register_implementation("disk", Disk, clobber=True)
    remote._filesystem.cache_clear()
    folder = open_storage(f"disk://{tmp_path}/out")
    with folder.opened():
        noted = folder.write("a/b.png", b"first")
        assert folder.content_now("a/b.png", noted) is noted
        assert folder.write("a/b.png", b"second").size == 6
        monkeypatch.setattr(Disk, "broken", True)
        with pytest.raises(MachineError, match=r"cannot write disk://.*/a/b\.png: No space left on device"):
            folder.write("a/b.png", b"third")
        monkeypatch.setattr(Disk, "broken", False)
        assert (tmp_path / "out/a/b.png").read_bytes() == b"second"
        assert list((tmp_path / "out/_run").glob(".segcli-*"))
        folder.remove_leftovers()
        assert not list((tmp_path / "out/_run").glob(".segcli-*"))


def test_copies_on_this_machine_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SEGCLI_CACHE", str(tmp_path))
    monkeypatch.setattr(fetching, "ROOM", 250)
    memory = fsspec.filesystem("memory")
    items = []
    for number in range(20):
        memory.pipe_file(f"memory://many/{number}.jpg", bytes(100))
        items.append(Input(f"memory://many/{number}.jpg", f"{number}.png", listed=Content(100, 0, 0, "")))
    items.insert(7, Input("here.jpg", "here.png"))
    items.append(Input("memory://many/none.jpg", "none.png", listed=Content(100, 0, 0, "")))
    stop = threading.Event()
    with fetching.Fetcher(stop) as fetcher:
        got = []
        for item in fetcher.fetched(Ahead(iter(items), 4, stop)):
            assert sum(path.stat().st_size for path in tmp_path.rglob("*.jpg")) <= 250
            assert item.problem or Path(item.path).exists() or item.source == "here.jpg"
            got.append(item)
            fetcher.drop(item)
    assert sorted(item.source for item in got) == sorted(item.source for item in items)
    assert [item.problem for item in got if item.problem] == ["cannot be read: it does not exist"]
    assert list((tmp_path / "copies").iterdir()) == []


def test_sources_of_two_kinds_have_no_common_folder(photos: Path) -> None:
    fsspec.filesystem("memory").pipe_file("memory://one/a.jpg", b"x")
    with pytest.raises(UsageError, match="have no folder in common"):
        parse([str(photos), "memory://one"], None, "out", SUFFIXES)
