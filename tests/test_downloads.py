"""Downloads from a server on the loopback interface that misbehaves in every way that servers do."""

from __future__ import annotations

import hashlib
import multiprocessing
import socket
import struct
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fault_table import Row
from loopback import Answer, Handler, Server, give, serving

from segcli import downloads
from segcli.downloads import download, is_offline, only_one
from segcli.errors import MachineError

BODY = np.random.default_rng(0).bytes(600_000)
SHA256 = "sha256:" + hashlib.sha256(BODY).hexdigest()
MD5 = "md5:" + hashlib.md5(BODY).hexdigest()
HALF = 300_000
whole = give(BODY)


ROW = Row("21 downloads: short, reset, stalled, wrong, refused, changed, two at once")


def reset(handler: Handler) -> None:
    """Close so that the client sees a connection reset."""
    handler.wfile.flush()
    handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    handler.connection.close()


def short(handler: Handler) -> None:
    """Half of the body, then the end."""
    handler.start(200, Content_Length=str(len(BODY)), ETag='"one"')
    handler.wfile.write(BODY[:HALF])


def cut(handler: Handler) -> None:
    """Half of the body, then a reset."""
    short(handler)
    reset(handler)


def ignores_range(handler: Handler) -> None:
    handler.start(200, Content_Length=str(len(BODY)))
    handler.wfile.write(BODY)


def wrong_content(handler: Handler) -> None:
    give(bytes(len(BODY)))(handler)


def stalls(handler: Handler) -> None:
    """Half of the body, then silence until the client gives up."""
    short(handler)
    handler.wfile.flush()
    handler.connection.recv(1)


def wrong_place(handler: Handler) -> None:
    """A part that was not asked for."""
    handler.start(206, Content_Length="9", Content_Range=f"bytes 5-13/{len(BODY)}", ETag='"one"')
    handler.wfile.write(BODY[5:14])


def error(status: int) -> Answer:
    return lambda handler: handler.start(status, Content_Length="0")


def page(handler: Handler) -> None:
    handler.start(200, Content_Type="text/html; charset=utf-8", Content_Length="13")
    handler.wfile.write(b"<html></html>")


def endless(handler: Handler) -> None:
    """No length: the body ends when the connection does, whole or not."""
    handler.start(200)
    handler.wfile.write(BODY[:HALF])


def chunked(handler: Handler) -> None:
    handler.protocol_version = "HTTP/1.1"
    handler.start(200, Transfer_Encoding="chunked")
    for start in range(0, len(BODY), 100_000):
        handler.wfile.write(b"%x\r\n%s\r\n" % (100_000, BODY[start : start + 100_000]))
    handler.wfile.write(b"0\r\n\r\n")


def chunked_cut(handler: Handler) -> None:
    handler.protocol_version = "HTTP/1.1"
    handler.start(200, Transfer_Encoding="chunked")
    handler.wfile.write(b"%x\r\n%s\r\n" % (100_000, BODY[:100_000]))


def compressed(handler: Handler) -> None:
    handler.start(200, Content_Length="5", Content_Encoding="gzip")
    handler.wfile.write(b"12345")


@pytest.fixture
def server() -> Iterator[Server]:
    with serving() as server:
        server.script = [whole]
        yield server


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(downloads, "PAUSE_SECONDS", 0.0)
    monkeypatch.setattr(downloads, "STALL_SECONDS", 0.4)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


class Ears:
    """Remembers what a watch hears."""

    def __init__(self) -> None:
        self.said: list[str] = []
        self.steps: list[tuple[int, int | None]] = []

    def say(self, text: str) -> None:
        self.said.append(text)

    def progress(self, done: int, total: int | None) -> None:
        self.steps.append((done, total))


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("checksum", [None, SHA256, SHA256[:15], MD5])
def test_a_whole_file(server: Server, tmp_path: Path, checksum: str | None) -> None:
    ears = Ears()
    assert download((server.address,), tmp_path / "file.bin", checksum, ears) == server.address
    assert (tmp_path / "file.bin").read_bytes() == BODY
    assert names(tmp_path) == ["file.bin"]
    assert ears.steps[0] == (0, len(BODY))
    assert ears.steps[-1] == (len(BODY), len(BODY))


