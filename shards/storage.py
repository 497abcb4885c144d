"""Finished means renamed: files appear under their final name whole and on disk, or not at all.

A folder is a path on a local disk or a `UPath` on a store that fsspec opens. Stores that cannot rename are written by one
upload of the whole file, which object stores make visible only when it is complete.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import functools
import hashlib
import html
import json
import os
import re
import secrets
import stat
import tempfile
import time
import urllib.parse
import zlib
from collections.abc import Callable, Hashable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, Protocol, TypeVar

from alexprep.shards.errors import AlexprepError

# -------------------- Finished means renamed: files appear under their final name whole and on disk, or not at all.


TEMPORARY_MARK = ".tmp-"

# What systems answer where hard links are unknown: FAT, FUSE, SMB, some network folders.
_NO_LINKS = {errno.EPERM, errno.EACCES, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS}
# And where a folder cannot be synced: its renames are as durable as the file system makes them.
_NO_FOLDER_SYNC = {errno.EINVAL, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS}


def folder_at(place: str | Path) -> Path:
    """The folder of a path or URL: a `Path`, or a `UPath`, which has the same methods.

    Raises:
        AlexprepError: the URL is of no kind that fsspec knows, or what opens it is not installed.
    """
    if "://" not in str(place):
        return Path(place)
    from upath import UPath

    try:
        folder = UPath(str(place))
        folder.fs  # noqa: B018  (imports what opens it)
    except ImportError as error:
        raise AlexprepError(f"{place} needs a package that is not installed: {error}") from None
    except Exception as error:  # noqa: BLE001  (each store has its own kinds)
        words = f"{type(error).__name__}: {error}".partition("\n")[0]
        raise AlexprepError(
            f"{place} is no place that fsspec can open ({words}): name a folder, or a URL such as s3://…"
        ) from None
    return folder  # type: ignore[return-value]


def is_local(path: Path) -> bool:
    """Whether a path is on a local disk, where files can be renamed and mapped."""
    return isinstance(path, Path)


@contextlib.contextmanager
def published(path: Path) -> Iterator[BinaryIO]:
    """A binary file to write to; it gets its name `path` only when the block ends without an exception.

    The order is: write under a temporary name in the same folder, fsync the file, rename, fsync the folder. The lock that
    is held meanwhile tells `remove_temporaries` that the writer lives. After an exception the temporary file is removed
    and `path` is untouched. A file that has these very bytes already stays as it is.
    """
    if not is_local(path):
        with tempfile.TemporaryFile() as spool:
            yield spool
            spool.seek(0)
            _store(path, spool.read())
        return
    with _temporary(path) as (temporary, file):
        yield file
        file.flush()
        os.fsync(file.fileno())
        if not same_bytes(temporary, path):
            os.rename(temporary, path)
    sync_folder(path.parent)


def publish_bytes(path: Path, data: bytes) -> None:
    """Writes `data` as the whole of `path`, atomically and durably."""
    with published(path) as file:
        file.write(data)


def publish_first(path: Path, data: bytes) -> bytes:
    """Writes `path` unless it exists; returns what it holds then. Of several writers exactly one wins.

    (On stores that cannot link, two writers at the same instant may both believe that they won.)
    """
    if path.exists():
        return path.read_bytes()
    if not is_local(path):
        _store(path, data)
        return data
    with _temporary(path) as (temporary, file):
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
        with contextlib.suppress(FileExistsError):
            try:
                os.link(temporary, path)
            except OSError as error:
                if error.errno not in _NO_LINKS:
                    raise
                if not path.exists():
                    os.rename(temporary, path)
    sync_folder(path.parent)
    return path.read_bytes()


def _store(path: Path, data: bytes) -> None:
    """One upload."""
    make_folder(path.parent)
    with _writable(path):
        path.write_bytes(data)


def make_folder(folder: Path) -> None:
    """Makes a folder with those above it, unless it is there.

    Raises:
        AlexprepError: it is on a store that cannot be written.
    """
    with _writable(folder):
        folder.mkdir(parents=True, exist_ok=True)


@contextlib.contextmanager
def _writable(path: Path) -> Iterator[None]:
    try:
        yield
    except NotImplementedError as error:
        raise AlexprepError(
            f"{path} cannot be written: this kind of store is only read; name a folder, or a URL such as s3://…"
        ) from error


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


def json_bytes(document: Any, indent: int | None = 1) -> bytes:
    """A document as JSON with a final newline; NaN and infinity are refused (ValueError)."""
    return (json.dumps(document, indent=indent, allow_nan=False) + "\n").encode()


def publish_json(path: Path, document: Any) -> None:
    """Writes `document` as JSON, atomically and durably."""
    publish_bytes(path, json_bytes(document))


def same_bytes(one: Path, other: Path) -> bool:
    """Whether both are files of the same content."""
    with contextlib.suppress(FileNotFoundError):
        if one.stat().st_size == other.stat().st_size:
            return file_sha256(one) == file_sha256(other)
    return False


def content(path: Path) -> tuple[bytes | None, str]:
    """A file's content and ""; or None and what is wrong with it.

    It is read, not mapped: a bad sector below a mapping would end the process.
    """
    try:
        return path.read_bytes(), ""
    except OSError as error:
        return None, trouble(error)


def trouble(error: OSError) -> str:
    """What is wrong with a file that was to be read."""
    return "is missing" if isinstance(error, FileNotFoundError) else f"cannot be read ({error.strerror or error})"


def file_sha256(path: Path) -> str:
    """The sha256 of a file, hex."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


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


