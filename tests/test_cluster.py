"""`segcli predict --engine ray`: the same results and the same record as one process."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import Process, run, wait_until
from ray_cluster import Nodes, two_nodes
from results import tree
from small_model import save_picture, small_model

from segcli.cli import main
from segcli.errors import UsageError
from segcli.inference.cluster import Wishes, lay_out

MANY = 300
PREDICT = ("predict", "in", "--workers", 0, "--precision", "fp32")
ACTORS = ("--engine", "ray", "--num-actors", 2, "--cpus-per-actor", 1)


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "masks/_run/manifest.jsonl").read_text().splitlines()]


def statuses(folder: Path) -> Counter[str]:
    return Counter(line["status"] for line in lines(folder))


def done_in(folder: Path) -> int:
    record = folder / "masks/_run/manifest.jsonl"
    return record.read_bytes().count(b'"done"') if record.exists() else 0


@pytest.fixture(scope="module")
def cluster() -> Iterator[Nodes]:
    with two_nodes() as nodes:
        yield nodes


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with 300 pictures and a bad file in `in`, and in `masks` what one process makes of them."""
    folder = tmp_path_factory.mktemp("many")
    for number in range(MANY):
        save_picture(folder / f"in/{number % 7}/{number}.png", 24, 32, number)
    (folder / "in/bad.jpg").write_text("hello")
    assert run(*PREDICT, "-m", small_model(), folder=folder)[0] == 1
    return folder


def test_a_node_is_killed_in_the_middle(many: Path, cluster: Nodes, tmp_path: Path) -> None:
    shutil.copytree(many / "in", tmp_path / "in")
    command = (*PREDICT, "-m", small_model(), *ACTORS, "--ray-address", cluster.address)
    process = Process(*command, folder=tmp_path)
    wait_until(lambda: done_in(tmp_path) > 20 or process.has_ended(), 600)
    assert 20 < done_in(tmp_path) < MANY, process.errors
    cluster.do("kill")
    assert process.wait() == 1, process.errors
    assert process.errors.splitlines()[0] == (
        "Segmenting 301 images with small (21 classes) on 2 actors of 1 CPU on 2 machines by Ray in fp32."
    )
    assert "  in/bad.jpg: not an image (it starts with 'hello')" in process.errors
    assert statuses(tmp_path) == {"done": MANY, "failed": 1}
    assert tree(tmp_path / "masks") == tree(many / "masks")
    # The other engine finds nothing to do.
    code, errors = run(*PREDICT, "-m", small_model(), folder=tmp_path)
    assert code == 1
    assert f"0 done, {MANY} done before, 1 failed" in errors


@pytest.mark.skipif(torch.cuda.is_available(), reason="the claim would be true")
def test_actors_start_on_a_gpu_that_ray_was_told_of_and_look_for_it_themselves(tmp_path: Path) -> None:
    save_picture(tmp_path / "in/a.png")
    command = (*PREDICT, "-m", small_model(), *ACTORS, "--gpus-per-actor", 0.5)
    with two_nodes(gpus=1) as nodes:
        code, errors = run(*command, "--ray-address", nodes.address, folder=tmp_path)
    first, second = errors.splitlines()[:2]
    assert first.startswith("Segmenting 1 image with small (21 classes) on 2 actors of 0.5 GPU on 2 machines")
    assert second.startswith("Error: --device cuda: PyTorch sees no GPU on this machine")
    assert code == 2


# Python runs this in every process before anything else: an actor meets its fate by the picture.
FATE = """
import os, signal, sys
if any("default_worker" in word for word in sys.orig_argv):
    import segcli.inference.finishing as finishing
    real = finishing.file_of
    def file_of(output, kind):
        if "KILL" in output:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(output, kind)
    finishing.file_of = file_of
"""


