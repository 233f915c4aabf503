"""Where results are kept, and how the state of a file is told: a folder of this machine is one `Storage`.

Every name is relative to the output folder and has "/": "a/b.png", "_run/run.json". A `Storage` promises that
a name holds either what it held before or all of what was written, and that one run at a time writes there.
What lies below a URL is in `remote.py`, which is imported when the first URL is met.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from segcli.errors import MachineError
from segcli.files import TEMPORARY_PREFIX, locked, machine_errors, remove_leftovers, sha256, write_atomic
from segcli.inference.layout import LOCK_FILE, MANIFEST_FILE, RUN_FOLDER

ALIASES = {"s3a": "s3", "gcs": "gs"}


@dataclass(frozen=True)
class Content:
    """What tells one state of a file from another."""

    size: int  # bytes
    mtime_ns: int
    ctime_ns: int
    sha256: str
    etag: str = ""  # what an object store calls this state; "" on a disk


class Storage(Protocol):
    """Where results are kept. `str` is its name as the user wrote it."""

    at_a_time: int  # writes that it takes at a time before more make it no faster

    def place(self, name: str) -> str:
        """The name of a file for people."""

    def folders(self, name: str) -> list[str]:
        """The names of the folders in a folder; none when it does not exist."""

    def files(self, name: str) -> list[str]:
        """The names of the files in a folder; none when it does not exist."""

    def read(self, name: str) -> bytes | None:
        """The content of a file, None when there is none."""

    def write(self, name: str, data: bytes) -> Content:
        """Write a file, all of it or nothing. Raises MachineError."""

    def remove(self, name: str) -> None:
        """Delete a file; one that is not there or cannot be deleted is left alone."""

    def content_now(self, name: str, noted: Content | None) -> Content | None:
        """The present state of a file: `noted` itself when it is that, None when it holds something else."""

    def ignores_case(self) -> bool:
        """Whether "A.png" and "a.png" are one file. Asked while it is `opened`."""

    def opened(self) -> AbstractContextManager[Path]:
        """Keep it to this process, and yield the file of this machine to which the manifest is written.

        Of a shard, only its record is kept to this process, and the folder to the processes of all shards.

        Raises:
            UsageError: Another process is writing there.
            MachineError: It cannot be made or written to.
        """

    def lines(self, record: str) -> Iterator[bytes]:
        """The lines of a manifest, of the folder or of a shard, as they are known now; none that was torn."""

    def whole_manifest(self) -> Path:
        """The manifest of the folder as a file of this machine, for a shard to read while it is `opened`."""

    def remove_folder(self, name: str) -> None:
        """Delete a folder with all that is in it: on a disk at once, below a URL one after the other."""

    def remove_leftovers(self) -> None:
        """Delete what a killed run left half written."""

    def publish(self, manifest: Path) -> None:
        """The manifest is complete: make it the one that everybody sees. Only while it is `opened`."""


def is_url(path: str) -> bool:
    """Whether a path names something that is not on a disk of this machine."""
    return "://" in path and path.partition("://")[0].isalnum()


def canonical(path: str) -> str:
    """One way to write a path: file:// is a path of this machine, and s3a and gcs are s3 and gs."""
    if not is_url(path):
        return path
    protocol, _, rest = path.partition("://")
    if protocol.lower() in ("file", "local"):
        return rest
    return f"{ALIASES.get(protocol.lower(), protocol.lower())}://{rest}"


def absolute(path: str) -> str:
    """The path of an input as the manifest notes it."""
    return path if is_url(path) else os.path.abspath(path)


def exists(path: str) -> bool:
    """Whether there is anything under a name."""
    if is_url(path):
        from segcli.inference import remote

        return bool(remote.kind_of(path))
    return os.path.lexists(path)


def open_storage(out: str, record: str = RUN_FOLDER) -> Storage:
    """The output folder of a path or a URL.

    Args:
        out: The path or URL.
        record: Where lock and manifest lie in it: for all of it, or those of a shard.

    Raises:
        UsageError: Packages that a URL needs are not installed.
        MachineError: The path is that of a file.
    """
    out = canonical(out)
    if is_url(out):
        from segcli.inference.remote import RemoteFolder

        return RemoteFolder(out, record)
    if Path(out).exists() and not Path(out).is_dir():
        raise MachineError(f"cannot write to {out}: it is a file; choose a folder for --out")
    return Folder(Path(out), record)


