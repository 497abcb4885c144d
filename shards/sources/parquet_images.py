"""Pictures inside Parquet files, as Hugging Face has its datasets: a column of their bytes, and one of labels.

SOURCE is one file, or a folder with data/train-00000-of-00005.parquet, validation-… and test-…, also right in it or in a folder a
split (train/0000.parquet). Lists of paths in Parquet are in `table`; how groups of rows are kept in memory is in `grouped`.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import math
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from alexprep.shards.errors import AlexprepError, AmbiguousSourceError
from alexprep.shards.sources.base import (
    NO_CHOICES,
    NO_LABEL,
    SPLITS,
    UNLABELLED,
    Account,
    Choices,
    Input,
    Location,
    Source,
    numbered_classes,
    split_of,
)
from alexprep.shards.sources.grouped import DamagedGroupError, FileView, GroupedSource, Sizes, check_group
from alexprep.shards.sources.labels import (
    LABEL_COLUMNS,
    LABEL_FIELDS,
    LabelError,
    check_range,
    is_number,
    label_in,
    label_name,
    several,
    text_of,
)
from alexprep.shards.sources.table_rows import SPLIT_COLUMNS
from alexprep.shards.sources.tree import pass_over_rest, read_tree
from alexprep.shards.storage import Files, as_text

# Names, in lower case, of a column of pictures that no schema calls so; the first counts that there is.
IMAGES = ("image", "img", "picture", "photo", "jpg", "jpeg", "png", "webp", "image_bytes", "bytes")
MISSING = -1  # Hugging Face's label of a row that has none

_LOOKED_AT = 200  # names in a folder that are looked at for a Parquet file, and folders
_OPENED = 8  # files that are opened to find one with pictures
_FOOTERS = 512  # that are kept
_NAME_BYTES = 255
_MEDIA = ("Image", "Audio", "Video")
_PANDAS_INDEX = "__index_level_0__"  # the numbers of rows, as pandas writes them
_of_several = re.compile(r"(.*?)-?(\d{5})-of-(\d{5})").fullmatch


class Part(NamedTuple):
    """One file, and the split that its name or folder tells; None for none."""

    split: str | None
    path: bytes


class Columns(NamedTuple):
    """The columns that are read, and what the schema says of them.

    Attributes:
        image: of the pictures: binary, or a struct with the field "bytes".
        label: None where there is none.
        names: the class names by label, where the schema tells them; () where it does not.
        split: a column that tells the split of each row of files whose names tell none, or None.
        others: columns of further pictures, which are not read.
    """

    image: str
    label: str | None
    names: tuple[str, ...]
    split: str | None
    others: tuple[str, ...] = ()


NO_COLUMNS = Columns("", None, (), None)


@dataclass(frozen=True)
class ParquetImages(GroupedSource):
    """Rows of a picture and its label, in the order of the files and rows.

    Attributes:
        parts: the files, by split and then path.
        columns: of the first file; the others must have them too.
    """

    parts: tuple[Part, ...] = ()
    columns: Columns = NO_COLUMNS
    layout = "parquet"
    expects = "Parquet files with a column of pictures and one of labels, as data/train-00000-of-00005.parquet"

    @classmethod
    def at(cls, files: Files, name: bytes, choices: Choices = NO_CHOICES) -> Source | None:
        """See `Source`: the file that is named, or those below the root, of which one must have a column of pictures."""
        _footer.cache_clear()
        paths = [name] if name else _files_below(files)
        if not paths or not paths[0].lower().endswith(b".parquet") or choices.column("path") is not None:
            return None
        looked_at = sorted(paths, key=lambda path: split_of(path) != "train")[:_OPENED]
        schema, problem = None, None
        for path in looked_at:
            try:
                schema = _footer(files, path).schema.to_arrow_schema()
                break
            except AlexprepError as error:
                problem = error
        if schema is None:
            if name or read_tree(files).root.count:
                return None  # a table, which will say so; or class folders
            raise problem or AlexprepError("")
        columns = _columns(schema, choices, files.display(path))
        if columns is None:
            return None
        parts = _parts(files, paths, columns) if not name else [Part(split_of(os.path.splitext(name)[0]), name)]
        if choices.column("split") is not None:  # goes before what names tell
            parts = [Part(None, path) for _, path in parts]
        others = f"; {', '.join(columns.others)} not read" if columns.others else ""
        evidence = f"pictures in the column {columns.image!r}, labels in {columns.label!r}{others}"
        return cls(files, tuple(parts), columns, choices=choices, whole=not name, evidence=evidence)

    def inputs(self, account: Account) -> Iterator[Input]:
        """Every row that has a label, by split, file and row. Of a split in which no row has one, every row, if it is not train."""
        self.begin_listing()
        _footer.cache_clear()
        self.sizes()
        rows = [_Rows(self.files, part, self.columns) for part in self.parts]
        account.found += sum(map(len, rows))
        named = _names_of(rows, self.columns, self.files.display(self.parts[0].path))
        for split in sorted({split for some in rows for split in some.splits}):
            labelled = sum(some.labelled(split) for some in rows)
            count = sum(some.count(split) for some in rows)
            if not labelled and split == "train":
                raise AlexprepError(
                    f"{self.files.display(self.parts[0].path)}: no row of train has a label"
                    + (f" in {self.columns.label!r}" if self.columns.label else "")
                    + ": name the column with --columns label=NAME"
                )
            if not labelled:
                account.warnings.append(
                    f"nothing tells the classes of the {count:,} rows of {split}: their label is -1"
                )
            elif labelled < count:
                account.warnings.append(
                    f"{count - labelled:,} of {count:,} rows of {split} have no label: they are passed over"
                )
            for some, names in zip(rows, named, strict=True):
                yield from some.inputs(split, names, account if labelled else None)
        if self.whole:
            pass_over_rest(self.files, {part.path for part in self.parts}, account)

    def classes(self, present: set[str]) -> list[str]:
        """The names that the schema gives; the numbers from "0" to the highest where all are numbers; otherwise sorted as bytes."""
        if self.columns.names:
            return list(self.columns.names)
        if present and all(map(is_number, present)):
            return numbered_classes(present)
        return super().classes(present)

    def covers(self, target: str) -> bool:
        """Whether one of the files lies in the folder `target`."""
        return self.whole and any(
            below is not None and part.path.startswith(b"".join(name + b"/" for name in below))
            for below in [self.files.below(target)]
            for part in self.parts
        )

    def measured(self) -> Sizes:
        """See `GroupedSource`."""
        inputs, total, largest, metadata, most = 0, 0, 0, 0, 0
        for part in self.parts:
            footer, shown = _footer(self.files, part.path), self.files.display(part.path)
            chunk = _chunk_of(footer, self.columns.image)
            if chunk is None:
                raise AlexprepError(
                    f"{shown} has no column {self.columns.image!r} of pictures, as other files have: move it away"
                )
            inputs += footer.num_rows
            along = _chunks_along(footer, self.columns)
            for number in range(footer.num_row_groups):
                group = footer.row_group(number)
                size = group.column(chunk).total_uncompressed_size
                check_group(size, number, shown)
                beside = sum(group.column(n).total_uncompressed_size for n in along)
                total, largest, metadata, most = (
                    total + size,
                    max(largest, size),
                    metadata + beside,
                    max(most, beside),
                )
        return Sizes(inputs, total, largest, metadata, most)

    def read_group(self, path: bytes, number: int) -> pa.ChunkedArray:
        """See `GroupedSource`; page checksums are compared where the file has them."""
        column = self._columns_of(path, number, lambda footer: [_chunk_name(footer, self.columns.image)]).column(0)
        return pc.struct_field(column, "bytes") if pa.types.is_struct(column.type) else column

    def read_metadata(self, path: bytes, number: int) -> pa.Table:
        """See `GroupedSource`."""
        table = self._columns_of(
            path, number, lambda footer: _names_along(footer.schema.to_arrow_schema(), self.columns)
        )
        for n, field in enumerate(table.schema):
            if pa.types.is_timestamp(field.type) and field.type.unit == "ns":  # finer than Python's datetime
                table = table.set_column(n, field.name, table.column(n).cast(pa.string()))
        return table

    def _columns_of(self, path: bytes, number: int, names: Callable[[pq.FileMetaData], list[str]]) -> pa.Table:
        """Some columns of a row group, by their names in the file."""
        try:
            footer = _footer(self.files, path)
            with FileView(self.files, path) as file:
                opened = pq.ParquetFile(file, metadata=footer, page_checksum_verification=True)
                return opened.read_row_group(number, names(footer), use_threads=False)
        except (pa.ArrowException, OSError, IndexError) as error:
            if (isinstance(error, OSError) and error.errno is not None) or isinstance(error, MemoryError):
                raise
            raise DamagedGroupError(f"row group {number} is damaged ({_first_line(error)})") from None


class _Rows:
    """The rows of one file: split and label of each, and where it lies."""

    def __init__(self, files: Files, part: Part, columns: Columns) -> None:
        """Reads and checks labels and splits; pictures stay where they are."""
        self._files, self._path, self._columns = files, part.path, columns
        self._shown = files.display(part.path)
        self._footer = _footer(files, part.path)
        schema = self._footer.schema.to_arrow_schema()
        by_column = (columns.split,) if part.split is None else ()
        wanted = [name for name in (columns.label, *by_column) if name is not None and name in schema.names]
        if columns.label is not None and columns.label not in schema.names and part.split != "test":
            raise AlexprepError(f"{self._shown} has no column {columns.label!r}, as other files have: move it away")
        self._along = _names_along(schema, columns)
        table = self._read(wanted)
        count = self._footer.num_rows
        self.written: list[str] = []  # the labels as they are written, by code, where the schema does not name them
        self._labels = np.full(count, MISSING, np.int32)
        if columns.label in wanted:
            if columns.names and _class_label(schema, str(columns.label)) != columns.names:
                raise AlexprepError(
                    f"{self._shown} gives the labels in {columns.label!r} other names than the first file does: the files are of "
                    "different datasets, so name one of them as SOURCE"
                )
            self._labels = self._codes(table.column(str(columns.label)))
        self._split_of_rows = self._row_splits(table.column(columns.split)) if columns.split in wanted else None
        self._split = part.split or "train"
        sizes = [self._footer.row_group(number).num_rows for number in range(self._footer.num_row_groups)]
        self._starts = np.cumsum([0, *sizes])

    def __len__(self) -> int:
        return len(self._labels)

    @property
    def splits(self) -> set[str]:
        """Of which there are rows."""
        if self._split_of_rows is not None:
            return set(self._split_of_rows.tolist())
        return {self._split} if len(self) else set()

    def _of(self, split: str) -> NDArray[np.int64]:
        """The rows of a split, ascending."""
        if self._split_of_rows is None:
            return np.arange(len(self) if split == self._split else 0)
        return np.flatnonzero(self._split_of_rows == split)

    def count(self, split: str) -> int:
        """The rows of a split."""
        return len(self._of(split))

    def labelled(self, split: str) -> int:
        """The rows of a split that have a label."""
        return int((self._labels[self._of(split)] != MISSING).sum())

    def inputs(self, split: str, names_by_code: Sequence[str], account: Account | None) -> Iterator[Input]:
        """The rows of a split. Those without a label are passed over, in the `account`; without one they are inputs too."""
        rows = self._of(split)
        if not len(rows):
            return
        names, metadata = self._names(), b"+" if self._along else b""
        groups = np.searchsorted(self._starts, rows, "right") - 1
        within = rows - self._starts[groups]
        codes = self._labels[rows]
        for row, group, place, code in zip(*(some.tolist() for some in (rows, groups, within, codes)), strict=True):
            member = b"row %d" % row + (b"/" + names[row] if names is not None and names[row] else b"")
            location = Location(self._path, member, group, place)
            if code == MISSING and account is not None:
                account.pass_over(NO_LABEL, f"{self._shown}/{as_text(member)}")
            else:
                yield Input(split, UNLABELLED if code == MISSING else names_by_code[code], location, metadata)

    def _read(self, columns: Sequence[str]) -> pa.Table:
        """Some columns of the whole file."""
        if not columns:
            return pa.table({})
        try:
            with FileView(self._files, self._path) as file:
                opened = pq.ParquetFile(file, metadata=self._footer, page_checksum_verification=True)
                return opened.read(list(columns), use_threads=False)
        except (pa.ArrowException, OSError) as error:
            raise _unreadable(self._shown, error) from None

    def _names(self) -> list[bytes] | None:
        """The pictures' own names, which a struct may have beside the bytes."""
        name = f"{self._columns.image}.path"
        paths = [self._footer.schema.column(n).path for n in range(len(self._footer.schema))]
        if name not in paths:
            return None
        column = pc.struct_field(self._read([name]).column(0), "path")
        if not (pa.types.is_string(column.type) or pa.types.is_large_string(column.type)):
            return None
        texts = column.cast(pa.large_string()).cast(pa.large_binary()).to_pylist()
        return [(text or b"").replace(b"\0", b"")[:_NAME_BYTES] for text in texts]

    def _codes(self, column: pa.ChunkedArray) -> NDArray[np.int32]:
        """The label of each row as the number of its name, in the schema or in `written`; `MISSING` for none."""
        if pa.types.is_dictionary(column.type):
            column = pa.chunked_array([chunk.dictionary_decode() for chunk in column.chunks], column.type.value_type)
        kind, name = column.type, self._columns.label
        if self._columns.names:
            numbers = column.cast(pa.int64()).fill_null(MISSING).to_numpy()
            if len(wrong := np.flatnonzero((numbers < MISSING) | (numbers >= len(self._columns.names)))):
                what = f"{numbers[wrong[0]]} in {name!r} is not between -1 (none) and {len(self._columns.names) - 1:,}"
                raise self._wrong(int(wrong[0]), f"the label {what}: mend it, or get the file again")
            codes: NDArray[np.int32] = numbers.astype(np.int32)
            return codes
        if pa.types.is_list(kind) or pa.types.is_large_list(kind):
            what = f"gives one picture several labels ({kind}); one is needed: name another with --columns label=NAME"
            raise AlexprepError(f"{self._shown}: the column {name!r} {what}")
        if pa.types.is_nested(kind) or pa.types.is_temporal(kind):
            what = (
                f"has the type {kind}, but a label is a text or a whole number: name another with --columns label=NAME"
            )
            raise AlexprepError(f"{self._shown}: the column {name!r} {what}")
        if pa.types.is_string(kind):
            column = column.cast(pa.binary())  # since a file may say that what is not UTF-8 is text
        coded = column.combine_chunks().dictionary_encode()
        codes = coded.indices.fill_null(MISSING).to_numpy(zero_copy_only=False).astype(np.int32)
        for code, value in enumerate(coded.dictionary.to_pylist()):
            missing = value in (MISSING, b"", "") or (isinstance(value, float) and math.isnan(value))
            try:
                self.written.append("" if missing else text_of(value if kind != pa.string() else value.decode()))
                if not missing:
                    check_range(label_in(self.written[-1]))
            except (LabelError, UnicodeDecodeError) as error:
                words = str(error) if isinstance(error, LabelError) else f"{value[:80]!r} is not UTF-8"
                raise self._wrong(int(np.argmax(codes == code)), words) from None
            if missing:
                codes[codes == code] = MISSING
        return codes

    def _wrong(self, row: int, problem: str) -> AlexprepError:
        return AlexprepError(f"{self._shown}, row {row:,}: {problem}")

    def _row_splits(self, column: pa.ChunkedArray) -> NDArray[np.str_]:
        texts = [(data or b"").decode("utf-8", "backslashreplace").strip() for data in _binary(column)]
        for row, text in enumerate(texts):
            if text.lower() not in SPLITS:
                known = f"not one of {', '.join(SPLITS)}: change it, or rename the column if it is none of splits"
                raise self._wrong(row, f"the split {text!r} is {known}")
        return np.array([SPLITS[text.lower()] for text in texts], "U5")


