"""Where results are kept, and how their state is told: a folder of this machine is one `Storage`.

Every name is relative to the output folder and has "/": "a/b.png", "_run/run.json". What a `Storage`
promises: a name holds either what it held before or all of what was written; only one run writes at a time.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from segcli.errors import MachineError
from segcli.files import locked, remove_leftovers, sha256, write_atomic
from segcli.inference.layout import LOCK_FILE, MANIFEST_FILE, RUN_FOLDER


@dataclass(frozen=True)
class Content:
    """What tells one state of a file from another."""

    size: int  # bytes
    mtime_ns: int
    ctime_ns: int
    sha256: str


class Storage(Protocol):
    """Where results are kept. `str` is its name as the user wrote it."""

    def place(self, name: str) -> str:
        """The name of a file for people."""

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

        Raises:
            UsageError: Another process is writing there.
            MachineError: It cannot be made or written to.
        """

    def remove_leftovers(self) -> None:
        """Delete what a killed run left half written."""

    def publish(self, manifest: Path) -> None:
        """The manifest is complete: make it the one that everybody sees. Only while it is `opened`."""


class Folder:
    """A folder of this machine."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __str__(self) -> str:
        return str(self._path)

    def place(self, name: str) -> str:
        return str(self._path / name)

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
        if self._path.exists() and not self._path.is_dir():
            raise MachineError(f"cannot write to {self._path}: it is a file; choose a folder for --out")
        with locked(self._path, self._path / RUN_FOLDER / LOCK_FILE):
            yield self._path / RUN_FOLDER / MANIFEST_FILE

    def remove_leftovers(self) -> None:
        remove_leftovers(self._path)

    def publish(self, manifest: Path) -> None:
        pass  # it lies there already


def describe(path: Path, data: bytes) -> Content:
    """The state of a file that was just written."""
    status = path.stat()
    return Content(status.st_size, status.st_mtime_ns, status.st_ctime_ns, hashlib.sha256(data).hexdigest())


def content_now(path: str, before: Content | None) -> Content | None:
    """The present state of a file; it is hashed only when its size and times are not those noted."""
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
