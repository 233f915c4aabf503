"""What happened to every input, on disk, so that a run can be killed at any moment and go on later.

    masks/_run/manifest.jsonl   one line per input: done, skipped or failed; a run only appends
    masks/_run/run.json         version, model, options, and whether the last run ended
    masks/_run/lock             held by the process that writes here

A line about results in a tar (`archives.py`) names the tar besides. Its `output` is then only a name, and its
`files` are members.

With `--shard 3/16` these three lie in masks/_run/shards-of-16/3/, until the shards are merged. A shard reads
the folder's manifest as well, and holds the folder's lock together with the other shards.

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
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from segcli.errors import UsageError
from segcli.files import TEMPORARY_PREFIX, machine_errors
from segcli.inference.layout import (
    MANIFEST_FILE,
    PRODUCTS,
    RUN_FILE,
    RUN_FOLDER,
    SHARDS_FOLDER,
    file_of,
    mask_of,
)
from segcli.inference.seen import Seen
from segcli.inference.shards import Shard
from segcli.inference.sources import Input
from segcli.inference.storage import Content, Storage, absolute, content_now, exists

UNSAID = {"out_format": "files"}  # settings that are noted only where they are different
Status = Literal["done", "skipped", "failed"]


@dataclass(frozen=True)
class Archive:
    """A tar that holds the results of several inputs, as it was written."""

    name: str  # below the output folder
    samples: int  # inputs whose results it holds
    content: Content


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
    archive: Archive | None = None  # what they are members of, where they are no files

    def line(self) -> bytes:
        return json.dumps(_values(self), default=_values).encode() + b"\n"

    @classmethod
    def parse(cls, line: bytes) -> Entry | None:
        """The entry of a line, or None when it is damaged."""
        try:
            values = json.loads(line.decode("ascii"))
            if values.get("input"):
                values["input"] = Content(**values["input"])
            if archive := values.get("archive"):
                values["archive"] = Archive(**{**archive, "content": Content(**archive["content"])})
            values["files"] = {kind: Content(**value) for kind, value in values.get("files", {}).items()}
            return cls(**values)
        except (ValueError, TypeError, AttributeError):
            return None


def _values(of: Entry | Content | Archive) -> dict[str, Any]:
    """What a line says. Files of this machine have no ETag, and do not say so a million times."""
    return {name: value for name, value in vars(of).items() if value or name not in ("etag", "archive")}


def digest(settings: Mapping[str, Any]) -> str:
    """A short name for everything that the bytes of a result depend on."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]


class Manifest:
    """The record of one run. Made by `open_manifest`.

    Args:
        path: The file of this machine that holds it.
        out: The output folder.
        whole: The manifest of the whole folder, where this is that of a shard.
        shard: That shard.
    """

    def __init__(
        self, path: Path, out: Storage, whole: Path | None = None, shard: Shard | None = None
    ) -> None:
        self.path = path
        self._out = out
        self._claimed = Seen()  # the outputs that this run's inputs have
        cut_torn_line(path)
        self._file = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        self._earlier = [_Index(path)]
        if whole is not None and shard is not None and whole.exists():
            self._earlier.append(_Index(whole, shard.holds))
        self._fold = str.casefold if out.ignores_case() else str

    def __len__(self) -> int:
        """Number of results that earlier runs noted."""
        return sum(map(len, self._earlier))

    def claim(self, item: Input) -> bool:
        """Reserve an input's output; False when another input of this run has it."""
        return self._claimed.add(self._fold(item.output))

    def find(self, output: str) -> Entry | None:
        """What earlier runs noted about an output."""
        for index in self._earlier:
            if (entry := index.find(output)) is not None:
                return entry
        return None

    @property
    def names_archives(self) -> bool:
        """Whether earlier runs noted results in tars."""
        return any(index.names_archives for index in self._earlier)

    def append(self, *entries: Entry) -> None:
        """Add lines. They are in the hands of the system at once, so they outlive the process."""
        with machine_errors(self.path, "write"):
            lines = b"".join(entry.line() for entry in entries)
            if os.write(self._file, lines) != len(lines):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def close(self) -> None:
        with machine_errors(self.path, "write"):
            os.fsync(self._file)
            os.close(self._file)
            for index in self._earlier:
                index.close()

    def compact(self) -> None:
        """Keep the last line about every input and every output. Damaged lines go, too."""
        compact(self.path)
        self._out.publish(self.path)


