"""Caffe's message classes, built from its published layout with protobuf: an independent writer.

Field names, numbers, types and labels are those of BVLC/caffe, src/caffe/proto/caffe.proto; fields that hold
no weights are left out.
"""

from __future__ import annotations

from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

T = descriptor_pb2.FieldDescriptorProto
LAYOUT: dict[str, list[tuple[str, int, Any, bool, bool]]] = {  # name, number, type, repeated, packed
    "BlobShape": [("dim", 1, T.TYPE_INT64, True, True)],
    "BlobProto": [
        ("num", 1, T.TYPE_INT32, False, False),
        ("channels", 2, T.TYPE_INT32, False, False),
        ("height", 3, T.TYPE_INT32, False, False),
        ("width", 4, T.TYPE_INT32, False, False),
        ("data", 5, T.TYPE_FLOAT, True, True),
        ("diff", 6, T.TYPE_FLOAT, True, True),
        ("shape", 7, "BlobShape", False, False),
        ("double_data", 8, T.TYPE_DOUBLE, True, True),
    ],
    "LayerParameter": [
        ("name", 1, T.TYPE_STRING, False, False),
        ("type", 2, T.TYPE_STRING, False, False),
        ("bottom", 3, T.TYPE_STRING, True, False),
        ("top", 4, T.TYPE_STRING, True, False),
        ("blobs", 7, "BlobProto", True, False),
    ],
    "V1LayerParameter": [
        ("bottom", 2, T.TYPE_STRING, True, False),
        ("top", 3, T.TYPE_STRING, True, False),
        ("name", 4, T.TYPE_STRING, False, False),
        ("type", 5, T.TYPE_INT32, False, False),  # an enum, which is a varint too
        ("blobs", 6, "BlobProto", True, False),
        ("blobs_lr", 7, T.TYPE_FLOAT, True, False),
    ],
    "NetParameter": [
        ("name", 1, T.TYPE_STRING, False, False),
        ("layers", 2, "V1LayerParameter", True, False),
        ("input", 3, T.TYPE_STRING, True, False),
        ("layer", 100, "LayerParameter", True, False),
    ],
    # as a writer that does not pack would have it; the wire format allows readers to meet both
    "UnpackedBlobProto": [
        ("data", 5, T.TYPE_FLOAT, True, False),
        ("double_data", 8, T.TYPE_DOUBLE, True, False),
        ("shape", 7, "UnpackedBlobShape", False, False),
    ],
    "UnpackedBlobShape": [("dim", 1, T.TYPE_INT64, True, False)],
}


def _classes() -> dict[str, Any]:
    file = descriptor_pb2.FileDescriptorProto(name="caffe_for_tests.proto", package="caffe", syntax="proto2")
    for name, fields in LAYOUT.items():
        message = file.message_type.add(name=name)
        for field, number, kind, repeated, packed in fields:
            entry = message.field.add(name=field, number=number)
            entry.label = T.LABEL_REPEATED if repeated else T.LABEL_OPTIONAL
            if isinstance(kind, str):
                entry.type, entry.type_name = T.TYPE_MESSAGE, f".caffe.{kind}"
            else:
                entry.type = kind
            if packed:
                entry.options.packed = True
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return {
        name: message_factory.GetMessageClass(pool.FindMessageTypeByName(f"caffe.{name}")) for name in LAYOUT
    }


CLASSES = _classes()
