"""Writers of files of records: TFRecord, RecordIO, LMDB, and Arrow as `save_to_disk` has it, by others' own code or by their specifications."""

from __future__ import annotations

import functools
import io
import json
import struct
import tarfile
import zlib
from pathlib import Path
from typing import Any

import lmdb
import pyarrow as pa
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from tensorboard.summary.writer.record_writer import RecordWriter

FIELD = descriptor_pb2.FieldDescriptorProto


def message(name: str, *fields: tuple[str, int, int, int, str]) -> descriptor_pb2.DescriptorProto:
    """A message type: (name, number, type, label, name of a message's type) of each field."""
    made = descriptor_pb2.DescriptorProto(name=name)
    for field, number, kind, label, inner in fields:
        made.field.add(name=field, number=number, type=kind, label=label, type_name=inner or None)
    return made


@functools.cache
def protobuf(name: str) -> Any:
    """TensorFlow's Example and Caffe's Datum as protobuf itself makes them, from the descriptions in their .proto files."""
    one, many, is_message = FIELD.LABEL_OPTIONAL, FIELD.LABEL_REPEATED, FIELD.TYPE_MESSAGE
    file = descriptor_pb2.FileDescriptorProto(name="test.proto", package="t", syntax="proto2")
    file.message_type.add().CopyFrom(message("BytesList", ("value", 1, FIELD.TYPE_BYTES, many, "")))
    file.message_type.add().CopyFrom(message("FloatList", ("value", 1, FIELD.TYPE_FLOAT, many, "")))
    file.message_type.add().CopyFrom(message("Int64List", ("value", 1, FIELD.TYPE_INT64, many, "")))
    kinds = ("bytes_list", 1, ".t.BytesList"), ("float_list", 2, ".t.FloatList"), ("int64_list", 3, ".t.Int64List")
    file.message_type.add().CopyFrom(
        message("Feature", *((kind, n, is_message, one, inner) for kind, n, inner in kinds))
    )
    entry = message("Entry", ("key", 1, FIELD.TYPE_STRING, one, ""), ("value", 2, is_message, one, ".t.Feature"))
    file.message_type.add().CopyFrom(entry)
    file.message_type.add().CopyFrom(message("Features", ("feature", 1, is_message, many, ".t.Entry")))
    file.message_type.add().CopyFrom(message("Example", ("features", 1, is_message, one, ".t.Features")))
    datum = [(field, n, FIELD.TYPE_INT32, one, "") for n, field in enumerate(("channels", "height", "width"), 1)]
    datum += [("data", 4, FIELD.TYPE_BYTES, one, ""), ("label", 5, FIELD.TYPE_INT32, one, "")]
    datum += [("float_data", 6, FIELD.TYPE_FLOAT, many, ""), ("encoded", 7, FIELD.TYPE_BOOL, one, "")]
    file.message_type.add().CopyFrom(message("Datum", *datum))
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName(f"t.{name}"))


def an_example(**features: Any) -> bytes:
    made = protobuf("Example")()
    for name, value in features.items():
        entry = made.features.feature.add(key=name.replace("__", "/"))
        values = value if isinstance(value, list) else [value]
        if isinstance(values[0], bytes):
            entry.value.bytes_list.value.extend(values)
        elif isinstance(values[0], float):
            entry.value.float_list.value.extend(values)
        else:
            entry.value.int64_list.value.extend(values)
    return bytes(made.SerializeToString())


def tfrecord(path: Path, examples: list[bytes]) -> Path:
    """By tensorboard's writer, which is TensorFlow's."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        writer = RecordWriter(file)
        for example in examples:
            writer.write(example)
    return path


def a_datum(**values: Any) -> bytes:
    return bytes(protobuf("Datum")(**values).SerializeToString())


def recordio(path: Path, records: list[bytes]) -> Path:
    """As dmlc-core's recordio.h says: data is cut where the magic number stands in it, in every fourth place."""
    magic = struct.pack("<I", 0xCED7230A)
    out = io.BytesIO()
    for data in records:
        cuts = [at for at in range(0, len(data) - 3, 4) if data[at : at + 4] == magic]
        parts = [data[a + 4 * (n > 0) : b] for n, (a, b) in enumerate(zip([0, *cuts], [*cuts, len(data)], strict=True))]
        for n, part in enumerate(parts):
            kind = 0 if len(parts) == 1 else 1 if n == 0 else 3 if n == len(parts) - 1 else 2
            out.write(magic + struct.pack("<I", kind << 29 | len(part)) + part + bytes(-len(part) % 4))
    path.write_bytes(out.getvalue())
    return path


def image_record(label: float, identity: int, data: bytes, *more: float) -> bytes:
    return (
        struct.pack("<IfQQ", len(more), 0.0 if more else label, identity, 0)
        + struct.pack(f"<{len(more)}f", *more)
        + data
    )


def database(folder: Path, values: dict[bytes, bytes], name: str = "") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    place = folder / name
    with (
        lmdb.open(str(place), map_size=2**24, subdir=not name) as environment,
        environment.begin(write=True) as transaction,
    ):
        for key, value in values.items():
            transaction.put(key, value)
    return folder


def write_arrow(path: Path, table: pa.Table, rows: int = 5, new: Any = pa.ipc.new_stream) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with pa.OSFile(str(path), "wb") as file, new(file, table.schema) as writer:
        writer.write_table(table, max_chunksize=rows)
    return path


def save_to_disk(folder: Path, tables: list[pa.Table], split: str) -> Path:
    names = [f"data-{n:05d}-of-{len(tables):05d}.arrow" for n in range(len(tables))]
    for name, table in zip(names, tables, strict=True):
        write_arrow(folder / name, table)
    state = {
        "_data_files": [{"filename": name} for name in names],
        "_fingerprint": "0",
        "_format_type": None,
        "_split": split,
    }
    (folder / "state.json").write_text(json.dumps(state))
    (folder / "dataset_info.json").write_text("{}")
    return folder


def gzipped_tar(path: Path, content: list[tuple[str, bytes]]) -> None:
    """Deflated in blocks of 4 kB, between which there may be seek points."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        for name, data in content:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    packer, data = zlib.compressobj(1, zlib.DEFLATED, 31), file.getvalue()
    parts = [
        packer.compress(data[at : at + 4096]) + packer.flush(zlib.Z_FULL_FLUSH) for at in range(0, len(data), 4096)
    ]
    path.write_bytes(b"".join([*parts, packer.flush()]))
