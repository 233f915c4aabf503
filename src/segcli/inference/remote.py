"""Inputs and outputs below URLs (s3://, gs://, memory://, ...), through fsspec.

A URL is taken as it is written: `#`, `?`, `%` and spaces are letters of the name, as in `aws s3 cp`.
Credentials and endpoints come from where fsspec and its drivers look for them (AWS_PROFILE,
AWS_ENDPOINT_URL, FSSPEC_S3_..., the metadata service of a virtual machine, ...); errors that pass are tried
again by the drivers.

The manifest of a remote folder is a file of this machine while a run writes to it. What is new in it is
uploaded every few seconds, and becomes one file again when the run ends:

    masks/_run/parts/20261123T233138-1a2b3c-000007.jsonl   lines, uploaded while the run goes on
    masks/_run/manifest.jsonl                              all of them, once it has ended
    masks/_run/lock                                        who writes, and when it was last heard of

A line is uploaded after the files that it names, so whatever a line says is true; what was done after the
last upload of a run that was killed is done again, to the same bytes.
"""

from __future__ import annotations

import contextlib
import datetime
import errno
import functools
import hashlib
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from segcli.downloads import cache_folder
from segcli.errors import ImageError, MachineError, SegcliError, UsageError
from segcli.files import TEMPORARY_PREFIX, locked
from segcli.inference.layout import LOCK_FILE, MANIFEST_FILE, RUN_FOLDER, SHARDS_FOLDER
from segcli.inference.storage import Content, whole_lines

UPLOAD_EVERY = 10.0  # seconds between two parts of the manifest
LOCK_EXPIRES = 120.0  # seconds after which a run that is not heard of any more counts as dead
PARTS_FOLDER = "parts"
FOLDERS_REMEMBERED = 8  # listings of output folders, one per product of the folder at hand
# Stores whose uploads appear whole or not at all. Elsewhere a file is uploaded under another name and moved.
ATOMIC = frozenset({"s3", "gs", "az", "abfs", "abfss", "memory", "oss", "oci", "hf"})
ETAGS = ("ETag", "etag", "e_tag", "md5Hash", "content_md5", "crc32c", "generation")
TIMES = ("LastModified", "last_modified", "updated", "mtime", "modified", "created")
# Answers about the credentials, not about one object.
REFUSED_KEYS = {
    "ExpiredToken",
    "InvalidAccessKeyId",
    "InvalidToken",
    "RequestTimeTooSkewed",
    "SignatureDoesNotMatch",
    "TokenRefreshRequired",
}


@functools.cache
def _filesystem(protocol: str) -> Any:
    try:
        import fsspec

        return fsspec.filesystem(protocol, use_listings_cache=False, skip_instance_cache=True)
    except ImportError as error:
        raise UsageError(
            f"{protocol}:// needs packages that are not installed; pip install 'segcli[cloud]' "
            f"({_reason(error)})"
        ) from error
    except ValueError as error:
        raise UsageError(f"{protocol}:// is no kind of address that fsspec knows") from error


def _at(url: str) -> tuple[Any, str]:
    """The file system of a URL and the path in it."""
    filesystem = _filesystem(url.partition("://")[0])
    return filesystem, filesystem._strip_protocol(url)


def _reason(error: BaseException) -> str:
    """Why a request failed, in one line."""
    if type(error).__name__ in ("NoCredentialsError", "PartialCredentialsError", "CredentialRetrievalError"):
        return (
            "there are no credentials; set AWS_PROFILE, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY "
            "(for a public bucket FSSPEC_S3_ANON=true)"
        )
    text = " ".join((str(error) or type(error).__name__).split())
    if isinstance(error, OSError) and error.errno and error.strerror:
        text = " ".join(str(error.strerror).split())
    if isinstance(error, PermissionError):
        return f"access denied ({text})"
    if isinstance(error, FileNotFoundError) and "exist" not in text:
        return "it does not exist"
    return text


def _code(error: BaseException) -> str:
    """The name that S3 gives an error, or ""."""
    response = getattr(error.__cause__, "response", None) or {}
    return str(response.get("Error", {}).get("Code", ""))


def _concerns_one(error: BaseException) -> bool:
    """Whether an error is about the object that was asked for, and the next one may be fine."""
    return _code(error) not in REFUSED_KEYS and isinstance(
        error, FileNotFoundError | PermissionError | IsADirectoryError
    )


