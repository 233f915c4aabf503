"""Loading samples: every fault is named, no process is left behind, and memory does not grow."""

from __future__ import annotations

import gc
import multiprocessing
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from PIL import Image
from processes import Process, wait_until
from training_runs import REGISTER_TINY, TINY, assert_same_result, make_shapes

from segcli.data.loading import Dismissal, SegmentationSamples, batches, loader
from segcli.data.sets import open_data
from segcli.data.transforms import Augmentation, class_mix, training_transform
from segcli.errors import ImageError, MachineError
from segcli.models.preprocessing import Preprocessing

MIB = 1 << 20


@pytest.fixture
def shapes(tmp_path: Path) -> Path:
    return make_shapes(tmp_path / "shapes")


@pytest.fixture(autouse=True)
def no_process_is_left() -> Iterator[None]:
    yield
    gc.collect()
    assert not multiprocessing.active_children()


def samples(root: Path) -> SegmentationSamples:
    transform = training_transform(Augmentation(crop=(48, 48), jitter=0), (0, 0, 0))
    return SegmentationSamples(open_data(root, "train"), transform, Preprocessing())


def resident(process: int | str = "self") -> int:
    """Bytes of memory of a process that are its own."""
    _, all_pages, shared, *_ = map(int, Path(f"/proc/{process}/statm").read_text().split())
    return (all_pages - shared) * os.sysconf("SC_PAGE_SIZE")


def test_batches_are_tensors_of_one_size(shapes: Path) -> None:
    for workers in (0, 2):
        loaded = list(loader(samples(shapes), batches(8, 4, 0, 0), workers, pin=False))
        assert [(i.shape, i.dtype) for i, _ in loaded] == [((4, 3, 48, 48), torch.uint8)] * 2
        assert [(t.shape, t.dtype) for _, t in loaded] == [((4, 48, 48), torch.uint8)] * 2


@pytest.mark.parametrize("workers", [0, 2])
def test_a_damaged_file_is_named_in_one_line(shapes: Path, workers: int) -> None:
    image = shapes / "train/images/5.png"
    image.write_bytes(image.read_bytes()[:200])
    with pytest.raises(ImageError, match=r"images/5\.png: ") as error:
        list(loader(samples(shapes), batches(8, 4, 0, 0), workers, pin=False))
    assert "\n" not in str(error.value)
    Image.new("RGB", (64, 60)).save(image)
    with pytest.raises(ImageError, match=r"masks/5\.png is of another size than .*images/5\.png"):
        list(loader(samples(shapes), batches(8, 4, 0, 0), workers, pin=False))


def test_class_mix_pastes_half_of_the_classes_and_never_the_ignored_pixels() -> None:
    label = torch.full((2, 3), 9, dtype=torch.uint8)
    other = torch.tensor([[1, 1, 2], [2, 255, 3]], dtype=torch.uint8)
    image, other_image = torch.zeros(3, 2, 3, dtype=torch.uint8), torch.full((3, 2, 3), 50, dtype=torch.uint8)
    seen = set()
    for seed in range(30):
        torch.manual_seed(seed)
        mixed_image, mixed = class_mix(image, label, other_image, other)
        pasted = mixed != 9
        assert torch.equal(mixed[pasted], other[pasted])
        assert torch.equal(mixed_image, torch.where(pasted, other_image, image))
        assert mixed[1, 1] == 9
        chosen = set(mixed[pasted].tolist())
        assert len(chosen) == 2  # the larger half of three classes
        assert torch.equal(pasted, torch.isin(other, torch.tensor(sorted(chosen))))
        seen.add(frozenset(chosen))
    assert seen == {frozenset({1, 2}), frozenset({1, 3}), frozenset({2, 3})}


def test_samples_are_mixed_as_often_as_asked_for_and_alike_for_a_seed(shapes: Path) -> None:
    plain, mixed = samples(shapes), samples(shapes)
    mixed.paste = 0.5
    keys = [(index, seed) for index in range(8) for seed in range(20)]
    changed = 0
    for key in keys:
        before, after, again = plain[key], mixed[key], mixed[key]
        assert not isinstance(before, ImageError)
        assert not isinstance(after, ImageError)
        assert not isinstance(again, ImageError)
        assert torch.equal(after[0], again[0])
        changed += not torch.equal(before[0], after[0])
    assert 50 < changed < 110  # of 160, half; 5 standard deviations of 6.3 are 32


def test_a_loading_process_that_dies_is_said(shapes: Path) -> None:
    loading = loader(samples(shapes), [[(0, 1)]] * 100, 1, pin=False)
    next(loading)
    (worker,) = multiprocessing.active_children()
    worker.kill()
    with pytest.raises(MachineError, match="a process that loads images died"):
        list(loading)


def test_memory_does_not_grow_within_an_epoch(shapes: Path) -> None:
    loading = loader(samples(shapes), [[(number % 8, number)] for number in range(900)], 1, pin=False)
    sizes = []
    for number, _ in enumerate(loading):
        if number in (300, 850):
            (worker,) = multiprocessing.active_children()
            sizes.append((resident(), resident(worker.pid or 0)))
    for early, late in zip(*sizes, strict=True):
        assert late - early < 4 * MIB


