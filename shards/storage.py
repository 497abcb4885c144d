"""Reads and writes files: on a local disk through `os`, on a store such as s3:// or https:// through fsspec.

Data sets and runs are written to folders that are a `Path` here and a `UPath` there (`folder_at`), by one rule: finished means
renamed. A file appears under its final name whole and on disk, or not at all. Images to be converted are read from `Files`
(`files_at`), whose paths are bytes, since names need not be text.

What the files of a data set are called and hold is the business of `dataset_format` and `manifest`.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import filecmp
import functools
import gzip
import hashlib
import html
import io
import json
import os
import re
import secrets
import stat
import tempfile
import urllib.parse
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TypeVar

from alexprep.shards.errors import AlexprepError
from alexprep.shards.patience import STALLED, patiently, whole_file

TEMPORARY_MARK = ".tmp-"
MAX_FILE_BYTES = 2**30  # no photo is that large; an endless file is
MAX_INFLATED_BYTES = 2**31  # of a gzipped file that is read as a whole: the largest known (EMNIST) has 640 MB
PAUSES = (0.1, 1.0)  # seconds before a read of a disk that failed is tried for the second and for the third time

# What systems answer where hard links are unknown: FAT, FUSE, SMB, some network folders.
_NO_LINKS = {errno.EPERM, errno.EACCES, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS}
# And where a folder cannot be synced: its renames are as durable as the file system makes them.
_NO_FOLDER_SYNC = {errno.EINVAL, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS}
# And of a link that leads nowhere or where nobody may look. Others speak of the disk, not of the link.
_BROKEN_LINK = {errno.ELOOP, errno.ENOTDIR, errno.ENAMETOOLONG, errno.EACCES, errno.EPERM}
CONNECTIONS = 20  # to an S3 store at the same time; botocore has 10, and `shard_fetcher` fetches more shards at once
_HTTP = ("http://", "https://")
_AHEAD_BYTES = 2**20  # that are read at once where many small reads are to come
_BLOCK_BYTES = 2**20  # of a file that is hashed or inflated

Result = TypeVar("Result")
is_url = re.compile(rb"[A-Za-z][A-Za-z0-9+.:-]*://").match


def local_path(place: str) -> str | None:
    """A path as it is, the path of a URL of this machine's disks, None for any other URL.

    >>> local_path("a/b"), local_path("file:///a/b"), local_path("s3://a/b")
    ('a/b', '/a/b', None)
    """
    scheme, separator, path = place.partition("://")
    if not separator:
        return place
    return path if scheme in ("file", "local") else None


def is_local(folder: Path) -> bool:
    """Whether what `folder_at` returned is on a local disk, where files can be renamed, locked and mapped."""
    return isinstance(folder, Path)


def is_place(value: Any) -> bool:
    """Whether a value names a place: a path or URL, as text, as a `Path`, or as a `UPath`, which is no os.PathLike but has a file system."""
    return isinstance(value, str | os.PathLike) or hasattr(value, "fs")


def folder_at(place: str | Path) -> Path:
    """The folder of a path or URL: a `Path`, or a `StorePath`, which has the same methods.

    A URL with a password is refused, and one of a whole store, where folders would be buckets.
    """
    if "://" not in str(place):
        return Path(place)
    from alexprep.shards.store_path import StorePath

    _check_url(str(place))
    try:
        _open_store(str(place))
        if not str(place).partition("://")[2].strip("/"):
            raise AlexprepError(f"{place} names a whole store: name a folder in it, such as s3://bucket/folder")
        return StorePath(str(place))  # type: ignore[return-value]
    except AlexprepError:
        raise
    except Exception as error:  # noqa: BLE001  (each store has its own kinds)
        words = f"{type(error).__name__}: {error}".partition("\n")[0]
        raise _cannot_open(str(place), words) from None


def _check_url(url: str) -> None:
    """Refuses passwords, which would go into logs and files."""
    scheme, _, rest = url.partition("://")
    login, _, host = rest.partition("/")[0].rpartition("@")
    if ":" in login:
        raise AlexprepError(
            f"the URL {scheme}://…@{host} has a password, which would go into logs and files: leave it out, and say it where fsspec reads "
            "settings, in the environment or in ~/.config/fsspec"
        )


def files_at(place: str) -> tuple[Files, bytes]:
    """The files of a path or URL that is to be read: (files, b"") for a folder, (files of its folder, its name) for a file.

    A name with braces that does not exist is taken for a pattern, and returned as it stands; any other is an AlexprepError.
    """
    path = local_path(place)
    if path is not None:
        absolute = os.path.abspath(os.fsencode(path))
        if os.path.isdir(absolute):
            return LocalFiles(os.path.realpath(absolute)), b""
        folder, name = os.path.split(absolute)
        found = os.path.exists(absolute)
        files: Files = LocalFiles(os.path.realpath(folder))
    else:
        system, inside = _open_store(place)
        try:
            if system.isdir(inside):
                return RemoteFiles(place.rstrip("/")), b""
            found = system.exists(inside)
        except Exception as error:  # noqa: BLE001  (each store has its own kinds)
            raise AlexprepError(f"SOURCE {place} cannot be reached ({type(error).__name__}: {error})") from None
        url, _, last = place.rpartition("/")
        files = RemoteFiles(url)
        name = urllib.parse.unquote_to_bytes(last) if place.startswith(_HTTP) else _as_bytes(last)
    if not found and b"{" not in name:
        raise AlexprepError(f"SOURCE {place} does not exist")
    return files, name


def _open_store(url: str) -> tuple[Any, str]:
    """The file system of a URL, which fsspec keeps for the next call, and the path inside it."""
    import fsspec

    # Of a user's own settings none is changed.
    fsspec.config.conf.setdefault("s3", {}).setdefault("config_kwargs", {}).setdefault(
        "max_pool_connections", CONNECTIONS
    )
    try:
        return fsspec.core.url_to_fs(url)  # type: ignore[no-any-return]
    except ImportError as error:
        raise AlexprepError(f"{url} needs a package that is not installed: {error}") from None
    except ValueError as error:
        raise _cannot_open(url, str(error)) from None


def _cannot_open(url: str, words: str) -> AlexprepError:
    return AlexprepError(f"{url} is no place that fsspec can open ({words}): name a folder, or a URL such as s3://…")


# Writing: whole files under their final names


@contextlib.contextmanager
def published(path: Path, first: bool = False) -> Iterator[BinaryIO]:
    """A binary file to write to; it gets its name `path` only when the block ends without an exception.

    The order is: write under a temporary name in the same folder, fsync the file, rename, fsync the folder. The lock that
    is held meanwhile tells `remove_temporaries` that the writer lives. After an exception the temporary file is removed
    and `path` is untouched. A file that has these very bytes already stays as it is. Stores that cannot rename are written
    by one upload of the whole, which object stores make visible only when it is complete.

    With `first`, a file that is there stays, whatever it holds.
    """
    if not is_local(path):
        with tempfile.TemporaryFile() as spool:
            yield spool
            spool.seek(0)
            publish_bytes(path, spool.read())
        return
    with _temporary(path) as (temporary, file):
        yield file
        file.flush()
        os.fsync(file.fileno())
        if first:
            _link(temporary, path)
        elif not (path.exists() and filecmp.cmp(temporary, path, shallow=False)):
            os.rename(temporary, path)
    sync_folder(path.parent)


def publish_bytes(path: Path, data: bytes) -> None:
    """Writes `data` as the whole of `path`, atomically and durably."""
    if not is_local(path):
        make_folder(path.parent)
        with _writable(path):
            _upload(path, data)
        return
    with published(path) as file:
        file.write(data)


def publish_json(path: Path, document: Any) -> None:
    """Writes `document` as JSON, atomically and durably."""
    publish_bytes(path, json_bytes(document))


def publish_first(path: Path, data: bytes) -> bytes:
    """Writes `path` unless it exists; returns what it holds then. Of several writers exactly one wins.

    (On stores that cannot link, two writers at the same instant may both believe that they won.)
    """
    if path.exists():
        return path.read_bytes()
    with published(path, first=True) as file:
        file.write(data)
    return path.read_bytes() if is_local(path) else data


def make_folder(folder: Path) -> None:
    """Makes a folder with those above it, unless it is there; AlexprepError on a store that cannot be written."""
    with _writable(folder):
        folder.mkdir(parents=True, exist_ok=True)


def sync_folder(folder: Path) -> None:
    """Makes renames inside `folder` survive a power cut, as far as its file system can promise that."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _NO_FOLDER_SYNC:
            error.filename = str(folder)
            raise
    finally:
        os.close(descriptor)