@contextlib.contextmanager
def _errors(doing: str, url: str) -> Iterator[None]:
    """Turn whatever a driver raises into a `MachineError` of one line."""
    try:
        yield
    except SegcliError:
        raise
    except Exception as error:
        raise MachineError(f"cannot {doing} {url}: {_reason(error)}") from error


def _content(info: dict[str, Any]) -> Content:
    """The state of an object as the store tells it; its SHA-256 is not known."""
    etag = next((str(info[key]).strip('"') for key in ETAGS if info.get(key)), "")
    changed = next((info[key] for key in TIMES if info.get(key)), 0)
    if isinstance(changed, str):
        changed = datetime.datetime.fromisoformat(changed)
    if isinstance(changed, datetime.datetime):
        changed = changed.timestamp()
    return Content(int(info.get("size", info.get("Size", 0)) or 0), int(changed * 1e9), 0, "", etag)


# ---- reading ----


def kind_of(url: str) -> str:
    """ "folder", "file", or "" where there is nothing."""
    filesystem, path = _at(url)
    with _errors("look at", url):
        if url.endswith("/") and any(True for _ in listing(url)):
            return "folder"
        try:
            return "folder" if filesystem.info(path)["type"] == "directory" else "file"
        except FileNotFoundError as error:
            if _code(error) == "NoSuchBucket":
                raise UsageError(f"{url}: {_reason(error)}") from error
            return ""


def listing(folder: str) -> Iterator[tuple[str, Content | None]]:
    """The names in a folder and their states; None for a folder. Comes in pages where the store gives pages.

    Raises:
        ImageError: There is no such folder, or it may not be listed.
        MachineError: The store cannot be reached.
    """
    filesystem, path = _at(folder)
    pages = _s3_pages if "s3" in filesystem.protocol else _one_page
    try:
        yield from pages(filesystem, path)
    except Exception as error:
        if _concerns_one(error):
            raise ImageError(f"the folder cannot be listed: {_reason(error)}") from error
        raise MachineError(f"cannot list {folder}: {_reason(error)}") from error


def _one_page(filesystem: Any, path: str) -> Iterator[tuple[str, Content | None]]:
    for info in filesystem.ls(path, detail=True):
        if info["name"].strip("/") != path.strip("/"):  # a marker that stands for the folder itself
            name = info["name"].rstrip("/").rpartition("/")[2]
            yield name, None if info["type"] == "directory" else _content(info)


def _s3_pages(filesystem: Any, path: str) -> Iterator[tuple[str, Content | None]]:
    """A thousand objects at a time: `ls` keeps a dictionary of each, one gigabyte for a million."""
    bucket, key, _ = filesystem.split_path(path)
    prefix = f"{key}/" if key else ""
    more: dict[str, str] = {}
    while True:
        page = filesystem.call_s3("list_objects_v2", Bucket=bucket, Prefix=prefix, Delimiter="/", **more)
        for folder in page.get("CommonPrefixes", ()):
            yield folder["Prefix"][len(prefix) : -1], None
        for found in page.get("Contents", ()):
            if found["Key"] != prefix:  # a marker that stands for the folder itself
                yield found["Key"][len(prefix) :], _content(found)
        if not page.get("IsTruncated"):
            return
        more = {"ContinuationToken": page["NextContinuationToken"]}


def fetch(url: str, target: Path, size: int) -> None:
    """Copy an object to this machine.

    Raises:
        ImageError: It is gone, may not be read, or has not the `size` that was listed.
        MachineError: The store cannot be reached, or there is no space.
    """
    filesystem, path = _at(url)
    try:
        filesystem.get_file(path, str(target))
    except Exception as error:
        if _concerns_one(error):
            raise ImageError(f"cannot be read: {_reason(error)}") from error
        raise MachineError(f"cannot read {url}: {_reason(error)}") from error
    if target.stat().st_size != size:
        raise ImageError("changed while it was read; run the same command again")


def content_now(url: str, listed: Content, before: Content | None) -> Content | None:
    """The present state of an input; it is read and hashed only when it may be the same, but need not be."""
    if before is None or listed.size != before.size:
        return None
    if _same(listed, before):
        return before
    filesystem, path = _at(url)
    with _errors("read", url):
        return _with_hash(listed, filesystem.cat_file(path))


