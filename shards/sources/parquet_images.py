"""Pictures inside Parquet files, as Hugging Face has its datasets: a column of their bytes, and one of labels.

SOURCE is one file, or a folder with data/train-00000-of-00005.parquet, validation-… and test-…, also right in it or in a folder a
split (train/0000.parquet). Lists of paths in Parquet are in `table`; how groups of rows are kept in memory is in `grouped`.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
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
from alexprep.shards.sources.columnar_files import columnar
from alexprep.shards.sources.foreign_formats import IMAGE_COLUMNS
from alexprep.shards.sources.grouped import GroupedSource, Sizes, check_group
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
from alexprep.shards.sources.numbered_files import SplitFiles, check_complete, files_below, of_several, split_of_file
from alexprep.shards.sources.table_rows import SPLIT_COLUMNS
from alexprep.shards.sources.tree import read_tree
from alexprep.shards.storage import Files, as_text

MISSING = -1  # Hugging Face's label of a row that has none

_OPENED = 8  # files that are opened to find one with pictures
_NAME_BYTES = 255
_MEDIA = ("Image", "Audio", "Video")
_PANDAS_INDEX = "__index_level_0__"  # the numbers of rows, as pandas writes them


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
class ParquetImages(SplitFiles, GroupedSource):
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
        columnar.cache_clear()
        paths = [name] if name else files_below(files, lambda file: file.lower().endswith(b".parquet"))
        if not paths or not paths[0].lower().endswith(b".parquet") or choices.column("path") is not None:
            return None
        looked_at = sorted(paths, key=lambda path: split_of(path) != "train")[:_OPENED]
        schema, problem = None, None
        for path in looked_at:
            try:
                schema = columnar(files, path).schema
                break
            except AlexprepError as error:
                problem = error
        if schema is None:
            if name or read_tree(files).root.count:
                return None  # a table, which will say so; or class folders
            raise problem or AlexprepError("")
        columns = columns_of(schema, choices, files.display(path))
        if columns is None:
            return None
        parts = _parts(files, paths, columns) if not name else [Part(split_of(os.path.splitext(name)[0]), name)]
        return cls.of(files, parts, columns, choices, whole=not name)

    @classmethod
    def of(
        cls, files: Files, parts: Sequence[Part], columns: Columns, choices: Choices, *, whole: bool
    ) -> ParquetImages:
        """The source of some files."""
        if choices.column("split") is not None:  # goes before what names tell
            parts = [Part(None, path) for _, path in parts]
        others = f"; {', '.join(columns.others)} not read" if columns.others else ""
        labels = "no labels" if columns.label is None else f"labels in {columns.label!r}"
        evidence = f"pictures in the column {columns.image!r}, {labels}{others}"
        return cls(files, tuple(parts), columns, choices=choices, whole=whole, evidence=evidence)

    def inputs(self, account: Account) -> Iterator[Input]:
        """Every row that has a label, by split, file and row. Of a split in which no row has one, every row, if it is not train."""
        self.begin_listing()
        columnar.cache_clear()
        self.sizes()
        rows = [_Rows(self.files, part, self.columns) for part in self.parts]
        account.found += sum(map(len, rows))
        named = _names_of(rows, self.columns, self.files.display(self.parts[0].path))
        for split in sorted({split for some in rows for split in some.splits}):
            labelled = sum(some.labelled(split) for some in rows)
            count = sum(some.count(split) for some in rows)
            if self.choices.unlabelled:
                pass
            elif not labelled and split == "train":
                raise AlexprepError(
                    f"{self.files.display(self.parts[0].path)}: no row of train has a label"
                    + (f" in {self.columns.label!r}" if self.columns.label else "")
                    + ": name the column with --columns label=NAME"
                )
            elif not labelled:
                account.warnings.append(
                    f"nothing tells the classes of the {count:,} rows of {split}: their label is -1"
                )
            elif labelled < count:
                account.warnings.append(
                    f"{count - labelled:,} of {count:,} rows of {split} have no label: they are passed over"
                )
            for some, names in zip(rows, named, strict=True):
                yield from some.inputs(split, names, account if labelled else None)
        self.pass_over_others(account)

    def classes(self, present: set[str]) -> list[str]:
        """The names that the schema gives; the numbers from "0" to the highest where all are numbers; otherwise sorted as bytes."""
        if self.choices.unlabelled:
            return []
        if self.columns.names:
            return list(self.columns.names)
        if present and all(map(is_number, present)):
            return numbered_classes(present)
        return super().classes(present)

    def measured(self) -> Sizes:
        """See `GroupedSource`."""
        inputs, total, largest, metadata, most = 0, 0, 0, 0, 0
        for part in self.parts:
            file, shown = columnar(self.files, part.path), self.files.display(part.path)
            if (each := file.group_bytes(self.columns.image)) is None:
                raise AlexprepError(
                    f"{shown} has no column {self.columns.image!r} of pictures, as other files have: move it away"
                )
            inputs += sum(file.group_rows)
            along = file.bytes_of(_names_along(file.schema, self.columns))
            for number, (size, beside) in enumerate(zip(each, along, strict=True)):
                check_group(size, number, shown)
                total, largest, metadata, most = (
                    total + size,
                    max(largest, size),
                    metadata + beside,
                    max(most, beside),
                )
        return Sizes(inputs, total, largest, metadata, most)

    def read_group(self, path: bytes, number: int) -> pa.ChunkedArray:
        """See `GroupedSource`."""
        return columnar(self.files, path).pictures(number, self.columns.image)

    def read_metadata(self, path: bytes, number: int) -> pa.Table:
        """See `GroupedSource`."""
        file = columnar(self.files, path)
        table = file.group(number, _names_along(file.schema, self.columns))
        for n, field in enumerate(table.schema):
            if pa.types.is_timestamp(field.type) and field.type.unit == "ns":  # finer than Python's datetime
                table = table.set_column(n, field.name, table.column(n).cast(pa.string()))
        return table


class _Rows:
    """The rows of one file: split and label of each, and where it lies."""

    def __init__(self, files: Files, part: Part, columns: Columns) -> None:
        """Reads and checks labels and splits; pictures stay where they are."""
        self._files, self._path, self._columns = files, part.path, columns
        self._shown = files.display(part.path)
        self._file = columnar(files, part.path)
        schema = self._file.schema
        by_column = (columns.split,) if part.split is None else ()
        wanted = [name for name in (columns.label, *by_column) if name is not None and name in schema.names]
        if columns.label is not None and columns.label not in schema.names and part.split != "test":
            raise AlexprepError(f"{self._shown} has no column {columns.label!r}, as other files have: move it away")
        self._along = _names_along(schema, columns)
        table = self._file.read(wanted)
        count = sum(self._file.group_rows)
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
        self._starts = np.cumsum([0, *self._file.group_rows])

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

    def _names(self) -> list[bytes] | None:
        """The pictures' own names, which a struct may have beside the bytes."""
        column = self._file.names(self._columns.image)
        if column is None or not (pa.types.is_string(column.type) or pa.types.is_large_string(column.type)):
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
    kinds: dict[tuple[str | None, str], None] = {}
    for path in paths:
        folder, name = os.path.split(path)
        split = split_of_file(path)
        parts.append(Part(split, path))
        numbered = of_several(name)
        stem = numbered["stem"] if numbered else re.sub(rb"[-_.]?\d+$", b"", os.path.splitext(name)[0])
        kinds[split, as_text(folder + b"/" + stem)] = None
    check_complete(files, paths)
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


# What a file says of itself.


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


def columns_of(schema: pa.Schema, choices: Choices, shown: str) -> Columns | None:
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
        image = _one_of(found, IMAGE_COLUMNS, "image", "of pictures", shown)
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
    if label is not None and choices.unlabelled:
        raise AlexprepError(
            f"--columns label={label} names labels, and --unlabelled says that there are none: give one of them"
        )
    if label is None and not choices.unlabelled:
        classes = [name for name in schema.names if _class_label(schema, name)]
        label = _one_of(classes, LABEL_FIELDS, "label", "of classes", shown)
    if label is None and not choices.unlabelled:
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
    return _is_bytes(kind) and (said == "Image" if said else name.strip().lower() in IMAGE_COLUMNS)


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