def digest_json(document: Any) -> str:
    """The sha256, in hex, of a document's canonical JSON (sorted keys, no spaces)."""
    return hashlib.sha256(json.dumps(document, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def user_cache() -> Path | None:
    """Where this user's caches of alexprep lie: in $XDG_CACHE_HOME or ~/.cache; None where neither is an absolute path."""
    folders = (Path(os.environ.get("XDG_CACHE_HOME", "")), Path(os.path.expanduser("~/.cache")))
    return next((folder / "alexprep" for folder in folders if folder.is_absolute()), None)


# -------------------- What a store's answers mean: which failures are the file's own, and which are those of the way to it.


_ABSENT = (404, 410)  # HTTP: not found, gone
Answer = TypeVar("Answer")


def asked(ask: Callable[[], Answer], where: str) -> Answer:
    """What a store answers. Errors name `where`: errno ENOENT if there is no such file, ECOMM if nothing is said of it."""
    try:
        return ask()
    except (PermissionError, IsADirectoryError, NotADirectoryError, MemoryError, AlexprepError):
        raise
    except Exception as error:
        cause = error.__cause__ if isinstance(error, FileNotFoundError) else error
        if getattr(cause, "status", None) in _ABSENT or (isinstance(error, FileNotFoundError) and _is_absent(error)):
            raise FileNotFoundError(errno.ENOENT, "not found", where) from error
        raise OSError(errno.ECOMM, f"{type(cause).__name__}: {cause}", where) from error


def _is_absent(error: FileNotFoundError) -> bool:
    """Whether the store says that there is no such file. fsspec's http calls whatever goes wrong so, and tells the cause."""
    cause = error.__cause__
    if cause is None or isinstance(cause, FileNotFoundError):
        return cause is None or _is_absent(cause)
    status = getattr(cause, "status", None)  # aiohttp's; what has a response has been looked into, as by s3fs
    return status in _ABSENT if status is not None else getattr(cause, "response", None) is not None


# -------------------- Reading files below a root, on a local disk or on anything that fsspec opens. Paths are bytes: names need not be text.


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


# -------------------- Files behind a URL, through fsspec.


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
    """As `alexprep.shards.storage.files_at`, for a URL.

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
