"""Files behind a URL, through fsspec."""

from __future__ import annotations

import contextlib
import errno
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

from alexprep.shards.errors import AlexprepError
from alexprep.shards.sources.files import MAX_FILE_BYTES, PAUSES, Entry

_AHEAD = 2**20  # bytes that are read at once where many small reads are to come
_ABSENT = (404, 410)  # HTTP: not found, gone
_Answer = TypeVar("_Answer")


@dataclass(frozen=True)
class RemoteFiles:
    """Files behind a URL that fsspec understands: s3://, gs://, https://, memory://, …

    Attributes:
        url: of the root; empty where every path is a URL of its own.
    """

    url: str
    remote = True

    def entries(self, folder: bytes = b"") -> list[Entry]:
        """See `Files`.

        Raises:
            AlexprepError: the store cannot be reached, or refuses to list the folder.
        """
        try:
            return self._listed(folder)
        except (FileNotFoundError, NotADirectoryError):
            return []

    def walk(self, folder: bytes) -> Iterator[bytes]:
        """See `Files`. fsspec's own walk leaves out what it fails to list.

        Raises:
            AlexprepError: the store cannot be reached, or a folder cannot be listed.
        """
        found: list[bytes] = []
        pending = [folder]
        while pending:
            here = pending.pop()
            try:
                listed = self._listed(here)
            except (FileNotFoundError, NotADirectoryError) as error:
                raise self._unreadable(here, error, "listed") from error
            for name, is_folder in listed:
                (pending if is_folder else found).append(os.path.join(here, name))
        yield from sorted(found)

    def _listed(self, folder: bytes) -> list[Entry]:
        """As `entries`; FileNotFoundError or NotADirectoryError where there is no such folder."""
        system, root = _opened(self._url(folder))
        listed = self._patiently(lambda: system.ls(root, detail=True), folder, "listed")
        own = root.rstrip("/")  # which some stores list as if it were inside itself
        paths = ((item["name"].rstrip("/"), item["type"] == "directory") for item in listed)
        names = ((path.rpartition("/")[2], is_folder) for path, is_folder in paths if path != own)
        return sorted(Entry(name.encode(), is_folder) for name, is_folder in names if name and not name.startswith("."))

    def size(self, path: bytes) -> int:
        """See `Files`.

        Raises:
            AlexprepError: the store cannot be reached, or does not tell it.
        """
        system, place = _opened(self._url(path))
        size = self._patiently(lambda: system.size(place), path, "read")
        if size is None:
            raise AlexprepError(
                f"{self.display(path)}: the server does not tell its size, without which it cannot be read in parts: copy "
                "it to a disk"
            )
        return int(size)

    def read(self, path: bytes, offset: int = 0, size: int = -1) -> bytes:
        """See `Files`; errno ECOMM where the way to the file failed, not the file.

        Raises:
            AlexprepError: the server sends whole files where parts are asked for.
        """
        system, place = _opened(self._url(path))
        _check_limit(size)
        if size == 0:
            return b""
        end = None if size < 0 else offset + size
        data = bytes(_asked(lambda: system.cat_file(place, offset or None, end), self.display(path)))
        _check_limit(len(data))
        if 0 < size < len(data):
            raise self._without_ranges(path)
        return data

    @contextlib.contextmanager
    def reading(self, path: bytes) -> Iterator[Callable[[int, int], bytes]]:
        """See `Files`; reads ahead, so that neighbours need one journey.

        Raises:
            AlexprepError: the store cannot be reached, or sends whole files where parts are asked for.
        """
        system, place = _opened(self._url(path))
        with self._patiently(lambda: system.open(place, "rb", block_size=_AHEAD), path, "read") as file:
            # A stream, which fsspec opens where the server says that it has no ranges.
            if getattr(file, "size", 0) is None:
                raise self._without_ranges(path)

            def take(offset: int, size: int) -> bytes:
                file.seek(offset)
                try:
                    return bytes(file.read(size))
                except ValueError as error:
                    if "range requests" in str(error):  # fsspec has asked for one, and got the whole file
                        raise self._without_ranges(path) from error
                    raise

            yield lambda offset, size: self._patiently(lambda: take(offset, size), path, "read")

    def _patiently(self, ask: Callable[[], _Answer], path: bytes, deed: str) -> _Answer:
        """What `ask` returns, tried again where the network fails.

        Raises:
            AlexprepError: it goes on to fail, or the store refuses.
            FileNotFoundError: there is no such file; NotADirectoryError, IsADirectoryError: it is of the other kind.
        """
        for pause in (*PAUSES, None):
            try:
                return _asked(ask, self.display(path))
            except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
                raise
            except OSError as error:
                if pause is None or error.errno != errno.ECOMM:
                    raise self._unreadable(path, error, deed) from error
                time.sleep(pause)
        raise AssertionError  # the last pause is None

    def _unreadable(self, path: bytes, error: OSError, deed: str) -> AlexprepError:
        return AlexprepError(
            f"{self.display(path)} cannot be {deed} ({error.strerror or error}): see to the network and the permissions, "
            "then run the same command again"
        )

    def _without_ranges(self, path: bytes) -> AlexprepError:
        return AlexprepError(
            f"{self.display(path)}: the server does not answer range requests, so no part of a file can be read: copy it "
            "to a disk, or to a server that does"
        )

    def display(self, path: bytes = b"") -> str:
        """See `Files`."""
        return self._url(path)

    def covers(self, target: str, folder: bytes) -> bool:
        """See `Files`."""
        return f"{target.rstrip('/')}/".startswith(f"{self._url(folder).rstrip('/')}/")

    def _url(self, path: bytes) -> str:
        text = path.decode("utf-8", "surrogateescape")
        return "/".join(part for part in (self.url.rstrip("/"), text) if part and part != ".")


def _asked(ask: Callable[[], _Answer], where: str) -> _Answer:
    """What a store answers; OSError with errno ECOMM, which names `where`, for failures that say nothing of the file itself."""
    try:
        return ask()
    except (PermissionError, IsADirectoryError, NotADirectoryError, MemoryError, AlexprepError):
        raise
    except Exception as error:
        if isinstance(error, FileNotFoundError) and _is_absent(error):
            raise
        cause = error.__cause__ if isinstance(error, FileNotFoundError) else error
        if getattr(cause, "status", None) in _ABSENT:
            raise FileNotFoundError(str(error)) from error
        raise OSError(errno.ECOMM, f"{type(cause).__name__}: {cause}", where) from error


def _is_absent(error: FileNotFoundError) -> bool:
    """Whether the store says that there is no such file. fsspec's http calls whatever goes wrong so, and tells the cause."""
    cause = error.__cause__
    if cause is None or isinstance(cause, FileNotFoundError):
        return cause is None or _is_absent(cause)
    status = getattr(cause, "status", None)  # aiohttp's; what has a response has been looked into, as by s3fs
    return status in _ABSENT if status is not None else getattr(cause, "response", None) is not None


def _check_limit(size: int) -> None:
    if size > MAX_FILE_BYTES:
        raise OSError(f"{size:,} bytes are more than the limit of {MAX_FILE_BYTES:,}")


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


def remote_files_at(place: str) -> tuple[RemoteFiles, bytes]:
    """As `alexprep.shards.sources.files.files_at`, for a URL.

    Raises:
        AlexprepError: it cannot be reached, or there is nothing there.
    """
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
