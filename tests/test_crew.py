"""How many processes do a run on a machine."""

from __future__ import annotations

from pathlib import Path

import fsspec
import pytest
from small_model import save_picture

from segcli.images import SUFFIXES
from segcli.inference.crew import MANY, Crew, by_processor, count_up_to_many, crew_of, default_processes
from segcli.inference.shards import Shard
from segcli.inference.sources import parse

GIB = 1 << 30


@pytest.mark.parametrize(
    ("gpu", "memory", "devices", "cores", "images", "expected"),
    [
        (80, 0, ["cuda:0"], 16, 10, Crew(["cuda:0"], 8, 8)),  # half of the cores read, as many write
        (80, 0, ["cuda:0"], 16, MANY, Crew(["cuda:0"] * 4, 2, 2)),
        (80, 0, ["cuda:0", "cuda:1"], 16, MANY, Crew(["cuda:0", "cuda:1"] * 2, 2, 2)),
        (80, 0, ["cuda:0"], 2, 10, Crew(["cuda:0"], 2, 2)),
        (0, 64, ["cpu"], 16, MANY, Crew(["cpu"] * 8, 1, 0)),  # on a processor threads write
        (0, 64, ["cpu"], 2, 10, Crew(["cpu"], 1, 0)),
        (0, 0, ["mps"], 16, MANY, Crew(["mps"], 8, 0)),
    ],
)
def test_the_crew_suits_the_machine(
    gpu: int,
    memory: int,
    devices: list[str],
    cores: int,
    images: int,
    expected: Crew,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("segcli.inference.crew.cpus", lambda: cores)
    assert crew_of(devices, gpu * GIB, memory * GIB, lambda: images, None, None) == expected


def test_what_was_asked_for_goes_before_what_suits_the_machine() -> None:
    assert crew_of(["cuda:0"], 80 * GIB, 0, lambda: MANY, 3, 5) == Crew(["cuda:0"] * 3, 5, 5)
    assert crew_of(["cpu"], 0, 64 * GIB, lambda: MANY, 1, 0) == Crew(["cpu"], 0, 0)


@pytest.mark.parametrize(
    ("gpu", "memory", "devices", "cores", "images", "expected"),
    [
        (80, 64, 1, 16, MANY, 4),  # one for every four cores
        (80, 64, 2, 16, MANY, 2),
        (80, 64, 4, 16, MANY, 1),
        (80, 64, 1, 16, MANY - 1, 1),  # they would not pay
        (16, 64, 1, 16, MANY, 2),  # 6 GiB of the GPU's for each
        (8, 64, 1, 16, MANY, 1),
        (0, 64, 1, 16, MANY, 8),  # without a GPU one for every two cores
        (0, 64, 1, 5, MANY, 2),
        (0, 64, 1, 64, MANY, 8),  # at most
        (0, 64, 1, 16, MANY - 1, 1),
        (0, 32, 1, 16, MANY, 5),  # 6 GiB of the machine's for each
        (0, 8, 1, 16, MANY, 1),
    ],
)
def test_processes_that_share_a_device(
    gpu: int,
    memory: int,
    devices: int,
    cores: int,
    images: int,
    expected: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("segcli.inference.crew.cpus", lambda: cores)
    assert default_processes(gpu * GIB, memory * GIB, devices, lambda: images) == expected


def test_where_one_process_is_enough_nothing_is_counted() -> None:
    assert default_processes(0, 0, 1, lambda: pytest.fail("it was counted")) == 1


def test_only_pytorch_on_a_processor_is_shared_out(monkeypatch: pytest.MonkeyPatch) -> None:
    assert by_processor("cpu", "torch")
    assert by_processor("auto", "torch")
    assert not by_processor("cpu", "openvino")  # it is one process with threads of its own
    assert not by_processor("mps", "torch")
    monkeypatch.setattr("sys.platform", "darwin")
    assert not by_processor("auto", "torch")  # it may be Apple's GPU
    assert by_processor("cpu", "torch")


def test_inputs_are_counted_but_for_those_of_stores_and_stdin(tmp_path: Path) -> None:
    for name in "abc":
        save_picture(tmp_path / f"in/{name}.png")
    (tmp_path / "list").write_text("in/a.png\nin/b.png\n" * 4)

    def counted(source: str | None, list_file: str | None = None, shard: Shard | None = None) -> int:
        return count_up_to_many(parse([source] if source else [], list_file, "masks", SUFFIXES), shard)

    assert counted(str(tmp_path / "in")) == 3
    assert sum(counted(str(tmp_path / "in"), shard=Shard(number, 2)) for number in (1, 2)) == 3
    assert counted(None, str(tmp_path / "list")) == 8
    assert counted(None, str(tmp_path / "list"), Shard(1, 2)) == 4
    assert counted("-") == 0
    fsspec.filesystem("memory").pipe_file("/bucket/a.png", b"")
    assert counted("memory://bucket") == 0
