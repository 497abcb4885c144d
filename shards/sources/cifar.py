"""CIFAR-10 and CIFAR-100 in the binary version of https://www.cs.toronto.edu/~kriz/cifar.html, unpacked or as downloaded.

A record is one label byte (CIFAR-100: the coarse label, then the fine one) and 3 × 1,024 bytes: the red, green and blue plane of
32 × 32 pixels, row by row. What it shares with other files of records is in `binary_records`; CIFAR as images in class folders, or
as a tar of them, is no matter of this source.
"""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from alexprep.shards.errors import AlexprepError
from alexprep.shards.sources.base import Input, Location, Source
from alexprep.shards.sources.binary_records import (
    AGAIN,
    RecordFile,
    inflated_bytes,
    inputs_by_class,
    is_gzipped,
    needed,
    read_record,
    read_whole,
    record_name,
)
from alexprep.shards.storage import Files, as_text
from alexprep.shards.tar_format import members, reader_of

_SIDE = 32
_PIXELS = 3 * _SIDE * _SIDE


class _Kind(NamedTuple):
    """A binary version: its folder, the file with its class names, its files by split, and the bound of each label byte."""

    folder: bytes
    names: bytes
    splits: dict[str, tuple[bytes, ...]]
    bounds: tuple[int, ...]


_KINDS = {
    10: _Kind(
        b"cifar-10-batches-bin",
        b"batches.meta.txt",
        {"test": (b"test_batch.bin",), "train": tuple(b"data_batch_%d.bin" % n for n in range(1, 6))},
        (10,),
    ),
    100: _Kind(
        b"cifar-100-binary",
        b"fine_label_names.txt",
        {"test": (b"test.bin",), "train": (b"train.bin",)},
        (20, 100),
    ),
}
_ARCHIVE = re.compile(rb"cifar-(100?)-binary\.(tar|tar\.gz|tgz)")
_OTHER = re.compile(rb"cifar-(100?)-(batches-py|python|batches-mat|matlab)(\.tar|\.tar\.gz|\.tgz)?")
_OTHER_FILES = (  # of the other versions, when SOURCE is their folder
    (10, {b"data_batch_1", b"batches.meta"}),
    (10, {b"data_batch_1.mat", b"batches.meta.mat"}),
    (100, {b"train", b"test", b"meta"}),
    (100, {b"train.mat", b"test.mat", b"meta.mat"}),
)


@dataclass(frozen=True)
class Cifar(Source):
    """One binary version. The classes of CIFAR-100 are its 100 fine ones.

    Attributes:
        count: of classes, 10 or 100.
        folder: of the binary files, below the root.
        archive: the file that holds them; empty where they are unpacked.
    """

    count: int = 10
    folder: bytes = b""
    archive: bytes = b""
    layout = "cifar"
    expects = "cifar-10-binary.tar.gz, cifar-100-binary.tar.gz, or the folder that they unpack to"

    @classmethod
    def at(cls, files: Files, name: bytes) -> Source | None:
        """See `Source`: the binary version that is named, that the root is, or that lies in the root; unpacked before packed.

        Raises:
            AlexprepError: another version of CIFAR, or both CIFAR-10 and CIFAR-100.
        """
        if name:
            _refuse_other(files, name)
            archive = _ARCHIVE.fullmatch(name)
            return cls(files, int(archive[1]), archive=name) if archive else None
        folders, plain = files.folder_names(), files.file_names()
        for count, kind in _KINDS.items():
            if kind.names in plain and any(file in plain for file in kind.splits["train"]):
                return cls(files, count)
        found = {count: cls(files, count, kind.folder) for count, kind in _KINDS.items() if kind.folder in folders}
        for file in plain:
            if archive := _ARCHIVE.fullmatch(file):
                found.setdefault(int(archive[1]), cls(files, int(archive[1]), archive=file))
        if len(found) > 1:
            places = " or ".join(files.display(source.archive or source.folder) for source in found.values())
            raise AlexprepError(f"SOURCE {files.display()} holds both CIFAR-10 and CIFAR-100: name {places} as SOURCE")
        if not found:
            for count, others in _OTHER_FILES:
                if others <= set(plain):
                    _refuse_other(files, b"", count)
            # Beside other folders such a one says little: SOURCE may be class folders.
            if all(entry.startswith(b"cifar-") for entry in (*folders, *plain)):
                for entry in (*folders, *plain):
                    _refuse_other(files, entry)
        return next(iter(found.values()), None)

    def inputs(self) -> Iterator[Input]:
        """By split, class, file and record.

        Raises:
            AlexprepError: a file is missing or damaged (the record is named).
        """
        names, batches = _contents(self)
        for split in _KINDS[self.count].splits:
            files = [RecordFile(batch.labels, batch.locate) for batch in batches if batch.split == split]
            yield from inputs_by_class(split, names, files)

    def read(self, location: Location) -> NDArray[np.uint8]:
        """One image, uint8 (32, 32, 3) RGB."""
        planes = np.frombuffer(read_record(self.files, location), np.uint8)[-_PIXELS:].reshape(3, _SIDE, _SIDE)
        return np.ascontiguousarray(planes.transpose(1, 2, 0))

    def classes(self, present: set[str]) -> list[str]:
        """The names in the set's own order, all of them."""
        return list(_contents(self)[0])

    def resident_bytes(self) -> int:
        """What a gzipped archive holds."""
        return inflated_bytes(self.files, [self.archive] if self.archive else [])


