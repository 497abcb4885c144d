"""Rows of a CSV, TSV or Parquet file: the path, label and split of each, and where it stands. Nothing is held but a batch."""

from __future__ import annotations

import csv
import gzip
import io
import itertools
import zlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from alexprep.shards.errors import AlexprepError
from alexprep.shards.sources.files import Files

# Column names in lower case; where a table has several of one kind, the first in this order counts.
PATHS = ("path", "file", "filename", "image", "image_path", "filepath", "url")
LABELS = ("label", "class", "wnid", "target", "category", "y")
SPLIT_COLUMNS = ("split", "set", "subset", "fold")

MAX_LINE_BYTES = 2**20  # paths have at most 4,096, URLs seldom more; an endless line must not fill the memory
_BATCH = 65_536
_BUFFER = 2**20


class Row(NamedTuple):
    """One row; None and "" stand for a missing cell, also for a table without splits.

    Attributes:
        place: line of a text (the last one of a row that goes over several), or row of a Parquet file; the first is 1.
    """

    place: int
    path: str | None
    label: str | None
    split: str | None


def read_rows(files: Files, name: bytes) -> tuple[bool, Iterator[Row]]:
    """Whether the table has a column of splits, and its rows.

    Raises:
        AlexprepError: damaged, not UTF-8, or without the columns; from the iterator too.
    """
    if name.lower().endswith(b".parquet"):
        return _parquet_rows(files, name)
    return _text_rows(files, name)


def _text_rows(files: Files, name: bytes) -> tuple[bool, Iterator[Row]]:
    shown = files.display(name)
    table = _parsed(files, name, shown)
    first = next(table, None)
    if first is None:
        raise AlexprepError(f"{shown} is empty: it needs a row for each image, with its path and its label")
    place, cells = first
    # No header: two cells of which the first can be a file's name and the second is no column's.
    if len(cells) == 2 and any(mark in cells[0] for mark in "./") and cells[1].strip().lower() not in LABELS:
        return False, _chosen(itertools.chain([first], table), (0, 1, None), 2, shown)
    columns = _columns(cells, f"{shown}, line {place}")
    return columns[2] is not None, _chosen(table, columns, len(cells), shown)


def _chosen(
    table: Iterable[tuple[int, list[str]]], columns: tuple[int, int, int | None], width: int, shown: str
) -> Iterator[Row]:
    path, label, split = columns
    for place, cells in table:
        if len(cells) != width:
            raise AlexprepError(
                f"{shown}, line {place:,}: {len(cells)} cells, where the first line has {width}: put a cell that holds "
                "the separator in double quotes"
            )
        yield Row(place, cells[path], cells[label], None if split is None else cells[split])


def _columns(names: Sequence[str], shown: str) -> tuple[int, int, int | None]:
    """Which columns are the path, the label and the split."""
    lower = [name.strip().lower() for name in names]
    found: list[int | None] = []
    for wanted in (PATHS, LABELS, SPLIT_COLUMNS):
        name = next((name for name in wanted if name in lower), None)
        if name is not None and lower.count(name) > 1:
            raise AlexprepError(f"{shown}: two columns are named {name!r}: rename the one that is not meant")
        found.append(None if name is None else lower.index(name))
    path, label, split = found
    if path is None or label is None:
        what, known = ("path", PATHS) if path is None else ("label", LABELS)
        listed = ", ".join(repr(name[:40]) for name in names[:10])
        raise AlexprepError(
            f"{shown}: no column for the {what} among {listed}: name it {', '.join(known[:-1])} or {known[-1]}. Tables of "
            "text may have no header where the path and the label are all they have"
        )
    return path, label, split


def _parsed(files: Files, name: bytes, shown: str) -> Iterator[tuple[int, list[str]]]:
    """Line number and cells of each row that is not empty."""
    reader = csv.reader(
        _lines(files, name, shown),
        delimiter="\t" if name.lower().endswith((b".tsv", b".tsv.gz")) else ",",
        strict=True,
        skipinitialspace=True,
    )
    try:
        for cells in reader:
            if cells:
                yield reader.line_num, cells
    except csv.Error as error:
        raise AlexprepError(f"{shown}, line {reader.line_num:,}: {error}: mend the quotes of this line") from None
    except (OSError, EOFError, zlib.error) as error:
        raise AlexprepError(
            f"{shown} cannot be read after line {reader.line_num:,} ({error}): check it, or get it again"
        ) from None


