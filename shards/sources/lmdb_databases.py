"""LMDB databases with pictures: Caffe's, whose values are messages of its Datum, and those of encoded pictures under their names.

SOURCE is data.mdb, the folder that holds it, or one with a folder of such for each split (ilsvrc12_train_lmdb, ilsvrc12_val_lmdb). They are read
by liblmdb, which maps the file and trusts it: a database from a stranger is better exported by him. Datum's fields are those of
caffe.proto; raw pixels lie there by channel and in the order blue, green, red, as OpenCV, with which Caffe reads pictures, has them.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from alexprep.shards.errors import AlexprepError
from alexprep.shards.sources.base import (
    NO_CHOICES,
    UNLABELLED,
    Account,
    Choices,
    Input,
    Location,
    Source,
    not_installed,
    numbered_classes,
    split_of,
)
from alexprep.shards.sources.foreign_formats import is_lmdb
from alexprep.shards.sources.labels import MAX_LABEL
from alexprep.shards.sources.numbered_files import SplitFiles
from alexprep.shards.sources.picture_names import is_picture
from alexprep.shards.sources.protobuf_wire import LENGTH, VARINT, WireError, fields, varint
from alexprep.shards.sources.table_rows import LISTS, TABLES, read_rows
from alexprep.shards.storage import Files, LocalFiles, as_text

_DATA, _LOCK = b"data.mdb", b"lock.mdb"
_ENDINGS = (b".mdb", b".lmdb")
_CHANNELS, _HEIGHT, _WIDTH, _BYTES, _LABEL, _FLOATS, _ENCODED = range(1, 8)  # fields of Datum


class Datum(NamedTuple):
    """What a message of Caffe's Datum holds: shape, label and encoding, and where its bytes are."""

    shape: tuple[int, int, int]
    label: int | None
    encoded: bool
    begin: int
    end: int


@dataclass(frozen=True)
class LmdbDatabases(SplitFiles):
    """Values under keys, in the order of the keys.

    Attributes:
        lists: the lists beside the databases that tell the labels of plain keys.
    """

    parts: tuple[tuple[str, bytes], ...] = ()
    lists: tuple[bytes, ...] = ()
    layout = "lmdb"
    expects = "data.mdb with Caffe's Datum or encoded pictures, in SOURCE or in a folder a split (train_lmdb, val_lmdb)"

    @classmethod
    def at(cls, files: Files, name: bytes, choices: Choices = NO_CHOICES) -> Source | None:
        """See `Source`: the file that is named, data.mdb in the root, or those in its folders whose names mean splits."""
        if name:
            paths = [name] if name.lower().endswith(_ENDINGS) else []
        else:
            paths = [_DATA] if _DATA in files.file_names() else []
            paths = paths or [
                path for folder in files.folder_names() if split_of(folder) and (path := _database_in(files, folder))
            ]
        if not paths or not all(is_lmdb(files, path) for path in paths):
            return None
        if not isinstance(files, LocalFiles):
            raise AlexprepError(
                f"{files.display(paths[0])} is an LMDB database, which is read from a disk alone: copy it to one"
            )
        above = files.display().rpartition("/")[2].encode()
        databases = sorted((split_of(path) or split_of(above) or "train", path) for path in paths)
        if len({split for split, _ in databases}) < len(databases):
            raise AlexprepError(f"SOURCE {files.display()} holds several databases of one split: name one as SOURCE")
        listed = tuple(
            file for file in files.file_names() if file.lower().endswith((*TABLES, *LISTS)) and not choices.unlabelled
        )
        return cls(files, tuple(databases), listed, choices=choices, whole=not name)

    def inputs(self, account: Account) -> Iterator[Input]:
        """By split and key. A value's label is Datum's own; of a plain picture its key's folder or a list beside tells the class."""
        _close_all()  # a file may have changed since
        known: dict[bytes, str] | None = None
        for split, path in self.parts:
            shown = self.files.display(path)
            with _kept(self._place(path), shown).begin(buffers=True) as transaction:
                for key, value in transaction.cursor():
                    account.found += 1
                    member, datum = bytes(key), datum_in(value)
                    if self.choices.unlabelled:
                        class_name = UNLABELLED
                    elif datum is not None:
                        class_name = _number(datum, f"{shown}, key {as_text(member)!r}")
                    else:
                        known = self._listed() if known is None else known
                        class_name = _class_of(member, known, shown)
                    yield Input(split, class_name, Location(path, member, 0, 0))
        self.pass_over_others(account, self.lists)

    def read(self, location: Location) -> bytes | NDArray[np.uint8]:
        """The bytes of a picture, or the pixels of a Datum that is not encoded; OSError where there is none."""
        environment = _kept(self._place(location.path), self.files.display(location.path))
        with environment.begin() as transaction:
            value = transaction.get(location.member)
        if value is None:
            raise OSError("the database has no such key any more")
        datum = datum_in(memoryview(value))
        if datum is None:
            return bytes(value)
        data = value[datum.begin : datum.end]
        if datum.encoded:
            return bytes(data)
        if len(data) != np.prod(datum.shape) or datum.shape[0] not in (1, 3) or not data:
            raise OSError(
                f"{len(data):,} bytes are no pixels of {' x '.join(map(str, datum.shape))} (channels, height, width)"
            )
        pixels: NDArray[np.uint8] = np.frombuffer(data, np.uint8).reshape(datum.shape)
        return pixels[0] if len(pixels) == 1 else np.ascontiguousarray(pixels[::-1].transpose(1, 2, 0))

    def classes(self, present: set[str]) -> list[str]:
        """The numbers from "0" to the highest where all are numbers, otherwise sorted as bytes."""
        if present and all(name.isascii() and name.isdigit() for name in present):
            return numbered_classes(present)
        return super().classes(present)

    def _place(self, path: bytes) -> bytes:
        assert isinstance(self.files, LocalFiles)
        return os.path.join(self.files.root, path)

    def _listed(self) -> dict[bytes, str]:
        """The labels of keys that the lists beside the databases tell."""
        known: dict[bytes, str] = {}
        for name in self.lists:
            for row in read_rows(self.files, name, self.choices):
                known[(row.path or "").encode()] = (row.label or "").strip()
        return known