@pytest.mark.parametrize("broken", [short, cut, stalls])
@pytest.mark.parametrize("checksum", [None, SHA256, MD5])
@ROW
def test_a_broken_try_is_continued(
    server: Server, tmp_path: Path, broken: Answer, checksum: str | None
) -> None:
    server.script = [broken, whole]
    download((server.address,), tmp_path / "file.bin", checksum)
    assert (tmp_path / "file.bin").read_bytes() == BODY
    first, second = server.requests
    assert "range" not in first
    if broken is short:
        assert second["range"] == f"bytes={HALF}-"
    assert second.get("if-range", '"one"') == '"one"'
    assert names(tmp_path) == ["file.bin"]


@pytest.mark.parametrize(
    "broken", [short, cut, stalls, chunked_cut, wrong_content, *map(error, (429, 500, 502, 503))]
)
@ROW
def test_three_tries_and_no_file(server: Server, tmp_path: Path, broken: Answer) -> None:
    server.script = [broken]
    with pytest.raises(MachineError) as caught:
        download((server.address,), tmp_path / "file.bin", SHA256)
    assert len(server.requests) == 3
    assert not (tmp_path / "file.bin").exists()
    reason, advice = str(caught.value).split("\n")
    assert reason.startswith("cannot download file.bin: ")
    assert "(3 tries)" in reason
    assert advice == f"Get it by hand from {server.address} and save it as {tmp_path / 'file.bin'}"
    assert caught.value.exit_code == 3


@pytest.mark.parametrize("refusal", [error(401), error(403), error(404), error(410), page])
@ROW
def test_a_refusal_is_not_asked_again(server: Server, tmp_path: Path, refusal: Answer) -> None:
    server.script = [refusal]
    with pytest.raises(MachineError, match=r"\(1 try\)"):
        download((server.address,), tmp_path / "file.bin")
    assert len(server.requests) == 1
    assert names(tmp_path) == []


@ROW
def test_a_second_address_is_tried(server: Server, tmp_path: Path) -> None:
    server.script = [error(404), whole]
    other = server.address + "?mirror"
    assert download((server.address, other), tmp_path / "file.bin", MD5) == other
    assert (tmp_path / "file.bin").read_bytes() == BODY


@ROW
def test_an_unreachable_server(tmp_path: Path) -> None:
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))  # bound, but nobody listens
        address = f"http://127.0.0.1:{held.getsockname()[1]}/file.bin"
        with pytest.raises(MachineError, match="cannot be reached"):
            download((address,), tmp_path / "file.bin")
    assert names(tmp_path) == []


@ROW
def test_ignored_range_starts_over(server: Server, tmp_path: Path) -> None:
    server.script = [short, ignores_range]
    download((server.address,), tmp_path / "file.bin")
    assert server.requests[1]["range"] == f"bytes={HALF}-"
    assert (tmp_path / "file.bin").read_bytes() == BODY


@ROW
def test_a_file_that_changed_meanwhile_starts_over(server: Server, tmp_path: Path) -> None:
    changed = BODY[::-1]
    server.script = [short, give(changed, '"two"')]
    download((server.address,), tmp_path / "file.bin")
    assert (tmp_path / "file.bin").read_bytes() == changed


@ROW
def test_without_a_validator_only_a_checksum_allows_to_continue(server: Server, tmp_path: Path) -> None:
    def short_without_etag(handler: Handler) -> None:
        handler.start(200, Content_Length=str(len(BODY)))
        handler.wfile.write(BODY[:HALF])

    server.script = [short_without_etag, whole]
    download((server.address,), tmp_path / "a.bin")
    assert "range" not in server.requests[1]
    server.requests.clear()
    download((server.address,), tmp_path / "b.bin", SHA256)
    assert server.requests[1]["range"] == f"bytes={HALF}-"
    assert (tmp_path / "a.bin").read_bytes() == (tmp_path / "b.bin").read_bytes() == BODY


@ROW
def test_the_wrong_part_is_not_appended(server: Server, tmp_path: Path) -> None:
    server.script = [short, wrong_place, whole]
    download((server.address,), tmp_path / "file.bin")
    assert (tmp_path / "file.bin").read_bytes() == BODY


@ROW
def test_a_wrong_checksum_starts_over(server: Server, tmp_path: Path) -> None:
    ears = Ears()
    server.script = [wrong_content, whole]
    download((server.address,), tmp_path / "file.bin", SHA256, ears)
    assert "range" not in server.requests[1]
    assert (tmp_path / "file.bin").read_bytes() == BODY
    assert "not the right one: its sha256 is" in ears.said[0]