class _Batch(NamedTuple):
    """One file of records: where it is, and its labels."""

    split: str
    file: Location
    record_bytes: int
    labels: NDArray[np.uint8]

    def locate(self, record: int) -> tuple[Location]:
        path, member, offset, _ = self.file
        name = member + record_name(record, len(self.labels))
        return (Location(path, name, offset + record * self.record_bytes, self.record_bytes),)


@functools.lru_cache(maxsize=2)
def _contents(source: Cifar) -> tuple[tuple[str, ...], list[_Batch]]:
    """Class names and batches, without pixels; kept, since a gzipped archive takes seconds."""
    kind = _KINDS[source.count]
    splits = {kind.names: ""} | {name: split for split, batches in kind.splits.items() for name in batches}
    names: tuple[str, ...] = ()
    batches = []
    for name, location, content in _binary_files(source, list(splits)):
        shown = source.files.display(location.path) + (f"/{as_text(location.member)}" if location.member else "")
        if name == kind.names:
            names = _class_names(content, source.count, shown)
        else:
            labels = _labels(content, kind.bounds, shown)
            batches.append(_Batch(splits[name], location, len(kind.bounds) + _PIXELS, labels))
    return names, batches


def _binary_files(source: Cifar, names: list[bytes]) -> Iterator[tuple[bytes, Location, bytes]]:
    """Where each file is and what it holds, in the order of `names`."""
    files, archive = source.files, source.archive
    if not archive:
        present = files.file_names(source.folder)
        for name in names:
            if name not in present:
                raise AlexprepError(
                    f"{files.display(source.folder)} has no {name.decode()}: download and unpack it again"
                )
            path = os.path.join(source.folder, name)
            yield name, Location(path), read_whole(files, path)
        return
    shown = files.display(archive)
    with needed(files, archive):
        if is_gzipped(archive):
            content = read_whole(files, archive)
            read, size = reader_of(content), len(content)
        else:
            read, size = (lambda offset, size: files.read(archive, offset, size)), files.size(archive)
        found: dict[bytes, Location] = {}
        for member in members(read, size, shown):
            name = os.path.basename(member.name)
            if member.kind == "file" and name in names:
                if name in found:
                    raise AlexprepError(f"{shown} holds {name.decode()} twice: {AGAIN}")
                found[name] = Location(archive, member.name, member.offset, member.size)
        for name in names:
            if name not in found:
                raise AlexprepError(f"{shown} has no {name.decode()}: {AGAIN}")
            yield name, found[name], read(found[name].offset, found[name].size)


def _class_names(content: bytes, count: int, shown: str) -> tuple[str, ...]:
    names = tuple(line.strip() for line in content.decode("utf-8", "replace").split("\n") if line.strip())
    if len(set(names)) != count or len(names) != count or "\ufffd" in "".join(names):
        raise AlexprepError(f"{shown} has {len(set(names))} class names in {len(names)} lines, not {count}: {AGAIN}")
    return names


def _labels(content: bytes, bounds: tuple[int, ...], shown: str) -> NDArray[np.uint8]:
    """The last label byte of each record, uint8 (N,)."""
    size = len(bounds) + _PIXELS
    count, rest = divmod(len(content), size)
    if rest or not count:
        raise AlexprepError(
            f"{shown} has {len(content):,} bytes, no multiple of the {size:,} of a record: it ends within record {count:,}; "
            f"{AGAIN}"
        )
    labels = np.frombuffer(content, np.uint8).reshape(count, size)[:, : len(bounds)]
    wrong = np.argwhere(labels >= np.array(bounds, np.uint8))
    if wrong.size:
        row, column = wrong[0]
        raise AlexprepError(
            f"{shown}, record {row:,}: the label {labels[row, column]} is above {bounds[column] - 1}; {AGAIN}"
        )
    return labels[:, -1].copy()


def _refuse_other(files: Files, name: bytes, count: int = 0) -> None:
    """Raises for the Python and Matlab versions."""
    other = _OTHER.fullmatch(name)
    if other or count:
        version = f"cifar-{int(other[1]) if other else count}-binary.tar.gz"
        raise AlexprepError(
            f"SOURCE {files.display(name)} is CIFAR's Python or Matlab version. The former is pickled, and unpickling runs "
            f"whatever code a file holds, so neither is read: download {version}, the binary version, from "
            "https://www.cs.toronto.edu/~kriz/cifar.html and name it as SOURCE"
        )
