"""The files inside tars, listed by one scan of the headers and then read in place; nothing is unpacked."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from alexprep.shards.errors import AlexprepError
from alexprep.shards.sources.base import Location, Source
from alexprep.shards.sources.files import Files
from alexprep.shards.tar_format import members

_NO_FILE = -1  # as an offset: a link or a device, which has no bytes in the archive


class Packed(NamedTuple):
    """A file in an archive: its name there, and where its bytes are."""

    name: bytes
    location: Location


class ArchiveSource(Source):
    """A source whose inputs may lie in archives."""

    def read(self, location: Location) -> bytes | NDArray[np.uint8]:
        """See `Source`."""
        return read_packed(self.files, location)


def read_packed(files: Files, location: Location) -> bytes:
    """The bytes of a member; OSError where it has none, or the archive has become shorter."""
    if location.offset == _NO_FILE:
        raise OSError("a link or special file in an archive")
    data = files.read(location.path, location.offset, location.size)
    if 0 <= location.size != len(data):
        raise OSError("the archive is shorter than it was when it was listed")
    return data


def shown_name(name: bytes) -> bytes:
    """A member's name without what leads elsewhere; empty for a hidden one.

    Where it would lead to if it were unpacked does not matter here: "../x" and "/x" are x.

    >>> shown_name(b"./train//../a/1.jpg"), shown_name(b"train/.DS_Store"), shown_name(b"./")
    (b'train/a/1.jpg', b'', b'')
    """
    parts = [part for part in name.split(b"/") if part not in (b"", b".", b"..")]
    return b"" if any(part.startswith(b".") for part in parts) else b"/".join(parts)


def packed_files(files: Files, path: bytes, within: Location | None = None, prefix: bytes = b"") -> Iterator[Packed]:
    """Every member that is no folder and has no hidden name, in the archive's order.

    Args:
        files: where the archive lies.
        path: the archive.
        within: the part of the file that is the archive, where it lies in another one.
        prefix: put before the names in the locations.

    Raises:
        AlexprepError: the archive is damaged; the place is named.
    """
    start, size = (0, files.size(path)) if within is None else (within.offset, within.size)
    name = files.display(path) + (f"/{within.member.decode('utf-8', 'backslashreplace')}" if within else "")
    with files.reading(path) as read:
        for member in members(read, size, name, start):
            clean = shown_name(member.name)
            if member.kind == "folder" or not clean:
                continue
            offset, length = (member.offset, member.size) if member.kind == "file" else (_NO_FILE, 0)
            yield Packed(clean, Location(path, prefix + clean, offset, length))


def each_once(files: Files, packed: Iterable[Packed]) -> Iterator[Packed]:
    """The same members. Of two with one name, programs that unpack keep the last and others read both: so none is taken.

    Raises:
        AlexprepError: a name occurs twice, also where one is written ./a and the other a; archive and member are named.
    """
    seen: set[bytes] = set()
    for file in packed:
        if file.name in seen:
            where = (
                f"{files.display(file.location.path)} holds {file.location.member.decode('utf-8', 'backslashreplace')}"
            )
            raise AlexprepError(
                f"{where} twice, which programs read differently: pack the archive anew, with each file once"
            )
        seen.add(file.name)
        yield file
