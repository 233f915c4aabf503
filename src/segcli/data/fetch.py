"""Get public data sets: download, check, unpack safely.

Archives are those of torchvision.datasets (voc.py, sbd.py), with their checksums. An archive's content gets
its final name only when all of it was unpacked. Links and devices in an archive are refused, because no data
set needs them; tarfile's "data" filter refuses what leads out of the folder.
"""

from __future__ import annotations

import os
import shutil
import tarfile
import tempfile
import zlib
from pathlib import Path

from segcli.data.public import find_sbd_labels
from segcli.data.sets import KNOWN, Known
from segcli.downloads import SILENT, Watch, download, is_offline, mismatch, only_one
from segcli.errors import MachineError
from segcli.files import TEMPORARY_PREFIX, machine_errors

MAX_BYTES = 16 << 30  # VOC and SBD are 2 GB each when unpacked
MAX_FILES = 200_000

NEEDS = {"voc": ("voc2012",), "voc-sbd": ("voc2012", "voc-sbd")}  # archives; otherwise the set's own


def fetch(name: str, folder: Path, watch: Watch = SILENT) -> None:
    """Download a known data set and unpack it into a folder, which is made when it is missing.

    An archive that lies in the folder already is used, and removed when it was unpacked.

    Raises:
        MachineError: A set that cannot be fetched by a program, no network, a full disk, or an archive that
            is not what it should be. The message has the address, the checksum and the place.
    """
    for part in NEEDS.get(name, (name,)):
        known = KNOWN[part]
        if not known.md5:
            why = "needs a login" if known.login else "has no published checksum, so segcli does not fetch it"
            raise MachineError(f"{part} {why}\nGet it from {known.address} and unpack it into {folder}")
        archive = folder / known.address.rpartition("/")[2]
        here = find_sbd_labels(folder) if part == "voc-sbd" else known.layouts[0].find(folder)
        if here is None:
            with only_one(archive, watch):
                _get(known, archive, watch)
                watch.say(f"unpacking {archive.name}")
                unpack(archive, folder)
                archive.unlink(missing_ok=True)


def _get(known: Known, archive: Path, watch: Watch) -> None:
    checksum = f"md5:{known.md5}"
    if archive.is_file() and mismatch(archive, checksum) is None:
        return
    by_hand = f"Get it by hand from {known.source()}, save it as {archive}, and run the same command again"
    if is_offline():
        raise MachineError(f"{archive.name} is not here, and SEGCLI_OFFLINE forbids the network\n{by_hand}")
    try:
        download((known.address,), archive, checksum, watch)
    except MachineError as error:
        if isinstance(error.__cause__, OSError):  # the disk, not the network
            raise
        raise MachineError(f"{str(error).splitlines()[0]}\n{by_hand}") from error


def unpack(archive: Path, folder: Path, max_bytes: int = MAX_BYTES, max_files: int = MAX_FILES) -> None:
    """Unpack a tar archive into a folder, all of it or nothing.

    Raises:
        MachineError: The archive is damaged, larger than the limits, or holds what does not belong into one
            (links, devices, names that lead out of the folder); or the disk is full.
    """
    with machine_errors(folder, "unpack into"):
        folder.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=TEMPORARY_PREFIX, dir=folder))
        try:
            _unpack_members(archive, staging, max_bytes, max_files)
            _move(staging, folder)
        except (tarfile.TarError, zlib.error, EOFError) as error:
            reason = (str(error).splitlines() or ["it is cut off"])[0].rstrip(":")
            raise MachineError(
                f"{archive} cannot be unpacked: {reason}; delete it and get it again"
            ) from error
        finally:
            shutil.rmtree(staging, ignore_errors=True)


def _unpack_members(archive: Path, folder: Path, max_bytes: int, max_files: int) -> None:
    total = count = 0
    with tarfile.open(archive, "r:*") as tar:
        for member in tar:
            count += 1
            total += member.size
            if not (member.isfile() or member.isdir()):
                raise MachineError(
                    f"{archive} holds {member.name!r}, which is a link or a device; do not trust it"
                )
            if total > max_bytes or count > max_files:
                limit = f"{max_bytes >> 20:,} MiB or {max_files:,} files"
                raise MachineError(f"{archive} unpacks to more than {limit}; do not trust it")
            tar.extract(member, folder, filter="data")


def _move(source: Path, target: Path) -> None:
    """Move what is in `source` into `target`; folders that are there already are joined."""
    for entry in sorted(source.iterdir()):
        place = target / entry.name
        if entry.is_dir() and place.is_dir():
            _move(entry, place)
        else:
            os.replace(entry, place)  # noqa: PTH105 - of a folder, too