def is_temporary(name: str) -> bool:
    """Whether a file name is one that `published` gives to unfinished files."""
    return name.startswith(".") and TEMPORARY_MARK in name


def remove_temporaries(folder: Path) -> None:
    """Deletes what interrupted writers left in `folder` (not below it); files of living writers are locked, and stay.

    Where there are no locks nothing is deleted; a leftover takes room, but harms no reader. Files are opened for writing,
    since NFS gives an exclusive lock on nothing else.
    """
    if not is_local(folder):
        return
    for leftover in folder.glob(f".*{TEMPORARY_MARK}*"):
        with contextlib.suppress(OSError), open(leftover, "rb+") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            leftover.unlink(missing_ok=True)


@contextlib.contextmanager
def _temporary(path: Path) -> Iterator[tuple[Path, BinaryIO]]:
    """A new locked file beside `path`; what is left of it at the end is removed."""
    while True:
        temporary = path.with_name(f".{path.name}{TEMPORARY_MARK}{os.getpid()}-{secrets.token_hex(4)}")
        try:
            with open(temporary, "xb+") as file:
                with contextlib.suppress(OSError):  # some file systems have no locks: see remove_temporaries
                    fcntl.flock(file, fcntl.LOCK_EX)
                if not temporary.exists():  # another writer tidied up in the instant before the lock
                    continue
                yield temporary, file
                return
        except OSError as error:
            if str(error.filename or temporary) == str(temporary):  # a failed write or fsync does not say where
                error.filename, error.filename2 = str(path), None
            raise
        finally:
            temporary.unlink(missing_ok=True)


