"""The caffemodel reader against files that protobuf wrote."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from caffe_messages import CLASSES

from segcli.errors import CheckpointError
from segcli.models.caffe import read_caffemodel

WEIGHT = np.arange(24, dtype=np.float32).reshape(2, 3, 2, 2) / 7
BIAS = np.array([0.5, -1.25], np.float32)


def write(path: Path, net: Any) -> Path:
    path.write_bytes(net.SerializeToString())
    return path


def new_net() -> Any:
    net = CLASSES["NetParameter"](name="a net", input=["data"])
    net.layer.add(name="data", type="Input", top=["data"])
    layer = net.layer.add(name="conv", type="Convolution", bottom=["data"], top=["conv"])
    for array in (WEIGHT, BIAS):
        blob = layer.blobs.add()
        blob.shape.dim.extend(array.shape)
        blob.data.extend(array.ravel().tolist())
    layer.blobs[0].diff.extend([0.0] * 24)  # gradients, which some files carry
    net.layer.add(name="pool", type="Pooling")
    return net


def test_layers_of_today(tmp_path: Path) -> None:
    layers = read_caffemodel(write(tmp_path / "a.caffemodel", new_net()))
    assert [layer.name for layer in layers] == ["data", "conv", "pool"]
    assert [len(layer.blobs) for layer in layers] == [0, 2, 0]
    np.testing.assert_array_equal(layers[1].blobs[0], WEIGHT)
    np.testing.assert_array_equal(layers[1].blobs[1], BIAS)
    assert layers[1].blobs[0].dtype == np.float32


def test_layers_of_2014_with_four_dimensions(tmp_path: Path) -> None:
    net = CLASSES["NetParameter"](name="old")
    layer = net.layers.add(name="fc", type=14, blobs_lr=[1.0, 2.0])
    layer.blobs.add(num=1, channels=1, height=2, width=12).data.extend(WEIGHT.ravel().tolist())
    layer.blobs.add(num=1, channels=1, height=1, width=2).data.extend(BIAS.tolist())
    (found,) = read_caffemodel(write(tmp_path / "a.caffemodel", net))
    assert found.name == "fc"
    assert [blob.shape for blob in found.blobs] == [(1, 1, 2, 12), (1, 1, 1, 2)]
    np.testing.assert_array_equal(found.blobs[0].ravel(), WEIGHT.ravel())


def test_unpacked_and_double_numbers(tmp_path: Path) -> None:
    blob = CLASSES["UnpackedBlobProto"](data=BIAS.tolist())
    blob.shape.dim.extend([2])
    doubles = CLASSES["UnpackedBlobProto"](double_data=[0.1, 0.2, 0.3])
    doubles.shape.dim.extend([3, 1])
    net = CLASSES["NetParameter"]()
    layer = net.layer.add(name="both")
    for message in (blob, doubles):
        layer.blobs.add().ParseFromString(message.SerializeToString())
    packed = read_caffemodel(write(tmp_path / "packed.caffemodel", net))[0]

    def field(number: int, payload: bytes) -> bytes:
        assert len(payload) < 128
        return bytes([number << 3 | 2, len(payload)]) + payload

    raw = field(1, b"both") + field(7, blob.SerializeToString()) + field(7, doubles.SerializeToString())
    path = tmp_path / "raw.caffemodel"
    path.write_bytes(bytes([0xA2, 0x06, len(raw)]) + raw)  # field 100: key 100 << 3 | 2 = 802 = 0xA2 0x06
    unpacked = read_caffemodel(path)[0]
    for layer in (packed, unpacked):
        np.testing.assert_array_equal(layer.blobs[0], BIAS)
        np.testing.assert_array_equal(layer.blobs[1], np.float32([[0.1], [0.2], [0.3]]))


def test_a_cut_file_is_refused_wherever_it_is_cut(tmp_path: Path) -> None:
    """Cut between two layers it is a valid, shorter net; anywhere else the reader must say so."""
    whole = new_net().SerializeToString()
    net = new_net()
    ends = set()
    for count in range(4):
        part = CLASSES["NetParameter"](name=net.name, input=list(net.input))
        part.layer.extend(list(net.layer)[:count])
        ends.add(len(part.SerializeToString()))
    path = tmp_path / "cut.caffemodel"
    refused = 0
    for length in range(1, len(whole)):
        path.write_bytes(whole[:length])
        try:
            layers = read_caffemodel(path)
        except CheckpointError:
            refused += 1
        else:
            assert length in ends
            assert len(layers) < 3
    assert refused >= len(whole) - 1 - len(ends)


@pytest.mark.parametrize(
    "content",
    [b"", b"<!DOCTYPE html><html>404</html>", b"\x00" * 100, b"\xff" * 100, b"PK\x03\x04" + b"a" * 60],
)
def test_what_is_no_caffemodel_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "a.caffemodel"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"a\.caffemodel"):
        read_caffemodel(path)


def test_a_shape_that_does_not_fit_its_numbers_is_refused(tmp_path: Path) -> None:
    net = new_net()
    net.layer[1].blobs[0].shape.dim[0] = 4
    with pytest.raises(CheckpointError, match=r"shape \(4, 3, 2, 2\) has 24 numbers"):
        read_caffemodel(write(tmp_path / "a.caffemodel", net))


def test_damaged_bytes_end_in_our_error_or_in_layers(tmp_path: Path) -> None:
    whole = bytearray(new_net().SerializeToString())
    random = np.random.default_rng(0)
    path = tmp_path / "damaged.caffemodel"
    for _ in range(300):
        damaged = bytearray(whole)
        for place in random.integers(0, len(whole), 3):
            damaged[place] = random.integers(0, 256)
        path.write_bytes(damaged)
        try:
            read_caffemodel(path)
        except CheckpointError:
            continue
