"""Files of many images of equal size one behind the other, gzipped or not: what CIFAR, MNIST and small NORB share.

The formats themselves are told in `cifar`, `mnist` and `norb`.
"""

from __future__ import annotations

import contextlib
import functools
import re
import struct
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import numpy as np
from numpy.typing import NDArray

from alexprep.shards.errors import AlexprepError
from alexprep.shards.sources.base import SPLITS, Input, Location, Source
from alexprep.shards.storage import MAX_INFLATED_BYTES, Files, inflate, read_inflated

AGAIN = "download it again"
_inflating = threading.Lock()


class RecordFile(NamedTuple):
    """One file's share of a split.

    Attributes:
        labels: one number a record, any integer dtype, (N,).
        locate: record number → the inputs that it holds.
    """

    labels: NDArray[np.integer]
    locate: Callable[[int], Iterable[Location]]


def inputs_by_class(split: str, names: Sequence[str], record_files: Sequence[RecordFile]) -> Iterator[Input]:
    """The inputs of a split by class name as bytes, then by file and record. All labels must lie below len(names)."""
    for code in sorted(range(len(names)), key=lambda code: names[code].encode()):
        for file in record_files:
            for record in np.flatnonzero(file.labels == code).tolist():
                for location in file.locate(record):
                    yield Input(split, names[code], location)


def record_name(record: int, count: int) -> bytes:
    """A record's number as a member's name, with as many digits as the last one needs: bytes then sort as numbers do.

    >>> record_name(7, 1000)
    b'[007]'
    """
    return b"[%0*d]" % (len(str(count - 1)), record)


@dataclass(frozen=True)
class PairedFiles(Source):
    """Grey images in one file and their labels in another, for each split; the base of such sources.

    Attributes:
        pairs: (split, images file, labels file) in ascending order of the split.
        header_bytes: before the first image.
        images_per_record: of one label.
        numbering: the class names by label.
    """

    pairs: tuple[tuple[str, bytes, bytes], ...] = ()
    header_bytes: ClassVar[int]
    images_per_record: ClassVar[int] = 1
    numbering: ClassVar[Sequence[str]]

    def dimensions(self, images: bytes, head: bytes) -> tuple[int, int, int]:
        """How many records there are, and the images' height and width, by the first bytes of an images file."""
        raise NotImplementedError

    def labels(self, path: bytes) -> NDArray[np.integer]:
        """The labels in a labels file, (records,), all below len(numbering)."""
        raise NotImplementedError

    def locations(self, images: bytes, count: int, area: int, record: int) -> Iterable[Location]:
        """Where the images of a record are, of `count` records with images of `area` pixels."""
        return (Location(images, record_name(record, count), self.header_bytes + record * area, area),)

    def inputs(self) -> Iterator[Input]:
        """By split, class (as text: "10" before "2"), and place in the file.

        Raises:
            AlexprepError: a file is of another kind than its name tells, its length or count is wrong, or a label unknown.
        """
        for split, images, labels_file in self.pairs:
            head, length = read_beginning(self.files, images, self.header_bytes)
            count, height, width = self.dimensions(images, head)
            area, shown = height * width, self.files.display(images)
            check_length(shown, length, self.header_bytes, count, self.images_per_record * area)
            labels = self.labels(labels_file)
            if len(labels) != count:
                raise AlexprepError(
                    f"{shown} holds {count:,} records, {self.files.display(labels_file)} {len(labels):,} labels: they are "
                    f"not a pair; {AGAIN}"
                )
            locate = functools.partial(self.locations, images, count, area)
            yield from inputs_by_class(split, self.numbering, [RecordFile(labels, locate)])

    def read(self, location: Location) -> NDArray[np.uint8]:
        """One image, uint8 (H, W)."""
        height, width = _image_size(self, location.path)
        return np.frombuffer(read_record(self.files, location), np.uint8).reshape(height, width)

    def resident_bytes(self) -> int:
        """What gzipped image files hold."""
        return inflated_bytes(self.files, [images for _, images, _ in self.pairs])


@functools.lru_cache(maxsize=8)
def _image_size(source: PairedFiles, images: bytes) -> tuple[int, int]:
    """Height and width; kept, or every image would cost a second read."""
    head = read_record(source.files, Location(images, b"", 0, source.header_bytes))
    _, height, width = source.dimensions(images, head)
    return height, width


