"""`--memory` and `--tile`: what they say about memory, and that they say nothing about the masks."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from processes import run
from results import tree
from small_model import picture, save_picture, small_model

from segcli.errors import UsageError
from segcli.inference.decoders import Decoded
from segcli.inference.segmentation import Segmenter
from segcli.inference.sources import Input
from segcli.memory import memory_of, memory_of_machine
from segcli.models.checkpoint import load_model

MIB, GIB = 1 << 20, 1 << 30


def manifest(folder: Path) -> dict[str, dict[str, object]]:
    lines = (folder / "masks/_run/manifest.jsonl").read_text().splitlines()
    return {Path(line["source"]).name: line for line in map(json.loads, lines)}


# Prints how many pages the system had to clear for ten times the same computation.
REPEATED = """
import resource, sys, torch
from segcli.memory import keep_freed_memory
torch.set_num_threads(1)
if sys.argv[1] == "kept":
    keep_freed_memory()
def compute():
    return (torch.ones(20_000_000) + 1).sum()
for _ in range(9):
    compute()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    compute()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only glibc has mallopt")
def test_memory_that_is_kept_is_not_cleared_again() -> None:
    plain, kept = (
        int(subprocess.check_output([sys.executable, "-c", REPEATED, how])) for how in ("plain", "kept")
    )
    assert plain > 100_000  # two blocks of 80 MB in each round, in pages of 4 KB
    assert kept < plain / 3  # the heap may still be growing


# ---- sizes ----


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("6G", 6 * GIB),
        ("800m", 800 * MIB),
        ("1.5GiB", 3 * GIB // 2),
        ("64KB", 64 << 10),
        ("1T", 1 << 40),
        ("123456789", 123456789),
        (" 7M ", 7 * MIB),
    ],
)
def test_sizes(text: str, size: int) -> None:
    assert memory_of(text) == size


@pytest.mark.parametrize("text", ["", "0", "-1G", "G", "many", "3X", "1,5G", "50%"])
def test_no_sizes(text: str) -> None:
    with pytest.raises(UsageError, match="--memory"):
        memory_of(text)


def test_auto_is_half_of_the_machine() -> None:
    assert memory_of("auto") == memory_of_machine() // 2
    assert memory_of("auto") > 100 * MIB


def test_a_container_allows_less_than_the_machine_has(tmp_path: Path) -> None:
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text("0::/batch/job\n")
    (tmp_path / "sys/fs/cgroup/batch/job").mkdir(parents=True)
    (tmp_path / "sys/fs/cgroup/batch/job/memory.max").write_text("max\n")
    (tmp_path / "sys/fs/cgroup/batch/memory.max").write_text(f"{64 * MIB}\n")
    assert memory_of_machine(tmp_path) == 64 * MIB  # the job itself sets no limit, the group above it does


def test_a_container_of_the_older_kind(tmp_path: Path) -> None:
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text("7:cpu,cpuacct:/docker/1\n4:memory:/docker/1\n")
    folder = tmp_path / "sys/fs/cgroup/memory"
    folder.mkdir(parents=True)
    (folder / "memory.limit_in_bytes").write_text(f"{32 * MIB}\n")  # all that is seen from within
    assert memory_of_machine(tmp_path) == 32 * MIB


def test_without_a_container_it_is_what_the_machine_has(tmp_path: Path) -> None:
    assert memory_of_machine(tmp_path) >= memory_of_machine()


# ---- what an image needs ----

PEAK = """
import sys, torch
from pathlib import Path
import numpy as np
from segcli.inference.decoders import Decoded
from segcli.inference.segmentation import Segmenter
from segcli.inference.sources import Input
from segcli.models.checkpoint import load_model
torch.set_num_threads(1)
height, width = int(sys.argv[2]), int(sys.argv[3])
segmenter = Segmenter(load_model(Path(sys.argv[1])), torch.device("cpu"), ("mask", "overlay"))
picture = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
segmenter.begin([Decoded(Input("a", "a"), picture)]).results()
# Not getrusage: that counts the process that started this one, too.
peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
print(int(peak.split()[1]) * 1024)
"""


