"""Models by name: those that ship with segcli, those that others have published, and files on disk.

A published file is downloaded once, imported, and kept in the cache as a model file of ours:

    <cache>/models/<name>.safetensors   the model
    <cache>/models/<name>.json          where it came from, its checksums; kept when the model is deleted, so
                                        that a file whose publisher states no checksum is the same next time
    <cache>/downloads/<file>            the published file, if it was put there by hand (it stays)

This module must stay cheap to import (no torch, no numpy): commands look a model up before anything heavy.
"""

from __future__ import annotations

import datetime
import difflib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from segcli.downloads import (
    SILENT,
    Watch,
    by_hand,
    cache_folder,
    download,
    is_offline,
    mismatch,
    only_one,
    read_record,
)
from segcli.errors import CheckpointError, MachineError, UsageError
from segcli.files import sha256, write_atomic
from segcli.models.published import PUBLISHED, Published

if TYPE_CHECKING:
    from segcli.models.checkpoint import Model

SUFFIX = ".safetensors"
PACKAGE = Path(__file__).parents[1]
IN_WHEEL, IN_SOURCE_TREE = PACKAGE / "weights", PACKAGE.parents[1] / "weights"


def bundled_models() -> dict[str, Path]:
    """The models that ship with segcli: name -> file, in order of names.

    Files called encoder-* are no models, but weights to start a training from.
    """
    folder = IN_WHEEL if IN_WHEEL.is_dir() else IN_SOURCE_TREE
    files = sorted(folder.glob(f"*{SUFFIX}"))
    return {path.stem: path for path in files if not path.name.startswith("encoder-")}


DEFAULT_MODEL = "fcn8s-voc" if "fcn8s-voc" in bundled_models() else "fcn8s-camvid"


def find_model(name_or_path: str, offline: bool = False, watch: Watch = SILENT) -> Path:
    """The file of a model: a bundled name, a published name (downloaded on first use), or a path.

    Args:
        name_or_path: What the user gave.
        offline: Do not use the network; SEGCLI_OFFLINE says so too.
        watch: Hears what is downloaded, and how far it is.

    Raises:
        UsageError: Neither a known name nor a file; the nearest name is suggested.
        MachineError: The model must be downloaded, and cannot be.
    """
    path = Path(name_or_path)
    if path.is_file():
        return path
    bundled = bundled_models()
    if name_or_path in bundled:
        return bundled[name_or_path]
    if name_or_path in PUBLISHED:
        return fetch(PUBLISHED[name_or_path], offline, watch)
    raise UsageError(_unknown(name_or_path, [*bundled, *PUBLISHED]))


def open_model(name_or_path: str, offline: bool = False, watch: Watch = SILENT) -> Model:
    """`find_model`, then load it: a network in evaluation mode with all that is known about it."""
    from segcli.models.checkpoint import load_model

    return load_model(find_model(name_or_path, offline, watch))


