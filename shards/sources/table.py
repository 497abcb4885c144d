"""A list of images as SOURCE: CSV, TSV (both also gzipped) or Parquet, with a column of paths and one of labels.

Images inside a table are not read. Lists that tell the classes of the images beside them, as Kaggle's, are in `ground_truth`.
"""

from __future__ import annotations

import csv
import gzip
import io
import math
import os
import re
import zlib
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from alexprep.shards.errors import AlexprepError
from alexprep.shards.sources.base import (
    NO_CHOICES,
    SPLITS,
    Account,
    Choices,
    Input,
    Location,
    Source,
    numbered_classes,
    split_of,
)
from alexprep.shards.sources.foreign_formats import IMAGE_FOLDER_LISTS, images_inside
from alexprep.shards.sources.labels import (
    LABEL_COLUMNS,
    LabelError,
    check_range,
    is_number,
    label_in,
    label_name,
    several,
    text_of,
)
from alexprep.shards.storage import Files, LocalFiles, as_text, is_url, local_path, open_regular

# Column names in lower case; where a table has several of one kind, the first in this order counts. Those of labels: `labels`.
PATHS = ("path", "file", "filename", "image", "image_path", "filepath", "url", "file_name")
SPLIT_COLUMNS = ("split", "set", "subset", "fold")

MAX_LINE_BYTES = 2**20  # paths have at most 4,096, URLs seldom more; an endless line must not fill the memory
_MAX_FILE_NAME = 255  # bytes
_FOLDERS_LOOKED_INTO = 20  # beside a table, for the pictures that its ids may mean
_PICTURE_ENDINGS = (".jpg", ".jpeg", ".JPEG", ".JPG", ".png", ".PNG", ".webp", ".bmp", ".tif", ".tiff")
_BATCH = 65_536  # rows
_SPLIT_NAMES = sorted(set(SPLITS.values()))


@dataclass(frozen=True)
class Table(Source):
    """Rows of path and label. Paths are relative to the table's folder, absolute, or URLs that fsspec understands.

    The split is that of the row where there is such a column, otherwise the one that the table's name tells (val.csv),
    otherwise "train". What a label is, `labels` says: if every one is a whole number, it is the label itself and the classes are
    named "0" to the highest; otherwise labels are the names of classes. A row has one label. Several are refused, also a cell with
    commas all of whose parts are labels of other rows. (A comma or a space alone says nothing: "tench, Tinca tinca" is one class.)

    Attributes:
        table: the table's name in the root.
    """

    table: bytes = b""
    layout = "table"
    expects = "a file ending in .csv, .tsv (or .csv.gz, .tsv.gz) or .parquet, with columns such as path and label"

    @classmethod
    def at(cls, files: Files, name: bytes, choices: Choices = NO_CHOICES) -> Source | None:
        """See `Source`: the named file, by its ending."""
        if not name.lower().endswith((b".csv", b".tsv", b".csv.gz", b".tsv.gz", b".parquet")):
            return None
        try:
            first = next(read_rows(files, name), None)
        except AlexprepError:  # told when the inputs are listed
            first = None
        if isinstance(files, LocalFiles):
            files = LocalFiles(files.root, remote=bool(first and first.path and is_url(path_in(first.path))))
        return cls(files, name)

    def inputs(self, account: Account) -> Iterator[Input]:
        """By split, class and path, as bytes.

        15 million rows need about 2.5 times the bytes of their paths and 60 bytes a row: 3 GB for paths of 60 bytes.
        """
        yield from _Rows(self.files, self.table, account).in_order()

    def classes(self, present: set[str]) -> list[str]:
        """The numbers from "0" to the highest where all are numbers, otherwise sorted as bytes."""
        if present and all(map(is_number, present)):
            return numbered_classes(present)
        return super().classes(present)


