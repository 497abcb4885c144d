"""Files of rows in groups, read by column or by group: Parquet, and Arrow's streams and files as Hugging Face's `save_to_disk` writes them.

Both give the same to `parquet_images`: a schema, the rows of each group, some columns of all rows, the pictures of one group. The layout
of Arrow's messages is that of the Arrow Columnar Format, version 1.5, section "Serialization and IPC": of each message only the
metadata are read to list it, so a picture is read with its group alone.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import mmap
import os
import struct
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from alexprep.shards.errors import AlexprepError
from alexprep.shards.sources.grouped import DamagedGroupError, FileView
from alexprep.shards.storage import Files, LocalFiles, open_regular

_FILES = 512  # whose footers, or lists of messages, are kept
_ARROW_FILE = b"ARROW1\0\0"  # begins a file; a stream begins with its first message
_CONTINUED = b"\xff\xff\xff\xff"
_SCHEMA, _DICTIONARY, _BATCH = 1, 2, 3  # Message.fbs: MessageHeader
_MAX_METADATA_BYTES = 2**26  # of a message
_ALIGNED = 8


class ColumnarFile(ABC):
    """One file. What cannot be read of it as a whole is an AlexprepError; of a group, a DamagedGroupError or another OSError.

    Attributes:
        schema: Arrow's.
        group_rows: how many rows each group has.
    """

    schema: pa.Schema
    group_rows: list[int]

    def __init__(self, files: Files, path: bytes) -> None:
        self._files, self._path, self._shown = files, path, files.display(path)

    @abstractmethod
    def group_bytes(self, image: str) -> list[int] | None:
        """About how many bytes of pictures each group has, decompressed; None where there is no such column."""

    @abstractmethod
    def read(self, columns: Sequence[str]) -> pa.Table:
        """Some columns of the whole file."""

    @abstractmethod
    def names(self, image: str) -> pa.ChunkedArray | None:
        """The field "path" of a column of structs, which has the pictures' own names; None where there is none."""

    @abstractmethod
    def bytes_of(self, columns: Sequence[str]) -> list[int]:
        """How many bytes some columns have in each group, decompressed, beside what `group_bytes` counts."""

    @abstractmethod
    def group(self, number: int, columns: Sequence[str]) -> pa.Table:
        """Some columns of a group, of which nothing else is kept in memory."""

    def pictures(self, number: int, image: str) -> pa.ChunkedArray:
        """The pictures of a group, a column of binary."""
        import pyarrow.compute as pc  # takes as long as ten images, and most sources are asked only whether they are meant

        column = self._picture_column(number, image)
        return pc.struct_field(column, "bytes") if pa.types.is_struct(column.type) else column

    @abstractmethod
    def _picture_column(self, number: int, image: str) -> pa.ChunkedArray:
        """The column of pictures of a group, or the field of it that has their bytes."""

    def _group(self, number: int, read: Callable[[], Any]) -> Any:
        """What `read` gives of a group."""
        try:
            return read()
        except (pa.ArrowException, OSError, IndexError) as error:
            if (isinstance(error, OSError) and error.errno is not None) or isinstance(error, MemoryError):
                raise
            raise DamagedGroupError(f"row group {number} is damaged ({_first_line(error)})") from None


@functools.lru_cache(maxsize=_FILES)
def columnar(files: Files, path: bytes) -> ColumnarFile:
    """The file at a path, by its ending; kept. AlexprepError where it is none of its kind, or was cut short."""
    return (_Arrow if path.lower().endswith(b".arrow") else _Parquet)(files, path)