def _unknown(name_or_path: str, names: list[str]) -> str:
    path = Path(name_or_path)
    if path.is_dir():
        return f"{path} is a folder; give the model file in it (*{SUFFIX})"
    if path.suffix or len(path.parts) > 1:
        return f"there is no model file {path}; `segcli models list` shows the names"
    near = difflib.get_close_matches(name_or_path, names, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return f"no model is called {name_or_path!r}; {hint}`segcli models list` shows the names"


# ---- published models in the cache ----


def cached_model(record: Published) -> Path:
    """Where the model of a published file is kept, whether it is there or not."""
    return cache_folder() / "models" / f"{record.name}{SUFFIX}"


def published_file(record: Published) -> Path:
    """Where the published file itself goes; people can put it there by hand."""
    return cache_folder() / "downloads" / record.file


def fetch(record: Published, offline: bool = False, watch: Watch = SILENT) -> Path:
    """The model of a published file from the cache; else it is downloaded and imported.

    Raises:
        MachineError: There is no network, or it may not be used, or the download fails.
        CheckpointError: The file is not what its publisher says.
    """
    model = cached_model(record)
    if model.is_file():
        return model
    file = published_file(record)
    with only_one(file, watch):
        if model.is_file():
            return model
        known = read_record(_sidecar(model))
        checksum = record.checksum or (f"sha256:{known['sha256']}" if "sha256" in known else None)
        put_by_hand = file.is_file()
        if put_by_hand:
            watch.say(f"{record.name}: taking {file}")
            problem = mismatch(file, checksum)
            if problem:
                raise CheckpointError(f"{file} is not the published file: {problem}; delete it and try again")
            address = ""
        else:
            address = _download(record, file, checksum, offline, watch)
        try:
            _import(record, file, model)
        except CheckpointError:
            if not put_by_hand:
                file.unlink()  # damaged where it was published, or on the way
            raise
        _write_sidecar(record, file, model, address)
        if not put_by_hand:
            file.unlink()
    return model


def _download(record: Published, file: Path, checksum: str | None, offline: bool, watch: Watch) -> str:
    if offline or is_offline():
        raise MachineError(
            f"{record.name} is not on this machine, and the network is switched off "
            f"(--offline or SEGCLI_OFFLINE)\n{by_hand(record.addresses, file)}"
        )
    watch.say(
        f"{record.name} is not on this machine yet: downloading {record.file}, "
        f"about {record.mebibytes:.0f} MiB, from {record.addresses[0].split('/')[2]}"
    )
    if checksum is None:
        watch.say("its publisher states no checksum; the one of this download will be remembered")
    return download(record.addresses, file, checksum, watch)


def _import(record: Published, file: Path, model: Path) -> None:
    from segcli.models.importers import import_model

    metrics: dict[str, Any] = {}
    if record.mean_iou is not None:
        score = round(record.mean_iou / 100, 4)
        metrics[record.scored_on] = {"mean_iou": score, "published_by": record.said_by}
    import_model(
        file,
        model,
        source=record.source,
        arch=record.network,
        classes=record.classes[0],
        preprocessing=record.preprocessing,
        dataset=record.trained_on,
        metrics=metrics,
        licence=record.licence,
        notes=record.notes,
    )


def _sidecar(model: Path) -> Path:
    return model.with_suffix(".json")


def _write_sidecar(record: Published, file: Path, model: Path, address: str) -> None:
    content = {
        "name": record.name,
        "file": record.file,
        "address": address or "put there by hand",
        "bytes": file.stat().st_size,
        "sha256": sha256(file),
        "published_checksum": record.checksum,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "model_sha256": sha256(model),
    }
    write_atomic(_sidecar(model), json.dumps(content, indent=2).encode())


# ---- all models, for people ----


@dataclass(frozen=True)
class Entry:
    """A line of `segcli models list`.

    Attributes:
        name: What `--model` takes.
        classes: Number of classes, of each head.
        mebibytes: Size of the file, or of the download.
        mean_iou: Percent, or None.
        scored_on: The set of that score.
        measured: The score was measured by segcli; else others have published it.
        place: bundled, cached or to download.
    """

    name: str
    classes: tuple[int, ...]
    mebibytes: float
    mean_iou: float | None
    scored_on: str
    measured: bool
    place: str


def list_models() -> list[Entry]:
    """All models that have a name: the bundled ones, then the published ones."""
    return [_bundled_entry(name, path) for name, path in bundled_models().items()] + [
        _published_entry(record) for record in PUBLISHED.values()
    ]


def _bundled_entry(name: str, path: Path) -> Entry:
    from segcli.models.info import read_info

    info = read_info(path)
    heads = (info.class_set, info.second_class_set)
    scored_on: str = next(iter(info.metrics), "")
    score: dict[str, Any] = info.metrics.get(scored_on, {})
    images = f", {score['images']} images" if "images" in score else ""
    return Entry(
        name=name,
        classes=tuple(len(head) for head in heads if head is not None),
        mebibytes=path.stat().st_size / 2**20,
        mean_iou=100 * score["mean_iou"] if "mean_iou" in score else None,
        scored_on=scored_on + images,
        measured=True,
        place="bundled",
    )


def _published_entry(record: Published) -> Entry:
    from segcli.palettes import CLASS_SETS

    return Entry(
        name=record.name,
        classes=tuple(len(CLASS_SETS[name]) for name in record.classes),
        mebibytes=record.mebibytes,
        mean_iou=record.mean_iou,
        scored_on=record.scored_on,
        measured=False,
        place="cached" if cached_model(record).is_file() else "to download",
    )


def verify_model(name_or_path: str) -> str:
    """Load a model that is on this machine, and compare it with what was recorded when it came.

    Returns:
        What was checked, in words.

    Raises:
        UsageError: It is unknown, or not here.
        CheckpointError: It is damaged.
    """
    from segcli.models.checkpoint import load_model

    record = PUBLISHED.get(name_or_path)
    if record and not cached_model(record).is_file():
        raise UsageError(f"{name_or_path} is not on this machine; get it with `segcli models download`")
    path = find_model(name_or_path, offline=True)
    model = load_model(path)
    known: dict[str, Any] = read_record(_sidecar(path)) if record else {}
    if known and known.get("model_sha256") != model.sha256:
        raise CheckpointError(f"{path} has changed since it was downloaded; delete it, and download it again")
    tensors = len(model.network.state_dict())
    checked = f"{tensors} tensors fit {model.info.network}, all numbers finite, sha256 {model.sha256[:12]}"
    return checked + (f" as downloaded on {known['date'][:10]}" if known else "")