class _Rows:
    """A table's rows as columns: split and class as codes, in 13 bytes a row beside the path."""

    def __init__(self, files: Files, name: bytes, account: Account) -> None:
        """Reads and checks every row; each is counted as found in the `account`."""
        self._files, self._shown = files, files.display(name)
        self._unit = "row" if name.lower().endswith(b".parquet") else "line"
        self._split = split_of(os.path.splitext(name)[0]) or _split_of_folder(files, name) or "train"
        self._codes_of: dict[str, int] = {}  # of each label as it is written
        self._names: list[str] = []  # of the classes, by code; several codes may have one
        self._first_rows: list[int] = []  # by code
        self._codes, self._places, self._splits = array("i"), array("q"), array("b")
        self._paths: list[Any] = []
        self._saw_back_slash = False
        paths: list[bytes] = []
        for row in read_rows(files, name):
            account.found += 1
            label = (row.label or "").strip()
            if label not in self._codes_of:
                self._add_label(label, row.place)
            self._codes.append(self._codes_of[label])
            self._splits.append(_SPLIT_NAMES.index(self._split_of(row)))
            self._places.append(row.place)
            paths.append(self._path(row))
            if len(paths) == _BATCH:
                self._paths.append(pa.array(paths, pa.large_binary()))
                paths = []
        self._paths.append(pa.array(paths, pa.large_binary()))
        if not self._codes:
            raise AlexprepError(
                f"{self._shown} has no row below its header: it needs one for each image, with its path and its label"
            )
        self._check_labels()

    def in_order(self) -> Iterator[Input]:
        """The inputs by split, class and path; a path that occurs twice is an AlexprepError."""
        paths = pa.concat_arrays(self._paths)
        self._paths.clear()
        by_path = pc.sort_indices(paths)  # stable, and by bytes
        paths = paths.take(by_path)
        order: NDArray[np.int64] = by_path.to_numpy().astype(np.int64)
        if len(paths) > 1 and (same := pc.index(pc.equal(paths[:-1], paths[1:]), True).as_py()) >= 0:
            raise self._twice(paths[same].as_py(), int(order[same]), int(order[same + 1]))
        names = sorted(set(self._names), key=str.encode)
        position = {name: n for n, name in enumerate(names)}
        rank = np.array([position[name] for name in self._names], np.int64)
        key = np.frombuffer(self._splits, np.int8).astype(np.int64) * len(names)
        key += rank[np.frombuffer(self._codes, np.int32)]
        key = key[order]
        order = np.argsort(key, kind="stable")
        for start in range(0, len(order), _BATCH):
            some = order[start : start + _BATCH]
            for where, path in zip(key[some].tolist(), paths.take(pa.array(some)).to_pylist(), strict=True):
                split, code = divmod(where, len(names))
                yield Input(_SPLIT_NAMES[split], names[code], Location(path))

    def _wrong(self, place: int, problem: str) -> AlexprepError:
        return AlexprepError(f"{self._shown}, {self._unit} {place:,}: {problem}")

    def _path(self, row: Row) -> bytes:
        if not row.path:
            raise self._wrong(row.place, "the path is missing: fill it in, or delete the row")
        if "\0" in row.path:
            raise self._wrong(row.place, f"the path {row.path!r} holds a NUL, which no path can")
        path = path_in(row.path)
        if "\\" in row.path and not self._saw_back_slash:
            self._saw_back_slash = True
            self._check_back_slash(row)
        if path.startswith(b"/") and not isinstance(self._files, LocalFiles):
            problem = f"the path {row.path!r} is absolute, but the table lies at a URL: make it relative to the table, or a URL"
            raise self._wrong(row.place, problem)
        return path

    def _check_back_slash(self, row: Row) -> None:
        """Refuses the first path with a back-slash where it is one of Windows. (Other names may hold one, too.)"""
        cell, turned = str(row.path), str(row.path).replace("\\", "/")
        if not isinstance(self._files, LocalFiles) or os.path.lexists(os.path.join(self._files.root, cell.encode())):
            return
        if re.match(r"[A-Za-z]:\\", cell) or os.path.exists(os.path.join(self._files.root, turned.encode())):
            there = "" if turned[1:2] == ":" else f", and {turned!r} is there"
            step = "with / in place of each \\ and relative to the table" if not there else "with / in place of each \\"
            raise self._wrong(
                row.place, f"the path {cell!r} has the back-slashes of Windows{there}: write paths {step}"
            )

    def _split_of(self, row: Row) -> str:
        if row.split is None:
            return self._split
        split = SPLITS.get(row.split.strip().lower())
        if split is None:
            known = ", ".join(SPLITS)
            problem = f"the split {row.split!r} is not one of {known}: change it, or rename the column if it is none of splits"
            raise self._wrong(row.place, problem)
        return split

    def _add_label(self, label: str, place: int) -> None:
        try:
            self._names.append(label_in(label))
        except LabelError as error:
            raise self._wrong(place, str(error)) from None
        self._codes_of[label] = len(self._codes_of)
        self._first_rows.append(place)

    def _check_labels(self) -> None:
        """What can only be said of all labels together: numbers are what they count only where all are numbers."""
        if all(map(is_number, self._names)):
            highest = max(self._names, key=int)
            try:
                check_range(highest)
            except LabelError as error:
                raise self._wrong(self._first_rows[self._names.index(highest)], str(error)) from None
            return
        for label, code in self._codes_of.items():
            if label != self._names[code] and "." in label:
                other = next(name for name in self._names if not is_number(name))
                problem = f"the label {label} is a number with a point among names such as {other!r}: write it without a point"
                raise self._wrong(self._first_rows[code], problem)
            parts = [part.strip() for part in label.split(",")]
            if len(parts) > 1 and all(part in self._codes_of for part in parts):
                raise self._wrong(self._first_rows[code], several(label))
        self._names = list(self._codes_of)  # as they are written: "01" and "1" are two names

    def _twice(self, path: bytes, first: int, second: int) -> AlexprepError:
        lines = f"{self._unit}s {self._places[first]:,} and {self._places[second]:,}"
        labels = [self._names[self._codes[row]] for row in (first, second)]
        what = "the same label" if labels[0] == labels[1] else f"the labels {labels[0]!r} and {labels[1]!r}"
        if self._splits[first] != self._splits[second]:
            what += " and in two splits"
        return AlexprepError(f"{self._shown}: {lines} both name {as_text(path)!r}, with {what}: delete one")


