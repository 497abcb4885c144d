"""Finished means renamed: files appear under their final name whole and on disk, or not at all.

A folder is a path on a local disk or a `UPath` on a store that fsspec opens. Stores that cannot rename are written by one
upload of the whole file, which object stores make visible only when it is complete.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import secrets
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from alexprep.shards.errors import AlexprepError

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