def _names_of(rows: Sequence[_Rows], columns: Columns, shown: str) -> list[list[str]]:
    """The class names by code of each file: the schema's; or the labels, as numbers where all of all files are numbers."""
    if columns.names:
        return [list(columns.names)] * len(rows)
    written = {text for some in rows for text in some.written if text}
    if all(is_number(label_in(text)) for text in written):
        return [[label_in(text) if text else "" for text in some.written] for some in rows]
    for text in written:
        parts = [part.strip() for part in text.split(",")]
        if len(parts) > 1 and all(part in written for part in parts):
            raise AlexprepError(f"{shown}, column {columns.label!r}: {several(text)}")
    return [some.written for some in rows]


def _binary(column: Any) -> list[bytes | None]:
    """Texts as bytes, since a file may say that what is not UTF-8 is text."""
    return column.cast(pa.large_string()).cast(pa.large_binary()).to_pylist()  # type: ignore[no-any-return]


# Which files there are, and of which splits.


def _files_below(files: Files) -> list[bytes]:
    """The Parquet files below the root, ascending; the whole tree is read only where a look finds one."""
    if not _has_parquet(files):
        return []
    root = read_tree(files).root
    found = [os.path.join(folder.path, name) for folder in root.walk() for name in folder.papers]
    return sorted(path for path in found if path.lower().endswith(b".parquet"))