def _link(temporary: Path, path: Path) -> None:
    """Gives a file its name unless it is taken."""
    try:
        os.link(temporary, path)
    except FileExistsError:
        return
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        if not path.exists():
            os.rename(temporary, path)


def _upload(path: Path, data: bytes) -> None:
    """Writes the whole of a file to a store, again where the way to it fails."""
    try:
        patiently(lambda: path.write_bytes(data), str(path))
    except OSError as error:
        if isinstance(error.__cause__, NotImplementedError):
            raise error.__cause__ from None
        raise


@contextlib.contextmanager
def _writable(path: Path) -> Iterator[None]:
    try:
        yield
    except NotImplementedError as error:
        raise AlexprepError(
            f"{path} cannot be written: this kind of store is only read; name a folder, or a URL such as s3://…"
        ) from error


# Contents and digests of whole files


def json_bytes(document: Any, indent: int | None = 1) -> bytes:
    """A document as JSON with a final newline; NaN and infinity are refused (ValueError)."""
    return (json.dumps(document, indent=indent, allow_nan=False) + "\n").encode()


def digest_json(document: Any) -> str:
    """The sha256, in hex, of a document's canonical JSON (sorted keys, no spaces)."""
    return hashlib.sha256(json.dumps(document, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def file_sha256(path: Path) -> str:
    """The sha256 of a file, hex."""
    if not is_local(path):
        return hashlib.sha256(path.read_bytes()).hexdigest()
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()


def content(path: Path) -> tuple[bytes | None, str]:
    """A file's content and ""; or None and what is wrong with it.

    It is read, not mapped: a bad sector below a mapping would end the process.
    """
    try:
        return path.read_bytes(), ""
    except OSError as error:
        return None, trouble(error)


def trouble(error: OSError) -> str:
    """What is wrong with a file that was to be read, as the end of the sentence "FILE …"."""
    return "is missing" if isinstance(error, FileNotFoundError) else f"cannot be read ({error.strerror or error})"


def expected_bytes(path: Path, size: int) -> bytes:
    """A file's content, of which so many bytes are expected: in a store it may take the longer."""
    return path.read_bytes() if is_local(path) else path.read_bytes(size)  # type: ignore[call-arg]


def modified(path: Path) -> int:
    """When a file was written last, nanoseconds of Unix time, as exactly as its system or store tells."""
    return path.stat().st_mtime_ns if is_local(path) else path.modified()  # type: ignore[attr-defined]


def as_now(folder: Path) -> Path:
    """The same folder, of which a store is asked anew from now on, whatever it said before."""
    if not is_local(folder):
        folder.forget()  # type: ignore[attr-defined]
    return folder


def user_cache() -> Path | None:
    """Where this user's caches of alexprep lie: in $XDG_CACHE_HOME or ~/.cache; None where neither is an absolute path."""
    folders = (Path(os.environ.get("XDG_CACHE_HOME", "")), Path(os.path.expanduser("~/.cache")))
    return next((folder / "alexprep" for folder in folders if folder.is_absolute()), None)


def as_text(name: bytes) -> str:
    """A name or path for messages and ledgers: bytes that are not UTF-8 are written as escapes."""
    return name.decode("utf-8", "backslashreplace")


def _as_bytes(name: str) -> bytes:
    return name.encode("utf-8", "surrogateescape")


def _as_str(name: bytes) -> str:
    return name.decode("utf-8", "surrogateescape")


# Reading: files below a root


class Entry(NamedTuple):
    """One name in a folder."""

    name: bytes
    is_folder: bool


class Files(ABC):
    """Files below a root, to be read; a path is bytes, below the root. Sent to worker processes, so it holds no open file.

    Attributes:
        remote: whether every read crosses a network, so that several should be under way at once.
    """

    remote: bool

    def entries(self, folder: bytes = b"") -> list[Entry]:
        """What is in a folder, ascending by name, links followed, hidden names left out; [] where there is no such folder."""
        try:
            listed = self.listed(folder, links=True)
            return sorted(Entry(name, bool(is_folder)) for name, is_folder in listed if not name.startswith(b"."))
        except (FileNotFoundError, NotADirectoryError):
            return []

    def file_names(self, folder: bytes = b"") -> list[bytes]:
        """The names in a folder that are no folders, as `entries` gives them."""
        return [entry.name for entry in self.entries(folder) if not entry.is_folder]

    def folder_names(self, folder: bytes = b"") -> list[bytes]:
        """The names of the folders in a folder, as `entries` gives them."""
        return [entry.name for entry in self.entries(folder) if entry.is_folder]

    @abstractmethod
    def listed(self, folder: bytes, *, links: bool) -> Iterable[tuple[bytes, bool | None]]:
        """Each name in a folder, hidden ones too, in no order, and whether it is a folder's.

        A link to a folder is one where `links` says so, and else None.
        """

    @abstractmethod
    def inside(self, folder: bytes) -> Files:
        """The same files with a folder of them as the root."""

    @abstractmethod
    def size(self, path: bytes) -> int:
        """Bytes of a regular file; OSError where there is none. AlexprepError: the store does not tell it."""

    @abstractmethod
    def read(self, path: bytes, offset: int = 0, size: int = -1) -> bytes:
        """`size` bytes from `offset`, or all to the end; OSError where they cannot be had, or are too many.

        A disk is asked once, a store as long as the patience lasts. The error's errno is ECOMM where the way to the file failed, not the
        file. AlexprepError: the server sends whole files where parts are asked for.
        """

    @abstractmethod
    def reading(self, path: bytes) -> AbstractContextManager[Callable[[int, int], bytes]]:
        """A function (offset, size) → bytes, fewer only at the file's end, for many small reads of one file."""

    @abstractmethod
    def display(self, path: bytes = b"") -> str:
        """A path for messages."""

    @abstractmethod
    def below(self, target: str, folder: bytes = b"") -> tuple[bytes, ...] | None:
        """The names that lead from a folder to `target` (a path or URL), links followed; None where it lies elsewhere."""


@dataclass(frozen=True)
class LocalFiles(Files):
    """Files on a disk. A path that is a URL, as a table may give it, is taken as it stands.

    Attributes:
        root: absolute path, as bytes.
        remote: whether most paths are URLs.
    """

    root: bytes
    remote: bool = False

    def listed(self, folder: bytes, *, links: bool) -> Iterator[tuple[bytes, bool | None]]:
        """See `Files`."""
        with os.scandir(os.path.join(self.root, folder)) as found:
            for entry in found:
                is_folder = _is_folder(entry)
                yield entry.name, is_folder if links or not (is_folder and entry.is_symlink()) else None

    def inside(self, folder: bytes) -> LocalFiles:
        """See `Files`."""
        return LocalFiles(os.path.join(self.root, folder), self.remote) if folder else self

    def size(self, path: bytes) -> int:
        """See `Files`."""
        return _anywhere.size(path) if is_url(path) else os.stat(os.path.join(self.root, path)).st_size

    def read(self, path: bytes, offset: int = 0, size: int = -1) -> bytes:
        """See `Files`."""
        if is_url(path):
            return _anywhere.read(path, offset, size)
        with open_regular(os.path.join(self.root, path)) as file:
            wanted = max(0, os.fstat(file.fileno()).st_size - offset) if size < 0 else size
            _check_limit(wanted)
            file.seek(offset)
            return file.read(wanted)  # a file that grows meanwhile is read to its old length

    @contextlib.contextmanager
    def reading(self, path: bytes) -> Iterator[Callable[[int, int], bytes]]:
        """See `Files`."""
        with open(os.path.join(self.root, path), "rb", buffering=0) as file:
            yield lambda offset, size: os.pread(file.fileno(), size, offset)

    def display(self, path: bytes = b"") -> str:
        """See `Files`."""
        return as_text(path if is_url(path) else os.path.join(self.root, path).rstrip(b"/"))

    def below(self, target: str, folder: bytes = b"") -> tuple[bytes, ...] | None:
        """See `Files`."""
        path = local_path(target)
        if path is None:
            return None
        there, here = os.path.realpath(os.fsencode(path)), os.path.realpath(os.path.join(self.root, folder))
        if os.path.commonpath((there, here)) != here:
            return None
        return tuple(part for part in there[len(here) :].split(b"/") if part)


@dataclass(frozen=True)
class RemoteFiles(Files):
    """Files behind a URL that fsspec understands: s3://, gs://, https://, memory://, …

    All is asked again where the network fails, as long as the patience lasts. Then, or where the store refuses, listing, sizes and `reading`
    raise AlexprepError.

    Attributes:
        url: of the root; empty where every path is a URL of its own. A path that is a URL is taken as it stands.
    """

    url: str
    remote = True

    def listed(self, folder: bytes, *, links: bool) -> Iterator[tuple[bytes, bool | None]]:
        """See `Files`."""
        system, place = self._opened(folder)
        try:
            listed = self._patiently(lambda: system.ls(place, detail=True), folder, "listed")
        except (FileNotFoundError, NotADirectoryError) as error:
            if links:
                raise
            raise self._failed(folder, "listed", error) from error  # it was there when the folder above was listed
        own = place.rstrip("/")  # which some stores list as if it were inside itself
        for item in listed:
            path = item["name"].rstrip("/")
            name = b"" if path == own else self._name(path, own)
            if name:
                yield name, item["type"] == "directory"

    def inside(self, folder: bytes) -> RemoteFiles:
        """See `Files`."""
        return RemoteFiles(self._joined(self.url, folder)) if folder else self

    def size(self, path: bytes) -> int:
        """See `Files`."""
        system, place = self._opened(path)
        size = self._patiently(lambda: system.size(place), path, "read")
        if size is None:
            raise AlexprepError(
                f"{self.display(path)}: the server does not tell its size, without which it cannot be read in parts: copy "
                "it to a disk"
            )
        return int(size)

    def read(self, path: bytes, offset: int = 0, size: int = -1) -> bytes:
        """See `Files`."""
        system, place = self._opened(path)
        _check_limit(size)
        if size == 0:
            return b""
        end = None if size < 0 else offset + size
        # By name: s3fs has a version before them.
        part = functools.partial(system.cat_file, place, start=offset, end=end)
        ask = functools.partial(whole_file, system, place) if size < 0 and not offset else part
        data = bytes(patiently(ask, self.display(path), seconds=lambda: STALLED))
        _check_limit(len(data))
        if 0 < size < len(data):
            raise self._without_ranges(path)
        return data

    @contextlib.contextmanager
    def reading(self, path: bytes) -> Iterator[Callable[[int, int], bytes]]:
        """See `Files`; reads ahead, so that neighbours need one request."""
        system, place = self._opened(path)
        with self._patiently(lambda: system.open(place, "rb", block_size=_AHEAD_BYTES), path, "read") as file:
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

    def display(self, path: bytes = b"") -> str:
        """See `Files`."""
        return as_text(path if not self.url or is_url(path) else _as_bytes(self._joined(self.url, path)))

    def below(self, target: str, folder: bytes = b"") -> tuple[bytes, ...] | None:
        """See `Files`."""
        if local_path(target) is not None:
            return None
        opened = (self._opened(folder), _open_store(target))  # or memory://x and memory:///x would be two places
        here, there = (f"{path.rstrip('/')}/" for _, path in opened)
        if opened[0][0] != opened[1][0] or not there.startswith(here):
            return None
        return tuple(_as_bytes(part) for part in there[len(here) :].split("/") if part)

    def _opened(self, path: bytes) -> tuple[Any, str]:
        """The file system, and the path inside it. fsspec takes "::" in a URL for a chain of stores, so names go into none."""
        if not self.url or is_url(path):
            return _open_store(_as_str(path))
        system, root = _open_store(self.url)
        return system, self._joined(root, path)

    def _joined(self, root: str, path: bytes) -> str:
        """A path below `root`, as the store writes it: a web server wants what has a meaning in a URL escaped."""
        inner = urllib.parse.quote(path, safe="/!'()*") if self.url.startswith(_HTTP) else _as_str(path)
        return "/".join(part for part in (root.rstrip("/"), inner) if part and part != ".")

    def _name(self, path: str, own: str) -> bytes:
        """The name of what the folder `own` lists; empty for a link of a web page that is no file of the folder."""
        if not self.url.startswith(_HTTP):
            return _as_bytes(path.rpartition("/")[2])
        link = html.unescape(path).removeprefix(f"{own}/").removeprefix("./")
        name = b"" if re.search(r"[/?#]", link) else urllib.parse.unquote_to_bytes(link)
        return b"" if b"/" in name else name

    def _patiently(self, ask: Callable[[], Result], path: bytes, what: str) -> Result:
        """What `ask` returns, asked again where the network fails. That there is no such file, or folder, is left to the caller."""
        try:
            return patiently(ask, self.display(path))
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
            raise
        except OSError as error:
            raise self._failed(path, what, error) from error

    def _failed(self, path: bytes, what: str, error: OSError) -> AlexprepError:
        return AlexprepError(
            f"{self.display(path)} cannot be {what} ({error.strerror or error}): see to the network and the permissions, "
            "then run the same command again"
        )

    def _without_ranges(self, path: bytes) -> AlexprepError:
        return AlexprepError(
            f"{self.display(path)}: the server does not answer range requests, so no part of a file can be read: copy it "
            "to a disk, or to a server that does"
        )


_anywhere = RemoteFiles("")


def open_regular(path: bytes) -> BinaryIO:
    """A file on a disk, to be read; OSError if it is not a regular one: opening a named pipe would wait for ever."""
    file = open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb")  # noqa: SIM115
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise OSError("not a regular file")
    return file


def inflate(data: bytes, shown: str) -> bytes:
    """Data, decompressed if they are gzipped, in one part or several; OSError, which names `shown`, if damaged or too much."""
    if data[:2] != b"\x1f\x8b":
        return data
    parts: list[bytes] = []
    total = 0
    try:
        with gzip.GzipFile(fileobj=io.BytesIO(data)) as stream:
            while part := stream.read(_BLOCK_BYTES):
                parts.append(part)
                total += len(part)
                if total > MAX_INFLATED_BYTES:
                    raise OSError(f"{shown} inflates to more than the limit of {MAX_INFLATED_BYTES:,} bytes")
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise OSError(f"{shown} is a damaged gzip file, or was cut short ({error})") from None
    return b"".join(parts)


@functools.lru_cache(maxsize=4)
def read_inflated(files: Files, path: bytes) -> bytes:
    """A whole file, as `inflate` gives it; kept, since its records are read in any order."""
    return inflate(files.read(path), files.display(path))


def _is_folder(entry: os.DirEntry[bytes]) -> bool:
    """Whether an entry is a folder or a link to one. A link that leads nowhere is none: whoever reads it learns why."""
    try:
        return entry.is_dir()
    except OSError as error:
        if error.errno in _BROKEN_LINK:
            return False
        raise


def _check_limit(size: int) -> None:
    if size > MAX_FILE_BYTES:
        raise OSError(f"{size:,} bytes are more than the limit of {MAX_FILE_BYTES:,}")