def _same(now: Content, noted: Content) -> bool:
    if now.etag and noted.etag:
        return (now.size, now.etag) == (noted.size, noted.etag)
    return (now.size, now.mtime_ns) == (noted.size, noted.mtime_ns)


def _with_hash(content: Content, data: bytes | memoryview) -> Content:
    digest = hashlib.sha256(data).hexdigest()
    return Content(content.size, content.mtime_ns, content.ctime_ns, digest, content.etag)


# ---- writing ----


class RemoteFolder:
    """A folder below a URL, see `storage.Storage`.

    Only one run writes at a time: on this machine by a lock of the system, elsewhere by an object `_run/lock`
    that is made if there is none (one request on S3 and Google Cloud Storage, so that one of two wins) and
    renewed while the run goes on. A run that was killed holds it for `LOCK_EXPIRES` seconds against other
    machines, and not at all against its own. Should two runs ever hold it, as when one that was asleep renews
    it while another takes over, the later write stays, and the other run stops when it next looks. Shards
    have a lock each; they and the whole folder respect each other's, on every machine.
    """

    at_a_time = 16

    def __init__(self, url: str, record: str = RUN_FOLDER) -> None:
        self._url = url.rstrip("/")
        self._record = record
        self._fs, self._path = _at(url)
        self._states = functools.lru_cache(FOLDERS_REMEMBERED)(self._list_states)
        self._manifest: _Manifest | None = None

    def __str__(self) -> str:
        return self._url

    def place(self, name: str) -> str:
        return f"{self._url}/{name}"

    def __reduce__(self) -> tuple[type[RemoteFolder], tuple[str, str]]:
        return RemoteFolder, (self._url, self._record)  # for another process

    def folders(self, name: str) -> list[str]:
        try:
            return [inner for inner, found in listing(self.place(name)) if found is None]
        except ImageError:
            return []

    def files(self, name: str) -> list[str]:
        try:
            return [file for file, found in listing(self.place(name).rstrip("/")) if found is not None]
        except ImageError:
            return []

    def read(self, name: str) -> bytes | None:
        with _errors("read", self.place(name)):
            try:
                return bytes(self._fs.cat_file(f"{self._path}/{name}"))
            except FileNotFoundError:
                return None

    def write(self, name: str, data: bytes) -> Content:
        if self._manifest is not None and self._manifest.lost:
            raise MachineError(f"another run has taken over {self}; this one has stopped")
        path = f"{self._path}/{name}"
        with _errors("write", self.place(name)):
            answer = self._put(path, data)
            # The answer to a PUT tells the ETag. Its size is not in it.
            known = isinstance(answer, dict) and answer.get("ETag")
            info = {**answer, "size": len(data)} if known else self._fs.info(path)
        content = _with_hash(_content(info), data)
        if content.size != len(data):
            arrived = f"{content.size} of {len(data)} bytes arrived"
            raise MachineError(f"cannot write {self.place(name)}: {arrived}")
        return content

    def _put(self, path: str, data: bytes | Path) -> Any:
        try:
            path.encode()
        except UnicodeEncodeError as error:
            raise OSError(errno.EILSEQ, "names of objects are UTF-8, and this one is not") from error
        if _protocol(self._url) in ATOMIC:
            return self._upload(data, path)
        temporary = f"{self._path}/{RUN_FOLDER}/{TEMPORARY_PREFIX}{uuid.uuid4().hex}"
        for target in (temporary, path):
            self._fs.makedirs(target.rpartition("/")[0], exist_ok=True)
        self._upload(data, temporary)
        try:
            self._fs.mv(temporary, path)
        except OSError:  # some do not move onto a file that is there
            self._fs.rm_file(path)
            self._fs.mv(temporary, path)
        return None

    def _upload(self, data: bytes | Path, path: str) -> Any:
        if isinstance(data, Path):
            return self._fs.put_file(str(data), path)
        return self._fs.pipe_file(path, data)

    def remove(self, name: str) -> None:
        with contextlib.suppress(Exception):
            self._fs.rm_file(f"{self._path}/{name}")

    def content_now(self, name: str, noted: Content | None) -> Content | None:
        if noted is None:
            return None
        folder, _, file = name.rpartition("/")
        if self._states(folder).get(hash(file)) == _state(noted):
            return noted
        with _errors("read", self.place(name)):
            try:
                now = _content(self._fs.info(f"{self._path}/{name}"))
            except FileNotFoundError:
                return None
        return content_now(self.place(name), now, noted)

    def _list_states(self, folder: str) -> dict[int, int]:
        """Hashes of the names in a folder and of their states: the texts would take three times that."""
        try:
            below = f"{self._url}/{folder}" if folder else self._url
            return {hash(name): _state(found) for name, found in listing(below) if found is not None}
        except ImageError:
            return {}

    def ignores_case(self) -> bool:
        return False

    @contextlib.contextmanager
    def opened(self) -> Iterator[Path]:
        kind = kind_of(self._url)
        if kind == "file":
            raise MachineError(f"cannot write to {self}: it is an object; choose a folder for --out")
        for record in [RUN_FOLDER] if self._record != RUN_FOLDER else self._shards():
            refuse_held(self, record)
        name = hashlib.sha256(self.place(self._record).encode()).hexdigest()[:16]
        state = cache_folder() / "remote" / name
        with locked(self._url, state / LOCK_FILE):
            for path in state.iterdir():
                if path.name not in (LOCK_FILE, _Lock.NAME):
                    path.unlink()
            with (
                _Lock(self, self._record, state) as lock,
                _Manifest(self, self._record, state / MANIFEST_FILE, lock) as self._manifest,
            ):
                yield self._manifest.path
            (state / MANIFEST_FILE).unlink(missing_ok=True)

    def _shards(self) -> list[str]:
        """The records of the shards that are not merged."""
        splits = [f"{RUN_FOLDER}/{name}" for name in self.folders(RUN_FOLDER)]
        return [
            f"{split}/{number}"
            for split in splits
            if split.startswith(SHARDS_FOLDER)
            for number in self.folders(split)
        ]

    def lines(self, record: str) -> Iterator[bytes]:
        for name in [f"{record}/{MANIFEST_FILE}", *_parts(self, record)]:
            yield from whole_lines((self.read(name) or b"").splitlines(keepends=True))

    def whole_manifest(self) -> Path:
        assert self._manifest is not None
        path = self._manifest.path.with_name("whole.jsonl")
        _download(self, RUN_FOLDER, path)
        return path

    def remove_folder(self, name: str) -> None:
        with _errors("remove", self.place(name)):
            self._fs.rm(f"{self._path}/{name}", recursive=True)

    def remove_leftovers(self) -> None:
        if _protocol(self._url) in ATOMIC:
            return
        with contextlib.suppress(ImageError):
            for name, _ in listing(self.place(RUN_FOLDER)):
                if name.startswith(TEMPORARY_PREFIX):
                    self.remove(f"{RUN_FOLDER}/{name}")

    def publish(self, manifest: Path) -> None:
        assert self._manifest is not None
        name = f"{self._record}/{MANIFEST_FILE}"
        with _errors("write", self.place(name)):
            self._put(f"{self._path}/{name}", manifest)
        self._manifest.published()