@ROW
def test_a_later_process_continues(server: Server, tmp_path: Path) -> None:
    server.script = [short]
    with pytest.raises(MachineError):
        download((server.address,), tmp_path / "file.bin")
    assert names(tmp_path) == [".segcli-file.bin.from", ".segcli-file.bin.part"]
    server.script = [whole]
    server.requests.clear()
    download((server.address,), tmp_path / "file.bin")
    assert server.requests[0]["range"].startswith("bytes=")
    assert server.requests[0]["if-range"] == '"one"'
    assert (tmp_path / "file.bin").read_bytes() == BODY
    assert names(tmp_path) == ["file.bin"]


@ROW
def test_a_part_that_is_complete_already(server: Server, tmp_path: Path) -> None:
    """Killed between the last byte and the renaming."""
    (tmp_path / ".segcli-file.bin.part").write_bytes(BODY)
    (tmp_path / ".segcli-file.bin.from").write_text(
        f'{{"address": "{server.address}", "validator": "\\"one\\""}}'
    )
    download((server.address,), tmp_path / "file.bin", SHA256)
    assert (tmp_path / "file.bin").read_bytes() == BODY
    assert len(server.requests) == 1


@pytest.mark.parametrize("record", ["", "no json", "[]", '{"address": 3}', '{"address": "elsewhere"}'])
@ROW
def test_a_part_of_unknown_origin_is_not_trusted(server: Server, tmp_path: Path, record: str) -> None:
    (tmp_path / ".segcli-file.bin.part").write_bytes(b"what is this?")
    (tmp_path / ".segcli-file.bin.from").write_text(record)
    download((server.address,), tmp_path / "file.bin")
    assert (tmp_path / "file.bin").read_bytes() == BODY


@ROW
def test_a_body_without_length(server: Server, tmp_path: Path) -> None:
    server.script = [endless]
    with pytest.raises(MachineError, match="does not say how long the file is"):
        download((server.address,), tmp_path / "file.bin")
    with pytest.raises(MachineError, match="not the right one"):
        download((server.address,), tmp_path / "file.bin", SHA256)
    server.script = [chunked]
    download((server.address,), tmp_path / "file.bin")
    assert (tmp_path / "file.bin").read_bytes() == BODY


@ROW
def test_an_encoded_body_is_refused(server: Server, tmp_path: Path) -> None:
    server.script = [compressed]
    with pytest.raises(MachineError, match="encoding that was not asked for"):
        download((server.address,), tmp_path / "file.bin")
    assert server.requests[0]["accept-encoding"] == "identity"


def _get(address: str, target: str, ready: Any) -> None:
    ready.wait()
    with only_one(Path(target)):
        if not Path(target).exists():
            download((address,), Path(target), SHA256)


@ROW
def test_two_processes_at_once_get_it_once(server: Server, tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    ready = context.Barrier(2)
    target = tmp_path / "new" / "file.bin"
    processes = [context.Process(target=_get, args=(server.address, str(target), ready)) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0]
    assert target.read_bytes() == BODY
    assert len(server.requests) == 1


def test_waiting_for_another_process_is_said(tmp_path: Path) -> None:
    entered, heard = threading.Event(), threading.Event()

    class Listener(Ears):
        def say(self, text: str) -> None:
            super().say(text)
            heard.set()

    ears = Listener()

    def second() -> None:
        entered.wait(30)
        with only_one(tmp_path / "file.bin", ears):
            pass

    thread = threading.Thread(target=second)
    thread.start()
    with only_one(tmp_path / "file.bin"):
        entered.set()
        assert heard.wait(30)
    thread.join(30)
    assert ears.said == ["another process is getting file.bin; waiting for it"]


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with (
        pytest.raises(MachineError, match=r"cannot write into .*/file"),
        only_one(tmp_path / "file" / "a.bin"),
    ):
        pass


@pytest.mark.parametrize(("value", "expected"), [("1", True), ("yes", True), ("0", False), ("", False)])
def test_offline_by_environment(monkeypatch: pytest.MonkeyPatch, value: str, expected: bool) -> None:
    monkeypatch.setenv("SEGCLI_OFFLINE", value)
    assert is_offline() is expected


def test_cache_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SEGCLI_CACHE", str(tmp_path))
    assert downloads.cache_folder() == tmp_path
    monkeypatch.delenv("SEGCLI_CACHE")
    assert downloads.cache_folder().name == "segcli"
