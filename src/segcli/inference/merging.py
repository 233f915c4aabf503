"""From the records of shards to the record of the folder, and what a folder's records say."""

from __future__ import annotations

import json
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from segcli.errors import UsageError
from segcli.files import machine_errors
from segcli.inference import archives
from segcli.inference.layout import RUN_FILE, RUN_FOLDER, SHARDS_FOLDER
from segcli.inference.manifest import (
    compact,
    cut_torn_line,
    differences,
    last_of_each,
    names_archive,
    read_run,
    shard_counts,
    write_run,
)
from segcli.inference.shards import Shard
from segcli.inference.storage import Storage

SHOWN_DOUBLES = 10
STATUSES = ("done", "skipped", "failed")


@dataclass
class Merged:
    """What came of a merge."""

    shards: int = 0
    findings: list[str] = field(default_factory=list)  # what is missing, unfinished or double
    joined: bool = False
    counts: dict[str, int] = field(default_factory=dict)  # inputs by status, when joined


def merge(out: Storage, force: bool) -> Merged:
    """Join the manifests of a folder's shards, when nothing is missing or double.

    It may be killed at any moment and run again.

    Args:
        out: The folder.
        force: Join also when something is missing or double. The plain command then does the rest.

    Raises:
        UsageError: There are no shards, or one of them is running.
        MachineError: Nothing can be written, ...
    """
    merged = Merged()
    if not shard_counts(out):
        raise UsageError(f"{out} holds no shards that are not merged")
    with out.opened() as manifest:
        counts = shard_counts(out)
        shards = [Shard(number, count) for count in counts for number in range(1, count + 1)]
        runs = {shard: read_run(out, shard.record) for shard in shards}
        merged.shards = len(shards)
        if len(counts) > 1:
            told = " and ".join(map(str, counts))
            merged.findings.append(f"there are shards of {told}: two splits that share their inputs")
        merged.findings += _unfinished(runs)
        merged.findings += _doubles(out, [shard for shard in shards if runs[shard]])
        out.remove_leftovers()
        if merged.findings and not force:
            return merged

        cut_torn_line(manifest)
        with machine_errors(manifest, "write"), manifest.open("ab") as file:
            for shard in shards:
                file.writelines(out.lines(shard.record))
        with manifest.open("rb") as file:
            in_tars = any(map(names_archive, file))
        compact(manifest)
        out.publish(manifest)
        needed = archives.repack(manifest, out) if in_tars else set()
        with manifest.open("rb") as file:
            merged.counts = tally(file)
        merged.joined = True
        known = [run for run in runs.values() if run]
        last = max(known, key=lambda run: str(run.get("ended", "")))
        about = {key: value for key, value in last.items() if key not in ("state", "shard", *STATUSES)}
        began = min(str(run.get("started", "")) for run in known)
        state = "unfinished" if merged.findings else "finished"
        write_run(out, {"state": state, **about, "started": began, "shards": merged.shards, **merged.counts})
        for count in counts:
            out.remove_folder(f"{SHARDS_FOLDER}{count}")
        if in_tars:  # last: a merge that is killed before that reads the shards again, and they name old tars
            archives.sweep(out, needed)
    return merged


def _unfinished(runs: dict[Shard, dict[str, Any]]) -> Iterator[str]:
    """What is missing, has not ended, or was made in another way than the first."""
    first = next((shard for shard, run in runs.items() if run), None)
    for shard, run in runs.items():
        if not run:
            yield f"shard {shard} is missing: it was never started"
        elif run.get("state") != "finished":
            state = "killed" if run.get("state") == "running" else run.get("state")
            yield f"shard {shard} is not finished ({state}): run it again"
        elif first is not None and run.get("settings") != runs[first].get("settings"):
            changes = differences(runs[first].get("settings") or {}, run.get("settings") or {})
            yield f"shard {shard} was made with other settings than shard {first}: {changes}"


def _doubles(out: Storage, shards: list[Shard]) -> Iterator[str]:
    """The inputs and outputs that more than one shard has."""
    for key in ("source", "output"):
        keys, owners = array("q"), array("q")
        for number, shard in enumerate(shards):
            found = {hash(name) for name in _values(out, shard, key)}
            keys.extend(found)
            owners.extend([number] * len(found))
        values, times = np.unique(np.asarray(keys), return_counts=True)
        double = set(values[times > 1].tolist())
        shown: dict[str, list[Shard]] = {}
        for shard in shards if double else []:
            for name in _values(out, shard, key):
                if hash(name) in double and (name in shown or len(shown) < SHOWN_DOUBLES):
                    shown.setdefault(name, []).append(shard)
        for name, holders in shown.items():
            told = " and ".join(map(str, dict.fromkeys(holders)))
            yield f"{name} is the {'input' if key == 'source' else 'output'} of shards {told}"
        if len(double) > len(shown):
            yield f"and {len(double) - len(shown):,} more"


def _values(out: Storage, shard: Shard, key: str) -> Iterator[str]:
    """What the lines of a shard say under a key."""
    for line in out.lines(shard.record):
        value = _parsed(line).get(key)
        if value:
            yield str(value)


def _parsed(line: bytes) -> dict[str, Any]:
    try:
        values = json.loads(line)
        return values if isinstance(values, dict) else {}
    except ValueError:
        return {}


def tally(lines: Iterable[bytes]) -> dict[str, int]:
    """How many inputs are done, skipped and failed, by the last line about each."""
    sources, statuses = array("q"), array("b")
    for line in lines:
        values = _parsed(line)
        if values.get("status") in STATUSES:
            sources.append(hash(values.get("source")))
            statuses.append(STATUSES.index(values["status"]))
    last = np.asarray(statuses)[last_of_each(sources)]
    return dict(zip(STATUSES, np.bincount(last, minlength=len(STATUSES)).tolist(), strict=True))


@dataclass(frozen=True)
class Shown:
    """The state of a folder, or of one of its shards."""

    shard: Shard | None
    state: str  # running (or killed), finished, interrupted, failed, in shards, unfinished; "" when unknown
    counts: dict[str, int]  # inputs by status
    run: dict[str, Any]  # run.json


def show(out: Storage) -> list[Shown]:
    """The state of a folder, and of its shards that are not merged.

    Raises:
        UsageError: No run of segcli has written there.
    """
    whole = read_run(out)
    if not whole:
        raise UsageError(f"no run of segcli has written to {out}: there is no {RUN_FOLDER}/{RUN_FILE}")
    shards = [Shard(number, count) for count in shard_counts(out) for number in range(1, count + 1)]
    return [_shown(out, whole, None), *(_shown(out, read_run(out, shard.record), shard) for shard in shards)]


def _shown(out: Storage, run: dict[str, Any], shard: Shard | None) -> Shown:
    counts = {status: run[status] for status in STATUSES if isinstance(run.get(status), int)}
    if len(counts) < len(STATUSES):  # it has not ended
        counts = tally(out.lines(shard.record if shard else RUN_FOLDER))
    return Shown(shard, str(run.get("state", "")), counts, run)
