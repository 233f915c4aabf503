"""What becomes of pictures once they are computed, here and in processes of their own."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from processes import wait_until
from results import tree
from small_model import save_picture, small_model

from segcli.errors import ImageError, MachineError
from segcli.images import SUFFIXES
from segcli.inference.ahead import Ahead
from segcli.inference.decoders import Decoded
from segcli.inference.engine import Progress, run
from segcli.inference.finishing import SOON, Finishers, Finishing
from segcli.inference.manifest import Entry
from segcli.inference.messages import receive_object, send_object
from segcli.inference.pipeline import Task, Work
from segcli.inference.plan import Plan
from segcli.inference.sources import Input, parse
from segcli.inference.storage import open_storage

PARENT = os.getpid()


def fate(picture: Decoded, result: Any) -> tuple[dict[str, bytes], dict[str, float]]:
    """Says who encodes a picture, unless its name says what is to happen."""
    name = Path(picture.item.source).stem
    if name == "kill" and os.getpid() != result:
        (Path(os.environ["OUT"]) / ".segcli-half").touch()  # as if it were writing just now
        os.kill(os.getpid(), signal.SIGKILL)
    if name == "full":
        raise MachineError("cannot write: No space left on device")
    if name == "long":
        raise MachineError("cannot write") from OSError(errno.ENAMETOOLONG, "File name too long")
    if name == "large":
        raise ImageError("no overlay can be saved: 70000 x 1 pixels do not fit into a JPEG")
    if name == "odd":
        raise KeyError("what is this")
    return {"mask": b"%010d" % os.getpid() + bytes(picture.pixels.data)}, {"cat": 1.0}


@pytest.fixture
def finishing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Finishing:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))  # a process has to find `fate`
    monkeypatch.setenv("OUT", str(tmp_path))
    return Finishing(fate, open_storage(str(tmp_path)), "model", "digest", in_tars=False)


def picture(name: str) -> Decoded:
    return Decoded(Input(name, f"{name}.png"), np.arange(24, dtype=np.uint8).reshape(2, 4, 3), notes=("a",))


def entry_of(finishers: Finishers | Finishing, name: str) -> Entry:
    return finishers.finished(picture(name), PARENT)[0]


def who(folder: Path) -> int:
    """The process that wrote x.png."""
    return int((folder / "x.png").read_bytes()[:-24])


@pytest.fixture
def finishers(finishing: Finishing, tmp_path: Path) -> Iterator[Finishers]:
    """One process, which is there."""
    made = Finishers(finishing, 1, soon=1)
    entry_of(made, "x")
    until_another_writes(made, tmp_path)
    yield made
    made.close()


def until_another_writes(finishers: Finishers, folder: Path) -> None:
    def written_by_another() -> bool:
        entry_of(finishers, "x")
        return who(folder) != PARENT

    wait_until(written_by_another)


def test_an_entry_says_what_was_done(finishing: Finishing, tmp_path: Path) -> None:
    entry, in_tar = finishing.finished(picture("x"), PARENT)
    assert (entry.status, entry.output, entry.width, entry.height) == ("done", "x.png", 4, 2)
    assert (entry.model, entry.settings, entry.classes, entry.notes) == (
        "model",
        "digest",
        {"cat": 1},
        ("a",),
    )
    assert entry.files["mask"].size == (tmp_path / "x.png").stat().st_size
    assert in_tar == {}
    _, in_tar = replace(finishing, in_tars=True).finished(picture("y"), PARENT)
    assert in_tar == {"mask": b"%010d" % PARENT + bytes(range(24))}
    assert not (tmp_path / "y.png").exists()


def test_a_process_does_the_same(finishers: Finishers, finishing: Finishing, tmp_path: Path) -> None:
    assert who(tmp_path) != PARENT
    assert finishers.all_lived
    there, here = entry_of(finishers, "x"), entry_of(finishing, "x")
    assert there.files["mask"].size == here.files["mask"].size
    unlike = {"files": {}, "milliseconds": None}  # when it was written, and how long that took
    assert replace(there, **unlike) == replace(here, **unlike)


@pytest.mark.parametrize("somewhere", ["here", "there"])
def test_what_can_go_wrong_with_a_picture(somewhere: str, request: pytest.FixtureRequest) -> None:
    by: Finishing | Finishers = request.getfixturevalue("finishing" if somewhere == "here" else "finishers")
    assert entry_of(by, "large").reason == "no overlay can be saved: 70000 x 1 pixels do not fit into a JPEG"
    assert entry_of(by, "long").reason == "cannot write"
    assert entry_of(by, "odd").reason == "internal error, please report it: KeyError('what is this')"
    entry, _ = by.finished(picture("x"), ImageError("there is not enough memory"))
    assert (entry.status, entry.reason) == ("failed", "there is not enough memory")
    with pytest.raises(MachineError, match="No space left on device"):
        entry_of(by, "full")
    assert entry_of(by, "x").status == "done"


def test_a_process_that_a_picture_takes_down_is_replaced(finishers: Finishers, tmp_path: Path) -> None:
    first = who(tmp_path)
    entry = entry_of(finishers, "kill")
    assert entry.status == "failed"
    assert entry.reason == "saving its results takes the process down (ended by SIGKILL)"
    assert not finishers.all_lived
    entry_of(finishers, "x")
    until_another_writes(finishers, tmp_path)
    assert who(tmp_path) != first


def test_a_few_pictures_start_no_process(finishing: Finishing, tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    finishers = Finishers(finishing, 2, program=(sys.executable, "-c", f"open({str(trace)!r}, 'w')"))
    for _ in range(SOON - 1):
        entry_of(finishers, "x")
    assert not trace.exists()
    entry_of(finishers, "x")
    wait_until(trace.exists)
    finishers.close()


@pytest.mark.parametrize("program", [("/no/such/program",), (sys.executable, "-c", "raise SystemExit(1)")])
def test_without_processes_pictures_are_finished_here(
    program: tuple[str, ...], finishing: Finishing, tmp_path: Path
) -> None:
    finishers = Finishers(finishing, 2, soon=1, program=program)
    for _ in range(20):
        assert entry_of(finishers, "x").status == "done"
    assert who(tmp_path) == PARENT
    finishers.close()


def test_none_is_left_when_they_are_closed(finishing: Finishing, tmp_path: Path) -> None:
    finishers = Finishers(finishing, 3, soon=1)
    entry_of(finishers, "x")
    finishers.close()  # while they start
    found = subprocess.run(["ps", "--ppid", str(os.getpid()), "-o", "args="], capture_output=True, text=True)
    assert "finish_worker" not in found.stdout
    entry_of(finishers, "x")  # and none is started any more
    assert who(tmp_path) == PARENT


def test_it_never_imports_torch() -> None:
    code = (
        "import sys, segcli.inference.finish_worker, segcli.inference.products; print('torch' in sys.modules)"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True) == "False\n"


def test_messages_of_any_kind_arrive_as_they_were() -> None:
    import socket
    import threading

    pixels = np.random.default_rng(0).integers(0, 256, (300, 400, 3), np.uint8)
    message = {
        "pixels": pixels,
        "across": pixels[:, ::2],  # not contiguous
        "down": np.asfortranarray(pixels[..., 0]),
        "none": np.zeros((0, 3), np.float16),
        "error": ImageError("no"),
    }
    ours, theirs = socket.socketpair()
    with ours, theirs:
        threading.Thread(target=send_object, args=(ours, message)).start()
        found = receive_object(theirs)
        for key in ("pixels", "across", "down", "none"):
            np.testing.assert_array_equal(found[key], message[key])
            assert found[key].dtype == message[key].dtype
        assert str(found["error"]) == "no"
        ours.close()
        with pytest.raises(EOFError):
            receive_object(theirs)


def progress_of(
    folder: Path, out: Path, kinds: Sequence[str], start: Callable[[], Work[Any]], finishers: int
) -> Progress:
    """What became of a run over the pictures in `in`."""
    progress = Progress()
    task = Task(
        sources=parse([str(folder / "in")], None, str(out), SUFFIXES),
        out=open_storage(str(out)),
        kinds=kinds,
        model="model",
        settings={},
        options={},
        start=start,
        finishers=finishers,
    )
    run(task, progress)
    return progress


def test_a_run_with_processes_makes_what_one_makes_without(tmp_path: Path) -> None:
    for number in range(30):
        save_picture(tmp_path / f"in/{number}.png", 40, 60, number)
    (tmp_path / "in/bad.jpg").write_text("hello")
    plan = Plan(small_model(), "cpu", "fp32", ["mask", "overlay", "confidence", "scores"])
    for finishers in (0, 2):
        progress = progress_of(tmp_path, tmp_path / f"out{finishers}", plan.kinds, plan.start, finishers)
        assert (progress.done, progress.failed) == (30, 1)
    without, by_processes = tree(tmp_path / "out0"), tree(tmp_path / "out2")
    assert by_processes == without
    assert len(without) == 4 * 30


class Fates:
    """Work that leaves all to `fate`: a picture comes again and again until a process has met its own."""

    held = 1
    encode = staticmethod(fate)

    def __init__(self, out: Path) -> None:
        self._out = out

    def compute(self, pictures: Ahead[Decoded]) -> Iterator[tuple[Decoded, Any]]:
        (picture,) = pictures
        while not (self._out / ".segcli-half").exists():
            yield picture, PARENT


def test_what_a_process_that_died_left_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    monkeypatch.setenv("OUT", str(out))
    save_picture(tmp_path / "in/kill.png", 2, 4)
    progress = progress_of(tmp_path, out, ["mask"], lambda: Fates(out), finishers=1)
    reasons = {reason for _, reason in progress.failures}
    assert reasons == {"saving its results takes the process down (ended by SIGKILL)"}
    assert (out / "kill.png").exists()  # as long as no process was there, this one wrote it
    assert not list(out.glob(".segcli-*"))
