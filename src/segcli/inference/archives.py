"""Results in tar files, many in each, as the WebDataset library reads them: `--out-format webdataset`.

    masks/masks-5d41402abc4b2a76.tar    the name follows from the content
        a/b.mask.png a/b.overlay.jpg a/b.json    one sample: what was saved for an input, and what it is
        a/c.mask.png ...

Only the process that keeps the manifest writes them: encoded results come to it from wherever they are
computed. A tar is complete before the lines of its samples are noted, all at once. So a tar that was not
noted is only one too many, and what it holds is done again. Samples that a later one replaced stay in their
tar until the run ends: then such tars are written anew without them (`repack`), and tars in which nothing is
left, or that no line names, are deleted (`sweep`).

Format: https://github.com/webdataset/webdataset#the-webdataset-format
"""

from __future__ import annotations

import hashlib
import io
import json
import posixpath
import re
import tarfile
import threading
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

from segcli.files import machine_errors
from segcli.inference.layout import PLACES, mask_of
from segcli.inference.manifest import Archive, Entry, compact, names_archive
from segcli.inference.storage import Storage

SAMPLES = 1000  # in a tar, at most
BYTES = 64 << 20  # of results in a tar; it has more by those of the last sample
MEMORY_SHARE = 32  # of the memory that a run may take, the part for the results of one tar; 3 may be held
NAME = re.compile(r"masks-[0-9a-f]{16}\.tar")

Sample = Mapping[str, bytes]  # by the part of a member's name that follows the key: "mask.png"


def key_of(output: str) -> str:
    """The key of a sample: the mask's path without its suffix.

    WebDataset takes what precedes the first dot of a file's name for the key. So a dot in it becomes %2E, and
    a % anywhere becomes %25: different paths have different keys, and `urllib.parse.unquote` gives the path.
    """
    folder, name = posixpath.split(posixpath.splitext(output)[0].replace("%", "%25"))
    return posixpath.join(folder, name.replace(".", "%2E"))


def field_of(kind: str) -> str:
    """What the members of a kind of product are called after the key: "mask.png"."""
    return kind + PLACES[kind][1]


def sample_of(entry: Entry, files: Mapping[str, bytes]) -> Sample:
    """All that a tar holds of one input. It does not depend on when or how it was computed."""
    about = {
        "source": entry.source,
        "width": entry.width,
        "height": entry.height,
        "classes": dict(entry.classes),
    }
    members = {field_of(kind): data for kind, data in files.items()}
    return {**members, "json": json.dumps(about).encode() + b"\n"}