@pytest.mark.parametrize(("height", "width"), [(300, 400), (2000, 3000)])
def test_the_estimate_covers_what_a_process_takes(height: int, width: int) -> None:
    command = [sys.executable, "-c", PEAK, str(small_model()), str(height), str(width)]
    peak = int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    segmenter = Segmenter(load_model(small_model()), torch.device("cpu"), ("mask", "overlay"))
    assert peak <= segmenter.needed(height, width) <= 4 * peak


def test_more_is_needed_for_more() -> None:
    model = load_model(small_model())

    def needed(kinds: tuple[str, ...] = (), tta: str = "none", side: int = 3000, tile: str = "auto") -> int:
        segmenter = Segmenter(model, torch.device("cpu"), kinds, tta=tta, tile=tile)
        return segmenter.needed(side, side)

    assert needed(side=1000) < needed(side=3000)
    assert needed(("scores",)) - needed() == 4 * 21 * 3000 * 3000  # float16, and once more as a file
    assert needed(tta="flip") > needed() + 4 * 4 * 21 * 3000 * 3000 - 1
    assert needed(tile="on") < needed(tile="off")


def test_less_memory_makes_smaller_strips_and_the_same_labels() -> None:
    model = load_model(small_model())
    image = picture(900, 1000)
    results = []
    for memory in (4 * GIB, 100 * MIB):
        segmenter = Segmenter(model, torch.device("cpu"), ("mask",), memory=memory)
        (scores,) = segmenter.scores([Decoded(Input("a", "a"), image)])
        assert isinstance(scores, torch.Tensor)
        results.append((segmenter.finest_scores.count(torch.empty(1, 3, 900, 1000)), scores))
    (whole, expected), (strips, found) = results
    assert whole == 1
    assert strips > 4
    assert torch.allclose(found, expected, rtol=0, atol=2e-5 * float(expected.abs().max()))
    assert torch.equal(found.argmax(0), expected.argmax(0))


# ---- the commands ----


@pytest.mark.parametrize("workers", [0, 1])
def test_images_that_need_more_fail_and_others_do_not(tmp_path: Path, workers: int) -> None:
    save_picture(tmp_path / "in/small.png")
    Image.new("RGB", (5000, 5000)).save(tmp_path / "in/large.png")  # to compute it needs more than to read it
    Image.new("RGB", (8400, 8400)).save(tmp_path / "in/huge.png")  # needs more than that to read
    code, errors = run(
        "predict", "in", "--out", "masks", "--model", small_model(),
        "--memory", "1G", "--workers", workers, folder=tmp_path,
    )  # fmt: skip
    assert code == 1, errors
    lines = manifest(tmp_path)
    assert lines["small.png"]["status"] == "done"
    assert "5000 x 5000 pixels need about" in str(lines["large.png"]["reason"])
    assert "--memory is 1.0 GiB; try --size 500" in str(lines["large.png"]["reason"])
    assert lines["huge.png"]["reason"] == "reading its 71 megapixels needs about 1.1 GiB; --memory is 1.0 GiB"
    assert list(tree(tmp_path / "masks")) == ["_overlay/small.jpg", "small.png"]


def test_strips_give_the_same_bytes(tmp_path: Path) -> None:
    for seed, (height, width) in enumerate([(48, 64), (1, 1), (7, 130), (333, 210)]):
        save_picture(tmp_path / f"in/{seed}.png", height, width, seed)
    for tile in ("on", "off"):
        options = ["--out", tile, "--model", small_model(), "--tile", tile, "--precision", "fp32"]
        code, errors = run("predict", "in", *options, folder=tmp_path)
        assert code == 0, errors
    assert tree(tmp_path / "on") == tree(tmp_path / "off")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--tile", "512"), "--tile '512' is unknown; use auto, on or off"),
        (("--tile", "on", "--runtime", "openvino"), "--tile on needs PyTorch"),
        (("--memory", "lots"), "--memory 'lots': give auto or a size such as 6G or 800M"),
    ],
)
def test_what_makes_no_sense(tmp_path: Path, options: tuple[str, ...], words: str) -> None:
    save_picture(tmp_path / "in/small.png")
    code, errors = run("predict", "in", "--out", "masks", *options, folder=tmp_path)
    assert code == 2
    assert words in " ".join(errors.split())
    assert not (tmp_path / "masks").exists()
