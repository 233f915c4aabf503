"""The parts of the folder engine: running ahead, decoding in processes, computing, classes from scores."""

from __future__ import annotations

import io
import signal
import sys
import threading
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from small_model import picture, save_picture
from torch import Tensor

from segcli.errors import ImageError, MachineError
from segcli.files import sha256
from segcli.images import read_image
from segcli.inference import decoders as decoders_module
from segcli.inference import segmentation
from segcli.inference.ahead import Ahead
from segcli.inference.batches import Batch
from segcli.inference.classification import BAND, classify
from segcli.inference.decode_worker import LARGE, seconds_for
from segcli.inference.decoders import Decoded, Decoders
from segcli.inference.products import Segmentation, encode_npz, encode_products
from segcli.inference.segmentation import Segmenter
from segcli.inference.sources import Input
from segcli.models.checkpoint import Model, ModelInfo
from segcli.models.fcn import Network
from segcli.models.preprocessing import Preprocessing
from segcli.palettes import CLASS_SETS, generic_class_set

# ---- running ahead ----


def numbers(count: int, reached: list[int]) -> Iterator[int]:
    for number in range(count):
        reached.append(number)
        yield number


def test_ahead_gives_every_item_in_order() -> None:
    assert list(Ahead(iter(range(100)), 3, threading.Event())) == list(range(100))
    assert list(Ahead(iter(()), 3, threading.Event())) == []


def test_ahead_is_bounded() -> None:
    reached: list[int] = []
    stop = threading.Event()
    ahead = Ahead(numbers(100, reached), 3, stop)
    assert next(ahead) == 0
    assert next(ahead) == 1
    stop.set()
    ahead.thread.join()
    assert max(reached) <= 2 + 3  # taken, queued, and one in the hand


def test_ahead_hands_over_errors_after_the_items() -> None:
    def failing() -> Iterator[int]:
        yield 1
        raise MachineError("disk full")

    ahead = Ahead(failing(), 3, threading.Event())
    assert next(ahead) == 1
    with pytest.raises(MachineError, match="disk full"):
        next(ahead)


def test_ahead_can_look_without_taking() -> None:
    ahead = Ahead(iter([7]), 3, threading.Event())
    assert ahead.wait()
    assert ahead.poll(0) == 7
    with pytest.raises(StopIteration):
        ahead.poll(1)
    assert not Ahead(iter(()), 3, threading.Event()).wait()


def test_a_stopped_ahead_ends_on_both_sides() -> None:
    stop = threading.Event()
    closed: list[bool] = []

    def endless() -> Iterator[int]:
        try:
            while True:
                yield 1
        finally:
            closed.append(True)

    ahead = Ahead(endless(), 2, stop)
    assert next(ahead) == 1
    stop.set()
    assert list(ahead) == []
    ahead.thread.join()
    assert closed == [True]


# ---- decoding ----

# A worker that meets its fate by the name of the file.
FATES = """
import os, signal, sys, time
from segcli.inference import decode_worker

real = decode_worker.READERS["image"]

def reader(path, announce):
    name = os.path.basename(path)
    for fate in ("SEGV", "KILL", "ABRT", "BUS"):
        if fate in name:
            os.kill(os.getpid(), getattr(signal, "SIG" + fate))
    if "exit" in name:
        os._exit(3)
    if "memory" in name:
        bytearray(1 << 45)
    if "bug" in name:
        raise KeyError("surprise")
    while "loop" in name:
        pass
    if "sleep" in name:
        time.sleep(1000)
    if "half" in name:
        os.write(int(sys.argv[1]), bytes(3))  # of the answer
        time.sleep(1000)
    return real(path, announce)

decode_worker.READERS["image"] = reader
decode_worker.main()
"""


