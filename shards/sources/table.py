"""A list of images as SOURCE: CSV, TSV, Parquet, lines of JSON or `path label`, with a path and a label for each image.

Here is what the cells mean; how rows are read is in `table_rows`. Pictures inside Parquet are in `parquet_images`, folders with a list in
each in `image_folders`; lists that tell the classes of a flat split beside them, as Kaggle's, in `ground_truth`.
"""

from __future__ import annotations

import itertools
import os
import re
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
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
from alexprep.shards.sources.foreign_formats import IMAGE_FOLDER_LISTS
from alexprep.shards.sources.labels import LabelError, check_range, is_number, label_in, several
from alexprep.shards.sources.table_rows import JSON_LINES, LISTS, TABLES, Row, is_kept, is_list, read_along, read_rows
from alexprep.shards.sources.tree import read_tree
from alexprep.shards.storage import Files, LocalFiles, as_text, is_url, local_path

_BATCH = 65_536  # rows
_KEPT_BYTES = 2**30
_PLACE_BITS = 40  # of a row's number in its list; the list's number is above them
_SPLIT_NAMES = sorted(set(SPLITS.values()))


class ListFile(NamedTuple):
    """One list of a source: where it lies, the folder that its paths begin at, and the split of rows that tell none.

    The split is empty where the folder in a row's path tells it, or nothing, for train.
    """

    name: bytes
    folder: bytes
    split: str


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
    expects = "a file ending in .csv, .tsv (or .csv.gz, .tsv.gz), .parquet or .jsonl with columns such as path and label, or a .txt or .lst of them"

    @classmethod
    def at(cls, files: Files, name: bytes, choices: Choices = NO_CHOICES) -> Source | None:
        """See `Source`: the named file, by its ending; of lists in .txt and .lst also by their first lines."""
        lower = name.lower()
        if not lower.endswith((*TABLES, *JSON_LINES)) and not (lower.endswith(LISTS) and is_list(files, name)):
            return None
        try:
            first = next(read_rows(files, name, choices), None)
        except AlexprepError:  # told when the inputs are listed
            first = None
        if isinstance(files, LocalFiles):
            files = LocalFiles(files.root, remote=bool(first and first.path and is_url(path_in(first.path))))
        return cls(files, name, choices=choices)

    def lists(self) -> Sequence[ListFile]:
        """The lists that are read: the table alone."""
        split = split_of(os.path.splitext(self.table)[0]) or _split_of_folder(self.files, self.table) or "train"
        return (ListFile(self.table, b"", split),)

    def inputs(self, account: Account) -> Iterator[Input]:
        """By split, class and path, as bytes.

        15 million rows need about 2.5 times the bytes of their paths and 60 bytes a row: 3 GB for paths of 60 bytes.
        """
        yield from Rows(self.files, self.lists(), self.choices, account).in_order()

    def metadata(self, location: Location, reference: bytes) -> dict[str, Any]:
        """See `Source`: the row's other cells."""
        number, _, along = reference.partition(b" ")
        return read_along(self.files, self.lists()[int(number)].name, along, self.choices)

    def resident_bytes(self) -> int:
        """Of lists that cannot be read piece by piece."""
        return _KEPT_BYTES if any(is_kept(self.files, some.name) for some in self.lists()) else 0

    def classes(self, present: set[str]) -> list[str]:
        """The numbers from "0" to the highest where all are numbers, otherwise sorted as bytes."""
        if present and all(map(is_number, present)):
            return numbered_classes(present)
        return super().classes(present)


