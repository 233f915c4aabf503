"""The figures of docs/scale.md: the manifest, several processes on one machine, a store that is far away.

python benchmarks/scale.py            needs 'segcli[test]'; about a quarter of an hour on a busy core
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

LINES = 100_000
IMAGES = 160
LATENCY = 0.05  # seconds that the store takes for every answer


def manifest() -> None:
    """Size of a line, and how fast lines are written, read again and tidied (processor time)."""
    from segcli.inference.manifest import Entry, open_manifest
    from segcli.inference.storage import Content, Folder

    def entry(number: int) -> Entry:
        sha256 = hashlib.sha256(str(number).encode()).hexdigest()
        content = Content(123456, 1795478907310717184, 0, sha256, sha256[:32])
        name = f"{number % 1000:03d}/{number:08d}"
        shares = dict.fromkeys(("background", "person", "dog", "sofa"), 0.123456)
        files = {"mask": content, "overlay": content}
        return Entry(
            f"s3://bucket/photos/{name}.jpg", f"{name}.png", "done", None, 500, 375, "fcn8s-voc", 45.1,
            shares, (), "adfb2b76ef639ddf", content, files,
        )  # fmt: skip

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


def shards() -> None:
    """Images per second of one, two and four processes, each with a shard, on all processors allowed."""
    from small_model import save_picture

    with tempfile.TemporaryDirectory() as folder:
        for seed in range(IMAGES):
            save_picture(Path(folder, f"in/{seed:03d}.jpg"), 375, 500, seed)
        for count in (1, 2, 4):
            words = ["predict", "in", "--out", f"out{count}", "--workers", "1", "--quiet"]
            commands = [[*words, "--shard", f"{number + 1}/{count}"] for number in range(count)]
            begun = time.monotonic()
            program = [sys.executable, "-m", "segcli"]
            running = [subprocess.Popen([*program, *command], cwd=folder) for command in commands]
            assert not any(process.wait() for process in running)
            seconds = time.monotonic() - begun
            cpus = len(os.sched_getaffinity(0))
            print(f"shards: {count} on {cpus} CPU: {IMAGES / seconds:.1f} images/s, start-up included")


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
    manifest()
    store()
    shards()
