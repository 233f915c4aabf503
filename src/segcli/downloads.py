"""Files from the network: complete and checked under their final name, or not there at all.

A download goes to a hidden `.part` file beside its target. A second try, in this process or a later one,
continues it with a Range request where the server proves that the file is still the same (If-Range, RFC 9110
section 13.1.5) or where a checksum will tell; a server that ignores Range starts over. The file gets its name
only after its length and its checksum were right. Who gets a file holds a lock, so that a second process
waits and then finds it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from segcli.errors import MachineError
from segcli.files import TEMPORARY_PREFIX, machine_errors

if TYPE_CHECKING:
    import httpx

TRIES = 3
PAUSE_SECONDS = 2.0  # before the second try; twice as long before the third
STALL_SECONDS = 30.0  # without a byte, until a try is given up


class Watch(Protocol):
    """Who hears of a download."""

    def say(self, text: str) -> None:
        """A line for people."""

    def progress(self, done: int, total: int | None) -> None:
        """Bytes on disk, and how many there will be, if the server says so."""


class Silent:
    """Hears nothing."""

    def say(self, text: str) -> None:
        pass

    def progress(self, done: int, total: int | None) -> None:
        pass


SILENT = Silent()


class _Broken(Exception):
    """This try failed; the next may not."""


class _Refused(_Broken):
    """The server will not give the file; asking it again is no use."""


def cache_folder() -> Path:
    """Where downloads are kept: SEGCLI_CACHE, or the platform's place for caches."""
    import platformdirs

    chosen = os.environ.get("SEGCLI_CACHE")
    return Path(chosen) if chosen else platformdirs.user_cache_path("segcli", appauthor=False)


def is_offline() -> bool:
    """Whether SEGCLI_OFFLINE forbids the network."""
    return os.environ.get("SEGCLI_OFFLINE", "").lower() not in ("", "0", "false", "no")


@contextlib.contextmanager
def only_one(target: Path, watch: Watch = SILENT) -> Iterator[None]:
    """Let one process at a time make `target`; others wait. Its folder is made when it is missing."""
    import filelock

    with machine_errors(target.parent, "write into"):
        target.parent.mkdir(parents=True, exist_ok=True)
        lock = filelock.FileLock(target.with_name(f"{TEMPORARY_PREFIX}{target.name}.lock"))
        try:
            lock.acquire(timeout=0)
        except filelock.Timeout:
            watch.say(f"another process is getting {target.name}; waiting for it")
            lock.acquire()
    try:
        yield
    finally:
        lock.release()


def download(
    addresses: tuple[str, ...], target: Path, checksum: str | None = None, watch: Watch = SILENT
) -> str:
    """Get a file from the first of its addresses that gives it, in at most three tries.

    Args:
        addresses: Where it is, tried in turn.
        target: Where it goes. Its folder must exist; hold `only_one(target)` meanwhile.
        checksum: "md5:..." or "sha256:..." in hexadecimal; a sha256 may be only its first digits.
        watch: Hears of the progress.

    Returns:
        The address that gave it.

    Raises:
        MachineError: No network, no such file, three broken tries, or a disk that is full.
    """
    import httpx

    part = target.with_name(f"{TEMPORARY_PREFIX}{target.name}.part")
    timeout = httpx.Timeout(STALL_SECONDS, connect=min(STALL_SECONDS, 15))
    left = list(addresses)
    tries, reason = 0, ""
    with httpx.Client(follow_redirects=True, timeout=timeout) as client:
        while left and tries < TRIES:
            if tries:
                watch.say(f"{reason}; trying again ({tries + 1} of {TRIES})")
                time.sleep(PAUSE_SECONDS * tries)
            address = left[tries % len(left)]
            tries += 1
            try:
                with machine_errors(target, "write"):
                    _fetch(client, address, part, checksum is not None, watch)
                    problem = mismatch(part, checksum)
                    if problem:
                        _forget(part)
                        raise _Broken(f"{address} gave a file that is not the right one: {problem}")
                    part.replace(target)
                    _forget(part)
                return address
            except (httpx.HTTPError, httpx.InvalidURL, _Broken) as error:
                reason = str(error) if isinstance(error, _Broken) else _explain(error, address)
                if isinstance(error, _Refused):
                    left.remove(address)
    times = "1 try" if tries == 1 else f"{tries} tries"
    raise MachineError(f"cannot download {target.name}: {reason} ({times})\n{by_hand(addresses, target)}")