def _database_in(files: Files, folder: bytes) -> bytes | None:
    """The database in a folder, which another program may have given another name."""
    names = [name for name in files.file_names(folder) if name.lower().endswith(_ENDINGS) and name != _LOCK]
    return os.path.join(folder, names[0]) if len(names) == 1 else None


def _opened(place: bytes, shown: str) -> Any:
    """The database at a path, which must be as long as it says that it is: liblmdb would read beyond the end of a shorter one."""
    try:
        import lmdb
    except ImportError as error:
        raise not_installed("an LMDB database", error) from None
    try:
        environment = lmdb.open(
            os.fsdecode(place), subdir=False, readonly=True, lock=False, readahead=False, create=False
        )
        wanted = (environment.info()["last_pgno"] + 1) * environment.stat()["psize"]
    except lmdb.Error as error:
        raise AlexprepError(f"{shown} is no LMDB database, or is damaged ({error}): get it again") from None
    if os.path.getsize(place) < wanted:
        environment.close()
        raise AlexprepError(
            f"{shown} has {os.path.getsize(place):,} bytes of {wanted:,}: it was cut short, get it again"
        )
    return environment


_environments: dict[bytes, Any] = {}  # that are open in this process, where none may be opened twice


def _kept(place: bytes, shown: str) -> Any:
    """The database at a path, which stays open."""
    if place not in _environments:
        _environments[place] = _opened(place, shown)
    return _environments[place]


def _close_all() -> None:
    while _environments:
        _environments.popitem()[1].close()


def datum_in(value: memoryview) -> Datum | None:
    """A value as a Datum; None where it is none."""

    def get(at: int, size: int) -> bytes:
        return bytes(value[at : at + size])

    numbers: dict[int, int] = {}
    begin = end = 0
    try:
        for number, kind, at, to in fields(get, 0, len(value)):
            if kind == VARINT and number in (_CHANNELS, _HEIGHT, _WIDTH, _LABEL, _ENCODED):
                numbers[number] = varint(get, at, to)[0]
            elif kind == LENGTH and number == _BYTES:
                begin, end = at, to
            elif number != _FLOATS:
                return None
    except WireError:
        return None
    if not numbers and not end:
        return None
    shape = (numbers.get(_CHANNELS, 0), numbers.get(_HEIGHT, 0), numbers.get(_WIDTH, 0))
    return Datum(shape, numbers.get(_LABEL), bool(numbers.get(_ENCODED)), begin, end)


def _number(datum: Datum, where: str) -> str:
    label = datum.label or 0  # protobuf leaves out what has its default
    if label > MAX_LABEL:  # also those below 0, which are written as 64 bits
        raise AlexprepError(f"{where}: the label {label} is not between 0 and {MAX_LABEL:,}: make the database again")
    return str(label)


def _class_of(key: bytes, known: dict[bytes, str], shown: str) -> str:
    """The class of a plain picture: as a list beside the database says, or the name of its key's folder."""
    if label := known.get(key):
        return label
    folder = os.path.basename(os.path.dirname(key))
    if known or not folder or not is_picture(key):
        raise AlexprepError(
            f"{shown}: nothing tells the class of the key {as_text(key)!r}: put a list of `key label` into SOURCE (a .txt or .csv), or say --unlabelled"
        )
    return as_text(folder)
