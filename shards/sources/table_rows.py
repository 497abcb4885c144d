"""Reads the rows of a list of images, whatever it is written in: CSV, TSV (both also gzipped), Parquet, lines of JSON, or plain lists.

Columns are found by their names, or as the user says. Nothing is held but a batch. What the cells mean is told in `table`.
"""

from __future__ import annotations

import contextlib
import csv
import functools
import gzip
import io
import itertools
import json
import math
import os
import re
import zlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, BinaryIO, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from alexprep.shards.errors import AlexprepError
from alexprep.shards.metadata import MetadataError, parsed
from alexprep.shards.sources.base import NO_CHOICES, Choices
from alexprep.shards.sources.foreign_formats import images_inside
from alexprep.shards.sources.labels import LABEL_COLUMNS, LabelError, label_name, text_of
from alexprep.shards.sources.picture_names import READ, is_picture
from alexprep.shards.storage import Files, LocalFiles, as_text, open_regular, read_inflated

# Column names in lower case; where a table has several of one kind, the first in this order counts. Those of labels: `labels`.
PATHS = (
    *("path", "file", "filename", "image", "image_path", "filepath", "url", "file_name"),
    *("image_id", "image_name", "img", "img_path", "id"),
)
SPLIT_COLUMNS = ("split", "set", "subset", "fold")
VALID_COLUMN = "is_valid"  # fastai's: true for val, false for train; counts where there is no split
_VALID = {"true": "val", "1": "val", "false": "train", "0": "train"}

TABLES = (b".csv", b".tsv", b".csv.gz", b".tsv.gz", b".parquet")
JSON_LINES = (b".jsonl", b".ndjson", b".jsonlines", b".jsonl.gz")
LISTS = (b".txt", b".lst")

MAX_LINE_BYTES = 2**20  # paths have at most 4,096, URLs seldom more; an endless line must not fill the memory
_MAX_FILE_NAME = 255  # bytes
_FOLDERS_LOOKED_INTO = 20  # beside a table, for the pictures that its ids may mean
_LINES_LOOKED_AT = 20  # of a list
_ENDINGS = tuple(f".{each}" for ending in READ for each in (ending, ending.upper()))
_BATCH = 65_536  # rows
_GZIP = b"\x1f\x8b"
_HEADS = 64  # of tables that are kept
_MAX_OTHERS_BYTES = 2**28
_mxnet_line = re.compile(r"\d+\t[^\t]+(?:\t[^\t]+)*\t\S[^\t]*").fullmatch
_path_label_line = re.compile(r"\S.*[./\\]\S*\s+\S.*").fullmatch


class Row(NamedTuple):
    """One row; a cell that is missing is None or "".

    Attributes:
        place: line of a text (the last one of a row that goes over several), or row of a Parquet file; the first is 1.
        split: None in a table without splits, and there alone.
        along: where `read_along` finds the row's other cells; empty where it has none.
    """

    place: int
    path: str | None
    label: str | None
    split: str | None
    along: bytes = b""


def read_rows(files: Files, name: bytes, choices: Choices = NO_CHOICES) -> Iterator[Row]:
    """The rows of a table; AlexprepError where it is damaged, not UTF-8, or without the columns."""
    for kept in (is_kept, _text_head, _json_head, _others_in_parquet, read_inflated):
        kept.cache_clear()  # a table may have changed since it was read along
    lower = name.lower()
    for endings, read in ((JSON_LINES, _json_rows), (LISTS, _list_rows), ((b".parquet",), _parquet_rows)):
        if lower.endswith(endings):
            return read(files, name, choices)
    return _text_rows(files, name, choices)


def is_list(files: Files, name: bytes) -> bool:
    """Whether the first lines of a text are those of a list: `path label`, or MXNet's `index label path`; not those of a table."""
    try:
        head = files.read(name, 0, MAX_LINE_BYTES)
        text = head[: head.rfind(b"\n") + 1 or len(head)].decode("utf-8-sig")
    except (OSError, UnicodeDecodeError):
        return False
    lines = [line for line in text.splitlines()[:_LINES_LOOKED_AT] if line.strip()]
    if not lines or all("," in line for line in lines):
        return False
    return all(map(_mxnet_line, lines)) or all(map(_path_label_line, lines))