class _Parquet(ColumnarFile):
    """A Parquet file, whose metadata lie at its end; page checksums are compared where it has them."""

    def __init__(self, files: Files, path: bytes) -> None:
        super().__init__(files, path)
        try:
            with FileView(files, path) as file:
                self._footer = pq.read_metadata(file)
                self.schema = self._footer.schema.to_arrow_schema()
        except (pa.ArrowException, OSError) as error:
            raise self._unreadable(error) from None
        self.group_rows = [self._footer.row_group(number).num_rows for number in range(self._footer.num_row_groups)]

    def group_bytes(self, image: str) -> list[int] | None:
        """See `ColumnarFile`."""
        chunk = next((n for n, name in enumerate(self._leaves()) if name in (f"{image}.bytes", image)), None)
        if chunk is None:
            return None
        groups = map(self._footer.row_group, range(self._footer.num_row_groups))
        return [group.column(chunk).total_uncompressed_size for group in groups]

    def read(self, columns: Sequence[str]) -> pa.Table:
        """See `ColumnarFile`."""
        if not columns:
            return pa.table({})
        try:
            with FileView(self._files, self._path) as file:
                return self._opened(file).read(list(columns), use_threads=False)
        except (pa.ArrowException, OSError) as error:
            raise self._unreadable(error) from None

    def names(self, image: str) -> pa.ChunkedArray | None:
        """See `ColumnarFile`."""
        import pyarrow.compute as pc

        name = f"{image}.path"
        return pc.struct_field(self.read([name]).column(0), "path") if name in self._leaves() else None

    def bytes_of(self, columns: Sequence[str]) -> list[int]:
        """See `ColumnarFile`."""
        wanted = [n for n, leaf in enumerate(self._leaves()) if leaf.partition(".")[0] in columns or leaf in columns]
        groups = map(self._footer.row_group, range(self._footer.num_row_groups))
        return [sum(group.column(n).total_uncompressed_size for n in wanted) for group in groups]

    def group(self, number: int, columns: Sequence[str]) -> pa.Table:
        """See `ColumnarFile`."""

        def read() -> pa.Table:
            with FileView(self._files, self._path) as file:
                return self._opened(file).read_row_group(number, list(columns), use_threads=False)

        return self._group(number, read)

    def _picture_column(self, number: int, image: str) -> pa.ChunkedArray:
        """See `ColumnarFile`."""
        name = next((name for name in self._leaves() if name in (f"{image}.bytes", image)), image)
        return self.group(number, [name]).column(0)

    def _leaves(self) -> list[str]:
        return [self._footer.schema.column(n).path for n in range(len(self._footer.schema))]

    def _opened(self, file: FileView) -> pq.ParquetFile:
        return pq.ParquetFile(file, metadata=self._footer, page_checksum_verification=True)

    def _unreadable(self, error: Exception) -> AlexprepError:
        words = f"is no Parquet file, or is damaged ({_first_line(error)}): check it, or get it again"
        return AlexprepError(f"{self._shown} {words}")


class _Message(NamedTuple):
    """A message of an Arrow file: where it begins and ends, its kind, and the rows of a batch."""

    begin: int
    end: int
    kind: int
    rows: int


class _Arrow(ColumnarFile):
    """An Arrow stream or file, whose record batches are the groups. It has no checksums: a batch is held against the format's rules."""

    def __init__(self, files: Files, path: bytes) -> None:
        super().__init__(files, path)
        try:
            self._size = files.size(path)
            with files.reading(path) as read:
                found = list(_messages(read, self._size))
            if not found or found[0].kind != _SCHEMA:
                raise OSError("it does not begin with a schema")
            if any(message.kind == _DICTIONARY for message in found):
                raise OSError("it has columns of dictionaries, which are not read")
            self._batches = [message for message in found if message.kind == _BATCH]
            self.schema = pa.ipc.read_schema(pa.py_buffer(self._bytes(found[0])))
            _check_names(self.schema)
        except (pa.ArrowException, OSError, struct.error, IndexError, UnicodeDecodeError) as error:
            raise self._unreadable(error) from None
        self.group_rows = [batch.rows for batch in self._batches]

    def group_bytes(self, image: str) -> list[int] | None:
        """See `ColumnarFile`: of all columns, of which pictures are nearly all."""
        return [batch.end - batch.begin for batch in self._batches] if image in self.schema.names else None

    def read(self, columns: Sequence[str]) -> pa.Table:
        """See `ColumnarFile`. On a disk the file is mapped, so that of other columns nothing is read."""
        return self._copied([(name,) for name in columns])

    def names(self, image: str) -> pa.ChunkedArray | None:
        """See `ColumnarFile`."""
        kind = self.schema.field(image).type
        if not pa.types.is_struct(kind) or kind.get_field_index("path") < 0:
            return None
        return self._copied([(image, "path")]).column(0)

    def bytes_of(self, columns: Sequence[str]) -> list[int]:
        """See `ColumnarFile`: they are counted with the pictures."""
        return [0] * len(self._batches)

    def group(self, number: int, columns: Sequence[str]) -> pa.Table:
        """See `ColumnarFile`."""
        table = pa.Table.from_batches([self._batch(number).select(list(columns))])
        return table.take(pa.array(range(len(table)), pa.int64()))  # a copy, without the pictures beside

    def _picture_column(self, number: int, image: str) -> pa.ChunkedArray:
        """See `ColumnarFile`."""
        return pa.chunked_array([self._batch(number).column(image)])

    def _batch(self, number: int) -> pa.RecordBatch:
        def read() -> pa.RecordBatch:
            message = pa.ipc.read_message(pa.py_buffer(self._bytes(self._batches[number])))
            batch = pa.ipc.read_record_batch(message, self.schema)
            batch.validate(full=True)
            return batch

        return self._group(number, read)

    def _bytes(self, message: _Message) -> bytes:
        return self._files.read(self._path, message.begin, message.end - message.begin)

    def _copied(self, wanted: Sequence[tuple[str, ...]]) -> pa.Table:
        """Columns, or fields of columns, of the whole file, held against the format's rules and copied out of what may be a mapping."""
        names = [names[-1] for names in wanted]
        try:
            with self._viewed() as file:
                found = []
                for place in self._batches:
                    file.seek(place.begin)
                    batch = pa.ipc.read_record_batch(pa.ipc.read_message(file), self.schema)
                    batch.validate()  # before anything in it is touched
                    columns = [
                        batch.column(name) if not field else batch.column(name).field(*field) for name, *field in wanted
                    ]
                    found.append(pa.RecordBatch.from_arrays(columns, names))
                    found[-1].validate(full=True)
                kinds = [
                    functools.reduce(lambda kind, name: kind.field(name).type, names, self.schema) for names in wanted
                ]
                table = pa.Table.from_batches(found, pa.schema(list(zip(names, kinds, strict=True))))
                return table.take(pa.array(range(len(table)), pa.int64()))
        except (pa.ArrowException, OSError) as error:
            raise self._unreadable(error) from None

    @contextlib.contextmanager
    def _viewed(self) -> Iterator[Any]:
        """The whole file for pyarrow."""
        if isinstance(self._files, LocalFiles):
            with open_regular(os.path.join(self._files.root, self._path)) as file:
                if os.fstat(file.fileno()).st_size < self._size:
                    raise OSError("it is shorter than it was")
                yield pa.BufferReader(pa.py_buffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)))
        else:
            with FileView(self._files, self._path) as view:
                yield pa.PythonFile(view, "r")

    def _unreadable(self, error: Exception) -> AlexprepError:
        words = f"is no Arrow file, or is damaged ({_first_line(error)}): check it, or get it again"
        return AlexprepError(f"{self._shown} {words}")