def _protocol(url: str) -> str:
    return url.partition("://")[0]


def _state(content: Content) -> int:
    return hash((content.size, content.etag or content.mtime_ns))


class _Lock:
    """The object that says who writes to a remote folder."""

    NAME = "identity"  # file of this machine's state that tells its locks from those of others

    def __init__(self, folder: RemoteFolder, record: str, state: Path) -> None:
        self._folder = folder
        identity = state / self.NAME
        if not identity.exists():
            identity.write_text(uuid.uuid4().hex)
        self._mine = {
            "holder": f"process {os.getpid()} on {socket.gethostname()}",
            "machine": identity.read_text(),
            "run": uuid.uuid4().hex,
        }
        self._record = record

    def __enter__(self) -> _Lock:
        try:
            self._write("create")
        except Exception:  # it is there, or this store cannot make what is not there, or cannot be reached
            refuse_held(self._folder, self._record, self._mine["machine"])
            with _errors("write to", str(self._folder)):
                self._write("overwrite")
        return self

    def __exit__(self, *_: object) -> None:
        if self.renew():
            self._folder.remove(f"{self._record}/{LOCK_FILE}")

    def renew(self) -> bool:
        """Say that this run lives; False when another one has taken over."""
        try:
            if _holder(self._folder, self._record).get("run") != self._mine["run"]:
                return False
            self._write("overwrite")
        except Exception:  # the network is away: what is to be written will tell
            pass
        return True

    def _write(self, mode: str) -> None:
        filesystem, path = _at(self._folder.place(f"{self._record}/{LOCK_FILE}"))
        content = json.dumps({**self._mine, "renewed": time.time()}).encode()
        if _protocol(str(self._folder)) not in ATOMIC:
            filesystem.makedirs(path.rpartition("/")[0], exist_ok=True)
        filesystem.pipe_file(path, content, mode=mode)


