"""Reading files below a root, on a local disk or on anything that fsspec opens. Paths are bytes: names need not be text."""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import stat
import zlib
from collections.abc import Callable, Hashable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from alexprep.shards.errors import AlexprepError

MAX_FILE_BYTES = 2**30  # no photo is that large; an endless file is
PAUSES = (0.1, 1.0)  # seconds before a read that failed is tried for the second and for the third time
MAX_INFLATED_BYTES = 2**31  # of a gzipped file that is read as a whole: the largest known (EMNIST) has 640 MB
# Bytes of a gzip part that are inflated at once. What lies behind its end is copied each time, so the first step is small.
_FIRST_STEP, _STEP = 1024, 2**20
# What systems answer of a link that leads nowhere or where nobody may look. Others speak of the disk, not of the link.
_OF_THE_LINK = {errno.ELOOP, errno.ENOTDIR, errno.ENAMETOOLONG, errno.EACCES, errno.EPERM}
_LOCAL_SCHEMES = ("file://", "local://")


class Entry(NamedTuple):
    """One name in a folder."""

    name: bytes
    is_folder: bool


class Files(Hashable, Protocol):
    """Where a source's files lie. It is sent to worker processes, so it holds no open file."""

    @property
    def remote(self) -> bool:
        """Whether every read is a journey, so that several should be under way at once."""

    def entries(self, folder: bytes = b"") -> list[Entry]:
        """What is in a folder, ascending by name, links followed, hidden names left out; [] where there is no such folder."""

    def walk(self, folder: bytes) -> Iterator[bytes]:
        """The files below a folder at any depth, ascending, as paths from the root; hidden names are left out."""

    def size(self, path: bytes) -> int:
        """Bytes of a regular file; OSError where there is none."""

    def read(self, path: bytes, offset: int = 0, size: int = -1) -> bytes:
        """`size` bytes from `offset`, or all to the end; OSError where they cannot be had, or are more than the limit."""

    def reading(self, path: bytes) -> AbstractContextManager[Callable[[int, int], bytes]]:
        """A function (offset, size) → bytes, fewer only at the file's end, for many small reads of one file."""

    def display(self, path: bytes = b"") -> str:
        """A path for messages."""

    def below(self, target: str, folder: bytes = b"") -> tuple[bytes, ...] | None:
        """The names that lead from a folder to `target` (a path or URL), links followed; None where it lies elsewhere."""


