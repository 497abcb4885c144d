"""Files behind a URL, through fsspec."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from alexprep.shards.errors import AlexprepError
from alexprep.shards.sources.files import MAX_FILE_BYTES, Entry


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
        except (FileNotFoundError, PermissionError, IsADirectoryError):
            raise
        except Exception as error:
            raise OSError(errno.ECOMM, f"{type(error).__name__}: {error}") from error
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