# Which columns are which


class _Chosen(NamedTuple):
    """The places of the columns; `valid` where that of the splits says whether a row is of val."""

    path: int
    label: int
    split: int | None
    valid: bool = False

    def row(self, place: int, path: str | None, label: str | None, split: str | None, along: bytes = b"") -> Row:
        """A row, given its cells."""
        if self.valid:
            split = _VALID.get((split or "").strip().lower(), split or "")
        return Row(place, path, label, None if self.split is None else split or "", along)

    def others(self, names: Sequence[str]) -> list[tuple[int, str]]:
        """The columns that go along with the pictures: the place and name of each; one that comes again has a number behind it."""
        found: dict[str, int] = {}
        for place, name in enumerate(names):
            if place not in (self.path, self.label, self.split) and name.strip():
                number = next(n for n in itertools.count() if (f"{name}.{n}" if n else name) not in found)
                found[f"{name}.{number}" if number else name] = place
        return [(place, name) for name, place in found.items()]


def _columns(names: Sequence[str], shown: str, choices: Choices) -> _Chosen:
    """Which columns are the path, the label and the split."""
    lower = [name.strip().lower() for name in names]
    split_name = next((name for name in (*SPLIT_COLUMNS, VALID_COLUMN) if name in lower), None)
    usual = {
        "path": next((name for name in PATHS if name in lower), None),
        "label": label_name(lower, LABEL_COLUMNS),
        "split": split_name,
    }
    found: dict[str, int | None] = {}
    for use, name in usual.items():
        chosen = choices.column(use)
        if chosen is not None:
            found[use] = _chosen_column(use, chosen, list(names), shown)
            continue
        if name is not None and lower.count(name) > 1:
            raise AlexprepError(f"{shown}: two columns are named {name!r}: rename the one that is not meant")
        found[use] = None if name is None else lower.index(name)
    path, label, split = found["path"], found["label"], found["split"]
    if path is None or label is None:
        what, known = ("path", PATHS[:8]) if path is None else ("label", LABEL_COLUMNS)
        listed = ", ".join(repr(name[:40]) for name in names[:10])
        raise AlexprepError(
            f"{shown}: no column for the {what} among {listed}: name it {', '.join(known[:-1])} or {known[-1]}, or say which it is with "
            f"--columns {what}=NAME. Tables of text may have no header where the path and the label are all they have"
        )
    return _Chosen(path, label, split, split is not None and lower[split] == VALID_COLUMN)


def _chosen_column(use: str, chosen: str, names: list[str], shown: str) -> int:
    places = [n for n, name in enumerate(names) if name == chosen] or [
        n for n, name in enumerate(names) if name.strip().lower() == chosen.strip().lower()
    ]
    if len(places) == 1:
        return places[0]
    listed = ", ".join(repr(name[:40]) for name in names[:10])
    what = f"{len(places)} columns of that name" if places else f"no such column; it has {listed}"
    raise AlexprepError(f"--columns {use}={chosen}: {shown} has {what}")


# Texts


def _text_rows(files: Files, name: bytes, choices: Choices) -> Iterator[Row]:
    shown = files.display(name)
    delimiter = _delimiter(name)
    line, width, end, has_others = 0, 0, 0, False
    columns = _Chosen(0, 1, None)
    try:
        with _opened(files, name) as file:
            lines = _Lines(file, shown)
            reader = csv.reader(lines, delimiter=delimiter, strict=True, skipinitialspace=True)
            for cells in filter(None, reader):
                line, begin, end = reader.line_num, end, lines.end
                if not width:
                    width = len(cells)
                    if choices.columns or _is_header(cells):
                        where = f"{shown}, line {line}"
                        try:
                            columns = _columns(cells, where, choices)
                        except AlexprepError:
                            if problem := _header_problem(files, cells, next(reader, []), delimiter):
                                raise AlexprepError(f"{where}: {problem}") from None
                            raise
                        has_others = bool(columns.others(cells))
                        continue
                if len(cells) != width:
                    raise AlexprepError(
                        f"{shown}, line {line:,}: {len(cells)} cells, where the first line has {width}: put a cell that "
                        "holds the separator in double quotes"
                    )
                split = None if columns.split is None else cells[columns.split]
                along = b"%d %d" % (begin, end - begin) if has_others else b""
                yield columns.row(line, cells[columns.path], cells[columns.label], split, along)
    except csv.Error as error:
        raise AlexprepError(f"{shown}, line {reader.line_num:,}: {error}: mend the quotes of this line") from None
    except (OSError, EOFError, zlib.error) as error:
        raise _cut(shown, "line", line, error) from None
    if not width:
        raise _empty(shown)