def by_hand(addresses: tuple[str, ...], target: Path) -> str:
    """How people get a file that the program cannot."""
    return f"Get it by hand from {addresses[0]} and save it as {target}"


def mismatch(path: Path, checksum: str | None) -> str | None:
    """What is wrong with a file's checksum, or None. See `download` for its form."""
    if checksum is None:
        return None
    algorithm, _, wanted = checksum.partition(":")
    with path.open("rb") as file:
        found = hashlib.file_digest(file, algorithm).hexdigest()
    return None if found.startswith(wanted) else f"its {algorithm} is {found}, not {wanted}"


def _fetch(client: httpx.Client, address: str, part: Path, has_checksum: bool, watch: Watch) -> None:
    """Complete `part` from an address: continue it where that is safe, else start it anew."""
    record = _record(part)
    before = read_record(record)
    have = part.stat().st_size if part.is_file() and before.get("address") == address else 0
    validator = before.get("validator")
    if have and not validator and not has_checksum:
        have = 0  # nothing would tell whether the file has changed
    headers = {"Accept-Encoding": "identity"}
    if have:
        headers |= {"Range": f"bytes={have}-"} | ({"If-Range": validator} if validator else {})
    with client.stream("GET", address, headers=headers) as response:
        if response.status_code == 416:  # nothing is left to get
            if response.headers.get("Content-Range") == f"bytes */{have}":
                return
            _forget(part)
            raise _Broken(f"{address} does not have the {have:,} bytes that are here already")
        if response.status_code not in (200, 206):
            kind = _Refused if response.status_code in (401, 403, 404, 410) else _Broken
            raise kind(f"{address} answers {response.status_code} {response.reason_phrase}".rstrip())
        if response.headers.get("Content-Type", "").startswith("text/html"):
            raise _Refused(f"{address} gives a web page, not the file")
        if response.headers.get("Content-Encoding", "identity") != "identity":
            raise _Broken(f"{address} gives the file in an encoding that was not asked for")
        start, total = _extent(response, address)
        if start not in (0, have):
            raise _Broken(f"{address} continues at byte {start:,}, not at {have:,}")
        have = start  # 0: Range was ignored, or the file has changed
        if (
            total is None
            and not has_checksum
            and "chunked" not in response.headers.get("Transfer-Encoding", "")
        ):
            raise _Broken(f"{address} does not say how long the file is")
        if not have:
            record.write_text(json.dumps({"address": address, "validator": _validator(response)}))
        with part.open("ab" if have else "wb") as file:
            done = have
            watch.progress(done, total)
            for chunk in response.iter_raw():
                file.write(chunk)
                done += len(chunk)
                watch.progress(done, total)
            file.flush()
            os.fsync(file.fileno())
    if total is not None and done != total:
        raise _Broken(f"{address} gave {done:,} of {total:,} bytes")


def _extent(response: httpx.Response, address: str) -> tuple[int, int | None]:
    """Where the body starts in the file, and the length of the whole file if it is known."""
    length = response.headers.get("Content-Length")
    if response.status_code == 200:
        return 0, int(length) if length else None
    unit, _, rest = response.headers.get("Content-Range", "").partition(" ")
    first, _, last_and_total = rest.partition("-")
    total = last_and_total.rpartition("/")[2]
    if unit != "bytes" or not first.isdecimal():
        raise _Broken(f"{address} gives a part of the file without saying which")
    if total.isdecimal():
        return int(first), int(total)
    return int(first), int(first) + int(length) if length else None


def _validator(response: httpx.Response) -> str | None:
    """What proves later that the file is the same: a strong ETag, else the time of its last change."""
    etag: str = response.headers.get("ETag", "")
    if etag and not etag.startswith("W/"):
        return etag
    changed: str | None = response.headers.get("Last-Modified")
    return changed


def _record(part: Path) -> Path:
    return part.with_suffix(".from")


def read_record(path: Path) -> dict[str, Any]:
    """A JSON object from a file; empty when there is none, or none that can be read."""
    try:
        content = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _forget(part: Path) -> None:
    for path in (part, _record(part)):
        path.unlink(missing_ok=True)


def _explain(error: Exception, address: str) -> str:
    import httpx

    if isinstance(error, httpx.TimeoutException):
        return f"{address} was silent for too long"
    if isinstance(error, httpx.ConnectError):
        return f"{address} cannot be reached ({error})"
    return f"{address} broke off ({error})"