def _has_parquet(files: Files) -> bool:
    """Whether there is a Parquet file among the first names in the root, or in folders at most two names below it.

    Where there are many folders, they are class folders, and not looked into.
    """
    level = [b""]
    for _ in range(3):
        below: list[bytes] = []
        for folder in level:
            names: list[tuple[bytes, bool | None]] = []
            with contextlib.suppress(FileNotFoundError, NotADirectoryError):
                names = list(itertools.islice(files.listed(folder, links=True), _LOOKED_AT))
            if any(not inner and name.lower().endswith(b".parquet") and name[:1] != b"." for name, inner in names):
                return True
            below += [os.path.join(folder, name) for name, inner in names if inner and name[:1] != b"."]
        if len(below) > _LOOKED_AT:
            return False
        level = below
    return False


def _parts(files: Files, paths: list[bytes], columns: Columns) -> list[Part]:
    """Each file with its split. Several datasets in one folder, two kinds of files of one split, or missing ones are refused."""
    shown = files.display()
    configs: dict[bytes, list[bytes]] = {}
    for path in paths:
        above = [part for part in path.split(b"/")[:-1] if part.lower() != b"data" and not split_of(part)]
        configs.setdefault(b"/".join(above), []).append(path)
    if len(configs) > 1:
        raise AmbiguousSourceError(
            f"SOURCE {shown} holds {len(configs)} datasets, each in a folder of its own.",
            [
                (
                    f"SOURCE {files.display(config)}" if config else f"SOURCE {files.display(some[0])}",
                    f"{len(some):,} files",
                )
                for config, some in sorted(configs.items())
            ],
        )
    parts = []
    kinds: dict[tuple[str | None, str], dict[int, bytes]] = {}
    for path in paths:
        folder, name = os.path.split(path)
        split = split_of(os.path.splitext(name)[0]) or next(filter(None, map(split_of, folder.split(b"/")[::-1])), None)
        parts.append(Part(split, path))
        stem = as_text(os.path.splitext(name)[0])
        numbered = _of_several(stem)
        kind = as_text(folder + b"/") + (numbered[1] if numbered else re.sub(r"[-_.]?\d+$", "", stem))
        same = kinds.setdefault((split, kind), {})
        same[int(numbered[2]) if numbered else -1 - len(same)] = path
        if numbered and int(numbered[2]) >= int(numbered[3]):
            raise AlexprepError(f"{files.display(path)}: there is no number {numbered[2]} of {numbered[3]}: rename it")
    _check_complete(files, paths)
    told = [kind for kind in kinds if kind[0] is not None]
    for split, kind in told:
        if other := next((name for other, name in told if other == split and name != kind), None):
            both = " and ".join(sorted((kind.lstrip("/"), other.lstrip("/"))))
            raise AlexprepError(
                f"SOURCE {shown} holds files of {both}, which both mean {split!r}: move those of one away"
            )
    if told and len(told) < len(kinds) and columns.split is None:
        path = next(part.path for part in parts if part.split is None)
        raise AlexprepError(f"{files.display(path)} names no split, as other files do: rename it, or move it away")
    return sorted(parts, key=lambda part: (part.split or "train", part.path))