class Rows:
    """The rows of some lists as columns: split and class as codes, in 13 bytes a row beside the path."""

    def __init__(self, files: Files, lists: Sequence[ListFile], choices: Choices, account: Account) -> None:
        """Reads and checks every row; each is counted as found in the `account`, which is told of paths that were completed."""
        self._files, self._lists, self._account = files, lists, account
        self._codes_of: dict[str, int] = {}  # of each label as it is written
        self._names: list[str] = []  # of the classes, by code; several codes may have one
        self._first_rows: list[int] = []  # by code
        self._codes, self._places, self._splits = array("i"), array("q"), array("b")
        self._paths: list[Any] = []
        self._along: list[Any] = []
        self._saw_back_slash = False
        self._pictures: _Pictures | None = None
        paths: list[bytes] = []
        along: list[bytes] = []
        for number, file in enumerate(lists):
            for row in read_rows(files, file.name, choices):
                row = row._replace(place=row.place | number << _PLACE_BITS)
                account.found += 1
                label = (row.label or "").strip()
                if label not in self._codes_of:
                    self._add_label(label, row.place)
                self._codes.append(self._codes_of[label])
                split = self._split_of(row, file)
                self._splits.append(_SPLIT_NAMES.index(split))
                path = self._path(row, file)
                if not self._places:
                    self._pictures = _pictures_meant(files, path, account)
                self._places.append(row.place)
                paths.append(self._pictures.at(path, split, self._where(row.place)) if self._pictures else path)
                along.append(b"%d %s" % (number, row.along) if row.along else b"")
                if len(paths) == _BATCH:
                    self._keep(paths, along)
                    paths, along = [], []
        self._keep(paths, along)
        if not self._codes:
            raise AlexprepError(
                f"{files.display(lists[0].name)} has no row below its header: it needs one for each image, with its path and its label"
            )
        self._check_labels()

    def _keep(self, paths: list[bytes], along: list[bytes]) -> None:
        self._paths.append(pa.array(paths, pa.large_binary()))
        # Without a buffer where nothing goes along.
        self._along.append(pa.array(along, pa.large_binary()) if any(along) else pa.nulls(len(along)))

    def listed(self) -> set[bytes]:
        """All paths; before `in_order`."""
        return {path for paths in self._paths for path in paths.to_pylist()}

    def in_order(self) -> Iterator[Input]:
        """The inputs by split, class and path; a path that occurs twice is an AlexprepError."""
        import pyarrow.compute as pc  # takes as long as ten images, and most sources are asked only whether they are meant

        paths, along = pa.concat_arrays(self._paths), None
        if any(not pa.types.is_null(some.type) for some in self._along):
            along = pa.concat_arrays([some.cast(pa.large_binary()) for some in self._along])
        self._paths.clear()
        self._along.clear()
        by_path = pc.sort_indices(paths)  # stable, and by bytes
        paths, along = paths.take(by_path), None if along is None else along.take(by_path)
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
            rows = pa.array(some)
            metadata = along.take(rows).to_pylist() if along is not None else itertools.repeat(b"", len(some))
            columns = (key[some].tolist(), paths.take(rows).to_pylist(), metadata)
            for where, path, reference in zip(*columns, strict=True):
                split, code = divmod(where, len(names))
                yield Input(_SPLIT_NAMES[split], names[code], Location(path), reference or b"")

    def _where(self, place: int) -> str:
        """A row in words: its list, and the line or row there."""
        name = self._lists[place >> _PLACE_BITS].name
        return f"{self._files.display(name)}, {_unit(name)} {place & (1 << _PLACE_BITS) - 1:,}"

    def _wrong(self, place: int, problem: str) -> AlexprepError:
        return AlexprepError(f"{self._where(place)}: {problem}")

    def _path(self, row: Row, file: ListFile) -> bytes:
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
        return path if path.startswith(b"/") or is_url(path) else os.path.join(file.folder, path)

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

    def _split_of(self, row: Row, file: ListFile) -> str:
        if row.split is None:
            folders = [] if file.split else (row.path or "").encode().split(b"/")[:-1]
            return file.split or next(filter(None, map(split_of, folders)), "train")
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
        places = [self._places[row] for row in (first, second)]
        lists = [self._lists[place >> _PLACE_BITS].name for place in places]
        if lists[0] == lists[1]:
            lines = " and ".join(f"{place & (1 << _PLACE_BITS) - 1:,}" for place in places)
            where = f"{self._files.display(lists[0])}: {_unit(lists[0])}s {lines}"
        else:
            where = " and ".join(map(self._where, places))
        labels = [self._names[self._codes[row]] for row in (first, second)]
        what = "the same label" if labels[0] == labels[1] else f"the labels {labels[0]!r} and {labels[1]!r}"
        if self._splits[first] != self._splits[second]:
            what += " and in two splits"
        return AlexprepError(f"{where} both name {as_text(path)!r}, with {what}: delete one")


def _unit(name: bytes) -> str:
    return "row" if name.lower().endswith(b".parquet") else "line"


def _split_of_folder(files: Files, name: bytes) -> str | None:
    """The split of a hub's image folder, validation/metadata.csv, whose own name tells none."""
    folder = files.display().rpartition("/")[2]
    return SPLITS.get(folder.lower()) if name in IMAGE_FOLDER_LISTS else None


# What cells mean


class _Pictures:
    """The pictures below a list's folder, by their names without folder and ending, where these stand in the list."""

    def __init__(self, paths: list[bytes]) -> None:
        self._by_name: dict[bytes, list[bytes]] = {}
        for path in paths:
            stem, name = os.path.splitext(path)[0], os.path.basename(path)
            for key in {path, stem, name, os.path.splitext(name)[0]}:
                self._by_name.setdefault(key, []).append(path)

    def meant(self, path: bytes) -> list[bytes]:
        """Those that a path of a list may mean."""
        return self._by_name.get(path, [])

    def at(self, path: bytes, split: str, where: str) -> bytes:
        """The one that is meant: of several the one in a folder of the row's split. What is not there stays as it is, to be rejected."""
        found = self.meant(path)
        if len(found) > 1:
            found = [one for one in found if any(split_of(part) == split for part in one.split(b"/")[:-1])] or found
        if len(found) > 1:
            names = " and ".join(map(as_text, found[:2]))
            raise AlexprepError(
                f"{where}: {as_text(path)!r} may be {names}: write the folder and the ending into the list"
            )
        return found[0] if found else path


def _pictures_meant(files: Files, first: bytes, account: Account) -> _Pictures | None:
    """The pictures below the list's folder, where the first path is none but the name of one; None where paths are what they say."""
    if is_url(first) or first.startswith(b"/"):
        return None
    if isinstance(files, LocalFiles):
        if os.path.lexists(os.path.join(files.root, first)):
            return None
    elif os.path.splitext(first)[1]:
        return None  # a store is not listed to see whether a path is right
    pictures = _Pictures([path for path in read_tree(files).root.paths()])
    found = pictures.meant(first)
    if not found:
        return None
    account.warnings.append(
        f"paths in the list have no folder or ending: {as_text(first)!r} is {as_text(found[0])!r}, and so on"
        if len(found) == 1
        else f"paths in the list have no folder or ending: {as_text(first)!r} is one of {len(found)} files, by the row's split"
    )
    return pictures


def path_in(cell: str) -> bytes:
    """Where the cell of a path points, in one spelling: a/./b, a//b and file:///a/b are a/b and /a/b; other URLs as they are."""
    local = local_path(cell)
    if local is None:
        return cell.encode()
    if not re.search(r"(^|/)(\./|/)", local):
        return local.encode()
    parts = [part for part in local.split("/") if part not in ("", ".")]
    return ("/" * local.startswith("/") + "/".join(parts)).encode()