def test_memory_and_files_do_not_grow_over_epochs(shapes: Path) -> None:
    data, sizes, files = samples(shapes), [], []
    for epoch in range(16):
        for _ in loader(data, batches(8, 4, 0, epoch), 1, pin=False):
            pass
        gc.collect()
        sizes.append(resident())
        files.append(len(list(Path("/proc/self/fd").iterdir())))
    assert sizes[-1] - sizes[3] < 4 * MIB
    assert files[-1] == files[3]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_the_whole_group_leaves_no_process_and_a_checkpoint(
    tmp_path: Path, shapes: Path, number: signal.Signals
) -> None:
    """As Ctrl-C in a terminal does it: the processes that load images get it, too."""
    arguments = ["--data", shapes, "--out", "run", *TINY, "--epochs", "10000", "--workers", "2"]
    process = Process("train", *arguments, folder=tmp_path, before=REGISTER_TINY)
    wait_until(lambda: (tmp_path / "run/checkpoint.pt").exists())
    before = (tmp_path / "run/checkpoint.pt").stat().st_mtime_ns
    os.killpg(process.pid, number)
    assert process.wait() == 128 + number
    assert process.group_is_gone()
    assert process.errors.count("\n") == 2
    assert "The same command goes on from there." in process.errors
    assert (tmp_path / "run/checkpoint.pt").stat().st_mtime_ns > before


# In a process of segcli: the third step waits for the file `go` in one call of C, as a long batch would.
LONG_STEP = """
import ctypes, pathlib, threading, time
from segcli.training import loop
original, seen = loop.train_step, 0
libc, mutex = ctypes.CDLL(None), ctypes.create_string_buffer(64)
def open_when_told():
    while not pathlib.Path("go").exists():
        time.sleep(0.01)
    libc.pthread_mutex_unlock(mutex)
def waiting(*arguments):
    global seen
    seen += 1
    if seen == 3:
        libc.pthread_mutex_lock(mutex)
        threading.Thread(target=open_when_told).start()
        pathlib.Path("waits").touch()
        libc.pthread_mutex_lock(mutex)
    return original(*arguments)
loop.train_step = waiting
"""


@pytest.mark.parametrize("everyone", [True, False])
def test_workers_end_at_the_first_signal_however_long_the_batch_takes(
    tmp_path: Path, shapes: Path, everyone: bool
) -> None:
    """Ctrl-C reaches the whole group, `kill` the main process alone; the batch still counts."""
    arguments = ["--data", shapes, *TINY, "--epochs", "3", "--workers", "2"]
    whole = Process("train", *arguments, "--out", "whole", folder=tmp_path, before=REGISTER_TINY)
    assert whole.wait() == 0, whole.errors
    process = Process("train", *arguments, "--out", "run", folder=tmp_path, before=REGISTER_TINY + LONG_STEP)
    wait_until((tmp_path / "waits").exists)
    assert len(process.members()) == 3
    (os.killpg if everyone else os.kill)(process.pid, signal.SIGINT)
    wait_until(lambda: process.members() == [process.pid], seconds=5)
    assert process.errors == "Stopping after what is being computed now. Ctrl-C again stops at once.\n"
    (tmp_path / "go").touch()
    assert process.wait() == 130, process.errors
    assert "Stopped in epoch 2 after batch 1." in process.errors
    again = Process("train", *arguments, "--out", "run", folder=tmp_path, before=REGISTER_TINY)
    assert again.wait() == 0, again.errors
    assert_same_result(tmp_path / "run", tmp_path / "whole")


def test_a_second_signal_ends_a_long_batch_at_once(tmp_path: Path, shapes: Path) -> None:
    arguments = ["--data", shapes, "--out", "run", *TINY, "--workers", "2"]
    process = Process("train", *arguments, folder=tmp_path, before=REGISTER_TINY + LONG_STEP)
    wait_until((tmp_path / "waits").exists)
    process.send(signal.SIGINT)
    wait_until(lambda: "Stopping" in process.errors)
    process.send(signal.SIGINT)
    assert process.wait() == 130
    wait_until(process.group_is_gone, seconds=5)


def test_what_is_asked_for_after_the_workers_left_is_loaded_here(shapes: Path) -> None:
    order = batches(8, 2, 0, 0)
    expected = list(loader(samples(shapes), order, 0, pin=False))
    dismissal = Dismissal()
    loading = loader(samples(shapes), order, 2, False, dismissal)
    found = [next(loading)]
    dismissal.give()
    wait_until(lambda: not multiprocessing.active_children(), seconds=5)
    found += loading
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert all(map(torch.equal, one, other))


def test_workers_end_when_the_main_process_is_killed(tmp_path: Path, shapes: Path) -> None:
    arguments = ["--data", shapes, "--out", "run", *TINY, "--workers", "2"]
    process = Process("train", *arguments, folder=tmp_path, before=REGISTER_TINY + LONG_STEP)
    wait_until((tmp_path / "waits").exists)
    process.send(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    wait_until(process.group_is_gone, seconds=5)