def _check_complete(files: Files, paths: list[bytes]) -> None:
    """Sees to it that of train-00000-of-00005 and so on none is missing."""
    sets: dict[tuple[bytes, str, int], set[int]] = {}
    for path in paths:
        folder, name = os.path.split(path)
        if numbered := _of_several(as_text(os.path.splitext(name)[0])):
            sets.setdefault((folder, numbered[1], int(numbered[3])), set()).add(int(numbered[2]))
    for (folder, stem, count), present in sets.items():
        if len(present) < count:
            first = next(n for n in range(count) if n not in present)
            missing = os.path.join(folder, f"{stem}-{first:05d}-of-{count:05d}.parquet".encode())
            raise AlexprepError(
                f"{files.display(missing)} is missing, with {count - len(present) - 1:,} others of {count:,}: download what is missing, or "
                "name one file as SOURCE"
            )


# What a file says of itself.


@functools.lru_cache(maxsize=_FOOTERS)
def _footer(files: Files, path: bytes) -> pq.FileMetaData:
    """A file's metadata, which lies at its end; AlexprepError where it is no Parquet file, or was cut short."""
    shown = files.display(path)
    try:
        with FileView(files, path) as file:
            if file.read(7) == b"version":
                raise OSError("it is a pointer of Git LFS: fetch the file itself with `git lfs pull`")
            footer = pq.read_metadata(file)
            footer.schema.to_arrow_schema()
            return footer
    except (pa.ArrowException, OSError) as error:
        raise _unreadable(shown, error) from None