def _is_header(cells: Sequence[str]) -> bool:
    """Not where there are two cells of which the first can be a file's name and the second is no column's."""
    return len(cells) != 2 or not set("./") & set(cells[0]) or cells[1].strip().lower() in LABEL_COLUMNS


def _header_problem(files: Files, header: Sequence[str], row: Sequence[str], delimiter: str) -> str:
    """What is seen in a header without the columns that are needed, and in the first `row` below it; empty for nothing.

    Cells that are separated by another character than the table's name says; or a column of pictures' names under another name.
    """
    names = {",": "a comma (.csv)", "\t": "a tab (.tsv)", ";": "a semicolon", "|": "a bar"}
    other = next((mark for mark in names if mark != delimiter and mark in header[0]), None)
    if len(header) == 1 and other is not None:
        step = (
            "give the file the ending that belongs to it" if other in ",\t" else f"put {names[delimiter]} in its place"
        )
        return f"the separator is {names[other]}, where {names[delimiter]} was expected: {step}, with cells that hold it in double quotes"
    if not isinstance(files, LocalFiles) or set(PATHS) & {name.strip().lower() for name in header}:
        return ""
    for name, cell in zip(header, row, strict=False):
        path = _picture_meant(files, cell)
        if path is not None:
            return (
                f"the column {name!r} has the names of pictures, as {cell!r}, which is {as_text(path)}: say so, and which column has their "
                f"labels, with --columns path={name},label=NAME"
            )
    return ""


def _picture_meant(files: LocalFiles, cell: str) -> bytes | None:
    """The file that a cell names, perhaps without folder and ending, in the table's folder or those in it."""
    if not cell or "\0" in cell or len(cell) > _MAX_FILE_NAME:
        return None
    folders = [b"", *files.folder_names()[:_FOLDERS_LOOKED_INTO]]
    paths = (os.path.join(folder, f"{cell}{end}".encode()) for folder in folders for end in ("", *_ENDINGS))
    return next((path for path in paths if os.path.isfile(os.path.join(files.root, path))), None)