def test_stopped_by_the_terminal_and_an_input_that_takes_its_actor_down(many: Path, tmp_path: Path) -> None:
    """On a Ray of its own; then with the local engine."""
    shutil.copytree(many / "in", tmp_path / "in")
    save_picture(tmp_path / "in/0/KILL.png")
    (tmp_path / "site").mkdir()
    (tmp_path / "site/sitecustomize.py").write_text(FATE)
    command = (*PREDICT, "-m", small_model(), "--engine", "ray")
    path = os.pathsep.join([str(tmp_path / "site"), os.environ.get("PYTHONPATH", "")])
    process = Process(*command, folder=tmp_path, PYTHONPATH=path)
    wait_until(lambda: done_in(tmp_path) > 5 or process.has_ended(), 600)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    assert process.wait() == 130, process.errors
    assert "The same command goes on from here." in process.errors
    before = done_in(tmp_path)
    assert 5 < before < MANY
    assert json.loads((tmp_path / "masks/_run/run.json").read_text())["state"] == "interrupted"

    code, errors = run(*command, folder=tmp_path, PYTHONPATH=path)
    assert code == 1
    assert "  in/0/KILL.png: computing it takes its process down" in errors
    assert f"{MANY - before} done, {before} done before, 2 failed" in errors
    assert tree(tmp_path / "masks") == tree(many / "masks")
    assert len(lines(tmp_path)) == MANY + 2


