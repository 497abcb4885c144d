"""A list of images as SOURCE: CSV, TSV (both also gzipped) or Parquet, with a column of paths and one of labels."""

from __future__ import annotations

import os
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from alexprep.shards.errors import AlexprepError
from alexprep.shards.sources.base import SPLITS, Input, Location, Source, numbered_classes, split_of
from alexprep.shards.sources.cells import NUMBER, label_problem, located, several
from alexprep.shards.sources.files import Files, LocalFiles
from alexprep.shards.sources.remote import RemoteFiles, is_url
from alexprep.shards.sources.rows import Row, read_rows

MAX_LABEL = 10**6  # far above what sets have (Google Landmarks v2: 203,094 classes); each number up to it takes a class

_BATCH = 65_536
_SPLIT_NAMES = sorted(set(SPLITS.values()))


@dataclass(frozen=True)
class LocalOrRemote(LocalFiles):
    """A disk, for a table whose rows may be URLs.

    Attributes:
        remote: whether they are, as the first one tells: several reads are to be under way at once.
    """

    remote: bool = False

    def size(self, path: bytes) -> int:
        """See `Files`."""
        return RemoteFiles("").size(path) if is_url(path) else super().size(path)

    def read(self, path: bytes, offset: int = 0, size: int = -1) -> bytes:
        """See `Files`."""
        return RemoteFiles("").read(path, offset, size) if is_url(path) else super().read(path, offset, size)

    def display(self, path: bytes = b"") -> str:
        """See `Files`."""
        return RemoteFiles("").display(path) if is_url(path) else super().display(path)


@dataclass(frozen=True)
class Table(Source):
    """Rows of path and label. Paths are relative to the table's folder, absolute, or URLs that fsspec understands.

    The split is that of the row where there is such a column, otherwise the one that the table's name tells (val.csv),
    otherwise "train". If every label is a whole number, it is the label itself and the classes are named "0" to the highest;
    otherwise labels are the names of classes. A row has one label. Several are refused: a cell with "|" or ";", a cell in
    square brackets, several whole numbers, and a cell with commas all of whose parts are labels of other rows. (A comma or a
    space alone says nothing: "tench, Tinca tinca" is one class.)

    Attributes:
        table: the table's name in the root.
    """

    table: bytes = b""
    layout = "table"
    expects = "a file ending in .csv, .tsv (or .csv.gz, .tsv.gz) or .parquet, with columns such as path and label"

    @classmethod
    def at(cls, files: Files, name: bytes) -> Table | None:
        """The named file, by its ending."""
        if not name.lower().endswith((b".csv", b".tsv", b".csv.gz", b".tsv.gz", b".parquet")):
            return None
        try:
            first = next(read_rows(files, name)[1], None)
        except AlexprepError:  # told when the inputs are listed
            first = None
        if isinstance(files, LocalFiles):
            files = LocalOrRemote(files.root, bool(first and first.path and is_url(located(first.path))))
        return cls(files, name)

    def inputs(self) -> Iterator[Input]:
        """By split, class and path, as bytes.

        15 million rows need about 2.5 times the bytes of their paths and 60 bytes a row: 3 GB for paths of 60 bytes.

        Raises:
            AlexprepError: a cell is missing or makes no sense, or a path occurs twice; the line is named.
        """
        listed = _Listed(self.files, self.table)
        listed.read()
        if not len(listed):
            raise AlexprepError(
                f"{self.files.display(self.table)} has no row below its header: it needs one for each image, with its path and "
                "its label"
            )
        yield from listed.in_order()

    def classes(self, present: set[str]) -> list[str]:
        """The numbers from "0" to the highest where all are numbers, otherwise sorted as bytes."""
        if present and all(map(NUMBER.fullmatch, present)):
            return numbered_classes(present)
        return super().classes(present)