def _unreadable(shown: str, error: Exception) -> AlexprepError:
    return AlexprepError(f"{shown} is no Parquet file, or is damaged ({_first_line(error)}): check it, or get it again")


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]


def _chunk_of(footer: pq.FileMetaData, image: str) -> int | None:
    """The number of the leaf column that holds the pictures."""
    paths = [footer.schema.column(n).path for n in range(len(footer.schema))]
    return next((paths.index(name) for name in (f"{image}.bytes", image) if name in paths), None)


def _chunk_name(footer: pq.FileMetaData, image: str) -> str:
    chunk = _chunk_of(footer, image)
    return image if chunk is None else str(footer.schema.column(chunk).path)


def _names_along(schema: pa.Schema, columns: Columns) -> list[str]:
    """The columns that go along with the pictures: all but those that are read for something else, of other pictures, and of sound."""
    used, features = {columns.image, columns.label, columns.split, _PANDAS_INDEX}, _features(schema)
    return [
        name
        for name in schema.names
        if name not in used
        and not _holds_pictures(schema.field(name).type, name, features)
        and not (isinstance(said := features.get(name), dict) and said.get("_type") in _MEDIA)
    ]


def _chunks_along(footer: pq.FileMetaData, columns: Columns) -> list[int]:
    """The numbers of the leaf columns of `_names_along`."""
    names = _names_along(footer.schema.to_arrow_schema(), columns)
    paths = [footer.schema.column(n).path for n in range(len(footer.schema))]
    return [n for n, path in enumerate(paths) if any(path == name or path.startswith(f"{name}.") for name in names)]