def decode_all(
    paths: list[Path], workers: int, program: tuple[str, ...] = decoders_module.PROGRAM
) -> tuple[dict[str, Decoded], Decoders]:
    stop = threading.Event()
    decoders = Decoders(workers, "image", stop, program)
    items = Ahead(iter([Input(str(path), path.name) for path in paths]), 8, stop)
    decoded = {}
    for one in decoders.run(items):
        assert Path(one.item.source).name not in decoded
        decoded[Path(one.item.source).name] = one
        decoders.release(one)
    return decoded, decoders


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_workers_read_what_the_reader_reads(tmp_path: Path, workers: int) -> None:
    paths = [save_picture(tmp_path / f"{n}.png", 20 + n, 30, n) for n in range(7)]
    (tmp_path / "bad.jpg").write_text("hello")
    (tmp_path / "empty.jpg").write_bytes(b"")
    paths += [tmp_path / "bad.jpg", tmp_path / "empty.jpg", tmp_path / "gone.jpg"]
    decoded, _ = decode_all(paths, workers)
    assert len(decoded) == 10
    for path in paths[:7]:
        one = decoded[path.name]
        assert one.pixels is not None
        np.testing.assert_array_equal(one.pixels, read_image(path).pixels)
        assert one.content is not None
        assert (one.content.size, one.content.sha256) == (path.stat().st_size, sha256(path))
        assert one.content.mtime_ns == path.stat().st_mtime_ns
    assert decoded["bad.jpg"].problem == "not an image (it starts with 'hello')"
    assert decoded["empty.jpg"].problem == "the file is empty"
    assert decoded["gone.jpg"].problem.startswith("no such file")
    assert all(decoded[name].pixels is None for name in ("bad.jpg", "empty.jpg", "gone.jpg"))


def test_a_file_that_kills_its_decoder_costs_only_itself(tmp_path: Path) -> None:
    good = [save_picture(tmp_path / f"{n}.jpg", seed=n) for n in range(6)]
    fates = ["SEGV.jpg", "KILL.jpg", "ABRT.jpg", "BUS.jpg", "exit.jpg", "memory.jpg", "bug.jpg"]
    bad = [save_picture(tmp_path / name) for name in fates]
    mixed = [path for pair in zip(bad, [*good, good[0]], strict=True) for path in pair][:-1]
    decoded, _ = decode_all(mixed, 2, (sys.executable, "-c", FATES))
    assert {name: one.problem for name, one in decoded.items() if one.problem} == {
        "SEGV.jpg": "its decoder crashed (SIGSEGV)",
        "KILL.jpg": "its decoder was killed (SIGKILL), most likely because memory ran out",
        "ABRT.jpg": "its decoder crashed (SIGABRT)",
        "BUS.jpg": "its decoder crashed (SIGBUS)",
        "exit.jpg": "its decoder ended with exit code 3",
        "memory.jpg": "decoding it needs more memory than there is",
        "bug.jpg": "cannot be decoded (KeyError: 'surprise')",
    }
    for path in good:
        np.testing.assert_array_equal(decoded[path.name].pixels, read_image(path).pixels)


@pytest.mark.parametrize("fate", ["loop.jpg", "sleep.jpg"])
def test_a_file_that_takes_for_ever_is_given_up(
    tmp_path: Path, fate: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decoders_module, "seconds_for", lambda size, pixels=0: 0.3)
    paths = [save_picture(tmp_path / name) for name in (fate, "good.jpg")]
    decoded, decoders = decode_all(paths, 1, (sys.executable, "-c", FATES))
    assert decoded["good.jpg"].pixels is not None
    assert decoded[fate].problem == "reading it took longer than 0 s"
    assert all(worker.process.returncode is not None for worker in decoders._workers)


def test_a_decoder_that_stops_in_the_middle_of_an_answer_is_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decoders_module, "STALLED", 1)
    paths = [save_picture(tmp_path / name) for name in ("half.jpg", "good.jpg")]
    decoded, _ = decode_all(paths, 1, (sys.executable, "-c", FATES))
    assert decoded["good.jpg"].pixels is not None
    assert decoded["half.jpg"].problem == "its decoder stopped in the middle of an answer"


def test_an_orphan_that_loops_ends_itself(tmp_path: Path) -> None:
    ours, theirs = decoders_module.socket.socketpair()
    with ours, theirs:
        path = save_picture(tmp_path / "loop.jpg")
        process = decoders_module.subprocess.Popen(
            [sys.executable, "-c", FATES, str(theirs.fileno())], pass_fds=[theirs.fileno()]
        )
        assert decoders_module.receive(ours)[0] == {"ready": True}
        job = {"path": str(path), "reader": "image", "seconds": 0.05}  # and nobody who watches
        decoders_module.send(ours, job)
        assert process.wait(60) == -signal.SIGPROF


def test_workers_that_do_not_start_are_the_machines_fault(tmp_path: Path) -> None:
    with pytest.raises(MachineError, match=r"do not start .*exit code 5.*--workers 0"):
        decode_all([save_picture(tmp_path / "a.jpg")], 1, (sys.executable, "-c", "raise SystemExit(5)"))


