"""What processes of a run tell each other over a socket.

Two kinds of messages: those of processes that read files of strangers are text and numbers, so that whatever
becomes of such a process, nothing it says is executed. Those of processes that were given all they have by
this one are pickled. Arrays travel as they lie in memory.
"""

from __future__ import annotations

import json
import pickle
import socket
import struct
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
FRAME = struct.Struct("!IQ")  # length of the header, length of the pixels
SIZE = struct.Struct("!Q")


def send(connection: socket.socket, header: dict[str, Any], pixels: Array | None = None) -> None:
    """Send one message; `pixels` travel as they lie in memory, their shape and type in the header."""
    if pixels is not None:
        pixels = np.ascontiguousarray(pixels)
        header = {**header, "shape": pixels.shape, "dtype": pixels.dtype.str}
    text = json.dumps(header).encode()
    connection.sendall(FRAME.pack(len(text), 0 if pixels is None else pixels.nbytes) + text)
    if pixels is not None:
        connection.sendall(pixels.reshape(-1).view(np.uint8).data)


def receive(connection: socket.socket) -> tuple[dict[str, Any], Array | None]:
    """Receive one message. Raises EOFError when the other side has gone."""
    length, size = FRAME.unpack(bytes(_fill(connection, bytearray(FRAME.size))))
    header = json.loads(bytes(_fill(connection, bytearray(length))))
    if not size:
        return header, None
    pixels = np.empty(header["shape"], np.dtype(header["dtype"]))
    if pixels.nbytes != size:
        raise EOFError("a message of the wrong size")
    _fill(connection, pixels.reshape(-1).view(np.uint8).data)
    return header, pixels


def _fill(connection: socket.socket, buffer: bytearray | memoryview) -> bytearray | memoryview:
    view = memoryview(buffer)
    done = 0
    while done < len(view):
        count = connection.recv_into(view[done:])
        if not count:
            raise EOFError("the other side has gone")
        done += count
    return buffer


def send_object(connection: socket.socket, message: object) -> None:
    """Send one message of any kind."""
    buffers: list[pickle.PickleBuffer] = []
    text = pickle.dumps(message, 5, buffer_callback=buffers.append)
    parts = [buffer.raw() for buffer in buffers]
    sizes = [len(text), *(part.nbytes for part in parts)]
    connection.sendall(b"".join([SIZE.pack(len(sizes)), *map(SIZE.pack, sizes), text]))
    for part in parts:
        connection.sendall(part)


def receive_object(connection: socket.socket) -> Any:
    """Receive one message of `send_object`. Raises EOFError when the other side has gone."""
    (count,) = SIZE.unpack(_fill(connection, bytearray(SIZE.size)))
    told = _fill(connection, bytearray(count * SIZE.size))
    length, *sizes = (size for (size,) in SIZE.iter_unpack(told))
    text = _fill(connection, bytearray(length))
    parts = [np.empty(size, np.uint8) for size in sizes]
    for part in parts:
        _fill(connection, part.data)
    return pickle.loads(text, buffers=parts)