def _columns(schema: pa.Schema, choices: Choices, shown: str) -> Columns | None:
    """The columns that are meant; None where none holds pictures."""
    features = _features(schema)
    chosen = {use: choices.column(use) for use in ("image", "label", "split")}
    for use, name in chosen.items():
        if name is not None and name not in schema.names:
            listed = ", ".join(map(repr, schema.names[:20]))
            raise AlexprepError(f"--columns {use}={name}: {shown} has no such column; it has {listed}")
    image = chosen["image"]
    if image is None:
        found = [name for name in schema.names if _holds_pictures(schema.field(name).type, name, features)]
        image = _one_of(found, IMAGES, "image", "of pictures", shown)
        if image is None:
            return None
        others = tuple(name for name in found if name != image)
    else:
        others = ()
        if not _is_bytes(schema.field(image).type):
            raise AlexprepError(
                f"--columns image={image}: {shown} has the type {schema.field(image).type} there, and no bytes"
            )
    label = chosen["label"]
    if label is None:
        classes = [name for name in schema.names if _class_label(schema, name)]
        label = _one_of(classes, LABEL_FIELDS, "label", "of classes", shown)
    if label is None:
        lower = {name.strip().lower(): name for name in reversed(schema.names) if name != image}
        usual = label_name(lower, LABEL_COLUMNS)
        label = None if usual is None else lower[usual]
    texts = {name.strip().lower(): name for name in schema.names if pa.types.is_string(schema.field(name).type)}
    split = chosen["split"] or next((texts[name] for name in SPLIT_COLUMNS if name in texts), None)
    if label is None and split is None and choices == NO_CHOICES and not features:
        return None  # nothing says that this is a set of labelled pictures
    return Columns(image, label, _class_label(schema, label) if label else (), split, others)


