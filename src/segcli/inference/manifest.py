"""What happened to every input, on disk, so that a run can be killed at any moment and go on later.

    masks/_run/manifest.jsonl   one line per input: done, skipped or failed; a run only appends
    masks/_run/run.json         version, model, options, and whether the last run ended
    masks/_run/lock             held by the process that writes here

A line is written after the files that it names are complete, so whatever a line says is true even when the
process is killed right after it. A torn last line is cut off by the next run; its input is done again.
When a run ends, lines that a later one replaced are dropped (by writing the file anew and renaming it), so
that every input has one line.

An input counts as unchanged when its size and times are those noted, or else when its SHA-256 is: a folder
that was copied or touched is not computed again, a changed photograph is. An output counts as good when its
size and modification time are those noted when it was written, or else when its SHA-256 is: junk, an empty
file or half a mask under the final name is found and made again.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from segcli.errors import UsageError
from segcli.files import TEMPORARY_PREFIX, machine_errors
from segcli.inference.layout import MANIFEST_FILE, PRODUCTS, RUN_FILE, RUN_FOLDER, file_of, mask_of
from segcli.inference.sources import Input
from segcli.inference.storage import Content, Storage, absolute, content_now, exists

Status = Literal["done", "skipped", "failed"]


@dataclass(frozen=True)
class Entry:
    """One line of the manifest."""

    source: str  # absolute path of the input
    output: str | None  # the mask (or what else was saved), below the output folder; None when failed
    status: Status
    reason: str | None = None  # why it failed or was skipped
    width: int | None = None  # of the image as displayed, pixels
    height: int | None = None
    model: str | None = None
    milliseconds: float | None = None  # of computing time, from decoding to writing
    classes: Mapping[str, float] = field(default_factory=dict)  # share of the pixels, for classes that occur
    notes: Sequence[str] = ()  # such as "first of 12 frames"
    settings: str | None = None  # digest of what the result depends on
    input: Content | None = None
    files: Mapping[str, Content] = field(default_factory=dict)  # by what was saved: "mask", "overlay", ...

    def line(self) -> bytes:
        return json.dumps(vars(self), default=_values).encode() + b"\n"

    @classmethod
    def parse(cls, line: bytes) -> Entry | None:
        """The entry of a line, or None when it is damaged."""
        try:
            values = json.loads(line.decode("ascii"))
            if values.get("input"):
                values["input"] = Content(**values["input"])
            values["files"] = {kind: Content(**value) for kind, value in values.get("files", {}).items()}
            return cls(**values)
        except (ValueError, TypeError, AttributeError):
            return None


def _values(content: Content) -> dict[str, Any]:
    """What a line says of a file. Files of this machine have no ETag, and do not say so a million times."""
    values = vars(content)
    return values if content.etag else {name: value for name, value in values.items() if name != "etag"}


def digest(settings: Mapping[str, Any]) -> str:
    """A short name for everything that the bytes of a result depend on."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]


class Manifest:
    """The record of one output folder, open for one run. Made by `open_manifest`.

    Args:
        path: The file of this machine that holds it.
        out: The output folder.
    """

    def __init__(self, path: Path, out: Storage) -> None:
        self.path = path
        self._out = out
        self._positions: dict[int, int] = {}  # hash of an output -> where its last good line starts
        self._claimed: set[int] = set()  # hashes of the outputs that this run's inputs have
        self._index()
        self._file = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        self._reader = self.path.open("rb")
        self._fold = str.casefold if out.ignores_case() else str

    def _index(self) -> None:
        if not self.path.exists():
            return
        with self.path.open("r+b") as file:
            position = 0
            for line in file:
                if not line.endswith(b"\n"):
                    file.truncate(position)  # torn by a crash
                    break
                _, output = _keys(line)
                if output:
                    self._positions[output] = position
                position += len(line)

    def __len__(self) -> int:
        """Number of results that earlier runs noted."""
        return len(self._positions)

    def claim(self, item: Input) -> bool:
        """Reserve an input's output; False when another input of this run has it."""
        key = hash(self._fold(item.output))
        if key in self._claimed:
            return False
        self._claimed.add(key)
        return True

    def find(self, output: str) -> Entry | None:
        """What earlier runs noted about an output."""
        position = self._positions.get(hash(output))
        if position is None:
            return None
        self._reader.seek(position)
        entry = Entry.parse(self._reader.readline())
        return entry if entry is not None and mask_of(entry.output or "") == output else None

    def append(self, entry: Entry) -> None:
        """Add a line. It is in the hands of the system at once, so it outlives the process."""
        with machine_errors(self.path, "write"):
            line = entry.line()
            if os.write(self._file, line) != len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def close(self) -> None:
        with machine_errors(self.path, "write"):
            os.fsync(self._file)
            os.close(self._file)
            self._reader.close()

    def compact(self) -> None:
        """Keep the last line about every input and every output. Damaged lines go, too."""
        last_of_source: dict[int, int] = {}
        last_of_output: dict[int, int] = {}
        outputs = array("q")  # by line
        with self.path.open("rb") as file:
            for number, line in enumerate(file):
                source, output = _keys(line)
                outputs.append(output)
                if source:
                    last_of_source[source] = number
                if output:
                    last_of_output[output] = number
        keep = {n for n in last_of_source.values() if not outputs[n] or last_of_output[outputs[n]] == n}
        if len(keep) < len(outputs):
            temporary = self.path.with_name(TEMPORARY_PREFIX + MANIFEST_FILE)
            with machine_errors(self.path, "write"):
                with self.path.open("rb") as old, temporary.open("wb") as new:
                    new.writelines(line for number, line in enumerate(old) if number in keep)
                    new.flush()
                    os.fsync(new.fileno())
                temporary.replace(self.path)
        self._out.publish(self.path)