def test_large_images_wait_for_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    side = 1500
    assert side * side > LARGE
    monkeypatch.setattr(decoders_module, "ROOM", side * side)
    paths = [save_picture(tmp_path / f"{n}.png", side, side, n) for n in range(3)]
    stop = threading.Event()
    decoders = Decoders(3, "image", stop)
    held: list[Decoded] = []
    for one in decoders.run(Ahead(iter([Input(str(path), path.name) for path in paths]), 8, stop)):
        assert one.room == side * side
        assert decoders._room_used == side * side  # never two at a time
        held.append(one)
        decoders.release(one)
    assert len(held) == 3
    assert decoders._room_used == 0


def test_time_limits_grow_with_the_file() -> None:
    assert seconds_for(0) == 10
    assert seconds_for(5_000_000, 8_000_000) == 10 + 1 + 2


# ---- computing ----


class Windows(Network):
    """Scores for three classes: how red, green and blue the neighbourhood of a pixel is."""

    def __init__(self, most: int = 1000, coarse: int = 1) -> None:
        super().__init__()
        self.num_classes, self.stride = 3, 1
        self.most = most  # images at a time that "fit into memory"
        self.coarse = coarse
        self.seen: list[int] = []

    def __deepcopy__(self, memo: object) -> Windows:
        return self  # tests look at what it has seen

    def score_pyramid(self, images: Tensor) -> list[Tensor]:
        self.seen.append(len(images))
        if len(images) > self.most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")
        size = (max(1, images.shape[2] // self.coarse), max(1, images.shape[3] // self.coarse))
        return [F.interpolate(F.avg_pool2d(images, 3, 1, 1), size, mode="area")]

    def upsample(self, scores: Tensor, size: tuple[int, int]) -> Tensor:
        return scores


def model_of(network: Network) -> Model:
    info = ModelInfo("test", generic_class_set(3), Preprocessing(mean=(0.5, 0.5, 0.5), std=(1, 1, 1)))
    return Model(network, info, Path("test"), "")


def pictures_of(sizes: list[tuple[int, int]]) -> list[Decoded]:
    return [Decoded(Input(f"{n}.png", f"{n}.png"), picture(*size, seed=n)) for n, size in enumerate(sizes)]


def coming(pictures: Iterable[Decoded]) -> Ahead[Decoded]:
    """Pictures as the engine hands them on."""
    return Ahead(iter(pictures), 1, threading.Event())


def computed(
    network: Network, sizes: list[tuple[int, int]], batch: int, at_once: int = 1
) -> dict[str, bytes | str]:
    """Labels, or the reason why there are none, by source."""
    segmenter = Segmenter(model_of(network), torch.device("cpu"), ["mask"], batch)
    assert segmenter.batch_size == 1  # on the CPU, whatever was asked for
    segmenter.batch_size, segmenter.at_once, segmenter.side_by_side = batch, at_once, 0  # as on a GPU
    return {
        done.item.source: str(result) if isinstance(result, ImageError) else result.labels.tobytes()
        for done, result in segmenter.compute(coming(pictures_of(sizes)))
    }


SIZES = [(20, 30), (30, 20), (20, 30), (1, 1), (20, 30), (30, 20), (20, 30), (20, 30)]


@pytest.mark.parametrize("at_once", [1, 2])
@pytest.mark.parametrize("batch", [2, 3, 8, 100])
def test_batches_hold_one_size_and_change_nothing(batch: int, at_once: int) -> None:
    network = Windows()
    assert computed(network, SIZES, batch, at_once) == computed(Windows(), SIZES, 1)
    assert sum(network.seen) == len(SIZES)
    assert max(network.seen) == min(batch, 5)  # five of 20 x 30


@pytest.mark.parametrize("at_once", [1, 2])
@pytest.mark.parametrize("most", [1, 2, 3])
def test_out_of_memory_above_a_batch_size_backs_off(most: int, at_once: int) -> None:
    network = Windows(most)
    assert computed(network, [(20, 30)] * 12, 8, at_once) == computed(Windows(), [(20, 30)] * 12, 1)
    assert network.seen.count(8) == 1  # it is tried once, and remembered


def test_out_of_memory_for_one_image_is_reported() -> None:
    reason = "there is not enough memory to compute 30 x 20 pixels; try --size 500"
    assert computed(Windows(most=0), [(20, 30)] * 2, 2) == {"0.png": reason, "1.png": reason}


class Picky(Windows):
    """Refuses images of 30 rows."""

    def score_pyramid(self, images: Tensor) -> list[Tensor]:
        if images.shape[2] == 30:
            raise RuntimeError("I do not like it\nand say so at length")
        return super().score_pyramid(images)


def test_an_image_that_the_network_refuses_fails_alone() -> None:
    results = computed(Picky(), SIZES, 4)
    clean = computed(Windows(), SIZES, 1)
    refused = "the network cannot compute 20 x 30 pixels: I do not like it"
    for number, size in enumerate(SIZES):
        expected = refused if size == (30, 20) else clean[f"{number}.png"]
        assert results[f"{number}.png"] == expected


def test_large_images_are_computed_alone_and_at_once() -> None:
    segmenter = Segmenter(model_of(Windows()), torch.device("cpu"), ["mask"])
    segmenter.batch_size, segmenter.side_by_side = 8, 0
    pictures = pictures_of([(20, 30)] * 3)
    pictures[1].room = LARGE + 1
    assert [p.item.source for p, _ in segmenter.compute(coming(pictures))] == ["1.png", "0.png", "2.png"]


class OnItsOwn(Segmenter):
    """Computes as a GPU does: it is done only when somebody waits for it."""

    def __init__(self, network: Network, batch: int) -> None:
        super().__init__(model_of(network), torch.device("cpu"), ["mask"])
        self.batch_size, self.at_once, self.side_by_side = batch, 2, 0
        self.asked: list[int] = []  # images in every batch

    def begin(self, pictures: Sequence[Decoded]) -> Batch:
        self.asked.append(len(pictures))
        return replace(super().begin(pictures), done=cast(torch.cuda.Event, Waited()))


class Waited:
    """An event that has not happened until it is waited for."""

    def query(self) -> bool:
        return False

    def synchronize(self) -> None:
        pass


def test_a_gpu_is_asked_for_the_next_batch_before_results_are_fetched() -> None:
    segmenter = OnItsOwn(Windows(), batch=2)
    asked = [list(segmenter.asked) for _ in segmenter.compute(coming(pictures_of([(20, 30)] * 7)))]
    # All have come before the first result is waited for; the seventh had to wait for others.
    assert asked == [[2, 2], [2, 2], [2, 2, 2], [2, 2, 2], [2, 2, 2, 1], [2, 2, 2, 1], [2, 2, 2, 1]]


def test_a_gpu_that_has_nothing_to_do_takes_what_fills_no_batch() -> None:
    network, pictures = Windows(), pictures_of([(20, 30)] * 5)
    segmenter = Segmenter(model_of(network), torch.device("cpu"), ["mask"])
    segmenter.batch_size, segmenter.at_once, segmenter.side_by_side = 4, 2, 0
    released = threading.Event()

    def a_few() -> Iterator[Decoded]:
        yield from pictures[:3]
        assert released.wait(60)  # as a station does that is given no more until these are done
        yield from pictures[3:]

    for done, _ in segmenter.compute(coming(a_few())):
        if done is pictures[2]:
            released.set()
    assert network.seen == [3, 2]


@pytest.mark.parametrize("lanes", [1, 2, 5])
def test_images_side_by_side_come_in_order_and_change_nothing(lanes: int) -> None:
    sizes = [*SIZES, (600, 500), (600, 500), *SIZES]  # 300,000 pixels are too many for one thread
    segmenter = Segmenter(model_of(Windows()), torch.device("cpu"), ["mask"])
    segmenter.side_by_side = lanes
    found = list(segmenter.compute(coming(pictures_of(sizes))))
    assert [done.item.source for done, _ in found] == [f"{number}.png" for number in range(len(sizes))]
    one_by_one = computed(Windows(), sizes, 1)
    assert {done.item.source: result.labels.tobytes() for done, result in found} == one_by_one


def test_side_by_side_what_holds_room_goes_on_before_the_next_is_read() -> None:
    segmenter = Segmenter(model_of(Windows()), torch.device("cpu"), ["mask"])
    segmenter.side_by_side = 4
    pictures = pictures_of([(20, 30)] * 5)
    released = threading.Event()

    def one_by_one() -> Iterator[Decoded]:
        pictures[2].room = LARGE + 1
        yield from pictures[:3]
        assert released.wait(60)  # as decoders do, when there is no more room
        yield from pictures[3:]

    for done, _ in segmenter.compute(coming(one_by_one())):
        if done.room:
            released.set()
    assert released.is_set()


def test_an_image_that_fails_side_by_side_fails_alone() -> None:
    segmenter = Segmenter(model_of(Picky()), torch.device("cpu"), ["mask"])
    found = [result for _, result in segmenter.compute(coming(pictures_of(SIZES)))]
    assert [isinstance(result, ImageError) for result in found] == [size == (30, 20) for size in SIZES]


def test_a_picture_that_cannot_be_prepared_is_told_in_its_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    prepare = segmentation.to_pixels

    def picky(image: Any, preprocessing: Preprocessing) -> Tensor:
        if len(image) == 1:
            raise RuntimeError("CUDA error: out of memory")
        return prepare(image, preprocessing)

    monkeypatch.setattr(segmentation, "to_pixels", picky)
    clean = computed(Windows(), SIZES, 2)
    assert clean == computed(Windows(), SIZES, 2, at_once=2)
    assert clean["3.png"] == "there is not enough memory to compute 1 x 1 pixels; try --size 500"


def test_the_size_can_be_overridden() -> None:
    segmenter = Segmenter(model_of(Windows()), torch.device("cpu"), ["mask"], shorter_side=10)
    ((_, result),) = segmenter.compute(coming(pictures_of([(40, 60)])))
    assert isinstance(result, Segmentation)
    assert result.labels.shape == (40, 60)


# ---- from scores to classes ----


def test_classes_of_scores_written_out() -> None:
    scores = torch.tensor([[[1.0, 2.0]], [[3.0, 0.0]], [[2.0, 2.0]]])  # (3 classes, 1 row, 2 columns)
    result = classify(scores[None], (1, 2), confidence=True, probabilities=True).of(0)
    assert result.labels.tolist() == [[1, 0]]  # of equal scores the first
    assert result.labels.dtype == np.uint8
    # softmax(1, 3, 2) = (0.0900, 0.6652, 0.2447); softmax(2, 0, 2) = (0.4683, 0.0634, 0.4683)
    assert result.confidence is not None
    assert result.confidence.tolist() == [[round(0.6652 * 255), round(0.4683 * 255)]]
    assert result.probabilities is not None
    assert result.probabilities.dtype == np.float16
    expected = [[[0.0900, 0.4683]], [[0.6652, 0.0634]], [[0.2447, 0.4683]]]
    np.testing.assert_allclose(result.probabilities, expected, atol=5e-4)


@pytest.mark.parametrize("band", [5 * 70 * 8, 5 * 70 * 90, 2 * 5 * 70 * 90])  # 8 rows, one image, two
def test_classes_do_not_depend_on_how_many_are_computed_at_a_time(
    band: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    scores = torch.randn(3, 5, 12, 10, generator=torch.Generator().manual_seed(0))
    whole = [classify(each[None], (90, 70), confidence=True, probabilities=True).of(0) for each in scores]
    monkeypatch.setitem(BAND, "cpu", band)
    bands = classify(scores, (90, 70), confidence=True, probabilities=True)
    for number, alone in enumerate(whole):
        found = bands.of(number)
        np.testing.assert_array_equal(found.labels, alone.labels)
        np.testing.assert_array_equal(found.confidence, alone.confidence)
        assert found.probabilities is not None
        assert alone.probabilities is not None
        np.testing.assert_array_max_ulp(found.probabilities, alone.probabilities)  # strips round otherwise


def test_many_classes_need_16_bits() -> None:
    scores = torch.zeros(1, 300, 2, 2)
    scores[:, 299] = 1
    labels = classify(scores, (2, 2)).of(0).labels
    assert labels.dtype == np.uint16
    assert labels.tolist() == [[299, 299], [299, 299]]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_scores_that_are_not_finite_are_an_error_of_their_image(value: float) -> None:
    scores = torch.zeros(2, 3, 4, 4)
    scores[1, 1, 2, 2] = value
    found = classify(scores, (4, 4))
    assert found.of(0).labels.max() == 0
    with pytest.raises(ImageError, match="not finite"):
        found.of(1)


# ---- files ----


def test_npz_is_compressed_readable_and_without_a_date() -> None:
    values = np.arange(24, dtype=np.float16).reshape(2, 3, 4)
    data = encode_npz(probabilities=values)
    assert data == encode_npz(probabilities=values)
    with np.load(io.BytesIO(data)) as loaded:
        assert loaded.files == ["probabilities"]
        np.testing.assert_array_equal(loaded["probabilities"], values)
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        (info,) = archive.infolist()
    assert info.compress_type == zipfile.ZIP_DEFLATED
    assert info.date_time == (1980, 1, 1, 0, 0, 0)


def test_a_product_that_a_format_cannot_hold_is_named() -> None:
    wide = np.zeros((1, 65_501, 3), np.uint8)
    result = Segmentation(np.zeros((1, 65_501), np.uint8))
    with pytest.raises(ImageError, match=r"no overlay can be saved: .* do not fit into a JPEG"):
        encode_products(wide, result, CLASS_SETS["voc"], ["mask", "overlay"], 0.5)