class _Listed:
    """A table's rows as columns: split and class as codes, in 9 bytes a row beside the path and the line."""

    def __init__(self, files: Files, name: bytes) -> None:
        self._files, self._shown = files, files.display(name)
        self._text = not name.lower().endswith(b".parquet")
        self._has_splits, self._rows = read_rows(files, name)
        self._split = split_of(os.path.splitext(name)[0]) or "train"
        self._classes: dict[str, int] = {}
        self._first_rows: list[int] = []  # of each class
        self._codes, self._places, self._splits = array("i"), array("q"), array("b")
        self._paths: list[Any] = []

    def read(self) -> None:
        """Reads and checks every row."""
        split_codes: dict[str | None, int] = {}
        codes: dict[str | None, int] = {}  # by the cell as it stands
        paths: list[bytes] = []
        for row in self._rows:
            code = codes.get(row.label)
            if code is None:
                code = codes[row.label] = self._code(row)
            split = split_codes.get(row.split)
            if split is None:
                split = split_codes[row.split] = _SPLIT_NAMES.index(self._split_of(row))
            self._codes.append(code)
            self._splits.append(split)
            self._places.append(row.place)
            paths.append(self._path(row))
            if len(paths) == _BATCH:
                self._paths.append(pa.array(paths, pa.large_binary()))
                paths = []
        self._paths.append(pa.array(paths, pa.large_binary()))
        self._check_labels()

    def in_order(self) -> Iterator[Input]:
        """The inputs by split, class and path.

        Raises:
            AlexprepError: a path occurs twice.
        """
        paths = pa.concat_arrays(self._paths)
        self._paths.clear()
        by_path = pc.sort_indices(paths)  # stable, and by bytes
        paths = paths.take(by_path)
        order: NDArray[np.int64] = by_path.to_numpy().astype(np.int64)
        if len(paths) > 1 and (same := pc.index(pc.equal(paths[:-1], paths[1:]), True).as_py()) >= 0:
            self._fail_twice(paths[same].as_py(), int(order[same]), int(order[same + 1]))
        names = sorted(self._classes, key=str.encode)
        rank = np.empty(len(names), np.int64)
        rank[[self._classes[name] for name in names]] = np.arange(len(names))
        key = np.frombuffer(self._splits, np.int8).astype(np.int64) * len(names)
        key += rank[np.frombuffer(self._codes, np.int32)]
        key = key[order]
        order = np.argsort(key, kind="stable")
        for start in range(0, len(order), _BATCH):
            some = order[start : start + _BATCH]
            for where, path in zip(key[some].tolist(), paths.take(pa.array(some)).to_pylist(), strict=True):
                split, code = divmod(where, len(names))
                yield Input(_SPLIT_NAMES[split], names[code], Location(path))

    def __len__(self) -> int:
        return len(self._codes)

    def _at(self, place: int) -> str:
        return f"{self._shown}, {'line' if self._text else 'row'} {place:,}"

    def _path(self, row: Row) -> bytes:
        if not row.path:
            raise AlexprepError(f"{self._at(row.place)}: the path is missing: fill it in, or delete the row")
        if "\0" in row.path:
            raise AlexprepError(f"{self._at(row.place)}: the path {row.path!r} holds a NUL, which no path can")
        path = located(row.path)
        if path.startswith(b"/") and not isinstance(self._files, LocalFiles):
            raise AlexprepError(
                f"{self._at(row.place)}: the path {row.path!r} is absolute, but the table lies at a URL: make it relative to "
                "the table, or a URL"
            )
        return path

    def _split_of(self, row: Row) -> str:
        if not self._has_splits:
            return self._split
        split = SPLITS.get((row.split or "").strip().lower())
        if split is None:
            raise AlexprepError(
                f"{self._at(row.place)}: the split {row.split or ''!r} is not one of {', '.join(SPLITS)}: change it, or rename "
                "the column if it is none of splits"
            )
        return split

    def _code(self, row: Row) -> int:
        """The code of a label that has not been seen before."""
        label = (row.label or "").strip()
        problem = label_problem(label)
        if problem:
            raise AlexprepError(f"{self._at(row.place)}: {problem}")
        if label not in self._classes:
            self._classes[label] = len(self._classes)
            self._first_rows.append(row.place)
        return self._classes[label]

    def _check_labels(self) -> None:
        """What can only be said of all labels together."""
        if self._classes and all(map(NUMBER.fullmatch, self._classes)):
            highest = max(self._classes, key=int)
            if int(highest) > MAX_LABEL:
                raise AlexprepError(
                    f"{self._at(self._first_rows[self._classes[highest]])}: the label {highest} is above {MAX_LABEL:,}: number "
                    "the classes from 0, or give them names"
                )
        for label, code in self._classes.items():
            parts = [part.strip() for part in label.split(",")]
            if len(parts) > 1 and all(part in self._classes for part in parts):
                raise AlexprepError(f"{self._at(self._first_rows[code])}: {several(label)}")

    def _fail_twice(self, path: bytes, first: int, second: int) -> None:
        lines = f"{'lines' if self._text else 'rows'} {self._places[first]:,} and {self._places[second]:,}"
        names = list(self._classes)
        labels = [names[self._codes[row]] for row in (first, second)]
        what = "the same label" if labels[0] == labels[1] else f"the labels {labels[0]!r} and {labels[1]!r}"
        if self._splits[first] != self._splits[second]:
            what += " and in two splits"
        shown = path.decode("utf-8", "backslashreplace")
        raise AlexprepError(f"{self._shown}: {lines} both name {shown!r}, with {what}: delete one")