def _one_of(found: list[str], usual: Sequence[str], use: str, what: str, shown: str) -> str | None:
    """The only one; of several the one with a usual name; a question where that leaves several, or none."""
    if len(found) < 2:
        return found[0] if found else None
    named = [name for name in found if name.strip().lower() in usual[:3]]
    if len(named) == 1:
        return named[0]
    raise AmbiguousSourceError(
        f"{shown} has {len(found)} columns {what}.",
        [(f"--columns {use}={name}", f"{name} is read, the others are not") for name in found],
    )


def _is_bytes(kind: pa.DataType) -> bool:
    """Whether values are bytes, or have a field of bytes."""
    if pa.types.is_struct(kind):
        return kind.get_field_index("bytes") >= 0 and _is_bytes(kind.field("bytes").type)
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def _holds_pictures(kind: pa.DataType, name: str, features: dict[str, Any]) -> bool:
    """Whether a column holds pictures: as the schema says where it says anything, otherwise by its name and type."""
    feature = features.get(name)
    said = feature.get("_type") if isinstance(feature, dict) else None
    return _is_bytes(kind) and (said == "Image" if said else name.strip().lower() in IMAGES)


def _features(schema: pa.Schema) -> dict[str, Any]:
    """What Hugging Face's metadata say of each column; {} where there are none, or damaged ones."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
    except (KeyError, TypeError, ValueError, RecursionError):
        return {}
    return features if isinstance(features, dict) else {}


def _class_label(schema: pa.Schema, column: str) -> tuple[str, ...]:
    """The class names by label, where the metadata call a column of whole numbers a ClassLabel; () where not, or where names repeat."""
    feature = _features(schema).get(column)
    if not isinstance(feature, dict) or feature.get("_type") != "ClassLabel" or column not in schema.names:
        return ()
    names = feature.get("names")
    if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
        return ()
    return tuple(names) if len(set(names)) == len(names) and pa.types.is_integer(schema.field(column).type) else ()