def _messages(read: Callable[[int, int], bytes], size: int) -> Iterator[_Message]:
    """The messages of a stream or file of `size` bytes; OSError where it is cut, or something else."""
    head = read(0, len(_ARROW_FILE))
    at = len(_ARROW_FILE) if head == _ARROW_FILE else 0
    for number in itertools.count():
        prefix = read(at, 8)
        if prefix[:4] != _CONTINUED or len(prefix) < 8:
            raise OSError(
                f"no message of Arrow begins at byte {at:,} of {size:,}" + (", so it was cut short" if number else "")
            )
        (length,) = struct.unpack_from("<i", prefix, 4)
        if not length:
            return
        metadata = read(at + 8, length) if 0 < length <= _MAX_METADATA_BYTES else b""
        if len(metadata) < length or not metadata:
            raise OSError(f"the message at byte {at:,} is cut short")
        kind, rows, body = _message_fields(metadata)
        end = at + 8 + length + body
        if body < 0 or end > size or end % _ALIGNED:
            raise OSError(f"the message at byte {at:,} goes beyond the end of the file, which was cut short")
        yield _Message(at, end, kind, rows)
        at = end


def _message_fields(metadata: bytes) -> tuple[int, int, int]:
    """Kind, rows and body's bytes of a message, from its table in flatbuffers' form: (header_type, header.length, bodyLength)."""
    (message,) = struct.unpack_from("<I", metadata)
    kind_at, header_at, body_at = (_field(metadata, message, number) for number in (1, 2, 3))
    kind = metadata[kind_at] if kind_at else 0
    (body,) = struct.unpack_from("<q", metadata, body_at) if body_at else (0,)
    rows = 0
    if kind == _BATCH and header_at:
        header = header_at + struct.unpack_from("<I", metadata, header_at)[0]
        length_at, compression_at = _field(metadata, header, 0), _field(metadata, header, 3)
        if compression_at:
            raise OSError("its buffers are compressed, which are not read: write it without compression")
        (rows,) = struct.unpack_from("<q", metadata, length_at) if length_at else (0,)
    return kind, rows, body


def _field(table: bytes, at: int, number: int) -> int:
    """Where a field of the flatbuffers' table at `at` lies; 0 where it has its default."""
    vtable = at - struct.unpack_from("<i", table, at)[0]
    (size,) = struct.unpack_from("<H", table, vtable)
    place = 4 + 2 * number
    offset = struct.unpack_from("<H", table, vtable + place)[0] if place + 2 <= size else 0
    return at + offset if offset else 0


def _check_names(schema: pa.Schema) -> None:
    """Raises UnicodeDecodeError where the name of a column, or of a field of one, is no text: pyarrow does so when it is asked for."""
    for column in schema:
        assert isinstance(column.name, str)
        assert not pa.types.is_struct(column.type) or all(isinstance(field.name, str) for field in column.type)


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]
