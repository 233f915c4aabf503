"""The process that decodes files. A file that kills, fills or occupies it costs that file and nothing else.

    python -m segcli.inference.decode_worker FD

It reads jobs from a socket and answers each with a header and, when the file could be read, its pixels.
It never imports torch. Its parent is `decoders.py`, where the messages are described.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import resource
import signal
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from segcli import images
from segcli.errors import ImageError
from segcli.inference.messages import Array, receive, send

Reader = Callable[[str, images.Announce], tuple[Array, tuple[str, ...], Array | None]]

LARGE = 2_000_000  # pixels; a worker asks before it decodes more
PIECE = 1 << 20  # bytes of a file that are hashed at a time
GIB = 1 << 30


def read_image(path: str, announce: images.Announce) -> tuple[Array, tuple[str, ...], None]:
    """An image as displayed: uint8 (H, W, 3), and notes."""
    picture = images.read_image(Path(path), images.MAX_PIXELS, announce)
    return picture.pixels, picture.notes, None


def read_mask(path: str, announce: images.Announce) -> tuple[Array, tuple[str, ...], Array | None]:
    """A label map: integers (H, W), and its palette, uint8 (256, 3), when it has one."""
    labels, palette = images.read_mask(Path(path), images.MAX_PIXELS, announce)
    return labels, (), palette


def read_colors(path: str, announce: images.Announce) -> tuple[Array, tuple[str, ...], None]:
    """A colour-coded label map: uint8 (H, W, 3)."""
    return images.read_color_map(Path(path), images.MAX_PIXELS, announce), (), None


READERS: dict[str, Reader] = {"image": read_image, "mask": read_mask, "colors": read_colors}


def seconds_for(size: int, pixels: int = 0) -> float:
    """How long reading a file of `size` bytes and `pixels` pixels may take: 10 s, and more for large ones."""
    return 10 + size / 5e6 + pixels / 4e6


def decode(path: str, reader: str, ask: Callable[[int], None]) -> tuple[dict[str, Any], Array | None]:
    """Read one file.

    Args:
        path: The file.
        reader: A key of `READERS`.
        ask: Called with the number of pixels, before decoding, when they are many.

    Returns:
        A header with "problem" or with "notes", and the pixels when there was no problem. Both kinds have
        "content" (size, times and SHA-256 of the file, None when it could not be read) and "milliseconds".
    """

    def announce(pixels: int) -> None:
        if pixels > LARGE:
            ask(pixels)

    start = time.perf_counter()
    header: dict[str, Any] = {"problem": "", "notes": [], "content": None, "palette": None}
    pixels: Array | None = None
    try:
        before = os.stat(path)
        digest = hashlib.sha256()  # hashlib.file_digest clears 256 KiB first, more than most masks have
        with open(path, "rb") as file:
            while piece := file.read(PIECE):
                digest.update(piece)
        header["content"] = {
            "size": before.st_size,
            "mtime_ns": before.st_mtime_ns,
            "ctime_ns": before.st_ctime_ns,
            "sha256": digest.hexdigest(),
        }
        pixels, notes, palette = READERS[reader](path, announce)
        header["notes"] = list(notes)
        header["palette"] = None if palette is None else palette.tobytes().hex()
        after = os.stat(path)
        if (before.st_size, before.st_mtime_ns, before.st_ino) != (
            after.st_size,
            after.st_mtime_ns,
            after.st_ino,
        ):
            raise ImageError("changed while it was read; run the same command again")
    except FileNotFoundError:
        header["problem"] = "no such file; it was there when its folder was listed"
    except OSError as error:
        header["problem"] = f"cannot be read: {error.strerror or error}"
    except ImageError as error:
        header["problem"] = str(error)
    except MemoryError:
        header["problem"] = "decoding it needs more memory than there is"
    except Exception as error:  # whatever a decoder raises about this file is the reason why this file failed
        header["problem"] = f"cannot be decoded ({type(error).__name__}: {error})"
    if header["problem"]:
        pixels = None
    header["milliseconds"] = (time.perf_counter() - start) * 1e3
    return header, pixels


def _confine() -> None:
    """Bound what one file can take, and make this process the first to go when memory runs out."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent decides
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with contextlib.suppress(OSError, ValueError):
        physical = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        _, most = resource.getrlimit(resource.RLIMIT_AS)
        resource.setrlimit(resource.RLIMIT_AS, (max(4 * GIB, physical // 4), most))
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
        file.write("1000")


def main() -> None:
    connection = socket.socket(fileno=int(sys.argv[1]))
    _confine()
    send(connection, {"ready": True})

    def limit(seconds: float) -> None:
        # The parent keeps the time; this limit is on computing time, and ends an orphan that loops.
        signal.setitimer(signal.ITIMER_PROF, 2 * seconds)

    def ask(pixels: int) -> None:
        send(connection, {"ask": pixels})
        answer, _ = receive(connection)
        limit(answer["seconds"])
        if refusal := answer.get("refusal"):
            raise ImageError(refusal)

    with contextlib.suppress(EOFError, ConnectionError):
        while True:
            job, _ = receive(connection)
            limit(job["seconds"])
            header, pixels = decode(job["path"], job["reader"], ask)
            limit(0)
            send(connection, header, pixels)


if __name__ == "__main__":
    main()
