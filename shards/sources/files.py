"""Reading files below a root, on a local disk or on anything that fsspec opens. Paths are bytes: names need not be text."""

from __future__ import annotations

import contextlib
import functools
import os
import stat
import zlib
from collections.abc import Callable, Hashable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from alexprep.shards.errors import AlexprepError

MAX_FILE_BYTES = 2**30  # no photo is that large; an endless file is
MAX_INFLATED_BYTES = 2**31  # of a gzipped file that is read as a whole: the largest known (EMNIST) has 640 MB


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

    def covers(self, target: str, folder: bytes) -> bool:
        """Whether a file written below `target` (a path or URL) would lie in `folder`."""


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
                return sorted(Entry(e.name, e.is_dir()) for e in found if not e.name.startswith(b"."))
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
                    elif not entry.is_dir():
                        found.append(path)
        yield from sorted(found)

    def size(self, path: bytes) -> int:
        """See `Files`."""
        return os.stat(os.path.join(self.root, path)).st_size

    def read(self, path: bytes, offset: int = 0, size: int = -1) -> bytes:
        """See `Files`."""
        # Non-blocking, since opening a named pipe would wait for ever.
        descriptor = os.open(os.path.join(self.root, path), os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        with open(descriptor, "rb", buffering=0) as file:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise OSError("not a regular file")
            wanted = max(0, status.st_size - offset) if size < 0 else size
            if wanted > MAX_FILE_BYTES:
                raise OSError(f"{wanted:,} bytes are more than the limit of {MAX_FILE_BYTES:,}")
            file.seek(offset)
            parts = []
            while wanted and (part := file.read(wanted)):  # a file that grows meanwhile is read to its old length
                parts.append(part)
                wanted -= len(part)
            return parts[0] if len(parts) == 1 else b"".join(parts)

    @contextlib.contextmanager
    def reading(self, path: bytes) -> Iterator[Callable[[int, int], bytes]]:
        """See `Files`."""
        with open(os.path.join(self.root, path), "rb", buffering=0) as file:
            yield lambda offset, size: os.pread(file.fileno(), size, offset)

    def display(self, path: bytes = b"") -> str:
        """See `Files`."""
        return os.path.join(self.root, path).rstrip(b"/").decode("utf-8", "backslashreplace")

    def covers(self, target: str, folder: bytes) -> bool:
        """See `Files`."""
        if "://" in target:
            return False
        there, here = os.path.realpath(os.fsencode(target)), os.path.realpath(os.path.join(self.root, folder))
        return os.path.commonpath((there, here)) == here


@dataclass(frozen=True)
class RemoteFiles:
    """Files behind a URL that fsspec understands: s3://, gs://, https://, memory://, …

    Attributes:
        url: of the root; empty where every path is a URL of its own.
    """

    url: str
    remote = True

    def entries(self, folder: bytes = b"") -> list[Entry]:
        """See `Files`."""
        system, root = _opened(self._url(folder))
        try:
            listed = system.ls(root, detail=True)
        except (FileNotFoundError, NotADirectoryError):
            return []
        names = ((item["name"].rstrip("/").rpartition("/")[2], item["type"] == "directory") for item in listed)
        here = root.rstrip("/").rpartition("/")[2]
        return sorted(
            Entry(name.encode(), is_folder)
            for name, is_folder in names
            if name and not name.startswith(".") and (is_folder or name != here)
        )

    def walk(self, folder: bytes) -> Iterator[bytes]:
        """See `Files`."""
        system, root = _opened(self._url(folder))
        prefix = root.rstrip("/") + "/"
        below = [path.removeprefix(prefix) for path in system.find(root)]
        visible = (path for path in below if not any(part.startswith(".") for part in path.split("/")))
        yield from sorted(os.path.join(folder, path.encode()) for path in visible)

    def size(self, path: bytes) -> int:
        """See `Files`."""
        system, place = _opened(self._url(path))
        size = system.size(place)
        if size is None:
            raise OSError(f"{self.display(path)}: the server does not tell its size")
        return int(size)

    def read(self, path: bytes, offset: int = 0, size: int = -1) -> bytes:
        """See `Files`."""
        system, place = _opened(self._url(path))
        wanted = self.size(path) - offset if size < 0 else size
        if wanted > MAX_FILE_BYTES:
            raise OSError(f"{wanted:,} bytes are more than the limit of {MAX_FILE_BYTES:,}")
        try:
            data = system.cat_file(place, start=offset or None, end=None if size < 0 else offset + size)
        except OSError:
            raise
        except Exception as error:
            raise OSError(f"{type(error).__name__}: {error}") from error
        return bytes(data)

    @contextlib.contextmanager
    def reading(self, path: bytes) -> Iterator[Callable[[int, int], bytes]]:
        """See `Files`; reads ahead, so that neighbours need one journey."""
        system, place = _opened(self._url(path))
        with system.open(place, "rb", block_size=2**20) as file:

            def read(offset: int, size: int) -> bytes:
                file.seek(offset)
                return bytes(file.read(size))

            yield read

    def display(self, path: bytes = b"") -> str:
        """See `Files`."""
        return self._url(path)

    def covers(self, target: str, folder: bytes) -> bool:
        """See `Files`."""
        return f"{target.rstrip('/')}/".startswith(f"{self._url(folder).rstrip('/')}/")

    def _url(self, path: bytes) -> str:
        text = path.decode("utf-8", "surrogateescape")
        return "/".join(part for part in (self.url.rstrip("/"), text) if part and part != ".")


def _opened(url: str) -> tuple[Any, str]:
    """The file system of a URL, which fsspec keeps for the next call, and the path inside it."""
    import fsspec

    try:
        system, path = fsspec.core.url_to_fs(url)
    except ImportError as error:
        raise AlexprepError(f"{url}: {error}") from None
    except ValueError as error:
        raise AlexprepError(f"{url} is no place that fsspec can open ({error})") from None
    return system, path


def files_at(place: str) -> tuple[Files, bytes]:
    """The files of a path or URL: (files, b"") for a folder, (files of its folder, its name) for a file.

    Raises:
        AlexprepError: there is nothing there.
    """
    if "://" in place:
        system, path = _opened(place)
        if "{" in place.rpartition("/")[2]:  # a brace pattern
            return RemoteFiles(place.rpartition("/")[0]), place.rpartition("/")[2].encode()
        try:
            if system.isdir(path):
                return RemoteFiles(place.rstrip("/")), b""
            found = system.exists(path)
        except Exception as error:  # noqa: BLE001  (each store has its own kinds)
            raise AlexprepError(f"SOURCE {place} cannot be reached ({type(error).__name__}: {error})") from None
        if not found:
            raise AlexprepError(f"SOURCE {place} does not exist")
        folder, _, name = place.rpartition("/")
        return RemoteFiles(folder), name.encode()
    absolute = os.path.abspath(os.fsencode(place))
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
    inflater = zlib.decompressobj(wbits=31)
    try:
        result = inflater.decompress(data, MAX_INFLATED_BYTES)
    except zlib.error as error:
        raise OSError(f"{files.display(path)} is a damaged gzip file ({error})") from None
    if inflater.unconsumed_tail:
        raise OSError(f"{files.display(path)} inflates to more than the limit of {MAX_INFLATED_BYTES:,} bytes")
    if not inflater.eof:
        raise OSError(f"{files.display(path)} is a gzip file that was cut short")
    return result