def check_length(shown: str, length: int, header_bytes: int, count: int, record_bytes: int) -> None:
    """Raises AlexprepError where a file has not the length that its header tells."""
    if length != header_bytes + count * record_bytes:
        raise AlexprepError(
            f"{shown} has {length:,} bytes; with the {count:,} records of {record_bytes:,} bytes that it states it would "
            f"have {header_bytes + count * record_bytes:,}: {AGAIN}"
        )


def find_sets(files: Files, name: bytes, pattern: re.Pattern[bytes]) -> dict[bytes, dict[str, dict[bytes, bytes]]]:
    """The files in the root whose names match, as {set: {split: {kind: file}}}; those of one set where `name` is given.

    Args:
        files: where to look.
        name: a file of the set that is meant, or empty.
        pattern: with the groups "set", "split" and "kind". A file that is there unpacked too is not read gzipped.

    Raises:
        AlexprepError: two files of a set stand for one split and kind.
    """
    found: dict[bytes, dict[str, dict[bytes, bytes]]] = {}
    words: dict[tuple[bytes, str], bytes] = {}
    chosen = pattern.fullmatch(name)
    # First what is named, then unpacked files, then "-" before ".", in which copies of MNIST differ.
    for file in sorted(files.file_names(), key=lambda file: (file != name, is_gzipped(file), file)):
        match = pattern.fullmatch(file)
        if match is None or (chosen and match["set"] != chosen["set"]):
            continue
        word = match["split"].lower()
        split = (SPLITS | {"t10k": "test", "testing": "test"})[word.decode()]
        if words.setdefault((match["set"], split), word) != word:
            other = words[match["set"], split].decode()
            raise AlexprepError(
                f"SOURCE {files.display()} holds files named {word.decode()} and {other}, which both mean {split!r}: "
                "move one of them away"
            )
        found.setdefault(match["set"], {}).setdefault(split, {}).setdefault(match["kind"].lower(), file)
    return found


def is_gzipped(path: bytes) -> bool:
    """Whether a file is read by inflating it, by its name."""
    return path.lower().endswith((b".gz", b".tgz"))


@contextlib.contextmanager
def needed(files: Files, path: bytes) -> Iterator[None]:
    """Around reads that a listing cannot do without: OSError becomes AlexprepError."""
    try:
        yield
    except OSError as error:
        raise AlexprepError(f"{files.display(path)} cannot be read ({error}): check it, or download it again") from None


def read_whole(files: Files, path: bytes) -> bytes:
    """A file's content, inflated if gzipped, not kept.

    Raises:
        AlexprepError: it cannot be read or is damaged.
    """
    with needed(files, path):
        return inflate(files.read(path), files.display(path))


def read_beginning(files: Files, path: bytes, size: int) -> tuple[bytes, int]:
    """A file's first `size` bytes, fewer where it ends before, and how many it has; both after inflating.

    Raises:
        AlexprepError: it cannot be read or is damaged.
    """
    if is_gzipped(path):
        content = read_whole(files, path)
        return content[:size], len(content)
    with needed(files, path):
        length = files.size(path)
        return files.read(path, 0, min(size, length)), length


def read_record(files: Files, location: Location) -> bytes:
    """The bytes at a location.

    Raises:
        OSError: they cannot be read, or the file is shorter than when it was listed.
    """
    path, _, offset, size = location
    if is_gzipped(path):
        with _inflating:  # or several threads would inflate it at once
            content = read_inflated(files, path)
        data = content[offset : offset + size]
    else:
        data = files.read(path, offset, size)
    if len(data) != size:
        raise OSError(f"{files.display(path)} has changed: it ends within {location}")
    return data


def inflated_bytes(files: Files, paths: Iterable[bytes]) -> int:
    """Memory that reading records of these files takes: what is inflated stays, and while it grows it is there twice."""
    sizes = [0]
    for path in filter(is_gzipped, paths):
        with needed(files, path):
            length = files.size(path)
            # A gzip file ends in the length of what it holds, 32 bits (RFC 1952, 2.3.1).
            tail = files.read(path, max(0, length - 4), min(4, length))
        sizes.append(min(struct.unpack("<I", tail)[0] if len(tail) == 4 else 0, MAX_INFLATED_BYTES))
    return sum(sizes) + max(sizes)
