"""How much memory a run may take.

Sources: proc(5) and cgroups(7) of Linux, where containers and batch systems say what they allow.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
from collections.abc import Iterator
from pathlib import Path

from segcli.errors import UsageError

UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
SHARE = 2  # auto is half of what the machine has: others use it, too
GIB = 1 << 30
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of glibc's malloc.h


def memory_of(text: str) -> int:
    """The bytes of `--memory`: 6G, 800M, 1.5GiB, a number of bytes, or auto.

    Raises:
        UsageError: It is no size.
    """
    if text.lower() == "auto":
        return memory_of_machine() // SHARE
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([KMGT]?)(?:I?B)?", text.strip().upper())
    size = int(float(match[1]) * UNITS[match[2]]) if match else 0
    if size < 1:
        raise UsageError(f"--memory {text!r}: give auto or a size such as 6G or 800M")
    return size


def memory_of_machine(root: Path = Path("/")) -> int:
    """Bytes of memory that this process can have: the machine's, or less where a container allows less."""
    return min([os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"), *_allowed(root)])


def _allowed(root: Path) -> Iterator[int]:
    """The limits of the control groups that this process belongs to, and of those above them."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    top = root / "sys/fs/cgroup"
    for line in lines:
        _, controllers, name = line.split(":", 2)
        if controllers == "":
            folder, file = top, "memory.max"
        elif "memory" in controllers.split(","):
            folder, file = top / "memory", "memory.limit_in_bytes"
        else:
            continue
        group = Path(name.lstrip("/"))
        for each in (group, *group.parents):
            with contextlib.suppress(OSError, ValueError):  # no such file from within, or "max"
                yield int((folder / each / file).read_text())


def keep_freed_memory() -> None:
    """Let this process keep memory that it frees, for its next use, as far as its C library can (glibc).

    By default glibc returns large blocks at once, and the system clears every page of the next one: an eighth
    of the time of a training on the processor, which allocates the same maps in every step. See mallopt(3).
    """
    allocator = ctypes.CDLL(None)
    if hasattr(allocator, "mallopt"):
        allocator.mallopt(M_MMAP_MAX, 0)
        allocator.mallopt(M_TRIM_THRESHOLD, (1 << 31) - 1)


def gib(size: int) -> str:
    """A size for people, in GiB."""
    return f"{size / GIB:.1f} GiB"