def _keys(line: bytes) -> tuple[int, int]:
    """Hashes of a line's source and of the mask it belongs to; 0 for what is not there."""
    try:
        values = json.loads(line.decode("ascii"))
        output = values["output"]
        return hash(values["source"]), hash(mask_of(output)) if output else 0
    except (ValueError, TypeError, KeyError, AttributeError):
        return 0, 0


@contextlib.contextmanager
def open_manifest(out: Storage) -> Iterator[Manifest]:
    """Keep the output folder to this process and open its manifest; leftovers of a killed run are removed.

    Raises:
        UsageError: Another process is writing to the folder.
        MachineError: The folder cannot be made or written to.
    """
    with out.opened() as path:
        if read_run(out).get("state") != "finished":
            out.remove_leftovers()
        manifest = Manifest(path, out)
        try:
            yield manifest
        finally:
            manifest.close()


def read_run(out: Storage) -> dict[str, Any]:
    """run.json, or {} when it is missing or damaged."""
    try:
        content = json.loads(out.read(f"{RUN_FOLDER}/{RUN_FILE}") or b"")
        return content if isinstance(content, dict) else {}
    except ValueError:
        return {}


def write_run(out: Storage, content: Mapping[str, Any]) -> None:
    """Write run.json."""
    out.write(f"{RUN_FOLDER}/{RUN_FILE}", (json.dumps(content, indent=2) + "\n").encode())


def refuse_other_settings(out: Storage, settings: Mapping[str, Any]) -> None:
    """Stop when the folder holds results that were made in another way.

    Raises:
        UsageError: Names every setting that differs.
    """
    before = read_run(out).get("settings")
    if not isinstance(before, dict) or before == settings:
        return
    names = sorted(name for name in before.keys() | settings.keys() if before.get(name) != settings.get(name))
    changes = "; ".join(
        f"{name} {_short(before.get(name))}, now {_short(settings.get(name))}" for name in names
    )
    raise UsageError(
        f"{out} holds results of other settings: {changes}.\n"
        "Choose another --out, or give --overwrite to do everything again."
    )


def finished_entry(
    entry: Entry | None, item: Input, settings: str, kinds: Sequence[str], out: Storage
) -> Entry | None:
    """An earlier result that can stand, as it is true today; None when the input has to be computed.

    Args:
        entry: What the manifest says about the input's output.
        item: The input as it is now.
        settings: The digest of this run's settings.
        kinds: What is to be saved.
        out: The output folder.

    Raises:
        FileExistsError: The output holds the result of another file, which still exists.
    """
    if entry is None:
        return None
    source = absolute(item.source)
    now = content_now(item.source, entry.input, item.listed)
    changed = now is None or entry.input is None or now.sha256 != entry.input.sha256
    if changed and entry.source != source and exists(entry.source):
        raise FileExistsError(entry.source)
    if changed or entry.settings != settings:
        return None
    files = dict(entry.files)
    for kind in kinds:
        noted = files.get(kind)
        found = out.content_now(file_of(item.output, kind), noted)
        if noted is None or found is None or found.sha256 != noted.sha256:
            return None
        files[kind] = found
    return replace(entry, source=source, input=now, files=files)


def remove_others(entry: Entry, item: Input, kinds: Sequence[str], out: Storage) -> None:
    """Delete the products of an outdated result that are not made again, so that old and new never mix."""
    for kind in entry.files.keys() & PRODUCTS.keys() - set(kinds):
        out.remove(file_of(item.output, kind))


def _short(value: Any) -> str:
    text = "unset" if value is None else str(value)
    return text[:12] + "..." if len(text) > 40 else text