class _Lines:
    """The lines of a text; `end` is where the last one ends, in bytes (after decompression, where it is gzipped)."""

    def __init__(self, file: BinaryIO, shown: str) -> None:
        gzipped = file.read(len(_GZIP)) == _GZIP
        file.seek(0)
        self._stream: Any = gzip.GzipFile(fileobj=file) if gzipped else file
        self._shown, self.number, self.end = shown, 0, 0

    def __iter__(self) -> _Lines:
        return self

    def __next__(self) -> str:
        line: bytes = self._stream.readline(MAX_LINE_BYTES + 1)
        if not line:
            raise StopIteration
        self.number += 1
        where = f"{self._shown}, line {self.number:,}"
        if len(line) > MAX_LINE_BYTES:
            raise AlexprepError(f"{where}: more than {MAX_LINE_BYTES:,} bytes: this is no table of paths")
        self.end += len(line)
        try:
            return line.decode("utf-8-sig" if self.number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            byte = f"{line[error.start]:#04x}"
            raise AlexprepError(f"{where}: byte {byte} is not UTF-8: save the table as UTF-8") from None


def _numbered_lines(files: Files, name: bytes) -> Iterator[tuple[int, str, bytes]]:
    """(number, line without its end, where it lies) of each line of a text that is not blank."""
    shown, number = files.display(name), 0
    try:
        with _opened(files, name) as file:
            begin, lines = 0, _Lines(file, shown)
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield number, line.rstrip("\r\n"), b"%d %d" % (begin, lines.end - begin)
                begin = lines.end
    except (OSError, EOFError, zlib.error) as error:
        raise _cut(shown, "line", number, error) from None


def _delimiter(name: bytes) -> str:
    return "\t" if name.lower().endswith((b".tsv", b".tsv.gz")) else ","


def _opened(files: Files, name: bytes) -> BinaryIO:
    """A table as a file: read from a disk bit by bit, from a store at once."""
    if isinstance(files, LocalFiles):
        return open_regular(os.path.join(files.root, name))
    return io.BytesIO(files.read(name))


def _cut(shown: str, unit: str, done: int, error: Exception) -> AlexprepError:
    return AlexprepError(f"{shown} cannot be read after {unit} {done:,} ({error}): check it, or get it again")


def _empty(shown: str) -> AlexprepError:
    return AlexprepError(f"{shown} is empty: it needs a row for each image, with its path and its label")


# Lists of lines


def _list_rows(files: Files, name: bytes, choices: Choices) -> Iterator[Row]:
    """`path label`, or MXNet's `index label path` between tabs, by the first line."""
    shown, mxnet, empty = files.display(name), False, True
    if choices.columns:
        raise AlexprepError(
            f"{shown} is a list without a header, so it has no columns for --columns to name: leave it out"
        )
    for number, line, _ in _numbered_lines(files, name):
        if empty:
            mxnet, empty = _mxnet_line(line) is not None, False
        cells = line.split("\t")
        if mxnet and len(cells) > 3:
            raise AlexprepError(f"{shown}, line {number:,}: {len(cells) - 2} labels; one is needed: {line[:80]!r}")
        if mxnet and (len(cells) < 3 or not cells[0].isdecimal()):
            raise AlexprepError(
                f"{shown}, line {number:,}: {line[:80]!r} is not `index label path` between tabs, as the first line is: mend it"
            )
        path, label = (cells[2], cells[1]) if mxnet else _path_and_label(line.strip(), f"{shown}, line {number:,}")
        yield Row(number, path.strip(), label.strip(), None)
    if empty:
        raise _empty(shown)


def _path_and_label(line: str, where: str) -> tuple[str, str]:
    """The two parts of a line. Either may hold spaces where the path ends as a picture's does, in one place only."""
    gaps = [(match.start(), match.end()) for match in re.finditer(r"\s+", line)]
    after_picture = [gap for gap in gaps if is_picture(line[: gap[0]].encode())]
    if len(after_picture) > 1 or (len(gaps) > 1 and not after_picture):
        raise AlexprepError(
            f"{where}: where the path ends in {line[:80]!r} cannot be told: write a .csv, with a comma between path and label, and the path "
            "in double quotes where it holds one"
        )
    for start, end in after_picture or gaps:
        return line[:start], line[end:]
    return line, ""  # which has no label, as will be told


# Lines of JSON


def _json_rows(files: Files, name: bytes, choices: Choices) -> Iterator[Row]:
    """One object a line, with the same keys as the first one."""
    shown = files.display(name)
    names: list[str] | None = None
    columns = _Chosen(0, 1, None)
    for number, line, place in _numbered_lines(files, name):
        where = f"{shown}, line {number:,}"
        try:
            item = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise AlexprepError(f"{where}: no JSON ({error}): mend the line, or get the file again") from None
        if not isinstance(item, dict):
            raise AlexprepError(f'{where}: {line[:80]!r} is no object, such as {{"file_name": "a.jpg", "label": 3}}')
        if names is None:
            names = list(item)
            columns = _columns(names, where, choices)
        path, label = (
            _json_text(item.get(names[n]), use, where) for n, use in ((columns.path, "path"), (columns.label, "label"))
        )
        split = None if columns.split is None else _json_text(item.get(names[columns.split]), "split", where)
        yield columns.row(number, path, label, split, place if _other_fields(item, names, columns) else b"")
    if names is None:
        raise _empty(shown)


def _json_text(value: Any, use: str, where: str) -> str | None:
    """A value as the cell of a table has it; None for nothing."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return None
    if use == "path" and not isinstance(value, str | int):
        raise AlexprepError(f"{where}: the path {str(value)[:80]!r} is no text")
    try:
        text = value if isinstance(value, str) else text_of(value)
        text.encode()  # JSON can write half a character, which no file can
    except (LabelError, UnicodeEncodeError) as error:
        raise AlexprepError(f"{where}: {error}") from None
    return text


def _other_fields(item: dict[str, Any], names: Sequence[str], columns: _Chosen) -> dict[str, Any]:
    """The fields of a line that go along with its picture."""
    used = {names[n] for n in columns[:3] if n is not None}
    return {name: value for name, value in item.items() if name not in used}


# Parquet


def _parquet_rows(files: Files, name: bytes, choices: Choices) -> Iterator[Row]:
    shown = files.display(name)
    done = 0
    try:
        with _opened(files, name) as file:
            table = pq.ParquetFile(file)
            schema = table.schema_arrow
            if (words := images_inside(schema)) and choices.column("path") is None:
                raise AlexprepError(f"{shown} is {words}")
            chosen = _columns(schema.names, shown, choices)
            columns = [schema.names[n] for n in chosen[:3] if n is not None]
            others = chosen.others(schema.names)
            for what, column in zip(("path", "label", "split"), columns, strict=False):
                _check_type(schema.field(column), what, shown)
            for batch in table.iter_batches(_BATCH, columns=columns):
                cells = [_texts(batch.column(column), done, shown) for column in columns]
                splits: Iterable[str | None] = cells[2] if chosen.split is not None else [None] * len(batch)
                places = range(done + 1, done + 1 + len(batch))
                along = (b"%d" % (place - 1) for place in places) if others else itertools.repeat(b"")
                yield from map(chosen.row, places, cells[0], cells[1], splits, along)
                done += len(batch)
    except (pa.ArrowException, OSError) as error:
        raise AlexprepError(
            f"{shown} is no Parquet file, or cannot be read after row {done:,} ({error}): check it, or get it again"
        ) from None


def _check_type(field: Any, what: str, shown: str) -> None:
    """Refuses columns of which it is not plain what their values mean as a path, a label or a split."""
    kind = field.type.value_type if pa.types.is_dictionary(field.type) else field.type
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        return
    if what == "label" and (pa.types.is_integer(kind) or pa.types.is_boolean(kind) or _stored_otherwise(kind)):
        return
    if (
        what == "split"
        and field.name.strip().lower() == VALID_COLUMN
        and (pa.types.is_boolean(kind) or pa.types.is_integer(kind))
    ):
        return
    if what == "path" and pa.types.is_integer(kind):
        return  # ids
    if what == "label" and (pa.types.is_list(kind) or pa.types.is_large_list(kind)):
        raise AlexprepError(
            f"{shown}: the column {field.name!r} gives one image several labels ({kind}); one is needed"
        )
    wanted = "a string or a whole number" if what == "label" else "a string"
    raise AlexprepError(f"{shown}: the column {field.name!r} has the type {kind}, but a {what} is {wanted}")


def _stored_otherwise(kind: Any) -> bool:
    """Whether values of this type are numbers or texts by what they hold, each by itself."""
    return any(
        known(kind)
        for known in (
            pa.types.is_floating,
            pa.types.is_binary,
            pa.types.is_large_binary,
            pa.types.is_fixed_size_binary,
        )
    )


def _texts(column: Any, before: int, shown: str) -> list[str | None]:
    """The values as text; of floats and bytes as `labels` understands them."""
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    by_value = _stored_otherwise(column.type)
    values = column.to_pylist() if by_value else column.cast(pa.large_string()).cast(pa.large_binary()).to_pylist()
    texts: list[str | None] = []
    for value in values:
        try:
            if by_value:
                missing = value is None or (isinstance(value, float) and math.isnan(value))
                texts.append(None if missing else text_of(value))
            else:
                texts.append(None if value is None else value.decode())
        except LabelError as error:
            raise AlexprepError(f"{shown}, row {before + len(texts) + 1:,}: {error}") from None
        except UnicodeDecodeError:
            raise AlexprepError(f"{shown}, row {before + len(texts) + 1:,}: {value[:80]!r} is not UTF-8") from None
    return texts


# What else a row says


def read_along(files: Files, name: bytes, along: bytes, choices: Choices = NO_CHOICES) -> dict[str, Any]:
    """The other cells of a row of a table, by the names of their columns; `along` is the `Row`'s.

    Cells of CSV and TSV are texts. MetadataError where the table has changed since, OSError where it cannot be read.
    """
    lower = name.lower()
    if lower.endswith(b".parquet"):
        table = _others_in_parquet(files, name, choices)
        if int(along) >= len(table):
            raise MetadataError(f"{files.display(name)} has changed since it was read")
        return dict(table.slice(int(along), 1).to_pylist()[0])
    offset, size = map(int, along.split())
    line = _piece(files, name, offset, size)
    if lower.endswith(JSON_LINES):
        item, head = parsed(line, "its line"), _json_head(files, name, choices)
        if not isinstance(item, dict):
            raise MetadataError(f"{files.display(name)} has changed since it was read")
        return _other_fields(item, *head)
    others, width = _text_head(files, name, choices)
    rows: list[list[str]] = []
    with contextlib.suppress(UnicodeDecodeError, csv.Error):
        text = io.StringIO(line.decode("utf-8-sig" if offset == 0 else "utf-8"), newline="")
        rows = list(filter(None, csv.reader(text, delimiter=_delimiter(name), skipinitialspace=True)))
    if len(rows) != 1 or len(rows[0]) != width:
        raise MetadataError(f"{files.display(name)} has changed since it was read")
    return {column: rows[0][place] for place, column in others}


def _piece(files: Files, name: bytes, offset: int, size: int) -> bytes:
    """Some bytes of a text, as they are after decompression."""
    return (
        read_inflated(files, name)[offset : offset + size] if is_kept(files, name) else files.read(name, offset, size)
    )


@functools.lru_cache(maxsize=_HEADS)
def is_kept(files: Files, name: bytes) -> bool:
    """Whether all that `read_along` finds in a table is kept in memory, since it cannot be read piece by piece."""
    if not isinstance(files, LocalFiles) or name.lower().endswith(b".parquet"):
        return True
    return files.read(name, 0, len(_GZIP)) == _GZIP


@functools.lru_cache(maxsize=_HEADS)
def _text_head(files: Files, name: bytes, choices: Choices) -> tuple[list[tuple[int, str]], int]:
    """The other columns of a CSV or TSV, and how many columns it has."""
    shown = files.display(name)
    with _opened(files, name) as file:
        lines = csv.reader(_Lines(file, shown), delimiter=_delimiter(name), skipinitialspace=True)
        cells = next(filter(None, lines))
    return _columns(cells, shown, choices).others(cells), len(cells)


@functools.lru_cache(maxsize=_HEADS)
def _json_head(files: Files, name: bytes, choices: Choices) -> tuple[list[str], _Chosen]:
    """The fields of the first line of a file of JSON lines, and which are which."""
    _, line, _ = next(_numbered_lines(files, name))
    names = list(json.loads(line))
    return names, _columns(names, files.display(name), choices)


@functools.lru_cache(maxsize=_HEADS)
def _others_in_parquet(files: Files, name: bytes, choices: Choices) -> Any:
    """The other columns of a list in Parquet, all rows of them: they are asked for in any order."""
    shown = files.display(name)
    with _opened(files, name) as file:
        table = pq.ParquetFile(file)
        names = table.schema_arrow.names
        others = _columns(names, shown, choices).others(names)
        wanted = [column for _, column in others]
        paths = [table.metadata.schema.column(n).path.split(".")[0] for n in range(len(table.metadata.schema))]
        size = sum(
            table.metadata.row_group(group).column(n).total_uncompressed_size
            for group in range(table.num_row_groups)
            for n, column in enumerate(paths)
            if column in wanted
        )
        if size > _MAX_OTHERS_BYTES:
            raise AlexprepError(
                f"{shown} has {size:,} bytes of metadata, more than the {_MAX_OTHERS_BYTES:,} that each worker can keep: write it as lines of "
                "JSON (.jsonl), or leave them out with --metadata"
            )
        return table.read(wanted, use_threads=False)