class _Index:
    """Where the last good line about every output starts in a manifest. 16 bytes per line.

    Args:
        path: The manifest.
        wanted: Tells for an output whether it will be asked for.
    """

    def __init__(self, path: Path, wanted: Callable[[str], bool] = bool) -> None:
        keys, positions = array("q"), array("q")
        self._file = path.open("rb")
        position = 0
        self.names_archives = False
        for line in self._file:
            self.names_archives |= names_archive(line)
            _, output = _names(line)
            if output and wanted(output):
                keys.append(hash(output))
                positions.append(position)
            position += len(line)
        order = np.argsort(np.asarray(keys), kind="stable")
        self._keys = np.asarray(keys)[order]
        self._positions = np.asarray(positions)[order]

    def __len__(self) -> int:
        return len(self._keys)

    def find(self, output: str) -> Entry | None:
        place = int(np.searchsorted(self._keys, hash(output), side="right")) - 1
        if place < 0 or self._keys[place] != hash(output):
            return None
        self._file.seek(int(self._positions[place]))
        entry = Entry.parse(self._file.readline())
        return entry if entry is not None and mask_of(entry.output or "") == output else None

    def close(self) -> None:
        self._file.close()


def compact(path: Path) -> None:
    """Keep the last line of a manifest about every input and every output. Damaged lines go, too."""
    sources, outputs = array("q"), array("q")  # by line
    with path.open("rb") as file:
        for line in file:
            source, output = _names(line)
            sources.append(hash(source))
            outputs.append(hash(output))
    has_output = np.asarray(outputs) != hash("")
    keep = last_of_each(sources) & (last_of_each(outputs) | ~has_output)
    keep &= np.asarray(sources) != hash("")
    if keep.all():
        return
    temporary = path.with_name(TEMPORARY_PREFIX + MANIFEST_FILE)
    with machine_errors(path, "write"):
        with path.open("rb") as old, temporary.open("wb") as new:
            new.writelines(line for line, wanted in zip(old, keep, strict=True) if wanted)
            new.flush()
            os.fsync(new.fileno())
        temporary.replace(path)


def last_of_each(keys: array[int]) -> npt.NDArray[np.bool_]:
    """For each of the keys whether it is the last of its kind."""
    values = np.asarray(keys)
    order = np.argsort(values, kind="stable")
    last = np.ones(len(values), bool)
    last[order[:-1]] = values[order[:-1]] != values[order[1:]]
    return last


def cut_torn_line(path: Path) -> None:
    """Cut off what a crash left of the last line."""
    with path.open("ab+") as file:
        end = file.seek(0, os.SEEK_END)
        while end:
            start = max(0, end - (1 << 16))
            file.seek(start)
            newline = file.read(end - start).rfind(b"\n")
            if newline >= 0:
                end = start + newline + 1
                break
            end = start
        file.truncate(end)


def names_archive(line: bytes) -> bool:
    """Whether a line is about results in a tar."""
    return b', "archive": {' in line  # in a text the quotes would be escaped


def _names(line: bytes) -> tuple[str, str]:
    """A line's source and the mask that it belongs to; "" for what is not there."""
    try:
        values = json.loads(line.decode("ascii"))
        output = values["output"]
        return str(values["source"]), mask_of(output) if output else ""
    except (ValueError, TypeError, KeyError, AttributeError):
        return "", ""


@contextlib.contextmanager
def open_manifest(out: Storage, shard: Shard | None = None) -> Iterator[Manifest]:
    """Keep the output folder, or one shard of it, to this process and open its manifest.

    Leftovers of a killed run are removed, but not by a shard: another one may be writing.

    Raises:
        UsageError: Another process is writing to the folder, or it holds other shards that are not merged.
        MachineError: The folder cannot be made or written to.
    """
    refuse_unmerged(out, shard)
    with out.opened() as path:
        if shard is None and read_run(out).get("state") != "finished":
            out.remove_leftovers()
        whole = out.whole_manifest() if shard is not None else None
        manifest = Manifest(path, out, whole, shard)
        try:
            yield manifest
        finally:
            manifest.close()


def shard_counts(out: Storage) -> list[int]:
    """Into how many shards the runs were split that are not merged: [16], or [] when there are none."""
    start = SHARDS_FOLDER.rpartition("/")[2]
    names = [name.removeprefix(start) for name in out.folders(RUN_FOLDER) if name.startswith(start)]
    return sorted(int(name) for name in names if name.isdecimal())