class Folder:
    """A folder of this machine.

    Args:
        path: The folder.
        record: Where lock and manifest lie in it: for all of it, or those of a shard.
    """

    at_a_time = 8  # they wait for the disk, which takes what waits together

    def __init__(self, path: Path, record: str = RUN_FOLDER) -> None:
        self._path = path
        self._record = record

    def __str__(self) -> str:
        return str(self._path)

    def place(self, name: str) -> str:
        return str(self._path / name)

    def folders(self, name: str) -> list[str]:
        return [entry.name for entry in self._entries(name) if entry.is_dir()]

    def files(self, name: str) -> list[str]:
        return [entry.name for entry in self._entries(name) if entry.is_file()]

    def _entries(self, name: str) -> list[os.DirEntry[str]]:
        try:
            with os.scandir(self._path / name) as entries:
                return list(entries)
        except OSError:
            return []

    def read(self, name: str) -> bytes | None:
        try:
            return (self._path / name).read_bytes()
        except OSError:
            return None

    def write(self, name: str, data: bytes) -> Content:
        path = self._path / name
        write_atomic(path, data)
        return describe(path, data)

    def remove(self, name: str) -> None:
        with contextlib.suppress(OSError):
            (self._path / name).unlink()

    def content_now(self, name: str, noted: Content | None) -> Content | None:
        return content_now(str(self._path / name), noted)

    def ignores_case(self) -> bool:
        return (self._path / RUN_FOLDER / LOCK_FILE.upper()).exists()

    @contextlib.contextmanager
    def opened(self) -> Iterator[Path]:
        whole, record = self._path / RUN_FOLDER, self._path / self._record
        with contextlib.ExitStack() as locks:
            locks.enter_context(locked(self._path, whole / LOCK_FILE, shared=record != whole))
            if record != whole:
                locks.enter_context(locked(record, record / LOCK_FILE))
            yield record / MANIFEST_FILE

    def lines(self, record: str) -> Iterator[bytes]:
        with contextlib.suppress(FileNotFoundError), (self._path / record / MANIFEST_FILE).open("rb") as file:
            yield from whole_lines(file)

    def whole_manifest(self) -> Path:
        return self._path / RUN_FOLDER / MANIFEST_FILE

    def remove_folder(self, name: str) -> None:
        folder = self._path / name
        doomed = folder.with_name(TEMPORARY_PREFIX + folder.name)
        with machine_errors(folder, "remove"):
            folder.rename(doomed)
            shutil.rmtree(doomed)

    def remove_leftovers(self) -> None:
        remove_leftovers(self._path)

    def publish(self, manifest: Path) -> None:
        pass  # it lies there already


def whole_lines(lines: Iterable[bytes]) -> Iterator[bytes]:
    """The lines of a manifest without one that was torn."""
    return (line for line in lines if line.endswith(b"\n"))


def describe(path: Path, data: bytes) -> Content:
    """The state of a file that was just written."""
    status = os.stat(path)
    return Content(status.st_size, status.st_mtime_ns, status.st_ctime_ns, hashlib.sha256(data).hexdigest())


def content_now(path: str, before: Content | None, listed: Content | None = None) -> Content | None:
    """The present state of a file; it is hashed only when its size and times are not those noted.

    Args:
        path: The file.
        before: Its state as it was noted.
        listed: What lies below a URL: its state as its folder was listed.
    """
    if listed is not None:
        from segcli.inference import remote

        return remote.content_now(path, listed, before)
    try:
        status = os.stat(path)
        if before is not None and _same(status, before):
            return before
        if before is None or status.st_size != before.size:
            return None
        return Content(status.st_size, status.st_mtime_ns, status.st_ctime_ns, sha256(Path(path)))
    except OSError:
        return None


def _same(status: os.stat_result, noted: Content) -> bool:
    return (status.st_size, status.st_mtime_ns, status.st_ctime_ns) == (
        noted.size,
        noted.mtime_ns,
        noted.ctime_ns,
    )