def pack(samples: Mapping[str, Sample]) -> bytes:
    """A tar of samples by key. The same samples give the same bytes, whatever their order."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for key in sorted(samples):
            for field, data in samples[key].items():
                member = tarfile.TarInfo(f"{key}.{field}")  # of 1970, by nobody, mode 0644
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    return file.getvalue()


def unpack(data: bytes) -> dict[str, dict[str, bytes]]:
    """The samples of a tar by key; of one that is damaged, those before the damage."""
    samples: dict[str, dict[str, bytes]] = {}
    try:
        with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as tar:
            for member in tar:
                folder, name = posixpath.split(member.name)
                stem, _, field = name.partition(".")
                if content := tar.extractfile(member):
                    samples.setdefault(posixpath.join(folder, stem), {})[field] = content.read()
    except tarfile.TarError:
        pass
    return samples


def write(out: Storage, samples: Mapping[str, Sample]) -> Archive:
    """Write a tar into the output folder. Raises MachineError."""
    data = pack(samples)
    name = f"masks-{hashlib.sha256(data).hexdigest()[:16]}.tar"
    return Archive(name, len(samples), out.write(name, data))


class Packer:
    """Collects results, and writes them a tar at a time, in a thread: meanwhile the next ones come.

    Args:
        out: The output folder.
        note: Gets the entries of a tar when it is complete.
        memory: Bytes that the run may take; None sets no limit.
    """

    def __init__(
        self, out: Storage, note: Callable[[Sequence[Entry]], None], memory: int | None = None
    ) -> None:
        self._out = out
        self._note = note
        self._most = BYTES if memory is None else min(BYTES, memory // MEMORY_SHARE)
        self._lock = threading.Lock()
        self._held: list[tuple[Entry, Mapping[str, bytes]]] = []
        self._size = 0  # bytes that are held
        self._thread = ThreadPoolExecutor(1)
        self._writing: Future[None] | None = None
        self._added = self._noted = 0

    @property
    def unnoted(self) -> int:
        """How many results were added that are in no tar."""
        return self._added - self._noted

    def add(self, entry: Entry, files: Mapping[str, bytes]) -> None:
        """Add the files of an input, by kind. Waits while a tar is written and another one is full.

        Raises:
            MachineError: A tar could not be written.
        """
        with self._lock:
            if self._writing is not None and self._writing.done():
                self._writing.result()  # raises what went wrong
            self._held.append((entry, files))
            self._size += sum(map(len, files.values()))
            self._added += 1
            if len(self._held) >= SAMPLES or self._size >= self._most:
                self._hand_over()

    def close(self) -> None:
        """Write what is left. Raises MachineError."""
        with self._lock, self._thread:
            self._hand_over()
            if self._writing is not None:
                self._writing.result()

    def _hand_over(self) -> None:
        if self._writing is not None:
            self._writing.result()
        if self._held:
            self._writing = self._thread.submit(self._write, self._held)
            self._held, self._size = [], 0

    def _write(self, held: Sequence[tuple[Entry, Mapping[str, bytes]]]) -> None:
        samples = {key_of(mask_of(entry.output or "")): sample_of(entry, files) for entry, files in held}
        archive = write(self._out, samples)
        self._note([replace(entry, archive=archive) for entry, _ in held])
        self._noted += len(held)


def repack(manifest: Path, out: Storage) -> set[str]:
    """Write the tars anew that hold more than the manifest says of them, and note that.

    It may be killed at any moment and run again: the old tars are left to `sweep`.

    Args:
        manifest: The manifest of the whole folder, compacted; while the folder is `opened`.
        out: The folder.

    Returns:
        The names of all tars that are needed.

    Raises:
        MachineError: Nothing can be written, ...
    """
    names: set[str] = set()
    changed = False
    with machine_errors(manifest, "write"), manifest.open("rb") as old, manifest.open("ab") as new:
        for name, (samples, positions) in _by_archive(manifest).items():
            if len(positions) == samples:
                names.add(name)
                continue
            entries = []
            for position in positions:
                old.seek(position)
                if (entry := Entry.parse(old.readline())) is not None:
                    entries.append(entry)
            for entry in _moved(out, name, entries):
                new.write(entry.line())
                names.update([entry.archive.name] if entry.archive else [])
            changed = True
    if changed:
        compact(manifest)
        out.publish(manifest)
    return names


def sweep(out: Storage, names: set[str]) -> None:
    """Delete all tars of the output folder but those."""
    for name in out.files(""):
        if NAME.fullmatch(name) and name not in names:
            out.remove(name)


def _by_archive(manifest: Path) -> dict[str, tuple[int, array[int]]]:
    """The tars that a manifest names: how many samples they were written with, and where its lines start."""
    found: dict[str, tuple[int, array[int]]] = {}
    position = 0
    with manifest.open("rb") as file:
        for line in file:
            if names_archive(line):
                archive = json.loads(line)["archive"]
                found.setdefault(archive["name"], (archive["samples"], array("q")))[1].append(position)
            position += len(line)
    return found


def _moved(out: Storage, name: str, entries: Sequence[Entry]) -> Iterator[Entry]:
    """Put the samples of some entries into a tar of their own, and yield what is now true of them."""
    held = unpack(out.read(name) or b"")
    kept, lost = {}, []
    for entry in entries:
        key = key_of(mask_of(entry.output or ""))
        if _is_whole(held.get(key, {}), entry):
            kept[key] = entry
        else:
            lost.append(entry)
    if kept:
        archive = write(out, {key: held[key] for key in kept})
        yield from (replace(entry, archive=archive) for entry in kept.values())
    reason = f"{name}, which held its results, is damaged; run the same command again"
    for entry in lost:
        yield Entry(entry.source, None, "failed", reason, model=entry.model, input=entry.input)


def _is_whole(sample: Mapping[str, bytes], entry: Entry) -> bool:
    return all(
        hashlib.sha256(sample.get(field_of(kind), b"")).hexdigest() == noted.sha256
        for kind, noted in entry.files.items()
    )
