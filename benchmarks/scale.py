"""The figures of docs/scale.md: the manifest, several processes on one machine, a store that is far away.

python benchmarks/scale.py            needs 'segcli[test]'; about half an hour on a busy machine
python benchmarks/scale.py driver     one part: manifest, tars, driver, store, workers
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from segcli.inference.plan import Plan

if TYPE_CHECKING:
    from segcli.inference.ahead import Ahead
    from segcli.inference.decoders import Decoded
    from segcli.inference.manifest import Entry
    from segcli.models.checkpoint import Model

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

LINES = 100_000
SAMPLES = 5_000
IMAGES = 160
COMPUTING = 0.25  # seconds that an image takes where workers are compared
LATENCY = 0.05  # seconds that the store takes for every answer


def entry(number: int) -> Entry:
    """A line about an image in a store, with two products."""
    from segcli.inference.manifest import Entry
    from segcli.inference.storage import Content

    sha256 = hashlib.sha256(str(number).encode()).hexdigest()
    content = Content(123456, 1795478907310717184, 0, sha256, sha256[:32])
    name = f"{number % 1000:03d}/{number:08d}"
    shares = dict.fromkeys(("background", "person", "dog", "sofa"), 0.123456)
    files = {"mask": content, "overlay": content}
    return Entry(
        f"s3://bucket/photos/{name}.jpg", f"{name}.png", "done", None, 500, 375, "fcn8s-voc", 45.1,
        shares, (), "adfb2b76ef639ddf", content, files,
    )  # fmt: skip


def manifest() -> None:
    """Size of a line, and how fast lines are written, read again and tidied (processor time)."""
    from segcli.inference.manifest import open_manifest
    from segcli.inference.storage import Folder

    entries = [entry(number) for number in range(LINES)]
    print(f"manifest: {len(entries[0].line())} bytes per line of a store", end="")
    with tempfile.TemporaryDirectory() as folder:
        out = Folder(Path(folder))
        with open_manifest(out) as record:
            begun = time.process_time()
            for one in entries:
                record.append(one)
            print(f"; lines per second: {LINES / (time.process_time() - begun):,.0f} written", end="")
            begun = time.process_time()
            record.compact()
            print(f", {LINES / (time.process_time() - begun):,.0f} tidied", end="")
        begun = time.process_time()
        with open_manifest(out):
            print(f", {LINES / (time.process_time() - begun):,.0f} opened")


def tars() -> None:
    """How many samples are packed, hashed and written to tars in a second (processor time)."""
    from segcli.inference.archives import Packer
    from segcli.inference.storage import Folder

    files = [{"mask": os.urandom(15_000), "overlay": os.urandom(50_000)} for _ in range(50)]
    with tempfile.TemporaryDirectory() as folder:
        begun = time.process_time()
        packer = Packer(Folder(Path(folder)), lambda entries: None)
        for number in range(SAMPLES):
            packer.add(entry(number), files[number % len(files)])
        packer.close()
        print(f"tars: {SAMPLES / (time.process_time() - begun):,.0f} samples of 65 KB a second")


class Waiting:
    """Work that waits for a network that computes elsewhere, as on a GPU, and gives back a mask."""

    held = 1

    def compute(self, pictures: Ahead[Decoded]) -> Iterator[tuple[Decoded, Any]]:
        for picture in pictures:
            time.sleep(COMPUTING)
            yield picture, picture.pixels

    def encode(self, picture: Decoded, result: Any) -> tuple[dict[str, bytes], dict[str, float]]:
        from segcli.images import encode_mask
        from segcli.palettes import CLASS_SETS

        return {"mask": encode_mask(result[..., 0] % 21, CLASS_SETS["voc"].palette())}, {}


class WaitingPlan(Plan):
    """A plan for that."""

    def start(self, model: Model | None = None) -> Any:
        return Waiting()


def workers() -> None:
    """How the engines share out work: images per second of 1, 2 and 4 workers, each `Waiting`.

    From the first mask to the last, so without what it takes to start.
    """
    import scale  # by its name: workers import it
    from small_model import save_picture, small_model

    from segcli.images import SUFFIXES
    from segcli.inference.cluster import RayCluster, Wishes
    from segcli.inference.engine import Helpers, Progress, run
    from segcli.inference.pipeline import Task
    from segcli.inference.processes import Processes
    from segcli.inference.sources import parse
    from segcli.inference.storage import open_storage

    os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    print(f"workers: {1 / COMPUTING:.0f} images/s each; load average {os.getloadavg()[0]:.0f}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(IMAGES):
            save_picture(Path(folder, f"in/{seed:03d}.jpg"), 375, 500, seed)
        plan = scale.WaitingPlan(small_model(), "cpu", "fp32", ["mask"])
        for name in ("processes", "Ray actors"):
            for count in (1, 2, 4):
                out = Path(folder, f"{name} {count}")
                task: Task[Any] = Task(
                    sources=parse([f"{folder}/in"], None, str(out), SUFFIXES),
                    out=open_storage(str(out)),
                    kinds=["mask"],
                    model="waiting",
                    settings={"weights": ""},
                    options={},
                    start=plan.start,
                )
                cluster = RayCluster(Wishes(actors=count, cpus_per_actor=1), "cpu")
                cluster.prepare(plan, "auto", lambda: None)
                helpers: Helpers = cluster if name == "Ray actors" else Processes(task, [plan.start] * count)
                run(task, Progress(), helpers)
                times = sorted(path.stat().st_mtime for path in out.glob("*.png"))
                rate = (len(times) - 1) / (times[-1] - times[0])
                print(f"workers: {count} {name}: {rate:.1f} images/s", flush=True)


def driver() -> None:
    """How many images per second the driver of a Ray run can note (processor time)."""
    import threading

    from segcli.inference.cluster import _Run
    from segcli.inference.cluster_workers import pack, unpack
    from segcli.inference.manifest import open_manifest
    from segcli.inference.sources import Input
    from segcli.inference.storage import Folder

    entries = [entry(number) for number in range(LINES)]
    tables = [
        pack(([(one.source, one, {}) for one in entries[start : start + 32]], False))
        for start in range(0, LINES, 32)
    ]
    with tempfile.TemporaryDirectory() as folder, open_manifest(Folder(Path(folder))) as record:
        noted = (lambda source, one, files: record.append(one), lambda: None, threading.Event())
        run = _Run(None, *noted)  # type: ignore[arg-type]
        run.held.update({one.source: Input(one.source, one.output or "") for one in entries})
        begun = time.process_time()
        for table in tables:
            for row in unpack(table):
                run._take(*row)
        print(f"driver: {LINES / (time.process_time() - begun):,.0f} images noted a second")


def store() -> None:
    """Images per second from and to a store that takes its time, one request at a time and sixteen."""
    import pytest
    from object_store import put, serving
    from small_model import picture, small_model

    from segcli.cli import main
    from segcli.images import encode_jpeg
    from segcli.inference import fetching, remote

    with pytest.MonkeyPatch.context() as environment, tempfile.TemporaryDirectory() as folder:
        environment.setenv("SEGCLI_CACHE", folder)
        with serving(environment) as server:
            for seed in range(IMAGES):
                put(f"in/{seed:03d}.jpg", encode_jpeg(picture(96, 128, seed)))
            server.refuse = lambda method, path: time.sleep(LATENCY)
            for at_a_time in (1, 16):
                fetching.AT_A_TIME = remote.RemoteFolder.at_a_time = at_a_time
                server.requests.clear()
                begun = time.monotonic()
                words = ["predict", "s3://bucket/in", "--out", f"s3://bucket/{at_a_time}", "--quiet"]
                with contextlib.suppress(SystemExit):
                    main([*words, "--model", str(small_model()), "--workers", "1"])
                seconds = time.monotonic() - begun
                kinds = [method for method, _ in server.requests]
                counts = {kind: kinds.count(kind) for kind in sorted(set(kinds))}
                print(
                    f"store: {LATENCY * 1e3:.0f} ms an answer, {at_a_time} requests at a time: "
                    f"{IMAGES / seconds:.1f} images/s; requests {json.dumps(counts)}"
                )


if __name__ == "__main__":
    parts = {"manifest": manifest, "tars": tars, "driver": driver, "store": store, "workers": workers}
    for part in sys.argv[1:] or parts:
        parts[part]()