def _split_of_folder(files: Files, name: bytes) -> str | None:
    """The split of a hub's image folder, validation/metadata.csv, whose own name tells none."""
    folder = files.display().rpartition("/")[2]
    return SPLITS.get(folder.lower()) if name in IMAGE_FOLDER_LISTS else None


# Rows: nothing is held but a batch


class Row(NamedTuple):
    """One row; a cell that is missing is None or "".

    Attributes:
        place: line of a text (the last one of a row that goes over several), or row of a Parquet file; the first is 1.
        split: None in a table without splits, and there alone.
    """

    place: int
    path: str | None
    label: str | None
    split: str | None


def read_rows(files: Files, name: bytes) -> Iterator[Row]:
    """The rows of a table; AlexprepError where it is damaged, not UTF-8, or without the columns."""
    return (_parquet_rows if name.lower().endswith(b".parquet") else _text_rows)(files, name)


def _text_rows(files: Files, name: bytes) -> Iterator[Row]:
    shown = files.display(name)
    delimiter = "\t" if name.lower().endswith((b".tsv", b".tsv.gz")) else ","
    line, width = 0, 0
    path, label, split = 0, 1, None
    try:
        with _opened(files, name) as file:
            reader = csv.reader(_lines(file, shown), delimiter=delimiter, strict=True, skipinitialspace=True)
            for cells in filter(None, reader):
                line = reader.line_num
                if not width:
                    width = len(cells)
                    # No header: two cells of which the first can be a file's name and the second is no column's.
                    if width != 2 or not set("./") & set(cells[0]) or cells[1].strip().lower() in LABEL_COLUMNS:
                        where = f"{shown}, line {line}"
                        try:
                            path, label, split = _columns(cells, where)
                        except AlexprepError:
                            if problem := _header_problem(files, cells, next(reader, []), delimiter):
                                raise AlexprepError(f"{where}: {problem}") from None
                            raise
                        continue
                if len(cells) != width:
                    raise AlexprepError(
                        f"{shown}, line {line:,}: {len(cells)} cells, where the first line has {width}: put a cell that "
                        "holds the separator in double quotes"
                    )
                yield Row(line, cells[path], cells[label], None if split is None else cells[split])
    except csv.Error as error:
        raise AlexprepError(f"{shown}, line {reader.line_num:,}: {error}: mend the quotes of this line") from None
    except (OSError, EOFError, zlib.error) as error:
        raise AlexprepError(
            f"{shown} cannot be read after line {line:,} ({error}): check it, or get it again"
        ) from None
    if not width:
        raise AlexprepError(f"{shown} is empty: it needs a row for each image, with its path and its label")


