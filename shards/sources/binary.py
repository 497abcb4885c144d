"""Files of many images of equal size one behind the other, gzipped or not: what CIFAR, MNIST and small NORB have in common."""

from __future__ import annotations

import contextlib
import re
import struct
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from alexprep.shards.errors import AlexprepError
from alexprep.shards.sources.base import SPLITS, Input, Location
from alexprep.shards.sources.files import MAX_INFLATED_BYTES, Files, inflated

_lock = threading.Lock()


class Part(NamedTuple):
    """One file's share of a split.

    Attributes:
        labels: one number a record, any integer dtype, (N,).
        locate: record number → the inputs that it holds.
    """

    labels: NDArray[np.integer]
    locate: Callable[[int], Iterable[Location]]


def in_order(split: str, names: Sequence[str], parts: Sequence[Part]) -> Iterator[Input]:
    """The inputs of a split by class name as bytes, then by part and record. All labels must lie below len(names)."""
    for code in sorted(range(len(names)), key=lambda code: names[code].encode()):
        for part in parts:
            for record in np.flatnonzero(part.labels == code).tolist():
                for location in part.locate(record):
                    yield Input(split, names[code], location)


def numbered(record: int, count: int) -> bytes:
    """A record's number as a member's name, with as many digits as the last one needs: bytes then sort as numbers do.

    >>> numbered(7, 1000)
    b'[007]'
    """
    return b"[%0*d]" % (len(str(count - 1)), record)


def paired(files: Files, name: bytes, pattern: re.Pattern[bytes]) -> dict[bytes, dict[str, dict[bytes, bytes]]]:
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
    entries = [entry.name for entry in files.entries() if not entry.is_folder]
    # First what is named, then unpacked files, then "-" before ".", in which copies of MNIST differ.
    for file in sorted(entries, key=lambda file: (file != name, is_gzipped(file), file)):
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
def listing(files: Files, path: bytes) -> Iterator[None]:
    """Around reads that a listing cannot do without: OSError becomes AlexprepError."""
    try:
        yield
    except OSError as error:
        raise AlexprepError(f"{files.display(path)} cannot be read ({error}): check it, or download it again") from None


def whole(files: Files, path: bytes) -> bytes:
    """A file's content, inflated if gzipped, not kept.

    Raises:
        AlexprepError: it cannot be read or is damaged.
    """
    with listing(files, path):
        return inflated.__wrapped__(files, path)


def beginning(files: Files, path: bytes, size: int) -> tuple[bytes, int]:
    """A file's first `size` bytes, fewer where it ends before, and how many it has; both after inflating.

    Raises:
        AlexprepError: it cannot be read or is damaged.
    """
    if is_gzipped(path):
        content = whole(files, path)
        return content[:size], len(content)
    with listing(files, path):
        length = files.size(path)
        return files.read(path, 0, min(size, length)), length


def record(files: Files, location: Location) -> bytes:
    """The bytes at a location.

    Raises:
        OSError: they cannot be read, or the file is shorter than when it was listed.
    """
    path, _, offset, size = location
    if is_gzipped(path):
        with _lock:  # or several threads would inflate it at once
            content = inflated(files, path)
        data = content[offset : offset + size]
    else:
        data = files.read(path, offset, size)
    if len(data) != size:
        raise OSError(f"{files.display(path)} has changed: it ends within {location}")
    return data


def resident(files: Files, paths: Iterable[bytes]) -> int:
    """Memory that reading records of these files takes: what is inflated stays, and while it grows it is there twice."""
    sizes = [0]
    for path in paths:
        if is_gzipped(path):
            with listing(files, path):
                length = files.size(path)
                # A gzip file ends in the length of what it holds, 32 bits (RFC 1952, 2.3.1).
                tail = files.read(path, max(0, length - 4), min(4, length))
            sizes.append(min(struct.unpack("<I", tail)[0] if len(tail) == 4 else 0, MAX_INFLATED_BYTES))
    return sum(sizes) + max(sizes)