def refuse_unmerged(out: Storage, shard: Shard | None) -> None:
    """Stop when there are shards of another count, or any where the whole folder is asked for.

    Raises:
        UsageError: Says what to do.
    """
    others = [count for count in shard_counts(out) if shard is None or count != shard.count]
    if others:
        told = f"{out} holds the work of {others[0]} shards that are not merged yet"
        go_on = f"Go on with --shard I/{others[0]}, or" if shard else "First"
        raise UsageError(f"{told}.\n{go_on} run: segcli runs merge {out}")


def read_run(out: Storage, record: str = RUN_FOLDER) -> dict[str, Any]:
    """run.json of the folder or of a shard, or {} when it is missing or damaged."""
    try:
        content = json.loads(out.read(f"{record}/{RUN_FILE}") or b"")
        return content if isinstance(content, dict) else {}
    except ValueError:
        return {}


def write_run(out: Storage, content: Mapping[str, Any], record: str = RUN_FOLDER) -> None:
    """Write run.json of the folder or of a shard."""
    out.write(f"{record}/{RUN_FILE}", (json.dumps(content, indent=2) + "\n").encode())


def announce_shards(out: Storage, about: Mapping[str, Any]) -> None:
    """Say in the folder's run.json that shards write here, unless one has done so with the same settings."""
    before = read_run(out)
    if before.get("state") != "in shards" or before.get("settings") != about["settings"]:
        write_run(out, {**about, "state": "in shards", "shard": None})


def refuse_other_settings(out: Storage, settings: Mapping[str, Any]) -> None:
    """Stop when the folder holds results that were made in another way.

    Raises:
        UsageError: Names every setting that differs.
    """
    before = read_run(out).get("settings")
    if isinstance(before, dict) and before != settings:
        raise UsageError(
            f"{out} holds results of other settings: {differences(before, settings)}.\n"
            "Choose another --out, or give --overwrite to do everything again."
        )


def kept_precision(out: Storage) -> str | None:
    """The precision that a folder's results have, so that `auto` goes on with it, also on other hardware.

    None when there are no results, or when not every machine can compute in it.
    """
    settings = read_run(out).get("settings")
    precision = settings.get("precision") if isinstance(settings, dict) else None
    return precision if precision in ("fp32", "bf16") else None


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """The settings that differ, in words."""
    before, now = {**UNSAID, **before}, {**UNSAID, **now}
    names = sorted(name for name in before.keys() | now.keys() if before.get(name) != now.get(name))
    return "; ".join(f"{name} {_short(before.get(name))}, now {_short(now.get(name))}" for name in names)


def finished_entry(
    entry: Entry | None,
    item: Input,
    settings: str,
    kinds: Sequence[str],
    out: Storage,
    archive_now: Callable[[Archive], Content | None],
) -> Entry | None:
    """An earlier result that can stand, as it is true today; None when the input has to be computed.

    Args:
        entry: What the manifest says about the input's output.
        item: The input as it is now.
        settings: The digest of this run's settings.
        kinds: What is to be saved.
        out: The output folder.
        archive_now: The present state of a tar, as `Storage.content_now` gives it.

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
    if entry.archive is not None:
        held = archive_now(entry.archive)
        if held is None or held.sha256 != entry.archive.content.sha256 or set(kinds) - entry.files.keys():
            return None
        return replace(entry, source=source, input=now, archive=replace(entry.archive, content=held))
    files = dict(entry.files)
    for kind in kinds:
        noted = files.get(kind)
        found = out.content_now(file_of(item.output, kind), noted)
        if noted is None or found is None or found.sha256 != noted.sha256:
            return None
        files[kind] = found
    return replace(entry, source=source, input=now, files=files)


def remove_others(entry: Entry, item: Input, kinds: Sequence[str], out: Storage) -> None:
    """Delete the products of an outdated result that are not made again, so that old and new never mix.

    Those in a tar stay until `archives.repack`.
    """
    if entry.archive is not None:
        return
    for kind in entry.files.keys() & PRODUCTS.keys() - set(kinds):
        out.remove(file_of(item.output, kind))


def _short(value: Any) -> str:
    text = "unset" if value is None else str(value)
    return text[:12] + "..." if len(text) > 40 else text