def refuse_held(folder: RemoteFolder, record: str, machine: str = "") -> None:
    """Raise UsageError when another machine holds the lock of a record."""
    held = _holder(folder, record)
    seconds = time.time() - held.get("renewed", 0)
    if held.get("machine") != machine and seconds < LOCK_EXPIRES:
        raise UsageError(
            f"{folder} is in use by {held.get('holder')}, heard of {seconds:.0f} s ago.\n"
            f"Wait for it ({LOCK_EXPIRES:.0f} s if it was killed), or choose another --out."
        )


def _holder(folder: RemoteFolder, record: str) -> dict[str, Any]:
    try:
        content = json.loads(folder.read(f"{record}/{LOCK_FILE}") or b"{}")
    except ValueError:
        return {}
    return content if isinstance(content, dict) else {}


def _download(folder: RemoteFolder, record: str, path: Path) -> list[str]:
    """Copy the manifest of a record to this machine, its parts at its end, and give the names of those."""
    filesystem, manifest = _at(folder.place(f"{record}/{MANIFEST_FILE}"))
    with _errors("read", folder.place(f"{record}/{MANIFEST_FILE}")), contextlib.suppress(FileNotFoundError):
        filesystem.get_file(manifest, str(path))
    parts = _parts(folder, record)
    with path.open("ab") as file:
        for name in parts:
            file.write(folder.read(name) or b"")
    return parts


def _parts(folder: RemoteFolder, record: str) -> list[str]:
    """The names of what was uploaded of a manifest since it was last one file, in their order."""
    try:
        names = [name for name, found in listing(folder.place(f"{record}/{PARTS_FOLDER}")) if found]
    except ImageError:  # there are none
        return []
    return [f"{record}/{PARTS_FOLDER}/{name}" for name in sorted(names) if name.endswith(".jsonl")]


class _Manifest:
    """Keeps a local file and the manifest of a remote folder the same, while it is entered."""

    def __init__(self, folder: RemoteFolder, record: str, path: Path, lock: _Lock) -> None:
        self.path = path
        self._record = record
        self.lost = False  # whether another run has taken over
        self._folder = folder
        self._lock = lock
        self._ended = threading.Event()
        self._busy = threading.Lock()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._name = f"{time.strftime('%Y%m%dT%H%M%S', time.gmtime())}-{uuid.uuid4().hex[:6]}"
        self._parts: list[str] = []  # names of all parts that the local file holds

    def __enter__(self) -> _Manifest:
        self._parts = _download(self._folder, self._record, self.path)
        self._new = self.path.open("rb")  # the same file after `Manifest.compact`, which makes another
        self._new.seek(0, os.SEEK_END)
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._ended.set()
        self._thread.join()
        with self._new, contextlib.suppress(MachineError) if kind else contextlib.nullcontext():
            self._upload()

    def published(self) -> None:
        """The whole is there as one file: the parts can go."""
        with self._busy:
            self._new.seek(0, os.SEEK_END)
            for name in self._parts:
                self._folder.remove(name)
            self._parts = []

    def _watch(self) -> None:
        while not self._ended.wait(UPLOAD_EVERY):
            with contextlib.suppress(MachineError):  # the next time, or the next file, will tell
                self._upload()
            self.lost = self.lost or not self._lock.renew()

    def _upload(self) -> None:
        """Upload the lines that are new, as a part."""
        with self._busy:
            start = self._new.tell()
            lines = self._new.read()
            lines = lines[: lines.rfind(b"\n") + 1]
            self._new.seek(start)
            if lines:
                name = f"{self._record}/{PARTS_FOLDER}/{self._name}-{len(self._parts):06d}.jsonl"
                self._folder.write(name, lines)
                self._parts.append(name)
                self._new.seek(start + len(lines))