def test_killed_and_gone_on_with_by_the_local_engine(many: Path, tmp_path: Path) -> None:
    shutil.copytree(many / "in", tmp_path / "in")
    process = Process(*PREDICT, "-m", small_model(), "--engine", "ray", folder=tmp_path)
    wait_until(lambda: done_in(tmp_path) > 5 or process.has_ended(), 600)
    process.send(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, process.errors
    before = done_in(tmp_path)
    assert 5 < before < MANY
    os.killpg(process.pid, signal.SIGKILL)  # Ray would end all but its agents at once, and those in a minute
    wait_until(process.group_is_gone)
    code, errors = run(*PREDICT, "-m", small_model(), folder=tmp_path)
    assert code == 1
    assert f"{MANY - before} done, {before} done before, 1 failed" in errors
    assert tree(tmp_path / "masks") == tree(many / "masks")


def test_what_a_worker_cannot_do_is_told_in_one_line(many: Path, cluster: Nodes, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    shutil.copy(many / "in/0/0.png", tmp_path / "in")
    command = ("predict", "in", "-m", small_model(), "--workers", 0, "--precision", "fp16", *ACTORS)
    code, errors = run(*command, "--ray-address", cluster.address, "-q", folder=tmp_path)
    assert (code, errors) == (2, "Error: --precision fp16 needs a GPU; use bf16 or fp32 on the CPU\n")


def test_tars_are_written_by_the_driver(cluster: Nodes, tmp_path: Path) -> None:
    for number in range(8):
        save_picture(tmp_path / f"in/{number}.png", 24, 32, number)
    (tmp_path / "in/bad.jpg").write_text("hello")
    command = (*PREDICT, "-m", small_model(), "--out-format", "webdataset")
    assert run(*command, "--out", "whole", folder=tmp_path)[0] == 1
    code, errors = run(*command, *ACTORS, "--ray-address", cluster.address, folder=tmp_path)
    assert code == 1, errors
    assert "9 images in" in errors
    assert statuses(tmp_path) == {"done": 8, "failed": 1}
    assert tree(tmp_path / "masks") == tree(tmp_path / "whole")  # one tar, whoever comes first
    assert len(tree(tmp_path / "masks")) == 1


# ---- without a cluster ----


def test_nothing_of_ray_is_imported_by_the_local_engine(tmp_path: Path) -> None:
    save_picture(tmp_path / "in/a.png")
    code = (
        "import sys\nfrom segcli.cli import main\n"
        f"try: main(['predict', 'in', '-m', {str(small_model())!r}, '--workers', '0', '-q'])\n"
        "except SystemExit as exit: print(exit.code, {'ray', 'pyarrow', 'fsspec'} & sys.modules.keys())"
    )
    process = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert process.stdout == "0 set()\n", process.stderr


def test_unknown_names_are_refused_before_ray_is_asked(tmp_path: Path) -> None:
    save_picture(tmp_path / "in/a.png")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        nobody = f"127.0.0.1:{taken.getsockname()[1]}"
    command = ("predict", "in", "-m", small_model(), "--engine", "ray", "--ray-address", nobody)
    for option, name, told in (
        ("--precision", "fp23", "'fp23' is unknown"),
        ("--precision", "int8", "int8 needs --runtime openvino"),
        ("--runtime", "tensorrt", "'tensorrt' is unknown"),
    ):
        code, errors = run(*command, option, name, folder=tmp_path)
        assert (code, len(errors.splitlines())) == (2, 1)
        assert errors.startswith(f"Error: {option} {told}")


def test_without_the_extra_it_says_what_to_install(tmp_path: Path) -> None:
    save_picture(tmp_path / "in/a.png")
    missing = "import sys; sys.modules['ray'] = None"
    code, errors = run("predict", "in", "--engine", "ray", folder=tmp_path, before=missing)
    assert (code, errors) == (2, "Error: --engine ray needs Ray; run: pip install 'segcli[ray]'\n")


def test_a_cluster_that_is_not_there(tmp_path: Path) -> None:
    save_picture(tmp_path / "in/a.png")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
    command = ("predict", "in", "-m", small_model(), "--engine", "ray", "--ray-address", address)
    code, errors = run(*command, folder=tmp_path)
    assert code == 3
    assert errors.startswith(f"Error: cannot reach the Ray cluster at {address}: ")
    assert len(errors.splitlines()) <= 2


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--engine", "spark"], "--engine 'spark' is unknown; use local or ray"),
        (["--num-actors", "2"], "--num-actors is for --engine ray"),
        (
            ["--num-actors", "2", "--ray-address", "auto"],
            "--ray-address, --num-actors are for --engine ray",
        ),
        (
            ["--engine", "ray", "--processes", "2"],
            "--processes is for --engine local; with Ray give --num-actors",
        ),
        (
            ["--engine", "ray", "--device", "cuda:1"],
            "--device cuda:1: with --engine ray it is auto, cpu or cuda; Ray shares out GPUs",
        ),
        (["--engine", "ray", "--ray-address", "ray://head:10001"], "Ray Client cannot do this"),
    ],
)
def test_options_that_do_not_fit(
    options: list[str], reason: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_picture(tmp_path / "in/a.png")
    with pytest.raises(SystemExit) as caught:
        main(["predict", str(tmp_path / "in"), "-o", str(tmp_path / "masks"), *options])
    assert caught.value.code == 2
    assert reason in capsys.readouterr().err


def test_where_actors_go() -> None:
    cpu, gpu = {"CPU": 16.0}, {"CPU": 16.0, "GPU": 4.0}
    # 48 processors, one kept for what reads for every 32 and one more: 46 // 4
    places = lay_out({"a": cpu, "b": cpu, "c": cpu}, Wishes(), "auto")
    assert (places.machines, places.actors, places.gpus, places.cpus) == (3, 11, 0, 4)
    assert places.readers == 48 - 11 * 4
    assert places.share == {"a": 4, "b": 4, "c": 4}
    places = lay_out({"a": cpu, "b": gpu}, Wishes(), "auto")
    assert (places.actors, places.gpus, places.cpus, places.readers) == (4, 1, 1, 28)
    assert str(places) == "4 actors of 1 GPU on 2 machines by Ray"
    assert lay_out({"b": gpu}, Wishes(gpus_per_actor=0.5), "cuda").actors == 8
    assert lay_out({"b": gpu}, Wishes(), "cpu").gpus == 0
    # two processors: one computes, one reads
    places = lay_out({"a": {"CPU": 2.0}}, Wishes(), "auto")
    assert (places.actors, places.cpus, places.readers) == (1, 1, 1)
    # three actors on one machine share what the one that reads leaves: 15 // 3, but never more than 4
    assert lay_out({"a": cpu}, Wishes(actors=3), "auto").cpus == 4
    assert lay_out({"a": cpu}, Wishes(actors=5), "auto").cpus == 3
    # more actors than there is room for now: a cluster may grow
    assert lay_out({"a": gpu}, Wishes(actors=64), "auto").actors == 64


@pytest.mark.parametrize(
    ("machines", "wishes", "device"),
    [
        ({"a": {"CPU": 1.0}}, Wishes(), "auto"),
        ({"a": {"CPU": 8.0}}, Wishes(), "cuda"),
        ({"a": {"CPU": 8.0}, "b": {"CPU": 8.0}}, Wishes(cpus_per_actor=9), "cpu"),
        ({}, Wishes(actors=3), "auto"),
    ],
)
def test_no_room(machines: dict[str, dict[str, float]], wishes: Wishes, device: str) -> None:
    with pytest.raises(UsageError, match="the cluster has no room for that"):
        lay_out(machines, wishes, device)
