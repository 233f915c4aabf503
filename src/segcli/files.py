"""Files that appear under their final name only when complete."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import secrets
import socket
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from segcli.errors import MachineError, UsageError

TEMPORARY_PREFIX = ".segcli-"  # every temporary file starts with this, so that leftovers can be recognised


@contextlib.contextmanager
def machine_errors(path: Path | str, doing: str) -> Iterator[None]:
    """Turn an OSError of the block into a `MachineError` that names the path and the reason."""
    try:
        yield
    except OSError as error:
        hints = {
            errno.ENOSPC: "free some space, then run the same command again",
            errno.EACCES: "choose a folder that you may write to",
            errno.EPERM: "choose a folder that you may write to",
            errno.EROFS: "choose a folder on a disk that is not read-only",
        }
        hint = hints.get(error.errno or 0)
        reason = os.strerror(error.errno) if error.errno else str(error)
        raise MachineError(f"cannot {doing} {path}: {reason}" + (f"; {hint}" if hint else "")) from error


def write_atomic(path: Path, data: bytes | memoryview) -> None:
    """Write a file so that `path` holds either what it held before or all of `data`.

    A temporary file in the same folder is written, flushed to the disk and renamed.
    The folder is made when it is missing.

    Raises:
        MachineError: The disk is full, the folder cannot be written to, ...
    """
    temporary = path.with_name(TEMPORARY_PREFIX + secrets.token_hex(8))
    with machine_errors(path, "write"):
        try:
            _write_through(temporary, data)
        except FileNotFoundError:
            path.parent.mkdir(parents=True, exist_ok=True)
            _write_through(temporary, data)
        try:
            temporary.replace(path)
        except BaseException:
            with contextlib.suppress(OSError):
                temporary.unlink()
            raise


def _write_through(path: Path, data: bytes | memoryview) -> None:
    """Write a new file, and have it on the disk; one that cannot be finished is removed."""
    with path.open("xb") as file:
        try:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        except BaseException:
            with contextlib.suppress(OSError):
                path.unlink()
            raise


def require_writable(folder: Path) -> None:
    """Make an output folder and try it, before hours are spent on what goes there.

    Raises:
        MachineError: It cannot be made, or nothing can be written to it.
    """
    with machine_errors(folder, "write to"):
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(prefix=TEMPORARY_PREFIX, dir=folder):
            pass


@contextlib.contextmanager
def locked(folder: Path | str, lock: Path, shared: bool = False) -> Iterator[None]:
    """Keep an output folder to this process; the system frees it when the process dies, however it dies.

    Args:
        folder: What is written to.
        lock: The file that stands for it; its folder is made when it is missing.
        shared: Let others in that share it, and nobody else.

    Raises:
        UsageError: Another process is writing to the folder.
        MachineError: The lock cannot be made.
    """
    with machine_errors(folder, "write to"):
        lock.parent.mkdir(parents=True, exist_ok=True)
        file = lock.open("a+")
    with file:
        with contextlib.suppress(OSError):  # a file system without locks
            _take(file, folder, shared)
        yield


def _take(file: IO[str], folder: Path | str, shared: bool) -> None:
    try:
        fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = _holder(file)
        raise UsageError(f"{folder} is in use by {holder}; wait for it, or choose another --out") from None
    file.seek(0)
    file.truncate()
    began = time.strftime("%Y-%m-%d %H:%M:%S")
    file.write(f"process {os.getpid()} on {socket.gethostname()} since {began}\n")
    file.flush()


def _holder(file: IO[str]) -> str:
    """Who holds a lock, as it wrote there; it may have taken it at this very moment, and write next."""
    for _ in range(100):
        file.seek(0)
        if holder := file.read().strip():
            return holder
        time.sleep(0.01)
    return "another process"


def remove_leftovers(folder: Path) -> None:
    """Delete the temporary files of a run that was killed."""
    for where, _, names in os.walk(folder):
        for name in names:
            if name.startswith(TEMPORARY_PREFIX):
                Path(where, name).unlink()


def remove_older_leftovers(folder: Path, began: float) -> None:
    """The same in a folder that is not `locked`, and not below it: only what is older than this run.

    Args:
        folder: The folder.
        began: When this run began, as `time.time` gives it. Others hold their temporary files for moments.
    """
    for path in folder.glob(f"{TEMPORARY_PREFIX}*"):
        with contextlib.suppress(OSError):
            if path.stat().st_mtime < began:
                path.unlink()


def sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
