"""What processes of a run tell each other over a socket.

Two kinds of messages: those of processes that read files of strangers are text and numbers, so that whatever
becomes of such a process, nothing it says is executed. Those of processes that were given all they have by
this one are pickled. Arrays travel as they lie in memory.

Every wait for a socket is a turn at running Python that other threads get, and that has to be waited for
afterwards. So a message is one call for who sends it, and at most three for who receives it.
"""

from __future__ import annotations

import json
import math
import pickle
import socket
import struct
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
FRAME = struct.Struct("!II")  # length of the head, number of arrays
SIZE = struct.Struct("!Q")  # bytes of every array, after the head
TIMES = struct.Struct("ll")  # seconds, microseconds: the kernel's struct timeval


def limit_waits(connection: socket.socket, seconds: int) -> None:
    """Let a message that does not go on for so long end in an OSError.

    Python's own limit, `settimeout`, would make every wait two calls, and several of every array.
    """
    for option in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):
        connection.setsockopt(socket.SOL_SOCKET, option, TIMES.pack(seconds, 0))


def send(connection: socket.socket, header: dict[str, Any], pixels: Array | None = None) -> None:
    """Send one message; `pixels` travel as they lie in memory, their shape and type in the header."""
    parts = []
    if pixels is not None:
        pixels = np.ascontiguousarray(pixels)
        header = {**header, "shape": pixels.shape, "dtype": pixels.dtype.str}
        parts.append(pixels.reshape(-1).view(np.uint8).data)
    _send(connection, json.dumps(header).encode(), parts)


def receive(connection: socket.socket) -> tuple[dict[str, Any], Array | None]:
    """Receive one message. Raises EOFError when the other side has gone."""
    text, parts = _receive(connection)
    header = json.loads(bytes(text))
    if not parts:
        return header, None
    dtype, (values,) = np.dtype(header["dtype"]), parts
    if values.nbytes != dtype.itemsize * math.prod(header["shape"]):
        raise EOFError("a message of the wrong size")
    return header, values.view(dtype).reshape(header["shape"])


def send_object(connection: socket.socket, message: object) -> None:
    """Send one message of any kind."""
    buffers: list[pickle.PickleBuffer] = []
    text = pickle.dumps(message, 5, buffer_callback=buffers.append)
    _send(connection, text, [buffer.raw() for buffer in buffers])


def receive_object(connection: socket.socket) -> Any:
    """Receive one message of `send_object`. Raises EOFError when the other side has gone."""
    text, parts = _receive(connection)
    return pickle.loads(text, buffers=parts)


def _send(connection: socket.socket, head: bytes, arrays: Sequence[memoryview]) -> None:
    sizes = b"".join(SIZE.pack(array.nbytes) for array in arrays)
    _move_all([memoryview(FRAME.pack(len(head), len(arrays)) + head + sizes), *arrays], connection.sendmsg)


def _receive(connection: socket.socket) -> tuple[memoryview, list[Array]]:
    """The head of a message, and its arrays as bytes, uint8 (N,)."""
    length, count = FRAME.unpack(_filled(connection, FRAME.size))
    text = _filled(connection, length + count * SIZE.size)
    arrays = [np.empty(size, np.uint8) for (size,) in SIZE.iter_unpack(text[length:])]
    _fill(connection, [array.data for array in arrays])
    return text[:length], arrays


def _filled(connection: socket.socket, size: int) -> memoryview:
    view = memoryview(bytearray(size))
    _fill(connection, [view])
    return view


def _fill(connection: socket.socket, views: list[memoryview]) -> None:
    _move_all(views, lambda left: connection.recvmsg_into(left, 0, socket.MSG_WAITALL)[0])


def _move_all(views: list[memoryview], move: Callable[[list[memoryview]], int]) -> None:
    """Let `move`, which says how many bytes it did, send or fill all of some memory."""
    missing = sum(view.nbytes for view in views)
    while missing:
        count = move(views)
        if not count:
            raise EOFError("the other side has gone")
        missing -= count
        if missing:
            views = _after(views, count)


def _after(views: list[memoryview], count: int) -> list[memoryview]:
    """What is left of some memory without its first `count` bytes."""
    left = []
    for view in views:
        if view.nbytes > count:
            left.append(view[count:])
        count = max(0, count - view.nbytes)
    return left
