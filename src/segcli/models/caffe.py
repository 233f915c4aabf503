"""Layers and weights of a `.caffemodel`, read straight from protobuf's wire format.

A caffemodel is a NetParameter message of BVLC/caffe, src/caffe/proto/caffe.proto. Six fields of it matter:

    NetParameter      layers = 2 (V1LayerParameter, until 2014), layer = 100 (LayerParameter)
    V1LayerParameter  name = 4, blobs = 6
    LayerParameter    name = 1, blobs = 7
    BlobProto         num = 1, channels = 2, height = 3, width = 4 (until 2014), data = 5, shape = 7,
                      double_data = 8
    BlobShape         dim = 1

Encoding: https://protobuf.dev/programming-guides/encoding. The file is mapped, not read, and weights are
views of it, so that a net of half a gigabyte costs no more memory than its weights.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from segcli.errors import CheckpointError

VARINT, EIGHT_BYTES, LENGTH_DELIMITED, FOUR_BYTES = 0, 1, 2, 5  # wire types
Blob = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Layer:
    """A layer of the net: its name, and its weights in Caffe's order (weight, then bias); most have none."""

    name: str
    blobs: tuple[Blob, ...]


class _Malformed(ValueError):
    """The bytes are not what the message layout says."""


def read_caffemodel(path: Path) -> list[Layer]:
    """All layers of a net, in their order, also those without weights.

    Returns:
        Layers with float32 blobs, in the shape that the file states: older files write all of them with
        four dimensions.

    Raises:
        CheckpointError: The file is cut off, or it is no caffemodel.
    """
    if path.stat().st_size == 0:
        raise CheckpointError(f"{path} is empty; get the file again")
    with path.open("rb") as file:
        content = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    layers = []
    try:
        for number, value in _fields(content):
            if number in (2, 100) and isinstance(value, memoryview):
                name_field, blobs_field = (4, 6) if number == 2 else (1, 7)
                layers.append(_layer(value, name_field, blobs_field))
    except _Malformed as error:
        found = f"after {len(layers)} layers" if layers else "at once"
        raise CheckpointError(
            f"{path} cannot be read as a caffemodel: {error}, {found}; it is cut off or something else"
        ) from error
    if not layers:
        raise CheckpointError(f"{path} holds no layers; is it a caffemodel?")
    return layers


def _layer(message: memoryview, name_field: int, blobs_field: int) -> Layer:
    name, blobs = "", []
    for number, value in _fields(message):
        if number == name_field and isinstance(value, memoryview):
            name = bytes(value).decode("utf-8", "replace")
        elif number == blobs_field and isinstance(value, memoryview):
            blobs.append(_blob(value))
    return Layer(name, tuple(blobs))


def _blob(message: memoryview) -> Blob:
    legacy = {1: 1, 2: 1, 3: 1, 4: 1}  # num, channels, height, width
    has_legacy = False
    shape: tuple[int, ...] | None = None
    parts: list[Blob] = []
    for number, value in _fields(message):
        if number in legacy and isinstance(value, int):
            legacy[number] = value
            has_legacy = True
        elif number == 5 and not isinstance(value, int):
            parts.append(_numbers(value, "<f4"))
        elif number == 8 and not isinstance(value, int):
            parts.append(_numbers(value, "<f8"))
        elif number == 7 and isinstance(value, memoryview):
            shape = tuple(_dimensions(value))
    flat = parts[0] if len(parts) == 1 else np.concatenate([np.empty(0, np.float32), *parts])
    if shape is None:
        shape = tuple(legacy.values()) if has_legacy else (flat.size,)
    if math.prod(shape) != flat.size or min(shape, default=0) < 0:
        raise _Malformed(f"a blob of shape {shape} has {flat.size} numbers")
    return flat.reshape(shape)


def _numbers(value: memoryview, kind: str) -> Blob:
    """Packed numbers, or a single one (unpacked fields come one by one)."""
    if len(value) % np.dtype(kind).itemsize:
        raise _Malformed(f"{len(value)} bytes do not make whole numbers")
    return np.frombuffer(value, kind).astype(np.float32, copy=False)


def _dimensions(message: memoryview) -> Iterator[int]:
    for number, value in _fields(message):
        if number != 1:
            continue
        if isinstance(value, int):
            yield value
        else:  # packed
            position = 0
            while position < len(value):
                dimension, position = _varint(value, position)
                yield dimension


def _fields(message: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    """The fields of a message: (number, an integer for varints or else the bytes)."""
    position = 0
    while position < len(message):
        key, position = _varint(message, position)
        number, wire_type = key >> 3, key & 7
        if wire_type == VARINT:
            integer, position = _varint(message, position)
            yield number, integer
            continue
        if wire_type == LENGTH_DELIMITED:
            length, position = _varint(message, position)
        elif wire_type in (EIGHT_BYTES, FOUR_BYTES):
            length = 8 if wire_type == EIGHT_BYTES else 4
        else:
            raise _Malformed(f"unknown wire type {wire_type}")
        if position + length > len(message):
            raise _Malformed(f"a field of {length:,} bytes has only {len(message) - position:,}")
        yield number, message[position : position + length]
        position += length


def _varint(message: memoryview, position: int) -> tuple[int, int]:
    """A number in groups of seven bits, the lowest first, and the position behind it."""
    value = 0
    for shift in range(0, 70, 7):
        if position >= len(message):
            raise _Malformed("a number is cut off")
        byte = message[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
    raise _Malformed("a number is too long")