def _lines(files: Files, name: bytes, shown: str) -> Iterator[str]:
    stream = io.BufferedReader(_Reader(files, name), _BUFFER)
    if stream.peek(2)[:2] == b"\x1f\x8b":
        stream = io.BufferedReader(gzip.GzipFile(fileobj=stream), _BUFFER)  # type: ignore[arg-type]
    number = 0
    while line := stream.readline(MAX_LINE_BYTES + 1):
        number += 1
        if len(line) > MAX_LINE_BYTES:
            raise AlexprepError(
                f"{shown}, line {number:,}: more than {MAX_LINE_BYTES:,} bytes: this is no table of paths"
            )
        try:
            yield line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise AlexprepError(
                f"{shown}, line {number:,}: byte {line[error.start]:#04x} is not UTF-8: save the table as UTF-8"
            ) from None


def _parquet_rows(files: Files, name: bytes) -> tuple[bool, Iterator[Row]]:
    shown = files.display(name)
    try:
        table = pq.ParquetFile(io.BufferedReader(_Reader(files, name), _BUFFER))
    except (pa.ArrowException, OSError) as error:
        raise AlexprepError(f"{shown} is no Parquet file or damaged ({error}): check it, or get it again") from None
    columns = _columns(table.schema_arrow.names, shown)
    for what, column in zip(("path", "label", "split"), columns, strict=True):
        if column is not None:
            _check_type(table.schema_arrow.field(column), what, shown)
    return columns[2] is not None, _from_batches(table, columns, shown)


def _check_type(field: Any, what: str, shown: str) -> None:
    """Refuses columns of which it is not plain what their values mean as a path, a label or a split."""
    kind = field.type.value_type if pa.types.is_dictionary(field.type) else field.type
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        return
    if what == "label" and (pa.types.is_integer(kind) or pa.types.is_boolean(kind)):
        return
    if what == "label" and (pa.types.is_list(kind) or pa.types.is_large_list(kind)):
        raise AlexprepError(
            f"{shown}: the column {field.name!r} gives one image several labels ({kind}); one is needed"
        )
    wanted = "a string or a whole number" if what == "label" else "a string"
    inside = "; images inside a table are not read" if what == "path" else ""
    raise AlexprepError(f"{shown}: the column {field.name!r} has the type {kind}, but a {what} is {wanted}{inside}")


def _from_batches(table: pq.ParquetFile, columns: tuple[int, int, int | None], shown: str) -> Iterator[Row]:
    names = [None if column is None else table.schema_arrow.names[column] for column in columns]
    done = 0
    try:
        for batch in table.iter_batches(_BATCH, columns=[name for name in names if name is not None]):
            places = range(done + 1, done + 1 + len(batch))
            cells = [[None] * len(batch) if name is None else _texts(batch.column(name), done, shown) for name in names]
            yield from map(Row, places, *cells)
            done += len(batch)
    except (pa.ArrowException, OSError) as error:
        raise AlexprepError(f"{shown} cannot be read after row {done:,} ({error}): check it, or get it again") from None


def _texts(column: Any, before: int, shown: str) -> list[str | None]:
    texts: list[str | None] = []
    for data in column.cast(pa.large_string()).cast(pa.large_binary()).to_pylist():
        try:
            texts.append(None if data is None else data.decode())
        except UnicodeDecodeError:
            raise AlexprepError(f"{shown}, row {before + len(texts) + 1:,}: {data[:80]!r} is not UTF-8") from None
    return texts


class _Reader(io.RawIOBase):
    """A file of any `Files` as Python has files."""

    def __init__(self, files: Files, name: bytes) -> None:
        self._files, self._name, self._at = files, name, 0
        self._size = files.size(name)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: Any) -> int:
        wanted = max(0, min(len(buffer), self._size - self._at))
        data = self._files.read(self._name, self._at, wanted) if wanted else b""
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)