def _columns(names: Sequence[str], shown: str) -> tuple[int, int, int | None]:
    """Which columns are the path, the label and the split."""
    lower = [name.strip().lower() for name in names]
    found: list[int | None] = []
    first = (next((name for name in wanted if name in lower), None) for wanted in (PATHS, SPLIT_COLUMNS))
    for name in (next(first), label_name(lower, LABEL_COLUMNS), next(first)):
        if name is not None and lower.count(name) > 1:
            raise AlexprepError(f"{shown}: two columns are named {name!r}: rename the one that is not meant")
        found.append(None if name is None else lower.index(name))
    path, label, split = found
    if path is None or label is None:
        what, known = ("path", PATHS) if path is None else ("label", LABEL_COLUMNS)
        listed = ", ".join(repr(name[:40]) for name in names[:10])
        raise AlexprepError(
            f"{shown}: no column for the {what} among {listed}: name it {', '.join(known[:-1])} or {known[-1]}. Tables of "
            "text may have no header where the path and the label are all they have"
        )
    return path, label, split


def _header_problem(files: Files, header: Sequence[str], row: Sequence[str], delimiter: str) -> str:
    """What is seen in a header without the columns that are needed, and in the first `row` below it; empty for nothing.

    Cells that are separated by another character than the table's name says; or a column of pictures' names, as in Kaggle's lists
    `id,breed`, whose pictures are looked for in the table's folder and in those in it.
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
            meant = as_text(path)
            before, _, after = meant.partition(cell)
            if not before and not after:
                return f"the column {name!r} has the paths of pictures, as {cell!r}: call it path, and that of the labels label"
            short = [f"folder {before.rstrip('/')}"] * bool(before) + ["ending"] * bool(after)
            return (
                f"the column {name!r} has the names of pictures without their {' and '.join(short)}: {cell!r} is {meant}, in the image "
                f"folder beside this table. Write a table with the columns path (here {meant}) and label, and name that as SOURCE"
            )
    return ""


def _picture_meant(files: LocalFiles, cell: str) -> bytes | None:
    """The file that a cell names, perhaps without folder and ending, in the table's folder or those in it."""
    if not cell or "\0" in cell or len(cell) > _MAX_FILE_NAME:
        return None
    folders = [b"", *files.folder_names()[:_FOLDERS_LOOKED_INTO]]
    paths = (os.path.join(folder, f"{cell}{end}".encode()) for folder in folders for end in ("", *_PICTURE_ENDINGS))
    return next((path for path in paths if os.path.isfile(os.path.join(files.root, path))), None)


def _lines(file: BinaryIO, shown: str) -> Iterator[str]:
    gzipped = file.read(2) == b"\x1f\x8b"
    file.seek(0)
    stream = gzip.GzipFile(fileobj=file) if gzipped else file
    for number, line in enumerate(iter(lambda: stream.readline(MAX_LINE_BYTES + 1), b""), 1):
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


def _opened(files: Files, name: bytes) -> BinaryIO:
    """A table as a file: read from a disk bit by bit, from a store at once."""
    if isinstance(files, LocalFiles):
        return open_regular(os.path.join(files.root, name))
    return io.BytesIO(files.read(name))


def _parquet_rows(files: Files, name: bytes) -> Iterator[Row]:
    shown = files.display(name)
    done = 0
    try:
        with _opened(files, name) as file:
            table = pq.ParquetFile(file)
            schema = table.schema_arrow
            if words := images_inside(schema):
                raise AlexprepError(f"{shown} is {words}")
            columns = [schema.names[n] for n in _columns(schema.names, shown) if n is not None]
            for what, column in zip(("path", "label", "split"), columns, strict=False):
                _check_type(schema.field(column), what, shown)
            for batch in table.iter_batches(_BATCH, columns=columns):
                paths, labels, *splits = (_texts(batch.column(column), done, shown) for column in columns)
                places = range(done + 1, done + 1 + len(batch))
                yield from map(
                    Row, places, paths, labels, [cell or "" for cell in splits[0]] if splits else [None] * len(batch)
                )
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


# What cells mean


def path_in(cell: str) -> bytes:
    """Where the cell of a path points, in one spelling: a/./b, a//b and file:///a/b are a/b and /a/b; other URLs as they are."""
    local = local_path(cell)
    if local is None:
        return cell.encode()
    if not re.search(r"(^|/)(\./|/)", local):
        return local.encode()
    parts = [part for part in local.split("/") if part not in ("", ".")]
    return ("/" * local.startswith("/") + "/".join(parts)).encode()