@dataclass(frozen=True)
class LocalFiles:
    """Files on a disk.

    Attributes:
        root: absolute path, as bytes.
    """

    root: bytes
    remote = False

    def entries(self, folder: bytes = b"") -> list[Entry]:
        """See `Files`."""
        try:
            with os.scandir(os.path.join(self.root, folder)) as found:
                return sorted(Entry(e.name, _is_folder(e)) for e in found if not e.name.startswith(b"."))
        except (FileNotFoundError, NotADirectoryError):
            return []

    def walk(self, folder: bytes) -> Iterator[bytes]:
        """See `Files`; links to folders are not followed, since they may form loops."""
        found: list[bytes] = []
        pending = [folder]
        while pending:
            here = pending.pop()
            with os.scandir(os.path.join(self.root, here)) as entries:
                for entry in entries:
                    if entry.name.startswith(b"."):
                        continue
                    path = os.path.join(here, entry.name)
                    if entry.is_dir(follow_symlinks=False):
                        pending.append(path)
                    elif not _is_folder(entry):
                        found.append(path)
        yield from sorted(found)

    def size(self, path: bytes) -> int:
        """See `Files`."""
        return os.stat(os.path.join(self.root, path)).st_size

    def read(self, path: bytes, offset: int = 0, size: int = -1) -> bytes:
        """See `Files`."""
        # Non-blocking, since opening a named pipe would wait for ever.
        descriptor = os.open(os.path.join(self.root, path), os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise OSError("not a regular file")
            wanted = max(0, status.st_size - offset) if size < 0 else size
            if wanted > MAX_FILE_BYTES:
                raise OSError(f"{wanted:,} bytes are more than the limit of {MAX_FILE_BYTES:,}")
            data = os.pread(descriptor, wanted, offset)
            while 0 < len(data) < wanted and (more := os.pread(descriptor, wanted - len(data), offset + len(data))):
                data += more  # a file that grows meanwhile is read to its old length
            return data
        finally:
            os.close(descriptor)

    @contextlib.contextmanager
    def reading(self, path: bytes) -> Iterator[Callable[[int, int], bytes]]:
        """See `Files`."""
        with open(os.path.join(self.root, path), "rb", buffering=0) as file:
            yield lambda offset, size: os.pread(file.fileno(), size, offset)

    def display(self, path: bytes = b"") -> str:
        """See `Files`."""
        return os.path.join(self.root, path).rstrip(b"/").decode("utf-8", "backslashreplace")

    def below(self, target: str, folder: bytes = b"") -> tuple[bytes, ...] | None:
        """See `Files`."""
        path = local_path(target)
        if path is None:
            return None
        there, here = os.path.realpath(os.fsencode(path)), os.path.realpath(os.path.join(self.root, folder))
        if os.path.commonpath((there, here)) != here:
            return None
        return tuple(part for part in there[len(here) :].split(b"/") if part)


def _is_folder(entry: os.DirEntry[bytes]) -> bool:
    """Whether an entry is a folder or a link to one. A link that leads nowhere is none: whoever reads it learns why."""
    try:
        return entry.is_dir()
    except OSError as error:
        if error.errno in _OF_THE_LINK:
            return False
        raise


def local_path(place: str) -> str | None:
    """A path as it is, the path of a URL of this machine's disks, None for any other URL.

    >>> local_path("a/b"), local_path("file:///a/b"), local_path("s3://a/b")
    ('a/b', '/a/b', None)
    """
    scheme = next((scheme for scheme in _LOCAL_SCHEMES if place.startswith(scheme)), "")
    return None if "://" in place and not scheme else place.removeprefix(scheme)


def files_at(place: str) -> tuple[Files, bytes]:
    """The files of a path or URL: (files, b"") for a folder, (files of its folder, its name) for a file.

    Raises:
        AlexprepError: there is nothing there.
    """
    path = local_path(place)
    if path is None:
        from alexprep.shards.sources.remote import remote_files_at

        return remote_files_at(place)
    absolute = os.path.abspath(os.fsencode(path))
    if b"{" in os.path.basename(absolute) and not os.path.exists(absolute):  # a brace pattern
        folder_bytes, name_bytes = os.path.split(absolute)
        return LocalFiles(os.path.realpath(folder_bytes)), name_bytes
    if os.path.isdir(absolute):
        return LocalFiles(os.path.realpath(absolute)), b""
    if not os.path.exists(absolute):
        raise AlexprepError(f"SOURCE {place} does not exist")
    folder_bytes, name_bytes = os.path.split(absolute)
    return LocalFiles(os.path.realpath(folder_bytes)), name_bytes


@functools.lru_cache(maxsize=4)
def inflated(files: Files, path: bytes) -> bytes:
    """A whole file, decompressed if it is gzipped; kept, since its records are read in any order.

    Raises:
        OSError: it cannot be read, is damaged, or holds more than `MAX_INFLATED_BYTES`.
    """
    data = files.read(path)
    if data[:2] != b"\x1f\x8b":
        return data
    parts: list[bytes] = []
    total, at, view = 0, 0, memoryview(data)
    while at < len(data):  # a gzip file may have several parts, one after the other
        inflater, step = zlib.decompressobj(wbits=31), _FIRST_STEP
        while not inflater.eof:
            if at == len(data):
                raise OSError(f"{files.display(path)} is a gzip file that was cut short")
            try:
                part = inflater.decompress(view[at : at + step], MAX_INFLATED_BYTES + 1 - total)
            except zlib.error as error:
                raise OSError(f"{files.display(path)} is a damaged gzip file ({error})") from None
            total += len(part)
            if total > MAX_INFLATED_BYTES:
                raise OSError(f"{files.display(path)} inflates to more than the limit of {MAX_INFLATED_BYTES:,} bytes")
            parts += [part] if part else []
            at = min(at + step, len(data)) - len(inflater.unused_data)
            step = min(4 * step, _STEP)
    return parts[0] if len(parts) == 1 else b"".join(parts)
