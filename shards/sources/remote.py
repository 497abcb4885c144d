"""Files behind a URL, through fsspec."""

from __future__ import annotations

import contextlib
import errno
import html
import os
import re
import time
import urllib.parse
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from alexprep.shards.errors import AlexprepError
from alexprep.shards.sources.answers import Answer, asked
from alexprep.shards.sources.files import MAX_FILE_BYTES, PAUSES, Entry, local_path

_AHEAD = 2**20  # bytes that are read at once where many small reads are to come
_HTTP = ("http://", "https://")
is_url = re.compile(rb"[A-Za-z][A-Za-z0-9+.:-]*://").match


@dataclass(frozen=True)
class RemoteFiles:
    """Files behind a URL that fsspec understands: s3://, gs://, https://, memory://, …

    Attributes:
        url: of the root; empty where every path is a URL of its own. A path that is a URL is taken as it stands.
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
        system, place = self._opened(folder)
        listed = self._patiently(lambda: system.ls(place, detail=True), folder, "listed")
        own = place.rstrip("/")  # which some stores list as if it were inside itself
        paths = ((item["name"].rstrip("/"), item["type"] == "directory") for item in listed)
        name_of = _linked_name if self.url.startswith(_HTTP) else _stored_name
        names = ((name_of(path, own), is_folder) for path, is_folder in paths if path != own)
        return sorted(Entry(name, is_folder) for name, is_folder in names if name and not name.startswith(b"."))

    def size(self, path: bytes) -> int:
        """See `Files`.

        Raises:
            AlexprepError: the store cannot be reached, or does not tell it.
        """
        system, place = self._opened(path)
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
        system, place = self._opened(path)
        _check_limit(size)
        if size == 0:
            return b""
        end = None if size < 0 else offset + size
        data = bytes(asked(lambda: system.cat_file(place, offset or None, end), self.display(path)))
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
        system, place = self._opened(path)
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

    def _patiently(self, ask: Callable[[], Answer], path: bytes, deed: str) -> Answer:
        """What `ask` returns, tried again where the network fails.

        Raises:
            AlexprepError: it goes on to fail, or the store refuses.
            FileNotFoundError: there is no such file; NotADirectoryError, IsADirectoryError: it is of the other kind.
        """
        for pause in (*PAUSES, None):
            try:
                return asked(ask, self.display(path))
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
        if not self.url or is_url(path):
            return path.decode("utf-8", "backslashreplace")
        return (
            _joined(self.url, self._inner(path)).encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
        )

    def below(self, target: str, folder: bytes = b"") -> tuple[bytes, ...] | None:
        """See `Files`."""
        if local_path(target) is not None:
            return None
        opened = (self._opened(folder), _opened(target))  # or memory://x and memory:///x would be two places
        here, there = (f"{path.rstrip('/')}/" for _, path in opened)
        if opened[0][0] != opened[1][0] or not there.startswith(here):
            return None
        return tuple(part.encode("utf-8", "surrogateescape") for part in there[len(here) :].split("/") if part)

    def _opened(self, path: bytes) -> tuple[Any, str]:
        """The file system, and the path inside it. fsspec takes "::" in a URL for a chain of stores, so names go into none."""
        if not self.url or is_url(path):
            return _opened(path.decode("utf-8", "surrogateescape"))
        system, root = _opened(self.url)
        return system, _joined(root, self._inner(path))

    def _inner(self, path: bytes) -> str:
        """A path as the store writes it: a web server wants what has a meaning in a URL escaped."""
        return (
            urllib.parse.quote(path, safe="/!'()*")
            if self.url.startswith(_HTTP)
            else path.decode("utf-8", "surrogateescape")
        )


def _joined(root: str, inner: str) -> str:
    return "/".join(part for part in (root.rstrip("/"), inner) if part and part != ".")


def _stored_name(path: str, own: str) -> bytes:
    """The name of what a store lists."""
    return path.rpartition("/")[2].encode("utf-8", "surrogateescape")


def _linked_name(path: str, own: str) -> bytes:
    """The name of what a web page links, as it is on the server's disk; empty for what is no file of the folder `own`."""
    link = html.unescape(path).removeprefix(f"{own}/").removeprefix("./")
    name = b"" if re.search(r"[/?#]", link) else urllib.parse.unquote_to_bytes(link)
    return b"" if b"/" in name else name


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
    folder, _, name = place.rpartition("/")
    try:
        if system.isdir(path):
            return RemoteFiles(place.rstrip("/")), b""
        found = system.exists(path)
    except Exception as error:  # noqa: BLE001  (each store has its own kinds)
        raise AlexprepError(f"SOURCE {place} cannot be reached ({type(error).__name__}: {error})") from None
    if not found and "{" not in name:  # else a brace pattern
        raise AlexprepError(f"SOURCE {place} does not exist")
    told = urllib.parse.unquote_to_bytes(name) if place.startswith(_HTTP) else name.encode("utf-8", "surrogateescape")
    return RemoteFiles(folder), told
